//! What was written to the log lately, in memory: so that packing it does not read it from the disk that writers want.
//!
//! It is kept in windows: stretches of the log's file of [`WINDOW_BLOCKS`] each. Lanes fill them, the background provides and empties them;
//! without any, nothing is kept.
//!
//! Invariants:
//! - Whoever writes a record copies its blocks into the windows that there are, before the record counts as complete: what a window has of an
//!   entry that is to be packed is that entry's, whatever was at its place before.
//! - A block's bytes are written by the lane whose record it is in, and looked at by nobody before its mark is set.
//! - A window's memory is used again when nobody holds it.
//! - Lanes allocate nothing: memory may be short because of what they write.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::disk::IoBuf;
use crate::machine::memory_bytes;
use crate::units::{BLOCK, Seq};

/// Blocks of a window.
pub const WINDOW_BLOCKS: u32 = 1024;
const WINDOW_BYTES: usize = WINDOW_BLOCKS as usize * BLOCK;
/// Windows of all volumes of this process at most; or this part of the memory, where that is less.
const MOST: usize = 64;
const PART: usize = 32;
/// Windows that one volume has at most: three groups; and no more than its log is large.
const MOST_OF_VOLUME: usize = 24;
/// Windows that come at once.
const AT_ONCE: usize = 4;
/// The same in bytes.
pub const PROVIDED_BYTES: u64 = (AT_ONCE * WINDOW_BYTES) as u64;

/// Volumes that need so few are not counted: their logs are that small.
const UNCOUNTED: usize = 3;

/// Windows that there are in this process.
static ALL: AtomicUsize = AtomicUsize::new(0);

/// How many there may be.
fn most() -> usize {
    MOST.min(usize::try_from(memory_bytes()).unwrap_or(usize::MAX) / PART / WINDOW_BYTES)
}

/// A place among [`ALL`].
struct Place;

impl Place {
    fn take() -> Option<Self> {
        let more = ALL.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < most()).then_some(n + 1));
        more.ok().map(|_| Self)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        ALL.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A stretch of the log's file.
pub struct Window {
    number: u32,
    data: IoBuf,
    /// A mark for each block that is here.
    here: [AtomicU64; WINDOW_BLOCKS as usize / 64],
    /// If it is one of [`ALL`].
    _place: Option<Place>,
}

impl Window {
    /// `None`: there may be no more of them, or the system has no memory to give.
    fn new(is_counted: bool) -> Option<Self> {
        let place = if is_counted { Some(Place::take()?) } else { None };
        let mut data = IoBuf::try_zeroed(WINDOW_BYTES)?;
        // Memory that nobody has touched is not there yet.
        data.bytes_mut().fill(0);
        Some(Self { number: 0, data, here: Default::default(), _place: place })
    }

    fn keep(&self, block: u32, bytes: &[u8]) {
        let at = (block % WINDOW_BLOCKS) as usize;
        self.data.copy_in(at * BLOCK, bytes);
        for n in at..at + bytes.len() / BLOCK {
            self.here[n / 64].fetch_or(1 << (n % 64), Ordering::Release);
        }
    }

    /// What the file has there, if it is here.
    #[must_use]
    pub fn block(&self, block: u32) -> Option<&[u8]> {
        let n = (block % WINDOW_BLOCKS) as usize;
        let is_here =
            block / WINDOW_BLOCKS == self.number && self.here[n / 64].load(Ordering::Acquire) & 1 << (n % 64) != 0;
        is_here.then(|| self.data.bytes_in(n * BLOCK..(n + 1) * BLOCK))
    }
}

#[derive(Default)]
struct Windows {
    /// With the last entry of which each has something.
    used: VecDeque<(Seq, Arc<Window>)>,
    /// Held by nobody else.
    free: Vec<Arc<Window>>,
}

/// See the module's page.
#[derive(Default)]
pub struct Recent {
    windows: Mutex<Windows>,
    /// There are windows.
    any: AtomicBool,
}

impl Recent {
    fn windows(&self) -> MutexGuard<'_, Windows> {
        self.windows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has windows for what is written from now on to a log of so many bytes, if there may be more of them.
    pub fn provide(&self, log_bytes: u64) {
        let enough = log_bytes.div_ceil(WINDOW_BYTES as u64) + 1;
        let enough = usize::try_from(enough).map_or(MOST_OF_VOLUME, |n| n.min(MOST_OF_VOLUME));
        let has = {
            let mut w = self.windows();
            let has = w.used.len() + w.free.len();
            // Nothing grows while lanes wait for the lock.
            w.used.reserve(MOST_OF_VOLUME);
            w.free.reserve(MOST_OF_VOLUME);
            has
        };
        for _ in has..enough.min(has + AT_ONCE) {
            let Some(fresh) = Window::new(enough > UNCOUNTED) else { break };
            // The lock is taken for this alone: lanes want it.
            let fresh = Arc::new(fresh);
            self.windows().free.push(fresh);
        }
        self.any.store(true, Ordering::Relaxed);
    }

