//! What a certificate or revocation list says. The bytes may be a peer's: everything here is bounded
//! by the caller's input, and whatever is odd is an error.
//!
//! Identity rule: a certificate has **exactly one** URI among its alternative names, and it is
//! `spiffe://lifeboat/site/NAME`. Two URIs, another scheme beside it, a path that goes on: refused,
//! since two readers of such a certificate could disagree on whose it is.

use std::net::IpAddr;
use std::path::Path;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;
use x509_parser::revocation_list::CertificateRevocationList;
use x509_parser::time::ASN1Time;

use super::PkiError;
use super::files::read_public_file;
use crate::clock::Timestamp;
use crate::ids::SiteId;

const URI_PREFIX: &str = "spiffe://lifeboat/site/";

/// The URI that identifies a site in its certificate.
pub fn site_uri(site: &SiteId) -> String {
    format!("{URI_PREFIX}{site}")
}

/// Why a certificate identifies no site.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Not a certificate.
    #[error("the certificate does not parse: {0}")]
    Malformed(String),
    /// No URI or several.
    #[error(
        "the certificate has {0} URI names and must have exactly one, {URI_PREFIX}NAME; issue it with `lifeboat pki issue`"
    )]
    UriCount(usize),
    /// A URI of something else.
    #[error(
        "the certificate's URI {0:?} is no site ({URI_PREFIX}NAME); issue it with `lifeboat pki issue`"
    )]
    NotASite(String),
}

/// What a certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateInfo {
    /// Serial number: lower-case hexadecimal without separators.
    pub serial: String,
    /// Subject, for people.
    pub subject: String,
    /// URI names.
    pub uris: Vec<String>,
    /// DNS names and IP addresses.
    pub names: Vec<String>,
    /// Not valid before.
    pub not_before: Timestamp,
    /// Not valid after.
    pub not_after: Timestamp,
}

impl CertificateInfo {
    /// Reads a DER certificate.
    pub fn from_der(der: &[u8]) -> Result<Self, IdentityError> {
        let malformed = |why: &dyn std::fmt::Display| IdentityError::Malformed(why.to_string());
        let (rest, cert) = X509Certificate::from_der(der).map_err(|e| malformed(&e))?;
        if !rest.is_empty() {
            return Err(malformed(&format!("{} bytes follow it", rest.len())));
        }
        let alternative = cert.subject_alternative_name().map_err(|e| malformed(&e))?;
        let (mut uris, mut names) = (Vec::new(), Vec::new());
        for name in alternative.iter().flat_map(|ext| &ext.value.general_names) {
            match name {
                GeneralName::URI(uri) => uris.push((*uri).to_owned()),
                GeneralName::DNSName(name) => names.push((*name).to_owned()),
                GeneralName::IPAddress(bytes) => names.push(ip_text(bytes)),
                GeneralName::Invalid(..) => {
                    return Err(malformed(&"an alternative name does not decode"));
                }
                _ => {}
            }
        }
        Ok(Self {
            serial: serial_text(cert.raw_serial()),
            subject: cert.subject().to_string(),
            uris,
            names,
            not_before: timestamp(cert.validity().not_before),
            not_after: timestamp(cert.validity().not_after),
        })
    }

    /// Reads the first certificate of a PEM file.
    pub fn read(path: &Path) -> Result<Self, PkiError> {
        let damaged = |why: String| PkiError::Damaged {
            path: path.to_owned(),
            why,
        };
        let bytes = read_public_file(path)?;
        let der = CertificateDer::from_pem_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
        Self::from_der(&der).map_err(|e| damaged(e.to_string()))
    }

    /// The site that it identifies.
    pub fn site(&self) -> Result<SiteId, IdentityError> {
        let [uri] = self.uris.as_slice() else {
            return Err(IdentityError::UriCount(self.uris.len()));
        };
        let name = uri.strip_prefix(URI_PREFIX);
        name.and_then(|name| name.parse().ok()).ok_or_else(|| {
            // A hostile URI is quoted; cut it so that it cannot flood a log.
            IdentityError::NotASite(uri.chars().take(200).collect())
        })
    }
}

/// What a revocation list says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CrlInfo {
    /// Its number; grows with each list.
    pub number: Option<u64>,
    /// When it was made.
    pub this_update: Timestamp,
    /// When it expires. A list without this date never does.
    pub next_update: Option<Timestamp>,
    /// Serials of the revoked certificates.
    pub revoked: Vec<String>,
}

impl CrlInfo {
    /// Reads a DER list.
    pub fn from_der(der: &[u8]) -> Result<Self, IdentityError> {
        let (_, crl) = CertificateRevocationList::from_der(der)
            .map_err(|e| IdentityError::Malformed(e.to_string()))?;
        Ok(Self {
            number: crl.crl_number().and_then(|n| u64::try_from(n).ok()),
            this_update: timestamp(crl.last_update()),
            next_update: crl.next_update().map(timestamp),
            revoked: crl
                .iter_revoked_certificates()
                .map(|revoked| serial_text(revoked.raw_serial()))
                .collect(),
        })
    }

    /// Reads the first list of a PEM file.
    pub fn read(path: &Path) -> Result<Self, PkiError> {
        let damaged = |why: String| PkiError::Damaged {
            path: path.to_owned(),
            why,
        };
        let bytes = read_public_file(path)?;
        let der = CertificateRevocationListDer::from_pem_slice(&bytes)
            .map_err(|e| damaged(e.to_string()))?;
        Self::from_der(&der).map_err(|e| damaged(e.to_string()))
    }
}

fn ip_text(bytes: &[u8]) -> String {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return IpAddr::from(v4).to_string();
    }
    if let Ok(v6) = <[u8; 16]>::try_from(bytes) {
        return IpAddr::from(v6).to_string();
    }
    format!("(an address of {} bytes)", bytes.len())
}

fn serial_text(raw: &[u8]) -> String {
    // DER puts a zero byte before a number whose first bit is set.
    let digits = raw.strip_prefix(&[0]).filter(|r| !r.is_empty());
    hex(digits.unwrap_or(raw))
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn timestamp(time: ASN1Time) -> Timestamp {
    let seconds = u64::try_from(time.timestamp()).unwrap_or(0);
    Timestamp(seconds.saturating_mul(1_000_000_000))
}
