use std::sync::Arc;

use super::*;
use crate::clock::SystemClock;
use crate::guest::{Contents, CutStrategy, Guest};
use crate::ids::{Epoch, Generation, JournalId};

fn spec(steps_in_copy: u64) -> FakeSpec {
    FakeSpec {
        seed: 7,
        ram_pages: 64,
        high_ram_pages: 16,
        disk_pages: vec![24, 8],
        chunk_pages: 8,
        staging_pages: 16,
        steps_in_copy,
        contents: 0,
    }
}

fn machine(steps_in_copy: u64) -> FakeMachine {
    FakeMachine::boot(spec(steps_in_copy), [1; 16], Arc::new(SystemClock))
}

fn base(epoch: u64) -> Base {
    Base {
        journal: JournalId([9; 16]),
        generation: Generation(1),
        epoch: Epoch(epoch),
    }
}

fn verdict(state: DeviceState, image: &[Vec<u8>]) -> Verdict {
    check(&spec(0), state, |addr| {
        let start = addr.page as usize * PAGE_SIZE;
        image[usize::from(addr.region.0)][start..start + PAGE_SIZE].to_vec()
    })
    .unwrap()
}

/// Takes all chunks, applies them to an image, says which pages they were.
async fn drain(guest: &mut FakeGuest, image: &mut [Vec<u8>]) -> PageSet {
    let mut pages = PageSet::new(&guest.info().layout);
    while let Some(chunk) = guest.next_chunk().await.unwrap() {
        for (addr, bytes) in chunk.iter() {
            let start = addr.page as usize * PAGE_SIZE;
            image[usize::from(addr.region.0)][start..start + PAGE_SIZE].copy_from_slice(bytes);
            pages.set(addr);
        }
    }
    pages
}

fn empty_image(machine: &FakeMachine) -> Vec<Vec<u8>> {
    let regions = machine.layout().regions();
    regions
        .iter()
        .map(|r| vec![0; r.bytes() as usize])
        .collect()
}

#[tokio::test]
async fn rounds_then_cuts_copy_the_guest_of_one_instant() {
    let machine = machine(5);
    machine.step(500);
    let mut guest = machine.connect().unwrap();
    let mut image = empty_image(&machine);
    let round = guest.round(Contents::All).await.unwrap();
    assert_eq!(round.dirty, PageSet::full(machine.layout()));
    assert_eq!(drain(&mut guest, &mut image).await, round.dirty);
    let fuzzy = verdict(machine.device_state(), &image);
    assert!(
        !fuzzy.is_clean(),
        "a round of a running guest is no instant"
    );
    for epoch in 1..20 {
        let cut = guest.cut(CutStrategy::Auto).await.unwrap();
        machine.step(epoch * 3);
        assert_eq!(drain(&mut guest, &mut image).await, cut.dirty);
        assert!(verdict(cut.device_state, &image).is_clean());
        guest.settle(cut.id, base(epoch)).await.unwrap();
        assert_eq!(machine.base(), Some(base(epoch)));
    }
}

#[tokio::test]
async fn debts_stay_until_settled_and_a_lost_adapter_gives_them_back() {
    let machine = machine(0);
    let mut guest = machine.connect().unwrap();
    let mut image = empty_image(&machine);
    let round = guest.round(Contents::All).await.unwrap();
    drain(&mut guest, &mut image).await;
    assert_eq!(machine.unsettled().count(), machine.layout().pages());
    guest.settle(round.id, base(1)).await.unwrap();
    assert!(machine.unsettled().is_empty());

    machine.step(40);
    let first = guest.cut(CutStrategy::Auto).await.unwrap();
    drain(&mut guest, &mut image).await;
    machine.step(40);
    let second = guest.cut(CutStrategy::Auto).await.unwrap();
    drain(&mut guest, &mut image).await;
    guest.settle(first.id, base(2)).await.unwrap();
    assert_eq!(machine.unsettled(), second.dirty);

    assert!(machine.connect().is_err(), "one adapter at a time");
    drop(guest);
    let mut guest = machine.connect().unwrap();
    assert_eq!(guest.info().base, Some(base(2)));
    let again = guest.round(Contents::Dirty).await.unwrap();
    assert_eq!(again.dirty, second.dirty);
    assert_eq!(drain(&mut guest, &mut image).await, second.dirty);
}

