//! A volume, or any base map with its chunks, written to an image.
//!
//! Invariants:
//! - Every block is checked before it is written; a damaged one ends the export.
//! - At most [`PARALLEL`] reads are under way, each of up to 1 MiB; they go on while another thread writes.
//! - Nothing in the store is changed.

use std::pin::pin;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::try_join;
use futures_util::stream::{self, Stream, StreamExt};
use serde::Serialize;

use super::admin;
use crate::chunk::reader::{ChunkReader, Keys};
use crate::error::{Error, ErrorKind, Result};
use crate::image::ImageSink;
use crate::manifest::Manifest;
use crate::manifest::images::load_image;
use crate::map::{BaseImage, Location};
use crate::store::Store;
use crate::units::{BLOCK, BlockNo};

/// Reads under way: as many bytes as 16 chunks have, in pieces, so that a map of small pieces has more of them in flight.
pub(super) const PARALLEL: usize = 64;
/// The most blocks of a read, and what reads are cut at: whole clusters of a qcow2 image.
pub(super) const PIECE: u64 = 256;

/// What is to be exported: a base map, and where its chunks are.
#[derive(Debug)]
pub struct Base {
    /// The map.
    pub map: BaseImage,
    /// Reads its chunks.
    pub reader: ChunkReader,
}

impl Base {
    /// The map that a volume's manifest names.
    ///
    /// # Errors
    /// `Corrupt` for a damaged checkpoint; the store's.
    pub async fn of(store: &Arc<dyn Store>, m: &Manifest) -> Result<Self> {
        let map = load_image(&**store, m).await?;
        Ok(Self::over(store, m, map))
    }

    /// A map of a volume that was read already.
    pub(super) fn over(store: &Arc<dyn Store>, m: &Manifest, map: BaseImage) -> Self {
        let keys = Keys::default();
        keys.set(m);
        Self { map, reader: ChunkReader::new(Arc::clone(store), Arc::new(keys)).without_log() }
    }

    /// Reads what the map places side by side, and checks it.
    pub(super) async fn read(&self, p: Piece) -> Result<Bytes> {
        let from = p.block.0 * BLOCK as u64;
        let range = |first: u64, end: u64| format!("bytes {first} to {end} of the volume cannot be exported");
        let read = self.reader.read(p.at, p.block, p.blocks).await;
        let read = read.map_err(|e| e.context(range(from, from + u64::from(p.blocks) * BLOCK as u64 - 1)))?;
        if let (Some((first, _)), Some((last, _))) = (read.bad.first(), read.bad.last()) {
            let byte = |block: usize| from + (block * BLOCK) as u64;
            let why = format!(
                "{}: damaged in chunk {} of the store; `vb-ublk volume verify` says what else is, and what to do",
                range(byte(*first), byte(last + 1) - 1),
                p.at.chunk()
            );
            return Err(Error::new(ErrorKind::Corrupt, why));
        }
        Ok(read.data)
    }

    /// Its size in bytes.
    #[must_use]
    pub const fn size_bytes(&self) -> u64 {
        self.map.volume_blocks() * BLOCK as u64
    }
}

/// How far an export is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Progress {
    /// Bytes of the volume's data that are written.
    pub bytes: u64,
    /// Of so many.
    pub of: u64,
}

/// What was exported.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Exported {
    /// The volume's size in bytes.
    pub size_bytes: u64,
    /// Bytes of it that were ever written and not discarded, in blocks of 4096.
    pub data_bytes: u64,
}

/// The manifest of a volume that nobody has attached: all of it is in the store; or of a snapshot (`VOLUME@SNAPSHOT`), as if the volume still
/// were as it was then.
///
/// # Errors
/// `Busy` when somebody has the volume attached, or a host died with it; `NotFound`, `Corrupt`, the store's.
pub async fn settled(store: &dyn Store, name: &str) -> Result<Manifest> {
    let m = admin::info(store, name).await?;
    not_attached(&m)?;
    Ok(m)
}

