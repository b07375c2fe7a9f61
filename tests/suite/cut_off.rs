//! A first copy that is cut off, again and again, and goes on where it stopped.

use lifeboat::control::types::SyncPath;

use crate::harness::image::replay;
use crate::harness::{GUEST, Options, Pair, kill_now, kvm, wait};

const DISK: u64 = 128 << 20;
/// What the guest may use of its disk; the rest does not compress.
const USED: u64 = 8 << 20;
/// How much passes before the next thing goes wrong.
const PIECE: u64 = 24 << 20;
/// Slow enough to be cut off in the middle: 16 MB a second.
const BANDWIDTH: &str = "bandwidth = \"128 Mbit/s\"";

#[derive(Debug, Clone, Copy)]
enum Lost {
    Standby,
    Link,
    Primary,
}

#[test]
fn a_first_copy_that_is_cut_off_goes_on_where_it_stopped() {
    let test = "a_first_copy_that_is_cut_off_goes_on_where_it_stopped";
    if !kvm(test) {
        return;
    }
    let mut pair = Pair::new(Options {
        proxy: true,
        ..Options::default()
    });
    let noise = pair.a.noisy_disk(DISK, USED);
    let keepalive = "keepalive = \"500ms\"";
    pair.a.edit(keepalive, &format!("{keepalive}\n{BANDWIDTH}"));
    pair.b.start();
    pair.a.start();
    pair.a.ok(&["guest", "start", GUEST]);
    let console = pair.a.console();
    pair.a.ok(&["protect", GUEST, "--no-wait"]);

    let passed = |pair: &Pair| pair.proxy.as_ref().expect("asked for").passed();
    let mut goes_on = 0_u64;
    for lost in [Lost::Standby, Lost::Link, Lost::Primary] {
        let from = passed(&pair);
        wait("some of it passes", || {
            (passed(&pair) > from + PIECE).then_some(())
        });
        assert!(
            pair.b.points().is_empty(),
            "{lost:?}: there is no point yet"
        );
        match lost {
            Lost::Standby => {
                pair.b.kill();
                pair.b.start();
                // Whatever arrived, nobody can be resumed from it.
                let refused = pair.failover(&[]);
                assert_ne!(refused.code, 0, "{refused:?}");
            }
            Lost::Link => {
                let proxy = pair.proxy.as_ref().expect("asked for");
                proxy.cut();
                wait("the link is down", || {
                    (!pair.a.status().peers[0].up).then_some(())
                });
                proxy.mend();
            }
            Lost::Primary => {
                pair.a.kill();
                console.advances();
                pair.a.start();
            }
        }
        goes_on += 1;
        wait("the standby says that it goes on", || {
            let log = pair.b.log();
            let said = log.matches("a first copy that was cut off goes on").count();
            (said as u64 >= goes_on).then_some(())
        });
        assert!(pair.b.points().is_empty(), "{lost:?}: nor is there now");
    }
    let status = wait("the guest is protected", || {
        let status = pair.at_a();
        status.last_point.is_some().then_some(status)
    });
    // Of the daemon that was started last.
    let sent = status.sent_bytes;
    println!("{test}: {sent} of {DISK} bytes in the last session, after {goes_on} others");
    let sync = status.sync.expect("the session has a base");
    assert_eq!(sync.path, SyncPath::Compare, "{sync:?}");
    // Of each piece a part that had not come to its end is lost, and what was on the way.
    assert!(sent < noise.len() as u64 - goes_on * PIECE / 2, "{sent}");
    assert!(pair.a.log().contains("need not be sent"));
    pair.more_points(2);
    pair.b.verify(&[]);
    console.advances();

    let victims = [pair.a.pid(), pair.a.vmm()];
    kill_now(&victims);
    pair.a.reap();
    pair.a.gone(victims[1]);
    let report = pair.failover(&[]).failover();
    pair.runs_on_clean(&pair.b.console());
    pair.b.ok(&["guest", "stop", GUEST]);
    pair.b.terminate();
    pair.check_image(report.point.epoch);
    let copy = replay(&pair.b.journal(), report.point.epoch).unwrap();
    assert!(copy.bytes().last().unwrap()[USED as usize..] == noise);
}
