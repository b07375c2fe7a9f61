//! The configuration of a site: one TOML file, symmetric for both sites.
//!
//! ```text
//!   FILE ──────────────┐ line and column of every syntax error, unknown key, wrong type
//!   LIFEBOAT__A__B=... ┼─▶ schema (all optional) ─▶ validate ─▶ SiteConfig   (plain values)
//!   defaults ──────────┘                               └──────▶ Origin of each value
//! ```
//!
//! Precedence: environment, then file, then default. Unknown keys are errors. Relative paths are
//! relative to the file. A configuration is taken as a whole or not at all.

pub mod resolved;
