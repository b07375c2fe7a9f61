//! `lifeboat demo --qemu`.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use super::linux::parts;
use crate::harness::site::PROGRAM;

fn demo(more: impl Fn(&mut Command) -> &mut Command) -> Output {
    let mut command = Command::new(PROGRAM);
    command
        .args(["--json", "demo", "--qemu"])
        .stdin(Stdio::null());
    more(&mut command).output().unwrap()
}

#[test]
fn the_demo_with_qemu_passes() {
    let Some(parts) = parts("the_demo_with_qemu_passes") else {
        return;
    };
    let output = demo(|command| {
        let given = command.arg("--tcg").arg("--kernel").arg(&parts.kernel);
        given.arg("--busybox").arg(&parts.busybox)
    });
    let told = String::from_utf8_lossy(&output.stderr);
    println!("{told}");
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{said}");
    let verdict: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    assert_eq!(verdict["result"], "pass");
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(verdict["accelerator"], "tcg");
    let how = verdict["checkpoints"].as_str().unwrap();
    assert!(how.starts_with("migrate: "), "{how}");
    // What it shows says on which terms.
    assert!(told.contains("without KVM") && told.contains(how), "{told}");
}

#[test]
fn what_the_demo_with_qemu_lacks_is_named() {
    // No QEMU on PATH.
    let output = demo(|command| command.env("PATH", "/missing"));
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{told}");
    assert!(told.contains("package qemu-system-x86"), "{told}");
    let Some(parts) = parts("what_the_demo_with_qemu_lacks_is_named") else {
        return;
    };
    let dynamic = Path::new(PROGRAM);
    for (kernel, busybox, why) in [
        (&*parts.busybox, &*parts.busybox, "is no bzImage"),
        (&*parts.kernel, dynamic, "busybox-static"),
        (
            &*parts.kernel,
            Path::new("/missing"),
            "cannot read /missing",
        ),
    ] {
        let output = demo(|command| {
            let given = command.arg("--kernel").arg(kernel);
            given.arg("--busybox").arg(busybox)
        });
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{told}");
        assert!(told.contains(why), "{told}");
    }
}
