//! The commands of the CA: make it, issue, revoke, renew the revocation list.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, RevocationReason, RevokedCertParams, SanType, SerialNumber,
};
use serde::{Deserialize, Serialize};
use time::{Duration as Span, OffsetDateTime};

use super::certificate::{CertificateInfo, hex, site_uri};
use super::files::{self, DirLock, PRIVATE, PUBLIC, read_key_file, read_public_file};
use super::{KeyFileError, PkiError, days_between};
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::ids::SiteId;

/// Lifetime of the CA certificate.
pub const CA_DAYS: u32 = 3650;

/// Lifetime of a site certificate unless asked otherwise.
pub const SITE_DAYS: u32 = 90;

/// Lifetime of a revocation list.
pub const CRL_DAYS: u32 = 30;

/// Certificates are valid from a little before now, since the clocks of two sites differ.
const BACKDATED: Span = Span::hours(1);

const INDEX_SCHEMA: u32 = 1;
const INDEX_BYTES_MAX: usize = 16 << 20;

/// What to put into a site certificate, and where.
#[derive(Debug, Clone)]
pub struct Issue<'a> {
    /// The site.
    pub site: &'a SiteId,
    /// DNS names and IP addresses under which it is dialed. The site's own name is added if it is a
    /// DNS name.
    pub names: &'a [String],
    /// Directory for the four files; made if it is not there.
    pub out: &'a Path,
    /// Lifetime in days; [`SITE_DAYS`] is usual.
    pub days: u32,
    /// Renew: overwrite what lies in `out`.
    pub overwrite: bool,
}

/// A certificate was issued.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    /// The site.
    pub site: SiteId,
    /// Serial number, hexadecimal.
    pub serial: String,
    /// DNS names and IP addresses in it.
    pub names: Vec<String>,
    /// When it expires.
    pub not_after: Timestamp,
    /// The certificate. This and the next three belong on the site's host.
    pub cert: PathBuf,
    /// Its private key (0600).
    pub key: PathBuf,
    /// A copy of the CA certificate.
    pub ca: PathBuf,
    /// A copy of the revocation list.
    pub crl: PathBuf,
}

/// A CA was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Initialised {
    /// The CA certificate.
    pub ca: PathBuf,
    /// The CA key, which stays where it is.
    pub ca_key: PathBuf,
    /// When the CA expires.
    pub ca_not_after: Timestamp,
    /// The revocation list (still empty).
    pub crl: PathBuf,
    /// The first site's certificate.
    pub first: Issued,
}

/// Certificates were revoked, or the list was renewed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revoked {
    /// Serials that are newly revoked.
    pub serials: Vec<String>,
    /// The new list; every site needs a copy of it.
    pub crl: PathBuf,
    /// Its number.
    pub number: u64,
    /// When it expires.
    pub next_update: Timestamp,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Index {
    schema: u32,
    crl_number: u64,
    issued: Vec<Entry>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    serial: String,
    site: SiteId,
    issued_at: Timestamp,
    not_after: Timestamp,
    revoked_at: Option<Timestamp>,
}

