//! What each request does to the engine.

use std::ops::Range;
use std::rc::Rc;

use futures_util::stream::{self, StreamExt};

use super::{Served, Session};
use crate::disk::IoBuf;
use crate::frontend::nbd::handshake::Dialect;
use crate::frontend::nbd::memory::Lease;
use crate::frontend::nbd::transport::Transport;
use crate::frontend::nbd::wire::{self, Request};
use crate::units::{BLOCK, Lba, SECTOR};
use crate::volume::engine::{Engine, Extent, IoFault};

/// A hole in an answer to READ is worth a chunk of its own from so many bytes.
const WORTH_A_HOLE: u64 = BLOCK as u64;
/// A long read goes to the engine in pieces of so many bytes, so many at once.
const STEP: usize = 1 << 20;
const STEPS: usize = 4;
/// The most extents in an answer to `BLOCK_STATUS`.
const MAX_EXTENTS: usize = 2048;
/// The most bytes that `BLOCK_STATUS` looks at, and how many at a time: it holds up the lane.
const MAX_LOOK: u64 = 8 << 30;
const LOOK: u64 = 64 << 20;

pub(super) const SECTOR_BYTES: u64 = SECTOR as u64;

pub(super) const fn sectors_around(range: &Range<u64>) -> Range<u64> {
    range.start / SECTOR_BYTES..range.end.div_ceil(SECTOR_BYTES)
}

pub(super) const fn is_whole(range: &Range<u64>) -> bool {
    range.start.is_multiple_of(SECTOR_BYTES) && range.end.is_multiple_of(SECTOR_BYTES)
}

pub(super) const fn count(sectors: &Range<u64>) -> u64 {
    sectors.end - sectors.start
}

impl<T: Transport, E: Engine> Session<T, E> {
    pub(super) async fn write(&self, range: &Range<u64>, fua: bool, data: Lease) -> Result<(), IoFault> {
        let Served { engine, guard, .. } = &self.served;
        let sectors = sectors_around(range);
        if is_whole(range) {
            let _pass = self.turn(guard.shared(sectors.clone())).await;
            return engine.write(Lba(sectors.start), data.all(), fua).await;
        }
        let _pass = self.turn(guard.exclusive(sectors.clone())).await;
        let (all, old) = (data.all(), IoBuf::zeroed(SECTOR));
        let (head, tail) = ((range.start % SECTOR_BYTES) as usize, (range.end % SECTOR_BYTES) as usize);
        if head > 0 {
            engine.read(Lba(sectors.start), old.clone()).await?;
            all.copy_in(0, &old.bytes()[..head]);
        }
        if tail > 0 {
            engine.read(Lba(sectors.end - 1), old.clone()).await?;
            all.copy_in(all.len() - SECTOR + tail, &old.bytes()[tail..]);
        }
        engine.write(Lba(sectors.start), all, fua).await
    }

    pub(super) async fn trim(&self, range: &Range<u64>, fua: bool) -> Result<(), IoFault> {
        // What is not a whole sector stays: a trim is a hint.
        let whole = range.start.div_ceil(SECTOR_BYTES)..range.end / SECTOR_BYTES;
        if whole.is_empty() {
            return Ok(());
        }
        let _pass = self.turn(self.served.guard.shared(whole.clone())).await;
        self.served.engine.discard(Lba(whole.start), count(&whole), fua).await
    }

    pub(super) async fn write_zeroes(&self, range: &Range<u64>, fua: bool) -> Result<(), IoFault> {
        let Served { engine, guard, .. } = &self.served;
        let sectors = sectors_around(range);
        if is_whole(range) {
            let _pass = self.turn(guard.shared(sectors.clone())).await;
            return engine.write_zeroes(Lba(sectors.start), count(&sectors), fua).await;
        }
        let _pass = self.turn(guard.exclusive(sectors.clone())).await;
        let whole = range.start.div_ceil(SECTOR_BYTES)..range.end / SECTOR_BYTES;
        let edges = [sectors.start, sectors.end - 1];
        for sector in &edges[..if edges[0] == edges[1] { 1 } else { 2 }] {
            if whole.contains(sector) {
                continue;
            }
            let base = sector * SECTOR_BYTES;
            let from = range.start.max(base) - base;
            let to = range.end.min(base + SECTOR_BYTES) - base;
            let buf = IoBuf::zeroed(SECTOR);
            engine.read(Lba(*sector), buf.clone()).await?;
            buf.zero(from as usize..to as usize);
            engine.write(Lba(*sector), buf, fua).await?;
        }
        if whole.is_empty() {
            return Ok(());
        }
        engine.write_zeroes(Lba(whole.start), count(&whole), fua).await
    }

