//! A log that replay refuses, ended before its damage.
//!
//! Replay refuses a log when something is missing that had been on stable storage. Whoever can do without may have the log end
//! there: what is left is a prefix of the volume's writes, as after a power cut at that moment. What lies behind is wiped, so
//! that no later replay meets it again.
//!
//! Invariant: the packed mark is durable in the superblock before anything is wiped, and segments are wiped from the newest
//! on; an interruption leaves a log that is refused again, or one that ends in the same place.

use std::cmp::Reverse;
use std::fmt;

use super::codec::{LogPos, RecordHeader};
use super::create::{SuperblockFile, write_zeros};
use super::log::FileSlots;
use super::replay::{Survey, geometry_of, survey};
use crate::disk::Disk;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::units::{BLOCK, Lba, Seq};

/// Ranges of sectors and of entries that are told one by one.
const MOST_TOLD: usize = 12;

/// What lies behind the damage of a log, as far as it can be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Behind {
    /// The last entry before the damage.
    pub last_kept: Seq,
    /// The last entry that can be read behind it, if any can.
    pub last: Option<Seq>,
    /// Ranges of entries, first and last, of which nothing can be read.
    pub unknown: Vec<(Seq, Seq)>,
    /// The sectors of the others: first, and how many; joined, in order.
    pub sectors: Vec<(Lba, u64)>,
}

impl Behind {
    pub(super) fn of(s: &Survey) -> Self {
        let end = s.replay.end;
        let is_behind = |r: &&RecordHeader| LogPos::new(r.placement.generation, r.placement.offset) >= end;
        let all = s.chain.iter().chain(&s.dangling).flat_map(|(_, w)| w.records.iter().chain(&w.past_gap));
        let mut records: Vec<&RecordHeader> = all.filter(is_behind).collect();
        records.sort_by_key(|r| r.placement.first_seq);
        let mut out = Self { last_kept: s.replay.last_seq, last: None, unknown: Vec::new(), sectors: Vec::new() };
        let mut next = out.last_kept.next();
        for r in records.into_iter().filter(|r| !r.entries.is_empty()) {
            let first = r.placement.first_seq;
            if first > next {
                out.unknown.push((next, Seq(first.0 - 1)));
            }
            next = next.max(Seq(first.0 + r.entries.len() as u64));
            out.sectors.extend(r.entries.iter().map(|e| (e.lba, e.sectors)));
            out.last = Some(Seq(next.0 - 1));
        }
        out.sectors.sort_unstable();
        out.sectors.dedup_by(|b, a| {
            let joined = b.0.0 <= a.0.0 + a.1;
            if joined {
                a.1 = a.1.max(b.0.0 + b.1 - a.0.0);
            }
            joined
        });
        out
    }
}

impl fmt::Display for Behind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let first = self.last_kept.next();
        let Some(last) = self.last else {
            return write!(f, "entries from {first} on are concerned, which sectors they wrote cannot be read");
        };
        write!(f, "entries {first} to {last} are concerned")?;
        let told = |n: usize| if n > MOST_TOLD { format!(" and {} ranges more", n - MOST_TOLD) } else { String::new() };
        let ranges: Vec<String> =
            self.sectors.iter().take(MOST_TOLD).map(|(lba, n)| format!("{lba} to {}", lba.0 + n - 1)).collect();
        write!(f, ": sectors {}{}", ranges.join(", "), told(self.sectors.len()))?;
        let ranges: Vec<String> = self.unknown.iter().take(MOST_TOLD).map(|(a, b)| format!("{a} to {b}")).collect();
        if !ranges.is_empty() {
            let more = told(self.unknown.len());
            write!(f, "; which sectors the entries {}{more} wrote cannot be read", ranges.join(", "))?;
        }
        Ok(())
    }
}

/// Why a log is refused, and what lies behind that.
#[derive(Debug)]
pub struct Damaged {
    /// What replay says.
    pub why: Error,
    /// What lies behind it.
    pub behind: Behind,
}

/// Whether replay refuses the log of `size` bytes.
///
/// # Errors
/// The I/O error.
pub async fn look<D: Disk>(disk: &D, size: u64, sb: &SuperblockFile) -> Result<Option<Damaged>> {
    let mut found = examine(disk, size, sb).await?;
    Ok(found.damage.take().map(|why| Damaged { why, behind: Behind::of(&found) }))
}

async fn examine<D: Disk>(disk: &D, size: u64, sb: &SuperblockFile) -> Result<Survey> {
    survey(disk, &sb.current, &FileSlots::whole(&geometry_of(&sb.current), size)).await
}

/// Ends the log before its damage, for good: what lies behind is overwritten with zeros.
///
/// # Errors
/// The I/O error; `Corrupt` when the log is refused all the same.
pub async fn end_before_damage<D: Disk>(disk: &D, size: u64, sb: &mut SuperblockFile) -> Result<()> {
    let found = examine(disk, size, sb).await?;
    if found.damage.is_none() {
        return Ok(());
    }
    let (geometry, end) = (geometry_of(&sb.current), found.replay.end);
    // A segment that is wiped may be the one that knows it.
    sb.packed(disk, found.replay.packed).await?;
    let good = found.headers.values().map(|(slot, h)| (*slot, h.generation));
    let mut behind: Vec<(u32, u32)> = good.chain(found.damaged.iter().copied()).collect();
    behind.retain(|(_, generation)| *generation > end.generation());
    behind.sort_unstable_by_key(|(_, generation)| Reverse(*generation));
    // Those that nobody knows first: of the others the newest are wiped first.
    for slot in found.illegible.iter().copied().chain(behind.into_iter().map(|b| b.0)) {
        // The header, and the record that would vouch for it.
        wipe(disk, geometry.slot_offset(slot), 2 * BLOCK as u64).await?;
        disk.sync().await.context(|| "syncing the log")?;
    }
    if let Some((slot, _)) = found.headers.get(&end.generation()) {
        let from = u64::from(end.offset()).max(BLOCK as u64);
        let until = u64::from(geometry.segment_bytes);
        wipe(disk, geometry.slot_offset(*slot) + from, until.saturating_sub(from)).await?;
    }
    disk.sync().await.context(|| "syncing the log")?;
    match examine(disk, size, sb).await?.damage {
        None => Ok(()),
        Some(e) => {
            Err(Error::new(ErrorKind::Corrupt, "the log was ended before its damage, and is refused all the same")
                .with_source(e))
        }
    }
}

async fn wipe<D: Disk>(disk: &D, from: u64, bytes: u64) -> Result<()> {
    write_zeros(disk, from, bytes).await.context(|| format!("wiping the log at byte {from}"))
}
