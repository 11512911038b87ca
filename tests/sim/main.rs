//! The whole volume on a disk that forgets, a store that answers late or twice, and a clock of its own: crashes at any
//! operation, also while recovering, against the crash rule. Same seed, same run.
//!
//! `VB_SIM_SEEDS=FROM..TO cargo test --test sim` runs others; `make soak` runs many.

#[path = "../support_rng/mod.rs"]
mod support_rng;

mod clock;
mod clone;
mod machine;
mod oracle;
mod room;
mod store;
mod wal;
mod world;

use std::sync::atomic::{AtomicUsize, Ordering};

use machine::Crash;
use world::{Load, World};

/// The seeds of this run.
fn seeds(short: u64) -> std::ops::Range<u64> {
    let Ok(asked) = std::env::var("VB_SIM_SEEDS") else { return 0..short };
    let (from, to) = asked.split_once("..").expect("VB_SIM_SEEDS is FROM..TO");
    from.parse().expect("a number")..to.parse().expect("a number")
}

/// Each seed's world to its end, on two threads; what all have seen.
fn each(seeds: impl Iterator<Item = u64>, lives: impl Fn(u64) -> World + Sync) -> world::Seen {
    let all: Vec<u64> = seeds.collect();
    let next = AtomicUsize::new(0);
    let some = || {
        let mut seen = world::Seen::default();
        while let Some(seed) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
            let _named = Named(*seed);
            seen = seen.plus(lives(*seed).seen());
        }
        seen
    };
    std::thread::scope(|s| {
        let other = s.spawn(some);
        some().plus(other.join().unwrap_or_else(|e| std::panic::resume_unwind(e)))
    })
}

/// Says which seed it was that failed.
struct Named(u64);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("this was seed {0}: VB_SIM_SEEDS={0}..{1}", self.0, self.0 + 1);
        }
    }
}

/// Says at which point of a sweep it failed.
struct Point {
    seed: u64,
    at: u64,
    how: Crash,
}

impl Drop for Point {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("this was world {}, cut at operation {} ({:?})", self.seed, self.at, self.how);
        }
    }
}

/// Seeds that have found something. 1830, 2094, 4675: a power cut while a log whose entries were all in the store wrote over
/// its newest segment left a log that no attach would take: records of the old segment vouched for what was gone and not needed;
/// in the last, records of a torn tail for entries whose numbers had been given out again.
const FOUND: [u64; 3] = [1830, 2094, 4675];

/// Lives one after the other, each cut short somewhere; then the store alone.
fn many_lives(seed: u64, world: &World) {
    let load = Load {
        lanes: 1 + seed as usize % 2,
        workers: 1 + seed as usize % 5,
        requests: 30,
        breaks: seed % 5 == 4,
        overlaps: false,
    };
    // Some die again and again while they attach.
    let span = if seed.is_multiple_of(4) { 40 } else { 600 };
    for _ in 0..4 {
        let at = 1 + world.draw(span);
        world.life(load, at);
        let how = if world.draw(2) == 0 { Crash::Process } else { Crash::Power };
        world.crash(how);
    }
    world.life(Load { requests: 4, breaks: false, ..load }, u64::MAX);
    world.crash(Crash::Power);
    world.life(Load { requests: 0, ..load }, u64::MAX);
    world.lose_host();
    world.life(Load { requests: 0, ..load }, u64::MAX);
}

/// A whole life, and then all but the store is gone.
fn the_store_alone(world: &World, load: Load) {
    world.life(Load { requests: 4, breaks: false, ..load }, u64::MAX);
    world.lose_host();
    world.life(Load { requests: 0, ..load }, u64::MAX);
}

#[test]
fn many_lives_keep_the_crash_rule() {
    let all = each(FOUND.into_iter().chain(seeds(1000)), |seed| {
        let world = World::new(seed);
        many_lives(seed, &world);
        world
    });
    if std::env::var("VB_SIM_SEEDS").is_err() {
        let enough = all.judged > 4000 && all.taken > 500 && all.late > 50 && all.drained > 100 && all.groups > 1000;
        assert!(enough && all.again > 0 && all.broken > 50 && all.resumed > 500, "{all:?}");
    }
}

/// The same with requests that overlap while they are in flight: each pair has one order, the same before and after any crash.
#[test]
fn writes_over_one_another_have_one_order() {
    let all = each(seeds(150), |seed| {
        let world = World::new(seed);
        let load =
            Load { lanes: 1 + seed as usize % 2, workers: 2, requests: 40, breaks: seed % 7 == 6, overlaps: true };
        for _ in 0..3 {
            world.life(load, 1 + world.draw(800));
            world.crash(if world.draw(2) == 0 { Crash::Process } else { Crash::Power });
        }
        the_store_alone(&world, load);
        world
    });
    if std::env::var("VB_SIM_SEEDS").is_err() {
        assert!(all.judged > 500 && all.later > 500 && all.earlier > 500, "{all:?}");
    }
}

