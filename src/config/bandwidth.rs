//! `bandwidth`, `time_zone` and `window` of a peer: how much may be sent to it, and when.
//!
//! ```toml
//!   [peer.site-b]
//!   bandwidth = "200 Mbit/s"               # otherwise; "off": no limit
//!   time_zone = "Europe/Berlin"            # of the windows; the host's own when left out
//!   [[peer.site-b.window]]                 # the first one that fits counts
//!   days = ["mon..fri"]                    # every day when left out
//!   from = "08:00"                         # from this minute ...
//!   to = "18:00"                           # ... to before this one; not after `from`: on the next day
//!   bandwidth = "50 Mbit/s"
//! ```
//!
//! A window belongs to the day on which it begins. What is in force at an instant is asked for anew
//! each second, so neither daylight saving nor a clock that is set needs care.

use std::fmt;
use std::num::NonZeroU64;

use toml::Spanned;

use super::check::Check;
use super::{schema, units};
use crate::clock::Timestamp;

/// Less than this is a slip of the pen: no checkpoint would ever arrive.
const BITS_MIN: u64 = 64_000;
/// 10 Tbit/s.
const BITS_MAX: u64 = 10_000_000_000_000;
const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
const WINDOWS_MAX: usize = 100;

/// Bytes in a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate(pub NonZeroU64);

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = self.0.get().saturating_mul(8) as f64;
        let (value, unit) = match bits {
            ..1e6 => (bits / 1e3, "kbit/s"),
            ..1e9 => (bits / 1e6, "Mbit/s"),
            _ => (bits / 1e9, "Gbit/s"),
        };
        // Two digits after the point at most, and none that say nothing.
        let text = format!("{value:.2}");
        let text = text.trim_end_matches('0').trim_end_matches('.');
        write!(f, "{text} {unit}")
    }
}

/// A limit, or that there is none (`off`).
pub type Limit = Option<Rate>;

/// How much may be sent to a peer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BandwidthConfig {
    /// Outside of windows.
    pub limit: Limit,
    /// Whose days and minutes the windows are in; `None`: the host's.
    pub zone: Option<String>,
    /// The first one that fits counts.
    pub windows: Vec<Window>,
}

/// A part of the week with a limit of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// Monday first: whether it begins on that day.
    pub days: [bool; 7],
    /// Minute of the day from which on.
    pub from: u16,
    /// Minute of the day before which it ends; on the next day if it is not after `from`.
    pub to: u16,
    /// What may be sent.
    pub limit: Limit,
}

impl Window {
    /// Whether this minute of this weekday (Monday is 0) is in it.
    pub fn holds(&self, day: usize, minute: u16) -> bool {
        let yesterday = (day + 6) % 7;
        match self.from < self.to {
            true => self.days[day] && (self.from..self.to).contains(&minute),
            false => {
                self.days[day] && minute >= self.from || self.days[yesterday] && minute < self.to
            }
        }
    }
}

impl BandwidthConfig {
    /// The limit at this instant, and whether a window says so.
    pub fn at(&self, now: Timestamp) -> (Limit, bool) {
        if self.windows.is_empty() {
            return (self.limit, false);
        }
        let now = jiff::Timestamp::from_nanosecond(i128::from(now.0));
        let now = now.expect("64 bits of nanoseconds end in 2554, jiff in 9999");
        let zone = match &self.zone {
            // It was found when the configuration was read; if it is gone since, the host's is left.
            Some(name) => jiff::tz::TimeZone::get(name).unwrap_or_else(|_| local()),
            None => local(),
        };
        let local = now.to_zoned(zone);
        let day = usize::try_from(local.weekday().to_monday_zero_offset()).unwrap_or(0);
        let minute = u16::try_from(i32::from(local.hour()) * 60 + i32::from(local.minute()));
        let minute = minute.unwrap_or(0);
        let window = self.windows.iter().find(|w| w.holds(day, minute));
        window.map_or((self.limit, false), |window| (window.limit, true))
    }
}

fn local() -> jiff::tz::TimeZone {
    jiff::tz::TimeZone::system()
}

