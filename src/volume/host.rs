//! The threads of an attached volume: one for its background, one for the lanes' reads of chunks. Each is a
//! tokio-uring runtime with an S3 client of its own.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use futures_util::future::select;
use rustix::process::{getpriority_process, setpriority_process};
use tokio::sync::oneshot;

use super::attach::{Attached, OpenLog, Request, Stores, attach, is_ours};
pub use super::background::logcare::keep_log;
use super::log_device::{check_device, device_geometry};
use super::reads::serve_reads;
use super::resume::resume;
use super::salvage::accept_loss;
use super::stale::check_log;
use super::{Command, Volume, admin, boot, fixed};
use crate::cache::fetch::Fetcher;
use crate::cache::{self, Cache};
use crate::config::FlushTo;
use crate::disk::file::{DataFile, sync_parent};
use crate::disk::uring::{self, TokioTimer, UringDisk};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::gc;
use crate::manifest::{Published, Writer};
use crate::store::lazy::Lazy;
use crate::store::metrics::Metrics;
use crate::store::retry::{Policy, Retry};
use crate::store::{self, Store, StoreOptions, StoreUrl, open};
use crate::time::{Timer, now_unix};
use crate::units::Nonce;
use crate::wal::create::{SuperblockFile, geometry_for};
use crate::wal::replay::geometry_of;

/// How long the end of an attachment waits for the cache's disk.
const CACHE_MAY_TAKE: Duration = Duration::from_secs(2);
/// A tenth of a lane's weight where both want the same processor, all of it where nobody else does. Not less: a log
/// that fills up slows writers down, which must give the uploads room again.
const BACKGROUND_NICE: i32 = 10;

/// How to attach a volume.
#[derive(Debug, Clone)]
pub struct AttachOptions {
    /// The store.
    pub store_url: StoreUrl,
    /// How to reach it.
    pub store_options: StoreOptions,
    /// The volume's name; or `VOLUME@SNAPSHOT`, to be read only.
    pub volume: String,
    /// The log: a file (made if missing), or a block device.
    pub log_path: PathBuf,
    /// Size of a new log in bytes.
    pub log_bytes: u64,
    /// Take the volume over from another host.
    pub force: bool,
    /// Refuse writes.
    pub read_only: bool,
    /// How far flushes go.
    pub flush_to: FlushTo,
    /// How long a request may wait for the store; none: as long as it takes.
    pub io_timeout: Option<Duration>,
    /// Go on from the log before the store is asked, as [`resume`] does: for a volume whose process has died while this
    /// kernel lived on.
    pub resume: bool,
    /// End a damaged log before its damage, and lose what lies behind.
    pub accept_loss: bool,
    /// How garbage is collected.
    pub gc: gc::Policy,
    /// The local cache of what is in the store.
    pub cache: Option<cache::Place>,
    /// It will be a device of this machine, whose memory may fill up with what is to be written to it.
    pub guard_memory: bool,
}

/// An attached volume with its threads.
#[derive(Debug)]
pub struct Host {
    volume: Arc<Volume>,
    threads: [JoinHandle<()>; 2],
}

impl std::fmt::Debug for Volume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Volume({})", self.name())
    }
}

