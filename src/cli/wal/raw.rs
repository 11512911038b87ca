//! A raw image in the making: a new, sparse file, and which of its sectors mean something.
//!
//! Invariants:
//! - Where no data was laid, the file is a hole.
//! - The file is removed unless it was finished.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use serde::Serialize;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::units::{BLOCK, SECTOR};

/// What a stretch of the image means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Kind {
    /// The file has the sectors.
    Data,
    /// The sectors read as zeros.
    Hole,
    /// What the sectors held is lost.
    Damaged,
}

/// So many sectors from `lba` on.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Extent {
    pub(super) lba: u64,
    pub(super) sectors: u64,
    pub(super) kind: Kind,
}

/// The newest meaning of each sector: start → end, kind; disjoint.
#[derive(Default)]
struct Extents(BTreeMap<u64, (u64, Kind)>);

impl Extents {
    /// Lays a newer extent over what is there; returns the data that it covers.
    fn lay(&mut self, new: Range<u64>, kind: Kind) -> Vec<Range<u64>> {
        let first = self.0.range(..new.start).next_back().map_or(new.start, |(start, _)| *start);
        let met = self.0.range(first..new.end).filter(|(_, (end, _))| *end > new.start);
        let met: Vec<_> = met.map(|(start, (end, kind))| (*start, *end, *kind)).collect();
        for &(start, end, kind) in &met {
            self.0.remove(&start);
            if start < new.start {
                self.0.insert(start, (new.start, kind));
            }
            if end > new.end {
                self.0.insert(new.end, (end, kind));
            }
        }
        self.0.insert(new.start, (new.end, kind));
        let data = met.into_iter().filter(|(_, _, kind)| *kind == Kind::Data);
        data.map(|(start, end, _)| start.max(new.start)..end.min(new.end)).collect()
    }

    /// In order; neighbours of one kind are one.
    fn joined(&self) -> Vec<Extent> {
        let mut all: Vec<Extent> = Vec::new();
        for (&lba, &(end, kind)) in &self.0 {
            match all.last_mut() {
                Some(last) if last.kind == kind && last.lba + last.sectors == lba => last.sectors = end - last.lba,
                _ => all.push(Extent { lba, sectors: end - lba, kind }),
            }
        }
        all
    }
}

/// See the module's page.
pub(super) struct RawImage {
    file: File,
    path: PathBuf,
    extents: Extents,
    finished: bool,
}

impl RawImage {
    /// Makes the file, of `bytes` and all a hole.
    pub(super) fn create(path: &Path, bytes: u64) -> Result<Self> {
        let making = || format!("making the image {}", path.display());
        let file = match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                let what = format!("{} exists already, and is not written over: name a new file", path.display());
                return Err(Error::new(ErrorKind::Exists, what));
            }
            opened => opened.context(making)?,
        };
        let image = Self { file, path: path.to_owned(), extents: Extents::default(), finished: false };
        image.file.set_len(bytes).context(|| format!("{} with a size of {bytes} bytes", making()))?;
        Ok(image)
    }

    fn writing(&self) -> impl Fn() -> String {
        let path = self.path.clone();
        move || format!("writing {} (it is removed: make room, or name another place)", path.display())
    }

    pub(super) fn data(&mut self, lba: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, lba * SECTOR as u64).context(self.writing())?;
        self.extents.lay(lba..lba + (bytes.len() / SECTOR) as u64, Kind::Data);
        Ok(())
    }

    /// A hole, or damage: older data must not show through.
    pub(super) fn blank(&mut self, lba: u64, sectors: u64, kind: Kind) -> Result<()> {
        for covered in self.extents.lay(lba..lba + sectors, kind) {
            self.clear(covered).context(self.writing())?;
        }
        Ok(())
    }

    fn clear(&self, sectors: Range<u64>) -> io::Result<()> {
        let (from, end) = (sectors.start * SECTOR as u64, sectors.end * SECTOR as u64);
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(&self.file, mode, from as i64, (end - from) as i64) {
            // Not every file system has holes; zeros say the same.
            Err(Errno::EOPNOTSUPP) => {
                let zeros = [0; BLOCK];
                let mut pieces = (from..end).step_by(BLOCK);
                pieces.try_for_each(|at| self.file.write_all_at(&zeros[..BLOCK.min((end - at) as usize)], at))
            }
            done => done.map_err(Into::into),
        }
    }

    /// Makes the file and its name survive a power cut; says what is in it.
    pub(super) fn finish(mut self) -> Result<Vec<Extent>> {
        self.file.sync_all().context(|| format!("syncing {} (it is removed)", self.path.display()))?;
        super::engine::sync_parent(&self.path)?;
        self.finished = true;
        Ok(self.extents.joined())
    }
}

