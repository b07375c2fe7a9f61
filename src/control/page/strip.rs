//! The exposure of a guest over the last hour, as a strip of bars.
//!
//! ```text
//!            .                    a bar is half a minute; its height is the worst exposure in it,
//!    - - - - # - - - - - target   in units of the target, cut off at twice the target
//!    _._.__._#_.___.._._
//!    1 h ago          now
//! ```
//!
//! Half minutes of which nothing is known (the daemon did not run, there was no point) stay empty.

use std::collections::VecDeque;
use std::fmt::Write;

use crate::clock::Timestamp;

/// Bars of a strip.
const BARS: u64 = 120;
/// What a bar stands for.
const BAR_NS: u64 = 30_000_000_000;
/// Exposures above this many targets are drawn as this.
const TOP: f64 = 2.0;
/// Above this share of the target a bar is a warning.
const NEAR: f64 = 0.75;

/// The worst use of the target in each of the last half minutes.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Strip {
    /// Number of the half minute since 1970, ascending, and the worst share of the target in it.
    bars: VecDeque<(u64, f64)>,
}

impl Strip {
    /// The exposure was this share of the target.
    pub(super) fn saw(&mut self, now: Timestamp, share: f64) {
        let bar = now.0 / BAR_NS;
        match self.bars.back_mut() {
            Some((last, worst)) if *last == bar => *worst = worst.max(share),
            // A clock that was set back: what it says of later is not true.
            Some((last, _)) if *last > bar => {
                self.bars.clear();
                self.bars.push_back((bar, share));
            }
            _ => self.bars.push_back((bar, share)),
        }
        self.forget(now);
    }

    /// Drops what is older than the strip is long.
    pub(super) fn forget(&mut self, now: Timestamp) {
        let first = (now.0 / BAR_NS).saturating_sub(BARS - 1);
        while self.bars.front().is_some_and(|(bar, _)| *bar < first) {
            self.bars.pop_front();
        }
    }

    /// True if nothing is known of the last hour.
    pub(super) fn is_empty(&self) -> bool {
        self.bars.is_empty()
    }

    /// Share of the known half minutes that were within the target.
    pub(super) fn within(&self) -> Option<f64> {
        let good = self.bars.iter().filter(|(_, share)| *share <= 1.0).count();
        (!self.bars.is_empty()).then(|| good as f64 / self.bars.len() as f64)
    }

    /// The picture.
    pub(super) fn svg(&self, now: Timestamp) -> String {
        let first = (now.0 / BAR_NS).saturating_sub(BARS - 1);
        let mut svg = format!(
            "<svg viewBox=\"0 0 {} 100\" preserveAspectRatio=\"none\" role=\"img\" \
             aria-label=\"exposure against target over the last hour\">\
             <rect class=\"fill\" x=\"0\" y=\"99\" width=\"{}\" height=\"1\"/>",
            BARS * 10,
            BARS * 10
        );
        for (bar, share) in &self.bars {
            let x = bar.saturating_sub(first) * 10;
            let height = (share.clamp(0.0, TOP) / TOP * 100.0).max(3.0);
            let tone = tone(*share);
            let y = 100.0 - height;
            // Writing to a string cannot fail.
            let _ = write!(
                svg,
                "<rect class=\"{tone}\" fill=\"currentColor\" x=\"{x}\" y=\"{y:.0}\" width=\"8\" height=\"{height:.0}\"/>"
            );
        }
        svg += &format!(
            "<line class=\"soft\" x1=\"0\" x2=\"{}\" y1=\"50\" y2=\"50\" stroke=\"currentColor\" \
             stroke-dasharray=\"12 8\" stroke-width=\"1\" vector-effect=\"non-scaling-stroke\"/></svg>",
            BARS * 10
        );
        svg
    }
}

/// How good a share of the target is, as a class of the style sheet.
pub(super) fn tone(share: f64) -> &'static str {
    if share > 1.0 {
        "bad"
    } else if share > NEAR {
        "warn"
    } else {
        "good"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(bar: u64) -> Timestamp {
        Timestamp((1_000 + bar) * BAR_NS)
    }

    #[test]
    fn a_strip_keeps_the_worst_of_each_half_minute_of_one_hour() {
        let mut strip = Strip::default();
        assert_eq!(strip.within(), None);
        for (bar, share) in [(0, 0.1), (1, 0.2), (1, 1.5), (1, 0.3), (2, 0.8)] {
            strip.saw(at(bar), share);
        }
        assert_eq!(strip.within(), Some(2.0 / 3.0));
        let svg = strip.svg(at(2));
        for class in ["\"good\"", "\"bad\"", "\"warn\""] {
            assert_eq!(svg.matches(class).count(), 1, "{class} in {svg}");
        }
        strip.forget(at(BARS));
        assert_eq!(strip.bars.len(), 2);
        for bar in 0..1_000 {
            strip.saw(at(bar), 0.5);
        }
        assert_eq!(strip.bars.len() as u64, BARS);
        strip.forget(at(5_000));
        assert!(strip.is_empty());
    }

    #[test]
    fn bars_stay_within_the_picture() {
        let mut strip = Strip::default();
        for (bar, share) in [(0, f64::INFINITY), (1, -1.0), (2, f64::NAN), (3, 1e9)] {
            strip.saw(at(bar), share);
        }
        // A clock that was set back begins anew.
        strip.saw(at(1), 0.5);
        assert_eq!(strip.bars.len(), 1);
        let svg = strip.svg(at(1));
        assert!(svg.contains("x=\"1190\""), "{svg}");
    }
}
