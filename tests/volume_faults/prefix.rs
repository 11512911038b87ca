//! A host is lost in the middle of its work: the store alone holds a prefix of what was done.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use vb_ublk::disk::IoBuf;
use vb_ublk::units::{Lba, SECTOR};
use vb_ublk::volume::Command;
use vb_ublk::volume::engine::Engine;

use super::force;
use super::support_rng::Rng;
use super::volume_support::{Bench, TestLane, block_on, buf_of, on_lane};

/// Per sector, the number of the request that wrote it last; 0: zeros.
pub(super) type Stamps = Vec<u64>;

pub(super) async fn stamps(e: &TestLane, sectors: usize) -> Stamps {
    let b = IoBuf::zeroed(sectors * SECTOR);
    e.read(Lba(0), b.clone()).await.unwrap();
    let stamp = |s: &[u8]| {
        let first = &s[..8];
        assert!(s.chunks(8).all(|w| w == first), "a sector is torn");
        u64::from_le_bytes(first.try_into().unwrap())
    };
    b.bytes().chunks(SECTOR).map(stamp).collect()
}

struct Request {
    id: u64,
    lba: usize,
    sectors: usize,
    zeroes: bool,
}

/// Rounds of requests side by side, which do not overlap. `completed` counts whole rounds.
async fn rounds(e: &TestLane, rng: &mut Rng, sectors: usize, n: usize, completed: &AtomicUsize) -> Vec<Vec<Request>> {
    let mut history: Vec<Vec<Request>> = Vec::new();
    for _ in 0..n {
        let mut round: Vec<Request> = Vec::new();
        for _ in 0..1 + rng.below(6) {
            let len = if rng.below(3) == 0 { 1 + rng.below(200) } else { 1 + rng.below(17) } as usize;
            let lba = rng.below((sectors - len) as u64) as usize;
            if round.iter().all(|r| lba + len <= r.lba || r.lba + r.sectors <= lba) {
                round.push(Request { id: rng.next() | 1, lba, sectors: len, zeroes: rng.below(6) == 0 });
            }
        }
        let requests = round.iter().map(|r| async move {
            let lba = Lba(r.lba as u64);
            if r.zeroes {
                e.discard(lba, r.sectors as u64, false).await.unwrap();
            } else {
                let data = r.id.to_le_bytes().repeat(r.sectors * SECTOR / 8);
                e.write(lba, buf_of(&data), false).await.unwrap();
            }
        });
        futures_util::future::join_all(requests).await;
        history.push(round);
        completed.fetch_add(1, Ordering::SeqCst);
    }
    history
}

/// How many whole rounds explain what is found, if one cut does: all rounds before it, any requests of its own, none after.
fn explain(before: &Stamps, history: &[Vec<Request>], found: &Stamps) -> Option<usize> {
    let stamp = |r: &Request| if r.zeroes { 0 } else { r.id };
    let mut state = before.clone();
    let mut best = (*found == state).then_some(0);
    for (n, round) in history.iter().enumerate() {
        let mut partly = state.clone();
        for r in round {
            let range = r.lba..r.lba + r.sectors;
            state[range.clone()].fill(stamp(r));
            if found[range.clone()].iter().all(|s| *s == stamp(r)) {
                partly[range].fill(stamp(r));
            }
        }
        if partly == *found {
            best = Some(if state == *found { n + 1 } else { n });
        }
    }
    best
}

#[test]
fn the_store_alone_holds_a_prefix_with_all_that_was_drained() {
    const SECTORS: usize = 4096;
    let bench = Bench::new(SECTORS * SECTOR);
    let mut state: Stamps = vec![0; SECTORS];
    let mut rng = Rng(11);
    let mut cut_off = 0;
    for life in 0..10 {
        let host = force(&bench).unwrap();
        let volume = host.volume().clone();
        let (completed, drained, stop) =
            (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let drainer = {
            let (volume, completed, drained, stop) = (volume.clone(), completed.clone(), drained.clone(), stop.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    let n = completed.load(Ordering::SeqCst);
                    if block_on(volume.command(Command::Barrier)).is_err() {
                        return;
                    }
                    drained.store(n, Ordering::SeqCst);
                }
            })
        };
        let history = on_lane(&volume, async |e| {
            assert_eq!(stamps(&e, SECTORS).await, state, "life {life}");
            rounds(&e, &mut rng, SECTORS, 500, &completed).await
        });
        drop(volume);
        host.abandon().unwrap();
        stop.store(true, Ordering::SeqCst);
        drainer.join().unwrap();
        bench.wipe_local();

        let host = force(&bench).unwrap();
        let found = on_lane(host.volume(), async |e| stamps(&e, SECTORS).await);
        let whole = explain(&state, &history, &found);
        let must = drained.load(Ordering::SeqCst);
        assert!(whole.is_some_and(|n| n >= must), "life {life}: {whole:?} rounds explain it, {must} were drained");
        cut_off += usize::from(whole < Some(history.len()));
        state = found;
        if life % 2 == 0 {
            host.detach().unwrap();
        } else {
            host.abandon().unwrap();
            bench.wipe_local();
        }
    }
    assert!(cut_off > 3, "{cut_off} of 10 lives were cut off: too few to say anything");
}
