//! A kernel as a distribution packs it: the image, and the modules that belong to it.
//!
//! ```text
//!   ROOT/boot/vmlinuz-RELEASE        the image says its RELEASE by itself (boot protocol of x86)
//!   ROOT/lib/modules/RELEASE/**      or below ROOT/usr; *.ko, *.ko.xz or *.ko.zst
//! ```
//!
//! A kernel without that directory is taken to have all drivers built in. What a module needs is in the
//! module itself (`depends=`): the usual list of it is made when a package is installed, and these may
//! only be unpacked.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where the boot protocol's header has its magic number, and the place of the release.
const MAGIC_AT: usize = 0x202;
const RELEASE_AT: usize = 0x20e;
/// The place of the release is counted from here.
const RELEASE_BASE: usize = 0x200;
/// No release is that long.
const RELEASE_BYTES_MAX: usize = 256;
/// The header and the release are in the image's first bytes.
const HEAD_BYTES: u64 = 64 << 10;

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is something else.
    #[error("{} is no bzImage of Linux: name a file such as /boot/vmlinuz-6.1.0-13-amd64", .0.display())]
    NotLinux(PathBuf),
    /// A busybox that needs libraries, which its guest has not.
    #[error("{} is no static program for x86-64: Debian's package busybox-static has one", .0.display())]
    NotStatic(PathBuf),
    /// A program whose libraries are not known.
    #[error("cannot tell which libraries {} needs: ldd: {why}", path.display())]
    Libraries {
        /// The program.
        path: PathBuf,
        /// What was said.
        why: String,
    },
    /// A module that cannot be unpacked.
    #[error("cannot unpack {} with {program}: {why}", path.display())]
    Unpack {
        /// The file.
        path: PathBuf,
        /// The program for it.
        program: &'static str,
        /// What it said.
        why: String,
    },
}

/// See the module.
#[derive(Debug)]
pub struct Kernel {
    image: PathBuf,
    release: String,
    /// Files, by the names of modules, in which `-` is written as `_`.
    modules: BTreeMap<String, PathBuf>,
}

impl Kernel {
    /// Looks at an image, and for its modules.
    pub fn open(image: &Path) -> Result<Self, KernelError> {
        let error = |source| KernelError::Read {
            path: image.to_owned(),
            source,
        };
        let mut head = Vec::new();
        let file = File::open(image).map_err(error)?;
        file.take(HEAD_BYTES)
            .read_to_end(&mut head)
            .map_err(error)?;
        let release = release(&head).ok_or_else(|| KernelError::NotLinux(image.to_owned()))?;
        let image = std::path::absolute(image).map_err(error)?;
        let mut modules = BTreeMap::new();
        if let Some(root) = image.ancestors().nth(2) {
            for place in ["lib/modules", "usr/lib/modules"] {
                find(&root.join(place).join(&release), &mut modules);
            }
        }
        Ok(Self {
            image,
            release,
            modules,
        })
    }

    /// The image's file.
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// Such as `6.1.0-13-cloud-amd64`.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Names and contents of these modules and of those that they need, in an order in which they can be
    /// loaded. What is no module is built in.
    pub fn modules(&self, wanted: &[&str]) -> Result<Vec<(String, Vec<u8>)>, KernelError> {
        let mut found = Vec::new();
        // A module waits here a second time, until those that it needs are found.
        let mut stack: Vec<(String, Option<Vec<u8>>)> = wanted.iter().rev().map(name).collect();
        while let Some((name, read)) = stack.pop() {
            if found.iter().any(|(known, _)| *known == name) {
                continue;
            }
            if let Some(content) = read {
                found.push((name, content));
            } else if let Some(path) = self.modules.get(&name) {
                let content = unpacked(path)?;
                let needs = depends(&content);
                // A circle would have no order, and no end here.
                let waits = |need: &String| stack.iter().any(|(n, c)| n == need && c.is_some());
                let needs: Vec<String> = needs.into_iter().filter(|need| !waits(need)).collect();
                stack.push((name, Some(content)));
                stack.extend(needs.into_iter().map(|need| (need, None)));
            }
        }
        Ok(found)
    }

    #[cfg(test)]
    pub(super) fn monolithic() -> Self {
        Self {
            image: PathBuf::new(),
            release: String::new(),
            modules: BTreeMap::new(),
        }
    }
}

fn name(wanted: &&str) -> (String, Option<Vec<u8>>) {
    (wanted.replace('-', "_"), None)
}

