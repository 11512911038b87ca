//! Garbage collection: the space of blocks that were overwritten or discarded comes back.
//!
//! - [`usage`]: how much of each chunk is live. Pure.
//! - [`plan`]: which chunks are emptied next. Pure.
//! - [`scan`]: what is in the store, and what snapshots keep there.
//! - [`lent`]: what a clone's map names of its parents' chunks. Pure.
//! - [`gather`]: live blocks out of chunks that are to go, put into new ones.
//! - [`mod@sweep`]: what is deleted, and how.
//!
//! One round, by the background of an attached volume (`volume::background::gc`): the usage of the last *published* map is counted; chunks
//! that it does not name are deleted; of those that are mostly dead the live blocks are copied into new chunks, which take their places in
//! the map where that still says the source; a checkpoint is published; the next round finds the emptied chunks dead.
//!
//! Invariants:
//! - A chunk is deleted only when the published map and the maps of all snapshots do not name it, nor can any host that goes on from that
//!   manifest: it has a number up to the checkpoint's last, so whatever it brought had been applied when the checkpoint was cut. No
//!   number is given out twice, so what is dead stays dead, and a deletion that comes late, even one of a host that has lost the volume
//!   meanwhile, harms nobody.
//! - A chunk that a snapshot's map names is neither deleted nor emptied.
//! - A chunk that was written by garbage collection belongs to no group and counts through a published map alone. Extents keep the
//!   birth of their content, and discards that a chunk records outlive it, so that the chunks alone still tell what is newest.
//! - Before the first deletion after a checkpoint there is a copy of its manifest ([`sweep::copy_key`]): chunks of groups up to there may be gone.
//! - A chunk that cannot be read whole stays where it is.

pub mod gather;
pub mod lent;
pub mod plan;
pub mod scan;
pub mod sweep;
pub mod usage;

use std::time::Duration;

use crate::config::GarbageLimit;

/// So many times the live data: no volume has as much garbage. (Not infinity: it is reckoned with.)
const ANY: f64 = 1e6;

/// When garbage is collected, and how much.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// Whether at all.
    pub enabled: bool,
    /// A round begins when there is more garbage than this share of the live data…
    pub start: f64,
    /// …and goes on until there is no more than this…
    pub stop: f64,
    /// …and so many blocks: in a small volume nobody minds.
    pub slack_blocks: u64,
    /// Between two rounds; a tenth of it when there is enough garbage for one.
    pub pause: Duration,
    /// Objects that count for nothing are deleted when they have been seen for so long.
    pub grace: Duration,
    /// Between two lists of the store, which find what others have uploaded late.
    pub relist: Duration,
}

impl Policy {
    /// Collects all that is worth a request, at once: what a user asks for.
    #[must_use]
    pub fn thorough(&self) -> Self {
        Self { enabled: true, start: 0.02, stop: 0.02, slack_blocks: 0, pause: Duration::ZERO, ..self.clone() }
    }

    /// Begins when there is more garbage than the user allows, and ends a tenth below. Without a limit nothing is copied; what nobody
    /// needs any more is deleted all the same, and counted.
    #[must_use]
    pub fn above(limit: GarbageLimit) -> Self {
        let start = limit.0.map_or(ANY, |percent| f64::from(percent) / 100.0);
        Self { start, stop: start * 0.9, ..Self::default() }
    }

    /// Never.
    #[must_use]
    pub fn off() -> Self {
        Self { enabled: false, ..Self::default() }
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            enabled: true,
            start: 0.35,
            stop: 0.315,
            slack_blocks: 1024,
            pause: Duration::from_secs(5),
            grace: Duration::from_secs(3600),
            relist: Duration::from_secs(6 * 3600),
        }
    }
}
