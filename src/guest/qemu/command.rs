//! The command line of a QEMU: what of it belongs to the site where it ran, and what it becomes at
//! another site.
//!
//! ```text
//!   as captured                         as started at the other site
//!   path of a replicated disk     ─▶    where the disk is there              (placed)
//!   anything the operator lists   ─▶    what the table says: taps, paths     (placed)
//!   -M pc                         ─▶    -M pc-i440fx-7.2: an alias means another machine to
//!                                       another version                      (started)
//!   its monitors, pid file, -S .. ─▶    monitors of ours, -incoming defer    (started)
//!   socket of the guest agent     ─▶    beside our monitors                  (started)
//!   open files of libvirt's       ─▶    files beside our monitors; its master key goes
//! ```
//!
//! The other site has written it, and it can name any file of this host: only for peers that are
//! trusted so far (`qemu = true`).

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::machine::Machine;
use crate::ids::{DiskId, GuestId};

/// A line of the operator's table: a text in a peer's command lines, and what it is here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rewrite {
    /// The text, anywhere in an argument.
    pub from: String,
    /// What takes its place.
    pub to: String,
    /// Only for this guest; `None`: for all of the peer.
    pub guest: Option<GuestId>,
}

/// Sockets that a QEMU of ours listens on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sockets {
    /// The daemon's monitor.
    pub qmp: PathBuf,
    /// The watchdog's.
    pub watchdog: PathBuf,
    /// The guest agent's, if the machine has one.
    pub agent: PathBuf,
    /// Where files are made that QEMU was given open by whoever started it.
    pub files: PathBuf,
}

impl Sockets {
    /// Those below a guest's directory.
    pub fn within(run_dir: &Path) -> Self {
        Self {
            qmp: run_dir.join("qmp.sock"),
            watchdog: run_dir.join("watchdog.sock"),
            agent: run_dir.join("agent.sock"),
            files: run_dir.to_owned(),
        }
    }
}

/// Why a command line cannot be started here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// It starts something else.
    #[error("the guest was not run by a QEMU that can be started here, but by {0:?}")]
    Program(String),
    /// A disk's image that is not in it.
    #[error("QEMU's command line does not name the image of disk \"{0}\", {1}")]
    Disk(DiskId, String),
    /// A disk that has no file here.
    #[error("the point has no disk \"{0}\"")]
    File(DiskId),
}

/// Options with an argument that are their old site's, or ours to say.
const DROPPED: [&str; 7] = [
    "-add-fd",
    "-qmp",
    "-monitor",
    "-pidfile",
    "-incoming",
    "-loadvm",
    "-qmp-pretty",
];
/// The same without an argument.
const DROPPED_ALONE: [&str; 3] = ["-daemonize", "-S", "-no-shutdown"];
/// Where QEMU finds files that were opened for it.
const OPEN_FILES: &str = "/dev/fdset/";
/// Id of the key with which libvirt hands over other secrets; it is made anew for each start.
const LIBVIRT_KEY: &str = "masterKey0";
/// Name of the guest agent's port, as the agent of every distribution opens it.
const AGENT_PORT: &str = "org.qemu.guest_agent.0";

/// The machine with its disks in these files, and the operator's table applied to all the rest.
pub fn placed(
    mut machine: Machine,
    files: &[(DiskId, PathBuf)],
    table: &[Rewrite],
) -> Result<Machine, CommandError> {
    // What must not be rewritten stands as a mark while the table is applied: no argument has a NUL.
    let mark = |number: usize| format!("\0{number}\0");
    for (number, disk) in machine.disks.iter().enumerate() {
        let mut named = false;
        for argument in &mut machine.command {
            let (text, found) = replace_whole(argument, &disk.file, &mark(number));
            *argument = text;
            named |= found;
        }
        if !named {
            return Err(CommandError::Disk(disk.id.clone(), disk.file.clone()));
        }
    }
    // The program is chosen by its name alone.
    for argument in machine.command.iter_mut().skip(1) {
        for line in table.iter().filter(|line| !line.from.is_empty()) {
            *argument = argument.replace(&line.from, &line.to);
        }
    }
    for (number, disk) in machine.disks.iter_mut().enumerate() {
        let found = files.iter().find(|(id, _)| *id == disk.id);
        let (_, path) = found.ok_or_else(|| CommandError::File(disk.id.clone()))?;
        disk.file = path.display().to_string();
        for argument in &mut machine.command {
            *argument = argument.replace(&mark(number), &disk.file);
        }
    }
    Ok(machine)
}

