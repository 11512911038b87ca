//! A volume as a block device of the kernel's ublk driver.
//!
//! Each hardware queue of the device is a thread and a [`Lane`] on libublk's ring. The calling thread of
//! [`serve`] is the control thread: it adds the device, starts it, waits, stops and deletes it.
//!
//! Invariants:
//! - START is given only when every queue has reported that its set-up succeeded: the kernel would wait for
//!   a missing queue for ever. A queue thread that panics takes the process with it, for the same reason.
//! - The device is stopped before its queue threads end, and deleted after the last of them has let go of it.
//! - Only the engine answers a FLUSH or FUA; nothing here decides durability.

mod control;
mod features;
mod params;
mod queue;
mod stop;

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::mpsc;
use std::sync::{Arc, mpsc::Receiver};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder};
use libublk::io::UblkDev;
use libublk::{UblkError, UblkFlags, sys};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};

pub use control::{DeviceState, DeviceStatus, delete_dead, device_info, is_alive, is_in_use, list_devices, resize};
pub use features::{Feature, KernelFeatures, features};
pub use params::DeviceSpec;
pub use stop::StopHandle;

use crate::error::{Context as _, Error, ErrorKind, Result};
use crate::lane::Lane;
use crate::volume::engine::Engine;

/// How long udev and devtmpfs may take to make a device node.
const NODE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a killed server may take to exit.
const EXIT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long the driver may take to quiesce a device that lost its server.
const QUIESCE_TIMEOUT: Duration = Duration::from_secs(30);

/// A device that serves.
#[derive(Debug, Clone)]
pub struct DeviceInfo {
    /// The number N in `/dev/ublkbN`.
    pub id: u32,
    /// `/dev/ublkbN`.
    pub path: PathBuf,
    /// Hardware queues; the kernel gives no more than there are CPUs.
    pub queues: u16,
    /// Requests in flight per queue at most.
    pub depth: u16,
}

/// What the kernel calls the node of a device.
#[must_use]
pub fn device_path(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{id}"))
}

/// Serves a device until `stop` is asked for or somebody else stops the device. `make` is called once on
/// each queue's thread, with the queue's number and lane. `ready` is called when `/dev/ublkbN` serves.
///
/// A device in recovery that cannot be served stays as it is, for the next try. Queues that were set up go on waiting: whoever is told of
/// the failure ends the process.
///
/// On a stop the page cache of the device is written out, requests in flight complete, and the device is
/// deleted.
///
/// Blocks SIGTERM and SIGINT in the calling thread and all it starts (a control command must not be
/// interrupted); whoever wants them takes them from a signalfd, or from another thread.
///
/// # Errors
/// Bad settings; no driver or no rights (says what is missing); a queue whose set-up failed. The device is
/// gone then, unless it was to be recovered.
pub fn serve<E, M>(spec: &DeviceSpec, make: M, ready: impl FnOnce(&DeviceInfo), stop: &StopHandle) -> Result<()>
where
    E: Engine,
    M: Fn(u16, &Lane) -> Result<Rc<E>> + Send + Sync + 'static,
{
    spec.check()?;
    control::open().map(drop)?;
    block_signals()?;
    let ctrl = if spec.recover { take_over(spec)? } else { add(spec)? };
    let id = ctrl.dev_info().dev_id;
    let served = start_and_wait(&ctrl, spec, Arc::new(make), ready, stop);
    if spec.recover && served.is_err() {
        // The data of a device in recovery may still be wanted: it stays, quiesced or waiting.
        return served;
    }
    // What is left is uploaded after this: it does not wait for whoever has a device open that was stopped by force, as `ctrl`
    // would when it is dropped.
    ctrl.disown();
    served.and(control::delete_stopped(id))
}

fn block_signals() -> Result<()> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGINT);
    set.thread_block().map_err(|e| Error::io("blocking SIGTERM and SIGINT", e.into()))
}

fn add(spec: &DeviceSpec) -> Result<UblkCtrl> {
    if let Some(id) = spec.id
        && Path::new(&format!("/dev/ublkc{id}")).exists()
    {
        let what = format!("/dev/ublkb{id} exists already; choose another number, or delete that device first");
        return Err(Error::new(ErrorKind::Exists, what));
    }
    let ctrl = UblkCtrlBuilder::default()
        .name("vb-ublk")
        .id(spec.id.map_or(-1, u32::cast_signed))
        .nr_queues(spec.queues)
        .depth(spec.depth)
        .io_buf_bytes(spec.max_io_bytes)
        .ctrl_flags(u64::from(sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE))
        .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV)
        .build()
        .map_err(from_ublk)
        .context(|| "adding a ublk device")?;
    if ctrl.dev_info().flags & u64::from(sys::UBLK_F_USER_RECOVERY_REISSUE) == 0 {
        tracing::warn!("this kernel cannot recover a device whose server died (needs Linux 6.1)");
    }
    Ok(ctrl)
}

