//! A guest of either kind, for those who do not care which.

use super::RunState;
use super::builtin::BuiltinGuest;
use super::qemu::QemuGuest;
use super::{Base, Chunk, Contents, Cut, CutId, CutStrategy, Guest, GuestError, GuestInfo, Round};

/// See the module.
pub enum AnyGuest {
    /// Of our own monitor.
    Builtin(Box<BuiltinGuest>),
    /// Of stock QEMU.
    Qemu(Box<QemuGuest>),
}

macro_rules! either {
    ($self:expr, $guest:ident => $call:expr) => {
        match $self {
            Self::Builtin($guest) => $call,
            Self::Qemu($guest) => $call,
        }
    };
}

impl AnyGuest {
    /// Its process.
    pub fn pid(&self) -> u32 {
        either!(self, guest => guest.pid())
    }

    /// Lets go of it in good order; it runs on.
    pub async fn detach(self) -> Result<(), GuestError> {
        match self {
            // The end of the connection is all it needs.
            Self::Builtin(_) => Ok(()),
            Self::Qemu(guest) => guest.detach().await,
        }
    }

    /// How its checkpoints are taken and why so, where there is a choice.
    pub fn method(&self) -> Option<String> {
        match self {
            Self::Builtin(_) => None,
            Self::Qemu(guest) => Some(guest.choice().to_string()),
        }
    }
}

impl Guest for AnyGuest {
    fn info(&self) -> &GuestInfo {
        either!(self, guest => guest.info())
    }

    async fn state(&mut self) -> Result<RunState, GuestError> {
        either!(self, guest => guest.state().await)
    }

    async fn round(&mut self, contents: Contents) -> Result<Round, GuestError> {
        either!(self, guest => guest.round(contents).await)
    }

    async fn cut(&mut self, strategy: CutStrategy) -> Result<Cut, GuestError> {
        either!(self, guest => guest.cut(strategy).await)
    }

    fn disk_news(&mut self) -> Option<String> {
        either!(self, guest => guest.disk_news())
    }

    async fn next_chunk(&mut self) -> Result<Option<Chunk>, GuestError> {
        either!(self, guest => guest.next_chunk().await)
    }

    async fn settle(&mut self, id: CutId, base: Base) -> Result<(), GuestError> {
        either!(self, guest => guest.settle(id, base).await)
    }

    async fn give_back(&mut self) -> Result<(), GuestError> {
        either!(self, guest => guest.give_back().await)
    }

    async fn pause(&mut self) -> Result<(), GuestError> {
        either!(self, guest => guest.pause().await)
    }

    async fn resume(&mut self) -> Result<(), GuestError> {
        either!(self, guest => guest.resume().await)
    }

    async fn stop(&mut self) -> Result<(), GuestError> {
        either!(self, guest => guest.stop().await)
    }
}
