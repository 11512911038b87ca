//! A volume that is written over at random, again and again: what it takes in the store stays bounded, and what collecting costs, too.
//!
//! `VB_SOAK=1 cargo test --test volume_rewrite -- --nocapture` does it in full length, and prints the table of `docs/PERFORMANCE.md`.

#[path = "support_rng/mod.rs"]
mod support_rng;
#[allow(dead_code)]
#[path = "volume_support/mod.rs"]
mod volume_support;

use std::time::{Duration, Instant};

use support_rng::Rng;
use vb_ublk::disk::IoBuf;
use vb_ublk::gc::Policy;
use vb_ublk::units::{BLOCK, Lba};
use vb_ublk::volume::engine::Engine;
use vb_ublk::volume::host::{AttachOptions, Host};
use vb_ublk::volume::{Command, Volume};
use volume_support::{Bench, block_on, drain, on_lane, pause};

const MIB: u64 = 1 << 20;
/// Blocks of a write: 16 KiB.
const EXTENT: u64 = 4;
/// Writes at once.
const DEPTH: usize = 16;

/// How much faster than the load the log and the uploads have to be for collection to keep up beside them.
const HEADROOM: u64 = 6;

/// The length of a run.
struct Plan {
    size: u64,
    passes: u32,
    /// Bytes per second that are written, at most; a disk under a steady load, not one that is filled as fast as it goes. A machine
    /// whose first pass, which goes as fast as it can, does not reach [`HEADROOM`] times as much gets a load that it can bear.
    pace: u64,
    policy: Policy,
}

fn plan() -> Plan {
    if std::env::var("VB_SOAK").is_ok() {
        return Plan { size: 128 * MIB, passes: 20, pace: 16 * MIB, policy: Policy::default() };
    }
    let policy = Policy { slack_blocks: 256, pause: Duration::from_millis(1000), ..Policy::default() };
    Plan { size: 32 * MIB, passes: 6, pace: 12 * MIB, policy }
}

/// What a block holds: its number, and in which pass it was written.
fn block_of(block: u64, pass: u32) -> Vec<u8> {
    let word = (u64::from(pass) << 40 | block).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    word.repeat(BLOCK / 8)
}

fn holds(volume: &std::sync::Arc<Volume>, passes: &[u32], what: &str) {
    on_lane(volume, async |e| {
        for (block, pass) in (0..).zip(passes) {
            let b = IoBuf::zeroed(BLOCK);
            e.read(Lba(block * 8), b.clone()).await.unwrap();
            assert!(b.bytes() == block_of(block, *pass), "block {block} of pass {pass}, {what}");
        }
    });
}

struct Sample {
    stored: u64,
    put: u64,
}

fn look(bench: &Bench, volume: &Volume) -> Sample {
    let stored = block_on(bench.store().list("vol/chunks/", None)).unwrap().iter().map(|o| o.size).sum();
    let s = volume.status();
    Sample { stored, put: s.store_requests.put.bytes_out }
}

#[test]
fn rewriting_for_ever_takes_one_and_a_half_times_the_data() {
    let Plan { size, passes, mut pace, policy } = plan();
    let bench = Bench::new(size as usize);
    let host = Host::attach(AttachOptions { gc: policy, ..bench.options() }).unwrap();
    let (blocks, mut rng) = (size / BLOCK as u64, Rng(5));
    let mut newest = vec![0; blocks as usize];
    let mut kept = None;
    let (mut each, mut before) = (Vec::new(), look(&bench, host.volume()));
    println!("| pass | live MiB | stored at its end MiB | at most in it MiB | of the live data | uploaded / written |");
    println!("|---|---|---|---|---|---|");
    for pass in 1..=passes {
        let mut order: Vec<u64> = (0..blocks / EXTENT).collect();
        (1..order.len()).rev().for_each(|i| order.swap(i, rng.below(i as u64 + 1) as usize));
        let mut most_now = 0;
        let begun = Instant::now();
        for (done, some) in order.chunks(order.len() / 64).enumerate() {
            on_lane(host.volume(), async |e| {
                for batch in some.chunks(DEPTH) {
                    let writes = batch.iter().map(|extent| {
                        let data: Vec<u8> = (0..EXTENT).flat_map(|i| block_of(extent * EXTENT + i, pass)).collect();
                        let (e, at) = (&e, Lba(extent * EXTENT * 8));
                        async move { e.write(at, volume_support::buf_of(&data), false).await.unwrap() }
                    });
                    futures_util::future::join_all(writes).await;
                }
            });
            for extent in some {
                newest[(extent * EXTENT) as usize..][..EXTENT as usize].fill(pass);
            }
            let due = Duration::from_secs_f64((done as u64 + 1) as f64 * size as f64 / 64.0 / pace as f64);
            if pass > 1 {
                pause(due.saturating_sub(begun.elapsed()));
            }
            if done % 4 == 3 {
                most_now = most_now.max(look(&bench, host.volume()).stored);
            }
        }
        if pass == 1 {
            drain(host.volume());
            let reached = (size as f64 / begun.elapsed().as_secs_f64()) as u64;
            pace = pace.min(reached / HEADROOM).max(MIB);
            println!("written and uploaded at {} MiB/s, from now on {} MiB/s", reached / MIB, pace / MIB);
        }
        let now = look(&bench, host.volume());
        let factor = (now.put - before.put) as f64 / size as f64;
        println!(
            "| {pass} | {} | {} | {} | {:.2} | {factor:.2} |",
            size / MIB,
            now.stored / MIB,
            most_now / MIB,
            most_now as f64 / size as f64
        );
        before = now;
        // The first pass fills it; one that a snapshot is held in keeps more by right.
        if kept.is_none() && pass > 1 {
            each.push(most_now);
        }
        if pass == passes / 2 {
            block_on(host.volume().command(|reply| Command::Snapshot { name: "s".into(), created: 1, reply })).unwrap();
            kept = Some(newest.clone());
        }
        if pass == passes / 2 + 2 {
            let Some(kept) = kept.take() else { continue };
            let view = Host::attach(AttachOptions {
                volume: "vol@s".to_owned(),
                log_path: bench.dir.path().join("wal/s.wal"),
                ..bench.options()
            })
            .unwrap();
            holds(view.volume(), &kept, "in the snapshot");
            view.detach().unwrap();
            block_on(host.volume().command(|reply| Command::DeleteSnapshot { name: "s".into(), reply })).unwrap();
            // What it kept comes back.
            block_on(host.volume().command(Command::CollectGarbage)).unwrap();
        }
    }
    drain(host.volume());
    holds(host.volume(), &newest, "in the end");
    let s = host.volume().status();
    let written = size * u64::from(passes);
    let factor = s.store_requests.put.bytes_out as f64 / written as f64;
    each.sort_unstable();
    let times = |n: u64| n as f64 / size as f64;
    let (usual, most) = (times(each[(each.len() - 1) * 3 / 4]), times(each[each.len() - 1]));
    println!(
        "uploaded {factor:.2} times what was written; stored in three of four passes at most {usual:.2} times the live data, in all {most:.2}"
    );
    assert!(factor <= 2.0, "uploaded {factor:.2} times what was written");
    // A machine that is busy with other things holds a round up. In the short form a pass takes not much longer than a round.
    let limits = if std::env::var("VB_SOAK").is_ok() { (1.5, 1.8) } else { (2.0, 3.0) };
    assert!(usual <= limits.0 && most <= limits.1, "{usual:.2} and {most:.2} times the live data are stored");
    host.detach().unwrap();
}
