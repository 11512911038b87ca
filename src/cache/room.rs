//! The slots of the cache's file: which are free, and how far the file may grow.
//!
//! Invariants:
//! - A slot is free, or one [`Slot`] has it. Of the free ones those that were used come first, the one that has been free the longest before
//!   others; then new ones; and those that could not be written when nothing else is left.
//! - The file ends at most [`STEP`] slots behind the last one that was ever handed out. So another life knows what may hold something, and
//!   asks anew whether there is room for the rest.
//! - No slot is new, and none gets its place on the disk, in the last tenth of the file system, which logs may need. One that has its place
//!   may be used whatever comes.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::slot::SLOT_BYTES;
use crate::disk::file::DataFile;
use crate::error::{Context, Result};

/// Slots that the file grows by, 34 MiB: who extends a file waits for what is being read from it.
const STEP: u32 = 512;
/// New slots between two looks at the file system, 4 MiB and a little; and used ones, while it has no room.
const LOOK: u32 = 64;

#[derive(Debug)]
struct Free {
    used: VecDeque<u32>,
    fresh: Range<u32>,
    failed: VecDeque<u32>,
    /// Slots that the file has room for.
    grown: u32,
    /// Of those, up to where they have their places on the disk, or a look has allowed them.
    sure: u32,
    /// Whether the file system had room at the last look.
    roomy: bool,
    /// Slots handed out since it has had none.
    since: u32,
}

/// See the module's page.
#[derive(Debug)]
pub(super) struct Room {
    file: Arc<DataFile>,
    total: u32,
    free: Mutex<Free>,
    /// For tests: in place of the file system, what it has to spare.
    #[cfg(test)]
    pub(super) spare: std::sync::atomic::AtomicU64,
}

/// A slot that somebody has; free again when it is dropped.
#[derive(Debug)]
pub(super) struct Slot {
    number: u32,
    room: Arc<Room>,
    failed: bool,
}

impl Slot {
    pub(super) fn at(&self) -> u64 {
        u64::from(self.number) * SLOT_BYTES
    }

    /// It could not be written: others go before it.
    pub(super) fn fail(mut self) {
        self.failed = true;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let free = &mut *self.room.free();
        if self.failed { &mut free.failed } else { &mut free.used }.push_back(self.number);
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
        let (used, failed) = (VecDeque::new(), VecDeque::new());
        let free = Free { used, fresh: old..total, failed, grown: old, sure: old, roomy: true, since: 0 };
        let room = Self {
            file,
            total,
            free: Mutex::new(free),
            #[cfg(test)]
            spare: u64::MAX.into(),
        };
        Ok((Arc::new(room), old))
    }

