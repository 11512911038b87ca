//! What the command line takes; what it takes for volumes in the store, images and logs is in [`store`].

mod bench;
mod store;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{ArgAction, ArgGroup, Args, Parser, Subcommand, ValueHint};

pub(crate) use bench::BenchArgs;
pub(crate) use store::{
    CacheArgs, CloneArgs, ExportArgs, FlattenArgs, GcArgs, ImportArgs, LogArgs, RebuildArgs, SnapshotCommand,
    VolumeCommand, WalCommand,
};

use crate::config::{ByteSize, FlushTo, GarbageLimit, VolumeName};

/// A block device whose data lives in an object store.
#[derive(Debug, Parser)]
#[command(
    name = "vb-ublk",
    version,
    propagate_version = true,
    max_term_width = 100,
    after_help = "An option with an [env: ...] is looked for on the command line, then in the environment, then in the \
                  configuration file, under its long name (but for --config itself). The other options are on the \
                  command line alone. Exit codes: 0 done, 1 failed, 2 bad usage."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Debug, Default, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Where the volumes are: file:///folder, memory:NAME or s3://bucket/prefix [env: VB_UBLK_STORE; default: the
    /// folder `store` in the data folder]
    #[arg(long, global = true, value_name = "URL", conflicts_with = "bucket")]
    pub(crate) store: Option<String>,
    /// Short for --store s3://BUCKET [env: AWS_BUCKET]
    #[arg(long, global = true, value_name = "BUCKET")]
    pub(crate) bucket: Option<String>,
    /// The S3 server's URL, for all but AWS [env: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, AWS_HOST]
    #[arg(long, global = true, value_name = "URL")]
    pub(crate) endpoint: Option<String>,
    /// The region of the bucket [env: AWS_REGION, AWS_DEFAULT_REGION]
    #[arg(long, global = true)]
    pub(crate) region: Option<String>,
    /// The section of the AWS profile files to take credentials from [env: AWS_PROFILE]
    #[arg(long, global = true)]
    pub(crate) profile: Option<String>,
    /// A PEM file with the only certificate authorities to trust [env: VB_UBLK_CA_CERT]
    #[arg(long, global = true, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) ca_cert: Option<PathBuf>,
    /// Accept any certificate of the S3 server [env: VB_UBLK_INSECURE]
    #[arg(long, global = true)]
    pub(crate) insecure: bool,
    /// Where logs and the default store are [env: VB_UBLK_DATA_DIR; default: /var/lib/vb-ublk as root]
    #[arg(long, global = true, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) data_dir: Option<PathBuf>,
    /// Where the daemons' state is [env: VB_UBLK_RUN_DIR; default: /run/vb-ublk as root]
    #[arg(long, global = true, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) run_dir: Option<PathBuf>,
    /// The configuration file [env: VB_UBLK_CONFIG; default: /etc/vb-ublk/config.toml, if it is there]
    #[arg(long, global = true, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) config: Option<PathBuf>,
    /// Say more; twice, even more (RUST_LOG goes before this)
    #[arg(short, long, global = true, action = ArgAction::Count, conflicts_with = "quiet")]
    pub(crate) verbose: u8,
    /// Say only what fails
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Attach a volume as a block device; prints its path once it serves
    Add(Box<AddArgs>),
    /// Serve volumes over NBD, for QEMU and others; stays in the foreground
    Nbd(Box<NbdArgs>),
    /// Detach: stop the device, upload what is left, release the volume
    Del(DelArgs),
    /// Take up the devices of daemons that died: what is mounted on them goes on
    Recover(WhichArgs),
    /// Let this program take over the devices of running daemons, with a pause instead of an error
    Upgrade(WhichArgs),
    /// The volumes attached on this host
    List(JsonArg),
    /// All there is to know about the attached volumes
    Status(StatusArgs),
    /// What the kernel's ublk driver can do, and what is used of it
    Features(JsonArg),
    /// Volumes in the store
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Volumes as they were at a moment: made at once, of volumes in use, too, and kept for nothing but what changes later
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Make a volume that begins as a snapshot of another one; at once, whatever its size
    Clone(CloneArgs),
    /// Bring back the space in the store of what was overwritten or discarded
    ///
    /// A volume that is attached does this by itself, when there is much of it.
    Gc(GcArgs),
    /// Have what a volume attached on this host was written so far survive more than it does by itself
    ///
    /// It ends when the store has all that had completed, so that it survives the loss of this host; with --to wal, when it survives the loss
    /// of power. What a file system still has in memory, `sync` writes.
    Barrier(BarrierArgs),
    /// Make a new volume from a disk image: a file, a block device or a pipe
    ///
    /// Zeros are not stored. The volume is there when all of the image is in the store, and not before.
    Import(Box<ImportArgs>),
    /// Write a volume that is not attached to a disk image
    ///
    /// Or a snapshot, VOLUME@SNAPSHOT, of one that is. Every block is checked. A file is there under its name when it is whole, and not
    /// before.
    Export(ExportArgs),
    /// Measure a volume, an NBD export, a block device or a file: a workload with its rates and latencies
    Bench(Box<BenchArgs>),
    /// Write-ahead logs that no process has: left by a dead daemon, set aside, or damaged
    #[command(subcommand)]
    Wal(WalCommand),
    /// Print the completions for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the man pages into a folder
    Man {
        /// The folder, which has to be there
        #[arg(value_hint = ValueHint::DirPath)]
        dir: PathBuf,
    },
}

