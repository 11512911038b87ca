//! A leaf of the base map: 512 blocks of the volume, in the form with the fewest bytes.
//!
//! - `Empty`: nothing mapped.
//! - `Run`: blocks `first .. first + len` lie at consecutive indices from `at`. No allocation.
//! - `Pair`: two adjoining runs, the second from `split` on. No allocation. A chunk holds up to 1016
//!   blocks, so a leaf of sequential data crosses at most one chunk's end: sequential data is all `Run`
//!   and `Pair`.
//! - `Runs`: sorted *breaks*, words of `9-bit first block << 55 | location`: from that block on,
//!   consecutive locations, up to the next break; a location of 0 means unmapped. Nothing is mapped
//!   before the first break; the last one holds to the leaf's end.
//! - `Table`: sorted words of `9-bit block << 55 | location`, one per mapped block. With 512 words
//!   the block is the index; with fewer it is found in at most 9 steps.
//!
//! Both lists are packed, see [`Words`]. `Runs` is chosen only when it has fewer words than `Table`, so a leaf with `m` mapped
//! blocks never has more than `m` words.

use super::location::{INDEX_MASK, Location};
use super::words::{Words, block_of, raw_of, word};
use crate::units::LEAF_BLOCKS;

/// Blocks in a leaf, as an index.
pub(crate) const BLOCKS: usize = LEAF_BLOCKS as usize;

/// A leaf spread out: the raw location of each block, 0 where unmapped.
pub(crate) type Flat = [u64; BLOCKS];

/// See the module's page.
#[derive(Clone, Default)]
pub(crate) enum Leaf {
    #[default]
    Empty,
    Run {
        first: u16,
        len: u16,
        at: u64,
    },
    Pair {
        first: u16,
        split: u16,
        end: u16,
        a: u64,
        b: u64,
    },
    Runs(Words),
    Table(Words),
}

const _: () = assert!(size_of::<Leaf>() == 24);

/// Whether `next` follows `raw` in the same chunk; 0 follows 0. (Looked at for each block of a leaf: no
/// location is 0, and one whose index is 0 follows none.)
const fn follows(raw: u64, next: u64) -> bool {
    if raw == 0 { next == 0 } else { next == raw + 1 && next & INDEX_MASK != 0 }
}

impl Leaf {
    /// The smallest form of a leaf.
    pub(crate) fn from_flat(flat: &Flat) -> Self {
        // Breaks, the first unmapped stretch left out.
        let mut breaks = [0u64; BLOCKS];
        let (mut n, mut mapped, mut prev) = (0, 0, 0);
        for (i, &raw) in flat.iter().enumerate() {
            mapped += usize::from(raw != 0);
            if !follows(prev, raw) {
                breaks[n] = word(i, raw);
                n += 1;
            }
            prev = raw;
        }
        if let Some(small) = Self::inline(&breaks[..n]) {
            return small;
        }
        if n < mapped {
            return Self::Runs(Words::new(&breaks[..n]));
        }
        let mut words = [0u64; BLOCKS];
        let mut m = 0;
        for (i, &raw) in flat.iter().enumerate().filter(|(_, raw)| **raw != 0) {
            words[m] = word(i, raw);
            m += 1;
        }
        Self::Table(Words::new(&words[..m]))
    }

    /// The form without allocation for a list of breaks, if there is one.
    fn inline(breaks: &[u64]) -> Option<Self> {
        let at = |i: usize| (block_of(breaks[i]) as u16, raw_of(breaks[i]));
        let end_at = |i: usize| if i < breaks.len() { at(i) } else { (BLOCKS as u16, 0) };
        match breaks.len() {
            0 => Some(Self::Empty),
            1..=3 => {
                let ((first, a), (split, b), (end, c)) = (at(0), end_at(1), end_at(2));
                if b == 0 && breaks.len() <= 2 {
                    Some(Self::Run { first, len: split - first, at: a })
                } else if b != 0 && c == 0 {
                    Some(Self::Pair { first, split, end, a, b })
                } else {
                    None
                }
            }
            _ => None,
        }
    }

