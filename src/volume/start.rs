//! The log made ready for its next entries, after replay.

use std::sync::Arc;

use futures_util::stream::{self, StreamExt, TryStreamExt};

use crate::disk::Disk;
use crate::disk::file::DataFile;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::map::{Entry, EntryKind, LogBlock, Maps};
use crate::units::{BLOCK, Seq};
use crate::wal::codec::{LogPos, RecordKind};
use crate::wal::create::{SuperblockFile, write_zeros, zero_slot};
use crate::wal::log::{Geometry, Log, LogEntry, Start};
use crate::wal::replay::Replay;

/// Slots that a new log has before the volume is served.
const FIRST_SLOTS: u32 = 2;
/// Slots cleared at once.
const PARALLEL_SLOTS: usize = 16;

/// Where a log lies.
pub(super) struct Place<'a, D> {
    pub disk: &'a D,
    pub file: &'a DataFile,
    pub geometry: Geometry,
}

fn to_map_entry(e: &LogEntry) -> Entry {
    let kind = match e.kind {
        RecordKind::Data => EntryKind::Data(LogBlock(e.file_block)),
        RecordKind::Discard | RecordKind::Zeroes => EntryKind::Hole,
    };
    Entry { lba: e.lba, sectors: e.sectors, seq: e.seq, kind }
}

/// Sees to it that the log has room to begin with.
pub(super) async fn prepare_slots<D: Disk>(at: &Place<'_, D>, r: &mut Replay) -> Result<()> {
    let Place { disk, file, geometry } = at;
    r.slots_ready = r.slots_ready.min(geometry.max_segments);
    if file.is_device() {
        // A device has its size; segments of an earlier log bear another log's number, so nothing is zeroed.
        let slots = (file.size()?.saturating_sub(geometry.slot_offset(0)) / u64::from(geometry.segment_bytes)) as u32;
        r.slots_ready = slots.min(geometry.max_segments);
        return Ok(());
    }
    let first = FIRST_SLOTS.min(geometry.max_segments);
    while r.slots_ready < first || r.free.is_empty() && r.slots_ready < geometry.max_segments {
        match zero_slot(*disk, geometry, r.slots_ready).await {
            Ok(()) => {}
            // What is in the log can be uploaded, and that makes room.
            Err(e) if e.kind() == ErrorKind::Full && !r.entries.is_empty() => {
                tracing::warn!("{e}: writes wait until the log's entries are in the store");
                break;
            }
            Err(e) => return Err(e),
        }
        r.free.push(r.slots_ready);
        r.slots_ready += 1;
    }
    disk.sync().await.context(|| format!("syncing {}", file.path().display()))
}

/// Of a log whose entries are all in the store, and are known to be in the superblock, nothing is needed. What a power cut has
/// left behind in its segments goes by entry numbers that are given out again: half overwritten, it would
/// vouch for entries that never were. Any of these headers may survive alone, since no segment needs another here.
async fn forget_segments<D: Disk>(at: &Place<'_, D>, slots: u32) -> Result<()> {
    let Place { disk, file, geometry } = at;
    let wipe = |slot| {
        let offset = geometry.slot_offset(slot);
        async move {
            write_zeros(*disk, offset, BLOCK as u64)
                .await
                .context(|| format!("clearing the log's segment at byte {offset} of {}", file.path().display()))
        }
    };
    stream::iter(0..slots).map(wipe).buffer_unordered(PARALLEL_SLOTS).try_collect::<()>().await?;
    disk.sync().await.context(|| format!("syncing {}", file.path().display()))
}

/// Makes the log ready for its next entries: replayed ones applied, synced, with room. Everything up to `stored` is in
/// the store.
pub(super) async fn start_log<D: Disk>(
    at: Place<'_, D>,
    sb: &mut SuperblockFile,
    salt: Box<dyn FnMut() -> u64 + Send>,
    mut r: Replay,
    stored: Seq,
    maps: &Arc<Maps>,
) -> Result<Log> {
    let Place { disk, file, geometry } = &at;
    let volume_sectors = sb.current.volume_sectors;
    r.entries.retain(|e| e.seq > stored);
    if let Some(first) = r.entries.first()
        && first.seq != stored.next()
    {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!(
                "the store ends with entry {}, but the log goes on with entry {}: what lies between is missing",
                stored, first.seq
            ),
        ));
    }
    if let Some(e) = r.entries.iter().find(|e| e.lba.0 + e.sectors > volume_sectors) {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!("the log's entry {} lies past the end of the volume", e.seq),
        ));
    }
    // What replay read may still sit in a disk's cache; from here on it counts as durable.
    disk.sync().await.context(|| format!("syncing {}", file.path().display()))?;
    let packed = stored.max(r.packed);
    sb.packed(*disk, packed).await?;
    let kept: Vec<_> = r.live.iter().copied().filter(|l| l.last_seq > packed).collect();
    r.free.extend(r.live.iter().filter(|l| l.last_seq <= packed).map(|l| l.slot));
    if file.is_device() {
        let used: Vec<u32> = kept.iter().map(|l| l.slot).collect();
        r.free = (0..r.slots_ready).filter(|s| !used.contains(s)).collect();
    }
    if kept.is_empty() && r.next_generation > 1 {
        forget_segments(&at, r.slots_ready).await?;
    }
    let sink_maps = maps.clone();
    let log = Log::new(
        sb.current.volume,
        sb.current.log_id,
        *geometry,
        Start {
            next_seq: Seq(stored.max(r.last_seq).0 + 1),
            packed,
            // A log with nothing to keep begins anew: no mark may name slots that are about to be overwritten.
            end: if kept.is_empty() { LogPos::default() } else { r.end },
            next_generation: r.next_generation,
            live: kept,
            free: r.free,
            journal: r.entries,
            slots_ready: r.slots_ready,
        },
        salt,
        Box::new(move |e| sink_maps.apply_entry(&to_map_entry(e))),
    );
    for (block, crc) in &r.crcs {
        log.set_crc(*block, *crc);
    }
    Ok(log)
}
