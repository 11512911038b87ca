//! The volume as one lane sees it: requests in, answers out. Nothing here waits on the store but reads of what is
//! only there.
//!
//! Invariants:
//! - A write is answered when the frontier has passed its record; with FUA, when a sync that began after that has
//!   ended (or its record was written with RWF_DSYNC over a durable log).
//! - A flush covers what the frontier had passed when it was issued, on whichever lane.
//! - Where flushes go to the store, they and writes with FUA are answered after a barrier that began when the log was durable.
//! - What a read returns has passed its check: checksum and address.
//! - With a limit on waiting, what waits longer for the store, or for room that uploads would make, fails; a write that
//!   failed so has no place in the log. What is on its way to the log's disk is waited for in any case.

use std::cell::RefCell;
use std::future::Future;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{Either, join_all, select};

use super::Volume;
use super::counts::{Kind, LaneCounter};
use super::engine::{Engine, Extent, IoFault};
use crate::cache::ahead::Streams;
use crate::cache::slot::{PAGE_BLOCKS, parts};
use crate::cache::{Cache, Page};
use crate::checksum::block_crc;
use crate::chunk::reader::{Blocks, sectors_good};
use crate::config::FlushTo;
use crate::disk::{Disk, IoBuf};
use crate::map::{Location, LogBlock, Piece, PinLog, Source};
use crate::time::Timer;
use crate::units::{BLOCK, BlockNo, Lba, SECTOR, SECTORS_PER_BLOCK};
use crate::wal::appender::{Appender, NotLogged};
use crate::wal::codec::{LogPos, RecordKind};
use crate::wal::log::Log;

/// A write is logged in entries of at most this many bytes.
const MAX_ENTRY_BYTES: usize = 1 << 20;
/// A discard or zeroing is logged in entries of at most this many sectors (1 GiB): what applies one holds up all lanes.
const MAX_HOLE_SECTORS: u64 = (1 << 30) / SECTOR as u64;
/// Between two looks for writes that have waited too long for room.
const LOOK_FOR_EXPIRED: Duration = Duration::from_millis(100);

/// See the module's page.
pub struct VolumeLane<D: Disk, T: Timer> {
    volume: Arc<Volume>,
    appender: Rc<Appender<D>>,
    /// The volume's cache, and the lane's own descriptor of its file.
    cache: Option<(Arc<Cache>, D)>,
    timer: T,
    streams: RefCell<Streams>,
    spare: RefCell<Vec<Vec<Piece>>>,
    counter: LaneCounter,
}

/// Pins log slots under the map's lock; each pin is given back by the [`Pin`] of its piece.
struct Pinner<'a>(&'a Log);

/// For lookups that look at kinds alone: nothing is read, so nothing has to stay.
pub(super) struct Unpinned;

impl PinLog for Unpinned {
    fn pin(&self, _: LogBlock) {}
}

impl PinLog for Pinner<'_> {
    fn pin(&self, blk: LogBlock) {
        self.0.pin(blk.0);
    }
}

struct Pin<'a> {
    log: &'a Log,
    block: u32,
}

/// Gives back the pins of pieces that are not read after all.
fn unpin(log: &Log, pieces: &[Piece]) {
    for p in pieces {
        if let Source::Log { blk, .. } = p.what {
            log.unpin(blk.0);
        }
    }
}

/// Bytes of the first block before `lba`.
const fn skip_of(lba: Lba) -> usize {
    (lba.0 % SECTORS_PER_BLOCK) as usize * SECTOR
}

/// How many blocks a part of the volume touches.
const fn blocks_of(lba: Lba, dst: &IoBuf) -> usize {
    (skip_of(lba) + dst.len()).div_ceil(BLOCK)
}

/// Where the blocks that `dst` touches are read to: in place, if it is made of whole ones.
fn whole_blocks(lba: Lba, dst: &IoBuf) -> IoBuf {
    if skip_of(lba) == 0 && dst.is_aligned(BLOCK) { dst.clone() } else { IoBuf::zeroed(blocks_of(lba, dst) * BLOCK) }
}

/// Copies what was asked for out of [`whole_blocks`], unless it is there.
fn hand_over(lba: Lba, read: &IoBuf, dst: &IoBuf) {
    if read.as_ptr() != dst.as_ptr() {
        let skip = skip_of(lba);
        dst.copy_in(0, &read.bytes()[skip..skip + dst.len()]);
    }
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        self.log.unpin(self.block);
    }
}

