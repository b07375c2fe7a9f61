//! Whether fuzzy rounds go before a cut.
//!
//! ```text
//!   harvest ── copy while the guest runs ── harvest ── copy ── pause: what changed since │ frame ends
//!             └──────── a round ────────┘
//! ```
//!
//! What a round copies and the guest leaves alone until the cut costs the guest nothing. A page that is
//! write-protected for the cut costs it a fault if it writes before the copier comes, which another thread
//! answers: little while a processor is free, and up to an eighth of the guest's speed on a busy host
//! (`lifeboat bench --only guest`). So a large set is copied in rounds, and what is left for the cut is small
//! enough to be copied in the pause. What changed again meanwhile is sent twice.
//!
//! A guest that changes the same pages all the time would have them all sent twice, and still be cut with a
//! large set: it is cut without rounds for a while, by write protection.

/// Pages: a cut copies that many in the pause, in half a millisecond.
pub const ROUND_PAGES: u64 = 512;

/// A round is followed by another while the dirty set shrinks to this share of the last one.
const SHRINKS: f64 = 0.7;
/// A round has not helped if the cut has more than this share of its pages.
const USELESS_SHARE: f64 = 0.5;
/// Cuts without a round after one that did not help.
const WITHOUT: u32 = 16;

/// See the module.
pub(crate) struct Rounds {
    pages: u64,
    many: bool,
    without: u32,
}

impl Rounds {
    /// For sets of more than so many pages. Nothing is known of the first one: it may be large.
    pub fn new(pages: u64) -> Self {
        Self {
            pages,
            many: true,
            without: 0,
        }
    }

    /// More changes than can be known, at one time.
    pub fn expect_many(&mut self) {
        (self.many, self.without) = (true, 0);
    }

    /// True if a round goes before the next cut.
    pub fn go_first(&self) -> bool {
        self.many && self.without == 0
    }

    /// True if another round goes after one that found so many pages, and the one before it, if any, so
    /// many: the next one is likely to find less.
    pub fn go_on(&self, pages: u64, before: Option<u64>) -> bool {
        let shrinks = before.is_none_or(|before| pages as f64 <= before as f64 * SHRINKS);
        !self.is_few(pages) && shrinks
    }

    fn is_few(&self, pages: u64) -> bool {
        pages <= self.pages
    }

    /// A cut was made that found so many pages, after rounds, if there were any, of which none found more than
    /// so many.
    pub fn cut(&mut self, round: Option<u64>, cut: u64) {
        self.many = !self.is_few(round.unwrap_or(0).max(cut));
        let large = round.filter(|round| !self.is_few(*round));
        self.without = match large {
            Some(round) if cut as f64 > round as f64 * USELESS_SHARE => WITHOUT,
            _ => self.without.saturating_sub(1),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cuts that follow each other: what changed in each interval, and how much of it again during a round.
    fn rounds(of: &mut Rounds, cuts: usize, changes: u64, again: u64) -> usize {
        let mut made = 0;
        for _ in 0..cuts {
            match of.go_first() {
                true => {
                    made += 1;
                    of.cut(Some(changes), again);
                }
                false => of.cut(None, changes),
            }
        }
        made
    }

    #[test]
    fn large_sets_have_rounds_for_as_long_as_they_help() {
        let mut of = Rounds::new(500);
        assert!(of.go_first(), "what the first one finds is not known");
        // After each cut with a round little is left for it, and the next set is as large all the same.
        assert_eq!(rounds(&mut of, 100, 10_000, 300), 100);
        // Small sets have one too many.
        assert_eq!(rounds(&mut of, 100, 400, 100), 1);
        // The first large one is not foreseen.
        assert_eq!(rounds(&mut of, 100, 600, 100), 99);
        // All of it changes again: one of each seventeen.
        assert_eq!(rounds(&mut of, 170, 10_000, 9_000), 10);
        // It is seen before long that rounds help now.
        assert!(rounds(&mut of, 100, 10_000, 300) >= 100 - WITHOUT as usize);
        assert_eq!(rounds(&mut of, 10, 10_000, 9_000), 1);
        assert!(!of.go_first());
        of.expect_many();
        assert!(of.go_first());
    }

    #[test]
    fn rounds_go_on_while_there_is_less_each_time() {
        let of = Rounds::new(500);
        for (pages, before, more) in [
            (10_000, None, true),
            (500, None, false),
            (7000, Some(10_000), true),
            (7001, Some(10_000), false),
            (500, Some(10_000), false),
        ] {
            assert_eq!(of.go_on(pages, before), more, "{pages} after {before:?}");
        }
    }
}
