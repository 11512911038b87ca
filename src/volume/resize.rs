//! A volume made larger or smaller.
//!
//! An attached volume grows by its own daemon (`background::resize`). One that nobody has attached is resized here: to grow is to
//! say so in the manifest; to shrink, a map without what lies behind the new end is written first. Snapshots keep the size that
//! they had.

use super::background::checkpoint::put_unattached;
use super::snapshots::not_deleting;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::images::load_image;
use crate::manifest::{self, Checkpoint, Manifest, Published};
use crate::map::Run;
use crate::store::Store;
use crate::units::{BLOCK, Nonce};

/// How to resize.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// The new size in bytes.
    pub size_bytes: u64,
    /// Shrink although there is data behind the new end: it is lost.
    pub discard_tail: bool,
    /// A fresh nonce.
    pub nonce: Nonce,
}

/// Refuses to make a volume smaller while it is attached, for a start.
pub(super) fn may_grow(m: &Manifest, size_bytes: u64) -> Result<()> {
    if size_bytes >= m.size_bytes {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Usage,
        format!(
            "volume {:?} has {} bytes, and {size_bytes} would be less: an attached volume only grows; detach it to shrink it",
            m.name, m.size_bytes
        ),
    ))
}

/// Resizes a volume that nobody has attached. Returns what the manifest says then.
///
/// # Errors
/// `Busy` while somebody has it attached, `Usage` for a size that cannot be, or that would cut data off without leave; `Conflict` when it
/// is changed meanwhile; `Corrupt`, the store's. After an error the volume is as it was.
pub async fn resize(store: &dyn Store, name: &str, opts: &Options) -> Result<Manifest> {
    manifest::check_name(name)?;
    let mut published = Published::load(store, name).await?;
    let m = published.manifest.clone();
    manifest::check_size(opts.size_bytes, m.logical_block)?;
    not_deleting(&m)?;
    let cut = if opts.size_bytes < m.size_bytes && m.writer.is_none() { cut(store, &m, opts).await? } else { None };
    // To write the map may have taken long.
    published = Published::load(store, name).await?;
    let same = |now: &Manifest| now.uuid == m.uuid && now.epoch == m.epoch && now.checkpoint == m.checkpoint;
    published
        .edit(store, false, |now| {
            not_deleting(now)?;
            if !same(now) || now.size_bytes != m.size_bytes {
                let what = format!("volume {name:?} was used or changed meanwhile: try again");
                return Err(Error::new(ErrorKind::Conflict, what));
            }
            now.size_bytes = opts.size_bytes;
            if let Some(c) = &cut {
                now.checkpoint = Some(c.clone());
            }
            Ok(())
        })
        .await?;
    Ok(published.manifest)
}

/// The checkpoint of the volume without what lies behind its new end, written to the store; `None` when there is none.
async fn cut(store: &dyn Store, m: &Manifest, opts: &Options) -> Result<Option<Checkpoint>> {
    let Some(c) = &m.checkpoint else { return Ok(None) };
    let blocks = opts.size_bytes / BLOCK as u64;
    let map = load_image(store, m).await?;
    let behind: u64 = map.runs().map(|r| r.block.0 + u64::from(r.blocks)).max().unwrap_or(0);
    if behind > blocks && !opts.discard_tail {
        let lost: u64 = map.runs().filter_map(|r| behind_end(&r, blocks)).sum();
        return Err(Error::new(
            ErrorKind::Usage,
            format!(
                "volume {:?} holds {} bytes of data behind byte {}, the last of them before byte {}: shrink what is on it first, and discard \
                 what is free; or give --discard-tail, and they are lost",
                m.name,
                lost * BLOCK as u64,
                opts.size_bytes,
                behind * BLOCK as u64
            ),
        ));
    }
    let number = c.number() + 1;
    let full = put_unattached(store, m, &map.resized(blocks), number, opts.nonce)
        .await
        .map_err(|e| e.context("writing the smaller volume's map"))?;
    Ok(Some(Checkpoint { full, delta: None, ..c.clone() }))
}

/// Blocks of a run that lie behind the end.
fn behind_end(r: &Run, end: u64) -> Option<u64> {
    let lost = (r.block.0 + u64::from(r.blocks)).saturating_sub(end.max(r.block.0));
    (lost > 0).then_some(lost)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::{BaseImage, Location};
    use crate::units::{BlockNo, ChunkNo};

    #[test]
    fn runs_are_cut_at_the_end() {
        let at = Some(Location::new(0, ChunkNo(1), 0));
        let run = |block, blocks| Run { block: BlockNo(block), blocks, to: at };
        for (r, behind, before) in [
            (run(0, 10), None, Some(run(0, 10))),
            (run(5, 5), None, Some(run(5, 5))),
            (run(5, 6), Some(1), Some(run(5, 5))),
            (run(9, 10), Some(9), Some(run(9, 1))),
            (run(10, 1), Some(1), None),
            (run(20, 3), Some(3), None),
        ] {
            let mut map = BaseImage::empty(2000);
            map.apply_runs(&[r]);
            let cut = map.resized(10);
            assert_eq!((behind_end(&r, 10), cut.runs().next()), (behind, before), "{r:?}");
            assert_eq!(cut.resized(2000).runs().next(), before, "{r:?}");
        }
    }
}
