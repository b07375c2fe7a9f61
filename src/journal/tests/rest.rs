//! What a first copy leaves that was cut off: it is kept, found again, used as far as it is sound, and
//! given up when it must be.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::world::{Image, PAGES, Start, World, guest, layout, mutate, write};
use crate::frame::{PartHeader, PartView};
use crate::ids::{Epoch, Generation, JournalId};
use crate::journal::reading::read_part;
use crate::journal::rest::Rest;
use crate::journal::segment::Loc;
use crate::journal::store::{Access, Store, StoreFile};
use crate::journal::{Faults, JournalError, Laid};
use crate::page::PAGE_SIZE;

/// The guest changes almost everywhere, in a way that does not compress; parts of the frame that says so:
/// its first one in the journal.
fn first_copy(world: &mut World) -> Vec<Vec<u8>> {
    let old = world.image.clone();
    for page in world.image.0.chunks_exact_mut(PAGE_SIZE) {
        let words = match world.random.below(4) {
            0 => 3,
            _ => page.len() / 8,
        };
        for word in page.chunks_exact_mut(8).take(words) {
            word.copy_from_slice(&world.random.next().to_le_bytes());
        }
    }
    let journal = world.journal.as_ref().unwrap();
    world.epoch = journal.highest_epoch().max(world.epoch).next();
    let start = Start {
        journal: journal.id(),
        generation: journal.generation(),
        epoch: world.epoch,
        prev: world.newest,
    };
    let (all, full) = ((0..PAGES).collect::<Vec<_>>(), world.newest.is_none());
    world.primary.forget();
    let parts = world
        .primary
        .frame(start, &old, &world.image, &all, full, world.now);
    assert!(parts.len() > 2 || !full, "{} parts", parts.len());
    assert!(parts.len() > 1);
    let image = Rc::new(world.image.clone());
    world.images.insert(world.epoch, image);
    parts
}

/// The image with these parts laid over it.
fn over(image: &Image, parts: &[Vec<u8>]) -> Image {
    let mut image = image.clone();
    for part in parts {
        PartView::verify(part).unwrap().apply(&mut image).unwrap();
    }
    image
}

fn send(world: &mut World, parts: &[Vec<u8>]) -> Result<(), JournalError> {
    parts.iter().try_for_each(|p| write(world.journal(), p))
}

/// Lays the rest; the ground is then to be `expected`.
fn lay(world: &mut World, expected: &Image) -> Result<Laid, JournalError> {
    let mut laying = world.journal().begin_rest(&layout())?;
    let mut laid = Laid::default();
    while world.journal().lay_rest(&mut laying, &mut laid)? {}
    let epoch = world.journal().highest_epoch().max(world.epoch).next();
    world.images.insert(epoch, Rc::new(expected.clone()));
    let root = world.journal().finish_ground(laying, epoch)?;
    assert_eq!(root, expected.root());
    world.resync();
    Ok(laid)
}

fn shows(world: &mut World, expected: &Image) {
    let mut image = Image::new();
    let ground = world.journal().ground_image().unwrap();
    ground.replay(&mut image).unwrap();
    assert!(image == *expected);
}

/// Nothing of it counts as a point, now or after a restart.
fn is_no_point(world: &mut World) {
    assert_eq!(world.journal().newest(), None);
    assert!(world.journal().points().is_empty());
    let report = world.journal().check(&mut |_| {}).unwrap();
    assert_eq!(report.findings, vec![]);
}

fn live(world: &mut World) -> u32 {
    world.journal().segments.usage().live
}

fn places(world: &mut World) -> Vec<Loc> {
    world.journal().rest.as_ref().unwrap().parts.clone()
}

/// How many of its parts can be used: a crash may have torn what was not synced.
fn sound(world: &mut World) -> usize {
    let places = places(world);
    let segments = &world.journal().segments;
    let is_sound = |loc: &&Loc| {
        let mut bytes = Vec::new();
        read_part(segments, **loc, &mut bytes).is_ok() && PartView::verify(&bytes).is_ok()
    };
    places.iter().take_while(is_sound).count()
}

