//! A site that is not there, for tests of server, client and command line.
//!
//! Its clock stands still, so that what is printed is always the same. What a guest's name starts
//! with decides what becomes of verbs: `db1` is well, `web1` is late, `lost1` was fenced, `slow1`
//! never ends a run, `torn1` has a damaged journal.

mod samples;

use std::path::PathBuf;
use std::sync::Arc;

use super::backend::Backend;
use super::bandwidth::{Bandwidth, BandwidthRequest};
use super::checkpoint::{Checkpoint, CheckpointRequest};
use super::codes::Reason;
use super::events::Events;
use super::facts::Facts;
use super::runs::{RunBook, RunHandle};
use super::types::*;
use crate::clock::{Clock, Env, Timestamp};
use crate::guest::RunState;
use crate::guest::network::{GuestNetwork, NetworkName};
use crate::ids::{Epoch, Generation, GroupId, GuestId, SiteId};
use crate::metrics::Metrics;
use crate::metrics::labels::{BoundBy, GuestState, Operation, Role};

/// 2026-11-23T09:31:44.900Z
const NOW: Timestamp = Timestamp(1_795_426_304_900_000_000);
const SECOND: u64 = 1_000_000_000;

struct Still;

impl Clock for Still {
    fn now(&self) -> Timestamp {
        NOW
    }
}

pub(crate) struct Fake {
    pub(crate) metrics: Metrics,
    runs: RunBook,
}

impl Fake {
    pub(crate) fn new() -> Arc<Self> {
        let env = Env::simulated(Arc::new(Still));
        let metrics = Metrics::new(env.clone());
        metrics.guest(&"db1".parse().unwrap());
        Arc::new(Self {
            runs: RunBook::new(env, metrics.clone()),
            metrics,
        })
    }

    fn guest(&self, name: &GuestId) -> Result<GuestStatus, ApiError> {
        let guests = samples::guests().into_iter();
        let found = guests.into_iter().find(|guest| guest.name == *name);
        found.ok_or_else(|| ApiError::no_such_guest(name))
    }

    fn point(&self, name: &GuestId, point: Option<Epoch>) -> Result<PointStatus, ApiError> {
        self.guest(name)?;
        let points = points(name);
        match point {
            None => Ok(points[0].clone()),
            Some(epoch) => {
                let found = points.into_iter().find(|point| point.epoch == epoch);
                found.ok_or_else(|| ApiError::no_such_point(name, epoch))
            }
        }
    }

    /// Begins a run that a task of its own carries on; that of `slow1` never ends.
    fn begin(
        &self,
        verb: Operation,
        guest: &GuestId,
        work: impl FnOnce(RunHandle) + Send + 'static,
    ) -> Result<Run, ApiError> {
        let handle = self.runs.begin(verb, guest)?;
        handle.step("prepare");
        handle.progress(1, 2, ProgressUnit::Bytes);
        let run = handle.run();
        if guest.as_str() == "slow1" {
            std::mem::forget(handle);
        } else {
            tokio::spawn(async move { work(handle) });
        }
        Ok(run)
    }
}

fn site(name: &str) -> SiteId {
    name.parse().unwrap()
}

fn before(millis: u64) -> Timestamp {
    Timestamp(NOW.0 - millis * 1_000_000)
}

fn point_at(epoch: u64, age_millis: u64) -> PointStatus {
    PointStatus {
        epoch: Epoch(epoch),
        generation: Generation(7),
        captured_at: before(age_millis),
        durable_at: Some(before(age_millis - 30)),
        age_seconds: age_millis as f64 / 1e3,
        bytes: Some(1_153_434),
        pages: Some(412),
        root: Some("ab".repeat(32)),
        pinned: false,
        tags: Vec::new(),
        verified_at: None,
    }
}

fn points(guest: &GuestId) -> Vec<PointStatus> {
    let age = if guest.as_str() == "web1" {
        41_000
    } else {
        800
    };
    let tagged = PointStatus {
        pinned: true,
        tags: vec!["before-upgrade".to_owned()],
        verified_at: Some(before(60_000)),
        ..point_at(8991, 152_000)
    };
    vec![point_at(9120, age), point_at(9042, 104_000), tagged]
}

fn export_socket(guest: &GuestId) -> PathBuf {
    PathBuf::from(format!("/run/lifeboat/{guest}/export.sock"))
}

fn export(guest: &GuestId, point: PointStatus, socket: PathBuf) -> ExportStatus {
    ExportStatus {
        guest: guest.clone(),
        point,
        disks: vec![ExportedDisk::new("root".parse().unwrap(), 1 << 30, &socket)],
        socket,
        clients: 1,
        ended: None,
    }
}