impl Host {
    /// Attaches; blocks until the volume can be served.
    ///
    /// # Errors
    /// Those of [`attach`], of the log's file, and of the store.
    pub fn attach(opts: AttachOptions) -> Result<Self> {
        admin::split_name(&opts.volume)?;
        if let Some(place) = &opts.cache {
            cache::check_size(place.bytes)?;
        }
        // With this thread's priority, which the background's is below.
        store::prepare_fetches(&opts.store_url);
        let (told, answer) = oneshot::channel();
        let for_reads = opts.clone();
        let background = spawn("vb-background", move || {
            step_back();
            store::prepare_uploads(&opts.store_url);
            uring::run(async move {
                match open_and_attach(&opts).await {
                    Ok(Attached { volume, mut background, reads, reader }) => {
                        if opts.guard_memory && !volume.read_only() {
                            background.guard_memory(opts.cache.is_some());
                        }
                        let _ = told.send(Ok((volume, reads, reader)));
                        background.run().await;
                    }
                    Err(e) => {
                        let _ = told.send(Err(e));
                    }
                }
            });
        })?;
        let (volume, reads, reader) = answer.blocking_recv().map_err(|_| {
            Error::new(ErrorKind::Internal, "the volume's background thread ended before it had attached")
        })??;
        // Not before: a refusal leaves nothing behind.
        let cache = open_cache(&for_reads);
        if let Some(cache) = cache.clone() {
            volume.set_cache(cache);
        }
        let served = volume.clone();
        let reading = spawn("vb-reads", move || {
            uring::run(async move {
                let keeper = async {
                    match disk_of(served.log_file()) {
                        Ok(disk) => keep_log(served.clone(), disk, TokioTimer).await,
                        Err(e) => served.log.fail(e.to_string()),
                    }
                };
                let reads = async {
                    // A client of its own: its connections live on this thread.
                    let options = StoreOptions { fetch_aside: true, ..for_reads.store_options };
                    let store = Lazy::new(for_reads.store_url, options);
                    let store = Arc::new(Metrics::new(Arc::new(store)));
                    served.count_store(store.clone());
                    let advice = Retry::new(store.clone(), Policy::attach());
                    let reader = reader.over(Arc::new(Retry::new(store, Policy::serving())));
                    let cache = cache.and_then(|c| Some((c.clone(), disk_of(c.file()).ok()?)));
                    let fetcher = Fetcher::new(reader.clone(), cache.clone());
                    let filled = async {
                        let Some((cache, disk)) = &cache else { return };
                        if served.until_confirmed().await.is_ok() {
                            cache.restore(disk, reader.keys(), || served.is_gone()).await;
                            boot::prefetch(&served, &advice, &fetcher).await;
                        }
                    };
                    let work = futures_util::future::join(serve_reads(reads, &fetcher, served.until_gone()), filled);
                    // Of the store's answers none is waited for; what is under way on the cache's disk has a moment.
                    let late = async {
                        served.until_gone().await;
                        TokioTimer.sleep(CACHE_MAY_TAKE).await;
                    };
                    select(std::pin::pin!(work), std::pin::pin!(late)).await;
                };
                futures_util::future::join(keeper, reads).await;
            });
        })?;
        Ok(Self { volume, threads: [background, reading] })
    }

    /// What lanes share.
    #[must_use]
    pub const fn volume(&self) -> &Arc<Volume> {
        &self.volume
    }

    /// Uploads everything, publishes a checkpoint, releases the epoch. All lanes must have ended.
    ///
    /// # Errors
    /// `Fenced` when another host has the volume.
    pub fn detach(self) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        let ended = || Error::new(ErrorKind::Internal, "the volume's background thread has ended early");
        self.volume.commands.blocking_send(Command::Detach(reply)).map_err(|_| ended())?;
        let result = answer.blocking_recv().map_err(|_| ended())?;
        self.join()?;
        result
    }

    /// Ends the threads and leaves everything as the death of the process would: what is not uploaded stays in the
    /// log, the epoch is not released. The same host attaches again and has everything.
    ///
    /// # Errors
    /// `Internal` when a thread has ended early.
    pub fn abandon(self) -> Result<()> {
        // A background that has ended already needs no telling.
        let _ = self.volume.commands.blocking_send(Command::Abandon);
        self.join()
    }

    /// Waits for the threads; both end when the volume is gone.
    fn join(self) -> Result<()> {
        for t in self.threads {
            t.join().map_err(|_| Error::new(ErrorKind::Internal, "a thread of the volume has panicked"))?;
        }
        Ok(())
    }
}

fn spawn(name: &str, f: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(f).context(|| format!("starting thread {name}"))
}

