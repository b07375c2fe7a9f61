//! Work on many pieces that is done ahead by several threads, and used in order.
//!
//! ```text
//!   thread 0:  make 0, 2, 4 ...  ──▶ ┐
//!   thread 1:  make 1, 3, 5 ...  ──▶ ┴─ use 0, 1, 2, 3 ...   (the caller's thread)
//!                  ◀── buffers come back ──┘
//! ```
//!
//! Reading, checking and decoding of big things cost about as much as using them; each thread has two
//! buffers, so that it makes one piece while the other one is used. What comes out does not depend on
//! how the threads run.

use std::num::NonZero;
use std::sync::mpsc::sync_channel;
use std::thread;

/// Threads that make pieces: more do not help, because one thread uses all of them.
const THREADS_MAX: usize = 4;
/// Buffers of a thread.
const BUFFERS: usize = 2;

/// Reads that the disk has to do at a time: most of their time is its answer.
pub(super) const READS: usize = 8;

/// Threads for work that keeps a processor busy, if it is worth several.
pub(super) fn threads(worth: bool) -> usize {
    let cores = || thread::available_parallelism().map_or(1, NonZero::get);
    if worth { cores().min(THREADS_MAX) } else { 1 }
}

/// Threads for so many small reads.
pub(super) fn readers(count: usize) -> usize {
    if count < READS { 1 } else { READS }
}

/// Calls `make` for the pieces 0 to `count` - 1, with a buffer that may have been used for another one,
/// and `each` with what it made, in order. With one thread the caller's own does all. Ends with the first
/// error in the order of the pieces, whichever of the two it comes from.
pub(super) fn in_order<T: Default + Send, E: Send>(
    count: usize,
    threads: usize,
    make: impl Fn(usize, &mut T) -> Result<(), E> + Sync,
    mut each: impl FnMut(usize, &mut T) -> Result<(), E>,
) -> Result<(), E> {
    let threads = threads.min(count);
    if threads < 2 {
        let mut buffer = T::default();
        return (0..count).try_for_each(|number| {
            make(number, &mut buffer)?;
            each(number, &mut buffer)
        });
    }
    thread::scope(|scope| {
        let make = &make;
        // A host that has no room for a thread does without.
        let lanes: Vec<Option<_>> = (0..threads)
            .map(|first| {
                let (give, given) = sync_channel::<T>(BUFFERS);
                let (done, made) = sync_channel(BUFFERS);
                for _ in 0..BUFFERS {
                    give.send(T::default()).expect("there is room for all");
                }
                let work = move || {
                    for number in (first..count).step_by(threads) {
                        // Whoever wanted the pieces has given up.
                        let Ok(mut buffer) = given.recv() else { return };
                        let result = make(number, &mut buffer);
                        let failed = result.is_err();
                        if done.send(result.map(|()| buffer)).is_err() || failed {
                            return;
                        }
                    }
                };
                let begun = thread::Builder::new().spawn_scoped(scope, work);
                begun.is_ok().then_some((give, made))
            })
            .collect();
        let mut own = T::default();
        for number in 0..count {
            let Some((give, made)) = &lanes[number % threads] else {
                make(number, &mut own)?;
                each(number, &mut own)?;
                continue;
            };
            // A thread ends early only after an error, or by a panic, which the scope passes on.
            let Ok(result) = made.recv() else {
                panic!("a thread that made pieces ended too early");
            };
            let mut buffer = result?;
            each(number, &mut buffer)?;
            // The thread may be done.
            let _ = give.send(buffer);
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pieces are used in order with what was made for them; the first error in that order counts.
    #[test]
    fn pieces_come_in_order_and_the_first_error_ends() {
        for threads in [1, 2, 5] {
            for count in [0, 1, 2, 3, 50] {
                for (bad_make, bad_use) in [(99, 99), (0, 99), (7, 5), (5, 7), (49, 99), (99, 49)] {
                    let mut seen = Vec::new();
                    let result = in_order(
                        count,
                        threads,
                        |number, buffer: &mut Vec<usize>| {
                            buffer.clear();
                            buffer.resize(number, number * 3);
                            if number == bad_make {
                                return Err(("made", number));
                            }
                            Ok(())
                        },
                        |number, buffer| {
                            assert_eq!(*buffer, vec![number * 3; number]);
                            if number == bad_use {
                                return Err(("used", number));
                            }
                            seen.push(number);
                            Ok(())
                        },
                    );
                    let end = bad_make.min(bad_use).min(count);
                    assert_eq!(seen, (0..end).collect::<Vec<_>>(), "{threads} {count}");
                    let expected = match end {
                        end if end == count => Ok(()),
                        end if end == bad_make => Err(("made", end)),
                        end => Err(("used", end)),
                    };
                    assert_eq!(result, expected, "{threads} {count}");
                }
            }
        }
    }
}
