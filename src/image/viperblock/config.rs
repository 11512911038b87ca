//! `config.json` of a volume, an AMI or a snapshot.
//!
//! It has no checksum, so what it says is checked for sense only. A field at its top that is not known is told
//! ([`Config::unknown`]): fields there have changed what the map means before (`HasFlatSection`).

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::{Error, ErrorKind, Result};
use crate::units::{BLOCK, MAX_VOLUME_BYTES};

/// More is no configuration.
const MAX_BYTES: usize = 4 << 20;

/// What the fields may be called, of volumes and of snapshots.
const VOLUME_FIELDS: [&str; 18] = [
    "VolumeName",
    "VolumeSize",
    "BlockSize",
    "ObjBlockSize",
    "SeqNum",
    "ObjectNum",
    "WALNum",
    "BlockToObjectWALNum",
    "Version",
    "VolumeConfig",
    "ShardedWAL",
    "SnapshotID",
    "SourceVolumeName",
    "EncryptionEnabled",
    "VolumeUUID",
    "SeqNumHighWater",
    "StateSeqNum",
    "KeyFingerprint",
];
const SNAPSHOT_FIELDS: [&str; 12] = [
    "SnapshotID",
    "SourceVolumeName",
    "SeqNum",
    "ObjectNum",
    "BlockSize",
    "ObjBlockSize",
    "BlockCount",
    "CreatedAt",
    "SourceVolumeUUID",
    "SourceVolumeNameHash",
    "StateSeqNum",
    "HasFlatSection",
];

/// See the module's page.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// What it is of.
    pub kind: Kind,
    /// Fields that are not known.
    pub unknown: Vec<String>,
    /// The whole of it, as it is.
    pub raw: Map<String, Value>,
}

/// What a configuration is of.
#[derive(Debug, Clone, PartialEq)]
pub enum Kind {
    /// A volume or an AMI, which is a volume that nobody writes to.
    Volume(VolumeConfig),
    /// A snapshot.
    Snapshot(SnapshotConfig),
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeConfig {
    /// Size in bytes.
    pub size_bytes: u64,
    /// The number of the block map to take where there is no `blocks.live.bin`.
    pub map_number: u64,
    /// The snapshot that it was made from.
    pub snapshot: Option<String>,
    /// The snapshot that an AMI without blocks of its own stands for.
    pub ami_snapshot: Option<String>,
    /// What it calls itself: `ImageID`, else `VolumeID`.
    pub id: Option<String>,
    /// Whether it is an AMI.
    pub is_ami: bool,
    /// `available`, `in-use`, …
    pub state: Option<String>,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotConfig {
    /// The volume whose chunks it names.
    pub source: String,
    /// Number of blocks it has of that volume; absent where it does not say.
    pub block_count: Option<u64>,
    /// Whether the layers below are in its map, too.
    pub layered: bool,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "PascalCase")]
struct Raw {
    volume_name: String,
    volume_size: u64,
    block_size: u64,
    #[serde(rename = "BlockToObjectWALNum")]
    map_number: u64,
    version: Option<u64>,
    volume_config: RawVolumeConfig,
    #[serde(rename = "SnapshotID")]
    snapshot_id: String,
    source_volume_name: String,
    encryption_enabled: bool,
    block_count: Option<u64>,
    #[serde(rename = "SourceVolumeUUID")]
    source_volume_uuid: String,
    source_volume_name_hash: String,
    has_flat_section: bool,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "PascalCase")]