/// Makes a CA in `dir` and the certificate of the first site in `dir/SITE`.
pub fn init(dir: &Path, site: &SiteId, names: &[String]) -> Result<Initialised, PkiError> {
    certificate_names(site, names)?;
    files::make_dir(dir)?;
    let _lock = DirLock::take(dir)?;
    let (ca_key, ca, crl) = (dir.join("ca.key"), dir.join("ca.pem"), dir.join("crl.pem"));
    if ca_key.exists() || ca.exists() {
        return Err(PkiError::AlreadyInitialised(dir.to_owned()));
    }
    let now = now();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.distinguished_name = rcgen::DistinguishedName::new();
    let id = random_serial()?;
    // Two CAs of two installations get names of their own, so that errors can tell them apart.
    let name = format!("lifeboat site CA {}", &hex(&id)[..8]);
    params.distinguished_name.push(DnType::CommonName, name);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(SerialNumber::from_slice(&id));
    params.not_before = now - BACKDATED;
    params.not_after = now + Span::days(CA_DAYS.into());
    let key = new_key()?;
    let cert = params
        .self_signed(&key)
        .map_err(crypto("sign the CA certificate"))?;
    // The key is last: its presence says that the CA is complete.
    let index = Index {
        schema: INDEX_SCHEMA,
        crl_number: 0,
        issued: Vec::new(),
    };
    store_index(dir, &index)?;
    files::write(&ca, cert.pem().as_bytes(), PUBLIC, false)?;
    files::write(&ca_key, key.serialize_pem().as_bytes(), PRIVATE, false)?;
    let mut authority = Authority::open(dir)?;
    authority.write_crl()?;
    let first = authority.issue(&Issue {
        site,
        names,
        out: &dir.join(site.as_str()),
        days: SITE_DAYS,
        overwrite: false,
    })?;
    Ok(Initialised {
        ca,
        ca_key,
        ca_not_after: authority.not_after,
        crl,
        first,
    })
}

/// Issues a site certificate with the CA in `dir`.
pub fn issue(dir: &Path, what: &Issue<'_>) -> Result<Issued, PkiError> {
    let _lock = lock(dir)?;
    Authority::open(dir)?.issue(what)
}

/// Revokes a certificate by its serial, or all valid ones of a site, and renews the list.
pub fn revoke(dir: &Path, serial_or_site: &str) -> Result<Revoked, PkiError> {
    let _lock = lock(dir)?;
    let mut authority = Authority::open(dir)?;
    let at = timestamp(now());
    let serial = serial_or_site.replace(':', "").to_ascii_lowercase();
    let valid = |entry: &&mut Entry| entry.revoked_at.is_none() && entry.not_after > at;
    let mut serials = Vec::new();
    for entry in authority.index.issued.iter_mut().filter(valid) {
        if entry.serial == serial || entry.site.as_str() == serial_or_site {
            entry.revoked_at = Some(at);
            serials.push(entry.serial.clone());
        }
    }
    if serials.is_empty() {
        let what = serial_or_site.chars().take(100).collect();
        return Err(PkiError::NothingToRevoke(what));
    }
    let mut revoked = authority.write_crl()?;
    revoked.serials = serials;
    Ok(revoked)
}

/// Makes a new revocation list with the same content, valid for [`CRL_DAYS`] from now.
pub fn refresh_crl(dir: &Path) -> Result<Revoked, PkiError> {
    let _lock = lock(dir)?;
    Authority::open(dir)?.write_crl()
}

struct Authority<'a> {
    dir: &'a Path,
    issuer: Issuer<'static, KeyPair>,
    not_after: Timestamp,
    index: Index,
}

