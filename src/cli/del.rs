//! `del`: asks daemons to detach and waits for them; clears up after dead ones. A volume of an NBD server is not `del`'s to detach: its
//! server refuses, and says what to do.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::args::DelArgs;
use super::output::{one_line, print};
use super::progress::Progress;
use super::state::{RunDir, State};
use super::{control, engine, pause, serve};
use crate::error::{Error, ErrorKind, Result};
use crate::units::human_bytes;

/// How often to look whether a daemon has gone.
const LOOK: Duration = Duration::from_millis(50);

pub(super) fn run(run: &RunDir, args: &DelArgs) -> Result<()> {
    let timeout = args.timeout.map(Duration::from_secs);
    if let Some(volume) = &args.which.volume {
        return match run.read(volume)? {
            Some(state) => one(run, &state, args.force, timeout),
            None => Err(Error::new(
                ErrorKind::NotFound,
                format!("volume {volume} is not attached on this host: `vb-ublk list` shows what is"),
            )),
        };
    }
    let all = run.all()?;
    if let Some(n) = args.which.number {
        let found = all.into_iter().filter_map(|(_, s)| s.ok()).find(|s| s.device == Some(n));
        return match found {
            Some(state) => one(run, &state, args.force, timeout),
            None => orphan(n, args.force),
        };
    }
    // All: one that fails keeps none of the others.
    let mut failed = Vec::new();
    for (volume, state) in all {
        if let Err(e) = state.and_then(|s| one(run, &s, args.force, timeout)) {
            super::complain(&e.to_string());
            failed.push(volume.to_string());
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    let what = format!("not detached: {}; the reasons are above", failed.join(", "));
    Err(Error::new(ErrorKind::Busy, what))
}

/// Removes a device that nobody serves and nobody knows.
fn orphan(n: u32, force: bool) -> Result<()> {
    if engine::device(n)?.is_none_or(|d| d.is_served()) {
        let what = format!("/dev/ublkb{n} serves no volume of vb-ublk: `vb-ublk list` shows those that do");
        return Err(Error::new(ErrorKind::NotFound, what));
    }
    if !force {
        let what = format!(
            "/dev/ublkb{n} has lost its server, and nothing says what it served: --force removes it, and what waits in it fails"
        );
        return Err(Error::new(ErrorKind::Busy, what));
    }
    engine::delete_dead(n)
}

fn one(run: &RunDir, state: &State, force: bool, timeout: Option<Duration>) -> Result<()> {
    let begun = Instant::now();
    if !run.is_held(&state.volume)? {
        return bury(run, state, force);
    }
    let socket = run.socket_path(&state.volume)?;
    match control::detach(&socket, force) {
        Ok(()) => {}
        // It may have gone between the two looks; then there is nothing to ask.
        Err(_) if !run.is_held(&state.volume)? => {}
        Err(e) => return Err(e.context(format!("detaching volume {}", state.volume))),
    }
    let mut progress = Progress::new(true);
    while is_there(run, state)? {
        if timeout.is_some_and(|t| begun.elapsed() >= t) {
            progress.clear();
            let what = format!(
                "volume {} is still being detached after {} s: it goes on; see `vb-ublk status {}`",
                state.volume,
                begun.elapsed().as_secs(),
                state.volume
            );
            return Err(Error::new(ErrorKind::TimedOut, what));
        }
        progress.say(|| control::status(&socket).ok().map(|status| how_far(state, &status)));
        pause(LOOK);
    }
    progress.clear();
    match run.read(&state.volume)? {
        // Another one has attached it since.
        Some(left) if left.pid != state.pid => Ok(()),
        None => Ok(()),
        Some(State { failure: Some(why), .. }) => {
            run.remove(&state.volume)?;
            Err(Error::new(ErrorKind::Io, why))
        }
        Some(left) => {
            let log = left.daemon_log.map_or_else(String::new, |l| format!(", see its log {}", l.display()));
            let what = format!(
                "the daemon of volume {} (process {}) died while detaching{log}: `vb-ublk del --volume {}` clears up",
                state.volume, state.pid, state.volume
            );
            Err(Error::new(ErrorKind::Internal, what))
        }
    }
}

/// Whether this very daemon still has the volume.
fn is_there(run: &RunDir, state: &State) -> Result<bool> {
    Ok(run.is_held(&state.volume)? && run.read(&state.volume).is_ok_and(|s| s.is_none_or(|s| s.pid == state.pid)))
}

/// Clears up after a daemon that is dead.
fn bury(run: &RunDir, state: &State, force: bool) -> Result<()> {
    let volume = &state.volume;
    let Some(_held) = run.lock(volume)? else {
        let what = format!("volume {volume} is just being attached by another process: try again");
        return Err(Error::new(ErrorKind::Busy, what));
    };
    if let Some(n) = serve::device_left_by(state)?.map(|d| d.id) {
        let device = engine::device_path(n);
        let in_use = engine::is_in_use(&device);
        let device = device.display();
        if in_use && !force {
            let what = format!(
                "{device} of the dead process {} is mounted or in use: unmount it first (or use --force: what waits in it fails)",
                state.pid
            );
            return Err(Error::new(ErrorKind::Busy, what));
        }
        if in_use {
            super::complain(&format!(
                "{device} is mounted or in use: its I/O fails now, and this waits until it is unmounted"
            ));
        }
        engine::delete_dead(n)?;
    }
    run.remove(volume)?;
    let died = match &state.failure {
        Some(why) => format!("had failed ({why})"),
        None => "had died".to_owned(),
    };
    print(&format!(
        "the daemon of volume {volume} {died}; what it left is removed, but its log {} stays: the next attach on this host \
         (`vb-ublk add` or `vb-ublk nbd`) takes up what was not uploaded\n",
        state.wal.display()
    ))
}

/// How much is left.
fn how_far(state: &State, status: &Value) -> String {
    let left = status.pointer("/engine/log/pending_bytes").and_then(Value::as_u64);
    let trouble = status.pointer("/engine/background/store_trouble").and_then(Value::as_str);
    let left = left.map_or_else(String::new, |n| format!(", {} left to upload", human_bytes(n)));
    let trouble = trouble.map_or_else(String::new, |t| format!(" ({})", one_line(t)));
    format!("detaching {}{left}{trouble}", state.volume)
}

#[cfg(test)]
mod tests {
    use super::super::args::WhichArgs;
    use super::*;

    fn fresh() -> (tempfile::TempDir, RunDir, State) {
        let dir = tempfile::tempdir().expect("dir");
        let run = RunDir::create(dir.path()).expect("run");
        let mut state = State::new("v".parse().expect("name"), "file:///s".into(), "/w".into(), None);
        state.device = Some(1_000_000);
        run.write(&state).expect("write");
        (dir, run, state)
    }

    #[test]
    fn the_dead_are_cleared_up_by_number_and_by_name() {
        for by_number in [true, false] {
            let (_dir, run, state) = fresh();
            let args = DelArgs {
                which: WhichArgs {
                    number: by_number.then_some(1_000_000),
                    volume: (!by_number).then(|| state.volume.clone()),
                    all: false,
                },
                force: false,
                timeout: None,
            };
            super::run(&run, &args).expect("buried");
            assert_eq!(run.read(&state.volume).expect("read"), None);
            assert_eq!(super::run(&run, &args).expect_err("gone").kind(), ErrorKind::NotFound);
        }
    }

    #[test]
    fn a_daemon_that_does_not_answer_is_not_buried() {
        let (_dir, run, state) = fresh();
        let _held = run.lock(&state.volume).expect("lock").expect("free");
        let e = one(&run, &state, false, None).expect_err("no socket");
        assert!(e.to_string().contains("detaching volume v"), "{e}");
        assert!(run.read(&state.volume).expect("read").is_some());
    }

    #[test]
    fn waiting_ends_when_the_daemon_has_gone_or_time_is_up() {
        struct Leaves(std::sync::Mutex<Option<super::super::state::Held>>, RunDir, bool);
        impl control::Daemon for Leaves {
            fn status(&self) -> Result<Value> {
                Ok(Value::Null)
            }
            fn detach(&self, _: bool) -> Result<()> {
                let held = self.0.lock().expect("lock").take();
                if self.2 {
                    self.1.remove(&"v".parse().expect("name")).expect("remove");
                    drop(held);
                } else {
                    *self.0.lock().expect("lock") = held;
                }
                Ok(())
            }
            fn order(&self, _: &control::Order) -> Result<u64> {
                unreachable!("nobody orders anything")
            }
            fn is_done(&self, _: u64) -> Result<bool> {
                unreachable!("nobody has ordered anything")
            }
        }
        for leaves in [true, false] {
            let (_dir, run, state) = fresh();
            let held = run.lock(&state.volume).expect("lock").expect("free");
            let listener = control::listen(&run.socket_path(&state.volume).expect("path")).expect("listen");
            control::spawn(listener, Leaves(std::sync::Mutex::new(Some(held)), run.clone(), leaves))
                .expect("spawn")
                .leave_running();
            let done = one(&run, &state, false, Some(Duration::from_millis(200)));
            assert_eq!(done.err().map(|e| e.kind()), (!leaves).then_some(ErrorKind::TimedOut));
        }
    }
}
