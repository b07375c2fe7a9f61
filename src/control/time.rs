//! Times in JSON: RFC 3339 in UTC with up to nine digits of a second, `2026-11-23T09:31:44.102Z`.

use serde::{Deserialize, Deserializer, Serializer, de};

use crate::clock::Timestamp;

/// As text.
pub fn format(at: Timestamp) -> String {
    let at = jiff::Timestamp::from_nanosecond(i128::from(at.0))
        .expect("64 bits of nanoseconds end in 2554, jiff in 9999");
    at.to_string()
}

/// From text; `None` when it is no time, or one before 1970 or after 2554.
pub fn parse(text: &str) -> Option<Timestamp> {
    let at: jiff::Timestamp = text.parse().ok()?;
    u64::try_from(at.as_nanosecond()).ok().map(Timestamp)
}

/// For `#[serde(with)]`.
pub fn serialize<S: Serializer>(at: &Timestamp, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&format(*at))
}

/// For `#[serde(with)]`.
pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Timestamp, D::Error> {
    let text = String::deserialize(from)?;
    parse(&text).ok_or_else(|| de::Error::custom(format!("{text:?} is no RFC 3339 time")))
}

/// The same for a time that may be missing (`null`).
pub mod option {
    use super::*;

    /// For `#[serde(with)]`.
    pub fn serialize<S: Serializer>(at: &Option<Timestamp>, to: S) -> Result<S::Ok, S::Error> {
        match at {
            Some(at) => super::serialize(at, to),
            None => to.serialize_none(),
        }
    }

    /// For `#[serde(with)]`.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Timestamp>, D::Error> {
        let text = Option::<String>::deserialize(from)?;
        let parsed = text.map(|text| {
            parse(&text).ok_or_else(|| de::Error::custom(format!("{text:?} is no RFC 3339 time")))
        });
        parsed.transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_survive_text() {
        for nanos in [0, 1, 1_700_000_000_123_000_000, u64::MAX] {
            assert_eq!(parse(&format(Timestamp(nanos))), Some(Timestamp(nanos)));
        }
        assert_eq!(
            format(Timestamp(1_700_000_000_102_000_000)),
            "2023-11-14T22:13:20.102Z"
        );
        for bad in ["", "yesterday", "1969-12-31T23:59:59Z", "2026-11-23"] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }
}
