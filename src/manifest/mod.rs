//! The manifest: the one object of a volume that changes. It names everything that counts.
//!
//! Invariants:
//! - It is replaced by compare-and-swap only ([`Published::publish`]); each version carries a publish id,
//!   by which a writer knows its own version after a reply was lost.
//! - Epochs only grow. An epoch owns the groups and chunk numbers from its first ones up to those of the
//!   next epoch that has first ones; an epoch without first ones owns nothing.
//! - What a manifest names was durable in the store before the manifest was published.

pub(crate) mod images;
mod lineage;
mod publish;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use lineage::{Parent, Snapshot, SourceOf, parse_ref_key, ref_key, refs_prefix};
pub use publish::{By, Published};

use crate::checksum::sha256_hex;
use crate::config::unfit_name;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{BLOCK, ChunkNo, Epoch, GroupNo, MAX_VOLUME_BYTES, Nonce, Seq};

/// Version of the format: 2 has snapshots and parents.
pub const VERSION: u32 = 2;
/// The oldest version that is read.
const OLDEST: u32 = 1;
/// The epoch in the keys of a checkpoint that no attachment wrote.
pub const NO_ATTACHMENT: Epoch = Epoch(0);
/// What the `format` field says.
const FORMAT: &str = "vb-ublk volume";

/// Who has the volume attached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Writer {
    /// The host's name.
    pub host: String,
    /// The process.
    pub pid: u32,
    /// When it attached, in seconds since 1970 (by that host's clock; for people only).
    pub since: u64,
}

/// One attachment in the volume's history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EpochEntry {
    /// Its number.
    pub epoch: Epoch,
    /// Its nonce: part of all keys it wrote.
    pub nonce: Nonce,
    /// The first group it owns, and the first chunk number. Absent: it owns nothing.
    pub first: Option<FirstOwned>,
}

/// Where an epoch's ownership begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FirstOwned {
    /// The first group.
    pub group: GroupNo,
    /// The first chunk number.
    pub chunk: ChunkNo,
}

/// One object of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Key below the volume's prefix.
    pub key: String,
    /// Length in bytes.
    pub bytes: u64,
    /// SHA-256, hex.
    pub sha256: String,
}

/// An image of the base map, or a delta to one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// The checkpoint's number: one counter.
    pub number: u64,
    /// Its objects, in order.
    pub parts: Vec<Part>,
    /// The source that wrote it, and in whose folder it lies: 0 is the volume itself. The sources in it are that one's.
    #[serde(default)]
    pub source: u8,
}

impl Image {
    /// Bytes of all parts.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(|p| p.bytes).sum()
    }
}

/// The base map as of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    /// The last group in it.
    pub group: GroupNo,
    /// The last entry in it.
    pub through: Seq,
    /// The last chunk number in it.
    pub last_chunk: ChunkNo,
    /// The whole map.
    pub full: Image,
    /// What has changed since `full`.
    pub delta: Option<Image>,
}

impl Checkpoint {
    /// Its images: the full one, and the delta.
    pub fn images(&self) -> impl Iterator<Item = &Image> {
        std::iter::once(&self.full).chain(&self.delta)
    }

    /// Whether an image of it is a parent's.
    #[must_use]
    pub fn is_borrowed(&self) -> bool {
        self.images().any(|i| i.source != 0)
    }

    /// The number of its newest image: later ones have higher ones.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.full.number.max(self.delta.as_ref().map_or(0, |d| d.number))
    }
}

