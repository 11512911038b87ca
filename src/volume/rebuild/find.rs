//! What there is of a volume in the store.

use uuid::Uuid;

use super::history::Named;
use super::local::LocalLog;
use crate::chunk::header;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::{self, Manifest};
use crate::store::{Store, Version, list_folder};
use crate::units::{Epoch, Nonce};
use crate::volume::stale::{check_chunks, check_log};

/// The manifest as it was found.
pub(super) enum Found {
    Good(Box<Manifest>, Version),
    /// Good, and older than the volume: why.
    Old(Box<Manifest>, Version, String),
    Damaged(bytes::Bytes, Version, String),
    Missing,
}

pub(super) async fn find_manifest(store: &dyn Store, name: &str) -> Result<Found> {
    let key = manifest::key(name);
    let mut why = String::new();
    // A bit may have flipped on the way.
    for last in [false, true] {
        let (bytes, version) = match store.get(&key).await {
            Ok(got) => got,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Found::Missing),
            Err(e) => return Err(e.context(format!("reading {key} in {}", store.url()))),
        };
        match Manifest::decode(&bytes) {
            Ok(m) if m.name == name => return Ok(Found::Good(Box::new(m), version)),
            Ok(m) => why = format!("it is the manifest of volume {:?}", m.name),
            Err(e) if e.kind() == ErrorKind::Corrupt => why = e.to_string(),
            Err(e) => return Err(e.context(format!("reading {key} in {}", store.url()))),
        }
        if last {
            return Ok(Found::Damaged(bytes, version, why));
        }
    }
    Err(Error::new(ErrorKind::Internal, format!("reading {key}: {why}")))
}

/// Whether a good manifest is older than the volume: by its chunks, and by the log here.
///
/// # Errors
/// The store's.
pub(super) async fn judge_age(
    store: &dyn Store,
    found: Found,
    named: &[Named],
    log: Option<&LocalLog>,
) -> Result<Found> {
    let Found::Good(m, version) = found else { return Ok(found) };
    let prefix = manifest::prefix(&m.name);
    let later = named.iter().filter(|n| n.epoch > m.epoch);
    let later: Vec<_> = later.map(|n| (n.epoch, header::key(&prefix, n.chunk, n.epoch, n.nonce))).collect();
    let checked = match log.map_or(Ok(()), |l| check_log(store, &m, &l.superblock)) {
        Ok(()) => check_chunks(store, &m, &later).await,
        old => old,
    };
    match checked {
        Ok(()) => Ok(Found::Good(m, version)),
        Err(e) if e.kind() == ErrorKind::Corrupt => Ok(Found::Old(m, version, e.to_string())),
        Err(e) => Err(e),
    }
}

/// All chunks that there are, in order of number.
pub(super) async fn list_chunks(store: &dyn Store, name: &str) -> Result<Vec<Named>> {
    let folder = format!("{}chunks/", manifest::prefix(name));
    let listed = list_folder(store, &folder).await?;
    let parse = |key: &str| key.strip_prefix(&folder).and_then(header::parse_name);
    let mut named: Vec<Named> = listed
        .iter()
        .filter_map(|o| parse(&o.key))
        .map(|(chunk, epoch, nonce)| Named { chunk, epoch, nonce })
        .collect();
    named.sort_unstable();
    Ok(named)
}

/// Number, epoch and nonce of the checkpoints that there are parts of.
pub(super) async fn list_checkpoints(store: &dyn Store, name: &str) -> Result<Vec<(u64, Epoch, Nonce)>> {
    let folder = format!("{}checkpoints/", manifest::prefix(name));
    let listed = list_folder(store, &folder).await?;
    let parse = |key: &str| {
        let mut fields = key.strip_prefix(&folder)?.split('.').next()?.split('-');
        let mut hex = || u64::from_str_radix(fields.next()?, 16).ok();
        Some((hex()?, Epoch(hex()?), Nonce(hex()?)))
    };
    Ok(listed.iter().filter_map(|o| parse(&o.key)).collect())
}

/// Refuses what neither chunks nor a copy of the manifest say: what a clone began with, and what clones of the volume began with.
///
/// # Errors
/// `Unsupported` for either; the store's.
pub(super) async fn stands_alone(store: &dyn Store, name: &str, uuid: Uuid, copy: Option<&Manifest>) -> Result<()> {
    let all = store.list("", None).await.map_err(|e| e.context("looking for clones"))?;
    let refs = all.iter().filter_map(|o| {
        let volume = o.key.split_once("/refs/")?.0;
        manifest::parse_ref_key(volume, &o.key).map(|(snapshot, clone, id)| (volume, snapshot, clone, id))
    });
    for (volume, snapshot, clone, id) in refs {
        let what = if copy.is_some_and(|m| id == uuid || m.snapshots.iter().any(|s| s.id == snapshot)) {
            continue;
        } else if id == uuid && volume != name {
            format!("it is a clone of a snapshot of volume {volume:?}, and its chunks do not say of which")
        } else if volume == name {
            format!("volume {clone:?} was cloned from a snapshot of it, and its chunks do not say what that was")
        } else {
            continue;
        };
        let how = "only its manifest says so: put manifest.json back from a copy of the store";
        return Err(Error::new(ErrorKind::Unsupported, format!("{what}; {how}")));
    }
    Ok(())
}
