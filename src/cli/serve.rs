//! The process that serves a volume: attach, serve, detach.
//!
//! Invariants:
//! - The main thread attaches, is the device's control thread while it serves, and detaches. Signals and the
//!   control socket have a thread each, which only ask it to stop.
//! - The phase goes attaching → serving → detaching, never back.
//! - The state file says what is true before anyone is told: it names the device before the parent reports it, and is
//!   gone, or has the last words, before the lock is.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use nix::sys::signal::Signal;
use serde_json::Value;

use super::control::{self, Daemon, Order};
use super::daemonize::{Reporter, Side, daemonize};
use super::engine::{self, AttachOptions, Attached, CreateOptions, DeviceSpec, DeviceStatus, StopHandle, View};
use super::jobs::Jobs;
use super::metrics::{Exporter, Figures, Listening, Source, VolumeFigures};
use super::notify::{Word, tell};
use super::output::print;
use super::phase::{Phase, describe};
use super::protect;
use super::signals::Signals;
use super::state::{Held, RunDir, State};
use crate::error::{Error, ErrorKind, Result};

/// All that a serving process needs.
pub(super) struct Plan {
    pub(super) attach: AttachOptions,
    /// Create the volume if it is missing.
    pub(super) create: Option<CreateOptions>,
    /// Size and logical block are filled in when the volume is attached.
    pub(super) spec: DeviceSpec,
    pub(super) state: State,
    /// Where metrics are asked for.
    pub(super) metrics: Option<SocketAddr>,
    pub(super) strict: bool,
    pub(super) run: RunDir,
    pub(super) held: Held,
}

/// Who wants to know that the device serves.
pub(super) struct Told {
    reporter: RefCell<Option<Reporter>>,
    foreground: bool,
}

impl Told {
    /// Whoever reads stdout, and the service manager.
    pub(super) fn terminal() -> Self {
        Self { reporter: RefCell::new(None), foreground: true }
    }

    /// The process that started this one.
    fn parent(reporter: Reporter) -> Self {
        Self { reporter: RefCell::new(Some(reporter)), foreground: false }
    }

    fn ready(&self, device: &str, volume: &str) {
        if let Some(reporter) = self.reporter.take() {
            reporter.ready(device);
        } else if let Err(e) = print(&format!("{device}\n")) {
            tracing::warn!("{e}");
        }
        self.manager(&Word::Ready(&format!("volume {volume} serves as {device}")));
    }

    /// Nobody hears it who has been told that the device serves.
    pub(super) fn failed(&self, e: &Error) {
        if let Some(reporter) = self.reporter.take() {
            reporter.failed(e);
        }
    }

    /// A daemon of our own making is not the process that a service manager watches.
    fn manager(&self, word: &Word<'_>) {
        if self.foreground {
            tell(word);
        }
    }
}

/// The device that a dead daemon left in the kernel, if it is still there and still its own.
pub(super) fn device_left_by(state: &State) -> Result<Option<DeviceStatus>> {
    let Some(n) = state.device else { return Ok(None) };
    Ok(engine::device(n)?.filter(|d| is_left_by(d.pid, state)))
}

/// Whether a device of the number that a dead process had is what that left. The kernel forgets a process when it has noticed its
/// death, while the device still counts as live for a moment; one that another process serves since has that. Who died while
/// taking a device up may have been quicker than the kernel.
fn is_left_by(pid: i32, dead: &State) -> bool {
    pid <= 0 || u32::try_from(pid) == Ok(dead.pid) || dead.taken_from == Some(pid)
}

/// What the threads share.
struct Shared {
    phase: Mutex<Phase>,
    state: Mutex<State>,
    view: OnceLock<View>,
    stop: StopHandle,
    run: RunDir,
    begun: Instant,
    jobs: Jobs,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Each change is one assignment: a panic elsewhere leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and writes it down.
    fn record(&self, change: impl FnOnce(&mut State)) -> Result<()> {
        let mut state = self.state();
        change(&mut state);
        self.run.write(&state)
    }