/// A log that is written over several times in each life: what is still needed must not be, and what says that it is not
/// needed must be durable first.
#[test]
fn a_small_log_turns_over() {
    let all = each(seeds(20), |seed| {
        let world = World::tight(seed);
        let load = Load { lanes: 2, workers: 8, requests: 150, breaks: false, overlaps: false };
        for _ in 0..4 {
            world.life(load, 1 + world.draw(6000));
            world.crash(if world.draw(3) == 0 { Crash::Process } else { Crash::Power });
        }
        the_store_alone(&world, load);
        world
    });
    if std::env::var("VB_SIM_SEEDS").is_err() {
        assert!(all.judged > 80 && all.groups > 1000 && all.resumed > 30, "{all:?}");
    }
}

/// What the store has is needed here, too, until the superblock says that it has it: until then no room of it is used again.
#[test]
fn no_room_is_used_again_before_the_mark_is_durable() {
    for seed in [3, 6, 9] {
        let _named = Named(seed);
        let world = World::tight(seed);
        let load = Load { lanes: 2, workers: 8, requests: 1000, breaks: false, overlaps: false };
        let (written, twice) = world.life_without_marks(load);
        assert!(written > 1 << 20, "{written} bytes fill no log of 2 MiB");
        assert!(!twice, "a slot was used again, and only memory knows that nobody needs it");
        assert!(world.seen().groups > 0, "nothing was uploaded");
        world.crash(Crash::Power);
        the_store_alone(&world, load);
    }
}

/// A short life cut at each of its operations, from the first to its end.
#[test]
fn a_crash_at_every_operation() {
    let load = Load { lanes: 1, workers: 2, requests: 40, breaks: false, overlaps: false };
    for (seed, how) in [(1, Crash::Process), (1, Crash::Power), (3, Crash::Process), (3, Crash::Power)] {
        let mut judged = 0;
        for at in 1.. {
            let _named = Point { seed, at, how };
            let world = World::new(seed);
            let ended = world.life(load, at);
            world.crash(how);
            // Once more while recovering.
            world.life(load, 1 + at / 8);
            world.crash(how);
            the_store_alone(&world, Load { requests: 0, ..load });
            judged += world.seen().judged;
            if ended {
                println!("world {seed}, {how:?}: {at} operations");
                assert!(at > 100 && judged >= 2 * at - 2, "{at} operations, judged {judged} times");
                break;
            }
        }
    }
}

/// A life cut somewhere, and what comes after it cut at each of its own operations: replay, attach, what it uploads, and its end.
#[test]
fn a_crash_at_every_operation_of_a_recovery() {
    let load = Load { lanes: 1, workers: 2, requests: 10, breaks: false, overlaps: false };
    let step = if std::env::var("VB_SIM_SEEDS").is_ok() { 5 } else { 60 };
    for (first, how) in (30..300).step_by(step).flat_map(|at| [(at, Crash::Process), (at, Crash::Power)]) {
        for at in 1.. {
            let _named = Point { seed: first, at, how };
            let world = World::new(1);
            world.life(load, first);
            world.crash(how);
            let ended = world.life(Load { requests: 0, ..load }, at);
            world.crash(how);
            the_store_alone(&world, Load { requests: 0, ..load });
            assert!(world.seen().judged >= 2, "{:?}", world.seen());
            if ended {
                assert!(at > 10, "only {at} operations");
                break;
            }
        }
    }
}

/// One life with snapshots that come and go, garbage that is collected, and in the second world a clone that comes to stand alone,
/// cut short at each of its operations (in the short form at each fifth), by a death and by a power cut.
#[test]
fn a_crash_at_every_operation_of_keeping_house() {
    let load = Load { lanes: 1, workers: 1, requests: 200, breaks: false, overlaps: false };
    let step = if std::env::var("VB_SIM_SEEDS").is_ok() { 1 } else { 5 };
    for (seed, clone) in [(6, false), (24, true)] {
        let whole = World::collecting(seed);
        assert!(whole.life(load, u64::MAX));
        let did = whole.seen();
        assert!(did.deleted > 5 && did.moved > 5 && (did.alone > 0) == clone, "world {seed}: {did:?}");
        let mut all = world::Seen::default();
        let mut points = 0;
        for at in (1..).step_by(step) {
            let mut ended = false;
            for how in [Crash::Process, Crash::Power] {
                let _named = Point { seed, at, how };
                let world = World::collecting(seed);
                ended = world.life(load, at);
                world.crash(how);
                world.life(Load { requests: 8, ..load }, u64::MAX);
                world.look_at_snapshots();
                world.lose_host();
                world.life(Load { requests: 0, ..load }, u64::MAX);
                world.look_at_snapshots();
                all = all.plus(world.seen());
            }
            if ended {
                break;
            }
            points += 1;
        }
        println!("world {seed}: {points} points, {all:?}");
        assert!(points * step > 500 && all.judged >= 4 * points as u64, "{points} points: {all:?}");
        assert!(all.snapshots > points as u64 && all.exact > points as u64, "{points} points: {all:?}");
    }
}

