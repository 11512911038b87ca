//! Protects the daemon against memory reclaim that waits for the daemon's own device.
//!
//! Without this, writing back dirty pages of our device may need memory that only that write-back can free.

#![allow(unsafe_code)]

use std::io;
use std::time::{Duration, Instant};

use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

use crate::error::{Error, ErrorKind, Result};

/// From `linux/prctl.h`; the libc crate lacks it.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Blocks of memory below this are of the heap: the most that glibc takes.
#[cfg(target_env = "gnu")]
const MMAP_FROM: libc::c_int = 32 << 20;
/// What the heap has free at the start: for headers, maps and lists. Large buffers are mappings of their own.
const RESERVE: usize = 20 << 20;
/// What a daemon takes, about, until it serves: the heap, the queues' buffers, the packer's.
const NEEDED: usize = 96 << 20;
/// How long that may take to be found.
const FIND: Duration = Duration::from_secs(10);
/// Between two looks whether it is.
const BREATH: Duration = Duration::from_millis(5);
/// The bit of CAP_IPC_LOCK, from `linux/capability.h`.
const CAP_IPC_LOCK: u64 = 1 << 14;

/// Has what was freed stay with the process, in one heap for all threads: memory that has gone back to the system may not be had again
/// when it is needed most.
fn keep_heap() {
    #[cfg(target_env = "gnu")]
    for (what, value) in
        [(libc::M_ARENA_MAX, 1), (libc::M_TRIM_THRESHOLD, libc::c_int::MAX), (libc::M_MMAP_THRESHOLD, MMAP_FROM)]
    {
        // SAFETY: takes two numbers, no pointers; no other thread is there yet.
        if unsafe { libc::mallopt(what, value) } != 1 {
            tracing::debug!("mallopt({what}, {value}) is refused");
        }
    }
}

/// Before any thread starts. Marks the process, and so its threads, as one that others' writes wait for; keeps what it has and what it will
/// have in memory; and has it not be chosen when memory runs out. Strict: a refusal is an error, else a warning. `again`: the device is there
/// already, and what is to be written to it may fill the memory.
///
/// # Errors
/// When `strict`, and the process may not.
pub(super) fn process(strict: bool, again: bool) -> Result<()> {
    keep_heap();
    if again {
        find_memory();
    }
    // SAFETY: this option takes one number and no pointers; the unused arguments must be zero.
    let code = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1_u64, 0_u64, 0_u64, 0_u64) };
    let done = if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    weigh(done, strict, "marking the process as an I/O flusher (PR_SET_IO_FLUSHER; needs CAP_SYS_RESOURCE)")?;
    // Without the right to raise the limit, what it allows may do all the same.
    if let Err(e) = setrlimit(Resource::RLIMIT_MEMLOCK, nix::libc::RLIM_INFINITY, nix::libc::RLIM_INFINITY) {
        tracing::debug!("raising RLIMIT_MEMLOCK: {e}");
    }
    let locked = if may_lock_all() {
        mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE).map_err(io::Error::from)
    } else {
        Err(io::Error::from_raw_os_error(libc::EPERM))
    };
    weigh(locked, strict, "locking the process in memory (mlockall; needs CAP_IPC_LOCK or a higher RLIMIT_MEMLOCK)")?;
    // Freed at once, and kept: see `keep_heap`.
    drop(std::hint::black_box(vec![1_u8; RESERVE]));
    let score = std::fs::write("/proc/self/oom_score_adj", "-1000");
    weigh(score, false, "protecting the process from the OOM killer (oom_score_adj; needs CAP_SYS_RESOURCE)")
}

/// Has the system find as much memory as the process will need. For one that is marked it would only wait until there is some; for a child,
/// which is not, it reclaims what it can, and ends a process if it must. What the child had is free when it has ended. Should it wait for the
/// device, which waits for this process, it is left behind; it shares no memory that this process would have to wait for.
fn find_memory() {
    // SAFETY: no other thread is there yet, so the child may do whatever the parent may.
    let child = match unsafe { fork() } {
        Ok(ForkResult::Parent { child }) => child,
        Ok(ForkResult::Child) => {
            // SAFETY: the child uses none of the parent's files; left behind, it must not hold their locks.
            unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
            drop(std::hint::black_box(vec![1_u8; NEEDED]));
            // SAFETY: ends the child; nothing of the parent's is closed or written twice.
            unsafe { libc::_exit(0) }
        }
        Err(e) => {
            tracing::debug!("starting a process that finds memory: {e}");
            return;
        }
    };
    let begun = Instant::now();
    while matches!(waitpid(child, Some(WaitPidFlag::WNOHANG)), Ok(WaitStatus::StillAlive)) {
        if begun.elapsed() >= FIND {
            tracing::warn!("memory is short: {NEEDED} bytes were not found within {} s", FIND.as_secs());
            let _ = kill(child, Signal::SIGKILL);
            return;
        }
        super::pause(BREATH);
    }
}

/// Whether what is mapped later can be locked, too: else a lock of all that is to come would have allocations fail.
fn may_lock_all() -> bool {
    let unlimited = getrlimit(Resource::RLIMIT_MEMLOCK).is_ok_and(|(soft, _)| soft == nix::libc::RLIM_INFINITY);
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|l| u64::from_str_radix(l.strip_prefix("CapEff:")?.trim(), 16).ok());
    unlimited || effective.is_some_and(|c| c & CAP_IPC_LOCK != 0)
}

fn weigh(done: io::Result<()>, strict: bool, what: &str) -> Result<()> {
    match done {
        Err(e) if strict => {
            Err(Error::new(ErrorKind::Denied, format!("{what} failed, and --strict wants it")).with_source(e))
        }
        Err(e) => {
            tracing::warn!("{what} failed: {e}; under memory pressure the device may hang");
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strict_turns_a_warning_into_an_error() {
        let no = || Err(io::Error::from_raw_os_error(libc::EPERM));
        assert!(weigh(no(), false, "x").is_ok());
        assert_eq!(weigh(no(), true, "x").expect_err("strict").kind(), ErrorKind::Denied);
        assert!(weigh(Ok(()), true, "x").is_ok());
    }
}
