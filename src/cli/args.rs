//! The command line as it is typed.

use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

use clap::builder::styling::{AnsiColor, Styles};
use clap::{Args, Parser, Subcommand};

use super::{bandwidth, bench};
use crate::config::units;
use crate::control::codes::EXIT_CODES;
use crate::control::drills::Probe;
use crate::ids::{DiskId, GroupId, GuestId, PlanName, SiteId};
use crate::plan::steps::Mode;

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().bold())
    .usage(AnsiColor::Green.on_default().bold())
    .literal(AnsiColor::Cyan.on_default().bold())
    .placeholder(AnsiColor::Cyan.on_default());

/// The table of exit codes, as `--help` prints it.
pub static EXIT_CODES_HELP: LazyLock<String> = LazyLock::new(|| {
    let rows = EXIT_CODES
        .iter()
        .map(|(code, meaning)| format!("  {:<5}{meaning}\n", *code as u8));
    format!(
        "Exit codes (an unknown one is a failure; new ones may come):\n{}",
        rows.collect::<String>()
    )
});

/// Disaster recovery for KVM guests: memory, CPU, devices and disks of a running guest, replicated
/// to another site and resumed there.
#[derive(Debug, Parser)]
#[command(name = "lifeboat", version, styles = STYLES, after_help = EXIT_CODES_HELP.as_str())]
#[command(
    propagate_version = true,
    max_term_width = 100,
    subcommand_required = true
)]
#[command(arg_required_else_help = true)]
pub struct Cli {
    /// Options of all verbs.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// Options of all verbs.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Configuration file of the site.
    #[arg(
        short,
        long,
        global = true,
        value_name = "FILE",
        env = "LIFEBOAT_CONFIG"
    )]
    pub config: Option<PathBuf>,
    /// Unix socket of the daemon (otherwise that of the configuration, or the usual one).
    #[arg(long, global = true, value_name = "PATH", env = "LIFEBOAT_SOCKET")]
    pub socket: Option<PathBuf>,
    /// Print JSON on stdout, one documented schema per verb.
    #[arg(long, global = true)]
    pub json: bool,
    /// Say only what was asked for; no progress, no notes.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Log more on stderr; twice: even more.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// No colours (also with NO_COLOR set, or without a terminal).
    #[arg(long, global = true)]
    pub no_color: bool,
    /// Wait for a long verb at most so long, then exit 8; it goes on in the daemon.
    #[arg(long, global = true, value_name = "DURATION", value_parser = units::duration)]
    pub timeout: Option<Duration>,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Run the daemon of this site, in the foreground (needs --config).
    Site,
    /// Show a disaster on this machine: two sites, a guest, a kill, a failover. Under a minute.
    Demo {
        /// Keep everything in this directory, which must be empty or new.
        #[arg(long, value_name = "DIR")]
        keep: Option<PathBuf>,
        /// Simulate the guest: the same engine, without /dev/kvm.
        #[arg(long)]
        no_kvm: bool,
        /// Linux in a stock QEMU, with KVM if Linux boots so here. Takes longer.
        #[arg(long, conflicts_with = "no_kvm")]
        qemu: bool,
        /// Kernel for QEMU's guest (otherwise Debian's linux-image-cloud-amd64, by apt-get download).
        #[arg(long, value_name = "FILE", requires = "qemu")]
        kernel: Option<PathBuf>,
        /// Static busybox for QEMU's guest (otherwise Debian's busybox-static, by apt-get download).
        #[arg(long, value_name = "FILE", requires = "qemu")]
        busybox: Option<PathBuf>,
        /// Do not try KVM with QEMU.
        #[arg(long, requires = "qemu")]
        tcg: bool,
    },
    /// Measure this machine: limits, encoder, commits, link, pauses; each with its ratio to the limit.
    Bench {
        /// Small sets and few samples, in seconds: does it work, not how fast.
        #[arg(long)]
        quick: bool,
        /// Where the disk is measured (otherwise where temporary files go).
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
        /// Only this.
        #[arg(long, value_name = "NAME")]
        only: Option<bench::Section>,
        /// Also run the same dirty sets through the stock QEMU of this machine. Takes minutes longer.
        #[arg(long)]
        compare_qemu: bool,
    },
    /// Run one guest's monitor; started by the daemon.
    #[command(hide = true)]
    Vmm {
        /// The guest.
        #[arg(long)]
        guest: GuestId,
        /// Where its sockets are.
        #[arg(long, value_name = "DIR")]
        run_dir: PathBuf,
    },
    /// Make a QEMU guest run again when the daemon leaves it alone; started by the daemon.
    #[command(hide = true)]
    QemuWatchdog {
        /// A monitor of the guest.
        #[arg(long, value_name = "SOCKET")]
        monitor: PathBuf,
        /// The monitor is for the watchdog alone.
        #[arg(long)]
        own: bool,
        /// How long a checkpoint may stand still, in milliseconds.
        #[arg(long, value_name = "N")]
        bound_ms: u64,
    },
    /// Quiesce a guest's applications until told or left alone; started by the daemon.
    #[command(hide = true)]
    QuiesceGuard,
    /// Show the site, its peers and its guests.
    Status {
        /// Only this guest.
        name: Option<GuestId>,
        /// Go on showing: redraw on a terminal, one line per change otherwise.
        #[arg(short, long)]
        watch: bool,
        /// How often to look.
        #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = units::duration)]
        interval: Duration,
    },
    /// Show the site live on a terminal, with rates and the exposure over time; q ends it.
    Top {
        /// How often to look.
        #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = units::duration)]
        interval: Duration,
    },
    /// Judge the site in one line, as a monitoring plugin: exits 0 ok, 1 warning, 2 critical, 3 unknown.
    Check {
        /// Only this guest, and what it depends on.
        name: Option<GuestId>,
    },
    /// Start, stop and look at guests.
    #[command(subcommand)]
    Guest(GuestVerb),
    /// Begin to replicate a guest; waits for its first recovery point.
    Protect {
        /// The guest.
        name: GuestId,
        /// Where to (otherwise as configured).
        #[arg(long, value_name = "SITE")]
        peer: Option<SiteId>,
        /// Work that may be lost at most (otherwise as configured).
        #[arg(long, value_name = "DURATION", value_parser = units::duration)]
        rpo: Option<Duration>,
        /// Print the run and do not wait for it.
        #[arg(long)]
        no_wait: bool,
    },
    /// End the replication of a guest.
    Unprotect {
        /// The guest.
        name: GuestId,
        /// Also delete its journal at this site, with all recovery points.
        #[arg(long)]
        purge: bool,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
    /// List the recovery points of a guest, newest first.
    Points {
        /// The guest.
        name: GuestId,
        /// Only the newest N.
        #[arg(long, value_name = "N")]
        last: Option<usize>,
    },
    /// Make a checkpoint of a guest now, and wait until it is durable. Asked where it runs.
    Checkpoint {
        /// The guest.
        name: GuestId,
        /// Quiesce its applications for it, as `quiesce` of the guest says how.
        #[arg(long)]
        consistent: bool,
    },
    /// Resume a guest, or all guests of a group, at this site from a recovery point.
    Failover {
        /// The guest.
        #[arg(required_unless_present = "group")]
        name: Option<GuestId>,
        /// All guests of this group, from the newest instant of which this site has a point of each.
        #[arg(long, value_name = "GROUP", conflicts_with_all = ["name", "point", "consistent"])]
        group: Option<GroupId>,
        /// From the newest point that was cut while the guest's applications were quiesced.
        #[arg(long, conflicts_with = "point")]
        consistent: bool,
        /// From this point (otherwise the newest).
        #[arg(long, value_name = "N")]
        point: Option<u64>,
        /// You know that the other site cannot run the guest any more.
        #[arg(long)]
        fenced_by_operator: bool,
        /// Only say what would happen and what would be lost.
        #[arg(long)]
        dry_run: bool,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
    /// Make a failover to this site final: it cannot be rolled back any more.
    Commit {
        /// The guest.
        name: GuestId,
    },
    /// Undo a failover to this site: discard what ran here since, and give the guest back to its owner
    /// before, as it is there.
    Rollback {
        /// The guest.
        name: GuestId,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
    /// Move a running guest to another site, live and without loss. Asked where it runs now.
    Move {
        /// The guest.
        name: GuestId,
        /// Where to (otherwise where it is replicated to).
        #[arg(long, value_name = "SITE")]
        to: Option<SiteId>,
        /// The guest is switched off: move its disks and its configuration, and start it there on
        /// demand.
        #[arg(long)]
        offline: bool,
        /// Print the run and do not wait for it.
        #[arg(long)]
        no_wait: bool,
    },
    /// Move the running, protected guests of this site to another one, one after the other. Asked
    /// again it goes on with those that are left.
    Evacuate {
        /// Where to.
        #[arg(long, value_name = "SITE")]
        to: SiteId,
        /// Only these, in this order.
        names: Vec<GuestId>,
        /// Only the guests of this plan, in its order.
        #[arg(long, value_name = "FILE", conflicts_with = "names")]
        plan: Option<PathBuf>,
        /// Only the guests of this group of the plan.
        #[arg(long, value_name = "GROUP", requires = "plan")]
        group: Option<PlanName>,
        /// Move so many at a time.
        #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u16).range(1..))]
        parallel: u16,
        /// Go on with the others after a failure.
        #[arg(long)]
        keep_going: bool,
    },
    /// Propose moves of running, protected guests that even out the load of this site and its peers.
    Balance {
        /// Only to this site.
        #[arg(long, value_name = "SITE")]
        to: Option<SiteId>,
        /// Do what is proposed, one move after the other.
        #[arg(long)]
        yes: bool,
    },
    /// Watch a replicated guest for a while, and say what its replication needs: bandwidth for its RPO
    /// target, the smallest RPO, the size of its journal (with -c FILE).
    Estimate {
        /// The guest.
        name: GuestId,
        /// How long to watch it.
        #[arg(long = "for", value_name = "DURATION", default_value = "30s", value_parser = units::duration)]
        watch: Duration,
        /// What the link carries per second, such as 12MiB (otherwise as measured).
        #[arg(long, value_name = "SIZE", value_parser = units::size)]
        bandwidth: Option<u64>,
    },
    /// Resume a clone of a recovery point in isolation, ask it, and remove it. Nothing else notices.
    TestFailover {
        /// The guest.
        name: GuestId,
        /// This point (otherwise the newest).
        #[arg(long, value_name = "N")]
        point: Option<u64>,
        /// Let the clone run on for so long afterwards.
        #[arg(long, value_name = "DURATION", value_parser = units::duration)]
        keep: Option<Duration>,
        /// What the clone is asked: to speak on its console, or nothing but to run.
        #[arg(long, value_name = "console|none", default_value = "console")]
        probe: Probe,
        /// How long the answer may take (otherwise as configured).
        #[arg(long, value_name = "DURATION", value_parser = units::duration)]
        probe_timeout: Option<Duration>,
        /// End the clone that an earlier drill kept.
        #[arg(long, conflicts_with_all = ["point", "keep", "probe", "probe_timeout"])]
        stop: bool,
    },
    /// Replay a recovery point and compare every checksum.
    Verify {
        /// The guest.
        name: GuestId,
        /// This point (otherwise the newest).
        #[arg(long, value_name = "N")]
        point: Option<u64>,
    },
    /// Serve the disks of a recovery point read-only over NBD, for qemu-img, nbdmount and the like.
    Export {
        /// The guest.
        #[arg(required_unless_present = "list")]
        name: Option<GuestId>,
        /// This point (otherwise the newest).
        #[arg(long, value_name = "N")]
        point: Option<u64>,
        /// Only this disk (otherwise all).
        #[arg(long, value_name = "ID")]
        disk: Option<DiskId>,
        /// Where the socket is to be, on the host of the daemon.
        #[arg(long, value_name = "PATH")]
        at: Option<PathBuf>,
        /// End the export of the guest.
        #[arg(long, conflicts_with_all = ["point", "disk", "at"])]
        stop: bool,
        /// List the exports of this site.
        #[arg(long, conflicts_with_all = ["name", "point", "disk", "at", "stop"])]
        list: bool,
    },
    /// Write a copy of a guest to a file, to be brought to the other site on a disk.
    ExportSeed(super::seeds::ExportSeed),
    /// Lay such a file under the first protection of a guest, which then sends what differs.
    ImportSeed(super::seeds::ImportSeed),
    /// Judge and run plans: groups of guests in order, with hooks, probes and a record.
    #[command(subcommand)]
    Plan(PlanVerb),
    /// Look at, check and mend journals.
    #[command(subcommand)]
    Journal(JournalVerb),
    /// List the runs of long verbs, or wait for one.
    Runs {
        /// Wait for this one and show it.
        id: Option<String>,
    },
    /// Show what happened at this site: guests, links, failovers, drills, obstacles, certificates.
    Events {
        /// Go on showing.
        #[arg(short, long)]
        follow: bool,
        /// Only what happened in this last stretch of time.
        #[arg(long, value_name = "DURATION", value_parser = units::duration)]
        since: Option<Duration>,
    },
    /// Show or override how much is sent to a peer.
    Bandwidth {
        /// The peer.
        site: SiteId,
        /// Such as "50 Mbit/s"; "off": no limit; "configured": end the override (otherwise: show it).
        #[arg(value_name = "RATE|off|configured", value_parser = bandwidth::wanted)]
        limit: Option<bandwidth::Wanted>,
        /// How long the override lasts.
        #[arg(long = "for", value_name = "DURATION", requires = "limit", value_parser = units::duration)]
        lasts: Option<Duration>,
    },
    /// Make the daemon read its configuration and certificates again.
    Reload,
    /// Make and look at certificates.
    #[command(subcommand)]
    Pki(PkiVerb),
    /// Judge and explain a configuration.
    #[command(subcommand)]
    Config(ConfigVerb),
    /// Look whether this host is fit for its configuration; each fault with its remedy.
    Doctor {
        /// Compare this site with a peer instead, by what their running daemons know of each other.
        #[arg(long, value_name = "SITE")]
        peer: Option<SiteId>,
    },
    /// Gather what somebody needs to know who is to help: versions, configuration, status, figures,
    /// findings, the log. No keys, nothing of guests.
    SupportBundle {
        /// The archive, which must not be there yet.
        #[arg(value_name = "FILE.tar.zst")]
        file: PathBuf,
    },
    /// Print what a shell needs to complete this program's arguments.
    #[command(hide = true)]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write a manual page per verb.
    #[command(hide = true)]
    Man {
        /// Where to; made if it is not there.
        #[arg(value_name = "DIR")]
        dir: PathBuf,
    },
}

/// Verbs for guests.
#[derive(Debug, Subcommand)]
pub enum GuestVerb {
    /// List the guests of this site.
    List,
    /// Show all of one guest.
    Show {
        /// The guest.
        name: GuestId,
    },
    /// Start a guest that is active here.
    Start {
        /// The guest.
        name: GuestId,
        /// Although the peer cannot be asked whether it runs there.
        #[arg(long)]
        force: bool,
    },
    /// Stop a guest: end its process, flush its disks.
    Stop {
        /// The guest.
        name: GuestId,
    },
    /// Attach to the guest's serial terminal; Ctrl-] leaves.
    Console {
        /// The guest.
        name: GuestId,
    },
}

/// Verbs for plans.
#[derive(Debug, Subcommand)]
pub enum PlanVerb {
    /// Say what is wrong with a plan, and whether its programs and guests are there.
    Validate {
        /// The plan.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Carry out a plan at this site.
    Run(PlanRun),
    /// Show the report of a run, after a check of its record.
    Report {
        /// A run, or a plan: its newest run.
        #[arg(value_name = "RUN")]
        run: String,
        /// Where the records are (otherwise plans/ in the state directory).
        #[arg(long, value_name = "DIR")]
        record: Option<PathBuf>,
    },
}

/// `plan run`
#[derive(Debug, Args)]
pub struct PlanRun {
    /// The plan.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// What to do with the guests (otherwise failover).
    #[arg(long, value_name = "failover|test|move")]
    pub mode: Option<Mode>,
    /// Only say what would happen and what would be lost.
    #[arg(long)]
    pub dry_run: bool,
    /// Go on with the newest run, which failed or was cut off.
    #[arg(long, conflicts_with_all = ["dry_run", "abandon"])]
    pub resume: bool,
    /// Give up the newest run, which was cut off, and begin anew.
    #[arg(long, conflicts_with = "dry_run")]
    pub abandon: bool,
    /// Leave out this step; may be repeated.
    #[arg(long, value_name = "STEP")]
    pub skip: Vec<String>,
    /// Where guests move to (otherwise as in the plan).
    #[arg(long, value_name = "SITE")]
    pub to: Option<SiteId>,
    /// You know that the other site cannot run the guests any more.
    #[arg(long)]
    pub fenced_by_operator: bool,
    /// Why; for the report.
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
    /// Where the records are (otherwise plans/ in the state directory).
    #[arg(long, value_name = "DIR")]
    pub record: Option<PathBuf>,
    /// Do not ask; prompts of the plan count as confirmed.
    #[arg(long)]
    pub yes: bool,
}

/// Verbs for journals.
#[derive(Debug, Subcommand)]
pub enum JournalVerb {
    /// Show the figures of a journal.
    Stat {
        /// The guest.
        name: GuestId,
    },
    /// Read all of a journal and check it.
    Check {
        /// The guest.
        name: GuestId,
    },
    /// Make the catalogue anew from the segments.
    RebuildIndex {
        /// The guest.
        name: GuestId,
    },
}

/// Verbs for certificates.
#[derive(Debug, Subcommand)]
pub enum PkiVerb {
    /// Make a CA and the certificate of the first site.
    Init {
        /// Directory of the CA; its key stays here.
        #[arg(long, value_name = "DIR", default_value = "pki")]
        dir: PathBuf,
        /// The first site.
        #[arg(long, value_name = "SITE")]
        site: SiteId,
        /// DNS name or IP address that peers connect to; may be repeated.
        #[arg(long = "name", value_name = "NAME")]
        names: Vec<String>,
    },
    /// Issue or renew the certificate of a site.
    Issue {
        /// Directory of the CA.
        #[arg(long, value_name = "DIR", default_value = "pki")]
        dir: PathBuf,
        /// The site.
        #[arg(long, value_name = "SITE")]
        site: SiteId,
        /// DNS name or IP address that peers connect to; may be repeated.
        #[arg(long = "name", value_name = "NAME")]
        names: Vec<String>,
        /// Directory for the four files of the site (otherwise DIR/SITE).
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// Lifetime.
        #[arg(long, value_name = "N", default_value_t = crate::pki::authority::SITE_DAYS)]
        days: u32,
        /// Overwrite what is there.
        #[arg(long)]
        renew: bool,
    },
    /// Revoke certificates; every site then needs the new list.
    Revoke {
        /// Directory of the CA.
        #[arg(long, value_name = "DIR", default_value = "pki")]
        dir: PathBuf,
        /// Serial number of one certificate, or a site: all of its certificates. Without it the
        /// list is only renewed.
        target: Option<String>,
    },
    /// Show the certificates of a site (needs -c FILE).
    Status,
}

/// Verbs for configurations.
#[derive(Debug, Subcommand)]
pub enum ConfigVerb {
    /// Say what is wrong with a configuration, and whether the files are there that it names.
    Check,
    /// Show every value in force and where it comes from; no secrets.
    Show,
}
