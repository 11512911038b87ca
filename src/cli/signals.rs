//! The signals of a process that serves volumes.
//!
//! Invariant: they are blocked before the first thread starts, and taken from a signalfd: they interrupt no control
//! command of the ublk driver, and no thread but the one that waits for them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use tokio::sync::oneshot;

use crate::error::{Context, Error, Result};

/// SIGTERM, SIGINT and SIGHUP, blocked.
pub(super) struct Signals(SignalFd);

impl Signals {
    /// Before any thread starts: threads inherit what is blocked.
    ///
    /// # Errors
    /// When the system has no descriptor to give.
    pub(super) fn block() -> Result<Self> {
        let mut set = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            set.add(signal);
        }
        set.thread_block()
            .and_then(|()| SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC))
            .map(Self)
            .map_err(|e| Error::io("taking signals from a signalfd", e.into()))
    }

    /// Starts the thread that takes them, and is there when the first one has come. A second one ends the process: whoever cleans up
    /// may wait for a store that is away. `instead` as for [`Self::heed`].
    ///
    /// # Errors
    /// As for [`Self::heed`].
    pub(super) fn first(self, instead: &'static str) -> Result<impl Future<Output = ()> + use<>> {
        let (tell, told) = oneshot::channel();
        let mut tell = Some(tell);
        self.heed(instead, move |_| {
            let Some(first) = tell.take() else {
                super::complain("stopped at once: what was written or uploaded so far is left as it is");
                std::process::exit(1);
            };
            // Nobody waits for it any more: the command is about to end by itself.
            let _ = first.send(());
        })?;
        Ok(async move {
            if told.await.is_err() {
                // No signal can come any more.
                std::future::pending().await
            }
        })
    }

    /// Starts the thread that takes them, and raises the flag with the first one. A second one ends the process, with that for a last
    /// word. `instead` as for [`Self::heed`].
    ///
    /// # Errors
    /// As for [`Self::heed`].
    pub(super) fn flag(self, instead: &'static str, last_word: &'static str) -> Result<Arc<AtomicBool>> {
        let raised = Arc::new(AtomicBool::new(false));
        let raise = raised.clone();
        self.heed(instead, move |_| {
            if raise.swap(true, Ordering::Relaxed) {
                super::complain(last_word);
                std::process::exit(1);
            }
        })?;
        Ok(raised)
    }

    /// Starts the thread that calls `heed` with each, for as long as the process lives. `instead` is how to stop the
    /// process when signals cannot be read, for a line in the log.
    ///
    /// # Errors
    /// When the system has no thread to give.
    pub(super) fn heed(self, instead: &'static str, mut heed: impl FnMut(Signal) + Send + 'static) -> Result<()> {
        let run = move || {
            loop {
                match self.0.read_signal() {
                    Ok(Some(info)) => {
                        let signal = i32::try_from(info.ssi_signo).ok().and_then(|n| Signal::try_from(n).ok());
                        signal.into_iter().for_each(&mut heed);
                    }
                    Ok(None) | Err(Errno::EINTR) => {}
                    Err(e) => {
                        tracing::error!("reading signals: {e}; stop with {instead}");
                        return;
                    }
                }
            }
        };
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(run)
            .map(drop)
            .context(|| "starting the thread that takes signals")
    }
}
