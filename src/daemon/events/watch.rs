//! What is new since the last look.

use std::collections::BTreeMap;

use crate::clock::Timestamp;
use crate::control::events::{Event, EventKind, Severity};
use crate::control::types::{GuestStatus, Run, RunId, RunStatus};
use crate::ids::{GuestId, SiteId};
use crate::metrics::labels::{GuestState, Operation, Role};

/// Days that a certificate has left when somebody has to know, and when they have to act.
const DAYS_WARNING: i64 = 14;
const DAYS_CRITICAL: i64 = 2;

/// An event that has no number yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Draft {
    kind: EventKind,
    severity: Severity,
    guest: Option<GuestId>,
    peer: Option<SiteId>,
    run: Option<RunId>,
    text: String,
}

impl Draft {
    pub fn new(kind: EventKind, severity: Severity, text: String) -> Self {
        Self {
            kind,
            severity,
            guest: None,
            peer: None,
            run: None,
            text,
        }
    }

    fn of(mut self, guest: &GuestId) -> Self {
        self.guest = Some(guest.clone());
        self
    }

    /// With its number.
    pub fn event(self, seq: u64, at: Timestamp) -> Event {
        Event {
            seq,
            at,
            kind: self.kind,
            severity: self.severity,
            guest: self.guest,
            peer: self.peer,
            run: self.run,
            text: self.text,
        }
    }
}

/// A guest as it was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SeenGuest {
    pub state: GuestState,
    pub role: Role,
    pub peer: Option<SiteId>,
    pub why: Option<String>,
    pub obstacle: Option<String>,
    pub mismatches: u64,
}

impl SeenGuest {
    pub fn of(status: &GuestStatus, mismatches: u64) -> Self {
        Self {
            state: status.state,
            role: status.role,
            peer: status.peer.clone(),
            why: status.blocked_on.clone(),
            obstacle: status.obstacle.clone(),
            mismatches,
        }
    }

    /// Something has to go over the link to its peer.
    fn needs_link(&self) -> bool {
        matches!(
            self.state,
            GuestState::InitialSync
                | GuestState::Protected
                | GuestState::Degraded
                | GuestState::Resync
        )
    }
}

/// The site at one look.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    pub guests: BTreeMap<GuestId, SeenGuest>,
    /// Whether it is heard, and why not.
    pub peers: BTreeMap<SiteId, (bool, Option<String>)>,
    pub runs: Vec<Run>,
    pub journal_full: bool,
    /// Days that each has left.
    pub certificates: BTreeMap<String, i64>,
}

/// Remembers the last look.
#[derive(Default)]
pub(super) struct Watch {
    before: Option<Seen>,
    /// Of each run, whether its beginning and its end were told.
    runs: BTreeMap<RunId, (bool, bool)>,
    /// Guests whose lateness was told and is not over.
    late: BTreeMap<GuestId, ()>,
}

impl Watch {
    /// What is new. Of the first look only what needs somebody is.
    pub fn look(&mut self, now: Seen) -> Vec<Draft> {
        let mut drafts = Vec::new();
        self.runs(&now, &mut drafts);
        let before = self.before.take();
        certificates(before.as_ref(), &now, &mut drafts);
        if let Some(before) = &before {
            for (name, guest) in &now.guests {
                if let Some(was) = before.guests.get(name) {
                    self.guest(name, was, guest, &mut drafts);
                }
            }
            links(before, &now, &mut drafts);
        }
        let was_full = before.as_ref().is_some_and(|before| before.journal_full);
        match (was_full, now.journal_full) {
            (false, true) => drafts.push(Draft::new(
                EventKind::JournalFull,
                Severity::Critical,
                "less is free for journals than is kept free: history stops growing".to_owned(),
            )),
            (true, false) => drafts.push(Draft::new(
                EventKind::JournalOk,
                Severity::Info,
                "there is space for journals again".to_owned(),
            )),
            _ => {}
        }
        self.late.retain(|guest, ()| now.guests.contains_key(guest));
        self.before = Some(now);
        drafts
    }

