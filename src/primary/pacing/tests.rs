use super::*;

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

const WANTED: Wanted = Wanted {
    target: ms(1000),
    min: ms(20),
    max: ms(500),
    budget: None,
    slow_max: 0,
};

fn done(latency: u64, made: u64, standby: u64, period: u64) -> Done {
    Done {
        latency: ms(latency),
        made: ms(made),
        standby: Some(ms(standby)),
        period: Some(ms(period)),
    }
}

fn bound(pacing: &Pacing, limited: bool) -> BoundBy {
    pacing.pace(limited, Instant::now()).bound_by
}

#[test]
fn the_interval_leaves_room_for_the_latency() {
    let cases = [
        // target, min, max, latency -> interval
        (5000, 20, 1000, 10, 1000),
        (1000, 20, 5000, 50, 700),
        (1000, 20, 5000, 740, 20),
        (1000, 20, 5000, 9000, 20),
        (100, 200, 100, 0, 200),
    ];
    for (target, min, max, latency, interval) in cases {
        let mut pacing = Pacing::new(Wanted {
            target: ms(target),
            min: ms(min),
            max: ms(max),
            ..WANTED
        });
        pacing.durable(done(latency, 0, 0, interval));
        assert_eq!(
            pacing.interval(),
            ms(interval),
            "target {target} latency {latency}"
        );
    }
}

#[test]
fn a_slow_commit_is_answered_at_once_and_forgotten_slowly() {
    let mut pacing = Pacing::new(Wanted {
        max: ms(1000),
        ..WANTED
    });
    pacing.durable(done(10, 0, 0, 700));
    let before = pacing.interval();
    pacing.durable(done(500, 0, 0, 700));
    let after = pacing.interval();
    assert!(after < before / 2);
    pacing.durable(done(10, 0, 0, 700));
    assert!(pacing.interval() > after && pacing.interval() < before);
}

/// In the long run the guest is paused for no more than its budget, also if pauses differ.
#[test]
fn the_budget_is_held_whatever_the_target() {
    for budget in [0.01, 0.05, 0.5] {
        let mut pacing = Pacing::new(Wanted {
            budget: Some(budget),
            ..WANTED
        });
        let (mut paused, mut passed) = (Duration::ZERO, Duration::ZERO);
        for n in 0..1000u64 {
            let pause = ms(1 + n * 37 % 60);
            pacing.paused(pause);
            paused += pause;
            passed += pacing.interval();
        }
        let share = paused.div_duration_f64(passed);
        assert!(share < budget * 1.02, "{share} of {budget}");
        // And not for less than the target would have it, where the budget binds.
        if budget < 0.05 {
            assert!(share > budget * 0.95, "{share} of {budget}");
            assert_eq!(bound(&pacing, false), BoundBy::PauseBudget);
        }
    }
}

#[test]
fn what_binds_is_the_stage_that_is_busy_or_what_is_between_them() {
    use BoundBy::*;
    // latency, made, standby, period (the interval is 500 ms below a latency of 250 ms) -> bound by
    let cases = [
        (10, 3, 4, 500, Nothing),
        (240, 100, 100, 520, Nothing),
        // Cuts too far apart.
        (200, 1800, 20, 2000, Processor),
        (4000, 100, 1900, 2000, Standby),
        (4000, 100, 100, 2000, Link),
        // A latency that leaves no room, at the shortest interval.
        (900, 600, 100, 20, Processor),
        (900, 100, 600, 20, Standby),
        (900, 100, 100, 20, Link),
    ];
    for (latency, made, standby, period, bound_by) in cases {
        let mut pacing = Pacing::new(WANTED);
        pacing.durable(done(latency, made, standby, period));
        let case = format!("{latency} {made} {standby} {period}");
        assert_eq!(bound(&pacing, false), bound_by, "{case}");
        let limited = match bound_by {
            Link => Bandwidth,
            other => other,
        };
        assert_eq!(bound(&pacing, true), limited, "{case}");
    }
}

