//! Links of several streams over in-memory ones: against a plain queue, and with streams that break,
//! stall and are slow.

use std::collections::VecDeque;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::time::{Instant, timeout};

use super::super::assembly::{AHEAD, Assembly, Torn};
use super::super::session::{self, Link};
use super::super::stats::Counted;
use super::streams::{TIMES, start_of};
use super::*;
use crate::ids::Epoch;
use crate::throttle::Throttle;
use crate::wire::codec::{Header, Message};
use crate::wire::message::RefuseReason;
use crate::wire::stripe::{Carried, PIECE_BYTES, Piece, STRIPED_BYTES_MIN};
use crate::wire::testlink::decode;

type Primary = (TlsTx<ToStandby>, TlsRx<ToPrimary>);
type Secondary = (TlsTx<ToPrimary>, TlsRx<ToStandby>);

/// A link of as many streams as there are pairs, all of which have joined.
async fn over(
    pairs: Vec<(DuplexStream, DuplexStream)>,
    limit: Option<Arc<Throttle>>,
) -> (Primary, Secondary) {
    let (near, near_spent) = Link::new(TIMES, Env::system(), Arc::default(), limit);
    let (far, far_spent) = Link::new(TIMES, Env::system(), Arc::default(), None);
    let streams = pairs.len();
    let mut pairs = VecDeque::from(pairs);
    let (first, second) = pairs.pop_front().unwrap();
    let primary = start_of(&near, near_spent, first);
    let secondary = start_of(&far, far_spent, second);
    for (at_near, at_far) in pairs {
        let stream = Counted::new(at_near, near.stats.clone());
        let heard = stream.heard();
        tokio::spawn(session::run_at_primary(stream, heard, near.clone()));
        let stream = Counted::new(at_far, far.stats.clone());
        let pongs = mpsc::channel(1);
        let heard = stream.heard();
        tokio::spawn(session::run_at_standby(stream, heard, far.clone(), pongs));
    }
    while primary.0.streams() < streams {
        tokio::task::yield_now().await;
    }
    (primary, secondary)
}

fn plain(streams: usize, buffer: usize) -> Vec<(DuplexStream, DuplexStream)> {
    (0..streams).map(|_| tokio::io::duplex(buffer)).collect()
}

/// A stream of which so many bytes pass to the standby; then it breaks, or stalls for ever.
fn ending(bytes: u64, breaks: bool) -> (DuplexStream, DuplexStream) {
    let (near, mut middle) = tokio::io::duplex(1 << 14);
    let (mut further, far) = tokio::io::duplex(1 << 14);
    tokio::spawn(async move {
        let mut left = bytes;
        let mut buffer = vec![0; 1 << 14];
        while left > 0 {
            let most = buffer.len().min(left as usize);
            let read = middle.read(&mut buffer[..most]).await.unwrap();
            further.write_all(&buffer[..read]).await.unwrap();
            left -= read as u64;
        }
        if !breaks {
            std::future::pending::<()>().await;
        }
    });
    (near, far)
}

fn numbers(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed;
    move |below| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 33) % below
    }
}

fn random_message(random: &mut impl FnMut(u64) -> u64) -> ToStandby {
    let pages = match random(4) {
        0 => {
            return ToStandby::Abandon {
                epoch: Epoch(random(1000)),
            };
        }
        1 => 1 + random(64),
        2 => 120 + random(20),
        _ => 1 + random(700),
    };
    let mut part = vec![0; pages as usize * 4096];
    for chunk in part.chunks_mut(512) {
        chunk[0] = random(256) as u8;
        chunk[511] = random(256) as u8;
    }
    ToStandby::Part(part.into())
}