/// Replaces a path where it is the whole of a value, and not the beginning or end of a longer one.
fn replace_whole(text: &str, path: &str, by: &str) -> (String, bool) {
    let part = |c: char| !matches!(c, ',' | '"' | '=' | ':');
    let (mut done, mut rest, mut found) = (String::new(), text, false);
    while let Some(at) = rest.find(path) {
        let after = &rest[at + path.len()..];
        // `nbd:` and the like stand before a path; a path's own letters do not.
        let before = rest[..at].chars().next_back().or(done.chars().next_back());
        let whole = !before.is_some_and(part) && !after.chars().next().is_some_and(part);
        done.push_str(&rest[..at]);
        done.push_str(if whole { by } else { path });
        found |= whole;
        rest = after;
    }
    done.push_str(rest);
    (done, found)
}

/// The command line that starts the machine here, waiting for a checkpoint.
pub fn started(machine: &Machine, sockets: &Sockets) -> Result<Vec<String>, CommandError> {
    let mut arguments = machine.command.iter();
    let program = arguments.next().map_or("", String::as_str);
    // Of the old site's path only the name: the program is this site's own.
    let program_name = program.rsplit('/').next().unwrap_or_default();
    if !program_name.starts_with("qemu-system-") && !["qemu-kvm", "kvm"].contains(&program_name) {
        return Err(CommandError::Program(program.to_owned()));
    }
    let monitors: Vec<String> = values(&machine.command, "-mon")
        .filter_map(|mon| Some(item(mon, "chardev")?.to_owned()))
        .collect();
    let agent = agent_device(&machine.command);
    let names_key = |argument: &&String| argument.contains(LIBVIRT_KEY);
    let key_is_used = machine.command.iter().filter(names_key).count() > 1;
    let mut command = vec![program_name.to_owned()];
    let mut typed = false;
    while let Some(argument) = arguments.next() {
        let name = option(argument);
        if DROPPED_ALONE.contains(&name) {
            continue;
        }
        if DROPPED.contains(&name) || name == "-mon" {
            arguments.next();
            continue;
        }
        command.push(argument.clone());
        match name {
            "-M" | "-machine" => {
                let value = arguments.next().map_or("", String::as_str);
                let value = with_type(value, &machine.head.machine);
                typed |= value.1;
                command.push(value.0);
            }
            "-chardev" => {
                let value = arguments.next().map_or("", String::as_str);
                let id = item(value, "id").unwrap_or_default();
                if monitors.iter().any(|monitor| monitor == id) {
                    command.pop();
                } else if agent.as_deref() == Some(id) {
                    command.push(with_path(value, &sockets.agent));
                } else if item(value, "path").is_some_and(|path| path.starts_with(OPEN_FILES)) {
                    let file = sockets.files.join(format!("{id}.log"));
                    command.push(with_path(value, &file));
                } else {
                    command.push(unwaited(value));
                }
            }
            "-serial" | "-parallel" => {
                command.push(unwaited(arguments.next().map_or("", String::as_str)));
            }
            "-object" if !key_is_used => {
                let value = arguments.next().map_or("", String::as_str);
                if named(value, "id") == LIBVIRT_KEY {
                    command.pop();
                } else {
                    command.push(value.to_owned());
                }
            }
            _ => {}
        }
    }
    if !typed {
        command.extend(["-machine".into(), format!("type={}", machine.head.machine)]);
    }
    for socket in [&sockets.qmp, &sockets.watchdog] {
        command.push("-qmp".into());
        command.push(format!("unix:{},server=on,wait=off", socket.display()));
    }
    command.extend(["-incoming".into(), "defer".into()]);
    Ok(command)
}

