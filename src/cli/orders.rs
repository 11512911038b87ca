//! What takes its time and is done by whoever has the volume attached: its daemon on this host, or this process for as long as it takes.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::oneshot::error::TryRecvError;

use super::args::LogArgs;
use super::claim::{attached_here, take};
use super::control::{self, Order};
use super::engine::{AttachOptions, Attached, Collect, View};
use super::pause;
use super::place::{DEFAULT_WAL, log_at};
use super::settings::{LogPlace, Settings};
use super::signals::Signals;
use super::state::{Held, RunDir};
use crate::config::{ByteSize, FlushTo, VolumeName};
use crate::error::{Error, ErrorKind, Result};

/// Between two looks at what a daemon was ordered to do.
const LOOK: Duration = Duration::from_millis(20);

/// Has the volume's daemon do it, if it is attached on this host, and waits for the end. `false`: it is not.
///
/// # Errors
/// The order's own, and when the daemon cannot be asked.
pub(super) fn ordered(settings: &Settings, volume: &VolumeName, order: &Order) -> Result<bool> {
    ordered_telling(settings, volume, order, &mut |_| ())
}

/// The same, with something to be done while one waits; it is given the daemon's socket.
///
/// # Errors
/// As [`ordered`].
pub(super) fn ordered_telling(
    settings: &Settings,
    volume: &VolumeName,
    order: &Order,
    meanwhile: &mut dyn FnMut(&Path),
) -> Result<bool> {
    if attached_here(settings, volume)?.is_none() {
        return Ok(false);
    }
    let socket = RunDir::at(&settings.run_dir).socket_path(volume)?;
    let asking = |e: Error| e.context(format!("volume {volume}, attached on this host"));
    let job = control::order(&socket, order).map_err(asking)?;
    while !control::is_done(&socket, job).map_err(asking)? {
        meanwhile(&socket);
        pause(LOOK);
    }
    Ok(true)
}

/// Takes the volume for this process, and how it is attached then, unless one changes it: without a cache, and as a device of nobody's.
///
/// # Errors
/// `Busy` when another process has it; those of the log's place.
pub(super) fn for_a_while(
    settings: &Settings,
    volume: &VolumeName,
    place: &LogPlace,
    wal_size: Option<ByteSize>,
) -> Result<(Held, AttachOptions)> {
    let held = take(&RunDir::create(&settings.run_dir)?, volume)?;
    let most = wal_size.or(settings.add.wal_size).unwrap_or(DEFAULT_WAL);
    let (log_path, log_bytes) = log_at(place, volume, most)?;
    let options = AttachOptions {
        store_url: settings.store.clone(),
        store_options: settings.store_options.clone(),
        volume: volume.to_string(),
        log_path,
        log_bytes,
        force: false,
        read_only: false,
        flush_to: FlushTo::Wal,
        io_timeout: None,
        resume: false,
        accept_loss: false,
        gc: Collect::above(settings.add.gc_garbage.unwrap_or_default()),
        cache: None,
        guard_memory: false,
    };
    Ok((held, options))
}

/// Attaches the volume for as long as it takes. A log of this host's that has something for it is uploaded on the way.
/// Returns its status after that. `meanwhile` is called now and then. A signal ends it, with the volume detached.
///
/// # Errors
/// Those of attaching and detaching, and the order's own; `Interrupted` after a signal.
pub(super) fn offline(
    settings: &Settings,
    volume: &VolumeName,
    log: &LogArgs,
    order: &Order,
    meanwhile: &mut dyn FnMut(&View),
) -> Result<Value> {
    // The daemon's own log: another would leave that one as an older attachment's.
    let (_held, options) = for_a_while(settings, volume, &settings.log_place(log.place()), None)?;
    let last_word = "stopped at once: the volume was attached for this, and is until this host attaches it again";
    let stop = Signals::block()?.flag("kill -9", last_word)?;
    let attached = Attached::attach(options)?;
    let view = attached.view();
    let done = view.order(order).and_then(|mut answer| {
        loop {
            match answer.try_recv() {
                Ok(done) => return done,
                Err(TryRecvError::Empty) if stop.load(Ordering::Relaxed) => {
                    let what = format!("stopped before volume {volume} was done; what is done of it stays so");
                    return Err(Error::new(ErrorKind::Interrupted, what));
                }
                Err(TryRecvError::Empty) => meanwhile(&view),
                Err(TryRecvError::Closed) => {
                    let what = "the volume's background has ended before it was done";
                    return Err(Error::new(ErrorKind::Internal, what));
                }
            }
            pause(LOOK);
        }
    });
    let status = view.status();
    attached.detach()?;
    done?;
    status
}