    fn guest(&mut self, name: &GuestId, was: &SeenGuest, is: &SeenGuest, to: &mut Vec<Draft>) {
        use GuestState::{Degraded, Fenced, Protected, Stopped, Unprotected};
        let mut say = |kind, severity, text: String| {
            to.push(Draft::new(kind, severity, format!("{name}: {text}")).of(name));
        };
        if was.state != is.state {
            let why = is.why.clone().unwrap_or_else(|| is.state.to_string());
            match is.state {
                Protected if self.late.remove(name).is_some() => say(
                    EventKind::GuestRecovered,
                    Severity::Info,
                    "is within its target again".to_owned(),
                ),
                Protected if !matches!(was.state, GuestState::Resync) => say(
                    EventKind::GuestProtected,
                    Severity::Info,
                    "is protected".to_owned(),
                ),
                // Said once for each time it is late, whatever it does in between.
                Degraded if self.late.insert(name.clone(), ()).is_none() => {
                    say(EventKind::GuestDegraded, Severity::Warning, why);
                }
                Fenced => say(
                    EventKind::GuestFenced,
                    Severity::Critical,
                    "another site owns it with a higher generation; it is stopped here".to_owned(),
                ),
                Unprotected => say(
                    EventKind::GuestUnprotected,
                    Severity::Warning,
                    "nothing is replicated any more".to_owned(),
                ),
                Stopped if is.role == Role::Active => {
                    say(EventKind::GuestStopped, Severity::Warning, why);
                }
                _ => {}
            }
        }
        match (&was.obstacle, &is.obstacle) {
            (None, Some(what)) => say(
                EventKind::ObstacleFound,
                Severity::Critical,
                format!("a failover would fail: {what}"),
            ),
            (Some(_), None) => say(
                EventKind::ObstacleGone,
                Severity::Info,
                "nothing obstructs a failover any more".to_owned(),
            ),
            _ => {}
        }
        if is.mismatches > was.mismatches {
            say(
                EventKind::VerificationMismatch,
                Severity::Critical,
                "its copy is not what the guest had".to_owned(),
            );
        }
    }

    /// Failovers, moves and drills, from their first step that changes something.
    fn runs(&mut self, now: &Seen, to: &mut Vec<Draft>) {
        let first = self.before.is_none();
        for run in now.runs.iter().rev() {
            let (begun, ended) = match run.verb {
                Operation::Failover => (EventKind::FailoverBegun, EventKind::FailoverEnded),
                Operation::Move => (EventKind::MoveBegun, EventKind::MoveEnded),
                Operation::TestFailover => (EventKind::DrillBegun, EventKind::DrillEnded),
                _ => continue,
            };
            let told = self.runs.entry(run.id.clone()).or_insert((first, false));
            let mut say = |kind, severity, text: String| {
                let mut draft = Draft::new(kind, severity, text).of(&run.guest);
                draft.run = Some(run.id.clone());
                to.push(draft);
            };
            let over = run.state != RunStatus::Running;
            // One that was refused, or only planned, changed nothing.
            let real = run.steps.iter().any(|step| step.name != "plan");
            let what = format!("{} of {}", run.verb, run.guest).replace('_', " ");
            if real && !told.0 {
                told.0 = true;
                say(begun, Severity::Info, format!("{what} began"));
            }
            if over && !told.1 {
                told.1 = true;
                let why = run.error.as_ref().map(|error| error.message.clone());
                match (run.state, why) {
                    _ if !real => {}
                    (RunStatus::Ok, _) => say(ended, Severity::Info, format!("{what} is done")),
                    (_, why) => say(
                        ended,
                        Severity::Critical,
                        format!("{what} failed: {}", why.unwrap_or_default()),
                    ),
                }
            }
        }
        self.runs
            .retain(|id, _| now.runs.iter().any(|run| run.id == *id));
    }
}

/// Links over which something has to go.
fn links(before: &Seen, now: &Seen, to: &mut Vec<Draft>) {
    for (peer, (up, why)) in &now.peers {
        let was = before.peers.get(peer).is_some_and(|(up, _)| *up);
        let of_peer = |guest: &SeenGuest| guest.peer.as_ref() == Some(peer) && guest.needs_link();
        let used = before.guests.values().any(of_peer) && now.guests.values().any(of_peer);
        let mut draft = match (was, up) {
            (true, false) if used => {
                let why = why.as_deref().unwrap_or("nothing is heard any more");
                let text = format!("the link to {peer} is down: {why}");
                Draft::new(EventKind::LinkDown, Severity::Critical, text)
            }
            (false, true) if used => {
                let text = format!("the link to {peer} is up");
                Draft::new(EventKind::LinkUp, Severity::Info, text)
            }
            _ => continue,
        };
        draft.peer = Some(peer.clone());
        to.push(draft);
    }
}