impl<D: Disk, T: Timer> VolumeLane<D, T> {
    /// A lane of `volume`; `disk` is the lane's own descriptor of the volume's log, `of_cache` that of its cache.
    pub fn new(volume: Arc<Volume>, disk: D, of_cache: Option<D>, timer: T) -> Rc<Self> {
        let appender = Rc::new(Appender::new(volume.log.clone(), disk));
        let counter = volume.counter();
        let cache = volume.cache().cloned().zip(of_cache);
        Rc::new(Self {
            volume,
            appender,
            cache,
            timer,
            streams: RefCell::default(),
            spare: RefCell::default(),
            counter,
        })
    }

    fn check(&self, lba: Lba, sectors: u64) -> Result<(), IoFault> {
        let end = lba.0.checked_add(sectors).ok_or(IoFault::BadRange)?;
        if sectors == 0 || end > self.volume.sectors() {
            return Err(IoFault::BadRange);
        }
        if self.volume.is_gone() { Err(IoFault::Gone) } else { Ok(()) }
    }

    fn check_write(&self, lba: Lba, sectors: u64) -> Result<(), IoFault> {
        if self.volume.read_only() {
            return Err(IoFault::ReadOnly);
        }
        self.check(lba, sectors)
    }

    fn fault(&self, why: impl Into<NotLogged>) -> IoFault {
        match why.into() {
            _ if self.volume.is_gone() => IoFault::Gone,
            NotLogged::Failed => IoFault::Io,
            NotLogged::Expired => self.timed_out(),
        }
    }

    fn timed_out(&self) -> IoFault {
        self.volume.count_timeout();
        IoFault::TimedOut
    }

    /// Since when a request waits; of use only where there is a limit.
    fn since(&self) -> Duration {
        if self.volume.io_timeout.is_some() { self.timer.now() } else { Duration::ZERO }
    }

    /// Waits as long as the log's fill and the uploads' pace ask for.
    async fn pace(&self, bytes: u64, since: Duration) -> Result<(), IoFault> {
        let throttle = &self.volume.throttle;
        let Some(turn) = throttle.queue(bytes) else { return Ok(()) };
        loop {
            let now = self.timer.now();
            match throttle.wait(turn, now) {
                _ if self.volume.is_gone() => return Ok(()),
                None => return Ok(()),
                Some(_) if self.volume.io_timeout.is_some_and(|limit| now.saturating_sub(since) >= limit) => {
                    return Err(self.timed_out());
                }
                Some(wait) => self.timer.sleep(wait).await,
            }
        }
    }

    /// What waits for the store, for as long as the user allows.
    async fn within<O>(&self, answer: impl Future<Output = Result<O, IoFault>>) -> Result<O, IoFault> {
        let Some(limit) = self.volume.io_timeout else { return answer.await };
        match select(std::pin::pin!(answer), std::pin::pin!(self.timer.sleep(limit))).await {
            Either::Left((answer, _)) => answer,
            Either::Right(_) => Err(self.timed_out()),
        }
    }

    /// Gives up what waits too long for room in the log, for ever.
    async fn expire(self: Rc<Self>, limit: Duration) {
        loop {
            self.appender.stalled().await;
            self.timer.sleep(LOOK_FOR_EXPIRED).await;
            self.appender.expire(self.timer.now().saturating_sub(limit));
        }
    }

    async fn settle(&self, end: LogPos, fua: bool) -> Result<(), IoFault> {
        if fua {
            self.volume.log.sync_through(end, self.appender.disk()).await.map_err(|e| self.fault(e))?;
            if self.volume.flush_to == FlushTo::Store {
                self.within(self.volume.barrier()).await?;
            }
        }
        // A write that ends after the volume was lost is not acknowledged.
        if self.volume.is_gone() { Err(IoFault::Gone) } else { Ok(()) }
    }

