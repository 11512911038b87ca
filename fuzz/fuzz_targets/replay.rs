//! Whole logs: three segments with anything in their headers and records, replayed and inspected.
//!
//! A block of the log is given by its first [`GIVEN`] bytes; the rest is zeros. So an input of a few KiB is a log of many records. Each segment
//! has [`SLOT_GIVEN`] bytes of the input: what changes in one does not move the others.
#![no_main]

use std::collections::HashMap;
use std::io;

use futures_util::FutureExt;
use vb_ublk::disk::{Disk, IoBuf};
use vb_ublk::units::BLOCK;
use vb_ublk::wal::codec::{Superblock, peek_record};
use vb_ublk::wal::inspect::inspect;
use vb_ublk::wal::log::Geometry;
use vb_ublk::wal::replay::{geometry_of, replay};
use vb_ublk_fuzz::{GIVEN, SLOT_GIVEN, seal, superblock};

const SLOTS: usize = 3;
const CRC_AT: usize = 8;
/// Where a segment header has its salt, with which its records are sealed.
const SALT: std::ops::Range<usize> = 40..48;

/// Where a record header says how long the record is.
const RECORD_BYTES: std::ops::Range<usize> = 44..48;

/// A disk of zeros but for some blocks.
struct Sparse {
    blocks: HashMap<u64, Vec<u8>>,
    size: u64,
}

impl Disk for Sparse {
    async fn read_at(&self, offset: u64, dst: IoBuf) -> io::Result<()> {
        let end = offset + dst.len() as u64;
        if end > self.size || offset % BLOCK as u64 != 0 || dst.len() % BLOCK != 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (i, at) in (offset / BLOCK as u64..end / BLOCK as u64).enumerate() {
            if let Some(block) = self.blocks.get(&at) {
                dst.copy_in(i * BLOCK, block);
            }
        }
        Ok(())
    }
    async fn writev_at(&self, _: u64, _: Vec<IoBuf>, _: bool) -> io::Result<()> {
        unreachable!("who reads a log does not write it")
    }
    async fn sync(&self) -> io::Result<()> {
        unreachable!("who reads a log does not sync it")
    }
}

/// Puts the checksums of a slot's segment header and of its records right, as far as its records hang together.
fn seal_slot(slot: &mut [Vec<u8>]) {
    let Some((header, records)) = slot.split_first_mut() else { return };
    seal(header, CRC_AT, &[]);
    let salt = header[SALT].to_vec();
    let mut at = 0;
    while let Some(block) = records.get(at)
        && let Ok(n) = peek_record(block)
        && let Some(whole) = records.get(at..at + n / BLOCK)
    {
        let mut bytes = whole.concat();
        seal(&mut bytes, CRC_AT, &salt);
        records[at][CRC_AT..CRC_AT + 4].copy_from_slice(&bytes[CRC_AT..CRC_AT + 4]);
        let record_bytes = u32::from_le_bytes(records[at][RECORD_BYTES].try_into().expect("four bytes")) as usize;
        at += record_bytes.div_ceil(BLOCK).max(1);
    }
}

fn read(slots: &[Vec<Vec<u8>>], sb: &Superblock, geometry: &Geometry) {
    let size = geometry.slot_offset(SLOTS as u32);
    let mut blocks = HashMap::from([(0, sb.encode().to_vec())]);
    for (i, slot) in slots.iter().enumerate() {
        let first = geometry.slot_offset(i as u32) / BLOCK as u64;
        blocks.extend((first..).zip(slot.iter().cloned()));
    }
    let disk = Sparse { blocks, size };
    let replayed = replay(&disk, size, sb).now_or_never().expect("a disk that answers at once");
    let inspected = inspect(&disk, size).now_or_never().expect("a disk that answers at once");
    if let Ok(r) = replayed {
        inspected.expect("what can be replayed can be inspected");
        // Every entry once, in order, none that is packed, its data within the file.
        assert!(r.entries.first().is_none_or(|e| e.seq > r.packed));
        assert!(r.entries.windows(2).all(|w| w[0].seq.next() == w[1].seq));
        assert!(r.entries.iter().all(|e| e.data_byte() + e.stored_bytes() <= size));
        assert!(r.live.iter().all(|l| !r.free.contains(&l.slot)));
    }
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let sb = superblock();
    let geometry = geometry_of(&sb);
    let block = |given: &[u8]| {
        let mut block = given.to_vec();
        block.resize(BLOCK, 0);
        block
    };
    let slots = bytes.chunks(SLOT_GIVEN).take(SLOTS);
    let mut slots: Vec<Vec<Vec<u8>>> = slots.map(|s| s.chunks(GIVEN).map(block).collect()).collect();
    read(&slots, &sb, &geometry);
    slots.iter_mut().for_each(|s| seal_slot(s));
    read(&slots, &sb, &geometry);
});
