//! While the store is away: a volume whose process has died goes on from its log; and `--io-timeout`, with which what would
//! wait fails, and nothing comes of it later.

mod support_rng;
mod volume_support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use futures_util::future::{Either, select};
use support_rng::Rng;
use vb_ublk::disk::IoBuf;
use vb_ublk::error::ErrorKind;
use vb_ublk::units::{BLOCK, Lba};
use vb_ublk::volume::Volume;
use vb_ublk::volume::engine::{Engine, Extent, IoFault};
use vb_ublk::volume::host::{AttachOptions, Host};
use volume_support::{Bench, buf_of, churn, compare, drain, get, on_lane, pause, put};

const SIZE: usize = 48 << 20;
const LIMIT: Duration = Duration::from_secs(1);

fn resume(bench: &Bench) -> Host {
    Host::attach(AttachOptions { resume: true, ..bench.options() }).expect("the log is enough")
}

/// Blocks until the store has been asked.
fn confirm(volume: &Volume) {
    let begun = Instant::now();
    while !volume.is_confirmed() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", volume.status());
        pause(Duration::from_millis(20));
    }
}

/// A volume with a checkpoint, groups after it and entries in the log alone, whose process has died.
fn dead(bench: &Bench, model: &mut [u8], rng: &mut Rng) {
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| churn(&e, model, rng, 300).await);
    host.detach().unwrap();
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| churn(&e, model, rng, 300).await);
    drain(host.volume());
    on_lane(host.volume(), async |e| churn(&e, model, rng, 100).await);
    host.abandon().unwrap();
}

#[test]
fn it_serves_while_the_store_is_away_and_is_whole_when_that_comes_back() {
    let (bench, mut model, mut rng) = (Bench::new(SIZE), vec![0; SIZE], Rng(1));
    dead(&bench, &mut model, &mut rng);
    let (here, away) = (bench.dir.path().join("store"), bench.dir.path().join("elsewhere"));
    fs::rename(&here, &away).unwrap();
    assert_eq!(bench.attach().expect_err("without a store").kind(), ErrorKind::NotFound);
    let host = resume(&bench);
    let volume = host.volume().clone();
    on_lane(&volume, async |e| {
        churn(&e, &mut model, &mut rng, 200).await;
        e.flush().await.unwrap();
        put(&e, 100, 4, 7).await;
        model[100 * 4096..104 * 4096].fill(7);
        assert_eq!(get(&e, 102).await, Ok(7), "what the log has");
        e.discard(Lba(101 * 8), 8, false).await.unwrap();
        model[101 * 4096..102 * 4096].fill(0);
        assert_eq!(get(&e, 101).await, Ok(0), "what the log says is gone");
        let mut extents = Vec::new();
        e.extents(Lba(0), 64, &mut extents).unwrap();
        assert_eq!(extents, [Extent { sectors: 64, hole: false }]);

        let all = IoBuf::zeroed(1 << 20);
        let read = std::pin::pin!(e.read(Lba(0), all.clone()));
        let (later, heard) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            pause(Duration::from_millis(300));
            later.send(()).unwrap();
        });
        let read = match select(read, heard).await {
            Either::Left(_) => panic!("a read of what nobody has is answered"),
            Either::Right((_, read)) => read,
        };
        let status = volume.status();
        assert!(!status.confirmed && status.failure.is_none(), "{status:?}");
        fs::rename(&away, &here).unwrap();
        read.await.unwrap();
        assert!(all.bytes() == &model[..1 << 20], "the whole of it");
    });
    assert!(volume.is_confirmed());
    on_lane(&volume, async |e| compare(&e, &model, "confirmed").await);
    assert_eq!(volume.status().background.store_trouble, None);
    host.detach().unwrap();
    bench.wipe_local();
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| compare(&e, &model, "from the store alone").await);
    host.detach().unwrap();
}

