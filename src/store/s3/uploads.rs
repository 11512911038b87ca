//! Large uploads, on threads of their own: what they cost, in the client, in TLS and in copies to the kernel, would keep the thread that
//! asks for them from packing what comes next.
//!
//! Invariant: an upload ends when nobody waits for it any more.

use std::future::{Future, pending};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::available_parallelism;
use std::time::Duration;

use tokio::runtime::{Builder, Handle};
use tokio::task::JoinHandle;

use crate::error::{Error, ErrorKind, Result};

/// Bodies from this size on go aside, in bytes.
pub(super) const LARGE: usize = 1 << 20;
/// The most threads, for all volumes of the process together; on a machine with few processors half as many as it has.
const THREADS: usize = 4;
/// Stack of a thread, in bytes: memory that is locked, in a daemon.
const STACK: usize = 1 << 20;
/// Threads that look up names, for each of them; they stay for so long.
const LOOKUPS: usize = 2;
const STAY: Duration = Duration::from_secs(3600);

/// Ends an upload when it is dropped.
struct Upload<T>(JoinHandle<T>);

impl<T> Drop for Upload<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Runs an upload on one of the threads; on this one while the system has none to give.
///
/// # Errors
/// When a thread has ended early.
pub(super) async fn aside<T: Send + 'static>(upload: impl Future<Output = T> + Send + 'static) -> Result<T> {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let Some(threads) = threads() else { return Ok(upload.await) };
    let turn = NEXT.fetch_add(1, Ordering::Relaxed) % threads.len();
    let mut upload = Upload(threads[turn].spawn(upload));
    let ended = |e| Error::new(ErrorKind::Internal, "a thread for uploads ended early").with_source(e);
    (&mut upload.0).await.map_err(ended)
}

/// Has the threads started, if they are not: before memory is short, and after the process has become a daemon.
pub(in crate::store) fn prepare() {
    let _ = threads();
}

fn threads() -> Option<&'static [Handle]> {
    static POOL: OnceLock<Vec<Handle>> = OnceLock::new();
    static STARTING: Mutex<()> = Mutex::new(());
    if POOL.get().is_none() {
        let _one = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        if POOL.get().is_none() {
            let count = available_parallelism().map_or(1, |n| n.get() / 2).clamp(1, THREADS);
            let failed = |e: &io::Error| tracing::warn!("starting a thread for uploads: {e}");
            let pool: Vec<_> = (0..count).map_while(|_| start().inspect_err(failed).ok()).collect();
            // Fewer will do; without any it is tried again.
            if !pool.is_empty() {
                let _ = POOL.set(pool);
            }
        }
    }
    POOL.get().map(Vec::as_slice)
}

/// A thread with a runtime. It has the priority of the thread that wants it, and ends with the process.
fn start() -> io::Result<Handle> {
    let mut runtime = Builder::new_current_thread();
    runtime.enable_all().max_blocking_threads(LOOKUPS).thread_stack_size(STACK).thread_keep_alive(STAY);
    let runtime = runtime.build()?;
    let handle = runtime.handle().clone();
    let run = move || runtime.block_on(pending::<()>());
    std::thread::Builder::new().name("vb-uploads".to_owned()).stack_size(STACK).spawn(run)?;
    Ok(handle)
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn an_upload_ends_with_who_waits_for_it() {
        let here = std::thread::current().id();
        assert_ne!(aside(async { std::thread::current().id() }).await.expect("run"), here);
        let (alive, ended) = oneshot::channel::<()>();
        let upload = aside(async move {
            let _alive = alive;
            std::future::pending::<()>().await;
        });
        let gave_up = tokio::time::timeout(Duration::from_millis(50), upload).await;
        assert!(gave_up.is_err());
        let ended = tokio::time::timeout(Duration::from_secs(10), ended).await.expect("it was ended");
        assert!(ended.is_err(), "dropped, not answered");
    }
}
