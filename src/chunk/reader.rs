//! Reading blocks out of chunks in the store, each checked against its checksum and address.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use bytes::Bytes;
use uuid::Uuid;

use super::header::{self, ChunkHeader, HEADER_ROOM};
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::{self, EpochEntry, Manifest};
use crate::map::Location;
use crate::store::Store;
use crate::units::{BLOCK, BlockNo, ChunkNo, Epoch, Nonce, SECTORS_PER_BLOCK};

/// The mask of a block with all its sectors.
pub(crate) const WHOLE: u8 = 0xff;
/// Parsed headers kept in memory: at most about 30 KiB each.
const HEADERS_KEPT: usize = 256;

/// Where the chunks of the volume and of its ancestors are.
#[derive(Debug, Default)]
pub struct Keys {
    sources: RwLock<Vec<Source>>,
}

#[derive(Debug, Clone)]
struct Source {
    prefix: String,
    uuid: Uuid,
    history: Vec<EpochEntry>,
}

impl Keys {
    /// Has the sources that a manifest names.
    pub fn set(&self, m: &Manifest) {
        let all = m.sources().map(|s| Source { prefix: s.prefix(), uuid: s.uuid, history: s.history.to_vec() });
        *self.sources.write().unwrap_or_else(PoisonError::into_inner) = all.collect();
    }

    /// Which source has this chunk, if that attachment owns it.
    #[must_use]
    pub fn source(&self, volume: Uuid, chunk: ChunkNo, epoch: Epoch, nonce: Nonce) -> Option<u8> {
        let sources = self.sources.read().unwrap_or_else(PoisonError::into_inner);
        let owns = |s: &Source| s.uuid == volume && manifest::owner(&s.history, chunk) == Some((epoch, nonce));
        sources.iter().position(owns).and_then(|n| u8::try_from(n).ok())
    }

    /// The key of a chunk, and whose it is.
    ///
    /// # Errors
    /// `Corrupt` when the map names a chunk that nobody owns.
    pub fn key(&self, source: u8, chunk: ChunkNo) -> Result<(String, Uuid)> {
        let sources = self.sources.read().unwrap_or_else(PoisonError::into_inner);
        sources
            .get(usize::from(source))
            .and_then(|s| {
                manifest::owner(&s.history, chunk).map(|(e, n)| (header::key(&s.prefix, chunk, e, n), s.uuid))
            })
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::Corrupt,
                    format!("the map names chunk {chunk} of source {source}, which no epoch owns"),
                )
            })
    }
}

#[derive(Debug, Default)]
struct Headers {
    by_chunk: HashMap<(u8, ChunkNo), Arc<ChunkHeader>>,
    order: VecDeque<(u8, ChunkNo)>,
}

/// Blocks as read.
#[derive(Debug, Clone)]
pub struct Blocks {
    /// Their bytes, 4096 each.
    pub data: Bytes,
    /// Blocks that are not whole: (index in `data`, mask of the sectors that are good).
    pub bad: Vec<(usize, u8)>,
}

/// Stored blocks of a chunk, as read and checked.
#[derive(Debug, Clone)]
pub struct Stored {
    /// The object.
    pub key: String,
    /// What the chunk says of them.
    pub header: Arc<ChunkHeader>,
    /// The first one's number among the chunk's stored blocks.
    pub from: usize,
    /// Their bytes, 4096 each.
    pub data: Bytes,
    /// Blocks that are not whole: (index in `data`, mask of the sectors that are good; 0: it fails its check).
    pub bad: Vec<(usize, u8)>,
}

impl Stored {
    /// Those from `index` on, which the map has as the volume's from `first` on. `None` when one of them fails its check.
    #[must_use]
    pub fn part(&self, index: usize, first: BlockNo, blocks: usize) -> Option<Blocks> {
        let part = self.part_as_read(index, first, blocks);
        part.bad.iter().all(|(_, good)| *good != 0).then_some(part)
    }

