//! How the NBD server attaches and detaches volumes: what `add` does for its one, for many in one process.
//!
//! Invariants:
//! - While a volume is attached, and until all of it is uploaded, its lock is held, its state file says where it is served, and its control
//!   socket answers.
//! - Nothing is written into the run folder for a name that is no volume's: clients choose names.
//! - The log is let go of before the volume's lock is.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::super::claim::take;
use super::super::control::{self, Control, Daemon, Order};
use super::super::engine::{self, AttachOptions, Attached, Collect, CreateOptions, LaneEngine, View};
use super::super::jobs::Jobs;
use super::super::metrics::VolumeFigures;
use super::super::pause;
use super::super::phase::{Phase, describe};
use super::super::place::{CacheFolder, wal_file};
use super::super::state::{Held, RunDir, State};
use super::listen::Uri;
use super::registry::Attacher;
use crate::config::{FlushTo, GarbageLimit, VolumeName};
use crate::error::{Error, ErrorKind, Result};
use crate::frontend::nbd::{ExportInfo, ServerStatus};
use crate::lane::Lane;
use crate::store::{StoreOptions, StoreUrl};
use crate::units::human_bytes;

/// How long lanes may take to let go of a volume that nobody uses any more.
const LANES: Duration = Duration::from_secs(10);

/// What all volumes of a server have in common.
pub(super) struct Volumes {
    pub(super) store: StoreUrl,
    pub(super) store_options: StoreOptions,
    pub(super) run: RunDir,
    pub(super) wal_dir: PathBuf,
    pub(super) wal_bytes: u64,
    pub(super) cache: Option<CacheFolder>,
    pub(super) flush_to: FlushTo,
    pub(super) gc_garbage: GarbageLimit,
    pub(super) io_timeout: Option<Duration>,
    pub(super) force: bool,
    /// End damaged logs before their damage.
    pub(super) accept_loss: bool,
    pub(super) read_only: bool,
    /// Make a volume that is missing.
    pub(super) create: Option<CreateOptions>,
    pub(super) uris: Vec<Uri>,
    /// Where the server's metrics are.
    pub(super) metrics: Option<SocketAddr>,
    pub(super) figures: Arc<Figures>,
}

/// The server's figures, once it runs.
#[derive(Default)]
pub(super) struct Figures(pub(super) OnceLock<Box<dyn Fn() -> Option<ServerStatus> + Send + Sync>>);

/// An attached volume.
pub(super) struct NbdVolume {
    name: VolumeName,
    info: ExportInfo,
    shared: Arc<Shared>,
    /// Held by each lane that has the log open.
    lanes: Arc<()>,
    live: Mutex<Option<Live>>,
}

/// What is given back by a detach.
struct Live {
    attached: Attached,
    control: Control,
    held: Held,
}

/// What the control socket's thread sees.
struct Shared {
    state: State,
    begun: Instant,
    phase: Mutex<Phase>,
    view: Mutex<Option<View>>,
    figures: Arc<Figures>,
    jobs: Jobs,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change is one assignment: a panic elsewhere leaves it whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Answers(Arc<Shared>);

impl Daemon for Answers {
    fn status(&self) -> Result<Value> {
        let (phase, view) = (*locked(&self.0.phase), locked(&self.0.view).clone());
        let engine = view.as_ref().map(View::status).transpose()?;
        let mut said = describe(&self.0.state, phase, self.0.begun, engine);
        if let Some(figures) = self.0.figures.0.get().and_then(|f| f()) {
            said["nbd_server"] = serde_json::to_value(figures)
                .map_err(|e| Error::new(ErrorKind::Internal, "writing JSON").with_source(e))?;
        }
        Ok(said)
    }

    fn detach(&self, _force: bool) -> Result<()> {
        let State { volume, nbd, .. } = &self.0.state;
        let what = format!(
            "volume {volume} is served over NBD at {}, and is detached by itself when its clients have left; or stop the server: {}",
            nbd.join(", "),
            self.0.state.how_to_detach()
        );
        Err(Error::new(ErrorKind::Busy, what))
    }

