//! The site CA: one certificate authority of the installation, one certificate per site.
//!
//! ```text
//!   DIR (on the machine that keeps the CA; may be offline)
//!     ca.key        signs; never leaves DIR            0600
//!     ca.pem        every site has a copy              0644
//!     crl.pem       every site has a copy, renewed at least every 30 days
//!     index.json    what was issued and revoked
//!     NAME/         issued to site NAME: copy these four files there
//!       NAME.pem NAME.key ca.pem crl.pem
//!
//!   site certificate:  P-256, 90 days, for client and server alike
//!     URI SAN   spiffe://lifeboat/site/NAME       exactly one: the identity
//!     DNS/IP    NAME and what was asked for       what a dialer's `server_name` is checked against
//! ```
//!
//! * A key file is 0600 from its first byte, and no file is overwritten unless the caller says so.
//!   Files appear whole (written beside, synced, renamed), so a crash leaves the old or the new one.
//! * `index.json` is written before the certificate that it lists: a crash may leave a serial that
//!   nobody holds, never a certificate that cannot be revoked.
//! * A renewal replaces key and certificate one after the other. A daemon that reloads in between
//!   sees a pair that does not match, keeps the old pair and says so.
//!
//! Left to others: who may replicate what (configuration), loading into TLS (`transport`), printing
//! (`cli`). Dropped: an encrypted CA key. It would need a passphrase at each renewal, and people
//! then keep it in a script beside the key; keep DIR on an encrypted or removable disk instead.

pub mod authority;
pub mod certificate;
mod files;

pub use authority::{Initialised, Issue, Issued, Revoked, init, issue, refresh_crl, revoke};
pub use certificate::{CertificateInfo, CrlInfo, IdentityError, site_uri};
pub use files::{KeyFileError, read_key_file, read_public_file};

use std::path::{Path, PathBuf};

use crate::clock::Timestamp;

/// Why a command of the CA failed.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A CA is there already.
    #[error(
        "{0} already holds a CA; a new one would make every certificate that it issued useless. \
         Issue further certificates with it, or choose an empty directory"
    )]
    AlreadyInitialised(PathBuf),
    /// No CA there.
    #[error(
        "{0} holds no CA key (ca.key): run `lifeboat pki init` first, or give the directory of the \
         machine where that was done; the key stays there and is not copied to sites"
    )]
    NotInitialised(PathBuf),
    /// A file would be overwritten.
    #[error("{0} exists and is not overwritten; say so explicitly to renew it")]
    Exists(PathBuf),
    /// A name that cannot stand in a certificate.
    #[error("{name:?} is neither a DNS name nor an IP address: {why}")]
    BadName {
        /// The name.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// A lifetime that cannot be.
    #[error(
        "a certificate of {days} days is not possible: use 1 to {most} days (the CA itself expires then)"
    )]
    BadDays {
        /// What was asked for.
        days: u32,
        /// What is possible.
        most: u32,
    },
    /// Nothing to revoke.
    #[error("no certificate with serial or site {0:?} was issued here and is still valid")]
    NothingToRevoke(String),
    /// A file that is not what it should be.
    #[error("{path} is damaged or not what it should be: {why}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A key file that cannot be used.
    #[error(transparent)]
    Key(#[from] KeyFileError),
    /// A file operation failed.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// The operation.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The cryptography failed.
    #[error("cannot {what}: {why}")]
    Crypto {
        /// The operation.
        what: &'static str,
        /// What the library said.
        why: String,
    },
}

/// The files of one site, to be looked at.
#[derive(Debug, Clone, Copy)]
pub struct StatusPaths<'a> {
    /// CA certificate.
    pub ca: &'a Path,
    /// The site's certificate.
    pub cert: &'a Path,
    /// Revocation list, if one is used.
    pub crl: Option<&'a Path>,
}

/// What [`status`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PkiStatus {
    /// The CA certificate.
    pub ca: CertificateInfo,
    /// The site's certificate.
    pub cert: CertificateInfo,
    /// The revocation list.
    pub crl: Option<CrlInfo>,
}

/// Reads a site's certificates. They are parsed, not verified: `transport::TlsMaterial` does that.
pub fn status(paths: StatusPaths<'_>) -> Result<PkiStatus, PkiError> {
    Ok(PkiStatus {
        ca: CertificateInfo::read(paths.ca)?,
        cert: CertificateInfo::read(paths.cert)?,
        crl: paths.crl.map(CrlInfo::read).transpose()?,
    })
}

/// Whole days from `now` to `then`; negative when it is past.
pub fn days_between(now: Timestamp, then: Timestamp) -> i64 {
    let day = 86_400 * 1_000_000_000_i128;
    let days = (i128::from(then.0) - i128::from(now.0)).div_euclid(day);
    i64::try_from(days).expect("64 bits of nanoseconds are 213 thousand days")
}

#[cfg(test)]
mod tests;
