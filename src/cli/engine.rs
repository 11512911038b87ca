//! Every call that the command line makes into the volume engine and the ublk frontend, in one place; those for images are in [`images`].

pub(super) mod images;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use serde_json::Value;
use tokio::sync::oneshot;

use super::control::Order;
use crate::config::FlushTo;
use crate::disk::file::DataFile;
use crate::disk::uring::{self, UringDisk};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::frontend::ublk;
use crate::gc;
use crate::lane::{Lane, LaneDisk, LaneTimer};
use crate::manifest::{By, Manifest, Published, Snapshot};
use crate::store::retry::{Policy, Retry};
use crate::store::{self, Store, StoreOptions, StoreUrl};
use crate::time::now_unix;
use crate::units::{BLOCK, Nonce};
use crate::volume::host::{Host, who};
use crate::volume::lane::VolumeLane;
use crate::volume::{Command, Volume, admin, rebuild, resize, snapshots, verify};
use crate::wal;
use crate::wal::codec::{SUPERBLOCK_AT, Superblock};

pub(super) use crate::cache::{Place as CachePlace, check_size as check_cache_size, file_in as cache_file};
pub(super) use crate::disk::file::sync_parent;
pub(super) use crate::frontend::ublk::{DeviceSpec, DeviceStatus, StopHandle, device_path};
pub(super) use crate::gc::Policy as Collect;
pub(super) use crate::volume::VolumeStatus;
pub(super) use crate::volume::admin::{CreateOptions, Listed};
pub(super) use crate::volume::attach::utc;
pub(super) use crate::volume::damage::{Damage, Report};
pub(super) use crate::volume::host::AttachOptions;
pub(super) use crate::volume::rebuild::{LogFate, ManifestState, MapFrom, Progress as Rebuilding, Report as Rebuilt};
pub(super) use crate::volume::verify::Progress;
pub(super) use crate::wal::codec::{LogPos, RecordKind};
pub(super) use crate::wal::create::MAX_LOG_BYTES;
pub(super) use crate::wal::inspect::{BadBlock, End, Inspection, Item, Piece, Standing};

/// Runs `f` with the store open, on a runtime that lives no longer than this call.
fn with_store<T>(url: &StoreUrl, opts: &StoreOptions, f: impl AsyncFnOnce(&dyn Store) -> Result<T>) -> Result<T> {
    with_policy(Policy::attach(), url, opts, f)
}

fn with_policy<T>(
    policy: Policy,
    url: &StoreUrl,
    opts: &StoreOptions,
    f: impl AsyncFnOnce(&dyn Store) -> Result<T>,
) -> Result<T> {
    with_shared(policy, url, opts, async |s| f(&**s).await)
}

fn with_shared<T>(
    policy: Policy,
    url: &StoreUrl,
    opts: &StoreOptions,
    f: impl AsyncFnOnce(&Arc<dyn Store>) -> Result<T>,
) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context(|| "starting the runtime for the store's requests")?;
    runtime.block_on(async {
        let store = store::open(url, opts).await.context(|| format!("opening the store {url}"))?;
        let store: Arc<dyn Store> = Arc::new(Retry::new(store, policy));
        f(&store).await
    })
}

/// Whether this program can read the log at `path`, which its daemon may be writing to at this moment: as far as a superblock tells.
///
/// # Errors
/// `Unsupported` when no copy of it can be read by this program; the I/O error.
pub(super) fn knows_log(path: &Path) -> Result<()> {
    let file = File::open(path).context(|| format!("opening the log {}", path.display()))?;
    let mut why = Vec::new();
    for at in SUPERBLOCK_AT {
        let mut block = [0; BLOCK];
        let read = file.read_exact_at(&mut block, at).map_err(|e| e.to_string());
        match read.and_then(|()| Superblock::decode(&block).map_err(|e| e.to_string())) {
            Ok(_) => return Ok(()),
            Err(e) => why.push(e),
        }
    }
    let what = format!("this vb-ublk cannot read the log {}: {}", path.display(), why.join("; "));
    Err(Error::new(ErrorKind::Unsupported, what))
}

pub(super) fn json(v: &impl serde::Serialize) -> Result<Value> {
    serde_json::to_value(v).map_err(|e| Error::new(ErrorKind::Internal, "writing JSON").with_source(e))
}

pub(super) fn create(url: &StoreUrl, opts: &StoreOptions, name: &str, create: &CreateOptions) -> Result<Value> {
    let opts = StoreOptions { create: true, ..opts.clone() };
    with_store(url, &opts, async |s| json(&admin::create(s, name, create, now_unix()).await?))
}