#[test]
fn what_had_arrived_stays_and_becomes_ground() {
    for restart in [false, true] {
        let mut world = World::new(1);
        let parts = first_copy(&mut world);
        let some = &parts[..2];
        send(&mut world, some).unwrap();
        world.journal().cut_off();
        if restart {
            // The disk keeps what it has.
            let report = world.open().unwrap();
            assert_eq!(report.rest, world.journal().rest());
            assert_eq!(report.points, 0);
        }
        is_no_point(&mut world);
        let kept = world.journal().rest().unwrap();
        let bytes = some.iter().map(|part| part.len() as u64).sum();
        assert_eq!((kept.parts, kept.bytes), (2, bytes));
        assert!(world.journal().ground().is_none());
        assert!(live(&mut world) > 0, "its segments stay");

        let expected = over(&Image::new(), some);
        let laid = lay(&mut world, &expected).unwrap();
        assert_eq!((laid.parts, laid.bytes), (2, bytes));
        assert!(laid.pages > 100);
        shows(&mut world, &expected);
        is_no_point(&mut world);
        assert_eq!((world.journal().rest(), live(&mut world)), (None, 0));

        // The next session sends what differs, and is cut off too.
        let parts = first_copy(&mut world);
        send(&mut world, &parts[..1]).unwrap();
        world.journal().cut_off();
        if restart {
            world.open().unwrap();
        }
        let expected = over(&expected, &parts[..1]);
        assert_eq!(lay(&mut world, &expected).unwrap().parts, 1);
        shows(&mut world, &expected);
        world.crash(false);
        shows(&mut world, &expected);
        for _ in 0..20 {
            world.commit(9, false).unwrap();
            while world.maintain().unwrap() {}
        }
        world.verify();
        world.crash(false);
        world.verify();
    }
}

#[test]
fn a_frame_that_is_no_first_copy_leaves_nothing() {
    let mut world = World::new(2);
    world.commit(5, true).unwrap();
    let parts = world.next_frame(300, true);
    assert!(parts.len() > 1);
    send(&mut world, &parts[..1]).unwrap();
    let before = live(&mut world);
    world.journal().cut_off();
    assert_eq!(world.journal().rest(), None);
    assert!(live(&mut world) <= before);
    world.crash(false);
    assert_eq!(world.journal().rest(), None);
    assert!(world.journal().begin_rest(&layout()).is_err());
    world.verify();

    // Nor does one that was found to be wrong.
    let mut world = World::new(2);
    let parts = first_copy(&mut world);
    send(&mut world, &parts[..2]).unwrap();
    world.journal().abort();
    assert_eq!((world.journal().rest(), live(&mut world)), (None, 0));
}

#[test]
fn it_is_given_up_for_whatever_comes_instead() {
    type Instead = fn(&mut World);
    let ways: [(&str, Instead); 4] = [
        ("another frame", |world| {
            world.resync();
            let parts = first_copy(world);
            send(world, &parts[..1]).unwrap();
            world.journal().abort();
        }),
        ("another owner", |world| {
            world.journal().raise_generation(Generation(2)).unwrap();
        }),
        ("a seed", |world| {
            let mut image = Image::new();
            mutate(&mut image, &mut world.random, 60);
            world.lay(&image).unwrap();
        }),
        ("a full disk", |world| {
            world.options.min_free_bytes = 1 << 51;
            world.open().unwrap();
            assert!(world.journal().rest().is_some());
            world.maintain().unwrap();
            world.options.min_free_bytes = 0;
        }),
    ];
    for (what, instead) in ways {
        let mut world = World::new(3);
        let parts = first_copy(&mut world);
        send(&mut world, &parts[..2]).unwrap();
        world.journal().cut_off();
        assert!(world.journal().rest().is_some());
        instead(&mut world);
        assert_eq!(world.journal().rest(), None, "{what}");
        assert_eq!(live(&mut world), 0, "{what}");
        if what == "another owner" || what == "a seed" {
            // Its parts lie there still.
            world.open().unwrap();
            assert_eq!(world.journal().rest(), None, "{what}");
        }
        world.open().unwrap();
        world.resync();
        world.commit(5, false).unwrap();
        assert_eq!(world.journal().rest(), None, "{what}");
        world.verify();
    }
}

