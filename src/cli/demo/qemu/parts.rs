//! What the demo needs from elsewhere: a QEMU, and a kernel and a busybox for its guest.
//!
//! | | given | otherwise |
//! |---|---|---|
//! | QEMU | on `PATH` | none: says which package has it |
//! | kernel | `--kernel FILE` | Debian's newest cloud kernel, by apt into the demo's directory |
//! | busybox | `--busybox FILE` | Debian's busybox-static, the same way |
//!
//! Packages are downloaded and unpacked, not installed: no privileges are needed, and nothing of them is
//! left when the demo is over.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

use super::QemuOptions;
use super::initrd::Initrd;
use super::kernel::{Kernel, KernelError};

/// What the guest does.
const MAIN: &str = include_str!("main.sh");
/// The only machine that the demo's guest knows.
pub(super) const QEMU: &str = "qemu-system-x86_64";
/// Names the package of Debian's newest kernel for virtual machines.
const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";
const BUSYBOX_PACKAGE: &str = "busybox-static";
/// How long a program may take that downloads or unpacks a package, or says its version.
const PROGRAM_WITHIN: Duration = Duration::from_secs(120);

/// The demo cannot run on this host as it is, and why.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(in crate::cli::demo) struct Missing(pub String);

/// All that is needed.
pub(super) struct Parts {
    /// QEMU's, such as `7.2.22`.
    pub version: String,
    /// The guest's.
    pub kernel: Kernel,
    /// The guest's programs.
    pub initrd: PathBuf,
}

impl Parts {
    /// Finds or fetches everything; what is fetched or made is below `directory`.
    pub(super) async fn find(options: &QemuOptions, directory: &Path) -> Result<Self, Missing> {
        std::fs::create_dir_all(directory)
            .map_err(|error| Missing(format!("cannot make {}: {error}", directory.display())))?;
        let version = match output(QEMU, &["--version"], Path::new("/")).await {
            Ok(text) => version(&text),
            Err(why) => {
                return Err(Missing(format!(
                    "the demo needs {QEMU}: install it (Debian's package qemu-system-x86) or put it on PATH ({why})"
                )));
            }
        };
        let missing = |what: &str, option: &str, package: &str, why: &str| {
            Missing(format!(
                "the demo needs {what}: name one with {option} FILE, or make Debian's package {package} available to apt-get download, which fails here: {why}"
            ))
        };
        let image = match &options.kernel {
            Some(image) => image.clone(),
            None => fetch_kernel(directory)
                .await
                .map_err(|why| missing("a Linux kernel", "--kernel", KERNEL_PACKAGE, &why))?,
        };
        let busybox = match &options.busybox {
            Some(busybox) => busybox.clone(),
            None => fetch_busybox(directory)
                .await
                .map_err(|why| missing("a static busybox", "--busybox", BUSYBOX_PACKAGE, &why))?,
        };
        let unusable = |error: KernelError| Missing(error.to_string());
        let kernel = Kernel::open(&image).map_err(unusable)?;
        let initrd = directory.join("initrd");
        let archive = Initrd::new(&kernel, &busybox, MAIN).map_err(unusable)?;
        archive
            .write(&initrd)
            .map_err(|error| Missing(format!("cannot write {}: {error}", initrd.display())))?;
        Ok(Self {
            version,
            kernel,
            initrd,
        })
    }
}

/// The number in `QEMU emulator version 7.2.22 (Debian ...)`.
fn version(text: &str) -> String {
    let mut words = text
        .split_whitespace()
        .skip_while(|word| *word != "version");
    words.nth(1).unwrap_or("of unknown version").to_owned()
}

async fn fetch_kernel(directory: &Path) -> Result<PathBuf, String> {
    let package = fetch(KERNEL_PACKAGE, directory).await?;
    let package = package.to_string_lossy();
    let needs = output("dpkg-deb", &["--field", &package, "Depends"], directory).await?;
    let named = needs.split([' ', ',']).next().unwrap_or_default().trim();
    if !named.starts_with("linux-image-") {
        return Err(format!("it depends on {needs:?}, which is no kernel"));
    }
    unpack(&fetch(named, directory).await?, directory).await?;
    first_in(&directory.join("boot"), "vmlinuz-").ok_or(format!("{named} holds no kernel"))
}

async fn fetch_busybox(directory: &Path) -> Result<PathBuf, String> {
    unpack(&fetch(BUSYBOX_PACKAGE, directory).await?, directory).await?;
    let places = ["usr/bin/busybox", "bin/busybox"].map(|place| directory.join(place));
    let found = places.into_iter().find(|path| path.exists());
    found.ok_or(format!("{BUSYBOX_PACKAGE} holds no busybox"))
}

/// Downloads a package; its file.
async fn fetch(package: &str, directory: &Path) -> Result<PathBuf, String> {
    output("apt-get", &["download", package], directory).await?;
    first_in(directory, &format!("{package}_")).ok_or(format!("apt-get left no file of {package}"))
}

async fn unpack(package: &Path, directory: &Path) -> Result<(), String> {
    let arguments = ["-x", &package.to_string_lossy(), "."];
    output("dpkg-deb", &arguments, directory).await.map(drop)
}

/// A file whose name begins so.
fn first_in(directory: &Path, begin: &str) -> Option<PathBuf> {
    let mut entries = std::fs::read_dir(directory).ok()?.flatten();
    let found = entries.find(|entry| entry.file_name().to_string_lossy().starts_with(begin));
    found.map(|entry| entry.path())
}

/// What a program says on its standard output, or why it does not work.
async fn output(program: &str, arguments: &[&str], directory: &Path) -> Result<String, String> {
    let failed = |why: String| format!("{program} {}: {why}", arguments.join(" "));
    let output = Command::new(program)
        .args(arguments)
        .current_dir(directory)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = match timeout(PROGRAM_WITHIN, output).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => return Err(failed(error.to_string())),
        Err(_) => return Err(failed(format!("not done after {PROGRAM_WITHIN:?}"))),
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().rfind(|line| !line.trim().is_empty());
        return Err(failed(last.unwrap_or("it failed").to_owned()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_of_qemu_is_found() {
        for (text, wanted) in [
            (
                "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright",
                "7.2.22",
            ),
            ("QEMU emulator version 10.0.13", "10.0.13"),
            ("nothing", "of unknown version"),
        ] {
            assert_eq!(version(text), wanted);
        }
    }

    #[tokio::test]
    async fn what_does_not_work_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let said = output("sh", &["-c", "echo good"], dir.path()).await;
        assert_eq!(said.unwrap(), "good\n");
        let script = "echo why >&2; echo >&2; exit 3";
        let why = output("sh", &["-c", script], dir.path()).await.unwrap_err();
        assert!(why.ends_with(": why"), "{why}");
        let why = output("/missing/program", &[], dir.path()).await;
        assert!(why.unwrap_err().starts_with("/missing/program : "));
        assert!(first_in(dir.path(), "").is_none());
    }
}
