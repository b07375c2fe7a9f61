//! Threads that help encoders, and whoever decodes, and work whose results come back in order.
//!
//! ```text
//!  encoder ─ submit ─▶ [ task | task | task ]  oldest first ─ next ─▶ encoder, in the same order
//!                          ▲       ▲
//!                        helper  helper        whoever comes first does it: also the encoder,
//!                                              when it would have to wait
//! ```
//!
//! One thread less than there are processors, [`HELPERS_MAX`] at most, for all of the process together:
//! what an encoder cannot hand to others is about a quarter of its work, so that more would wait for it.
//! They sleep when there is nothing to do, and are started when they are first wanted. On one processor
//! there are none, and an encoder does everything itself, at the same places: what it makes is the same
//! to the last bit.
//!
//! Work can be done more than once, with the same result: it reads what it needs and changes nothing. So
//! an encoder whose helper has lost its processor to somebody else (a guest, say) does not wait for it
//! longer than [`PATIENCE`], and does the work itself; on a busy host an encoder with helpers is not
//! slower than one without. A panic in work goes on in the encoder that asks for the result. Work that
//! was dropped before somebody began it is not done at all.
//!
//! Dropped alternative: a work-stealing pool. Its threads look for work for a while before they sleep,
//! on processors that guests want; and whoever waits in it waits for the one who began.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

/// Most threads that help.
const HELPERS_MAX: usize = 3;

/// Threads that one encoder has for itself: the one that it runs on, and those that help.
pub fn encoding_threads() -> usize {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    processors.min(HELPERS_MAX + 1)
}

/// How long an encoder waits for work that a helper has begun: longer than most of it takes.
const PATIENCE: Duration = Duration::from_micros(500);

type Work<T> = Arc<dyn Fn() -> T + Send + Sync>;

enum State<T> {
    Waits(Work<T>),
    /// Begun; kept for whoever loses patience.
    Runs(Work<T>),
    Done(thread::Result<T>),
    /// The result was taken, or nobody wants it.
    Over,
}

struct Task<T> {
    state: Mutex<State<T>>,
    done: Condvar,
}

/// A task of whatever kind.
trait Help: Send + Sync {
    /// Does the work, unless somebody has begun it. True if it was done here.
    fn help(&self) -> bool;
}

impl<T> Task<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Work runs without the lock, so that a panic leaves the state as it was.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Send> Help for Task<T> {
    fn help(&self) -> bool {
        let work = {
            let mut state = self.lock();
            let State::Waits(work) = &*state else {
                return false;
            };
            let work = work.clone();
            *state = State::Runs(work.clone());
            work
        };
        let result = catch_unwind(AssertUnwindSafe(&*work));
        // What it holds is given back before anybody hears of the result.
        drop(work);
        let mut state = self.lock();
        // Otherwise nobody wants it any more.
        if matches!(*state, State::Runs(_)) {
            *state = State::Done(result);
            self.done.notify_all();
        }
        true
    }
}

/// Where tasks are handed to the helpers; `None` if there are none.
fn helpers() -> Option<&'static Sender<Arc<dyn Help>>> {
    static HELPERS: OnceLock<Option<Sender<Arc<dyn Help>>>> = OnceLock::new();
    let start = || {
        let (tx, rx) = mpsc::channel();
        let rx = Arc::new(Mutex::new(rx));
        let started = (1..encoding_threads()).filter(|number| {
            let rx = rx.clone();
            let thread = thread::Builder::new().name(format!("encode-{number}"));
            thread.spawn(move || run(&rx)).is_ok()
        });
        // A host that has no room for a thread goes on without.
        (started.count() > 0).then_some(tx)
    };
    HELPERS.get_or_init(start).as_ref()
}

fn run(tasks: &Mutex<Receiver<Arc<dyn Help>>>) {
    loop {
        let next = tasks.lock().unwrap_or_else(PoisonError::into_inner).recv();
        match next {
            Ok(task) => task.help(),
            Err(_) => return,
        };
    }
}

/// Work of one encoder: results come in the order in which it was submitted.
pub(super) struct Ordered<T> {
    tasks: VecDeque<Arc<Task<T>>>,
    /// Somebody may help.
    shared: bool,
}

