//! `add`: everything that can be checked is checked before the daemon is started.

use std::time::Duration;

use super::args::{AddArgs, MAX_QUEUES};
use super::claim::take;
use super::engine::{self, AttachOptions, Collect, CreateOptions, DeviceSpec};
use super::output::print;
use super::place::{DEFAULT_WAL, cache_folder, log_at, not_on_ublk};
use super::recover;
use super::serve::{self, Plan, Told};
use super::settings::{LogPlace, Settings};
use super::state::{How, RunDir, State};
use crate::config::ByteSize;
use crate::error::{Error, ErrorKind, Result};
use crate::store::StoreUrl;
use crate::units::{BLOCK, MAX_VOLUME_BYTES};

const DEFAULT_DEPTH: u16 = 128;
const MOST_DEFAULT_QUEUES: usize = 4;

pub(super) fn run(settings: &Settings, args: &AddArgs) -> Result<()> {
    let left = if args.recover { left(settings, args)? } else { None };
    let plan = match left {
        Some(plan) => plan,
        None => plan(settings, args)?,
    };
    match plan.state.daemon_log.clone() {
        Some(log) => print(&format!("{}\n", serve::in_daemon(plan, &log)?)),
        None => serve::run(plan, &Told::terminal()),
    }
}

/// The device that a dead daemon left of the volume, to be taken up as it is.
fn left(settings: &Settings, args: &AddArgs) -> Result<Option<Plan>> {
    let run = RunDir::create(&settings.run_dir)?;
    let Some(mut plan) = recover::plan(settings, &run, &args.volume)? else { return Ok(None) };
    if let (Some(asked), Some(left)) = (args.number, plan.spec.id)
        && asked != left
    {
        let what = format!(
            "volume {} was served as /dev/ublkb{left} by a process that died, and -n {asked} asks for another device: leave it out, or \
             remove that one with `vb-ublk del -n {left}`",
            args.volume
        );
        return Err(Error::new(ErrorKind::Busy, what));
    }
    if args.foreground {
        plan.state.daemon_log = None;
    }
    Ok(Some(plan))
}

/// The size of a volume to create.
///
/// # Errors
/// `Usage`, saying what it may be.
pub(super) fn check_size(size: ByteSize) -> Result<u64> {
    let step = BLOCK as u64;
    if size.0 == 0 || size.0 > MAX_VOLUME_BYTES || !size.0.is_multiple_of(step) {
        let what = format!("a volume of {} bytes: the size may be 4K to 64T, in steps of 4K", size.0);
        return Err(Error::new(ErrorKind::Usage, what));
    }
    Ok(size.0)
}

fn plan(settings: &Settings, args: &AddArgs) -> Result<Plan> {
    let defaults = &settings.add;
    let volume = &args.volume;
    let create = match args.size {
        Some(size) if args.create => {
            Some(CreateOptions { size_bytes: check_size(size)?, logical_block: args.logical_block_size.unwrap_or(512) })
        }
        _ => None,
    };
    let is_snapshot = volume.parts().1.is_some();
    if is_snapshot && args.create {
        return Err(Error::new(ErrorKind::Usage, format!("{volume} is a snapshot: --create makes volumes")));
    }
    let read_only = args.read_only || is_snapshot;
    let spec = DeviceSpec {
        id: args.number,
        queues: args.queues.or(defaults.queues).unwrap_or_else(default_queues),
        depth: args.depth.or(defaults.depth).unwrap_or(DEFAULT_DEPTH),
        // Not known before the volume is attached.
        size_bytes: BLOCK as u64,
        read_only,
        ..DeviceSpec::default()
    };
    // The command line has been checked for this, the other places have not.
    if spec.queues > MAX_QUEUES {
        let what = format!("{} queues: a device may have 1 to {MAX_QUEUES}", spec.queues);
        return Err(Error::new(ErrorKind::Usage, what));
    }
    spec.check()?;
    let place = settings.log_place(LogPlace::of(args.wal_dir.clone(), args.wal_device.clone()));
    if let (LogPlace::Device(device), true) = (&place, is_snapshot) {
        let what = format!("{} as a log: {volume} is a snapshot, which needs none", device.display());
        return Err(Error::new(ErrorKind::Usage, what));
    }
    if let (LogPlace::Device(device), Some(_)) = (&place, args.wal_size) {
        let what = format!(
            "--wal-size is for a log in a folder, and the log is to be the device {}: leave it out, or give --wal-dir",
            device.display()
        );
        return Err(Error::new(ErrorKind::Usage, what));
    }
    let wal_size = args.wal_size.or(defaults.wal_size).unwrap_or(DEFAULT_WAL);
    engine::check_log_size(wal_size.0)?;

    engine::driver()?;
    if let Some(n) = args.number
        && engine::device(n)?.is_some()
    {
        let what =
            format!("/dev/ublkb{n} exists already: choose another number, or detach it with `vb-ublk del -n {n}`");
        return Err(Error::new(ErrorKind::Exists, what));
    }

    let run = RunDir::create(&settings.run_dir)?;
    let held = take(&run, volume)?;
    if let StoreUrl::File { root } = &settings.store {
        not_on_ublk("the store", root)?;
    }
    let (log_path, log_bytes) = log_at(&place, volume, wal_size)?;
    let daemon_log = (!args.foreground).then(|| run.log_path(volume));
    let gc_garbage = args.gc_garbage.or(defaults.gc_garbage).unwrap_or_default();
    let attach = AttachOptions {
        store_url: settings.store.clone(),
        store_options: settings.store_options.clone(),
        volume: volume.to_string(),
        log_path: log_path.clone(),
        log_bytes,
        force: args.force,
        read_only,
        flush_to: args.flush.or(defaults.flush).unwrap_or_default(),
        io_timeout: limit(args.io_timeout.or(defaults.io_timeout)),
        resume: false,
        accept_loss: args.accept_loss,
        gc: Collect::above(gc_garbage),
        cache: cache_folder(args.cache.clone(), settings)?.map(|c| c.of(volume)),
        guard_memory: true,
    };
    let strict = args.strict || defaults.strict;
    let mut state = State::new(volume.clone(), settings.store.to_string(), log_path, daemon_log);
    let metrics = args.metrics.or(defaults.metrics);
    state.how = Some(How::of(&attach, gc_garbage, metrics, strict));
    Ok(Plan { attach, create, spec, state, metrics, strict, run, held })
}

/// A limit on waiting as options give it; 0 is none.
pub(super) fn limit(seconds: Option<u32>) -> Option<Duration> {
    seconds.filter(|s| *s > 0).map(|s| Duration::from_secs(s.into()))
}

fn default_queues() -> u16 {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u16::try_from(cpus.min(MOST_DEFAULT_QUEUES)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_volumes() {
        for good in [4096, 10 << 30, MAX_VOLUME_BYTES] {
            assert_eq!(check_size(ByteSize(good)).expect("good"), good);
        }
        for bad in [0, 512, 4097, MAX_VOLUME_BYTES + 4096] {
            assert_eq!(check_size(ByteSize(bad)).expect_err("bad").kind(), ErrorKind::Usage);
        }
    }
}
