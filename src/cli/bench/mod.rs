//! `lifeboat bench`: how fast this machine is, and how near Lifeboat comes to it.
//!
//! ```text
//!   limits   what the hardware and the libraries below do: copying, hashing, TLS, the disk
//!   encode   the primary's encoder                 against a copy of the same scattered pages
//!   commit   the standby's journal, durable        against one raw write and flush of the same bytes
//!   stream   a link between two sites on loopback  against plain rustls in the same process layout
//!   pause    consistent cuts of a guest on KVM     against stop-and-copy of the same set
//!   guest    the guest's own speed while it is cut against its speed alone
//!   seed     the first copy of a guest, durable     against a copy of the same memory
//!   recovery the journal of a daemon that was killed, with its catalogue and without
//!   failover from the command to the resumed guest  against QEMU's -incoming, if that is asked for
//!   sites    two daemons with one guest and with many: what they cost, how well they keep up
//!   qemu     the stock QEMU of this machine with the same sets, if that is asked for
//! ```
//!
//! Everything that is measured is the product's own code behind its public types. A measurement and
//! its limit take turns, sample by sample, so that their ratio means something on a machine that does
//! other work besides; absolute figures on such a machine do not. What is pure computation in one thread
//! (copying, hashing) is measured in its processor time; encoding, at which several threads are, and
//! the copy beside it by the clock.
//!
//! Document `lifeboat.bench/v1`:
//!
//! ```text
//! quick    bool       few samples of small sets: shows that it works, not how fast
//! host     { cpus, kernel, load }                 load: average of the last minute, at the start
//! rows     [ { section, what, unit,               unit: "s", "B", "B/s", "pages/s", "steps/s"
//!              samples, p50, p90, p99,            p99: 99 % of the samples are at least that good
//!              limit  { what, unit, p50, ratio }  ratio: p50 as a share of the limit's speed; or null
//!              target { what, met } } ]           or null
//! skipped  [ { section, why } ]
//! ```

mod amplification;
mod commit;
mod encode;
mod failover;
mod limits;
mod link;
mod original;
mod pages;
mod pause;
mod qemu;
mod recovery;
mod sample;
mod seed;
mod sites;
mod steady;

use std::path::PathBuf;

use serde::Serialize;

use super::output::Output;
use super::text::{Paint, Toned, table};
use super::units;
use crate::control::codes::{ExitCode, Reason};
use crate::control::types::{ApiError, Document};

/// What can be measured alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Section {
    /// What the hardware and the libraries below can do.
    Limits,
    /// The primary's encoder.
    Encode,
    /// Durable commits into the standby's journal.
    Commit,
    /// The link between two sites.
    Stream,
    /// How long a guest stands still for a cut.
    Pause,
    /// How much slower a guest is while it is cut again and again.
    Guest,
    /// The first copy of a guest.
    Seed,
    /// From the command to the first sign of life of the resumed guest.
    Failover,
    /// Opening the journal of a daemon that was killed.
    Recovery,
    /// Two daemons with one guest and with many.
    Sites,
    /// The stock QEMU of this machine with the same dirty sets.
    Qemu,
}

/// What `lifeboat bench` was asked for.
#[derive(Debug, Clone, Default)]
pub struct BenchOptions {
    /// Small sets, few samples.
    pub quick: bool,
    /// Where the disk is measured; otherwise where temporary files go.
    pub dir: Option<PathBuf>,
    /// Only this; otherwise all.
    pub only: Option<Section>,
    /// Also what the stock QEMU of this machine does with the same sets.
    pub compare_qemu: bool,
}

/// What a figure counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
enum Unit {
    /// A time; less is better.
    #[serde(rename = "s")]
    Seconds,
    /// An amount of memory; less is better.
    #[serde(rename = "B")]
    Size,
    #[serde(rename = "B/s")]
    Bytes,
    #[serde(rename = "pages/s")]
    Pages,
    #[serde(rename = "steps/s")]
    Steps,
}

