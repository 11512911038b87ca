//! The log as all lanes share it.
//!
//! - `entry`: sizes, and entries of the completed log.
//! - `tail`: places for records, the frontier, the journal.
//! - `sync`: the durable mark and the gate to it.
//! - `slots`: which room is free.
//!
//! Invariants, beside those that these files open with:
//! - A failed write or sync latches: from then on nothing is reserved, acknowledged or synced.
//! - Lock order: `tail`, then a shard of the maps. Nothing under these locks waits.

mod entry;
mod slots;
mod sync;
mod tail;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Waker;

use tokio::sync::Notify;
use uuid::Uuid;

pub(super) use entry::FileSlots;
pub use entry::{Geometry, LogEntry, number_entries};
use sync::SyncGate;
use tail::Tail;

use super::codec::{LogPos, Placement, SegmentHeader};
use super::recent::Recent;
use crate::units::{BLOCK, Seq};

/// Entries that may wait to be packed, in memory; a few more come with the records in flight.
pub const MAX_ENTRIES: usize = 2 << 20;

/// Room for one record.
#[derive(Debug)]
pub struct Room {
    /// Where to write in the file: the segment header if there is one, then the record.
    pub file_offset: u64,
    /// Goes in front of the record: it is the first of its segment.
    pub segment: Option<SegmentHeader>,
    /// For the record's header.
    pub placement: Placement,
    /// The file block at which the record itself begins.
    pub record_block: u32,
    /// Everything before this record was durable when it was placed.
    pub clean: bool,
    /// The log's position after the record.
    pub end: LogPos,
    ticket: u64,
}

/// Why nothing was reserved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The log is full: wait on [`Log::room_freed`].
    Full,
    /// The log has failed.
    Failed,
}

/// The log failed earlier; the reason is in [`Log::failure`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the log has failed")]
pub struct Failed;

/// A slot in use.
#[derive(Debug, Clone, Copy)]
pub struct Live {
    /// The slot.
    pub slot: u32,
    /// Its segment's generation.
    pub generation: u32,
    /// The highest entry number in it.
    pub last_seq: Seq,
}

/// What the log looks like to people and to backpressure.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LogStatus {
    /// Bytes the log may grow to.
    pub capacity_bytes: u64,
    /// Bytes it has on the disk so far.
    pub ready_bytes: u64,
    /// Bytes of it that cannot be reused yet.
    pub used_bytes: u64,
    /// Entries not yet in the store.
    pub entries: u64,
    /// Their data, in bytes.
    pub pending_bytes: u64,
    /// The newest completed entry.
    pub last_seq: u64,
    /// Everything up to here is in the store.
    pub packed_seq: u64,
    /// Syncs since the attach that flushes, FUA writes or time asked for, and that succeeded.
    #[serde(default)]
    pub syncs: u64,
}

/// See the module's page.
pub struct Log {
    volume: Uuid,
    log_id: u64,
    geometry: Geometry,
    tail: Mutex<Tail>,
    frontier: AtomicU64,
    /// End of the last passed record that has entries: what a flush has to reach.
    flush_target: AtomicU64,
    durable: AtomicU64,
    carried: AtomicU64,
    syncs: AtomicU64,
    slots_ready: AtomicU32,
    failure: OnceLock<String>,
    pins: Box<[AtomicU32]>,
    crcs: Box<[AtomicU32]>,
    recent: Recent,
    gate: SyncGate,
    sink: Box<dyn Fn(&LogEntry) + Send + Sync>,
    work: Notify,
    work_wanted: AtomicBool,
}

