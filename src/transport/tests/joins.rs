//! Streams that join a link, over TLS: those that may, and those that may not.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::super::join::{Keys, read_one};
use super::super::testpki::*;
use super::*;
use crate::wire::codec::Message;
use crate::wire::stripe::{Carried, Join, PIECE_BYTES};
use crate::wire::version::{ALPN, ALPN_JOIN, ALPN_STREAMS};

fn sites() -> (Arc<TlsMaterial>, Arc<TlsMaterial>) {
    let ca = TestCa::new("ca");
    (
        Files::good(&ca, "a", 1).load(),
        Files::good(&ca, "b", 2).load(),
    )
}

/// Bytes that went to the standby, by connection.
#[derive(Clone, Default)]
pub(super) struct Passed {
    each: Arc<Mutex<Vec<Arc<AtomicU64>>>>,
    open: Arc<AtomicU64>,
}

impl Passed {
    pub(super) fn each(&self) -> Vec<u64> {
        let all = self.each.lock().unwrap();
        all.iter().map(|n| n.load(Ordering::Relaxed)).collect()
    }

    /// True if so many connections have carried pieces.
    pub(super) fn busy(&self, streams: usize) -> bool {
        let each = self.each();
        let used = each.iter().filter(|n| **n > 2 * PIECE_BYTES as u64);
        used.count() == streams
    }

    /// Connections that have not ended.
    pub(super) fn open(&self) -> u64 {
        self.open.load(Ordering::Relaxed)
    }
}

async fn pass(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWriteExt + Unpin, n: &AtomicU64) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        n.fetch_add(read as u64, Ordering::Relaxed);
        if to.write_all(&buffer[..read]).await.is_err() {
            break;
        }
    }
    // The other end may be gone.
    let _ = to.shutdown().await;
}

/// Forwards connections and counts.
pub(super) async fn counting(target: String) -> (String, Passed) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let passed = Passed::default();
    let all = passed.clone();
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let far = TcpStream::connect(&target).await.unwrap();
            let n: Arc<AtomicU64> = Arc::default();
            all.each.lock().unwrap().push(n.clone());
            let open = all.open.clone();
            open.fetch_add(1, Ordering::Relaxed);
            tokio::spawn(async move {
                let (near_read, near_write) = near.into_split();
                let (far_read, far_write) = far.into_split();
                let back = AtomicU64::new(0);
                tokio::join!(
                    pass(near_read, far_write, &n),
                    pass(far_read, near_write, &back)
                );
                open.fetch_sub(1, Ordering::Relaxed);
            });
        }
    });
    (address, passed)
}