/// What a measurement is compared with.
#[derive(Debug, Clone, Serialize)]
struct Limit {
    what: String,
    unit: Unit,
    p50: f64,
    ratio: f64,
}

/// What was wanted of it.
#[derive(Debug, Clone, Serialize)]
struct Target {
    what: String,
    met: bool,
}

/// One measurement.
#[derive(Debug, Clone, Serialize)]
struct Row {
    section: Section,
    what: String,
    unit: Unit,
    samples: usize,
    p50: f64,
    p90: f64,
    p99: f64,
    limit: Option<Limit>,
    target: Option<Target>,
}

/// What this host cannot measure.
#[derive(Debug, Clone, Serialize)]
struct Skipped {
    section: Section,
    why: String,
}

#[derive(Debug, Clone, Serialize)]
struct Host {
    cpus: usize,
    kernel: String,
    load: f64,
}

/// `lifeboat bench`
#[derive(Debug, Serialize)]
struct Report {
    quick: bool,
    host: Host,
    rows: Vec<Row>,
    skipped: Vec<Skipped>,
}

impl Document for Report {
    const SCHEMA: &'static str = "lifeboat.bench/v1";
}

/// Schemas of the documents made here.
pub const SCHEMAS: &[&str] = &[Report::SCHEMA];

/// What the sections share.
struct Bench {
    quick: bool,
    compare_qemu: bool,
    /// For the disk tests; removed at the end.
    dir: tempfile::TempDir,
    rows: Vec<Row>,
    skipped: Vec<Skipped>,
}

impl Bench {
    /// `full`, or far fewer in a quick run.
    fn samples(&self, full: usize) -> usize {
        if self.quick { 3 } else { full }
    }

    fn push(&mut self, row: Row) {
        self.rows.push(row);
    }

    fn skip(&mut self, section: Section, why: impl Into<String>) {
        let why = why.into();
        self.skipped.push(Skipped { section, why });
    }

    /// Why so much memory cannot be had, if so; some is left for others.
    fn no_room(&self, mib: u64) -> Option<String> {
        let needed = mib + mib / 4;
        let free = available_mib()?;
        (free < needed).then(|| format!("it needs {needed} MiB of memory, {free} are free"))
    }
}

type Measure = fn(&mut Bench) -> anyhow::Result<()>;

const SECTIONS: [(Section, Measure); 11] = [
    (Section::Limits, limits::measure),
    (Section::Encode, encode::measure),
    (Section::Commit, commit::measure),
    (Section::Stream, link::measure),
    (Section::Pause, pause::measure),
    (Section::Guest, steady::measure),
    (Section::Seed, seed::measure),
    (Section::Recovery, recovery::measure),
    (Section::Failover, failover::measure),
    (Section::Sites, sites::measure),
    (Section::Qemu, qemu::measure),
];

/// Runs work that has processes of its own, and ends these with it at a SIGINT too.
fn interruptible(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Runtime::new()?.block_on(async {
        tokio::select! {
            done = work => done,
            _ = tokio::signal::ctrl_c() => anyhow::bail!("interrupted"),
        }
    })
}