impl<'a> Authority<'a> {
    fn open(dir: &'a Path) -> Result<Self, PkiError> {
        let key_path = dir.join("ca.key");
        let key = read_key_file(&key_path).map_err(|error| match error {
            KeyFileError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                PkiError::NotInitialised(dir.to_owned())
            }
            other => other.into(),
        })?;
        let key = KeyPair::from_pem(&text(&key_path, key)?).map_err(damaged(&key_path))?;
        let ca_path = dir.join("ca.pem");
        let not_after = CertificateInfo::read(&ca_path)?.not_after;
        let pem = text(&ca_path, read_public_file(&ca_path)?)?;
        let issuer = Issuer::from_ca_cert_pem(&pem, key).map_err(damaged(&ca_path))?;
        let index_path = dir.join("index.json");
        let index = read_public_file(&index_path)?;
        let index: Index = serde_json::from_slice(&index).map_err(damaged(&index_path))?;
        if index.schema != INDEX_SCHEMA {
            let why = format!("schema {} is newer than this program", index.schema);
            return Err(damaged(&index_path)(why));
        }
        Ok(Self {
            dir,
            issuer,
            not_after,
            index,
        })
    }

    fn issue(&mut self, what: &Issue<'_>) -> Result<Issued, PkiError> {
        let names = certificate_names(what.site, what.names)?;
        let now = now();
        let most = days_between(timestamp(now), self.not_after).clamp(0, CA_DAYS.into()) as u32;
        if what.days == 0 || what.days > most {
            let days = what.days;
            return Err(PkiError::BadDays { days, most });
        }
        files::make_dir(what.out)?;
        let cert = what.out.join(format!("{}.pem", what.site));
        let key_path = what.out.join(format!("{}.key", what.site));
        if let Some(path) = [&cert, &key_path].into_iter().find(|path| path.exists())
            && !what.overwrite
        {
            return Err(PkiError::Exists(path.clone()));
        }
        let id = random_serial()?;
        let mut params =
            CertificateParams::new(names.clone()).map_err(crypto("make the certificate"))?;
        let uri = site_uri(what.site);
        let uri = uri
            .try_into()
            .map_err(crypto("write the URI of the certificate"))?;
        params.subject_alt_names.push(SanType::URI(uri));
        params.distinguished_name = rcgen::DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, format!("lifeboat site {}", what.site));
        params.serial_number = Some(SerialNumber::from_slice(&id));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        params.not_before = now - BACKDATED;
        params.not_after = now + Span::days(what.days.into());
        let key = new_key()?;
        let signed = params
            .signed_by(&key, &self.issuer)
            .map_err(crypto("sign the certificate"))?;
        let entry = Entry {
            serial: hex(&id),
            site: what.site.clone(),
            issued_at: timestamp(now),
            not_after: timestamp(params.not_after),
            revoked_at: None,
        };
        let (serial, not_after) = (entry.serial.clone(), entry.not_after);
        self.index.issued.push(entry);
        store_index(self.dir, &self.index)?;
        let pem = key.serialize_pem();
        files::write(&key_path, pem.as_bytes(), PRIVATE, what.overwrite)?;
        files::write(&cert, signed.pem().as_bytes(), PUBLIC, what.overwrite)?;
        let copy = |name: &str| {
            let target = what.out.join(name);
            files::write(
                &target,
                &read_public_file(&self.dir.join(name))?,
                PUBLIC,
                true,
            )?;
            Ok::<_, PkiError>(target)
        };
        Ok(Issued {
            site: what.site.clone(),
            serial,
            names,
            not_after,
            cert,
            key: key_path,
            ca: copy("ca.pem")?,
            crl: copy("crl.pem")?,
        })
    }

    fn write_crl(&mut self) -> Result<Revoked, PkiError> {
        let now = now();
        let next_update = now + Span::days(CRL_DAYS.into());
        let number = self.index.crl_number.checked_add(1);
        self.index.crl_number = number.ok_or_else(|| {
            damaged(&self.dir.join("index.json"))("the number of its list cannot grow any more")
        })?;
        let mut revoked_certs = Vec::new();
        for entry in &self.index.issued {
            let Some(at) = entry.revoked_at else { continue };
            revoked_certs.push(RevokedCertParams {
                serial_number: SerialNumber::from_slice(&self.serial_bytes(&entry.serial)?),
                revocation_time: date(at),
                reason_code: Some(RevocationReason::Unspecified),
                invalidity_date: None,
            });
        }
        let list = CertificateRevocationListParams {
            this_update: now - BACKDATED,
            next_update,
            crl_number: self.index.crl_number.into(),
            issuing_distribution_point: None,
            revoked_certs,
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list
            .signed_by(&self.issuer)
            .map_err(crypto("sign the revocation list"))?;
        let pem = list.pem().map_err(crypto("encode the revocation list"))?;
        // The index first: a revocation that is only in the list would be gone with the next list.
        store_index(self.dir, &self.index)?;
        let crl = self.dir.join("crl.pem");
        files::write(&crl, pem.as_bytes(), PUBLIC, true)?;
        Ok(Revoked {
            serials: Vec::new(),
            crl,
            number: self.index.crl_number,
            next_update: timestamp(next_update),
        })
    }

    fn serial_bytes(&self, serial: &str) -> Result<Vec<u8>, PkiError> {
        let pairs = serial.as_bytes().chunks(2);
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
        let bytes: Option<Vec<u8>> = pairs.map(byte).collect();
        bytes.filter(|b| !b.is_empty()).ok_or_else(|| {
            let why = format!("serial {serial:?} is not hexadecimal");
            damaged(&self.dir.join("index.json"))(why)
        })
    }
}

