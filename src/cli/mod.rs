//! The command line: a client of the daemon, and a few verbs that need none.
//!
//! ```text
//!   args ─▶ dispatch ─┬─ verbs ──── client ── daemon        (the CLI's death stops nothing there)
//!                     ├─ config, pki, doctor, bench         (no daemon needed)
//!                     └─ exit code, by the table in control::codes
//! ```
//!
//! Only this module and `main` print. Results go to stdout, everything else to stderr.

pub mod args;
pub mod balance;
pub mod bandwidth;
pub mod bench;
pub mod bundle;
pub mod check;
pub mod config;
pub mod confirm;
pub mod console;
pub mod demo;
pub mod doctor;
pub mod drills;
pub mod estimate;
pub mod evacuate;
mod events;
pub mod follow;
pub mod groups;
pub mod logging;
pub mod manual;
pub mod operator;
pub mod output;
pub mod pki;
pub mod plan;
pub mod render;
mod run_text;
pub mod seeds;
pub mod site;
mod source;
pub mod text;
pub mod top;
pub mod units;
pub mod verbs;

#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::PathBuf;

use clap::Parser;

use crate::config::{DEFAULT_SOCKET, Files, load};
use crate::control::client::Client;
use crate::control::codes::{ExitCode, Reason};
use crate::control::types::ApiError;
use args::{Cli, Global, Verb};
use output::{Output, Streams, Style};

/// The whole program: arguments and streams of this process, to its exit code.
pub fn main() -> ExitCode {
    let (mut out, mut err) = (std::io::stdout(), std::io::stderr());
    let mut input = std::io::stdin().lock();
    let streams = Streams {
        out_is_terminal: out.is_terminal(),
        err_is_terminal: err.is_terminal(),
        input_is_terminal: input.is_terminal(),
        out: &mut out,
        err: &mut err,
        input: &mut input,
    };
    run(std::env::args_os().collect(), streams)
}

/// As [`main`], with arguments and streams that are given.
pub fn run(args: Vec<OsString>, streams: Streams<'_>) -> ExitCode {
    let json = args.iter().any(|arg| arg == "--json");
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => return usage(&error, json, streams),
    };
    let global = &cli.global;
    let style = Style::new(
        global.json,
        global.quiet,
        global.no_color,
        streams.out_is_terminal,
    );
    let mut out = Output { streams, style };
    match dispatch(cli, &mut out) {
        Ok(code) => code,
        Err(error) => {
            out.error(&error);
            error.reason.exit_code()
        }
    }
}

/// Help and version are results; the rest is a usage error.
fn usage(error: &clap::Error, json: bool, streams: Streams<'_>) -> ExitCode {
    if !error.use_stderr() {
        let _ = write!(streams.out, "{}", error.render());
        return ExitCode::Ok;
    }
    if json {
        let message = error.render().to_string().trim().to_owned();
        let style = Style::new(true, false, true, false);
        Output { streams, style }.error(&ApiError::new(Reason::Usage, message));
    } else {
        let _ = write!(streams.err, "{}", error.render());
    }
    ExitCode::Usage
}

