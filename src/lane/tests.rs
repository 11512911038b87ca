use std::cell::{Cell, RefCell};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::task::Waker;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc, oneshot};

use super::*;
use crate::disk::Disk;
use crate::time::Timer;

fn on_lane_in<T>(mode: RingMode, f: impl FnOnce(&Lane) -> T) -> T {
    let lane = Lane::new(OwnRing::new(64, mode).unwrap()).unwrap();
    let out = f(&lane);
    lane.shutdown(&mut NoDriver).unwrap();
    assert_eq!(lane.0.slots.borrow().in_flight(), 0);
    out
}

fn on_lane<T>(f: impl FnOnce(&Lane) -> T) -> T {
    on_lane_in(RingMode::Cooperative, f)
}

/// A file in a folder that takes O_DIRECT (beside the test's binary: /tmp may not), and the folder.
fn direct_file() -> (tempfile::TempDir, Arc<File>) {
    let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
    let mut how = OpenOptions::new();
    how.read(true).write(true).create(true).truncate(true).custom_flags(libc::O_DIRECT);
    let file = how.open(dir.path().join("data")).unwrap();
    (dir, Arc::new(file))
}

fn filled(len: usize, seed: u8) -> IoBuf {
    let mut buf = IoBuf::zeroed(len);
    for (i, b) in buf.bytes_mut().iter_mut().enumerate() {
        *b = (i as u8).wrapping_mul(31).wrapping_add((i >> 8) as u8).wrapping_add(seed);
    }
    buf
}

async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

#[test]
fn tasks_run_and_go() {
    on_lane(|lane| {
        let count = Rc::new(Cell::new(0));
        for _ in 0..10 {
            let (count, inner) = (Rc::clone(&count), lane.clone());
            lane.spawn(async move {
                let count2 = Rc::clone(&count);
                inner.spawn(async move { count2.set(count2.get() + 1) });
                yield_now().await;
                count.set(count.get() + 1);
            });
        }
        lane.run_until(async {
            while count.get() < 20 {
                yield_now().await;
            }
        })
        .unwrap();
        assert_eq!(lane.tasks(), 0);
    });
}

#[test]
fn oneshots_from_another_thread_arrive() {
    for mode in [RingMode::Cooperative, RingMode::Deferred] {
        on_lane_in(mode, |lane| {
            for i in 0..200_u32 {
                let (tx, rx) = oneshot::channel();
                let t = std::thread::spawn(move || {
                    if i % 3 == 0 {
                        // So that the lane sleeps.
                        #[expect(clippy::disallowed_methods)]
                        std::thread::sleep(Duration::from_millis(2));
                    }
                    tx.send(i).unwrap();
                });
                assert_eq!(lane.run_until(rx).unwrap().unwrap(), i);
                t.join().unwrap();
            }
        });
    }
}

#[test]
fn a_storm_of_wakes_loses_nothing() {
    const THREADS: usize = 4;
    const EACH: usize = 25_000;
    on_lane(|lane| {
        let (tx, mut rx) = mpsc::channel::<usize>(64);
        let threads: Vec<_> = (0..THREADS)
            .map(|t| {
                let tx = tx.clone();
                std::thread::spawn(move || {
                    for i in 0..EACH {
                        tx.blocking_send(t * EACH + i).unwrap();
                    }
                })
            })
            .collect();
        drop(tx);
        let seen = lane
            .run_until(async {
                let mut seen = vec![false; THREADS * EACH];
                while let Some(i) = rx.recv().await {
                    assert!(!std::mem::replace(&mut seen[i], true));
                }
                seen
            })
            .unwrap();
        assert!(seen.iter().all(|s| *s));
        threads.into_iter().for_each(|t| t.join().unwrap());
    });
}

/// One wake at a time, each answered before the next: a lost one would hang here.
#[test]
fn single_wakes_between_two_lanes_are_never_lost() {
    const ROUNDS: usize = 20_000;
    let ping = Arc::new(Notify::new());
    let pong = Arc::new(Notify::new());
    let (ping2, pong2) = (Arc::clone(&ping), Arc::clone(&pong));
    let other = std::thread::spawn(move || {
        on_lane(|lane| {
            lane.run_until(async {
                for _ in 0..ROUNDS {
                    ping2.notified().await;
                    pong2.notify_one();
                }
            })
            .unwrap();
        });
    });
    on_lane(|lane| {
        lane.run_until(async {
            for _ in 0..ROUNDS {
                ping.notify_one();
                pong.notified().await;
            }
        })
        .unwrap();
    });
    other.join().unwrap();
}