    async fn hole(&self, lba: Lba, sectors: u64, kind: RecordKind, fua: bool) -> Result<(), IoFault> {
        self.check_write(lba, sectors)?;
        let (mut from, past) = (lba.0, lba.0 + sectors);
        let since = self.since();
        let mut end = LogPos::default();
        while from < past {
            let n = (past - from).min(MAX_HOLE_SECTORS);
            // Holes carry no data but take entries, memory and packing: a block's worth of pacing each.
            self.pace(BLOCK as u64, since).await?;
            end = self.appender.push_hole(Lba(from), n, kind, fua, since).await.map_err(|e| self.fault(e))?;
            from += n;
        }
        self.settle(end, fua).await
    }

    async fn piece(&self, p: Piece, dst: IoBuf) -> Result<(), IoFault> {
        match p.what {
            Source::Zero => {
                dst.zero(0..dst.len());
                Ok(())
            }
            Source::Log { blk, .. } => {
                // Given back as soon as this piece is read: a slow neighbour must not hold the log's room.
                let _pin = Pin { log: &self.volume.log, block: blk.0 };
                self.read_log(p.lba, blk, dst).await
            }
            Source::Chunk(at) | Source::Damaged(at) => self.read_stored(p.lba, at, dst).await,
        }
    }

    async fn read_log(&self, lba: Lba, blk: LogBlock, dst: IoBuf) -> Result<(), IoFault> {
        let log = &self.volume.log;
        let at = u64::from(blk.0) * BLOCK as u64;
        let mut buf = whole_blocks(lba, &dst);
        if let Err(e) = self.appender.disk().read_at(at, buf.clone()).await {
            tracing::error!("reading the log at byte {at} for block {} failed: {e}", lba.block());
            return Err(IoFault::Io);
        }
        for (i, data) in buf.bytes_mut().chunks_exact(BLOCK).enumerate() {
            let block = BlockNo(lba.block().0 + i as u64);
            if block_crc(block, data) != log.crc(blk.0 + i as u32) {
                tracing::error!(
                    "block {block} (byte {} of the volume) fails its check in the log at byte {}",
                    block.0 * BLOCK as u64,
                    at + (i * BLOCK) as u64
                );
                return Err(IoFault::Io);
            }
        }
        hand_over(lba, &buf, &dst);
        Ok(())
    }

    /// The chunk is not in the store: garbage collection may have put its blocks elsewhere since they were looked up.
    async fn read_moved(&self, lba: Lba, at: Location, dst: IoBuf) -> Result<(), IoFault> {
        let mut pieces = Vec::new();
        let sectors = (dst.len() / SECTOR) as u64;
        self.volume.maps.lookup(lba, sectors, &Pinner(&self.volume.log), &mut pieces);
        if pieces
            .iter()
            .any(|p| matches!(p.what, Source::Chunk(now) | Source::Damaged(now) if (now.source(), now.chunk()) == (at.source(), at.chunk())))
        {
            tracing::error!("block {} lies in chunk {}, which is not in the store", lba.block(), at.chunk());
            unpin(&self.volume.log, &pieces);
            return Err(IoFault::Io);
        }
        // Each time round the map has changed: it comes to an end.
        Box::pin(self.pieces(lba, &pieces, &dst)).await
    }

    /// Reads all pieces of a range, which are pinned.
    async fn pieces(&self, lba: Lba, pieces: &[Piece], dst: &IoBuf) -> Result<(), IoFault> {
        let part = |p: &Piece| {
            let from = (p.lba.0 - lba.0) as usize * SECTOR;
            dst.slice(from..from + p.sectors as usize * SECTOR)
        };
        match pieces {
            [one] => self.piece(*one, dst.clone()).await,
            // All of them, whatever becomes of one: a piece that is still being read owns its part of the buffer.
            many => join_all(many.iter().map(|p| self.piece(*p, part(p)))).await.into_iter().collect(),
        }
    }

