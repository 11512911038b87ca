//! Golden bytes of each kind, and what is refused.

use super::{
    Age, BLOCK, BlockMap, Cipher, CodecError, LOG_RECORD, MapRecord, block_map, chunk_head, layered_map, log_head,
    log_record,
};

// Made with Python's struct and zlib, not with this program.
const MAP_HEAD: &str = "5642574200010000000067890abc";
const RECORD_26: &str = "0102030405060708000311121314151617180040100a2979e1fd";
const RECORD_34: &str = "0102030405060708000311121314151617180040100a2122232425262728d8bca9cd";
const LOG_HEAD: &str = "5642574c0001000010000000000067890abc";
const LOG_RECORD_HEAD: &str = "2122232425262728010203040506070800000000000000002d2a42c2";
const CHUNK_HEAD: &str = "56424348000100001000";

fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|n| u8::from_str_radix(&text[n..n + 2], 16).expect("hex")).collect()
}

fn record(seq: u64) -> MapRecord {
    MapRecord { block: 0x0102_0304_0506_0708, chunk: 0x1112_1314_1516_1718, offset: 0x0040_100a, seq }
}

fn map_of(record: &str, times: usize) -> Vec<u8> {
    hex(&format!("{MAP_HEAD}{}", record.repeat(times)))
}

#[test]
fn golden_map_records_of_both_ages() {
    let old = BlockMap { age: Some(Age::Unnumbered), records: vec![record(0)] };
    assert_eq!(block_map(&map_of(RECORD_26, 1)), Ok(old));
    let new = BlockMap { age: Some(Age::Numbered), records: vec![record(0x2122_2324_2526_2728)] };
    assert_eq!(block_map(&map_of(RECORD_34, 1)), Ok(new));
    assert_eq!(block_map(&hex(MAP_HEAD)), Ok(BlockMap { age: None, records: vec![] }));
}

#[test]
fn golden_chunk_and_log() {
    assert_eq!(chunk_head(&hex(CHUNK_HEAD)), Ok(Cipher::Plain));
    assert_eq!(log_head(&hex(LOG_HEAD)), Ok(Cipher::Plain));
    let mut bytes = hex(LOG_RECORD_HEAD);
    bytes.resize(LOG_RECORD, 0xa5);
    let got = log_record(&bytes).expect("sound");
    assert_eq!((got.seq, got.block), (0x2122_2324_2526_2728, 0x0102_0304_0506_0708));
    assert_eq!(got.data, [0xa5; BLOCK]);
    for at in [0, 8, 16, 24, 27, 28, LOG_RECORD - 1] {
        bytes[at] ^= 1;
        assert!(matches!(log_record(&bytes), Err(CodecError::Checksum { .. })), "byte {at}");
        bytes[at] ^= 1;
    }
    assert!(matches!(log_record(&bytes[..LOG_RECORD - 1]), Err(CodecError::Length { .. })));
    for (plain, encrypted, read) in
        [(CHUNK_HEAD, *b"VBCE", chunk_head as fn(&[u8]) -> Result<Cipher, CodecError>), (LOG_HEAD, *b"VBWE", log_head)]
    {
        let mut bytes = hex(plain);
        bytes[..4].copy_from_slice(&encrypted);
        assert_eq!(read(&bytes), Ok(Cipher::Encrypted));
        bytes[5] = 2;
        assert!(matches!(read(&bytes), Err(CodecError::Unknown { field: "version", value: 2, .. })));
        bytes[5] = 1;
        bytes[8] = 2;
        assert!(matches!(read(&bytes), Err(CodecError::Unknown { field: "block size", value: 512, .. })));
        bytes[0] = b'X';
        assert!(matches!(read(&bytes), Err(CodecError::Magic(_))));
        assert!(matches!(read(&bytes[..9]), Err(CodecError::Length { .. })));
    }
}

#[test]
fn where_both_lengths_are_possible_the_checksums_tell_the_age() {
    // 442 bytes are 13 records of 34 or 17 of 26.
    for (text, times, age) in [(RECORD_34, 13, Age::Numbered), (RECORD_26, 17, Age::Unnumbered)] {
        let mut bytes = map_of(text, times);
        let map = block_map(&bytes).expect("sound");
        assert_eq!((map.age, map.records.len()), (Some(age), times));
        // One damaged record, also the first one, does not make it the other age's.
        bytes[20] ^= 1;
        let text = block_map(&bytes).expect_err("damaged").to_string();
        assert!(text.contains("record 0, at byte 14,"), "{text}");
    }
}

#[test]
fn no_flipped_or_missing_byte_of_a_map_goes_unseen() {
    for bytes in [map_of(RECORD_34, 3), map_of(RECORD_26, 3)] {
        let whole = block_map(&bytes).expect("sound");
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x10;
            // The time of writing is for nobody.
            assert_eq!(block_map(&flipped).ok().as_ref() == Some(&whole), (6..14).contains(&at), "byte {at}");
            let cut = block_map(&bytes[..at]);
            // Whole records may go without a trace: the file does not count them.
            assert!(cut.is_err() || (at - 14) % (bytes.len() / 3 - 4) == 0, "{at} bytes");
        }
    }
}

fn layered() -> Vec<u8> {
    let mut bytes = map_of(RECORD_34, 1);
    bytes.extend(b"FLAT\x01\x01\x00\x03vol");
    bytes.extend([7; 36]);
    bytes.extend(hex(&format!("00000002{RECORD_34}{RECORD_34}")));
    bytes
}

#[test]
fn golden_inherited_layers() {
    let bytes = layered();
    let (own, layers) = layered_map(&bytes, 1).expect("sound");
    assert_eq!((own.age, own.records.len()), (Some(Age::Numbered), 1));
    assert_eq!((layers.len(), layers[0].volume.as_str(), layers[0].records.len()), (1, "vol", 2));
    assert_eq!(layers[0].records[1], record(0x2122_2324_2526_2728));
    let (none, _) = layered_map(&[&bytes[..14], &bytes[48..]].concat(), 0).expect("sound");
    assert_eq!(none, BlockMap { age: None, records: vec![] });
}

#[test]
fn layers_with_hostile_counts_are_refused() {
    let bytes = layered();
    for own in [0, 2, 3, u64::MAX, u64::MAX / 34 + 1] {
        assert!(layered_map(&bytes, own).is_err(), "{own} own records");
    }
    for len in 0..bytes.len() {
        assert!(layered_map(&bytes[..len], 1).is_err(), "{len} bytes");
    }
    let more = [bytes.as_slice(), &[0]].concat();
    assert!(layered_map(&more, 1).is_err());
    for at in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[at] |= 0x80;
        let _ = layered_map(&flipped, 1);
    }
    let counted = 14 + 34 + 6 + 5 + 36;
    let mut many = bytes;
    many[counted..counted + 4].fill(0xff);
    assert!(matches!(layered_map(&many, 1), Err(CodecError::Length { .. })));
}
