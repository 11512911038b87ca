//! `recover` and `upgrade`: a new process takes up the device of one that died, or of one that is ended for it.
//!
//! Invariants:
//! - The volume's lock is held from before the dead one's state is believed until the new process has its own state there.
//! - The log is replayed before the kernel hears that the recovery has ended: what was in flight is issued again then.
//! - Whatever fails leaves device and state as they were: requests wait on, and the recovery can be tried again.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::add::limit;
use super::args::WhichArgs;
use super::engine::{self, AttachOptions, Collect, DeviceSpec};
use super::output::print;
use super::serve::{self, Plan};
use super::settings::Settings;
use super::state::{Held, How, RunDir, State};
use super::{control, pause};
use crate::config::{GarbageLimit, VolumeName};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{StoreOptions, StoreUrl};

/// How long a killed process may take to let go of its lock.
const DYING: Duration = Duration::from_secs(10);

/// What the two commands do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verb {
    /// Takes up what dead processes left.
    Recover,
    /// Ends living ones first.
    Upgrade,
}

pub(super) fn run(settings: &Settings, args: &WhichArgs, verb: Verb) -> Result<()> {
    let run = RunDir::create(&settings.run_dir)?;
    let chosen = choose(&run, args, verb)?;
    let mut failed = Vec::new();
    for state in &chosen {
        match one(settings, &run, state, verb) {
            Ok(device) => print(&format!("{device}\n"))?,
            Err(e) if chosen.len() == 1 => return Err(e),
            // One that fails keeps none of the others.
            Err(e) => {
                super::complain(&e.to_string());
                failed.push(state.volume.to_string());
            }
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Busy, format!("not served again: {}; the reasons are above", failed.join(", "))))
}

/// The states that the command is about.
fn choose(run: &RunDir, args: &WhichArgs, verb: Verb) -> Result<Vec<State>> {
    let missing = |what: String| {
        let what = format!("{what}: `vb-ublk list` shows what there is");
        Err(Error::new(ErrorKind::NotFound, what))
    };
    if let Some(volume) = &args.volume {
        return match run.read(volume)? {
            Some(state) => Ok(vec![state]),
            None => missing(format!("volume {volume} is not attached on this host")),
        };
    }
    let mut all = Vec::new();
    for (volume, state) in run.all()? {
        match state {
            Ok(state) => all.push(state),
            Err(e) => super::complain(&format!("volume {volume}: {e}")),
        }
    }
    if let Some(n) = args.number {
        return match all.into_iter().find(|s| s.device == Some(n)) {
            Some(state) => Ok(vec![state]),
            None => missing(format!("/dev/ublkb{n} is no device of a volume that was attached on this host")),
        };
    }
    let mut chosen = Vec::new();
    for state in all {
        let due = match verb {
            Verb::Recover => !run.is_held(&state.volume)? && serve::device_left_by(&state)?.is_some(),
            Verb::Upgrade => run.is_held(&state.volume)? && state.device.is_some() && state.daemon_log.is_some(),
        };
        if due {
            chosen.push(state);
        }
    }
    Ok(chosen)
}

fn one(settings: &Settings, run: &RunDir, state: &State, verb: Verb) -> Result<String> {
    if verb == Verb::Upgrade {
        end(run, state)?;
    }
    let plan = plan(settings, run, &state.volume)?.ok_or_else(|| {
        let what = format!("volume {} left no device: attach it with `vb-ublk add --volume {0}`", state.volume);
        Error::new(ErrorKind::NotFound, what)
    })?;
    serve::in_daemon(plan, &run.log_path(&state.volume))
}

/// How to take up the device that a dead process left of `volume`; `None` when there is none.
///
/// # Errors
/// It lives; the state cannot be read, or is that of a program that wrote down less.
pub(super) fn plan(settings: &Settings, run: &RunDir, volume: &VolumeName) -> Result<Option<Plan>> {
    if run.read(volume)?.is_none() {
        return Ok(None);
    }
    let held = lock(run, volume)?;
    // Read again: now nobody else changes it.
    let Some(dead) = run.read(volume)? else { return Ok(None) };
    let Some(device) = serve::device_left_by(&dead)? else { return Ok(None) };
    let n = device.id;
    let Some(how) = dead.how.clone() else {
        let what = format!(
            "/dev/ublkb{n} was served by a program that did not write down how: remove it with `vb-ublk del -n {n}`, then attach \
             volume {volume} again; the log {} keeps what was written",
            dead.wal.display()
        );
        return Err(Error::new(ErrorKind::Unsupported, what));
    };
    let given = &settings.store_options;
    let store_options = StoreOptions {
        endpoint: given.endpoint.clone().or(how.endpoint.clone()),
        region: given.region.clone().or(how.region.clone()),
        profile: given.profile.clone().or(how.profile.clone()),
        ca_cert: given.ca_cert.clone().or(how.ca_cert.clone()),
        insecure: given.insecure || how.insecure,
        ..given.clone()
    };
    let mut state = State::new(volume.clone(), dead.store.clone(), dead.wal.clone(), Some(run.log_path(volume)));
    // From the start: a recovery that fails is still somebody's device.
    state.device = Some(n);
    state.taken_from = (device.pid > 0).then_some(device.pid);
    state.metrics = dead.metrics;
    state.how = Some(how.clone());
    Ok(Some(Plan {
        attach: AttachOptions {
            store_url: dead.store.parse()?,
            store_options,
            volume: volume.to_string(),
            log_path: dead.wal,
            log_bytes: how.log_bytes,
            force: false,
            read_only: how.read_only,
            flush_to: how.flush,
            io_timeout: limit(how.io_timeout),
            resume: true,
            accept_loss: false,
            gc: Collect::above(how.gc_garbage),
            cache: how.cache.clone(),
            guard_memory: true,
        },
        create: None,
        spec: DeviceSpec { id: Some(n), recover: true, read_only: how.read_only, ..DeviceSpec::default() },
        state,
        metrics: how.metrics,
        strict: how.strict,
        run: run.clone(),
        held,
    }))
}