/// Sends parts until `enough`; each has to arrive as it was.
pub(super) async fn exchange(
    tx: &mut TlsTx<ToStandby>,
    rx: &mut TlsRx<ToStandby>,
    mut enough: impl FnMut() -> bool,
) {
    let mut round = 0u8;
    while !enough() {
        round = round.wrapping_add(1);
        let part = vec![round; 4 << 20];
        let (sent, part) =
            soon(async { tokio::join!(tx.send(ToStandby::Part(part.into())), rx.recv()) }).await;
        sent.unwrap();
        let ToStandby::Part(part) = part.unwrap() else {
            panic!("no part");
        };
        assert!(part.len() == 4 << 20 && part.iter().all(|b| *b == round));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_has_as_many_streams_as_its_dialer_says() {
    let (a, b) = sites();
    for streams in [1, 2, 8] {
        let mut standby = Standby::listen(&b, &["a"]).await;
        let (address, passed) = counting(standby.address()).await;
        let dialer = dialer(&a, address, "b").with_streams(streams);
        let (dialed, accepted) = tokio::join!(greet(&dialer, &a), answer(&mut standby, &b));
        let ((mut tx, rx), _) = dialed.unwrap();
        let mut accepted = accepted;
        // Each takes pieces, in the end.
        exchange(&mut tx, &mut accepted.rx, || passed.busy(streams)).await;
        assert_eq!((passed.each().len(), tx.streams()), (streams, streams));
        assert_eq!(b.peers().len(), 1, "one link");
        let received = accepted.stats.received_bytes();
        assert!(
            received > streams as u64 * 2 * PIECE_BYTES as u64,
            "{received}"
        );
        drop((tx, rx));
        assert_eq!(soon(accepted.rx.recv()).await, Err(LinkError::Closed));
    }
}

#[tokio::test]
async fn older_sites_get_and_give_one_stream() {
    let (a, b) = sites();
    // An older standby knows one name of the protocol.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, passed) = counting(listener.local_addr().unwrap().to_string()).await;
    let mut config = (*b.current().server).clone();
    config.alpn_protocols = vec![ALPN.to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let accept = async {
        let tls = acceptor.accept(listener.accept().await.unwrap().0).await;
        streams::start_plain::<_, ToPrimary, ToStandby>(tls.unwrap())
    };
    let dialer_of_new = dialer(&a, address, "b").with_streams(4);
    let (dialed, (mut tx2, mut rx2)) =
        soon(async { tokio::join!(dialer_of_new.dial(), accept) }).await;
    let (mut tx, _rx) = dialed.unwrap();
    let pong = ToPrimary::Pong {
        nonce: 0,
        at: Timestamp(1),
    };
    tx2.send(pong).await.unwrap();
    let mut rounds = 0;
    exchange(&mut tx, &mut rx2, || {
        rounds += 1;
        rounds > 5
    })
    .await;
    assert_eq!(passed.each().len(), 1);
    // An older primary says one name.
    let mut standby = Standby::listen(&b, &["a"]).await;
    let mut config = (*a.current().client).clone();
    config.alpn_protocols = vec![ALPN.to_vec()];
    let tls = connect(&standby, Arc::new(config)).await;
    assert_eq!(tls.get_ref().1.alpn_protocol(), Some(ALPN));
    let (mut tx, mut rx) = streams::start_plain::<_, ToStandby, ToPrimary>(tls);
    let me = Introduction::new(site("a"));
    let b_site = site("b");
    let hello = as_primary(&mut tx, &mut rx, &me, &b_site, Timestamp(1));
    let (hello, _) = tokio::join!(hello, answer(&mut standby, &b));
    hello.unwrap();
}

async fn connect(standby: &Standby, config: Arc<rustls::ClientConfig>) -> TlsStream<TcpStream> {
    let stream = TcpStream::connect(standby.address()).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let connected = TlsConnector::from(config).connect(name, stream);
    soon(connected).await.unwrap()
}

/// A first stream that the test holds itself, and its keys.
async fn first(standby: &mut Standby, a: &TlsMaterial) -> (TlsStream<TcpStream>, Keys, Accepted) {
    let tls = connect(standby, a.current().client.clone()).await;
    assert_eq!(tls.get_ref().1.alpn_protocol(), Some(ALPN_STREAMS));
    let keys = Keys::of(tls.get_ref().1).unwrap();
    let accepted = soon(standby.listener.accept()).await;
    (tls, keys, accepted)
}

/// What the standby says to a stream that joins; an error if it only closes.
async fn ask(tls: &mut TlsStream<TcpStream>, join: Join) -> Result<ToPrimary, LinkError> {
    let join = Carried::<ToStandby>::Join(join).encode().unwrap();
    tls.write_all(&join.to_bytes()).await.unwrap();
    soon(read_one::<ToPrimary>(tls)).await
}

async fn joins(
    standby: &Standby,
    a: &TlsMaterial,
    join: impl FnOnce(&TlsStream<TcpStream>) -> Join,
) -> (TlsStream<TcpStream>, Result<ToPrimary, LinkError>) {
    let mut tls = connect(standby, a.current().joining.clone()).await;
    assert_eq!(tls.get_ref().1.alpn_protocol(), Some(ALPN_JOIN));
    let join = join(&tls);
    let answer = ask(&mut tls, join).await;
    (tls, answer)
}

fn refused_text(answer: Result<ToPrimary, LinkError>) -> String {
    match answer {
        Ok(ToPrimary::Refused { text, .. }) => text,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn streams_that_may_not_join_are_refused_and_reported() {
    let ca = TestCa::new("ca");
    let (a, b) = (Files::good(&ca, "a", 1), Files::good(&ca, "b", 2));
    let (a, b) = (a.load(), b.load());
    let c = Files::good(&ca, "c", 3).load();
    let renewed = Files::good(&ca, "a", 4).load();
    let mut standby = Standby::listen(&b, &["a", "c"]).await;
    let (mut first, keys, mut accepted) = first(&mut standby, &a).await;
    let good = |index: u8| {
        let keys = &keys;
        move |tls: &TlsStream<TcpStream>| keys.join(index, tls.get_ref().1).unwrap()
    };
    // One that may.
    let (mut member, answer) = joins(&standby, &a, good(2)).await;
    assert!(
        matches!(answer, Ok(ToPrimary::Pong { nonce: 2, .. })),
        "{answer:?}"
    );
    // Twice; with the proof of another connection; of another index; of another link; out of range.
    let (_, answer) = joins(&standby, &a, good(2)).await;
    assert!(refused_text(answer).contains("there already"));
    assert_eq!(standby.refused().await.failure, HandshakeFailure::Protocol);
    let stolen = keys.join(3, member.get_ref().1).unwrap();
    let (_, answer) = joins(&standby, &a, |_| stolen).await;
    assert!(refused_text(answer).contains("proof"));
    let other_index = |tls: &TlsStream<TcpStream>| Join {
        index: 4,
        ..good(3)(tls)
    };
    let (_, answer) = joins(&standby, &a, other_index).await;
    assert!(refused_text(answer).contains("proof"));
    let bit = |tls: &TlsStream<TcpStream>| {
        let mut join = good(3)(tls);
        join.proof[31] ^= 1;
        join
    };
    let (_, answer) = joins(&standby, &a, bit).await;
    assert!(refused_text(answer).contains("proof"));
    for index in [0, 8, 255] {
        let (_, answer) = joins(&standby, &a, good(index)).await;
        let text = refused_text(answer);
        assert!(text.contains("eight") || text.contains("already"), "{text}");
    }
    for _ in 0..6 {
        assert_eq!(standby.refused().await.failure, HandshakeFailure::Protocol);
    }
    // Another site that is allowed here, and the same one with another certificate.
    for other in [&c, &renewed] {
        let (_, answer) = joins(&standby, other, good(3)).await;
        assert!(refused_text(answer).contains("certificate"));
        assert_eq!(standby.refused().await.failure, HandshakeFailure::WrongSite);
    }
    // A message that is no join.
    let mut tls = connect(&standby, a.current().joining.clone()).await;
    let close = ToStandby::Close.encode().unwrap().to_bytes();
    tls.write_all(&close).await.unwrap();
    let text = refused_text(soon(read_one::<ToPrimary>(&mut tls)).await);
    assert!(text.contains("does not join"), "{text}");
    assert_eq!(standby.refused().await.failure, HandshakeFailure::Protocol);
    // None of it touched the link: its stream still brings pieces.
    let part = ToStandby::Part(vec![9; 2 * PIECE_BYTES].into())
        .encode()
        .unwrap();
    let header = crate::wire::codec::Header::parse::<ToStandby>(&part.header).unwrap();
    let striped = Carried::<ToStandby>::Striped { number: 0, header };
    let bytes = striped.encode().unwrap().to_bytes();
    first.write_all(&bytes).await.unwrap();
    for offset in [PIECE_BYTES, 0] {
        let head = crate::wire::stripe::Piece::head(0, offset, PIECE_BYTES);
        member.write_all(&head).await.unwrap();
        member.write_all(&vec![9; PIECE_BYTES]).await.unwrap();
    }
    let part = soon(accepted.rx.recv()).await;
    assert_eq!(part, Ok(ToStandby::Part(vec![9; 2 * PIECE_BYTES].into())));
    // After the link's end there is nothing to join, and nobody to blame.
    drop((first, member, accepted));
    soon(async {
        while !b.peers().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let (_, answer) = joins(&standby, &a, good(3)).await;
    assert!(answer.is_err(), "{answer:?}");
    let tls = connect(&standby, a.current().client.clone()).await;
    assert!(standby.refused.try_recv().is_err());
    drop(tls);
}

#[tokio::test]
async fn a_stream_that_does_not_say_what_it_joins_is_given_up() {
    let (a, b) = sites();
    let times = LinkTimes {
        handshake_timeout: Duration::from_millis(1500),
        ..LinkTimes::default()
    };
    let mut standby = Standby::with(&b, &["a"], times, 8).await;
    let mut tls = connect(&standby, a.current().joining.clone()).await;
    let mut end = Vec::new();
    // Closed without a word; an error would do too.
    let _ = soon(tls.read_to_end(&mut end)).await;
    assert_eq!(end, b"");
    assert_eq!(standby.refused().await.failure, HandshakeFailure::Timeout);
}
