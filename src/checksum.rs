//! The one data checksum: of a 4096-byte block at its address.

use crate::units::BlockNo;

/// CRC-32 of the volume block's number (u64, little-endian) followed by the block's 4096 bytes, so that right
/// data at a wrong address fails. The log, the chunks and the cache use the same, so that the checksum taken when
/// a write arrives goes with the data all the way.
#[must_use]
pub fn block_crc(block: BlockNo, data: &[u8]) -> u32 {
    let mut h = crc32fast::Hasher::new();
    h.update(&block.0.to_le_bytes());
    h.update(data);
    h.finalize()
}
