//! Where vCPU threads stop, and what the guest is doing.
//!
//! ```text
//!            pause                    all vCPUs stopped            all captured
//!  Running ────────▶ vCPUs kicked ────────────────────▶ capture ──────────────▶ Paused ── resume ──▶
//!     │                                (last one: VM state; then each: its vCPU)
//!     │ fail / end (any thread: error of KVM, triple fault, failed disk write, reset)
//!     └────────▶ Failed(cause) or Stopped(cause): vCPUs park and never run again
//! ```
//!
//! Two steps, because state may only be captured once *no* vCPU runs: an interrupt that vCPU 1 sends
//! to vCPU 0 after vCPU 0 was captured would be lost. Interrupt controllers are captured before local
//! APICs for the same reason: a timer tick in between is then seen twice, not never.
//!
//! Invariants:
//! - `want` is written before a vCPU is kicked, and a vCPU clears its `immediate_exit` before it reads
//!   `want`: a kick is never lost.
//! - The gate opens only when every vCPU is captured, so no opening falls between the two steps.
//! - The first cause of an end stays.
//! - vCPUs that stand (`brake.rs`) are no pause: they wait outside the guest, and go to the gate from
//!   there. What holds for `want` and kicks holds for `standing` too.
//! - No wait here is endless: a vCPU that does not leave KVM in [`STOP_TIME_MAX`] is a failure.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::kvm_run;

use crate::guest::RunState;
use crate::vmm::VmmError;
use crate::vmm::state::{VcpuState, VmState};

/// Longest time a vCPU may take to stop.
const STOP_TIME_MAX: Duration = Duration::from_secs(10);
/// A kick is repeated after this time.
const KICK_AGAIN: Duration = Duration::from_millis(100);

/// What vCPU threads are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Want {
    /// Enter the guest.
    Run,
    /// Stop and wait.
    Pause,
    /// End the thread.
    Exit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Phase {
    Running,
    /// Out of the guest, accesses completed.
    Stopped,
    /// Captured and waiting.
    Parked,
    /// The thread ended.
    Exited,
}

/// How to get a vCPU thread out of the guest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kick {
    /// Kernel id of the thread.
    pub tid: libc::pid_t,
    /// Its `kvm_run`, mapped as long as the kick is registered.
    pub run: *mut kvm_run,
}

// SAFETY: the pointer is only used for an atomic store into memory that is mapped until the owning
// thread unregisters the kick under the gate's lock.
unsafe impl Send for Kick {}

struct Slot {
    phase: Phase,
    kick: Option<Kick>,
    captured: Option<Result<VcpuState, String>>,
}

struct Inner {
    state: RunState,
    want: Want,
    slots: Vec<Slot>,
    /// Number of times the gate was opened. A vCPU that sleeps through a short opening sees by it that
    /// it has to stop, and be captured, again.
    openings: u64,
    vm: Option<Result<VmState, String>>,
}

impl Inner {
    fn ended(&self) -> bool {
        matches!(self.state, RunState::Failed(_) | RunState::Stopped(_))
    }
}

/// Takes the VM's part of the state; called while no vCPU runs.
pub(crate) type CaptureVm = Box<dyn Fn() -> Result<VmState, VmmError> + Send + Sync>;

/// The gate of one machine.
pub(crate) struct Gate {
    inner: Mutex<Inner>,
    changed: Condvar,
    /// Copy of `inner.want` for the vCPUs' loop.
    want: AtomicU8,
    /// vCPUs stand outside the guest although they may run. Changed under the lock.
    standing: AtomicBool,
    capture_vm: CaptureVm,
}