/// Lets the calling thread, and those it starts, have less of a busy processor than the lanes, which wait for microseconds
/// where packing takes milliseconds. Best effort; never raises a thread that is lower already.
fn step_back() {
    let lower = getpriority_process(None).and_then(|nice| setpriority_process(None, nice.max(BACKGROUND_NICE)));
    if let Err(e) = lower {
        tracing::debug!("lowering a background thread: {e}");
    }
}

/// The volume's cache. Without it the volume is served all the same: it costs speed alone.
fn open_cache(opts: &AttachOptions) -> Option<Arc<Cache>> {
    let opened = opts.cache.as_ref().map(Cache::open)?;
    opened.map(Arc::new).inspect_err(|e| tracing::warn!("volume {} is served without its cache: {e}", opts.volume)).ok()
}

/// This process, as a manifest names it.
pub(crate) fn who() -> Writer {
    let host = nix::unistd::gethostname().map_or_else(|_| "unknown".to_owned(), |h| h.to_string_lossy().into_owned());
    Writer { host, pid: std::process::id(), since: now_unix() }
}

/// The two ways to the same store, over `backend`. The retries are above the counters: each try is a request.
fn stores(backend: &Arc<Metrics>, attach: Policy) -> Stores {
    Stores {
        attach: Arc::new(Retry::new(backend.clone(), attach)),
        background: Arc::new(Retry::new(backend.clone(), Policy::background())),
    }
}

fn request(opts: &AttachOptions) -> Result<Request> {
    let nonce = Nonce::draw().context(|| "drawing a nonce")?;
    let gc = if opts.read_only { gc::Policy::off() } else { opts.gc.clone() };
    Ok(Request {
        force: opts.force,
        read_only: opts.read_only,
        flush_to: opts.flush_to,
        io_timeout: opts.io_timeout,
        gc,
        writer: who(),
        nonce,
    })
}

fn salts() -> Box<dyn FnMut() -> u64 + Send> {
    // Entropy that fails after it has worked is no state this can go on from.
    Box::new(|| getrandom::u64().unwrap_or_else(|e| panic!("the system's entropy failed: {e}")))
}

async fn open_and_attach(opts: &AttachOptions) -> Result<Attached<UringDisk, TokioTimer>> {
    if let (volume, Some(snapshot)) = admin::split_name(&opts.volume)? {
        let backend = Arc::new(Metrics::new(open(&opts.store_url, &opts.store_options).await?));
        let of = (volume, snapshot);
        let attached =
            fixed::open(stores(&backend, Policy::attach()), of, &opts.log_path, opts.io_timeout, salts()).await?;
        attached.volume.count_store(backend);
        return Ok(attached);
    }
    if opts.resume
        && let Some(attached) = open_and_resume(opts).await?
    {
        return Ok(attached);
    }
    let wanted = geometry_for(opts.log_bytes)?;
    let backend = Arc::new(Metrics::new(open(&opts.store_url, &opts.store_options).await?));
    let stores = stores(&backend, Policy::attach());
    let published = Published::load(&*stores.attach, &opts.volume).await?;
    let (file, superblock) = open_log(&opts.log_path, &*stores.attach, &published, opts).await?;
    // A device is used whole.
    let geometry = if file.is_device() { device_geometry(&file)? } else { wanted };
    let disk = disk_of(&file)?;
    let log = OpenLog { file: Arc::new(file), disk, superblock, geometry, salt: salts() };
    let attached = attach(stores, published, log, TokioTimer, request(opts)?).await?;
    attached.volume.count_store(backend);
    Ok(attached)
}

/// Without a word to the store; `None` when there is no log to go on from.
async fn open_and_resume(opts: &AttachOptions) -> Result<Option<Attached<UringDisk, TokioTimer>>> {
    if !opts.log_path.exists() {
        return Ok(None);
    }
    let file = DataFile::open(&opts.log_path, false)?;
    let disk = disk_of(&file)?;
    let Some(superblock) = load_superblock(&file, &disk).await? else { return Ok(None) };
    let geometry = geometry_of(&superblock.current);
    let backend = Arc::new(Metrics::new(Arc::new(Lazy::new(opts.store_url.clone(), opts.store_options.clone()))));
    let log = OpenLog { file: Arc::new(file), disk, superblock: Some(superblock), geometry, salt: salts() };
    // Nobody waits for the taking, and one call of it that fails has all of them made again.
    let attached = resume(stores(&backend, Policy::long_run()), &opts.volume, log, TokioTimer, request(opts)?).await?;
    attached.volume.count_store(backend);
    Ok(Some(attached))
}