/// Whether the machine has a port for a guest agent that we can reach once we started it.
pub fn has_agent(machine: &Machine) -> bool {
    agent_device(&machine.command).is_some()
}

/// Where the guest agent of a QEMU that runs as described can be reached.
pub fn agent_socket(machine: &Machine) -> Option<PathBuf> {
    let id = agent_device(&machine.command)?;
    let mut devices = values(&machine.command, "-chardev");
    let device = devices.find(|device| item(device, "id") == Some(id.as_str()))?;
    item(device, "path").map(PathBuf::from)
}

/// Id of the character device behind the agent's port, if it is a socket that QEMU listens on.
pub(super) fn agent_device(command: &[String]) -> Option<String> {
    let port = values(command, "-device").find_map(|device| {
        if let Ok(Value::Object(json)) = serde_json::from_str(device) {
            let text = |key| json.get(key).and_then(Value::as_str);
            return (text("name") == Some(AGENT_PORT)).then(|| text("chardev").map(str::to_owned));
        }
        let named = item(device, "name") == Some(AGENT_PORT);
        named.then(|| item(device, "chardev").map(str::to_owned))
    });
    let id = port??;
    let listens = values(command, "-chardev").any(|device| {
        let server = match item(device, "server") {
            Some(value) => value == "on",
            None => items(device).any(|item| item == "server"),
        };
        item(device, "id") == Some(id.as_str())
            && items(device).next() == Some("socket")
            && item(device, "path").is_some()
            && server
    });
    listens.then_some(id)
}

/// An option's name as with one dash.
pub(super) fn option(argument: &str) -> &str {
    match argument.strip_prefix("--") {
        Some(name) if !name.is_empty() => &argument[1..],
        _ => argument,
    }
}

/// Arguments of every occurrence of an option.
pub(super) fn values<'a>(command: &'a [String], name: &'a str) -> impl Iterator<Item = &'a str> {
    command
        .windows(2)
        .filter(move |pair| option(&pair[0]) == name)
        .map(|pair| pair[1].as_str())
}

/// The items of `a,b=c`. A doubled comma is one within a value; such items are left whole.
pub(super) fn items(value: &str) -> impl Iterator<Item = &str> {
    let bytes = value.as_bytes();
    let mut from = 0;
    std::iter::from_fn(move || {
        if from > bytes.len() {
            return None;
        }
        let mut at = from;
        while at < bytes.len() {
            if bytes[at] == b',' {
                if bytes.get(at + 1) != Some(&b',') {
                    break;
                }
                at += 1;
            }
            at += 1;
        }
        let item = &value[from..at];
        from = at + 1;
        Some(item)
    })
}

/// Value of `key` in `a,key=value`.
pub(super) fn item<'a>(value: &'a str, key: &str) -> Option<&'a str> {
    items(value).find_map(|item| item.strip_prefix(key)?.strip_prefix('='))
}

/// Value of a key of an option that may be written in JSON; empty if there is none.
pub(super) fn named(value: &str, key: &str) -> String {
    if let Ok(Value::Object(json)) = serde_json::from_str(value) {
        let text = json.get(key).and_then(Value::as_str);
        return text.unwrap_or_default().to_owned();
    }
    item(value, key).unwrap_or_default().to_owned()
}

/// A machine option that names this type; false if it names none.
fn with_type(value: &str, machine: &str) -> (String, bool) {
    let mut named = false;
    let replaced: Vec<String> = items(value)
        .enumerate()
        .map(|(number, item)| {
            let first = number == 0 && !item.contains('=') && !item.is_empty();
            if first || item.starts_with("type=") {
                named = true;
                format!("type={machine}")
            } else {
                item.to_owned()
            }
        })
        .collect();
    (replaced.join(","), named)
}

