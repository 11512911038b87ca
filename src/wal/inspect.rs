//! Looking into a log that nobody has: what it holds, where it ends and why, and its data, checked block by block.
//!
//! Nothing here writes. Which records count, and why a log is refused, is replay's to say. This adds what replay has no
//! use for: the segments before, whose entries are all packed, as far back as none is missing; and what lies behind damage.

use std::cmp::Reverse;

use super::codec::{LogPos, RecordHeader, RecordKind, SegmentHeader, Superblock};
use super::create::SuperblockFile;
use super::legible::Legible;
use super::log::{FileSlots, Geometry, LogEntry, number_entries};
use super::replay::{Segment, Survey, Walked, geometry_of, survey, walk};
use crate::checksum::block_crc;
use crate::disk::{Disk, IoBuf};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{BLOCK, BlockNo, Lba, MAX_VOLUME_BYTES, SECTOR, SECTORS_PER_BLOCK, Seq};

/// Data is read in pieces of at most 1 MiB.
const WINDOW_BLOCKS: usize = 256;

/// Why a log ends where it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// No valid record lies behind the last one.
    Clean,
    /// Records lie behind a gap; nothing of them was promised to be on stable storage.
    Torn,
    /// What lies behind is missed: see [`Inspection::damage`].
    Damaged,
}

/// Where a record stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// In a segment whose entries are all packed: a replay does not look at it.
    Old,
    /// A replay reads it.
    Chain,
    /// Behind the end.
    Beyond,
}

/// A segment with a good header.
#[derive(Debug, Clone, Copy)]
pub struct FoundSegment {
    /// Where it is.
    pub slot: u32,
    /// Its header.
    pub header: SegmentHeader,
}

/// A record with a good header.
#[derive(Debug)]
pub struct FoundRecord {
    /// The slot it is in.
    pub slot: u32,
    /// Where it stands.
    pub standing: Standing,
    /// What it says.
    pub header: RecordHeader,
}

/// An entry, with the record it is in.
#[derive(Debug, Clone, Copy)]
pub struct Item<'a> {
    /// Its record.
    pub record: &'a FoundRecord,
    /// What it does.
    pub entry: LogEntry,
    /// The checksums of its stored blocks.
    pub crcs: &'a [u32],
}

/// What a log holds.
#[derive(Debug)]
pub struct Inspection {
    /// Its superblock.
    pub superblock: Superblock,
    /// Its segments, oldest first.
    pub segments: Vec<FoundSegment>,
    /// Its records, oldest first.
    pub records: Vec<FoundRecord>,
    /// The packed mark: the superblock's, or a segment's if that is newer.
    pub packed: Seq,
    /// The last entry that a replay returns (or the packed mark, if that is higher).
    pub last_seq: Seq,
    /// The newest durable mark.
    pub durable: LogPos,
    /// Where the log ends.
    pub end: LogPos,
    /// Why it ends there.
    pub why: End,
    /// What is wrong with it, but for data blocks, which are checked as they are read.
    pub damage: Vec<Error>,
}

/// What an entry does to a stretch of sectors.
#[derive(Debug)]
pub enum Piece<'a> {
    /// They hold this; the checksums are right.
    Data(Lba, &'a [u8]),
    /// So many of them read as zeros.
    Hole(Lba, u64),
    /// What so many of them held is lost.
    Damaged(Lba, u64, &'a BadBlock),
}

/// A stored block that cannot be had.
#[derive(Debug)]
pub struct BadBlock {
    /// The entry.
    pub seq: Seq,
    /// Where in the file the block is.
    pub byte: u64,
    /// Why it cannot be had.
    pub why: String,
}

impl Inspection {
    /// Sizes.
    #[must_use]
    pub const fn geometry(&self) -> Geometry {
        geometry_of(&self.superblock)
    }

    /// Where a position of the log is in its file, if the segment is there.
    #[must_use]
    pub fn byte_of(&self, at: LogPos) -> Option<u64> {
        let s = self.segments.iter().find(|s| s.header.generation == at.generation())?;
        Some(self.geometry().slot_offset(s.slot) + u64::from(at.offset()))
    }

    /// All entries, oldest first.
    pub fn items(&self) -> impl Iterator<Item = Item<'_>> {
        let geometry = self.geometry();
        self.records.iter().flat_map(move |r| r.items(geometry))
    }

    /// Whether a replay returns the entry: it counts, and is not in the store as far as the log knows.
    #[must_use]
    pub fn is_unpacked(&self, item: &Item<'_>) -> bool {
        item.record.standing == Standing::Chain && item.entry.seq > self.packed
    }

    /// Whether the entry lies inside the volume.
    #[must_use]
    pub const fn fits(&self, item: &Item<'_>) -> bool {
        let known = self.superblock.volume_sectors;
        let sectors = if known == 0 { MAX_VOLUME_BYTES / SECTOR as u64 } else { known };
        item.entry.lba.0 + item.entry.sectors <= sectors
    }
}

