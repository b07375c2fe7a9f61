use super::resolved::*;
use super::*;
use crate::guest::qemu::command::Rewrite;
use crate::guest::qemu::probe::Mode;
use std::path::PathBuf;
use std::time::Duration;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn load_text(text: &str, env: &[(&str, &str)]) -> Result<Loaded, ConfigError> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("site.toml");
    std::fs::write(&file, text).unwrap();
    let env = env.iter().map(|(k, v)| (k.to_string(), v.to_string()));
    load_with(&file, Files::Ignored, env)
}

fn builtin(guest: &GuestConfig) -> &BuiltinConfig {
    match &guest.machine {
        MachineConfig::Builtin(builtin) => builtin,
        MachineConfig::Qemu(_) => panic!("{guest:?}"),
    }
}

#[test]
fn the_samples_load_and_fit_together() {
    let sample = |name: &str| {
        let file = root().join("config").join(name);
        load_with(&file, Files::Ignored, std::iter::empty())
            .unwrap()
            .config
    };
    let (a, b) = (sample("site-a.toml"), sample("site-b.toml"));
    for (one, other) in [(&a, &b), (&b, &a)] {
        let peer = &one.peers[&other.site];
        assert!(peer.address.is_some() && one.listen.is_some() && one.tls.is_some());
        assert_eq!(one.retention, other.retention);
    }
    for (name, guest) in &a.guests {
        assert!(
            b.peers[&a.site].guests.contains(name),
            "{name} may not be written"
        );
        assert_eq!(guest.peer.as_ref(), Some(&b.site));
        assert_eq!(guest.replication.rpo_target, Duration::from_secs(2));
        assert_eq!(
            builtin(guest).disks[0].path,
            root().join("config/guests/db1/root.img")
        );
    }
    assert_eq!(a.journal.path, PathBuf::from("/var/lib/lifeboat/journal"));
}

/// Each bad sample starts with `# expect: KEY | PLACE | TEXT`. Samples named `bad-file-*` are wrong
/// only because of the files that they name.
#[test]
fn bad_samples_fail_with_the_key_and_the_place() {
    let mut seen = 0;
    for entry in std::fs::read_dir(root().join("tests/data/config")).unwrap() {
        let file = entry.unwrap().path();
        let name = file.file_name().unwrap().to_str().unwrap().to_owned();
        if !(name.starts_with("bad-") && name.ends_with(".toml")) {
            continue;
        }
        seen += 1;
        let text = std::fs::read_to_string(&file).unwrap();
        let expected = text.lines().next().unwrap();
        let expected: Vec<_> = expected
            .strip_prefix("# expect: ")
            .unwrap_or_else(|| panic!("{name} has no expectation"))
            .splitn(3, " | ")
            .map(str::trim)
            .collect();
        let only_files = name.starts_with("bad-file-");
        let ignored = load_with(&file, Files::Ignored, std::iter::empty());
        assert_eq!(ignored.is_ok(), only_files, "{name}: {ignored:?}");
        let error = load_with(
            &file,
            if only_files {
                Files::Required
            } else {
                Files::Ignored
            },
            std::iter::empty(),
        )
        .expect_err(&name);
        let problem = &error.problems()[0];
        let place = problem.place.as_ref().map(Place::to_string);
        let place = place.unwrap_or_default();
        assert_eq!(problem.key, expected[0], "{name}: {error}");
        assert!(
            place.split(',').next() == Some(expected[1]),
            "{name}: {error}"
        );
        assert!(problem.message.contains(expected[2]), "{name}: {error}");
    }
    assert!(seen >= 40, "only {seen} bad samples were found");
}

const SMALL: &str = r#"
[site]
name = "site-a"
[defaults.replication]
rpo_target = "10s"
[[guest]]
name = "db1"
memory = "64MiB"
boot = { demo = { working_set = "8MiB" } }
"#;

#[test]
fn defaults_are_filled_in() {
    let config = load_text(SMALL, &[]).unwrap().config;
    assert_eq!(config.admin_socket, PathBuf::from(DEFAULT_SOCKET));
    assert_eq!(config.metrics_listen.unwrap().to_string(), "127.0.0.1:7480");
    assert_eq!((config.listen, config.tls), (None, None));
    assert_eq!(config.journal.segment_bytes, 64 << 20);
    assert_eq!(config.journal.min_free, MinFree::Percent(5));
    assert_eq!(config.journal.min_free.of(1000), 50);
    let guest = config.guests.values().next().unwrap();
    assert_eq!(guest.replication.rpo_target, Duration::from_secs(10));
    assert_eq!(guest.replication.checkpoint_min, Duration::from_millis(20));
    assert_eq!((builtin(guest).vcpus, guest.autostart), (1, true));
    let working_set_bytes = 8 << 20;
    assert_eq!(builtin(guest).boot, BootConfig::Demo { working_set_bytes });
}

