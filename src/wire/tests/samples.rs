//! One of each message, with its name.

use super::*;

pub(super) fn to_standby() -> Vec<(&'static str, ToStandby)> {
    let layout = Layout::try_from(vec![
        Region {
            kind: RegionKind::Ram { gpa: 0 },
            pages: 16384,
        },
        Region {
            kind: RegionKind::Disk {
                id: "root".parse::<DiskId>().unwrap(),
            },
            pages: 8192,
        },
    ]);
    vec![
        (
            "hello",
            ToStandby::Hello(Hello {
                versions: Versions { min: 1, max: 1 },
                site: site("site-a"),
                build: "lifeboat 0.1.0".into(),
                now: AT,
            }),
        ),
        (
            "open",
            ToStandby::Open(Open {
                guest: "db1".parse().unwrap(),
                generation: Generation(3),
                layout: layout.unwrap(),
                machine: br#"{"vcpus":2}"#.to_vec(),
                rpo_target: Duration::from_millis(1500),
                running: true,
            }),
        ),
        ("part", ToStandby::Part(vec![0xa5; 4096].into())),
        ("abandon", ToStandby::Abandon { epoch: Epoch(300) }),
        ("ping", ToStandby::Ping { nonce: 7, at: AT }),
        ("close", ToStandby::Close),
        ("prepare", ToStandby::Prepare),
        ("compare", ToStandby::Compare { epoch: Epoch(300) }),
        ("mark", ToStandby::Mark { epoch: Epoch(300) }),
        (
            "group",
            ToStandby::Group {
                epoch: Epoch(300),
                mark: GroupMark {
                    group: "shop".parse().unwrap(),
                    number: 1_764_352_678_123_456,
                    members: 2,
                },
            },
        ),
        (
            "last",
            ToStandby::Last {
                epoch: Epoch(301),
                generation: Generation(4),
            },
        ),
        (
            "take",
            ToStandby::Take {
                epoch: Epoch(301),
                generation: Generation(4),
            },
        ),
    ]
}

pub(super) fn to_primary() -> Vec<(&'static str, ToPrimary)> {
    let root = ImageRoot([0x11; 32]);
    vec![
        (
            "hello-reply",
            ToPrimary::Hello(HelloReply {
                version: 1,
                site: site("site-b"),
                build: "lifeboat 0.1.0".into(),
                now: AT,
            }),
        ),
        (
            "opened",
            ToPrimary::Opened(Opened {
                journal: JournalId([0x22; 16]),
                generation: Generation(3),
                newest: Some(Newest {
                    epoch: Epoch(299),
                    root,
                    captured_at: AT,
                    intact: true,
                }),
                highest_epoch: Epoch(301),
                ground: false,
            }),
        ),
        (
            "opened-empty",
            ToPrimary::Opened(Opened {
                journal: JournalId([0x22; 16]),
                generation: Generation(1),
                newest: None,
                highest_epoch: Epoch(0),
                ground: false,
            }),
        ),
        (
            "opened-ground",
            ToPrimary::Opened(Opened {
                journal: JournalId([0x22; 16]),
                generation: Generation(1),
                newest: None,
                highest_epoch: Epoch(7),
                ground: true,
            }),
        ),
        (
            "ground",
            ToPrimary::Ground {
                epoch: Epoch(302),
                root,
            },
        ),
        (
            "ack",
            ToPrimary::Ack {
                epoch: Epoch(300),
                root,
                durable_at: AT,
                busy_us: None,
            },
        ),
        (
            "ack-busy",
            ToPrimary::Ack {
                epoch: Epoch(300),
                root,
                durable_at: AT,
                busy_us: Some(2900),
            },
        ),
        (
            "mismatch",
            ToPrimary::Mismatch {
                epoch: Epoch(300),
                expected: root,
                found: ImageRoot([0x33; 32]),
            },
        ),
        (
            "fenced",
            ToPrimary::Fenced {
                generation: Generation(4),
                site: site("site-b"),
            },
        ),
        (
            "returned",
            ToPrimary::Returned {
                generation: Generation(5),
            },
        ),
        (
            "refused",
            ToPrimary::Refused {
                reason: RefuseReason::UnknownGuest,
                text: "no guest db1 here".into(),
            },
        ),
        (
            "abandoned",
            ToPrimary::Abandoned {
                epoch: Epoch(300),
                text: "fdatasync failed".into(),
            },
        ),
        (
            "fingerprints",
            ToPrimary::Fingerprints {
                first: 300,
                pages: vec![0xa5; 32],
            },
        ),
        (
            "incomparable",
            ToPrimary::Incomparable {
                text: "no".to_owned(),
            },
        ),
        ("prepared", ToPrimary::Prepared { refused: None }),
        (
            "taken",
            ToPrimary::Taken {
                refused: Some("no room".into()),
                runs_us: None,
            },
        ),
        (
            "taken-runs",
            ToPrimary::Taken {
                refused: None,
                runs_us: Some(1700),
            },
        ),
        (
            "readiness",
            ToPrimary::Readiness(Readiness {
                obstacle: Some("no bridge".into()),
                differences: None,
            }),
        ),
        (
            "facts",
            ToPrimary::Facts(Box::new(Facts {
                build: "lifeboat 0.1.0".into(),
                versions: Versions { min: 1, max: 1 },
                now: AT,
                cpus: 8,
                load_permille: 1_250,
                memory: 32 << 30,
                memory_available: 20 << 30,
                state: Space {
                    free: 1 << 40,
                    capacity: 2 << 40,
                },
                journal: Space {
                    free: 3 << 40,
                    capacity: 4 << 40,
                },
                journal_floor: 1 << 30,
                kvm_problem: Some("no /dev/kvm".into()),
                cpu: "GenuineIntel Xeon".into(),
                features: vec![CpuBits {
                    leaf: 7,
                    subleaf: 0,
                    register: 1,
                    bits: 0x8000_0001,
                }],
                certificate_until: Some(AT),
                running: vec![Running {
                    guest: "web".parse().unwrap(),
                    memory: 1 << 30,
                    cpu_permille: Some(700),
                }],
                allowed: vec!["db1".parse().unwrap()],
                qemu: true,
            })),
        ),
        ("pong", ToPrimary::Pong { nonce: 7, at: AT }),
    ]
}