impl Drop for RawImage {
    fn drop(&mut self) {
        if !self.finished
            && let Err(e) = std::fs::remove_file(&self.path)
        {
            tracing::warn!("{} is incomplete, and could not be removed: {e}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(lba: u64, sectors: u64, kind: Kind) -> Extent {
        Extent { lba, sectors, kind }
    }

    #[test]
    fn newer_extents_cover_older_ones() {
        let mut x = Extents::default();
        assert!(x.lay(0..100, Kind::Data).is_empty());
        assert!(x.lay(100..120, Kind::Data).is_empty());
        assert_eq!(x.lay(40..110, Kind::Hole), [40..100, 100..110]);
        assert!(x.lay(60..70, Kind::Data).is_empty());
        assert_eq!(x.lay(65..66, Kind::Damaged).first(), Some(&(65..66)));
        let want = [
            extent(0, 40, Kind::Data),
            extent(40, 20, Kind::Hole),
            extent(60, 5, Kind::Data),
            extent(65, 1, Kind::Damaged),
            extent(66, 4, Kind::Data),
            extent(70, 40, Kind::Hole),
            extent(110, 10, Kind::Data),
        ];
        assert_eq!(x.joined(), want);
        assert_eq!(x.lay(0..200, Kind::Data), [0..40, 60..65, 66..70, 110..120]);
        assert_eq!(x.joined(), [extent(0, 200, Kind::Data)]);
    }

    #[test]
    fn an_image_is_sparse_and_older_data_does_not_show_through() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("out");
        let mut image = RawImage::create(&path, 64 << 20).expect("made");
        image.data(1, &[7; 8192]).expect("data");
        image.blank(3, 5, Kind::Hole).expect("hole");
        image.blank(8, 2, Kind::Damaged).expect("damage");
        image.blank(1 << 16, 1 << 16, Kind::Hole).expect("hole");
        let extents = image.finish().expect("finished");
        let want = [
            extent(1, 2, Kind::Data),
            extent(3, 5, Kind::Hole),
            extent(8, 2, Kind::Damaged),
            extent(10, 7, Kind::Data),
            extent(1 << 16, 1 << 16, Kind::Hole),
        ];
        assert_eq!(extents, want);
        let bytes = std::fs::read(&path).expect("read");
        assert_eq!(bytes.len(), 64 << 20);
        for (i, sector) in bytes.chunks(SECTOR).enumerate() {
            let fill = if matches!(i, 1..3 | 10..17) { 7 } else { 0 };
            assert!(sector.iter().all(|b| *b == fill), "sector {i}");
        }
        assert!(std::fs::metadata(&path).expect("there").blocks() * 512 < 1 << 20);
        assert_eq!(RawImage::create(&path, 512).err().map(|e| e.kind()), Some(ErrorKind::Exists));
        assert_eq!(std::fs::read(&path).expect("still there").len(), 64 << 20);
    }

    #[test]
    fn an_image_that_is_not_finished_is_removed() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("out");
        let mut image = RawImage::create(&path, 1 << 20).expect("made");
        image.data(0, &[7; 512]).expect("data");
        assert!(path.exists());
        drop(image);
        assert!(!path.exists());
    }
}
