//! The log's superblock, segment headers and record headers, with anything in them.
#![no_main]

use vb_ublk::wal::codec::{SegmentHeader, Superblock, decode_record, peek_record};
use vb_ublk_fuzz::{RECORD_AT, seal, segment};

/// Where all three have their checksum.
const CRC_AT: usize = 8;

fn read(bytes: &[u8]) {
    if let Ok(s) = Superblock::decode(bytes) {
        assert_eq!(Superblock::decode(&s.encode()).as_ref(), Ok(&s));
    }
    if let Ok(s) = SegmentHeader::decode(bytes) {
        let mut again = vec![0; 4096];
        s.encode_into(&mut again);
        assert_eq!(SegmentHeader::decode(&again).as_ref(), Ok(&s));
    }
    if let Ok(n) = peek_record(bytes)
        && let Some(header) = bytes.get(..n)
        && let Ok(r) = decode_record(header, &segment(), RECORD_AT)
    {
        let data: u64 = r.entries.iter().map(|e| e.stored_blocks()).sum();
        assert_eq!(data, r.crcs.len() as u64);
    }
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(4096), 0);
    read(&bytes);
    seal(&mut bytes, CRC_AT, &[]);
    read(&bytes);
    if let Ok(n) = peek_record(&bytes)
        && let Some(header) = bytes.get_mut(..n)
    {
        seal(header, CRC_AT, &segment().salt.to_le_bytes());
        read(&bytes);
    }
});