/// Where a log starts from: what replay found, or nothing.
pub struct Start {
    /// The number of the next entry.
    pub next_seq: Seq,
    /// Everything up to here is in the store.
    pub packed: Seq,
    /// The end of what replay kept; the next segment names it as its predecessor's. 0 when no slot is live: nothing
    /// before that segment is needed, and no durable mark may name what is not kept.
    pub end: LogPos,
    /// The next segment's generation: above every one on the disk.
    pub next_generation: u32,
    /// Slots in use, oldest first.
    pub live: Vec<Live>,
    /// Slots that may be written.
    pub free: Vec<u32>,
    /// Replayed entries above `packed`, in order.
    pub journal: Vec<LogEntry>,
    /// Slots that exist on the disk.
    pub slots_ready: u32,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic aborts the release build; in tests a poisoned lock still shows the first panic.
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Log {
    /// A log that continues from `start`. `sink` is told each entry as it passes the frontier, in order, under
    /// the log's lock; entries of `start.journal` are told at once.
    pub fn new(
        volume: Uuid,
        log_id: u64,
        geometry: Geometry,
        start: Start,
        salt: Box<dyn FnMut() -> u64 + Send>,
        sink: Box<dyn Fn(&LogEntry) + Send + Sync>,
    ) -> Self {
        let blocks = (geometry.capacity() / BLOCK as u64) as usize;
        start.journal.iter().for_each(&sink);
        Self {
            volume,
            log_id,
            geometry,
            frontier: AtomicU64::new(start.end.0),
            flush_target: AtomicU64::new(start.end.0),
            work_wanted: AtomicBool::new(false),
            durable: AtomicU64::new(start.end.0),
            carried: AtomicU64::new(start.end.0),
            syncs: AtomicU64::new(0),
            slots_ready: AtomicU32::new(start.slots_ready),
            tail: Mutex::new(Tail::new(start, salt)),
            failure: OnceLock::new(),
            pins: (0..geometry.max_segments).map(|_| AtomicU32::new(0)).collect(),
            crcs: (0..blocks).map(|_| AtomicU32::new(0)).collect(),
            recent: Recent::default(),
            gate: SyncGate::default(),
            sink,
            work: Notify::new(),
        }
    }

    /// The volume.
    #[must_use]
    pub const fn volume(&self) -> Uuid {
        self.volume
    }

    /// What was written lately, in memory.
    #[must_use]
    pub const fn recent(&self) -> &Recent {
        &self.recent
    }

    /// Sizes.
    #[must_use]
    pub const fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// End of the contiguous completed log.
    #[must_use]
    pub fn frontier(&self) -> LogPos {
        LogPos(self.frontier.load(Ordering::Acquire))
    }

    /// Bytes of log from `a` to the later `b`, about: segments between count whole.
    #[must_use]
    pub fn bytes_between(&self, a: LogPos, b: LogPos) -> u64 {
        let at = |p: LogPos| u64::from(p.generation()) * u64::from(self.geometry.segment_bytes) + u64::from(p.offset());
        at(b).saturating_sub(at(a))
    }

    /// Why the log has failed, if it has.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }

    /// Latches a failure; the first reason stays.
    pub fn fail(&self, reason: impl Into<String>) {
        let reason = reason.into();
        if self.failure.set(reason.clone()).is_ok() {
            tracing::error!("{reason}: no write or flush succeeds from now on; reads go on");
        }
        let wakers: Vec<Waker> = {
            let mut t = lock(&self.tail);
            let mut w = std::mem::take(&mut t.room_waiters);
            w.extend(t.pending.iter().map(|p| p.waker.clone()));
            w
        };
        wakers.into_iter().for_each(Waker::wake);
        self.gate.wake();
        self.work.notify_one();
    }

    fn tell(&self) {
        if self.work_wanted.swap(false, Ordering::AcqRel) {
            self.work.notify_one();
        }
    }

    /// Waits until something has happened in the log since the last call. Told once per call: a busy log does not
    /// wake the background for each record.
    pub async fn news(&self) {
        self.work_wanted.store(true, Ordering::Release);
        self.work.notified().await;
    }

    /// The present state.
    #[must_use]
    pub fn status(&self) -> LogStatus {
        let t = lock(&self.tail);
        let segment = u64::from(self.geometry.segment_bytes);
        let used = t.live.len() as u64 * segment - t.current.map_or(0, |c| segment - u64::from(c.offset).min(segment));
        LogStatus {
            capacity_bytes: self.geometry.capacity(),
            ready_bytes: u64::from(self.slots_ready.load(Ordering::Acquire)) * segment,
            used_bytes: used,
            entries: t.journal.len() as u64,
            pending_bytes: t.journal_bytes,
            last_seq: t.passed_seq.0,
            packed_seq: t.packed.0,
            syncs: self.syncs.load(Ordering::Relaxed),
        }
    }
}
