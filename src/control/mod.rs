//! The admin API of a site: HTTP with JSON on a unix socket.
//!
//! ```text
//!   lifeboat CLI ── client ── unix socket (mode 0660) ── server ── Backend (the daemon)
//!   Prometheus, probes ────── TCP, loopback by default ─ server:  / /metrics /livez /readyz
//! ```
//!
//! The CLI is only a client: its death never stops what it began. Verbs that take long are *runs*
//! of the daemon, which clients poll. Whoever may open the socket may do everything, so access is
//! the file mode and its directory, and nothing here listens on TCP except four read-only pages,
//! of which one is for people: see `page`.

pub mod backend;
pub mod bandwidth;
pub mod checkpoint;
pub mod client;
pub mod codes;
pub mod drills;
pub mod events;
pub mod exports;
pub mod facts;
#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod fake_facts;
pub mod groups;
pub mod pace;
mod page;
pub mod reports;
pub mod requests;
pub mod runs;
pub mod server;
pub mod socket;
pub mod time;
pub mod types;

#[cfg(test)]
mod tests;
