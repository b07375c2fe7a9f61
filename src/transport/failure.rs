//! From what TLS and the system say to what an operator can act on.

use std::io;

use rustls::{AlertDescription, CertificateError, Error as Tls};

use crate::wire::link::{HandshakeFailure, LinkError};

/// An error of the TLS handshake.
pub(super) fn of_handshake(error: &io::Error) -> LinkError {
    if let Some(tls) = tls_of(error) {
        let (failure, text) = judge(tls);
        return LinkError::Handshake { failure, text };
    }
    let text = match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
            "the peer ended the connection during the TLS handshake; its log says why".to_owned()
        }
        _ => format!("the connection broke during the TLS handshake: {error}"),
    };
    LinkError::Handshake {
        failure: HandshakeFailure::Other,
        text,
    }
}

/// An error of a link that is up. With TLS 1.3 a client learns only here that its certificate was
/// refused.
pub(super) fn of_link(error: &io::Error) -> LinkError {
    match tls_of(error) {
        Some(Tls::AlertReceived(alert)) => match judge_alert(*alert) {
            (HandshakeFailure::Other, text) => LinkError::Broken(text),
            (failure, text) => LinkError::Handshake { failure, text },
        },
        Some(tls) => LinkError::Broken(format!("TLS: {tls}")),
        None if error.kind() == io::ErrorKind::UnexpectedEof => {
            LinkError::Broken("the peer went away without closing it".into())
        }
        None => LinkError::Broken(error.to_string()),
    }
}

fn tls_of(error: &io::Error) -> Option<&Tls> {
    error.get_ref()?.downcast_ref()
}

fn judge(error: &Tls) -> (HandshakeFailure, String) {
    match error {
        Tls::InvalidCertificate(why) => {
            let (failure, remedy) = judge_certificate(why);
            (
                failure,
                format!(
                    "the peer's certificate is refused: {}; {remedy}",
                    words(why)
                ),
            )
        }
        Tls::NoCertificatesPresented => (
            HandshakeFailure::UnknownCa,
            "the peer presented no certificate: it is no site of this installation".into(),
        ),
        Tls::AlertReceived(alert) => judge_alert(*alert),
        Tls::NoApplicationProtocol => (
            HandshakeFailure::Protocol,
            "the peer does not speak lifeboat/1: another program, or an incompatible version"
                .into(),
        ),
        Tls::InvalidMessage(_)
        | Tls::InappropriateMessage { .. }
        | Tls::InappropriateHandshakeMessage { .. }
        | Tls::PeerIncompatible(_)
        | Tls::PeerMisbehaved(_)
        | Tls::DecryptError
        | Tls::PeerSentOversizedRecord => (
            HandshakeFailure::Protocol,
            format!("the peer does not speak TLS 1.3 as it should: {error}"),
        ),
        other => (
            HandshakeFailure::Other,
            format!("the TLS handshake failed: {other}"),
        ),
    }
}

/// What is wrong with a certificate; rustls has words only for some of it.
pub(super) fn words(error: &CertificateError) -> String {
    use CertificateError as E;
    let words = match error {
        E::Revoked => "it was revoked",
        E::UnknownIssuer => "no CA of ours issued it",
        E::BadSignature => "the CA of that name did not sign it",
        E::UnknownRevocationStatus => "no revocation list covers it",
        E::InvalidPurpose | E::InvalidPurposeContext { .. } => {
            "it is not meant for both ends of a link"
        }
        other => return other.to_string(),
    };
    words.to_owned()
}

/// The label of a certificate that we refuse, and what to do about it.
pub(super) fn judge_certificate(error: &CertificateError) -> (HandshakeFailure, &'static str) {
    use CertificateError as E;
    match error {
        E::Expired | E::ExpiredContext { .. } | E::NotValidYet | E::NotValidYetContext { .. } => (
            HandshakeFailure::Expired,
            "renew it with `lifeboat pki issue`, or check the clocks of both hosts",
        ),
        E::ExpiredRevocationList | E::ExpiredRevocationListContext { .. } => (
            HandshakeFailure::Expired,
            "this site's revocation list is out of date: renew it with `lifeboat pki` and copy it here",
        ),
        E::Revoked => (
            HandshakeFailure::Revoked,
            "if that is a mistake, issue a new one with `lifeboat pki issue`",
        ),
        E::UnknownIssuer | E::BadSignature => (
            HandshakeFailure::UnknownCa,
            "both sites must use the same CA (ca.pem)",
        ),
        E::UnknownRevocationStatus => (
            HandshakeFailure::UnknownCa,
            "the revocation list is not of the CA that issued it: copy ca.pem and crl.pem together",
        ),
        E::NotValidForName | E::NotValidForNameContext { .. } => (
            HandshakeFailure::WrongSite,
            "`server_name` must be one of its names: change the configuration or issue it anew",
        ),
        _ => (
            HandshakeFailure::Other,
            "issue it with `lifeboat pki issue`",
        ),
    }
}

fn judge_alert(alert: AlertDescription) -> (HandshakeFailure, String) {
    use AlertDescription as A;
    let (failure, why) = match alert {
        A::CertificateRevoked => (
            HandshakeFailure::Revoked,
            "it was revoked; issue a new one with `lifeboat pki issue`",
        ),
        A::CertificateExpired => (
            HandshakeFailure::Expired,
            "it has expired or is not valid yet; renew it, or check the clocks of both hosts",
        ),
        A::UnknownCA => (
            HandshakeFailure::UnknownCa,
            "the peer does not know the CA that issued it, or the peer's revocation list is out of date",
        ),
        A::CertificateRequired | A::NoCertificate => {
            (HandshakeFailure::UnknownCa, "none was presented")
        }
        A::BadCertificate
        | A::UnsupportedCertificate
        | A::CertificateUnknown
        | A::DecryptError
        | A::AccessDenied => (
            HandshakeFailure::UnknownCa,
            "it is not acceptable there; issue it with `lifeboat pki issue`",
        ),
        A::NoApplicationProtocol => {
            return (
                HandshakeFailure::Protocol,
                "the peer does not speak lifeboat/1: another program, or an incompatible version"
                    .into(),
            );
        }
        A::ProtocolVersion | A::HandshakeFailure | A::DecodeError | A::UnexpectedMessage => {
            return (
                HandshakeFailure::Protocol,
                format!("the peer does not agree to TLS 1.3 as it is spoken here: {alert:?}"),
            );
        }
        other => {
            let text = format!("the peer ended the TLS session: {other:?}");
            return (HandshakeFailure::Other, text);
        }
    };
    (failure, format!("the peer refused our certificate: {why}"))
}