impl FoundRecord {
    /// Where it begins.
    #[must_use]
    pub const fn at(&self) -> LogPos {
        LogPos::new(self.header.placement.generation, self.header.placement.offset)
    }

    fn items(&self, geometry: Geometry) -> impl Iterator<Item = Item<'_>> {
        let place = &self.header.placement;
        let data = geometry.slot_offset(self.slot) + u64::from(place.offset + self.header.header_bytes);
        let mut crcs = &self.header.crcs[..];
        number_entries(&self.header.entries, place.first_seq, (data / BLOCK as u64) as u32).map(move |entry| {
            // The codec has seen to it that there are as many checksums as stored blocks.
            let (own, rest) = crcs.split_at(entry.record().stored_blocks() as usize);
            crcs = rest;
            Item { record: self, entry, crcs: own }
        })
    }
}

/// Looks into the log of `size` bytes on `disk`.
///
/// # Errors
/// `NotFound` when no log is there, `Corrupt` when its superblock cannot be read; else the I/O error. Any other damage is part
/// of what is returned.
pub async fn inspect<D: Disk>(disk: &D, size: u64) -> Result<Inspection> {
    let Some(SuperblockFile { current: superblock }) = SuperblockFile::load(disk, size).await? else {
        return Err(Error::new(
            ErrorKind::NotFound,
            "there is no log: the places of its superblock (bytes 0 and 65536) are empty. It was never used, or its head was wiped",
        ));
    };
    let slots = FileSlots::with_cut(&geometry_of(&superblock), size);
    let survey = survey(disk, &superblock, &slots).await?;
    let old = walk_old(disk, &superblock, &slots, &survey).await?;
    Ok(judge(superblock, &slots, size, survey, old))
}

/// The segments before the chain, oldest first: back to the first gap. What is older than a gap must not be laid over
/// anything newer.
async fn walk_old<D: Disk>(
    disk: &D,
    sb: &Superblock,
    slots: &FileSlots,
    survey: &Survey,
) -> Result<Vec<(Segment, Walked)>> {
    let Some((first, _)) = survey.chain.first() else { return Ok(Vec::new()) };
    let mut next = first.header;
    let mut headers: Vec<_> =
        survey.headers.values().filter(|(_, h)| h.generation < next.generation).copied().collect();
    headers.sort_unstable_by_key(|(_, h)| Reverse(h.generation));
    let mut old = Vec::new();
    for (slot, header) in headers {
        if header.first_seq >= next.first_seq {
            // A replay has left it behind.
            continue;
        }
        let linked = next.predecessor_end.generation() == header.generation;
        let limit = if linked { next.predecessor_end.offset() } else { sb.segment_bytes };
        let s = Segment { slot, header, limit: slots.clip(slot, limit), newest: false };
        let mut w = walk(&Legible::new(disk), &geometry_of(sb), &s).await?;
        // Numbers are given once to what counts: what the next segment begins with, this one has only as a torn tail.
        w.records.retain(|r| seq_after(r) <= next.first_seq);
        if w.records.last().map(seq_after) != Some(next.first_seq) {
            break;
        }
        next = header;
        old.push((s, w));
    }
    old.reverse();
    Ok(old)
}

/// The number of the first entry that comes after a record.
const fn seq_after(r: &RecordHeader) -> Seq {
    Seq(r.placement.first_seq.0 + r.entries.len() as u64)
}

/// Puts what was found in order, and adds the damage that replay does not see.
fn judge(sb: Superblock, slots: &FileSlots, size: u64, survey: Survey, old: Vec<(Segment, Walked)>) -> Inspection {
    let Survey { replay, damage, chain, dangling, headers, .. } = survey;
    let oldest_needed = chain.first().map_or(0, |(s, _)| s.header.generation);
    let mut segments: Vec<_> = headers.values().map(|&(slot, header)| FoundSegment { slot, header }).collect();
    segments.sort_unstable_by_key(|s| s.header.generation);
    let mut found = Inspection {
        superblock: sb,
        segments,
        records: Vec::new(),
        packed: replay.packed,
        last_seq: replay.last_seq,
        durable: replay.durable,
        end: replay.end,
        why: if replay.torn_bytes > 0 { End::Torn } else { End::Clean },
        damage: damage.into_iter().collect(),
    };
    for (s, w) in old {
        found.take(s.slot, Standing::Old, w.records);
    }
    for (s, w) in chain {
        let (kept, left): (Vec<_>, Vec<_>) = w.records.into_iter().partition(|r| end_of(r) <= replay.end);
        found.take(s.slot, Standing::Chain, kept);
        found.take(s.slot, Standing::Beyond, left);
        found.take(s.slot, Standing::Beyond, w.past_gap);
    }
    for (s, w) in dangling.into_iter().rev() {
        found.take(s.slot, Standing::Beyond, w.records);
        found.take(s.slot, Standing::Beyond, w.past_gap);
    }
    // A slot is there whole before a segment is opened in it.
    let cut = found.segments.iter().find(|s| s.slot >= slots.whole && s.header.generation >= oldest_needed);
    let cut = cut.map(|s| file_is_cut(size, &found.geometry(), s));
    // An attach refuses it.
    let outside = found.items().find(|i| found.is_unpacked(i) && !found.fits(i)).map(|i| lies_outside(&i));
    found.damage.extend(cut.into_iter().chain(outside));
    if !found.damage.is_empty() {
        found.why = End::Damaged;
    }
    found
}

