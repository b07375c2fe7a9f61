//! Verbs for many guests, over the admin API.

pub mod guests;
