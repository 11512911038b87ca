//! Reading a log back after any end: clean, `kill -9`, power cut, rot.
//!
//! What counts is the contiguous chain of valid records, from the oldest segment that is linked to the
//! newest one. Below the newest surviving durable mark D nothing may be missing: a gap there is corruption.
//! Above D a gap is a torn tail, and what follows it was never acknowledged. At or below D only headers are
//! read (data is checked when it is read or packed); above D data decides too.
//!
//! A block that the disk cannot read is never taken for the end of the log, wherever it is: what it held may have been acknowledged. In a
//! segment that is known to be older than the chain it does not matter.
//!
//! A gap may swallow a segment's header, too, while a later segment's is there: that one *dangles*. It is left behind
//! like any torn tail, unless a mark in it says that more was durable than the chain holds. This can be told exactly
//! because a slot is reused only when the next segment's header is durable (`log/slots.rs`): whatever a mark names is
//! in the chain, or packed, or damaged.

use std::collections::HashMap;

use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::codec::{
    LogPos, MAX_HEADER_BYTES, RecordHeader, SegmentHeader, Superblock, claimed_generation, decode_record, peek_record,
};
use super::legible::Legible;
use super::log::{FileSlots, Geometry, Live, LogEntry, number_entries};
use super::salvage::Behind;
use crate::checksum::block_crc;
use crate::disk::{Disk, IoBuf};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::units::{BLOCK, Seq};

const PARALLEL_SEGMENTS: usize = 16;
const WINDOW: usize = 1 << 20;

/// What a log holds.
#[derive(Debug, Default)]
pub struct Replay {
    /// All entries of the chain above the packed mark, in order.
    pub entries: Vec<LogEntry>,
    /// Checksums of stored blocks: (block of the file, CRC).
    pub crcs: Vec<(u32, u32)>,
    /// The packed mark.
    pub packed: Seq,
    /// The number of the newest entry in the chain (or the packed mark, if that is higher).
    pub last_seq: Seq,
    /// Where the chain ends.
    pub end: LogPos,
    /// The newest durable mark found.
    pub durable: LogPos,
    /// Above every generation found.
    pub next_generation: u32,
    /// Slots that hold entries above the packed mark, oldest first.
    pub live: Vec<Live>,
    /// Slots that may be written.
    pub free: Vec<u32>,
    /// Slots on the disk.
    pub slots_ready: u32,
    /// Bytes of records found valid beyond the end of the chain: never acknowledged, left behind.
    pub torn_bytes: u64,
}

/// A segment whose header is good.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) slot: u32,
    pub(super) header: SegmentHeader,
    /// Where the next segment says this one ends; the slot's end for the newest.
    pub(super) limit: u32,
    pub(super) newest: bool,
}

/// The records of a segment.
#[derive(Debug)]
pub(super) struct Walked {
    pub(super) records: Vec<RecordHeader>,
    /// Where the chain of records ends.
    end: u32,
    /// Valid records past the first gap.
    pub(super) past_gap: Vec<RecordHeader>,
    /// The chain ends because this byte of the file cannot be read.
    illegible: Option<u64>,
}

/// All that is to be known of a log, damaged or not.
#[derive(Debug)]
pub(super) struct Survey {
    /// What a replay returns; of a damaged log, as far as it came.
    pub(super) replay: Replay,
    /// Why a replay refuses the log.
    pub(super) damage: Option<Error>,
    /// Oldest first.
    pub(super) chain: Vec<(Segment, Walked)>,
    /// Newer ones that hang on nothing, newest first.
    pub(super) dangling: Vec<(Segment, Walked)>,
    /// Generation → slot, header of all good segments.
    pub(super) headers: HashMap<u32, (u32, SegmentHeader)>,
    /// Slot and generation of segments with a damaged header.
    pub(super) damaged: Vec<(u32, u32)>,
    /// Slots of which neither the header can be read nor what would vouch for it.
    pub(super) illegible: Vec<u32>,
}

fn corrupt(text: String) -> Error {
    Error::new(ErrorKind::Corrupt, text)
}