    /// Whether it has no memory.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.any.load(Ordering::Relaxed)
    }

    /// Keeps the data of a record whose blocks begin at `first` and whose last entry is `last`, as far as there is room.
    pub(super) fn keep(&self, first: u32, last: Seq, data: &[IoBuf]) {
        if self.is_empty() {
            return;
        }
        let mut block = first;
        let mut window = None;
        for buf in data {
            let mut bytes = buf.bytes();
            while !bytes.is_empty() {
                if block == first || block.is_multiple_of(WINDOW_BLOCKS) {
                    window = self.window(block / WINDOW_BLOCKS, last);
                }
                let room = (WINDOW_BLOCKS - block % WINDOW_BLOCKS) as usize * BLOCK;
                let (now, rest) = bytes.split_at(room.min(bytes.len()));
                if let Some(window) = &window {
                    window.keep(block, now);
                }
                block += (now.len() / BLOCK) as u32;
                bytes = rest;
            }
        }
    }

    /// The window of that number, for something of the entries up to `last`.
    fn window(&self, number: u32, last: Seq) -> Option<Arc<Window>> {
        let mut w = self.windows();
        let Windows { used, free } = &mut *w;
        if let Some((newest, window)) = used.iter_mut().rev().find(|(_, w)| w.number == number) {
            *newest = last.max(*newest);
            return Some(Arc::clone(window));
        }
        let mut window = free.pop()?;
        Arc::get_mut(&mut window)?.number = number;
        used.push_back((last, Arc::clone(&window)));
        Some(window)
    }

    /// The window of a block, if there is one.
    #[must_use]
    pub fn of(&self, block: u32) -> Option<Arc<Window>> {
        let number = block / WINDOW_BLOCKS;
        self.windows().used.iter().find(|(_, w)| w.number == number).map(|(_, w)| Arc::clone(w))
    }

    /// What entries up to `through` have written is not asked for any more.
    pub fn done(&self, through: Seq) {
        let mut w = self.windows();
        let Windows { used, free } = &mut *w;
        while let Some(at) = used.iter().position(|(last, _)| *last <= through) {
            let Some((_, mut window)) = used.remove(at) else { break };
            // Else somebody has it, who drops it.
            if let Some(alone) = Arc::get_mut(&mut window) {
                alone.here = Default::default();
                free.push(window);
            }
        }
    }

    /// Gives back what memory is not in use.
    pub fn shrink(&self) {
        let free = std::mem::take(&mut self.windows().free);
        drop(free);
    }

    /// Gives all memory back.
    pub fn clear(&self) {
        self.any.store(false, Ordering::Relaxed);
        let all = std::mem::take(&mut *self.windows());
        drop(all);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(from: u8, n: u8) -> IoBuf {
        let buf = IoBuf::zeroed(usize::from(n) * BLOCK);
        (0..n).for_each(|i| buf.copy_in(usize::from(i) * BLOCK, &[from + i; BLOCK]));
        buf
    }

    /// The first byte of each block that is here.
    fn found(recent: &Recent, blocks: std::ops::Range<u32>) -> Vec<Option<u8>> {
        blocks.map(|b| recent.of(b).and_then(|w| w.block(b).map(|data| data[0]))).collect()
    }

    fn used_and_free(recent: &Recent) -> (usize, usize) {
        let w = recent.windows();
        (w.used.len(), w.free.len())
    }

    /// A log that needs three windows.
    const LOG: u64 = WINDOW_BYTES as u64 + 1;

    #[test]
    fn what_is_written_over_two_windows_is_here_until_it_is_done() {
        let recent = Recent::default();
        let at = 5 * WINDOW_BLOCKS - 3;
        recent.keep(at, Seq(7), &[blocks(1, 2), blocks(3, 4)]);
        assert_eq!(found(&recent, at..at + 1), [None], "nobody has provided anything");
        recent.provide(LOG);
        recent.keep(at, Seq(7), &[blocks(1, 2), blocks(3, 4)]);
        let all: Vec<_> = [None].into_iter().chain((1..7).map(Some)).chain([None]).collect();
        assert_eq!(found(&recent, at - 1..at + 7), all);
        // The second window gets something newer, and stays.
        recent.keep(at + 100, Seq(9), &[blocks(50, 1)]);
        recent.done(Seq(7));
        assert_eq!((found(&recent, at..at + 1), found(&recent, at + 4..at + 5)), (vec![None], vec![Some(5)]));
        let held = recent.of(at + 100);
        recent.done(Seq(9));
        assert_eq!(used_and_free(&recent), (0, 2), "one is held by somebody");
        drop(held);
        // At the same places again, of another time.
        recent.keep(at, Seq(20), &[blocks(70, 1)]);
        assert_eq!(found(&recent, at..at + 2), [Some(70), None]);
        recent.shrink();
        assert_eq!((used_and_free(&recent), found(&recent, at..at + 1)), ((1, 0), vec![Some(70)]));
        recent.clear();
        assert!(found(&recent, at..at + 1) == [None] && recent.is_empty());
    }

    #[test]
    fn there_are_no_more_than_a_log_needs() {
        let recent = Recent::default();
        for _ in 0..2 {
            recent.provide(LOG);
            assert_eq!(used_and_free(&recent), (0, 3));
        }
        // Each record finds the window of the one before.
        (0..100).for_each(|n| recent.keep(n, Seq(n.into()), &[blocks(1, 1)]));
        assert_eq!(used_and_free(&recent), (1, 2));
        (1..9).for_each(|n| recent.keep(n * WINDOW_BLOCKS, Seq(200), &[blocks(1, 1)]));
        assert_eq!(used_and_free(&recent), (3, 0), "more are not made");
    }

    #[test]
    fn all_volumes_together_have_so_many() {
        let (many, before) = ((0..100).map(|_| Recent::default()).collect::<Vec<_>>(), ALL.load(Ordering::Relaxed));
        many.iter().for_each(|r| r.provide(u64::MAX));
        let all: usize = many.iter().map(|r| used_and_free(r).1).sum();
        assert!(all + before <= most() && most() <= MOST, "{all} of {}", most());
        drop(many);
        assert_eq!(ALL.load(Ordering::Relaxed), before);
    }
}