/// Claims a device whose server died.
fn take_over(spec: &DeviceSpec) -> Result<UblkCtrl> {
    let Some(id) = spec.id else {
        return Err(Error::new(ErrorKind::Usage, "recovering a device needs its number"));
    };
    wait_until_quiesced(id)?;
    let ctrl = UblkCtrlBuilder::default()
        .name("vb-ublk")
        .id(id.cast_signed())
        .dev_flags(UblkFlags::UBLK_DEV_F_RECOVER_DEV)
        .build()
        .map_err(from_ublk)
        .context(|| format!("opening /dev/ublkb{id} for recovery"))?;
    let code = ctrl.start_user_recover().map_err(from_ublk);
    checked(code).map_err(|e| {
        let io = std::error::Error::source(&e).and_then(|s| s.downcast_ref::<std::io::Error>());
        let invalid = io.and_then(std::io::Error::raw_os_error) == Some(libc::EINVAL);
        let e = e.context(format!("starting the recovery of /dev/ublkb{id}"));
        if invalid {
            let what = "an earlier recovery may have died half way, which older kernels do not get over: `vb-ublk del --force`, then `vb-ublk add` (nothing acknowledged is lost)";
            return e.context(what);
        }
        e
    })?;
    Ok(ctrl)
}

/// The driver needs a while to notice that a server is gone, and to gather what was in flight.
fn wait_until_quiesced(id: u32) -> Result<()> {
    let begun = Instant::now();
    loop {
        let Some(device) = device_info(id)? else {
            return Err(Error::new(ErrorKind::NotFound, format!("there is no /dev/ublkb{id} to recover")));
        };
        if device.state == DeviceState::Quiesced {
            return Ok(());
        }
        // A process that was just killed may still be on its way out.
        let (patience, what) = if device.state != DeviceState::Live {
            (Duration::ZERO, format!("is {}, not quiesced: there is nothing to recover", device.state))
        } else if control::is_alive(device.pid) {
            (EXIT_TIMEOUT, format!("is live and served by process {}: there is nothing to recover", device.pid))
        } else {
            (QUIESCE_TIMEOUT, "lost its server, but the driver has not quiesced it yet; try again later".into())
        };
        if begun.elapsed() >= patience {
            return Err(Error::new(ErrorKind::Busy, format!("/dev/ublkb{id} {what}")));
        }
        pause(Duration::from_millis(50));
    }
}

/// The queue threads of a device.
struct Queues {
    threads: Vec<JoinHandle<Result<()>>>,
    /// A queue's set-up succeeded, or why not.
    reports: Receiver<Result<()>>,
    /// Rings when a queue has ended.
    ended: StopHandle,
}

fn start_and_wait<E, M>(
    ctrl: &UblkCtrl,
    spec: &DeviceSpec,
    make: Arc<M>,
    ready: impl FnOnce(&DeviceInfo),
    stop: &StopHandle,
) -> Result<()>
where
    E: Engine,
    M: Fn(u16, &Lane) -> Result<Rc<E>> + Send + Sync + 'static,
{
    let prepare = |dev: &mut UblkDev| {
        dev.tgt.dev_size = spec.size_bytes;
        dev.tgt.params = params::kernel_params(spec);
        Ok(())
    };
    let dev = UblkDev::new("vb-ublk".into(), prepare, ctrl).map_err(from_ublk);
    let dev = Arc::new(dev.context(|| format!("opening /dev/ublkc{}", ctrl.dev_info().dev_id))?);
    let info = DeviceInfo {
        id: dev.dev_info.dev_id,
        path: device_path(dev.dev_info.dev_id),
        queues: dev.dev_info.nr_hw_queues,
        depth: dev.dev_info.queue_depth,
    };
    let queues = spawn_queues(spec, &dev, &make, &info)?;
    let started = all_ready(&queues, info.queues)
        .and_then(|()| checked(ctrl.start_dev(&dev).map_err(from_ublk)).context(|| "starting the device"))
        .and_then(|()| wait_for_node(&info.path));
    let served = match started {
        // A stop would tell those who use the device that it has gone.
        Err(e) if spec.recover => return Err(e),
        started => started.and_then(|()| {
            ready(&info);
            wait(stop, &queues.ended)
        }),
    };
    if served.is_ok() && stop.is_stopped() {
        write_out(&info.path);
    }
    // Waits until the requests in flight are done; the queues see their fetches cancelled and end.
    let stopped = ctrl.kill_dev().map_err(from_ublk).context(|| format!("stopping {}", info.path.display()));
    if let Err(e) = &stopped
        && served.is_ok()
    {
        // Another process may have deleted it; the queues end in that case, too.
        tracing::warn!("{e}");
    }
    let mut result = served;
    for thread in queues.threads {
        let ended = thread.join().unwrap_or_else(|_| Err(Error::new(ErrorKind::Internal, "a queue thread panicked")));
        result = result.and(ended);
    }
    result
}

