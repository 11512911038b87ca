//! The chunks that count, put together group by group, as an attach does; and what is missing among them.
//!
//! Invariants:
//! - Groups are applied whole and in order; nothing is applied behind the first that is not whole.
//! - Nothing counts as bad that was read badly only once.
//! - In memory: the map, sixteen headers on their way, and the headers of one group.

use std::collections::BTreeSet;

use futures_util::stream::{self, StreamExt};
use uuid::Uuid;

use super::Progress;
use super::history::{Named, Rules};
use super::report::Lost;
use crate::chunk::header::{self, ChunkHeader, ExtentKind};
use crate::chunk::reader::fetch_header;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::{self, FirstOwned, Manifest};
use crate::map::Maps;
use crate::store::Store;
use crate::units::{BLOCK, BlockNo, ChunkNo, Epoch, GroupNo, SECTOR, Seq};
use crate::volume::recover::{PARALLEL_HEADERS, StoreEnd, group_update, is_whole};

/// Objects that are named one by one.
const MOST_NAMED: usize = 256;

/// What an attachment has in the volume.
#[derive(Debug, Clone, Copy)]
pub(super) struct Share {
    pub epoch: Epoch,
    pub first: FirstOwned,
    /// The last entries of its first and of its last group.
    pub first_through: Seq,
    pub last_through: Seq,
}

/// What the chunks make.
pub(super) struct Assembled {
    pub maps: Maps,
    /// Where the last group that was applied ends.
    pub end: StoreEnd,
    /// Chunks that were applied.
    pub chunks: u64,
    /// The volumes that the chunks say they are of.
    pub volumes: BTreeSet<Uuid>,
    /// The block after the last that any group touched.
    pub blocks_touched: u64,
    /// Objects that count and cannot be used.
    pub bad: Vec<Lost>,
    /// Objects that the first group that is not whole lacks. They may never have been there.
    pub missing: Vec<Lost>,
    /// A group that was whole once, as a later one says.
    pub relied_on: GroupNo,
    /// There are blocks that were copied from a parent.
    pub inherited: bool,
    /// The last group that has all its chunks.
    pub last_whole: GroupNo,
    /// Who has written what was applied, in order.
    pub shares: Vec<Share>,
    /// Whether a group that was applied ends with the log's packed mark.
    pub meets_log: bool,
}

/// A chunk's header, or why it cannot be had.
pub(super) enum Looked {
    Header(Box<ChunkHeader>),
    Bad(String),
}

/// Reads a header, twice if it must be.
///
/// # Errors
/// The store's; `Unsupported` when a newer program wrote the chunk.
pub(super) async fn look(store: &dyn Store, key: &str) -> Result<Looked> {
    let is_fault = |e: &Error| matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::NotFound | ErrorKind::Io);
    match fetch_header(store, key).await {
        Err(e) if is_fault(&e) => {}
        looked => return header_of(looked, key),
    }
    match fetch_header(store, key).await {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(Looked::Bad("it is not in the store".to_owned())),
        Err(e) if is_fault(&e) => Ok(Looked::Bad(e.to_string())),
        looked => header_of(looked, key),
    }
}

fn header_of(looked: Result<ChunkHeader>, key: &str) -> Result<Looked> {
    let h = looked.map_err(|e| e.context(format!("reading the header of {key}")))?;
    Ok(Looked::Header(Box::new(h)))
}

/// Where to begin, and for what volume.
pub(super) struct Ground<'a> {
    pub store: &'a dyn Store,
    /// Name and size; the size is the largest possible where nobody knows it.
    pub draft: &'a Manifest,
    /// Whose the chunks have to be, where that is known.
    pub volume: Option<Uuid>,
    /// With the map as of `start`.
    pub maps: Maps,
    pub start: StoreEnd,
    /// The log's packed mark.
    pub packed: Option<Seq>,
}

