//! A command line that touches nothing but its own directory: to try whether a QEMU starts here,
//! beside the guest that may run on the same host.
//!
//! ```text
//!   -netdev tap,id=n,..      ─▶ hubport,id=n          no cable
//!   -chardev socket,id=c,..  ─▶ null,id=c             no file is cut off, no socket taken
//!   -serial, -parallel       ─▶ null
//!   -vnc, -spice, -gdb, -D   ─▶ gone                  no port, no log
//! ```
//!
//! A clone that is to be listened to gets a console of its own in the place of its first serial line. Its
//! agent is spoken to at a socket of its own: it reaches nothing.
//!
//! What is taken away is looked at instead ([`needs`]): does the bridge exist, and the directory of the
//! socket? All else (images, ROMs, machine type, CPU model, devices) QEMU checks itself when it starts.

use std::path::{Path, PathBuf};

use super::command::{agent_device, item, items, named, option, values};

/// Options that are left out, with their argument.
const LEFT_OUT: [&str; 5] = ["-vnc", "-spice", "-gdb", "-D", "-display"];
/// The same without argument.
const LEFT_OUT_ALONE: [&str; 2] = ["-s", "-nographic"];

/// What of a machine is connected.
#[derive(Debug, Clone, Copy, Default)]
pub struct Connected<'a> {
    /// Its first serial line is a socket there.
    pub console: Option<&'a Path>,
    /// Its agent's port is one there, if it was one before.
    pub agent: Option<&'a Path>,
    /// Networks, as they are written.
    pub networks: &'a [String],
}

/// The command line without its connections to the world but these.
pub fn isolated(command: &[String], connected: Connected<'_>) -> Vec<String> {
    let Connected {
        console,
        agent,
        networks,
    } = connected;
    let spoken_to = console.and_then(|_| serial_device(command));
    let agent = agent.and_then(|path| Some((agent_device(command)?, path)));
    let socket = |path: &Path| format!("{},server=on,wait=off", path.display());
    let mut line = console.filter(|_| spoken_to.is_none());
    let mut isolated = Vec::new();
    let mut arguments = command.iter();
    let mut ports = 0;
    let mut port = || {
        ports += 1;
        ports
    };
    while let Some(argument) = arguments.next() {
        let option = option(argument);
        if LEFT_OUT_ALONE.contains(&option) {
            continue;
        }
        if LEFT_OUT.contains(&option) {
            arguments.next();
            continue;
        }
        isolated.push(argument.clone());
        if let ("-netdev" | "-nic", [value, ..]) = (option, arguments.as_slice())
            && networks.contains(value)
        {
            isolated.extend(arguments.next().cloned());
            continue;
        }
        let mut value = || arguments.next().map_or("", String::as_str);
        let replaced = match option {
            "-netdev" => format!("hubport,hubid={},id={}", port(), named(value(), "id")),
            "-nic" => match value() {
                "none" => "none".to_owned(),
                nic => {
                    let kept = ["model", "mac", "addr", "id"];
                    let kept = kept.iter().filter_map(|key| Some((key, item(nic, key)?)));
                    let kept: String = kept.map(|(key, value)| format!(",{key}={value}")).collect();
                    format!("hubport,hubid={}{kept}", port())
                }
            },
            "-chardev" => {
                let id = named(value(), "id");
                let serial = console.filter(|_| spoken_to.as_ref() == Some(&id));
                let agent = agent.as_ref().filter(|(of, _)| *of == id);
                match serial.or(agent.map(|(_, path)| *path)) {
                    Some(path) => format!("socket,id={id},path={}", socket(path)),
                    None => format!("null,id={id}"),
                }
            }
            "-audiodev" => format!("none,id={}", named(value(), "id")),
            "-serial" | "-parallel" => match value() {
                kept if kept == "none" || kept.starts_with("chardev:") => kept.to_owned(),
                _ => match line.take_if(|_| option == "-serial") {
                    Some(path) => format!("unix:{}", socket(path)),
                    None => "null".to_owned(),
                },
            },
            _ => continue,
        };
        isolated.push(replaced);
    }
    isolated.extend(["-display".into(), "none".into()]);
    isolated
}

/// Id of the character device behind the first serial line, if it is one with a name.
fn serial_device(command: &[String]) -> Option<String> {
    let ports = ["isa-serial", "pci-serial", "virtconsole"];
    let device = values(command, "-device").find_map(|device| {
        let driver = match named(device, "driver") {
            named if named.is_empty() => items(device).next()?.to_owned(),
            named => named,
        };
        let is_port = ports.contains(&driver.as_str());
        is_port.then(|| named(device, "chardev"))
    });
    let line = values(command, "-serial").find(|line| *line != "none");
    match line.map(|line| line.strip_prefix("chardev:")) {
        Some(id) => id.map(str::to_owned),
        None => device.filter(|id| !id.is_empty()),
    }
}

/// What a command line wants of its host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needs {
    /// Directories in which QEMU makes sockets and files.
    pub directories: Vec<PathBuf>,
    /// Bridges.
    pub bridges: Vec<String>,
    /// Taps. A QEMU with the rights for it makes one that is missing, connected to nothing.
    pub taps: Vec<String>,
    /// Arguments with open file descriptors of whoever started it.
    pub descriptors: Vec<String>,
    /// Programs behind sockets, which cannot be tried.
    pub vhost_user: bool,
}