#[test]
fn no_room_for_ground_gives_it_up() {
    let mut world = World::new(4);
    let parts = first_copy(&mut world);
    send(&mut world, &parts[..2]).unwrap();
    world.journal().cut_off();
    world.options.min_free_bytes = 1 << 51;
    world.open().unwrap();
    let laid = lay(&mut world, &Image::new()).unwrap();
    assert_eq!(laid, Laid::default());
    assert_eq!((world.journal().rest(), live(&mut world)), (None, 0));
    shows(&mut world, &Image::new());
}

/// What a session had laid when it ended, or when the rest was given up, is as good as it is.
#[test]
fn laying_ends_in_the_middle() {
    for over_ground in [false, true] {
        for begin_again in [false, true] {
            let mut world = World::new(10);
            let mut before = Image::new();
            if over_ground {
                mutate(&mut before, &mut world.random, 100);
                world.lay(&before).unwrap();
            }
            let mut parts = first_copy(&mut world);
            parts.pop();
            send(&mut world, &parts).unwrap();
            world.journal().cut_off();
            let mut laying = world.journal().begin_rest(&layout()).unwrap();
            let mut laid = Laid::default();
            assert!(world.journal().lay_rest(&mut laying, &mut laid).unwrap());
            assert_eq!(world.journal().ground(), None);
            assert!(world.journal().ground_image().is_err());
            is_no_point(&mut world);
            let expected = match begin_again {
                true => over(&before, &parts),
                false => {
                    world.journal().release_rest();
                    assert!(!world.journal().lay_rest(&mut laying, &mut laid).unwrap());
                    over(&before, &parts[..1])
                }
            };
            if begin_again {
                drop(laying);
                lay(&mut world, &expected).unwrap();
            } else {
                let epoch = world.journal().highest_epoch().next();
                world.images.insert(epoch, Rc::new(expected.clone()));
                world.journal().finish_ground(laying, epoch).unwrap();
                world.resync();
            }
            shows(&mut world, &expected);
            is_no_point(&mut world);
            world.commit(20, false).unwrap();
            world.verify();
        }
    }
}

#[test]
fn a_damaged_part_ends_it() {
    for (damaged, restart) in [(0, false), (0, true), (1, false), (1, true)] {
        let mut world = World::new(5);
        let parts = first_copy(&mut world);
        send(&mut world, &parts[..2]).unwrap();
        world.journal().cut_off();
        let at = places(&mut world)[damaged];
        let file = crate::journal::segment::file_name(at.segment);
        world.store.flip(&file, u64::from(at.offset) + 9000, 3);
        if restart {
            world.open().unwrap();
        }
        let expected = over(&Image::new(), &parts[..damaged]);
        assert_eq!(lay(&mut world, &expected).unwrap().parts, damaged);
        shows(&mut world, &expected);
        world.commit(30, false).unwrap();
        world.verify();
    }
}

#[test]
fn parts_of_another_journal_or_owner_are_not_found() {
    for other in [Some(JournalId([7; 16])), None] {
        let mut world = World::new(6);
        let parts = first_copy(&mut world);
        send(&mut world, &parts[..2]).unwrap();
        world.journal().cut_off();
        let at = places(&mut world)[0];
        // What another one's journal would have there.
        let start = Start {
            journal: other.unwrap_or(world.journal().id()),
            generation: Generation(if other.is_some() { 1 } else { 2 }),
            epoch: world.epoch,
            prev: None,
        };
        let (all, image) = ((0..PAGES).collect::<Vec<_>>(), world.image.clone());
        world.primary.forget();
        let strange = world
            .primary
            .frame(start, &Image::new(), &image, &all, true, world.now);
        assert_eq!(strange[0].len(), parts[0].len());
        let file = crate::journal::segment::file_name(at.segment);
        let file = world.store.open(&file, Access::Blocks, true).unwrap();
        file.write_at(u64::from(at.offset), &strange[0]).unwrap();
        world.open().unwrap();
        assert_eq!(world.journal().rest(), None, "{other:?}");
        is_no_point(&mut world);
    }
}

