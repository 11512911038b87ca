//! What is read from the store and from the log, with anything in it. Most of it ends at a checksum: the tests beside the codecs
//! seal what they have spoiled, and go on from there.
#![no_main]

use vb_ublk::chunk::header::{ChunkHeader, parse_key};
use vb_ublk::manifest::Manifest;
use vb_ublk::wal::codec::{SegmentHeader, Superblock};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = Manifest::decode(bytes);
    let _ = ChunkHeader::decode(bytes);
    let _ = Superblock::decode(bytes);
    let _ = SegmentHeader::decode(bytes);
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = parse_key(text);
    }
});
