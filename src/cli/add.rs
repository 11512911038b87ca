//! `add`: everything that can be checked is checked before the daemon is started.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::args::{AddArgs, MAX_QUEUES};
use super::daemonize::{Side, daemonize};
use super::engine::{self, AttachOptions, CreateOptions, DeviceSpec};
use super::layers::ublk_below;
use super::output::print;
use super::serve::{self, Plan, Told};
use super::settings::{LogPlace, Settings};
use super::state::{Held, RunDir, State};
use crate::config::{ByteSize, VolumeName};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::store::StoreUrl;
use crate::units::{BLOCK, MAX_VOLUME_BYTES};

const DEFAULT_WAL: ByteSize = ByteSize(1 << 30);
const DEFAULT_DEPTH: u16 = 128;
const MOST_DEFAULT_QUEUES: usize = 4;

pub(super) fn run(settings: &Settings, args: &AddArgs) -> Result<()> {
    let plan = plan(settings, args)?;
    let Some(log) = plan.state.daemon_log.clone() else {
        return serve::run(plan, &Told::terminal());
    };
    match daemonize(&log)? {
        Side::Parent(device) => print(&format!("{device}\n")),
        Side::Child(reporter) => {
            let told = Told::parent(reporter);
            let mut plan = plan;
            plan.state.pid = std::process::id();
            let code = match serve::run(plan, &told) {
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
    let spec = DeviceSpec {
        id: args.number,
        queues: args.queues.or(defaults.queues).unwrap_or_else(default_queues),
        depth: args.depth.or(defaults.depth).unwrap_or(DEFAULT_DEPTH),
        // Not known before the volume is attached.
        size_bytes: BLOCK as u64,
        read_only: args.read_only,
        ..DeviceSpec::default()
    };
    // The command line has been checked for this, the other places have not.
    if spec.queues > MAX_QUEUES {
        let what = format!("{} queues: a device may have 1 to {MAX_QUEUES}", spec.queues);
        return Err(Error::new(ErrorKind::Usage, what));
    }
    spec.check()?;
    let place = LogPlace::of(args.wal_dir.clone(), args.wal_device.clone())
        .or_else(|| defaults.log.clone())
        .unwrap_or_else(|| LogPlace::Dir(settings.data_dir.join("wal")));
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
    let (log_path, log_bytes) = match &place {
        LogPlace::Device(device) => (absolute(device)?, wal_device(device)?),
        LogPlace::Dir(dir) => (wal_file(&absolute(dir)?, volume)?, wal_size.0),
    };
    let daemon_log = (!args.foreground).then(|| run.log_path(volume));
    Ok(Plan {
        attach: AttachOptions {
            store_url: settings.store.clone(),
            store_options: settings.store_options.clone(),
            volume: volume.to_string(),
            log_path: log_path.clone(),
            log_bytes,
            force: args.force,
            read_only: args.read_only,
        },
        create,
        spec,
        state: State::new(volume.clone(), settings.store.to_string(), log_path, daemon_log),
        strict: args.strict || defaults.strict,
        run,
        held,
    })
}

fn default_queues() -> u16 {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u16::try_from(cpus.min(MOST_DEFAULT_QUEUES)).unwrap_or(1)
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).context(|| format!("finding the absolute path of {:?}", path.display()))
}

/// Takes the volume on this host, or says who has it.
fn take(run: &RunDir, volume: &VolumeName) -> Result<Held> {
    let held = run.lock(volume)?;
    // A damaged state of nobody is simply replaced.
    let state = match run.read(volume) {
        Err(_) if held.is_some() => None,
        state => state?,
    };
    let Some(held) = held else {
        let what = match state {
            Some(State { pid, store, device: Some(n), .. }) => format!(
                "volume {volume} of {store} is attached already as /dev/ublkb{n} by process {pid}: use that, or detach it with \
                 `vb-ublk del -n {n}`"
            ),
            Some(State { pid, .. }) => {
                format!("volume {volume} is just being attached or detached by process {pid}: see `vb-ublk list`")
            }
            None => format!("volume {volume} is just being attached by another process: see `vb-ublk list`"),
        };
        return Err(Error::new(ErrorKind::Busy, what));
    };
    if let Some(state) = state
        && let Some(n) = serve::device_left_by(&state)?
    {
        let what = format!(
            "volume {volume} was served as /dev/ublkb{n} by process {}, which died, and the device is still there: remove it with \
             `vb-ublk del -n {n}`, then attach again; the log {} keeps what was written",
            state.pid,
            state.wal.display()
        );
        return Err(Error::new(ErrorKind::Busy, what));
    }
    Ok(held)
}

fn on_ublk(what: &str, path: &Path, device: &str) -> Error {
    let what = format!(
        "{what} {} is on {device}, itself a ublk device, and could wait for itself: choose a place on a local disk",
        path.display()
    );
    Error::new(ErrorKind::Usage, what)
}

/// Refuses a folder on a ublk device. For one that is not there yet, its nearest ancestor counts.
fn not_on_ublk(what: &str, path: &Path) -> Result<()> {
    let meta = path.ancestors().find_map(|p| std::fs::metadata(p).ok());
    match meta.and_then(|m| ublk_below(Path::new("/sys"), m.dev())) {
        Some(device) => Err(on_ublk(what, path, &device)),
        None => Ok(()),
    }
}

/// Makes the log's folder and names the log.
fn wal_file(dir: &Path, volume: &VolumeName) -> Result<PathBuf> {
    let what = "the folder of the write-ahead log";
    not_on_ublk(what, dir)?;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .context(|| format!("making {what} {} (choose another with --wal-dir)", dir.display()))?;
    if nix::unistd::access(dir, nix::unistd::AccessFlags::W_OK).is_err() {
        let what = format!("{what} {} cannot be written to: choose another with --wal-dir", dir.display());
        return Err(Error::new(ErrorKind::Denied, what));
    }
    Ok(dir.join(format!("{volume}.wal")))
}

/// Checks that a device can be a log; returns how much of it is used.
fn wal_device(path: &Path) -> Result<u64> {
    let opening = || format!("opening the write-ahead log's device {}", path.display());
    let meta = std::fs::metadata(path).context(opening)?;
    if !meta.file_type().is_block_device() {
        let what = format!("{} is not a block device: name one, or use --wal-dir", path.display());
        return Err(Error::new(ErrorKind::Usage, what));
    }
    if let Some(device) = ublk_below(Path::new("/sys"), meta.rdev()) {
        return Err(on_ublk("the write-ahead log's device", path, &device));
    }
    // O_EXCL on a device: nobody has it mounted, or in a mapping.
    let mut file: File = match OpenOptions::new().read(true).write(true).custom_flags(nix::libc::O_EXCL).open(path) {
        Err(e) if e.raw_os_error() == Some(nix::libc::EBUSY) => {
            let what = format!("{} is mounted or in use: a write-ahead log needs a device of its own", path.display());
            return Err(Error::new(ErrorKind::Busy, what));
        }
        opened => opened.context(opening)?,
    };
    let size = file.seek(SeekFrom::End(0)).context(|| format!("reading the size of {}", path.display()))?;
    let used = size.min(engine::MAX_LOG_BYTES);
    engine::check_log_size(used).map_err(|e| e.context(format!("{} as the write-ahead log", path.display())))?;
    Ok(used)
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

    #[test]
    fn a_volume_is_taken_once() {
        let dir = tempfile::tempdir().expect("dir");
        let run = RunDir::create(&dir.path().join("run")).expect("run");
        let v: VolumeName = "v".parse().expect("name");
        let held = take(&run, &v).expect("free");
        let e = take(&run, &v).expect_err("no state yet").to_string();
        assert!(e.contains("being attached by another"), "{e}");
        let mut state = State::new(v.clone(), "file:///s".into(), "/w".into(), None);
        run.write(&state).expect("write");
        let e = take(&run, &v).expect_err("attaching").to_string();
        assert!(e.contains(&format!("process {}", std::process::id())), "{e}");
        state.device = Some(4711);
        run.write(&state).expect("write");
        let e = take(&run, &v).expect_err("serving");
        assert_eq!(e.kind(), ErrorKind::Busy);
        assert!(e.to_string().contains("/dev/ublkb4711") && e.to_string().contains("del -n 4711"), "{e}");
        drop(held);
        // Dead, and its device is gone with it.
        take(&run, &v).expect("free again");
    }

    #[test]
    fn a_log_has_a_place() {
        let dir = tempfile::tempdir().expect("dir");
        let v: VolumeName = "v".parse().expect("name");
        let wal = wal_file(&dir.path().join("a/b"), &v).expect("made");
        assert_eq!(wal, dir.path().join("a/b/v.wal"));
        assert_eq!(wal_device(dir.path()).expect_err("a folder").kind(), ErrorKind::Usage);
        assert_eq!(wal_device(&dir.path().join("none")).expect_err("none").kind(), ErrorKind::NotFound);
    }
}
