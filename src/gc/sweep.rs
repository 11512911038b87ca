//! Deleting what nothing names any more.
//!
//! Invariants:
//! - Before anything is deleted the manifest was seen to be this attachment's, and the copy of the manifest whose checkpoint makes it
//!   garbage is in the store.
//! - A deletion that fails is made again by a later round: nothing depends on it.

use std::collections::HashSet;

use futures_util::stream::{self, StreamExt};

use crate::chunk::header;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::{Checkpoint, Manifest, Published, prefix};
use crate::store::{Store, list_folder};
use crate::units::{ChunkNo, Epoch, Nonce};

/// Deletions at once.
const PARALLEL: usize = 8;
/// Between two looks at the manifest.
const BATCH: usize = 256;
/// Copies of manifests that are kept.
const COPIES: usize = 2;

/// The folder of the copies of manifests.
#[must_use]
pub fn copies_prefix(volume: &str) -> String {
    format!("{}gc/", prefix(volume))
}

/// The key of the copy of a manifest whose checkpoint has that number: in the order of checkpoints. Its attachment writes it again when
/// the manifest has changed and the checkpoint has not.
#[must_use]
pub fn copy_key(volume: &str, number: u64, epoch: Epoch, nonce: Nonce) -> String {
    format!("{}{number:016x}-{:08x}-{nonce}.json", copies_prefix(volume), epoch.0)
}

/// The copies that are there, oldest first: each by its key, and what it says unless it is damaged.
///
/// # Errors
/// The store's; `Unsupported` for a newer program's.
pub async fn copies(store: &dyn Store, volume: &str) -> Result<Vec<(String, Option<Manifest>)>> {
    let folder = copies_prefix(volume);
    let listed = list_folder(store, &folder).await?;
    let mut keys: Vec<String> = listed.into_iter().map(|o| o.key).filter(|k| k.ends_with(".json")).collect();
    keys.sort_unstable();
    let mut out = Vec::new();
    for key in keys {
        let said = match store.get(&key).await {
            Ok((bytes, _)) => Manifest::decode(&bytes),
            Err(e) => Err(e),
        };
        match said {
            Ok(m) => out.push((key, Some(m).filter(|m| m.name == volume))),
            Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::NotFound) => out.push((key, None)),
            Err(e) => return Err(e.context(format!("reading {key} in {}", store.url()))),
        }
    }
    Ok(out)
}

/// What is to be deleted.
#[derive(Debug, Clone, Default)]
pub struct Rubbish {
    /// Chunks of the volume's own that are dead in the published map.
    pub chunks: Vec<ChunkNo>,
    /// Keys of other objects that count for nothing.
    pub others: Vec<String>,
    /// The copy of the manifest is there.
    pub is_copied: bool,
}

/// What was deleted.
#[derive(Debug, Clone, Default)]
pub struct Swept {
    /// Chunks.
    pub chunks: Vec<ChunkNo>,
    /// Other objects.
    pub others: Vec<String>,
    /// Chunks that could not be deleted.
    pub refused: Vec<ChunkNo>,
}

/// Deletes. `m` is the published manifest by which it is rubbish.
///
/// # Errors
/// `Fenced` when the volume is another's by now; the store's, for the first look and the copy. What cannot be deleted is left out of the
/// result.
pub async fn sweep(store: &dyn Store, m: &Manifest, rubbish: Rubbish) -> Result<Swept> {
    still_ours(store, m).await?;
    if !rubbish.chunks.is_empty() && !rubbish.is_copied {
        keep_copy(store, m).await?;
    }
    let folder = prefix(&m.name);
    let chunks = rubbish.chunks.iter().filter_map(|n| {
        let (epoch, nonce) = m.owner(*n)?;
        Some((Some(*n), header::key(&folder, *n, epoch, nonce)))
    });
    let others = rubbish.others.iter().map(|key| (None, key.clone()));
    let mut swept = Swept::default();
    let all: Vec<(Option<ChunkNo>, String)> = chunks.chain(others).collect();
    for (i, some) in all.chunks(BATCH).enumerate() {
        if i > 0 {
            still_ours(store, m).await?;
        }
        let mut deletions = stream::iter(some)
            .map(|(chunk, key)| async move { (chunk, store.delete(key).await, key) })
            .buffer_unordered(PARALLEL);
        while let Some((chunk, result, key)) = deletions.next().await {
            match (result, chunk) {
                (Ok(()), Some(chunk)) => swept.chunks.push(*chunk),
                (Ok(()), None) => swept.others.push(key.clone()),
                (Err(e), _) => {
                    tracing::warn!("{}: it will be tried again", e.context(format!("deleting {key}")));
                    swept.refused.extend(chunk);
                }
            }
        }
    }
    Ok(swept)
}

async fn still_ours(store: &dyn Store, m: &Manifest) -> Result<()> {
    Published::load(store, &m.name).await?.check_nonce(m.nonce)
}

/// Keeps a copy of the manifest: with it, what the deleted chunks were overwritten by can be told also when the manifest is lost.
///
/// # Errors
/// The store's.
pub async fn keep_copy(store: &dyn Store, m: &Manifest) -> Result<()> {
    let number = m.checkpoint.as_ref().map_or(0, Checkpoint::number);
    let key = copy_key(&m.name, number, m.epoch, m.nonce);
    let doing = |e: Error| e.context(format!("keeping a copy of the manifest as {key} in {}", store.url()));
    store.put(&key, m.encode()?.into()).await.map_err(doing)
}

/// Objects beside the chunks that count for nothing any more: copies of manifests but for the newest ones; parts of maps that neither `m`,
/// nor its snapshots, nor those copies, nor `kept` name, of older checkpoints than the newest.
///
/// # Errors
/// The store's.
pub async fn leftovers(store: &dyn Store, m: &Manifest, kept: &HashSet<String>) -> Result<Vec<String>> {
    let Some(newest) = m.checkpoint.as_ref().map(Checkpoint::number) else { return Ok(Vec::new()) };
    let mut copies = copies(store, &m.name).await?;
    let good = copies.iter().rposition(|(_, m)| m.is_some());
    let old = good.unwrap_or(0).min(copies.len().saturating_sub(COPIES));
    let mut out: Vec<String> = copies.drain(..old).map(|(key, _)| key).collect();
    let mut named = part_keys(m);
    named.extend(copies.iter().filter_map(|(_, m)| m.as_ref()).flat_map(part_keys));
    let folder = format!("{}checkpoints/", prefix(&m.name));
    let listed = list_folder(store, &folder).await?;
    let is_old = |key: &str| {
        let name = key.strip_prefix(&folder).unwrap_or_default();
        let number = name.split('-').next().and_then(|n| u64::from_str_radix(n, 16).ok());
        number.is_some_and(|n| n < newest) && !named.contains(key) && !kept.contains(key)
    };
    out.extend(listed.into_iter().map(|o| o.key).filter(|k| is_old(k)));
    Ok(out)
}

/// The keys of all parts in the volume's own folder that a manifest names.
#[must_use]
pub fn part_keys(m: &Manifest) -> HashSet<String> {
    let folder = prefix(&m.name);
    let images = m.checkpoints().flat_map(Checkpoint::images);
    images.filter(|i| i.source == 0).flat_map(|i| &i.parts).map(|p| format!("{folder}{}", p.key)).collect()
}
