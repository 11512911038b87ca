//! Where the log grows: places are given in order, records arrive in any, and pass in order again.
//!
//! Invariants:
//! - Positions are reserved in order under `tail`'s lock; writes complete in any order. The *frontier* is
//!   the end of the contiguous completed log: a record behind it is in the file, and so is everything
//!   before it. It only advances.
//! - Records pass the frontier in log order, under `tail`'s lock; the sink (the overlay) and the journal
//!   see their entries then, so both are at every moment the state of a prefix of the log.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};

use super::{Failed, Live, Log, LogEntry, MAX_ENTRIES, Refused, Room, Start, lock};
use crate::units::{BLOCK, Seq};
use crate::wal::codec::{LogPos, Placement, SegmentHeader};

/// A record on its way to the file.
#[derive(Debug)]
pub(super) struct Pending {
    end: LogPos,
    done: Option<Vec<LogEntry>>,
    pub(super) waker: Waker,
}

/// The segment that is being written.
#[derive(Debug, Clone, Copy)]
pub(super) struct Open {
    pub(super) slot: u32,
    generation: u32,
    salt: u64,
    pub(super) offset: u32,
    previous: u32,
}

/// What is under the lock.
pub(super) struct Tail {
    /// `None` before the first reservation after an attach.
    pub(super) current: Option<Open>,
    last_end: LogPos,
    next_generation: u32,
    next_seq: Seq,
    pub(super) packed: Seq,
    pub(super) free: VecDeque<u32>,
    pub(super) live: VecDeque<Live>,
    pub(super) journal: VecDeque<LogEntry>,
    pub(super) journal_bytes: u64,
    pub(super) pending: VecDeque<Pending>,
    first_ticket: u64,
    pub(super) passed_seq: Seq,
    pub(super) room_waiters: Vec<Waker>,
    salt: Box<dyn FnMut() -> u64 + Send>,
}

impl Tail {
    /// A log that has been replayed, or is new: nothing is under way.
    pub(super) fn new(start: Start, salt: Box<dyn FnMut() -> u64 + Send>) -> Self {
        Self {
            current: None,
            last_end: start.end,
            next_generation: start.next_generation,
            next_seq: start.next_seq,
            packed: start.packed,
            free: start.free.into(),
            live: start.live.into(),
            journal_bytes: start.journal.iter().map(LogEntry::stored_bytes).sum(),
            journal: start.journal.into(),
            pending: VecDeque::new(),
            first_ticket: 0,
            passed_seq: Seq(start.next_seq.0 - 1),
            room_waiters: Vec::new(),
            salt,
        }
    }

    /// Whether entries alone fill the log: small discards take little room in it, but memory each.
    pub(super) fn is_crowded(&self) -> bool {
        self.journal.len() >= MAX_ENTRIES
    }

    /// Whether the open segment has room for a record of so many bytes.
    pub(super) fn fits(&self, record_bytes: u32, segment_bytes: u32) -> bool {
        self.current.is_some_and(|c| c.offset + record_bytes <= segment_bytes)
    }
}

impl Log {
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
        let mut segment = None;
        if !t.fits(record_bytes, self.geometry.segment_bytes) {
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

    /// The number of the newest entry that has passed the frontier.
    #[must_use]
    pub fn passed_seq(&self) -> Seq {
        lock(&self.tail).passed_seq
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
}