fn dispatch(cli: Cli, out: &mut Output<'_>) -> Result<ExitCode, ApiError> {
    let Cli { global, verb } = cli;
    let file = global.config.as_deref();
    match verb {
        Verb::Site => return site::run(file, global.verbose),
        Verb::Vmm { guest, run_dir } => return site::monitor(&guest, &run_dir),
        Verb::QemuWatchdog {
            monitor,
            own,
            bound_ms,
        } => return site::watchdog(monitor, own, bound_ms),
        Verb::QuiesceGuard => return site::quiesce_guard(),
        _ => logging::start_for_command(global.verbose),
    }
    match verb {
        Verb::Site | Verb::Vmm { .. } | Verb::QemuWatchdog { .. } | Verb::QuiesceGuard => {
            unreachable!("they were run above")
        }
        Verb::Demo {
            keep,
            no_kvm,
            qemu,
            kernel,
            busybox,
            tcg,
        } => {
            let qemu = qemu.then_some(demo::qemu::QemuOptions {
                kernel,
                busybox,
                tcg,
            });
            let options = demo::DemoOptions {
                keep,
                no_kvm,
                qemu,
                json: global.json,
            };
            Ok(match workers()?.block_on(demo::run(&options)) {
                demo::DemoExit::Pass => ExitCode::Ok,
                demo::DemoExit::Fail => ExitCode::Failed,
                demo::DemoExit::Unable => ExitCode::Usage,
                demo::DemoExit::Interrupted => ExitCode::Interrupted,
            })
        }
        Verb::Bench {
            quick,
            dir,
            only,
            compare_qemu,
        } => {
            let options = bench::BenchOptions {
                quick,
                dir,
                only,
                compare_qemu,
            };
            bench::run(&options, out)
        }
        Verb::Config(verb) => config::run(&verb, file, out),
        Verb::Pki(verb) => pki::run(verb, file, out).map(|()| ExitCode::Ok),
        Verb::Check { name } => Ok(runtime()?.block_on(check::run(&global, name.as_ref(), out))),
        Verb::Plan(verb) => {
            let (client, timeout) = (Client::new(socket(&global)?), global.timeout);
            let records = records(&global)?;
            runtime()?.block_on(plan::run(verb, &client, records, timeout, out))
        }
        Verb::SupportBundle { file: target } => {
            let client = Client::new(socket(&global)?);
            let done = runtime()?.block_on(bundle::run(&target, file, &client, out));
            done.map(|()| ExitCode::Ok)
        }
        Verb::Estimate {
            name,
            watch,
            bandwidth,
        } => {
            let loaded = file.map(|file| load(file, Files::Ignored)).transpose();
            let loaded = loaded.map_err(|e| config::error(&e))?;
            let request = estimate::Request {
                guest: name,
                watch,
                bandwidth,
                retention: loaded.map(|loaded| loaded.config.retention),
            };
            let client = Client::new(socket(&global)?);
            let done = runtime()?.block_on(estimate::run(&request, &client, out));
            done.map(|()| ExitCode::Ok)
        }
        Verb::Doctor { peer: Some(peer) } => {
            let client = Client::new(socket(&global)?);
            runtime()?.block_on(doctor::peer(&peer, &client, out))
        }
        Verb::Doctor { peer: None } => runtime()?.block_on(doctor::run(file, out)),
        Verb::Completions { shell } => {
            manual::completions(shell, out);
            Ok(ExitCode::Ok)
        }
        Verb::Man { dir } => manual::pages(&dir, out).map(|()| ExitCode::Ok),
        Verb::Top { interval } => {
            let client = Client::new(socket(&global)?);
            runtime()?.block_on(top::run(&client, interval, out))
        }
        verb => {
            let client = Client::new(socket(&global)?);
            runtime()?.block_on(verbs::run(verb, &client, global.timeout, out))
        }
    }
}

/// A client needs no more than one thread.
fn runtime() -> Result<tokio::runtime::Runtime, ApiError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| ApiError::new(Reason::Failed, format!("no runtime: {error}")))
}

/// Daemons have a worker per processor.
fn workers() -> Result<tokio::runtime::Runtime, ApiError> {
    tokio::runtime::Runtime::new()
        .map_err(|error| ApiError::new(Reason::Failed, format!("no runtime: {error}")))
}

/// Where the site keeps the records of plans, if its configuration is named.
fn records(global: &Global) -> Result<Option<PathBuf>, ApiError> {
    let Some(file) = &global.config else {
        return Ok(None);
    };
    let loaded = load(file, Files::Ignored).map_err(|e| config::error(&e))?;
    Ok(Some(loaded.config.state_dir.join("plans")))
}

/// The daemon's socket: as said, or as configured, or the usual one.
fn socket(global: &Global) -> Result<PathBuf, ApiError> {
    if let Some(socket) = &global.socket {
        return Ok(socket.clone());
    }
    match &global.config {
        Some(file) => {
            let loaded = load(file, Files::Ignored).map_err(|e| config::error(&e))?;
            Ok(loaded.config.admin_socket)
        }
        None => Ok(PathBuf::from(DEFAULT_SOCKET)),
    }
}