    /// What is in chunks: page by page from the cache, the rest from the store, all at once.
    async fn read_stored(&self, lba: Lba, at: Location, dst: IoBuf) -> Result<(), IoFault> {
        let Some((cache, disk)) = &self.cache else { return self.read_remote(lba, at, dst).await };
        let blocks = blocks_of(lba, &dst);
        if usize::from(at.index()) % PAGE_BLOCKS + blocks <= PAGE_BLOCKS {
            return match cache.find(at, blocks) {
                Some(page) => self.read_cached(cache, disk, &page, lba, at, dst).await,
                None => self.read_remote(lba, at, dst).await,
            };
        }
        let mut found: Vec<(usize, usize, Option<Arc<Page>>)> = Vec::new();
        for (from, n) in parts(at.index().into(), blocks) {
            match (cache.find(at.plus(from as u16), n), found.last_mut()) {
                (None, Some((_, missing, None))) => *missing += n,
                (page, _) => found.push((from, n, page)),
            }
        }
        let skip = skip_of(lba);
        let reads = found.iter().map(|(from, n, page)| {
            // The first part may begin inside its block, and the last one end inside its own.
            let bytes = (from * BLOCK).saturating_sub(skip)..((from + n) * BLOCK - skip).min(dst.len());
            let lba = Lba(lba.0 + (bytes.start / SECTOR) as u64);
            let (at, part) = (at.plus(*from as u16), dst.slice(bytes));
            async move {
                match page {
                    Some(page) => self.read_cached(cache, disk, page, lba, at, part).await,
                    None => self.read_remote(lba, at, part).await,
                }
            }
        });
        // All of them, whatever becomes of one: a part that is still being read owns its part of the buffer.
        join_all(reads).await.into_iter().collect()
    }

    async fn read_cached(
        &self,
        cache: &Cache,
        disk: &D,
        page: &Page,
        lba: Lba,
        at: Location,
        dst: IoBuf,
    ) -> Result<(), IoFault> {
        let buf = whole_blocks(lba, &dst);
        if cache.read(disk, page, at, lba.block(), buf.clone()).await.is_none() {
            return self.read_remote(lba, at, dst).await;
        }
        hand_over(lba, &buf, &dst);
        Ok(())
    }

    async fn read_remote(&self, lba: Lba, at: Location, dst: IoBuf) -> Result<(), IoFault> {
        let first = lba.0 % SECTORS_PER_BLOCK;
        let sectors = (dst.len() / SECTOR) as u64;
        let blocks = blocks_of(lba, &dst);
        if let Some((cache, _)) = &self.cache {
            cache.missed(dst.len() as u64);
        }
        let read = self.within(self.volume.read_chunk(at, lba.block(), blocks as u16)).await?;
        let Some(Blocks { data, bad }) = read else { return self.read_moved(lba, at, dst).await };
        for (i, mask) in bad {
            let start = (i as u64 * SECTORS_PER_BLOCK).max(first);
            let end = ((i as u64 + 1) * SECTORS_PER_BLOCK).min(first + sectors);
            let base = i as u64 * SECTORS_PER_BLOCK;
            if !sectors_good(mask, start - base, end - base) {
                tracing::error!("block {} is damaged and cannot be read", lba.block().0 + i as u64);
                return Err(IoFault::Io);
            }
        }
        let skip = skip_of(lba);
        dst.copy_in(0, &data[skip..skip + dst.len()]);
        Ok(())
    }

    /// Has fetched what a stream of reads will ask for next, as far as it is in chunks alone.
    fn fetch_ahead(&self, cache: &Cache, sectors: Range<u64>) {
        let end = sectors.end.min(self.volume.sectors());
        if sectors.start >= end || !self.volume.is_confirmed() {
            return;
        }
        let mut pieces = self.spare.borrow_mut().pop().unwrap_or_default();
        let (lba, sectors) = (Lba(sectors.start), end - sectors.start);
        self.volume.not_here(cache, lba, sectors, &mut pieces, |at, blocks| self.volume.fetch_ahead(at, blocks));
        self.spare.borrow_mut().push(pieces);
    }

    async fn read_range(&self, lba: Lba, dst: IoBuf) -> Result<(), IoFault> {
        let sectors = (dst.len() / SECTOR) as u64;
        self.check(lba, sectors)?;
        if !self.volume.is_confirmed() && !self.volume.maps.overlay_covers(lba, sectors) {
            self.within(self.volume.until_confirmed()).await?;
        }
        if let Some((cache, _)) = &self.cache {
            let ahead = self.streams.borrow_mut().read(lba.0..lba.0 + sectors, cache.most_ahead());
            if let Some(ahead) = ahead {
                self.fetch_ahead(cache, ahead);
            }
        }
        let mut pieces = self.spare.borrow_mut().pop().unwrap_or_default();
        self.volume.maps.lookup(lba, sectors, &Pinner(&self.volume.log), &mut pieces);
        if let Some(boot) = self.volume.boot() {
            boot.read(&pieces, || self.timer.now());
        }
        let result = self.pieces(lba, &pieces, &dst).await;
        pieces.clear();
        self.spare.borrow_mut().push(pieces);
        result
    }

