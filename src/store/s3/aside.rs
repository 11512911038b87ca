//! Large bodies, on threads of their own: what they cost, in the client, in TLS and in copies to and from the kernel, would keep the thread
//! that asks for them from packing what comes next, or from handing out what has come.
//!
//! Invariant: a transfer ends when nobody waits for it any more.

use std::future::{Future, pending};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};
use std::thread::available_parallelism;
use std::time::Duration;

use tokio::runtime::{Builder, Handle};
use tokio::task::JoinHandle;

use crate::error::{Error, ErrorKind, Result};

/// Bodies from this size on go aside, in bytes.
pub(super) const LARGE: u64 = 1 << 20;
/// The most threads, for all volumes of the process together; on a machine with few processors half as many as it has.
const THREADS: usize = 4;
/// Stack of a thread, in bytes: memory that is locked, in a daemon.
const STACK: usize = 1 << 20;
/// Threads that look up names, for each of them; they stay for so long.
const LOOKUPS: usize = 2;
const STAY: Duration = Duration::from_secs(3600);

/// Bodies that are sent.
pub(in crate::store) static UPLOADS: Threads = Threads::new("vb-uploads");
/// Bodies that are fetched for somebody who may wait for them, so that they have threads of another priority.
pub(in crate::store) static FETCHES: Threads = Threads::new("vb-fetches");

/// Ends a transfer when it is dropped.
struct Transfer<T>(JoinHandle<T>);

impl<T> Drop for Transfer<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Threads with a runtime each, started once. They have the priority of the thread that wants them first, and end with the process.
pub(in crate::store) struct Threads {
    name: &'static str,
    all: OnceLock<Vec<Handle>>,
    starting: Mutex<()>,
    next: AtomicUsize,
}

impl Threads {
    const fn new(name: &'static str) -> Self {
        Self { name, all: OnceLock::new(), starting: Mutex::new(()), next: AtomicUsize::new(0) }
    }

    /// Runs a transfer on one of the threads; on this one while the system has none to give.
    ///
    /// # Errors
    /// When a thread has ended early.
    pub(super) async fn run<T: Send + 'static>(&self, transfer: impl Future<Output = T> + Send + 'static) -> Result<T> {
        let Some(threads) = self.started() else { return Ok(transfer.await) };
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % threads.len();
        let mut transfer = Transfer(threads[turn].spawn(transfer));
        let ended = |e| Error::new(ErrorKind::Internal, format!("a thread {} ended early", self.name)).with_source(e);
        (&mut transfer.0).await.map_err(ended)
    }

    /// Has the threads started, if they are not: before memory is short, and after the process has become a daemon.
    pub(in crate::store) fn prepare(&self) {
        let _ = self.started();
    }

    fn started(&self) -> Option<&[Handle]> {
        if self.all.get().is_none() {
            let _one = self.starting.lock().unwrap_or_else(PoisonError::into_inner);
            if self.all.get().is_none() {
                let count = available_parallelism().map_or(1, |n| n.get() / 2).clamp(1, THREADS);
                let failed = |e: &io::Error| tracing::warn!("starting a thread {}: {e}", self.name);
                let all: Vec<_> = (0..count).map_while(|_| self.start().inspect_err(failed).ok()).collect();
                // Fewer will do; without any it is tried again.
                if !all.is_empty() {
                    let _ = self.all.set(all);
                }
            }
        }
        self.all.get().map(Vec::as_slice)
    }

    fn start(&self) -> io::Result<Handle> {
        let (told, made) = mpsc::channel();
        // Made there: a runtime must not be dropped where another one runs, as it would be here if there were no thread to be had.
        let run = move || {
            let mut runtime = Builder::new_current_thread();
            runtime.enable_all().max_blocking_threads(LOOKUPS).thread_stack_size(STACK).thread_keep_alive(STAY);
            match runtime.build() {
                Ok(runtime) => {
                    let _ = told.send(Ok(runtime.handle().clone()));
                    runtime.block_on(pending::<()>());
                }
                Err(e) => drop(told.send(Err(e))),
            }
        };
        std::thread::Builder::new().name(self.name.to_owned()).stack_size(STACK).spawn(run)?;
        made.recv().map_err(io::Error::other)?
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn a_transfer_ends_with_who_waits_for_it() {
        let here = std::thread::current().id();
        assert_ne!(UPLOADS.run(async { std::thread::current().id() }).await.expect("run"), here);
        let (alive, ended) = oneshot::channel::<()>();
        let upload = UPLOADS.run(async move {
            let _alive = alive;
            std::future::pending::<()>().await;
        });
        let gave_up = tokio::time::timeout(Duration::from_millis(50), upload).await;
        assert!(gave_up.is_err());
        let ended = tokio::time::timeout(Duration::from_secs(10), ended).await.expect("it was ended");
        assert!(ended.is_err(), "dropped, not answered");
    }
}
