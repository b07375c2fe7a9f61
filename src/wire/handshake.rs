//! The first messages of a link: who are you, which version do we speak.
//!
//! ```text
//!   primary                                    standby
//!   Hello{versions, site} ───────────────────▶ site as certified? version in common?
//!   site as expected? version in range? ◀───── HelloReply{version, site}
//!                                       ◀───── or Refused{reason, text}, and the link ends
//! ```
//!
//! Only after this is a session up: with TLS 1.3 a client whose certificate the server refuses has
//! connected all the same, and learns of it when it first reads. Both sides compare the site that is
//! said with the site that the certificate says. No time limit here: callers put one around it.

use super::limits;
use super::link::{HandshakeFailure, LinkError, LinkRx, LinkTx, RetryClass};
use super::message::{Hello, HelloReply, RefuseReason, ToPrimary, ToStandby};
use super::version::Versions;
use crate::clock::Timestamp;
use crate::ids::SiteId;

/// What a site says of itself.
#[derive(Debug, Clone)]
pub struct Introduction {
    /// The site.
    pub site: SiteId,
    /// Program and version, for people.
    pub build: String,
    /// Protocol versions it speaks; [`Versions::OURS`] except in tests.
    pub versions: Versions,
}

impl Introduction {
    /// This program and its version.
    pub fn build() -> &'static str {
        concat!("lifeboat ", env!("CARGO_PKG_VERSION"))
    }

    /// This program, as `site`.
    pub fn new(site: SiteId) -> Self {
        Self {
            site,
            build: Self::build().to_owned(),
            versions: Versions::OURS,
        }
    }
}

/// What the standby knows after the hellos.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Greeted {
    /// The version to speak.
    pub version: u16,
    /// What the primary said.
    pub hello: Hello,
}

/// Why the hellos did not lead to a session.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// The link ended.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The peer refused us.
    #[error("the peer refused: {text}")]
    Refused {
        /// Why.
        reason: RefuseReason,
        /// In its words.
        text: String,
    },
    /// No version in common.
    #[error(
        "no protocol version in common: this site speaks {ours}, the peer {theirs}; upgrade the older site"
    )]
    Version {
        /// What we speak.
        ours: Versions,
        /// What the peer speaks.
        theirs: Versions,
    },
    /// The peer says it is another site than its certificate says.
    #[error(
        "the peer says that it is site {said}, but its certificate is for site {certified}: \
         its configuration and its certificate do not belong together"
    )]
    WrongSite {
        /// The site it says.
        said: SiteId,
        /// The site of its certificate.
        certified: SiteId,
    },
    /// Another message where a hello has to be.
    #[error("the peer's first message is no hello: it does not speak this protocol")]
    NoHello,
}

impl HandshakeError {
    /// Whether it makes sense to dial again soon.
    pub fn retry(&self) -> RetryClass {
        match self {
            Self::Link(error) => error.retry(),
            Self::Refused {
                reason: RefuseReason::ShuttingDown | RefuseReason::Busy | RefuseReason::NoSpace,
                ..
            } => RetryClass::Transient,
            _ => RetryClass::Permanent,
        }
    }

    /// The label under which it is counted.
    pub fn failure(&self) -> HandshakeFailure {
        match self {
            Self::Link(error) => error.failure(),
            Self::WrongSite { .. }
            | Self::Refused {
                reason: RefuseReason::WrongSite | RefuseReason::NotAllowed,
                ..
            } => HandshakeFailure::WrongSite,
            Self::Version { .. } | Self::NoHello => HandshakeFailure::Protocol,
            Self::Refused { reason, .. } => match reason {
                RefuseReason::Version | RefuseReason::Protocol => HandshakeFailure::Protocol,
                _ => HandshakeFailure::Other,
            },
        }
    }
}

/// The primary's side. `certified` is the site that the peer's certificate names.
pub async fn as_primary(
    tx: &mut impl LinkTx<ToStandby>,
    rx: &mut impl LinkRx<ToPrimary>,
    me: &Introduction,
    certified: &SiteId,
    now: Timestamp,
) -> Result<HelloReply, HandshakeError> {
    let hello = Hello {
        versions: me.versions,
        site: me.site.clone(),
        build: limits::cut_text(me.build.clone(), limits::BUILD_BYTES_MAX),
        now,
    };
    // If the peer refused our certificate, the connection may be gone before the hello is out. The
    // reason is then in what can be read; a failed write knows none.
    let sent = tx.send(ToStandby::Hello(hello)).await;
    let reply = match (rx.recv().await, sent) {
        (Ok(ToPrimary::Refused { reason, text }), _) => {
            return Err(HandshakeError::Refused { reason, text });
        }
        (Ok(_), Err(error)) | (Err(error), _) => return Err(error.into()),
        (Ok(ToPrimary::Hello(reply)), Ok(())) => reply,
        (Ok(_), Ok(())) => return Err(HandshakeError::NoHello),
    };
    if reply.site != *certified {
        return Err(HandshakeError::WrongSite {
            said: reply.site,
            certified: certified.clone(),
        });
    }
    if !me.versions.contains(reply.version) {
        let theirs = Versions {
            min: reply.version,
            max: reply.version,
        };
        return Err(HandshakeError::Version {
            ours: me.versions,
            theirs,
        });
    }
    Ok(reply)
}

/// The standby's side. `certified` is the site that the peer's certificate names. On an error of the
/// peer's making it was sent a refusal; the caller drops the link.
pub async fn as_standby(
    tx: &mut impl LinkTx<ToPrimary>,
    rx: &mut impl LinkRx<ToStandby>,
    me: &Introduction,
    certified: &SiteId,
    now: Timestamp,
) -> Result<Greeted, HandshakeError> {
    let (reason, error) = match rx.recv().await {
        Ok(ToStandby::Hello(hello)) => match judge(&hello, me, certified) {
            Ok(version) => {
                let reply = HelloReply {
                    version,
                    site: me.site.clone(),
                    build: limits::cut_text(me.build.clone(), limits::BUILD_BYTES_MAX),
                    now,
                };
                tx.send(ToPrimary::Hello(reply)).await?;
                return Ok(Greeted { version, hello });
            }
            Err(refusal) => refusal,
        },
        Ok(_) => (RefuseReason::Protocol, HandshakeError::NoHello),
        Err(LinkError::Wire(error)) => (
            RefuseReason::Protocol,
            HandshakeError::Link(LinkError::Wire(error)),
        ),
        Err(error) => return Err(error.into()),
    };
    // The refusal is a courtesy: the reason that counts is ours, whether it arrives or not.
    let text = error.to_string();
    let _ = tx.send(ToPrimary::Refused { reason, text }).await;
    Err(error)
}

fn judge(
    hello: &Hello,
    me: &Introduction,
    certified: &SiteId,
) -> Result<u16, (RefuseReason, HandshakeError)> {
    if hello.site != *certified {
        let error = HandshakeError::WrongSite {
            said: hello.site.clone(),
            certified: certified.clone(),
        };
        return Err((RefuseReason::WrongSite, error));
    }
    me.versions.agree(hello.versions).ok_or_else(|| {
        let error = HandshakeError::Version {
            ours: me.versions,
            theirs: hello.versions,
        };
        (RefuseReason::Version, error)
    })
}
