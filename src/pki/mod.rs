//! The site CA and its certificates.
