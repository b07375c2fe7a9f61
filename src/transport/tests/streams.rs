//! The two tasks of a link over in-memory streams: time is paused, nothing is encrypted.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::time::{Instant, timeout};

use super::super::session::{self, First, Link};
use super::super::stats::Counted;
use super::*;
use crate::ids::Epoch;
use crate::wire::codec::{Message, WireError};

pub(super) const TIMES: LinkTimes = LinkTimes {
    connect_timeout: Duration::from_secs(5),
    handshake_timeout: Duration::from_secs(5),
    keepalive: Duration::from_secs(2),
    dead_after: Duration::from_secs(10),
};

/// A link over any stream, without a certificate behind it.
pub(super) fn start_plain<S, Out, In>(stream: S) -> (TlsTx<Out>, TlsRx<In>)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    Out: Message,
    In: Message,
{
    let (link, spent) = Link::new(TIMES, Env::system(), Arc::default(), None);
    start_of(&link, spent, stream)
}

/// The first stream of a link.
pub(super) fn start_of<S, Out, In>(
    link: &Arc<Link>,
    spent: session::Spent,
    stream: S,
) -> (TlsTx<Out>, TlsRx<In>)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    Out: Message,
    In: Message,
{
    let stream = Counted::new(stream, link.stats.clone());
    let first = First {
        heard: stream.heard(),
        stream,
        spent,
        membership: None,
        joinable: None,
        spoke: None,
    };
    session::start(link, first)
}

type Primary = (TlsTx<ToStandby>, TlsRx<ToPrimary>);
type Secondary = (TlsTx<ToPrimary>, TlsRx<ToStandby>);

fn both(buffer: usize) -> (Primary, Secondary) {
    let (near, far) = tokio::io::duplex(buffer);
    (start_plain(near), start_plain(far))
}

fn one(buffer: usize) -> (Primary, DuplexStream) {
    let (near, far) = tokio::io::duplex(buffer);
    (start_plain(near), far)
}

#[tokio::test(start_paused = true)]
async fn a_silent_peer_is_dead_after_the_time_for_it() {
    let ((mut tx, mut rx), _far) = one(1 << 20);
    let started = Instant::now();
    assert_eq!(rx.recv().await, Err(LinkError::Dead(TIMES.dead_after)));
    let took = started.elapsed();
    assert!(
        took >= TIMES.dead_after && took < TIMES.dead_after + TIMES.keepalive,
        "{took:?}"
    );
    let sent = tx.send(ToStandby::Close).await;
    assert_eq!(sent, Err(LinkError::Dead(TIMES.dead_after)));
}

#[tokio::test(start_paused = true)]
async fn a_single_byte_is_a_sign_of_life() {
    let ((_tx, mut rx), mut far) = one(1 << 20);
    let pong = ToPrimary::Pong {
        nonce: 0,
        at: Timestamp(1),
    };
    let bytes = pong.encode().unwrap().to_bytes();
    let started = Instant::now();
    for byte in &bytes {
        let early = timeout(Duration::from_secs(9), rx.recv()).await;
        assert!(early.is_err(), "{early:?}");
        far.write_all(&[*byte]).await.unwrap();
    }
    assert_eq!(rx.recv().await, Err(LinkError::Dead(TIMES.dead_after)));
    let alive = Duration::from_secs(9) * bytes.len() as u32;
    assert!(started.elapsed() >= alive + TIMES.dead_after);
}

#[tokio::test(start_paused = true)]
async fn an_idle_link_stays_up_and_measures_itself() {
    let ((mut tx, mut rx), (_tx2, mut rx2)) = both(1 << 16);
    for _ in 0..20 {
        let early = timeout(Duration::from_secs(300), rx.recv()).await;
        assert!(early.is_err(), "{early:?}");
    }
    assert!(tx.stats().rtt().is_some());
    assert!(rx2.stats().rtt().is_none());
    assert!(rx2.stats().since_received() <= TIMES.keepalive * 2);
    tx.send(ToStandby::Close).await.unwrap();
    assert_eq!(rx2.recv().await, Ok(ToStandby::Close));
}

