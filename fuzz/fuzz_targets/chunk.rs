//! Chunk headers and chunks' keys, with anything in them.
#![no_main]

use vb_ublk::chunk::header::{ChunkHeader, HEADER_ROOM, key, parse_key};
use vb_ublk_fuzz::seal;

const CRC_AT: usize = 252;

fn read(bytes: &[u8]) {
    if let Ok(h) = ChunkHeader::decode(bytes) {
        assert_eq!(h.encode().as_deref(), Ok(bytes));
    }
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Some((chunk, epoch, nonce)) = parse_key(text)
    {
        assert!(text.ends_with(&key("", chunk, epoch, nonce)));
    }
    let mut bytes = bytes.to_vec();
    bytes.resize(HEADER_ROOM, 0);
    read(&bytes);
    seal(&mut bytes, CRC_AT, &[]);
    read(&bytes);
});
