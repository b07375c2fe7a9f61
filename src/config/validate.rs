//! What the keys mean: defaults, limits, and what does not fit together.
//!
//! All problems are collected, so that one look at the answer is enough to mend the file.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use toml::Spanned;

use super::check::{Check, Found};
use super::resolved::*;
use super::schema;
use super::units;
use super::validate_guest as guests;
use crate::guest::qemu::command::Rewrite;
use crate::ids::{GuestId, SiteId};

/// Longest path of a unix socket in Linux, without its final zero.
pub(super) const SOCKET_PATH_BYTES_MAX: usize = 107;
/// A segment holds at least one part of a frame (16 MiB) and its own header.
const SEGMENT_BYTES: std::ops::RangeInclusive<u64> = 32 << 20..=1 << 30;

pub(super) fn parse_as<T: FromStr>(text: &str) -> Result<T, String>
where
    T::Err: std::fmt::Display,
{
    text.parse().map_err(|error: T::Err| error.to_string())
}

pub(super) fn one_of<T: Copy>(text: &str, words: &[(&str, T)]) -> Result<T, String> {
    let found = words.iter().find(|(word, _)| *word == text);
    found.map(|(_, value)| *value).ok_or_else(|| {
        let known: Vec<_> = words.iter().map(|(w, _)| format!("\"{w}\"")).collect();
        format!("{text:?} is not one of {}", known.join(", "))
    })
}

fn socket_address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        format!("{text:?} is no address: write IP:PORT such as \"127.0.0.1:7480\", \"[::]:7443\"")
    })
}

/// `HOST:PORT`; the host is resolved at each attempt to connect.
fn host_port(text: &str) -> Result<String, String> {
    let refuse =
        || format!("{text:?} is no address: write HOST:PORT such as \"standby.example:7443\"");
    let (host, port) = text.rsplit_once(':').ok_or_else(refuse)?;
    let port: u16 = port.parse().map_err(|_| refuse())?;
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    // A colon in a host without brackets is an IPv6 address whose port is a guess.
    let brackets_fit = host.starts_with('[') == host.contains(':');
    let valid = bare
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b':' | b'_' | b'%'));
    if port == 0 || bare.is_empty() || !brackets_fit || !valid {
        return Err(refuse());
    }
    Ok(text.to_owned())
}

fn host_of(address: &str) -> String {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    host.trim_start_matches('[')
        .trim_end_matches(']')
        .to_owned()
}

fn min_free(text: &str) -> Result<MinFree, String> {
    let Some(percent) = text.strip_suffix('%') else {
        return units::size(text).map(MinFree::Bytes);
    };
    match percent.trim().parse() {
        Ok(percent @ 0..=50) => Ok(MinFree::Percent(percent)),
        _ => Err(format!(
            "{text:?} is no share from \"0%\" to \"50%\" nor a size such as \"10GiB\""
        )),
    }
}

/// The whole configuration; what is wrong is in `check.problems` afterwards.
pub(super) fn site(raw: schema::File, file: PathBuf, check: &mut Check<'_>) -> Option<SiteConfig> {
    let name = check.required(
        "site.name",
        raw.site.name,
        "the name of this site, as in its certificate",
        parse_as::<SiteId>,
    );
    let state_dir = directory(
        check,
        "site.state_dir",
        raw.site.state_dir,
        "/var/lib/lifeboat",
    );
    let admin_socket = admin_socket(check, raw.admin);
    let metrics_listen = check.parsed(
        "metrics.listen",
        raw.metrics.listen,
        "127.0.0.1:7480",
        |text| match text {
            "off" => Ok(None),
            text => socket_address(text).map(Some),
        },
    );
    let log = log(check, raw.log);
    let listen = check.optional("listen.address", raw.listen.address, socket_address);
    same_port(check, &listen, &metrics_listen);
    let tls = raw.tls.and_then(|raw| tls(check, raw));
    let peers = peers(check, raw.peer, name.as_ref(), listen.is_some());
    if tls.is_none() && check.problems.is_empty() && (!peers.is_empty() || listen.is_some()) {
        check.problem(
            "tls",
            None,
            "is missing: a site with a peer or a listener needs [tls] with ca, cert and key; \
             \"lifeboat pki\" makes them",
        );
    }
    let journal = journal(check, raw.journal, &state_dir.value);
    let retention = retention(check, raw.defaults.retention);
    let defaults = raw.defaults.replication;
    let replication = guests::replication(check, "defaults.replication", defaults.clone());
    let fencing = raw.fencing.and_then(|raw| fencing(check, raw));
    let events = super::events::validate(check, raw.events);
    let guests = guests::all(check, raw.guest, &peers, &defaults);
    let groups = super::group::all(check, raw.group, &guests);
    let rollback_window = check.parsed(
        "failover.rollback_window",
        raw.failover.rollback_window,
        "24h",
        units::duration,
    );
    let drill = super::validate_drill::drill(check, raw.drill, &peers, &guests);
    Some(SiteConfig {
        file,
        site: name?.value,
        state_dir: state_dir.value,
        admin_socket,
        metrics_listen: metrics_listen.value,
        log,
        listen: listen.map(|found| found.value),
        tls,
        peers,
        journal,
        retention,
        replication,
        fencing,
        events,
        drill,
        rollback_window: rollback_window.value,
        guests,
        groups,
    })
}