/// Power goes at every single step: while the parts come, while they are laid over nothing, or over ground.
#[test]
fn it_survives_a_crash_at_any_point() {
    for over_ground in [false, true] {
        let (mut rests, mut grounds) = (0, 0);
        for at in 1.. {
            let mut world = World::new(7);
            let mut before = Image::new();
            if over_ground {
                mutate(&mut before, &mut world.random, 200);
                world.lay(&before).unwrap();
            }
            let parts = first_copy(&mut world);
            let some = &parts[..parts.len() - 1];
            let expected = over(&before, some);
            world.store.set_faults(Faults {
                power_off: Some(at),
                ..Faults::default()
            });
            let mut interrupted = || {
                send(&mut world, some)?;
                world.journal().cut_off();
                lay(&mut world, &expected)
            };
            let done = interrupted().is_ok();
            world.crash(at % 2 == 0);
            // And again, in the middle of the repair.
            if at % 3 == 0 && world.journal().rest().is_some() {
                world.store.set_faults(Faults {
                    power_off: Some(at % 7 + 1),
                    ..Faults::default()
                });
                let expected = over(&before, &some[..sound(&mut world)]);
                let _ = lay(&mut world, &expected);
                world.crash(at % 2 == 1);
            }
            is_no_point(&mut world);
            let (ground, rest) = (world.journal().ground(), world.journal().rest());
            match rest {
                Some(_) => {
                    let sound = sound(&mut world);
                    assert!(!done, "{at}: finished, and there again");
                    assert!(
                        ground.is_some() || !over_ground || sound == some.len(),
                        "{at}: the old ground is lost, and what was laid over it too"
                    );
                    let expected = over(&before, &some[..sound]);
                    assert_eq!(lay(&mut world, &expected).unwrap().parts, sound);
                    shows(&mut world, &expected);
                    rests += 1;
                }
                None => {
                    assert!(ground.is_some() || !over_ground, "{at}: all is lost");
                    grounds += 1;
                }
            }
            if let Some((epoch, root)) = world.journal().ground() {
                let expected = Image::clone(&world.images[&epoch]);
                assert_eq!(root, expected.root());
                shows(&mut world, &expected);
            }
            world.commit(20, false).unwrap();
            world.verify();
            world.crash(false);
            world.verify();
            if done {
                break;
            }
        }
        assert!(rests > 10 && grounds > 1, "{rests} {grounds}");
    }
}

/// An epoch's number can have been used twice, and parts may be missing.
#[test]
fn it_goes_from_the_newest_part_0_to_the_first_gap() {
    let mut world = World::new(8);
    let parts = first_copy(&mut world);
    let header = PartHeader::parse(&parts[0]).unwrap();
    assert_eq!(header.guest, guest());
    let loc = |place: u32| Loc {
        sequence: 1,
        segment: 0,
        offset: place,
        len: 4096,
    };
    // Places of part 0, 1, 2 -> places of the rest.
    let cases: [([&[u32]; 3], &[u32]); 7] = [
        ([&[1], &[2], &[3]], &[1, 2, 3]),
        ([&[1], &[], &[3]], &[1]),
        ([&[], &[2], &[3]], &[]),
        ([&[1, 4], &[2], &[3]], &[4]),
        ([&[1, 4], &[2, 5], &[3]], &[4, 5]),
        ([&[1, 4], &[2, 5], &[3, 6]], &[4, 5, 6]),
        ([&[4], &[2], &[3]], &[4]),
    ];
    for (numbers, expected) in cases {
        let mut places: BTreeMap<u32, Vec<(Loc, bool)>> = BTreeMap::new();
        for (number, list) in (0..).zip(numbers).filter(|(_, list)| !list.is_empty()) {
            places.insert(number, list.iter().map(|p| (loc(*p), false)).collect());
        }
        let found = Rest::found(&world.journal().super_, &header, &places);
        let found = found.map_or(vec![], |rest| rest.parts);
        let expected: Vec<Loc> = expected.iter().map(|p| loc(*p)).collect();
        assert_eq!(found, expected, "{numbers:?}");
    }
    let mut later = header.clone();
    later.epoch = Epoch(9);
    (later.prev_epoch, later.full) = (Epoch(3), false);
    let places = BTreeMap::from([(0, vec![(loc(1), false)])]);
    let super_ = world.journal().super_.clone();
    assert!(Rest::found(&super_, &header, &places).is_some());
    assert!(Rest::found(&super_, &later, &places).is_none());
    let mut merged = header.clone();
    merged.merged = true;
    assert!(Rest::found(&super_, &merged, &places).is_none());
}