    /// Calls `f(first, len, raw)` for each stretch of consecutive locations in `from..to`, in order.
    pub(crate) fn stretches(&self, from: usize, to: usize, mut f: impl FnMut(usize, usize, u64)) {
        let mut cut = |first: usize, end: usize, raw: u64| {
            let (a, b) = (first.max(from), end.min(to));
            if raw != 0 && a < b {
                f(a, b - a, raw + (a - first) as u64);
            }
        };
        match self {
            Self::Empty => {}
            Self::Run { first, len, at } => cut(usize::from(*first), usize::from(first + len), *at),
            Self::Pair { first, split, end, a, b } => {
                cut(usize::from(*first), usize::from(*split), *a);
                cut(usize::from(*split), usize::from(*end), *b);
            }
            Self::Runs(w) => {
                // The break at or before `from` is the first that matters.
                let mut breaks = w.from(w.before(from + 1).saturating_sub(1)).peekable();
                while let Some(w) = breaks.next_if(|&w| block_of(w) < to) {
                    cut(block_of(w), breaks.peek().map_or(BLOCKS, |&w| block_of(w)), raw_of(w));
                }
            }
            Self::Table(w) => {
                for w in w.from(w.before(from)).take_while(|&w| block_of(w) < to) {
                    cut(block_of(w), block_of(w) + 1, raw_of(w));
                }
            }
        }
    }

    /// The raw location of block `i`, 0 where unmapped.
    pub(crate) fn get(&self, i: usize) -> u64 {
        let mut raw = 0;
        self.stretches(i, i + 1, |_, _, r| raw = r);
        raw
    }

    /// Spreads the leaf out.
    pub(crate) fn flat(&self) -> Flat {
        let mut flat = [0; BLOCKS];
        self.stretches(0, BLOCKS, |first, len, raw| fill(&mut flat, first, len, raw));
        flat
    }

    /// The leaf with `ops` laid over it in turn: `(first, len, raw location of the first or 0)`.
    pub(crate) fn update(&self, ops: impl Iterator<Item = (usize, usize, u64)> + Clone) -> Self {
        // The whole leaf in one go, as wide discards and sequential data have it.
        let mut two = ops.clone();
        if let (Some((0, BLOCKS, raw)), None) = (two.next(), two.next()) {
            return if raw == 0 { Self::Empty } else { Self::Run { first: 0, len: BLOCKS as u16, at: raw } };
        }
        let mut flat = self.flat();
        for (first, len, raw) in ops {
            fill(&mut flat, first, len, raw);
        }
        Self::from_flat(&flat)
    }

    /// The leaf with each location as seen by a volume to which source 0 is source `by`; the form stays. `None` when a location
    /// has no room for that.
    pub(crate) fn lifted(&self, by: u8) -> Option<Self> {
        let lift = |raw: u64| match Location::from_raw(raw) {
            Some(at) => at.lifted(by).map(Location::raw),
            None => Some(0),
        };
        let each = |words: &Words| -> Option<Words> {
            let lifted: Option<Vec<u64>> = words.from(0).map(|w| Some(word(block_of(w), lift(raw_of(w))?))).collect();
            lifted.map(|l| Words::new(&l))
        };
        Some(match self {
            Self::Empty => Self::Empty,
            Self::Run { first, len, at } => Self::Run { first: *first, len: *len, at: lift(*at)? },
            Self::Pair { first, split, end, a, b } => {
                Self::Pair { first: *first, split: *split, end: *end, a: lift(*a)?, b: lift(*b)? }
            }
            Self::Runs(w) => Self::Runs(each(w)?),
            Self::Table(w) => Self::Table(each(w)?),
        })
    }

    /// Number of mapped blocks.
    pub(crate) fn mapped(&self) -> usize {
        match self {
            Self::Empty => 0,
            Self::Run { len, .. } => usize::from(*len),
            Self::Pair { first, end, .. } => usize::from(end - first),
            Self::Table(w) => w.len(),
            Self::Runs(_) => {
                let mut n = 0;
                self.stretches(0, BLOCKS, |_, len, _| n += len);
                n
            }
        }
    }

    /// One more than the last mapped block, 0 when none is.
    pub(crate) fn end(&self) -> usize {
        let mut end = 0;
        self.stretches(0, BLOCKS, |first, len, _| end = first + len);
        end
    }

