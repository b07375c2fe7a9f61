//! Checks of what the configuration names: disk of the journals, certificates, peers, daemon.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use super::Finding;
use crate::cli::units;
use crate::clock::{Clock, SystemClock};
use crate::config::resolved::{JournalConfig, PeerConfig, TlsConfig};
use crate::control::client::Client;
use crate::ids::SiteId;
use crate::page::PAGE_SIZE;
use crate::pki::{self, StatusPaths};

/// Writes that the latency is measured by.
const WRITES: usize = 50;
/// Above this a commit per second is a burden.
const SLOW_SYNC: Duration = Duration::from_millis(50);
/// To connect to a peer.
const CONNECT_WITHIN: Duration = Duration::from_secs(3);
/// Certificates are looked after before it is urgent.
const EXPIRES_SOON_DAYS: i64 = 14;

/// The nearest directory that exists at or above `path`.
fn existing(path: &Path) -> PathBuf {
    let mut path = path;
    while !path.is_dir() {
        match path.parent() {
            Some(parent) => path = parent,
            None => break,
        }
    }
    path.to_owned()
}

/// Space and speed of the journals' disk.
pub(super) fn journal(config: &JournalConfig) -> Vec<Finding> {
    let directory = existing(&config.path);
    vec![space(config, &directory), speed(&directory)]
}

fn space(config: &JournalConfig, directory: &Path) -> Finding {
    let check = "journal space";
    let (free, capacity) = match free_and_capacity(directory) {
        Ok(both) => both,
        Err(error) => {
            let message = format!("{}: {error}", directory.display());
            return Finding::fail(
                check,
                message,
                "set journal.path to a directory that exists",
            );
        }
    };
    let floor = config.min_free.of(capacity);
    let message = format!(
        "{}: {} of {} free, floor {}",
        directory.display(),
        units::bytes(free),
        units::bytes(capacity),
        units::bytes(floor)
    );
    let fix = "free space, or lower journal.min_free, or move journal.path";
    match free {
        free if free < floor => Finding::fail(check, message, fix),
        free if free < floor + 16 * config.segment_bytes => Finding::warn(check, message, fix),
        _ => Finding::ok(check, message),
    }
}

fn free_and_capacity(directory: &Path) -> io::Result<(u64, u64)> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(directory.as_os_str().as_bytes())?;
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the path is a C string and the pointer is valid for one statvfs.
    if unsafe { libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so the structure is filled.
    let stat = unsafe { stat.assume_init() };
    let block = stat.f_frsize;
    Ok((
        block.saturating_mul(stat.f_bavail),
        block.saturating_mul(stat.f_blocks),
    ))
}

/// One page at an address that direct I/O takes.
struct Page(NonNull<u8>);

impl Page {
    const LAYOUT: Layout = match Layout::from_size_align(PAGE_SIZE, PAGE_SIZE) {
        Ok(layout) => layout,
        Err(_) => panic!("a page is a power of two"),
    };

    fn new() -> Self {
        // SAFETY: the layout has a size above 0.
        let page = unsafe { alloc_zeroed(Self::LAYOUT) };
        Self(NonNull::new(page).unwrap_or_else(|| handle_alloc_error(Self::LAYOUT)))
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: PAGE_SIZE initialised bytes were allocated and nobody writes to them.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr(), PAGE_SIZE) }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.0.as_ptr(), Self::LAYOUT) };
    }
}

/// A file that is removed at the end.
struct Probe(PathBuf);

impl Drop for Probe {
    fn drop(&mut self) {
        // What cannot be removed is one page of zeros with a telling name.
        let _ = std::fs::remove_file(&self.0);
    }
}

fn speed(directory: &Path) -> Finding {
    let check = "journal disk";
    let name = format!(".lifeboat-doctor-{}", std::process::id());
    let probe = Probe(directory.join(name));
    let open = |flags| {
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(flags)
            .open(&probe.0)
    };
    let (file, direct) = match open(libc::O_DIRECT) {
        Ok(file) => (Ok(file), true),
        Err(_) => (open(0), false),
    };
    let measured = file.and_then(|file| sync_latencies(&file));
    let latencies = match measured {
        Ok(latencies) => latencies,
        Err(error) => {
            let message = format!("{} cannot be written: {error}", directory.display());
            return Finding::fail(
                check,
                message,
                "give the daemon's user a directory of its own",
            );
        }
    };
    let message = format!(
        "{}: fdatasync p50 {}, p99 {}",
        directory.display(),
        units::duration(latencies[WRITES / 2]),
        units::duration(latencies[WRITES * 99 / 100]),
    );
    if !direct {
        return Finding::fail(
            check,
            format!("{message}; no direct I/O (O_DIRECT)"),
            "put journal.path on ext4, xfs or another file system with direct I/O, not on tmpfs \
             or overlayfs",
        );
    }
    match latencies[WRITES / 2] > SLOW_SYNC {
        true => Finding::warn(
            check,
            format!("{message}: each checkpoint waits for one"),
            "use a disk with a power-safe cache, and not one that guests write to",
        ),
        false => Finding::ok(check, message),
    }
}

