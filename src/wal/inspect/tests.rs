//! Logs laid out by hand, so that each byte's place is known.

use std::cell::RefCell;
use std::io;

use futures_util::FutureExt;
use uuid::Uuid;

use super::{End, Inspection, Piece, Standing, inspect, read_entries};
use crate::checksum::block_crc;
use crate::disk::{Disk, IoBuf};
use crate::error::{ErrorKind, Result};
use crate::units::{BLOCK, BlockNo, Lba, SECTOR, Seq};
use crate::wal::codec::{
    LogPos, Placement, RecordEntry, RecordKind, SLOTS_START, SegmentHeader, Superblock, header_bytes, place_record,
    prepare_record,
};
use crate::wal::create::new_superblock;
use crate::wal::log::Geometry;

const GEOMETRY: Geometry = Geometry { segment_bytes: 1 << 20, max_segments: 8 };
const VOLUME: Uuid = Uuid::from_u128(7);
const BLOCK32: u32 = BLOCK as u32;

/// A disk that is never written.
struct Bytes(Vec<u8>);

impl Disk for Bytes {
    async fn read_at(&self, offset: u64, dst: IoBuf) -> io::Result<()> {
        let from = self.0.get(offset as usize..offset as usize + dst.len());
        dst.copy_in(0, from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
    async fn writev_at(&self, _: u64, _: Vec<IoBuf>, _: bool) -> io::Result<()> {
        unreachable!("an inspection wrote")
    }
    async fn sync(&self) -> io::Result<()> {
        unreachable!("an inspection synced")
    }
}

/// A log that is being laid out.
struct Layout {
    bytes: Vec<u8>,
    slot: u32,
    header: SegmentHeader,
    offset: u32,
    before: u32,
    next: Seq,
    durable: LogPos,
}

impl Layout {
    fn new(packed: u64, slots: u32) -> Self {
        let mut bytes = vec![0; (SLOTS_START + u64::from(slots) * u64::from(GEOMETRY.segment_bytes)) as usize];
        let sb = new_superblock(VOLUME, 9, GEOMETRY, 1 << 16, 512);
        let sb = Superblock { update: 2, packed_through: Seq(packed), ..sb };
        bytes[..BLOCK].copy_from_slice(&sb.encode());
        let header = SegmentHeader {
            volume: VOLUME,
            log_id: 9,
            generation: 0,
            salt: 0,
            predecessor_end: LogPos(0),
            packed_through: Seq(packed),
            first_seq: Seq(1),
        };
        Self { bytes, slot: 0, header, offset: 0, before: 0, next: Seq(1), durable: LogPos(0) }
    }

    fn at(&self) -> usize {
        (GEOMETRY.slot_offset(self.slot) + u64::from(self.offset)) as usize
    }

    fn end(&self) -> LogPos {
        LogPos::new(self.header.generation, self.offset)
    }

    /// Goes on in this slot, after what was written last.
    fn segment(&mut self, slot: u32, generation: u32) {
        let predecessor_end = self.end();
        self.header =
            SegmentHeader { generation, salt: generation.into(), predecessor_end, first_seq: self.next, ..self.header };
        (self.slot, self.offset, self.before) = (slot, 0, 0);
        let at = self.at();
        self.header.encode_into(&mut self.bytes[at..at + BLOCK]);
        self.offset = BLOCK32;
    }

    /// Each block of an entry is filled with the entry's number.
    fn record(&mut self, entries: &[RecordEntry]) {
        let mut data = Vec::new();
        let mut crcs = Vec::new();
        for (i, e) in entries.iter().enumerate() {
            for b in 0..e.stored_blocks() {
                let block = [(self.next.0 + i as u64) as u8; BLOCK];
                crcs.push(block_crc(BlockNo(e.lba.block().0 + b), &block));
                data.extend_from_slice(&block);
            }
        }
        let mut h = vec![0; header_bytes(entries.len(), crcs.len())];
        prepare_record(&mut h, VOLUME, entries, &crcs);
        let (SegmentHeader { generation, salt, .. }, durable) = (self.header, self.durable);
        let place = Placement {
            generation,
            salt,
            offset: self.offset,
            predecessor: self.before,
            first_seq: self.next,
            durable,
        };
        place_record(&mut h, &place);
        h.extend_from_slice(&data);
        let at = self.at();
        self.bytes[at..at + h.len()].copy_from_slice(&h);
        (self.before, self.offset) = (self.offset, self.offset + h.len() as u32);
        self.next = Seq(self.next.0 + entries.len() as u64);
    }

    fn inspect(&self) -> Result<Inspection> {
        ready(inspect(&Bytes(self.bytes.clone()), self.bytes.len() as u64))
    }
}

fn ready<T>(f: impl Future<Output = T>) -> T {
    f.now_or_never().expect("this disk does not wait")
}

fn data(lba: u64, sectors: u64) -> RecordEntry {
    RecordEntry { lba: Lba(lba), sectors, kind: RecordKind::Data }
}

fn seqs(found: &Inspection, standing: Standing) -> Vec<u64> {
    found.items().filter(|i| i.record.standing == standing).map(|i| i.entry.seq.0).collect()
}

/// Generations 1 to 3; entries 1 and 2, 3 and 4, 5 and 6.
fn three_segments(packed: u64) -> Layout {
    let mut l = Layout::new(packed, 3);
    for g in 1..=3 {
        l.segment(g - 1, g);
        l.record(&[data(u64::from(g) * 8, 8)]);
        l.record(&[data(u64::from(g) * 800, 8)]);
    }
    l
}

#[test]
fn packed_entries_are_shown_as_long_as_they_are_there() {
    let l = three_segments(3);
    let found = l.inspect().unwrap();
    assert_eq!((found.why, found.end, found.last_seq, found.packed), (End::Clean, l.end(), Seq(6), Seq(3)));
    assert_eq!((seqs(&found, Standing::Old), seqs(&found, Standing::Chain)), (vec![1, 2], vec![3, 4, 5, 6]));
    let unpacked: Vec<_> = found.items().filter(|i| found.is_unpacked(i)).map(|i| i.entry.seq.0).collect();
    assert_eq!(unpacked, [4, 5, 6]);
    assert_eq!(found.byte_of(found.end), Some(l.at() as u64));
    assert!(found.damage.is_empty());
}

#[test]
fn a_torn_tail_that_a_replay_left_behind_is_not_shown_as_packed() {
    let mut l = Layout::new(0, 3);
    l.segment(0, 1);
    l.record(&[data(0, 8)]);
    let (kept, next) = (l.end(), l.next);
    l.record(&[data(8, 8)]);
    // A replay kept the first record alone; the next life begins behind it, with the same number, and all is packed.
    l.next = next;
    l.offset = kept.offset();
    l.segment(1, 2);
    l.record(&[data(16, 8)]);
    let packed = Superblock { packed_through: Seq(2), ..Superblock::decode(&l.bytes[..BLOCK]).unwrap() };
    l.bytes[..BLOCK].copy_from_slice(&packed.encode());
    let found = l.inspect().unwrap();
    assert_eq!((seqs(&found, Standing::Old), seqs(&found, Standing::Chain)), (vec![1], vec![2]));
    // Neither when no link says where the first segment ended.
    let at = l.bytes.len() - 2 * GEOMETRY.segment_bytes as usize;
    SegmentHeader { predecessor_end: LogPos(0), ..l.header }.encode_into(&mut l.bytes[at..at + BLOCK]);
    let found = l.inspect().unwrap();
    assert_eq!((seqs(&found, Standing::Old), seqs(&found, Standing::Chain)), (vec![1], vec![2]));
}

#[test]
fn what_is_older_than_a_gap_is_not_shown() {
    let mut l = three_segments(6);
    l.bytes[SLOTS_START as usize + (1 << 20)..][..BLOCK].fill(0);
    let found = l.inspect().unwrap();
    assert!(found.damage.is_empty());
    assert_eq!((seqs(&found, Standing::Old), seqs(&found, Standing::Chain)), (vec![], vec![5, 6]));
}

#[test]
fn a_torn_tail_is_no_damage_and_a_gap_below_the_durable_mark_is() {
    for durable in [false, true] {
        let mut l = Layout::new(0, 2);
        l.segment(0, 1);
        l.record(&[data(0, 8)]);
        let (gap, byte) = (l.end(), l.at());
        l.record(&[data(8, 8)]);
        l.durable = if durable { l.end() } else { LogPos(0) };
        l.record(&[data(16, 8), data(24, 8)]);
        l.bytes[byte + 100] ^= 1;
        let found = l.inspect().unwrap();
        assert_eq!((found.end, found.last_seq), (gap, Seq(1)));
        assert_eq!((seqs(&found, Standing::Chain), seqs(&found, Standing::Beyond)), (vec![1], vec![3, 4]));
        if durable {
            assert_eq!((found.why, found.damage.len()), (End::Damaged, 1));
            assert!(found.damage[0].to_string().contains(&format!("byte {byte} ")), "{}", found.damage[0]);
        } else {
            assert_eq!((found.why, found.damage.len()), (End::Torn, 0));
        }
    }
}

#[test]
fn a_lost_header_is_damage_and_what_lies_behind_it_is_shown() {
    let mut l = three_segments(0);
    l.durable = l.end();
    l.record(&[]);
    l.bytes[SLOTS_START as usize + (1 << 20)..][..BLOCK].fill(0);
    let found = l.inspect().unwrap();
    assert_eq!((found.why, found.last_seq, found.damage[0].kind()), (End::Damaged, Seq(2), ErrorKind::Corrupt));
    assert_eq!((seqs(&found, Standing::Chain), seqs(&found, Standing::Beyond)), (vec![1, 2], vec![5, 6]));
}

#[test]
fn a_cut_file_is_told_and_read_as_far_as_it_goes() {
    let mut l = three_segments(0);
    // In the middle of the last record's data.
    let end = l.at() - 1000;
    l.bytes.truncate(end);
    let found = l.inspect().unwrap();
    assert_eq!((found.why, found.last_seq), (End::Damaged, Seq(5)));
    assert!(found.damage[0].to_string().contains("the file was cut"), "{}", found.damage[0]);
    // Only in a segment that nobody needs: no damage.
    let mut l = Layout::new(2, 2);
    l.segment(1, 1);
    l.record(&[data(0, 8), data(8, 8)]);
    l.segment(0, 2);
    l.record(&[data(16, 8)]);
    l.bytes.truncate(l.bytes.len() - 1000);
    let found = l.inspect().unwrap();
    assert_eq!((found.why, found.last_seq, seqs(&found, Standing::Old)), (End::Clean, Seq(3), vec![1, 2]));
}

#[test]
fn an_entry_past_the_volume_s_end_is_damage() {
    let mut l = Layout::new(0, 2);
    l.segment(0, 1);
    l.record(&[data((1 << 16) - 8, 8), data((1 << 16) - 8, 9)]);
    let found = l.inspect().unwrap();
    assert!(found.damage[0].to_string().contains("entry 2 (sectors 65528 to 65536)"), "{}", found.damage[0]);
    assert_eq!(found.items().map(|i| found.fits(&i)).collect::<Vec<_>>(), [true, false]);
}

#[test]
fn a_bad_block_is_lost_alone() {
    let mut l = Layout::new(0, 2);
    l.segment(0, 1);
    // Sectors 5 to 27: the last three of block 0, blocks 1 and 2, and four of block 3.
    let record = l.at();
    l.record(&[RecordEntry { lba: Lba(64), sectors: 9, kind: RecordKind::Discard }, data(5, 23)]);
    // Everything so far was on stable storage: replay leaves the data's check to the reader.
    l.durable = l.end();
    l.record(&[]);
    let bad = record + BLOCK + 2 * BLOCK;
    l.bytes[bad + 17] ^= 0x10;
    let found = l.inspect().unwrap();
    assert!(found.damage.is_empty());
    let told = RefCell::new(Vec::new());
    let disk = Bytes(l.bytes.clone());
    ready(read_entries(
        &disk,
        &found,
        |_| true,
        |piece| {
            told.borrow_mut().push(match piece {
                Piece::Hole(lba, sectors) => ("hole", lba.0, sectors),
                Piece::Damaged(lba, sectors, why) => {
                    assert_eq!((why.seq, why.byte), (Seq(2), bad as u64));
                    ("damaged", lba.0, sectors)
                }
                Piece::Data(lba, bytes) => {
                    assert!(bytes.iter().all(|b| *b == 2));
                    ("data", lba.0, (bytes.len() / SECTOR) as u64)
                }
            });
            Ok(())
        },
    ))
    .unwrap();
    assert_eq!(told.into_inner(), [("hole", 64, 9), ("data", 5, 11), ("damaged", 16, 8), ("data", 24, 4)]);
}

#[test]
fn what_is_no_log_is_refused() {
    let kind = |bytes: Vec<u8>| ready(inspect(&Bytes(bytes.clone()), bytes.len() as u64)).unwrap_err().kind();
    assert_eq!((kind(vec![0; 1 << 20]), kind(Vec::new())), (ErrorKind::NotFound, ErrorKind::NotFound));
    assert_eq!(kind(vec![7; 1 << 20]), ErrorKind::Corrupt);
}
