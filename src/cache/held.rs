//! What was fetched ahead, in memory until it has been read: who reads as fast as it comes needs no way through the cache's disk, and the
//! cache soon lets go of what nobody has read.
//!
//! Invariant: what has not been read leaves for the cache, and for nowhere else.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::fetch::Fetched;

/// How long what nobody reads is held.
pub const PATIENCE: Duration = Duration::from_secs(1);

/// See the module's page.
pub struct Held {
    all: VecDeque<(Instant, Fetched)>,
    bytes: u64,
    most: u64,
}

impl Held {
    pub(super) const fn new(most: u64) -> Self {
        Self { all: VecDeque::new(), bytes: 0, most }
    }

    /// How much there is.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether there is nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Whether there is enough: nothing more should be fetched ahead now.
    #[must_use]
    pub const fn is_full(&self) -> bool {
        self.bytes >= self.most
    }

    /// What was fetched until `now`.
    pub fn push(&mut self, now: Instant, f: Fetched) {
        self.bytes += f.bytes();
        self.all.push_back((now, f));
    }

    /// What is to be written to the cache next, where the cache has a place for it: what has been read, what nobody reads, and the oldest when
    /// there is enough. Without a place, what has been read is let go when there is enough: it was read once, and in order.
    pub fn next(&mut self, has_place: bool, now: Instant) -> Option<Fetched> {
        loop {
            let (since, first) = self.all.front()?;
            let (is_read, is_old) = (first.is_read(), now.saturating_duration_since(*since) >= PATIENCE);
            let goes = if has_place { is_read || is_old || self.is_full() } else { is_read && self.is_full() };
            if !goes {
                return None;
            }
            let (_, first) = self.all.pop_front()?;
            self.bytes -= first.bytes();
            if has_place {
                return Some(first);
            }
        }
    }

    /// All of it, for the cache.
    pub fn into_all(self) -> impl Iterator<Item = Fetched> {
        self.all.into_iter().map(|(_, f)| f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::BLOCK;

    fn held(most: usize, now: Instant, all: &[(usize, usize)]) -> Held {
        let mut held = Held::new((most * BLOCK) as u64);
        all.iter().for_each(|(blocks, read)| held.push(now, Fetched::none_of(*blocks, *read)));
        held
    }

    /// The sizes of what goes to the cache, in blocks.
    fn kept(held: &mut Held, now: Instant) -> Vec<u64> {
        std::iter::from_fn(|| held.next(true, now)).map(|f| f.bytes() / BLOCK as u64).collect()
    }

    #[test]
    fn what_has_been_read_goes_to_the_cache_and_the_rest_when_nobody_reads_it() {
        let now = Instant::now();
        let mut h = held(1000, now, &[(10, 10), (11, 12), (12, 11), (13, 13)]);
        assert_eq!(kept(&mut h, now), [10, 11]);
        h.push(now + PATIENCE, Fetched::none_of(14, 0));
        assert_eq!(kept(&mut h, now + PATIENCE / 2), [0; 0], "the first of these is not read yet");
        assert_eq!(kept(&mut h, now + PATIENCE), [12, 13]);
        assert_eq!(h.bytes / BLOCK as u64, 14);
        assert_eq!(h.into_all().count(), 1);
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
    fn a_cache_without_a_place_loses_what_was_read_and_nothing_else() {
        let now = Instant::now();
        let mut h = held(100, now, &[(50, 50), (50, 50), (50, 0), (50, 50)]);
        assert!(h.next(false, now).is_none());
        assert_eq!(h.bytes / BLOCK as u64, 100, "both that were read, and not the one behind them");
        assert!(h.next(false, now + PATIENCE).is_none() && h.is_full(), "there is as much as there may be");
        let mut h = held(100, now, &[(50, 50)]);
        assert!(h.next(false, now).is_none());
        assert_eq!(h.bytes / BLOCK as u64, 50, "there is room for it");
        assert_eq!(kept(&mut h, now), [50]);
    }
}
