//! The registry over a fake: attaches and detaches that wait for the test's word.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use super::*;

/// What has happened to one volume, and what shall.
#[derive(Default)]
struct Fate {
    attaches: u64,
    detaches: u64,
    /// Attached, or being attached or detached: never twice at once.
    there: bool,
    fail_attaches: u64,
    fail_detaches: u64,
    /// Attaches and detaches wait for as long as this is set.
    hold: bool,
    /// Attaches and detaches that wait.
    waiting: u64,
}

#[derive(Default)]
struct World {
    fates: Mutex<HashMap<VolumeName, Fate>>,
    changed: Condvar,
}

struct FakeVolume {
    name: VolumeName,
    lost: Mutex<bool>,
    /// Clients that are reading and writing.
    users: AtomicU64,
}

#[derive(Clone, Default)]
struct Fake(Arc<World>);

impl Fake {
    fn with<T>(&self, name: &VolumeName, f: impl FnOnce(&mut Fate) -> T) -> T {
        let mut fates = self.0.fates.lock().expect("lock");
        let out = f(fates.entry(name.clone()).or_default());
        self.0.changed.notify_all();
        out
    }

    /// Waits until the volume's fate is so.
    fn until(&self, name: &VolumeName, is: impl Fn(&Fate) -> bool) {
        let mut fates = self.0.fates.lock().expect("lock");
        while !is(fates.entry(name.clone()).or_default()) {
            let (guard, late) = self.0.changed.wait_timeout(fates, Duration::from_secs(20)).expect("lock");
            assert!(!late.timed_out(), "waited for ever");
            fates = guard;
        }
    }

    /// Counts as waiting until it is let go.
    fn pass(&self, name: &VolumeName) {
        self.with(name, |f| f.waiting += 1);
        self.until(name, |f| !f.hold);
        self.with(name, |f| f.waiting -= 1);
    }
}

impl Attacher for Fake {
    type Volume = FakeVolume;

    fn attach(&self, name: &VolumeName) -> Result<FakeVolume> {
        self.with(name, |f| {
            assert!(!std::mem::replace(&mut f.there, true), "{name} is attached twice");
            f.attaches += 1;
        });
        self.pass(name);
        self.with(name, |f| {
            if f.fail_attaches > 0 {
                (f.fail_attaches, f.there) = (f.fail_attaches - 1, false);
                return Err(Error::new(ErrorKind::Unreachable, format!("no store, try {}", f.attaches)));
            }
            Ok(FakeVolume { name: name.clone(), lost: Mutex::new(false), users: AtomicU64::new(0) })
        })
    }

    fn detach(&self, volume: &FakeVolume) -> Result<()> {
        assert_eq!(volume.users.load(Ordering::SeqCst), 0, "{} is detached under its users", volume.name);
        self.pass(&volume.name);
        self.with(&volume.name, |f| {
            assert!(std::mem::replace(&mut f.there, false), "{} is detached twice", volume.name);
            f.detaches += 1;
            if f.fail_detaches > 0 {
                f.fail_detaches -= 1;
                return Err(Error::new(ErrorKind::Io, format!("detaching {}: the disk is gone", volume.name)));
            }
            Ok(())
        })
    }

    fn is_lost(&self, volume: &FakeVolume) -> bool {
        *volume.lost.lock().expect("lock")
    }
}

const LINGER: Duration = Duration::from_secs(10);

fn name(s: &str) -> VolumeName {
    s.parse().expect("name")
}

/// A registry whose clock is the test's: nothing is detached but by `sweep` and `close`.
fn fresh() -> (Arc<Registry<Fake>>, Fake, VolumeName) {
    let fake = Fake::default();
    (Arc::new(Registry::new(fake.clone(), LINGER)), fake, name("v"))
}

fn opener(registry: &Arc<Registry<Fake>>, name: &VolumeName) -> thread::JoinHandle<Result<Arc<Lease<Fake>>>> {
    let (registry, name) = (Arc::clone(registry), name.clone());
    thread::spawn(move || registry.open(&name))
}

fn later() -> Instant {
    Instant::now() + LINGER
}

/// Waits until the registry has nothing of the volume.
fn until_absent(registry: &Registry<Fake>, name: &VolumeName) {
    let mut table = registry.0.table();
    while table.slots.contains_key(name) {
        table = registry.0.wait(table);
    }
}

#[test]
fn those_who_open_at_once_attach_once() {
    let (registry, fake, v) = fresh();
    fake.with(&v, |f| f.hold = true);
    let openers: Vec<_> = (0..8).map(|_| opener(&registry, &v)).collect();
    fake.until(&v, |f| f.waiting == 1);
    // Another volume does not wait for this one.
    let w = registry.open(&name("w")).expect("another");
    fake.with(&v, |f| f.hold = false);
    let leases: Vec<_> = openers.into_iter().map(|t| t.join().expect("thread").expect("open")).collect();
    assert!(leases.iter().all(|l| std::ptr::eq(l.volume(), leases[0].volume())));
    assert_eq!(fake.with(&v, |f| f.attaches), 1);
    assert_eq!(registry.busy(), [v.clone(), name("w")]);
    drop((leases, w));
    registry.close().expect("closed");
    assert_eq!(fake.with(&v, |f| (f.attaches, f.detaches, f.there)), (1, 1, false));
    assert_eq!(registry.open(&v).expect_err("closed").kind(), ErrorKind::Busy);
}

