//! `nbd`: the process that serves volumes over NBD.
//!
//! - [`activation`], [`listen`]: where clients come to.
//! - [`exports`]: which names there are.
//! - [`registry`]: which volumes are attached, for whom, and until when.
//! - [`volumes`]: how one is attached and detached.
//!
//! Invariants:
//! - What can be refused is refused before anything listens. Who is told that the server serves (stdout, the service manager) can connect.
//! - At a signal no request is taken any more, those under way are answered, and every volume is uploaded and released. A second signal ends
//!   the process at once: the logs have the rest.

mod activation;
mod exports;
pub(super) mod listen;
mod registry;
mod volumes;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::add::{check_size, limit};
use super::args::{NbdArgs, TlsMode};
use super::engine::{self, CreateOptions};
use super::metrics::{self, Exporter};
use super::notify::{Word, tell};
use super::output::print;
use super::place::{CacheFolder, DEFAULT_WAL, absolute, cache_folder, not_on_ublk, wal_folder};
use super::protect;
use super::settings::{LogPlace, Settings};
use super::signals::Signals;
use super::state::RunDir;
use crate::config::{FlushTo, GarbageLimit, VolumeName};
use crate::error::{Error, ErrorKind, Result};
use crate::frontend::nbd::server::Server;
use crate::frontend::nbd::{ServerSpec, Tls, tls};
use crate::store::StoreUrl;
use exports::Served;
use listen::{Listening, Wanted};
use registry::Registry;
use volumes::{Figures, Volumes};

const DEFAULT_LINGER: u32 = 10;
const DEFAULT_CONNECTIONS: u16 = 128;
const MOST_DEFAULT_WORKERS: usize = 4;
const MAX_WORKERS: u16 = 64;
/// How long a client may take to choose an export.
const HANDSHAKE: Duration = Duration::from_secs(30);

/// A second signal so soon after the first is no second thought: `timeout` and terminals send them in pairs.
const SAME_WISH: Duration = Duration::from_secs(1);

/// What the command line and its like come to.
struct Plan {
    tcp: Vec<SocketAddr>,
    unix: Vec<PathBuf>,
    insecure: bool,
    tls: Option<Tls>,
    names: Vec<VolumeName>,
    create: Option<CreateOptions>,
    read_only: bool,
    force: bool,
    accept_loss: bool,
    workers: u16,
    max_connections: u16,
    linger: Duration,
    wal_dir: PathBuf,
    wal_bytes: u64,
    cache: Option<CacheFolder>,
    flush_to: FlushTo,
    gc_garbage: GarbageLimit,
    io_timeout: Option<Duration>,
    metrics: Option<SocketAddr>,
    strict: bool,
}

pub(super) fn run(settings: &Settings, args: &NbdArgs) -> Result<()> {
    // First of all: nothing else may be open.
    let passed = activation::take()?;
    let plan = plan(settings, args)?;
    let signals = Signals::block()?;
    protect::process(plan.strict, false)?;
    let run = RunDir::create(&settings.run_dir)?;
    if let StoreUrl::File { root } = &settings.store {
        not_on_ublk("the store", root)?;
    }
    wal_folder(&plan.wal_dir)?;
    let metrics = plan.metrics.map(metrics::Listening::open).transpose()?;
    let Listening { listeners, uris, files } = listen::open(Wanted {
        tcp: plan.tcp,
        unix: plan.unix,
        passed,
        tls_required: plan.tls.as_ref().is_some_and(|t| t.required),
        insecure: plan.insecure,
    })?;
    let figures = Arc::<Figures>::default();
    let volumes = Volumes {
        store: settings.store.clone(),
        store_options: settings.store_options.clone(),
        run,
        wal_dir: plan.wal_dir,
        wal_bytes: plan.wal_bytes,
        cache: plan.cache,
        flush_to: plan.flush_to,
        gc_garbage: plan.gc_garbage,
        io_timeout: plan.io_timeout,
        force: plan.force,
        accept_loss: plan.accept_loss,
        read_only: plan.read_only,
        create: plan.create,
        uris: uris.clone(),
        metrics: metrics.as_ref().map(metrics::Listening::address),
        figures: Arc::clone(&figures),
    };
    let served = Arc::new(Served { registry: Registry::new(volumes, plan.linger), names: plan.names });
    let (stop, stopped) = mpsc::channel();
    let leaving = Arc::clone(&served);
    let mut asked = None::<Instant>;
    signals.heed("SIGKILL: the logs keep what is not uploaded", move |signal| {
        match asked {
            // The main thread waits for it, or will.
            None => drop(stop.send(signal)),
            Some(first) if first.elapsed() < SAME_WISH => {
                tracing::info!("{signal} again, at once: taken for the same wish");
                return;
            }
            Some(_) => leave(&leaving, signal),
        }
        asked = Some(Instant::now());
    })?;
    served.registry.keep()?;
    let told = ToldOf { served: Arc::clone(&served), figures: Arc::clone(&figures) };
    let exporter = metrics.map(|m| m.answer(told)).transpose()?;
    let spec = ServerSpec {
        listeners,
        workers: plan.workers.into(),
        max_connections: plan.max_connections.into(),
        tls: plan.tls,
        handshake_timeout: HANDSHAKE,
    };
    let server = Arc::new(Mutex::new(Some(Server::start(spec, Arc::clone(&served))?)));
    let watched = Arc::downgrade(&server);
    // Set once, here alone. Weak: the server has the exports, and they have this.
    let _ = figures.0.set(Box::new(move || {
        watched.upgrade()?.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(Server::status)
    }));

    let addresses: Vec<_> = uris.iter().map(|u| u.of("")).collect();
    tracing::info!("serving volumes of {} at {}", settings.store, addresses.join(", "));
    if let Err(e) = print(&addresses.iter().map(|a| format!("{a}\n")).collect::<String>()) {
        tracing::warn!("{e}");
    }
    tell(&Word::Ready(&format!("serving {} at {}", settings.store, addresses.join(", "))));

    match stopped.recv() {
        Ok(signal) => tracing::info!("{signal}: stopping"),
        Err(_) => tracing::error!("the thread that takes signals has ended: stopping"),
    }
    tell(&Word::Stopping("taking leave of clients"));
    let server = server.lock().unwrap_or_else(PoisonError::into_inner).take();
    let ended = server.map_or(Ok(()), Server::stop).inspect_err(|e| tracing::error!("{e}"));
    let busy = served.registry.busy().len();
    tell(&Word::Status(&format!("detaching {busy} volumes: uploading what is left")));
    let closed = served.registry.close();
    // Not before: what is uploaded at the end is to be seen.
    exporter.into_iter().for_each(Exporter::end);
    drop(files);
    ended.and(closed)
}