#[test]
fn the_environment_overrides_the_file_and_says_so() {
    let text = format!(
        "{SMALL}\n[peer.site-b]\naddress = \"b.example:1\"\n[tls]\nca=\"a\"\ncert=\"b\"\nkey=\"c\"\n"
    );
    let env = [
        ("LIFEBOAT__SITE__NAME", "site-x"),
        ("LIFEBOAT__PEER__SITE_B__ADDRESS", "[::1]:7443"),
        ("LIFEBOAT__DEFAULTS__RETENTION__HOURLY", "7"),
        ("LIFEBOAT__DEFAULTS__REPLICATION__SHADOW", "false"),
        ("LIFEBOAT__METRICS__LISTEN", "off"),
        ("LIFEBOAT_CONFIG", "not one of them"),
    ];
    let Loaded { config, settings } = load_text(&text, &env).unwrap();
    assert_eq!(config.site.as_str(), "site-x");
    let (name, peer) = config.peers.iter().next().unwrap();
    assert_eq!(name.as_str(), "site-b");
    assert_eq!(peer.address.as_deref(), Some("[::1]:7443"));
    assert_eq!(peer.server_name.as_deref(), Some("::1"));
    assert_eq!(config.retention.hourly, 7);
    assert_eq!(config.metrics_listen, None);
    let guest = config.guests.values().next().unwrap();
    assert!(!guest.replication.shadow);

    let origin = |key: &str| {
        let found = settings.iter().find(|s| s.key == key);
        found.unwrap_or_else(|| panic!("no {key}")).origin.clone()
    };
    let env = |name: &str| Origin::Env(name.to_owned());
    assert_eq!(origin("site.name"), env("LIFEBOAT__SITE__NAME"));
    assert_eq!(
        origin("peer.site-b.address"),
        env("LIFEBOAT__PEER__SITE_B__ADDRESS")
    );
    assert_eq!(
        origin("guest.db1.replication.shadow"),
        env("LIFEBOAT__DEFAULTS__REPLICATION__SHADOW")
    );
    assert_eq!(origin("defaults.replication.rpo_target"), Origin::File(5));
    assert_eq!(origin("guest.db1.replication.rpo_target"), Origin::File(5));
    assert_eq!(origin("guest.db1.memory"), Origin::File(8));
    assert_eq!(origin("journal.min_free"), Origin::Default);
}

#[test]
fn a_wrong_variable_is_named() {
    for (name, value, key, text) in [
        ("LIFEBOAT__SITE__NMAE", "x", "site.nmae", "unknown field"),
        ("LIFEBOAT__SITE__NAME", "7", "site.name", "invalid type"),
        ("LIFEBOAT__SITE__NAME", "A B", "site.name", "not usable"),
        ("LIFEBOAT__GUEST__DB1__PEER", "x", "guest.db1.peer", "lists"),
        ("LIFEBOAT__", "x", "", "unknown field"),
    ] {
        let error = load_text(SMALL, &[(name, value)]).unwrap_err();
        let problem = &error.problems()[0];
        assert_eq!(problem.place, Some(Place::Env(name.to_owned())), "{error}");
        assert_eq!(problem.key, key, "{error}");
        assert!(problem.message.contains(text), "{error}");
    }
}

#[test]
fn all_problems_are_reported_at_once() {
    let text = r#"
[site]
name = "site-a"
[metrics]
listen = "nowhere"
[journal]
segment_size = "3"
[defaults.replication]
rpo_target = "soon"
[[guest]]
name = "a"
memory = "64MiB"
boot = { demo = {} }
[[guest]]
name = "b"
memory = "64MiB"
boot = { demo = {} }
"#;
    let error = load_text(text, &[]).unwrap_err();
    let keys: Vec<_> = error.problems().iter().map(|p| p.key.as_str()).collect();
    assert_eq!(
        keys,
        [
            "metrics.listen",
            "journal.segment_size",
            "defaults.replication.rpo_target"
        ]
    );
    let shown = error.to_string();
    assert!(
        shown.starts_with("3 problems in the configuration"),
        "{shown}"
    );
    assert!(
        shown.contains("\n  line 5, column 10: metrics.listen: "),
        "{shown}"
    );
}

#[test]
fn arguments_of_hooks_are_not_shown() {
    let text =
        format!("{SMALL}\n[fencing]\ncommand = [\"/sbin/off\", \"--password\", \"hunter2\"]\n");
    let Loaded { config, settings } = load_text(&text, &[]).unwrap();
    assert_eq!(config.fencing.unwrap().command[2], "hunter2");
    assert!(settings.iter().all(|s| !s.value.contains("hunter2")));
}