/// One task alone, woken by a thread that waits for its waker, so that the wake comes just when the lane is
/// about to sleep. Nothing else would wake the lane if it were lost.
#[test]
fn a_wake_in_the_moment_of_falling_asleep_is_not_lost() {
    const ROUNDS: usize = 100_000;
    let place = Arc::new(std::sync::Mutex::new(None::<Waker>));
    let given = Arc::new(AtomicUsize::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let (place2, given2, stop2) = (Arc::clone(&place), Arc::clone(&given), Arc::clone(&stop));
    let other = std::thread::spawn(move || {
        let mut n = 0_u32;
        while !stop2.load(Ordering::Relaxed) {
            let taken = place2.lock().unwrap().take();
            if let Some(waker) = taken {
                n = n.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                for _ in 0..n >> 23 {
                    std::hint::spin_loop();
                }
                given2.fetch_add(1, Ordering::SeqCst);
                waker.wake();
            }
        }
    });
    let late = on_lane(|lane| {
        let timer = LaneTimer::new(lane);
        lane.run_until(async {
            let all = async {
                for round in 0..ROUNDS {
                    std::future::poll_fn(|cx| {
                        if given.load(Ordering::SeqCst) > round {
                            return Poll::Ready(());
                        }
                        *place.lock().unwrap() = Some(cx.waker().clone());
                        Poll::Pending
                    })
                    .await;
                }
            };
            tokio::select! { () = all => false, () = timer.sleep(Duration::from_secs(60)) => true }
        })
        .unwrap()
    });
    stop.store(true, Ordering::Relaxed);
    other.join().unwrap();
    assert!(!late, "a wake was lost");
}

/// Many tasks, woken by raw wakers from many threads, in a tight race with the lane's falling asleep.
#[test]
fn raw_wakes_reach_their_tasks() {
    const TASKS: usize = 16;
    const WAKES: usize = 100_000 / TASKS;
    struct Cell1 {
        waker: std::sync::Mutex<Option<Waker>>,
        given: AtomicUsize,
    }
    let cells: Arc<Vec<Cell1>> =
        Arc::new((0..TASKS).map(|_| Cell1 { waker: Default::default(), given: AtomicUsize::new(0) }).collect());
    let stop = Arc::new(AtomicBool::new(false));
    let threads: Vec<_> = (0..2)
        .map(|half| {
            let (cells, stop) = (Arc::clone(&cells), Arc::clone(&stop));
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    for c in cells.iter().skip(half).step_by(2) {
                        let taken = c.waker.lock().unwrap().take();
                        if let Some(w) = taken {
                            c.given.fetch_add(1, Ordering::SeqCst);
                            w.wake();
                        }
                    }
                    std::thread::yield_now();
                }
            })
        })
        .collect();
    on_lane(|lane| {
        let left = Rc::new(Cell::new(TASKS));
        let (tx, rx) = oneshot::channel();
        let tx = Rc::new(RefCell::new(Some(tx)));
        for i in 0..TASKS {
            let (cells, left, tx) = (Arc::clone(&cells), Rc::clone(&left), Rc::clone(&tx));
            lane.spawn(async move {
                for n in 0..WAKES {
                    std::future::poll_fn(|cx| {
                        if cells[i].given.load(Ordering::SeqCst) > n {
                            return Poll::Ready(());
                        }
                        *cells[i].waker.lock().unwrap() = Some(cx.waker().clone());
                        Poll::Pending
                    })
                    .await;
                }
                left.set(left.get() - 1);
                if left.get() == 0 {
                    tx.borrow_mut().take().unwrap().send(()).unwrap();
                }
            });
        }
        lane.run_until(rx).unwrap().unwrap();
    });
    stop.store(true, Ordering::Relaxed);
    threads.into_iter().for_each(|t| t.join().unwrap());
}

