//! What was just packed is in the local cache without a read of it.

use vb_ublk::units::Lba;
use vb_ublk::volume::engine::Engine;

use super::cache::{attach, cache_of, read, until_written};
use super::support_rng::Rng;
use super::volume_support::{Bench, churn, compare, drain, on_lane, put};

const MIB: usize = 1 << 20;

/// Slowly enough for the cache's disk: no lane's read goes to the store.
#[test]
fn what_was_written_is_read_here_when_the_log_has_let_go_of_it() {
    let bench = Bench::new(16 * MIB);
    let mut model = vec![0; 16 * MIB];
    let host = attach(&bench);
    for round in 0..6 {
        on_lane(host.volume(), async |e| churn(&e, &mut model, &mut Rng(round), 60).await);
        drain(host.volume());
        until_written(&host);
    }
    on_lane(host.volume(), async |e| compare(&e, &model, "here").await);
    let seen = cache_of(&host);
    assert!(seen.hit_bytes > 4 * MIB as u64, "{seen:?}");
    assert_eq!((seen.misses, seen.damaged), (0, 0), "{seen:?}");
    host.detach().unwrap();
}

/// The log, the cache and the map at once.
#[test]
fn what_is_written_over_meanwhile_is_read_as_it_is_now() {
    let bench = Bench::new(8 * MIB);
    let host = attach(&bench);
    for turn in 1..=5 {
        on_lane(host.volume(), async |e| put(&e, 0, 2048, turn).await);
        // Half of it is packed, half of it is in the log.
        drain(host.volume());
        on_lane(host.volume(), async |e| {
            put(&e, 512, 1024, turn + 100).await;
            e.discard(Lba(100 * 8), 50 * 8, false).await.unwrap();
            for (block, fill) in [(0, turn), (100, 0), (149, 0), (150, turn), (512, turn + 100), (1536, turn)] {
                assert!(read(&e, block, 1).await.iter().all(|b| *b == fill), "block {block}, turn {turn}");
            }
        });
    }
    host.detach().unwrap();
}
