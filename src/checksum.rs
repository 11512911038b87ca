//! The data's checksum, of a 4096-byte block at its address, and the hash of whole objects and manifests.

use std::fmt::Write;

use sha2::{Digest, Sha256};

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

/// CRC-32 of `seed` and of `bytes`, with the four bytes at `gap`, where the checksum itself is, as zeros.
#[must_use]
pub(crate) fn crc_around(seed: &[u8], bytes: &[u8], gap: usize) -> u32 {
    let mut h = crc32fast::Hasher::new();
    for part in [seed, &bytes[..gap], &[0; 4], &bytes[gap + 4..]] {
        h.update(part);
    }
    h.finalize()
}

/// SHA-256 in lower-case hex: how formats and versions spell it.
#[must_use]
pub fn sha256_hex(bytes: impl AsRef<[u8]>) -> String {
    Sha256::digest(bytes).iter().fold(String::with_capacity(64), |mut hex, b| {
        let _ = write!(hex, "{b:02x}");
        hex
    })
}

#[cfg(test)]
mod tests {
    use super::sha256_hex;

    #[test]
    fn sha256_is_spelled_as_everywhere() {
        // The example of FIPS 180-2.
        assert_eq!(sha256_hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
