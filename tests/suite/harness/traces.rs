//! What something that ended may have left behind: processes, open files, mounts, taps.

use std::fs;
use std::path::Path;

use super::site::Site;

/// Every process that names this path in its command line.
fn processes(path: &Path) -> Vec<String> {
    let path = path.display().to_string();
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let lines = entries.filter_map(|entry| {
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let pid = entry.file_name().to_string_lossy().into_owned();
        line.contains(&path)
            .then(|| format!("process {pid}: {line}"))
    });
    lines.collect()
}

/// What this process has open, by name; deleted files too.
fn open_files(pid: u32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let names = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
    names.map(|name| name.display().to_string()).collect()
}

/// Traces of what used this directory of a site: all of it has to be gone, and its files with it. A tap
/// lives as long as it is open, so none may be.
pub fn left(site: &Site, directory: &Path) -> Vec<String> {
    let mut left = processes(directory);
    let name = directory.display().to_string();
    if directory.exists() {
        left.push(format!("files: {name}"));
    }
    let pid = site.pid();
    let mappings = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let mapped = mappings.lines().filter(|line| line.contains(&name));
    left.extend(mapped.map(|line| format!("mapped: {line}")));
    let open = open_files(pid).into_iter();
    let open = open.filter(|file| file.contains(&name) || file == "/dev/net/tun");
    left.extend(open.map(|file| format!("open: {file}")));
    let mounts = fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap();
    let below = site.dir().display().to_string();
    let mounts = mounts.lines().filter(|line| line.contains(&below));
    left.extend(mounts.map(|line| format!("mount: {line}")));
    left
}
