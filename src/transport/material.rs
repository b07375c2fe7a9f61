//! Certificates, key and revocation lists of this site, and what TLS makes of them.
//!
//! ```text
//!   files ─ load ─▶ Current{client config, server config, verifiers, status}  ─ ArcSwap ─▶ each new link
//!           reload: the new whole set, or the old one stays ─▶ links that are up are judged again
//! ```
//!
//! A first `load` accepts an own certificate or a list that has expired: a site must be able to
//! start, and to fail over, although it cannot talk to its peer; the status and the peer's refusals
//! say what is wrong. A `reload` does not accept them, since it would replace something better.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::client::danger::ServerCertVerifier;
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime,
};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{CertificateError, ClientConfig, RootCertStore, ServerConfig};

use super::failure;
use super::live::{DroppedLink, Live, Membership, PeerIdentity, PeerRole, Registry};
use super::suites;
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::ids::SiteId;
use crate::pki::{
    CertificateInfo, CrlInfo, KeyFileError, PkiError, read_key_file, read_public_file,
};
use crate::wire::version::{ALPN, ALPN_JOIN, ALPN_STREAMS};

/// Where the files are (PEM).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsPaths {
    /// Certificates of the CAs that issue site certificates; usually one, two while it is replaced.
    pub ca: PathBuf,
    /// This site's certificate, followed by intermediate ones if there are any.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Revocation lists of these CAs. Without a path nothing is checked for revocation.
    pub crl: Option<PathBuf>,
}

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error(transparent)]
    File(#[from] PkiError),
    /// The key file cannot be read.
    #[error(transparent)]
    Key(#[from] KeyFileError),
    /// A file holds something else.
    #[error("{path} is not usable: {why}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The certificate is of another site.
    #[error(
        "{path} is the certificate of site {found}, but this is site {expected}: \
         point the configuration to the right file, or issue one with `lifeboat pki issue`"
    )]
    OtherSite {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        found: SiteId,
        /// Who we are.
        expected: SiteId,
    },
}

/// What is loaded, for status and metrics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsStatus {
    /// This site's certificate.
    pub cert: CertificateInfo,
    /// The CA certificates.
    pub cas: Vec<CertificateInfo>,
    /// The revocation lists.
    pub crls: Vec<CrlInfo>,
}

impl TlsStatus {
    /// When the first of the revocation lists expires; `None` without lists.
    pub fn crl_next_update(&self) -> Option<Timestamp> {
        self.crls.iter().filter_map(|crl| crl.next_update).min()
    }
}

/// One consistent set, as the handshakes use it.
pub(super) struct Current {
    pub(super) server: Arc<ServerConfig>,
    pub(super) client: Arc<ClientConfig>,
    /// For a stream that joins a link.
    pub(super) joining: Arc<ClientConfig>,
    of_clients: Arc<dyn ClientCertVerifier>,
    of_servers: Arc<WebPkiServerVerifier>,
    status: TlsStatus,
}

/// The site's TLS identity: shared by its listener and all its dialers.
pub struct TlsMaterial {
    site: SiteId,
    paths: TlsPaths,
    current: ArcSwap<Current>,
    live: Arc<Registry>,
}

impl TlsMaterial {
    /// Loads and checks the files of this site.
    pub fn load(site: &SiteId, paths: TlsPaths) -> Result<Arc<Self>, TlsError> {
        let current = build(site, &paths, Expired::Accept)?;
        Ok(Arc::new(Self {
            site: site.clone(),
            paths,
            current: ArcSwap::from_pointee(current),
            live: Arc::default(),
        }))
    }

    /// Reads the files again. On an error everything stays as it was. Otherwise new links use the
    /// new set at once, and links whose peer's certificate is revoked, or of a CA that is no longer
    /// there, are dropped; returns those. A link whose certificate has merely expired goes on.
    pub fn reload(&self) -> Result<Vec<DroppedLink>, TlsError> {
        let current = build(&self.site, &self.paths, Expired::Refuse)?;
        self.current.store(Arc::new(current));
        Ok(self.recheck())
    }