/// See the module's page.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Always `vb-ublk volume`.
    pub format: String,
    /// Format version.
    pub version: u32,
    /// The volume's identity.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Logical block size in bytes: 512 or 4096.
    pub logical_block: u32,
    /// Block size of map and chunks in bytes.
    pub block_bytes: u32,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// The current attachment's number; 0: never attached.
    pub epoch: Epoch,
    /// The current attachment's nonce.
    pub nonce: Nonce,
    /// Who has it attached; absent after a clean detach.
    pub writer: Option<Writer>,
    /// All attachments, oldest first.
    pub history: Vec<EpochEntry>,
    /// The newest published base map; absent while nothing was ever checkpointed.
    pub checkpoint: Option<Checkpoint>,
    /// Oldest first.
    #[serde(default)]
    pub snapshots: Vec<Snapshot>,
    /// Whose chunks the map may name: source `n` is number `n - 1`.
    #[serde(default)]
    pub parents: Vec<Parent>,
    /// Neither the map nor a snapshot names a parent any more.
    #[serde(default)]
    pub flattened: bool,
    /// Somebody is deleting the volume, under this mark: it may be neither attached nor cloned any more.
    #[serde(default)]
    pub deleting: Option<Uuid>,
    /// Whether the store was seen to honour conditional writes at the last attach.
    pub conditional_writes: bool,
    /// Identity of this version.
    pub publish_id: Uuid,
    /// What the user or an importer keeps with the volume.
    pub metadata: serde_json::Map<String, serde_json::Value>,
    /// SHA-256, hex, of the object's bytes with this field empty: set by [`Manifest::encode`], empty in a manifest in
    /// memory.
    #[serde(default)]
    pub checksum: String,
}

impl Manifest {
    /// A new volume, attached by nobody.
    #[must_use]
    pub fn new(name: &str, size_bytes: u64, logical_block: u32, created: u64) -> Self {
        Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            uuid: Uuid::new_v4(),
            name: name.to_owned(),
            size_bytes,
            logical_block,
            block_bytes: BLOCK as u32,
            created,
            epoch: Epoch(0),
            nonce: Nonce(0),
            writer: None,
            history: Vec::new(),
            checkpoint: None,
            snapshots: Vec::new(),
            parents: Vec::new(),
            flattened: false,
            deleting: None,
            conditional_writes: true,
            publish_id: Uuid::new_v4(),
            metadata: serde_json::Map::new(),
            checksum: String::new(),
        }
    }

    /// As bytes for the store.
    ///
    /// # Errors
    /// `Internal`; this cannot happen for values of this type.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let plain = Self { checksum: String::new(), version: VERSION, ..self.clone() };
        let mut text = serde_json::to_string_pretty(&plain)
            .map_err(|e| Error::new(ErrorKind::Internal, "encoding the manifest").with_source(e))?;
        text.push('\n');
        let sum = sha256_hex(&text);
        // The field is the last one; what the user keeps in `metadata` comes before it.
        let at = text
            .rfind(&checksum_field(""))
            .ok_or_else(|| Error::new(ErrorKind::Internal, "encoding the manifest: it has no checksum field"))?;
        text.replace_range(at..at + checksum_field("").len(), &checksum_field(&sum));
        Ok(text.into_bytes())
    }

    /// Reads the bytes and checks that they make sense.
    ///
    /// # Errors
    /// `Corrupt` for anything but a whole manifest, `Unsupported` for another version's.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u32,
        }
        let corrupt = |why: &str| Error::new(ErrorKind::Corrupt, format!("the manifest is damaged: {why}"));
        let head: Head = serde_json::from_slice(bytes)
            .map_err(|e| corrupt("it is not JSON with a format and a version").with_source(e))?;
        if head.format != FORMAT {
            return Err(corrupt(&format!("its format is {:?}, not {FORMAT:?}", head.format)));
        }
        if !(OLDEST..=VERSION).contains(&head.version) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "the manifest has format version {}; this program reads {OLDEST} to {VERSION}: use a newer vb-ublk",
                    head.version
                ),
            ));
        }
        let m: Self =
            serde_json::from_slice(bytes).map_err(|e| corrupt("a field is missing or wrong").with_source(e))?;
        let text = String::from_utf8_lossy(bytes);
        let field = checksum_field(&m.checksum);
        let plain = text.rfind(&field).map(|at| [&text[..at], &checksum_field(""), &text[at + field.len()..]].concat());
        if plain.is_none_or(|t| sha256_hex(&t) != m.checksum) {
            return Err(corrupt("its checksum does not match"));
        }
        let m = Self { checksum: String::new(), version: VERSION, ..m };
        check_size(m.size_bytes, m.logical_block)
            .map_err(|e| corrupt("size or block size is impossible").with_source(e))?;
        if m.block_bytes as usize != BLOCK {
            return Err(corrupt("its block size is not 4096"));
        }
        if m.history.windows(2).any(|w| w[0].epoch >= w[1].epoch) {
            return Err(corrupt("its history is out of order"));
        }
        let owned: Vec<FirstOwned> = m.history.iter().filter_map(|e| e.first).collect();
        if owned.windows(2).any(|w| w[0].chunk > w[1].chunk || w[0].group > w[1].group) {
            return Err(corrupt("its epochs' ranges are out of order"));
        }
        if m.history.last().map_or(Epoch(0), |e| e.epoch) != m.epoch {
            return Err(corrupt("its history does not end with its epoch"));
        }
        m.check_lineage().map_err(corrupt)?;
        Ok(m)
    }

    /// The first group and chunk number after the newest checkpoint.
    #[must_use]
    pub fn after_checkpoint(&self) -> FirstOwned {
        self.checkpoint.as_ref().map_or(FirstOwned { group: GroupNo(1), chunk: ChunkNo(1) }, |c| FirstOwned {
            group: c.group.next(),
            chunk: c.last_chunk.next(),
        })
    }

    /// The last chunk number of the newest checkpoint; 0 when there is none.
    #[must_use]
    pub fn last_chunk(&self) -> ChunkNo {
        self.checkpoint.as_ref().map_or(ChunkNo(0), |c| c.last_chunk)
    }

    /// Who owns a chunk number.
    #[must_use]
    pub fn owner(&self, chunk: ChunkNo) -> Option<(Epoch, Nonce)> {
        owner(&self.history, chunk)
    }

    /// `epoch 3 on host a, process 17`: who has it, for messages.
    #[must_use]
    pub fn holder(&self) -> String {
        self.writer.as_ref().map_or_else(
            || format!("nobody (last epoch {})", self.epoch),
            |w| format!("host {:?}, process {}, epoch {}", w.host, w.pid, self.epoch),
        )
    }
}

