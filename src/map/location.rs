//! Where a block's data lies in the store, in 55 bits.
//!
//! ```text
//! bit 54      damaged: some sectors of the block are lost, the chunk's header says which
//! bits 53-47  source volume: 0 is the volume itself, others index its table of ancestors
//! bits 46-10  chunk number, never 0
//! bits  9-0   logical index of the block in the chunk
//! ```
//! The index is lowest, so that consecutive blocks of a chunk have consecutive raw values; no valid
//! location is 0, so that 0 can mean "unmapped" in packed words. Nine bits above stay free for the
//! index of a block in its leaf.

use crate::units::ChunkNo;

/// Bits of a packed location.
pub(crate) const LOCATION_BITS: u32 = 55;
/// Bits of the index in a chunk.
pub(crate) const INDEX_BITS: u32 = 10;
const CHUNK_BITS: u32 = 37;
const SOURCE_BITS: u32 = 7;
/// The index's part of a location.
pub(crate) const INDEX_MASK: u64 = (1 << INDEX_BITS) - 1;
const CHUNK_MASK: u64 = (1 << CHUNK_BITS) - 1;
const SOURCE_SHIFT: u32 = INDEX_BITS + CHUNK_BITS;
const DAMAGED: u64 = 1 << (LOCATION_BITS - 1);

const _: () = assert!(SOURCE_SHIFT + SOURCE_BITS + 1 == LOCATION_BITS);

/// The largest chunk number that a location can name.
pub const MAX_CHUNK: ChunkNo = ChunkNo(CHUNK_MASK);
/// The largest number of a source volume.
pub const MAX_SOURCE: u8 = (1 << SOURCE_BITS) - 1;

/// 55-bit packed location: damaged flag 1 bit | source volume 7 bits | chunk number 37 bits | logical
/// block index in the chunk 10 bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Location(u64);

impl Location {
    /// Block `index` of `chunk` of volume `source` (0: the volume itself).
    ///
    /// # Panics
    /// When a part does not fit: `source` above 127, `chunk` 0 or above 2^37 - 1, `index` above 1023.
    #[must_use]
    pub const fn new(source: u8, chunk: ChunkNo, index: u16) -> Self {
        assert!(source <= MAX_SOURCE, "a location's source volume is at most 127");
        assert!(chunk.0 != 0 && chunk.0 <= CHUNK_MASK, "a location's chunk number is 1 to 2^37 - 1");
        assert!(index as u64 <= INDEX_MASK, "a location's index is at most 1023");
        Self((source as u64) << SOURCE_SHIFT | chunk.0 << INDEX_BITS | index as u64)
    }

    /// The same place, known to have lost sectors.
    #[must_use]
    pub const fn damaged(self) -> Self {
        Self(self.0 | DAMAGED)
    }

    /// Whether the block is known to have lost sectors.
    #[must_use]
    pub const fn is_damaged(self) -> bool {
        self.0 & DAMAGED != 0
    }

    /// The source volume; 0 is the volume itself.
    #[must_use]
    pub const fn source(self) -> u8 {
        (self.0 >> SOURCE_SHIFT) as u8 & MAX_SOURCE
    }

    /// The same place as a volume sees it to which source 0 is source `by`; `None` when no location has room for that.
    #[must_use]
    pub const fn lifted(self, by: u8) -> Option<Self> {
        if self.source() as u16 + by as u16 > MAX_SOURCE as u16 {
            return None;
        }
        Some(Self(self.0 + ((by as u64) << SOURCE_SHIFT)))
    }

    /// The chunk.
    #[must_use]
    pub const fn chunk(self) -> ChunkNo {
        ChunkNo(self.0 >> INDEX_BITS & CHUNK_MASK)
    }

    /// The block's logical index in the chunk.
    #[must_use]
    pub const fn index(self) -> u16 {
        (self.0 & INDEX_MASK) as u16
    }

    /// The packed value: 55 bits, never 0.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// A packed value as stored; `None` when it has more than 55 bits or names chunk 0.
    #[must_use]
    pub const fn from_raw(raw: u64) -> Option<Self> {
        if raw >> LOCATION_BITS != 0 || raw >> INDEX_BITS & CHUNK_MASK == 0 { None } else { Some(Self(raw)) }
    }

    /// The block `n` further on in the same chunk.
    ///
    /// # Panics
    /// When the index would pass 1023.
    #[must_use]
    pub const fn plus(self, n: u16) -> Self {
        assert!(self.room() > n as u64, "a run of blocks ends inside its chunk");
        Self(self.0 + n as u64)
    }

    /// How many consecutive indices there are from here on, this one included.
    pub(crate) const fn room(self) -> u64 {
        INDEX_MASK + 1 - (self.0 & INDEX_MASK)
    }

    /// Whether `other` is the block `n` further on in the same chunk, in the same state.
    pub(crate) const fn leads_to(self, n: u64, other: Self) -> bool {
        n < self.room() && self.0 + n == other.0
    }
}

impl std::fmt::Debug for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let d = if self.is_damaged() { " damaged" } else { "" };
        write!(f, "Location({}:{:x}+{}{d})", self.source(), self.chunk().0, self.index())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_come_back() {
        let l = Location::new(127, MAX_CHUNK, 1022).plus(1).damaged();
        assert_eq!((l.source(), l.chunk(), l.index(), l.is_damaged()), (127, MAX_CHUNK, 1023, true));
        assert_eq!(l.raw(), (1 << 55) - 1);
        assert_eq!(Location::from_raw(l.raw()), Some(l));
        let l = Location::new(1, ChunkNo(2), 3);
        assert_eq!((l.source(), l.chunk(), l.index(), l.is_damaged()), (1, ChunkNo(2), 3, false));
        assert_eq!(l.raw(), 1 << 47 | 2 << 10 | 3);
    }

    #[test]
    fn nonsense_is_refused() {
        for raw in [0, 1023, 1 << 55 | 1 << 10, 1 << 54, 127 << 47, u64::MAX] {
            assert_eq!(Location::from_raw(raw), None, "{raw:x}");
        }
    }

    #[test]
    #[should_panic(expected = "inside its chunk")]
    fn a_run_does_not_leave_its_chunk() {
        let _ = Location::new(0, ChunkNo(1), 1020).plus(4);
    }
}