impl Backend for Fake {
    async fn status(&self) -> Result<SiteStatus, ApiError> {
        let peer = PeerStatus {
            name: site("site-b"),
            up: true,
            rtt_seconds: Some(0.018),
            clock_offset_seconds: Some(0.002),
            last_received_at: Some(before(400)),
            last_error: None,
            bandwidth: None,
        };
        let down = PeerStatus {
            name: site("site-c"),
            up: false,
            rtt_seconds: Some(0.1),
            last_error: Some("connection refused".to_owned()),
            clock_offset_seconds: None,
            ..peer.clone()
        };
        Ok(SiteStatus {
            site: site("site-a"),
            version: "0.1.0".to_owned(),
            now: NOW,
            peers: vec![peer, down],
            guests: samples::guests(),
            journal: StoreStatus {
                path: PathBuf::from("/var/lib/lifeboat/journal"),
                used_bytes: 7 << 30,
                free_bytes: 59 << 30,
                capacity_bytes: 100 << 30,
                min_free_bytes: 5 << 30,
            },
            certificates: vec![CertificateStatus {
                name: "site".to_owned(),
                subject: "spiffe://lifeboat/site/site-a".to_owned(),
                serial: "1a2b".to_owned(),
                not_after: Timestamp(NOW.0 + 76 * 86_400 * SECOND),
            }],
            groups: Vec::new(),
            hook: None,
        })
    }

    async fn facts(&self) -> Result<Facts, ApiError> {
        Ok(super::fake_facts::facts(NOW))
    }

    async fn guest_start(&self, guest: &GuestId, force: bool) -> Result<Done, ApiError> {
        let status = self.guest(guest)?;
        if status.state == GuestState::Fenced && !force {
            let message = format!("guest \"{guest}\" is owned by generation 8 at site-b");
            return Err(ApiError::new(Reason::Fenced, message).hint("look at site-b first"));
        }
        Ok(Done {
            guest: guest.clone(),
            outcome: match status.run_state {
                Some(RunState::Running) => Outcome::AlreadyRunning,
                _ => Outcome::Started,
            },
            detail: None,
        })
    }

    async fn guest_stop(&self, guest: &GuestId) -> Result<Done, ApiError> {
        self.guest(guest)?;
        // A defect, to see what the server makes of it.
        assert_ne!(guest.as_str(), "torn1", "the fake falls over");
        Ok(Done {
            guest: guest.clone(),
            outcome: Outcome::Stopped,
            detail: Some("disks flushed".to_owned()),
        })
    }

    async fn console(&self, guest: &GuestId) -> Result<ConsoleInfo, ApiError> {
        self.guest(guest)?;
        Ok(ConsoleInfo {
            guest: guest.clone(),
            socket: PathBuf::from(format!("/run/lifeboat/{guest}/console.sock")),
        })
    }

    async fn networks(&self, guest: &GuestId) -> Result<Networks, ApiError> {
        self.guest(guest)?;
        // One of them is of QEMU.
        let named = guest.as_str() == "web1";
        let office = GuestNetwork {
            id: "net0".into(),
            kind: "tap".into(),
            name: Some(NetworkName::Tap("tap3".into())),
        };
        Ok(Networks {
            guest: guest.clone(),
            networks: if named { vec![office] } else { vec![] },
            agent: named,
        })
    }

    async fn address(&self, guest: &GuestId, _request: AddressRequest) -> Result<Done, ApiError> {
        Err(ApiError::no_such_guest(guest))
    }

    async fn protect(&self, guest: &GuestId, request: ProtectRequest) -> Result<Run, ApiError> {
        let point = self.point(guest, None)?;
        let peer = request.peer.unwrap_or(site("site-b"));
        self.begin(Operation::Protect, guest, move |run| {
            run.step("copy");
            let result = ProtectReport {
                peer,
                already_protected: request.rpo_target_seconds.is_none(),
                sync: None,
                point,
                sent_bytes: 71 << 20,
            };
            run.finish(Ok(RunResult::Protect(result)));
        })
    }

    async fn commit(&self, guest: &GuestId) -> Result<Done, ApiError> {
        self.guest(guest)?;
        Ok(Done {
            guest: guest.clone(),
            outcome: Outcome::Committed,
            detail: None,
        })
    }

    async fn roll_back(&self, guest: &GuestId) -> Result<Done, ApiError> {
        self.guest(guest)?;
        Ok(Done {
            guest: guest.clone(),
            outcome: Outcome::RolledBack,
            detail: Some("site-b has it again, with generation 9".to_owned()),
        })
    }

    async fn unprotect(&self, guest: &GuestId, purge: bool) -> Result<Done, ApiError> {
        self.guest(guest)?;
        Ok(Done {
            guest: guest.clone(),
            outcome: Outcome::Unprotected,
            detail: purge.then(|| "412 recovery points deleted".to_owned()),
        })
    }