fn checksum_field(sum: &str) -> String {
    format!("\"checksum\": \"{sum}\"")
}

/// Who owns a chunk number under this history. When several epochs begin at the same number, the last of them does.
#[must_use]
pub fn owner(history: &[EpochEntry], chunk: ChunkNo) -> Option<(Epoch, Nonce)> {
    history.iter().rev().find(|e| e.first.is_some_and(|f| f.chunk <= chunk)).map(|e| (e.epoch, e.nonce))
}

/// Checks a volume's size and logical block size.
///
/// # Errors
/// `Usage`, with what would do.
pub fn check_size(size_bytes: u64, logical_block: u32) -> Result<()> {
    let usage = |s: String| Err(Error::new(ErrorKind::Usage, s));
    if logical_block != 512 && logical_block != 4096 {
        return usage(format!("a logical block size of {logical_block}: it must be 512 or 4096"));
    }
    if size_bytes == 0 || !size_bytes.is_multiple_of(BLOCK as u64) {
        return usage(format!("a volume of {size_bytes} bytes: the size must be a multiple of 4096 and not 0"));
    }
    if size_bytes > MAX_VOLUME_BYTES {
        return usage(format!("a volume of {size_bytes} bytes: the largest is {MAX_VOLUME_BYTES} (64 TiB)"));
    }
    Ok(())
}

/// Checks a volume's name.
///
/// # Errors
/// `Usage`.
pub fn check_name(name: &str) -> Result<()> {
    if unfit_name(name).is_none() {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Usage,
        format!("volume name {name:?}: use 1 to 128 of A-Z a-z 0-9 . _ -, starting with a letter or digit"),
    ))
}

/// The prefix of all keys of a volume.
#[must_use]
pub fn prefix(name: &str) -> String {
    format!("{name}/")
}

/// The manifest's key.
#[must_use]
pub fn key(name: &str) -> String {
    format!("{name}/manifest.json")
}

/// The key of a manifest while what it names is being deleted: who was its parent is told by that alone then.
#[must_use]
pub fn deleted_key(name: &str) -> String {
    format!("{name}/manifest.json.deleted")
}