/// The store may have more than the dead process's log knows of. That is read from there: the log's room is free for others.
#[test]
fn what_the_store_has_is_not_read_from_the_log() {
    let (bench, mut model) = (Bench::new(SIZE), vec![0; SIZE]);
    let host = bench.attach().unwrap();
    let (here, away) = (bench.dir.path().join("store"), bench.dir.path().join("elsewhere"));
    fs::rename(&here, &away).unwrap();
    on_lane(host.volume(), async |e| {
        put(&e, 100, 8, 7).await;
        e.flush().await.unwrap();
    });
    model[100 * 4096..108 * 4096].fill(7);
    // As the disk has it if the process dies after the upload, and before it has noted that in the log.
    let log = fs::read(bench.log()).unwrap();
    fs::rename(&away, &here).unwrap();
    drain(host.volume());
    host.abandon().unwrap();
    let block = log.windows(4096).step_by(4096).position(|b| b.iter().all(|x| *x == 7)).expect("it is in the log");
    fs::write(bench.log(), &log).unwrap();

    let host = resume(&bench);
    confirm(host.volume());
    assert_eq!(host.volume().status().log.entries, 0, "the store has it all");
    // What the next round of the log would do there.
    let file = fs::OpenOptions::new().write(true).open(bench.log()).unwrap();
    file.write_all_at(&[3; 8 * 4096], block as u64 * 4096).unwrap();
    file.sync_all().unwrap();
    on_lane(host.volume(), async |e| compare(&e, &model, "from the store").await);
    host.detach().unwrap();
}

#[test]
fn it_may_die_again_before_the_store_was_asked() {
    let (bench, mut model, mut rng) = (Bench::new(SIZE), vec![0; SIZE], Rng(2));
    dead(&bench, &mut model, &mut rng);
    let (here, away) = (bench.dir.path().join("store"), bench.dir.path().join("elsewhere"));
    fs::rename(&here, &away).unwrap();
    for _ in 0..5 {
        let host = resume(&bench);
        on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 60).await);
        assert!(!host.volume().is_confirmed());
        host.abandon().unwrap();
    }
    fs::rename(&away, &here).unwrap();
    let host = resume(&bench);
    on_lane(host.volume(), async |e| {
        churn(&e, &mut model, &mut rng, 60).await;
        compare(&e, &model, "after many deaths").await;
    });
    host.abandon().unwrap();
    // And any way of attaching takes what another has left.
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| compare(&e, &model, "attached").await);
    host.detach().unwrap();
}

#[test]
fn one_that_was_taken_meanwhile_is_lost_and_its_log_kept() {
    let (bench, mut model, mut rng) = (Bench::new(SIZE), vec![0; SIZE], Rng(3));
    dead(&bench, &mut model, &mut rng);
    let other = AttachOptions { log_path: bench.dir.path().join("b/vol.wal"), force: true, ..bench.options() };
    let host = Host::attach(other).unwrap();
    on_lane(host.volume(), async |e| put(&e, 5, 1, 9).await);

    let zombie = resume(&bench);
    let begun = Instant::now();
    while !zombie.volume().is_gone() {
        assert!(begun.elapsed() < Duration::from_secs(30), "it does not find out");
        pause(Duration::from_millis(20));
    }
    let why = zombie.volume().status().failure.unwrap();
    assert!(why.contains("was taken by host") && why.contains("vol.wal"), "{why}");
    on_lane(zombie.volume(), async |e| {
        assert_eq!(e.write(Lba(0), IoBuf::zeroed(4096), false).await, Err(IoFault::Gone));
        assert_eq!(get(&e, 0).await, Err(IoFault::Gone));
    });
    assert_eq!(zombie.detach().expect_err("it has nothing to release").kind(), ErrorKind::Fenced);
    on_lane(host.volume(), async |e| assert_eq!(get(&e, 5).await, Ok(9)));
    host.detach().unwrap();
    bench.attach().unwrap().detach().unwrap();
    assert!(bench.dir.path().join("wal/vol.wal.aside-1").exists());
}

#[test]
fn without_a_log_it_is_an_attach_like_any_other() {
    let (bench, mut model, mut rng) = (Bench::new(SIZE), vec![0; SIZE], Rng(4));
    let host = resume(&bench);
    confirm(host.volume());
    on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 50).await);
    host.detach().unwrap();
    // A log of a clean end: there is nothing to replay, and all is in the store.
    let host = resume(&bench);
    on_lane(host.volume(), async |e| compare(&e, &model, "after a clean end").await);
    confirm(host.volume());
    host.detach().unwrap();
}