    /// Bytes allocated outside the leaf itself.
    pub(crate) fn heap_bytes(&self) -> usize {
        match self {
            Self::Runs(w) | Self::Table(w) => w.heap_bytes(),
            _ => 0,
        }
    }

    pub(crate) const fn is_empty(&self) -> bool {
        matches!(self, Self::Empty)
    }

    /// Whether both are known to be the same without looking into tables.
    pub(crate) fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Runs(a), Self::Runs(b)) | (Self::Table(a), Self::Table(b)) => a.same(b),
            (Self::Empty, Self::Empty) => true,
            (Self::Run { first, len, at }, Self::Run { first: f, len: l, at: a }) => (first, len, at) == (f, l, a),
            (Self::Pair { first, split, end, a, b }, Self::Pair { first: f, split: s, end: e, a: c, b: d }) => {
                (first, split, end, a, b) == (f, s, e, c, d)
            }
            _ => false,
        }
    }

    /// Whether the checkpoint's form is a table of blocks; else it is breaks, as which the forms without allocation are told.
    pub(crate) const fn is_table(&self) -> bool {
        matches!(self, Self::Table(_))
    }

    /// How many words the checkpoint's form has.
    pub(crate) fn word_count(&self) -> usize {
        if let Self::Runs(w) | Self::Table(w) = self {
            return w.len();
        }
        let mut n = 0;
        self.each_word(|_| n += 1);
        n
    }

    /// Calls `f` with each word of the checkpoint's form, in order.
    pub(crate) fn each_word(&self, mut f: impl FnMut(u64)) {
        let mut put = |block: u16, raw: u64| {
            if usize::from(block) < BLOCKS {
                f(word(usize::from(block), raw));
            }
        };
        match self {
            Self::Empty => {}
            Self::Run { first, len, at } => {
                put(*first, *at);
                put(first + len, 0);
            }
            Self::Pair { first, split, end, a, b } => {
                put(*first, *a);
                put(*split, *b);
                put(*end, 0);
            }
            Self::Runs(w) | Self::Table(w) => w.from(0).for_each(f),
        }
    }

    /// A leaf from stored words. The error says what is wrong with them.
    pub(crate) fn from_words(table: bool, words: &[u64]) -> Result<Self, &'static str> {
        if words.is_empty() || words.len() > BLOCKS {
            return Err("a leaf has 1 to 512 words");
        }
        if words.windows(2).any(|w| block_of(w[0]) >= block_of(w[1])) {
            return Err("a leaf's words are not in order");
        }
        for (i, &w) in words.iter().enumerate() {
            let raw = raw_of(w);
            match Location::from_raw(raw) {
                Some(_) if table => {}
                Some(at) => {
                    let end = words.get(i + 1).map_or(BLOCKS, |&w| block_of(w));
                    if (end - block_of(w)) as u64 > at.room() {
                        return Err("a run passes the end of its chunk");
                    }
                }
                None if !table && raw == 0 && i > 0 && raw_of(words[i - 1]) != 0 => {}
                None => return Err("a location makes no sense"),
            }
        }
        if table {
            return Ok(Self::Table(Words::new(words)));
        }
        Ok(Self::inline(words).unwrap_or_else(|| Self::Runs(Words::new(words))))
    }
}

