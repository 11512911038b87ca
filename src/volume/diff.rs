//! What has changed between two states of a volume: between two of its snapshots, or since one of them.
//!
//! The maps of both are compared; no data is read. All states of a volume number their sources alike, since parents keep their places,
//! and no chunk number is given out twice: so what two maps place alike is the same. What they place differently may be the same
//! still, for garbage collection puts blocks elsewhere, and a block that it has moved keeps its birth. So it is the *later* map's
//! headers that are asked: a block whose birth the earlier state had reached already was not written since, and is what the earlier state
//! had, wherever that was. This needs no header of the earlier state, and compares no births of different volumes. (A parent's block that
//! comes into a chunk of the volume's own was there before its first entry: whatever birth it bears, at worst it counts as changed.)
//!
//! Invariants:
//! - Nothing that has changed is left out. What cannot be told, for a header that cannot be read, has changed.
//! - A volume that went on from before one of the states ([`Manifest::was_rewound`]) gave its numbers out twice: it is refused.
//! - Each header is read once, at most [`PARALLEL_HEADERS`] at a time, and only of chunks that the later map names for a block which both
//!   have. What is learnt goes into a copy of the earlier map: nothing grows but that, and by no more than the pages that both shared.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures_util::stream::{self, StreamExt};

use super::export::{Base, not_attached};
use super::recover::PARALLEL_HEADERS;
use super::snapshots::not_deleting;
use crate::chunk::header::{ChunkHeader, ExtentKind};
use crate::chunk::reader::ChunkReader;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::images::load_pair;
use crate::manifest::{self, Manifest, Published};
use crate::map::{BaseImage, BaseState, Change, Run};
use crate::store::Store;
use crate::units::{BLOCK, BlockNo, ChunkNo, Seq};

/// Two states of a volume, by their manifests.
#[derive(Debug)]
pub struct Pair {
    from: Manifest,
    to: Manifest,
}

/// What has become of the one in the other.
#[derive(Debug)]
pub struct Diff {
    from: BaseImage,
    to: BaseImage,
    base: Base,
}

impl Pair {
    /// Two snapshots of a volume; without the second one, the first and the volume as it is while nobody has it attached. They may be in
    /// any order.
    ///
    /// # Errors
    /// `NotFound`; `Usage` for a snapshot and itself; `Busy` for what is being deleted or attached; `Unsupported` for states that cannot
    /// be compared any more; the store's.
    pub async fn find(store: &dyn Store, volume: &str, from: &str, to: Option<&str>) -> Result<Self> {
        manifest::check_name(volume)?;
        let m = Published::load(store, volume).await?.manifest;
        not_deleting(&m)?;
        if to == Some(from) {
            let what =
                format!("snapshot {from:?} of volume {volume:?} is to be compared with itself: name two of them");
            return Err(Error::new(ErrorKind::Usage, what));
        }
        let earlier = Self::place(&m, Some(from))?;
        let later = Self::place(&m, to)?;
        let pair = Self { from: earlier.1, to: later.1 };
        let numbers = |m: &Manifest| m.checkpoint.as_ref().map(|c| (c.through, c.last_chunk));
        let in_order = |m: &Manifest, n: &Manifest| numbers(m) <= numbers(n);
        let kept = if earlier.0 < later.0 { in_order(&pair.from, &pair.to) } else { in_order(&pair.to, &pair.from) };
        if !kept || pair.from.was_rewound() || pair.to.was_rewound() {
            let what = format!(
                "volume {volume:?} was rebuilt with loss, and went on from before {}: what has changed cannot be told any more; export it \
                 whole, and begin anew from a snapshot that is made now",
                if pair.to.was_rewound() { to.unwrap_or("now") } else { from }
            );
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        Ok(pair)
    }

    /// A state, and which of the volume's it is.
    fn place(m: &Manifest, snapshot: Option<&str>) -> Result<(usize, Manifest)> {
        let Some(name) = snapshot else {
            not_attached(m)?;
            return Ok((m.snapshots.len(), m.clone()));
        };
        let s = m.snapshot(name)?;
        if s.deleting.is_some() {
            let what = format!(
                "snapshot {name:?} of volume {:?} is being deleted, or its deletion was interrupted: `vb-ublk snapshot delete {} {name}` \
                 ends it",
                m.name, m.name
            );
            return Err(Error::new(ErrorKind::Busy, what));
        }
        let at = m.snapshots.iter().position(|other| other.id == s.id).unwrap_or_default();
        Ok((at, m.at_snapshot(s)))
    }

    /// Size of the first state in bytes.
    #[must_use]
    pub const fn from_bytes(&self) -> u64 {
        self.from.size_bytes
    }

    /// Reads both maps and compares them.
    ///
    /// # Errors
    /// `Corrupt` for a damaged map; the store's.
    pub async fn compare(&self, store: &Arc<dyn Store>) -> Result<Diff> {
        let (from, to) = load_pair(&**store, &self.from, &self.to).await?;
        let base = Base::over(store, &self.to, to.clone());
        let (a, b) = (place_in_history(&self.from), place_in_history(&self.to));
        Ok(if a <= b {
            Diff { from: follow(&base.reader, from, a.0, &to).await?, to, base }
        } else {
            Diff { to: follow(&base.reader, to, b.0, &from).await?, from, base }
        })
    }
}

impl Diff {
    /// What has changed, in order: bytes of the second state, which has nothing behind its end.
    pub fn changes(&self) -> impl Iterator<Item = Change> + '_ {
        BaseImage::changes(&self.from, &self.to)
    }

