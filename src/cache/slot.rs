//! What a slot of the cache's file says of itself.
//!
//! The file is a row of slots of 69632 bytes, and nothing else: a header block, then room for the 16 blocks of one *page* of a chunk
//! (blocks 16 p to 16 p + 15 of those stored in it). All integers are little-endian; what is not used is zero.
//!
//! ```text
//! offset  size  field
//!      0     4  magic "VBCA"
//!      4     2  format version, 1
//!      6     2  bit i set: block i of the page is here
//!      8    16  uuid of the volume that wrote the chunk
//!     24     8  chunk number
//!     32     8  epoch
//!     40     8  nonce of the attachment that wrote the chunk
//!     48     2  page, at most 63
//!     50     2  0
//!     52     4  CRC-32 of the 4096 bytes, with this field as zero
//!     56  4*16  checksum of each block, as in the chunk's header; 0 where there is none
//!    120  3976  0
//!   4096   ...  the blocks, each in its place
//! ```

use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::checksum::crc_around;
use crate::chunk::header::MAX_BLOCKS;
use crate::codec::CodecError;
use crate::map::MAX_CHUNK;
use crate::units::{BLOCK, ChunkNo, Epoch, Nonce};

/// Blocks of a page.
pub const PAGE_BLOCKS: usize = 16;
/// Pages of a chunk.
pub const PAGES: usize = MAX_BLOCKS.div_ceil(PAGE_BLOCKS);
/// Bytes of a slot: its header, and a page.
pub const SLOT_BYTES: u64 = ((1 + PAGE_BLOCKS) * BLOCK) as u64;
/// The format's version.
pub const VERSION: u16 = 1;

const MAGIC: [u8; 4] = *b"VBCA";
const CRC_AT: usize = 52;
const WHAT: &str = "cache slot";

const _: () = assert!(std::mem::offset_of!(RawSlot, crc) == CRC_AT);
const _: () = assert!(size_of::<RawSlot>() == 120);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawSlot {
    magic: [u8; 4],
    version: U16,
    present: U16,
    volume: [u8; 16],
    chunk: U64,
    epoch: U64,
    nonce: U64,
    page: U16,
    zero: U16,
    crc: U32,
    crcs: [U32; PAGE_BLOCKS],
}

/// A slot's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotHeader {
    /// The volume that wrote the chunk.
    pub volume: Uuid,
    /// The chunk.
    pub chunk: ChunkNo,
    /// The attachment that wrote it: no two chunks of a volume agree in these three.
    pub epoch: Epoch,
    /// That attachment's nonce.
    pub nonce: Nonce,
    /// Which 16 of the chunk's stored blocks.
    pub page: u16,
    /// Bit `i`: block `i` of the page is here.
    pub present: u16,
    /// The checksum ([`crate::checksum::block_crc`]) of each.
    pub crcs: [u32; PAGE_BLOCKS],
}

/// A stretch of a chunk's stored blocks, cut at the ends of pages: of each part, how many blocks are before it, and how many it has.
pub(crate) fn parts(first: usize, blocks: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let n = (PAGE_BLOCKS - (first + done) % PAGE_BLOCKS).min(blocks - done);
        done += n;
        (n > 0).then_some((done - n, n))
    })
}

