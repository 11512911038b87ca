//! What garbage collection has left of older groups, and the copies of the manifest that it keeps.
//!
//! Groups up to a copy's checkpoint may have lost chunks whose content was overwritten. Two things make up for them: the map of that very
//! checkpoint, whose parts are kept as long as the copy; or, if that is damaged, the chunks that are left: of each block the content of the
//! latest birth is the newest, since collected blocks keep theirs, and discards that hide older content are kept, too.
//!
//! Invariant: what is behind the checkpoint is not looked at here: those groups are whole, or never were.

use futures_util::stream::{self, StreamExt};

use super::groups::{Looked, look};
use super::history::{Named, Rules};
use super::report::Lost;
use crate::chunk::header;
use crate::chunk::pack::map_extents;
use crate::error::{Error, ErrorKind, Result};
use crate::gc::sweep::copies;
use crate::manifest::images::{load_checkpoint, load_image};
use crate::manifest::{self, Manifest};
use crate::map::{BaseImage, GroupExtent, Maps};
use crate::store::Store;
use crate::units::{BLOCK, ChunkNo, SECTOR, Seq};
use crate::volume::recover::{PARALLEL_HEADERS, StoreEnd, checkpoint_end};

/// The volume as of the newest copy of its manifest.
pub(super) struct Kept {
    /// The copy.
    pub manifest: Manifest,
    /// Its map.
    pub map: BaseImage,
    /// The map was made of the chunks.
    pub of_chunks: bool,
}

impl Kept {
    /// Where its checkpoint ends.
    pub(super) fn end(&self) -> StoreEnd {
        checkpoint_end(&self.manifest)
    }

    /// The map for a volume of another size.
    pub(super) fn maps(&self, size_bytes: u64) -> Maps {
        let maps = Maps::new(size_bytes / SECTOR as u64);
        maps.load_base(&self.map.resized(size_bytes / BLOCK as u64));
        maps
    }
}

/// Looks for the newest copy; `None` when there is none: nothing was ever collected.
///
/// # Errors
/// `Corrupt` when it is damaged: an older one names chunks that are gone. The store's.
pub(super) async fn newest(store: &dyn Store, name: &str) -> Result<Option<Manifest>> {
    let all = copies(store, name).await?;
    let Some((key, newest)) = all.into_iter().next_back() else { return Ok(None) };
    if newest.is_none() {
        let what = format!(
            "garbage was collected in volume {name:?}, and {key}, the copy of its manifest that tells how far, is damaged: put that or \
             manifest.json back from a copy of the store"
        );
        return Err(Error::new(ErrorKind::Corrupt, what));
    }
    Ok(newest)
}

/// The map as of a copy's checkpoint.
///
/// # Errors
/// `Corrupt` when it is damaged and a chunk is, too; the store's; `Unsupported` when a newer program wrote something.
pub(super) async fn map_of(store: &dyn Store, manifest: Manifest, named: &[Named]) -> Result<Kept> {
    match load_image(store, &manifest).await {
        Ok(map) => Ok(Kept { manifest, map, of_chunks: false }),
        Err(e) if e.kind() == ErrorKind::Corrupt => by_birth(store, manifest, named).await,
        Err(e) => Err(e),
    }
}

/// The map that a volume began with: a clone's is that of the snapshot it was made from, until it has copied all of it.
///
/// # Errors
/// Those of reading that map.
pub(super) async fn beginning(store: &dyn Store, m: &Manifest) -> Result<BaseImage> {
    match m.parent() {
        Some(parent) => load_checkpoint(store, m, parent.checkpoint.as_ref()).await,
        None => Ok(BaseImage::empty(m.size_bytes / BLOCK as u64)),
    }
}

async fn by_birth(store: &dyn Store, manifest: Manifest, named: &[Named]) -> Result<Kept> {
    let m = &manifest;
    let prefix = manifest::prefix(&m.name);
    let mut map = beginning(store, m).await?;
    let until = m.last_chunk();
    let rules = Rules::Known { history: m.history.clone(), after: ChunkNo(0), until };
    let mut births: Vec<(Seq, GroupExtent)> = Vec::new();
    let mut bad = Vec::new();
    let mut looked = stream::iter(named.iter().filter(|n| rules.names(n)))
        .map(|n| {
            let key = header::key(&prefix, n.chunk, n.epoch, n.nonce);
            async move { (n, look(store, &key).await, key) }
        })
        .buffered(PARALLEL_HEADERS);
    while let Some((n, looked, key)) = looked.next().await {
        match looked? {
            Looked::Header(h) if h.volume != m.uuid => {
                bad.push(Lost::new(key, n.chunk, format!("it belongs to another volume ({})", h.volume)));
            }
            Looked::Header(h) => births.extend(h.extents.iter().map(|e| e.birth).zip(map_extents(&h, 0))),
            Looked::Bad(why) => bad.push(Lost::new(key, n.chunk, why)),
        }
    }
    if let Some(first) = bad.first() {
        // What it held may have been overwritten, or not: nobody can say what would show in its place.
        let what = format!(
            "{} chunks that garbage collection has left behind cannot be used, and the map that names what is needed of them is damaged, too: \
             {first}. Put the objects back from a copy of the store and try again",
            bad.len()
        );
        return Err(Error::new(ErrorKind::Corrupt, what));
    }
    births.sort_by_key(|b| b.0);
    // What lies behind the end was cut off with it.
    let end = map.volume_blocks();
    let extents: Vec<GroupExtent> = births
        .into_iter()
        .map(|(_, e)| GroupExtent { blocks: e.blocks.min(end.saturating_sub(e.block.0)), ..e })
        .filter(|e| e.blocks > 0)
        .collect();
    map.apply_extents(&extents);
    Ok(Kept { manifest, map, of_chunks: true })
}
