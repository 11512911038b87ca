//! Writes what the real encoders make to `corpus/`, for the fuzzer to begin with: `cargo run --example seeds`.

use std::fs;
use std::path::Path;

use vb_ublk::checksum::block_crc;
use vb_ublk::chunk::header::{ChunkExtent, ChunkHeader, ExtentKind, key};
use vb_ublk::manifest::{Checkpoint, EpochEntry, FirstOwned, Image, Manifest, Part, Snapshot, Writer};
use vb_ublk::map::checkpoint::{encode_delta, encode_full};
use vb_ublk::map::{BaseImage, Location, Run};
use vb_ublk::units::{BLOCK, BlockNo, ChunkNo, Epoch, GroupNo, Lba, Nonce, Seq};
use vb_ublk::wal::codec::{
    LogPos, Placement, RecordEntry, RecordKind, SegmentHeader, header_bytes, place_record, prepare_record,
};
use vb_ublk_fuzz::{BLOCKS, CHECKPOINT, GIVEN, RECORD_AT, SLOT_GIVEN, VOLUME, segment, superblock};

fn keep(target: &str, name: &str, bytes: &[u8]) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    fs::create_dir_all(&dir).expect("a folder for the corpus");
    fs::write(dir.join(format!("seed-{name}")), bytes).expect("a seed");
}

fn log() {
    keep("log", "superblock", &superblock().encode());
    let mut block = vec![0; 4096];
    segment().encode_into(&mut block);
    keep("log", "segment", &block);
    let entry = |lba, sectors, kind| RecordEntry { lba: Lba(lba), sectors, kind };
    let few = [entry(8, 16, RecordKind::Data), entry(3, 2, RecordKind::Data), entry(100, 8, RecordKind::Discard)];
    let many: Vec<RecordEntry> = (0..200).map(|i| entry(i * 8, 8, RecordKind::Data)).collect();
    for (name, entries) in [("record", &few[..]), ("long-record", &many), ("empty-record", &[])] {
        let blocks: u64 = entries.iter().filter(|e| e.kind == RecordKind::Data).map(RecordEntry::stored_blocks).sum();
        let crcs: Vec<u32> = (0..blocks as u32).collect();
        let mut header = vec![0; header_bytes(entries.len(), crcs.len())];
        prepare_record(&mut header, VOLUME, entries, &crcs);
        let s = segment();
        let place = Placement {
            generation: s.generation,
            salt: s.salt,
            offset: RECORD_AT,
            predecessor: 0,
            first_seq: Seq(7),
            durable: LogPos::new(5, 0),
        };
        place_record(&mut header, &place);
        keep("log", name, &header);
    }
}

/// A segment with two records of zeros, as the target of whole logs is given it: the first bytes of each block.
fn short_segment(header: SegmentHeader, durable: LogPos) -> (Vec<u8>, LogPos) {
    let mut blocks = vec![0; BLOCK];
    header.encode_into(&mut blocks);
    let (mut first_seq, mut predecessor) = (header.first_seq, 0);
    for lba in [8, 80] {
        let entries = [
            RecordEntry { lba: Lba(lba), sectors: 16, kind: RecordKind::Data },
            RecordEntry { lba: Lba(lba + 100), sectors: 8, kind: RecordKind::Discard },
        ];
        let crcs = [0, 1].map(|b| block_crc(BlockNo(lba / 8 + b), &[0; BLOCK]));
        let mut record = vec![0; header_bytes(entries.len(), crcs.len())];
        prepare_record(&mut record, VOLUME, &entries, &crcs);
        let (generation, salt, offset) = (header.generation, header.salt, blocks.len() as u32);
        place_record(&mut record, &Placement { generation, salt, offset, predecessor, first_seq, durable });
        (predecessor, first_seq) = (offset, Seq(first_seq.0 + 2));
        blocks.extend(record);
        blocks.resize(blocks.len() + crcs.len() * BLOCK, 0);
    }
    let mut given: Vec<u8> = blocks.chunks(BLOCK).flat_map(|b| b[..GIVEN].to_vec()).collect();
    given.resize(SLOT_GIVEN, 0);
    (given, LogPos::new(header.generation, blocks.len() as u32))
}

