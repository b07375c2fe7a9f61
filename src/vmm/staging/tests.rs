use proptest::prelude::*;
use std::collections::BTreeSet;

use super::*;

fn area(slots: u32, stall: Duration) -> Arc<Staging> {
    Arc::new(Staging::new(StagingOptions { slots, stall }).unwrap())
}

const LONG: Duration = Duration::from_secs(600);

proptest! {
    /// Against a plain set: whatever is taken, lent, dropped and released (also wrongly), a slot has
    /// one owner and none is lost.
    #[test]
    fn slots_have_one_owner(steps in prop::collection::vec((0u8..4, 0u32..8), 0..60)) {
        let staging = area(8, Duration::ZERO);
        let running = AtomicBool::new(false);
        let (mut filling, mut lent) = (Vec::new(), BTreeSet::new());
        for (what, number) in steps {
            match what {
                0 => match staging.acquire(Urgency::Urgent, &running) {
                    Ok(slot) => {
                        prop_assert!(!lent.contains(&slot.index));
                        filling.push(slot);
                    }
                    Err(error) => {
                        prop_assert_eq!(error, NoSlot::Stalled);
                        prop_assert_eq!(filling.len() + lent.len(), 8);
                    }
                },
                1 => if let Some(slot) = filling.pop() { prop_assert!(lent.insert(slot.lend())); },
                2 => drop(filling.pop()),
                _ => prop_assert_eq!(staging.release(number).is_ok(), lent.remove(&number)),
            }
            prop_assert_eq!(staging.lock().free.len(), 8 - filling.len() - lent.len());
        }
    }
}

#[test]
fn the_reader_sees_what_was_written() {
    let staging = area(4, LONG);
    let view = StagingView::new(staging.file().try_clone().unwrap(), 4).unwrap();
    let mut slot = staging
        .acquire(Urgency::Bulk, &AtomicBool::new(false))
        .unwrap();
    slot.pages_mut(3, 2).fill(7);
    let index = slot.lend();
    let bytes = view.slot(index, 6);
    assert!(bytes[..3 * PAGE_SIZE].iter().all(|b| *b == 0));
    assert!(bytes[3 * PAGE_SIZE..5 * PAGE_SIZE].iter().all(|b| *b == 7));
    assert!(bytes[5 * PAGE_SIZE..].iter().all(|b| *b == 0));
}

#[test]
fn bulk_users_leave_a_reserve_and_an_urgent_user_stalls_in_the_end() {
    let staging = area(16, Duration::from_millis(20));
    let running = AtomicBool::new(false);
    let bulk: Vec<_> = (0..14)
        .map(|_| staging.acquire(Urgency::Bulk, &running).unwrap())
        .collect();
    let urgent: Vec<_> = (0..2)
        .map(|_| staging.acquire(Urgency::Urgent, &running).unwrap())
        .collect();
    assert_eq!(
        staging.acquire(Urgency::Urgent, &running).err(),
        Some(NoSlot::Stalled)
    );
    drop((bulk, urgent));
    staging.acquire(Urgency::Urgent, &running).unwrap();
}

#[test]
fn waiting_ends_by_release_or_by_cancel() {
    let staging = area(4, LONG);
    let cancelled = Arc::new(AtomicBool::new(false));
    let lent: Vec<u32> = (0..4)
        .map(|_| staging.acquire(Urgency::Urgent, &cancelled).unwrap().lend())
        .collect();
    let wait = |urgency| {
        let (staging, cancelled) = (staging.clone(), cancelled.clone());
        std::thread::spawn(move || staging.acquire(urgency, &cancelled).map(Slot::lend))
    };
    let urgent = wait(Urgency::Urgent);
    staging.release(lent[2]).unwrap();
    assert_eq!(urgent.join().unwrap(), Ok(2));
    let (bulk, urgent) = (wait(Urgency::Bulk), wait(Urgency::Urgent));
    cancelled.store(true, Ordering::SeqCst);
    staging.wake();
    assert_eq!(bulk.join().unwrap(), Err(NoSlot::Cancelled));
    assert_eq!(urgent.join().unwrap(), Err(NoSlot::Cancelled));
}

#[test]
fn a_file_that_could_shrink_is_refused() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(4 * SLOT_BYTES as u64).unwrap();
    assert!(StagingView::new(file.into(), 4).is_err());
    let (sealed, _) = sealed_memory_file("short", SLOT_BYTES).unwrap();
    assert!(StagingView::new(sealed, 4).is_err());
}
