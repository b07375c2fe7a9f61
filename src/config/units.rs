//! Durations and sizes as people write them.
//!
//! ```text
//!   duration = number unit { number unit }     unit: ns us ms s m h d      "20ms" "1.5s" "1h30m"
//!   size     = digits unit                     unit: B kB MB GB TB (10^3)  KiB MiB GiB TiB (2^10)
//!   rate     = number unit                     unit: kbit/s Mbit/s ... kB/s ... KiB/s ...
//! ```
//!
//! A bare number is refused, except 0: whether it meant seconds or milliseconds would be a guess.

use std::time::Duration;

const DURATION_UNITS: &[(&str, u64)] = &[
    ("ns", 1),
    ("us", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
    ("d", 86_400_000_000_000),
];

const SIZE_UNITS: &[(&str, u64)] = &[
    ("B", 1),
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
];

/// Bits in a second. Network people count bits in powers of ten.
const RATE_UNITS: &[(&str, u64)] = &[
    ("kbit/s", 1_000),
    ("Mbit/s", 1_000_000),
    ("Gbit/s", 1_000_000_000),
    ("Tbit/s", 1_000_000_000_000),
    ("kB/s", 8_000),
    ("MB/s", 8_000_000),
    ("GB/s", 8_000_000_000),
    ("KiB/s", 8 << 10),
    ("MiB/s", 8 << 20),
    ("GiB/s", 8 << 30),
];

/// A duration, or why the text is none.
pub fn duration(text: &str) -> Result<Duration, String> {
    let refuse = || format!("{text:?} is no duration: write one such as \"20ms\", \"5s\", \"15m\"");
    let trimmed = text.trim();
    if trimmed == "0" {
        return Ok(Duration::ZERO);
    }
    let (mut rest, mut total, mut smallest) = (trimmed, 0_u64, u64::MAX);
    if rest.is_empty() {
        return Err(refuse());
    }
    while !rest.is_empty() {
        let (number, after) = rest.split_at(prefix(rest, |c| c.is_ascii_digit() || c == '.'));
        let (unit, after) = after.split_at(prefix(after, |c| c.is_ascii_alphabetic()));
        let scale = find(DURATION_UNITS, unit).ok_or_else(refuse)?;
        // Descending units only: "5s1h" is more likely a slip than a wish.
        if scale >= smallest {
            return Err(refuse());
        }
        smallest = scale;
        let nanos = decimal(number, scale).ok_or_else(refuse)?;
        total = total.checked_add(nanos).ok_or_else(refuse)?;
        rest = after;
    }
    Ok(Duration::from_nanos(total))
}

/// A size in bytes, or why the text is none.
pub fn size(text: &str) -> Result<u64, String> {
    let refuse =
        || format!("{text:?} is no size: write one such as \"64MiB\", \"20MB\", \"4096B\"");
    let trimmed = text.trim();
    if trimmed == "0" {
        return Ok(0);
    }
    let (number, unit) = trimmed.split_at(prefix(trimmed, |c| c.is_ascii_digit()));
    let scale = find(SIZE_UNITS, unit.trim_start()).ok_or_else(refuse)?;
    number
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(scale))
        .ok_or_else(refuse)
}

/// Bits per second of a bandwidth; `None` when the text is none.
pub fn bits_per_second(text: &str) -> Option<u64> {
    let trimmed = text.trim();
    let end = prefix(trimmed, |c| c.is_ascii_digit() || c == '.');
    let (number, unit) = trimmed.split_at(end);
    decimal(number, find(RATE_UNITS, unit.trim_start())?)
}

fn prefix(text: &str, wanted: impl Fn(char) -> bool) -> usize {
    text.find(|c| !wanted(c)).unwrap_or(text.len())
}

fn find(units: &[(&str, u64)], unit: &str) -> Option<u64> {
    units.iter().find(|(u, _)| *u == unit).map(|(_, s)| *s)
}

/// `number` times `scale`, exact; `None` when it is no number, not whole or too large.
fn decimal(number: &str, scale: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || number.ends_with('.') || fraction.len() > 9 {
        return None;
    }
    let whole = whole.parse::<u64>().ok()?.checked_mul(scale)?;
    if fraction.is_empty() {
        return Some(whole);
    }
    let part = u128::from(fraction.parse::<u64>().ok()?) * u128::from(scale);
    let divisor = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
    if part % divisor != 0 {
        return None;
    }
    whole.checked_add(u64::try_from(part / divisor).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, nanos) in [
            ("0", 0),
            ("20ms", 20_000_000),
            ("5s", 5_000_000_000),
            ("1.5s", 1_500_000_000),
            ("0.25ms", 250_000),
            ("1h30m", 5_400_000_000_000),
            (" 2d ", 172_800_000_000_000),
            ("15m", 900_000_000_000),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_nanos(nanos)), "{text:?}");
        }
        for bad in [
            "",
            "5",
            "s",
            "-5s",
            "5 s x",
            "5S",
            "5s1h",
            "5s5s",
            "1.s",
            ".5s",
            "0.5ns",
            "1e3s",
            "999999999999d",
            "5ß",
        ] {
            assert!(duration(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("20MB", 20_000_000),
            ("20MiB", 20 << 20),
            ("20 MiB", 20 << 20),
            ("1TiB", 1 << 40),
            ("4096B", 4096),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text:?}");
        }
        for bad in [
            "",
            "20",
            "MB",
            "20mb",
            "20Mb",
            "-1MB",
            "1.5MB",
            "99999999TiB",
            "5%",
        ] {
            assert!(size(bad).is_err(), "{bad:?} was accepted");
        }
    }
}
