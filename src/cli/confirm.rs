//! Asks before something is done that cannot be taken back.

use std::io::{BufRead, Read};

use super::output::Output;
use crate::control::codes::Reason;
use crate::control::types::ApiError;
use crate::ids::GuestId;

/// Longest answer that is read.
const ANSWER_BYTES_MAX: u64 = 256;

/// Refuses when nobody can be asked: without a terminal and without `--yes`.
pub fn askable(yes: bool, what: &str, out: &Output<'_>) -> Result<(), ApiError> {
    if yes || out.streams.input_is_terminal {
        return Ok(());
    }
    let message = format!("to {what} needs a confirmation, and there is no terminal to ask at");
    Err(ApiError::new(Reason::NotConfirmed, message).hint("--yes confirms it"))
}

/// Asks the operator to type the guest's name.
pub fn typed(yes: bool, guest: &GuestId, what: &str, out: &mut Output<'_>) -> Result<(), ApiError> {
    typed_name(yes, "guest", guest.as_str(), what, out)
}

/// Asks the operator to type a name; `whose` says of what it is the name.
pub fn typed_name(
    yes: bool,
    whose: &str,
    name: &str,
    what: &str,
    out: &mut Output<'_>,
) -> Result<(), ApiError> {
    askable(yes, what, out)?;
    if yes {
        return Ok(());
    }
    let streams = &mut out.streams;
    // A prompt that cannot be written is answered by whoever knows what is asked.
    let _ = write!(streams.err, "Type the {whose}'s name to {what}: ");
    let _ = streams.err.flush();
    let mut answer = String::new();
    let mut input = (&mut *streams.input).take(ANSWER_BYTES_MAX);
    let read = input.read_line(&mut answer);
    if read.is_ok() && answer.trim() == name {
        return Ok(());
    }
    Err(ApiError::new(
        Reason::NotConfirmed,
        format!("the name that was typed is not the {whose}'s: nothing was done"),
    ))
}