fn fill(flat: &mut Flat, first: usize, len: usize, raw: u64) {
    for (i, slot) in flat[first..first + len].iter_mut().enumerate() {
        *slot = if raw == 0 { 0 } else { raw + i as u64 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::ChunkNo;
    use proptest::prelude::*;

    fn loc(chunk: u64, index: u16) -> u64 {
        Location::new(0, ChunkNo(chunk), index).raw()
    }

    fn build(ops: &[(usize, usize, u64)]) -> Leaf {
        Leaf::Empty.update(ops.iter().copied())
    }

    #[test]
    fn each_shape_gets_its_form() {
        assert!(build(&[]).is_empty());
        assert!(matches!(build(&[(0, 512, loc(1, 0))]), Leaf::Run { first: 0, len: 512, .. }));
        assert!(matches!(build(&[(7, 9, loc(1, 5))]), Leaf::Run { first: 7, len: 9, .. }));
        let pair = build(&[(0, 300, loc(1, 716)), (300, 212, loc(2, 0))]);
        assert!(matches!(pair, Leaf::Pair { first: 0, split: 300, end: 512, .. }));
        assert!(matches!(
            build(&[(1, 2, loc(1, 7)), (3, 2, loc(1, 3))]),
            Leaf::Pair { first: 1, split: 3, end: 5, .. }
        ));
        assert!(matches!(build(&[(0, 100, loc(1, 0)), (101, 100, loc(2, 0))]), Leaf::Runs(w) if w.len() == 4));
        assert!(
            matches!(build(&[(3, 1, loc(1, 0)), (9, 1, loc(5, 0)), (11, 1, loc(6, 0))]), Leaf::Table(w) if w.len() == 3)
        );
        // The end of a chunk's numbering is not a step to the next chunk's first block.
        assert!(matches!(build(&[(0, 1, loc(1, 1023)), (1, 1, loc(2, 0))]), Leaf::Pair { .. }));
        assert!(build(&[(0, 512, loc(1, 0)), (0, 512, 0)]).is_empty());
    }

    proptest! {
        #[test]
        fn any_leaf_keeps_its_content_and_its_bound(
            ops in prop::collection::vec((0usize..512, 1usize..200, 0u64..4, 0u16..800), 0..40),
            singles in prop::collection::vec((0usize..512, 1u64..1 << 30, 0u16..1016), 0..520),
            from in 0usize..512, len in 1usize..512,
        ) {
            let mut flat = [0; BLOCKS];
            let mut leaf = Leaf::Empty;
            for (first, len, chunk, index) in ops {
                let len = len.min(BLOCKS - first);
                let raw = if chunk == 0 { 0 } else { loc(chunk, index) };
                fill(&mut flat, first, len, raw);
                leaf = leaf.update(std::iter::once((first, len, raw)));
            }
            for (i, chunk, index) in singles {
                flat[i] = loc(chunk, index);
            }
            leaf = leaf.update(flat.iter().enumerate().map(|(i, &raw)| (i, 1, raw)));
            prop_assert_eq!(leaf.flat(), flat);
            let mapped = flat.iter().filter(|r| **r != 0).count();
            prop_assert_eq!(leaf.mapped(), mapped);
            prop_assert_eq!(leaf.end(), flat.iter().rposition(|r| *r != 0).map_or(0, |i| i + 1));
            // Chunks below 2^30, so 9 + 31 + 10 bits for each word, the header, and what the allocator adds.
            prop_assert!(leaf.heap_bytes() <= 50 * mapped / 8 + 48);
            for (i, raw) in flat.iter().enumerate() {
                prop_assert_eq!(leaf.get(i), *raw);
            }
            let to = (from + len).min(BLOCKS);
            let mut seen = [0; BLOCKS];
            leaf.stretches(from, to, |first, len, raw| fill(&mut seen, first, len, raw));
            prop_assert_eq!(&seen[from..to], &flat[from..to]);
            prop_assert!(seen[..from].iter().chain(&seen[to..]).all(|r| *r == 0));
            if mapped > 0 {
                let mut words = Vec::new();
                leaf.each_word(|w| words.push(w));
                prop_assert_eq!(words.len(), leaf.word_count());
                prop_assert_eq!(Leaf::from_words(leaf.is_table(), &words).unwrap().flat(), flat);
            }
        }
    }

    #[test]
    fn stored_words_are_checked() {
        let one = word(3, loc(1, 0));
        for (table, words) in [
            (true, vec![]),
            (true, vec![one, one]),
            (false, vec![one, word(2, loc(1, 0))]),
            (true, vec![word(3, 0)]),
            (false, vec![word(3, 0)]),
            (false, vec![one, word(4, 0), word(5, 0)]),
            (false, vec![word(0, loc(1, 513))]),
            (true, vec![word(3, 5)]),
        ] {
            assert!(Leaf::from_words(table, &words).is_err(), "{words:x?}");
        }
        assert!(Leaf::from_words(false, &[word(0, loc(1, 512))]).is_ok());
    }
}
