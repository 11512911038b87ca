//! Blocks of chunks kept on a local disk, in one file for each volume.
//!
//! - [`slot`]: the file's format; [`room`]: which slots are free.
//! - [`fetch`]: what is not here, from the store: one request for all who wait, and into the cache with it.
//! - [`admit`]: what is written to it.
//! - [`ahead`]: reads that follow one another, and what to fetch before they ask for it; [`held`]: what of it is in memory.
//!
//! Invariants:
//! - A full, lost, damaged or mixed-up file costs speed, never data: chunks never change, a page is found by its chunk's name, and each
//!   block is checked when it is read. What fails its check is forgotten and read from the store; nothing is ever synced.
//! - A slot belongs to one [`Page`], or is free, or is being written: it is free again when the last reader has let go of the page.
//! - A page is found only when its slot is written.
//! - Blocks that have lost sectors are never here: the store's chunk says which sectors are good.
//! - While a volume is attached, the number of a source names the same volume.

mod admit;
pub mod ahead;
mod counts;
pub mod fetch;
pub mod held;
mod room;
pub mod slot;
pub mod trace;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::stream::{self, StreamExt};
use serde::{Deserialize, Serialize};

use crate::checksum::block_crc;
use crate::chunk::reader::Keys;
use crate::disk::file::DataFile;
use crate::disk::{Disk, IoBuf};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::machine::memory_bytes;
use crate::map::Location;
use crate::units::{BLOCK, BlockNo, ChunkNo, SECTOR, human_bytes};
pub use counts::CacheStatus;
use counts::Counts;
use room::{Room, Slot};
use slot::{PAGE_BLOCKS, SLOT_BYTES, SlotHeader, parts};

/// Slots that the index leaves free, for what is being written and what readers still hold.
const RESERVE: u32 = 64;
/// The smallest cache: 256 slots and a little.
pub const MIN_BYTES: u64 = 32 << 20;
const _: () = assert!(MIN_BYTES / SLOT_BYTES > 4 * RESERVE as u64);
/// The largest cache: its index takes about 150 bytes of memory for each slot.
pub const MAX_BYTES: u64 = 1 << 44;
/// Shards of the index. Each rounds its share up: together less than [`RESERVE`].
const SHARDS: usize = 16;
/// Blocks that are fetched ahead in one request: 1 MiB, so that several are on their way at once.
const MOST_AHEAD: u16 = 256;
/// Where so many are wanted, in blocks, several are on their way in any case: a request fetches as much of a chunk as is wanted.
const MANY_AHEAD: u64 = (8 << 20) / BLOCK as u64;
/// What is fetched ahead of a stream takes at most this part of the cache,
const AHEAD_OF_CACHE: u64 = 8;
/// and of all streams together, on its way, in memory, and on its way to the cache's disk, this part of the machine's memory.
const AHEAD_OF_MEMORY: u64 = 64;
/// Headers read at once when a cache is taken up again.
const RESTORE_DEPTH: usize = 32;

/// Where a volume's cache is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The file; made when missing.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
}

/// Which page: source, chunk and number of the page in one word, as in a [`Location`].
type PageId = u64;

fn page_id(source: u8, chunk: ChunkNo, page: u16) -> PageId {
    Location::new(source, chunk, page).raw()
}

fn page_of(at: Location) -> PageId {
    page_id(at.source(), at.chunk(), at.index() / PAGE_BLOCKS as u16)
}

/// A page in the cache; its slot stays as long as this lives.
#[derive(Debug)]
pub struct Page {
    slot: Slot,
    present: u16,
    crcs: [u32; PAGE_BLOCKS],
}

impl Page {
    /// Whether the blocks `from .. from + blocks` of the page are here.
    #[must_use]
    pub const fn has(&self, from: usize, blocks: usize) -> bool {
        let wanted = mask(from, blocks);
        self.present & wanted == wanted
    }
}

/// The bits of blocks `from .. from + blocks` of a page.
const fn mask(from: usize, blocks: usize) -> u16 {
    (((1_u32 << blocks) - 1) << from) as u16
}

/// See the module's page.
pub struct Cache {
    pages: quick_cache::sync::Cache<PageId, Arc<Page>>,
    room: Arc<Room>,
    /// How many slots there are for which the index was told.
    fitted: AtomicU32,
    /// How many slots the file had when it was opened, that [`Self::restore`] has not taken up.
    old: AtomicU32,
    slots: u32,
    most_ahead: u64,
    most_held: u64,
    file: Arc<DataFile>,
    /// Buffers of a slot each, for the next that is written: fresh memory would be zeroed first.
    spare: Mutex<Vec<IoBuf>>,
    counts: Counts,
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cache({}, {} slots)", self.file.path().display(), self.slots)
    }
}

