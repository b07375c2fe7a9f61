//! Peers that are slow, silent, garbled, or gone.

use std::net::Ipv4Addr;

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;

use super::super::testpki::*;
use super::*;
use crate::wire::message::RefuseReason;

fn pair() -> (Arc<TlsMaterial>, Arc<TlsMaterial>) {
    let ca = TestCa::new("ca");
    (
        Files::good(&ca, "a", 1).load(),
        Files::good(&ca, "b", 2).load(),
    )
}

#[tokio::test]
async fn garbage_instead_of_tls_is_counted_and_harms_nobody() {
    let (a, b) = pair();
    let mut standby = Standby::listen(&b, &["a"]).await;
    for garbage in [
        &b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"[..],
        &[0xff; 5000],
        &[0x16, 3, 1, 0xff, 0xff, 1],
        b"",
    ] {
        let mut stream = TcpStream::connect(standby.address()).await.unwrap();
        stream.write_all(garbage).await.unwrap();
        stream.shutdown().await.unwrap();
        let refused = standby.refused().await;
        assert!(
            matches!(
                refused.failure,
                HandshakeFailure::Protocol | HandshakeFailure::Other
            ),
            "{refused:?}"
        );
        // Whatever comes back is short, and then it ends.
        let mut back = Vec::new();
        let _ = soon(stream.read_to_end(&mut back)).await;
        assert!(back.len() < 100, "{} bytes", back.len());
    }
    let dialer = dialer(&a, standby.address(), "b");
    let (dialed, _accepted) = tokio::join!(greet(&dialer, &a), answer(&mut standby, &b));
    dialed.unwrap();
}

#[tokio::test]
async fn slow_handshakes_end_and_do_not_keep_others_out() {
    let (a, b) = pair();
    let times = LinkTimes {
        handshake_timeout: Duration::from_secs(3),
        ..LinkTimes::default()
    };
    let mut standby = Standby::with(&b, &["a"], times, 8).await;
    // From a second loopback address: four that say a little, and a fifth that is over its share.
    let mut slow = Vec::new();
    for _ in 0..5 {
        let socket = TcpSocket::new_v4().unwrap();
        socket
            .bind((Ipv4Addr::new(127, 0, 0, 2), 0).into())
            .unwrap();
        let mut stream = socket.connect(standby.listener.address()).await.unwrap();
        stream.write_all(&[0x16, 3, 1]).await.unwrap();
        slow.push(stream);
    }
    let refused = standby.refused().await;
    assert!(refused.text.contains("too many handshakes"), "{refused:?}");
    assert_eq!(refused.address.ip(), Ipv4Addr::new(127, 0, 0, 2));
    let dialer = dialer(&a, standby.address(), "b");
    let (dialed, _accepted) = tokio::join!(greet(&dialer, &a), answer(&mut standby, &b));
    dialed.unwrap();
    for _ in 0..4 {
        assert_eq!(standby.refused().await.failure, HandshakeFailure::Timeout);
    }
}

#[tokio::test]
async fn a_server_that_says_nothing_is_given_up() {
    let (a, _) = pair();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = DialTarget {
        address: listener.local_addr().unwrap().to_string(),
        server_name: "127.0.0.1".into(),
        site: site("b"),
    };
    let times = LinkTimes {
        handshake_timeout: Duration::from_millis(200),
        ..LinkTimes::default()
    };
    let dialer = TlsDialer::new(a.clone(), target, times, Env::system()).unwrap();
    let error = soon(dialer.dial()).await.map(drop).unwrap_err();
    assert_eq!(error.failure(), HandshakeFailure::Timeout, "{error}");
    drop(listener);
    let error = soon(dialer.dial()).await.map(drop).unwrap_err();
    assert!(matches!(error, LinkError::Connect { .. }), "{error}");
    assert_eq!(error.retry(), crate::wire::link::RetryClass::Transient);
}

#[tokio::test]
async fn a_refusal_arrives_although_the_primary_is_sending() {
    let (a, b) = pair();
    let mut standby = Standby::listen(&b, &["a"]).await;
    let dialer = dialer(&a, standby.address(), "b");
    for _ in 0..10 {
        let (dialed, mut accepted) = tokio::join!(greet(&dialer, &a), answer(&mut standby, &b));
        let ((mut tx, mut rx), _) = dialed.unwrap();
        let flood = async move {
            while tx
                .send(ToStandby::Part(vec![7; 1 << 20].into()))
                .await
                .is_ok()
            {}
        };
        let flood = tokio::spawn(flood);
        soon(accepted.rx.recv()).await.unwrap();
        let refusal = ToPrimary::Refused {
            reason: RefuseReason::NoSpace,
            text: "no room".into(),
        };
        accepted.tx.send(refusal.clone()).await.unwrap();
        drop(accepted);
        assert_eq!(soon(rx.recv()).await, Ok(refusal));
        assert!(soon(rx.recv()).await.is_err());
        soon(flood).await.unwrap();
    }
}

/// Forwards until it is told to stop, and then holds both connections open in silence.
async fn proxy(target: String) -> (String, watch::Sender<bool>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (stop, mut stopped) = watch::channel(false);
    tokio::spawn(async move {
        let (mut near, _) = listener.accept().await.unwrap();
        let mut far = TcpStream::connect(target).await.unwrap();
        let told = tokio::select! {
            told = stopped.wait_for(|stop| *stop) => told.is_ok(),
            _ = copy_bidirectional(&mut near, &mut far) => false,
        };
        if told {
            // Until the test ends.
            while stopped.changed().await.is_ok() {}
        }
        drop((near, far));
    });
    (address, stop)
}

#[tokio::test]
async fn silence_on_the_way_is_noticed_at_both_ends() {
    let (a, b) = pair();
    let times = LinkTimes {
        keepalive: Duration::from_millis(100),
        dead_after: Duration::from_millis(2500),
        ..LinkTimes::default()
    };
    let mut standby = Standby::with(&b, &["a"], times, 8).await;
    let (address, stop) = proxy(standby.address()).await;
    let target = DialTarget {
        address,
        server_name: "127.0.0.1".into(),
        site: site("b"),
    };
    let dialer = TlsDialer::new(a.clone(), target, times, Env::system()).unwrap();
    let (dialed, mut accepted) = tokio::join!(greet(&dialer, &a), answer(&mut standby, &b));
    let ((_tx, mut rx), _) = dialed.unwrap();
    // Idle for longer than `dead_after`: the beats keep it up, and give a round trip.
    let early = tokio::time::timeout(times.dead_after + times.keepalive * 3, rx.recv()).await;
    assert!(early.is_err(), "{early:?}");
    let rtt = dialer.stats().rtt().expect("pings were answered");
    assert!(rtt < times.dead_after);
    let offset = dialer.stats().clock_offset_ns().unwrap();
    assert!(
        offset.unsigned_abs() <= rtt.as_nanos() as u64,
        "one clock: {offset} ns"
    );
    stop.send_replace(true);
    let started = std::time::Instant::now();
    let (at_a, at_b) = soon(async { tokio::join!(rx.recv(), accepted.rx.recv()) }).await;
    assert_eq!(at_a, Err(LinkError::Dead(times.dead_after)));
    assert_eq!(at_b, Err(LinkError::Dead(times.dead_after)));
    assert!(started.elapsed() < times.dead_after * 10);
}
