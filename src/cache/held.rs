//! What was fetched ahead, in memory until it has been read: who reads as fast as it comes needs no way through the cache's disk, and the
//! cache soon lets go of what nobody has read.
//!
//! Invariants:
//! - What is on its way, what is held and what is being written to the cache is not more than `most`, and one request.
//! - What has not been read leaves for the cache; where that has no place for it, it is let go when it is old and others need the room.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::fetch::Fetched;

/// How long what nobody reads is held.
pub const PATIENCE: Duration = Duration::from_secs(1);

/// See the module's page.
pub struct Held {
    all: VecDeque<(Instant, Fetched)>,
    /// Bytes on their way here, here, and on their way into the cache.
    coming: u64,
    here: u64,
    leaving: u64,
    most: u64,
}

impl Held {
    pub(super) const fn new(most: u64) -> Self {
        Self { all: VecDeque::new(), coming: 0, here: 0, leaving: 0, most }
    }

    /// How much there is in memory.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.here + self.leaving
    }

    /// Whether there is nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Whether there is enough: nothing more should be fetched ahead now.
    #[must_use]
    pub const fn is_full(&self) -> bool {
        self.coming + self.here + self.leaving >= self.most
    }

    /// So much will come.
    pub const fn begin(&mut self, bytes: u64) {
        self.coming += bytes;
    }

    /// This has come until `now` of what was to be `bytes`; perhaps nothing.
    pub fn came(&mut self, bytes: u64, now: Instant, what: Option<Fetched>) {
        self.coming -= bytes;
        if let Some(f) = what {
            self.here += f.bytes();
            self.all.push_back((now, f));
        }
    }

    /// What is to be written to the cache next, where the cache has a place for it: what has been read, what nobody reads, and the oldest when
    /// there is enough; [`Self::left`] when that is done. Without a place, when there is enough, what has been read is let go, and what
    /// nobody reads.
    pub fn next(&mut self, has_place: bool, now: Instant) -> Option<Fetched> {
        let is_old = |since: &Instant| now.saturating_duration_since(*since) >= PATIENCE;
        if has_place {
            let (since, first) = self.all.front()?;
            if !(first.is_read() || is_old(since) || self.is_full()) {
                return None;
            }
            let (_, first) = self.all.pop_front()?;
            self.here -= first.bytes();
            self.leaving += first.bytes();
            return Some(first);
        }
        while self.is_full()
            && let Some(at) = self.all.iter().position(|(since, f)| f.is_read() || is_old(since))
            && let Some((_, gone)) = self.all.remove(at)
        {
            self.here -= gone.bytes();
        }
        None
    }

    /// So much of what left is in the cache.
    pub const fn left(&mut self, bytes: u64) {
        self.leaving -= bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::BLOCK;

    const fn bytes(blocks: usize) -> u64 {
        (blocks * BLOCK) as u64
    }

    fn hold(held: &mut Held, now: Instant, blocks: usize, read: usize) {
        held.begin(bytes(blocks));
        held.came(bytes(blocks), now, Some(Fetched::none_of(blocks, read)));
    }

    fn held(most: usize, now: Instant, all: &[(usize, usize)]) -> Held {
        let mut held = Held::new(bytes(most));
        all.iter().for_each(|(blocks, read)| hold(&mut held, now, *blocks, *read));
        held
    }

    /// The sizes of what goes to the cache, in blocks; it is written at once.
    fn kept(held: &mut Held, now: Instant) -> Vec<u64> {
        let mut all = Vec::new();
        while let Some(f) = held.next(true, now) {
            held.left(f.bytes());
            all.push(f.bytes() / BLOCK as u64);
        }
        all
    }

    #[test]
    fn what_has_been_read_goes_to_the_cache_and_the_rest_when_nobody_reads_it() {
        let now = Instant::now();
        let mut h = held(1000, now, &[(10, 10), (11, 12), (12, 11), (13, 13)]);
        assert_eq!(kept(&mut h, now), [10, 11]);
        hold(&mut h, now + PATIENCE, 14, 0);
        assert_eq!(kept(&mut h, now + PATIENCE / 2), [0; 0], "the first of these is not read yet");
        assert_eq!(kept(&mut h, now + PATIENCE), [12, 13]);
        assert_eq!(h.bytes(), bytes(14));
    }

    #[test]
    fn when_there_is_enough_the_oldest_goes_read_or_not() {
        let now = Instant::now();
        let mut h = held(100, now, &[(40, 0), (40, 0), (40, 0)]);
        assert!(h.is_full());
        assert_eq!(kept(&mut h, now), [40]);
        assert!(!h.is_full() && !h.is_empty());
    }

    #[test]
    fn a_cache_without_a_place_loses_what_was_read_and_what_is_old() {
        let now = Instant::now();
        let mut h = held(100, now, &[(50, 0), (50, 50), (50, 0), (50, 50)]);
        assert!(h.next(false, now).is_none());
        assert_eq!(h.bytes(), bytes(100), "both that were read");
        assert!(h.next(false, now + PATIENCE).is_none());
        assert_eq!(h.bytes(), bytes(50), "there is room for the other");
        assert!(h.next(false, now + PATIENCE * 9).is_none() && !h.is_full(), "nobody needs its room");
        assert_eq!(h.bytes(), bytes(50));
    }

    #[test]
    fn all_that_is_on_its_way_counts() {
        let now = Instant::now();
        let mut h = held(100, now, &[(60, 60)]);
        h.begin(bytes(40));
        assert!(h.is_full());
        let leaves = h.next(true, now).expect("it was read");
        assert!(h.is_full(), "it is not written yet");
        h.left(leaves.bytes());
        assert!(!h.is_full() && h.bytes() == 0);
        h.came(bytes(40), now, None);
        assert!(h.is_empty() && h.coming == 0, "it has failed");
    }
}