/// Puts the chunks together that count by `rules`; `named` are in order.
///
/// # Errors
/// The store's; `Unsupported`, as [`look`]; `Corrupt` for chunks that contradict each other or the volume's size.
pub(super) async fn assemble(
    ground: Ground<'_>,
    named: &[Named],
    rules: &Rules,
    told: &mut dyn FnMut(Progress),
) -> Result<Assembled> {
    let Ground { store, draft, volume, maps, start, packed } = ground;
    let prefix = manifest::prefix(&draft.name);
    let counting: Vec<&Named> = named.iter().filter(|n| rules.names(n)).collect();
    let mut progress = Progress { chunks: 0, of: counting.len() as u64, groups: start.group.0 };
    told(progress);
    let mut a = Assembler {
        draft,
        rules,
        packed,
        open: Vec::new(),
        stopped: false,
        out: Assembled {
            maps,
            end: start,
            chunks: 0,
            volumes: BTreeSet::new(),
            blocks_touched: 0,
            bad: Vec::new(),
            missing: Vec::new(),
            relied_on: GroupNo(0),
            inherited: false,
            last_whole: start.group,
            shares: Vec::new(),
            meets_log: packed.is_none_or(|p| p <= start.through),
        },
    };
    a.out.end.ignored = named.len() - counting.len();
    let mut headers = stream::iter(counting)
        .map(|n| {
            let key = header::key(&prefix, n.chunk, n.epoch, n.nonce);
            async move { (n, look(store, &key).await, key) }
        })
        .buffered(PARALLEL_HEADERS);
    while let Some((n, looked, key)) = headers.next().await {
        match looked? {
            Looked::Header(h) if volume.is_some_and(|v| v != h.volume) => {
                a.bad(Lost::new(key, n.chunk, format!("it belongs to another volume ({})", h.volume)));
            }
            Looked::Header(h) => a.take(*h)?,
            Looked::Bad(why) => a.bad(Lost::new(key, n.chunk, why)),
        }
        progress.chunks += 1;
        progress.groups = a.out.end.group.0;
        told(progress);
    }
    a.close()?;
    Ok(a.out)
}

struct Assembler<'a> {
    draft: &'a Manifest,
    rules: &'a Rules,
    packed: Option<Seq>,
    /// The group that is being gathered.
    open: Vec<ChunkHeader>,
    /// A group was not whole: what follows is only counted.
    stopped: bool,
    out: Assembled,
}