/// A bandwidth as people write it: `"200 Mbit/s"`, `"25 MB/s"`; `"off"` is none.
pub fn limit(text: &str) -> Result<Limit, String> {
    if text.trim() == "off" {
        return Ok(None);
    }
    let refuse = || {
        format!("{text:?} is no bandwidth: write such as \"200 Mbit/s\", \"25 MB/s\", or \"off\"")
    };
    let bits = units::bits_per_second(text).ok_or_else(refuse)?;
    if !(BITS_MIN..=BITS_MAX).contains(&bits) {
        return Err(format!(
            "{text:?} is not between \"64 kbit/s\" and \"10 Tbit/s\""
        ));
    }
    Ok(NonZeroU64::new(bits / 8).map(Rate))
}

/// `08:00` as a minute of the day; `24:00` is its end.
fn minute(text: &str) -> Result<u16, String> {
    let parsed = text.split_once(':').and_then(|(hour, minute)| {
        let two = |part: &str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_digit());
        let whole = two(hour) && two(minute);
        let (hour, minute): (u16, u16) = (hour.parse().ok()?, minute.parse().ok()?);
        (whole && minute < 60 && hour * 60 + minute <= 1440).then_some(hour * 60 + minute)
    });
    parsed.ok_or_else(|| format!("{text:?} is no time of day: write such as \"08:00\""))
}

/// `mon`, or `mon..fri`.
fn days(text: &str) -> Result<[bool; 7], String> {
    let number = |name: &str| DAYS.iter().position(|day| *day == name);
    let (first, last) = text.split_once("..").unwrap_or((text, text));
    let (Some(first), Some(last)) = (number(first), number(last)) else {
        return Err(format!(
            "{text:?} is no day: write \"mon\" to \"sun\", or several such as \"mon..fri\""
        ));
    };
    let mut days = [false; 7];
    let count = (last + 7 - first) % 7;
    (0..=count).for_each(|n| days[(first + n) % 7] = true);
    Ok(days)
}

