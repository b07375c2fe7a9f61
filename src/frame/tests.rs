//! Frames against a naive model of a guest, and hostile bytes.