#[test]
fn timers_fire_in_order_and_not_early() {
    on_lane(|lane| {
        let timer = LaneTimer::new(lane);
        let order = Rc::new(RefCell::new(Vec::new()));
        for ms in [40_u64, 10, 25] {
            let (timer, order) = (timer.clone(), Rc::clone(&order));
            lane.spawn(async move {
                let before = timer.now();
                timer.sleep(Duration::from_millis(ms)).await;
                assert!(timer.now() - before >= Duration::from_millis(ms));
                order.borrow_mut().push(ms);
            });
        }
        let start = Instant::now();
        lane.run_until(timer.sleep(Duration::from_millis(60))).unwrap();
        assert_eq!(*order.borrow(), [10, 25, 40]);
        assert!(start.elapsed() < Duration::from_secs(5));
    });
}

#[test]
fn a_long_sleep_that_is_dropped_gives_its_slot_back() {
    on_lane(|lane| {
        let timer = LaneTimer::new(lane);
        lane.run_until(async {
            let long = timer.sleep(Duration::from_secs(3600));
            let short = timer.sleep(Duration::from_millis(1));
            tokio::select! { biased; () = long => panic!("an hour has passed"), () = short => {} }
        })
        .unwrap();
        lane.run_until(timer.sleep(Duration::from_millis(5))).unwrap();
        // The doorbell's read alone.
        assert_eq!(lane.0.slots.borrow().in_flight(), 1);
    });
}

#[test]
fn shutdown_ends_what_would_wait_for_ever() {
    let start = Instant::now();
    on_lane(|lane| {
        let timer = LaneTimer::new(lane);
        lane.spawn(async move { timer.sleep(Duration::from_secs(3600)).await });
        lane.run_until(yield_now()).unwrap();
    });
    assert!(start.elapsed() < Duration::from_secs(60));
}

#[test]
fn what_was_written_is_read() {
    for mode in [RingMode::Cooperative, RingMode::Deferred] {
        let (_dir, file) = direct_file();
        on_lane_in(mode, |lane| {
            let disk = LaneDisk::new(lane, file);
            lane.run_until(async {
                let parts = vec![filled(4096, 1), filled(12288, 2), filled(512 * 8, 3)];
                disk.writev_at(8192, parts.clone(), false).await.unwrap();
                disk.writev_at(0, vec![filled(8192, 9)], true).await.unwrap();
                disk.sync().await.unwrap();
                let whole = IoBuf::zeroed(8192 + 20480);
                disk.read_at(0, whole.clone()).await.unwrap();
                let expect: Vec<u8> = [&filled(8192, 9), &parts[0], &parts[1], &parts[2]]
                    .iter()
                    .flat_map(|b| b.bytes().to_vec())
                    .collect();
                assert_eq!(whole.bytes(), expect);
            })
            .unwrap();
        });
    }
}

#[test]
fn more_buffers_than_one_write_takes() {
    let (_dir, file) = direct_file();
    on_lane(|lane| {
        let disk = LaneDisk::new(lane, file);
        let one = filled(4096, 5);
        lane.run_until(async {
            disk.writev_at(0, vec![one.clone(); 2 * MAX_IOVECS + 7], false).await.unwrap();
            let last = IoBuf::zeroed(4096);
            disk.read_at((2 * MAX_IOVECS as u64 + 6) * 4096, last.clone()).await.unwrap();
            assert_eq!(last.bytes(), one.bytes());
            assert_eq!(
                disk.read_at((2 * MAX_IOVECS as u64 + 7) * 4096, last).await.unwrap_err().kind(),
                io::ErrorKind::UnexpectedEof
            );
        })
        .unwrap();
    });
}

#[test]
fn the_end_of_the_file_is_an_error() {
    let (_dir, file) = direct_file();
    file.set_len(5000).unwrap();
    on_lane(|lane| {
        let disk = LaneDisk::new(lane, file);
        lane.run_until(async {
            for (at, len) in [(0, 8192), (4096, 4096), (8192, 4096)] {
                let e = disk.read_at(at, IoBuf::zeroed(len)).await.unwrap_err();
                assert_eq!(e.kind(), io::ErrorKind::UnexpectedEof, "at {at}");
            }
            disk.read_at(0, IoBuf::zeroed(4096)).await.unwrap();
        })
        .unwrap();
    });
}

