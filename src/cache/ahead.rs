//! Which reads follow one another, and how far ahead of them to fetch.
//!
//! Invariants:
//! - Nothing is fetched ahead for a read that does not go on where an earlier one ended.
//! - Of a stream, nothing is asked for twice.

use std::ops::Range;

/// Streams that a lane follows.
const STREAMS: usize = 8;
/// What is fetched ahead of the second read of a stream at least, in sectors: 256 KiB.
const FIRST: u64 = 512;
/// And so many times the second read, later so many times what has been read of the stream: who has read much will read on.
const TIMES_READ: u64 = 4;
/// Windows smaller than this become four times as large each time, others twice; in sectors: 4 MiB.
const SMALL: u64 = 8 << 10;
/// The most that is fetched ahead, in sectors: 64 MiB, sixteen chunks.
pub const MOST: u64 = 128 << 10;
/// A window is filled up when half of it has been read, or so much, in sectors: 8 MiB, two chunks.
const STEP: u64 = 16 << 10;

#[derive(Debug, Clone, Copy, Default)]
struct Stream {
    /// Where its next read begins.
    next: u64,
    /// Up to here it has been fetched, or is being fetched.
    ahead: u64,
    /// How far ahead to be; 0 after a single read.
    window: u64,
    /// How much of it was read.
    read: u64,
    /// When it was read last, in reads of the lane.
    used: u64,
}

/// See the module's page.
#[derive(Debug, Default)]
pub struct Streams {
    all: [Stream; STREAMS],
    reads: u64,
}

impl Streams {
    /// A read of sectors: what to fetch ahead, in sectors, if it is one of a stream.
    ///
    /// A window becomes larger each time that it is filled up, until it has `most` sectors, so that reads seldom wait and few requests are
    /// made.
    pub fn read(&mut self, sectors: Range<u64>, most: u64) -> Option<Range<u64>> {
        self.reads += 1;
        let now = self.reads;
        let Some(s) = self.all.iter_mut().find(|s| s.used > 0 && s.next == sectors.start) else {
            let oldest = self.all.iter_mut().min_by_key(|s| s.used)?;
            let read = sectors.end - sectors.start;
            *oldest = Stream { next: sectors.end, ahead: sectors.end, window: 0, read, used: now };
            return None;
        };
        (s.next, s.used) = (sectors.end, now);
        s.read = s.read.saturating_add(sectors.end - sectors.start);
        if s.window > 0 && s.ahead >= sectors.end + s.window - (s.window / 2).min(STEP) {
            return None;
        }
        s.window = match s.window {
            // Of two reads it is not known yet: one that was large comes as two.
            0 => FIRST.max((sectors.end - sectors.start).saturating_mul(TIMES_READ)),
            small @ ..SMALL => (small * 4).max(s.read.saturating_mul(TIMES_READ)),
            large => (large * 2).max(s.read.saturating_mul(TIMES_READ)),
        }
        .min(most);
        let from = s.ahead.max(sectors.end);
        let to = sectors.end + s.window;
        // Less may be wanted ahead than there was.
        s.ahead = s.ahead.max(to);
        (from < to).then_some(from..to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_followed_with_a_growing_window() {
        let mut s = Streams::default();
        assert_eq!(s.read(1000..1008, MOST), None);
        assert_eq!(s.read(1008..1016, MOST), Some(1016..1016 + FIRST));
        let (mut at, mut ahead, mut asked) = (1016, 1016 + FIRST, Vec::new());
        while at < 500_000 {
            if let Some(r) = s.read(at..at + 8, MOST) {
                assert_eq!(r.start, ahead.max(at + 8), "no gap, nothing twice");
                assert!(r.end <= at + 8 + MOST);
                ahead = r.end;
                asked.push(r.end - r.start);
            }
            at += 8;
            assert!(ahead >= at, "it stays ahead");
        }
        assert!(asked[..4].is_sorted(), "{asked:?}");
        assert!(asked.len() < 50, "{} times for 250 MB", asked.len());
    }

    #[test]
    fn what_has_been_read_says_how_far_ahead() {
        let (mut s, mut asked) = (Streams::default(), Vec::new());
        for at in (0..200_000).step_by(2048) {
            asked.extend(s.read(at..at + 2048, MOST).map(|r| r.end - at - 2048));
        }
        // 4 MiB ahead of the second MiB, as one that was read in two goes no further; 20 of the fifth, when half of them are read; 56 of the
        // 14th, and then the most.
        assert_eq!(asked[..3], [4 * 2048, 20 * 2048, 56 * 2048]);
        assert!(asked[3..].iter().all(|a| *a == MOST), "{asked:?}");
    }

    #[test]
    fn what_does_not_go_on_asks_for_nothing() {
        let mut s = Streams::default();
        let mut x = 1_u64;
        for _ in 0..10_000 {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let at = (x >> 40) * 8;
            assert_eq!(s.read(at..at + 8, MOST), None);
        }
        // The same place again and again is no stream.
        for _ in 0..10 {
            assert_eq!(s.read(8..16, MOST), None);
        }
    }

    #[test]
    fn several_streams_beside_each_other_and_beside_random_reads() {
        let mut s = Streams::default();
        let mut asked = [0; 4];
        for n in 0..1000_u64 {
            for (i, asked) in asked.iter_mut().enumerate() {
                let at = ((i as u64) << 30) | (n * 64);
                *asked += u64::from(s.read(at..at + 64, MOST).is_some());
            }
            let alone = ((n * 7919) << 12) | 3;
            assert_eq!(s.read(alone..alone + 4, MOST), None);
        }
        assert!(asked.iter().all(|n| (5..20).contains(n)), "{asked:?}");
    }

    #[test]
    fn one_larger_than_its_window_is_not_asked_for_what_it_has_read() {
        let mut s = Streams::default();
        s.read(0..4096, MOST);
        assert_eq!(s.read(4096..8192, MOST), Some(8192..8192 + 4 * 4096));
        // Nobody asks for more than that however large reads are.
        assert_eq!(s.read(8192..500_000, MOST), Some(500_000..500_000 + MOST));
        // That and more has been asked for when nobody wants as much any more.
        assert_eq!(s.read(500_000..600_000, 5000), None);
        assert_eq!(s.read(600_000..700_000, 5000), Some(700_000..705_000));
    }
}