#[test]
fn what_is_no_text_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x.toml");
    let load = || load_with(&file, Files::Ignored, std::iter::empty()).unwrap_err();
    assert!(matches!(load(), ConfigError::Read { .. }));
    std::fs::write(&file, [0xff, 0xfe]).unwrap();
    assert!(matches!(load(), ConfigError::NoText { .. }));
    std::fs::write(&file, vec![b'#'; (1 << 20) + 1]).unwrap();
    assert!(matches!(load(), ConfigError::NoText { .. }));
}

#[test]
fn one_image_under_two_names_is_found() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.img"), [0; 4096]).unwrap();
    std::os::unix::fs::symlink("a.img", dir.path().join("b.img")).unwrap();
    let file = dir.path().join("site.toml");
    let text = |read_only| {
        let guest = |name: &str| {
            format!(
                "[[guest]]\nname = \"{name}\"\nmemory = \"64MiB\"\nboot = {{ demo = {{}} }}\n\
                 disks = [{{ id = \"root\", path = \"{name}.img\", read_only = {read_only} }}]\n"
            )
        };
        format!("[site]\nname = \"site-a\"\n{}{}", guest("a"), guest("b"))
    };
    std::fs::write(&file, text(false)).unwrap();
    let error = load_with(&file, Files::Required, std::iter::empty()).unwrap_err();
    assert_eq!(error.problems()[0].key, "guest.b.disks[0].path");
    std::fs::write(&file, text(true)).unwrap();
    load_with(&file, Files::Required, std::iter::empty()).unwrap();
    std::fs::write(dir.path().join("a.img"), [0; 100]).unwrap();
    std::fs::write(&file, text(false)).unwrap();
    let error = load_with(&file, Files::Required, std::iter::empty()).unwrap_err();
    assert!(error.to_string().contains("no multiple of 4096"), "{error}");
}

#[test]
fn what_waits_warm_is_for_guests_of_the_peer() {
    let peer = |lines: &str| {
        let text = format!(
            "[site]\nname = \"site-b\"\n[listen]\naddress = \"127.0.0.1:7443\"\n\
             [tls]\nca = \"/ca\"\ncert = \"/cert\"\nkey = \"/key\"\n\
             [peer.site-a]\nguests = [\"web\", \"db\"]\n{lines}\n"
        );
        load_text(&text, &[]).map(|loaded| loaded.config.peers.into_values().next().unwrap().warm)
    };
    assert_eq!(peer("").unwrap(), []);
    let warm = peer("warm = [\"web\"]").unwrap();
    assert_eq!(warm, ["web".parse().unwrap()]);
    for (bad, word) in [
        ("warm = [\"mail\"]", "not in `guests`"),
        ("warm = [\"\"]", "warm"),
    ] {
        let error = peer(bad).unwrap_err().to_string();
        assert!(error.contains(word), "{bad}: {error}");
    }
}

#[test]
fn what_becomes_of_a_peers_command_lines_is_understood() {
    let peer = |rewrite: &str| {
        let text = format!(
            "[site]\nname = \"site-b\"\n[listen]\naddress = \"127.0.0.1:7443\"\n\
             [tls]\nca = \"/ca\"\ncert = \"/cert\"\nkey = \"/key\"\n\
             [peer.site-a]\nguests = [\"web\"]\nqemu = true\nrewrite = [{rewrite}]\n"
        );
        load_text(&text, &[])
            .map(|loaded| loaded.config.peers.into_values().next().unwrap().rewrites)
    };
    let line = |guest: Option<&str>| Rewrite {
        from: "tap3".into(),
        to: "tap7".into(),
        guest: guest.map(|name| name.parse().unwrap()),
    };
    let found =
        peer(r#"{ from = "tap3", to = "tap7" }, { from = "tap3", to = "tap7", guest = "web" }"#);
    assert_eq!(found.unwrap(), [line(None), line(Some("web"))]);
    for (bad, word) in [
        (r#"{ from = "", to = "x" }"#, "empty"),
        (r#"{ to = "x" }"#, "missing"),
        (r#"{ from = "x" }"#, "missing"),
        (
            r#"{ from = "x", to = "", guest = "db" }"#,
            "none of the guests",
        ),
        (r#"{ from = "x", to = "", all = true }"#, "all"),
    ] {
        let error = peer(bad).unwrap_err().to_string();
        assert!(error.contains(word), "{bad}: {error}");
    }
}

#[test]
fn a_guest_of_qemu_is_understood() {
    let text = r#"
[site]
name = "site-a"
[[guest]]
name = "web"
kind = "qemu"
qemu = { qmp = "/run/q", watchdog = "/run/w", mode = "migrate" }
disks = [{ id = "root", node = "virtio0" }]
"#;
    let config = load_text(text, &[]).unwrap().config;
    let expected = MachineConfig::Qemu(QemuConfig {
        qmp: "/run/q".into(),
        watchdog: Some("/run/w".into()),
        mode: Mode::Migrate,
        disks: vec![("root".parse().unwrap(), "virtio0".into())],
    });
    assert_eq!(config.guests.values().next().unwrap().machine, expected);
}