    pub(super) async fn read(&self, request: &Request, range: Range<u64>, one_chunk: bool) -> Result<(), IoFault> {
        let engine = &self.served.engine;
        let sectors = sectors_around(&range);
        let len = (range.end - range.start) as u32;
        let chunked = self.served.dialect != Dialect::Simple;
        let mut extents = Vec::new();
        if chunked {
            engine.extents(Lba(sectors.start), count(&sectors), &mut extents)?;
            if extents.iter().all(|e| e.hole) {
                self.reply(|heads| self.chunks(request).hole(heads, true, range.start, len));
                return Ok(());
            }
        }
        // While it waits for memory the client may leave, with gigabytes asked for: nobody else shall wait for those.
        let wanted = || !self.broken.get() && !self.hung_up.get();
        let len = count(&sectors) as usize * SECTOR;
        let lease = Rc::new(self.memory.lease_if(&self.account, len, wanted).await.ok_or(IoFault::Gone)?);
        self.read_in_steps(sectors.start, &lease.all()).await?;
        let first = sectors.start * SECTOR_BYTES;
        let part = |r: &Range<u64>| lease.slice((r.start - first) as usize..(r.end - first) as usize);
        if !chunked {
            self.answer(&lease, |heads, data| {
                wire::simple_reply(heads, 0, request.cookie);
                data(heads.len(), part(&range));
            });
            return Ok(());
        }
        let parts = if one_chunk { vec![(range.clone(), false)] } else { cut(&extents, first, &range) };
        let chunks = self.chunks(request);
        self.answer(&lease, |heads, data| {
            for (i, (r, hole)) in parts.iter().enumerate() {
                let (done, len) = (i + 1 == parts.len(), (r.end - r.start) as u32);
                if *hole {
                    chunks.hole(heads, done, r.start, len);
                } else {
                    chunks.data(heads, done, r.start, len);
                    data(heads.len(), part(r));
                }
            }
        });
        Ok(())
    }

    /// So that others of the lane have turns between.
    async fn read_in_steps(&self, from: u64, to: &IoBuf) -> Result<(), IoFault> {
        if to.len() <= STEP {
            return self.served.engine.read(Lba(from), to.clone()).await;
        }
        let steps = (0..to.len()).step_by(STEP).map(|at| {
            let part = to.slice(at..(at + STEP).min(to.len()));
            self.served.engine.read(Lba(from + (at / SECTOR) as u64), part)
        });
        // All of them, whatever becomes of one: a read that is under way owns its part of the buffer.
        let both = |all: Result<(), IoFault>, one| async move { all.and(one) };
        stream::iter(steps).buffer_unordered(STEPS).fold(Ok(()), both).await
    }

    pub(super) async fn block_status(&self, request: &Request, range: &Range<u64>, one: bool) -> Result<(), IoFault> {
        let sectors = sectors_around(range);
        let end = sectors.end.min(sectors.start + MAX_LOOK / SECTOR_BYTES);
        // One at a time, and not while its answers pile up.
        self.may_look.until(|| !self.looking.get() && self.outgoing.borrow().is_small()).await;
        let _looking = Looking::new(self);
        let mut found: Vec<Extent> = Vec::new();
        let mut at = sectors.start;
        while at < end && found.len() < if one { 2 } else { MAX_EXTENTS } {
            if at > sectors.start {
                self.beside.rest().await;
            }
            let step = (end - at).min(LOOK / SECTOR_BYTES);
            let before = found.len();
            self.served.engine.extents(Lba(at), step, &mut found)?;
            at += step;
            // What goes on over the step's border is one extent.
            if before > 0
                && let Some(next) = found.get(before).copied()
                && found[before - 1].hole == next.hole
            {
                found[before - 1].sectors += next.sectors;
                found.remove(before);
            }
        }
        found.truncate(if one { 1 } else { MAX_EXTENTS });
        let mut extents = Vec::with_capacity(found.len());
        let mut from = sectors.start * SECTOR_BYTES;
        for e in found {
            let to = from + e.sectors * SECTOR_BYTES;
            let clipped = from.max(range.start)..to.min(range.end);
            if !clipped.is_empty() {
                extents.push((clipped.end - clipped.start, e.hole));
            }
            from = to;
        }
        self.reply(|heads| self.chunks(request).block_status(heads, &extents));
        Ok(())
    }
}

/// The session looks for extents; until dropped.
struct Looking<'a, T, E>(&'a Session<T, E>);

impl<'a, T, E> Looking<'a, T, E> {
    fn new(session: &'a Session<T, E>) -> Self {
        session.looking.set(true);
        Self(session)
    }
}

impl<T, E> Drop for Looking<'_, T, E> {
    fn drop(&mut self) {
        self.0.looking.set(false);
        self.0.may_look.tell();
    }
}

/// The bytes of `range`, cut where holes begin and end that are worth it. `first` is where the extents begin.
fn cut(extents: &[Extent], first: u64, range: &Range<u64>) -> Vec<(Range<u64>, bool)> {
    let mut parts: Vec<(Range<u64>, bool)> = Vec::new();
    let mut from = first;
    for e in extents {
        let to = from + e.sectors * SECTOR_BYTES;
        let here = from.max(range.start)..to.min(range.end);
        from = to;
        if here.is_empty() {
            continue;
        }
        let hole = e.hole && here.end - here.start >= WORTH_A_HOLE;
        match parts.last_mut() {
            Some((last, kind)) if *kind == hole => last.end = here.end,
            _ => parts.push((here, hole)),
        }
    }
    parts
}