/// Takes the volume's lock. A process that was just killed may still have requests in flight, which keep it.
fn lock(run: &RunDir, volume: &VolumeName) -> Result<Held> {
    let begun = Instant::now();
    loop {
        if let Some(held) = run.lock(volume)? {
            return Ok(held);
        }
        let state = run.read(volume)?;
        let (pid, dead) = state.map_or((0, false), |s| (s.pid, !engine::is_alive(s.pid)));
        if !dead || begun.elapsed() > DYING {
            let what = format!(
                "volume {volume} is served by process {pid}, which lives: there is nothing to recover (`vb-ublk upgrade` replaces it)"
            );
            return Err(Error::new(ErrorKind::Busy, what));
        }
        pause(Duration::from_millis(20));
    }
}

/// Ends the living daemon of a volume, so that another may take up its device. All it has acknowledged is in the log.
fn end(run: &RunDir, state: &State) -> Result<()> {
    let volume = &state.volume;
    let refuse = |kind, what: String| Err(Error::new(kind, format!("volume {volume} {what}")));
    if !run.is_held(volume)? {
        return refuse(ErrorKind::NotFound, "is served by nobody: `vb-ublk recover` takes up its device".into());
    }
    let Some(n) = state.device else {
        return refuse(ErrorKind::Unsupported, "is not served as a device: an NBD server is simply restarted".into());
    };
    if state.daemon_log.is_none() {
        let what = format!(
            "is served in the foreground by process {0}: whoever started that has to start it anew (`kill -9 {0}`, then `add \
             --recover`, which the systemd unit does by itself)",
            state.pid
        );
        return refuse(ErrorKind::Unsupported, what);
    }
    if state.how.is_none() {
        let what = format!("is served by a program that did not write down how: use `vb-ublk del -n {n}`, then `add`");
        return refuse(ErrorKind::Unsupported, what);
    }
    if engine::device(n)?.is_none_or(|d| !d.is_recoverable()) {
        return refuse(ErrorKind::Unsupported, "has a device that this kernel cannot recover (Linux 6.1 can)".into());
    }
    // What the new process could not take up is not left without one.
    state.store.parse::<StoreUrl>().map_err(|e| e.context(format!("upgrading volume {volume}, which is served on")))?;
    engine::knows_log(&state.wal).map_err(|e| e.context(format!("upgrading volume {volume}, which is served on")))?;
    // It has to be this very process, and past its attaching and before its detaching.
    let status = control::status(&run.socket_path(volume)?)?;
    if status["state"] != "serving" || status["pid"] != state.pid {
        return refuse(ErrorKind::Busy, format!("is {}: try again when it serves", status["state"]));
    }
    let pid = Pid::from_raw(i32::try_from(state.pid).unwrap_or(0));
    match kill(pid, Signal::SIGKILL) {
        Ok(()) | Err(Errno::ESRCH) => await_end(state.pid, volume),
        Err(e) => Err(Error::io(format!("ending process {pid}, which serves volume {volume}"), e.into())),
    }
}

/// Waits until a process that was killed is dead: on a busy machine it may yet live for a while, and what lives is not taken over.
fn await_end(pid: u32, volume: &VolumeName) -> Result<()> {
    let begun = Instant::now();
    while engine::is_alive(pid) {
        if begun.elapsed() > DYING {
            let what = format!(
                "process {pid}, which serves volume {volume}, was killed and has not ended in {} s: when it has, `vb-ublk recover \
                 --volume {volume}` takes up its device",
                DYING.as_secs()
            );
            return Err(Error::new(ErrorKind::Busy, what));
        }
        pause(Duration::from_millis(5));
    }
    Ok(())
}