/// Refuses a volume of which a host may have more than the store.
pub(super) fn not_attached(m: &Manifest) -> Result<()> {
    if m.writer.is_none() {
        return Ok(());
    }
    let what = format!(
        "volume {:?} is attached by {}: export a snapshot of it, or detach it first (if that host died, attach it once more before)",
        m.name,
        m.holder()
    );
    Err(Error::new(ErrorKind::Busy, what))
}

/// Blocks side by side in the volume and in a chunk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    pub(super) block: BlockNo,
    pub(super) at: Location,
    pub(super) blocks: u16,
}

/// What is mapped, in order, in pieces that are read at once.
fn pieces(map: &BaseImage) -> impl Iterator<Item = Piece> {
    map.runs().filter_map(|r| r.to.map(|to| (r, to))).flat_map(|(r, to)| {
        let (mut next, end) = (r.block.0, r.block.0 + u64::from(r.blocks));
        std::iter::from_fn(move || {
            if next >= end {
                return None;
            }
            let stop = end.min((next / PIECE + 1) * PIECE);
            let index = to.index() + (next - r.block.0) as u16;
            let at = Location::new(to.source(), to.chunk(), index);
            let piece = Piece { block: BlockNo(next), at, blocks: (stop - next) as u16 };
            next = stop;
            Some(piece)
        })
    })
}

/// Writes what is read, one after the other; the next reads go on meanwhile.
pub(super) async fn in_order<T>(
    reads: impl Stream<Item = (T, Result<Bytes>)>,
    mut write: impl AsyncFnMut(T, Bytes) -> Result<()>,
) -> Result<()> {
    let mut reads = pin!(reads);
    let mut next = reads.next().await;
    while let Some((what, read)) = next {
        let following = async { Ok(reads.next().await) };
        (_, next) = try_join(write(what, read?), following).await?;
    }
    Ok(())
}

/// Writes all that the map has to `to`, in order; it is not finished then. Tells now and then how far it is.
///
/// # Errors
/// `Corrupt` for a damaged block, with the bytes of the volume that it is; the store's; the image's.
pub async fn export(base: &Base, to: &mut dyn ImageSink, told: &mut dyn FnMut(Progress)) -> Result<Exported> {
    let mut progress = Progress { bytes: 0, of: base.map.mapped_blocks() * BLOCK as u64 };
    let reads = stream::iter(pieces(&base.map)).map(|p| async move { (p, base.read(p).await) }).buffered(PARALLEL);
    in_order(reads, async |p: Piece, data| {
        progress.bytes += data.len() as u64;
        to.write(p.block.0 * BLOCK as u64, data).await?;
        told(progress);
        Ok(())
    })
    .await?;
    Ok(Exported { size_bytes: base.size_bytes(), data_bytes: progress.of })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::Run;
    use crate::units::ChunkNo;

    #[test]
    fn pieces_are_all_that_is_mapped_and_end_at_round_places() {
        let mut map = BaseImage::empty(4096);
        let run = |block, blocks, chunk, index| Run {
            block: BlockNo(block),
            blocks,
            to: Some(Location::new(0, ChunkNo(chunk), index)),
        };
        map.apply_runs(&[run(100, 1000, 7, 3), run(2000, 1, 8, 0), run(2001, 300, 9, 500)]);
        let mut seen = Vec::new();
        for p in pieces(&map) {
            assert!(p.blocks >= 1 && p.block.0 / PIECE == (p.block.0 + u64::from(p.blocks) - 1) / PIECE, "{p:?}");
            for i in 0..u64::from(p.blocks) {
                let at = Location::new(0, p.at.chunk(), p.at.index() + i as u16);
                assert_eq!(map.lookup(BlockNo(p.block.0 + i)), crate::map::BaseState::At(at));
                seen.push(p.block.0 + i);
            }
        }
        assert_eq!(seen, (100..1100).chain(2000..2301).collect::<Vec<_>>());
    }
}