fn directory(
    check: &mut Check<'_>,
    key: &str,
    raw: schema::Maybe<String>,
    default: &str,
) -> Found<PathBuf> {
    let found = check.parsed(key, raw, default, |text| Ok(text.to_owned()));
    let path = check.path(&found.value).unwrap_or_else(|message| {
        check.problem(key, found.place.clone(), message);
        PathBuf::from(default)
    });
    Found {
        value: path,
        place: found.place,
    }
}

fn admin_socket(check: &mut Check<'_>, raw: schema::Admin) -> PathBuf {
    let key = "admin.socket";
    let socket = directory(check, key, raw.socket, super::DEFAULT_SOCKET);
    let bytes = socket.value.as_os_str().len();
    if bytes > SOCKET_PATH_BYTES_MAX {
        let message = format!(
            "the path of a unix socket has at most {SOCKET_PATH_BYTES_MAX} bytes, this one has \
             {bytes}: use a shorter directory"
        );
        check.problem(key, socket.place, message);
    }
    socket.value
}

fn log(check: &mut Check<'_>, raw: schema::Log) -> LogConfig {
    let level = check.parsed("log.level", raw.level, "info", |text| {
        tracing_subscriber::EnvFilter::try_new(text)
            .map(|_| text.to_owned())
            .map_err(|error| {
                format!("{text:?}: {error}; write \"info\" or \"info,lifeboat::transport=debug\"")
            })
    });
    let format = check.parsed("log.format", raw.format, "auto", |text| {
        one_of(
            text,
            &[
                ("auto", LogFormat::Auto),
                ("text", LogFormat::Text),
                ("json", LogFormat::Json),
            ],
        )
    });
    LogConfig {
        level: level.value,
        format: format.value,
    }
}

fn same_port(
    check: &mut Check<'_>,
    listen: &Option<Found<SocketAddr>>,
    metrics: &Found<Option<SocketAddr>>,
) {
    let (Some(listen), Some(address)) = (listen, metrics.value) else {
        return;
    };
    if listen.value.port() == address.port() && address.port() != 0 {
        let message = format!(
            "port {} is taken by metrics.listen: use another",
            address.port()
        );
        check.problem("listen.address", listen.place.clone(), message);
    }
}

fn tls(check: &mut Check<'_>, raw: Spanned<schema::Tls>) -> Option<TlsConfig> {
    let raw = raw.into_inner();
    let ca = check.file("tls.ca", raw.ca, "the CA certificate of both sites");
    let cert = check.file("tls.cert", raw.cert, "the certificate of this site");
    let key = check.file("tls.key", raw.key, "the private key of this site");
    let crl = check.optional_file("tls.crl", raw.crl);
    Some(TlsConfig {
        ca: ca?.value,
        cert: cert?.value,
        key: key?.value,
        crl,
    })
}

fn peers(
    check: &mut Check<'_>,
    raw: BTreeMap<Spanned<String>, schema::Peer>,
    me: Option<&Found<SiteId>>,
    listens: bool,
) -> BTreeMap<SiteId, PeerConfig> {
    let mut peers = BTreeMap::new();
    for (name, raw) in raw {
        let place = check.place(&name);
        let prefix = format!("peer.{}", name.get_ref());
        let name: SiteId = match parse_as(name.get_ref()) {
            Ok(name) => name,
            Err(message) => {
                check.problem(&prefix, Some(place), message);
                continue;
            }
        };
        if me.is_some_and(|me| me.value == name) {
            check.problem(&prefix, Some(place), "is this site itself (site.name)");
            continue;
        }
        let config = peer(check, &prefix, raw, listens);
        if config.address.is_none() && config.guests.is_empty() {
            check.problem(
                &prefix,
                Some(place),
                "has neither an address to replicate to nor guests that it may write here",
            );
        }
        peers.insert(name, config);
    }
    peers
}

