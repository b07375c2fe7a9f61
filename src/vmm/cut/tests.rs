//! The engine on plain memory: writers that never stop, a reader, and a check of every image.
//!
//! The guest ([`guest::TestGuest`]) writes a growing counter into all words of a page, and knows for
//! each page which counter it wrote last. A cut's device state carries that knowledge as of the
//! pause, so an image is right if and only if every word of every page is what it says: a lost dirty
//! bit, a torn page, a page of a later instant all show. That the check does see them is shown by
//! guests with a fault built in.

mod guest;
mod reader;

use std::time::Duration;

use guest::{Fault, TestGuest};
use reader::Reader;

use super::*;
use crate::guest::{Base, Contents, CutStrategy};
use crate::ids::{Epoch, Generation, JournalId};
use crate::vmm::staging::StagingOptions;

const STRATEGIES: [CutStrategy; 2] = [CutStrategy::StopAndCopy, CutStrategy::CopyOnWrite];

/// Longer than any test.
const LONG: Duration = Duration::from_secs(3600);

fn base(epoch: u64) -> Base {
    Base {
        journal: JournalId([7; 16]),
        generation: Generation(1),
        epoch: Epoch(epoch),
    }
}

fn small() -> StagingOptions {
    StagingOptions {
        slots: 16,
        // Only a test of the stall may see one.
        stall: Duration::from_secs(600),
    }
}

#[test]
fn thousands_of_cuts_under_concurrent_writers_are_exact() {
    let guest = TestGuest::start(3, Fault::None);
    let engine = CutEngine::new(guest.target()).unwrap();
    let mut reader = Reader::attach(&engine, &guest, small());
    for number in 0..3000u64 {
        match number % 7 {
            5 => reader.round(&engine, Contents::Dirty).unwrap(),
            6 if number % 5 == 0 => reader.round(&engine, Contents::All).unwrap(),
            _ => {
                let strategy = STRATEGIES[(number / 2 % 2) as usize];
                let cut = reader.cut(&engine, strategy).unwrap();
                assert_eq!(cut.strategy, strategy);
                reader
                    .check(&cut)
                    .unwrap_or_else(|error| panic!("cut {number}: {error}"));
                if number % 3 == 0 {
                    engine.settle(cut.id, base(number)).unwrap();
                }
            }
        }
        if number % 11 == 0 {
            engine.give_back();
        }
    }
    assert!(guest.writes() > 3000, "the writers were not running");
}

#[test]
fn a_reader_that_is_slow_slows_the_guest_but_every_image_is_exact() {
    let guest = TestGuest::start(2, Fault::None);
    let engine = CutEngine::new(guest.target()).unwrap();
    let mut reader = Reader::attach(&engine, &guest, small());
    let mut pulled = 0;
    for _ in 0..100 {
        let before = guest.writes();
        // Takes nothing until the guest has written on, through write faults and the disk's hook.
        let cut = engine.cut(CutStrategy::CopyOnWrite).unwrap();
        guest.wait_for_writes(before + 50);
        pulled += reader.take(&cut.dirty).unwrap();
        reader.check(&cut).unwrap();
    }
    assert!(pulled > 0, "no page was pulled by a writer");
}

#[test]
fn a_reader_that_stalls_loses_the_cut_and_nothing_else() {
    let guest = TestGuest::start(2, Fault::None);
    let engine = CutEngine::new(guest.target()).unwrap();
    let stall = StagingOptions {
        slots: 4,
        stall: Duration::from_millis(5),
    };
    let mut reader = Reader::attach(&engine, &guest, stall);
    for _ in 0..30 {
        let cut = engine.cut(CutStrategy::CopyOnWrite).unwrap();
        assert!(matches!(
            engine.cut(CutStrategy::Auto),
            Err(CutError::Busy(id)) if id == cut.id
        ));
        assert!(engine.settle(cut.id, base(1)).is_err());
        let why = reader.wait_abandoned(cut.id);
        assert!(why.contains("stalled"), "{why}");
        let before = guest.writes();
        guest.wait_for_writes(before + 2000);
        // The reader recovers; a patient one, so that only it decides.
        reader = Reader::continue_with(reader, &engine, &guest, small());
        let cut = reader.cut(&engine, CutStrategy::CopyOnWrite).unwrap();
        reader.check(&cut).unwrap();
        reader = Reader::continue_with(reader, &engine, &guest, stall);
    }
}

