//! What has changed since a snapshot, written to an image that lies over one of the snapshot.
//!
//! Invariants:
//! - A cluster is written whole, as the later state has it, or left to the image below. So that image is read for nothing else.
//! - A cluster that was changed and has no data any more is told to be zeros: it must hide what is below.
//! - Every block is checked before it is written, as in [`super::export`]. At most [`PARALLEL`] reads are under way.

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use serde::Serialize;

use super::diff::Diff;
use super::export::{Base, PARALLEL, PIECE, Piece, Progress, in_order};
use crate::error::Result;
use crate::image::{CLUSTER, ImageSink};
use crate::map::{BaseImage, Change};
use crate::units::{BLOCK, BlockNo};

/// Blocks of a cluster.
const CLUSTER_BLOCKS: u64 = CLUSTER / BLOCK as u64;
// So that a piece has whole clusters.
const _: () = assert!(PIECE.is_multiple_of(CLUSTER_BLOCKS));

/// What was written of an increment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Increment {
    /// The volume's size in bytes.
    pub size_bytes: u64,
    /// Bytes that were written: whole clusters.
    pub data_bytes: u64,
    /// Bytes that were told to be zeros.
    pub zero_bytes: u64,
}

/// Whole clusters, but for the end of the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stretch {
    block: u64,
    blocks: u64,
    data: bool,
}

/// The clusters that changes touch: first one and the one after the last, in order, with room between them.
fn touched(changes: impl Iterator<Item = Change>) -> impl Iterator<Item = (u64, u64)> {
    let mut all = changes.map(|c| (c.block.0 / CLUSTER_BLOCKS, c.end().div_ceil(CLUSTER_BLOCKS)));
    let mut next = all.next();
    std::iter::from_fn(move || {
        let (first, mut end) = next.take()?;
        for (a, b) in all.by_ref() {
            if a > end {
                next = Some((a, b));
                break;
            }
            end = b.max(end);
        }
        Some((first, end))
    })
}

/// What is to be written, in order: data in pieces that are read at once.
fn stretches(changes: impl Iterator<Item = Change>, to: &BaseImage) -> impl Iterator<Item = Stretch> {
    touched(changes).flat_map(move |(mut next, end)| {
        std::iter::from_fn(move || {
            let has_data = |c: u64| {
                let block = c * CLUSTER_BLOCKS;
                !to.runs_of(BlockNo(block), CLUSTER_BLOCKS).is_empty()
            };
            let first = next;
            if first >= end {
                return None;
            }
            let data = has_data(first);
            let piece = if data { (first * CLUSTER_BLOCKS / PIECE + 1) * PIECE / CLUSTER_BLOCKS } else { end };
            next += 1;
            while next < end.min(piece) && has_data(next) == data {
                next += 1;
            }
            let (block, stop) = (first * CLUSTER_BLOCKS, (next * CLUSTER_BLOCKS).min(to.volume_blocks()));
            Some(Stretch { block, blocks: stop - block, data })
        })
    })
}

/// What a stretch holds, zeros and all.
async fn read(base: &Base, s: Stretch) -> Result<Bytes> {
    if !s.data {
        return Ok(Bytes::new());
    }
    let mut all = vec![0; s.blocks as usize * BLOCK];
    for r in base.map.runs_of(BlockNo(s.block), s.blocks) {
        let Some(at) = r.to else { continue };
        let data = base.read(Piece { block: r.block, at, blocks: r.blocks as u16 }).await?;
        let from = (r.block.0 - s.block) as usize * BLOCK;
        all[from..from + data.len()].copy_from_slice(&data);
    }
    Ok(all.into())
}

/// Writes what has changed to `to`, in order; it is not finished then. Tells now and then how far it is.
///
/// # Errors
/// `Corrupt` for a damaged block, with the bytes of the volume that it is; the store's; the image's.
pub async fn export(diff: &Diff, to: &mut dyn ImageSink, told: &mut dyn FnMut(Progress)) -> Result<Increment> {
    let base = diff.base();
    let all = || stretches(diff.changes(), &base.map);
    let mut done = Increment { size_bytes: base.size_bytes(), data_bytes: 0, zero_bytes: 0 };
    for s in all() {
        *if s.data { &mut done.data_bytes } else { &mut done.zero_bytes } += s.blocks * BLOCK as u64;
    }
    let mut progress = Progress { bytes: 0, of: done.data_bytes };
    let reads = stream::iter(all()).map(|s| async move { (s, read(base, s).await) }).buffered(PARALLEL);
    in_order(reads, async |s: Stretch, data: Bytes| {
        let at = s.block * BLOCK as u64;
        progress.bytes += data.len() as u64;
        if s.data {
            to.write(at, data).await?;
        } else {
            to.write_zeros(at, s.blocks * BLOCK as u64).await?;
        }
        told(progress);
        Ok(())
    })
    .await?;
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::{ChangeKind, Location, Run};
    use crate::units::ChunkNo;

    fn change(block: u64, blocks: u64, kind: ChangeKind) -> Change {
        Change { block: BlockNo(block), blocks, kind }
    }

    #[test]
    fn clusters_are_whole_and_told_once() {
        let mut map = BaseImage::empty(1000);
        let run = |block, blocks| Run { block: BlockNo(block), blocks, to: Some(Location::new(0, ChunkNo(1), 0)) };
        // Clusters 0, 10 to 40, and the last one, which is cut off at half.
        map.apply_runs(&[run(15, 1), run(160, 496), run(999, 1)]);
        let (data, zero) = (ChangeKind::Data, ChangeKind::Zero);
        let of = |changes: &[Change]| {
            stretches(changes.iter().copied(), &map).map(|s| (s.block, s.blocks, s.data)).collect::<Vec<_>>()
        };
        assert_eq!(of(&[change(3, 1, zero)]), [(0, 16, true)], "its neighbour has data");
        assert_eq!(of(&[change(15, 2, data), change(20, 1, zero)]), [(0, 16, true), (16, 16, false)]);
        assert_eq!(of(&[change(16, 100, zero)]), [(16, 112, false)]);
        assert_eq!(of(&[change(999, 1, data)]), [(992, 8, true)]);
        assert_eq!(
            of(&[change(150, 600, data)]),
            [(144, 16, false), (160, 96, true), (256, 256, true), (512, 144, true), (656, 96, false)]
        );
        assert_eq!(of(&[change(31, 1, zero), change(32, 1, zero), change(49, 1, zero)]), [(16, 48, false)]);
    }
}
