//! The slots of the cache's file: which are free, and how far the file may grow.
//!
//! Invariants:
//! - A slot is free, or one [`Slot`] has it. Of the free ones that were used the one comes next that has been free the longest: one that
//!   cannot be written is not tried over and over.
//! - The file ends at most [`STEP`] slots behind the last one that was ever handed out. So another life knows what may hold something, and
//!   asks anew whether there is room for the rest.
//! - While the file system is nearly full no slot is new.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::slot::SLOT_BYTES;
use crate::disk::file::DataFile;
use crate::error::{Context, Result};

/// Slots that the file grows by, 4 MiB and a little: at each there is a look at the file system.
const STEP: u32 = 64;

#[derive(Debug)]
struct Free {
    used: VecDeque<u32>,
    fresh: Range<u32>,
    /// Slots that the file has room for.
    grown: u32,
}

/// See the module's page.
#[derive(Debug)]
pub(super) struct Room {
    file: Arc<DataFile>,
    total: u32,
    free: Mutex<Free>,
    /// Whether the file system had room at the last look.
    roomy: AtomicBool,
    /// How many slots there may be now.
    limit: AtomicU32,
    /// Slots handed out since it has had none.
    since: AtomicU32,
}

/// A slot that somebody has; free again when it is dropped.
#[derive(Debug)]
pub(super) struct Slot {
    number: u32,
    room: Arc<Room>,
}

impl Slot {
    pub(super) fn at(&self) -> u64 {
        u64::from(self.number) * SLOT_BYTES
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.room.free().used.push_back(self.number);
    }
}

impl Room {
    /// The `total` slots of a file that is cut to that size, and how many of them may hold something: those are to be [`Self::claim`]ed.
    ///
    /// # Errors
    /// The file system's.
    pub(super) fn of(file: Arc<DataFile>, total: u32) -> Result<(Arc<Self>, u32)> {
        let had = file.size()?;
        let size = u64::from(total) * SLOT_BYTES;
        if had > size {
            file.dup()
                .and_then(|f| f.set_len(size))
                .context(|| format!("cutting the cache {}", file.path().display()))?;
        }
        // It grows by whole slots: what is cut inside of one was cut by somebody else.
        let old = (had / SLOT_BYTES).min(total.into()) as u32;
        let free = Mutex::new(Free { used: VecDeque::new(), fresh: old..total, grown: old });
        let (roomy, limit, since) = (true.into(), total.into(), 0.into());
        Ok((Arc::new(Self { file, total, free, roomy, limit, since }), old))
    }

    fn free(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many slots there may be now.
    pub(super) fn limit(&self) -> u32 {
        self.limit.load(Ordering::Relaxed)
    }

    /// A slot that an earlier life may have left something in; to be called once for each.
    pub(super) fn claim(self: &Arc<Self>, number: u32) -> Slot {
        Slot { number, room: Arc::clone(self) }
    }

    /// A slot to be written, if one is free.
    pub(super) fn take(self: &Arc<Self>) -> Option<Slot> {
        let mut free = self.free();
        if !self.roomy.load(Ordering::Relaxed) && self.since.fetch_add(1, Ordering::Relaxed) % STEP == STEP - 1 {
            self.look(&free);
        }
        let number = match free.used.pop_front() {
            Some(n) => n,
            None if free.fresh.is_empty() => return None,
            None => {
                let n = free.fresh.start;
                if n >= free.grown {
                    let grown = (n + STEP).min(self.total);
                    if !self.look(&free) || !self.grow(grown) {
                        return None;
                    }
                    free.grown = grown;
                }
                free.fresh.start += 1;
                n
            }
        };
        drop(free);
        Some(self.claim(number))
    }

    /// Whether the file may grow: not into the last tenth of the file system, which logs may need.
    fn look(&self, free: &Free) -> bool {
        let roomy = nix::sys::statvfs::fstatvfs(&*self.file).is_ok_and(|fs| fs.blocks_available() > fs.blocks() / 10);
        if self.roomy.swap(roomy, Ordering::Relaxed) && !roomy {
            tracing::warn!("the cache {} grows no further: its file system is nearly full", self.file.path().display());
        }
        self.limit.store(if roomy { self.total } else { free.fresh.start }, Ordering::Relaxed);
        roomy
    }

    fn grow(&self, slots: u32) -> bool {
        let grown = self.file.dup().and_then(|f| f.set_len(u64::from(slots) * SLOT_BYTES));
        if let Err(e) = &grown {
            tracing::debug!("the cache {} cannot grow: {e}", self.file.path().display());
        }
        grown.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(dir: &tempfile::TempDir) -> Arc<DataFile> {
        Arc::new(DataFile::open(&dir.path().join("c"), true).expect("file"))
    }

    fn numbers(room: &Arc<Room>, n: usize) -> Vec<Slot> {
        (0..n).map_while(|_| room.take()).collect()
    }

    #[test]
    fn the_file_grows_with_its_slots_and_the_oldest_free_one_is_next() {
        let dir = tempfile::tempdir().expect("dir");
        let (room, old) = Room::of(file(&dir), 100).expect("room");
        assert_eq!((old, room.file.size().expect("size")), (0, 0));
        let some = numbers(&room, 3);
        assert_eq!(some.iter().map(|s| s.number).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(room.file.size().expect("size"), u64::from(STEP) * SLOT_BYTES);
        drop(some);
        assert_eq!(numbers(&room, 2).iter().map(|s| s.number).collect::<Vec<_>>(), [0, 1]);
        let next: Vec<u32> = numbers(&room, 3).iter().map(|s| s.number).collect();
        assert_eq!(next, [2, 0, 1], "who was given back last comes last");
        assert_eq!(numbers(&room, 200).len(), 100);
        assert_eq!(room.file.size().expect("size"), 100 * SLOT_BYTES);
        drop(room);
        // What another life finds; and a smaller cache.
        assert_eq!(Room::of(file(&dir), 100).expect("room").1, 100);
        let (smaller, old) = Room::of(file(&dir), 90).expect("room");
        assert_eq!((old, smaller.file.size().expect("size")), (90, 90 * SLOT_BYTES));
    }

    #[test]
    fn without_room_what_there_is_goes_round() {
        let dir = tempfile::tempdir().expect("dir");
        let (room, _) = Room::of(file(&dir), 200).expect("room");
        let some = numbers(&room, 10);
        room.roomy.store(false, Ordering::Relaxed);
        room.limit.store(10, Ordering::Relaxed);
        drop(some);
        assert_eq!(numbers(&room, 10).len(), 10);
        assert_eq!(room.limit(), 10);
        // It looks again after a while.
        for _ in 0..STEP {
            drop(room.take());
        }
        assert_eq!(room.limit(), 200);
    }
}