fn replay() {
    let (mut log, mut end) = short_segment(segment(), LogPos::new(5, 0));
    keep("replay", "one", &log);
    for generation in 6..8 {
        let first_seq = Seq(7 + 4 * u64::from(generation - 5));
        let header =
            SegmentHeader { generation, salt: generation.into(), predecessor_end: end, first_seq, ..segment() };
        let (more, next_end) = short_segment(header, end);
        log.extend(more);
        end = next_end;
    }
    keep("replay", "three", &log);
    // The newest segment's second record is not there: its header is the fifth block.
    log[2 * SLOT_GIVEN + 4 * GIVEN..].fill(0);
    keep("replay", "torn", &log);
}

fn chunk() {
    let extent = |block, blocks, kind| ChunkExtent { block: BlockNo(block), blocks, kind, birth: Seq(9) };
    let header = ChunkHeader {
        volume: VOLUME,
        chunk: ChunkNo(4),
        epoch: Epoch(2),
        nonce: Nonce(5),
        after: Seq(6),
        through: Seq(30),
        group: GroupNo(3),
        index: 0,
        count: 1,
        applied_through: GroupNo(2),
        extents: vec![
            extent(10, 3, ExtentKind::Data),
            extent(100, 1000, ExtentKind::Discard),
            extent(5000, 1, ExtentKind::Damaged),
        ],
        crcs: vec![1, 2, 3, 4],
        masks: vec![(3, 0x0f)],
    };
    keep("chunk", "header", &header.encode().expect("a header"));
    keep("chunk", "key", key("v/", ChunkNo(4), Epoch(2), Nonce(5)).as_bytes());
}

fn checkpoint() {
    let at = |chunk, index| Some(Location::new(0, ChunkNo(chunk), index));
    let run = |block, blocks, to| Run { block: BlockNo(block), blocks, to };
    let runs = [run(0, 40, at(1, 0)), run(100, 1, at(2, 7)), run(200, 5, None), run(4096, 900, at(3, 10))];
    for part in encode_delta(&runs, BLOCKS, CHECKPOINT, 1 << 20) {
        keep("checkpoint", "delta", &part);
    }
    let mut image = BaseImage::empty(BLOCKS);
    image.apply_runs(&runs);
    for part in encode_full(&image, CHECKPOINT, 1 << 20) {
        keep("checkpoint", "full", &part);
    }
}

fn manifest() {
    let mut m = Manifest::new("v", BLOCKS * 4096, 512, 1);
    keep("manifest", "new", &m.encode().expect("a manifest"));
    m.uuid = VOLUME;
    (m.epoch, m.nonce) = (Epoch(2), Nonce(5));
    m.writer = Some(Writer { host: "h".into(), pid: 1, since: 2 });
    let entry = |epoch, nonce, group, chunk| EpochEntry {
        epoch: Epoch(epoch),
        nonce: Nonce(nonce),
        first: Some(FirstOwned { group: GroupNo(group), chunk: ChunkNo(chunk) }),
    };
    m.history = vec![entry(1, 4, 1, 1), entry(2, 5, 3, 9)];
    let part = |n: u64| Part { key: format!("checkpoints/{n}"), bytes: 100, sha256: "0".repeat(64) };
    let image = |number| Image { number, parts: vec![part(number)], source: 0 };
    m.checkpoint = Some(Checkpoint {
        group: GroupNo(2),
        through: Seq(30),
        last_chunk: ChunkNo(8),
        full: image(1),
        delta: Some(image(2)),
    });
    keep("manifest", "used", &m.encode().expect("a manifest"));
    let (size_bytes, checkpoint) = (m.size_bytes, m.checkpoint.clone());
    m.snapshots.push(Snapshot { name: "s".into(), id: VOLUME, created: 3, size_bytes, checkpoint, deleting: None });
    keep("manifest", "snapshot", &m.encode().expect("a manifest"));
    let clone = m.clone_of(&m.snapshots[0], "c", m.size_bytes, 4).expect("a clone");
    keep("manifest", "clone", &clone.encode().expect("a manifest"));
}

fn main() {
    log();
    replay();
    chunk();
    checkpoint();
    manifest();
}