    fn order(&self, order: &Order) -> Result<u64> {
        let not_yet = || Error::new(ErrorKind::Busy, "the volume is only being attached: try again");
        let view = locked(&self.0.view).clone().ok_or_else(not_yet)?;
        Ok(self.0.jobs.keep(view.order(order)?))
    }

    fn is_done(&self, job: u64) -> Result<bool> {
        self.0.jobs.is_done(job)
    }
}

impl NbdVolume {
    pub(super) fn info(&self) -> ExportInfo {
        let mut info = self.info.clone();
        // It may have grown.
        if let Some(view) = locked(&self.shared.view).as_ref() {
            info.size_bytes = view.size_bytes();
        }
        info
    }

    /// What is told of it, to whomever.
    pub(super) fn figures(&self) -> VolumeFigures {
        let (phase, view) = (*locked(&self.shared.phase), locked(&self.shared.view).clone());
        VolumeFigures { name: self.name.to_string(), phase, engine: view.as_ref().map(View::figures) }
    }

    /// The volume as `lane` sees it.
    pub(super) fn engine(&self, lane: &Lane) -> Result<std::rc::Rc<LaneEngine>> {
        let view = locked(&self.shared.view).clone();
        let detached = || Error::new(ErrorKind::Internal, format!("volume {} is detached already", self.name));
        view.ok_or_else(detached)?.lane(lane, Arc::clone(&self.lanes))
    }

    /// An attach on this host would find the log in use by what lanes still have of it.
    fn wait_for_lanes(&self) {
        let begun = Instant::now();
        while Arc::strong_count(&self.lanes) > 1 {
            if begun.elapsed() >= LANES {
                tracing::warn!("volume {} is detached although a lane still has its log open", self.name);
                return;
            }
            pause(Duration::from_millis(5));
        }
    }
}

impl Volumes {
    /// What clients are told of a volume.
    fn info_of(&self, name: &VolumeName, size_bytes: u64) -> ExportInfo {
        let read_only = self.read_only || name.parts().1.is_some();
        let how = if read_only { ", read-only" } else { "" };
        ExportInfo {
            name: name.to_string(),
            description: format!("{} of {}{how}", human_bytes(size_bytes), self.store),
            size_bytes,
            read_only,
        }
    }

    /// What a volume that is not attached is; one that would be made on first use is what it would be.
    pub(super) fn info(&self, name: &VolumeName) -> Result<ExportInfo> {
        let size = match (engine::size_of(&self.store, &self.store_options, name.as_str()), self.create_for(name)) {
            (Err(e), Some(create)) if e.kind() == ErrorKind::NotFound => create.size_bytes,
            (found, _) => found?,
        };
        Ok(self.info_of(name, size))
    }

    /// What a missing volume is made as; a snapshot is not made.
    fn create_for(&self, name: &VolumeName) -> Option<&CreateOptions> {
        self.create.as_ref().filter(|_| name.parts().1.is_none())
    }

    /// Has the volume there, or fails.
    fn ensure(&self, name: &VolumeName) -> Result<()> {
        let found = engine::size_of(&self.store, &self.store_options, name.as_str());
        match (found, self.create_for(name)) {
            (Err(e), Some(create)) if e.kind() == ErrorKind::NotFound => {
                match engine::create(&self.store, &self.store_options, name.as_str(), create) {
                    // Somebody else was faster, or there is something that is no volume.
                    Err(e) if e.kind() == ErrorKind::Exists => {
                        engine::size_of(&self.store, &self.store_options, name.as_str()).map(drop).map_err(|_| e)
                    }
                    Err(e) => Err(e),
                    Ok(_) => {
                        tracing::info!(
                            "volume {name} of {} is created in {}",
                            human_bytes(create.size_bytes),
                            self.store
                        );
                        Ok(())
                    }
                }
            }
            (found, _) => found.map(drop),
        }
    }