/// Reads the log of `size` bytes on `disk`.
///
/// # Errors
/// `Corrupt` when entries are missing below the durable or the packed mark; else the I/O error.
pub async fn replay<D: Disk>(disk: &D, size: u64, sb: &Superblock) -> Result<Replay> {
    let geometry = geometry_of(sb);
    let mut found = survey(disk, sb, &FileSlots::whole(&geometry, size)).await?;
    let Some(damage) = found.damage.take() else { return Ok(found.replay) };
    let behind = Behind::of(&found);
    Err(corrupt(format!(
        "{damage}; {behind}. Put the file back from a copy, if there is one. Else --accept-loss has the log end with entry {}, as after a power cut at \
         that moment, and keeps the file as it is under another name; `vb-ublk wal export --all` shows what can still be read",
        behind.last_kept
    )))
}

/// The sizes of the log that this is the superblock of.
#[must_use]
pub const fn geometry_of(sb: &Superblock) -> Geometry {
    Geometry { segment_bytes: sb.segment_bytes, max_segments: sb.max_segments }
}

/// Reads the log in `slots`, and goes on after damage as far as that tells more.
///
/// # Errors
/// The I/O error.
pub(super) async fn survey<D: Disk>(raw: &D, sb: &Superblock, slots: &FileSlots) -> Result<Survey> {
    let disk = &Legible::new(raw);
    let geometry = geometry_of(sb);
    let Headers { good: headers, damaged, illegible } =
        read_segment_headers(disk, sb, &geometry, slots.count()).await?;

    let mut out = Replay {
        packed: headers.values().map(|(_, h)| h.packed_through).fold(sb.packed_through, Seq::max),
        next_generation: headers.keys().max().map_or(1, |g| g + 1),
        slots_ready: slots.whole,
        ..Replay::default()
    };
    let (mut chain, mut dangling) = link(&headers, &geometry, out.packed);
    chain.iter_mut().chain(&mut dangling).for_each(|s| s.limit = slots.clip(s.slot, s.limit));
    let head = chain.last().map_or(0, |s| s.header.generation);
    let mut damage = damaged.iter().find(|(_, g)| *g > head).map(|(slot, generation)| {
        corrupt(format!(
            "the header of the log's segment of generation {generation} is damaged (byte {} of the file): entries after {} may have been in it",
            geometry.slot_offset(*slot),
            out.packed
        ))
    });
    damage = damage.or_else(|| {
        let at = geometry.slot_offset(*illegible.first()?);
        Some(corrupt(format!("the header of a segment of the log cannot be read (byte {at} of the file): entries after {} may have been in it", out.packed)))
    });
    let walked = walk_all(disk, &geometry, &chain).await?;
    let beyond = walk_all(disk, &geometry, &dangling).await?;
    out.durable = walked.iter().chain(&beyond).map(|w| w.durable(out.packed)).max().unwrap_or_default();
    out.torn_bytes = beyond.iter().map(Walked::valid_bytes).sum();
    let missing = assemble(disk, &geometry, &chain, &walked, &mut out).await?;
    damage = damage.or(missing);
    if damage.is_none() && out.durable > out.end {
        // What is missing begins behind the chain; the oldest segment that dangles says where it ends.
        let next = dangling.last().map_or(Seq(0), |s| s.header.first_seq);
        damage = Some(corrupt(format!(
            "the log ends with entry {} at {}, but a record says that everything up to {} was on stable storage: a segment's header is missing or damaged (the log goes on with entry {next})",
            out.last_seq, out.end, out.durable
        )));
    }
    let used: Vec<u32> = out.live.iter().map(|l| l.slot).collect();
    out.free = (0..slots.whole).filter(|s| !used.contains(s)).collect();
    let chain = chain.into_iter().zip(walked).collect();
    Ok(Survey {
        replay: out,
        damage,
        chain,
        dangling: dangling.into_iter().zip(beyond).collect(),
        headers,
        damaged,
        illegible,
    })
}

