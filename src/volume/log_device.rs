//! A block device as a log: it is used whole.

use std::os::unix::fs::FileExt;

use crate::disk::IoBuf;
use crate::disk::file::DataFile;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::units::BLOCK;
use crate::wal::codec::{SLOTS_START, SUPERBLOCK_AT, Superblock};
use crate::wal::create::{MAX_LOG_BYTES, geometry_for};
use crate::wal::legible::is_bad_sector;
use crate::wal::log::Geometry;

/// The sizes of a log that fills it.
pub(super) fn device_geometry(file: &DataFile) -> Result<Geometry> {
    let room = file.size()?.saturating_sub(SLOTS_START).min(MAX_LOG_BYTES);
    geometry_for(room).map_err(|e| e.context(format!("{} as a log", file.path().display())))
}

/// A device is used whole, so it must be empty or ours.
pub(super) fn check_device(file: &DataFile) -> Result<()> {
    // O_DIRECT wants an aligned buffer; the first MiB is where partition tables and file systems show.
    let mut head = IoBuf::zeroed(SLOTS_START as usize);
    let handle = file.dup().context(|| format!("opening {} a second time", file.path().display()))?;
    // Block by block: of one that cannot be read nothing is known.
    for (at, block) in head.bytes_mut().chunks_mut(BLOCK).enumerate() {
        match handle.read_exact_at(block, (at * BLOCK) as u64) {
            Err(e) if !is_bad_sector(&e) => return Err(e).context(|| format!("reading {}", file.path().display())),
            _ => {}
        }
    }
    let ours = SUPERBLOCK_AT.iter().any(|at| Superblock::decode(&head.bytes()[*at as usize..][..BLOCK]).is_ok());
    if !ours && head.bytes().iter().any(|b| *b != 0) {
        return Err(Error::new(
            ErrorKind::Busy,
            format!(
                "{} is not empty (its first MiB holds data) and not a vb-ublk log: if nothing on it is needed, wipe it with `wipefs -a` and `dd if=/dev/zero bs=1M count=1`",
                file.path().display()
            ),
        ));
    }
    Ok(())
}
