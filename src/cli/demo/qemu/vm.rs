//! The demo's QEMU, as an owner of guests might start it: unpatched, with two monitors for Lifeboat.
//!
//! ```text
//!   DIR/disk.img        its disk         DIR/qmp.sock, watchdog.sock    its monitors
//!   DIR/qemu.log        what QEMU has to say
//!   DIR/../serial.log   what the guest says; the second QEMU appends to it
//! ```

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

use super::parts::{Parts, QEMU};
use super::serial::{Serial, line};
use crate::cli::demo::POLL;
use crate::cli::demo::process::tail;
use crate::cli::demo::workspace::DISK_BYTES;

const MEMORY_MIB: u32 = 96;
/// Where Linux boots with KVM at all, it takes a few seconds at most.
const KVM_BOOTS_WITHIN: Duration = Duration::from_secs(12);
/// Without, a slow host needs some time.
const TCG_BOOTS_WITHIN: Duration = Duration::from_secs(60);

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Accelerator {
    /// The processor.
    Kvm,
    /// QEMU itself.
    Tcg,
}

impl Accelerator {
    /// As QEMU calls it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg",
        }
    }

    fn boots_within(self) -> Duration {
        match self {
            Accelerator::Kvm => KVM_BOOTS_WITHIN,
            Accelerator::Tcg => TCG_BOOTS_WITHIN,
        }
    }
}

/// A QEMU whose guest works.
pub(super) struct Vm {
    child: Child,
    /// What the guest says.
    pub serial: Serial,
}

impl Vm {
    /// Boots the guest with an empty disk; returns when it has said its first line.
    pub(super) async fn boot(
        parts: &Parts,
        directory: &Path,
        accelerator: Accelerator,
    ) -> anyhow::Result<Vm> {
        let disk = directory.join("disk.img");
        File::create(&disk)
            .and_then(|file| file.set_len(DISK_BYTES))
            .with_context(|| format!("cannot make {}", disk.display()))?;
        let serial_log = serial_log(directory);
        // Of an attempt with another accelerator.
        if let Err(error) = fs::remove_file(&serial_log)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            bail!("cannot remove {}: {error}", serial_log.display());
        }
        let log_path = directory.join("qemu.log");
        let log = File::create(&log_path)
            .with_context(|| format!("cannot write {}", log_path.display()))?;
        let child = Command::new(QEMU)
            .args(arguments(parts, directory, &serial_log, accelerator))
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("cannot share the log file")?)
            .stderr(log)
            // Ctrl-C is for the demo, which then ends its children.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .context("cannot start QEMU")?;
        let mut vm = Vm {
            child,
            serial: Serial::open(&serial_log),
        };
        if let Err(error) = vm.speaks(accelerator.boots_within(), &log_path).await {
            // It must be gone, with its lock of the disk, before another one is tried.
            vm.child.kill().await.context("cannot end QEMU")?;
            return Err(error);
        }
        Ok(vm)
    }

    /// Waits for the guest's first line.
    async fn speaks(&mut self, within: Duration, log: &Path) -> anyhow::Result<()> {
        let first = async {
            tokio::select! {
                first = self.serial.wait(0, line) => first.map(drop),
                ended = self.child.wait() => {
                    let status = ended?;
                    bail!("QEMU ended ({status}): {}", tail(log))
                }
            }
        };
        match timeout(within, first).await {
            Ok(spoke) => spoke,
            Err(_) => bail!("it says nothing for {} s", within.as_secs()),
        }
    }

    /// Process id; `None` when it has ended.
    pub(super) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Waits for the end of a QEMU that was killed.
    pub(super) async fn reap(&mut self) -> anyhow::Result<()> {
        while self.child.try_wait()?.is_none() {
            sleep(POLL).await;
        }
        Ok(())
    }
}

/// Beside the directories of both sites: it is of neither.
fn serial_log(directory: &Path) -> PathBuf {
    directory.with_file_name("serial.log")
}

fn arguments(
    parts: &Parts,
    directory: &Path,
    serial_log: &Path,
    accelerator: Accelerator,
) -> Vec<String> {
    let file = |name: &str| directory.join(name).display().to_string();
    let mut arguments: Vec<String> = [
        "-accel",
        accelerator.name(),
        "-machine",
        "pc",
        "-smp",
        "1",
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-append",
        "console=ttyS0 quiet panic=-1",
        "-device",
        "virtio-blk-pci,drive=data",
        "-serial",
        "chardev:console",
    ]
    .map(str::to_owned)
    .into();
    let mut say = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
    say("-m", MEMORY_MIB.to_string());
    say("-kernel", parts.kernel.image().display().to_string());
    say("-initrd", parts.initrd.display().to_string());
    let chardev = format!(
        "file,id=console,append=on,path={}",
        escaped(&serial_log.display().to_string())
    );
    say("-chardev", chardev);
    let disk = escaped(&file("disk.img"));
    say(
        "-blockdev",
        format!("driver=file,node-name=file,filename={disk}"),
    );
    say("-blockdev", "driver=raw,node-name=data,file=file".into());
    for socket in ["qmp.sock", "watchdog.sock"] {
        let socket = escaped(&file(socket));
        say("-qmp", format!("unix:{socket},server=on,wait=off"));
    }
    arguments
}

/// A comma in a value ends it, unless it is there twice.
fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}