#[tokio::test(start_paused = true)]
async fn a_slow_role_is_not_taken_for_a_dead_peer_and_bounds_the_sender() {
    let ((mut tx, mut rx), (_tx2, mut rx2)) = both(1 << 16);
    let sender = tokio::spawn(async move {
        for i in 0..20u8 {
            tx.send(ToStandby::Part(vec![i; 1 << 20].into()))
                .await
                .unwrap();
        }
        tx
    });
    // The standby's role takes nothing for a long time; both ends wait.
    let early = timeout(TIMES.dead_after * 20, rx.recv()).await;
    assert!(early.is_err(), "{early:?}");
    assert!(!sender.is_finished());
    let received = rx2.stats().received_bytes();
    assert!(
        received < 4 << 20,
        "{received} bytes were taken without a reader"
    );
    for i in 0..20u8 {
        let ToStandby::Part(part) = rx2.recv().await.unwrap() else {
            panic!("no part");
        };
        assert!(part.iter().all(|b| *b == i));
    }
    drop(sender.await.unwrap());
}

/// The memory of a part comes back when it is written; that of small messages is not worth it, and of
/// many parts only some are kept.
#[tokio::test(start_paused = true)]
async fn the_memory_of_sent_parts_comes_back() {
    let ((mut tx, _rx), (_tx2, mut rx2)) = both(1 << 16);
    assert_eq!(tx.spent(), None);
    for round in 1..10u8 {
        let part = vec![round; 1 << 20];
        let memory = part.as_ptr();
        tx.send(ToStandby::Part(part.into())).await.unwrap();
        tx.send(ToStandby::Part(vec![0; 4096].into()))
            .await
            .unwrap();
        rx2.recv().await.unwrap();
        rx2.recv().await.unwrap();
        // Behind the second part nothing of the first is wanted any more.
        tx.send(ToStandby::Part(vec![0; 4096].into()))
            .await
            .unwrap();
        rx2.recv().await.unwrap();
        let spent = tx.spent().expect("it was written");
        assert_eq!((spent.as_ptr(), spent.len()), (memory, 1 << 20));
        assert_eq!(tx.spent(), None);
    }
    for _ in 0..10 {
        tx.send(ToStandby::Part(vec![1; 1 << 20].into()))
            .await
            .unwrap();
        rx2.recv().await.unwrap();
    }
    tx.send(ToStandby::Close).await.unwrap();
    rx2.recv().await.unwrap();
    let kept = std::iter::from_fn(|| tx.spent()).count();
    assert_eq!(kept, 2);
}

#[tokio::test(start_paused = true)]
async fn a_stuck_write_ends_with_the_dead_peer() {
    // The far end takes 1000 bytes and then nothing more, and says nothing.
    let ((mut tx, mut rx), _far) = one(1000);
    tx.send(ToStandby::Part(vec![0; 1 << 20].into()))
        .await
        .unwrap();
    let sent = async {
        loop {
            if let Err(error) = tx.send(ToStandby::Part(vec![0; 4096].into())).await {
                return error;
            }
        }
    };
    let (received, sent) = tokio::join!(rx.recv(), sent);
    assert_eq!(received, Err(LinkError::Dead(TIMES.dead_after)));
    assert_eq!(sent, LinkError::Dead(TIMES.dead_after));
}