    /// With the volume's lock held. What a failure leaves in the run folder is the caller's to remove.
    fn attach_held(&self, name: &VolumeName) -> Result<(Arc<Shared>, Attached, Control)> {
        let log_path = wal_file(&self.wal_dir, name)?;
        let mut state = State::new(name.clone(), self.store.to_string(), log_path.clone(), None);
        state.nbd = self.uris.iter().map(|u| u.of(name.as_str())).collect();
        state.metrics = self.metrics;
        let shared = Arc::new(Shared {
            state,
            begun: Instant::now(),
            phase: Mutex::new(Phase::Attaching),
            view: Mutex::default(),
            figures: Arc::clone(&self.figures),
            jobs: Jobs::default(),
        });
        self.run.write(&shared.state)?;
        let listener = control::listen(&self.run.socket_path(name)?)?;
        let control = control::spawn(listener, Answers(Arc::clone(&shared)))?;
        tracing::info!("attaching volume {name} of {}", self.store);
        let attached = Attached::attach(AttachOptions {
            store_url: self.store.clone(),
            store_options: self.store_options.clone(),
            volume: name.to_string(),
            log_path,
            log_bytes: self.wal_bytes,
            force: self.force,
            read_only: self.read_only,
            flush_to: self.flush_to,
            io_timeout: self.io_timeout,
            resume: false,
            accept_loss: self.accept_loss,
            gc: Collect::above(self.gc_garbage),
            cache: self.cache.as_ref().map(|c| c.of(name)),
            guard_memory: false,
        });
        match attached {
            Ok(attached) => Ok((shared, attached, control)),
            Err(e) => {
                control.end();
                Err(e)
            }
        }
    }

    /// Removes what tells of a volume that is attached no more.
    fn forget(&self, name: &VolumeName) {
        if let Err(e) = self.run.remove(name) {
            tracing::warn!("{e}");
        }
    }

    /// For a process that ends in the middle: the logs have all.
    pub(super) fn forget_all(&self, names: &[VolumeName]) {
        names.iter().for_each(|name| self.forget(name));
    }
}

impl Attacher for Volumes {
    type Volume = NbdVolume;

    fn attach(&self, name: &VolumeName) -> Result<NbdVolume> {
        self.ensure(name)?;
        let held = take(&self.run, name)?;
        let (shared, attached, control) = self.attach_held(name).inspect_err(|e| {
            tracing::warn!("attaching volume {name}: {e}");
            self.forget(name);
        })?;
        let view = attached.view();
        let info = ExportInfo { read_only: view.read_only(), ..self.info_of(name, view.size_bytes()) };
        *locked(&shared.view) = Some(view);
        *locked(&shared.phase) = Phase::Serving;
        tracing::info!("volume {name} is attached");
        let live = Mutex::new(Some(Live { attached, control, held }));
        Ok(NbdVolume { name: name.clone(), info, shared, lanes: Arc::default(), live })
    }

    fn detach(&self, volume: &NbdVolume) -> Result<()> {
        let Some(Live { attached, control, held }) = locked(&volume.live).take() else { return Ok(()) };
        let name = &volume.name;
        *locked(&volume.shared.phase) = Phase::Detaching;
        volume.wait_for_lanes();
        tracing::info!("detaching volume {name}: uploading what is left");
        let detached = attached.detach();
        control.end();
        *locked(&volume.shared.view) = None;
        match &detached {
            Ok(()) => {
                self.forget(name);
                tracing::info!("volume {name} is detached");
            }
            // Nobody waits for this: the last words are left where `del` and `list` look.
            Err(e) => {
                let mut state = volume.shared.state.clone();
                state.failure = Some(e.to_string());
                if let Err(e) = self.run.write(&state) {
                    tracing::error!("{e}");
                }
            }
        }
        drop(held);
        detached
    }

    fn is_lost(&self, volume: &NbdVolume) -> bool {
        locked(&volume.shared.view).as_ref().is_some_and(View::is_gone)
    }
}

#[cfg(test)]
#[path = "volumes_tests.rs"]
mod tests;