impl Cache {
    /// Opens the file, or makes it. What it holds already counts when [`Self::restore`] has seen it.
    ///
    /// # Errors
    /// `Usage` for a size that is too small or too large, or what is no file; `Busy` when another process has it; `Full` where there is no
    /// room for the smallest; the file system's.
    pub fn open(place: &Place) -> Result<Self> {
        let Place { path, bytes } = place;
        check_size(*bytes)?;
        if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).context(|| format!("making the cache's folder {}", folder.display()))?;
        }
        let file = DataFile::open(path, true)?;
        if file.is_device() {
            return Err(Error::new(
                ErrorKind::Usage,
                format!(
                    "the cache {} is a block device: make a file system on it, and name a folder there",
                    path.display()
                ),
            ));
        }
        let room = room_for(&file)?;
        if room < MIN_BYTES {
            return Err(Error::new(
                ErrorKind::Full,
                format!(
                    "the file system of the cache {} has room for {} of it, and {} is the least: make room, name another folder with --cache-dir, \
                     or do without (--cache-size 0)",
                    path.display(),
                    human_bytes(room),
                    human_bytes(MIN_BYTES)
                ),
            ));
        }
        if room < *bytes {
            tracing::warn!(
                "the cache {} takes {} in place of {}: there is not more room beside the logs",
                path.display(),
                human_bytes(room),
                human_bytes(*bytes)
            );
        }
        let slots = ((*bytes).min(room) / SLOT_BYTES) as u32;
        let capacity = capacity_of(slots);
        let options = quick_cache::OptionsBuilder::new()
            .estimated_items_capacity(capacity as usize)
            .weight_capacity(capacity)
            .shards(SHARDS)
            .build()
            .map_err(|e| Error::new(ErrorKind::Internal, format!("laying out the cache's index: {e}")))?;
        let pages = quick_cache::sync::Cache::with_options(
            options,
            quick_cache::UnitWeighter,
            quick_cache::DefaultHashBuilder::default(),
            quick_cache::sync::DefaultLifecycle::default(),
        );
        let file = Arc::new(file);
        let (room, old) = Room::of(Arc::clone(&file), slots)?;
        let most_in_memory = (memory_bytes() / AHEAD_OF_MEMORY / SECTOR as u64).min(ahead::MOST);
        Ok(Self {
            pages,
            room,
            fitted: slots.into(),
            old: old.into(),
            slots,
            most_ahead: most_in_memory.min(u64::from(slots) * SLOT_BYTES / AHEAD_OF_CACHE / SECTOR as u64),
            most_held: most_in_memory * SECTOR as u64,
            file,
            spare: Mutex::default(),
            counts: Counts::default(),
        })
    }

    /// How far ahead of a stream of reads to fetch at most, in sectors.
    #[must_use]
    pub const fn most_ahead(&self) -> u64 {
        self.most_ahead
    }

    fn spare(&self) -> MutexGuard<'_, Vec<IoBuf>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file: lanes dup it.
    #[must_use]
    pub const fn file(&self) -> &Arc<DataFile> {
        &self.file
    }

    /// The page that has the `blocks` blocks from `at` on, which are of one page.
    #[must_use]
    pub fn find(&self, at: Location, blocks: usize) -> Option<Arc<Page>> {
        let from = usize::from(at.index()) % PAGE_BLOCKS;
        self.pages.get(&page_of(at)).filter(|p| p.has(from, blocks))
    }

    /// Reads whole blocks of a page that [`Self::find`] has found, and checks them: they are the volume's from `first` on. `None` when
    /// they are not what they should be; the page is forgotten then, and the store has it.
    ///
    /// # Panics
    /// When `dst` is not of whole blocks, or of more than the page has.
    pub async fn read<D: Disk>(
        &self,
        disk: &D,
        page: &Page,
        at: Location,
        first: BlockNo,
        mut dst: IoBuf,
    ) -> Option<()> {
        let from = usize::from(at.index()) % PAGE_BLOCKS;
        let blocks = dst.len() / BLOCK;
        assert!(dst.len().is_multiple_of(BLOCK) && page.has(from, blocks), "blocks that the page has");
        let offset = page.slot.at() + ((1 + from) * BLOCK) as u64;
        let why = match disk.read_at(offset, dst.clone()).await {
            Err(e) => Some(e.to_string()),
            Ok(()) => dst
                .bytes_mut()
                .chunks_exact(BLOCK)
                .enumerate()
                .find(|(i, data)| block_crc(BlockNo(first.0 + *i as u64), data) != page.crcs[from + i])
                .map(|(i, _)| format!("block {} of the volume fails its check", first.0 + i as u64)),
        };
        let Some(why) = why else {
            self.counts.hits.fetch_add(1, Ordering::Relaxed);
            self.counts.hit_bytes.fetch_add(dst.len() as u64, Ordering::Relaxed);
            return Some(());
        };
        if self.counts.damaged.fetch_add(1, Ordering::Relaxed) == 0 {
            tracing::warn!(
                "the cache {} at byte {offset}: {why}; the store has it, and this page is forgotten",
                self.file.path().display()
            );
        } else {
            tracing::debug!("the cache at byte {offset}: {why}");
        }
        // It may be another by now.
        if self.pages.peek(&page_of(at)).is_some_and(|p| std::ptr::eq(&raw const *p, page)) {
            self.pages.remove(&page_of(at));
        }
        None
    }

    /// What is not here of the `blocks` blocks from `at` on, page by page, in runs, counted from `at`, that a request each is to fetch
    /// when `of` blocks are wanted together.
    pub fn missing(&self, at: Location, blocks: u16, of: u64) -> Vec<Range<u16>> {
        let most = if of >= MANY_AHEAD { u16::MAX } else { MOST_AHEAD };
        let mut runs: Vec<Range<u16>> = Vec::new();
        for (from, n) in self.missing_parts(at, blocks) {
            match runs.last_mut() {
                Some(run) if run.end == from && run.end - run.start + n <= most => run.end += n,
                _ => runs.push(from..from + n),
            }
        }
        runs
    }

    /// The parts of pages that are not here; not counted as a use of those that are.
    fn missing_parts(&self, at: Location, blocks: u16) -> impl Iterator<Item = (u16, u16)> {
        let index = usize::from(at.index());
        let missing = move |from: usize, n| {
            let here = self.pages.peek(&page_of(at.plus(from as u16)));
            here.is_none_or(|p| !p.has((index + from) % PAGE_BLOCKS, n))
        };
        parts(index, blocks.into()).filter(move |(from, n)| missing(*from, *n)).map(|(from, n)| (from as u16, n as u16))
    }

    /// Whether a page here lacks some of these blocks.
    fn lacks(&self, id: PageId, present: u16) -> bool {
        self.pages.peek(&id).is_none_or(|p| present & !p.present != 0)
    }

    /// Whether the blocks are here; not counted as a use of them.
    #[must_use]
    pub fn has(&self, at: Location, blocks: u16) -> bool {
        self.missing_parts(at, blocks).next().is_none()
    }

    /// So much was fetched before it was asked for.
    pub(crate) fn fetched_ahead(&self, bytes: u64) {
        self.counts.ahead_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A read of `bytes` has to go to the store.
    pub fn missed(&self, bytes: u64) {
        self.counts.misses.fetch_add(1, Ordering::Relaxed);
        self.counts.miss_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Takes up what the file holds from an earlier life, as far as `keys` know the chunks. Reads go on meanwhile, and it stops when it `ends`.
    pub async fn restore<D: Disk>(&self, disk: &D, keys: &Keys, ends: impl Fn() -> bool) {
        let old = self.old.swap(0, Ordering::Relaxed);
        let looks = stream::iter(0..old).take_while(|_| std::future::ready(!ends())).map(|number| async move {
            let slot = self.room.claim(number);
            let block = IoBuf::zeroed(BLOCK);
            if disk.read_at(slot.at(), block.clone()).await.is_err() {
                return;
            }
            let Ok(h) = SlotHeader::decode(block.bytes()) else { return };
            let Some(source) = keys.source(h.volume, h.chunk, h.epoch, h.nonce) else { return };
            let id = page_id(source, h.chunk, h.page);
            if self.lacks(id, h.present) {
                self.pages.insert(id, Arc::new(Page { slot, present: h.present, crcs: h.crcs }));
            }
        });
        looks.buffer_unordered(RESTORE_DEPTH).for_each(|()| async {}).await;
        if old > 0 {
            tracing::info!(
                "the cache {} holds {} MiB from before",
                self.file.path().display(),
                (self.pages.len() * PAGE_BLOCKS * BLOCK) >> 20
            );
        }
    }

    /// What it has done so far.
    #[must_use]
    pub fn status(&self) -> CacheStatus {
        self.counts.status(u64::from(self.slots) * SLOT_BYTES, (self.pages.len() * PAGE_BLOCKS * BLOCK) as u64)
    }
}

/// How many pages the index has where there are so many slots.
fn capacity_of(slots: u32) -> u64 {
    u64::from(slots - RESERVE.min(slots / 2))
}

/// How large the cache may be: what it takes already, and half of what is free, for a log may be on the same file system.
fn room_for(file: &DataFile) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let of = || format!("looking for room for the cache {}", file.path().display());
    let taken = file.dup().and_then(|f| f.metadata()).context(of)?.blocks() * 512;
    let free = nix::sys::statvfs::fstatvfs(file).map_err(std::io::Error::from).context(of)?;
    // The fields' types differ from platform to platform.
    #[allow(clippy::useless_conversion, clippy::allow_attributes, reason = "see above")]
    Ok(taken + u64::from(free.blocks_available()) * u64::from(free.fragment_size()) / 2)
}

/// Whether a cache can be of this size.
///
/// # Errors
/// `Usage`, with what would do.
pub fn check_size(bytes: u64) -> Result<()> {
    if (MIN_BYTES..=MAX_BYTES).contains(&bytes) {
        return Ok(());
    }
    let what = format!(
        "a local cache of {}: --cache-size must be 0 (none), or {} to {}",
        human_bytes(bytes),
        human_bytes(MIN_BYTES),
        human_bytes(MAX_BYTES)
    );
    Err(Error::new(ErrorKind::Usage, what))
}

/// The cache file of a volume in a folder.
#[must_use]
pub fn file_in(folder: &Path, volume: &str) -> PathBuf {
    folder.join(format!("{volume}.cache"))
}

#[cfg(test)]
mod tests;