/// What an image says that it is.
fn release(head: &[u8]) -> Option<String> {
    if head.get(MAGIC_AT..MAGIC_AT + 4)? != b"HdrS" {
        return None;
    }
    let at = head.get(RELEASE_AT..RELEASE_AT + 2)?;
    let at = RELEASE_BASE + usize::from(u16::from_le_bytes([at[0], at[1]]));
    let text = head.get(at..)?;
    let text = &text[..text.len().min(RELEASE_BYTES_MAX)];
    let end = text.iter().position(|byte| matches!(byte, b' ' | 0))?;
    let release = std::str::from_utf8(&text[..end]).ok()?;
    // It becomes the name of a directory.
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-+~".contains(c);
    let good = release.starts_with(|c: char| c.is_ascii_digit()) && release.chars().all(plain);
    good.then(|| release.to_owned())
}

/// Adds all modules below a directory; none if it cannot be read.
fn find(directory: &Path, modules: &mut BTreeMap<String, PathBuf>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        // A link to the sources is none of ours.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            find(&path, modules);
        } else if let Some((stem, "" | ".xz" | ".zst")) =
            entry.file_name().to_str().and_then(|n| n.split_once(".ko"))
        {
            modules.insert(stem.replace('-', "_"), path);
        }
    }
}

/// The content of a module's file.
fn unpacked(path: &Path) -> Result<Vec<u8>, KernelError> {
    let program = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => {
            return fs::read(path).map_err(|source| KernelError::Read {
                path: path.to_owned(),
                source,
            });
        }
    };
    let failed = |why: String| KernelError::Unpack {
        path: path.to_owned(),
        program,
        why,
    };
    let output = Command::new(program)
        .arg("-dc")
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(failed(said));
    }
    Ok(output.stdout)
}

/// Modules that a module needs.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let text = &module[at + KEY.len()..];
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(0);
    let names = String::from_utf8_lossy(&text[..end]).replace('-', "_");
    let names = names.split(',').filter(|name| !name.is_empty());
    names.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(release: &str) -> Vec<u8> {
        let mut image = vec![0; 0x400];
        image[MAGIC_AT..MAGIC_AT + 4].copy_from_slice(b"HdrS");
        image[RELEASE_AT..RELEASE_AT + 2].copy_from_slice(&0x150u16.to_le_bytes());
        image[0x350..0x350 + release.len()].copy_from_slice(release.as_bytes());
        image
    }

    #[test]
    fn an_image_says_its_release() {
        let said = |text: &str| release(&image(text));
        assert_eq!(
            said("6.1.0-13-cloud-amd64 (a@b) #1 SMP"),
            Some("6.1.0-13-cloud-amd64".into())
        );
        for bad in ["", "../../etc x", "6.1/.. x", "amd64 x"] {
            assert_eq!(said(bad), None, "{bad:?}");
        }
        assert_eq!(release(b"MZ"), None);
        for cut in 0..0x35f {
            assert_eq!(release(&image("6.1.0-13-cloud")[..cut]), None, "{cut}");
        }
    }

    #[test]
    fn modules_come_after_those_that_they_need() {
        let root = tempfile::tempdir().unwrap();
        let boot = root.path().join("boot");
        let drivers = root.path().join("lib/modules/6.1.0-x/kernel/drivers");
        fs::create_dir_all(&boot).unwrap();
        fs::create_dir_all(&drivers).unwrap();
        fs::write(boot.join("vmlinuz"), image("6.1.0-x (me)")).unwrap();
        for (name, needs) in [
            ("virtio-pci", "virtio_ring,virtio"),
            ("virtio_ring", ""),
            ("virtio", "virtio-ring,missing"),
            ("round", "about"),
            ("about", "round"),
            ("other", ""),
        ] {
            let text = format!("\x7fELF\0depends={needs}\0{name}");
            fs::write(drivers.join(format!("{name}.ko")), text).unwrap();
        }
        let kernel = Kernel::open(&boot.join("vmlinuz")).unwrap();
        assert_eq!(kernel.release(), "6.1.0-x");
        let names = |wanted: &[&str]| -> Vec<String> {
            let found = kernel.modules(wanted).unwrap();
            found.into_iter().map(|(name, _)| name).collect()
        };
        assert_eq!(
            names(&["virtio_pci", "virtio_blk", "virtio"]),
            ["virtio_ring", "virtio", "virtio_pci"]
        );
        assert_eq!(names(&["round"]), ["about", "round"]);
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("vmlinuz");
        assert!(matches!(Kernel::open(&file), Err(KernelError::Read { .. })));
        fs::write(&file, "no kernel").unwrap();
        assert!(matches!(Kernel::open(&file), Err(KernelError::NotLinux(_))));
    }
}
