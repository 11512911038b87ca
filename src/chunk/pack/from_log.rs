//! What a group has in the log: taken from memory, or else read from its disk, checked, and put where it belongs in the chunks.

use std::cell::{Cell, RefCell};

use futures_util::stream::{FuturesUnordered, StreamExt};

use super::{Draft, Sources, Suspect, sector_mask};
use crate::checksum::block_crc;
use crate::chunk::header::HEADER_ROOM;
use crate::disk::{Disk, IoBuf};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{BLOCK, BlockNo, SECTOR, SECTORS_PER_BLOCK};
use crate::wal::legible::read_legible;
use crate::wal::log::Log;
use crate::wal::recent::WINDOW_BLOCKS;

/// Reads of the log are joined over gaps of up to this many blocks…
const JOIN_GAP: u32 = 4;
/// …up to this many blocks. Writers wait behind these reads in the disk's queue: with 8 MiB in flight, for milliseconds.
const JOIN_MAX: u32 = 32;
/// The thread has other things to do, too: after so many pieces from memory, of up to 128 KiB each.
const YIELD_AFTER: usize = 16;
/// Blocks of the log that go into a chunk, one behind the other.
#[derive(Clone, Copy)]
pub(super) struct Want {
    pub file_block: u32,
    pub blocks: u32,
    pub chunk: usize,
    pub index: u16,
    pub block: BlockNo,
    /// For a part of a block.
    pub part: Option<(u8, u8)>,
}

/// What is read of the log in one go.
struct Piece {
    start: u32,
    end: u32,
    wants: Vec<Want>,
}

impl Piece {
    /// If it is whole blocks of one chunk, which lie there as they do here.
    fn alike(&self) -> Option<&Want> {
        match &self.wants[..] {
            [w] if w.part.is_none() => Some(w),
            _ => None,
        }
    }

    /// The blocks that are wanted, each with its number in the want.
    fn blocks(&self) -> impl Iterator<Item = (&Want, u32)> {
        self.wants.iter().flat_map(|w| (0..w.blocks).map(move |i| (w, i)))
    }

    /// Whether `data` has all that is wanted, and all of that fits its checksums.
    fn is_good<'a>(&self, log: &Log, data: impl Fn(u32) -> Option<&'a [u8]>) -> bool {
        self.blocks().all(|(w, i)| {
            let crc = |data| block_crc(BlockNo(w.block.0 + u64::from(i)), data);
            data(w.file_block + i).is_some_and(|data| crc(data) == log.crc(w.file_block + i))
        })
    }
}

/// In log order and in large pieces, each of one window of what is kept in memory.
fn pieces(mut wants: Vec<Want>) -> Vec<Piece> {
    wants.sort_unstable_by_key(|w| w.file_block);
    let mut pieces: Vec<Piece> = Vec::new();
    for mut w in wants {
        // A run longer than one read is cut; its tail keeps its place in the order.
        loop {
            let window = w.file_block / WINDOW_BLOCKS;
            let now = w.blocks.min(JOIN_MAX).min((window + 1) * WINDOW_BLOCKS - w.file_block);
            let some = Want { blocks: now, ..w };
            let end = some.file_block + now;
            match pieces.last_mut() {
                Some(p)
                    if some.file_block <= p.end + JOIN_GAP
                        && end - p.start <= JOIN_MAX
                        && p.start / WINDOW_BLOCKS == window =>
                {
                    p.end = p.end.max(end);
                    p.wants.push(some);
                }
                _ => pieces.push(Piece { start: some.file_block, end, wants: vec![some] }),
            }
            if now == w.blocks {
                break;
            }
            w.file_block += now;
            w.index += now as u16;
            w.block.0 += u64::from(now);
            w.blocks -= now;
        }
    }
    pieces
}

/// Takes what the drafts want of the log from memory, or else from its disk, checking each block.
pub(super) async fn lay_log<D: Disk>(src: &Sources<'_, D>, drafts: &mut [Draft], wants: Vec<Want>) -> Result<()> {
    let mut left = Vec::new();
    for (n, piece) in pieces(wants).into_iter().enumerate() {
        if n % YIELD_AFTER == YIELD_AFTER - 1 {
            tokio::task::yield_now().await;
        }
        let window = src.log.recent().of(piece.start);
        match window.filter(|window| piece.is_good(src.log, |block| window.block(block))) {
            Some(window) => {
                for (w, i) in piece.blocks() {
                    if let Some(data) = window.block(w.file_block + i) {
                        place(&mut drafts[w.chunk], src.log, (w, i), data, true);
                    }
                }
            }
            None => left.push(piece),
        }
    }
    read_log(src, drafts, left).await
}