fn lock(dir: &Path) -> Result<DirLock, PkiError> {
    if !dir.join("ca.key").exists() {
        return Err(PkiError::NotInitialised(dir.to_owned()));
    }
    DirLock::take(dir)
}

fn store_index(dir: &Path, index: &Index) -> Result<(), PkiError> {
    let json = serde_json::to_vec_pretty(index).expect("the index has no failing encoder");
    let path = dir.join("index.json");
    if json.len() > INDEX_BYTES_MAX {
        return Err(damaged(&path)("too many certificates for one CA"));
    }
    files::write(&path, &json, PRIVATE, true)
}

fn certificate_names(site: &SiteId, others: &[String]) -> Result<Vec<String>, PkiError> {
    others.iter().try_for_each(|name| check_name(name))?;
    // Not every site name is a DNS name ("a..b"); a dialer then needs another one to ask for.
    let own = site.to_string();
    let mut names = match check_name(&own) {
        Err(error) if others.is_empty() => return Err(error),
        Err(_) => Vec::new(),
        Ok(()) => vec![own],
    };
    names.extend(others.iter().filter(|n| *n != site.as_str()).cloned());
    Ok(names)
}

/// DNS labels or an address; what rcgen itself would let pass is wider.
fn check_name(name: &str) -> Result<(), PkiError> {
    if name.parse::<IpAddr>().is_ok() {
        return Ok(());
    }
    match rustls::pki_types::DnsName::try_from(name) {
        Ok(_) => Ok(()),
        Err(why) => Err(PkiError::BadName {
            name: name.chars().take(260).collect(),
            why: why.to_string(),
        }),
    }
}

fn new_key() -> Result<KeyPair, PkiError> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(crypto("make a key"))
}

/// 16 random bytes that are a positive number of full length, so that text and DER agree.
fn random_serial() -> Result<[u8; 16], PkiError> {
    let mut id = [0; 16];
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let filled = provider.secure_random.fill(&mut id);
    filled.map_err(|_| crypto("make a serial number")("no random numbers"))?;
    id[0] = (id[0] & 0x3f) | 0x40;
    Ok(id)
}

fn now() -> OffsetDateTime {
    date(SystemClock.now())
}

fn date(at: Timestamp) -> OffsetDateTime {
    // Certificates count seconds.
    let seconds = i64::try_from(at.0 / 1_000_000_000).expect("64 bits of nanoseconds");
    OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

fn timestamp(date: OffsetDateTime) -> Timestamp {
    let seconds = u64::try_from(date.unix_timestamp()).unwrap_or(0);
    Timestamp(seconds.saturating_mul(1_000_000_000))
}

fn text(path: &Path, bytes: Vec<u8>) -> Result<String, PkiError> {
    String::from_utf8(bytes).map_err(damaged(path))
}

fn damaged<E: std::fmt::Display>(path: &Path) -> impl FnOnce(E) -> PkiError {
    move |why| PkiError::Damaged {
        path: path.to_owned(),
        why: why.to_string(),
    }
}

fn crypto<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> PkiError {
    move |why| PkiError::Crypto {
        what,
        why: why.to_string(),
    }
}
