//! Which request comes next, and what a verified block holds. The same seed, the same requests.

use fastrand::Rng;

use super::Workload;
use crate::disk::IoBuf;

/// A block that nobody has written yet.
const UNKNOWN: u32 = 0;

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    /// Which block of the span.
    pub block: u64,
    /// Whether it is read; else it is written.
    pub read: bool,
}

/// A job's requests.
#[derive(Debug)]
pub struct Load {
    rng: Rng,
    /// What blocks hold is of this run and job alone: what an earlier one has left is not taken for it.
    content: u64,
    scratch: Vec<u8>,
    blocks: u64,
    sequential: bool,
    read_percent: u8,
    next: u64,
    /// With verification: each block's version, and those that a request in flight touches.
    known: Option<Known>,
}

#[derive(Debug)]
struct Known {
    versions: Vec<u32>,
    busy: Vec<u64>,
    last: u32,
}

impl Load {
    /// That of a workload.
    #[must_use]
    pub fn new(work: &Workload) -> Self {
        let blocks = (work.span.end - work.span.start) / u64::from(work.block_bytes);
        let known =
            work.verify.then(|| Known { versions: vec![UNKNOWN; blocks as usize], busy: Vec::new(), last: UNKNOWN });
        Self {
            rng: Rng::with_seed(work.seed),
            content: Rng::new().u64(..),
            scratch: Vec::new(),
            blocks,
            sequential: work.sequential,
            read_percent: work.read_percent,
            next: 0,
            known,
        }
    }

    /// From the span's beginning again.
    pub fn rewind(&mut self) {
        self.next = 0;
    }

    fn draw(&mut self) -> u64 {
        if self.sequential {
            let block = self.next;
            self.next = (self.next + 1) % self.blocks;
            block
        } else {
            self.rng.u64(0..self.blocks)
        }
    }

    /// The next request. Its block is nobody else's until it is [released](Self::release).
    pub fn turn(&mut self) -> Turn {
        // Nothing is drawn for what is certain.
        let read = match self.read_percent {
            0 => false,
            100 => true,
            percent => self.rng.u8(0..100) < percent,
        };
        loop {
            let block = self.draw();
            let Some(known) = &mut self.known else { return Turn { block, read } };
            // At least half of the blocks are free.
            if !known.busy.contains(&block) {
                known.busy.push(block);
                return Turn { block, read };
            }
        }
    }

    /// The request on the block has ended.
    pub fn release(&mut self, block: u64) {
        if let Some(known) = &mut self.known {
            known.busy.retain(|b| *b != block);
        }
    }

    /// One block after the other, once.
    pub fn next_of_all(&mut self) -> Option<u64> {
        let block = self.next;
        (block < self.blocks).then(|| self.next += 1)?;
        Some(block)
    }

    /// The same of those whose content is known.
    pub fn next_known(&mut self) -> Option<u64> {
        while let Some(block) = self.next_of_all() {
            if self.known.as_ref().is_some_and(|k| k.versions[block as usize] != UNKNOWN) {
                return Some(block);
            }
        }
        None
    }

    /// Content that does not compress.
    pub fn scramble(&mut self, buf: &IoBuf) {
        let mut content = vec![0; buf.len()];
        self.rng.fill(&mut content);
        buf.copy_in(0, &content);
    }

    /// What is to be written: with verification the block's next version, else what the buffer has.
    pub fn fill(&mut self, block: u64, buf: &IoBuf) -> u32 {
        let Some(known) = &mut self.known else { return UNKNOWN };
        known.last = known.last.checked_add(1).unwrap_or(UNKNOWN + 1);
        self.scratch.clear();
        for word in words(self.content, block, known.last).take(buf.len() / 8) {
            self.scratch.extend_from_slice(&word.to_le_bytes());
        }
        buf.copy_in(0, &self.scratch);
        known.last
    }

    /// It was written.
    pub fn written(&mut self, block: u64, version: u32) {
        if let Some(known) = &mut self.known {
            known.versions[block as usize] = version;
        }
    }

    /// Whether a block that was read holds what was written there last.
    ///
    /// # Errors
    /// In which way it does not.
    pub fn check(&self, block: u64, buf: &IoBuf) -> Result<(), String> {
        let Some(known) = &self.known else { return Ok(()) };
        let version = known.versions[block as usize];
        if version == UNKNOWN {
            return Ok(());
        }
        let wanted = words(self.content, block, version);
        let found = buf.bytes().chunks_exact(8);
        match found.zip(wanted).position(|(found, wanted)| found != wanted.to_le_bytes()) {
            None => Ok(()),
            Some(i) => Err(format!("are not what was written there last: they differ from byte {} on", i * 8)),
        }
    }
}

/// What a version of a block holds, eight bytes at a time.
fn words(content: u64, block: u64, version: u32) -> impl Iterator<Item = u64> {
    let mut rng = Rng::with_seed(content ^ block.rotate_left(32) ^ u64::from(version));
    std::iter::repeat_with(move || rng.u64(..))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(read_percent: u8, sequential: bool, verify: bool) -> Load {
        Load::new(&Workload {
            read_percent,
            sequential,
            block_bytes: 4096,
            depth: 4,
            span: 0..64 << 12,
            time: std::time::Duration::ZERO,
            flush_every: None,
            fua: false,
            verify,
            fill: false,
            seed: 7,
            interval: None,
        })
    }

    #[test]
    fn the_same_seed_draws_the_same() {
        let draw = || {
            let mut l = load(30, false, true);
            (0..1000)
                .map(|_| {
                    let t = l.turn();
                    l.release(t.block);
                    t
                })
                .collect::<Vec<_>>()
        };
        let turns = draw();
        assert_eq!(turns, draw());
        let reads = turns.iter().filter(|t| t.read).count();
        assert!((200..400).contains(&reads), "{reads} of 1000");
        assert!(turns.iter().all(|t| t.block < 64));
    }

    #[test]
    fn in_order_it_goes_round() {
        let mut l = load(100, true, false);
        let blocks: Vec<u64> = (0..130).map(|_| l.turn().block).collect();
        assert!(blocks.iter().zip(0..).all(|(b, i)| *b == i % 64));
    }

    #[test]
    fn a_block_in_flight_is_not_drawn_again() {
        let mut l = load(0, false, true);
        let mut there = Vec::new();
        for _ in 0..32 {
            let block = l.turn().block;
            assert!(!there.contains(&block));
            there.push(block);
        }
    }

    #[test]
    fn what_is_not_the_last_write_is_found() {
        let mut l = load(0, false, true);
        let (old, new) = (IoBuf::zeroed(4096), IoBuf::zeroed(4096));
        assert_eq!(l.check(3, &old), Ok(()), "nobody knows");
        let first = l.fill(3, &old);
        l.written(3, first);
        assert_eq!(l.check(3, &old), Ok(()));
        assert!(l.check(3, &new).is_err(), "zeros");
        let second = l.fill(3, &new);
        l.written(3, second);
        assert_eq!(l.check(3, &new), Ok(()));
        assert!(l.check(3, &old).is_err(), "the one before");
        l.written(4, second);
        assert!(l.check(4, &new).is_err(), "another block's");
        let mut again = load(0, false, true);
        again.written(3, second);
        assert!(again.check(3, &new).is_err(), "an earlier run's");
        new.copy_in(4088, &[1; 8]);
        assert!(l.check(3, &new).expect_err("changed").contains("byte 4088"));
        assert_eq!([l.next_known(), l.next_known(), l.next_known()], [Some(3), Some(4), None]);
    }
}