/// A checkpoint part's key below the volume's prefix.
#[must_use]
pub fn part_key(number: u64, epoch: Epoch, nonce: Nonce, part: usize) -> String {
    format!("checkpoints/{number:016x}-{:08x}-{nonce}.{part:04}.map", epoch.0)
}

/// The epoch in such a key.
fn epoch_of_part(key: &str) -> Option<Epoch> {
    let epoch = key.strip_prefix("checkpoints/")?.split('-').nth(1)?;
    u64::from_str_radix(epoch, 16).ok().map(Epoch)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Manifest {
        let mut m = Manifest::new("vol-1", 1 << 30, 512, 17);
        for (epoch, first) in [(1, Some(1)), (2, None), (3, Some(10)), (4, Some(10))] {
            m.history.push(EpochEntry {
                epoch: Epoch(epoch),
                nonce: Nonce(epoch * 11),
                first: first.map(|c| FirstOwned { group: GroupNo(c), chunk: ChunkNo(c) }),
            });
        }
        m.epoch = Epoch(4);
        m
    }

    #[test]
    fn a_manifest_comes_back() {
        let m = sample();
        assert_eq!(Manifest::decode(&m.encode().unwrap()).unwrap(), m);
    }

    #[test]
    fn ownership_follows_the_history() {
        let m = sample();
        assert_eq!(m.owner(ChunkNo(1)), Some((Epoch(1), Nonce(11))));
        assert_eq!(m.owner(ChunkNo(9)), Some((Epoch(1), Nonce(11))));
        assert_eq!(
            m.owner(ChunkNo(10)),
            Some((Epoch(4), Nonce(44))),
            "epoch 3 began at the same number and owns nothing"
        );
        assert_eq!(m.owner(ChunkNo(0)), None);
    }

    #[test]
    fn a_history_that_went_on_from_before_a_checkpoint_shows() {
        let mut m = sample();
        let image = |epoch, source| Image {
            number: 1,
            parts: vec![Part { key: part_key(1, Epoch(epoch), Nonce(1), 0), bytes: 1, sha256: String::new() }],
            source,
        };
        let mut at = |last_chunk, full, delta| {
            let (group, through, last_chunk) = (GroupNo(last_chunk), Seq(9), ChunkNo(last_chunk));
            m.checkpoint = Some(Checkpoint { group, through, last_chunk, full, delta });
            m.was_rewound()
        };
        // Epoch 3 and 4 begin at chunk 10.
        assert!(!at(9, image(1, 0), None) && !at(12, image(4, 0), None) && !at(12, image(1, 0), Some(image(4, 0))));
        assert!(at(10, image(1, 0), None) && at(12, image(1, 0), Some(image(2, 0))));
        // A resize's map says nothing of it, and a parent's is none of this history.
        assert!(!at(12, image(0, 0), None) && !at(0, image(1, 1), None));
        m.checkpoint = None;
        assert!(!m.was_rewound());
    }

    #[test]
    fn nonsense_is_refused() {
        let text = String::from_utf8(sample().encode().unwrap()).unwrap();
        let kind = |t: &str| Manifest::decode(t.as_bytes()).unwrap_err().kind();
        assert_eq!(kind(&text.replace("\"created\": 17", "\"created\": 18")), ErrorKind::Corrupt, "the checksum");
        assert_eq!(kind("{}"), ErrorKind::Corrupt);
        assert_eq!(kind(&text[..text.len() / 2]), ErrorKind::Corrupt);
        assert_eq!(kind(&text.replace("\"version\": 2", "\"version\": 3")), ErrorKind::Unsupported);
        assert_eq!(kind(&text.replace("\"size_bytes\": 1073741824", "\"size_bytes\": 1000")), ErrorKind::Corrupt);
        assert_eq!(kind(&text.replace("\"epoch\": 4", "\"epoch\": 1")), ErrorKind::Corrupt);
    }

    #[test]
    fn names() {
        assert!(check_name("vol-1.a_B").is_ok());
        for bad in ["", "-a", ".a", "a/b", "a b", "ä", &"x".repeat(129)] {
            assert_eq!(check_name(bad).unwrap_err().kind(), ErrorKind::Usage, "{bad}");
        }
    }
}