#[test]
fn a_request_waits_no_longer_than_it_may() {
    let bench = Bench::new(128 << 20);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 30_000, 8, 9).await);
    host.detach().unwrap();
    let host = Host::attach(AttachOptions { io_timeout: Some(LIMIT), ..bench.options() }).unwrap();
    let volume = host.volume().clone();
    let (here, away) = (bench.dir.path().join("store"), bench.dir.path().join("elsewhere"));
    fs::rename(&here, &away).unwrap();
    let failed = on_lane(&volume, async |e| {
        let mut full = None;
        for i in 0..90 {
            let begun = Instant::now();
            match e.write(Lba(i * 2048), buf_of(&vec![i as u8 + 1; 1 << 20]), false).await {
                Ok(()) => assert!(full.is_none(), "room, and nothing was uploaded"),
                Err(fault) => {
                    assert_eq!(fault, IoFault::TimedOut);
                    assert!((LIMIT..3 * LIMIT).contains(&begun.elapsed()), "{:?}", begun.elapsed());
                    full = full.or(Some(i));
                }
            }
            if full.is_some_and(|first| i == first + 3) {
                break;
            }
        }
        let full = full.expect("a log of 64 MiB takes no 90");
        // The log is full to the last megabyte; a little more may go in before it says so.
        while e.discard(Lba(200_000), 8, false).await.is_ok() {}
        assert_eq!(e.discard(Lba(200_000), 8, false).await, Err(IoFault::TimedOut));
        for i in (0..full).step_by(7) {
            assert_eq!(get(&e, i * 256 + 5).await, Ok(i as u8 + 1), "what is in the log is read");
        }
        e.flush().await.expect("the log's disk is well");
        let begun = Instant::now();
        assert_eq!(get(&e, 30_001).await, Err(IoFault::TimedOut), "what is in the store alone");
        assert!((LIMIT..3 * LIMIT).contains(&begun.elapsed()), "{:?}", begun.elapsed());
        full
    });
    let status = volume.status();
    assert!(status.timeouts >= 6 && status.failure.is_none(), "{status:?}");
    fs::rename(&away, &here).unwrap();
    on_lane(&volume, async |e| {
        // As an impatient client does: again, until it goes.
        let begun = Instant::now();
        while e.write(Lba(failed * 2048), buf_of(&[77; BLOCK]), false).await.is_err() {
            assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", volume.status());
        }
        for i in 0..failed + 3 {
            let (block, buf) = (i * 256 + 1, IoBuf::zeroed(BLOCK));
            e.read(Lba(block * 8), buf.clone()).await.unwrap();
            let expect = if i < failed { i as u8 + 1 } else { 0 };
            assert!(buf.bytes().iter().all(|b| *b == expect), "MiB {i} of {failed}: what failed shows");
        }
        assert_eq!((get(&e, failed * 256).await, get(&e, 30_001).await), (Ok(77), Ok(9)));
    });
    host.detach().unwrap();
}

/// A call that is tried again has not failed yet, and may not for an hour: `status` must not keep silent for so long.
#[test]
fn the_status_says_at_once_that_the_store_does_not_answer() {
    let bench = Bench::new(SIZE);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 5, 1, 9).await);
    host.detach().unwrap();
    let host = Host::attach(AttachOptions { io_timeout: Some(LIMIT), ..bench.options() }).unwrap();
    let (here, away) = (bench.dir.path().join("store"), bench.dir.path().join("elsewhere"));
    fs::rename(&here, &away).unwrap();
    on_lane(host.volume(), async |e| assert_eq!(get(&e, 5).await, Err(IoFault::TimedOut)));
    let trouble = || host.volume().status().background;
    pause(Duration::from_secs(2));
    let said = trouble();
    assert!(said.store_trouble.as_ref().is_some_and(|t| t.contains("store folder")), "{said:?}");
    assert!(said.store_trouble_secs.is_some_and(|s| s > 0.5), "{said:?}");
    fs::rename(&away, &here).unwrap();
    let begun = Instant::now();
    while on_lane(host.volume(), async |e| get(&e, 5).await) != Ok(9) {
        assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", trouble());
    }
    let said = trouble();
    assert_eq!((said.store_trouble, said.store_trouble_secs), (None, None));
    host.detach().unwrap();
}

/// As if another host had taken it. One look that finds none may be an outage; three in a row are not.
#[test]
fn a_volume_that_is_deleted_meanwhile_is_lost() {
    let bench = Bench::new(SIZE);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 5, 1, 9).await);
    drain(host.volume());
    fs::remove_file(bench.dir.path().join("store/vol/manifest.json")).unwrap();
    let begun = Instant::now();
    while !host.volume().is_gone() {
        assert!(begun.elapsed() < Duration::from_secs(90), "it does not find out");
        pause(Duration::from_millis(50));
    }
    assert!(begun.elapsed() > Duration::from_secs(15), "after {:?}", begun.elapsed());
    on_lane(host.volume(), async |e| assert_eq!(get(&e, 5).await, Err(IoFault::Gone)));
    assert_eq!(host.detach().expect_err("there is nothing to release").kind(), ErrorKind::Fenced);
}