/// Measures and prints. The error was not printed yet.
pub fn run(options: &BenchOptions, out: &mut Output<'_>) -> Result<ExitCode, ApiError> {
    let place = options.dir.clone().unwrap_or_else(std::env::temp_dir);
    let dir = tempfile::Builder::new()
        .prefix("lifeboat-bench-")
        .tempdir_in(&place)
        .map_err(|error| {
            let text = format!("no directory can be made in {}: {error}", place.display());
            ApiError::new(Reason::Failed, text).hint("name another place with --dir")
        })?;
    let host = host();
    let mut bench = Bench {
        quick: options.quick,
        compare_qemu: options.compare_qemu || options.only == Some(Section::Qemu),
        dir,
        rows: Vec::new(),
        skipped: Vec::new(),
    };
    for (section, measure) in SECTIONS {
        if options.only.is_some_and(|only| only != section) {
            continue;
        }
        if section == Section::Qemu && !bench.compare_qemu {
            continue;
        }
        out.note(&format!("measuring {} ...", name(section)));
        measure(&mut bench).map_err(|error| {
            let text = format!("measuring {} failed: {error:#}", name(section));
            ApiError::new(Reason::Failed, text)
        })?;
    }
    let report = Report {
        quick: options.quick,
        host,
        rows: bench.rows,
        skipped: bench.skipped,
    };
    let paint = Paint(out.style.color);
    out.result(report, |report| text(report, paint));
    Ok(ExitCode::Ok)
}

fn host() -> Host {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let load = read("/proc/loadavg");
    Host {
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        load: load
            .split(' ')
            .next()
            .and_then(|first| first.parse().ok())
            .unwrap_or_default(),
    }
}

/// Memory that this machine can give, without hurting others; `None` if it does not say.
fn available_mib() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find(|line| line.starts_with("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib >> 10)
}

fn name(section: Section) -> &'static str {
    match section {
        Section::Limits => "limits",
        Section::Encode => "encode",
        Section::Commit => "commit",
        Section::Stream => "stream",
        Section::Pause => "pause",
        Section::Guest => "guest",
        Section::Seed => "seed",
        Section::Failover => "failover",
        Section::Recovery => "recovery",
        Section::Sites => "sites",
        Section::Qemu => "qemu",
    }
}

fn value(value: f64, unit: Unit) -> String {
    let thousands = |value: f64, unit: &str| match value {
        1e6.. => format!("{:.2} M{unit}", value / 1e6),
        1e3.. => format!("{:.0} k{unit}", value / 1e3),
        _ => format!("{value:.0} {unit}"),
    };
    match unit {
        Unit::Seconds => units::seconds(value),
        Unit::Size => format!("{:.0} MiB", value / f64::from(1 << 20)),
        Unit::Bytes => format!("{:.2} GB/s", value / 1e9),
        Unit::Pages => thousands(value, "pages/s"),
        Unit::Steps => thousands(value, "steps/s"),
    }
}

fn text(report: &Report, paint: Paint) -> String {
    let header = [
        "WHAT", "p50", "p90", "p99", "LIMIT", "p50", "RATIO", "TARGET", "",
    ];
    let rows = report.rows.iter().map(|row| {
        let plain = |text: String| paint.plain(text);
        let limit = |show: &dyn Fn(&Limit) -> String| -> Toned {
            plain(row.limit.as_ref().map(show).unwrap_or_default())
        };
        let met = match &row.target {
            None => paint.plain(""),
            Some(target) if target.met => paint.good("met"),
            Some(_) => paint.bad("NOT MET"),
        };
        vec![
            plain(format!("{}: {}", name(row.section), row.what)),
            plain(value(row.p50, row.unit)),
            plain(value(row.p90, row.unit)),
            plain(value(row.p99, row.unit)),
            limit(&|limit| limit.what.clone()),
            limit(&|limit| value(limit.p50, limit.unit)),
            limit(&|limit| format!("{:.2}", limit.ratio)),
            plain(
                row.target
                    .as_ref()
                    .map_or(String::new(), |t| t.what.clone()),
            ),
            met,
        ]
    });
    let mut text = table(&header, &[1, 2, 3, 5, 6], rows, paint);
    for skipped in &report.skipped {
        text += &format!("skipped: {}: {}\n", name(skipped.section), skipped.why);
    }
    let host = &report.host;
    text += &format!(
        "{} processors, Linux {}, load {:.1} at the start{}\n",
        host.cpus,
        host.kernel,
        host.load,
        if report.quick {
            "; quick: not a measurement"
        } else {
            ""
        }
    );
    text
}
