//! The lanes' reads of chunks, on a thread of their own, and what fills the cache beside them.
//!
//! Invariants:
//! - Nobody waits for the cache, or for what is fetched ahead: of both no more than so much is under way, and what does not fit in is left
//!   out.
//! - A write to the cache's disk is awaited, once begun.

use std::collections::VecDeque;
use std::time::Instant;

use futures_util::future::{Either, select};
use futures_util::stream::{self, FuturesUnordered, StreamExt};
use tokio::sync::mpsc;

use super::{ReadRequest, Waiting};
use crate::cache::fetch::{Fetched, Fetcher};
use crate::cache::held::PATIENCE;
use crate::disk::Disk;
use crate::map::Location;

/// Reads of chunks under way at once.
const MAX_READS: usize = 64;
/// Requests under way at once of what is fetched ahead.
const MAX_AHEAD: usize = 16;
/// Those that wait for their turn; what comes beyond is not fetched ahead.
const MAX_AHEAD_WAITING: usize = 512;
/// Fetched ranges that are being written to the cache at once; half of them may have been fetched ahead, up to whole chunks.
const MAX_KEEPING: usize = 16;

/// Serves lanes' reads of chunks, until there are no lanes or the volume is `gone`.
pub async fn serve_reads<D: Disk>(
    mut requests: mpsc::Receiver<ReadRequest>,
    fetcher: &Fetcher<D>,
    gone: impl Future<Output = ()>,
) {
    let mut gone = std::pin::pin!(gone);
    let (mut running, mut running_ahead, mut keeping) =
        (FuturesUnordered::new(), FuturesUnordered::new(), FuturesUnordered::new());
    let (mut ahead, mut packed, mut keeping_packed) = (VecDeque::new(), VecDeque::new(), FuturesUnordered::new());
    let mut held = fetcher.held();
    loop {
        while let Some(next) = held.next(keeping.len() < MAX_KEEPING / 2, Instant::now()) {
            keeping.push(fetcher.keep(next));
        }
        fetcher.holds(&held);
        while running_ahead.len() < MAX_AHEAD
            && !held.is_full()
            && let Some((at, blocks)) = ahead.pop_front()
        {
            running_ahead.push(fetcher.fetch_ahead(at, blocks));
        }
        // One after the other: readers and writers want the disk, too.
        if keeping_packed.is_empty()
            && let Some((chunk, turn)) = packed.pop_front()
        {
            keeping_packed.push(fetcher.keep_packed(chunk, turn));
        }
        tokio::select! {
            () = &mut gone => break,
            Some(fetched) = running.next() => {
                if let Some(fetched) = fetched && keeping.len() < MAX_KEEPING {
                    keeping.push(fetcher.keep(fetched));
                }
            }
            Some(fetched) = running_ahead.next() => fetched.into_iter().for_each(|f| held.push(Instant::now(), f)),
            Some(()) = keeping.next() => {}
            Some(()) = keeping_packed.next() => {}
            () = async { tokio::time::sleep(PATIENCE).await }, if !held.is_empty() => {}
            request = requests.recv(), if running.len() < MAX_READS => {
                let Some(request) = request else { break };
                let (at, blocks, waiting) = match request {
                    ReadRequest::Blocks { at, blocks, waiting } => (at, blocks, waiting),
                    ReadRequest::Packed(chunk, turn) => {
                        packed.push_back((chunk, turn));
                        continue;
                    }
                };
                if let Some(waiting) = waiting {
                    if waiting.reply.is_closed() {
                        continue;
                    }
                    // It is this one's turn now: who waits is not to fetch a part of it a second time.
                    let has_it = |(from, n): &(Location, u16)| {
                        (from.source(), from.chunk()) == (at.source(), at.chunk())
                            && from.index() <= at.index()
                            && at.index() + blocks <= from.index() + n
                    };
                    if let Some((at, blocks)) = ahead.iter().position(has_it).and_then(|i| ahead.remove(i)) {
                        running_ahead.push(fetcher.fetch_ahead(at, blocks));
                    }
                    running.push(serve_read(fetcher, at, blocks, waiting));
                } else if ahead.len() < MAX_AHEAD_WAITING {
                    ahead.push_back((at, blocks));
                }
            }
        }
    }
    if requests.is_closed() {
        while running.next().await.is_some() {}
    }
    stream::iter(held.into_all()).for_each_concurrent(MAX_KEEPING / 2, |f| fetcher.keep(f)).await;
    // The buffers of a write that is not awaited are never freed.
    while keeping.next().await.is_some() || keeping_packed.next().await.is_some() {}
}

async fn serve_read<D: Disk>(fetcher: &Fetcher<D>, at: Location, blocks: u16, waiting: Waiting) -> Option<Fetched> {
    let Waiting { first, mut reply } = waiting;
    let fetched = {
        let fetch = std::pin::pin!(fetcher.fetch(at, first, blocks));
        let gone = std::pin::pin!(reply.closed());
        match select(fetch, gone).await {
            Either::Left((fetched, _)) => Some(fetched),
            // The store may never answer for this one, and others wait for the place.
            Either::Right(_) => None,
        }
    };
    let (answer, fetched) = fetched?;
    // Who has asked may have given up just now.
    let _ = reply.send(answer);
    fetched
}
