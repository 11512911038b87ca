//! A leaf's list of words, packed: as many bits for each as the leaf's chunks differ in.
//!
//! A word is `9-bit block << 55 | location`, sorted by block. Of a location's upper 45 bits (flag, source, chunk number: its *chunk*)
//! only the distance to the lowest one in the list is kept:
//!
//! ```text
//! u64 0, header     bits 60-55: d, bits of a distance, 1 to 45
//!                   bits 54-45: number of words - 1
//!                   bits 44-0:  the lowest chunk of the list
//! u64 1 on          the words one behind the other, each of 9 + d + 10 bits, from bit 0 up:
//!                   block | distance + 1, or 0 for a location of 0 | index in the chunk
//! ```
//!
//! Invariant: a list has 1 to 512 words, and gives back exactly those that it was made of.

use std::sync::Arc;

use super::leaf::BLOCKS;
use super::location::{INDEX_BITS, INDEX_MASK, LOCATION_BITS};

/// Bits of the upper part of a location.
const CHUNK_BITS: u32 = LOCATION_BITS - INDEX_BITS;
const CHUNK_MASK: u64 = (1 << CHUNK_BITS) - 1;
const BLOCK_BITS: u32 = BLOCKS.ilog2();
/// The location's part of a word.
pub(super) const LOC_MASK: u64 = (1 << LOCATION_BITS) - 1;

const _: () = assert!(BLOCK_BITS + CHUNK_BITS + INDEX_BITS == u64::BITS);

/// A word.
pub(super) const fn word(block: usize, raw: u64) -> u64 {
    (block as u64) << LOCATION_BITS | raw
}

/// The word's block in the leaf.
pub(super) const fn block_of(word: u64) -> usize {
    (word >> LOCATION_BITS) as usize
}

/// The word's location, 0 for none.
pub(super) const fn raw_of(word: u64) -> u64 {
    word & LOC_MASK
}

/// What the allocator takes for an `Arc<[u64]>` of `n`: two counters, the elements, and a block header rounded up to 16 as common
/// allocators do.
pub(super) const fn arc_bytes(n: usize) -> usize {
    (16 + 8 * n + 8).next_multiple_of(16)
}

/// See the module's page. A clone shares the list.
#[derive(Clone)]
pub(crate) struct Words(Arc<[u64]>);

/// How a list is read: its header, taken apart.
#[derive(Clone, Copy)]
struct Form {
    distance_bits: u32,
    lowest: u64,
}

impl Form {
    const fn bits(self) -> u32 {
        BLOCK_BITS + self.distance_bits + INDEX_BITS
    }

    const fn pack(self, word: u64) -> u64 {
        let raw = raw_of(word);
        let distance = if raw == 0 { 0 } else { (raw >> INDEX_BITS) - self.lowest + 1 };
        ((block_of(word) as u64) << self.distance_bits | distance) << INDEX_BITS | raw & INDEX_MASK
    }

    const fn unpack(self, packed: u64) -> u64 {
        let distance = packed >> INDEX_BITS & ((1 << self.distance_bits) - 1);
        let raw = if distance == 0 { 0 } else { (self.lowest + distance - 1) << INDEX_BITS | packed & INDEX_MASK };
        word((packed >> (INDEX_BITS + self.distance_bits)) as usize, raw)
    }
}

impl Words {
    /// The list of `words`: 1 to 512, sorted by block.
    pub(super) fn new(words: &[u64]) -> Self {
        debug_assert!((1..=BLOCKS).contains(&words.len()), "a leaf has 1 to 512 words");
        let chunks = || words.iter().map(|w| raw_of(*w) >> INDEX_BITS).filter(|c| *c != 0);
        let lowest = chunks().min().unwrap_or(0);
        let span = chunks().max().unwrap_or(0) - lowest + 1;
        let form = Form { distance_bits: u64::BITS - span.leading_zeros(), lowest };
        let bits = form.bits();
        let n = Self::room(words.len(), bits);
        let mut out = [0; BLOCKS + 1];
        out[0] = u64::from(form.distance_bits) << LOCATION_BITS | (words.len() as u64 - 1) << CHUNK_BITS | lowest;
        for (i, &w) in words.iter().enumerate() {
            let packed = form.pack(w);
            let (at, shift) = place(i, bits);
            out[at] |= packed << shift;
            if shift + bits > u64::BITS {
                out[at + 1] |= packed >> (u64::BITS - shift);
            }
        }
        Self(Arc::from(&out[..n]))
    }

    /// Elements of a list of `words` with so many bits each, with its header.
    const fn room(words: usize, bits: u32) -> usize {
        1 + (words * bits as usize).div_ceil(u64::BITS as usize)
    }

