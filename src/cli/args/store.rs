//! Volumes in the store, their snapshots, images and logs.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueHint};

use super::super::engine::images::Format;
use super::super::settings::LogPlace;
use super::{JsonArg, logical_block};
use crate::config::{ByteSize, VolumeName};

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Create a volume, full of zeros
    Create {
        /// Its name
        volume: VolumeName,
        /// Its size, as in 10G
        #[arg(long)]
        size: ByteSize,
        /// Its logical block size
        #[arg(long, value_name = "BYTES", value_parser = logical_block, default_value = "512")]
        logical_block_size: u32,
        #[command(flatten)]
        json: JsonArg,
    },
    /// The volumes in the store
    List(JsonArg),
    /// What the store knows about a volume
    Info {
        /// Its name
        volume: VolumeName,
        /// Count what it takes in the store, too, by kind, as of its last checkpoint. That reads its map and those of its snapshots, up
        /// to 2 GiB for each TiB written at random, where all else is one small object
        #[arg(long)]
        space: bool,
        #[command(flatten)]
        json: JsonArg,
    },
    /// Read and check all that a volume has in the store; says which sectors are damaged
    Verify {
        /// Its name
        volume: VolumeName,
        #[command(flatten)]
        json: JsonArg,
    },
    /// Make a volume's map and manifest anew from its chunks, when they are damaged or missing
    ///
    /// Nothing is deleted. Objects that are missing, or whose headers are damaged, make it refuse: put them back, or see
    /// --accept-loss.
    Rebuild(RebuildArgs),
    /// Make a volume larger, in use or not; or smaller, while nobody has it attached
    Resize {
        /// Its name
        volume: VolumeName,
        /// Its new size, as in 20G
        size: ByteSize,
        /// Make it smaller although there is data behind the new end, which is lost
        #[arg(long)]
        discard_tail: bool,
        #[command(flatten)]
        json: JsonArg,
    },
    /// Have a clone copy all that it needs of what it was cloned from, which may then be deleted; in use or not
    ///
    /// Refused while the clone has snapshots that need it, too.
    Flatten(FlattenArgs),
    /// Delete a volume and all its data
    Delete {
        /// Its name
        volume: VolumeName,
        /// Delete it even though a host has it attached
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        json: JsonArg,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Keep a volume as it is now; prints VOLUME@SNAPSHOT when it is in the store
    ///
    /// Every write that has completed is in it, and what is written meanwhile may be: as after a power cut at that moment. The
    /// volume may be in use on this host, or nowhere.
    Create {
        /// The volume
        volume: VolumeName,
        /// The snapshot's name [default: the time, as in 20261120-215300]
        name: Option<String>,
        #[command(flatten)]
        json: JsonArg,
    },
    /// The snapshots of a volume
    List {
        /// The volume
        volume: VolumeName,
        #[command(flatten)]
        json: JsonArg,
    },
    /// What has changed from one snapshot of a volume to another one, which may be the older one
    ///
    /// Prints, for each stretch, its first byte, its length in bytes, and `data`, or `zero` where there was data and is none any
    /// more. What was written anew has changed, whatever was written; nothing that has changed is left out.
    Diff {
        /// The volume
        volume: VolumeName,
        /// The snapshot to begin from
        from: String,
        /// The snapshot to end with [default: the volume as it is, while nobody has it attached]
        to: Option<String>,
        #[command(flatten)]
        json: JsonArg,
    },
    /// Keep what a boot from a snapshot reads first: later ones fetch that ahead, in that order
    ///
    /// What counts is what was read of the snapshot in the five minutes from the first such read on, up to 2 GiB. Whoever attaches a clone of the snapshot, or the
    /// snapshot itself, and has a local cache, fetches it from then on.
    Record {
        /// VOLUME@SNAPSHOT
        #[arg(value_name = "VOLUME@SNAPSHOT")]
        snapshot: VolumeName,
        /// The clone of it that has booted, attached on this host [default: the snapshot itself, attached on this host]
        clone: Option<VolumeName>,
        #[command(flatten)]
        json: JsonArg,
    },
    /// Delete a snapshot; refused while a clone needs it
    Delete {
        /// The volume
        volume: VolumeName,
        /// The snapshot's name
        name: String,
        #[command(flatten)]
        json: JsonArg,
    },
}