/// What metrics are about.
struct ToldOf {
    served: Arc<Served>,
    figures: Arc<Figures>,
}

impl metrics::Source for ToldOf {
    fn figures(&self) -> metrics::Figures {
        self.served.figures(&self.figures)
    }
}

/// Ends the process while volumes are being detached: safe at any time, because the logs have all.
fn leave(served: &Served, signal: Signal) -> ! {
    let busy = served.registry.busy();
    let names: Vec<_> = busy.iter().map(VolumeName::as_str).collect();
    tracing::warn!(
        "{signal} while stopping: ending now; the logs keep what is not uploaded (of: {})",
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    );
    served.registry.attacher().forget_all(&busy);
    std::process::exit(1)
}

fn plan(settings: &Settings, args: &NbdArgs) -> Result<Plan> {
    let usage = |what: String| Err(Error::new(ErrorKind::Usage, what));
    let (nbd, add) = (&settings.nbd, &settings.add);
    let create = match args.create_size {
        Some(size) => Some(CreateOptions { size_bytes: check_size(size)?, logical_block: 512 }),
        None => None,
    };
    let workers = args.workers.or(nbd.workers).unwrap_or_else(default_workers);
    if !(1..=MAX_WORKERS).contains(&workers) {
        return usage(format!("{workers} workers: --workers may be 1 to {MAX_WORKERS}"));
    }
    let max_connections = args.max_connections.or(nbd.max_connections).unwrap_or(DEFAULT_CONNECTIONS);
    if max_connections == 0 {
        return usage("--max-connections 0 would turn every client away: give 1 or more".to_owned());
    }
    let wal_dir = match LogPlace::of(args.wal_dir.clone(), None).or_else(|| add.log.clone()) {
        Some(LogPlace::Dir(dir)) => absolute(&dir)?,
        Some(LogPlace::Device(device)) => {
            return usage(format!(
                "the write-ahead log is set to be the device {}, and an NBD server has a log for each volume: give it a folder with --wal-dir",
                device.display()
            ));
        }
        None => settings.usual_wal_dir(),
    };
    let wal_bytes = args.wal_size.or(add.wal_size).unwrap_or(DEFAULT_WAL).0;
    engine::check_log_size(wal_bytes)?;
    let mode = args.tls.or(nbd.tls);
    let tls = match (args.tls_certs.as_ref().or(nbd.tls_certs.as_ref()), mode) {
        (Some(dir), mode) => {
            Some(Tls { config: tls::load(&absolute(dir)?)?, required: mode != Some(TlsMode::Allowed) })
        }
        (None, Some(_)) => return usage("--tls needs certificates: name their folder with --tls-certs".to_owned()),
        (None, None) => None,
    };
    let or = |own: &[PathBuf], other: &[PathBuf]| if own.is_empty() { other.to_vec() } else { own.to_vec() };
    let mut unix = Vec::new();
    for path in or(&args.unix, &nbd.unix) {
        unix.push(absolute(&path)?);
    }
    let mut names = args.volume.clone();
    names.sort();
    names.dedup();
    Ok(Plan {
        tcp: if args.listen.is_empty() { nbd.listen.clone() } else { args.listen.clone() },
        unix,
        insecure: args.insecure_listen || nbd.insecure_listen,
        tls,
        names,
        create,
        read_only: args.read_only,
        force: args.force,
        accept_loss: args.accept_loss,
        workers,
        max_connections,
        linger: Duration::from_secs(args.linger.or(nbd.linger).unwrap_or(DEFAULT_LINGER).into()),
        wal_dir,
        wal_bytes,
        cache: cache_folder(args.cache.clone(), settings)?,
        flush_to: args.flush.or(add.flush).unwrap_or_default(),
        gc_garbage: args.gc_garbage.or(add.gc_garbage).unwrap_or_default(),
        io_timeout: limit(args.io_timeout.or(add.io_timeout)),
        metrics: args.metrics.or(add.metrics),
        strict: args.strict || add.strict,
    })
}

fn default_workers() -> u16 {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u16::try_from(cpus.min(MOST_DEFAULT_WORKERS)).unwrap_or(1)
}
