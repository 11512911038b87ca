//! What a cache counts of itself.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// What a cache has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CacheStatus {
    /// Bytes of the file.
    pub size_bytes: u64,
    /// Bytes of chunks that are in it, rounded up to pages.
    pub used_bytes: u64,
    /// Reads, or parts of reads, that it answered.
    pub hits: u64,
    /// Their bytes.
    pub hit_bytes: u64,
    /// Those that had to go to the store.
    pub misses: u64,
    /// Their bytes.
    pub miss_bytes: u64,
    /// Bytes that were fetched before they were asked for.
    #[serde(default)]
    pub ahead_bytes: u64,
    /// Of these, bytes that are in memory until they are read, or written to it.
    #[serde(default)]
    pub held_bytes: u64,
    /// Bytes that were written to it.
    pub written_bytes: u64,
    /// Pages that failed their check, or could not be read, and were forgotten.
    pub damaged: u64,
    /// Pages that could not be written.
    pub failed_writes: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) hits: AtomicU64,
    pub(super) hit_bytes: AtomicU64,
    pub(super) misses: AtomicU64,
    pub(super) miss_bytes: AtomicU64,
    pub(super) ahead_bytes: AtomicU64,
    pub(super) held_bytes: AtomicU64,
    pub(super) written_bytes: AtomicU64,
    pub(super) damaged: AtomicU64,
    pub(super) failed_writes: AtomicU64,
}

impl Counts {
    pub(super) fn status(&self, size_bytes: u64, used_bytes: u64) -> CacheStatus {
        let of = |n: &AtomicU64| n.load(Ordering::Relaxed);
        CacheStatus {
            size_bytes,
            used_bytes,
            hits: of(&self.hits),
            hit_bytes: of(&self.hit_bytes),
            misses: of(&self.misses),
            miss_bytes: of(&self.miss_bytes),
            ahead_bytes: of(&self.ahead_bytes),
            held_bytes: of(&self.held_bytes),
            written_bytes: of(&self.written_bytes),
            damaged: of(&self.damaged),
            failed_writes: of(&self.failed_writes),
        }
    }
}