#[tokio::test]
async fn messages_arrive_as_from_a_queue_and_all_before_the_end() {
    for streams in [1, 2, 4] {
        for seed in 0..12 {
            let mut random = numbers(seed);
            let buffer = [100, 5000, 1 << 16, 1 << 20][random(4) as usize];
            let ((mut tx, _rx), (_tx2, mut rx2)) = over(plain(streams, buffer), None).await;
            let mut model = VecDeque::new();
            let messages: Vec<_> = (0..15).map(|_| random_message(&mut random)).collect();
            model.extend(messages.iter().cloned());
            tokio::spawn(async move {
                for message in messages {
                    tx.send(message).await.unwrap();
                }
                // Dropped with a full queue: all of it still has to arrive.
            });
            while let Some(expected) = model.pop_front() {
                // A receiver that is dropped and asked again loses nothing.
                let message = loop {
                    let polls = random(3) as usize;
                    match streams::poll_few(rx2.recv(), polls).await {
                        Some(message) => break message.unwrap(),
                        None => tokio::task::yield_now().await,
                    }
                };
                assert!(message == expected, "{streams} streams, seed {seed}");
            }
            assert_eq!(soon(rx2.recv()).await, Err(LinkError::Closed));
        }
    }
}

/// The memory of striped parts comes back too.
#[tokio::test]
async fn the_memory_of_striped_parts_comes_back() {
    let ((mut tx, _rx), (_tx2, mut rx2)) = over(plain(3, 1 << 16), None).await;
    for _ in 0..5 {
        tx.send(ToStandby::Part(vec![3; 1 << 20].into()))
            .await
            .unwrap();
        soon(rx2.recv()).await.unwrap();
    }
    soon(async {
        while tx.spent().is_none_or(|part| part.len() != 1 << 20) {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_breaks_ends_the_link_with_its_reason() {
    // In the first piece, between pieces, in the middle of a part.
    for bytes in [3, 100_000, (PIECE_BYTES + 20) as u64, 900_000] {
        let pairs = vec![tokio::io::duplex(1 << 14), ending(bytes, true)];
        let ((mut tx, mut rx), (_tx2, mut rx2)) = over(pairs, None).await;
        let sender = tokio::spawn(async move {
            for i in (0..=u8::MAX).cycle() {
                if let Err(error) = tx.send(ToStandby::Part(vec![i; 1 << 20].into())).await {
                    return error;
                }
                // What goes over the other stream meanwhile takes time too.
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            unreachable!("it goes on for ever");
        });
        let mut received = 0_u8;
        let at_standby = loop {
            match soon(rx2.recv()).await {
                Ok(ToStandby::Part(part)) => {
                    assert!(part.iter().all(|b| *b == received));
                    received = received.wrapping_add(1);
                }
                Ok(other) => panic!("{other:?}"),
                Err(error) => break error,
            }
        };
        let at_primary = soon(rx.recv()).await.unwrap_err();
        let broken = |error: &LinkError| matches!(error, LinkError::Broken(_) | LinkError::Closed);
        assert!(broken(&at_standby), "{bytes}: {at_standby}");
        assert!(broken(&at_primary), "{bytes}: {at_primary}");
        assert!(broken(&soon(sender).await.unwrap()));
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_stream_is_a_dead_peer() {
    for bytes in [0, 300_000] {
        let pairs = vec![tokio::io::duplex(1 << 14), ending(bytes, false)];
        let ((mut tx, mut rx), (_tx2, mut rx2)) = over(pairs, None).await;
        let begun = Instant::now();
        tokio::spawn(async move {
            while tx
                .send(ToStandby::Part(vec![1; 1 << 20].into()))
                .await
                .is_ok()
            {}
        });
        let receive = async {
            loop {
                if let Err(error) = rx2.recv().await {
                    return error;
                }
            }
        };
        let (at_primary, at_standby) = tokio::join!(rx.recv(), receive);
        assert_eq!(at_primary, Err(LinkError::Dead(TIMES.dead_after)));
        let dead = [LinkError::Dead(TIMES.dead_after), LinkError::Closed];
        let gone = matches!(at_standby, LinkError::Broken(_)) || dead.contains(&at_standby);
        assert!(gone, "{at_standby}");
        assert!(begun.elapsed() < TIMES.dead_after * 2);
    }
}

#[tokio::test(start_paused = true)]
async fn idle_streams_stay_up() {
    let ((mut tx, mut rx), (_tx2, mut rx2)) = over(plain(4, 1 << 14), None).await;
    let early = timeout(TIMES.dead_after * 50, rx.recv()).await;
    assert!(early.is_err(), "{early:?}");
    tx.send(ToStandby::Part(vec![5; 4 << 20].into()))
        .await
        .unwrap();
    let part = soon(rx2.recv()).await;
    assert_eq!(part, Ok(ToStandby::Part(vec![5; 4 << 20].into())));
}

#[tokio::test(start_paused = true)]
async fn a_slow_role_bounds_what_all_streams_bring() {
    let ((mut tx, mut rx), (_tx2, mut rx2)) = over(plain(4, 1 << 14), None).await;
    let sender = tokio::spawn(async move {
        for i in 0..30u8 {
            tx.send(ToStandby::Part(vec![i; 1 << 20].into()))
                .await
                .unwrap();
        }
        tx
    });
    let early = timeout(TIMES.dead_after * 20, rx.recv()).await;
    assert!(early.is_err(), "{early:?}");
    // One in the queue, one in the reader's hands, two under way, and a piece of each stream.
    let most = (2 + AHEAD as u64) << 20;
    let received = rx2.stats().received_bytes();
    assert!(
        received < most + 4 * (PIECE_BYTES as u64 + 20_000),
        "{received}"
    );
    assert!(!sender.is_finished());
    for i in 0..30u8 {
        let part = rx2.recv().await.unwrap();
        assert!(part == ToStandby::Part(vec![i; 1 << 20].into()), "{i}");
    }
    drop(soon(sender).await.unwrap());
}

/// A stream that takes its time for each byte towards the standby, and has a way of some length.
fn slow(byte: Duration, way: Duration) -> (DuplexStream, DuplexStream) {
    let (near, middle) = tokio::io::duplex(1 << 14);
    let (further, far) = tokio::io::duplex(1 << 14);
    let (mut from, mut back_to) = tokio::io::split(middle);
    let (mut back_from, mut to) = tokio::io::split(further);
    tokio::spawn(async move { tokio::io::copy(&mut back_from, &mut back_to).await });
    let (leave, mut arrive) = mpsc::channel::<(Instant, Vec<u8>)>(1024);
    tokio::spawn(async move {
        let mut buffer = vec![0; 10_000];
        while let Ok(read @ 1..) = from.read(&mut buffer).await {
            tokio::time::sleep(byte * read as u32).await;
            let at = Instant::now() + way;
            if leave.send((at, buffer[..read].to_vec())).await.is_err() {
                return;
            }
        }
    });
    tokio::spawn(async move {
        while let Some((at, bytes)) = arrive.recv().await {
            tokio::time::sleep_until(at).await;
            if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
        // The far end may be gone.
        let _ = to.shutdown().await;
    });
    (near, far)
}

/// What one stream holds up is bounded at both ends, and the others wait for it.
#[tokio::test(start_paused = true)]
async fn a_slow_stream_holds_up_little_and_loses_nothing() {
    // 40 kB a second: the other two are as fast as memory.
    let mut pairs = plain(2, 1 << 16);
    pairs.push(slow(Duration::from_micros(25), Duration::ZERO));
    let ((mut tx, _rx), (_tx2, mut rx2)) = over(pairs, None).await;
    let sender = tokio::spawn(async move {
        for i in 0..40u8 {
            tx.send(ToStandby::Part(vec![i; 2 << 20].into()))
                .await
                .unwrap();
        }
    });
    let begun = Instant::now();
    for i in 0..40u8 {
        let part = rx2.recv().await.unwrap();
        assert!(part == ToStandby::Part(vec![i; 2 << 20].into()), "{i}");
    }
    sender.await.unwrap();
    assert_eq!(rx2.recv().await, Err(LinkError::Closed));
    // A third of it over the slow stream would take eleven minutes.
    assert!(
        begun.elapsed() < Duration::from_secs(300),
        "{:?}",
        begun.elapsed()
    );
}

/// Where several streams help: a long line that gives each connection 1 MB a second.
#[tokio::test(start_paused = true)]
async fn streams_add_up_where_each_connection_is_limited() {
    let mut took = Vec::new();
    for streams in [1, 2, 4] {
        let line = || slow(Duration::from_micros(1), Duration::from_millis(50));
        let pairs = (0..streams).map(|_| line()).collect();
        let ((mut tx, _rx), (_tx2, mut rx2)) = over(pairs, None).await;
        let begun = Instant::now();
        let send = async {
            for i in 0..5u8 {
                tx.send(ToStandby::Part(vec![i; 4 << 20].into()))
                    .await
                    .unwrap();
            }
        };
        let receive = async {
            for i in 0..5u8 {
                let part = rx2.recv().await.unwrap();
                assert!(part == ToStandby::Part(vec![i; 4 << 20].into()));
            }
        };
        tokio::join!(send, receive);
        took.push(begun.elapsed().as_secs_f64());
    }
    println!("20 MiB at 1 MB/s and connection: {took:.1?} s with 1, 2 and 4 streams");
    assert!(
        took[0] > 1.8 * took[1] && took[0] > 3.4 * took[2],
        "{took:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_limit_of_the_bandwidth_is_one_for_all_streams() {
    let throttle = Arc::new(Throttle::default());
    throttle.set(std::num::NonZeroU64::new(1 << 20));
    let ((mut tx, _rx), (_tx2, mut rx2)) = over(plain(4, 1 << 16), Some(throttle)).await;
    let begun = Instant::now();
    let send = async {
        for _ in 0..5 {
            tx.send(ToStandby::Part(vec![1; 2 << 20].into()))
                .await
                .unwrap();
        }
    };
    let receive = async {
        for _ in 0..5 {
            rx2.recv().await.unwrap();
        }
    };
    tokio::join!(send, receive);
    let took = begun.elapsed().as_secs_f64();
    assert!(
        (9.5..11.5).contains(&took),
        "10 MiB at 1 MiB/s took {took} s"
    );
}

#[tokio::test]
async fn a_refusal_arrives_although_all_streams_are_full() {
    for _ in 0..5 {
        let ((mut tx, mut rx), (mut tx2, mut rx2)) = over(plain(3, 1 << 14), None).await;
        let flood = tokio::spawn(async move {
            while tx
                .send(ToStandby::Part(vec![7; 2 << 20].into()))
                .await
                .is_ok()
            {}
        });
        soon(rx2.recv()).await.unwrap();
        let refusal = ToPrimary::Refused {
            reason: RefuseReason::NoSpace,
            text: "no room".into(),
        };
        tx2.send(refusal.clone()).await.unwrap();
        drop((tx2, rx2));
        assert_eq!(soon(rx.recv()).await, Ok(refusal));
        assert!(soon(rx.recv()).await.is_err());
        drop(rx);
        soon(flood).await.unwrap();
    }
}

fn piece(number: u64, offset: usize, bytes: usize) -> Piece {
    let mut message = Piece::head(number, offset, bytes).to_vec();
    message.resize(message.len() + bytes, offset as u8);
    match decode::<Carried<ToStandby>>(&message).unwrap() {
        Carried::Piece(piece) => piece,
        other => panic!("{other:?}"),
    }
}

fn announced(assembly: &Assembly, number: u64, bytes: usize) -> bool {
    let part = ToStandby::Part(vec![0; bytes].into()).encode().unwrap();
    let header = Header::parse::<ToStandby>(&part.header).unwrap();
    assembly
        .announce(number, header, vec![0; bytes].into())
        .is_ok()
}

#[tokio::test]
async fn pieces_that_do_not_fit_are_refused() {
    let assembly: Arc<Assembly> = Arc::default();
    let feeding = assembly.feed();
    let bytes = 2 * PIECE_BYTES + 4096;
    assert!(!announced(&assembly, 1, bytes), "it begins with 0");
    assert!(announced(&assembly, 0, bytes));
    assert!(!announced(&assembly, 0, bytes), "twice");
    let bad = [
        piece(0, 4096, PIECE_BYTES),
        piece(0, 0, PIECE_BYTES - 1),
        piece(0, 2 * PIECE_BYTES, 4095),
        piece(0, 2 * PIECE_BYTES, 4097),
        piece(0, 3 * PIECE_BYTES, 4096),
        piece(0, u32::MAX as usize, 1),
        piece(1, 0, PIECE_BYTES),
        piece(u64::MAX, 0, PIECE_BYTES),
    ];
    for piece in &bad {
        assembly.put_now(piece).unwrap_err();
    }
    for index in [1, 0] {
        let piece = piece(0, index * PIECE_BYTES, PIECE_BYTES);
        assembly.put_now(&piece).unwrap();
        assembly.put_now(&piece).unwrap_err();
    }
    assert!(streams::poll_few(assembly.front(), 3).await.is_none());
    assembly.put_now(&piece(0, 2 * PIECE_BYTES, 4096)).unwrap();
    let (_, body) = soon(assembly.front()).await.unwrap();
    assert_eq!(body.len(), bytes);
    assert_eq!(
        (body[0], body[PIECE_BYTES], body[2 * PIECE_BYTES]),
        (0, 0, 0)
    );
    assembly.put_now(&piece(0, 0, PIECE_BYTES)).unwrap_err();
    // Of another stream it waits for its message; without a stream nothing comes any more.
    let late = piece(1, 0, PIECE_BYTES);
    assert!(streams::poll_few(assembly.put(&late), 3).await.is_none());
    assert!(announced(&assembly, 1, bytes));
    soon(assembly.put(&late)).await.unwrap();
    drop(feeding);
    assert_eq!(soon(assembly.front()).await.map(drop), Err(Torn));
}

/// A peer that breaks the rules on a stream ends the link.
#[tokio::test]
async fn what_may_not_come_on_a_stream_ends_the_link() {
    let part = ToStandby::Part(vec![0; STRIPED_BYTES_MIN].into())
        .encode()
        .unwrap();
    let header = Header::parse::<ToStandby>(&part.header).unwrap();
    let striped = Carried::<ToStandby>::Striped { number: 3, header };
    let first = [
        striped.encode().unwrap().to_bytes(),
        [&Piece::head(0, 0, 4)[..], &[0; 4]].concat(),
    ];
    for bytes in first {
        let (near, mut far) = tokio::io::duplex(1 << 16);
        let (_tx, mut rx): Secondary = streams::start_plain(near);
        far.write_all(&bytes).await.unwrap();
        let error = soon(rx.recv()).await.unwrap_err();
        assert!(matches!(error, LinkError::Wire(_)), "{error}");
    }
    let close = ToStandby::Close.encode().unwrap().to_bytes();
    let (link, spent) = Link::new(TIMES, Env::system(), Arc::default(), None);
    let (near, _far) = tokio::io::duplex(1 << 16);
    let (_tx, mut rx): Secondary = start_of(&link, spent, near);
    let (near, mut far) = tokio::io::duplex(1 << 16);
    let pongs = mpsc::channel(1);
    tokio::spawn(session::run_at_standby(near, Arc::default(), link, pongs));
    far.write_all(&close).await.unwrap();
    let error = soon(rx.recv()).await.unwrap_err();
    assert!(matches!(error, LinkError::Wire(_)), "{error}");
}