    /// The site that the material is for.
    pub fn site(&self) -> &SiteId {
        &self.site
    }

    /// What is loaded now.
    pub fn status(&self) -> TlsStatus {
        self.current.load().status.clone()
    }

    /// The peers of the links that are up.
    pub fn peers(&self) -> Vec<(PeerIdentity, SocketAddr)> {
        self.live.peers()
    }

    pub(super) fn current(&self) -> Arc<Current> {
        self.current.load_full()
    }

    /// A link came up under `used`. If a reload came in between, it is judged by the new set.
    pub(super) fn enter(&self, live: Live, used: &Arc<Current>) -> Membership {
        let membership = self.live.enter(live);
        if !Arc::ptr_eq(&self.current(), used) {
            self.recheck();
        }
        membership
    }

    fn recheck(&self) -> Vec<DroppedLink> {
        let current = self.current();
        self.live.recheck(|live| current.objection(live))
    }
}

impl Current {
    /// Why a link that is up may not stay.
    fn objection(&self, live: &Live) -> Option<String> {
        let (leaf, rest) = live.chain.split_first()?;
        let info = CertificateInfo::from_der(leaf).ok()?;
        // At a time when it was valid, or expiry would hide that it is revoked.
        let now = within(&info, SystemClock.now());
        let verdict = match &live.role {
            PeerRole::Client => self
                .of_clients
                .verify_client_cert(leaf, rest, now)
                .map(drop),
            PeerRole::Server(name) => {
                let verified = self
                    .of_servers
                    .verify_server_cert(leaf, rest, name, &[], now);
                verified.map(drop)
            }
        };
        let Err(rustls::Error::InvalidCertificate(error)) = verdict else {
            return None;
        };
        use CertificateError as E;
        let gone = matches!(error, E::Revoked | E::UnknownIssuer | E::BadSignature);
        let serial = &live.peer.serial;
        gone.then(|| {
            let words = failure::words(&error);
            format!(
                "the certificate of {} (serial {serial}): {words}",
                live.peer.site
            )
        })
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Expired {
    Accept,
    Refuse,
}

fn build(site: &SiteId, paths: &TlsPaths, expired: Expired) -> Result<Current, TlsError> {
    let provider = suites::provider();
    let cas: Vec<CertificateDer<'static>> = read_pem(&paths.ca, "certificate")?;
    let mut roots = RootCertStore::empty();
    for ca in &cas {
        roots.add(ca.clone()).map_err(content(&paths.ca))?;
    }
    let roots = Arc::new(roots);
    let crls: Vec<CertificateRevocationListDer<'static>> = match &paths.crl {
        Some(path) => read_pem(path, "revocation list")?,
        None => Vec::new(),
    };
    let crl_path = paths.crl.as_deref().unwrap_or(Path::new("(no list)"));

    let of_clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
        .with_crls(crls.clone())
        .enforce_revocation_expiration()
        .build()
        .map_err(content(crl_path))?;
    let of_servers = WebPkiServerVerifier::builder_with_provider(roots, provider.clone())
        .with_crls(crls.clone())
        .enforce_revocation_expiration()
        .build()
        .map_err(content(crl_path))?;

    let chain: Vec<CertificateDer<'static>> = read_pem(&paths.cert, "certificate")?;
    let info = CertificateInfo::from_der(&chain[0]).map_err(content(&paths.cert))?;
    let found = info.site().map_err(content(&paths.cert))?;
    if found != *site {
        return Err(TlsError::OtherSite {
            path: paths.cert.clone(),
            found,
            expected: site.clone(),
        });
    }
    check_own(&*of_clients, &chain, &info, paths, expired)?;

    let key = read_key_file(&paths.key)?;
    let key = PrivateKeyDer::from_pem_slice(&key).map_err(content(&paths.key))?;
    let pair = |what: &str| {
        let path = paths.key.clone();
        let cert = paths.cert.display().to_string();
        let what = what.to_owned();
        move |e: rustls::Error| TlsError::Content {
            path,
            why: format!("it does not work with {cert} as {what}: {e}"),
        }
    };
    let versions = &[&rustls::version::TLS13];
    let mut server = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(versions)
        .map_err(pair("server"))?
        .with_client_cert_verifier(of_clients.clone())
        .with_single_cert(chain.clone(), key.clone_key())
        .map_err(pair("server"))?;
    // The first one that the peer knows too.
    server.alpn_protocols = [ALPN_STREAMS, ALPN, ALPN_JOIN].map(Vec::from).into();
    server.session_storage = Arc::new(NoServerSessionStorage {});
    server.send_tls13_tickets = 0;
    let mut client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .map_err(pair("client"))?
        .with_webpki_verifier(of_servers.clone())
        .with_client_auth_cert(chain, key)
        .map_err(pair("client"))?;
    client.resumption = Resumption::disabled();
    client.alpn_protocols = vec![ALPN_JOIN.to_vec()];
    let joining = client.clone();
    client.alpn_protocols = vec![ALPN_STREAMS.to_vec(), ALPN.to_vec()];

    let cas = cas.iter().map(|ca| CertificateInfo::from_der(ca));
    let cas = cas.collect::<Result<_, _>>().map_err(content(&paths.ca))?;
    let crls = crls.iter().map(|crl| CrlInfo::from_der(crl));
    let crls = crls.collect::<Result<_, _>>().map_err(content(crl_path))?;
    Ok(Current {
        server: Arc::new(server),
        client: Arc::new(client),
        joining: Arc::new(joining),
        of_clients,
        of_servers,
        status: TlsStatus {
            cert: info,
            cas,
            crls,
        },
    })
}

/// Verifies our own certificate as the peer will, so that a wrong set is found here, not there.
fn check_own(
    verifier: &dyn ClientCertVerifier,
    chain: &[CertificateDer<'static>],
    info: &CertificateInfo,
    paths: &TlsPaths,
    expired: Expired,
) -> Result<(), TlsError> {
    let real = SystemClock.now();
    if expired == Expired::Refuse && !(info.not_before..=info.not_after).contains(&real) {
        let why = "it has expired or is not valid yet; the one in use stays";
        return Err(content(&paths.cert)(why));
    }
    let verdict = verifier.verify_client_cert(&chain[0], &chain[1..], within(info, real));
    let error = match verdict {
        Ok(_) => return Ok(()),
        Err(rustls::Error::InvalidCertificate(error)) => error,
        Err(other) => return Err(content(&paths.cert)(other)),
    };
    use CertificateError as E;
    let list = matches!(
        error,
        E::ExpiredRevocationList | E::ExpiredRevocationListContext { .. }
    );
    if list && expired == Expired::Accept {
        return Ok(());
    }
    let path = if list { &paths.crl } else { &None };
    let (_, remedy) = failure::judge_certificate(&error);
    let path = path.as_deref().unwrap_or(&paths.cert);
    Err(content(path)(format!(
        "{}; {remedy}",
        failure::words(&error)
    )))
}

/// `now`, moved into the certificate's validity.
fn within(info: &CertificateInfo, now: Timestamp) -> UnixTime {
    let now = now.max(info.not_before).min(info.not_after);
    UnixTime::since_unix_epoch(std::time::Duration::from_nanos(now.0))
}

fn read_pem<T: PemObject>(path: &Path, what: &str) -> Result<Vec<T>, TlsError> {
    let bytes = read_public_file(path)?;
    let items = T::pem_slice_iter(&bytes).collect::<Result<Vec<T>, _>>();
    let items = items.map_err(content(path))?;
    if items.is_empty() {
        return Err(content(path)(format!("it holds no {what} in PEM form")));
    }
    Ok(items)
}

fn content<E: std::fmt::Display>(path: &Path) -> impl FnOnce(E) -> TlsError {
    move |why| TlsError::Content {
        path: path.to_owned(),
        why: why.to_string(),
    }
}

/// Parses a configured server name: DNS or IP.
pub(super) fn server_name(name: &str) -> Result<ServerName<'static>, String> {
    ServerName::try_from(name.to_owned()).map_err(|e| {
        let name: String = name.chars().take(260).collect();
        format!("server_name {name:?} is neither a DNS name nor an IP address: {e}")
    })
}
