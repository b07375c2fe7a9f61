//! The first copy by another way than the link: a seed in a file, and only the differences over the link.

use std::fs;

use lifeboat::control::types::{SyncPath, SyncStatus};
use lifeboat::metrics::labels::GuestState;

use crate::harness::{GUEST, Options, Pair, kvm, wait};

const DISK: u64 = 256 << 20;
/// What the guest may use of its disk; the rest does not compress.
const USED: u64 = 8 << 20;

#[test]
fn a_seed_by_post_leaves_only_differences_to_the_link() {
    let test = "a_seed_by_post_leaves_only_differences_to_the_link";
    if !kvm(test) {
        return;
    }
    let mut pair = Pair::new(Options::default());
    let noise = pair.a.noisy_disk(DISK, USED);
    pair.b.start();
    pair.a.start();
    pair.a.ok(&["guest", "start", GUEST]);
    let console = pair.a.console();
    console.advances();

    // Written while the guest goes on.
    let seed = pair.root().join("db1.seed").display().to_string();
    let directory = pair.root().display().to_string();
    let export = |to: &str| {
        pair.a
            .cli(&["--timeout", "60s", "export-seed", GUEST, "--to", to])
    };
    assert_eq!(export(&directory).code, 0);
    console.advances();
    let bytes = fs::metadata(&seed).unwrap().len();
    assert!(bytes > noise.len() as u64, "{bytes}");
    // Nothing is overwritten, and what cannot be written is said.
    let error = export(&seed).error(2);
    assert!(error.message.contains("there already"), "{error:?}");
    export("/nonexistent/db1.seed").error(1);
    assert!(!fs::exists(format!("{seed}.part")).unwrap());

    // Torn, damaged and strange ones are refused, and leave nothing.
    let whole = fs::read(&seed).unwrap();
    let bad = pair.root().join("bad.seed");
    let import = |file: &str, guest: &str| {
        let args = ["--timeout", "60s", "import-seed", file, "--guest", guest];
        pair.b.cli(&args)
    };
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    for (content, expected) in [
        (&whole[..whole.len() - 4096], "cut off"),
        (&whole[..100], "cut off"),
        (&flipped[..], "damaged"),
        (&[whole.as_slice(), b"x"].concat()[..], "behind its end"),
        (
            b"no seed at all, but long enough to be looked at: "
                .repeat(9)
                .as_slice(),
            "no seed",
        ),
    ] {
        fs::write(&bad, content).unwrap();
        let error = import(&bad.display().to_string(), GUEST).error(7);
        assert!(error.message.contains(expected), "{error:?}");
    }
    import(&seed, "db9").error(6);
    import("/dev/zero", GUEST).error(7);

    assert_eq!(import(&seed, GUEST).code, 0);
    assert!(pair.b.points().is_empty(), "ground is no recovery point");
    let error = import(&seed, GUEST).error(4);
    assert!(error.message.contains("a copy here already"), "{error:?}");
    // It is there after a restart too.
    pair.b.terminate();
    pair.b.start();
    pair.a.ok(&["--timeout", "60s", "protect", GUEST]);
    let status = pair.at_a();
    let (sent, whole_bytes) = (status.sent_bytes, DISK + (64 << 20));
    let share = sent as f64 / whole_bytes as f64;
    println!(
        "{test}: {sent} bytes over the link, {:.2} % of the guest",
        share * 1e2
    );
    let sync = status.sync.expect("it is protected");
    assert!(
        matches!(
            &sync,
            SyncStatus {
                path: SyncPath::Compare,
                ..
            }
        ),
        "{sync:?}"
    );
    assert!(share < 0.05, "{sent} of {whole_bytes} bytes");
    pair.b.verify(&[]);

    // What is protected is not disturbed; its copy can be exported where it is.
    let error = export(&format!("{directory}/again.seed")).error(4);
    assert!(error.message.contains("not disturbed"), "{error:?}");
    let copy = format!("{directory}/copy.seed");
    let export_copy = ["--timeout", "60s", "export-seed", GUEST, "--to", &copy];
    pair.b.ok(&export_copy);
    assert!(fs::metadata(&copy).unwrap().len() > noise.len() as u64);
    wait("it stays protected", || {
        (pair.at_a().state == GuestState::Protected).then_some(())
    });
    pair.failover(&[]).failover();
    pair.runs_on_clean(&pair.b.console());
}
