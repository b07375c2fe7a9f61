//! Certificates for tests, odd ones included.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::*;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use time::{Duration as Span, OffsetDateTime};

use super::{TlsMaterial, TlsPaths, suites};
use crate::ids::SiteId;

pub(super) fn site(name: &str) -> SiteId {
    name.parse().unwrap()
}

pub(super) struct TestCa {
    pub(super) pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// What to put into a certificate. Days are relative to now.
pub(super) struct Leaf<'a> {
    pub(super) uris: &'a [&'a str],
    pub(super) serial: u64,
    pub(super) days: (i64, i64),
}

impl TestCa {
    pub(super) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        let issuer = Issuer::new(params, key);
        Self { pem, issuer }
    }

    /// Certificate and key for 127.0.0.1.
    pub(super) fn leaf(&self, leaf: &Leaf<'_>) -> (String, String) {
        let names = vec!["127.0.0.1".to_owned(), "site.test".to_owned()];
        let mut params = CertificateParams::new(names).unwrap();
        for uri in leaf.uris {
            let uri = (*uri).try_into().unwrap();
            params.subject_alt_names.push(SanType::URI(uri));
        }
        params.serial_number = Some(leaf.serial.into());
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        let now = OffsetDateTime::now_utc();
        params.not_before = now + Span::days(leaf.days.0);
        params.not_after = now + Span::days(leaf.days.1);
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        (cert.pem(), key.serialize_pem())
    }

    pub(super) fn crl(&self, revoked: &[u64], days: (i64, i64)) -> String {
        let now = OffsetDateTime::now_utc();
        let revoked_certs = revoked.iter().map(|serial| RevokedCertParams {
            serial_number: (*serial).into(),
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        });
        let params = CertificateRevocationListParams {
            this_update: now + Span::days(days.0),
            next_update: now + Span::days(days.1),
            crl_number: 1u64.into(),
            issuing_distribution_point: None,
            revoked_certs: revoked_certs.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().pem().unwrap()
    }
}

pub(super) const GOOD: (i64, i64) = (-1, 90);

/// The files of one site in a directory of their own.
pub(super) struct Files {
    pub(super) dir: tempfile::TempDir,
    pub(super) site: SiteId,
}

impl Files {
    /// A good certificate of this site.
    pub(super) fn good(ca: &TestCa, name: &str, serial: u64) -> Self {
        Self::dated(ca, name, serial, GOOD)
    }

    pub(super) fn dated(ca: &TestCa, name: &str, serial: u64, days: (i64, i64)) -> Self {
        let uri = format!("spiffe://lifeboat/site/{name}");
        let uris = &[uri.as_str()];
        let leaf = ca.leaf(&Leaf { uris, serial, days });
        Self::of(name, &ca.pem, &leaf, &ca.crl(&[], GOOD))
    }

    pub(super) fn of(name: &str, ca: &str, leaf: &(String, String), crl: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let files = Self {
            dir,
            site: site(name),
        };
        files.put("ca.pem", ca);
        files.put("cert.pem", &leaf.0);
        files.put("key.pem", &leaf.1);
        files.put("crl.pem", crl);
        files
    }

    pub(super) fn put(&self, name: &str, content: &str) {
        let path = self.dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        use std::os::unix::fs::PermissionsExt;
        let private = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(&path, private).unwrap();
    }

    pub(super) fn paths(&self) -> TlsPaths {
        let path = |name: &str| -> PathBuf { Path::join(self.dir.path(), name) };
        TlsPaths {
            ca: path("ca.pem"),
            cert: path("cert.pem"),
            key: path("key.pem"),
            crl: Some(path("crl.pem")),
        }
    }

    pub(super) fn load(&self) -> Arc<TlsMaterial> {
        TlsMaterial::load(&self.site, self.paths()).unwrap()
    }
}

fn roots(ca: &TestCa) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    let der = CertificateDer::from_pem_slice(ca.pem.as_bytes()).unwrap();
    roots.add(der).unwrap();
    roots
}

fn pair(leaf: &(String, String)) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let cert = CertificateDer::from_pem_slice(leaf.0.as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(leaf.1.as_bytes()).unwrap();
    (vec![cert], key)
}

/// A TLS client that none of our checks keeps from being odd.
pub(super) fn raw_client(
    ca: &TestCa,
    leaf: Option<&(String, String)>,
    alpn: &[&[u8]],
) -> Arc<ClientConfig> {
    let builder = ClientConfig::builder_with_provider(suites::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots(ca));
    let mut config = match leaf {
        None => builder.with_no_client_auth(),
        Some(leaf) => {
            let (chain, key) = pair(leaf);
            builder.with_client_auth_cert(chain, key).unwrap()
        }
    };
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Arc::new(config)
}

/// A TLS server that none of our checks keeps from being odd.
pub(super) fn raw_server(ca: &TestCa, leaf: &(String, String)) -> Arc<ServerConfig> {
    let provider = suites::provider();
    let verifier =
        WebPkiClientVerifier::builder_with_provider(roots(ca).into(), provider.clone()).build();
    let (chain, key) = pair(leaf);
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier.unwrap())
        .with_single_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![b"lifeboat/1".to_vec()];
    Arc::new(config)
}