impl Gate {
    /// A gate for `vcpus` threads. It is closed: they stop and are captured when they come.
    pub fn new(vcpus: usize, capture_vm: CaptureVm) -> Self {
        let slot = || Slot {
            phase: Phase::Running,
            kick: None,
            captured: None,
        };
        Self {
            inner: Mutex::new(Inner {
                state: RunState::Paused,
                want: Want::Pause,
                slots: (0..vcpus).map(|_| slot()).collect(),
                openings: 0,
                vm: None,
            }),
            changed: Condvar::new(),
            want: AtomicU8::new(Want::Pause as u8),
            standing: AtomicBool::new(false),
            capture_vm,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the guest is doing.
    pub fn state(&self) -> RunState {
        self.lock().state.clone()
    }

    /// Waits until the state differs from `seen`, at most `timeout`, and returns it.
    pub fn wait_change(&self, seen: &RunState, timeout: Duration) -> RunState {
        let inner = self.lock();
        let (inner, _) = self
            .changed
            .wait_timeout_while(inner, timeout, |i| i.state == *seen)
            .unwrap_or_else(PoisonError::into_inner);
        inner.state.clone()
    }

    /// True once the guest has failed or stopped.
    pub fn ended(&self) -> bool {
        self.lock().ended()
    }

    /// The guest cannot go on. The first cause counts. Does not wait.
    pub fn fail(&self, cause: impl Into<String>) {
        self.end(RunState::Failed(cause.into()));
    }

    /// The guest has ended. Does not wait.
    pub fn end(&self, state: RunState) {
        let mut inner = self.lock();
        if !inner.ended() {
            inner.state = state;
            if inner.want == Want::Run {
                self.set_want(&mut inner, Want::Pause);
            }
        }
        self.changed.notify_all();
    }

    /// Makes the vCPUs stand outside the guest, or lets them go on. Does not wait.
    pub fn stand(&self, standing: bool) {
        let inner = self.lock();
        self.standing.store(standing, Ordering::SeqCst);
        if standing && inner.want == Want::Run {
            kick_all(&inner);
        }
        self.changed.notify_all();
    }

    fn set_want(&self, inner: &mut Inner, want: Want) {
        inner.want = want;
        self.want.store(want as u8, Ordering::SeqCst);
        if want != Want::Run {
            kick_all(inner);
        }
        self.changed.notify_all();
    }

    /// Opens the gate. Does nothing unless the guest is paused.
    pub fn resume(&self) {
        // After `boot` the threads may still be on their way to the gate; none may be left between
        // its two steps.
        let (mut inner, _) = self.wait_all(self.lock(), |p| p >= Phase::Parked);
        if inner.state != RunState::Paused {
            return;
        }
        inner.state = RunState::Running;
        inner.openings += 1;
        inner.vm = None;
        for slot in &mut inner.slots {
            slot.captured = None;
            slot.phase = Phase::Running;
        }
        self.set_want(&mut inner, Want::Run);
    }

    /// Closes the gate and waits until every vCPU is captured.
    pub fn pause(&self) -> Result<(), VmmError> {
        let mut inner = self.lock();
        if inner.state == RunState::Running && inner.want == Want::Run {
            self.set_want(&mut inner, Want::Pause);
        }
        let (mut inner, stuck) = self.wait_all(inner, |p| p >= Phase::Parked);
        if let Some(vcpu) = stuck {
            let cause = format!(
                "vCPU {vcpu} did not leave KVM within {} s: the host kernel does not stop it",
                STOP_TIME_MAX.as_secs()
            );
            if !inner.ended() {
                inner.state = RunState::Failed(cause);
            }
        }
        if inner.state == RunState::Running {
            inner.state = RunState::Paused;
        }
        self.changed.notify_all();
        match &inner.state {
            RunState::Paused => Ok(()),
            state => Err(VmmError::State {
                what: "pause",
                state: state.clone(),
            }),
        }
    }

    /// Hands the captured state to `read`. Only while paused.
    pub fn captured<R>(
        &self,
        read: impl FnOnce(&VmState, &[&VcpuState]) -> R,
    ) -> Result<R, VmmError> {
        // After `boot` the threads may still be on their way to the gate.
        let (inner, _) = self.wait_all(self.lock(), |p| p >= Phase::Parked);
        if inner.state != RunState::Paused {
            return Err(VmmError::State {
                what: "save",
                state: inner.state.clone(),
            });
        }
        let vm = whole(&inner.vm)?;
        let vcpus: Vec<&VcpuState> = inner
            .slots
            .iter()
            .map(|slot| whole(&slot.captured))
            .collect::<Result<_, _>>()?;
        Ok(read(vm, &vcpus))
    }

    /// Ends the vCPU threads. False if one of them does not end.
    pub fn stop(&self, state: RunState) -> bool {
        let mut inner = self.lock();
        if !inner.ended() {
            inner.state = state;
        }
        self.set_want(&mut inner, Want::Exit);
        let (_inner, stuck) = self.wait_all(inner, |p| p == Phase::Exited);
        stuck.is_none()
    }

    /// Waits, with repeated kicks, until every slot's phase is `good`; else returns the first that is
    /// not after [`STOP_TIME_MAX`].
    fn wait_all<'a>(
        &self,
        mut inner: MutexGuard<'a, Inner>,
        good: impl Fn(Phase) -> bool,
    ) -> (MutexGuard<'a, Inner>, Option<usize>) {
        let start = Instant::now();
        loop {
            let late = inner.slots.iter().position(|s| !good(s.phase));
            if late.is_none() || start.elapsed() > STOP_TIME_MAX {
                return (inner, late);
            }
            let (guard, timeout) = self
                .changed
                .wait_timeout(inner, KICK_AGAIN)
                .unwrap_or_else(PoisonError::into_inner);
            inner = guard;
            if timeout.timed_out() {
                kick_all(&inner);
            }
        }
    }

    // ---- the vCPU threads' side ----

    /// What the calling vCPU is to do now.
    pub fn want(&self) -> Want {
        match self.want.load(Ordering::SeqCst) {
            w if w == Want::Run as u8 => Want::Run,
            w if w == Want::Pause as u8 => Want::Pause,
            _ => Want::Exit,
        }
    }

    /// Waits while the calling vCPU is to stand. False if it did: what it is to do may have changed.
    pub fn may_enter(&self) -> bool {
        if !self.standing.load(Ordering::SeqCst) {
            return true;
        }
        let stands = |i: &mut Inner| i.want == Want::Run && self.standing.load(Ordering::SeqCst);
        drop(
            self.changed
                .wait_while(self.lock(), stands)
                .unwrap_or_else(PoisonError::into_inner),
        );
        false
    }

    /// A vCPU thread is there.
    pub fn register(&self, vcpu: usize, kick: Kick) {
        self.lock().slots[vcpu].kick = Some(kick);
    }

    /// A vCPU thread ends; its `kvm_run` may be unmapped after this.
    pub fn unregister(&self, vcpu: usize) {
        let slot = &mut self.lock().slots[vcpu];
        slot.kick = None;
        slot.phase = Phase::Exited;
        self.changed.notify_all();
    }

    /// Stops here as long as the gate is closed. `capture` is called once no vCPU runs.
    pub fn park(&self, vcpu: usize, capture: impl FnOnce() -> Result<VcpuState, VmmError>) {
        let mut inner = self.lock();
        if inner.want != Want::Pause {
            return;
        }
        inner.slots[vcpu].phase = Phase::Stopped;
        let openings = inner.openings;
        let wait = |inner: MutexGuard<'_, Inner>, until: &dyn Fn(&Inner) -> bool| {
            let closed = |i: &mut Inner| i.want == Want::Pause && i.openings == openings;
            let waited = self.changed.wait_while(inner, |i| closed(i) && !until(i));
            let inner = waited.unwrap_or_else(PoisonError::into_inner);
            // Nobody asks for the state of a guest that has ended, and its vCPUs do not stop together.
            inner.want == Want::Pause && !inner.ended()
        };
        let all_stopped = if inner.slots.iter().all(|s| s.phase >= Phase::Stopped) {
            drop(inner);
            let vm = (self.capture_vm)().map_err(|e| e.to_string());
            self.lock().vm = Some(vm);
            self.changed.notify_all();
            true
        } else {
            wait(inner, &|i| i.vm.is_some() || i.ended())
        };
        let captured = all_stopped.then(|| capture().map_err(|e| e.to_string()));
        let mut inner = self.lock();
        inner.slots[vcpu].captured = captured;
        inner.slots[vcpu].phase = Phase::Parked;
        self.changed.notify_all();
        wait(inner, &|_| false);
    }
}

