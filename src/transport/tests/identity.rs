//! Who may talk to whom, and what each side is told when not.

use rustls::pki_types::ServerName;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::super::testpki::*;
use super::*;
use crate::ids::{Epoch, ImageRoot};
use crate::wire::message::RefuseReason;
use crate::wire::version::VERSION;

#[tokio::test]
async fn a_good_pair_exchanges_messages_both_ways() {
    let ca = TestCa::new("ca");
    let (a, b) = (Files::good(&ca, "a", 1), Files::good(&ca, "b", 2));
    let (a, b) = (a.load(), b.load());
    let mut standby = Standby::listen(&b, &["a"]).await;
    let dialer = dialer(&a, standby.address(), "b");
    let (dialed, mut accepted) = tokio::join!(greet(&dialer, &a), answer(&mut standby, &b));
    let ((mut tx, mut rx), reply) = dialed.unwrap();
    assert_eq!((reply.site, reply.version), (site("b"), VERSION));
    assert_eq!(accepted.peer.site, site("a"));
    assert_eq!(accepted.peer.uri, "spiffe://lifeboat/site/a");
    assert_eq!(accepted.peer.serial, "01");
    let sizes = [4096, 16 << 20, 8192, 1 << 20, 4096];
    let send = async {
        for (i, bytes) in sizes.into_iter().enumerate() {
            tx.send(ToStandby::Part(vec![i as u8; bytes].into()))
                .await
                .unwrap();
        }
        tx.send(ToStandby::Close).await.unwrap();
    };
    let receive = async {
        for (i, bytes) in sizes.into_iter().enumerate() {
            let ToStandby::Part(part) = accepted.rx.recv().await.unwrap() else {
                panic!("no part");
            };
            assert!(part.len() == bytes && part.iter().all(|b| *b == i as u8));
            let ack = ToPrimary::Ack {
                epoch: Epoch(i as u64),
                root: ImageRoot([i as u8; 32]),
                durable_at: Timestamp(5),
                busy_us: None,
            };
            accepted.tx.send(ack).await.unwrap();
        }
        assert_eq!(accepted.rx.recv().await.unwrap(), ToStandby::Close);
    };
    soon(async { tokio::join!(send, receive) }).await;
    for i in 0..sizes.len() as u64 {
        let ToPrimary::Ack { epoch, .. } = soon(rx.recv()).await.unwrap() else {
            panic!("no ack");
        };
        assert_eq!(epoch, Epoch(i));
    }
    let bytes = sizes.iter().sum::<usize>() as u64;
    assert!(dialer.stats().sent_bytes() > bytes);
    assert!(accepted.stats.received_bytes() > bytes);
    // The end of one side is an orderly end at the other.
    drop((tx, rx));
    let end = soon(accepted.rx.recv()).await;
    assert_eq!(end, Err(LinkError::Closed));
    assert_eq!(accepted.rx.recv().await, end, "the reason stays");
    let sent = soon(async {
        loop {
            let pong = ToPrimary::Pong {
                nonce: 0,
                at: Timestamp(0),
            };
            if let Err(error) = accepted.tx.send(pong).await {
                return error;
            }
        }
    });
    assert_eq!(sent.await, LinkError::Closed);
}

/// A dial that must fail: the label at each side, and words that the primary's error must have.
async fn refused_pair(
    name: &str,
    (a, b): (&Files, &Files),
    at_primary: (HandshakeFailure, &str),
    at_standby: HandshakeFailure,
) {
    let (a, b) = (a.load(), b.load());
    let mut standby = Standby::listen(&b, &["a"]).await;
    let dialer = dialer(&a, standby.address(), "b");
    let error = greet(&dialer, &a).await.map(drop).unwrap_err();
    assert_eq!(error.failure(), at_primary.0, "{name}: {error}");
    assert!(error.to_string().contains(at_primary.1), "{name}: {error}");
    let refused = standby.refused().await;
    assert_eq!(refused.failure, at_standby, "{name}: {}", refused.text);
}