/// Sorted times of one write and fdatasync each.
fn sync_latencies(file: &File) -> io::Result<Vec<Duration>> {
    let page = Page::new();
    let mut times = Vec::with_capacity(WRITES);
    for index in 0..WRITES {
        let start = Instant::now();
        file.write_all_at(page.bytes(), (index * PAGE_SIZE) as u64)?;
        file.sync_data()?;
        times.push(start.elapsed());
    }
    times.sort();
    Ok(times)
}

/// Certificates that expire or are revoked.
pub(super) fn certificates(tls: &TlsConfig) -> Vec<Finding> {
    let check = "certificates";
    let paths = StatusPaths {
        ca: &tls.ca,
        cert: &tls.cert,
        crl: tls.crl.as_deref(),
    };
    let status = match pki::status(paths) {
        Ok(status) => status,
        Err(error) => {
            let fix = "\"lifeboat pki issue\" makes them; copy all four files";
            return vec![Finding::fail(check, error.to_string(), fix)];
        }
    };
    let now = SystemClock.now();
    let judge = |what: &str, at, fix: &str| {
        let days = pki::days_between(now, at);
        let message = format!("{what} good until {} ({days} d)", units::time(at));
        match days {
            ..0 => Finding::fail(check, message, fix),
            0..EXPIRES_SOON_DAYS => Finding::warn(check, message, fix),
            _ => Finding::ok(check, message),
        }
    };
    let renew = "\"lifeboat pki issue --renew\", copy the files, \"lifeboat reload\"";
    let mut findings = vec![
        judge("this site's certificate is", status.cert.not_after, renew),
        judge("the CA is", status.ca.not_after, "make a new CA in time"),
    ];
    if let Some(crl) = &status.crl {
        if crl.revoked.contains(&status.cert.serial) {
            let message = format!("this site's certificate {} is revoked", status.cert.serial);
            findings.push(Finding::fail(
                check,
                message,
                "\"lifeboat pki issue\" makes another",
            ));
        }
        let refresh = "\"lifeboat pki revoke\" renews the list; copy it to every site";
        let list = crl
            .next_update
            .map(|at| judge("the revocation list is", at, refresh));
        findings.extend(list);
    }
    if let Err(error) = pki::read_key_file(&tls.key) {
        let fix = "chmod 0600 and the daemon's user as owner";
        findings.push(Finding::fail(check, error.to_string(), fix));
    }
    findings
}

/// Can the peer be reached over TCP?
pub(super) async fn peer(name: &SiteId, peer: &PeerConfig) -> Option<Finding> {
    let check = "peer";
    let address = peer.address.as_deref()?;
    let connect = tokio::net::TcpStream::connect(address);
    let started = Instant::now();
    let connected = tokio::time::timeout(CONNECT_WITHIN, connect).await;
    let why = match connected {
        Ok(Ok(_)) => {
            let took = units::duration(started.elapsed());
            return Some(Finding::ok(
                check,
                format!("{name} answers at {address} ({took})"),
            ));
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer within {}", units::duration(CONNECT_WITHIN)),
    };
    Some(Finding::fail(
        check,
        format!("{name} does not answer at {address}: {why}"),
        format!(
            "is its daemon up, is listen.address set there, does a firewall let it pass? \
                 peer.{name}.address says where it is looked for"
        ),
    ))
}

/// Does a daemon run?
pub(super) async fn daemon(socket: &Path) -> Finding {
    let check = "daemon";
    match Client::new(socket).status().await {
        Ok(status) => Finding::ok(
            check,
            format!(
                "{} {} answers at {}",
                status.site,
                status.version,
                socket.display()
            ),
        ),
        Err(error) => Finding::warn(
            check,
            error.message,
            "\"lifeboat site -c FILE\" starts it (no fault if it is not meant to run yet)",
        ),
    }
}