    /// Begins to stop. Without `force`, not while the device is in use.
    fn begin_stop(&self, force: bool) -> Result<()> {
        let (volume, device) = {
            let state = self.state();
            (state.volume.clone(), state.device_path())
        };
        let phase = *self.phase();
        match phase {
            Phase::Detaching => return Ok(()),
            Phase::Attaching => {
                let what = format!("volume {volume} is still being attached: try again in a moment");
                return Err(Error::new(ErrorKind::Busy, what));
            }
            Phase::Serving => {}
        }
        // No lock is held meanwhile: opening the device may take time.
        if let Some(device) = device
            && engine::is_in_use(&device)
        {
            let device = device.display();
            if !force {
                let what = format!(
                    "{device} is mounted or in use: unmount it first (or use --force: programs that use it fail then)"
                );
                return Err(Error::new(ErrorKind::Busy, what));
            }
            tracing::warn!("{device} is stopped although it is mounted or in use");
        }
        *self.phase() = Phase::Detaching;
        self.stop.stop();
        Ok(())
    }
}

/// For the control thread.
struct Answers(Arc<Shared>);

impl Daemon for Answers {
    fn status(&self) -> Result<Value> {
        let phase = *self.0.phase();
        let state = self.0.state().clone();
        let engine = self.0.view.get().map(View::status).transpose()?;
        Ok(describe(&state, phase, self.0.begun, engine))
    }

    fn detach(&self, force: bool) -> Result<()> {
        self.0.begin_stop(force)?;
        tracing::info!("asked to detach");
        Ok(())
    }

    fn order(&self, order: &Order) -> Result<u64> {
        let not_yet = || Error::new(ErrorKind::Busy, "the volume is only being attached: try again");
        let view = self.0.view.get().cloned().ok_or_else(not_yet)?;
        Ok(self.0.jobs.keep(view.order(order)?))
    }

    fn is_done(&self, job: u64) -> Result<bool> {
        self.0.jobs.is_done(job)
    }
}

impl Source for Answers {
    fn figures(&self) -> Figures {
        let (name, phase) = (self.0.state().volume.to_string(), *self.0.phase());
        let engine = self.0.view.get().map(View::figures);
        Figures { volumes: vec![VolumeFigures { name, phase, engine }], server: None }
    }
}

/// Opens where metrics are asked for, before anything else is done that a refusal would have to undo. `dead` is where the daemon
/// had them that a recovery comes after.
fn open_metrics(asked: Option<SocketAddr>, dead: Option<SocketAddr>, recovers: bool) -> Result<Option<Listening>> {
    match asked {
        // A device that comes back matters more than its counters.
        Some(asked) if recovers => {
            // Whoever was told of a free port goes on asking there.
            let again = dead.filter(|_| asked.port() == 0).and_then(|d| Listening::open(d).ok());
            Ok(again.or_else(|| Listening::try_open(asked)))
        }
        asked => asked.map(Listening::open).transpose(),
    }
}

/// Serves in a process of its own, which writes to `log`; returns the device's path once it serves.
pub(super) fn in_daemon(mut plan: Plan, log: &Path) -> Result<String> {
    match daemonize(log)? {
        Side::Parent(device) => Ok(device),
        Side::Child(reporter) => {
            let told = Told::parent(reporter);
            plan.state.pid = std::process::id();
            let code = match run(plan, &told) {
                Ok(()) => 0,
                Err(e) => {
                    tracing::error!("{e}");
                    told.failed(&e);
                    1
                }
            };
            std::process::exit(code)
        }
    }
}

