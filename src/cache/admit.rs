//! What is written to the cache: pages of chunks as they were packed or fetched, those that lie side by side in one write.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures_util::future::join_all;
use futures_util::stream::{self, StreamExt};

use super::room::Slot;
use super::slot::{PAGE_BLOCKS, SLOT_BYTES, SlotHeader, parts};
use super::{Cache, Page, PageId, capacity_of, mask, page_id};
use crate::chunk::header::ChunkHeader;
use crate::disk::{Disk, IoBuf};
use crate::units::BLOCK;

/// Pages that are made ready together; if their slots are side by side it is one write, of half a MiB.
const TOGETHER: usize = 8;
/// How often that is under way.
const ADMIT_DEPTH: usize = 2;
/// Buffers that are kept for pages to come: for four chunks at once.
const SPARE: usize = 4 * ADMIT_DEPTH * TOGETHER;

/// A page that is to be written.
struct Coming {
    id: PageId,
    slot: Slot,
    present: u16,
    crcs: [u32; PAGE_BLOCKS],
    /// A whole slot's, and what of it is to be written.
    whole: IoBuf,
    buf: IoBuf,
}

impl Coming {
    /// Where it ends in the file.
    fn end(&self) -> u64 {
        self.slot.at() + self.buf.len() as u64
    }
}

impl Cache {
    /// Writes what has been read of a chunk, `data` from its stored block `from` on, page by page, but for the blocks `bad`. Best effort.
    pub async fn admit<D: Disk>(
        &self,
        disk: &D,
        source: u8,
        header: &ChunkHeader,
        from: usize,
        data: &[u8],
        bad: &[usize],
    ) {
        // A page is made ready when its turn comes.
        let pages = parts(from, data.len() / BLOCK).filter_map(|(before, n)| {
            let at = from + before;
            let lost = bad.iter().filter(|b| (before..before + n).contains(b)).map(|b| from + b);
            let present = lost.fold(mask(at % PAGE_BLOCKS, n), |m, b| m & !mask(b % PAGE_BLOCKS, 1));
            self.make_ready(source, header, at, &data[before * BLOCK..(before + n) * BLOCK], present)
        });
        let writes = stream::iter(pages).chunks(TOGETHER).map(|pages| self.write(disk, pages));
        writes.buffer_unordered(ADMIT_DEPTH).for_each(|()| async {}).await;
    }

    /// A page, or a part of one: `data` from the chunk's stored block `at` on. `None` when it is here, or there is no slot for it.
    fn make_ready(&self, source: u8, header: &ChunkHeader, at: usize, data: &[u8], present: u16) -> Option<Coming> {
        let (page, at) = (at / PAGE_BLOCKS, at % PAGE_BLOCKS);
        let id = page_id(source, header.chunk, page as u16);
        // One that has more blocks already is not replaced; of two that have some each, the newer stays.
        if present == 0 || !self.lacks(id, present) {
            return None;
        }
        let slot = self.room.take();
        let limit = self.room.limit();
        if self.fitted.swap(limit, Ordering::Relaxed) != limit {
            // Where there are fewer slots, pages have to make room for others.
            self.pages.set_capacity(capacity_of(limit));
        }
        let slot = slot?;
        let mut crcs = [0; PAGE_BLOCKS];
        for (i, crc) in crcs.iter_mut().enumerate().filter(|(i, _)| present & mask(*i, 1) != 0) {
            *crc = header.crcs[page * PAGE_BLOCKS + i];
        }
        let told = SlotHeader {
            volume: header.volume,
            chunk: header.chunk,
            epoch: header.epoch,
            nonce: header.nonce,
            page: page as u16,
            present,
            crcs,
        };
        // Header and blocks; before the first block there may be a hole, whose blocks are not here.
        let whole = self.spare().pop().unwrap_or_else(|| IoBuf::zeroed(SLOT_BYTES as usize));
        let mut buf = whole.slice(0..(1 + at) * BLOCK + data.len());
        buf.bytes_mut()[..(1 + at) * BLOCK].fill(0);
        buf.copy_in((1 + at) * BLOCK, data);
        told.encode_into(&mut buf.bytes_mut()[..BLOCK]);
        Some(Coming { id, slot, present, crcs, whole, buf })
    }

    /// Writes pages: those whose slots are side by side at once.
    async fn write<D: Disk>(&self, disk: &D, mut pages: Vec<Coming>) {
        pages.sort_unstable_by_key(|p| p.slot.at());
        let mut runs: Vec<Vec<Coming>> = Vec::new();
        for page in pages {
            match runs.last_mut() {
                Some(run) if run.last().is_some_and(|last| last.end() == page.slot.at()) => run.push(page),
                _ => runs.push(vec![page]),
            }
        }
        join_all(runs.into_iter().map(|run| self.write_run(disk, run))).await;
    }

    async fn write_run<D: Disk>(&self, disk: &D, run: Vec<Coming>) {
        let write =
            |run: &[Coming]| disk.writev_at(run[0].slot.at(), run.iter().map(|page| page.buf.clone()).collect(), false);
        if write(&run).await.is_ok() {
            run.into_iter().for_each(|page| self.written(page));
            return;
        }
        // One of them may lie where nothing can be written: each alone.
        for page in run {
            match write(std::slice::from_ref(&page)).await {
                Ok(()) => self.written(page),
                Err(e) => self.not_written(page, &e),
            }
        }
    }

    fn written(&self, page: Coming) {
        let Coming { id, slot, present, crcs, whole, buf } = page;
        self.counts.written_bytes.fetch_add(buf.len() as u64, Ordering::Relaxed);
        self.put_back(whole);
        // Another may have come meanwhile.
        if self.lacks(id, present) {
            self.pages.insert(id, Arc::new(Page { slot, present, crcs }));
        }
    }

    fn not_written(&self, page: Coming, why: &std::io::Error) {
        page.slot.fail();
        self.put_back(page.whole);
        if self.counts.failed_writes.fetch_add(1, Ordering::Relaxed) == 0 {
            tracing::warn!(
                "writing to the cache {} failed: {why}; what is not in it is read from the store (nothing is lost)",
                self.file.path().display()
            );
        }
    }

    fn put_back(&self, whole: IoBuf) {
        let mut spare = self.spare();
        if spare.len() < SPARE {
            spare.push(whole);
        }
    }
}