/// The captured part, or why there is none.
fn whole<T>(captured: &Option<Result<T, String>>) -> Result<&T, VmmError> {
    match captured {
        Some(Ok(state)) => Ok(state),
        Some(Err(why)) => Err(VmmError::Capture(why.clone())),
        None => Err(VmmError::Capture("its vCPUs did not stop".into())),
    }
}

fn kick_all(inner: &Inner) {
    for kick in inner.slots.iter().filter_map(|s| s.kick) {
        // SAFETY: the page is mapped while the kick is registered; the kernel and the owning thread
        // read this byte as it is, and all our accesses to it are atomic.
        unsafe {
            let flag = &raw mut (*kick.run).immediate_exit;
            AtomicU8::from_ptr(flag).store(1, Ordering::SeqCst);
            // A thread that is just ending gives ESRCH, which is as good.
            libc::syscall(libc::SYS_tgkill, libc::getpid(), kick.tid, libc::SIGRTMIN());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;
    use std::thread::JoinHandle;

    use super::*;

    /// A gate with threads that play vCPUs: they count while they are "in the guest".
    struct Rig {
        gate: Arc<Gate>,
        running: Arc<AtomicUsize>,
        turns: Arc<AtomicUsize>,
        threads: Vec<JoinHandle<()>>,
    }

    fn rig(vcpus: usize) -> Rig {
        let running = Arc::new(AtomicUsize::new(0));
        let turns = Arc::new(AtomicUsize::new(0));
        let watch = running.clone();
        let capture_vm = move || {
            assert_eq!(watch.load(Ordering::SeqCst), 0, "no vCPU runs");
            Ok(VmState::empty())
        };
        let gate = Arc::new(Gate::new(vcpus, Box::new(capture_vm)));
        let thread = |vcpu: usize| {
            let (gate, running, turns) = (gate.clone(), running.clone(), turns.clone());
            std::thread::spawn(move || {
                loop {
                    match gate.want() {
                        Want::Run if !gate.may_enter() => {}
                        Want::Run => {
                            running.fetch_add(1, Ordering::SeqCst);
                            std::thread::yield_now();
                            turns.fetch_add(1, Ordering::SeqCst);
                            running.fetch_sub(1, Ordering::SeqCst);
                        }
                        Want::Pause => gate.park(vcpu, || {
                            assert_eq!(running.load(Ordering::SeqCst), 0, "no vCPU runs");
                            Ok(VcpuState::empty())
                        }),
                        Want::Exit => return gate.unregister(vcpu),
                    }
                }
            })
        };
        let threads = (0..vcpus).map(thread).collect();
        Rig {
            gate,
            running,
            turns,
            threads,
        }
    }

    impl Rig {
        fn end(self) {
            assert!(self.gate.stop(RunState::Stopped("test".into())));
            for thread in self.threads {
                thread.join().unwrap();
            }
        }
    }

    #[test]
    fn nothing_is_captured_while_a_vcpu_runs() {
        let rig = rig(3);
        for round in 0..200 {
            rig.gate.resume();
            let before = rig.turns.load(Ordering::SeqCst);
            while round % 2 == 0 && rig.turns.load(Ordering::SeqCst) == before {
                std::thread::yield_now();
            }
            rig.gate.pause().unwrap();
            assert_eq!(rig.gate.captured(|_, vcpus| vcpus.len()).unwrap(), 3);
            assert_eq!(rig.running.load(Ordering::SeqCst), 0);
        }
        rig.end();
    }

    #[test]
    fn vcpus_that_stand_can_be_paused_and_go_on_afterwards() {
        let rig = rig(2);
        rig.gate.resume();
        for round in 0..50 {
            rig.gate.stand(true);
            // All are out of the guest once they had the time for one more turn each.
            while rig.running.load(Ordering::SeqCst) > 0 {
                std::thread::yield_now();
            }
            if round % 2 == 0 {
                rig.gate.pause().unwrap();
                assert_eq!(rig.gate.captured(|_, vcpus| vcpus.len()).unwrap(), 2);
                rig.gate.resume();
            }
            let before = rig.turns.load(Ordering::SeqCst);
            rig.gate.stand(false);
            while rig.turns.load(Ordering::SeqCst) == before {
                std::thread::yield_now();
            }
        }
        // Also when it ends.
        rig.gate.stand(true);
        rig.end();
    }

    #[test]
    fn the_first_cause_of_an_end_stays() {
        let rig = rig(2);
        rig.gate.resume();
        let seen = rig.gate.clone();
        let waiter = std::thread::spawn(move || {
            seen.wait_change(&RunState::Running, Duration::from_secs(60))
        });
        rig.gate.fail("first");
        rig.gate.fail("second");
        let failed = RunState::Failed("first".into());
        assert_eq!(waiter.join().unwrap(), failed);
        assert!(matches!(rig.gate.pause(), Err(VmmError::State { state, .. }) if state == failed));
        assert_eq!(rig.running.load(Ordering::SeqCst), 0, "all stand still");
        rig.gate.resume();
        assert_eq!(rig.gate.want(), Want::Pause);
        assert!(rig.gate.captured(|_, _| ()).is_err());
        let gate = rig.gate.clone();
        rig.end();
        assert_eq!(gate.state(), failed);
    }

    #[test]
    fn a_capture_that_fails_is_an_error_of_the_save_only() {
        let gate = Arc::new(Gate::new(
            1,
            Box::new(|| Err(VmmError::Capture("no PIT".into()))),
        ));
        let vcpu = gate.clone();
        let thread = std::thread::spawn(move || {
            while vcpu.want() != Want::Exit {
                vcpu.park(0, || Ok(VcpuState::empty()));
            }
            vcpu.unregister(0);
        });
        gate.pause().unwrap();
        let error = gate.captured(|_, _| ()).unwrap_err().to_string();
        assert!(error.contains("no PIT"), "{error}");
        gate.resume();
        assert_eq!(gate.state(), RunState::Running);
        assert!(gate.stop(RunState::Stopped("test".into())));
        thread.join().unwrap();
    }
}
