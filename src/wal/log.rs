//! The log as all lanes share it.
//!
//! Invariants:
//! - Positions are reserved in order under `tail`'s lock; writes complete in any order. The *frontier* is
//!   the end of the contiguous completed log: a record behind it is in the file, and so is everything
//!   before it. It only advances.
//! - Records pass the frontier in log order, under `tail`'s lock; the sink (the overlay) and the journal
//!   see their entries then, so both are at every moment the state of a prefix of the log.
//! - *Durable* (D) is a value of the frontier read before a sync was submitted that then succeeded.
//! - A failed write or sync latches: from then on nothing is reserved, acknowledged or synced.
//! - A slot is free only when all its entries are at or below a packed mark that is on stable storage in
//!   the superblock, the frontier has left it, the next segment's header is durable, and nobody pins it. So a
//!   power cut always leaves a segment from which the unpacked entries can be reached, if any was durable.
//! - Lock order: `tail`, then a shard of the maps. Nothing under these locks waits.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Poll, Waker};

use tokio::sync::Notify;
use uuid::Uuid;

use super::codec::{LogPos, Placement, RecordEntry, RecordKind, SLOTS_START, SegmentHeader};
use crate::disk::Disk;
use crate::units::{BLOCK, Lba, Seq};

/// Free slots to keep ready while the log may still grow.
const GROW_AHEAD: usize = 4;

/// Entries that may wait to be packed, in memory; a few more come with the records in flight.
pub const MAX_ENTRIES: usize = 2 << 20;

/// Sizes of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes in a slot.
    pub segment_bytes: u32,
    /// The most slots.
    pub max_segments: u32,
}

impl Geometry {
    /// Where a slot begins in the file.
    #[must_use]
    pub const fn slot_offset(&self, slot: u32) -> u64 {
        SLOTS_START + slot as u64 * self.segment_bytes as u64
    }
    /// The slot that holds a 4096-byte block of the file.
    #[must_use]
    pub const fn slot_of(&self, file_block: u32) -> u32 {
        ((file_block as u64 * BLOCK as u64 - SLOTS_START) / self.segment_bytes as u64) as u32
    }
    /// Bytes of all slots together.
    #[must_use]
    pub const fn capacity(&self) -> u64 {
        self.segment_bytes as u64 * self.max_segments as u64
    }
    /// The largest record: any segment has room for it.
    #[must_use]
    pub const fn max_record(&self) -> u32 {
        self.segment_bytes - BLOCK as u32
    }
}

/// An entry of the completed log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogEntry {
    /// Its number.
    pub seq: Seq,
    /// First sector.
    pub lba: Lba,
    /// Sectors.
    pub sectors: u64,
    /// For data: the 4096-byte block of the log file that holds the first stored block.
    pub file_block: u32,
    /// What it does.
    pub kind: RecordKind,
}

impl LogEntry {
    /// The entry without its place.
    #[must_use]
    pub const fn record(&self) -> RecordEntry {
        RecordEntry { lba: self.lba, sectors: self.sectors, kind: self.kind }
    }
    /// Sizes this entry adds to the log's data.
    #[must_use]
    pub const fn stored_bytes(&self) -> u64 {
        self.record().stored_blocks() * BLOCK as u64
    }
}

/// Numbers the entries of a record and places its data: `first_block` is the file block after its header.
pub fn number_entries(
    entries: &[RecordEntry],
    first_seq: Seq,
    first_block: u32,
) -> impl Iterator<Item = LogEntry> + use<'_> {
    let mut block = first_block;
    entries.iter().enumerate().map(move |(i, e)| {
        let file_block = block;
        block += e.stored_blocks() as u32;
        LogEntry { seq: Seq(first_seq.0 + i as u64), lba: e.lba, sectors: e.sectors, file_block, kind: e.kind }
    })
}

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

#[derive(Debug)]
struct Pending {
    end: LogPos,
    done: Option<Vec<LogEntry>>,
    waker: Waker,
}

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

struct Tail {
    /// Segment being written; `None` before the first reservation after an attach.
    current: Option<Open>,
    last_end: LogPos,
    next_generation: u32,
    next_seq: Seq,
    packed: Seq,
    free: VecDeque<u32>,
    live: VecDeque<Live>,
    journal: VecDeque<LogEntry>,
    journal_bytes: u64,
    pending: VecDeque<Pending>,
    first_ticket: u64,
    passed_seq: Seq,
    room_waiters: Vec<Waker>,
    salt: Box<dyn FnMut() -> u64 + Send>,
}

impl Tail {
    /// Whether entries alone fill the log: small discards take little room in it, but memory each.
    fn is_crowded(&self) -> bool {
        self.journal.len() >= MAX_ENTRIES
    }
}