    /// The same, with what fails its check, or is another block of the volume, among the bad.
    fn part_as_read(&self, index: usize, first: BlockNo, blocks: usize) -> Blocks {
        let skip = index - self.from;
        let data = self.data.slice(skip * BLOCK..(skip + blocks) * BLOCK);
        let known =
            self.bad.iter().filter(|(i, _)| (skip..skip + blocks).contains(i)).map(|(i, good)| (i - skip, *good));
        let mut bad: Vec<(usize, u8)> = known.collect();
        for (i, at) in self.header.stored_at().skip(index).take(blocks).enumerate() {
            if at.0 != first.0 + i as u64 {
                bad.retain(|(b, _)| *b != i);
                bad.push((i, 0));
            }
        }
        Blocks { data, bad }
    }
}

/// See the module's page.
#[derive(Debug, Clone)]
pub struct ChunkReader {
    store: Arc<dyn Store>,
    keys: Arc<Keys>,
    headers: Arc<Mutex<Headers>>,
    /// Whether damage is told in the log, where the caller's own is but an I/O error.
    logs: bool,
}

impl ChunkReader {
    /// A reader; clones share the headers.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, keys: Arc<Keys>) -> Self {
        Self { store, keys, headers: Arc::default(), logs: true }
    }

    /// For a caller that tells of damage itself.
    #[must_use]
    pub fn without_log(self) -> Self {
        Self { logs: false, ..self }
    }

    /// The same headers and keys over another client of the same store.
    #[must_use]
    pub fn over(&self, store: Arc<dyn Store>) -> Self {
        Self { store, ..self.clone() }
    }

    /// Who knows the keys.
    #[must_use]
    pub const fn keys(&self) -> &Arc<Keys> {
        &self.keys
    }

    fn kept(&self, id: (u8, ChunkNo)) -> Option<Arc<ChunkHeader>> {
        self.headers.lock().unwrap_or_else(PoisonError::into_inner).by_chunk.get(&id).cloned()
    }

    /// Keeps a header that is known already: of a chunk just packed.
    pub fn keep(&self, source: u8, header: Arc<ChunkHeader>) {
        let id = (source, header.chunk);
        let mut h = self.headers.lock().unwrap_or_else(PoisonError::into_inner);
        if h.by_chunk.insert(id, header).is_none() {
            h.order.push_back(id);
        }
        while h.order.len() > HEADERS_KEPT {
            if let Some(old) = h.order.pop_front() {
                h.by_chunk.remove(&old);
            }
        }
    }

    /// A chunk's header, checked against its key.
    ///
    /// # Errors
    /// `NotFound` when it is missing, `Corrupt` when it is damaged or another's; the store's.
    pub async fn header(&self, source: u8, chunk: ChunkNo) -> Result<Arc<ChunkHeader>> {
        if let Some(h) = self.kept((source, chunk)) {
            return Ok(h);
        }
        let (key, volume) = self.keys.key(source, chunk)?;
        let h = Arc::new(fetch_header(&*self.store, &key).await?);
        if h.volume != volume {
            let what = format!("{key} is of volume {}, not of {volume}: it is another's", h.volume);
            return Err(Error::new(ErrorKind::Corrupt, what));
        }
        self.keep(source, h.clone());
        Ok(h)
    }

    /// Reads `blocks` blocks that the map places at `at` and following; the first is the volume's block `first`.
    /// Blocks that fail their check, or were stored damaged, are named in the result, not an error.
    ///
    /// # Errors
    /// `NotFound` when the object is missing, `Corrupt` when it is cut or not this chunk; the store's.
    pub async fn read(&self, at: Location, first: BlockNo, blocks: u16) -> Result<Blocks> {
        match self.read_once(at, first, blocks).await {
            // A bit may have flipped on the way, or in the header that is kept here: only what reads badly twice is bad.
            Ok(b) if b.bad.iter().any(|(_, good)| *good == 0) => {}
            Err(e) if e.kind() == ErrorKind::Corrupt => {}
            done => return done,
        }
        self.forget((at.source(), at.chunk()));
        self.read_once(at, first, blocks).await
    }

    fn forget(&self, id: (u8, ChunkNo)) {
        let mut h = self.headers.lock().unwrap_or_else(PoisonError::into_inner);
        h.by_chunk.remove(&id);
        h.order.retain(|o| *o != id);
    }

    async fn read_once(&self, at: Location, first: BlockNo, blocks: u16) -> Result<Blocks> {
        let (index, blocks) = (usize::from(at.index()), usize::from(blocks));
        let stored = self.read_stored(at.source(), at.chunk(), index..index + blocks).await?;
        let read = stored.part_as_read(index, first, blocks);
        if self.logs {
            for (i, _) in read.bad.iter().filter(|(_, good)| *good == 0) {
                let volume_block = first.0 + *i as u64;
                tracing::error!(
                    "block {volume_block} (byte {} of the volume) fails its check in {}, block {}",
                    volume_block * BLOCK as u64,
                    stored.key,
                    index + i
                );
            }
        }
        Ok(read)
    }

    /// Reads stored blocks of a chunk, whatever blocks of the volume they are, and checks them.
    ///
    /// # Errors
    /// `NotFound` when the object is missing, `Corrupt` when it is cut or not this chunk; the store's.
    pub async fn read_stored(&self, source: u8, chunk: ChunkNo, blocks: Range<usize>) -> Result<Stored> {
        let (key, _) = self.keys.key(source, chunk)?;
        let at = |n: usize| (HEADER_ROOM + n * BLOCK) as u64;
        let range = at(blocks.start)..at(blocks.end);
        let data = async { self.store.get_range(&key, range).await.map_err(|e| missing(e, &key)) };
        // Side by side: a cold read costs one round trip.
        let (header, data) = futures_util::future::try_join(self.header(source, chunk), data).await?;
        let mut addresses = header.stored_at().skip(blocks.start);
        let mut bad = Vec::new();
        for (i, block) in data.chunks_exact(BLOCK).enumerate() {
            let good = addresses.next().and_then(|at| good_sectors(&header, blocks.start + i, at, block)).unwrap_or(0);
            if good != WHOLE {
                bad.push((i, good));
            }
        }
        drop(addresses);
        Ok(Stored { key, header, from: blocks.start, data, bad })
    }

    /// How many blocks a chunk has, if its header is kept here.
    #[must_use]
    pub fn stored_blocks(&self, source: u8, chunk: ChunkNo) -> Option<usize> {
        self.kept((source, chunk)).map(|h| h.stored_blocks())
    }
}