struct RawVolumeConfig {
    volume_metadata: RawVolumeMetadata,
    #[serde(rename = "AMIMetadata")]
    ami_metadata: RawAmiMetadata,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawVolumeMetadata {
    #[serde(rename = "VolumeID")]
    volume_id: String,
    #[serde(rename = "SizeGiB")]
    size_gib: u64,
    #[serde(rename = "State")]
    state: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawAmiMetadata {
    #[serde(rename = "ImageID")]
    image_id: String,
    #[serde(rename = "VolumeSizeGiB")]
    volume_size_gib: u64,
    #[serde(rename = "SnapshotID")]
    snapshot_id: String,
}

impl Config {
    /// Reads the bytes and checks that they make sense.
    ///
    /// # Errors
    /// `Corrupt` for anything but a configuration of a volume or a snapshot; `Unsupported` for an encrypted volume, a
    /// block size other than 4096 bytes, another version, and a volume of more than 64 TiB.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        if bytes.len() > MAX_BYTES {
            return Err(corrupt(format!("{} bytes are more than any configuration has", bytes.len())));
        }
        let raw: Map<String, Value> =
            serde_json::from_slice(bytes).map_err(|e| corrupt("it is not a JSON object").with_source(e))?;
        // An encrypted volume's is sealed: the configuration and its tag are fields of an envelope.
        if raw.contains_key("payload") && raw.contains_key("authtag") {
            return Err(encrypted());
        }
        let r = Raw::deserialize(&raw).map_err(|e| corrupt("a field is wrong").with_source(e))?;
        if r.encryption_enabled || !r.source_volume_uuid.is_empty() || !r.source_volume_name_hash.is_empty() {
            return Err(encrypted());
        }
        // The platform around Viperblock writes a name for a snapshot (an AMI) with its metadata alone, and so it does when an AMI
        // gets tags: all else is empty then, also of an AMI that has blocks.
        let of_volume = !r.volume_name.is_empty() || raw.contains_key("VolumeConfig");
        let bare = of_volume && r.volume_name.is_empty();
        match r.block_size {
            0 if bare => {}
            0 => return Err(corrupt("it names no block size")),
            n if n != BLOCK as u64 => {
                return Err(unsupported(format!("its blocks have {n} bytes; only those of 4096 can be read")));
            }
            _ => {}
        }
        if let Some(v) = r.version.filter(|v| *v != u64::from(super::codec::VERSION) && !(bare && *v == 0)) {
            return Err(unsupported(format!("it is of version {v}; this program reads version 1")));
        }
        // A snapshot's configuration has neither of the two (inferred from all that was seen).
        let (kind, fields) = if !of_volume {
            (Kind::Snapshot(snapshot(r)?), &SNAPSHOT_FIELDS[..])
        } else {
            (Kind::Volume(volume(r)?), &VOLUME_FIELDS[..])
        };
        let unknown = raw.keys().filter(|k| !fields.contains(&k.as_str())).cloned().collect();
        Ok(Self { kind, unknown, raw })
    }
}

fn snapshot(r: Raw) -> Result<SnapshotConfig> {
    if r.source_volume_name.is_empty() {
        return Err(corrupt("it has neither a VolumeName, as a volume has, nor a SourceVolumeName, as a snapshot has"));
    }
    if r.has_flat_section && r.block_count.is_none() {
        return Err(corrupt("it says HasFlatSection without a BlockCount"));
    }
    Ok(SnapshotConfig {
        source: r.source_volume_name,
        block_count: r.block_count.filter(|n| *n > 0 || r.has_flat_section),
        layered: r.has_flat_section,
    })
}

fn volume(r: Raw) -> Result<VolumeConfig> {
    let gib = |n: u64| n.saturating_mul(1 << 30);
    let (meta, ami) = (r.volume_config.volume_metadata, r.volume_config.ami_metadata);
    // An AMI may have its size in the AMI's metadata alone.
    let size_bytes = match r.volume_size.max(gib(meta.size_gib)) {
        0 => gib(ami.volume_size_gib),
        n => n,
    };
    if size_bytes == 0 {
        return Err(corrupt("it names no size"));
    }
    if size_bytes > MAX_VOLUME_BYTES {
        return Err(unsupported(format!(
            "it is of {size_bytes} bytes; a volume has {MAX_VOLUME_BYTES} (64 TiB) at most"
        )));
    }
    let some = |s: String| (!s.is_empty()).then_some(s);
    Ok(VolumeConfig {
        size_bytes,
        map_number: r.map_number,
        snapshot: some(r.snapshot_id),
        ami_snapshot: some(ami.snapshot_id),
        is_ami: !ami.image_id.is_empty(),
        id: some(ami.image_id).or(some(meta.volume_id)),
        state: some(meta.state),
    })
}

