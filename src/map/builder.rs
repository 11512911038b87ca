//! Checkpoint parts put together to a base image.

use super::checkpoint::{Part, PartKind, bad, same};
use super::image::BaseImage;
use super::runs::Run;
use crate::codec::CodecError;

/// Puts an image together from its parts, which may come in any order.
pub struct ImageBuilder {
    img: BaseImage,
    full: Seen,
    delta: Seen,
    /// The delta's parts by index: they are laid over the full image when that is whole.
    runs: Vec<(u32, Vec<Run>)>,
}

/// Which parts have come. The number of parts is the first one's word, which the others must keep.
#[derive(Default)]
struct Seen {
    parts: u32,
    come: std::collections::BTreeSet<u32>,
}

impl Seen {
    fn add(&mut self, part: &Part) -> Result<(), CodecError> {
        if self.come.is_empty() {
            self.parts = part.parts;
        }
        same("number of parts", part.parts, self.parts)?;
        if !self.come.insert(part.part) {
            return Err(bad(format!("part {} was given twice", part.part)));
        }
        Ok(())
    }

    fn whole(&self) -> bool {
        self.come.len() == self.parts as usize
    }
}

impl ImageBuilder {
    /// A builder for a volume of `volume_blocks`.
    #[must_use]
    pub fn new(volume_blocks: u64) -> Self {
        let img = BaseImage::empty(volume_blocks);
        Self { img, full: Seen::default(), delta: Seen::default(), runs: Vec::new() }
    }

    /// A builder that lays a delta over an image that is whole already.
    #[must_use]
    pub fn over(img: BaseImage) -> Self {
        Self { img, full: Seen::default(), delta: Seen::default(), runs: Vec::new() }
    }

    /// Takes a part of the full image.
    ///
    /// # Errors
    /// A part of a delta, of a larger volume, one given before, or one that maps a leaf of another part.
    pub fn full_part(&mut self, part: Part) -> Result<&mut Self, CodecError> {
        self.fits(&part, PartKind::Full)?;
        self.full.add(&part)?;
        for (l, leaf) in part.leaves {
            if !self.img.leaf(l.into()).is_empty() {
                return Err(bad(format!("leaf {l} comes in two parts")));
            }
            self.img.set_leaf(l.into(), leaf);
        }
        Ok(self)
    }

    /// Takes a part of the delta.
    ///
    /// # Errors
    /// A part of a full image, of a larger volume, or one given before.
    pub fn delta_part(&mut self, part: Part) -> Result<&mut Self, CodecError> {
        self.fits(&part, PartKind::Delta)?;
        self.delta.add(&part)?;
        self.runs.push((part.part, part.runs));
        Ok(self)
    }

    fn fits(&self, part: &Part, kind: PartKind) -> Result<(), CodecError> {
        same("kind", part.kind.code(), kind.code())?;
        if part.volume_blocks > self.img.volume_blocks() {
            let (got, have) = (part.volume_blocks, self.img.volume_blocks());
            return Err(bad(format!("it maps {got} blocks, the volume has {have}")));
        }
        Ok(())
    }

    /// The image.
    ///
    /// # Errors
    /// When parts are missing. Without any full part the image starts empty: the delta alone counts.
    pub fn finish(self) -> Result<BaseImage, CodecError> {
        let (mut img, delta) = self.whole()?;
        delta.iter().for_each(|runs| img.apply_runs(runs));
        Ok(img)
    }

    /// What the delta alone changes, in order.
    ///
    /// # Errors
    /// When parts are missing.
    pub fn finish_delta(self) -> Result<Vec<Run>, CodecError> {
        Ok(self.whole()?.1.concat())
    }

    /// The full image, and the delta part by part.
    fn whole(mut self) -> Result<(BaseImage, Vec<Vec<Run>>), CodecError> {
        for (seen, name) in [(&self.full, "full image"), (&self.delta, "delta")] {
            if !seen.whole() {
                return Err(bad(format!("{} of {} parts of the {name} are there", seen.come.len(), seen.parts)));
            }
        }
        self.runs.sort_unstable_by_key(|r| r.0);
        let runs: Vec<Vec<Run>> = self.runs.into_iter().map(|(_, runs)| runs).collect();
        let mut end = 0;
        for r in &runs {
            if r.first().is_some_and(|r| r.block.0 < end) {
                return Err(bad("the delta's parts overlap"));
            }
            end = r.last().map_or(end, Run::end);
        }
        Ok((self.img, runs))
    }
}
