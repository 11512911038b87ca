//! Viperblock's formats, with anything in them. Most of it ends at a checksum, so the records' are also put right first.
#![no_main]

use vb_ublk::image::viperblock::{codec, config::Config};

/// The same bytes as a map or as layers behind one, with records that pass.
fn sealed(bytes: &[u8], begin: usize, width: usize) -> Vec<u8> {
    let mut out = bytes.to_vec();
    for record in out.get_mut(begin..).unwrap_or_default().chunks_exact_mut(width) {
        let (head, crc) = record.split_at_mut(width - 4);
        crc.copy_from_slice(&crc32fast::hash(head).to_be_bytes());
    }
    out
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = codec::chunk_head(bytes);
    let _ = codec::log_head(bytes);
    let _ = codec::log_record(bytes);
    let _ = Config::decode(bytes);
    let own = u64::from(bytes.first().copied().unwrap_or(0));
    for width in [26, 34] {
        let map = [&b"VBWB\0\x01\0\0\0\0\0\0\0\0"[..], bytes].concat();
        for map in [&map, &sealed(&map, 14, width)] {
            let _ = codec::block_map(map);
            let _ = codec::layered_map(map, own);
        }
    }
    // Layers themselves, behind no record.
    let layers = [&b"VBWB\0\x01\0\0\0\0\0\0\0\0FLAT\x01"[..], bytes].concat();
    let _ = codec::layered_map(&layers, 0);
    let _ = codec::block_map(bytes);
});