#[test]
fn a_reader_that_dies_in_the_middle_gives_all_back() {
    let guest = TestGuest::start(2, Fault::None);
    let engine = CutEngine::new(guest.target()).unwrap();
    let mut reader = Reader::attach(&engine, &guest, small());
    for number in 0..200 {
        let strategy = STRATEGIES[number % 2];
        engine.cut(strategy).unwrap();
        reader.take_some(number % 5);
        engine.detach(reader.session());
        assert!(matches!(engine.cut(strategy), Err(CutError::NoSession)));
        let before = guest.writes();
        guest.wait_for_writes(before + 20);
        reader = Reader::continue_with(reader, &engine, &guest, small());
        let cut = reader.cut(&engine, strategy).unwrap();
        reader.check(&cut).unwrap();
    }
}

#[test]
fn until_something_was_settled_everything_is_dirty() {
    let guest = TestGuest::start(1, Fault::None);
    let engine = CutEngine::new(guest.target()).unwrap();
    let all = guest.target().layout().pages();
    let reader = Reader::attach(&engine, &guest, small());
    let round = engine.round(Contents::Dirty).unwrap();
    assert_eq!(round.dirty.count(), all);
    engine.give_back();
    assert_eq!(engine.base(), None);
    let mut reader = Reader::continue_with(reader, &engine, &guest, small());
    let cut = reader.cut(&engine, CutStrategy::Auto).unwrap();
    assert_eq!(
        (cut.dirty.count(), cut.strategy),
        (all, CutStrategy::CopyOnWrite)
    );
    reader.check(&cut).unwrap();
    engine.settle(cut.id, base(3)).unwrap();
    assert_eq!(engine.base(), Some(base(3)));
    engine.give_back();
    guest.stop_writing();
    let cut = reader.cut(&engine, CutStrategy::Auto).unwrap();
    assert!(cut.dirty.count() < all);
    reader.check(&cut).unwrap();
    engine.settle(cut.id, base(4)).unwrap();
    // Nothing is written any more: nothing is dirty, and a small set is copied in the pause.
    let cut = reader.cut(&engine, CutStrategy::Auto).unwrap();
    assert_eq!(
        (cut.dirty.count(), cut.strategy),
        (0, CutStrategy::StopAndCopy)
    );
}

#[test]
fn a_page_that_is_touched_before_the_pause_and_written_after_it_is_exact() {
    let guest = TestGuest::start(1, Fault::None);
    guest.stop_writing();
    let engine = CutEngine::new(guest.target()).unwrap();
    let mut reader = Reader::attach(&engine, &guest, small());
    guest.set_fault(Fault::WritesAroundThePause);
    for _ in 0..20 {
        // The copier begins after the write.
        let cut = reader.cut(&engine, CutStrategy::CopyOnWrite).unwrap();
        reader.check(&cut).unwrap();
    }
}

#[test]
fn a_paused_guest_stays_paused_over_a_cut() {
    let guest = TestGuest::start(2, Fault::None);
    let engine = CutEngine::new(guest.target()).unwrap();
    let mut reader = Reader::attach(&engine, &guest, small());
    guest.target().pause().unwrap();
    for strategy in STRATEGIES {
        let cut = reader.cut(&engine, strategy).unwrap();
        assert_eq!(cut.pause, Duration::ZERO);
        assert_eq!(guest.target().run_state(), RunState::Paused);
        reader.check(&cut).unwrap();
    }
}

#[test]
fn a_held_guest_stands_still_until_its_release_and_its_cut_is_exact() {
    let guest = TestGuest::start(2, Fault::None);
    let engine = CutEngine::new(guest.target()).unwrap();
    let mut reader = Reader::attach(&engine, &guest, small());
    for number in 0..40 {
        let strategy = STRATEGIES[number % 2];
        let cut = engine.cut_held(strategy, LONG).unwrap();
        assert_eq!(guest.target().run_state(), RunState::Paused);
        assert!(engine.release(), "it was held until now");
        assert_eq!(guest.target().run_state(), RunState::Running);
        assert!(!engine.release(), "it is held no more");
        reader.take(&cut.dirty).unwrap();
        reader.check(&cut).unwrap();
        // One that stands still for another reason stays so.
        guest.target().pause().unwrap();
        let refused = engine.cut_held(strategy, LONG).unwrap_err();
        assert!(matches!(refused, CutError::State(RunState::Paused)));
        assert!(!engine.release());
        assert_eq!(guest.target().run_state(), RunState::Paused);
        guest.target().resume();
    }
}

