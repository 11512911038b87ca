//! Protects the daemon against memory reclaim that waits for the daemon's own device.
//!
//! Without this, writing back dirty pages of our device may need memory that only that write-back can free.

#![allow(unsafe_code)]

use std::io;

use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::resource::{Resource, setrlimit};

use crate::error::{Error, ErrorKind, Result};

/// From `linux/prctl.h`; the libc crate lacks it.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Before any thread starts: threads inherit the mark. Strict: a refusal is an error, else a warning.
///
/// # Errors
/// When `strict`, and the process may not.
pub(super) fn io_flusher(strict: bool) -> Result<()> {
    // SAFETY: this option takes one number and no pointers; the unused arguments must be zero.
    let code = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1_u64, 0_u64, 0_u64, 0_u64) };
    let done = if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    weigh(done, strict, "marking the process as an I/O flusher (PR_SET_IO_FLUSHER; needs CAP_SYS_RESOURCE)")
}

/// When all is set up: keeps what is there and what will come in memory, and the process from being chosen when
/// memory runs out.
///
/// # Errors
/// When `strict`, and the process may not.
pub(super) fn memory(strict: bool) -> Result<()> {
    // Without the right to raise the limit, what it allows may do all the same.
    if let Err(e) = setrlimit(Resource::RLIMIT_MEMLOCK, nix::libc::RLIM_INFINITY, nix::libc::RLIM_INFINITY) {
        tracing::debug!("raising RLIMIT_MEMLOCK: {e}");
    }
    let locked = mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE).map_err(io::Error::from);
    weigh(locked, strict, "locking the process in memory (mlockall; needs CAP_IPC_LOCK or a higher RLIMIT_MEMLOCK)")?;
    let score = std::fs::write("/proc/self/oom_score_adj", "-1000");
    weigh(score, false, "protecting the process from the OOM killer (oom_score_adj; needs CAP_SYS_RESOURCE)")
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