#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct JsonArg {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct AddArgs {
    /// The volume to attach; or VOLUME@SNAPSHOT, which is read-only
    #[arg(long)]
    pub(crate) volume: VolumeName,
    /// Create the volume if it is not there
    #[arg(long, requires = "size")]
    pub(crate) create: bool,
    /// The size of a volume to create, as in 10G
    #[arg(long, requires = "create")]
    pub(crate) size: Option<ByteSize>,
    /// The device's number [default: the first free one]
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=MAX_DEVICE))]
    pub(crate) number: Option<u32>,
    /// Queues, each with a thread of its own [env: VB_UBLK_QUEUES; default: 1 for each CPU, at most
    /// 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=MAX_QUEUES.into()))]
    pub(crate) queues: Option<u16>,
    /// Requests in flight on each queue [env: VB_UBLK_DEPTH; default: 128]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) depth: Option<u16>,
    /// Refuse writes
    #[arg(long)]
    pub(crate) read_only: bool,
    /// The folder of the write-ahead log [env: VB_UBLK_WAL_DIR; default: `wal` in the data folder]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) wal_dir: Option<PathBuf>,
    /// A whole block device as the write-ahead log. It must be empty (its first MiB zeros) or hold this volume's log,
    /// else it is refused [env: VB_UBLK_WAL_DEVICE]
    #[arg(long, value_name = "DEVICE", value_hint = ValueHint::FilePath, conflicts_with_all = ["wal_dir", "wal_size"])]
    pub(crate) wal_device: Option<PathBuf>,
    /// The most that the write-ahead log takes in its folder [env: VB_UBLK_WAL_SIZE; default: 1G]
    #[arg(long, value_name = "SIZE")]
    pub(crate) wal_size: Option<ByteSize>,
    #[command(flatten)]
    pub(crate) cache: CacheArgs,
    /// The logical block size of a volume to create [default: 512]
    #[arg(long, value_name = "BYTES", value_parser = logical_block, requires = "create")]
    pub(crate) logical_block_size: Option<u32>,
    /// Stay in the foreground, log to stderr
    #[arg(long)]
    pub(crate) foreground: bool,
    /// Take the volume over from another host, which can then write it no more
    #[arg(long)]
    pub(crate) force: bool,
    /// If the write-ahead log is damaged, have it end before the damage, as after a power cut at that moment; it is kept as it
    /// was under another name
    #[arg(long)]
    pub(crate) accept_loss: bool,
    /// If a daemon of this volume has died and left its device, take that up as it is: of the other options those of the store
    /// go before what the dead one had, and --foreground counts
    #[arg(long)]
    pub(crate) recover: bool,
    /// How far a flush goes before it is answered: to the local log (`wal`), which survives the loss of power, or to the store
    /// (`store`), for what has to survive the loss of this host [env: VB_UBLK_FLUSH; default: wal]
    #[arg(long, value_name = "wal|store")]
    pub(crate) flush: Option<FlushTo>,
    /// How much garbage (what was overwritten or discarded) the store may keep before data is copied in the background to have its room
    /// back, in percent of the live data, or `off`: more costs room and saves requests [env: VB_UBLK_GC_GARBAGE; default: 35%]
    #[arg(long, value_name = "PERCENT")]
    pub(crate) gc_garbage: Option<GarbageLimit>,
    /// Let a request that waits for the store, or for room that uploads would make, fail after so long [env:
    /// VB_UBLK_IO_TIMEOUT; default: 0, it waits as long as it takes]
    #[arg(long, value_name = "SECONDS")]
    pub(crate) io_timeout: Option<u32>,
    /// Answer Prometheus at /metrics of this address, over HTTP: a port of 127.0.0.1, or an address of this host with a port; port 0
    /// is a free one, which `status` shows [env: VB_UBLK_METRICS; default: nowhere]
    #[arg(long, value_name = "ADDR", value_parser = super::metrics::parse)]
    pub(crate) metrics: Option<SocketAddr>,
    /// Fail where the process cannot be protected against memory pressure, rather than warn [env:
    /// VB_UBLK_STRICT]
    #[arg(long)]
    pub(crate) strict: bool,
}