fn peer(check: &mut Check<'_>, prefix: &str, raw: schema::Peer, listens: bool) -> PeerConfig {
    let address = check.optional(&format!("{prefix}.address"), raw.address, host_port);
    let address = address.map(|found| found.value);
    let server_name_key = format!("{prefix}.server_name");
    let server_name = check.optional(&server_name_key, raw.server_name, |text| match text {
        "" => Err("is empty: write the DNS name in the peer's certificate".to_owned()),
        text => Ok(text.to_owned()),
    });
    let server_name = server_name.map(|found| found.value).or_else(|| {
        let host = address.as_deref().map(host_of)?;
        check.setting(&server_name_key, &host, None);
        Some(host)
    });
    let guests_key = format!("{prefix}.guests");
    let place = raw.guests.first().map(|first| check.place(first));
    let names: Vec<_> = raw.guests.iter().map(|name| name.get_ref()).collect();
    check.setting(&guests_key, format!("{names:?}"), place.as_ref());
    let mut guests: Vec<GuestId> = Vec::new();
    for name in &raw.guests {
        match parse_as(name.get_ref()) {
            Ok(guest) if guests.contains(&guest) => {
                let place = check.place(name);
                check.problem(
                    &guests_key,
                    Some(place),
                    format!("\"{guest}\" is named twice"),
                );
            }
            Ok(guest) => guests.push(guest),
            Err(message) => {
                let place = check.place(name);
                check.problem(&guests_key, Some(place), message);
            }
        }
    }
    if !guests.is_empty() && !listens {
        check.problem(
            &guests_key,
            place,
            "lets the peer write here, but nothing listens: set listen.address",
        );
    }
    let qemu = check.plain(&format!("{prefix}.qemu"), raw.qemu, false);
    let rewrites = rewrites(check, prefix, raw.rewrite, &guests);
    let warm = warm(check, prefix, raw.warm, &guests);
    let keepalive = check.parsed(
        &format!("{prefix}.keepalive"),
        raw.keepalive,
        "2s",
        positive_duration,
    );
    let dead_after_key = format!("{prefix}.dead_after");
    let dead_after = check.parsed(&dead_after_key, raw.dead_after, "10s", positive_duration);
    if dead_after.value < keepalive.value * 2 {
        check.problem(
            &dead_after_key,
            dead_after.place.or(keepalive.place),
            "is less than twice keepalive: one late answer would cut a good link",
        );
    }
    let streams = check.plain(&format!("{prefix}.streams"), raw.streams, 1);
    if !(1..=STREAMS_MAX).contains(&streams.value) {
        let message = format!("{} is not from 1 to 8", streams.value);
        check.problem(&format!("{prefix}.streams"), streams.place, message);
    }
    let (zone, windows) = (raw.time_zone, raw.window);
    let bandwidth = super::bandwidth::validate(check, prefix, raw.bandwidth, zone, windows);
    PeerConfig {
        address,
        server_name,
        guests,
        qemu: qemu.value,
        rewrites,
        warm,
        keepalive: keepalive.value,
        dead_after: dead_after.value,
        streams: streams.value as usize,
        bandwidth,
    }
}

/// Guests for which something waits here.
fn warm(
    check: &mut Check<'_>,
    prefix: &str,
    raw: Vec<Spanned<String>>,
    guests: &[GuestId],
) -> Vec<GuestId> {
    let key = format!("{prefix}.warm");
    let place = raw.first().map(|first| check.place(first));
    let names: Vec<_> = raw.iter().map(|name| name.get_ref()).collect();
    check.setting(&key, format!("{names:?}"), place.as_ref());
    let mut warm = Vec::new();
    for name in raw {
        match parse_as::<GuestId>(name.get_ref()) {
            Ok(guest) if guests.contains(&guest) => warm.push(guest),
            Ok(guest) => {
                let place = check.place(&name);
                let message = format!("\"{guest}\" is not in `guests` of this peer");
                check.problem(&key, Some(place), message);
            }
            Err(message) => {
                let place = check.place(&name);
                check.problem(&key, Some(place), message);
            }
        }
    }
    warm
}

