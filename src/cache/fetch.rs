//! Reads of chunks for the lanes, on a store thread: from the store, and into the cache.
//!
//! Invariants:
//! - Of a range that is on its way nothing is asked for again: who wants a part of it waits for the same answer. It counts as on its way until
//!   it is in the cache, or nobody holds it any more.
//! - An answer does not wait for the cache.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures_util::future::{FutureExt, LocalBoxFuture, Shared, WeakShared};

use super::Cache;
use super::held::Held;
use super::slot::PAGE_BLOCKS;
use crate::chunk::header::HEADER_ROOM;
use crate::chunk::pack::BuiltChunk;
use crate::chunk::reader::{Blocks, ChunkReader, Stored};
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::map::Location;
use crate::units::{BLOCK, BlockNo, ChunkNo};

type Answer = std::result::Result<Arc<Stored>, Arc<Error>>;
type Flight = Shared<LocalBoxFuture<'static, Answer>>;

/// A range of a chunk that is on its way.
struct OnItsWay {
    source: u8,
    chunk: ChunkNo,
    blocks: Range<usize>,
    read: Rc<Cell<usize>>,
    answer: WeakShared<LocalBoxFuture<'static, Answer>>,
}

/// See the module's page.
pub struct Fetcher<D> {
    reader: ChunkReader,
    cache: Option<(Arc<Cache>, D)>,
    under_way: RefCell<Vec<OnItsWay>>,
    /// Who waits for an answer.
    waiting: Cell<usize>,
}

/// What has been fetched and is to be kept; whoever asks for it meanwhile is answered from it.
pub struct Fetched {
    source: u8,
    blocks: usize,
    /// In the chunk, the end of what was wanted, and of what was handed out.
    wanted: usize,
    read: Rc<Cell<usize>>,
    flight: Flight,
}

impl Fetched {
    /// Blocks of which the first `read` were handed out, with nothing in them.
    #[cfg(test)]
    pub(super) fn none_of(blocks: usize, read: usize) -> Self {
        let flight = std::future::pending().boxed_local().shared();
        Self { source: 0, blocks, wanted: blocks, read: Rc::new(Cell::new(read)), flight }
    }

    /// Its size in bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        (self.blocks * BLOCK) as u64
    }

    /// Whether its end was handed out: reads that follow one another have had the rest.
    pub(super) fn is_read(&self) -> bool {
        self.read.get() >= self.wanted
    }
}

/// One who waits, for as long as it lives.
struct Waits<'a>(&'a Cell<usize>);

