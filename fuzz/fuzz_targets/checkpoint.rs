//! Parts of checkpoints, with anything in them.
#![no_main]

use vb_ublk::map::checkpoint::{Expect, HEADER_BYTES, PartKind, decode_part};
use vb_ublk_fuzz::{BLOCKS, CHECKPOINT};

fn read(bytes: &[u8]) {
    for kind in [PartKind::Full, PartKind::Delta] {
        let expect = Expect { ident: CHECKPOINT, kind, part: 0, parts: 1, volume_blocks: BLOCKS };
        if let Ok(part) = decode_part(bytes, &expect) {
            assert!(part.volume_blocks() <= BLOCKS);
        }
    }
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    read(bytes);
    if bytes.len() < HEADER_BYTES {
        return;
    }
    let mut bytes = bytes.to_vec();
    let (head, payload) = bytes.split_at_mut(HEADER_BYTES);
    head[56..64].copy_from_slice(&(payload.len() as u64).to_le_bytes());
    head[64..68].copy_from_slice(&crc32fast::hash(payload).to_le_bytes());
    let crc = crc32fast::hash(&head[..68]);
    head[68..].copy_from_slice(&crc.to_le_bytes());
    read(&bytes);
});