impl<T: Send + 'static> Ordered<T> {
    /// `shared`: helpers take part; otherwise work is done as it is submitted.
    pub fn new(shared: bool) -> Self {
        Self {
            tasks: VecDeque::new(),
            shared,
        }
    }

    /// Number of results that were not taken.
    pub fn len(&self) -> usize {
        self.tasks.len()
    }

    /// Adds work. What is not `worth` being handed over is done here and now.
    pub fn submit(&mut self, worth: bool, work: impl Fn() -> T + Send + Sync + 'static) {
        let to = helpers_if(self.shared && worth);
        let state = match to {
            Some(_) => State::Waits(Arc::new(work) as Work<T>),
            None => State::Done(Ok(work())),
        };
        let task = Arc::new(Task {
            state: Mutex::new(state),
            done: Condvar::new(),
        });
        self.tasks.push_back(task.clone());
        if let Some(to) = to {
            // The receiving end lives as long as the process; if not, the work is done here later.
            let _ = to.send(task);
        }
    }

    /// The oldest result if it is there without work or waiting.
    pub fn ready(&mut self) -> Option<T> {
        let first = self.tasks.front()?;
        let done = matches!(*first.lock(), State::Done(_));
        if done { self.next() } else { None }
    }

    /// The oldest result; `None` if there is no work. While others are at it, does what nobody has
    /// begun; when there is nothing of that kind, and patience ends, what they are at.
    pub fn next(&mut self) -> Option<T> {
        let first = self.tasks.pop_front()?;
        first.help();
        let runs = |state: &mut State<T>| matches!(state, State::Runs(_));
        for task in &self.tasks {
            if !runs(&mut first.lock()) {
                break;
            }
            task.help();
        }
        let waited = first.done.wait_timeout_while(first.lock(), PATIENCE, runs);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let state = std::mem::replace(&mut *state, State::Over);
        match state {
            State::Done(Ok(result)) => Some(result),
            State::Done(Err(panic)) => resume_unwind(panic),
            State::Runs(work) => Some(work()),
            State::Waits(_) | State::Over => {
                unreachable!("its work was begun, and only we take the result")
            }
        }
    }
}

impl<T> Ordered<T> {
    /// Drops all work and all results.
    pub fn clear(&mut self) {
        for task in self.tasks.drain(..) {
            *task.lock() = State::Over;
        }
    }
}

fn helpers_if(wanted: bool) -> Option<&'static Sender<Arc<dyn Help>>> {
    match wanted {
        true => helpers(),
        false => None,
    }
}

impl<T> Drop for Ordered<T> {
    fn drop(&mut self) {
        self.clear();
    }
}

/// What nobody uses now, for whoever needs it next: as much as was ever used at the same time.
pub(super) struct Stock<T>(Mutex<Vec<T>>);

impl<T> Stock<T> {
    pub fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(Vec::new())))
    }

    pub fn take_or(&self, new: impl FnOnce() -> T) -> T {
        let one = self.all().pop();
        one.unwrap_or_else(new)
    }

    pub fn put(&self, one: T) {
        self.all().push(one);
    }

    /// Keeps at most so many.
    pub fn truncate(&self, most: usize) {
        let mut all = self.all();
        all.truncate(most);
        all.shrink_to_fit();
    }

    /// Something is in it or not before anything can panic.
    fn all(&self) -> MutexGuard<'_, Vec<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order_whoever_did_the_work() {
        for shared in [false, true] {
            let mut work = Ordered::new(shared);
            for number in 0..500 {
                work.submit(number % 7 > 0, move || (number, thread::current().id()));
                if number % 5 == 0 {
                    assert!(work.next().is_some());
                }
            }
            let taken = 500 - work.len();
            let rest: Vec<_> = std::iter::from_fn(|| work.next()).collect();
            assert!(rest.iter().map(|(number, _)| *number).eq(taken..500));
            let here = thread::current().id();
            assert!(shared || rest.iter().all(|(_, thread)| *thread == here));
        }
    }

    #[test]
    fn a_panic_goes_on_where_the_result_is_wanted() {
        for shared in [false, true] {
            let failed = catch_unwind(|| {
                let mut work = Ordered::new(shared);
                work.submit(true, || 1);
                work.submit(true, || -> i32 { panic!("the work's own") });
                work.submit(true, || 3);
                while work.next().is_some() {}
            });
            let text = failed.unwrap_err();
            assert_eq!(text.downcast_ref(), Some(&"the work's own"));
        }
        // The helpers have survived it.
        let mut work = Ordered::new(true);
        work.submit(true, || 4);
        assert_eq!(work.next(), Some(4));
    }

    #[test]
    fn dropped_work_gives_back_what_it_holds() {
        let held = Arc::new(());
        let mut work = Ordered::new(true);
        for _ in 0..100 {
            let held = held.clone();
            work.submit(true, move || Arc::strong_count(&held) > 0);
        }
        work.clear();
        assert_eq!((work.len(), work.next()), (0, None));
        drop(work);
        // What a helper was at is given back when it is through with it.
        while Arc::strong_count(&held) > 1 {
            thread::yield_now();
        }
    }

    /// A helper that has begun and gets no processor holds nobody up.
    #[test]
    fn work_that_takes_long_is_done_by_whoever_needs_it() {
        let here = thread::current().id();
        let (begun, entered) = mpsc::channel();
        let held = Arc::new(Mutex::new(()));
        let guard = held.lock().unwrap();
        let mut work = Ordered::new(true);
        let lock = held.clone();
        work.submit(true, move || {
            if thread::current().id() != here {
                begun.send(()).unwrap();
                drop(lock.lock().unwrap());
            }
            thread::current().id()
        });
        if encoding_threads() > 1 {
            entered.recv().unwrap();
        }
        assert_eq!(work.next(), Some(here));
        drop(guard);
    }
}