#[tokio::test]
async fn bad_bytes_end_the_link_with_their_reason() {
    let header = |bytes: u32, kind: u8| {
        let mut header = [0; 8];
        header[..4].copy_from_slice(&bytes.to_le_bytes());
        header[4] = kind;
        let sum = crc32c::crc32c(&header[..6]);
        header[6..].copy_from_slice(&((sum >> 16) as u16 ^ sum as u16).to_le_bytes());
        header.to_vec()
    };
    let length = |e: &WireError| matches!(e, WireError::Length { .. });
    type Judge<'a> = &'a dyn Fn(&WireError) -> bool;
    let cases: [(&str, Vec<u8>, Judge<'_>); 7] = [
        ("oversized part", header(u32::MAX, 3), &length),
        ("part over the limit", header((16 << 20) + 4096, 3), &length),
        ("empty part", header(0, 3), &length),
        ("part that is no multiple", header(5000, 3), &length),
        ("oversized open", header((1 << 20) + 1, 2), &length),
        ("an ack to a standby", header(40, 0x83), &|e| {
            matches!(e, WireError::Kind(0x83))
        }),
        ("noise", vec![0x5a; 64], &|e| {
            matches!(e, WireError::Check(_))
        }),
    ];
    for (name, bytes, judge) in cases {
        let (near, mut far) = tokio::io::duplex(1 << 16);
        let (_tx, mut rx): Secondary = start_plain(near);
        let good = ToStandby::Abandon { epoch: Epoch(9) };
        far.write_all(&good.clone().encode().unwrap().to_bytes())
            .await
            .unwrap();
        far.write_all(&bytes).await.unwrap();
        assert_eq!(soon(rx.recv()).await, Ok(good), "{name}");
        let error = soon(rx.recv()).await.unwrap_err();
        assert!(
            matches!(&error, LinkError::Wire(e) if judge(e)),
            "{name}: {error}"
        );
    }
}

#[tokio::test]
async fn an_end_between_messages_is_closed_and_within_one_is_broken() {
    let part = ToStandby::Part(vec![1; 8192].into())
        .encode()
        .unwrap()
        .to_bytes();
    for cut in [0, 1, 7, 8, 9, 4104, part.len() - 1, part.len()] {
        let (near, mut far) = tokio::io::duplex(1 << 16);
        let (_tx, mut rx): Secondary = start_plain(near);
        far.write_all(&part[..cut]).await.unwrap();
        far.shutdown().await.unwrap();
        if cut == part.len() {
            assert!(soon(rx.recv()).await.is_ok());
        }
        let error = soon(rx.recv()).await.unwrap_err();
        let whole = cut == 0 || cut == part.len();
        assert_eq!(error == LinkError::Closed, whole, "{cut}: {error}");
        assert_eq!(
            matches!(error, LinkError::Broken(_)),
            !whole,
            "{cut}: {error}"
        );
    }
}

#[tokio::test]
async fn what_was_queued_is_written_before_the_end() {
    let ((tx, rx), (mut tx2, rx2)) = both(100);
    for epoch in 0..30 {
        let text = "x".repeat(50);
        let epoch = Epoch(epoch);
        tx2.send(ToPrimary::Abandoned { epoch, text })
            .await
            .unwrap();
    }
    drop((tx2, rx2));
    let (_tx, mut rx) = (tx, rx);
    for n in 0..30 {
        let message = soon(rx.recv()).await.unwrap();
        assert!(matches!(message, ToPrimary::Abandoned { epoch: Epoch(e), .. } if e == n));
    }
    assert_eq!(soon(rx.recv()).await, Err(LinkError::Closed));
}

#[tokio::test(start_paused = true)]
async fn after_our_end_the_peer_is_read_for_a_while_and_not_for_ever() {
    let (near, mut far) = tokio::io::duplex(1 << 16);
    let link: Secondary = start_plain(near);
    drop(link);
    // The end is written at once, while the peer is still sending and never stops.
    let mut end = Vec::new();
    soon(far.read_to_end(&mut end)).await.unwrap();
    let message = ToStandby::Abandon { epoch: Epoch(1) };
    let bytes = message.encode().unwrap().to_bytes();
    let step = Duration::from_millis(50);
    let mut read_for = Duration::ZERO;
    while far.write_all(&bytes).await.is_ok() {
        tokio::time::advance(step).await;
        tokio::task::yield_now().await;
        read_for += step;
        assert!(read_for < session::LINGER * 2, "it reads for ever");
    }
    assert!(read_for >= session::LINGER, "{read_for:?}");
}

#[tokio::test]
async fn a_message_out_of_bounds_is_not_sent_and_harms_nothing() {
    let ((mut tx, _rx), (_tx2, mut rx2)) = both(1 << 16);
    for bytes in [0, 1, 4097, (16 << 20) + 4096] {
        let sent = tx.send(ToStandby::Part(vec![0; bytes].into())).await;
        assert!(
            matches!(sent, Err(LinkError::Unsendable(_))),
            "{bytes}: {sent:?}"
        );
    }
    tx.send(ToStandby::Close).await.unwrap();
    assert_eq!(soon(rx2.recv()).await, Ok(ToStandby::Close));
}

#[tokio::test]
async fn parts_of_any_size_arrive_where_a_disk_takes_them() {
    let ((mut tx, _rx), (_tx2, mut rx2)) = both(1 << 16);
    let sizes = [1 << 20, 4096, 1 << 20, 1 << 16, 2 << 20, 1 << 16, 8192];
    for (i, bytes) in sizes.into_iter().enumerate() {
        let sent = vec![i as u8; bytes];
        tx.send(ToStandby::Part(sent.clone().into())).await.unwrap();
        let ToStandby::Part(part) = soon(rx2.recv()).await.unwrap() else {
            panic!("no part");
        };
        assert!(*part == sent, "part {i}");
        assert!(
            part.as_ptr().addr().is_multiple_of(4096),
            "part {i} would be copied"
        );
    }
}

#[tokio::test]
async fn pings_are_answered_and_never_reach_the_role() {
    let (near, mut far) = tokio::io::duplex(1 << 16);
    let (_tx, mut rx): Secondary = start_plain(near);
    let ping = |nonce| ToStandby::Ping {
        nonce,
        at: Timestamp(1),
    };
    for nonce in [1, 77, u64::MAX] {
        let bytes = ping(nonce).encode().unwrap().to_bytes();
        far.write_all(&bytes).await.unwrap();
        let mut head = [0; 8];
        soon(far.read_exact(&mut head)).await.unwrap();
        let mut body = vec![0; head[0] as usize];
        far.read_exact(&mut body).await.unwrap();
        let header = crate::wire::codec::Header::parse::<ToPrimary>(&head).unwrap();
        let pong = ToPrimary::decode(header, body.into()).unwrap();
        assert!(
            matches!(pong, ToPrimary::Pong { nonce: n, .. } if n == nonce),
            "{pong:?}"
        );
    }
    far.write_all(&ToStandby::Close.encode().unwrap().to_bytes())
        .await
        .unwrap();
    assert_eq!(soon(rx.recv()).await, Ok(ToStandby::Close));
}

/// Polls a future a few times and drops it if it is not ready then.
pub(super) async fn poll_few<F: Future>(future: F, polls: usize) -> Option<F::Output> {
    let mut future = std::pin::pin!(future);
    for _ in 0..polls {
        tokio::select! {
            biased;
            output = &mut future => return Some(output),
            () = tokio::task::yield_now() => {}
        }
    }
    None
}

#[tokio::test]
async fn dropped_futures_lose_and_double_nothing() {
    for seed in 1..20u64 {
        let mut state = seed;
        let mut random = move |below: u64| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 33) % below
        };
        // Small buffers make every message arrive in many pieces.
        let ((mut tx, _rx), (_tx2, mut rx2)) = both(1 + random(9000) as usize);
        let (told, mut counts) = mpsc::unbounded_channel();
        let mut choice = random;
        let sender = tokio::spawn(async move {
            for n in 0..200u64 {
                let message = match choice(3) {
                    0 => ToStandby::Part(vec![n as u8; 4096 * (1 + choice(4) as usize)].into()),
                    _ => ToStandby::Abandon { epoch: Epoch(n) },
                };
                match poll_few(tx.send(message.clone()), choice(6) as usize).await {
                    Some(sent) => told.send((sent, message)).unwrap(),
                    None => tokio::task::yield_now().await,
                }
            }
            tx
        });
        let mut received = Vec::new();
        let collect = async {
            loop {
                match poll_few(rx2.recv(), random(4) as usize).await {
                    Some(Ok(message)) => received.push(message),
                    Some(Err(error)) => return error,
                    None => tokio::task::yield_now().await,
                }
            }
        };
        let end = async {
            let tx = sender.await.unwrap();
            drop(tx);
            std::future::pending::<()>().await
        };
        let error = soon(async {
            tokio::select! {
                error = collect => error,
                () = end => unreachable!("it never ends"),
            }
        });
        assert_eq!(error.await, LinkError::Closed);
        let mut sent = Vec::new();
        while let Some((result, message)) = counts.recv().await {
            assert_eq!(result, Ok(()));
            sent.push(message);
        }
        assert!(!sent.is_empty());
        assert!(
            sent == received,
            "seed {seed}: {} sent, {} received",
            sent.len(),
            received.len()
        );
    }
}