#[derive(Debug, Clone, Copy)]
struct Open {
    slot: u32,
    generation: u32,
    salt: u64,
    offset: u32,
    previous: u32,
}

#[derive(Default)]
struct SyncGate {
    running: bool,
    waiters: Vec<Waker>,
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
    slots_ready: AtomicU32,
    failure: OnceLock<String>,
    pins: Box<[AtomicU32]>,
    crcs: Box<[AtomicU32]>,
    gate: Mutex<SyncGate>,
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
        let journal_bytes = start.journal.iter().map(LogEntry::stored_bytes).sum();
        let passed_seq = Seq(start.next_seq.0 - 1);
        Self {
            volume,
            log_id,
            geometry,
            tail: Mutex::new(Tail {
                current: None,
                last_end: start.end,
                next_generation: start.next_generation,
                next_seq: start.next_seq,
                packed: start.packed,
                free: start.free.into(),
                live: start.live.into(),
                journal: start.journal.into(),
                journal_bytes,
                pending: VecDeque::new(),
                first_ticket: 0,
                passed_seq,
                room_waiters: Vec::new(),
                salt,
            }),
            frontier: AtomicU64::new(start.end.0),
            flush_target: AtomicU64::new(start.end.0),
            work_wanted: AtomicBool::new(false),
            durable: AtomicU64::new(start.end.0),
            carried: AtomicU64::new(start.end.0),
            slots_ready: AtomicU32::new(start.slots_ready),
            failure: OnceLock::new(),
            pins: (0..geometry.max_segments).map(|_| AtomicU32::new(0)).collect(),
            crcs: (0..blocks).map(|_| AtomicU32::new(0)).collect(),
            gate: Mutex::new(SyncGate::default()),
            sink,
            work: Notify::new(),
        }
    }

    /// The volume.
    #[must_use]
    pub const fn volume(&self) -> Uuid {
        self.volume
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

    /// Everything below is on stable storage.
    #[must_use]
    pub fn durable(&self) -> LogPos {
        LogPos(self.durable.load(Ordering::Acquire))
    }

    /// Whether the newest durable mark is not yet in any record.
    #[must_use]
    pub fn durable_is_news(&self) -> bool {
        self.durable() > LogPos(self.carried.load(Ordering::Relaxed))
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
        let waiters = std::mem::take(&mut lock(&self.gate).waiters);
        waiters.into_iter().for_each(Waker::wake);
        self.work.notify_one();
    }

    /// Reserves room for a record of `record_bytes` with `entries` entries, in the next place of the log.
    /// `waker` is woken when the frontier passes it, if that happens in another lane's hands.
    ///
    /// # Errors
    /// When the log is full or has failed.
    pub fn reserve(&self, record_bytes: u32, entries: u32, waker: &Waker) -> Result<Room, Refused> {
        debug_assert!(record_bytes <= self.geometry.max_record());
        let mut t = lock(&self.tail);
        if self.failure().is_some() {
            return Err(Refused::Failed);
        }
        if t.is_crowded() {
            return Err(Refused::Full);
        }
        let fits = t.current.is_some_and(|c| c.offset + record_bytes <= self.geometry.segment_bytes);
        let mut segment = None;
        if !fits {
            let Some(slot) = t.free.pop_front() else { return Err(Refused::Full) };
            let salt = (t.salt)();
            let generation = t.next_generation;
            t.next_generation += 1;
            segment = Some(SegmentHeader {
                volume: self.volume,
                log_id: self.log_id,
                generation,
                salt,
                predecessor_end: t.last_end,
                packed_through: t.packed,
                first_seq: t.next_seq,
            });
            let last_seq = Seq(t.next_seq.0 - 1);
            t.live.push_back(Live { slot, generation, last_seq });
            t.current = Some(Open { slot, generation, salt, offset: BLOCK as u32, previous: 0 });
        }
        let durable = self.durable();
        let clean = durable == t.last_end && t.pending.is_empty();
        let first_seq = t.next_seq;
        let Some(open) = t.current.as_mut() else { return Err(Refused::Full) };
        let placement = Placement {
            generation: open.generation,
            salt: open.salt,
            offset: open.offset,
            predecessor: open.previous,
            first_seq,
            durable,
        };
        let slot_at = self.geometry.slot_offset(open.slot);
        let record_at = slot_at + u64::from(open.offset);
        open.previous = open.offset;
        open.offset += record_bytes;
        let end = LogPos::new(open.generation, open.offset);
        t.last_end = end;
        t.next_seq.0 += u64::from(entries);
        let last = Seq(t.next_seq.0 - 1);
        if let Some(live) = t.live.back_mut() {
            live.last_seq = last;
        }
        let ticket = t.first_ticket + t.pending.len() as u64;
        t.pending.push_back(Pending { end, done: None, waker: waker.clone() });
        self.carried.fetch_max(durable.0, Ordering::Relaxed);
        Ok(Room {
            file_offset: if segment.is_some() { slot_at } else { record_at },
            segment,
            placement,
            record_block: (record_at / BLOCK as u64) as u32,
            clean,
            end,
            ticket,
        })
    }

    /// The record of `room` is in the file. Its entries, and those of records that waited for it, reach the sink
    /// and the journal; the frontier advances over them, and other lanes that waited are woken.
    pub fn complete(&self, room: &Room, entries: Vec<LogEntry>) {
        let mut t = lock(&self.tail);
        if self.failure().is_some() {
            return;
        }
        let at = (room.ticket - t.first_ticket) as usize;
        t.pending[at].done = Some(entries);
        while t.pending.front().is_some_and(|p| p.done.is_some()) {
            let Some(Pending { end, done, waker }) = t.pending.pop_front() else { break };
            t.first_ticket += 1;
            for e in done.iter().flatten() {
                (self.sink)(e);
                t.journal_bytes += e.stored_bytes();
                t.passed_seq = e.seq;
            }
            if done.as_ref().is_some_and(|d| !d.is_empty()) {
                self.flush_target.store(end.0, Ordering::Release);
            }
            self.frontier.store(end.0, Ordering::Release);
            t.journal.extend(done.into_iter().flatten());
            waker.wake();
        }
        drop(t);
        self.tell();
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

    /// What a flush that is issued now has to make durable.
    #[must_use]
    pub fn flush_target(&self) -> LogPos {
        LogPos(self.flush_target.load(Ordering::Acquire))
    }

    /// Waits until the frontier has reached `end`. The waker given to [`Log::reserve`] is what wakes the task.
    ///
    /// # Errors
    /// When the log fails first.
    pub async fn passed(&self, end: LogPos) -> Result<(), Failed> {
        std::future::poll_fn(|_| {
            // Order matters: a failure does not take back what had passed before it.
            if self.frontier() >= end {
                Poll::Ready(Ok(()))
            } else if self.failure().is_some() {
                Poll::Ready(Err(Failed))
            } else {
                Poll::Pending
            }
        })
        .await
    }

    /// Waits until a reservation may succeed again (or the log has failed).
    pub async fn room_freed(&self) {
        let mut registered = false;
        std::future::poll_fn(|cx| {
            if registered {
                return Poll::Ready(());
            }
            let mut t = lock(&self.tail);
            if !t.free.is_empty() && !t.is_crowded() || self.failure().is_some() {
                return Poll::Ready(());
            }
            t.room_waiters.push(cx.waker().clone());
            registered = true;
            Poll::Pending
        })
        .await;
    }

    /// Makes everything below `target` survive power loss. Waiters join only a sync that is not yet submitted.
    ///
    /// # Errors
    /// When the sync fails (which latches the log), or the log had failed.
    pub async fn sync_through<D: Disk>(&self, target: LogPos, disk: &D) -> Result<(), Failed> {
        loop {
            if self.durable() >= target {
                return Ok(());
            }
            if self.failure().is_some() {
                return Err(Failed);
            }
            if self.take_gate().await {
                let reached = self.frontier();
                let result = disk.sync().await;
                match &result {
                    Ok(()) => {
                        self.durable.fetch_max(reached.0, Ordering::AcqRel);
                    }
                    Err(e) => self.sync_failed(e),
                }
                let waiters = {
                    let mut g = lock(&self.gate);
                    g.running = false;
                    std::mem::take(&mut g.waiters)
                };
                waiters.into_iter().for_each(Waker::wake);
                if result.is_err() {
                    return Err(Failed);
                }
            }
        }
    }

    /// Everything up to `end` is durable by other means than [`Log::sync_through`]: a record was written with RWF_DSYNC
    /// over a durable log, or `end` was the frontier before somebody else's sync of the file was submitted.
    pub fn durable_to(&self, end: LogPos) {
        self.durable.fetch_max(end.0, Ordering::AcqRel);
    }

    fn sync_failed(&self, e: &io::Error) {
        self.fail(format!("syncing the log failed: {e}; what was written since the last sync may be lost"));
    }

    /// True: the caller runs the next sync. False: one that was running has ended; look again.
    async fn take_gate(&self) -> bool {
        let mut waited = false;
        std::future::poll_fn(|cx| {
            let mut g = lock(&self.gate);
            if !g.running {
                // A waiter looks at the durable mark first: the sync that ended may have been enough.
                if waited {
                    return Poll::Ready(false);
                }
                g.running = true;
                return Poll::Ready(true);
            }
            waited = true;
            g.waiters.push(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// Keeps a slot from being reused.
    pub fn pin(&self, file_block: u32) {
        self.pins[self.geometry.slot_of(file_block) as usize].fetch_add(1, Ordering::AcqRel);
    }

    /// Gives a pin back.
    pub fn unpin(&self, file_block: u32) {
        let before = self.pins[self.geometry.slot_of(file_block) as usize].fetch_sub(1, Ordering::AcqRel);
        debug_assert!(before > 0, "unpinned more often than pinned");
    }

    /// Remembers the checksum of a stored block, before its entry reaches the sink.
    pub fn set_crc(&self, file_block: u32, crc: u32) {
        self.crcs[(file_block - (SLOTS_START / BLOCK as u64) as u32) as usize].store(crc, Ordering::Release);
    }

    /// The checksum of a stored block.
    #[must_use]
    pub fn crc(&self, file_block: u32) -> u32 {
        self.crcs[(file_block - (SLOTS_START / BLOCK as u64) as u32) as usize].load(Ordering::Acquire)
    }

    /// The completed entries that are not yet packed, from `after`, until their data passes `max_bytes`
    /// (one at least, and at most `max_entries`).
    #[must_use]
    pub fn journal_after(&self, after: Seq, max_bytes: u64, max_entries: usize) -> Vec<LogEntry> {
        let t = lock(&self.tail);
        let skip = t.journal.partition_point(|e| e.seq <= after);
        let mut bytes = 0;
        let mut out = Vec::new();
        for e in t.journal.iter().skip(skip).take(max_entries) {
            bytes += e.stored_bytes();
            if bytes > max_bytes && !out.is_empty() {
                break;
            }
            out.push(*e);
        }
        out
    }

    /// The number of the newest entry that has passed the frontier.
    #[must_use]
    pub fn passed_seq(&self) -> Seq {
        lock(&self.tail).passed_seq
    }

    /// Everything up to `through` is in the store and in the map: drops it from the journal.
    pub fn retire(&self, through: Seq) {
        let mut t = lock(&self.tail);
        let n = t.journal.partition_point(|e| e.seq <= through);
        let gone: u64 = t.journal.drain(..n).map(|e| e.stored_bytes()).sum();
        t.journal_bytes -= gone;
        let wakers = if t.free.is_empty() { Vec::new() } else { std::mem::take(&mut t.room_waiters) };
        drop(t);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// The superblock on stable storage says that everything up to `packed` is in the store: frees slots.
    /// Returns whether a slot is held by pins alone (try again a little later).
    pub fn recycle(&self, packed: Seq) -> bool {
        let (frontier, durable) = (self.frontier(), self.durable());
        let mut held = false;
        let wakers = {
            let mut t = lock(&self.tail);
            t.packed = t.packed.max(packed);
            let packed = t.packed;
            let current = t.current.map(|c| c.slot);
            while let Some(&Live { slot, generation, last_seq }) = t.live.front() {
                // Before the first reservation after an attach, every live segment is a finished one.
                let left =
                    current.is_none_or(|c| c != slot) && (current.is_none() || generation < frontier.generation());
                // What follows must be found after a power cut, once this one is overwritten.
                let followed = t.live.get(1).is_some_and(|next| durable > LogPos::new(next.generation, BLOCK as u32));
                if last_seq > packed || !left || !followed {
                    break;
                }
                if self.pins[slot as usize].load(Ordering::Acquire) > 0 {
                    held = true;
                    break;
                }
                t.live.pop_front();
                t.free.push_back(slot);
            }
            if t.free.is_empty() { Vec::new() } else { std::mem::take(&mut t.room_waiters) }
        };
        wakers.into_iter().for_each(Waker::wake);
        held
    }

    /// A freshly written slot: the number of the next one to grow, if the log may and should grow.
    #[must_use]
    pub fn wants_slot(&self) -> Option<u32> {
        let ready = self.slots_ready.load(Ordering::Acquire);
        (ready < self.geometry.max_segments && lock(&self.tail).free.len() < GROW_AHEAD).then_some(ready)
    }

    /// Slot `slot` (as told by [`Log::wants_slot`]) exists on the disk, zeroed and synced.
    pub fn add_slot(&self, slot: u32) {
        self.slots_ready.store(slot + 1, Ordering::Release);
        let wakers = {
            let mut t = lock(&self.tail);
            t.free.push_back(slot);
            std::mem::take(&mut t.room_waiters)
        };
        wakers.into_iter().for_each(Waker::wake);
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
        }
    }
}
