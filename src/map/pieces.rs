//! What a lookup hands out, put together.

use super::leaf::Leaf;
use super::location::Location;
use super::types::{Piece, Source};
use crate::units::{Lba, SECTORS_PER_BLOCK};

/// Gathers a lookup's pieces behind what `out` held before.
pub(super) struct Pieces<'a> {
    pub(super) own: usize,
    pub(super) out: &'a mut Vec<Piece>,
}

impl Pieces<'_> {
    /// Sectors `from..to` of the leaf that starts at `start`, as the base has them.
    pub(super) fn base(&mut self, start: u64, from: u16, to: u16, leaf: &Leaf) {
        let spb = SECTORS_PER_BLOCK as usize;
        let (from, to) = (usize::from(from), usize::from(to));
        let mut at = from;
        let mut push = |at: usize, end: usize, what: Source| {
            if at < end {
                self.push(start + at as u64, (end - at) as u16, what);
            }
        };
        leaf.stretches(from / spb, to.div_ceil(spb), |first, len, raw| {
            let (a, b) = ((first * spb).max(from), ((first + len) * spb).min(to));
            push(at, a, Source::Zero);
            push(a, b, Location::from_raw(raw).map_or(Source::Zero, chunk_source));
            at = b;
        });
        push(at, to, Source::Zero);
    }

    pub(super) fn push(&mut self, lba: u64, sectors: u16, what: Source) {
        let (lba, sectors) = (Lba(lba), u32::from(sectors));
        if let Some(last) = self.out[self.own..].last_mut() {
            let blocks = lba.block().0 - last.lba.block().0;
            let goes_on = match (last.what, what) {
                (Source::Zero, Source::Zero) => true,
                (Source::Chunk(a), Source::Chunk(b)) | (Source::Damaged(a), Source::Damaged(b)) => {
                    a.leads_to(blocks, b)
                }
                _ => false,
            };
            if let Some(sum) = last.sectors.checked_add(sectors).filter(|_| goes_on) {
                last.sectors = sum;
                return;
            }
        }
        self.out.push(Piece { lba, sectors, what });
    }
}

const fn chunk_source(at: Location) -> Source {
    if at.is_damaged() { Source::Damaged(at) } else { Source::Chunk(at) }
}