#[test]
fn an_idle_volume_lingers_and_a_used_one_stays() {
    let (registry, fake, v) = fresh();
    let (a, b) = (registry.open(&v).expect("a"), registry.open(&v).expect("b"));
    drop(a);
    assert_eq!(registry.sweep(later()), None, "b uses it");
    drop(b);
    let end = registry.sweep(Instant::now()).expect("it lingers");
    // Opened while it lingers: the same attachment, and no clock runs.
    let c = registry.open(&v).expect("c");
    assert_eq!(registry.sweep(end + LINGER), None);
    assert_eq!(fake.with(&v, |f| (f.attaches, f.detaches)), (1, 0));
    drop(c);
    let again = registry.sweep(end - Duration::from_millis(1)).expect("a new clock");
    assert!(again >= end);
    assert_eq!(registry.sweep(again), None);
    until_absent(&registry, &v);
    assert_eq!(fake.with(&v, |f| (f.attaches, f.detaches)), (1, 1));
    drop(registry.open(&v).expect("anew"));
    assert_eq!(fake.with(&v, |f| (f.attaches, f.detaches)), (2, 1));
}

/// Somebody may open the volume between the end of the last reference and the drop of what it referred to.
#[test]
fn a_drop_that_comes_late_does_not_start_the_clock_of_the_next() {
    let (registry, _fake, v) = fresh();
    let first = registry.open(&v).expect("first");
    let late = Lease {
        volume: Arc::clone(&first.volume),
        name: v.clone(),
        number: first.number,
        registry: Arc::clone(&registry.0),
    };
    drop(first);
    let second = registry.open(&v).expect("second");
    assert_ne!(second.number, late.number);
    drop(late);
    assert_eq!(registry.sweep(later()), None, "the second is used");
    drop(second);
    assert!(registry.sweep(Instant::now()).is_some());
}

#[test]
fn who_opens_during_a_detach_waits_and_attaches_anew() {
    let (registry, fake, v) = fresh();
    drop(registry.open(&v).expect("open"));
    fake.with(&v, |f| f.hold = true);
    registry.sweep(later());
    fake.until(&v, |f| f.waiting == 1);
    let openers: Vec<_> = (0..4).map(|_| opener(&registry, &v)).collect();
    thread::yield_now();
    assert!(registry.attached(&v).is_none());
    assert_eq!(fake.with(&v, |f| f.attaches), 1);
    fake.with(&v, |f| f.hold = false);
    for t in openers {
        let lease = t.join().expect("thread").expect("open");
        assert_eq!(lease.volume().name, v);
    }
    let (attaches, detaches) = fake.with(&v, |f| (f.attaches, f.detaches));
    assert_eq!((attaches, detaches), (2, 1));
}

#[test]
fn a_failed_attach_is_told_to_all_who_waited_and_tried_anew_by_the_next() {
    let (registry, fake, v) = fresh();
    fake.with(&v, |f| (f.hold, f.fail_attaches) = (true, 1));
    let first = opener(&registry, &v);
    fake.until(&v, |f| f.waiting == 1);
    let Some(Slot::Attaching(outcome)) = registry.0.table().slots.get(&v).map(|s| match s {
        Slot::Attaching(outcome) => Slot::<Fake>::Attaching(Arc::clone(outcome)),
        _ => Slot::Detaching,
    }) else {
        panic!("not attaching");
    };
    let others: Vec<_> = (0..4).map(|_| opener(&registry, &v)).collect();
    // Who knows the outcome: the slot, the first, this test, and the four that wait.
    while Arc::strong_count(&outcome) < 7 {
        thread::yield_now();
    }
    fake.with(&v, |f| f.hold = false);
    for t in std::iter::once(first).chain(others) {
        let e = t.join().expect("thread").expect_err("no store");
        assert_eq!((e.kind(), e.to_string().as_str()), (ErrorKind::Unreachable, "no store, try 1"));
    }
    assert!(registry.busy().is_empty());
    registry.open(&v).expect("the store is back");
    assert_eq!(fake.with(&v, |f| f.attaches), 2);
}

#[test]
fn a_lease_dropped_as_soon_as_it_is_there_starts_the_clock() {
    let (registry, fake, v) = fresh();
    fake.with(&v, |f| f.hold = true);
    let going = opener(&registry, &v);
    fake.until(&v, |f| f.waiting == 1);
    assert_eq!(registry.sweep(later()), None, "nothing is due while it attaches");
    fake.with(&v, |f| f.hold = false);
    drop(going.join().expect("thread"));
    registry.sweep(later());
    until_absent(&registry, &v);
    assert_eq!(fake.with(&v, |f| (f.attaches, f.detaches)), (1, 1));
}

