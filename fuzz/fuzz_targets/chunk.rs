//! Chunk headers and chunks' names, with anything in them.
#![no_main]

use vb_ublk::chunk::header::{ChunkHeader, HEADER_ROOM, key, parse_name};
use vb_ublk_fuzz::seal;

const CRC_AT: usize = 252;

fn read(bytes: &[u8]) {
    if let Ok(h) = ChunkHeader::decode(bytes) {
        assert_eq!(h.encode().as_deref(), Ok(bytes));
    }
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Some((chunk, epoch, nonce)) = parse_name(text)
    {
        assert_eq!(key("", chunk, epoch, nonce), format!("chunks/{text}"));
    }
    let mut bytes = bytes.to_vec();
    bytes.resize(HEADER_ROOM, 0);
    read(&bytes);
    seal(&mut bytes, CRC_AT, &[]);
    read(&bytes);
});