    fn form(&self) -> Form {
        let head = self.0[0];
        Form { distance_bits: (head >> LOCATION_BITS) as u32, lowest: head & CHUNK_MASK }
    }

    /// Number of words.
    pub(super) fn len(&self) -> usize {
        (self.0[0] >> CHUNK_BITS) as usize % BLOCKS + 1
    }

    fn packed(&self, i: usize, bits: u32) -> u64 {
        let (at, shift) = place(i, bits);
        let mut packed = self.0[at] >> shift;
        if shift + bits > u64::BITS {
            packed |= self.0[at + 1] << (u64::BITS - shift);
        }
        packed & (u64::MAX >> (u64::BITS - bits))
    }

    /// The words from number `i` on, in order.
    pub(super) fn from(&self, i: usize) -> impl Iterator<Item = u64> + '_ {
        let form = self.form();
        (i..self.len()).map(move |i| form.unpack(self.packed(i, form.bits())))
    }

    /// How many words are of blocks before `block`, which is at most 512.
    pub(super) fn before(&self, block: usize) -> usize {
        if self.len() == BLOCKS {
            return block;
        }
        let (bits, low) = (self.form().bits(), self.form().bits() - BLOCK_BITS);
        let (mut from, mut to) = (0, self.len());
        while from < to {
            let mid = from.midpoint(to);
            if ((self.packed(mid, bits) >> low) as usize) < block {
                from = mid + 1;
            } else {
                to = mid;
            }
        }
        from
    }

    /// Bytes that the list takes.
    pub(super) fn heap_bytes(&self) -> usize {
        arc_bytes(self.0.len())
    }

    /// Whether both are one list.
    pub(super) fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// Element and bit at which word `i` begins, of words of `bits` bits.
const fn place(i: usize, bits: u32) -> (usize, u32) {
    let bit = i * bits as usize;
    (1 + bit / u64::BITS as usize, (bit % u64::BITS as usize) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::location::{Location, MAX_CHUNK, MAX_SOURCE};
    use crate::units::ChunkNo;
    use proptest::prelude::*;

    fn check(words: &[u64]) -> Words {
        let packed = Words::new(words);
        assert_eq!(packed.len(), words.len());
        assert_eq!(packed.from(0).collect::<Vec<_>>(), words);
        for block in 0..=BLOCKS {
            assert_eq!(packed.before(block), words.partition_point(|w| block_of(*w) < block), "before {block}");
        }
        packed
    }

    #[test]
    fn the_farthest_chunks_fit() {
        let low = Location::new(0, ChunkNo(1), 1023).raw();
        let high = Location::new(MAX_SOURCE, MAX_CHUNK, 1023).damaged().raw();
        let packed = check(&[word(0, low), word(3, 0), word(511, high)]);
        assert_eq!(packed.form().bits(), 64);
        // All of one chunk: a bit tells it from unmapped.
        let packed = check(&[word(7, high), word(9, 0)]);
        assert_eq!((packed.form().bits(), packed.heap_bytes()), (20, arc_bytes(2)));
        let all: Vec<u64> = (0..BLOCKS).map(|i| word(i, if i % 2 == 0 { low } else { high })).collect();
        check(&all);
        check(&all[511..]);
    }

    #[test]
    fn a_full_list_of_any_width() {
        for d in 0..CHUNK_BITS {
            let far = (1 << d) - 1;
            let raw = |i: usize| {
                (1 + if i.is_multiple_of(3) { 0 } else { far - i as u64 % 2 * (far / 2) }) << INDEX_BITS | i as u64
            };
            let words: Vec<u64> = (0..BLOCKS).map(|i| word(i, if i % 7 == 6 { 0 } else { raw(i) })).collect();
            assert_eq!(check(&words).form().bits(), BLOCK_BITS + d + 1 + INDEX_BITS);
        }
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out(
            far in 0u32..38,
            of in prop::collection::btree_map(0usize..BLOCKS, (0u8..4, any::<u64>(), 0u16..1024, any::<bool>(), 0u8..8), 1..BLOCKS),
        ) {
            let words: Vec<u64> = of.into_iter().map(|(block, (source, chunk, index, damaged, gap))| {
                let at = Location::new(source, ChunkNo(1 + chunk % (1 << far).min(MAX_CHUNK.0)), index);
                word(block, if gap == 0 { 0 } else if damaged { at.damaged().raw() } else { at.raw() })
            }).collect();
            let packed = check(&words);
            prop_assert!(packed.heap_bytes() <= arc_bytes(1 + words.len()));
        }
    }
}