impl How {
    /// What a recovery has to know of how a volume is attached.
    pub(super) fn of(
        attach: &AttachOptions,
        gc_garbage: GarbageLimit,
        metrics: Option<SocketAddr>,
        strict: bool,
    ) -> Self {
        let o = &attach.store_options;
        Self {
            endpoint: o.endpoint.clone(),
            region: o.region.clone(),
            profile: o.profile.clone(),
            ca_cert: o.ca_cert.clone(),
            insecure: o.insecure,
            log_bytes: attach.log_bytes,
            cache: attach.cache.clone(),
            read_only: attach.read_only,
            flush: attach.flush_to,
            gc_garbage,
            io_timeout: attach.io_timeout.map(|t| u32::try_from(t.as_secs()).unwrap_or(u32::MAX)),
            metrics,
            strict,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn which(volume: Option<&str>, number: Option<u32>) -> WhichArgs {
        let volume = volume.map(|v| v.parse().expect("name"));
        WhichArgs { all: volume.is_none() && number.is_none(), volume, number }
    }

    #[test]
    fn only_what_is_there_is_chosen() {
        let dir = tempfile::tempdir().expect("dir");
        let run = RunDir::create(&dir.path().join("run")).expect("run");
        let mut state = State::new("v".parse().expect("name"), "file:///s".into(), "/w".into(), None);
        state.device = Some(1_000_000);
        run.write(&state).expect("write");
        std::fs::write(dir.path().join("run/broken.json"), "{").expect("write");
        let kind = |a: &WhichArgs| choose(&run, a, Verb::Recover).map(|s| s.len()).map_err(|e| e.kind());
        assert_eq!(kind(&which(Some("w"), None)), Err(ErrorKind::NotFound));
        assert_eq!(kind(&which(None, Some(7))), Err(ErrorKind::NotFound));
        assert_eq!(kind(&which(None, Some(1_000_000))), Ok(1));
        assert_eq!(kind(&which(Some("v"), None)), Ok(1));
        // Its device is gone: of all there are, none.
        assert_eq!(kind(&which(None, None)), Ok(0));
    }

    #[test]
    fn a_killed_process_may_take_a_while_to_end() {
        let mut child = std::process::Command::new("sleep").arg("0.3").spawn().expect("a process");
        let begun = Instant::now();
        await_end(child.id(), &"v".parse().expect("name")).expect("it ends");
        assert!(begun.elapsed() >= Duration::from_millis(200), "it was not waited for: {:?}", begun.elapsed());
        child.wait().expect("its end");
    }

    #[test]
    fn what_the_new_program_cannot_read_is_noticed_first() {
        use crate::checksum::crc_around;
        use crate::wal::codec::{SUPERBLOCK_AT, Superblock};

        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("w");
        let sb = Superblock {
            update: 2,
            volume: uuid::Uuid::from_u128(1),
            log_id: 2,
            segment_bytes: 4 << 20,
            max_segments: 16,
            volume_sectors: 8,
            logical_block: 512,
            packed_through: crate::units::Seq(3),
            confirmed: crate::units::Nonce(4),
            drawn: Vec::new(),
        };
        let with = |copies: [&[u8]; 2]| {
            let mut file = vec![0; SUPERBLOCK_AT[1] as usize];
            file[..copies[0].len()].copy_from_slice(copies[0]);
            file.extend_from_slice(copies[1]);
            std::fs::write(&path, file).expect("write");
            engine::knows_log(&path).map_err(|e| (e.kind(), e.to_string()))
        };
        let good = sb.encode();
        let mut torn = good.clone();
        torn[100] ^= 1;
        // As a program to come may write it: whole, and of another version.
        let mut newer = good.clone();
        newer[4] += 1;
        newer[8..12].fill(0);
        let crc = crc_around(&[], &newer, 8);
        newer[8..12].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(with([&good, &good]), Ok(()));
        assert_eq!(with([&torn, &good]), Ok(()), "one copy is enough");
        let (kind, why) = with([&newer, &newer]).expect_err("another version");
        assert!(kind == ErrorKind::Unsupported && why.contains("version"), "{why}");
        assert_eq!(with([&torn, &[]]).expect_err("nothing to read").0, ErrorKind::Unsupported);
        std::fs::remove_file(&path).expect("remove");
        assert_eq!(engine::knows_log(&path).expect_err("no log").kind(), ErrorKind::NotFound);
    }

    #[test]
    fn the_living_are_left_alone() {
        let dir = tempfile::tempdir().expect("dir");
        let run = RunDir::create(&dir.path().join("run")).expect("run");
        let v: VolumeName = "v".parse().expect("name");
        let mut state = State::new(v.clone(), "file:///s".into(), "/w".into(), None);
        state.device = Some(1_000_000);
        run.write(&state).expect("write");
        assert_eq!(end(&run, &state).expect_err("nobody serves it").kind(), ErrorKind::NotFound);
        let held = run.lock(&v).expect("lock").expect("free");
        let e = lock(&run, &v).expect_err("this process lives").to_string();
        assert!(e.contains(&format!("process {}", std::process::id())), "{e}");
        let e = end(&run, &state).expect_err("in the foreground");
        assert!(e.to_string().contains("foreground"), "{e}");
        state.device = None;
        assert!(end(&run, &state).expect_err("over NBD").to_string().contains("not served as a device"));
        drop(held);
    }
}