#[tokio::test]
async fn bad_certificates_are_refused_with_their_reason_at_both_sides() {
    use HandshakeFailure::*;
    let (ca, other) = (TestCa::new("ca"), TestCa::new("other"));
    let (a, b) = (Files::good(&ca, "a", 1), Files::good(&ca, "b", 2));

    let stranger = Files::good(&other, "a", 1);
    let both = format!("{}{}", ca.pem, other.pem);
    stranger.put("ca.pem", &both);
    let crls = format!("{}{}", ca.crl(&[], GOOD), other.crl(&[], GOOD));
    stranger.put("crl.pem", &crls);
    let expect = (UnknownCa, "does not know the CA");
    refused_pair("client of another CA", (&stranger, &b), expect, UnknownCa).await;

    let stranger = Files::good(&other, "b", 1);
    stranger.put("ca.pem", &both);
    stranger.put("crl.pem", &crls);
    let expect = (UnknownCa, "both sites must use the same CA");
    refused_pair("server of another CA", (&a, &stranger), expect, UnknownCa).await;

    let old = Files::dated(&ca, "a", 3, (-10, -1));
    refused_pair("client expired", (&old, &b), (Expired, "expired"), Expired).await;
    let early = Files::dated(&ca, "a", 4, (1, 10));
    let expect = (Expired, "not valid yet");
    refused_pair("client not yet valid", (&early, &b), expect, Expired).await;
    let old = Files::dated(&ca, "b", 5, (-10, -1));
    let expect = (Expired, "the peer's certificate is refused");
    refused_pair("server expired", (&a, &old), expect, Expired).await;
    let early = Files::dated(&ca, "b", 6, (1, 10));
    let expect = (Expired, "check the clocks");
    refused_pair("server not yet valid", (&a, &early), expect, Expired).await;

    let strict = Files::good(&ca, "b", 2);
    strict.put("crl.pem", &ca.crl(&[1, 77], GOOD));
    let expect = (Revoked, "it was revoked");
    refused_pair("client revoked", (&a, &strict), expect, Revoked).await;
    let strict = Files::good(&ca, "a", 1);
    strict.put("crl.pem", &ca.crl(&[2], GOOD));
    let expect = (Revoked, "the peer's certificate is refused");
    refused_pair("server revoked", (&strict, &b), expect, Revoked).await;

    let stale = Files::good(&ca, "b", 2);
    stale.put("crl.pem", &ca.crl(&[], (-40, -10)));
    let expect = (UnknownCa, "revocation list is out of date");
    refused_pair("standby's list expired", (&a, &stale), expect, Expired).await;
    let stale = Files::good(&ca, "a", 1);
    stale.put("crl.pem", &ca.crl(&[], (-40, -10)));
    let expect = (Expired, "this site's revocation list is out of date");
    refused_pair("primary's list expired", (&stale, &b), expect, UnknownCa).await;

    let unknown = Files::good(&ca, "c", 9);
    let expect = (WrongSite, "site c may not replicate to site b");
    refused_pair(
        "site that is not allowed",
        (&unknown, &b),
        expect,
        WrongSite,
    )
    .await;
}

#[tokio::test]
async fn a_server_that_is_another_one_is_refused_by_the_primary() {
    let ca = TestCa::new("ca");
    let (a, b) = (Files::good(&ca, "a", 1), Files::good(&ca, "b", 2));
    let (a, b) = (a.load(), b.load());
    let standby = Standby::listen(&b, &["a"]).await;
    // Another site than expected.
    let wrong = dialer(&a, standby.address(), "c");
    let error = soon(wrong.dial()).await.map(drop).unwrap_err();
    assert_eq!(error.failure(), HandshakeFailure::WrongSite);
    assert!(error.to_string().contains("is site b, not c"), "{error}");
    assert_eq!(error.retry(), crate::wire::link::RetryClass::Permanent);
    // Another name than expected.
    let named = |name: &str| {
        let target = DialTarget {
            address: standby.address(),
            server_name: name.to_owned(),
            site: site("b"),
        };
        TlsDialer::new(a.clone(), target, LinkTimes::default(), Env::system())
    };
    soon(named("site.test").unwrap().dial())
        .await
        .map(drop)
        .unwrap();
    let error = soon(named("elsewhere.test").unwrap().dial()).await;
    let error = error.map(drop).unwrap_err();
    assert_eq!(error.failure(), HandshakeFailure::WrongSite);
    assert!(error.to_string().contains("`server_name`"), "{error}");
    assert!(named("not a name").is_err());
}