fn certificates(before: Option<&Seen>, now: &Seen, to: &mut Vec<Draft>) {
    let level = |days: i64| {
        let severity = match days < DAYS_CRITICAL {
            true => Severity::Critical,
            false => Severity::Warning,
        };
        (days < DAYS_WARNING).then_some(severity)
    };
    for (name, days) in &now.certificates {
        let was = before.and_then(|before| level(*before.certificates.get(name)?));
        if let Some(severity) =
            level(*days).filter(|severity| was.is_none_or(|was| was < *severity))
        {
            let text = format!("the certificate \"{name}\" has {days} days left");
            to.push(Draft::new(EventKind::CertificateExpiring, severity, text));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> GuestId {
        "db1".parse().unwrap()
    }

    fn peer() -> SiteId {
        "site-b".parse().unwrap()
    }

    fn seen(state: GuestState, up: bool) -> Seen {
        let guest = SeenGuest {
            state,
            role: Role::Active,
            peer: Some(peer()),
            why: Some("the link: it is cut".to_owned()),
            obstacle: None,
            mismatches: 0,
        };
        Seen {
            guests: [(name(), guest)].into(),
            peers: [(peer(), (up, None))].into(),
            certificates: [("site".to_owned(), 90)].into(),
            ..Seen::default()
        }
    }

    fn kinds(drafts: &[Draft]) -> Vec<EventKind> {
        drafts.iter().map(|draft| draft.kind).collect()
    }

    /// A guest's life, look by look, and what is said at each.
    #[test]
    fn each_change_is_said_once() {
        use EventKind as K;
        use GuestState as S;
        let mut watch = Watch::default();
        let looks: &[(S, bool, &[K])] = &[
            (S::Unprotected, false, &[]),
            (S::InitialSync, false, &[]),
            (S::InitialSync, true, &[K::LinkUp]),
            (S::Protected, true, &[K::GuestProtected]),
            (S::Protected, true, &[]),
            (S::Protected, false, &[K::LinkDown]),
            (S::Degraded, false, &[K::GuestDegraded]),
            (S::Resync, true, &[K::LinkUp]),
            (S::Degraded, true, &[]),
            (S::Protected, true, &[K::GuestRecovered]),
            (S::Resync, true, &[]),
            (S::Protected, true, &[]),
            (S::Fenced, true, &[K::GuestFenced]),
            (S::Unprotected, true, &[K::GuestUnprotected]),
            // Nobody needs the link any more.
            (S::Unprotected, false, &[]),
            (S::Stopped, false, &[K::GuestStopped]),
        ];
        for (number, (state, up, expected)) in looks.iter().enumerate() {
            let drafts = watch.look(seen(*state, *up));
            assert_eq!(kinds(&drafts), *expected, "look {number}: {drafts:?}");
        }
    }

    #[test]
    fn obstacles_mismatches_space_and_certificates_are_said() {
        use EventKind as K;
        let mut watch = Watch::default();
        let mut now = seen(GuestState::Protected, true);
        now.certificates = [("site".to_owned(), 10)].into();
        assert_eq!(kinds(&watch.look(now.clone())), [K::CertificateExpiring]);
        assert_eq!(kinds(&watch.look(now.clone())), []);
        now.certificates = [("site".to_owned(), 1)].into();
        now.journal_full = true;
        let guest = now.guests.get_mut(&name()).unwrap();
        guest.obstacle = Some("no machine type".to_owned());
        guest.mismatches = 1;
        let expected = [
            K::CertificateExpiring,
            K::ObstacleFound,
            K::VerificationMismatch,
            K::JournalFull,
        ];
        assert_eq!(kinds(&watch.look(now.clone())), expected);
        now.journal_full = false;
        now.guests.get_mut(&name()).unwrap().obstacle = None;
        now.certificates = [("site".to_owned(), 90)].into();
        let expected = [K::ObstacleGone, K::JournalOk];
        assert_eq!(kinds(&watch.look(now)), expected);
    }

    #[test]
    fn runs_are_said_from_their_first_real_step_to_their_end() {
        use crate::control::types::Step;
        use EventKind as K;
        let step = |name: &str| Step {
            name: name.to_owned(),
            state: RunStatus::Ok,
            seconds: 0.1,
            detail: None,
        };
        let mut run = Run {
            id: RunId("1".to_owned()),
            verb: Operation::Failover,
            guest: name(),
            state: RunStatus::Running,
            started_at: Timestamp(1),
            ended_at: None,
            steps: vec![step("plan")],
            progress: None,
            result: None,
            error: None,
        };
        let with = |run: &Run| Seen {
            runs: vec![run.clone()],
            ..seen(GuestState::Protected, true)
        };
        let mut watch = Watch::default();
        watch.look(seen(GuestState::Protected, true));
        assert_eq!(kinds(&watch.look(with(&run))), []);
        run.steps.push(step("fence"));
        assert_eq!(kinds(&watch.look(with(&run))), [K::FailoverBegun]);
        run.state = RunStatus::Ok;
        assert_eq!(kinds(&watch.look(with(&run))), [K::FailoverEnded]);
        assert_eq!(kinds(&watch.look(with(&run))), []);
        // One that is seen at its end only, and one that was only planned.
        run.id = RunId("2".to_owned());
        run.verb = Operation::TestFailover;
        run.state = RunStatus::Failed;
        let both = watch.look(with(&run));
        assert_eq!(kinds(&both), [K::DrillBegun, K::DrillEnded]);
        assert_eq!(both[1].severity, Severity::Critical);
        run.id = RunId("3".to_owned());
        run.steps.truncate(1);
        assert_eq!(kinds(&watch.look(with(&run))), []);
    }
}
