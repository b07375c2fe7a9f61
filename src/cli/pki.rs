//! `lifeboat pki`: the site CA, without a daemon.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::args::PkiVerb;
use super::config as cli_config;
use super::output::Output;
use super::text::{Paint, facts, table};
use super::units;
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::config::{self, Files};
use crate::control::codes::Reason;
use crate::control::time;
use crate::control::types::{ApiError, Document};
use crate::ids::SiteId;
use crate::pki::{self, CertificateInfo, Issue, PkiError, StatusPaths};

/// `lifeboat pki init`, `issue`
#[derive(Debug, Serialize)]
struct Issued {
    site: SiteId,
    serial: String,
    names: Vec<String>,
    #[serde(with = "time")]
    not_after: Timestamp,
    cert: PathBuf,
    key: PathBuf,
    ca: PathBuf,
    crl: PathBuf,
    /// Only of `init`: the key that signs.
    ca_key: Option<PathBuf>,
}

impl Document for Issued {
    const SCHEMA: &'static str = "lifeboat.pki_issued/v1";
}

/// `lifeboat pki revoke`
#[derive(Debug, Serialize)]
struct Revoked {
    serials: Vec<String>,
    crl: PathBuf,
    number: u64,
    #[serde(with = "time")]
    next_update: Timestamp,
}

impl Document for Revoked {
    const SCHEMA: &'static str = "lifeboat.pki_revoked/v1";
}