/// Whether a valid segment header is of this very log: not of one that was here before.
fn is_of(h: &SegmentHeader, sb: &Superblock) -> bool {
    let end = h.predecessor_end.offset();
    h.volume == sb.volume && h.log_id == sb.log_id && end.is_multiple_of(BLOCK as u32) && end <= sb.segment_bytes
}

/// The first blocks of all slots.
struct Headers {
    /// Generation → slot, header.
    good: HashMap<u32, (u32, SegmentHeader)>,
    /// Slot and generation where a header was and its checksum fails.
    damaged: Vec<(u32, u32)>,
    /// Slots of which neither the header can be read nor the block behind it.
    illegible: Vec<u32>,
}

async fn read_segment_headers<D: Disk>(
    disk: &Legible<'_, D>,
    sb: &Superblock,
    geometry: &Geometry,
    slots: u32,
) -> Result<Headers> {
    let found: Vec<(u32, IoBuf)> = stream::iter(0..slots)
        .map(|slot| async move {
            // With the block in which the first record begins.
            let buf = IoBuf::zeroed(2 * BLOCK);
            let at = geometry.slot_offset(slot);
            disk.read_at(at, buf.clone()).await.context(|| format!("reading the log's segment header at byte {at}"))?;
            Ok::<_, Error>((slot, buf))
        })
        .buffered(PARALLEL_SEGMENTS)
        .try_collect()
        .await?;
    let mut out = Headers { good: HashMap::new(), damaged: Vec::new(), illegible: Vec::new() };
    for (slot, buf) in found {
        let (block, record) = buf.bytes().split_at(BLOCK);
        match SegmentHeader::decode(block) {
            Ok(h) if is_of(&h, sb) => drop(out.good.insert(h.generation, (slot, h))),
            // A slot never used, or left by another volume on a reused device, is simply free. If it should have been a
            // link of the chain, the gap shows.
            Ok(_) => {}
            Err(_) => {
                let at = geometry.slot_offset(slot);
                let [lost, lost_too] = [0, BLOCK as u64].map(|n| disk.bad_in(at + n..at + n + 1).is_some());
                // Without a record behind its header a segment holds nothing.
                let was_here = lost || SegmentHeader::was_here(block);
                let claimed = claimed_generation(record, sb.volume).filter(|_| was_here);
                out.damaged.extend(claimed.map(|g| (slot, g)));
                out.illegible.extend((lost && lost_too).then_some(slot));
            }
        }
    }
    Ok(out)
}

impl Walked {
    /// The highest durable mark that matters. What a record vouches for lies before it: where all of that is packed, it may be gone, and
    /// is when the segment is being written over.
    fn durable(&self, packed: Seq) -> LogPos {
        let all = self.records.iter().chain(&self.past_gap);
        let matters = all.filter(|r| r.placement.first_seq > packed.next());
        matters.map(|r| r.placement.durable).max().unwrap_or_default()
    }

    fn valid_bytes(&self) -> u64 {
        bytes_of(&self.records) + bytes_of(&self.past_gap)
    }
}

fn bytes_of(records: &[RecordHeader]) -> u64 {
    records.iter().map(|r| u64::from(r.record_bytes)).sum()
}

/// The segments that hang together, oldest first: each names its predecessor's end. The chain's head is the newest
/// segment from which the first unpacked entry can be reached; what lies before that entry's segment is not needed,
/// whatever state it is in. The second list is of newer segments, newest first, that no chain reaches.
fn link(
    headers: &HashMap<u32, (u32, SegmentHeader)>,
    geometry: &Geometry,
    packed: Seq,
) -> (Vec<Segment>, Vec<Segment>) {
    let mut heads: Vec<u32> = headers.keys().copied().collect();
    heads.sort_unstable_by(|a, b| b.cmp(a));
    let mut dangling = Vec::new();
    for head in heads {
        let mut chain: Vec<Segment> = Vec::new();
        let mut next = Some(head);
        let mut limit = geometry.segment_bytes;
        while let Some((slot, header)) = next.and_then(|g| headers.get(&g)).copied() {
            chain.push(Segment { slot, header, limit, newest: chain.is_empty() });
            if header.first_seq <= packed.next() {
                chain.reverse();
                return (chain, dangling);
            }
            limit = header.predecessor_end.offset();
            let before = header.predecessor_end.generation();
            next = (before > 0 && before < header.generation).then_some(before);
        }
        dangling.extend(chain.into_iter().next());
    }
    (Vec::new(), dangling)
}