#[derive(Debug, Args)]
pub(crate) struct CloneArgs {
    /// The snapshot
    #[arg(value_name = "VOLUME@SNAPSHOT")]
    pub(crate) from: VolumeName,
    /// The new volume
    pub(crate) new: VolumeName,
    /// Its size, not below the snapshot's [default: the snapshot's]
    #[arg(long)]
    pub(crate) size: Option<ByteSize>,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

/// Where a volume's log is that is not attached.
#[derive(Debug, Clone, Args)]
pub(crate) struct LogArgs {
    /// The folder of its write-ahead log, where it is not attached [default: as for `add`]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    wal_dir: Option<PathBuf>,
    /// The block device that is its write-ahead log, likewise
    #[arg(long, value_name = "DEVICE", value_hint = ValueHint::FilePath, conflicts_with = "wal_dir")]
    wal_device: Option<PathBuf>,
}

impl LogArgs {
    /// What the command line says.
    pub(crate) fn place(&self) -> Option<LogPlace> {
        LogPlace::of(self.wal_dir.clone(), self.wal_device.clone())
    }
}

/// The local cache of what is in the store.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub(crate) struct CacheArgs {
    /// The folder of the local cache, best on a fast local disk [env: VB_UBLK_CACHE_DIR; default: `cache` in the data folder]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) cache_dir: Option<PathBuf>,
    /// The most that the local cache of a volume takes there; 0 is none [env: VB_UBLK_CACHE_SIZE; default: 4G for a store over S3, else 0]
    #[arg(long, value_name = "SIZE")]
    pub(crate) cache_size: Option<ByteSize>,
}