/// Reads those pieces from the disk.
async fn read_log<D: Disk>(src: &Sources<'_, D>, drafts: &mut [Draft], pieces: Vec<Piece>) -> Result<()> {
    let free: RefCell<Vec<IoBuf>> = RefCell::default();
    let (build, unproven) = (src.suspects.builds.get(), Cell::new(None));
    let (free, unproven) = (&free, &unproven);
    let read = |drafts: &[Draft], piece: Piece| {
        let buf = match piece.alike() {
            Some(w) => room_of(&drafts[w.chunk], w),
            None => free.borrow_mut().pop().unwrap_or_else(|| IoBuf::zeroed(JOIN_MAX as usize * BLOCK)),
        };
        async move {
            let at = u64::from(piece.start) * BLOCK as u64;
            // What cannot be read fits no checksum.
            let bad = read_legible(src.disk, at, &buf.slice(0..(piece.end - piece.start) as usize * BLOCK)).await;
            let bad = bad.map_err(|e| Error::io(format!("reading the log at byte {at} to pack it"), e))?;
            for byte in bad {
                if !src.suspects.is_damaged(Suspect::Log((byte / BLOCK as u64) as u32), build) {
                    unproven.set(Some(byte));
                }
            }
            Ok::<_, Error>((piece, buf))
        }
    };
    let (mut pieces, mut under_way) = (pieces.into_iter(), FuturesUnordered::new());
    let mut failed = None;
    loop {
        if failed.is_none() {
            let more = (src.log_reads)().max(1).saturating_sub(under_way.len());
            under_way.extend(pieces.by_ref().take(more).map(|p| read(drafts, p)));
        }
        // Those under way are waited for also after one that has failed: the kernel fills their memory, which is to be used again.
        let Some(done) = under_way.next().await else { break };
        let (piece, buf) = match done {
            Ok(done) => done,
            Err(e) => {
                failed.get_or_insert(e);
                continue;
            }
        };
        for (w, i) in piece.blocks() {
            let at = (w.file_block + i - piece.start) as usize * BLOCK;
            place(&mut drafts[w.chunk], src.log, (w, i), buf.bytes_in(at..at + BLOCK), false);
        }
        if piece.alike().is_none() {
            free.borrow_mut().push(buf);
        }
    }
    if let Some(e) = failed {
        return Err(e);
    }
    match unproven.get() {
        None => Ok(()),
        Some(byte) => {
            let what =
                format!("the log's disk cannot read byte {byte} of the log, which is to be packed; it is read again");
            Err(Error::new(ErrorKind::Io, what))
        }
    }
}

/// Where whole blocks go.
fn room_of(d: &Draft, w: &Want) -> IoBuf {
    let at = HEADER_ROOM + usize::from(w.index) * BLOCK;
    d.body.buf.slice(at..at + w.blocks as usize * BLOCK)
}

/// Puts a block of the log where it belongs, unless it was read to there; and checks it, unless it `is_good`.
fn place(d: &mut Draft, log: &Log, (w, i): (&Want, u32), data: &[u8], is_good: bool) {
    let file_block = w.file_block + i;
    let crc = log.crc(file_block);
    let index = usize::from(w.index) + i as usize;
    let block = BlockNo(w.block.0 + u64::from(i));
    let good = is_good || block_crc(block, data) == crc;
    if !good {
        tracing::error!(
            "the log's copy of block {block} (byte {} of the log) fails its check, or cannot be read: packed as damaged",
            u64::from(file_block) * BLOCK as u64
        );
    }
    let at = HEADER_ROOM + index * BLOCK;
    let (from, to) = w.part.unwrap_or((0, SECTORS_PER_BLOCK as u8));
    let range = usize::from(from) * SECTOR..usize::from(to) * SECTOR;
    if !std::ptr::eq(d.body.buf.as_ptr().wrapping_add(at), data.as_ptr()) {
        d.body.buf.copy_in(at + range.start, &data[range]);
    }
    let b = &mut d.blocks[index];
    if w.part.is_none() {
        b.1 = crc;
    }
    if !good {
        b.2 &= !sector_mask(from, to);
        if w.part.is_none() {
            b.1 = block_crc(block, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn want(file_block: u32, blocks: u32, index: u16) -> Want {
        Want { file_block, blocks, chunk: 0, index, block: BlockNo(1000 + u64::from(index)), part: None }
    }

    fn cut(wants: Vec<Want>) -> Vec<(u32, u32, usize)> {
        pieces(wants).iter().map(|p| (p.start, p.end, p.wants.len())).collect()
    }

    #[test]
    fn pieces_go_over_headers_and_end_with_their_window() {
        assert_eq!(cut(vec![want(40, 2, 2), want(10, 3, 5), want(14, 1, 8)]), [(10, 15, 2), (40, 42, 1)]);
        let n = WINDOW_BLOCKS;
        assert_eq!(
            cut(vec![want(n - 40, 80, 0)]),
            [(n - 40, n - 8, 1), (n - 8, n, 1), (n, n + 32, 1), (n + 32, n + 40, 1)]
        );
        assert_eq!(cut(vec![want(n - 1, 1, 0), want(n, 1, 1)]), [(n - 1, n, 1), (n, n + 1, 1)]);
        let tail = pieces(vec![want(0, 40, 3)]);
        let last = tail[1].alike().map(|w| (w.index, w.block.0, w.blocks));
        assert_eq!(last, Some((35, 1035, 8)), "a run that is cut goes on where it was");
        assert!(pieces(vec![want(0, 1, 0), want(1, 1, 1)])[0].alike().is_none());
    }
}
