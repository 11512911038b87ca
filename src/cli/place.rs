//! Where write-ahead logs and stores may be.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::args::CacheArgs;
use super::engine::{self, CachePlace};
use super::layers::ublk_below;
use super::settings::{LogPlace, Settings};
use super::state::remove_if_there;
use crate::config::{ByteSize, VolumeName};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::store::StoreUrl;

/// The most that a log takes in its folder, unless told otherwise.
pub(super) const DEFAULT_WAL: ByteSize = ByteSize(1 << 30);
/// The most that a cache takes, unless told otherwise.
const DEFAULT_CACHE: ByteSize = ByteSize(4 << 30);

pub(super) fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).context(|| format!("finding the absolute path of {:?}", path.display()))
}

fn on_ublk(what: &str, path: &Path, device: &str) -> Error {
    let what = format!(
        "{what} {} is on {device}, itself a ublk device, and could wait for itself: choose a place on a local disk",
        path.display()
    );
    Error::new(ErrorKind::Usage, what)
}

/// Refuses a folder on a ublk device. For one that is not there yet, its nearest ancestor counts.
pub(super) fn not_on_ublk(what: &str, path: &Path) -> Result<()> {
    let meta = path.ancestors().find_map(|p| std::fs::metadata(p).ok());
    match meta.and_then(|m| ublk_below(Path::new("/sys"), m.dev())) {
        Some(device) => Err(on_ublk(what, path, &device)),
        None => Ok(()),
    }
}

/// Makes the folder of logs, or checks that it can be written to.
pub(super) fn wal_folder(dir: &Path) -> Result<()> {
    folder("the folder of the write-ahead log", "--wal-dir", dir)
}

/// Makes a folder of ours, or checks that it can be written to; `option` chooses another.
fn folder(what: &str, option: &str, dir: &Path) -> Result<()> {
    not_on_ublk(what, dir)?;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .context(|| format!("making {what} {} (choose another with {option})", dir.display()))?;
    if nix::unistd::access(dir, nix::unistd::AccessFlags::W_OK).is_err() {
        let what = format!("{what} {} cannot be written to: choose another with {option}", dir.display());
        return Err(Error::new(ErrorKind::Denied, what));
    }
    Ok(())
}

/// Makes the log's folder and names the log.
pub(super) fn wal_file(dir: &Path, volume: &VolumeName) -> Result<PathBuf> {
    wal_folder(dir)?;
    Ok(dir.join(format!("{volume}.wal")))
}

/// Where caches are, and how large each is.
#[derive(Debug, Clone)]
pub(super) struct CacheFolder {
    dir: PathBuf,
    bytes: u64,
}

impl CacheFolder {
    /// That of a volume.
    pub(super) fn of(&self, volume: &VolumeName) -> CachePlace {
        CachePlace { path: engine::cache_file(&self.dir, volume.as_str()), bytes: self.bytes }
    }
}

/// Where caches are, if there are to be any. A folder that is the store needs no copy of itself unless somebody asks for it; and
/// what nobody asks for is no reason to refuse a volume.
pub(super) fn cache_folder(wanted: CacheArgs, settings: &Settings) -> Result<Option<CacheFolder>> {
    let CacheArgs { cache_dir, cache_size } = wanted.or(&settings.add.cache);
    let asked_for = cache_dir.is_some() || cache_size.is_some();
    let usual = if matches!(settings.store, StoreUrl::S3 { .. }) { DEFAULT_CACHE } else { ByteSize(0) };
    let bytes = cache_size.unwrap_or(usual).0;
    if bytes == 0 {
        return Ok(None);
    }
    engine::check_cache_size(bytes)?;
    let dir = absolute(&cache_dir_of(cache_dir, settings))?;
    match folder("the folder of the cache", "--cache-dir", &dir) {
        Err(e) if !asked_for => {
            tracing::warn!("without a local cache: {e}");
            Ok(None)
        }
        made => made.map(|()| Some(CacheFolder { dir, bytes })),
    }
}

fn cache_dir_of(chosen: Option<PathBuf>, settings: &Settings) -> PathBuf {
    chosen.unwrap_or_else(|| settings.data_dir.join("cache"))
}

/// Removes the cache of a volume or a snapshot that is no more, and those of its snapshots, where somebody or this host's settings have
/// them.
pub(super) fn forget_cache(chosen: Option<PathBuf>, settings: &Settings, volume: &VolumeName) {
    let dir = cache_dir_of(chosen, settings);
    let of_snapshots = std::fs::read_dir(&dir).into_iter().flatten().flatten().map(|f| f.path()).filter(|p| {
        let name = p.file_name().unwrap_or_default().to_string_lossy();
        name.strip_prefix(volume.as_str()).is_some_and(|rest| rest.starts_with('@') && rest.ends_with(".cache"))
    });
    for path in of_snapshots.chain([engine::cache_file(&dir, volume.as_str())]) {
        if let Err(e) = remove_if_there(&path) {
            tracing::warn!("the cache {} is of no use any more, and cannot be removed: {e}", path.display());
        }
    }
}

/// The log's path, and how much it may take: `most` of a folder, which is made, or the whole of a device.
pub(super) fn log_at(place: &LogPlace, volume: &VolumeName, most: ByteSize) -> Result<(PathBuf, u64)> {
    match place {
        LogPlace::Device(device) => Ok((absolute(device)?, wal_device(device)?)),
        LogPlace::Dir(dir) => Ok((wal_file(&absolute(dir)?, volume)?, most.0)),
    }
}

/// Checks that a device can be a log; returns how much of it is used.
pub(super) fn wal_device(path: &Path) -> Result<u64> {
    let opening = || format!("opening the write-ahead log's device {}", path.display());
    let meta = std::fs::metadata(path).context(opening)?;
    if !meta.file_type().is_block_device() {
        let what = format!("{} is not a block device: name one, or use --wal-dir", path.display());
        return Err(Error::new(ErrorKind::Usage, what));
    }
    if let Some(device) = ublk_below(Path::new("/sys"), meta.rdev()) {
        return Err(on_ublk("the write-ahead log's device", path, &device));
    }
    // O_EXCL on a device: nobody has it mounted, or in a mapping.
    let mut file: File = match OpenOptions::new().read(true).write(true).custom_flags(nix::libc::O_EXCL).open(path) {
        Err(e) if e.raw_os_error() == Some(nix::libc::EBUSY) => {
            let what = format!("{} is mounted or in use: a write-ahead log needs a device of its own", path.display());
            return Err(Error::new(ErrorKind::Busy, what));
        }
        opened => opened.context(opening)?,
    };
    let size = file.seek(SeekFrom::End(0)).context(|| format!("reading the size of {}", path.display()))?;
    let used = size.min(engine::MAX_LOG_BYTES);
    engine::check_log_size(used).map_err(|e| e.context(format!("{} as the write-ahead log", path.display())))?;
    Ok(used)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_has_a_place() {
        let dir = tempfile::tempdir().expect("dir");
        let v: VolumeName = "v".parse().expect("name");
        let wal = wal_file(&dir.path().join("a/b"), &v).expect("made");
        assert_eq!(wal, dir.path().join("a/b/v.wal"));
        assert_eq!(wal_device(dir.path()).expect_err("a folder").kind(), ErrorKind::Usage);
        assert_eq!(wal_device(&dir.path().join("none")).expect_err("none").kind(), ErrorKind::NotFound);
    }
}