impl<'a> Waits<'a> {
    fn new(all: &'a Cell<usize>) -> Self {
        all.set(all.get() + 1);
        Self(all)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

impl<D: Disk> Fetcher<D> {
    /// One that fetches what it is asked for; with a cache more, and keeps it there.
    #[must_use]
    pub fn new(reader: ChunkReader, cache: Option<(Arc<Cache>, D)>) -> Self {
        Self { reader, cache, under_way: RefCell::default(), waiting: Cell::new(0) }
    }

    /// The blocks that the map places at `at` and following; the first is the volume's block `first`. What came with them goes to
    /// [`Self::keep`], when the answer has been given.
    ///
    /// # Errors
    /// Those of [`ChunkReader::read`].
    pub async fn fetch(&self, at: Location, first: BlockNo, blocks: u16) -> (Result<Blocks>, Option<Fetched>) {
        if self.cache.is_none() {
            return (self.reader.read(at, first, blocks).await, None);
        }
        let _waits = Waits::new(&self.waiting);
        let (fetched, ours) = self.flight(at, blocks);
        fetched.read.set(fetched.read.get().max(usize::from(at.index() + blocks)));
        let answer = match fetched.flight.clone().await {
            // What fails its check, or cannot be parsed, is read again.
            Ok(stored) => match stored.part(usize::from(at.index()), first, usize::from(blocks)) {
                Some(answer) => Ok(answer),
                None => self.reader.read(at, first, blocks).await,
            },
            Err(e) if e.kind() == ErrorKind::Corrupt => self.reader.read(at, first, blocks).await,
            Err(e) => Err(Error::new(e.kind(), e.to_string())),
        };
        (answer, ours.then_some(fetched))
    }

    /// Whether somebody waits for an answer.
    pub fn is_waited_for(&self) -> bool {
        self.waiting.get() > 0
    }

    /// Fetches blocks for the cache alone, unless they are there or on their way. From now on they are on their way.
    pub fn fetch_ahead(&self, at: Location, blocks: u16) -> impl Future<Output = Option<Fetched>> {
        let begun = self.cache.as_ref().filter(|(cache, _)| !cache.has(at, blocks)).and_then(|(cache, _)| {
            let (fetched, ours) = self.flight(at, blocks);
            ours.then_some((cache, fetched))
        });
        async {
            let (cache, fetched) = begun?;
            // A failure, and what fails its check, is told to who asks for it, if anybody does.
            let stored = fetched.flight.clone().await.ok()?;
            cache.fetched_ahead(stored.data.len() as u64);
            Some(fetched)
        }
    }

    /// For what was fetched ahead.
    #[must_use]
    pub fn held(&self) -> Held {
        Held::new(self.cache.as_ref().map_or(0, |(cache, _)| cache.most_held))
    }

    /// Tells the cache's status how much is held.
    pub fn holds(&self, held: &Held) {
        if let Some((cache, _)) = &self.cache {
            cache.counts.held_bytes.store(held.bytes(), Ordering::Relaxed);
        }
    }

    /// The answer that is on its way, or a new one (`true`).
    fn flight(&self, at: Location, blocks: u16) -> (Fetched, bool) {
        let (source, chunk) = (at.source(), at.chunk());
        let wanted = usize::from(at.index())..usize::from(at.index()) + usize::from(blocks);
        let mut under_way = self.under_way.borrow_mut();
        under_way.retain(|o| o.answer.upgrade().is_some());
        let same = |o: &&OnItsWay| {
            (o.source, o.chunk) == (source, chunk) && o.blocks.start <= wanted.start && wanted.end <= o.blocks.end
        };
        if let Some(o) = under_way.iter().find(same)
            && let Some(flight) = o.answer.upgrade()
        {
            return (
                Fetched { source, blocks: o.blocks.len(), wanted: wanted.end, read: o.read.clone(), flight },
                false,
            );
        }
        let end = wanted.end;
        let blocks = self.window(source, chunk, wanted);
        let (reader, range) = (self.reader.clone(), blocks.clone());
        let flight = async move { reader.read_stored(source, chunk, range).await.map(Arc::new).map_err(Arc::new) }
            .boxed_local()
            .shared();
        let fetched = Fetched { source, blocks: blocks.len(), wanted: end, read: Rc::default(), flight };
        // It has not been polled yet, so it can be downgraded.
        let way = |answer| OnItsWay { source, chunk, blocks, read: fetched.read.clone(), answer };
        under_way.extend(fetched.flight.downgrade().map(way));
        (fetched, true)
    }

    /// Whole pages, as far as the chunk is known to have them.
    fn window(&self, source: u8, chunk: ChunkNo, wanted: Range<usize>) -> Range<usize> {
        let Some(stored) = self.reader.stored_blocks(source, chunk).filter(|n| *n >= wanted.end) else { return wanted };
        wanted.start / PAGE_BLOCKS * PAGE_BLOCKS..wanted.end.next_multiple_of(PAGE_BLOCKS).min(stored)
    }

    /// Puts into the cache a chunk of the volume's own that was just packed. Others may be offered when `_turn` is over.
    pub async fn keep_packed<T>(&self, chunk: BuiltChunk, _turn: T) {
        let Some((cache, disk)) = &self.cache else { return };
        // Blocks that have lost sectors are never there.
        if chunk.header.masks.is_empty() {
            cache.admit(disk, 0, &chunk.header, 0, &chunk.body[HEADER_ROOM..], &[]).await;
        }
    }

    /// Puts into the cache what was fetched.
    pub async fn keep(&self, fetched: Fetched) {
        let (Some((cache, disk)), Some(Ok(stored))) = (&self.cache, fetched.flight.peek()) else { return };
        let bad: Vec<usize> = stored.bad.iter().map(|(i, _)| *i).collect();
        cache.admit(disk, fetched.source, &stored.header, stored.from, &stored.data, &bad).await;
    }
}
