//! How runs end: healed and converged, promoted and fenced, or sabotaged and found out.

use std::sync::atomic::Ordering;
use std::time::Duration;

use lifeboat::guest::RunState;
use lifeboat::guest::fake::FakeMachine;
use lifeboat::ids::Generation;
use lifeboat::primary::{Command, Outcome};
use tokio::time::{Instant, sleep, timeout};

use crate::site_b::{self, Shared};
use crate::world::{Undo, World};

/// After the last fault there must be a new point within this (virtual) time. The sum of what the
/// roles may wait: dead-peer detection twice, the longest backoff, a full copy.
pub const CONVERGE_WITHIN: Duration = Duration::from_secs(40);

impl World {
    /// The guest is protected for some steps, and nothing fails but what the script sabotages.
    /// `audit` restarts site A's daemon at the end, which then reads everything once more.
    pub async fn run_sabotaged(&mut self, steps: u64, audit: bool) {
        self.checker.book.lock().unwrap().calm = true;
        self.start_b();
        self.start_a();
        for _ in 0..steps {
            sleep(Duration::from_millis(300)).await;
        }
        // What was dropped last must not be written, and so noticed, again: a cut or two later all
        // changes are durable, but for that.
        self.writer.pace.store(0, Ordering::Relaxed);
        sleep(Duration::from_secs(2)).await;
        if audit {
            self.kill_a().await;
            self.start_a();
            sleep(Duration::from_secs(3)).await;
        }
        let (store, catalogue) = (self.site_b.store.fork(), self.site_b.catalogue.fork());
        self.recover(store, catalogue, true);
        if let Some(replica) = self.b.as_ref().and_then(site_b::Daemon::replica) {
            let replica = replica.lock().unwrap();
            self.checker.tracking(&self.machine, replica.journal());
        }
    }

    /// Everything works again.
    pub async fn heal(&mut self) {
        if self.site_b.store.is_off() {
            self.kill_b(true).await;
        }
        self.undo.clear();
        for undo in [
            Undo::Unblock,
            Undo::Accept,
            Undo::HealDisk,
            Undo::Calm,
            Undo::Pace,
            Undo::StartB,
            Undo::StartA,
        ] {
            self.undo(undo);
        }
        self.checker.book.lock().unwrap().calm = true;
        self.trace.note("healed", "");
    }

    /// A new point within bounded time; then, with the guest at rest, a point equal to the guest.
    pub async fn converge(&mut self) {
        let epoch = self.checker.newest_acked();
        let acks = self.checker.acks();
        let limit = Instant::now() + CONVERGE_WITHIN;
        while self.checker.acks() < acks + 2 || self.checker.newest_acked() <= epoch {
            assert!(
                Instant::now() < limit,
                "no new point after all faults ended: {}",
                self.why()
            );
            self.step(Duration::from_millis(100)).await;
        }
        self.trace.note("converged", self.checker.newest_acked());
        self.writer.pace.store(0, Ordering::Relaxed);
        let limit = Instant::now() + CONVERGE_WITHIN;
        while !self.settled_and_equal() {
            assert!(
                Instant::now() < limit,
                "a guest at rest is not settled: {}",
                self.why()
            );
            self.step(Duration::from_millis(200)).await;
        }
        let daemon = self.a.take().expect("it was started");
        let drain = daemon.commands.send(Command::Drain(Duration::from_secs(5)));
        drain.await.expect("the role takes commands");
        let outcome = timeout(Duration::from_secs(10), daemon.outcome()).await;
        assert_eq!(outcome.ok(), Some(Outcome::Drained));
    }

    /// The newest point is the guest as it is, byte for byte.
    fn settled_and_equal(&self) -> bool {
        let Some(replica) = self.b.as_ref().and_then(site_b::Daemon::replica) else {
            return false;
        };
        let replica = replica.lock().unwrap();
        let journal = replica.journal();
        let Some(newest) = journal.newest() else {
            return false;
        };
        let Some((state, image)) = self.checker.point(journal, newest) else {
            return false;
        };
        if state != self.machine.device_state() {
            return false;
        }
        let same = image.into_regions() == self.machine.image();
        assert!(
            same,
            "#{} has the guest's state and not its content",
            newest.epoch
        );
        self.machine.base().is_some_and(|b| b.epoch == newest.epoch)
            && self.machine.unsettled().is_empty()
    }

    fn why(&self) -> String {
        let status = self.a.as_ref().map(|a| a.status.borrow().clone());
        format!("{status:?}")
    }

    /// Site B works, and has its copy open.
    pub async fn open_b(&mut self) -> Shared {
        if self.site_b.store.is_off() {
            self.kill_b(true).await;
        }
        self.undo(Undo::HealDisk);
        self.start_b();
        loop {
            if let Some(replica) = self.b.as_ref().and_then(site_b::Daemon::replica) {
                return replica;
            }
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Site B becomes the owner while A runs and knows nothing of it.
    pub async fn promote(&mut self) {
        let replica = self.open_b().await;
        let generation = Generation(2);
        let (state, image, newest) = {
            let mut replica = replica.lock().unwrap();
            let newest = replica
                .journal()
                .newest()
                .cloned()
                .expect("there are acknowledged points");
            let promoted = replica.promote(generation, None);
            let promotion = promoted.unwrap_or_else(|e| panic!("promotion fails: {e}"));
            assert_eq!(promotion.point.epoch, newest.epoch);
            let (state, image) = self
                .checker
                .point(replica.journal(), &newest)
                .expect("a good point");
            (state, image, newest)
        };
        drop(replica);
        self.checker.promoted(generation, newest.epoch);
        self.trace
            .note("promoted", format_args!("at #{}", newest.epoch));
        let run = [200; 16];
        let clock = self.site_b.clock.clone();
        let resumed =
            FakeMachine::restore(self.spec.clone(), run, clock, state, image.into_regions());
        let resumed = resumed.expect("the point restores");
        assert_eq!(resumed.state(), RunState::Paused);
        // The old side goes on for a while, whatever its link is like, and is fenced in the end.
        for _ in 0..5 {
            let wait = self.dice.micros(1_000..900_000);
            self.step(wait).await;
        }
        self.heal().await;
        let daemon = self.a.take().expect("it was started");
        let outcome = timeout(CONVERGE_WITHIN, daemon.outcome()).await;
        let fenced = Outcome::Fenced {
            generation,
            site: self.site_b.site.clone(),
        };
        assert_eq!(outcome.ok(), Some(fenced), "the old owner was not fenced");
        // A restart of either daemon changes nothing.
        self.kill_b(true).await;
        self.undo.clear();
        self.start_b();
        self.start_a();
        let daemon = self.a.take().expect("it was started");
        let again = timeout(CONVERGE_WITHIN, daemon.outcome()).await;
        assert!(matches!(again, Ok(Outcome::Fenced { .. })), "{again:?}");
    }
}