/// Creates the volume unless it is there already, with the same size.
pub(super) fn ensure(url: &StoreUrl, opts: &StoreOptions, name: &str, create: &CreateOptions) -> Result<()> {
    let opts = StoreOptions { create: true, ..opts.clone() };
    with_store(url, &opts, async |s| {
        let exists = match admin::create(s, name, create, now_unix()).await {
            Ok(_) => return Ok(()),
            Err(e) if e.kind() == ErrorKind::Exists => e,
            Err(e) => return Err(e),
        };
        let there = match admin::info(s, name).await {
            Ok(m) => m.size_bytes,
            // Something is there, and it is no volume.
            Err(e) if e.kind() == ErrorKind::NotFound => return Err(exists),
            Err(e) => return Err(e),
        };
        if there == create.size_bytes {
            return Ok(());
        }
        let what = format!(
            "volume {name} exists already in {url} with {there} bytes, not {}: leave out --create to attach it as it is",
            create.size_bytes
        );
        Err(Error::new(ErrorKind::Exists, what))
    })
}

/// All volumes, in order. A store whose folder was never made has none.
pub(super) fn list(url: &StoreUrl, opts: &StoreOptions) -> Result<Listed> {
    with_store(url, opts, async |s| admin::list(s).await)
}

/// The size of a volume in bytes.
///
/// # Errors
/// `NotFound`, the store's.
pub(super) fn size_of(url: &StoreUrl, opts: &StoreOptions, name: &str) -> Result<u64> {
    with_store(url, opts, async |s| Ok(admin::info(s, name).await?.size_bytes))
}

pub(super) fn info(url: &StoreUrl, opts: &StoreOptions, name: &str) -> Result<Value> {
    with_store(url, opts, async |s| json(&admin::info(s, name).await?))
}

/// Resizes a volume that nobody has attached.
pub(super) fn resize(
    url: &StoreUrl,
    opts: &StoreOptions,
    name: &str,
    size_bytes: u64,
    discard_tail: bool,
) -> Result<Manifest> {
    let nonce = Nonce::draw().context(|| "drawing a nonce")?;
    let how = resize::Options { size_bytes, discard_tail, nonce };
    with_store(url, opts, async |s| resize::resize(s, name, &how).await)
}

/// Tells the kernel the new size of a device.
pub(super) fn resize_device(id: u32, size_bytes: u64) -> Result<()> {
    ublk::resize(id, size_bytes)
}

/// A time as a name: `20261120-215300`.
pub(super) fn moment(unix: u64) -> String {
    let digits: String = utc(unix).chars().filter(char::is_ascii_digit).collect();
    let (day, time) = digits.split_at(digits.len().min(8));
    format!("{day}-{time}")
}

pub(super) fn create_snapshot(
    url: &StoreUrl,
    opts: &StoreOptions,
    volume: &str,
    name: &str,
    created: u64,
) -> Result<()> {
    with_store(url, opts, async |s| snapshots::create(s, volume, name, created).await.map(drop))
}

/// Oldest first.
pub(super) fn snapshots(url: &StoreUrl, opts: &StoreOptions, volume: &str) -> Result<Vec<Snapshot>> {
    with_store(url, opts, async |s| Ok(admin::info(s, volume).await?.snapshots))
}

pub(super) fn delete_snapshot(url: &StoreUrl, opts: &StoreOptions, volume: &str, name: &str) -> Result<()> {
    with_store(url, opts, async |s| {
        let mut published = Published::load(s, volume).await?;
        snapshots::delete(s, &mut published, By::Anybody, name).await
    })
}

/// Makes a volume of a snapshot (volume, snapshot).
pub(super) fn clone(
    url: &StoreUrl,
    opts: &StoreOptions,
    from: (&str, &str),
    new: &str,
    size_bytes: Option<u64>,
) -> Result<Manifest> {
    with_store(url, opts, async |s| snapshots::clone(s, from.0, from.1, new, size_bytes, now_unix()).await)
}

/// Deletes a volume; returns how many objects that were.
pub(super) fn delete(url: &StoreUrl, opts: &StoreOptions, name: &str, force: bool) -> Result<u64> {
    with_store(url, opts, async |s| admin::delete(s, name, force).await)
}

/// Reads and checks all that a volume has in the store.
pub(super) fn verify(
    url: &StoreUrl,
    opts: &StoreOptions,
    name: &str,
    told: &mut dyn FnMut(Progress),
) -> Result<Report> {
    with_policy(Policy::long_run(), url, opts, async |s| verify::verify(s, name, told).await)
}