impl CacheArgs {
    /// With what another place says where this one says nothing.
    pub(crate) fn or(self, other: &Self) -> Self {
        Self {
            cache_dir: self.cache_dir.or_else(|| other.cache_dir.clone()),
            cache_size: self.cache_size.or(other.cache_size),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct GcArgs {
    /// The volume: attached on this host, or nowhere
    pub(crate) volume: VolumeName,
    /// Say how much there is, and change nothing
    #[arg(long, conflicts_with_all = ["wal_dir", "wal_device"])]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) log: LogArgs,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

#[derive(Debug, Args)]
pub(crate) struct FlattenArgs {
    /// The clone: attached on this host, or nowhere
    pub(crate) volume: VolumeName,
    #[command(flatten)]
    pub(crate) log: LogArgs,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

#[derive(Debug, Args)]
pub(crate) struct RebuildArgs {
    /// Its name
    pub(crate) volume: VolumeName,
    /// Say what would be done, and change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// End the volume before the first group of chunks that is not whole any more, as after a power cut at that moment
    #[arg(long)]
    pub(crate) accept_loss: bool,
    /// Rebuild it even though a host has it attached whose log is not here, or nothing is left that would say whether one has
    #[arg(long)]
    pub(crate) force: bool,
    /// Its size, where neither manifest nor log say it
    #[arg(long)]
    pub(crate) size: Option<ByteSize>,
    /// Its logical block size, likewise [default: 512]
    #[arg(long, value_name = "BYTES", value_parser = logical_block)]
    pub(crate) logical_block_size: Option<u32>,
    #[command(flatten)]
    pub(crate) log: LogArgs,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// The image; - is standard input
    #[arg(value_hint = ValueHint::FilePath, required_unless_present = "viperblock")]
    pub(crate) file: Option<PathBuf>,
    /// The volume to make [default: the metadata's ImageID, else its VolumeID]
    #[arg(long, required_unless_present_any = ["metadata", "viperblock"])]
    pub(crate) volume: Option<VolumeName>,
    /// Import this volume, AMI or snapshot of Viperblock's, instead of an image
    #[arg(long, value_name = "NAME", conflicts_with_all = ["file", "format", "allow_backing"])]
    pub(crate) viperblock: Option<String>,
    /// The bucket or folder that it is in [default: the store that the new volume goes to]
    #[arg(long, value_name = "URL", requires = "viperblock")]
    pub(crate) from: Option<String>,
    /// The URL of the S3 server that it is on [default: --endpoint]
    #[arg(long, value_name = "URL", requires = "from")]
    pub(crate) from_endpoint: Option<String>,
    /// The region of the bucket that it is in [default: --region]
    #[arg(long, value_name = "REGION", requires = "from")]
    pub(crate) from_region: Option<String>,
    /// The section of the AWS profile files to take that bucket's credentials from [default: as for the new volume's]
    #[arg(long, value_name = "PROFILE", requires = "from")]
    pub(crate) from_profile: Option<String>,
    /// Where the logs are that the last host left which had it: Viperblock's base folder there. Without them, what had not been
    /// uploaded is not in the new volume
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, requires = "viperblock")]
    pub(crate) viperblock_wal: Option<PathBuf>,
    /// Go without what is damaged in Viperblock's logs, without a map that is missing, and without fields of its configuration
    /// that are not known
    #[arg(long, requires = "viperblock")]
    pub(crate) accept_loss: bool,
    /// What the image is: raw or qcow2 [default: as a file begins; a device or a pipe is raw]
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<Format>,
    /// A JSON file to keep with the volume: {"VolumeMetadata": {"VolumeID": ...}, "AMIMetadata": {"ImageID": ...}}
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) metadata: Option<PathBuf>,
    /// The volume's size, as in 10G, if it is to be larger than the image [default: the image's, in steps of 4K]
    #[arg(long)]
    pub(crate) size: Option<ByteSize>,
    /// The volume's logical block size
    #[arg(long, value_name = "BYTES", value_parser = logical_block, default_value = "512")]
    pub(crate) logical_block_size: u32,
    /// Open backing files that a qcow2 image names also in this folder and below it, not only beside the image. May be given
    /// several times
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) allow_backing: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// The volume
    pub(crate) volume: VolumeName,
    /// The image to write: a file, a block device, or - for standard output
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
    /// What to write: raw or qcow2
    #[arg(long, value_name = "FORMAT", default_value = "raw")]
    pub(crate) format: Format,
    /// Replace a file that is there; write over a block device
    #[arg(long)]
    pub(crate) force: bool,
    /// Only what has changed since this snapshot of the same volume: an increment, in qcow2, to lie over an image of that snapshot
    ///
    /// Without --backing it names none: `qemu-img rebase -u -b FULL -F qcow2 FILE` lays it over the image FULL.
    #[arg(long, value_name = "SNAPSHOT")]
    pub(crate) since: Option<String>,
    /// Have the increment lie over this image of the --since snapshot: a full one, or the increment before
    #[arg(long, value_name = "IMAGE", requires = "since", value_hint = ValueHint::FilePath)]
    pub(crate) backing: Option<PathBuf>,
    /// What that image is: raw or qcow2 [default: as the file begins; a device is raw]
    #[arg(long, value_name = "FORMAT", requires = "backing")]
    pub(crate) backing_format: Option<Format>,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

#[derive(Debug, Subcommand)]
pub(crate) enum WalCommand {
    /// What a log holds, and where and why it ends; changes nothing
    ///
    /// Of a damaged log it says all that can still be read; the exit code is then 1.
    Inspect {
        /// The log: a file, as VOLUME.wal or VOLUME.wal.aside-1, or a device
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// List each entry: its number, what it does, and where it is. `left` are those behind the end of the log
        #[arg(long)]
        records: bool,
        #[command(flatten)]
        json: JsonArg,
    },
    /// Write what a log holds that is not in the store into a new, sparse raw image, and say which sectors that are
    ///
    /// Laid over a copy of the volume, data as it is in the image and holes as zeros, these sectors bring it up to date.
    /// Every block is checked, and damaged ones are left out; the exit code is then 1.
    Export {
        /// The log: a file, as VOLUME.wal or VOLUME.wal.aside-1, or a device
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// The image, which must not be there yet
        #[arg(value_hint = ValueHint::FilePath)]
        out: PathBuf,
        /// Everything that is still in the log: what is in the store, too, as far back as no entry is missing; and of a
        /// damaged log what lies behind the damage
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        json: JsonArg,
    },
}
