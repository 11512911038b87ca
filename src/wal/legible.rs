//! Reading a log on a disk that cannot read all of its sectors. What it cannot read is damage like any other: it is told by its place,
//! and what is good around it is had all the same.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io;
use std::ops::Range;

use nix::errno::Errno;

use super::codec::SUPERBLOCK_AT;
use crate::disk::{Disk, IoBuf};
use crate::units::BLOCK;

/// What a block that cannot be read is filled with: nothing that is written has a checksum that fits.
const ILLEGIBLE: u8 = 0xa5;

/// A log's disk, and what could not be read of it so far.
pub(super) struct Legible<'a, D> {
    disk: &'a D,
    /// Bytes at which such blocks begin.
    bad: RefCell<BTreeSet<u64>>,
}

impl<'a, D: Disk> Legible<'a, D> {
    pub(super) const fn new(disk: &'a D) -> Self {
        Self { disk, bad: RefCell::new(BTreeSet::new()) }
    }

    /// Fills `dst`, blocks that cannot be read with something that no checksum fits.
    ///
    /// # Errors
    /// Any but those of single sectors.
    pub(super) async fn read_at(&self, offset: u64, dst: IoBuf) -> io::Result<()> {
        let bad = read_legible(self.disk, offset, &dst).await?;
        self.bad.borrow_mut().extend(bad);
        Ok(())
    }

    /// The first block in a range of bytes that could not be read.
    pub(super) fn bad_in(&self, range: Range<u64>) -> Option<u64> {
        self.bad.borrow().range(range).next().copied()
    }
}

/// Whether an error of a read is one of the sectors that were to be read, and not of the disk as a whole.
#[must_use]
pub(crate) fn is_bad_sector(e: &io::Error) -> bool {
    let errno = e.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EIO | Errno::ENODATA | Errno::EILSEQ | Errno::EBADMSG))
}

/// Fills `dst`, whole blocks, from `offset`; those that cannot be read are filled with something that no checksum fits, and returned: the bytes
/// at which they begin.
///
/// # Errors
/// Any but those of single sectors: a disk that cannot read its superblocks either may come back, and with it what it holds.
pub(crate) async fn read_legible<D: Disk>(disk: &D, offset: u64, dst: &IoBuf) -> io::Result<Vec<u64>> {
    match disk.read_at(offset, dst.clone()).await {
        Err(e) if is_bad_sector(&e) => {}
        read => return read.map(|()| Vec::new()),
    }
    let mut bad = Vec::new();
    for from in (0..dst.len()).step_by(BLOCK) {
        let block = dst.slice(from..(from + BLOCK).min(dst.len()));
        let at = offset + from as u64;
        match disk.read_at(at, block.clone()).await {
            Ok(()) => {}
            Err(e) if is_bad_sector(&e) => {
                if !is_alive(disk).await {
                    return Err(e);
                }
                // The disk may have been away at that moment, or busy with the sector before.
                if disk.read_at(at, block.clone()).await.is_ok() {
                    continue;
                }
                block.copy_in(0, &[ILLEGIBLE; BLOCK][..block.len()]);
                bad.push(at);
            }
            Err(e) => return Err(e),
        }
    }
    Ok(bad)
}

async fn is_alive<D: Disk>(disk: &D) -> bool {
    for at in SUPERBLOCK_AT {
        if disk.read_at(at, IoBuf::zeroed(BLOCK)).await.is_ok() {
            return true;
        }
    }
    false
}