impl SlotHeader {
    /// Writes the header into a zeroed block.
    pub fn encode_into(&self, block: &mut [u8]) {
        let raw = RawSlot {
            magic: MAGIC,
            version: VERSION.into(),
            present: self.present.into(),
            volume: self.volume.into_bytes(),
            chunk: self.chunk.0.into(),
            epoch: self.epoch.0.into(),
            nonce: self.nonce.0.into(),
            page: self.page.into(),
            zero: 0.into(),
            crc: 0.into(),
            crcs: self.crcs.map(U32::new),
        };
        block[..size_of::<RawSlot>()].copy_from_slice(raw.as_bytes());
        let crc = crc_around(&[], &block[..BLOCK], CRC_AT);
        block[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
    }

    /// Reads a slot's first block.
    ///
    /// # Errors
    /// Anything that is not a whole, intact header of this version: nothing is in the slot.
    pub fn decode(block: &[u8]) -> Result<Self, CodecError> {
        let short = || CodecError::Length { what: WHAT, got: block.len() as u64, need: BLOCK as u64 };
        let block = block.get(..BLOCK).ok_or_else(short)?;
        let (raw, _) = RawSlot::read_from_prefix(block).map_err(|_| short())?;
        if raw.magic != MAGIC {
            return Err(CodecError::Magic(WHAT));
        }
        let (stored, computed) = (raw.crc.get(), crc_around(&[], block, CRC_AT));
        if stored != computed {
            return Err(CodecError::Checksum { what: WHAT, stored, computed });
        }
        CodecError::known(WHAT, "version", raw.version.get().into(), VERSION.into())?;
        let page = raw.page.get();
        if usize::from(page) >= PAGES || raw.chunk.get() == 0 || raw.chunk.get() > MAX_CHUNK.0 || raw.zero.get() != 0 {
            return Err(CodecError::invalid(WHAT, format!("page {page} of chunk {:x}", raw.chunk.get())));
        }
        Ok(Self {
            volume: Uuid::from_bytes(raw.volume),
            chunk: ChunkNo(raw.chunk.get()),
            epoch: Epoch(raw.epoch.get()),
            nonce: Nonce(raw.nonce.get()),
            page,
            present: raw.present.get(),
            crcs: raw.crcs.map(U32::get),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> SlotHeader {
        let mut crcs = [0; PAGE_BLOCKS];
        crcs[0] = 0x0102_0304;
        crcs[15] = 0xffee_ddcc;
        SlotHeader {
            volume: Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff),
            chunk: ChunkNo(0x0a0b),
            epoch: Epoch(3),
            nonce: Nonce(0x1122_3344_5566_7788),
            page: 63,
            present: 0x8001,
            crcs,
        }
    }

    #[test]
    fn a_stretch_is_cut_at_the_ends_of_pages() {
        let cut = |first, blocks| parts(first, blocks).collect::<Vec<_>>();
        assert_eq!(cut(0, 16), [(0, 16)]);
        assert_eq!(cut(15, 18), [(0, 1), (1, 16), (17, 1)]);
        assert_eq!(cut(20, 3), [(0, 3)]);
        assert_eq!(cut(31, 0), []);
    }

    #[test]
    fn golden() {
        let mut block = vec![0; BLOCK];
        example().encode_into(&mut block);
        let want = "5642434101000180\
                    00112233445566778899aabbccddeeff\
                    0b0a000000000000030000000000000088776655443322113f000000";
        let hex: String = block[..52].iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, want);
        assert_eq!(block[56..60], [4, 3, 2, 1]);
        assert_eq!(block[116..120], [0xcc, 0xdd, 0xee, 0xff]);
        assert!(block[120..].iter().all(|b| *b == 0));
        assert_eq!(SlotHeader::decode(&block).unwrap(), example());
    }

    #[test]
    fn a_flipped_bit_anywhere_empties_the_slot() {
        let mut block = vec![0; BLOCK];
        example().encode_into(&mut block);
        for at in (0..BLOCK).step_by(7).chain(0..130) {
            block[at] ^= 0x10;
            assert!(SlotHeader::decode(&block).is_err(), "byte {at}");
            block[at] ^= 0x10;
        }
        assert!(SlotHeader::decode(&block[..BLOCK - 1]).is_err());
        assert!(SlotHeader::decode(&vec![0; BLOCK]).is_err());
    }

    #[test]
    fn what_is_intact_and_makes_no_sense_is_refused() {
        for bad in [
            SlotHeader { page: 64, ..example() },
            SlotHeader { chunk: ChunkNo(0), ..example() },
            SlotHeader { chunk: ChunkNo(1 << 37), ..example() },
        ] {
            let mut block = vec![0; BLOCK];
            bad.encode_into(&mut block);
            assert!(SlotHeader::decode(&block).is_err(), "{bad:?}");
        }
    }
}