/// The three keys of a peer.
pub(super) fn validate(
    check: &mut Check<'_>,
    prefix: &str,
    limit_of_peer: schema::Maybe<String>,
    zone: schema::Maybe<String>,
    windows: Vec<Spanned<schema::Window>>,
) -> BandwidthConfig {
    let key = format!("{prefix}.bandwidth");
    let by_default = check.parsed(&key, limit_of_peer, "off", limit);
    let zone = check.optional(&format!("{prefix}.time_zone"), zone, |text| {
        let found = jiff::tz::TimeZone::get(text);
        let named = found.map(|_| text.to_owned());
        named.map_err(|_| {
            format!("no time zone {text:?} is known here: write such as \"Europe/Berlin\", \"UTC\"")
        })
    });
    if let (Some(too_many), true) = (windows.get(WINDOWS_MAX), windows.len() > WINDOWS_MAX) {
        let place = check.place(too_many);
        let message = format!("there are more than {WINDOWS_MAX}");
        check.problem(&format!("{prefix}.window"), Some(place), message);
    }
    let windows = windows.into_iter().enumerate().filter_map(|(index, raw)| {
        let place = check.place(&raw);
        let raw = raw.into_inner();
        let key = format!("{prefix}.window[{index}]");
        let from = check.required(&format!("{key}.from"), raw.from, "when it begins", minute);
        let to = check.required(&format!("{key}.to"), raw.to, "when it ends", minute);
        let what = "what may be sent then";
        let limit = check.required(&format!("{key}.bandwidth"), raw.bandwidth, what, limit);
        let mut on = [raw.days.is_empty(); 7];
        for text in raw.days {
            let place = check.place(&text);
            match days(text.get_ref()) {
                Ok(days) => (0..7).for_each(|day| on[day] |= days[day]),
                Err(message) => check.problem(&format!("{key}.days"), Some(place), message),
            }
        }
        let (from, to, limit) = (from?.value, to?.value, limit?.value);
        if from == to || from == 1440 || to == 0 {
            let message = "is empty: for all of a day write from = \"00:00\", to = \"24:00\"";
            check.problem(&key, Some(place), message);
        }
        Some(Window {
            days: on,
            from,
            to,
            limit,
        })
    });
    let windows = windows.collect();
    BandwidthConfig {
        limit: by_default.value,
        zone: zone.map(|found| found.value),
        windows,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bandwidths_are_read_and_shown() {
        for (text, bytes, shown) in [
            ("200 Mbit/s", 25_000_000, "200 Mbit/s"),
            ("200Mbit/s", 25_000_000, "200 Mbit/s"),
            ("1.5 Gbit/s", 187_500_000, "1.5 Gbit/s"),
            ("25 MB/s", 25_000_000, "200 Mbit/s"),
            ("64 kbit/s", 8_000, "64 kbit/s"),
            ("1 MiB/s", 1 << 20, "8.39 Mbit/s"),
        ] {
            let rate = limit(text).unwrap().unwrap();
            assert_eq!((rate.0.get(), rate.to_string()), (bytes, shown.to_owned()));
        }
        assert_eq!(limit("off"), Ok(None));
        for bad in [
            "",
            "200",
            "200 Mbit",
            "0 Mbit/s",
            "1 kbit/s",
            "-1 Mbit/s",
            "99 Tbit/s",
        ] {
            assert!(limit(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn days_and_minutes_are_read() {
        let on = |text: &str| days(text).unwrap().map(u8::from);
        assert_eq!(on("mon..fri"), [1, 1, 1, 1, 1, 0, 0]);
        assert_eq!(on("sat..mon"), [1, 0, 0, 0, 0, 1, 1]);
        assert_eq!(on("wed"), [0, 0, 1, 0, 0, 0, 0]);
        assert_eq!((minute("08:30"), minute("24:00")), (Ok(510), Ok(1440)));
        for bad in ["8:00", "24:01", "12:60", "12", "", "ab:cd", "+1:00"] {
            assert!(minute(bad).is_err(), "{bad:?} was accepted");
        }
        assert!(days("monday").is_err() && days("mon..").is_err());
    }

    /// Hours of a week against a list of hours that is made by walking through each window.
    #[test]
    fn windows_hold_the_minutes_between_and_may_pass_midnight() {
        for (from, to) in [(480, 1080), (1320, 360), (0, 1440), (1380, 60)] {
            let window = Window {
                days: days("fri").unwrap(),
                from,
                to,
                limit: None,
            };
            let length = if from < to {
                to - from
            } else {
                1440 - from + to
            };
            let begin = 4 * 1440 + usize::from(from);
            let inside = begin..begin + usize::from(length);
            for at in 0..7 * 1440 {
                let (day, minute) = (at / 1440, at % 1440);
                let holds = window.holds(day, minute as u16);
                assert_eq!(holds, inside.contains(&at), "{from} {to}: {day} {minute}");
            }
        }
    }

    #[test]
    fn the_first_window_that_fits_counts_in_its_zone() {
        let some = |bytes| NonZeroU64::new(bytes).map(Rate);
        let window = |days_of: &str, from, to, bytes| Window {
            days: days(days_of).unwrap(),
            from,
            to,
            limit: some(bytes),
        };
        let config = BandwidthConfig {
            limit: None,
            zone: Some("Europe/Berlin".to_owned()),
            windows: vec![
                window("mon..fri", 480, 1080, 1),
                window("mon..sun", 0, 1440, 2),
            ],
        };
        let at = |text: &str| {
            let at: jiff::Timestamp = text.parse().unwrap();
            config.at(Timestamp(u64::try_from(at.as_nanosecond()).unwrap()))
        };
        // A Friday, at 09:00 and at 07:59 of Berlin's summer and winter.
        assert_eq!(at("2026-07-03T07:00:00Z"), (some(1), true));
        assert_eq!(at("2026-07-03T05:59:59Z"), (some(2), true));
        assert_eq!(at("2026-01-02T07:00:00Z"), (some(1), true));
        assert_eq!(at("2026-01-02T06:59:59Z"), (some(2), true));
        // A Sunday.
        assert_eq!(at("2026-07-05T07:00:00Z"), (some(2), true));
    }
}
