//! What it costs to copy pages inside the pause: which cuts are better made that way.
//!
//! A page that is copied in the pause costs the guest one copy. A page that is write-protected costs it
//! nothing if the copier comes first, and else a fault, which is as long as some twenty copies where KVM is
//! itself virtualised. So small sets are copied in the pause as long as that stays short, and how many
//! pages are a small set depends on the host: it is measured with each such cut. (Who can copy the larger
//! part before the pause should: see `primary::rounds`.)

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Copying takes at most this much of the pause.
const COPYING_MAX: Duration = Duration::from_micros(500);
/// Nanoseconds for a page until something was measured.
const FIRST_PAGE_NS: u64 = 600;
/// Smaller sets say nothing: their time is that of the call.
const MEASURED_PAGES_MIN: u64 = 64;
/// A cut that was interrupted, or was lucky, changes the estimate by this share at most.
const WEIGHT: u64 = 4;
/// Most pages, however fast they are: 16 MiB.
pub const STOP_AND_COPY_PAGES_MAX: u64 = 4096;

/// The measured time to copy a page, in nanoseconds.
pub struct CopyCost {
    page_ns: AtomicU64,
}

impl Default for CopyCost {
    fn default() -> Self {
        Self {
            page_ns: AtomicU64::new(FIRST_PAGE_NS),
        }
    }
}

impl CopyCost {
    /// Takes a measurement into account. A pause that was interrupted counts as twice the estimate at most.
    pub fn note(&self, pages: u64, took: Duration) {
        if pages < MEASURED_PAGES_MIN {
            return;
        }
        let before = self.page_ns.load(Ordering::Relaxed);
        let page_ns = (took.as_nanos() as u64 / pages).clamp(1, 2 * before);
        let after = (before * (WEIGHT - 1) + page_ns).div_ceil(WEIGHT);
        self.page_ns.store(after, Ordering::Relaxed);
    }

    /// So many pages are a small set.
    pub fn small(&self) -> u64 {
        let page_ns = self.page_ns.load(Ordering::Relaxed);
        (COPYING_MAX.as_nanos() as u64 / page_ns).min(STOP_AND_COPY_PAGES_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_set_is_what_this_host_copies_quickly() {
        let cost = CopyCost::default();
        assert_eq!(cost.small(), 833);
        for (page_ns, small) in [(1000, 500), (100, 5000), (250, 2000)] {
            for _ in 0..64 {
                cost.note(1000, Duration::from_nanos(1000 * page_ns));
            }
            let off = cost.small().abs_diff(small.min(STOP_AND_COPY_PAGES_MAX));
            assert!(off <= small / 50, "{page_ns}: {}", cost.small());
        }
    }

    #[test]
    fn one_measurement_changes_little() {
        let cost = CopyCost::default();
        cost.note(1000, Duration::from_secs(1));
        assert!(cost.small() > 600, "{}", cost.small());
        cost.note(1, Duration::from_secs(1));
        cost.note(0, Duration::ZERO);
        assert!(cost.small() > 600, "{}", cost.small());
        for _ in 0..1000 {
            cost.note(1000, Duration::ZERO);
        }
        assert_eq!(cost.small(), STOP_AND_COPY_PAGES_MAX);
        for _ in 0..1000 {
            cost.note(u64::MAX, Duration::MAX);
        }
        assert_eq!(cost.small(), STOP_AND_COPY_PAGES_MAX);
    }
}