    async fn points(&self, guest: &GuestId) -> Result<Points, ApiError> {
        self.guest(guest)?;
        Ok(Points {
            guest: guest.clone(),
            now: NOW,
            points: points(guest),
        })
    }

    async fn move_guest(&self, guest: &GuestId, request: MoveRequest) -> Result<Run, ApiError> {
        self.guest(guest)?;
        let to = request.to.unwrap_or(site("site-b"));
        self.begin(Operation::Move, guest, move |run| {
            run.step("hand over");
            if to == site("site-c") {
                let error = ApiError::new(Reason::Failed, "site-c has too little memory");
                return run.finish(Err(error));
            }
            let result = MoveReport {
                from: site("site-a"),
                to,
                epoch: Epoch(4711),
                generation: Generation(8),
                downtime_seconds: (!request.offline).then_some(0.043),
                stood_still_at: None,
                total_seconds: 1.6,
                sent_bytes: 71 << 20,
                offline: request.offline,
            };
            run.finish(Ok(RunResult::Move(result)));
        })
    }

    async fn failover(&self, guest: &GuestId, request: FailoverRequest) -> Result<Run, ApiError> {
        let point = self.point(guest, request.point)?;
        self.begin(Operation::Failover, guest, move |run| {
            run.detail("site-a has been silent for 73 s");
            run.step("fence");
            if !request.fenced_by_operator && !request.dry_run {
                let error = ApiError::new(Reason::NotFenced, "site-a may still run the guest");
                return run.finish(Err(error.hint("--fenced-by-operator, if it cannot")));
            }
            run.detail("by the operator's word");
            run.step("resume");
            let older = request.point.is_some();
            let result = FailoverReport {
                dry_run: request.dry_run,
                from: Some(site("site-a")),
                to: site("site-b"),
                loss_seconds: point.age_seconds,
                point,
                newest: older.then(|| point_at(9120, 800)),
                fence: "by the operator's word".to_owned(),
                generation_before: Generation(7),
                generation_after: Generation(8),
                rto_seconds: (!request.dry_run).then_some(0.9),
            };
            run.finish(Ok(RunResult::Failover(result)));
        })
    }

    async fn failover_group(
        &self,
        group: &GroupId,
        request: FailoverRequest,
    ) -> Result<Runs, ApiError> {
        if group.as_str() != "shop" {
            let message = format!("no guest has a point of a group \"{group}\" here");
            return Err(ApiError::new(Reason::NoSuchPoint, message));
        }
        let mut runs = Vec::new();
        for guest in ["db1", "web1"] {
            let guest = guest.parse().unwrap();
            runs.push(self.failover(&guest, request.clone()).await?);
        }
        Ok(Runs { runs })
    }

    async fn test_failover(&self, guest: &GuestId, request: DrillRequest) -> Result<Run, ApiError> {
        let point = self.point(guest, request.point)?;
        let guest = guest.clone();
        self.begin(Operation::TestFailover, &guest.clone(), move |run| {
            run.step("probe");
            let silent = guest.as_str() == "web1";
            let probe = ProbeReport {
                name: "console".to_owned(),
                passed: !silent,
                detail: match silent {
                    true => "it said nothing for 60 s".to_owned(),
                    false => "it spoke".to_owned(),
                },
            };
            let report = DrillReport {
                point,
                rto_seconds: (!silent).then_some(1.32),
                probes: vec![probe],
                kept: request.keep_seconds.map(|_| KeptClone {
                    console: PathBuf::from("/run/lifeboat/db1/console.sock"),
                    until: Timestamp(NOW.0 + 600 * SECOND),
                }),
            };
            match silent {
                false => run.finish(Ok(RunResult::Drill(report))),
                true => {
                    let error = ApiError::new(Reason::Failed, "the clone said nothing for 60 s");
                    run.fail_with(RunResult::Drill(report), error);
                }
            }
        })
    }

    async fn test_failover_stop(&self, guest: &GuestId) -> Result<Done, ApiError> {
        self.guest(guest)?;
        Ok(Done {
            guest: guest.clone(),
            outcome: match guest.as_str() {
                "db1" => Outcome::DrillEnded,
                _ => Outcome::NoDrillKept,
            },
            detail: None,
        })
    }

    async fn verify(&self, guest: &GuestId, point: Option<Epoch>) -> Result<Run, ApiError> {
        let point = self.point(guest, point)?;
        let torn = guest.as_str() == "torn1";
        self.begin(Operation::Verify, guest, move |run| {
            let differences = u64::from(torn);
            let result = RunResult::Verify(VerifyReport {
                point,
                memory_pages: 524_288,
                disk_pages: 20_480,
                differences,
                first_differences: torn
                    .then(|| "memory page 17: checksum differs".to_owned())
                    .into_iter()
                    .collect(),
            });
            if torn {
                let error = ApiError::new(Reason::Difference, "the point is damaged");
                return run.fail_with(result, error.hint("use an older point"));
            }
            run.finish(Ok(result));
        })
    }