/// The kernel takes device numbers below 2^20 (its minors).
const MAX_DEVICE: i64 = (1 << 20) - 1;
/// The most queues of a device, each a thread.
pub(crate) const MAX_QUEUES: u16 = 32;

pub(crate) fn logical_block(s: &str) -> Result<u32, String> {
    match s {
        "512" => Ok(512),
        "4096" => Ok(4096),
        _ => Err("512 or 4096 is possible".to_owned()),
    }
}

#[derive(Debug, Args)]
pub(crate) struct NbdArgs {
    /// Listen on this TCP address, as in 127.0.0.1:10809 or [::1]:0; port 0 is a free one. May be given several times
    /// [env: VB_UBLK_LISTEN; default: 127.0.0.1:10809, if there is no other listener]
    #[arg(long, value_name = "ADDR:PORT", value_parser = super::nbd::listen::parse)]
    pub(crate) listen: Vec<SocketAddr>,
    /// Listen on this unix socket; a dead one is replaced. May be given several times [env: VB_UBLK_UNIX]
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub(crate) unix: Vec<PathBuf>,
    /// Serve this volume, or VOLUME@SNAPSHOT, which is read-only; may be given several times. A single one is the default export, too [default: all volumes of
    /// the store]
    #[arg(long, value_name = "VOLUME")]
    pub(crate) volume: Vec<VolumeName>,
    /// Make a volume that is missing on its first use, of this size, as in 10G (with --volume: those)
    #[arg(long, value_name = "SIZE")]
    pub(crate) create_size: Option<ByteSize>,
    /// Refuse writes
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Offer TLS with server-cert.pem and server-key.pem from this folder; with ca-cert.pem there, clients need a
    /// certificate of that authority [env: VB_UBLK_TLS_CERTS]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) tls_certs: Option<PathBuf>,
    /// Whether clients must use TLS [env: VB_UBLK_TLS; default: required, with --tls-certs]
    #[arg(long, value_name = "required|allowed", value_parser = TlsMode::parse)]
    pub(crate) tls: Option<TlsMode>,
    /// Listen on addresses that other hosts reach, without requiring TLS [env: VB_UBLK_INSECURE_LISTEN]
    #[arg(long)]
    pub(crate) insecure_listen: bool,
    /// Clients at once; further ones are turned away [env: VB_UBLK_MAX_CONNECTIONS; default: 128]
    #[arg(long, value_name = "N")]
    pub(crate) max_connections: Option<u16>,
    /// Threads that serve clients [env: VB_UBLK_WORKERS; default: 1 for each CPU, at most 4]
    #[arg(long, value_name = "N")]
    pub(crate) workers: Option<u16>,
    /// How long a volume stays attached when its last client has left [env: VB_UBLK_LINGER; default: 10]
    #[arg(long, value_name = "SECONDS")]
    pub(crate) linger: Option<u32>,
    /// Take volumes over from other hosts, which can then write them no more
    #[arg(long)]
    pub(crate) force: bool,
    /// If the write-ahead log of a volume is damaged, have it end before the damage, as after a power cut at that moment; it
    /// is kept as it was under another name
    #[arg(long)]
    pub(crate) accept_loss: bool,
    /// The folder of the write-ahead logs [env: VB_UBLK_WAL_DIR; default: `wal` in the data folder]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) wal_dir: Option<PathBuf>,
    /// The most that the write-ahead log of each volume takes [env: VB_UBLK_WAL_SIZE; default: 1G]
    #[arg(long, value_name = "SIZE")]
    pub(crate) wal_size: Option<ByteSize>,
    #[command(flatten)]
    pub(crate) cache: CacheArgs,
    /// How far a flush goes before it is answered: to the local log (`wal`), which survives the loss of power, or to the store
    /// (`store`), for what has to survive the loss of this host [env: VB_UBLK_FLUSH; default: wal]
    #[arg(long, value_name = "wal|store")]
    pub(crate) flush: Option<FlushTo>,
    /// How much garbage (what was overwritten or discarded) the store may keep before data is copied in the background to have its room
    /// back, in percent of the live data, or `off`: more costs room and saves requests [env: VB_UBLK_GC_GARBAGE; default: 35%]
    #[arg(long, value_name = "PERCENT")]
    pub(crate) gc_garbage: Option<GarbageLimit>,
    /// Let a request that waits for the store, or for room that uploads would make, fail after so long [env:
    /// VB_UBLK_IO_TIMEOUT; default: 0, it waits as long as it takes]
    #[arg(long, value_name = "SECONDS")]
    pub(crate) io_timeout: Option<u32>,
    /// Answer Prometheus at /metrics of this address, over HTTP: a port of 127.0.0.1, or an address of this host with a port; port 0
    /// is a free one, which `status` shows [env: VB_UBLK_METRICS; default: nowhere]
    #[arg(long, value_name = "ADDR", value_parser = super::metrics::parse)]
    pub(crate) metrics: Option<SocketAddr>,
    /// Fail where the process cannot be protected against memory pressure, rather than warn [env:
    /// VB_UBLK_STRICT]
    #[arg(long)]
    pub(crate) strict: bool,
}

