//! Asking a device to stop, from anywhere.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::{Error, Result};

/// Asks for a stop; clones ask the same device. Backed by an eventfd, so a signal handler may write an
/// eight-byte 1 to [`AsFd::as_fd`] itself. Once asked, it stays asked.
#[derive(Debug, Clone)]
pub struct StopHandle(Arc<EventFd>);

impl StopHandle {
    /// A handle that nobody has used.
    ///
    /// # Errors
    /// When the system has no descriptor to give.
    pub fn new() -> Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let fd = EventFd::from_flags(flags).map_err(|e| Error::io("making an eventfd", e.into()))?;
        Ok(Self(Arc::new(fd)))
    }

    /// Asks for a stop. May be called from any thread, and more than once.
    pub fn stop(&self) {
        // Full means asked already.
        let _ = self.0.write(1);
    }

    /// Whether a stop was asked for.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0)
    }
}

impl AsFd for StopHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn once_asked_it_stays_asked() {
        let stop = StopHandle::new().unwrap();
        assert!(!stop.is_stopped());
        stop.clone().stop();
        stop.stop();
        assert!(stop.is_stopped() && stop.is_stopped());
    }
}