    async fn export(&self, guest: &GuestId, request: ExportRequest) -> Result<Run, ApiError> {
        let point = self.point(guest, request.point)?;
        let socket = request.socket.unwrap_or_else(|| export_socket(guest));
        let status = export(guest, point, socket);
        self.begin(Operation::Export, guest, |run| {
            run.finish(Ok(RunResult::Export(status)));
        })
    }

    async fn export_stop(&self, guest: &GuestId) -> Result<Done, ApiError> {
        self.guest(guest)?;
        Ok(Done {
            guest: guest.clone(),
            outcome: match guest.as_str() {
                "db1" => Outcome::Unexported,
                _ => Outcome::AlreadyUnexported,
            },
            detail: None,
        })
    }

    async fn exports(&self) -> Result<Exports, ApiError> {
        let of = |name: &str| {
            let guest: GuestId = name.parse().unwrap();
            export(&guest, point_at(9042, 104_000), export_socket(&guest))
        };
        let broken = ExportStatus {
            clients: 0,
            ended: Some("the disk was full".to_owned()),
            ..of("web1")
        };
        Ok(Exports {
            exports: vec![of("db1"), broken],
        })
    }

    async fn journal_stat(&self, guest: &GuestId) -> Result<JournalStat, ApiError> {
        self.guest(guest)?;
        Ok(JournalStat {
            guest: guest.clone(),
            journal: "00112233445566778899aabbccddeeff".to_owned(),
            path: PathBuf::from("/var/lib/lifeboat/journal").join(guest.as_str()),
            generation: Generation(7),
            size_bytes: 3 << 30,
            base_bytes: 2 << 30,
            segments: 16,
            free_bytes: 59 << 30,
            points: 412,
            oldest_point_at: Some(before(86_400_000)),
            newest_point_at: Some(before(800)),
            notes: vec!["a torn tail of 1.0 MiB was cut off".to_owned()],
        })
    }

    async fn journal_check(&self, guest: &GuestId) -> Result<Run, ApiError> {
        self.guest(guest)?;
        self.begin(Operation::JournalCheck, guest, |run| {
            run.finish(Ok(RunResult::JournalCheck(JournalCheckReport {
                points: 412,
                bytes: 3 << 30,
                problems: Vec::new(),
            })));
        })
    }

    async fn journal_rebuild(&self, guest: &GuestId) -> Result<Run, ApiError> {
        self.guest(guest)?;
        self.begin(Operation::JournalRebuild, guest, |run| {
            // The work fell over.
            drop(run);
        })
    }

    async fn seed_export(&self, guest: &GuestId, request: SeedRequest) -> Result<Run, ApiError> {
        self.guest(guest)?;
        self.begin(Operation::ExportSeed, guest, |run| {
            run.step("write");
            run.finish(Ok(RunResult::SeedExport(SeedReport {
                file: request.file,
                bytes: 90 << 20,
                pages: 64 << 8,
                captured_at: before(900),
            })));
        })
    }

    async fn seed_import(&self, guest: &GuestId, request: SeedRequest) -> Result<Run, ApiError> {
        self.guest(guest)?;
        self.begin(Operation::ImportSeed, guest, |run| {
            run.step("verify");
            run.step("lay");
            run.finish(Ok(RunResult::SeedImport(SeedLaid {
                file: request.file,
                bytes: 90 << 20,
                pages: 64 << 8,
                epoch: Epoch(1),
            })));
        })
    }

    async fn run(&self, id: &RunId) -> Result<Run, ApiError> {
        self.runs.get(id)
    }

    async fn runs(&self) -> Result<Runs, ApiError> {
        Ok(self.runs.list())
    }

    async fn checkpoint(
        &self,
        guest: &GuestId,
        _request: CheckpointRequest,
    ) -> Result<Checkpoint, ApiError> {
        Err(ApiError::no_such_guest(guest))
    }

    async fn events(&self, after: u64) -> Result<Events, ApiError> {
        let (site, last) = (site("site-a"), after);
        let events = Vec::new();
        Ok(Events { site, events, last })
    }

    async fn bandwidth(
        &self,
        peer: &SiteId,
        request: BandwidthRequest,
    ) -> Result<Bandwidth, ApiError> {
        let _ = request;
        Err(ApiError::new(Reason::Usage, format!("no peer {peer}")))
    }

    async fn reload(&self) -> Result<Reloaded, ApiError> {
        Ok(Reloaded {
            applied: vec!["guest.db1.replication.rpo_target".to_owned()],
            restart_needed: vec!["metrics.listen".to_owned()],
        })
    }

    async fn ready(&self) -> Result<(), ApiError> {
        Err(ApiError::new(
            Reason::NotReady,
            "the journal of torn1 is not open",
        ))
    }
}