/// What a volume takes in the store, as of its last checkpoint.
pub(super) fn garbage(url: &StoreUrl, opts: &StoreOptions, name: &str) -> Result<Value> {
    let (known, orphans, m) = with_policy(Policy::long_run(), url, opts, async |s| gc::scan::look(s, name).await)?;
    let bytes = known.usage.space(&known.held, m.last_chunk()).in_bytes();
    Ok(serde_json::json!({
        "volume": name,
        "logical_bytes": bytes.logical,
        "mapped_bytes": bytes.mapped,
        "shared_bytes": bytes.shared,
        "stored_bytes": bytes.stored,
        "live_bytes": bytes.live,
        "snapshot_bytes": bytes.held,
        "garbage_bytes": bytes.garbage,
        "orphans": orphans.len(),
    }))
}

/// How to rebuild a volume.
pub(super) struct RebuildOptions {
    pub(super) force: bool,
    pub(super) accept_loss: bool,
    pub(super) dry_run: bool,
    pub(super) size_bytes: Option<u64>,
    pub(super) logical_block: Option<u32>,
}

/// Makes a volume's map and manifest anew from its chunks. The log stays locked meanwhile, so that nobody attaches with it.
pub(super) fn rebuild(
    url: &StoreUrl,
    opts: &StoreOptions,
    name: &str,
    how: &RebuildOptions,
    log: Option<(&Path, &OpenLog)>,
    told: &mut dyn FnMut(Rebuilding),
) -> Result<Rebuilt> {
    let local = match log {
        Some((path, log)) if !log.is_blank()? => {
            let found = log
                .inspect()
                .map_err(|e| e.context("the volume's log cannot be used; move it away to rebuild without it"));
            Some(rebuild::LocalLog::of(path.display().to_string(), &found?))
        }
        _ => None,
    };
    let nonce = Nonce::draw().context(|| "drawing a nonce")?;
    let RebuildOptions { force, accept_loss, dry_run, size_bytes, logical_block } = *how;
    let now_unix = now_unix();
    let how =
        rebuild::Options { force, accept_loss, dry_run, size_bytes, logical_block, writer: who(), nonce, now_unix };
    with_policy(Policy::long_run(), url, opts, async |s| rebuild::rebuild(s, name, &how, local.as_ref(), told).await)
}

/// An attached volume.
pub(super) struct Attached(Host);

/// A volume on a lane.
pub(super) type LaneEngine = VolumeLane<LaneDisk, LaneTimer>;

/// A descriptor of the log, or the cache, that tells when it is closed.
struct UsedFile {
    file: File,
    _user: Arc<()>,
}

impl AsFd for UsedFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Looks at an attached volume from other threads.
#[derive(Clone)]
pub(super) struct View(Arc<Volume>);

impl View {
    /// What is told of the volume, to whomever.
    pub(super) fn figures(&self) -> VolumeStatus {
        self.0.status()
    }

    pub(super) fn status(&self) -> Result<Value> {
        json(&self.figures())
    }

    /// Begins what the daemon was ordered to do; returns where the end is told.
    pub(super) fn order(&self, order: &Order) -> Result<oneshot::Receiver<Result<()>>> {
        self.0.ask(|reply| match order.clone() {
            Order::Snapshot { name, created } => Command::Snapshot { name, created, reply },
            Order::Grow { size_bytes } => Command::Grow { size_bytes, reply },
            Order::CollectGarbage => Command::CollectGarbage(reply),
            Order::Flatten => Command::Flatten(reply),
            Order::KeepTrace { volume, snapshot } => Command::KeepTrace { volume, snapshot, reply },
            Order::Barrier { to: FlushTo::Wal } => Command::Sync(reply),
            Order::Barrier { to: FlushTo::Store } => Command::Barrier(reply),
            Order::DeleteSnapshot { name } => Command::DeleteSnapshot { name, reply },
        })
    }

    pub(super) fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }

    pub(super) fn read_only(&self) -> bool {
        self.0.read_only()
    }

    /// Whether it is detached or lost; then no request succeeds any more.
    pub(super) fn is_gone(&self) -> bool {
        self.0.is_gone()
    }

    /// The volume as `lane` sees it. `user` is let go of when the lane, and each of its requests in flight, has let go of the log and the cache.
    pub(super) fn lane(&self, lane: &Lane, user: Arc<()>) -> Result<Rc<LaneEngine>> {
        // A dup shares the open file description, and with it the lock.
        let disk = |file: &DataFile, what: &str| {
            let file = file.dup().context(|| format!("opening {what} for a queue"))?;
            Ok::<_, Error>(LaneDisk::new(lane, Arc::new(UsedFile { file, _user: Arc::clone(&user) })))
        };
        let of_cache = self.0.cache().map(|c| disk(c.file(), "the cache")).transpose()?;
        let disk = disk(self.0.log_file(), "the write-ahead log")?;
        Ok(VolumeLane::new(Arc::clone(&self.0), disk, of_cache, LaneTimer::new(lane)))
    }
}

