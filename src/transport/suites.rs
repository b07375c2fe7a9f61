//! The cryptography that links use: named here, passed on explicitly, nothing by default.

use std::sync::Arc;

use rustls::SupportedCipherSuite;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite};

/// aws-lc-rs with AES-128-GCM first. ChaCha20 costs twice as much where the CPU has AES, so it is
/// offered only where it has not, and then first. Key exchange: X25519MLKEM768 is preferred by the
/// provider itself.
pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: suites(cpu_has_aes()),
        ..aws_lc_rs::default_provider()
    })
}

fn suites(cpu_has_aes: bool) -> Vec<SupportedCipherSuite> {
    let mut suites = vec![
        cipher_suite::TLS13_AES_128_GCM_SHA256,
        cipher_suite::TLS13_AES_256_GCM_SHA384,
    ];
    if !cpu_has_aes {
        suites.insert(0, cipher_suite::TLS13_CHACHA20_POLY1305_SHA256);
    }
    suites
}

#[cfg(target_arch = "x86_64")]
fn cpu_has_aes() -> bool {
    std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq")
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu_has_aes() -> bool {
    // Server CPUs of other architectures that run KVM have it.
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chacha_is_for_cpus_without_aes_only() {
        use rustls::CipherSuite::*;
        let names = |aes| suites(aes).iter().map(|s| s.suite()).collect::<Vec<_>>();
        assert_eq!(
            names(true),
            [TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384]
        );
        assert_eq!(names(false)[0], TLS13_CHACHA20_POLY1305_SHA256);
    }
}
