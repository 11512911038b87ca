//! Reads of chunks for the lanes, on a store thread: from the store, and into the cache.
//!
//! Invariants:
//! - Of a range that is on its way nothing is asked for again: who wants a part of it waits for the same answer. It counts as on its way until
//!   it is in the cache.
//! - An answer does not wait for the cache.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::sync::Arc;

use futures_util::future::{FutureExt, LocalBoxFuture, Shared, WeakShared};

use super::Cache;
use super::slot::PAGE_BLOCKS;
use crate::chunk::header::HEADER_ROOM;
use crate::chunk::pack::BuiltChunk;
use crate::chunk::reader::{Blocks, ChunkReader, Stored};
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::map::Location;
use crate::units::{BlockNo, ChunkNo};

type Answer = std::result::Result<Arc<Stored>, Arc<Error>>;
type Flight = Shared<LocalBoxFuture<'static, Answer>>;

/// A range of a chunk that is on its way.
struct OnItsWay {
    source: u8,
    chunk: ChunkNo,
    blocks: Range<usize>,
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
    flight: Flight,
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
        let (flight, ours) = self.flight(at, blocks);
        let kept = ours.then(|| Fetched { source: at.source(), flight: flight.clone() });
        let answer = match flight.await {
            // What fails its check, or cannot be parsed, is read again.
            Ok(stored) => match stored.part(usize::from(at.index()), first, usize::from(blocks)) {
                Some(answer) => Ok(answer),
                None => self.reader.read(at, first, blocks).await,
            },
            Err(e) if e.kind() == ErrorKind::Corrupt => self.reader.read(at, first, blocks).await,
            Err(e) => Err(Error::new(e.kind(), e.to_string())),
        };
        (answer, kept)
    }

    /// Whether somebody waits for an answer.
    pub fn is_waited_for(&self) -> bool {
        self.waiting.get() > 0
    }

    /// Fetches blocks for the cache alone, unless they are there or on their way.
    pub async fn fetch_ahead(&self, at: Location, blocks: u16) -> Option<Fetched> {
        let (cache, _) = self.cache.as_ref()?;
        if cache.has(at, blocks) {
            return None;
        }
        let (flight, true) = self.flight(at, blocks) else { return None };
        // A failure, and what fails its check, is told to who asks for it, if anybody does.
        let stored = flight.clone().await.ok()?;
        cache.fetched_ahead(stored.data.len() as u64);
        Some(Fetched { source: at.source(), flight })
    }

    /// The answer that is on its way, or a new one (`true`).
    fn flight(&self, at: Location, blocks: u16) -> (Flight, bool) {
        let (source, chunk) = (at.source(), at.chunk());
        let wanted = usize::from(at.index())..usize::from(at.index()) + usize::from(blocks);
        let mut under_way = self.under_way.borrow_mut();
        under_way.retain(|o| o.answer.upgrade().is_some());
        let same = |o: &&OnItsWay| {
            (o.source, o.chunk) == (source, chunk) && o.blocks.start <= wanted.start && wanted.end <= o.blocks.end
        };
        if let Some(flight) = under_way.iter().find(same).and_then(|o| o.answer.upgrade()) {
            return (flight, false);
        }
        let blocks = self.window(source, chunk, wanted);
        let (reader, range) = (self.reader.clone(), blocks.clone());
        let flight = async move { reader.read_stored(source, chunk, range).await.map(Arc::new).map_err(Arc::new) }
            .boxed_local()
            .shared();
        // It has not been polled yet, so it can be downgraded.
        under_way.extend(flight.downgrade().map(|answer| OnItsWay { source, chunk, blocks, answer }));
        (flight, true)
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