impl Attached {
    /// Blocks until the volume can serve.
    pub(super) fn attach(opts: AttachOptions) -> Result<Self> {
        Host::attach(opts).map(Self)
    }

    pub(super) fn view(&self) -> View {
        View(Arc::clone(self.0.volume()))
    }

    pub(super) fn size_bytes(&self) -> u64 {
        self.0.volume().size_bytes()
    }

    pub(super) fn logical_block(&self) -> u32 {
        self.0.volume().logical_block()
    }

    /// Serves the device until it is stopped.
    pub(super) fn serve(
        &self,
        spec: &DeviceSpec,
        ready: impl FnOnce(&ublk::DeviceInfo),
        stop: &StopHandle,
    ) -> Result<()> {
        let view = self.view();
        let make = move |_queue: u16, lane: &Lane| view.lane(lane, Arc::new(()));
        ublk::serve(spec, make, ready, stop)
    }

    /// Uploads what is left and releases the volume; may take long. All lanes must have ended.
    pub(super) fn detach(self) -> Result<()> {
        let volume = self.view();
        self.0.detach().map_err(|e| {
            e.context(format!(
                "detaching volume {}: not all is uploaded; the log {} keeps it, attach again on this host to upload it",
                volume.0.name(),
                volume.0.log_file().path().display()
            ))
        })
    }
}

/// What the kernel says of a device; `None` when there is none.
pub(super) fn device(id: u32) -> Result<Option<ublk::DeviceStatus>> {
    // Without a driver there is no device.
    if !Path::new("/dev/ublk-control").exists() {
        return Ok(None);
    }
    ublk::device_info(id)
}

/// The devices without a living server, of this program or another, that are not among `known`.
pub(super) fn orphans(known: &[u32]) -> Result<Vec<ublk::DeviceStatus>> {
    let mut devices = ublk::list_devices()?;
    devices.retain(|d| !known.contains(&d.id) && !d.is_served());
    Ok(devices)
}

/// Whether a process runs.
pub(super) fn is_alive(pid: u32) -> bool {
    ublk::is_alive(pid.cast_signed())
}

/// Whether a log may have this size.
pub(super) fn check_log_size(bytes: u64) -> Result<()> {
    wal::create::geometry_for(bytes).map(drop)
}

/// Whether the driver is there and this process may use it.
pub(super) fn driver() -> Result<ublk::KernelFeatures> {
    ublk::features()
}

pub(super) fn delete_dead(id: u32) -> Result<()> {
    ublk::delete_dead(id)
}

/// Whether the device, or a partition of it, is mounted or held by another device.
pub(super) fn is_in_use(path: &Path) -> bool {
    ublk::is_in_use(path)
}

/// A log that no other process has, to be read alone.
pub(super) struct OpenLog(DataFile);

impl OpenLog {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = DataFile::open_to_read(path)
            .map_err(|e| e.context(format!("reading the log {} while no other process has it", path.display())))?;
        Ok(Self(file))
    }

    pub(super) fn size(&self) -> Result<u64> {
        self.0.size()
    }

    fn with_disk<T>(&self, f: impl AsyncFnOnce(UringDisk) -> Result<T>) -> Result<T> {
        uring::run(async {
            let opening = || format!("opening {} a second time", self.0.path().display());
            f(UringDisk::new(&self.0).context(opening)?).await
        })
    }

    /// Whether no log was ever in it.
    pub(super) fn is_blank(&self) -> Result<bool> {
        let size = self.size()?;
        let found = self.with_disk(async |disk| wal::create::SuperblockFile::load(&disk, size).await);
        found.map(|sb| sb.is_none()).map_err(|e| e.context(format!("reading the log {}", self.0.path().display())))
    }

    pub(super) fn inspect(&self) -> Result<Inspection> {
        let size = self.size()?;
        self.with_disk(async |disk| wal::inspect::inspect(&disk, size).await)
            .map_err(|e| e.context(format!("reading the log {}", self.0.path().display())))
    }

    /// Reads the wanted entries, in log order.
    pub(super) fn read(
        &self,
        found: &Inspection,
        wanted: impl Fn(&Item<'_>) -> bool,
        each: impl FnMut(Piece<'_>) -> Result<()>,
    ) -> Result<()> {
        self.with_disk(async |disk| wal::inspect::read_entries(&disk, found, wanted, each).await)
    }
}