#[tokio::test]
async fn an_abandoned_cut_says_so_and_loses_nothing() {
    let machine = machine(0);
    let mut guest = machine.connect().unwrap();
    let cut = guest.cut(CutStrategy::Auto).await.unwrap();
    let held = guest.next_chunk().await.unwrap();
    assert!(machine.abandon_handout());
    assert!(matches!(
        guest.next_chunk().await,
        Err(GuestError::Abandoned(_))
    ));
    assert!(matches!(
        guest.next_chunk().await,
        Err(GuestError::Failed(_))
    ));
    assert_eq!(guest.cut(CutStrategy::Auto).await.unwrap().dirty, cut.dirty);
    drop(held);
}

#[tokio::test]
async fn staging_is_bounded_and_freed_by_the_drop_of_chunks() {
    let machine = machine(0);
    let mut guest = machine.connect().unwrap();
    guest.round(Contents::All).await.unwrap();
    let first = guest.next_chunk().await.unwrap();
    let second = guest.next_chunk().await.unwrap();
    assert_eq!(machine.staged_pages(), 16);
    let waiting = tokio::spawn(async move { guest.next_chunk().await.map(|c| (c, guest)) });
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished(), "a third chunk is over the bound");
    drop(first);
    let (third, _guest) = waiting.await.unwrap().unwrap();
    assert!(third.is_some());
    drop((second, third));
    assert_eq!(machine.staged_pages(), 0);
}

#[tokio::test]
async fn a_killed_process_is_gone_for_everyone() {
    let machine = machine(0);
    let mut guest = machine.connect().unwrap();
    machine.step(10);
    machine.kill();
    machine.step(10);
    assert_eq!(machine.counter(), 10);
    assert!(matches!(
        guest.cut(CutStrategy::Auto).await,
        Err(GuestError::Gone(_))
    ));
    assert!(machine.connect().is_err());
}

#[test]
fn every_stale_torn_or_foreign_page_is_found() {
    let machine = machine(0);
    machine.step(1000);
    let (state, good) = (machine.device_state(), machine.image());
    assert!(verdict(state.clone(), &good).is_clean());
    let later = {
        machine.step(400);
        machine.image()
    };
    let mut changed = [0u64; 2];
    for addr in PageSet::full(machine.layout()).iter() {
        let (region, start) = (usize::from(addr.region.0), addr.page as usize * PAGE_SIZE);
        let range = start..start + PAGE_SIZE;
        if good[region][range.clone()] == later[region][range.clone()] {
            continue;
        }
        let disk = region >= 2;
        changed[usize::from(disk)] += 1;
        let mut bad = good.clone();
        bad[region][start + PAGE_SIZE / 2..start + PAGE_SIZE]
            .copy_from_slice(&later[region][start + PAGE_SIZE / 2..start + PAGE_SIZE]);
        let found = verdict(state.clone(), &bad);
        assert_eq!(found.first.map(|m| m.addr), Some(addr));
        assert_eq!(
            (found.memory_mismatches, found.disk_mismatches),
            (u64::from(!disk), u64::from(disk))
        );
    }
    assert!(changed.iter().all(|n| *n > 10), "{changed:?}");
}

#[test]
fn copies_of_one_guest_go_different_ways() {
    let first = machine(0);
    first.step(300);
    let (state, image) = (first.device_state(), first.image());
    let restored = |run| {
        FakeMachine::restore(
            spec(0),
            run,
            Arc::new(SystemClock),
            state.clone(),
            image.clone(),
        )
        .unwrap()
    };
    let second = restored([2; 16]);
    assert_eq!(second.state(), RunState::Paused);
    second.step(5);
    assert_eq!(second.counter(), 300, "a paused guest does nothing");
    second.shared.lock().state = RunState::Running;
    first.step(200);
    second.step(200);
    assert_eq!(first.counter(), second.counter());
    assert!(verdict(first.device_state(), &first.image()).is_clean());
    assert!(verdict(second.device_state(), &second.image()).is_clean());
    assert!(!verdict(second.device_state(), &first.image()).is_clean());

    let other = FakeSpec { seed: 8, ..spec(0) };
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let wrong = FakeMachine::restore(other, [3; 16], clock, state.clone(), image.clone());
    assert!(wrong.is_err());
}

#[test]
fn a_description_is_read_back_or_refused() {
    let good = spec(1);
    assert_eq!(FakeSpec::from_json(&good.to_json()), Ok(good));
    for bad in [
        FakeSpec {
            ram_pages: 0,
            ..spec(0)
        },
        FakeSpec {
            chunk_pages: 0,
            ..spec(0)
        },
        FakeSpec {
            staging_pages: 7,
            ..spec(0)
        },
    ] {
        assert!(FakeSpec::from_json(&bad.to_json()).is_err(), "{bad:?}");
    }
    assert!(FakeSpec::from_json(b"{}").is_err());
}
