//! Becoming a daemon: fork, a session of its own, and a pipe on which the child reports.
//!
//! Invariant: it happens while the process has one thread, before any runtime. Locks that are held at that
//! time (`flock`) belong to the open file and so to both; the parent only waits and exits.

#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::OFlag;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, fork, pipe2, setsid};

use crate::error::{Context, Error, ErrorKind, Result};

/// The longest report that a child is believed.
const MAX_REPORT: u64 = 64 << 10;

/// The child's end of the pipe. Dropped without a word, it tells the parent that the child has died.
#[derive(Debug)]
pub(super) struct Reporter(File);

impl Reporter {
    /// It serves; `device` is its path.
    pub(super) fn ready(mut self, device: &str) {
        // A parent that was killed meanwhile is no reason to stop.
        let _ = writeln!(self.0, "ready {device}");
    }

    /// It failed, for good.
    pub(super) fn failed(mut self, e: &Error) {
        let _ = writeln!(self.0, "failed {}", super::output::one_line(&e.to_string()));
    }
}

/// Which side of the fork this is.
pub(super) enum Side {
    /// The child, with stdin empty and stdout and stderr going to the log.
    Child(Reporter),
    /// The parent, when the child has reported that the device serves: its path.
    Parent(String),
}

/// Forks. `log` is made, if need be, and written to by the child.
///
/// # Errors
/// In the parent: that of the child, or that it died without a word.
pub(super) fn daemonize(log: &Path) -> Result<Side> {
    let opening = || format!("opening the daemon's log {}", log.display());
    let log_file = OpenOptions::new().append(true).create(true).mode(0o600).open(log).context(opening)?;
    let before = log_file.metadata().context(opening)?.len();
    let null = OpenOptions::new().read(true).open("/dev/null").context(|| "opening /dev/null")?;
    let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(|e| Error::io("making a pipe", e.into()))?;
    // What is threaded must not fork: the child would have the locks of threads that it does not have.
    let threads = threads();
    if threads != 1 {
        return Err(Error::new(ErrorKind::Internal, format!("cannot become a daemon with {threads} threads running")));
    }
    // SAFETY: the process has this one thread (checked above; the kernel's io_uring workers run no code of the program), so
    // no lock is held by a thread that the child lacks, and the child may do anything that the parent could.
    let forked = unsafe { fork() };
    match forked.map_err(|e| Error::io("starting the daemon", e.into()))? {
        ForkResult::Parent { child } => {
            drop(write);
            let device = heed(File::from(read), child, log)?;
            for warning in warnings(log, before) {
                super::complain(&warning);
            }
            Ok(Side::Parent(device))
        }
        ForkResult::Child => {
            drop(read);
            let reporter = Reporter(File::from(write));
            match settle(&null, &log_file) {
                Ok(()) => Ok(Side::Child(reporter)),
                Err(e) => {
                    reporter.failed(&e);
                    std::process::exit(1)
                }
            }
        }
    }
}

/// The threads of this process that run its code. Older kernels (6.12) pass the driver's control commands to io_uring
/// workers, which linger for seconds and are listed with the threads.
fn threads() -> usize {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return 1 };
    let is_worker = |t: &std::fs::DirEntry| {
        std::fs::read_to_string(t.path().join("comm")).is_ok_and(|name| name.starts_with("iou-wrk-"))
    };
    tasks.filter(|t| !t.as_ref().is_ok_and(is_worker)).count()
}

fn settle(null: &File, log: &File) -> Result<()> {
    let done = setsid()
        .map(drop)
        .and_then(|()| chdir("/"))
        .and_then(|()| dup2_stdin(null))
        .and_then(|()| dup2_stdout(log))
        .and_then(|()| dup2_stderr(log));
    done.map_err(|e| Error::io("becoming a daemon", e.into()))
}

/// What a log warns of, from byte `from` on: each warning once, as far as it can be read.
fn warnings(log: &Path, from: u64) -> Vec<String> {
    let mut text = Vec::new();
    // What cannot be read here still is in the log.
    let _ = File::open(log).and_then(|mut f| {
        f.seek(SeekFrom::Start(from))?;
        f.take(MAX_REPORT).read_to_end(&mut text)
    });
    let mut out: Vec<String> = Vec::new();
    for line in String::from_utf8_lossy(&text).lines() {
        // A time, the level, the words.
        let (_, rest) = line.split_once(' ').unwrap_or_default();
        let (level, words) = rest.trim_start().split_once(' ').unwrap_or_default();
        let words = words.trim_start();
        if level == "WARN" && !out.iter().any(|w| w == words) {
            out.push(words.to_owned());
        }
    }
    out
}

/// Waits for the child's report.
fn heed(pipe: File, child: Pid, log: &Path) -> Result<String> {
    let mut report = String::new();
    let read = pipe.take(MAX_REPORT).read_to_string(&mut report);
    let line = report.strip_suffix('\n').unwrap_or("");
    if let Some(device) = line.strip_prefix("ready ") {
        return Ok(device.to_owned());
    }
    if let Some(why) = line.strip_prefix("failed ") {
        return Err(Error::new(ErrorKind::Io, format!("{why} (log: {})", log.display())));
    }
    let end = match (read, waitpid(child, None)) {
        (Err(e), _) => format!("its report cannot be read: {e}"),
        (_, Ok(WaitStatus::Exited(_, code))) => format!("it exited with code {code}"),
        (_, Ok(WaitStatus::Signaled(_, signal, _))) => format!("it was killed by {signal}"),
        _ => "how it ended is not known".to_owned(),
    };
    let what = format!("the daemon (process {child}) died without a word; {end}: see its log {}", log.display());
    Err(Error::new(ErrorKind::Internal, what))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_starts_a_daemon_is_told_what_it_warns_of() {
        let dir = tempfile::tempdir().expect("a folder");
        let log = dir.path().join("log");
        let old = "2026-11-20T10:00:00.1Z  WARN of yesterday\n";
        let new = "2026-11-21T10:00:00.1Z  INFO all is well\n2026-11-21T10:00:00.2Z  WARN the log was set aside as x\nno line of ours\n\n\
                   2026-11-21T10:00:00.3Z  WARN the log was set aside as x\n2026-11-21T10:00:00.4Z ERROR that is reported\n";
        std::fs::write(&log, format!("{old}{new}")).expect("written");
        assert_eq!(warnings(&log, old.len() as u64), ["the log was set aside as x"]);
        assert!(warnings(&dir.path().join("none"), 0).is_empty());
    }
}