/// The check that every block passes before it is handed out: the mask of its good sectors ([`WHOLE`] for all), or
/// `None` when stored block `n` is not the volume's `block` as it was packed.
pub(crate) fn good_sectors(header: &ChunkHeader, n: usize, block: BlockNo, data: &[u8]) -> Option<u8> {
    if header.crcs.get(n).is_none_or(|crc| header::block_crc(block, data) != *crc) {
        return None;
    }
    let mask = header.masks.iter().find(|(m, _)| usize::from(*m) == n);
    Some(mask.map_or(WHOLE, |(_, good)| *good))
}

/// Whether all sectors `from .. to` of a block are good under a mask.
#[must_use]
pub fn sectors_good(mask: u8, from: u64, to: u64) -> bool {
    debug_assert!(from < to && to <= SECTORS_PER_BLOCK);
    (from..to).all(|s| mask & (1 << s) != 0)
}

fn missing(e: Error, key: &str) -> Error {
    match e.kind() {
        ErrorKind::NotFound => {
            Error::new(ErrorKind::NotFound, format!("the map names {key}, which is not in the store")).with_source(e)
        }
        _ => e,
    }
}

/// Reads and checks a chunk's header by its key.
///
/// # Errors
/// `NotFound` when it is missing, `Corrupt` when it is damaged or another's; the store's.
pub async fn fetch_header(store: &dyn Store, key: &str) -> Result<ChunkHeader> {
    let bytes = store.get_range(key, 0..HEADER_ROOM as u64).await.map_err(|e| missing(e, key))?;
    parse_header(key, &bytes)
}

/// The same of bytes that were read.
pub(crate) fn parse_header(key: &str, bytes: &[u8]) -> Result<ChunkHeader> {
    let h = ChunkHeader::decode(bytes).map_err(|e| Error::from(e).context(format!("reading the header of {key}")))?;
    let name = key.rsplit('/').next().unwrap_or(key);
    if header::parse_name(name) != Some((h.chunk, h.epoch, h.nonce)) {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!("{key} holds chunk {} of epoch {}: it sits under a wrong name", h.chunk, h.epoch),
        ));
    }
    Ok(h)
}