/// Serves until somebody stops the device; then uploads what is left.
pub(super) fn run(plan: Plan, told: &Told) -> Result<()> {
    let signals = Signals::block()?;
    protect::process(plan.strict, plan.spec.recover)?;
    let Plan { attach, create, spec, mut state, metrics, run, held, .. } = plan;
    let (volume, daemon) = (state.volume.clone(), state.daemon_log.is_some());
    let recovers = spec.recover;
    let metrics = open_metrics(metrics, state.metrics, recovers)?;
    state.metrics = metrics.as_ref().map(Listening::address);
    let listener = control::listen(&run.socket_path(&volume)?)?;
    let shared = Arc::new(Shared {
        phase: Mutex::new(Phase::Attaching),
        state: Mutex::new(state),
        view: OnceLock::new(),
        stop: StopHandle::new()?,
        run,
        begun: Instant::now(),
        jobs: Jobs::default(),
    });
    shared.record(|_| {})?;
    // It answers for as long as the process lives.
    control::spawn(listener, Answers(Arc::clone(&shared)))?.leave_running();
    let exporter = match metrics.map(|m| m.answer(Answers(Arc::clone(&shared)))).transpose() {
        Err(e) if recovers => {
            tracing::warn!("{e}: there are no metrics until the next start");
            None
        }
        started => started?,
    };
    let heeding = Arc::clone(&shared);
    signals.heed("`vb-ublk del`", move |signal| heed(signal, &heeding, daemon))?;

    told.manager(&Word::Status(&format!("attaching volume {volume}")));
    let done = attach_and_serve(&shared, attach, create, spec, told);
    // Not before: what is uploaded at the end is to be seen.
    exporter.into_iter().for_each(Exporter::end);
    match &done {
        // Who waits for the start hears it. Later on nobody does: the last words are left where `del` and `list` look.
        Err(e) if *shared.phase() != Phase::Attaching => {
            let words = e.to_string();
            let device_stays = shared.state().device.is_some_and(|n| engine::device(n).is_ok_and(|d| d.is_some()));
            shared.record(|s| {
                s.failure = Some(words);
                if !device_stays {
                    s.device = None;
                }
            })?;
        }
        // The device is still there, and waits for the next try.
        Err(_) if recovers => {}
        _ => shared.run.remove(&volume)?,
    }
    drop(held);
    done
}

fn attach_and_serve(
    shared: &Shared,
    attach: AttachOptions,
    create: Option<CreateOptions>,
    mut spec: DeviceSpec,
    told: &Told,
) -> Result<()> {
    if let Some(create) = &create {
        engine::ensure(&attach.store_url, &attach.store_options, &attach.volume, create)?;
    }
    let recovers = spec.recover;
    let volume = attach.volume.clone();
    tracing::info!("attaching volume {volume} of {}", attach.store_url);
    let attached = Attached::attach(attach)?;
    // Set once, here alone.
    let _ = shared.view.set(attached.view());
    spec.size_bytes = attached.size_bytes();
    spec.logical_block = attached.logical_block();
    let served = attached.serve(
        &spec,
        |device| {
            let path = device.path.display().to_string();
            if let Err(e) = shared.record(|s| {
                s.device = Some(device.id);
                s.taken_from = None;
            }) {
                tracing::error!("{e}; other commands will not find the device");
            }
            *shared.phase() = Phase::Serving;
            tracing::info!("volume {volume} serves as {path}, {} queues of {}", device.queues, device.depth);
            told.ready(&path, &volume);
        },
        &shared.stop,
    );
    if recovers && served.is_err() && *shared.phase() == Phase::Attaching {
        // The device waits for the next try, and what its users have written and will write needs this log and this epoch: nothing is
        // released, and the process ends.
        return served;
    }
    {
        let mut phase = shared.phase();
        // A device that never served: whoever waits for the start hears it.
        if *phase == Phase::Serving {
            *phase = Phase::Detaching;
        }
    }
    if let Err(e) = &served {
        tracing::error!("{e}");
    }
    tracing::info!("detaching volume {volume}: uploading what is left");
    told.manager(&Word::Stopping(&format!("detaching volume {volume}: uploading what is left")));
    let detached = attached.detach();
    if detached.is_ok() {
        tracing::info!("volume {volume} is detached");
    }
    served.and(detached)
}

/// What a signal does.
fn heed(signal: Signal, shared: &Shared, daemon: bool) {
    if daemon && signal == Signal::SIGHUP {
        tracing::info!("SIGHUP: there is nothing to reload");
        return;
    }
    let phase = *shared.phase();
    match phase {
        Phase::Serving => {
            tracing::info!("{signal}: stopping");
            if let Err(e) = shared.begin_stop(true) {
                tracing::warn!("{e}");
            }
        }
        Phase::Attaching | Phase::Detaching => leave(shared, signal, phase),
    }
}