/// What [`isolated`] takes away.
pub fn needs(command: &[String]) -> Needs {
    let mut needs = Needs::default();
    let mut directory = |path: &str| {
        let parent = Path::new(path).parent();
        let parent = parent.filter(|parent| !parent.as_os_str().is_empty());
        needs.directories.extend(parent.map(Path::to_owned));
    };
    for device in values(command, "-chardev") {
        let kind = items(device).next().unwrap_or_default();
        if matches!(kind, "file" | "socket" | "pipe" | "unix")
            && let Some(path) = item(device, "path")
        {
            directory(path);
        }
    }
    for line in values(command, "-serial").chain(values(command, "-parallel")) {
        let place = line
            .strip_prefix("file:")
            .or_else(|| line.strip_prefix("unix:"));
        if let Some(path) = place.and_then(|place| items(place).next()) {
            directory(path);
        }
    }
    for net in values(command, "-netdev").chain(values(command, "-nic")) {
        let bridge = named(net, "br");
        needs.bridges.extend((!bridge.is_empty()).then_some(bridge));
        let tap = named(net, "ifname");
        needs.taps.extend((!tap.is_empty()).then_some(tap));
    }
    let from_outside = |argument: &&String| {
        let json = ["\"fd\"", "\"fds\"", "\"vhostfd\""];
        argument.contains("/dev/fdset/")
            || json.iter().any(|key| argument.contains(key))
            || items(argument).any(|item| {
                ["fd=", "fds=", "vhostfd=", "vhostfds="]
                    .iter()
                    .any(|key| item.starts_with(key))
            })
    };
    needs.descriptors = command.iter().filter(from_outside).cloned().collect();
    needs.vhost_user = command.iter().any(|a| a.contains("vhost-user"));
    needs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(command: &str) -> Vec<String> {
        command.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn nothing_outside_is_touched() {
        let command = split(
            "kvm -m 64 -netdev tap,ifname=tap3,id=n,vhost=on -device virtio-net,netdev=n \
             -netdev {\"type\":\"bridge\",\"br\":\"br0\",\"id\":\"o\"} \
             -nic user,model=e1000,mac=52:54:00:00:00:01,hostfwd=tcp::22-:22 -nic none \
             -chardev socket,id=c,path=/r/c,server=on -serial file:/r/out -serial chardev:c \
             -vnc :1 -s -nographic -qmp unix:/r/q,server=on",
        );
        assert_eq!(
            isolated(&command, Connected::default()).join(" "),
            "kvm -m 64 -netdev hubport,hubid=1,id=n -device virtio-net,netdev=n \
             -netdev hubport,hubid=2,id=o \
             -nic hubport,hubid=3,model=e1000,mac=52:54:00:00:00:01 -nic none \
             -chardev null,id=c -serial null -serial chardev:c \
             -qmp unix:/r/q,server=on -display none"
        );
        let mapped = ["bridge,id=n,br=br-test".to_owned()];
        let command_mapped = split("kvm -netdev bridge,id=n,br=br-test -netdev user,id=o");
        assert_eq!(
            isolated(
                &command_mapped,
                Connected {
                    networks: &mapped,
                    ..Connected::default()
                }
            )
            .join(" "),
            "kvm -netdev bridge,id=n,br=br-test -netdev hubport,hubid=1,id=o -display none"
        );
        for (command, heard) in [
            (
                "kvm -serial file:/a -serial pty",
                "kvm -serial unix:/c,server=on,wait=off -serial null",
            ),
            (
                "kvm -serial none -chardev file,id=s,path=/a -device isa-serial,chardev=s",
                "kvm -serial none -chardev socket,id=s,path=/c,server=on,wait=off -device isa-serial,chardev=s",
            ),
            (
                "kvm -chardev pty,id=s -device {\"driver\":\"isa-serial\",\"chardev\":\"s\"}",
                "kvm -chardev socket,id=s,path=/c,server=on,wait=off -device {\"driver\":\"isa-serial\",\"chardev\":\"s\"}",
            ),
            (
                "kvm -chardev socket,id=ga,path=/r/a,server=on -device virtserialport,chardev=ga,name=org.qemu.guest_agent.0",
                "kvm -chardev socket,id=ga,path=/a,server=on,wait=off -device virtserialport,chardev=ga,name=org.qemu.guest_agent.0",
            ),
            (
                "kvm -chardev pty,id=x -chardev pty,id=s -serial chardev:s",
                "kvm -chardev null,id=x -chardev socket,id=s,path=/c,server=on,wait=off -serial chardev:s",
            ),
        ] {
            let connected = Connected {
                console: Some(Path::new("/c")),
                agent: Some(Path::new("/a")),
                ..Connected::default()
            };
            let listened = isolated(&split(command), connected);
            assert_eq!(listened.join(" "), format!("{heard} -display none"));
        }
        let found = needs(&command);
        assert_eq!(found.directories, [Path::new("/r"), Path::new("/r")]);
        assert_eq!(found.bridges, ["br0"]);
        assert_eq!(found.taps, ["tap3"]);
        assert!(found.descriptors.is_empty() && !found.vhost_user);
        let passed = split(
            "kvm -netdev tap,fd=30,id=n -add-fd set=1,fd=3 -drive file=/dev/fdset/1 -m 64 \
             -netdev {\"type\":\"tap\",\"fd\":\"29\",\"id\":\"h\"} -device virtio,x=fd",
        );
        assert_eq!(needs(&passed).descriptors.len(), 4);
    }
}
