//! Volumes that nobody needs to attach for this: create, list, info, delete.

use std::collections::BTreeSet;

use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::snapshots::{forget_parent, mark_deleted, not_needed};
use crate::chunk::header::parse_name;
use crate::config::split_snapshot;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::{self, By, Manifest, Published};
use crate::store::{Store, list_folder};

const PARALLEL_DELETES: usize = 16;

/// What a new volume is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CreateOptions {
    /// Size in bytes, a multiple of 4096.
    pub size_bytes: u64,
    /// Logical block size in bytes: 512 or 4096.
    pub logical_block: u32,
}

/// A volume's name, and a snapshot's: `VOLUME` or `VOLUME@SNAPSHOT`.
///
/// # Errors
/// `Usage` when either cannot be one.
pub fn split_name(name: &str) -> Result<(&str, Option<&str>)> {
    let (volume, snapshot) = split_snapshot(name);
    manifest::check_name(volume)?;
    if let Some(s) = snapshot {
        manifest::check_name(s).map_err(|e| e.context(format!("the snapshot in {name:?}")))?;
    }
    Ok((volume, snapshot))
}

/// Makes a volume.
///
/// # Errors
/// `Usage` for a name or size that cannot be, `Exists`, the store's.
pub async fn create(store: &dyn Store, name: &str, opts: &CreateOptions, now_unix: u64) -> Result<Manifest> {
    manifest::check_name(name)?;
    manifest::check_size(opts.size_bytes, opts.logical_block)?;
    nothing_there(store, name).await?;
    let m = Manifest::new(name, opts.size_bytes, opts.logical_block, now_unix);
    Ok(Published::create(store, m).await?.manifest)
}

/// Looks before a volume is made: a store that ignores conditions would let a second one wipe the first, and what is left of a deleted
/// one, or of an import, would be taken for the new one's.
///
/// # Errors
/// `Exists`, the store's.
pub(super) async fn nothing_there(store: &dyn Store, name: &str) -> Result<()> {
    let exists = |what: String| Err(Error::new(ErrorKind::Exists, what));
    match store.get(&manifest::key(name)).await {
        Ok(_) => return exists(format!("there is a volume {name:?} in {} already: choose another name", store.url())),
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(e.context(format!("looking for a volume {name:?} in {}", store.url()))),
    }
    let left = list_folder(store, &manifest::prefix(name)).await?;
    if left.is_empty() {
        return Ok(());
    }
    exists(format!(
        "{} objects of a volume {name:?} without a manifest are in {}: an import or a deletion of it is under way, or was \
         killed (then `vb-ublk volume delete {name}` removes them), or its manifest was lost (`vb-ublk volume rebuild {name}`)",
        left.len(),
        store.url()
    ))
}

/// What a store holds, by name, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listed {
    /// The volumes.
    pub volumes: BTreeSet<String>,
    /// Names under which there are chunks, or a clone's deletion is noted, and no manifest.
    pub remains: BTreeSet<String>,
}

/// The names of all volumes in the store, and of what may once have been, or become, one.
///
/// # Errors
/// The store's.
pub async fn list(store: &dyn Store) -> Result<Listed> {
    let objects =
        store.list("", None).await.map_err(|e| e.context(format!("listing the volumes in {}", store.url())))?;
    let mut found = Listed::default();
    for (name, rest) in objects.iter().filter_map(|o| o.key.split_once('/')) {
        if manifest::check_name(name).is_err() {
            continue;
        }
        // Others keep chunks here, too: under names of other forms.
        let is_chunk = || rest.strip_prefix("chunks/").is_some_and(|c| parse_name(c).is_some());
        match rest {
            "manifest.json" => drop(found.volumes.insert(name.to_owned())),
            "manifest.json.deleted" => drop(found.remains.insert(name.to_owned())),
            _ if !found.remains.contains(name) && is_chunk() => drop(found.remains.insert(name.to_owned())),
            _ => {}
        }
    }
    found.remains.retain(|n| !found.volumes.contains(n));
    Ok(found)
}

