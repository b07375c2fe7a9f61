//! Ground is no point, and what is built on it is as sound as any history.

use super::world::{Image, World, layout, mutate};
use crate::frame::PartView;
use crate::ids::{Epoch, ImageRoot};
use crate::journal::{Faults, JournalError};

fn content(world: &mut World) -> Image {
    let mut image = Image::new();
    mutate(&mut image, &mut world.random, 200);
    image
}

fn ground_of(world: &mut World) -> Option<(Epoch, ImageRoot)> {
    world.journal().ground()
}

fn shows(world: &mut World, expected: &Image) {
    let mut image = Image::new();
    let ground = world.journal().ground_image().unwrap();
    ground.replay(&mut image).unwrap();
    assert!(image == *expected);
}

#[test]
fn ground_is_no_point_and_frames_follow_it() {
    let mut world = World::new(1);
    let image = content(&mut world);
    world.lay(&image).unwrap();
    let (epoch, root) = ground_of(&mut world).unwrap();
    assert_eq!(root, image.root());
    assert_eq!(world.journal().newest(), None);
    let no_point = world.journal().replay(epoch, &mut Image::new());
    assert!(matches!(no_point, Err(JournalError::UnknownPoint(_))));
    let again = world.journal().begin_ground(&layout());
    assert!(matches!(again, Err(JournalError::NotEmpty)));
    shows(&mut world, &image);

    world.crash(false);
    assert_eq!(ground_of(&mut world), Some((epoch, root)));
    shows(&mut world, &image);
    world.commit(5, false).unwrap();
    assert_eq!(ground_of(&mut world), None, "there is a point now");
    assert!(world.journal().ground_image().is_err());
    for _ in 0..30 {
        world.commit(8, false).unwrap();
        while world.maintain().unwrap() {}
    }
    world.verify();
    world.crash(false);
    world.verify();
}

#[test]
fn a_full_copy_over_ground_takes_its_place() {
    let mut world = World::new(2);
    let image = content(&mut world);
    world.lay(&image).unwrap();
    world.newest = None;
    world.commit(5, true).unwrap();
    for _ in 0..20 {
        world.commit(8, false).unwrap();
        while world.maintain().unwrap() {}
    }
    world.verify();
    world.crash(true);
    world.verify();
}

#[test]
fn there_is_no_ground_beside_points() {
    let mut world = World::new(3);
    world.commit(5, true).unwrap();
    let refused = world.journal().begin_ground(&layout());
    assert!(matches!(refused, Err(JournalError::NotEmpty)));
}

/// Power goes at every single step of laying; what is found is no ground or all of it.
#[test]
fn ground_is_whole_or_not_there() {
    let (mut none, mut whole) = (0, 0);
    for at in 1.. {
        let mut world = World::new(4);
        // What an earlier attempt left is in the way.
        let before = content(&mut world);
        let mut laying = world.journal().begin_ground(&layout()).unwrap();
        let pages = &before.0[..90 << 12];
        world.journal().lay(&mut laying, pages).unwrap();

        let image = content(&mut world);
        world.store.set_faults(Faults {
            power_off: Some(at),
            ..Faults::default()
        });
        let laid = world.lay(&image);
        world.crash(at % 2 == 0);
        let found = ground_of(&mut world);
        match found {
            None => {
                assert!(laid.is_err(), "laid ground is lost");
                none += 1;
                world.lay(&image).unwrap();
            }
            Some(_) => whole += 1,
        }
        shows(&mut world, &image);
        world.commit(20, false).unwrap();
        world.verify();
        world.crash(false);
        world.verify();
        if laid.is_ok() {
            break;
        }
    }
    assert!(none > 10 && whole >= 1, "{none} {whole}");
}

#[test]
fn a_full_disk_takes_no_ground_and_keeps_its_reserve() {
    let mut world = World::new(5);
    let image = content(&mut world);
    world.options.min_free_bytes = 1 << 51;
    world.open().unwrap();
    let error = world.lay(&image).unwrap_err();
    assert!(matches!(error, JournalError::NoSpace { .. }), "{error}");
    world.options.min_free_bytes = 0;
    world.open().unwrap();
    world.lay(&image).unwrap();
    shows(&mut world, &image);
}

#[test]
fn a_flipped_bit_in_ground_is_found() {
    let mut world = World::new(6);
    let image = content(&mut world);
    world.lay(&image).unwrap();
    let page = (0..96)
        .find(|p| image.page(*p).iter().any(|b| *b != 0))
        .unwrap();
    world.store.flip("base.r0", (page << 12) as u64 + 17, 3);
    let ground = world.journal().ground_image().unwrap();
    assert!(ground.replay(&mut Image::new()).is_err());
    let report = world.journal().check(&mut |_| {}).unwrap();
    assert_eq!(report.findings.len(), 1);
}

/// A frame that holds everything is laid part by part, and is no point either.
#[test]
fn a_full_frame_is_laid_as_ground() {
    let mut world = World::new(9);
    let parts = world.next_frame(300, true);
    let image = world.image.clone();
    let mut laying = world.journal().begin_ground(&layout()).unwrap();
    for part in &parts {
        let part = PartView::verify(part).unwrap();
        world.journal().lay_part(&mut laying, &part).unwrap();
    }
    laying.end();
    let epoch = world.journal().highest_epoch().next();
    let root = world.journal().finish_ground(laying, epoch).unwrap();
    assert_eq!(root, image.root());
    assert_eq!(world.journal().newest(), None);
    shows(&mut world, &image);
}
