//! The log's room: slots that are live, free, pinned or not grown yet, who waits for them, and the checksums of what they
//! hold.
//!
//! Invariants:
//! - A slot is free only when all its entries are at or below a packed mark that is on stable storage in
//!   the superblock, the frontier has left it, the next segment's header is durable, and nobody pins it. So a
//!   power cut always leaves a segment from which the unpacked entries can be reached, if any was durable.
//! - Who waits for room is woken by whatever makes some, and by a failure.

use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};

use super::tail::Tail;
use super::{Live, Log, lock};
use crate::units::{BLOCK, Seq};
use crate::wal::codec::{LogPos, SLOTS_START};

/// Free slots to keep ready while the log may still grow.
const GROW_AHEAD: usize = 4;

impl Tail {
    /// Whether a record of so many bytes finds room: in the open segment, or in one of its own.
    pub(super) fn has_room(&self, record_bytes: u32, segment_bytes: u32) -> bool {
        !self.is_crowded() && (self.fits(record_bytes, segment_bytes) || !self.free.is_empty())
    }

    /// Who may look for room again, now that there may be some: each knows how much it needs.
    fn with_room(&mut self) -> Vec<Waker> {
        if self.is_crowded() { Vec::new() } else { std::mem::take(&mut self.room_waiters) }
    }
}

impl Log {
    /// Waits until a reservation of `record_bytes` may succeed again (or the log has failed).
    pub async fn room_freed(&self, record_bytes: u32) {
        std::future::poll_fn(|cx| {
            let mut t = lock(&self.tail);
            if t.has_room(record_bytes, self.geometry.segment_bytes) || self.failure().is_some() {
                return Poll::Ready(());
            }
            if !t.room_waiters.iter().any(|w| w.will_wake(cx.waker())) {
                t.room_waiters.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }

    /// Everything up to `through` is in the store and in the map: drops it from the journal.
    pub fn retire(&self, through: Seq) {
        let mut t = lock(&self.tail);
        let n = t.journal.partition_point(|e| e.seq <= through);
        let gone: u64 = t.journal.drain(..n).map(|e| e.stored_bytes()).sum();
        t.journal_bytes -= gone;
        let wakers = t.with_room();
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
            t.with_room()
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
            t.with_room()
        };
        wakers.into_iter().for_each(Waker::wake);
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
}