    async fn log_data(&self, lba: Lba, src: IoBuf, fua: bool) -> Result<(), IoFault> {
        self.check_write(lba, (src.len() / SECTOR) as u64)?;
        let since = self.since();
        self.pace(src.len() as u64, since).await?;
        let end = if src.len() <= MAX_ENTRY_BYTES {
            self.appender.push_data(lba, &src, fua, since).await
        } else {
            let cut = |from: usize| src.slice(from..(from + MAX_ENTRY_BYTES).min(src.len()));
            let tickets = (0..src.len())
                .step_by(MAX_ENTRY_BYTES)
                .map(|from| self.appender.push_data(Lba(lba.0 + (from / SECTOR) as u64), &cut(from), fua, since));
            let ends: Result<Vec<LogPos>, NotLogged> = join_all(tickets).await.into_iter().collect();
            ends.map(|ends| ends.into_iter().max().unwrap_or_default())
        };
        let end = end.map_err(|e| self.fault(e))?;
        self.settle(end, fua).await
    }

    async fn sync_log(&self) -> Result<(), IoFault> {
        if self.volume.is_gone() {
            return Err(IoFault::Gone);
        }
        let log = &self.volume.log;
        if log.failure().is_some() {
            return Err(IoFault::Io);
        }
        self.settle(log.flush_target(), true).await
    }

    fn counted(&self, kind: Kind, bytes: u64, done: Result<(), IoFault>) -> Result<(), IoFault> {
        self.counter.count(kind, bytes, done.is_ok());
        done
    }
}

impl<D: Disk, T: Timer> Engine for VolumeLane<D, T> {
    async fn read(&self, lba: Lba, dst: IoBuf) -> Result<(), IoFault> {
        let bytes = dst.len() as u64;
        self.counted(Kind::Read, bytes, self.read_range(lba, dst).await)
    }

    async fn write(&self, lba: Lba, src: IoBuf, fua: bool) -> Result<(), IoFault> {
        let bytes = src.len() as u64;
        self.counted(Kind::Write, bytes, self.log_data(lba, src, fua).await)
    }

    async fn flush(&self) -> Result<(), IoFault> {
        self.counted(Kind::Flush, 0, self.sync_log().await)
    }

    async fn discard(&self, lba: Lba, sectors: u64, fua: bool) -> Result<(), IoFault> {
        let done = self.hole(lba, sectors, RecordKind::Discard, fua).await;
        self.counted(Kind::Discard, sectors.saturating_mul(SECTOR as u64), done)
    }

    async fn write_zeroes(&self, lba: Lba, sectors: u64, fua: bool) -> Result<(), IoFault> {
        let done = self.hole(lba, sectors, RecordKind::Zeroes, fua).await;
        self.counted(Kind::WriteZeroes, sectors.saturating_mul(SECTOR as u64), done)
    }

    fn extents(&self, lba: Lba, sectors: u64, out: &mut Vec<Extent>) -> Result<(), IoFault> {
        self.check(lba, sectors)?;
        if !self.volume.is_confirmed() {
            // Nobody knows yet; to read it is right in any case.
            out.push(Extent { sectors, hole: false });
            return Ok(());
        }
        let mut pieces = self.spare.borrow_mut().pop().unwrap_or_default();
        self.volume.maps.lookup(lba, sectors, &Unpinned, &mut pieces);
        let first = out.len();
        for p in pieces.drain(..) {
            let (sectors, hole) = (u64::from(p.sectors), p.what == Source::Zero);
            match out[first..].last_mut() {
                Some(last) if last.hole == hole => last.sectors += sectors,
                _ => out.push(Extent { sectors, hole }),
            }
        }
        self.spare.borrow_mut().push(pieces);
        Ok(())
    }

    fn seal(&self) {
        self.appender.seal();
    }

    fn tasks(self: Rc<Self>) -> Vec<std::pin::Pin<Box<dyn Future<Output = ()>>>> {
        let mut tasks = self.appender.clone().tasks();
        if let Some(limit) = self.volume.io_timeout {
            tasks.push(Box::pin(self.expire(limit)));
        }
        tasks
    }
}