fn spawn_queues<E, M>(spec: &DeviceSpec, dev: &Arc<UblkDev>, make: &Arc<M>, info: &DeviceInfo) -> Result<Queues>
where
    E: Engine,
    M: Fn(u16, &Lane) -> Result<Rc<E>> + Send + Sync + 'static,
{
    let (report, reports) = mpsc::channel();
    let mut queues = Queues { threads: Vec::new(), reports, ended: StopHandle::new()? };
    for number in 0..info.queues {
        let (dev, make, report, ended) = (Arc::clone(dev), Arc::clone(make), report.clone(), queues.ended.clone());
        let mode = spec.ring_mode;
        let report_failure = report.clone();
        let thread = std::thread::Builder::new().name(format!("ublk{}-q{number}", info.id)).spawn(move || {
            let _guard = AbortOnPanic;
            let result = queue::run(number, &dev, mode, &*make, &report);
            ended.stop();
            result
        });
        match thread {
            Ok(thread) => queues.threads.push(thread),
            Err(e) => {
                // Told like a failed set-up, so that the other queues end in order. The receiver lives.
                let _ = report_failure.send(Err(Error::io("starting a queue's thread", e)));
            }
        }
    }
    Ok(queues)
}

/// A queue thread that unwinds would leave requests unanswered for ever; the kernel's recovery is for
/// processes that die.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!("a queue thread panicked: ending the process, the device can be recovered");
            std::process::abort();
        }
    }
}

/// Waits until every queue has reported, also when one has failed: a STOP cancels only the fetches that the
/// driver has, so a queue that fetched afterwards would wait for ever.
fn all_ready(queues: &Queues, count: u16) -> Result<()> {
    let mut result = Ok(());
    for _ in 0..count {
        let missing = |_| Err(Error::new(ErrorKind::Internal, "a queue thread ended without a word"));
        result = result.and(queues.reports.recv().unwrap_or_else(missing));
    }
    result
}

fn wait_for_node(path: &Path) -> Result<()> {
    let begun = Instant::now();
    while !path.exists() {
        if begun.elapsed() > NODE_TIMEOUT {
            let what = format!(
                "the kernel has started the device, but {} has not appeared; is devtmpfs mounted on /dev?",
                path.display()
            );
            return Err(Error::new(ErrorKind::NotFound, what));
        }
        pause(Duration::from_millis(10));
    }
    Ok(())
}

/// The control thread may wait; it serves nothing.
fn pause(d: Duration) {
    let _ = poll(&mut [], PollTimeout::try_from(d).unwrap_or(PollTimeout::ZERO));
}

/// Waits for a stop or for the end of a queue.
fn wait(stop: &StopHandle, ended: &StopHandle) -> Result<()> {
    loop {
        let mut fds = [PollFd::new(stop.as_fd(), PollFlags::POLLIN), PollFd::new(ended.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => return Ok(()),
            Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(Error::io("waiting for the device's end", e.into())),
        }
    }
}

/// Writes out the page cache of the device while it still serves: what is dirty after STOP is lost.
fn write_out(path: &Path) {
    if let Err(e) = std::fs::File::open(path).and_then(|f| f.sync_all()) {
        tracing::warn!("writing out the page cache of {} before stopping it: {e}", path.display());
    }
}

/// libublk hands EBUSY through as a success.
fn checked(result: Result<i32>) -> Result<()> {
    match result? {
        code if code < 0 => Err(Error::io("the ublk driver refused", std::io::Error::from_raw_os_error(-code))),
        _ => Ok(()),
    }
}

/// libublk's error in our terms.
fn from_ublk(e: UblkError) -> Error {
    match e {
        UblkError::IOError(e) => Error::io("the ublk driver could not be asked", e),
        UblkError::UringIOError(code) | UblkError::OtherError(code) if code < 0 => {
            control::refusal(std::io::Error::from_raw_os_error(-code))
        }
        other => Error::new(ErrorKind::Internal, "libublk failed").with_source(other),
    }
}
