//! What a verification tells: figures, and damage with what it means and what to do about it.

use serde::Serialize;

use super::recover::StoreEnd;
use crate::chunk::verify::{Checked, Fault};
use crate::manifest::Manifest;

/// Ranges that are listed. Of a store that has lost everything, the rest is only counted.
const MAX_LISTED: usize = 1 << 16;

/// What is wrong with an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DamageKind {
    /// The manifest is damaged or missing, or older than the volume.
    Manifest,
    /// A checkpoint's part is damaged or missing.
    Checkpoint,
    /// What came after the checkpoint is damaged or not whole.
    Group,
    /// A block is not what was packed.
    Checksum,
    /// The sectors were lost before they were packed.
    Lost,
    /// A chunk that the map names is not there.
    Missing,
    /// A chunk ends early.
    Cut,
    /// A chunk's header is damaged.
    Header,
    /// The store cannot read an object that it has.
    Unreadable,
    /// The map names a chunk that no epoch owns.
    Unowned,
    /// A newer program wrote the object.
    Newer,
}

impl DamageKind {
    /// What it is called in tables, and in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Manifest => "manifest",
            Self::Checkpoint => "checkpoint",
            Self::Group => "group",
            Self::Checksum => "checksum",
            Self::Lost => "lost",
            Self::Missing => "missing",
            Self::Cut => "cut",
            Self::Header => "header",
            Self::Unreadable => "unreadable",
            Self::Unowned => "unowned",
            Self::Newer => "newer",
        }
    }

    /// What it means to those who use the volume.
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Manifest => "the volume cannot be attached, and nothing of it was checked",
            Self::Checkpoint => {
                "the volume cannot be attached, and no block of it was checked: nobody knows where they are"
            }
            Self::Group => "the volume cannot be attached: what was written after its checkpoint hangs on this",
            Self::Lost => "reads of these sectors fail: they were damaged in the log, before they were uploaded",
            Self::Missing => {
                "reads of these sectors fail, and a write of a part of such a 4 KiB block holds up all uploads"
            }
            Self::Checksum | Self::Cut | Self::Header | Self::Unreadable | Self::Unowned => {
                "reads of these sectors fail"
            }
            Self::Newer => "this version of vb-ublk can neither check nor use what is in the object",
        }
    }

    /// What to do about it.
    #[must_use]
    pub const fn advice(self) -> &'static str {
        match self {
            Self::Manifest | Self::Checkpoint => {
                "put the object back from a copy of the store, else `vb-ublk volume rebuild` makes it anew; delete nothing, the \
                 volume's other objects are still needed"
            }
            Self::Group => {
                "put the objects back from a copy of the store, and keep the log of the host that had the volume; `vb-ublk volume \
                 rebuild --dry-run` there says what it would do without them"
            }
            Self::Lost => "write them anew from a backup",
            Self::Newer => "use a newer vb-ublk",
            Self::Checksum | Self::Missing | Self::Cut | Self::Header | Self::Unreadable | Self::Unowned => {
                "put the object back from a copy of the store, or write the blocks anew, whole, from a backup"
            }
        }
    }
}

/// A damaged place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// The first sector that cannot be read. Absent where an object is damaged that is no volume's block.
    pub lba: Option<u64>,
    /// Number of sectors.
    pub sectors: Option<u64>,
    /// What it is.
    pub kind: DamageKind,
    /// The object.
    pub key: String,
    /// How that was seen.
    pub why: String,
    /// What it means.
    pub meaning: &'static str,
    /// What to do.
    pub advice: &'static str,
}

impl Damage {
    /// Damage of an object that holds no blocks, or nobody knows which.
    pub(super) fn of_object(kind: DamageKind, key: impl Into<String>, why: impl Into<String>) -> Self {
        let (key, why) = (key.into(), why.into());
        Self { lba: None, sectors: None, kind, key, why, meaning: kind.meaning(), advice: kind.advice() }
    }

    /// The sectors after the last.
    const fn end(&self) -> Option<u64> {
        match (self.lba, self.sectors) {
            (Some(lba), Some(sectors)) => Some(lba + sectors),
            _ => None,
        }
    }
}

/// Which state of the volume was verified.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct State {
    /// The newest attachment.
    pub epoch: u64,
    /// Who has it attached.
    pub attached_by: Option<String>,
    /// The last group in the checkpoint; 0: there is no checkpoint.
    pub checkpoint_group: u64,
    /// The last group that counts.
    pub group: u64,
    /// The last entry of the log in it.
    pub through: u64,
    /// Blocks of 4096 bytes that are mapped.
    pub mapped_blocks: u64,
}