/// `lifeboat pki status`
#[derive(Debug, Serialize)]
struct Status {
    certificates: Vec<Certificate>,
    #[serde(with = "time::option")]
    crl_next_update: Option<Timestamp>,
    revoked: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Certificate {
    name: &'static str,
    subject: String,
    serial: String,
    names: Vec<String>,
    #[serde(with = "time")]
    not_after: Timestamp,
    days_left: i64,
    revoked: bool,
}

impl Document for Status {
    const SCHEMA: &'static str = "lifeboat.pki_status/v1";
}

/// Schemas of the documents made here.
pub const SCHEMAS: &[&str] = &[Issued::SCHEMA, Revoked::SCHEMA, Status::SCHEMA];

fn failed(error: PkiError) -> ApiError {
    let reason = match error {
        PkiError::BadName { .. } | PkiError::BadDays { .. } => Reason::Usage,
        PkiError::AlreadyInitialised(_) | PkiError::Exists(_) => Reason::WouldLoseData,
        _ => Reason::Failed,
    };
    ApiError::new(reason, error.to_string())
}

/// Carries out a verb. The error was not printed yet.
pub fn run(verb: PkiVerb, file: Option<&Path>, out: &mut Output<'_>) -> Result<(), ApiError> {
    let paint = Paint(out.style.color);
    match verb {
        PkiVerb::Init { dir, site, names } => {
            let made = pki::init(&dir, &site, &names).map_err(failed)?;
            out.result(issued(made.first, Some(made.ca_key)), issued_text);
        }
        PkiVerb::Issue {
            dir,
            site,
            names,
            out: to,
            days,
            renew,
        } => {
            let to = to.unwrap_or_else(|| dir.join(site.as_str()));
            let what = Issue {
                site: &site,
                names: &names,
                out: &to,
                days,
                overwrite: renew,
            };
            let made = pki::issue(&dir, &what).map_err(failed)?;
            out.result(issued(made, None), issued_text);
        }
        PkiVerb::Revoke { dir, target } => {
            let revoked = match target {
                Some(target) => pki::revoke(&dir, &target),
                None => pki::refresh_crl(&dir),
            };
            let revoked = revoked.map_err(failed)?;
            let document = Revoked {
                serials: revoked.serials,
                crl: revoked.crl,
                number: revoked.number,
                next_update: revoked.next_update,
            };
            out.result(document, revoked_text);
        }
        PkiVerb::Status => {
            let file = cli_config::named(file)?;
            let status = status(file)?;
            out.result(status, |status| status_text(status, paint));
        }
    }
    Ok(())
}

fn issued(made: pki::Issued, ca_key: Option<PathBuf>) -> Issued {
    Issued {
        site: made.site,
        serial: made.serial,
        names: made.names,
        not_after: made.not_after,
        cert: made.cert,
        key: made.key,
        ca: made.ca,
        crl: made.crl,
        ca_key,
    }
}

fn issued_text(issued: &Issued) -> String {
    let mut rows = vec![
        ("site", issued.site.to_string()),
        ("names", issued.names.join(", ")),
        ("serial", issued.serial.clone()),
        ("not after", units::time(issued.not_after)),
    ];
    for (name, path) in [
        ("cert", &issued.cert),
        ("key", &issued.key),
        ("ca", &issued.ca),
        ("crl", &issued.crl),
    ] {
        rows.push((name, path.display().to_string()));
    }
    let mut text = facts(&rows);
    text += &format!(
        "Copy these four files to {} and name them in [tls] of its configuration.\n",
        issued.site
    );
    if let Some(ca_key) = &issued.ca_key {
        text += &format!("{} signs for all sites: it stays here.\n", ca_key.display());
    }
    text
}

fn revoked_text(revoked: &Revoked) -> String {
    let what = match revoked.serials.len() {
        0 => "nothing new revoked".to_owned(),
        _ => format!("revoked {}", revoked.serials.join(", ")),
    };
    format!(
        "{what}\nlist {} in {}, good until {}\nCopy it to every site, then \"lifeboat reload\".\n",
        revoked.number,
        revoked.crl.display(),
        units::time(revoked.next_update)
    )
}

fn status(file: &Path) -> Result<Status, ApiError> {
    let loaded = config::load(file, Files::Ignored).map_err(|e| cli_config::error(&e))?;
    let Some(tls) = loaded.config.tls else {
        let message = format!("{} has no [tls]", file.display());
        return Err(ApiError::new(Reason::Config, message));
    };
    let paths = StatusPaths {
        ca: &tls.ca,
        cert: &tls.cert,
        crl: tls.crl.as_deref(),
    };
    let found = pki::status(paths).map_err(failed)?;
    let now = SystemClock.now();
    let revoked = found
        .crl
        .as_ref()
        .map_or(Vec::new(), |crl| crl.revoked.clone());
    let certificate = |name, info: CertificateInfo| Certificate {
        name,
        days_left: pki::days_between(now, info.not_after),
        revoked: revoked.contains(&info.serial),
        subject: info.uris.first().cloned().unwrap_or(info.subject),
        serial: info.serial,
        names: info.names,
        not_after: info.not_after,
    };
    Ok(Status {
        certificates: vec![certificate("site", found.cert), certificate("ca", found.ca)],
        crl_next_update: found.crl.and_then(|crl| crl.next_update),
        revoked,
    })
}

fn status_text(status: &Status, paint: Paint) -> String {
    let rows = status.certificates.iter().map(|certificate| {
        let left = format!("{} d", certificate.days_left);
        let state = match certificate.days_left {
            _ if certificate.revoked => paint.bad("REVOKED"),
            ..0 => paint.bad("EXPIRED"),
            0..14 => paint.warn("expires soon"),
            _ => paint.good("ok"),
        };
        vec![
            paint.plain(certificate.name),
            paint.plain(&certificate.subject),
            paint.plain(&certificate.serial),
            paint.plain(units::time(certificate.not_after)),
            paint.plain(left),
            state,
        ]
    });
    let header = [
        "NAME",
        "SUBJECT",
        "SERIAL",
        "NOT AFTER (UTC)",
        "LEFT",
        "STATE",
    ];
    let mut text = table(&header, &[4], rows, paint);
    if let Some(at) = status.crl_next_update {
        text += &format!(
            "revocation list: {} revoked, good until {}\n",
            status.revoked.len(),
            units::time(at)
        );
    }
    text
}