#[test]
fn a_bad_descriptor_is_an_error() {
    let (dir, _file) = direct_file();
    let read_only = Arc::new(File::open(dir.path().join("data")).unwrap());
    on_lane(|lane| {
        let disk = LaneDisk::new(lane, read_only);
        let e = lane.run_until(disk.writev_at(0, vec![filled(4096, 0)], false)).unwrap().unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::EBADF));
    });
}

#[test]
fn a_dropped_future_leaves_its_operation_running() {
    let (_dir, file) = direct_file();
    on_lane(|lane| {
        let disk = LaneDisk::new(lane, Arc::clone(&file));
        for round in 0..100_u8 {
            let buf = filled(65536, round);
            lane.run_until(async {
                let mut write = std::pin::pin!(disk.writev_at(0, vec![buf], true));
                // Polled once, so it is submitted; then dropped.
                std::future::poll_fn(|cx| {
                    assert!(write.as_mut().poll(cx).is_pending());
                    Poll::Ready(())
                })
                .await;
            })
            .unwrap();
            let slots = lane.0.slots.borrow();
            assert!(slots.census().2 >= slots.in_flight(), "what is in flight has its buffer");
            assert!(slots.in_flight() > 0);
        }
        // Waits behind the writes: fdatasync alone does not order, reads of the same range by O_DIRECT do not
        // either, so wait until the kernel holds nothing but the doorbell's read.
        let timer = LaneTimer::new(lane);
        lane.run_until(async {
            while lane.0.slots.borrow().in_flight() > 1 {
                timer.sleep(Duration::from_millis(1)).await;
            }
            let back = IoBuf::zeroed(65536);
            disk.read_at(0, back.clone()).await.unwrap();
            let whose = back.bytes()[0];
            assert_eq!(back.bytes(), filled(65536, whose).bytes(), "freed memory was written");
        })
        .unwrap();
        let slots = lane.0.slots.borrow();
        assert!(slots.in_flight() <= 1, "{} in flight", slots.in_flight());
        let (all, free, bufs) = slots.census();
        assert_eq!((all - free, bufs), (1, 1), "slots and buffers taken by other than the doorbell");
    });
}

#[test]
fn more_operations_than_the_ring_has_places() {
    let (_dir, file) = direct_file();
    on_lane(|lane| {
        let disk = Rc::new(LaneDisk::new(lane, file));
        let left = Rc::new(Cell::new(1000));
        for i in 0..1000_u64 {
            let (disk, left) = (Rc::clone(&disk), Rc::clone(&left));
            lane.spawn(async move {
                disk.writev_at(i * 4096, vec![filled(4096, i as u8)], false).await.unwrap();
                let back = IoBuf::zeroed(4096);
                disk.read_at(i * 4096, back.clone()).await.unwrap();
                assert_eq!(back.bytes(), filled(4096, i as u8).bytes());
                left.set(left.get() - 1);
            });
        }
        let timer = LaneTimer::new(lane);
        lane.run_until(async {
            while left.get() > 0 {
                timer.sleep(Duration::from_millis(1)).await;
            }
        })
        .unwrap();
        let counters = lane.counters();
        assert!(counters.ops.get() >= 2000);
        assert!(counters.enters.get() < counters.ops.get(), "operations share their enters");
    });
}

#[test]
fn tasks_that_never_rest_do_not_shut_out_the_ring() {
    on_lane(|lane| {
        lane.spawn(async {
            loop {
                yield_now().await;
            }
        });
        lane.run_until(LaneTimer::new(lane).sleep(Duration::from_millis(5))).unwrap();
    });
}

/// Whoever is sealed may make tasks ready, whose requests must be sealed in turn before the lane sleeps.
#[test]
fn the_lane_seals_until_nothing_is_ready() {
    #[derive(Default)]
    struct Sealer {
        seals: usize,
        wake: Option<Rc<Notify>>,
    }
    impl Driver for Sealer {
        fn seal(&mut self) {
            self.seals += 1;
            if let Some(n) = self.wake.take() {
                n.notify_one();
            }
        }
    }
    on_lane(|lane| {
        let n = Rc::new(Notify::new());
        let mut sealer = Sealer { seals: 0, wake: Some(Rc::clone(&n)) };
        let passes = lane.counters().passes.get();
        lane.run_with(&mut sealer, n.notified()).unwrap();
        assert_eq!(sealer.seals, 2);
        assert_eq!(lane.counters().passes.get() - passes, 1, "no enter in between");
    });
}