    /// The second state.
    #[must_use]
    pub const fn base(&self) -> &Base {
        &self.base
    }
}

/// How far a state's map goes: the last entry in it, and what garbage collection had made of that.
fn place_in_history(m: &Manifest) -> (Seq, ChunkNo, u64) {
    m.checkpoint.as_ref().map_or_else(Default::default, |c| (c.through, c.last_chunk, c.number()))
}

/// The earlier map, in which what was only moved since is where the later one has it.
async fn follow(reader: &ChunkReader, mut earlier: BaseImage, through: Seq, later: &BaseImage) -> Result<BaseImage> {
    let chunks: BTreeSet<ChunkNo> = BaseImage::differences(&earlier, later)
        .filter(|d| d.from.is_some())
        .filter_map(|d| d.to)
        // Nothing is ever moved into a parent's chunk.
        .filter(|to| to.source() == 0)
        .map(|to| to.chunk())
        .collect();
    let mut headers = stream::iter(chunks)
        .map(|chunk| async move {
            match reader.header(0, chunk).await {
                // What reads badly once may have been damaged on its way.
                Err(e) if e.kind() == ErrorKind::Corrupt => reader.header(0, chunk).await,
                read => read,
            }
        })
        .buffer_unordered(PARALLEL_HEADERS);
    while let Some(header) = headers.next().await {
        match header {
            Ok(h) => earlier.apply_runs(&not_written_since(&h, through, &earlier, later)),
            Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::NotFound | ErrorKind::Unsupported) => {
                tracing::warn!("what lies in a chunk that cannot be read counts as changed: {e}");
            }
            Err(e) => return Err(e.context("looking whether blocks were written or only moved")),
        }
    }
    Ok(earlier)
}

/// The blocks of a chunk that the later map has there, the earlier one elsewhere, and that were not written after `through`.
fn not_written_since(h: &ChunkHeader, through: Seq, earlier: &BaseImage, later: &BaseImage) -> Vec<Run> {
    let mut moved = Vec::new();
    let mut index = 0;
    let end = earlier.volume_blocks().min(later.volume_blocks());
    for e in h.extents.iter().filter(|e| e.kind != ExtentKind::Discard) {
        let first = index;
        index += e.blocks;
        if e.birth > through {
            continue;
        }
        for block in (e.block.0..e.block.0 + e.blocks).take_while(|b| *b < end).map(BlockNo) {
            let (BaseState::At(then), BaseState::At(now)) = (earlier.lookup(block), later.lookup(block)) else {
                continue;
            };
            let here = (0, h.chunk, first + (block.0 - e.block.0));
            if then != now && (now.source(), now.chunk(), u64::from(now.index())) == here {
                moved.push(Run { block, blocks: 1, to: Some(now) });
            }
        }
    }
    moved
}

/// Bytes that a change has, and where.
#[must_use]
pub const fn bytes_of(c: &Change) -> (u64, u64) {
    (c.block.0 * BLOCK as u64, c.blocks * BLOCK as u64)
}