impl Inspection {
    fn take(&mut self, slot: u32, standing: Standing, records: Vec<RecordHeader>) {
        self.records.extend(records.into_iter().map(|header| FoundRecord { slot, standing, header }));
    }
}

const fn end_of(r: &RecordHeader) -> LogPos {
    LogPos::new(r.placement.generation, r.placement.offset + r.record_bytes)
}

fn file_is_cut(size: u64, geometry: &Geometry, s: &FoundSegment) -> Error {
    let begin = geometry.slot_offset(s.slot);
    Error::new(
        ErrorKind::Corrupt,
        format!(
            "the file was cut: it ends at byte {size}, inside the segment of generation {} (bytes {begin} to {}). What came after is lost, unless another copy of the log has it",
            s.header.generation,
            begin + u64::from(geometry.segment_bytes)
        ),
    )
}

fn lies_outside(item: &Item<'_>) -> Error {
    let LogEntry { seq, lba, sectors, .. } = item.entry;
    let what = format!("entry {seq} (sectors {lba} to {}) lies past the end of the volume", lba.0 + sectors - 1);
    Error::new(ErrorKind::Corrupt, what)
}

/// Reads the entries that are `wanted`, in log order, and tells `each` what they do, piece by piece: damaged blocks as
/// such.
///
/// # Errors
/// What `each` returns.
pub async fn read_entries<D: Disk>(
    disk: &D,
    found: &Inspection,
    wanted: impl Fn(&Item<'_>) -> bool,
    mut each: impl FnMut(Piece<'_>) -> Result<()>,
) -> Result<()> {
    for item in found.items().filter(wanted) {
        match item.entry.kind {
            RecordKind::Data => read_data(disk, &item, &mut each).await?,
            RecordKind::Discard | RecordKind::Zeroes => each(Piece::Hole(item.entry.lba, item.entry.sectors))?,
        }
    }
    Ok(())
}

async fn read_data<D: Disk>(disk: &D, item: &Item<'_>, each: &mut impl FnMut(Piece<'_>) -> Result<()>) -> Result<()> {
    let e = &item.entry;
    for (i, crcs) in item.crcs.chunks(WINDOW_BLOCKS).enumerate() {
        let first = e.lba.block().0 + (i * WINDOW_BLOCKS) as u64;
        let byte = (u64::from(e.file_block) + (i * WINDOW_BLOCKS) as u64) * BLOCK as u64;
        let (buf, bad) = read_checked(disk, byte, first, crcs).await;
        // The entry's sectors in these blocks of the window.
        let sectors = |from: usize, to: usize| {
            let from = ((first + from as u64) * SECTORS_PER_BLOCK).max(e.lba.0);
            from..((first + to as u64) * SECTORS_PER_BLOCK).min(e.lba.0 + e.sectors)
        };
        let mut good = 0;
        for (at, why) in bad.into_iter().map(|(at, why)| (at, Some(why))).chain([(crcs.len(), None)]) {
            if good < at {
                let s = sectors(good, at);
                let skip = |sector: u64| (sector - first * SECTORS_PER_BLOCK) as usize * SECTOR;
                each(Piece::Data(Lba(s.start), &buf.bytes()[skip(s.start)..skip(s.end)]))?;
            }
            if let Some(why) = why {
                let s = sectors(at, at + 1);
                let bad = BadBlock { seq: e.seq, byte: byte + (at * BLOCK) as u64, why };
                each(Piece::Damaged(Lba(s.start), s.end - s.start, &bad))?;
            }
            good = at + 1;
        }
    }
    Ok(())
}

/// Stored blocks, from volume block `first` on; and which of them are bad, and why.
async fn read_checked<D: Disk>(disk: &D, byte: u64, first: u64, crcs: &[u32]) -> (IoBuf, Vec<(usize, String)>) {
    let buf = IoBuf::zeroed(crcs.len() * BLOCK);
    let whole = disk.read_at(byte, buf.clone()).await;
    let mut bad = Vec::new();
    for (i, crc) in crcs.iter().enumerate() {
        let block = buf.slice(i * BLOCK..(i + 1) * BLOCK);
        // One bad block of the disk fails a read of many.
        let read = if whole.is_ok() { Ok(()) } else { disk.read_at(byte + (i * BLOCK) as u64, block.clone()).await };
        match read {
            Ok(()) if block_crc(BlockNo(first + i as u64), block.bytes()) == *crc => {}
            Ok(()) => bad.push((i, "its checksum does not match".to_owned())),
            Err(e) => bad.push((i, format!("it cannot be read ({e})"))),
        }
    }
    (buf, bad)
}

#[cfg(test)]
mod tests;