impl Assembler<'_> {
    fn bad(&mut self, lost: Lost) {
        if self.out.bad.len() < MOST_NAMED {
            self.out.bad.push(lost);
        }
    }

    fn take(&mut self, h: ChunkHeader) -> Result<()> {
        self.out.volumes.insert(h.volume);
        if !self.rules.takes(&h) {
            self.out.end.ignored += 1;
            return Ok(());
        }
        // Chunks of two volumes make no map.
        self.stopped |= self.out.volumes.len() > 1;
        if h.group.0 == 0 {
            // Garbage collection wrote it, and no map that was published names it, or it would be in the ground: all that it has is
            // elsewhere, too. If the map that names it is lost with all copies, the groups that it relies on are not whole.
            self.out.relied_on = self.out.relied_on.max(h.applied_through);
            self.out.end.ignored += 1;
            self.out.inherited |= h.extents.iter().any(|e| e.kind != ExtentKind::Discard && e.birth.0 == 0);
            return Ok(());
        }
        if self.open.first().is_some_and(|o| o.group != h.group || o.epoch != h.epoch) {
            self.close()?;
        }
        self.out.relied_on = self.out.relied_on.max(h.applied_through);
        self.open.push(h);
        Ok(())
    }

    /// The group that was gathered is over.
    fn close(&mut self) -> Result<()> {
        let mut chunks = std::mem::take(&mut self.open);
        let Some(first) = chunks.first() else { return Ok(()) };
        let (group, count) = (first.group, first.count as usize);
        chunks.sort_by_key(|h| h.index);
        let out = &mut self.out;
        if !self.stopped && group == out.end.group.next() && is_whole(&chunks, out.end.through) {
            return self.apply(&chunks);
        }
        if chunks.len() == count {
            out.last_whole = out.last_whole.max(group);
        }
        out.end.ignored += chunks.len();
        if !std::mem::replace(&mut self.stopped, true) {
            self.tell_gap(&chunks);
        }
        Ok(())
    }

    fn apply(&mut self, chunks: &[ChunkHeader]) -> Result<()> {
        let out = &mut self.out;
        let touched = chunks.iter().flat_map(|h| &h.extents).map(|e| e.block.0.saturating_add(e.blocks)).max();
        let touched = out.blocks_touched.max(touched.unwrap_or(0));
        let size = self.draft.size_bytes;
        if touched.saturating_mul(BLOCK as u64) > size {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "group {} of volume {:?} reaches to byte {}, past the volume's size of {size} bytes: a size that was given with \
                     --size is too small, or these chunks are not of this volume",
                    chunks[0].group,
                    self.draft.name,
                    touched.saturating_mul(BLOCK as u64)
                ),
            ));
        }
        let update = group_update(self.draft, chunks)?;
        out.maps.apply_group(&update);
        out.blocks_touched = touched;
        out.chunks += chunks.len() as u64;
        let (h, through) = (&chunks[0], update.last);
        match out.shares.last_mut() {
            Some(s) if s.epoch == h.epoch => s.last_through = through,
            _ => out.shares.push(Share {
                epoch: h.epoch,
                first: FirstOwned { group: h.group, chunk: out.end.last_chunk.next() },
                first_through: through,
                last_through: through,
            }),
        }
        out.end.group = h.group;
        out.end.through = through;
        out.end.last_chunk = chunks.iter().map(|h| h.chunk).fold(out.end.last_chunk, ChunkNo::max);
        out.last_whole = out.last_whole.max(h.group);
        out.meets_log |= self.packed == Some(through);
        Ok(())
    }

    /// Names what the first group that is not whole lacks, and says of it what its neighbours tell.
    fn tell_gap(&mut self, chunks: &[ChunkHeader]) {
        let prefix = manifest::prefix(&self.draft.name);
        let out = &mut self.out;
        let first = &chunks[0];
        let Some(base) = first.chunk.0.checked_sub(u64::from(first.index)) else { return };
        let key = |number: u64| header::key(&prefix, ChunkNo(number), first.epoch, first.nonce);
        let entries = (first.after.0 + 1, first.through.0);
        // Groups of which nothing is left.
        let gone = out.end.last_chunk.0 + 1..base;
        let mut lacking: Vec<Lost> = gone
            .take(MOST_NAMED)
            .map(|number| {
                let group = (first.group == out.end.group.next().next()).then_some(out.end.group.next().0);
                let entries = group.map(|_| (out.end.through.0 + 1, first.after.0));
                Lost { group, entries, ..Lost::missing(key(number), ChunkNo(number)) }
            })
            .collect();
        let volume_end = self.draft.size_bytes / SECTOR as u64;
        for index in (0..first.count).take(MOST_NAMED) {
            let Err(at) = chunks.binary_search_by_key(&index, |h| h.index) else { continue };
            // The group's blocks are in order, from chunk to chunk.
            let from = at.checked_sub(1).and_then(|i| chunks[i].extents.last()).map_or(0, |e| e.block.0 + e.blocks);
            let until = chunks.get(at).and_then(|h| h.extents.first()).map(|e| e.block);
            let sectors = (BlockNo(from).lba().0, until.map_or(volume_end, |b| b.lba().0));
            let number = base + u64::from(index);
            let lost = Lost::missing(key(number), ChunkNo(number));
            lacking.push(Lost { group: Some(first.group.0), entries: Some(entries), sectors: Some(sectors), ..lost });
        }
        for lost in lacking {
            match out.bad.iter_mut().find(|b| b.chunk == lost.chunk) {
                Some(bad) => *bad = Lost { key: bad.key.clone(), why: bad.why.clone(), ..lost },
                None => out.missing.push(lost),
            }
        }
    }
}
