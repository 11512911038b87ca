//! Snapshots and clones, and what depends on what.
//!
//! A snapshot is an entry in the manifest. Its maker publishes it with the checkpoint that it names (`background::checkpoint` while the
//! volume is attached, [`create`] while it is not). A clone is a manifest whose map begins as a snapshot's, and an object at that snapshot's
//! volume, the *ref*, that says so. Making one costs six requests to the store, whatever the size.
//!
//! Invariants:
//! - *Clone*: put the ref; put the manifest; then look at the snapshot once more. If it is gone or marked, undo.
//! - *Delete* (of a snapshot, or of the volume): mark it; then list its refs. If a clone is there, take the mark away. Else remove what
//!   was marked, if the mark still is one's own.
//! - So of a clone and a deletion at the same time at most one succeeds: if the look came before the mark the ref and the manifest
//!   were there before the list; else the look sees the mark. A ref without its clone is of one that will still look, of one that was
//!   undone, or of one that was deleted; it goes when the snapshot has gone, and not before: the mark may be taken away again.
//! - A clone that has never been attached may not have looked, if its maker died: its first attach looks ([`still_there`]).

use futures_util::stream::{self, StreamExt, TryStreamExt};
use serde::Serialize;
use uuid::Uuid;

use super::admin::nothing_there;
use crate::cache::trace::trace_key;
use crate::error::{Error, ErrorKind, Result};
use crate::gc::sweep::keep_copy;
use crate::manifest::images::load_checkpoint;
use crate::manifest::{self, By, Manifest, Published, Snapshot, parse_ref_key, ref_key, refs_prefix};
use crate::store::{Store, list_folder};

const PARALLEL_LOOKS: usize = 16;
/// Clones that a refusal names.
const MOST_TOLD: usize = 8;

/// Keeps a volume that nobody has attached as it is, under a name.
///
/// # Errors
/// `Busy` while somebody has it attached, `Exists`, `Usage` for a name that cannot be; the store's.
pub async fn create(store: &dyn Store, volume: &str, name: &str, now_unix: u64) -> Result<Snapshot> {
    let mut published = Published::load(store, volume).await?;
    let id = Uuid::new_v4();
    published.edit(store, false, |m| add(m, &Wanted { name: name.to_owned(), id, created: now_unix })).await?;
    published.manifest.snapshot(name).cloned()
}

/// A snapshot that is to be made.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub name: String,
    pub id: Uuid,
    pub created: u64,
}

/// Adds a snapshot of the manifest's checkpoint.
pub(super) fn add(m: &mut Manifest, wanted: &Wanted) -> Result<()> {
    not_deleting(m)?;
    m.may_snapshot(&wanted.name)?;
    m.snapshots.push(Snapshot {
        name: wanted.name.clone(),
        id: wanted.id,
        created: wanted.created,
        size_bytes: m.size_bytes,
        checkpoint: m.checkpoint.clone(),
        deleting: None,
    });
    Ok(())
}

/// Refuses what cannot be done with a volume that somebody is deleting.
pub(super) fn not_deleting(m: &Manifest) -> Result<()> {
    if m.deleting.is_none() {
        return Ok(());
    }
    let what = format!(
        "volume {:?} is being deleted, or its deletion was interrupted: `vb-ublk volume delete {}` ends it",
        m.name, m.name
    );
    Err(Error::new(ErrorKind::Busy, what))
}

/// Deletes a snapshot. What it alone kept is garbage then.
///
/// # Errors
/// `Busy`, with their names, when volumes were cloned from it and still need it; `Busy` when another process has the volume attached,
/// `NotFound`, `Conflict` when somebody else deletes it at the same time; the store's.
pub async fn delete(store: &dyn Store, published: &mut Published, by: By, name: &str) -> Result<()> {
    let id = published.manifest.snapshot(name)?.id;
    let volume = published.manifest.name.clone();
    let what = format!("snapshot {name:?} of volume {volume:?}");
    let mark = mark(store, published, by, Some(id), &what).await?;
    // Who puts one from now on finds the mark.
    store.delete(&trace_key(&volume, id)).await?;
    published
        .change(store, by, |m| {
            let marked = m.snapshots.iter().position(|s| s.id == id && s.deleting == Some(mark));
            m.snapshots.remove(marked.ok_or_else(|| taken(&what))?);
            Ok(())
        })
        .await?;
    // Whoever put one of these finds the snapshot gone.
    forget_refs(store, &volume, id).await
}

/// Marks a volume that is to be deleted, unless others need it.
///
/// # Errors
/// `Busy`, with their names, when volumes were cloned from it; the store's.
pub(super) async fn mark_deleted(store: &dyn Store, published: &mut Published, by: By) -> Result<()> {
    let volume = published.manifest.name.clone();
    let what = format!("volume {volume:?}");
    let mark = mark(store, published, by, None, &what).await?;
    let now = Published::load(store, &volume).await?.manifest;
    if now.deleting == Some(mark) { Ok(()) } else { Err(taken(&what)) }
}