/// Ends the process in the middle of attaching, or while what is left is uploaded: safe at any time, because the log
/// has all.
fn leave(shared: &Shared, signal: Signal, phase: Phase) -> ! {
    let state = shared.state();
    tracing::warn!(
        "{signal} while {}: ending now; the log {} keeps what is not uploaded",
        phase.name(),
        state.wal.display()
    );
    let device_stays = state.device.is_some_and(|n| Path::new(&format!("/dev/ublkc{n}")).exists());
    // A device that stays needs its state, so that `del` can remove it.
    if !device_stays && let Err(e) = shared.run.remove(&state.volume) {
        tracing::warn!("{e}");
    }
    std::process::exit(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared(run: &RunDir) -> Arc<Shared> {
        let state = State::new("v".parse().expect("name"), "file:///s".into(), "/w".into(), None);
        Arc::new(Shared {
            phase: Mutex::new(Phase::Attaching),
            state: Mutex::new(state),
            view: OnceLock::new(),
            stop: StopHandle::new().expect("stop"),
            run: run.clone(),
            begun: Instant::now(),
            jobs: Jobs::default(),
        })
    }

    #[test]
    fn a_detach_waits_for_the_attach_and_happens_once() {
        let dir = tempfile::tempdir().expect("dir");
        let run = RunDir::create(dir.path()).expect("run");
        let shared = shared(&run);
        let answers = Answers(Arc::clone(&shared));
        assert_eq!(answers.status().expect("status")["state"], "attaching");
        assert_eq!(answers.detach(false).expect_err("attaching").kind(), ErrorKind::Busy);
        assert!(!shared.stop.is_stopped());
        *shared.phase() = Phase::Serving;
        shared.record(|s| s.device = Some(1_000_000)).expect("record");
        assert_eq!(answers.status().expect("status")["device"], "/dev/ublkb1000000");
        answers.detach(false).expect("free");
        assert!(shared.stop.is_stopped());
        answers.detach(false).expect("again");
        assert_eq!(answers.status().expect("status")["state"], "detaching");
        assert_eq!(run.read(&"v".parse().expect("name")).expect("read").expect("state").device, Some(1_000_000));
    }

    #[test]
    fn a_recovery_goes_on_without_its_metrics() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = taken.local_addr().expect("address");
        let e = open_metrics(Some(address), None, false).expect_err("taken");
        assert!(e.kind() == ErrorKind::Busy && e.to_string().contains(&address.to_string()), "{e}");
        assert!(open_metrics(Some(address), Some(address), true).expect("it goes on").is_none());
        let free = SocketAddr::from(([127, 0, 0, 1], 0));
        let other = open_metrics(Some(free), Some(address), true).expect("free").expect("asked for");
        assert_ne!(other.address(), address);
        drop(taken);
        let same = open_metrics(Some(free), Some(address), true).expect("free").expect("asked for");
        assert_eq!(same.address(), address);
        drop(same);
        for recovers in [false, true] {
            let open = open_metrics(Some(address), None, recovers).expect("free").expect("asked for");
            assert_eq!(open.address(), address);
            assert!(open_metrics(None, Some(address), recovers).expect("nothing asked").is_none());
        }
    }

    #[test]
    fn a_dead_ones_device_is_known_before_and_after_the_kernel_notices() {
        let mut dead = State::new("v".parse().expect("name"), "file:///s".into(), "/w".into(), None);
        dead.pid = 7;
        for (pid, left) in [(7, true), (-1, true), (0, true), (8, false)] {
            assert_eq!(is_left_by(pid, &dead), left, "{pid}");
        }
        // It died while it took the device up from 8, whose death the kernel has not noticed yet.
        dead.taken_from = Some(8);
        for (pid, left) in [(7, true), (-1, true), (8, true), (9, false)] {
            assert_eq!(is_left_by(pid, &dead), left, "{pid}");
        }
    }
}