#[test]
fn a_stall_binds_until_something_is_durable_again() {
    let now = Instant::now();
    let mut pacing = Pacing::new(WANTED);
    pacing.durable(done(10, 3, 4, 500));
    pacing.stalls(now);
    assert_eq!(bound(&pacing, false), BoundBy::LinkOrStandby);
    assert_eq!(bound(&pacing, true), BoundBy::Bandwidth);
    pacing.durable(done(10, 3, 4, 500));
    assert_eq!(bound(&pacing, false), BoundBy::Nothing);
    // Where cuts wait for the standby all the time, waiting is nothing new; but no end of it is.
    let mut pacing = Pacing::new(WANTED);
    pacing.durable(done(4000, 100, 1900, 2000));
    pacing.stalls(now);
    let later = |wait| pacing.pace(false, now + ms(wait)).bound_by;
    assert_eq!(later(3000), BoundBy::Standby);
    assert_eq!(later(30_000), BoundBy::LinkOrStandby);
    // Another session knows nothing of cuts before it.
    pacing.cut(now);
    pacing.begin();
    assert_eq!(pacing.cut(now), None);
    assert_eq!(bound(&pacing, false), BoundBy::Link);
}

#[test]
fn an_older_standby_does_not_say_what_it_is_busy_with() {
    let mut pacing = Pacing::new(WANTED);
    pacing.durable(Done {
        standby: None,
        ..done(4000, 100, 0, 2000)
    });
    assert_eq!(bound(&pacing, false), BoundBy::LinkOrStandby);
    assert_eq!(bound(&pacing, true), BoundBy::Bandwidth);
    let why = pacing.pace(false, Instant::now()).why().unwrap();
    assert!(
        why.starts_with("the link or the standby: a checkpoint each 2000 ms (20 ms planned)"),
        "{why}"
    );
}

#[test]
fn a_guest_is_slowed_down_step_by_step_within_what_is_allowed() {
    let start = Instant::now();
    let mut pacing = Pacing::new(Wanted {
        slow_max: 30,
        ..WANTED
    });
    let mut now = start;
    let mut at = |pacing: &mut Pacing, exposure: u64| {
        now += ms(2000);
        pacing.slow(ms(exposure), now).map(|(percent, _)| percent)
    };
    // What is left of an outage.
    assert_eq!(at(&mut pacing, 9000), None);
    pacing.durable(done(10, 1, 1, 500));
    assert_eq!(at(&mut pacing, 500), None);
    for percent in [8, 16, 24, 30, 30] {
        assert_eq!(at(&mut pacing, 1200), Some(percent));
    }
    assert!(pacing.let_go() && !pacing.let_go());
    assert_eq!(at(&mut pacing, 2500), Some(30), "far too late");
    // Between the two it stays.
    assert_eq!(at(&mut pacing, 900), Some(30));
    // As late as is planned for.
    for percent in [26, 22, 18, 14, 10, 6, 2, 0] {
        assert_eq!(at(&mut pacing, 800), Some(percent));
    }
    assert_eq!(at(&mut pacing, 100), None);
    // The effect of a step is awaited.
    let later = start + ms(100_000);
    assert_eq!(pacing.slow(ms(1900), later).unwrap().0, 8);
    assert_eq!(pacing.slow(ms(1900), later + ms(100)).unwrap().0, 8);
    assert_eq!(pacing.slow(ms(1900), later + ms(600)).unwrap().0, 16);
    assert!(pacing.let_go() && !pacing.let_go());
    // A budget that makes it late: it would not help.
    let mut pacing = Pacing::new(Wanted {
        slow_max: 30,
        budget: Some(0.01),
        ..WANTED
    });
    pacing.paused(ms(50));
    pacing.durable(done(10, 1, 1, 5000));
    assert_eq!(pacing.slow(ms(5000), later), None);
    // Nothing comes through: there is no second one to tell how they follow each other.
    let mut pacing = Pacing::new(Wanted {
        slow_max: 30,
        ..WANTED
    });
    pacing.stalls(later);
    assert_eq!(pacing.slow(ms(5000), later).unwrap().0, 30);
    // Off.
    let mut pacing = Pacing::new(WANTED);
    assert_eq!(pacing.slow(ms(9000), later), None);
}