    fn free(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many slots there may be now.
    pub(super) fn limit(&self) -> u32 {
        let free = self.free();
        if free.roomy { self.total } else { free.fresh.start.max(free.sure) }
    }

    /// A slot that an earlier life may have left something in; to be called once for each.
    pub(super) fn claim(self: &Arc<Self>, number: u32) -> Slot {
        Slot { number, room: Arc::clone(self), failed: false }
    }

    /// A slot to be written, if one is free.
    pub(super) fn take(self: &Arc<Self>) -> Option<Slot> {
        let mut free = self.free();
        if !free.roomy {
            free.since += 1;
            if free.since >= LOOK {
                self.look(&mut free);
            }
        }
        let number = free.used.pop_front().or_else(|| self.fresh(&mut free)).or_else(|| free.failed.pop_front())?;
        drop(free);
        Some(self.claim(number))
    }

    fn fresh(&self, free: &mut Free) -> Option<u32> {
        let is_sure = free.fresh.start < free.sure;
        if free.fresh.is_empty() || !(is_sure || self.look(free)) {
            return None;
        }
        free.fresh.next()
    }

    /// Whether more slots may be new: not in the last tenth of the file system, which logs may need. The file has room for them then.
    fn look(&self, free: &mut Free) -> bool {
        let fit = (self.spare() / SLOT_BYTES).min(STEP.into()) as u32;
        let grown = (fit >= LOOK.min(free.fresh.len() as u32)).then(|| self.grow(free, fit));
        let roomy = matches!(grown, Some(Ok(())));
        free.since = 0;
        if std::mem::replace(&mut free.roomy, roomy) && !roomy {
            let why = match grown {
                Some(Err(e)) => e.to_string(),
                _ => "its file system is nearly full".to_owned(),
            };
            tracing::warn!("the cache {} grows no further: {why}", self.file.path().display());
        }
        roomy
    }

    /// Bytes that are free beside the file system's last tenth.
    #[cfg(not(test))]
    fn spare(&self) -> u64 {
        // The fields' types differ from platform to platform.
        #[allow(clippy::useless_conversion, clippy::allow_attributes, reason = "see above")]
        nix::sys::statvfs::fstatvfs(&*self.file).map_or(0, |fs| {
            let spare = u64::from(fs.blocks_available()).saturating_sub(u64::from(fs.blocks()) / 10);
            spare.saturating_mul(u64::from(fs.fragment_size()))
        })
    }

    #[cfg(test)]
    fn spare(&self) -> u64 {
        self.spare.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Makes `by` slots sure, or as many as there may be.
    fn grow(&self, free: &mut Free, by: u32) -> std::io::Result<()> {
        let next = free.fresh.start;
        if next < free.sure || free.fresh.is_empty() {
            return Ok(());
        }
        if next < free.grown {
            // A file whose slots get their places when they are written.
            free.sure = (next + LOOK).min(free.grown);
            return Ok(());
        }
        let grown = (next + by).min(self.total);
        let file = self.file.dup()?;
        let (from, to) = (u64::from(next) * SLOT_BYTES, u64::from(grown) * SLOT_BYTES);
        // What has its place on the disk is written without a thread of the kernel's that looks for one.
        match fallocate(&file, FallocateFlags::empty(), from.cast_signed(), (to - from).cast_signed()) {
            Ok(()) => free.sure = grown,
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL) => {
                file.set_len(to)?;
                free.sure = (next + LOOK).min(grown);
            }
            Err(e) => {
                // Some of it may have been taken, and nothing is to be gained by it: should it not be given back, it is taken later.
                let _ = file.set_len(from);
                return Err(e.into());
            }
        }
        free.grown = grown;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

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
        let (room, old) = Room::of(file(&dir), 700).expect("room");
        assert_eq!((old, room.file.size().expect("size")), (0, 0));
        let some = numbers(&room, 3);
        assert_eq!(some.iter().map(|s| s.number).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(room.file.size().expect("size"), u64::from(STEP) * SLOT_BYTES);
        drop(some);
        assert_eq!(numbers(&room, 2).iter().map(|s| s.number).collect::<Vec<_>>(), [0, 1]);
        let next: Vec<u32> = numbers(&room, 3).iter().map(|s| s.number).collect();
        assert_eq!(next, [2, 0, 1], "who was given back last comes last");
        assert_eq!(numbers(&room, 1000).len(), 700);
        assert_eq!(room.file.size().expect("size"), 700 * SLOT_BYTES);
        drop(room);
        // What another life finds; and a smaller cache.
        assert_eq!(Room::of(file(&dir), 700).expect("room").1, 700);
        let (smaller, old) = Room::of(file(&dir), 90).expect("room");
        assert_eq!((old, smaller.file.size().expect("size")), (90, 90 * SLOT_BYTES));
    }

    #[test]
    fn who_cannot_be_written_comes_after_all_others() {
        let dir = tempfile::tempdir().expect("dir");
        let (room, _) = Room::of(file(&dir), 3).expect("room");
        room.take().expect("a slot").fail();
        assert_eq!(numbers(&room, 9).iter().map(|s| s.number).collect::<Vec<_>>(), [1, 2, 0]);
    }

    #[test]
    fn without_room_what_there_is_goes_round() {
        let dir = tempfile::tempdir().expect("dir");
        let (room, _) = Room::of(file(&dir), 700).expect("room");
        let some = numbers(&room, 10);
        room.spare.store(0, Ordering::Relaxed);
        // What has its place is used.
        let more = numbers(&room, 700);
        assert_eq!((more.len(), room.limit()), (STEP as usize - 10, STEP));
        drop((some, more));
        assert_eq!(numbers(&room, 700).len(), STEP as usize);
        // It looks again after a while.
        room.spare.store(u64::MAX, Ordering::Relaxed);
        for _ in 0..LOOK {
            drop(room.take());
        }
        assert_eq!((room.limit(), numbers(&room, 900).len()), (700, 700));
    }

    #[test]
    fn no_more_is_taken_than_the_file_system_has_to_spare() {
        let dir = tempfile::tempdir().expect("dir");
        let (room, _) = Room::of(file(&dir), 700).expect("room");
        room.spare.store(u64::from(LOOK) * SLOT_BYTES - 1, Ordering::Relaxed);
        assert_eq!(numbers(&room, 9).len(), 0, "so little is not worth it");
        room.spare.store(100 * SLOT_BYTES, Ordering::Relaxed);
        let first = numbers(&room, 100);
        assert_eq!((first.len(), room.file.size().expect("size")), (100, 100 * SLOT_BYTES));
        room.spare.store(0, Ordering::Relaxed);
        assert_eq!((numbers(&room, 1).len(), room.limit()), (0, 100));
    }
}