#[tokio::test]
async fn certificates_without_exactly_one_site_uri_are_refused_at_both_sides() {
    let ca = TestCa::new("ca");
    let (a, b) = (Files::good(&ca, "a", 1), Files::good(&ca, "b", 2));
    let (a, b) = (a.load(), b.load());
    let uris: [&[&str]; 4] = [
        &[],
        &["spiffe://lifeboat/site/a", "spiffe://lifeboat/site/b"],
        &["spiffe://lifeboat/site/a", "https://example.org/"],
        &["spiffe://elsewhere/site/a"],
    ];
    for uris in uris {
        let leaf = ca.leaf(&Leaf {
            uris,
            serial: 7,
            days: GOOD,
        });
        // Such a client at our listener: it is told why.
        let mut standby = Standby::listen(&b, &["a", "b"]).await;
        let config = raw_client(&ca, Some(&leaf), &[b"lifeboat/1"]);
        let stream = TcpStream::connect(standby.address()).await.unwrap();
        let name = ServerName::try_from("127.0.0.1").unwrap();
        let tls = TlsConnector::from(config)
            .connect(name, stream)
            .await
            .unwrap();
        let (mut tx, mut rx) = streams::start_plain::<_, ToStandby, ToPrimary>(tls);
        let me = Introduction::new(site("a"));
        let error = soon(as_primary(&mut tx, &mut rx, &me, &site("b"), Timestamp(0))).await;
        assert!(
            matches!(&error, Err(HandshakeError::Refused { reason: RefuseReason::WrongSite, text })
                if text.contains("URI")),
            "{uris:?}: {error:?}"
        );
        assert_eq!(standby.refused().await.failure, HandshakeFailure::NoUri);
        // Such a server for our dialer.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dialer = dialer(&a, listener.local_addr().unwrap().to_string(), "a");
        let acceptor = TlsAcceptor::from(raw_server(&ca, &leaf));
        let serve = async { acceptor.accept(listener.accept().await.unwrap().0).await };
        let (error, _served) = tokio::join!(soon(dialer.dial()), serve);
        let error = error.map(drop).unwrap_err();
        assert_eq!(
            error.failure(),
            HandshakeFailure::NoUri,
            "{uris:?}: {error}"
        );
        // Such a certificate as our own.
        let own = Files::of("a", &ca.pem, &leaf, &ca.crl(&[], GOOD));
        let error = TlsMaterial::load(&own.site, own.paths()).map(drop);
        assert!(error.unwrap_err().to_string().contains("pki issue"));
    }
}

#[tokio::test]
async fn clients_without_certificate_or_without_our_protocol_are_refused() {
    let ca = TestCa::new("ca");
    let b = Files::good(&ca, "b", 2).load();
    let leaf = ca.leaf(&Leaf {
        uris: &["spiffe://lifeboat/site/a"],
        serial: 1,
        days: GOOD,
    });
    let mut standby = Standby::listen(&b, &["a"]).await;

    type Case<'a> = (
        Option<&'a (String, String)>,
        &'a [&'a [u8]],
        HandshakeFailure,
    );
    let cases: [Case<'_>; 3] = [
        (None, &[b"lifeboat/1"], HandshakeFailure::UnknownCa),
        (Some(&leaf), &[], HandshakeFailure::Protocol),
        (
            Some(&leaf),
            &[b"h2", b"lifeboat/2"],
            HandshakeFailure::Protocol,
        ),
    ];
    for (leaf, alpn, failure) in cases {
        let config = raw_client(&ca, leaf, alpn);
        let stream = TcpStream::connect(standby.address()).await.unwrap();
        let name = ServerName::try_from("127.0.0.1").unwrap();
        let mut tls = TlsConnector::from(config).connect(name, stream).await;
        if let Ok(tls) = &mut tls {
            use tokio::io::AsyncReadExt;
            let ended = soon(tls.read(&mut [0; 16])).await;
            assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
        }
        let refused = standby.refused().await;
        assert_eq!(refused.failure, failure, "{alpn:?}: {}", refused.text);
    }
}

#[tokio::test]
async fn tls_is_1_3_with_aes_128_and_post_quantum_key_exchange() {
    let ca = TestCa::new("ca");
    let (a, b) = (Files::good(&ca, "a", 1), Files::good(&ca, "b", 2));
    let (a, b) = (a.load().current(), b.load().current());
    let (client, server) = tokio::io::duplex(64 << 10);
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let (client, server) = tokio::join!(
        TlsConnector::from(a.client.clone()).connect(name, client),
        TlsAcceptor::from(b.server.clone()).accept(server),
    );
    let (client, server) = (client.unwrap(), server.unwrap());
    let connection = client.get_ref().1;
    let group = connection.negotiated_key_exchange_group().unwrap();
    assert_eq!(group.name(), rustls::NamedGroup::X25519MLKEM768);
    assert_eq!(
        connection.protocol_version(),
        Some(rustls::ProtocolVersion::TLSv1_3)
    );
    let suite = connection.negotiated_cipher_suite().unwrap().suite();
    if std::arch::is_x86_feature_detected!("aes") {
        assert_eq!(suite, rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    }
    let agreed = server.get_ref().1.alpn_protocol();
    assert_eq!(agreed, Some(&b"lifeboat/1 streams"[..]));
}
