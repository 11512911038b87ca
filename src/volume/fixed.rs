//! A snapshot, served to be read.
//!
//! Invariants:
//! - Nothing is taken, packed or published, here or in the store: any number of hosts may serve one snapshot, beside the volume itself.
//! - Nothing is ever written to the log: it is there because a volume has one, and its file has no name.

use std::path::Path;
use std::sync::Arc;

use super::Parts;
use super::attach::{Attached, Stores};
use super::boot::BootOf;
use super::start::{Place, start_log};
use crate::config::FlushTo;
use crate::disk::file::DataFile;
use crate::disk::uring::{TokioTimer, UringDisk};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::gc::Policy;
use crate::manifest::Published;
use crate::manifest::images::load_image;
use crate::map::Maps;
use crate::store::Store;
use crate::units::{SECTOR, Seq};
use crate::wal::create::{MIN_LOG_BYTES, SuperblockFile, geometry_for, new_superblock};
use crate::wal::replay::Replay;

/// Serves `snapshot` of `volume`. `log_path` is where a file of a few MiB is made, which is gone when the volume is let go of.
///
/// # Errors
/// `NotFound` when there is no such volume or snapshot, `Corrupt`; the store's, and those of the log's folder.
pub(super) async fn open(
    stores: Stores,
    (volume, snapshot): (&str, &str),
    log_path: &Path,
    io_timeout: Option<std::time::Duration>,
    mut salt: Box<dyn FnMut() -> u64 + Send>,
) -> Result<Attached<UringDisk, TokioTimer>> {
    let store: &dyn Store = &*stores.attach;
    let published = Published::load(store, volume).await?;
    let entry = published.manifest.snapshot(snapshot)?;
    let of = BootOf::snapshot(&published.manifest, entry);
    let m = published.manifest.at_snapshot(entry);
    let maps = Arc::new(Maps::new(m.size_bytes / SECTOR as u64));
    maps.load_base(&load_image(store, &m).await?);

    // Another process may serve the same snapshot.
    let log_path = &log_path.with_extension(format!("{}.tmp", std::process::id()));
    if let Some(folder) = log_path.parent() {
        std::fs::create_dir_all(folder).context(|| format!("making the log's folder {}", folder.display()))?;
    }
    if log_path.exists() {
        let what = format!(
            "{} is in the way: a snapshot that is served needs a file of its own there for a moment",
            log_path.display()
        );
        return Err(Error::new(ErrorKind::Exists, what));
    }
    let file = Arc::new(DataFile::open(log_path, true)?);
    std::fs::remove_file(log_path).context(|| format!("unlinking {}", log_path.display()))?;
    let disk = UringDisk::new(&file).context(|| format!("opening {} a second time", log_path.display()))?;
    let geometry = geometry_for(MIN_LOG_BYTES)?;
    let first = new_superblock(m.uuid, salt(), geometry, m.size_bytes / SECTOR as u64, m.logical_block);
    let mut sb = SuperblockFile::create(&disk, first).await?;
    let replay = Replay { next_generation: 1, ..Replay::default() };
    let at = Place { disk: &disk, file: &file, geometry };
    let log = start_log(at, &mut sb, salt, replay, Seq(0), &maps).await?;
    let parts = Parts {
        name: format!("{volume}@{snapshot}"),
        uuid: m.uuid,
        size_bytes: m.size_bytes,
        logical_block: m.logical_block,
        read_only: true,
        // Nothing is ever written that a flush would have to wait for.
        flush_to: FlushTo::Wal,
        io_timeout,
        gc: Policy::off(),
        store_url: store.url(),
        log,
        log_file: file,
        maps,
    };
    let mut attached = Attached::new(parts, stores.background, disk, TokioTimer);
    attached.reader.keys().set(&m);
    attached.volume.set_boot(of);
    attached.background.serve_fixed();
    Ok(attached)
}