/// A host that has lost the volume changes nothing any more, however late it finds out, and finds out.
#[test]
fn a_fenced_host_never_shows() {
    let all = each(seeds(300), |seed| {
        let world = World::new(seed);
        let load = Load {
            lanes: 1 + seed as usize % 2,
            workers: 1 + seed as usize % 3,
            requests: 40,
            breaks: false,
            overlaps: false,
        };
        world.life(load, 1 + world.draw(600));
        world.crash(Crash::Process);
        for _ in 0..2 {
            world.life_with_take_over(load, 200 + world.draw(1500));
            world.crash(if world.draw(2) == 0 { Crash::Process } else { Crash::Power });
        }
        the_store_alone(&world, load);
        world
    });
    if std::env::var("VB_SIM_SEEDS").is_err() {
        let enough = all.judged > 1500
            && all.stopped > 500
            && all.heard > 50
            && all.late > 50
            && all.promised > 5
            && all.groups > 1000;
        assert!(enough, "{all:?}");
    }
}

#[test]
fn the_same_seed_is_the_same_run() {
    let run = |seed| {
        let world = World::new(seed);
        many_lives(seed, &world);
        world.trace()
    };
    assert_eq!(run(7), run(7));
    assert_ne!(run(7), run(8));
    let rough = |seed| {
        let world = World::rough(seed, 8);
        let load = Load { lanes: 2, workers: 1, requests: 40, breaks: false, overlaps: true };
        world.life(load, 900);
        world.crash(Crash::Process);
        world.life_with_take_over(load, 2000);
        world.crash(Crash::Power);
        world.life(load, u64::MAX);
        format!("{} {:?}", world.trace(), world.seen())
    };
    assert_eq!(rough(8), rough(8));
    assert_ne!(rough(8), rough(10));
}

/// Lives that are cut short, perhaps by another host that takes over; in the end there is the store alone, and each snapshot is read.
fn lives_with_snapshots(world: &World, load: Load, taken_over: bool) {
    for _ in 0..3 {
        if taken_over {
            world.life_with_take_over(Load { breaks: false, ..load }, 200 + world.draw(2500));
        } else {
            world.life(load, 1 + world.draw(2500));
        }
        world.crash(if world.draw(2) == 0 { Crash::Process } else { Crash::Power });
    }
    world.life(Load { requests: 40, breaks: false, ..load }, u64::MAX);
    world.look_at_snapshots();
    world.lose_host();
    world.life(Load { requests: 0, ..load }, u64::MAX);
    world.look_at_snapshots();
}

/// Any call of the store may go without an answer, whatever came of it, or be refused, at any time: also manifests and checkpoints, reads and
/// lists, while attaching, taking over and collecting. (And the log's disk may have no room for it to grow.) All of it waits or is tried again; nothing is lost, nobody takes himself for another.
#[test]
fn a_store_that_answers_one_call_and_not_the_next() {
    let all = each(seeds(40), |seed| {
        let world = World::rough(seed, 4 + seed % 20);
        let load = Load {
            lanes: 1 + seed as usize / 3 % 2,
            workers: 1 + seed as usize % 3,
            requests: 50,
            breaks: seed % 7 == 6,
            overlaps: true,
        };
        lives_with_snapshots(&world, load, seed % 4 == 1);
        world
    });
    if std::env::var("VB_SIM_SEEDS").is_err() {
        assert!(
            all.judged > 130 && all.refused > 1500 && all.full > 10 && all.snapshots > 70 && all.alone > 10,
            "{all:?}"
        );
    }
}

/// Garbage is collected all the time, with snapshots that come and go: nothing that anybody can reach is deleted, whoever dies when. Some
/// volumes begin as clones, and come to stand alone: what they were made from is deleted then.
#[test]
fn what_is_collected_is_garbage() {
    let all = each(seeds(150), |seed| {
        let world = World::collecting(seed);
        let one = seed.is_multiple_of(2);
        let load = Load {
            lanes: 1,
            workers: if one { 1 } else { 3 },
            requests: if one { 120 } else { 60 },
            breaks: seed % 7 == 6,
            overlaps: false,
        };
        lives_with_snapshots(&world, load, seed % 3 == 1);
        world
    });
    if std::env::var("VB_SIM_SEEDS").is_err() {
        let enough = all.judged > 500
            && all.deleted > 1000
            && all.garbage > 500
            && all.moved > 500
            && all.snapshots > 300
            && all.exact > 50
            && all.alone > 20;
        assert!(enough, "{all:?}");
    }
}