/// A socket that waits for nobody: whoever connected at the old site may never come.
fn unwaited(value: &str) -> String {
    if !items(value).any(|item| item == "server" || item == "server=on") {
        return value.to_owned();
    }
    let waits = |item: &&str| item.starts_with("wait") || *item == "nowait";
    let kept = items(value).filter(|item| !waits(item));
    kept.chain(["wait=off"]).collect::<Vec<_>>().join(",")
}

/// A character device with its file or socket elsewhere.
fn with_path(value: &str, path: &Path) -> String {
    let replaced = items(value).map(|item| match item.strip_prefix("path=") {
        Some(_) => format!("path={}", path.display()),
        None => item.to_owned(),
    });
    unwaited(&replaced.collect::<Vec<_>>().join(","))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::qemu::machine::MachineDisk;
    use crate::guest::qemu::qmp::Version;
    use crate::guest::qemu::stream::{Block, Head};

    fn machine(command: &str, disks: &[(&str, &str)]) -> Machine {
        let head = Head {
            machine: "pc-i440fx-7.2".into(),
            configuration: vec![],
            section: 2,
            blocks: vec![Block {
                name: "pc.ram".into(),
                bytes: 8 << 20,
            }],
        };
        let version = Version {
            major: 7,
            minor: 2,
            micro: 22,
        };
        let disks = disks.iter().map(|(id, file)| MachineDisk {
            id: id.parse().unwrap(),
            node: (*id).into(),
            file: (*file).into(),
            pages: 9,
        });
        let command = command.split_whitespace().map(str::to_owned).collect();
        Machine::new(version, head, command, disks.collect())
    }

    fn run(machine: &Machine) -> String {
        let command = started(machine, &Sockets::within(Path::new("/r"))).unwrap();
        command.join(" ")
    }

    const OURS: &str = "-qmp unix:/r/qmp.sock,server=on,wait=off -qmp \
                        unix:/r/watchdog.sock,server=on,wait=off -incoming defer";

    #[test]
    fn what_is_the_old_sites_goes_and_the_rest_stays() {
        let cases = [
            (
                "/opt/qemu-system-x86_64 -M pc -m 64 -daemonize -qmp unix:/a/q,server=on -S --pidfile /a/pid",
                "qemu-system-x86_64 -M type=pc-i440fx-7.2 -m 64",
            ),
            (
                "kvm -M pc -serial unix:/a/s,server -parallel tcp::4,server=on,nowait -chardev \
                 socket,id=c,path=/a/c,server=on",
                "kvm -M type=pc-i440fx-7.2 -serial unix:/a/s,server,wait=off -parallel \
                 tcp::4,server=on,wait=off -chardev socket,id=c,path=/a/c,server=on,wait=off",
            ),
            // The type is added where the machine was QEMU's default.
            ("kvm -m 64", "kvm -m 64 -machine type=pc-i440fx-7.2"),
            (
                "qemu-kvm -machine accel=kvm --machine usb=off,type=pc",
                "qemu-kvm -machine accel=kvm --machine usb=off,type=pc-i440fx-7.2",
            ),
            (
                "kvm -M pc,usb=off -chardev socket,id=m,path=/a/m,server=on -mon chardev=m,mode=control \
                 -chardev file,id=log,path=/a/log -serial chardev:log",
                "kvm -M type=pc-i440fx-7.2,usb=off -chardev file,id=log,path=/a/log -serial chardev:log",
            ),
            (
                "kvm -M pc -chardev socket,path=/a/qga,server=on,wait=on,id=ga -device \
                 virtserialport,chardev=ga,name=org.qemu.guest_agent.0",
                "kvm -M type=pc-i440fx-7.2 -chardev socket,path=/r/agent.sock,server=on,id=ga,wait=off -device \
                 virtserialport,chardev=ga,name=org.qemu.guest_agent.0",
            ),
            // As libvirt starts it.
            (
                "kvm -object {\"qom-type\":\"secret\",\"id\":\"masterKey0\",\"file\":\"/l/k\"} \
                 -object {\"qom-type\":\"memory-backend-ram\",\"id\":\"pc.ram\"} -machine pc-i440fx-7.2,usb=off \
                 -chardev socket,id=m,fd=26,server=on -mon chardev=m,mode=control -no-shutdown \
                 -add-fd set=0,fd=25 -chardev file,id=s,path=/dev/fdset/0,append=on -serial chardev:s",
                "kvm -object {\"qom-type\":\"memory-backend-ram\",\"id\":\"pc.ram\"} -machine \
                 type=pc-i440fx-7.2,usb=off -chardev file,id=s,path=/r/s.log,append=on -serial chardev:s",
            ),
        ];
        for (old, new) in cases {
            assert_eq!(run(&machine(old, &[])), format!("{new} {OURS}"));
        }
        for program in ["/bin/sh", "", "/tmp/qemu-system-x86_64/sh"] {
            let other = machine(&format!("{program} -m 64"), &[]);
            let refused = started(&other, &Sockets::within(Path::new("/r")));
            assert!(
                matches!(refused, Err(CommandError::Program(_))),
                "{program}"
            );
        }
    }

    #[test]
    fn an_agent_is_one_that_can_be_reached() {
        let port = "virtserialport,chardev=ga,name=org.qemu.guest_agent.0";
        let json = r#"{"driver":"virtserialport","chardev":"ga","name":"org.qemu.guest_agent.0"}"#;
        let socket = "socket,id=ga,path=/a,server=on";
        for (device, chardev, there) in [
            (port, socket, true),
            (json, socket, true),
            (port, "socket,id=ga,path=/a,server", true),
            (port, "socket,id=ga,path=/a,server=off", false),
            (port, "socket,id=other,path=/a,server=on", false),
            (port, "pty,id=ga", false),
            (
                "virtserialport,chardev=ga,name=com.redhat.spice.0",
                socket,
                false,
            ),
        ] {
            let command = format!("kvm -chardev {chardev} -device {device}");
            assert_eq!(has_agent(&machine(&command, &[])), there, "{command}");
        }
    }

    #[test]
    fn disks_are_placed_and_the_table_is_applied_to_all_the_rest() {
        let old = machine(
            "/a/kvm -drive file=/a/root.img,format=raw,id=root -blockdev \
             {\"filename\":\"/a/root.img.2\"} -serial file:/a/out -netdev tap,ifname=tap3",
            &[("root", "/a/root.img"), ("two", "/a/root.img.2")],
        );
        let files: Vec<(DiskId, PathBuf)> = [("root", "/a/new/r"), ("two", "/a/new/t")]
            .map(|(id, path)| (id.parse().unwrap(), path.into()))
            .into();
        let line = |from: &str, to: &str| Rewrite {
            from: from.into(),
            to: to.into(),
            guest: None,
        };
        let table = [
            line("/a/", "/b/"),
            line("ifname=tap3", "ifname=tap7"),
            line("", "x"),
        ];
        let new = placed(old.clone(), &files, &table).unwrap();
        assert_eq!(
            new.command.join(" "),
            "/a/kvm -drive file=/a/new/r,format=raw,id=root -blockdev {\"filename\":\"/a/new/t\"} \
             -serial file:/b/out -netdev tap,ifname=tap7"
        );
        assert_eq!(new.disks[1].file, "/a/new/t");
        let missing = placed(old.clone(), &files[..1], &[]).unwrap_err();
        assert!(matches!(missing, CommandError::File(_)));
        let mut other = old;
        other.disks[0].file = "/a/root".into();
        let unnamed = placed(other, &files, &[]).unwrap_err();
        assert!(matches!(unnamed, CommandError::Disk(..)));
    }

    #[test]
    fn items_keep_doubled_commas() {
        let cases: [(&str, &[&str]); 4] = [
            ("a,b=c", &["a", "b=c"]),
            ("a,,b,c", &["a,,b", "c"]),
            ("", &[""]),
            ("a,", &["a", ""]),
        ];
        for (text, expected) in cases {
            assert_eq!(items(text).collect::<Vec<_>>(), expected, "{text:?}");
        }
    }
}