/// What is asked of clients, where TLS is offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TlsMode {
    Required,
    Allowed,
}

impl TlsMode {
    pub(crate) fn parse(s: &str) -> Result<Self, String> {
        match s {
            "required" => Ok(Self::Required),
            "allowed" => Ok(Self::Allowed),
            _ => Err("`required` or `allowed` is possible".to_owned()),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct BarrierArgs {
    /// The volume
    pub(crate) volume: VolumeName,
    /// How far: to the local log, for the loss of power, or to the store, for the loss of this host
    #[arg(long, value_name = "wal|store", default_value = "store")]
    pub(crate) to: FlushTo,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

/// Which devices.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("which").required(true).args(["number", "volume", "all"]))]
pub(crate) struct WhichArgs {
    /// The device's number
    #[arg(short = 'n', long, value_name = "N")]
    pub(crate) number: Option<u32>,
    /// The volume
    #[arg(long)]
    pub(crate) volume: Option<VolumeName>,
    /// All of this host
    #[arg(long)]
    pub(crate) all: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DelArgs {
    #[command(flatten)]
    pub(crate) which: WhichArgs,
    /// Stop the device even though it is mounted or open
    #[arg(long)]
    pub(crate) force: bool,
    /// Give up waiting after this many seconds; the upload goes on [default: wait for ever]
    #[arg(long, value_name = "SECONDS")]
    pub(crate) timeout: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// The volume [default: all of this host]
    pub(crate) volume: Option<VolumeName>,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}