/// Marks a snapshot, or the volume, unless clones need it. Returns the mark, which another deletion may replace by its own.
async fn mark(
    store: &dyn Store,
    published: &mut Published,
    by: By,
    snapshot: Option<Uuid>,
    what: &str,
) -> Result<Uuid> {
    let mark = Uuid::new_v4();
    published
        .change(store, by, |m| {
            *mark_of(m, snapshot).ok_or_else(|| taken(what))? = Some(mark);
            Ok(())
        })
        .await?;
    let volume = published.manifest.name.clone();
    let kept = not_needed(store, &volume, snapshot, what).await;
    if kept.is_err() {
        published
            .change(store, by, |m| {
                if let Some(at) = mark_of(m, snapshot).filter(|at| **at == Some(mark)) {
                    *at = None;
                }
                Ok(())
            })
            .await?;
    }
    kept.map(|()| mark)
}

/// Where the mark of a snapshot is, or the volume's.
fn mark_of(m: &mut Manifest, snapshot: Option<Uuid>) -> Option<&mut Option<Uuid>> {
    match snapshot {
        None => Some(&mut m.deleting),
        Some(id) => m.snapshots.iter_mut().find(|s| s.id == id).map(|s| &mut s.deleting),
    }
}

fn taken(what: &str) -> Error {
    Error::new(ErrorKind::Conflict, format!("somebody else deletes {what}"))
}

/// Refuses to delete what clones need.
///
/// # Errors
/// `Busy`, with their names; the store's.
pub(super) async fn not_needed(store: &dyn Store, volume: &str, snapshot: Option<Uuid>, what: &str) -> Result<()> {
    let clones = dependents(store, volume, snapshot).await?;
    if clones.is_empty() { Ok(()) } else { Err(needed(what, &clones)) }
}

/// Removes what is left of the refs to a snapshot that is gone.
async fn forget_refs(store: &dyn Store, volume: &str, snapshot: Uuid) -> Result<()> {
    let folder = refs_prefix(volume, Some(snapshot));
    let refs = list_folder(store, &folder).await?;
    for r in refs {
        store.delete(&r.key).await.map_err(|e| e.context(format!("deleting {} in {}", r.key, store.url())))?;
    }
    Ok(())
}

fn needed(what: &str, clones: &[String]) -> Error {
    let more = clones.len().saturating_sub(MOST_TOLD);
    let names = clones[..clones.len() - more].join(", ");
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    Error::new(
        ErrorKind::Busy,
        format!(
            "{what} cannot be deleted: {names}{more} {} made from it; delete {} first",
            if clones.len() == 1 { "was" } else { "were" },
            if clones.len() == 1 { "it" } else { "them" },
        ),
    )
}

/// The names of the volumes that were cloned from a snapshot, or from any of the volume's, and still need it. Nothing is removed: a ref
/// without its clone may be of one that is being made, and the mark may be taken away again.
///
/// # Errors
/// The store's.
async fn dependents(store: &dyn Store, volume: &str, snapshot: Option<Uuid>) -> Result<Vec<String>> {
    let folder = refs_prefix(volume, snapshot);
    let refs = list_folder(store, &folder).await?;
    let clones: Vec<Option<String>> = stream::iter(&refs)
        .map(|object| async move {
            let Some((snapshot, clone, uuid)) = parse_ref_key(volume, &object.key) else { return Ok(None) };
            Ok::<_, Error>(needs(store, &clone, uuid, snapshot).await?.then_some(clone))
        })
        .buffered(PARALLEL_LOOKS)
        .try_collect()
        .await?;
    Ok(clones.into_iter().flatten().collect())
}

/// Whether that clone is there and depends on that snapshot.
async fn needs(store: &dyn Store, clone: &str, uuid: Uuid, snapshot: Uuid) -> Result<bool> {
    match Published::load(store, clone).await {
        Ok(p) => Ok(p.manifest.uuid == uuid && p.manifest.parent().is_some_and(|p| p.snapshot == snapshot)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        // Whatever it says: it may need it.
        Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported) => Ok(true),
        Err(e) => Err(e),
    }
}

/// What a ref says, for people.
#[derive(Serialize)]
struct RefBody<'a> {
    clone: &'a str,
    uuid: Uuid,
    snapshot: &'a str,
    size_bytes: u64,
}