/// A volume's manifest; of a snapshot (`VOLUME@SNAPSHOT`), as if the volume still were as it was then.
///
/// # Errors
/// `NotFound`, `Corrupt`, the store's.
pub async fn info(store: &dyn Store, name: &str) -> Result<Manifest> {
    let (volume, snapshot) = split_name(name)?;
    let m = Published::load(store, volume).await?.manifest;
    match snapshot {
        Some(s) => Ok(m.at_snapshot(m.snapshot(s)?)),
        None => Ok(m),
    }
}

/// Deletes every object of a volume, the manifest first: what an interruption leaves is no volume any more, and the
/// next delete of the name removes the rest. Of a clone a copy of the manifest is left till last, which says what its parent has to
/// forget. Returns the number of objects.
///
/// # Errors
/// `Busy` when somebody has it attached (unless `force`), or when volumes were cloned from it; `NotFound`, the store's.
pub async fn delete(store: &dyn Store, name: &str, force: bool) -> Result<u64> {
    manifest::check_name(name)?;
    let prefix = manifest::prefix(name);
    let manifest_key = manifest::key(name);
    let deleted_key = manifest::deleted_key(name);
    let what = format!("volume {name:?}");
    let rest = async || -> Result<Vec<String>> {
        Ok(store
            .list(&prefix, None)
            .await?
            .into_iter()
            .map(|o| o.key)
            .filter(|k| *k != manifest_key && *k != deleted_key)
            .collect())
    };
    let was;
    match Published::load(store, name).await {
        Ok(p) if p.manifest.writer.is_some() && !force => {
            return Err(Error::new(
                ErrorKind::Busy,
                format!(
                    "volume {name:?} is attached by {}: detach it first, or add --force if that host is gone",
                    p.manifest.holder()
                ),
            ));
        }
        Ok(mut p) => {
            // Before the mark, which a host that has it attached would notice.
            not_needed(store, name, None, &what).await?;
            mark_deleted(store, &mut p, if force { By::Force } else { By::Anybody }).await?;
            if !p.manifest.parents.is_empty() {
                let copy = p.manifest.encode()?.into();
                store.put(&deleted_key, copy).await.map_err(|e| e.context(format!("writing {deleted_key}")))?;
            }
            was = Some(p.manifest);
        }
        Err(e) if e.kind() == ErrorKind::NotFound => {
            let copy = interrupted(store, &deleted_key).await?;
            if copy.is_none() && rest().await?.is_empty() {
                return Err(e);
            }
            was = copy.flatten();
            not_needed(store, name, None, &what).await?;
        }
        Err(e) if !force => return Err(e),
        // Nothing can be marked: a clone that is made at this very moment is not seen.
        Err(_) => {
            was = interrupted(store, &deleted_key).await?.flatten();
            not_needed(store, name, None, &what).await?;
        }
    }
    store.delete(&manifest_key).await.map_err(|e| e.context(format!("deleting {manifest_key}")))?;
    let keys = rest().await?;
    stream::iter(&keys)
        .map(|k| async move { store.delete(k).await.map_err(|e| e.context(format!("deleting {k}"))) })
        .buffer_unordered(PARALLEL_DELETES)
        .try_collect::<()>()
        .await?;
    // Last: what an interruption leaves behind is told from a living clone's by its identity.
    if let Some(m) = was {
        forget_parent(store, &m).await?;
    }
    store.delete(&deleted_key).await.map_err(|e| e.context(format!("deleting {deleted_key}")))?;
    Ok(keys.len() as u64 + 1)
}

/// The manifest of a clone whose deletion was interrupted, if there is one, and if it can be read: the parent forgets others when their
/// snapshot goes.
async fn interrupted(store: &dyn Store, deleted_key: &str) -> Result<Option<Option<Manifest>>> {
    match store.get(deleted_key).await {
        Ok((bytes, _)) => Ok(Some(Manifest::decode(&bytes).ok())),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e.context(format!("reading {deleted_key} in {}", store.url()))),
    }
}
