//! Plans as code: many guests, in order, with what has to happen before and after.
//!
//! ```text
//!   FILE ── load ──▶ Plan (groups in the order in which they are done)
//!                     │
//!      for each group │  before ─▶ guests, `parallel` at a time ─▶ addresses ─▶ probes ─▶ after
//!                     │  hook       failover | test | move          agent        tcp       hook
//!                     │  message    (verbs of the admin API,        hook         http      message
//!                     │  prompt      networks of the plan)                       command   prompt
//!                     ▼                                                          serial
//!                   Runner ──▶ record: one line before and one after each step, hash-chained
//!                     │                      └──▶ Markdown report
//!                     └── a crash? `--resume`: steps that ended well are not repeated
//! ```
//!
//! A plan is run by the command line, over the daemon's admin API: what a step asks of the daemon
//! goes on there whatever becomes of the command line, and is found again. Invariants: a step is in
//! the record, durably, before it begins; a plan has at most one run at a time, by a lock on a file.
//! Hooks and commands are argument vectors, never a shell's text; one that was cut off by a crash is
//! run again, so they have to bear that.

pub mod command;
pub mod file;
pub mod guests;
pub mod network;
pub mod order;
pub mod probe;
pub mod record;
pub mod report;
pub mod runner;
pub mod site;
pub mod steps;

#[cfg(test)]
mod tests;