/// Makes a volume that begins as a snapshot of another one.
///
/// # Errors
/// `NotFound`, `Exists`, `Usage` for a name or size that cannot be, `Busy` when the snapshot is being deleted, `Full` for too long a chain of
/// clones; the store's. What an interruption leaves is at most a ref, which the next deletion of the snapshot removes.
pub async fn clone(
    store: &dyn Store,
    volume: &str,
    snapshot: &str,
    new: &str,
    size_bytes: Option<u64>,
    now_unix: u64,
) -> Result<Manifest> {
    manifest::check_name(new)?;
    let parent = Published::load(store, volume).await?.manifest;
    not_deleting(&parent)?;
    let from = parent.snapshot(snapshot)?;
    let size_bytes = size_bytes.unwrap_or(from.size_bytes);
    manifest::check_size(size_bytes, parent.logical_block)?;
    let m = parent.clone_of(from, new, size_bytes, now_unix)?;
    let key = ref_key(volume, from.id, new, m.uuid);
    let body = RefBody { clone: new, uuid: m.uuid, snapshot, size_bytes };
    let body = serde_json::to_vec(&body)
        .map_err(|e| Error::new(ErrorKind::Internal, format!("encoding {key}")).with_source(e))?;
    nothing_there(store, new).await?;
    store.put(&key, body.into()).await.map_err(|e| e.context(format!("writing {key} in {}", store.url())))?;
    let uuid = m.uuid;
    let made = match Published::create(store, m).await {
        Ok(p) => p.manifest,
        // Only what is certainly not there needs no ref. One without its clone is in nobody's way.
        Err(e) if e.kind() == ErrorKind::Exists => match Published::load(store, new).await {
            Ok(there) if there.manifest.uuid == uuid => there.manifest,
            Ok(_) => {
                let _ = store.delete(&key).await;
                return Err(e);
            }
            Err(_) => return Err(e),
        },
        Err(e) => return Err(e),
    };
    let still = Published::load(store, volume).await.and_then(|p| {
        not_deleting(&p.manifest)?;
        let s = p.manifest.snapshot(snapshot)?;
        if s.id == from.id && s.deleting.is_none() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Busy, format!("snapshot {snapshot:?} of volume {volume:?} is being deleted")))
    });
    if let Err(e) = still {
        undo(store, new, uuid, &key).await?;
        return Err(e.context(format!("cloning {volume}@{snapshot}")));
    }
    Ok(made)
}

/// Refuses a clone that was never attached when what it was made from is gone, or going.
///
/// # Errors
/// `NotFound` when it is; the store's.
pub(super) async fn still_there(store: &dyn Store, m: &Manifest) -> Result<()> {
    let Some(parent) = m.parent().filter(|_| m.epoch.0 == 0) else { return Ok(()) };
    let gone = || {
        let what = format!(
            "volume {:?} was to be a clone of {}@{}, which is gone or being deleted: its making was interrupted; delete it",
            m.name, parent.name, parent.snapshot_name
        );
        Error::new(ErrorKind::NotFound, what)
    };
    match Published::load(store, &parent.name).await {
        Ok(p) => {
            let p = p.manifest;
            let there = p.uuid == parent.uuid
                && p.deleting.is_none()
                && p.snapshots.iter().any(|s| s.id == parent.snapshot && s.deleting.is_none());
            if there { Ok(()) } else { Err(gone()) }
        }
        Err(e) if e.kind() == ErrorKind::NotFound => Err(gone().with_source(e)),
        Err(e) => Err(e),
    }
}

/// The names of the volume's own snapshots whose maps name a parent.
///
/// # Errors
/// `Corrupt` when a snapshot's map cannot be read: nobody knows what it names then. The store's.
pub(super) async fn borrowers(store: &dyn Store, m: &Manifest) -> Result<Vec<String>> {
    let mut found = Vec::new();
    // None can, once the volume itself does not.
    for s in m.snapshots.iter().filter(|_| !m.flattened) {
        let Some(c) = &s.checkpoint else { continue };
        let borrows = c.is_borrowed() || {
            let image = load_checkpoint(store, &m.at_snapshot(s), Some(c)).await;
            let image = image.map_err(|e| e.context(format!("reading the map of snapshot {:?}", s.name)))?;
            image.runs().any(|r| r.to.is_some_and(|at| at.source() != 0))
        };
        if borrows {
            found.push(s.name.clone());
        }
    }
    Ok(found)
}

/// Has the manifest say that neither the volume's map nor any of its snapshots' names a parent, and removes the ref. May be done again.
///
/// # Errors
/// `Fenced` when the volume is another's by now; the store's.
pub(super) async fn cut_tie(store: &dyn Store, published: &mut Published) -> Result<()> {
    // What was copied is of no group: without this copy a rebuild would not know that it counts.
    let alone = Manifest { flattened: true, ..published.manifest.clone() };
    keep_copy(store, &alone).await?;
    if !published.manifest.flattened {
        published
            .change(store, By::Attachment, |m| {
                m.flattened = true;
                Ok(())
            })
            .await?;
    }
    forget_parent(store, &published.manifest).await
}

async fn undo(store: &dyn Store, new: &str, uuid: Uuid, ref_key: &str) -> Result<()> {
    let undoing = |e: Error| {
        e.context(format!("undoing the clone {new:?}; `vb-ublk volume delete {new}` removes what is left of it"))
    };
    let there = Published::load(store, new).await;
    if there.is_ok_and(|p| p.manifest.uuid == uuid) {
        store.delete(&manifest::key(new)).await.map_err(undoing)?;
    }
    store.delete(ref_key).await.map_err(undoing)
}

/// Removes the ref of a volume that needs its parent no more, or is gone.
///
/// # Errors
/// The store's.
pub(super) async fn forget_parent(store: &dyn Store, m: &Manifest) -> Result<()> {
    let Some(p) = m.parents.first() else { return Ok(()) };
    let key = ref_key(&p.name, p.snapshot, &m.name, m.uuid);
    store.delete(&key).await.map_err(|e| e.context(format!("deleting {key} in {}", store.url())))
}
