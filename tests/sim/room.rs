//! Writers that wait for room in the log: all of them get it, or are told that there is none.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use futures_util::FutureExt;
use vb_ublk::disk::IoBuf;
use vb_ublk::units::{Lba, SECTOR};
use vb_ublk::wal::appender::{Appender, NotLogged};
use vb_ublk::wal::codec::RecordKind;
use vb_ublk::wal::create::SuperblockFile;
use vb_ublk::wal::log::Log;

use crate::machine::{SimDisk, Spawner};
use crate::wal::{STRIDE, appender, begin, fresh_disk, quietly, replay_image, write};

#[test]
fn writers_wait_while_the_log_is_full_and_a_failure_ends_the_wait() {
    for fails in [false, true] {
        let disk = fresh_disk();
        let d = disk.clone();
        quietly(&disk, async move |spawner| {
            let (log, a, mut sb) = begin(&d, &spawner).await;
            let done = Rc::new(RefCell::new(Vec::new()));
            // Two slots hold some ten of these; nobody grows the log.
            for id in 0..30 {
                let (a, done) = (a.clone(), done.clone());
                spawner.spawn(async move {
                    let r = write(&a, id, 16).await;
                    done.borrow_mut().push(r);
                });
            }
            for _ in 0..200 {
                d.tick().await.unwrap();
            }
            let full = done.borrow().len();
            assert!((1..30).contains(&full), "{full} of 30 fit");
            if fails {
                log.fail("a test");
            }
            let mut rounds = 0;
            while done.borrow().len() < 30 {
                rounds += 1;
                assert!(rounds < 1000, "{} of 30 are through", done.borrow().len());
                d.tick().await.unwrap();
                if !fails {
                    let through = log.passed_seq();
                    log.sync_through(log.flush_target(), &d).await.unwrap();
                    log.retire(through);
                    sb.packed(&d, through).await.unwrap();
                    log.recycle(through);
                }
            }
            assert_eq!(done.borrow().iter().filter(|r| r.is_err()).count(), if fails { 30 - full } else { 0 });
        });
    }
}

/// Pushes writes until one has to wait for room.
async fn fill(d: &SimDisk, a: &Rc<Appender<SimDisk>>, spawner: &Spawner) {
    while a.stalled().now_or_never().is_none() {
        let a = a.clone();
        spawner.spawn(async move {
            let _ = write(&a, 100, 16).await;
        });
        settle(d).await;
    }
}

async fn settle(d: &SimDisk) {
    for _ in 0..50 {
        d.tick().await.unwrap();
    }
}

/// Everything so far is packed, and its room free.
async fn make_room(d: &SimDisk, log: &Log, sb: &mut SuperblockFile) {
    let through = log.passed_seq();
    log.sync_through(log.flush_target(), d).await.unwrap();
    log.retire(through);
    sb.packed(d, through).await.unwrap();
    log.recycle(through);
}

/// A newer write to the same sectors must not be overtaken by one that was given up.
#[test]
fn what_has_waited_too_long_is_never_logged() {
    let disk = fresh_disk();
    let d = disk.clone();
    quietly(&disk, async move |spawner| {
        let (log, a, mut sb) = begin(&d, &spawner).await;
        fill(&d, &a, &spawner).await;
        let answers = Rc::new(RefCell::new(Vec::new()));
        for id in 0..20 {
            let (a, answers) = (a.clone(), answers.clone());
            spawner.spawn(async move {
                let answer = write(&a, id, 16).await;
                answers.borrow_mut().push(answer);
            });
        }
        settle(&d).await;
        assert!(answers.borrow().is_empty(), "they wait");
        a.expire(Duration::ZERO);
        settle(&d).await;
        assert!(answers.borrow().is_empty(), "none has waited for longer than that");
        while answers.borrow().len() < 20 {
            a.expire(Duration::from_secs(1));
            settle(&d).await;
        }
        assert!(answers.borrow().iter().all(|r| *r == Err(NotLogged::Expired)), "{answers:?}");
        // Another lane writes to the sectors of one of them, and there is room again.
        let b = appender(&log, &d, &spawner);
        let before = log.passed_seq();
        let newer = std::pin::pin!(write(&b, 7, 1));
        let (newer, ()) = futures_util::future::join(newer, make_room(&d, &log, &mut sb)).await;
        newer.unwrap();
        settle(&d).await;
        make_room(&d, &log, &mut sb).await;
        write(&a, 3, 8).await.unwrap();
        settle(&d).await;
        assert_eq!(log.passed_seq().0, before.0 + 2, "these two, and nothing that was given up");
    });
}

/// One slot that comes free is room for all who fit in.
#[test]
fn two_lanes_share_the_room_of_one_slot() {
    let disk = fresh_disk();
    let d = disk.clone();
    quietly(&disk, async move |spawner| {
        let (log, a, mut sb) = begin(&d, &spawner).await;
        let b = appender(&log, &d, &spawner);
        fill(&d, &a, &spawner).await;
        fill(&d, &b, &spawner).await;
        // The open segment stays; those before it go.
        make_room(&d, &log, &mut sb).await;
        let through = log.passed_seq();
        while a.stalled().now_or_never().is_some() || b.stalled().now_or_never().is_some() {
            assert!(log.passed_seq().0 < through.0 + 3, "one of them waits on beside room");
            d.tick().await.unwrap();
        }
    });
}

/// What is left of a record when some of it was given up is whole.
#[test]
fn the_rest_of_a_batch_is_logged_as_it_was() {
    const AT: u64 = STRIDE * 4;
    let disk = fresh_disk();
    let d = disk.clone();
    quietly(&disk, async move |spawner| {
        let (log, a, mut sb) = begin(&d, &spawner).await;
        fill(&d, &a, &spawner).await;
        let young = Duration::from_secs(9);
        let left = Rc::new(Cell::new(12));
        for id in 0..12 {
            let (a, left) = (a.clone(), left.clone());
            spawner.spawn(async move {
                // Large ones, that do not fit beside what is there.
                let src = IoBuf::zeroed(SECTOR * (1 + id as usize));
                src.copy_in(0, &vec![id as u8 + 1; src.len()]);
                let since = if id % 2 == 0 { young } else { Duration::ZERO };
                let hole = a.push_hole(Lba(id), 1, RecordKind::Zeroes, false, young);
                let data = a.push_data(Lba(AT + 16 * id), &src, id == 0, since);
                let (hole, data) = futures_util::future::join(hole, data).await;
                assert_eq!((hole.is_ok(), data.is_ok()), (true, id % 2 == 0), "{id}");
                left.set(left.get() - 1);
            });
        }
        settle(&d).await;
        assert_eq!(left.get(), 12, "they wait");
        for _ in 0..5 {
            a.expire(Duration::from_secs(5));
            settle(&d).await;
        }
        make_room(&d, &log, &mut sb).await;
        while left.get() > 0 {
            d.tick().await.unwrap();
        }
    });
    let (r, image) = (replay_image(disk.image()).unwrap(), disk.image());
    let data: Vec<_> = r.entries.iter().filter(|e| e.kind == RecordKind::Data && e.lba.0 >= AT).collect();
    assert!(
        data.iter().map(|e| (e.lba.0, e.sectors)).eq((0..12).step_by(2).map(|id| (AT + 16 * id, 1 + id))),
        "{data:?}"
    );
    for e in data {
        let stored = &image[e.data_byte() as usize..][..e.sectors as usize * SECTOR];
        assert!(stored.iter().all(|b| u64::from(*b) == (e.lba.0 - AT) / 16 + 1), "{e:?}");
    }
}
