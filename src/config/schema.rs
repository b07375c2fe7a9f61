//! The file's keys as they are written: everything optional, everything with its place in the
//! text. Meaning, defaults and limits are in `validate`.

use std::collections::BTreeMap;

use serde::Deserialize;
use toml::Spanned;

/// A value that may be there, with its place.
pub(super) type Maybe<T> = Option<Spanned<T>>;

macro_rules! table {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Default, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub(super) struct $name { $(pub(super) $field: $type,)* }
    };
}

table!(
    /// The whole file.
    File {
        site: Site,
        admin: Admin,
        metrics: Metrics,
        log: Log,
        listen: Listen,
        tls: Option<Spanned<Tls>>,
        peer: BTreeMap<Spanned<String>, Peer>,
        defaults: Defaults,
        journal: Journal,
        fencing: Option<Spanned<Fencing>>,
        failover: Failover,
        drill: Drill,
        events: Events,
        guest: Vec<Spanned<Guest>>,
        group: Vec<Spanned<Group>>,
    }
);
table!(
    /// `[site]`
    Site {
        name: Maybe<String>,
        state_dir: Maybe<String>,
    }
);
table!(
    /// `[admin]`
    Admin {
        socket: Maybe<String>,
    }
);
table!(
    /// `[metrics]`
    Metrics {
        listen: Maybe<String>,
    }
);
table!(
    /// `[log]`
    Log {
        level: Maybe<String>,
        format: Maybe<String>,
    }
);
table!(
    /// `[listen]`
    Listen {
        address: Maybe<String>,
    }
);
table!(
    /// `[tls]`
    Tls {
        ca: Maybe<String>,
        cert: Maybe<String>,
        key: Maybe<String>,
        crl: Maybe<String>,
    }
);
table!(
    /// `[peer.NAME]`
    Peer {
        address: Maybe<String>,
        server_name: Maybe<String>,
        guests: Vec<Spanned<String>>,
        qemu: Maybe<bool>,
        rewrite: Vec<Spanned<Rewrite>>,
        warm: Vec<Spanned<String>>,
        keepalive: Maybe<String>,
        dead_after: Maybe<String>,
        streams: Maybe<u32>,
        bandwidth: Maybe<String>,
        time_zone: Maybe<String>,
        window: Vec<Spanned<Window>>,
    }
);
table!(
    /// One of `window` of a peer
    Window {
        days: Vec<Spanned<String>>,
        from: Maybe<String>,
        to: Maybe<String>,
        bandwidth: Maybe<String>,
    }
);
table!(
    /// A line of `rewrite` of a peer
    Rewrite {
        from: Maybe<String>,
        to: Maybe<String>,
        guest: Maybe<String>,
    }
);
table!(
    /// `[defaults]`
    Defaults {
        replication: Replication,
        retention: Retention,
    }
);
table!(
    /// `[defaults.replication]`, and `replication` of a guest
    Replication {
        rpo_target: Maybe<String>,
        checkpoint: Checkpoint,
        max_backlog: Maybe<String>,
        compression: Maybe<String>,
        strategy: Maybe<String>,
        shadow: Maybe<bool>,
        pause_budget: Maybe<String>,
        slow_guest: Maybe<String>,
    }
);
table!(
    /// `checkpoint` of a replication
    Checkpoint {
        min: Maybe<String>,
        max: Maybe<String>,
    }
);
table!(
    /// `[defaults.retention]`
    Retention {
        continuous: Maybe<String>,
        minutely: Maybe<u32>,
        hourly: Maybe<u32>,
        daily: Maybe<u32>,
        min_points: Maybe<u32>,
    }
);
table!(
    /// `[journal]`
    Journal {
        path: Maybe<String>,
        segment_size: Maybe<String>,
        min_free: Maybe<String>,
    }
);
table!(
    /// `[fencing]`
    Fencing {
        command: Option<Spanned<Vec<String>>>,
        timeout: Maybe<String>,
    }
);
table!(
    /// `[failover]`
    Failover {
        rollback_window: Maybe<String>,
    }
);
table!(
    /// `[drill]`
    Drill {
        every: Maybe<String>,
        probe_timeout: Maybe<String>,
        guests: BTreeMap<Spanned<String>, Spanned<String>>,
    }
);
table!(
    /// `[events]`
    Events {
        command: Option<Spanned<Vec<String>>>,
        timeout: Maybe<String>,
        only: Vec<Spanned<String>>,
    }
);
table!(
    /// `[[guest]]`
    Guest {
        name: Maybe<String>,
        peer: Maybe<String>,
        memory: Maybe<String>,
        kind: Maybe<String>,
        vcpus: Maybe<u32>,
        boot: Option<Spanned<Boot>>,
        qemu: Option<Spanned<Qemu>>,
        disks: Vec<Spanned<Disk>>,
        autostart: Maybe<bool>,
        replication: Replication,
        quiesce: Option<Spanned<Quiesce>>,
    }
);
table!(
    /// `[[group]]`
    Group {
        name: Maybe<String>,
        guests: Vec<Spanned<String>>,
        every: Maybe<String>,
        pause_max: Maybe<String>,
    }
);
table!(
    /// `quiesce` of a guest
    Quiesce {
        before: Option<Spanned<Vec<String>>>,
        after: Option<Spanned<Vec<String>>>,
        fsfreeze: Maybe<bool>,
        timeout: Maybe<String>,
        every: Maybe<String>,
    }
);
table!(
    /// `qemu` of a guest
    Qemu {
        qmp: Maybe<String>,
        watchdog: Maybe<String>,
        mode: Maybe<String>,
    }
);
table!(
    /// `boot` of a guest
    Boot {
        demo: Option<Spanned<Demo>>,
        kernel: Maybe<String>,
        initrd: Maybe<String>,
        cmdline: Maybe<String>,
    }
);
table!(
    /// `demo` of a boot
    Demo {
        working_set: Maybe<String>,
    }
);
table!(
    /// One of `disks` of a guest
    Disk {
        id: Maybe<String>,
        path: Maybe<String>,
        node: Maybe<String>,
        read_only: Maybe<bool>,
    }
);

impl Replication {
    /// These values, and those of `below` where there are none.
    pub(super) fn over(self, below: &Self) -> Self {
        fn or<T: Clone>(own: Maybe<T>, below: &Maybe<T>) -> Maybe<T> {
            own.or_else(|| below.clone())
        }
        Self {
            rpo_target: or(self.rpo_target, &below.rpo_target),
            checkpoint: Checkpoint {
                min: or(self.checkpoint.min, &below.checkpoint.min),
                max: or(self.checkpoint.max, &below.checkpoint.max),
            },
            max_backlog: or(self.max_backlog, &below.max_backlog),
            compression: or(self.compression, &below.compression),
            strategy: or(self.strategy, &below.strategy),
            shadow: or(self.shadow, &below.shadow),
            pause_budget: or(self.pause_budget, &below.pause_budget),
            slow_guest: or(self.slow_guest, &below.slow_guest),
        }
    }
}