/// The error for all that is encrypted.
pub(super) fn encrypted() -> Error {
    unsupported(
        "it is encrypted, and its keys are Viperblock's alone: attach it with Viperblock and import the block device instead",
    )
}

fn corrupt(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, why)
}

fn unsupported(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, why)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Config, Kind, VolumeConfig};
    use crate::error::ErrorKind;

    fn decode(v: &serde_json::Value) -> crate::error::Result<Config> {
        Config::decode(v.to_string().as_bytes())
    }

    fn volume(v: &serde_json::Value) -> VolumeConfig {
        let Kind::Volume(v) = decode(v).expect("sound").kind else { panic!("a volume") };
        v
    }

    #[test]
    fn the_size_is_the_larger_one() {
        let of = |size: u64, gib: u64, ami: u64| {
            json!({"VolumeName": "v", "BlockSize": 4096, "VolumeSize": size, "VolumeConfig": {
                "VolumeMetadata": {"SizeGiB": gib}, "AMIMetadata": {"VolumeSizeGiB": ami, "ImageID": "ami-1"}}})
        };
        assert_eq!(volume(&of(5 << 20, 0, 0)).size_bytes, 5 << 20);
        assert_eq!(volume(&of(5 << 20, 2, 9)).size_bytes, 2 << 30);
        assert_eq!(volume(&of(3 << 30, 2, 9)).size_bytes, 3 << 30);
        assert_eq!(volume(&of(0, 0, 9)).size_bytes, 9 << 30);
        assert_eq!(decode(&of(0, 0, 0)).expect_err("no size").kind(), ErrorKind::Corrupt);
        assert_eq!(decode(&of(0, u64::MAX, 0)).expect_err("huge").kind(), ErrorKind::Unsupported);
        assert!(volume(&of(1, 0, 0)).is_ami);
    }

    #[test]
    fn an_ami_may_have_its_metadata_alone() {
        let v = volume(&json!({"VolumeName": "", "VolumeSize": 0, "BlockSize": 0, "Version": 0, "VolumeConfig": {
            "VolumeMetadata": {}, "AMIMetadata": {"ImageID": "ami-1", "SnapshotID": "snap-1", "VolumeSizeGiB": 3}}}));
        assert_eq!((v.size_bytes, v.ami_snapshot.as_deref()), (3 << 30, Some("snap-1")));
    }

    #[test]
    fn a_snapshot_has_no_name_of_a_volume() {
        let c =
            decode(&json!({"SnapshotID": "s", "SourceVolumeName": "v", "BlockSize": 4096, "BlockCount": 3, "New": 1}));
        let c = c.expect("sound");
        assert!(matches!(&c.kind, Kind::Snapshot(s) if s.source == "v" && s.block_count == Some(3) && !s.layered));
        assert_eq!(c.unknown, ["New"]);
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        for (v, kind, word) in [
            (json!({"v": 1, "payload": {}, "authtag": "x"}), ErrorKind::Unsupported, "encrypted"),
            (json!({"VolumeName": "v", "EncryptionEnabled": true}), ErrorKind::Unsupported, "encrypted"),
            (json!({"SourceVolumeName": "v", "SourceVolumeUUID": "00"}), ErrorKind::Unsupported, "encrypted"),
            (json!({"VolumeName": "v", "BlockSize": 512}), ErrorKind::Unsupported, "512"),
            (json!({"VolumeName": "v", "BlockSize": 4096, "Version": 2}), ErrorKind::Unsupported, "version 2"),
            (json!({"VolumeName": "v"}), ErrorKind::Corrupt, "block size"),
            (json!({"VolumeName": 7}), ErrorKind::Corrupt, "field"),
            (json!({"BlockSize": 4096, "SnapshotID": "s"}), ErrorKind::Corrupt, "SourceVolumeName"),
            (json!([1]), ErrorKind::Corrupt, "JSON"),
        ] {
            let e = decode(&v).expect_err("refused");
            assert_eq!(e.kind(), kind, "{v}");
            assert!(e.to_string().contains(word), "{e}");
        }
        assert!(Config::decode("[".repeat(1 << 20).as_bytes()).is_err());
        assert!(Config::decode(&vec![b' '; (4 << 20) + 1]).is_err());
    }
}