/// What becomes of the peer's QEMU command lines here.
fn rewrites(
    check: &mut Check<'_>,
    prefix: &str,
    raw: Vec<Spanned<schema::Rewrite>>,
    guests: &[GuestId],
) -> Vec<Rewrite> {
    let mut rewrites = Vec::new();
    for (index, raw) in raw.into_iter().enumerate() {
        let raw = raw.into_inner();
        let key = format!("{prefix}.rewrite[{index}]");
        let from = check.required(
            &format!("{key}.from"),
            raw.from,
            "a text in the peer's command lines",
            |text| match text {
                "" => Err("is empty: write what is to be replaced".to_owned()),
                text => Ok(text.to_owned()),
            },
        );
        let to = check.required(
            &format!("{key}.to"),
            raw.to,
            "what takes its place here",
            |text| Ok(text.to_owned()),
        );
        let guest = check.optional(&format!("{key}.guest"), raw.guest, |text| {
            let guest = parse_as::<GuestId>(text)?;
            match guests.contains(&guest) {
                true => Ok(guest),
                false => Err(format!("\"{guest}\" is none of the guests of {prefix}")),
            }
        });
        if let (Some(from), Some(to)) = (from, to) {
            rewrites.push(Rewrite {
                from: from.value,
                to: to.value,
                guest: guest.map(|found| found.value),
            });
        }
    }
    rewrites
}

pub(super) fn positive_duration(text: &str) -> Result<Duration, String> {
    match units::duration(text)? {
        Duration::ZERO => Err("must be more than 0".to_owned()),
        some if some > Duration::from_secs(366 * 86_400) => {
            Err(format!("{text:?} is more than a year"))
        }
        some => Ok(some),
    }
}

fn journal(
    check: &mut Check<'_>,
    raw: schema::Journal,
    state_dir: &std::path::Path,
) -> JournalConfig {
    let default = state_dir.join("journal").display().to_string();
    let path = directory(check, "journal.path", raw.path, &default);
    let segment =
        check.parsed(
            "journal.segment_size",
            raw.segment_size,
            "64MiB",
            |text| match units::size(text)? {
                size if SEGMENT_BYTES.contains(&size) && size % (1 << 20) == 0 => Ok(size),
                _ => Err(format!(
                    "{text:?} is not a whole number of MiB from 32MiB to 1GiB"
                )),
            },
        );
    let free = check.parsed("journal.min_free", raw.min_free, "5%", min_free);
    JournalConfig {
        path: path.value,
        segment_bytes: segment.value,
        min_free: free.value,
    }
}

fn retention(check: &mut Check<'_>, raw: schema::Retention) -> RetentionConfig {
    let prefix = "defaults.retention";
    let continuous = check.parsed(
        &format!("{prefix}.continuous"),
        raw.continuous,
        "15m",
        units::duration,
    );
    let mut number = |key: &str, raw, default| {
        let found = check.plain(&format!("{prefix}.{key}"), raw, default);
        (found.value, found.place)
    };
    let (minutely, _) = number("minutely", raw.minutely, 60);
    let (hourly, _) = number("hourly", raw.hourly, 24);
    let (daily, _) = number("daily", raw.daily, 14);
    let (min_points, place) = number("min_points", raw.min_points, 3);
    if min_points == 0 {
        check.problem(
            &format!("{prefix}.min_points"),
            place,
            "must be at least 1: the newest point is never dropped",
        );
    }
    RetentionConfig {
        continuous: continuous.value,
        minutely,
        hourly,
        daily,
        min_points: min_points.max(1),
    }
}

fn fencing(check: &mut Check<'_>, raw: Spanned<schema::Fencing>) -> Option<FencingConfig> {
    let raw = raw.into_inner();
    let timeout = check.parsed("fencing.timeout", raw.timeout, "30s", positive_duration);
    let key = "fencing.command";
    let Some(command) = raw.command else {
        check.problem(key, None, "is missing: a list of program and arguments");
        return None;
    };
    let command = check.command(key, command)?;
    Some(FencingConfig {
        command,
        timeout: timeout.value,
    })
}