#[test]
fn closing_waits_for_an_attach_and_detaches_it() {
    let (registry, fake, v) = fresh();
    fake.with(&v, |f| f.hold = true);
    let late = opener(&registry, &v);
    fake.until(&v, |f| f.waiting == 1);
    let closer = thread::spawn({
        let registry = Arc::clone(&registry);
        move || registry.close()
    });
    while !registry.0.table().closing {
        thread::yield_now();
    }
    fake.with(&v, |f| f.hold = false);
    assert_eq!(late.join().expect("thread").expect_err("closing").kind(), ErrorKind::Busy);
    closer.join().expect("thread").expect("closed");
    assert_eq!(fake.with(&v, |f| (f.attaches, f.detaches, f.there)), (1, 1, false));
}

#[test]
fn a_lost_volume_is_not_joined_and_does_not_linger() {
    let (registry, fake, v) = fresh();
    let old = registry.open(&v).expect("open");
    *old.volume().lost.lock().expect("lock") = true;
    assert_eq!(registry.open(&v).expect_err("lost").kind(), ErrorKind::Fenced);
    assert_eq!(registry.sweep(later()), None, "its clients have not left");
    drop(old);
    // Who opens it now does not wait for the clock.
    let anew = registry.open(&v).expect("anew");
    assert_eq!(fake.with(&v, |f| (f.attaches, f.detaches)), (2, 1));
    *anew.volume().lost.lock().expect("lock") = true;
    drop(anew);
    assert_eq!(registry.sweep(Instant::now()), None);
    until_absent(&registry, &v);
    assert_eq!(fake.with(&v, |f| f.detaches), 2);
}

#[test]
fn failures_to_detach_are_remembered_until_made_good() {
    let (registry, fake, v) = fresh();
    let w = name("w");
    for volume in [&v, &w] {
        fake.with(volume, |f| f.fail_detaches = 1);
        drop(registry.open(volume).expect("open"));
        registry.sweep(later());
        until_absent(&registry, volume);
    }
    // Attached again, v goes well.
    drop(registry.open(&v).expect("open"));
    let e = registry.close().expect_err("w failed").to_string();
    assert_eq!(e, "detaching w: the disk is gone");
}

#[test]
fn the_thread_detaches_when_the_time_has_come() {
    let fake = Fake::default();
    let registry = Registry::new(fake.clone(), Duration::from_millis(1));
    registry.keep().expect("thread");
    for round in 1..=3 {
        let lease = registry.open(&name("v")).expect("open");
        // By now the thread sleeps, and nothing but the drop can wake it.
        crate::cli::pause(Duration::from_millis(50));
        drop(lease);
        fake.until(&name("v"), |f| f.detaches == round);
    }
    registry.close().expect("closed");
}

/// Many threads open, use and drop a few volumes, whose attaches fail now and then and which are lost now and then. What may never
/// happen is asserted by the fake; here it is seen that all ends well.
#[test]
fn under_stress_nothing_is_attached_twice_or_detached_under_its_users() {
    const THREADS: u64 = 8;
    const ROUNDS: u64 = 400;
    let fake = Fake::default();
    let registry = Arc::new(Registry::new(fake.clone(), Duration::from_micros(50)));
    registry.keep().expect("thread");
    let names: Arc<Vec<_>> = Arc::new((0..3).map(|n| name(&format!("v{n}"))).collect());
    let threads: Vec<_> = (0..THREADS)
        .map(|seed| {
            let (registry, fake, names) = (Arc::clone(&registry), fake.clone(), Arc::clone(&names));
            thread::spawn(move || {
                let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
                let (mut served, mut held) = (0_u64, Vec::new());
                for _ in 0..ROUNDS {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    let v = &names[(random % 3) as usize];
                    match random >> 32 & 31 {
                        0 => fake.with(v, |f| f.fail_attaches += 1),
                        1..8 => held.clear(),
                        8..12 => crate::cli::pause(Duration::from_millis(1)),
                        _ => match registry.open(v) {
                            Ok(lease) => {
                                // Users that the fake sees. Two references of one lease are two users.
                                lease.volume().users.fetch_add(1, Ordering::SeqCst);
                                if random >> 40 & 31 == 0 {
                                    *lease.volume().lost.lock().expect("lock") = true;
                                }
                                thread::yield_now();
                                lease.volume().users.fetch_sub(1, Ordering::SeqCst);
                                served += 1;
                                if random >> 48 & 3 == 0 && held.len() < 2 {
                                    held.push(lease);
                                }
                            }
                            Err(e) => assert!(matches!(e.kind(), ErrorKind::Unreachable | ErrorKind::Fenced), "{e}"),
                        },
                    }
                }
                served
            })
        })
        .collect();
    let served: u64 = threads.into_iter().map(|t| t.join().expect("thread")).sum();
    registry.close().expect("closed");
    assert!(served > THREADS, "{served} were served");
    for v in &*names {
        let (attaches, detaches, there) = fake.with(v, |f| (f.attaches, f.detaches, f.there));
        assert!(!there && attaches >= detaches && detaches > 1, "{v}: {attaches} attaches, {detaches} detaches");
    }
    assert!(registry.busy().is_empty());
}
