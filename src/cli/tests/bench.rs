//! `lifeboat bench`: the table, and what it cannot do. `tests/suite/bench.rs` runs all of it.

use super::lifeboat;
use crate::control::codes::ExitCode;

#[test]
fn one_section_alone_is_a_table() {
    let ran = lifeboat(&["bench", "--quick", "--only", "encode"], None, None);
    assert_eq!(ran.code, ExitCode::Ok, "{}", ran.err);
    assert!(ran.out.contains("encode: all changed, lz4"), "{}", ran.out);
    assert!(!ran.out.contains("limits:"), "{}", ran.out);
    assert!(ran.out.contains("quick: not a measurement"), "{}", ran.out);
}

#[test]
fn a_directory_that_is_not_there_is_named() {
    let ran = lifeboat(
        &["bench", "--quick", "--dir", "/does/not/exist"],
        None,
        None,
    );
    assert_eq!(ran.code, ExitCode::Failed);
    assert!(ran.err.contains("/does/not/exist"), "{}", ran.err);
}