async fn load_superblock(file: &DataFile, disk: &UringDisk) -> Result<Option<SuperblockFile>> {
    SuperblockFile::load(disk, file.size()?)
        .await
        .map_err(|e| e.context(format!("reading the log {}", file.path().display())))
}

fn disk_of(file: &DataFile) -> Result<UringDisk> {
    UringDisk::new(file).context(|| format!("opening {} a second time", file.path().display()))
}

/// Opens and locks the log. One that is not the newest attachment's is set aside whole, and a new one made.
async fn open_log(
    path: &Path,
    store: &dyn Store,
    published: &Published,
    opts: &AttachOptions,
) -> Result<(DataFile, Option<SuperblockFile>)> {
    let m = &published.manifest;
    let is_device = std::fs::metadata(path).is_ok_and(|d| {
        use std::os::unix::fs::FileTypeExt;
        d.file_type().is_block_device()
    });
    if !is_device && let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).context(|| format!("making the log's folder {}", folder.display()))?;
    }
    let existed = path.exists();
    if !existed && m.writer.is_some() && !opts.force {
        // Refuse before a file is made: nothing changes on a refusal.
        return Err(super::attach::held(m));
    }
    let file = DataFile::open(path, !is_device)?;
    if is_device {
        check_device(&file)?;
    }
    let superblock = load_superblock(&file, &disk_of(&file)?).await?;
    if let Some(sb) = &superblock {
        check_log(store, m, &sb.current)?;
    }
    match superblock {
        Some(mut sb) if is_ours(&sb, m) => {
            if opts.accept_loss {
                accept_loss(&file, &disk_of(&file)?, &mut sb).await?;
            }
            Ok((file, Some(sb)))
        }
        Some(sb) if is_device => Err(Error::new(
            ErrorKind::Busy,
            format!(
                "{} holds the log of {} (entries packed up to {}): use another device, or wipe it with `wipefs`/`dd` if that log is not needed",
                path.display(),
                if sb.current.volume == m.uuid {
                    "an older attachment of this volume".to_owned()
                } else {
                    format!("volume {}", sb.current.volume)
                },
                sb.current.packed_through
            ),
        )),
        Some(_) => {
            if m.writer.is_some() && !opts.force {
                return Err(super::attach::held(m));
            }
            let aside = set_aside(path)?;
            tracing::warn!(
                "the log {} is not of the newest attachment of volume {:?}: it was set aside as {} and is not replayed",
                path.display(),
                m.name,
                aside.display()
            );
            drop(file);
            Ok((DataFile::open(path, true)?, None))
        }
        None => Ok((file, None)),
    }
}

fn set_aside(path: &Path) -> Result<PathBuf> {
    for n in 1.. {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".aside-{n}"));
        let aside = PathBuf::from(name);
        if !aside.exists() {
            std::fs::rename(path, &aside).context(|| format!("setting the log {} aside", path.display()))?;
            sync_parent(path)?;
            return Ok(aside);
        }
    }
    Err(Error::new(ErrorKind::Internal, "no name is left to set a log aside"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_background_steps_back_and_its_threads_with_it() {
        let nice = || getpriority_process(None).expect("a thread's niceness");
        let here = nice();
        let there = std::thread::spawn(move || {
            step_back();
            let below = std::thread::spawn(nice).join().expect("joined");
            (nice(), below)
        });
        let lower = here.max(BACKGROUND_NICE);
        assert_eq!(there.join().expect("joined"), (lower, lower));
        assert_eq!(nice(), here, "nobody else");
    }
}
