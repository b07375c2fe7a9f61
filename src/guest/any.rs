//! A guest of any kind, for those who do not care which.

use std::time::Duration;

use super::RunState;
use super::builtin::BuiltinGuest;
use super::builtin::stopped::StoppedGuest;
use super::qemu::QemuGuest;
use super::{
    Base, Chunk, Contents, Cut, CutId, CutStrategy, Guest, GuestError, GuestInfo, Round, Still,
};

/// See the module.
pub enum AnyGuest {
    /// Of our own monitor.
    Builtin(Box<BuiltinGuest>),
    /// Of stock QEMU.
    Qemu(Box<QemuGuest>),
    /// Switched off.
    Stopped(Box<StoppedGuest>),
}

macro_rules! any {
    ($self:expr, $guest:ident => $call:expr) => {
        match $self {
            Self::Builtin($guest) => $call,
            Self::Qemu($guest) => $call,
            Self::Stopped($guest) => $call,
        }
    };
}

impl AnyGuest {
    /// Its process; `None` if it is switched off.
    pub fn pid(&self) -> Option<u32> {
        match self {
            Self::Builtin(guest) => Some(guest.pid()),
            Self::Qemu(guest) => Some(guest.pid()),
            Self::Stopped(_) => None,
        }
    }

    /// Lets go of it in good order; it runs on.
    pub async fn detach(self) -> Result<(), GuestError> {
        match self {
            // The end of the connection is all it needs.
            Self::Builtin(_) | Self::Stopped(_) => Ok(()),
            Self::Qemu(guest) => guest.detach().await,
        }
    }

    /// How its checkpoints are taken and why so, where there is a choice.
    pub fn method(&self) -> Option<String> {
        match self {
            Self::Builtin(_) | Self::Stopped(_) => None,
            Self::Qemu(guest) => Some(guest.choice().to_string()),
        }
    }
}

impl Guest for AnyGuest {
    fn info(&self) -> &GuestInfo {
        any!(self, guest => guest.info())
    }

    async fn state(&mut self) -> Result<RunState, GuestError> {
        any!(self, guest => guest.state().await)
    }

    fn round_pauses(&self) -> bool {
        any!(self, guest => guest.round_pauses())
    }

    async fn round(&mut self, contents: Contents) -> Result<Round, GuestError> {
        any!(self, guest => guest.round(contents).await)
    }

    async fn cut(&mut self, strategy: CutStrategy) -> Result<Cut, GuestError> {
        any!(self, guest => guest.cut(strategy).await)
    }

    async fn last_cut(
        &mut self,
        strategy: CutStrategy,
        still: Still,
    ) -> Result<(Cut, Duration), GuestError> {
        any!(self, guest => guest.last_cut(strategy, still).await)
    }

    async fn disarm(&mut self) -> Result<(), GuestError> {
        any!(self, guest => guest.disarm().await)
    }

    async fn cut_held(
        &mut self,
        strategy: CutStrategy,
        within: Duration,
    ) -> Result<Cut, GuestError> {
        any!(self, guest => guest.cut_held(strategy, within).await)
    }

    async fn release(&mut self) -> Result<bool, GuestError> {
        any!(self, guest => guest.release().await)
    }

    async fn slow(&mut self, percent: u8, within: Duration) -> Result<bool, GuestError> {
        any!(self, guest => guest.slow(percent, within).await)
    }

    fn disk_news(&mut self) -> Option<String> {
        any!(self, guest => guest.disk_news())
    }

    async fn next_chunk(&mut self) -> Result<Option<Chunk>, GuestError> {
        any!(self, guest => guest.next_chunk().await)
    }

    async fn settle(&mut self, id: CutId, base: Base) -> Result<(), GuestError> {
        any!(self, guest => guest.settle(id, base).await)
    }

    async fn give_back(&mut self) -> Result<(), GuestError> {
        any!(self, guest => guest.give_back().await)
    }

    async fn pause(&mut self) -> Result<(), GuestError> {
        any!(self, guest => guest.pause().await)
    }

    async fn resume(&mut self) -> Result<(), GuestError> {
        any!(self, guest => guest.resume().await)
    }

    async fn stop(&mut self) -> Result<(), GuestError> {
        any!(self, guest => guest.stop().await)
    }
}