async fn walk_all<D: Disk>(disk: &Legible<'_, D>, geometry: &Geometry, segments: &[Segment]) -> Result<Vec<Walked>> {
    stream::iter(segments).map(|s| walk(disk, geometry, s)).buffered(PARALLEL_SEGMENTS).try_collect().await
}

async fn read_header<D: Disk>(
    disk: &Legible<'_, D>,
    geometry: &Geometry,
    s: &Segment,
    offset: u32,
) -> Result<Option<RecordHeader>> {
    let at = geometry.slot_offset(s.slot) + u64::from(offset);
    let first = IoBuf::zeroed(BLOCK);
    disk.read_at(at, first.clone()).await.context(|| format!("reading the log at byte {at}"))?;
    let Ok(bytes) = peek_record(first.bytes()) else { return Ok(None) };
    if offset as usize + bytes > s.limit as usize {
        return Ok(None);
    }
    let whole = if bytes == BLOCK {
        first
    } else {
        let buf = IoBuf::zeroed(bytes.min(MAX_HEADER_BYTES));
        disk.read_at(at, buf.clone()).await.context(|| format!("reading the log at byte {at}"))?;
        buf
    };
    Ok(decode_record(whole.bytes(), &s.header, offset).ok())
}

/// Follows the records of one segment, and looks past the first gap for later ones.
pub(super) async fn walk<D: Disk>(disk: &Legible<'_, D>, geometry: &Geometry, s: &Segment) -> Result<Walked> {
    let mut w = Walked { records: Vec::new(), end: BLOCK as u32, past_gap: Vec::new(), illegible: None };
    let mut previous = 0;
    while w.end < s.limit {
        let Some(r) = read_header(disk, geometry, s, w.end).await? else { break };
        if r.placement.predecessor != previous || w.end + r.record_bytes > s.limit {
            break;
        }
        previous = w.end;
        w.end += r.record_bytes;
        w.records.push(r);
    }
    // Of what lies behind only that header has been read so far.
    let start = geometry.slot_offset(s.slot);
    w.illegible = disk.bad_in(start + u64::from(w.end)..start + u64::from(s.limit));
    let mut at = w.end;
    while at < s.limit {
        // Windows of 1 MiB; within each, every block may start a header.
        let n = WINDOW.min((s.limit - at) as usize);
        let buf = IoBuf::zeroed(n);
        let file_at = geometry.slot_offset(s.slot) + u64::from(at);
        disk.read_at(file_at, buf.clone()).await.context(|| format!("reading the log at byte {file_at}"))?;
        for i in (0..n).step_by(BLOCK) {
            if peek_record(&buf.bytes()[i..i + BLOCK]).is_ok()
                && let Some(r) = read_header(disk, geometry, s, at + i as u32).await?
            {
                w.past_gap.push(r);
            }
        }
        at += n as u32;
    }
    Ok(w)
}

