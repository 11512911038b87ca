//! `--accept-loss`: a damaged log, kept whole under another name, and ended before its damage.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::disk::file::{DataFile, sync_parent};
use crate::disk::{Disk, IoBuf};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::wal::create::SuperblockFile;
use crate::wal::legible::read_legible;
use crate::wal::salvage::{end_before_damage, look};

/// Bytes copied at once.
const COPY: usize = 1 << 20;

/// Ends a log before its damage, if it has any. Before anything is changed it is copied to `LOG.lost-N`.
///
/// # Errors
/// `Unsupported` for a damaged log on a block device, with the way to go; the I/O error.
pub(super) async fn accept_loss<D: Disk>(file: &DataFile, disk: &D, sb: &mut SuperblockFile) -> Result<()> {
    let path = file.path();
    let doing = || format!("ending the log {} before its damage", path.display());
    let Some(damaged) = look(disk, file.size()?, sb).await.context(doing)? else {
        tracing::warn!("--accept-loss: the log {} is whole; nothing of it is given up", path.display());
        return Ok(());
    };
    if file.is_device() {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "the log on {0} is damaged, and it is kept as it is: copy it with `dd if={0} of=DIR/VOLUME.wal bs=4k iflag=direct conv=noerror,sync` and attach with --wal-dir DIR \
                 --accept-loss",
                path.display()
            ),
        )
        .with_source(damaged.why));
    }
    let kept = keep(file, disk).await?;
    end_before_damage(disk, file.size()?, sb).await.context(doing)?;
    tracing::warn!(
        "the log {} was damaged, and by --accept-loss it ends with entry {} now: {}; {}; it is kept as it was as {}",
        path.display(),
        damaged.behind.last_kept,
        damaged.why,
        damaged.behind,
        kept.display()
    );
    Ok(())
}

/// Copies a log to the first name that is free; what cannot be read of it fits no checksum there. The name is there only when the copy is
/// durable.
async fn keep<D: Disk>(file: &DataFile, disk: &D) -> Result<PathBuf> {
    let path = file.path();
    let named = |end: String| {
        let mut name = path.as_os_str().to_owned();
        name.push(end);
        PathBuf::from(name)
    };
    let mut n = 1;
    while named(format!(".lost-{n}")).exists() {
        n += 1;
    }
    let (kept, part) = (named(format!(".lost-{n}")), named(format!(".lost-{n}.part")));
    let copied = copy_legible(disk, file.size()?, &part)
        .await
        .and_then(|()| fs::rename(&part, &kept))
        .context(|| format!("copying the damaged log {} to {} before it is changed", path.display(), kept.display()));
    if copied.is_err() {
        // Best effort: half a copy is of no use.
        let _ = fs::remove_file(&part);
    }
    copied?;
    sync_parent(&kept)?;
    Ok(kept)
}

async fn copy_legible<D: Disk>(disk: &D, size: u64, to: &Path) -> io::Result<()> {
    let to = File::options().write(true).create(true).truncate(true).mode(0o600).open(to)?;
    let buf = IoBuf::zeroed(COPY);
    let mut at = 0;
    while at < size {
        let part = buf.slice(0..(size - at).min(COPY as u64) as usize);
        read_legible(disk, at, &part).await?;
        to.write_all_at(part.bytes(), at)?;
        at += part.len() as u64;
    }
    to.sync_all()
}
