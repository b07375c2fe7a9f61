//! Builds the demo payload (src/vmm/payload/guest), a `no_std` ELF that the crate embeds.
//!
//! It is compiled with the host's own target, because that one is always installed, and linked
//! statically by GNU ld: rust's default linker cannot drop the unwind tables that the host's
//! `core` refers to. The compiler is called directly, so neither RUSTFLAGS nor clippy nor rustdoc
//! change the payload.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::{env, fs};

const SOURCES: &str = "src/vmm/payload";
const COMPILED: [&str; 7] = [
    "abi.rs",
    "content.rs",
    "step.rs",
    "guest/main.rs",
    "guest/memory.rs",
    "guest/virtio.rs",
    "guest/payload.ld",
];

fn main() -> ExitCode {
    for file in COMPILED {
        println!("cargo::rerun-if-changed={SOURCES}/{file}");
    }
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=RUSTC");
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            for line in why.lines() {
                println!("cargo::error={line}");
            }
            ExitCode::FAILURE
        }
    }
}

fn variable(name: &str) -> Result<PathBuf, String> {
    match env::var_os(name) {
        Some(value) => Ok(value.into()),
        None => Err(format!(
            "{name} is not set; this script is run by cargo only"
        )),
    }
}

fn build() -> Result<(), String> {
    let host = env::var("HOST").unwrap_or_default();
    if !host.starts_with("x86_64-") || !host.contains("linux") {
        return Err(format!(
            "Lifeboat's demo payload is x86-64 code and needs an x86-64 Linux host to be built on, not {host}"
        ));
    }
    for tool in ["cc", "ld.bfd"] {
        require(tool)?;
    }
    let root = variable("CARGO_MANIFEST_DIR")?.join(SOURCES);
    let elf = variable("OUT_DIR")?.join("payload.elf");
    let script = root.join("guest/payload.ld");
    let mut rustc = Command::new(variable("RUSTC")?);
    rustc.args(["--edition", "2024", "--crate-type", "bin"]);
    // The crate lints the shared files; here, what only the host uses would count as unused.
    rustc.args(["--crate-name", "payload", "--cap-lints", "allow"]);
    for option in [
        "panic=abort",
        "opt-level=2",
        "codegen-units=1",
        "lto=fat",
        "debuginfo=0",
        "strip=symbols",
        "overflow-checks=off",
        "relocation-model=static",
        "linker=cc",
        "link-arg=-nostartfiles",
        "link-arg=-nostdlib",
        "link-arg=-static",
        "link-arg=-no-pie",
        "link-arg=-fuse-ld=bfd",
        "link-arg=-Wl,-z,norelro",
        "link-arg=-Wl,-z,max-page-size=4096",
        "link-arg=-Wl,--build-id=none",
    ] {
        rustc.args(["-C", option]);
    }
    rustc.arg("-C");
    rustc.arg(format!("link-arg=-Wl,-T,{}", script.display()));
    rustc.arg("-o").arg(&elf).arg(root.join("guest/main.rs"));
    let output = rustc
        .output()
        .map_err(|e| format!("the compiler {rustc:?} cannot be run: {e}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("the demo payload does not build:\n{said}"));
    }
    let size = fs::metadata(&elf).map_err(|e| format!("{}: {e}", elf.display()))?;
    if size.len() > 1 << 20 {
        return Err(format!(
            "the demo payload has {} bytes, more than 1 MiB: was it linked without --gc-sections?",
            size.len()
        ));
    }
    Ok(())
}

/// A missing linker is said in plain words, before rustc drowns it in a command line.
fn require(tool: &str) -> Result<(), String> {
    match Command::new(tool).arg("--version").output() {
        Ok(output) if output.status.success() => Ok(()),
        _ => Err(format!(
            "`{tool}` cannot be run, but linking the demo payload needs it: install gcc and binutils \
             (Debian, Ubuntu: apt install gcc binutils; Fedora: dnf install gcc binutils)"
        )),
    }
}
