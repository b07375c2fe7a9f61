//! Numbers for people: always with a unit, three digits or so.

use std::time::Duration;

use crate::clock::Timestamp;

/// `0.8 ms`, `12 ms`, `1.9 s`, `41 s`, `12 min`, `3.5 h`, `9 d`.
pub fn seconds(seconds: f64) -> String {
    const STEPS: &[(f64, f64, &str)] = &[
        (0.001, 1e-6, "us"),
        (1.0, 1e-3, "ms"),
        (120.0, 1.0, "s"),
        (7_200.0, 60.0, "min"),
        (172_800.0, 3_600.0, "h"),
        (f64::INFINITY, 86_400.0, "d"),
    ];
    let magnitude = seconds.abs();
    if magnitude == 0.0 {
        return "0 s".to_owned();
    }
    let step = STEPS.iter().find(|(below, ..)| magnitude < *below);
    let (_, unit, name) = step.unwrap_or(&STEPS[STEPS.len() - 1]);
    format!("{} {name}", digits(seconds / unit))
}

/// A duration, as [`seconds`].
pub fn duration(duration: Duration) -> String {
    seconds(duration.as_secs_f64())
}

/// `0 B`, `512 B`, `1.1 MiB`, `38 GiB`.
pub fn bytes(bytes: u64) -> String {
    const UNITS: &[&str] = &["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1024.0 {
        (value, unit) = (value / 1024.0, unit + 1);
    }
    if unit == 0 {
        return format!("{bytes} B");
    }
    format!("{} {}", digits(value), UNITS[unit])
}

fn digits(value: f64) -> String {
    if value.abs() < 9.95 {
        format!("{value:.1}")
    } else {
        format!("{value:.0}")
    }
}

/// `2026-11-23 09:31:44.102`, in UTC.
pub fn time(at: Timestamp) -> String {
    let at = jiff::Timestamp::from_nanosecond(i128::from(at.0))
        .expect("64 bits of nanoseconds end in 2554, jiff in 9999");
    at.strftime("%Y-%m-%d %H:%M:%S%.3f").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_units() {
        for (value, text) in [
            (0.0, "0 s"),
            (0.000_12, "120 us"),
            (0.0031, "3.1 ms"),
            (0.8, "800 ms"),
            (1.94, "1.9 s"),
            (41.2, "41 s"),
            (150.0, "2.5 min"),
            (86_400.0, "24 h"),
            (777_600.0, "9.0 d"),
            (-0.002, "-2.0 ms"),
        ] {
            assert_eq!(seconds(value), text);
        }
        for (value, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1 << 10, "1.0 KiB"),
            (310 << 20, "310 MiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(bytes(value), text);
        }
        let at = Timestamp(1_700_000_000_102_000_000);
        assert_eq!(time(at), "2023-11-14 22:13:20.102");
    }
}