/// See the module's page.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The volume.
    pub volume: String,
    /// The store.
    pub store: String,
    /// What was verified. Absent where that cannot be told: manifest or checkpoint are damaged.
    pub state: Option<State>,
    /// Chunks that the map names.
    pub chunks: u64,
    /// Those that are not there.
    pub chunks_missing: u64,
    /// Blocks that were read and checked.
    pub blocks_checked: u64,
    /// Bytes of chunks that were read.
    pub bytes_read: u64,
    /// Sectors that cannot be read.
    pub damaged_sectors: u64,
    /// Those that are in no range of `damage`: the list is full.
    pub unlisted_sectors: u64,
    /// What is good to know, and no damage.
    pub notes: Vec<String>,
    /// What is damaged: objects, then ranges of sectors in order.
    pub damage: Vec<Damage>,
}

impl Report {
    pub(super) fn new(volume: &str, store: String) -> Self {
        Self {
            volume: volume.to_owned(),
            store,
            state: None,
            chunks: 0,
            chunks_missing: 0,
            blocks_checked: 0,
            bytes_read: 0,
            damaged_sectors: 0,
            unlisted_sectors: 0,
            notes: Vec::new(),
            damage: Vec::new(),
        }
    }

    /// Whether nothing is damaged.
    #[must_use]
    pub const fn is_well(&self) -> bool {
        self.damage.is_empty()
    }

    pub(super) fn set_state(&mut self, m: &Manifest, end: &StoreEnd, mapped_blocks: u64) {
        self.state = Some(State {
            epoch: m.epoch.0,
            attached_by: m.writer.as_ref().map(|_| m.holder()),
            checkpoint_group: m.checkpoint.as_ref().map_or(0, |c| c.group.0),
            group: end.group.0,
            through: end.through.0,
            mapped_blocks,
        });
    }

    /// Takes in what is known of a chunk.
    pub(super) fn add_chunk(&mut self, key: &str, checked: Checked) {
        self.blocks_checked += checked.blocks;
        self.bytes_read += checked.bytes;
        self.chunks_missing += u64::from(checked.bad.iter().any(|b| b.fault == Fault::Missing));
        let found = checked.bad.into_iter().map(|b| {
            let (kind, why) = words(b.fault);
            Damage { lba: Some(b.lba.0), sectors: Some(b.sectors), ..Damage::of_object(kind, key, why) }
        });
        self.add_sectors(found.collect());
    }

    pub(super) fn add_sectors(&mut self, mut found: Vec<Damage>) {
        merge(&mut found);
        for d in found {
            let sectors = d.sectors.unwrap_or(0);
            self.damaged_sectors += sectors;
            if self.damage.len() < MAX_LISTED {
                self.damage.push(d);
            } else {
                self.unlisted_sectors += sectors;
            }
        }
    }

    /// Brings the damage into order.
    pub(super) fn finish(&mut self) {
        merge(&mut self.damage);
    }
}

/// Sorts by sector and joins what goes on.
fn merge(damage: &mut Vec<Damage>) {
    damage.sort_by_key(|d| d.lba);
    damage.dedup_by(|next, last| {
        let goes_on = last.end().is_some()
            && last.end() == next.lba
            && (last.kind, &last.key, &last.why) == (next.kind, &next.key, &next.why);
        if goes_on {
            last.sectors = last.sectors.zip(next.sectors).map(|(a, b)| a + b);
        }
        goes_on
    });
}

fn words(fault: Fault) -> (DamageKind, String) {
    match fault {
        Fault::Checksum => (DamageKind::Checksum, "the block is not what its checksum and address say".to_owned()),
        Fault::Lost => (DamageKind::Lost, "the sectors were lost before they were packed".to_owned()),
        Fault::Missing => (DamageKind::Missing, "the object is not in the store".to_owned()),
        Fault::Cut(why) => (DamageKind::Cut, why),
        Fault::Header(why) => (DamageKind::Header, why),
        Fault::Newer(why) => (DamageKind::Newer, why),
        Fault::Unreadable(why) => (DamageKind::Unreadable, why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_listed_is_counted() {
        let mut r = Report::new("v", String::new());
        let at = |lba: usize| Damage {
            lba: Some(lba as u64),
            sectors: Some(8),
            ..Damage::of_object(DamageKind::Checksum, "k", "w")
        };
        r.add_sectors((0..MAX_LISTED + 3).map(|i| at(i * 16)).collect());
        r.add_sectors(vec![at(8)]);
        r.finish();
        assert_eq!((r.damage.len(), r.unlisted_sectors), (MAX_LISTED, 4 * 8));
        assert_eq!(r.damaged_sectors, (MAX_LISTED as u64 + 4) * 8);
    }
}