/// Joins the segments' chains in order, as far as they are whole. Returns the damage that ends them, if it is that.
async fn assemble<D: Disk>(
    disk: &Legible<'_, D>,
    geometry: &Geometry,
    chain: &[Segment],
    walked: &[Walked],
    out: &mut Replay,
) -> Result<Option<Error>> {
    out.last_seq = out.packed;
    if let Some(first) = chain.first() {
        out.end = first.header.predecessor_end;
    }
    let mut next_seq: Option<Seq> = None;
    let mut cut = false;
    for (s, w) in chain.iter().zip(walked) {
        if cut {
            out.torn_bytes += w.valid_bytes();
            continue;
        }
        let mut end = LogPos::new(s.header.generation, BLOCK as u32);
        let mut last_seq = Seq(s.header.first_seq.0.saturating_sub(1));
        // An attach may skip numbers: what it skips was in the store, and the segment says so.
        if next_seq.is_some_and(|n| n != s.header.first_seq && s.header.packed_through.next() < s.header.first_seq) {
            return Ok(Some(corrupt(format!(
                "the log's segment of generation {} starts at entry {}, which does not follow the segment before it",
                s.header.generation, s.header.first_seq
            ))));
        }
        let mut expected = s.header.first_seq;
        let mut damage = None;
        for r in &w.records {
            let record_end = LogPos::new(s.header.generation, r.placement.offset + r.record_bytes);
            if r.placement.first_seq != expected {
                damage = Some(corrupt(format!(
                    "the log's record at {end} starts at entry {}, expected {expected}",
                    r.placement.first_seq
                )));
                break;
            }
            if record_end > out.durable && !data_is_whole(disk, geometry, s, r).await? {
                let start = geometry.slot_offset(s.slot) + u64::from(r.placement.offset);
                let lost = disk.bad_in(start..start + u64::from(r.record_bytes));
                damage = lost.map(|at| illegible(s, r.placement.offset, at));
                cut = true;
                out.torn_bytes += u64::from(r.record_bytes);
                break;
            }
            let file_block =
                ((geometry.slot_offset(s.slot) + u64::from(r.placement.offset + r.header_bytes)) / BLOCK as u64) as u32;
            out.crcs.extend(r.crcs.iter().enumerate().map(|(i, c)| (file_block + i as u32, *c)));
            out.entries
                .extend(number_entries(&r.entries, r.placement.first_seq, file_block).filter(|e| e.seq > out.packed));
            expected = Seq(expected.0 + r.entries.len() as u64);
            last_seq = Seq(expected.0 - 1);
            end = record_end;
        }
        if !cut && w.end < s.limit {
            damage = damage.or_else(|| Some(illegible(s, w.end, w.illegible?)));
            cut = !(s.newest && w.past_gap.is_empty());
        }
        if damage.is_none() && cut && out.durable > end {
            damage = Some(corrupt(format!(
                "the log is damaged at {end} (byte {} of the file): a later record says that everything up to {} was on stable storage",
                geometry.slot_offset(s.slot) + u64::from(end.offset()),
                out.durable
            )));
        }
        if cut {
            out.torn_bytes += bytes_of(&w.past_gap);
        }
        out.end = end;
        out.last_seq = out.last_seq.max(last_seq);
        next_seq = Some(last_seq.next());
        if last_seq > out.packed {
            out.live.push(Live { slot: s.slot, generation: s.header.generation, last_seq });
        }
        if damage.is_some() {
            return Ok(damage);
        }
    }
    Ok(None)
}

/// What cannot be read may have been acknowledged, wherever it is: it is no torn tail. A disk that tears a write has it old or new.
fn illegible(s: &Segment, record: u32, at: u64) -> Error {
    let of = LogPos::new(s.header.generation, record);
    corrupt(format!("the log's disk cannot read byte {at} of the file, in the record at {of}"))
}

async fn data_is_whole<D: Disk>(
    disk: &Legible<'_, D>,
    geometry: &Geometry,
    s: &Segment,
    r: &RecordHeader,
) -> Result<bool> {
    if r.crcs.is_empty() {
        return Ok(true);
    }
    let at = geometry.slot_offset(s.slot) + u64::from(r.placement.offset + r.header_bytes);
    let buf = IoBuf::zeroed(r.crcs.len() * BLOCK);
    disk.read_at(at, buf.clone()).await.context(|| format!("reading the log at byte {at}"))?;
    let mut blocks = buf.bytes().chunks_exact(BLOCK).zip(&r.crcs);
    for e in &r.entries {
        for i in 0..e.stored_blocks() {
            let Some((data, crc)) = blocks.next() else { return Ok(false) };
            if block_crc(crate::units::BlockNo(e.lba.block().0 + i), data) != *crc {
                return Ok(false);
            }
        }
    }
    Ok(true)
}