#[test]
fn a_held_guest_runs_when_time_is_up_or_its_reader_is_gone() {
    let guest = TestGuest::start(1, Fault::None);
    let engine = CutEngine::new(guest.target()).unwrap();
    let mut reader = Reader::attach(&engine, &guest, small());
    let runs = || {
        while guest.target().run_state() != RunState::Running {
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    // Time is up: whoever comes later learns that it was not held all the time.
    let cut = engine.cut_held(CutStrategy::CopyOnWrite, Duration::from_millis(20));
    runs();
    assert!(!engine.release());
    let cut = cut.unwrap();
    reader.take(&cut.dirty).unwrap();
    reader.check(&cut).unwrap();
    // The clock of an earlier hold ends no later one.
    engine
        .cut_held(CutStrategy::Auto, Duration::from_millis(30))
        .unwrap();
    assert!(engine.release());
    engine.give_back();
    engine.cut_held(CutStrategy::Auto, LONG).unwrap();
    std::thread::sleep(Duration::from_millis(60));
    assert!(engine.release());
    engine.give_back();
    // Paused for good meanwhile: no clock lets it run.
    engine
        .cut_held(CutStrategy::Auto, Duration::from_millis(20))
        .unwrap();
    engine.forget_hold();
    std::thread::sleep(Duration::from_millis(60));
    assert_eq!(guest.target().run_state(), RunState::Paused);
    guest.target().resume();
    engine.give_back();
    // A cut that fails holds nobody.
    guest.set_fault(Fault::SaveFails);
    engine.cut_held(CutStrategy::Auto, LONG).unwrap_err();
    runs();
    guest.set_fault(Fault::None);
    // The reader is gone.
    engine.cut_held(CutStrategy::Auto, LONG).unwrap();
    engine.detach(reader.session());
    runs();
}

#[test]
fn a_failing_target_loses_no_bit() {
    for fault in [Fault::SaveFails, Fault::HarvestFails, Fault::DiskReadFails] {
        let guest = TestGuest::start(2, Fault::None);
        let engine = CutEngine::new(guest.target()).unwrap();
        let mut reader = Reader::attach(&engine, &guest, small());
        for number in 0..40 {
            guest.set_fault(fault);
            let strategy = STRATEGIES[number % 2];
            match engine.cut(strategy) {
                Err(error) => assert!(error.to_string().contains("nothing is lost"), "{error}"),
                Ok(cut) => {
                    assert_eq!(fault, Fault::DiskReadFails);
                    match reader.take(&cut.dirty) {
                        Err(why) => assert!(why.contains("cannot be read"), "{why}"),
                        Ok(_) => assert!(cut.dirty.region(RegionId(2)).is_empty()),
                    }
                }
            }
            guest.set_fault(Fault::None);
            let before = guest.writes();
            guest.wait_for_writes(before + 20);
            let cut = reader.cut(&engine, strategy).unwrap();
            reader.check(&cut).unwrap();
        }
    }
}

/// The negative controls: guests that break one rule each. The check of the images must see it.
#[test]
fn the_check_catches_a_lost_bit_a_late_disk_write_and_a_guest_that_is_not_stopped() {
    for fault in [
        Fault::LosesDirtyBits,
        Fault::SkipsDiskHook,
        Fault::DoesNotStop,
    ] {
        let guest = TestGuest::start(2, fault);
        let engine = CutEngine::new(guest.target()).unwrap();
        // Room for all that the writers touch before the reader takes: they must not wait for it.
        let roomy = StagingOptions {
            slots: 4096,
            ..small()
        };
        let mut reader = Reader::attach(&engine, &guest, roomy);
        let caught = (0..2000).any(|number| {
            let cut = engine.cut(STRATEGIES[number % 2]).unwrap();
            let before = guest.writes();
            guest.wait_for_writes(before + 10);
            reader.take(&cut.dirty).unwrap();
            reader.check(&cut).is_err()
        });
        assert!(caught, "{fault:?} was not seen");
    }
}
