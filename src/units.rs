//! Units and identifiers. Every number that crosses a module boundary has one of these types or a
//! name that ends in its unit (`_bytes`, `_sectors`, `_blocks`).

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes in a sector: the granularity of requests, of the log and of the overlay.
pub const SECTOR: usize = 512;
/// Bytes in a block: the granularity of the base map and of chunks.
pub const BLOCK: usize = 4096;
/// Sectors in a block.
pub const SECTORS_PER_BLOCK: u64 = (BLOCK / SECTOR) as u64;
/// Blocks in a leaf of the maps (2 MiB of volume).
pub const LEAF_BLOCKS: u64 = 512;
/// Sectors in a leaf of the maps.
pub const LEAF_SECTORS: u64 = LEAF_BLOCKS * SECTORS_PER_BLOCK;
/// The largest volume: 64 TiB.
pub const MAX_VOLUME_BYTES: u64 = 1 << 46;

macro_rules! newtype {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The one after this.
            #[must_use]
            pub const fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

newtype! {
    /// A logical block address in 512-byte sectors.
    Lba
}
newtype! {
    /// The number of a 4096-byte block of the volume.
    BlockNo
}
newtype! {
    /// The number of a log entry (write, discard, zeroing). The first is 1; 0 means "before all".
    Seq
}
newtype! {
    /// The number of an attachment of the volume. The first is 1.
    Epoch
}
newtype! {
    /// The number of a chunk within its volume: one counter for group and GC chunks. The first is 1.
    ChunkNo
}
newtype! {
    /// The number of a group of chunks that become visible together. The first is 1.
    GroupNo
}

impl Lba {
    /// The block that holds this sector.
    #[must_use]
    pub const fn block(self) -> BlockNo {
        BlockNo(self.0 / SECTORS_PER_BLOCK)
    }
}

impl BlockNo {
    /// The first sector of this block.
    #[must_use]
    pub const fn lba(self) -> Lba {
        Lba(self.0 * SECTORS_PER_BLOCK)
    }
}

/// Random identity of one attachment; part of every key that the attachment writes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Nonce(pub u64);

impl Nonce {
    /// Draws a new one from the system's entropy.
    ///
    /// # Errors
    /// When the system has no entropy to give.
    pub fn draw() -> std::io::Result<Self> {
        Ok(Self(getrandom::u64().map_err(std::io::Error::other)?.max(1)))
    }
}

impl fmt::Display for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nonce({self})")
    }
}

impl std::str::FromStr for Nonce {
    type Err = std::num::ParseIntError;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        u64::from_str_radix(s, 16).map(Self)
    }
}

impl Serialize for Nonce {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Nonce {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let s = String::deserialize(d)?;
        s.parse().map_err(serde::de::Error::custom)
    }
}

/// Bytes as people read them: `1.5 GiB`.
#[must_use]
pub fn human_bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut v = n as f64;
    let mut u = 0;
    while v >= 1024.0 && u < UNITS.len() - 1 {
        v /= 1024.0;
        u += 1;
    }
    if v.fract() == 0.0 || u == 0 { format!("{v:.0} {}", UNITS[u]) } else { format!("{v:.1} {}", UNITS[u]) }
}
