//! The guests of the fake site.

use super::*;

pub(super) fn guests() -> Vec<GuestStatus> {
    let db1 = GuestStatus {
        name: "db1".parse().unwrap(),
        role: Role::Active,
        state: GuestState::Protected,
        run_state: Some(RunState::Running),
        pid: Some(4711),
        peer: Some(site("site-b")),
        generation: Generation(7),
        rpo_target_seconds: Some(5.0),
        rpo_exposure_seconds: Some(0.8),
        last_point: Some(point_at(9120, 800)),
        points: Some(412),
        oldest_point_at: Some(before(86_400_000)),
        pause_p50_seconds: Some(0.0012),
        pause_p99_seconds: Some(0.0031),
        backlog_bytes: 0,
        inflight: 1,
        sent_bytes: 4_400_000_000,
        sync: Some(SyncStatus {
            path: SyncPath::Delta,
            reason: "the daemon was restarted".to_owned(),
        }),
        sync_progress: None,
        last_drill: Some(DrillStatus {
            point: Epoch(9042),
            captured_at: before(104_000),
            at: before(71_000),
            rto_seconds: 1.32,
        }),
        drill_failure: None,
        disk_news: None,
        blocked_on: None,
        pace: Some(PaceStatus {
            bound_by: BoundBy::Nothing,
            why: None,
            interval_seconds: 1.0,
            period_seconds: Some(1.0),
            durable_after_seconds: 0.021,
            made_seconds: 0.004,
            standby_seconds: Some(0.006),
            paused_ratio: 0.0012,
            slowed_ratio: 0.0,
        }),
        obstacle: None,
        differences: None,
        command: None,
        rollback_until: None,
        warm: None,
        machine: Some(MachineSummary {
            checkpoints: None,
            kind: "demo".to_owned(),
            memory_bytes: 64 << 20,
            vcpus: 2,
            disks: vec![DiskSummary {
                id: "root".parse().unwrap(),
                bytes: 1 << 30,
                read_only: false,
            }],
        }),
    };
    let web1 = GuestStatus {
        name: "web1".parse().unwrap(),
        state: GuestState::Degraded,
        rpo_exposure_seconds: Some(41.0),
        last_point: Some(point_at(8803, 41_000)),
        drill_failure: Some(DrillFailure {
            at: before(9_000),
            why: "the clone said nothing for 60 s".to_owned(),
        }),
        backlog_bytes: 310 << 20,
        inflight: 8,
        blocked_on: Some("the link is slower than the guest writes".to_owned()),
        pace: Some(PaceStatus {
            bound_by: BoundBy::Link,
            why: Some("the link: a checkpoint each 9000 ms (20 ms planned)".to_owned()),
            interval_seconds: 0.02,
            period_seconds: Some(9.0),
            durable_after_seconds: 32.0,
            made_seconds: 0.2,
            standby_seconds: Some(0.3),
            paused_ratio: 0.0004,
            slowed_ratio: 0.2,
        }),
        obstacle: None,
        differences: None,
        command: None,
        ..db1.clone()
    };
    let lost1 = GuestStatus {
        name: "lost1".parse().unwrap(),
        state: GuestState::Fenced,
        run_state: Some(RunState::Stopped("site-b owns generation 8".to_owned())),
        pid: None,
        generation: Generation(8),
        rpo_exposure_seconds: None,
        last_point: None,
        points: None,
        oldest_point_at: None,
        pause_p50_seconds: None,
        pause_p99_seconds: None,
        inflight: 0,
        sync: None,
        last_drill: None,
        pace: None,
        ..db1.clone()
    };
    let slow1 = GuestStatus {
        name: "slow1".parse().unwrap(),
        role: Role::Standby,
        state: GuestState::InitialSync,
        run_state: None,
        sync_progress: Some(Progress {
            done: 71,
            total: 100,
            unit: ProgressUnit::Bytes,
        }),
        machine: None,
        ..lost1.clone()
    };
    let torn1 = GuestStatus {
        name: "torn1".parse().unwrap(),
        role: Role::Standby,
        state: GuestState::Unprotected,
        run_state: None,
        machine: None,
        ..lost1.clone()
    };
    vec![db1, lost1, slow1, torn1, web1]
}
