//! The lanes' reads of chunks, on a thread of their own, and what fills the cache beside them.
//!
//! Invariants:
//! - Nobody waits for the cache. Of what is fetched ahead, and of what is written to the cache, no more than so much is under way; what does
//!   not fit in is left out.
//! - A write to the cache's disk is awaited, once begun.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use futures_util::future::{Either, select};
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::mpsc;

use super::{ReadRequest, Waiting};
use crate::cache::fetch::{Fetched, Fetcher};
use crate::cache::held::{Held, PATIENCE};
use crate::disk::Disk;
use crate::map::Location;
use crate::units::BLOCK;

/// Reads of chunks under way at once.
const MAX_READS: usize = 64;
/// Requests under way at once of what is fetched ahead, and with how many it begins.
const MAX_AHEAD: usize = 16;
const FIRST_AHEAD: usize = 4;
/// One that takes longer makes them half as many; one that takes less than a fourth of it allows one more.
const SLOW_AHEAD: Duration = Duration::from_secs(2);
/// Those that wait for their turn; what comes beyond is not fetched ahead.
const MAX_AHEAD_WAITING: usize = 512;
/// Ranges that are being written to the cache at once: of those that somebody has waited for, and of those that were fetched ahead, which
/// are larger.
const MAX_KEEPING: usize = 16;
const MAX_KEEPING_AHEAD: usize = 4;

/// Where something is, and how many blocks.
type Place = (Location, u16);

/// Serves lanes' reads of chunks, until there are no lanes or the volume is `gone`.
pub async fn serve_reads<D: Disk>(
    mut requests: mpsc::Receiver<ReadRequest>,
    fetcher: &Fetcher<D>,
    gone: impl Future<Output = ()>,
) {
    let mut gone = std::pin::pin!(gone);
    let (mut running, mut keeping) = (FuturesUnordered::new(), FuturesUnordered::new());
    let (mut running_ahead, mut keeping_ahead) = (FuturesUnordered::new(), FuturesUnordered::new());
    let (mut packed, mut keeping_packed) = (VecDeque::new(), FuturesUnordered::new());
    let (mut ahead, mut held, mut at_once) = (VecDeque::<Place>::new(), fetcher.held(), FIRST_AHEAD);
    loop {
        while let Some(next) = held.next(keeping_ahead.len() < MAX_KEEPING_AHEAD, Instant::now()) {
            let bytes = next.bytes();
            let keep = fetcher.keep(next);
            keeping_ahead.push(async move {
                keep.await;
                bytes
            });
        }
        fetcher.holds(&held);
        while running_ahead.len() < at_once
            && !held.is_full()
            && let Some(place) = ahead.pop_front()
        {
            running_ahead.push(run_ahead(fetcher, &mut held, place));
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
            Some((took, bytes, fetched)) = running_ahead.next() => {
                at_once = next_at_once(at_once, took);
                held.came(bytes, Instant::now(), fetched);
                // Checking it has taken a while, and this thread has others to serve.
                tokio::task::yield_now().await;
            }
            Some(()) = keeping.next() => {}
            Some(bytes) = keeping_ahead.next() => held.left(bytes),
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
                    if !held.is_full()
                        && let Some(place) = take_out(&mut ahead, at, blocks)
                    {
                        running_ahead.push(run_ahead(fetcher, &mut held, place));
                    }
                    running.push(serve_read(fetcher, at, blocks, waiting));
                } else if ahead.len() < MAX_AHEAD_WAITING {
                    ahead.push_back((at, blocks));
                }
            }
        }
    }
    // What is only held is let go of: nobody is to wait for it now.
    if requests.is_closed() {
        while running.next().await.is_some() {}
    }
    // The buffers of a write that is not awaited are never freed.
    while keeping.next().await.is_some()
        || keeping_ahead.next().await.is_some()
        || keeping_packed.next().await.is_some()
    {}
}

/// Begins a request of what is fetched ahead: how long it takes, how many bytes it was to be, and what comes of it.
fn run_ahead<'a, D: Disk>(
    fetcher: &'a Fetcher<D>,
    held: &mut Held,
    (at, blocks): Place,
) -> impl Future<Output = (Duration, u64, Option<Fetched>)> + use<'a, D> {
    let bytes = u64::from(blocks) * BLOCK as u64;
    held.begin(bytes);
    let (begun, fetch) = (Instant::now(), fetcher.fetch_ahead(at, blocks));
    async move {
        let fetched = fetch.await;
        (begun.elapsed(), bytes, fetched)
    }
}

/// How many requests there may be at once after one that took so long: a slow store, or a narrow line, is not made to answer all of them
/// late.
fn next_at_once(now: usize, took: Duration) -> usize {
    if took > SLOW_AHEAD {
        (now / 2).max(1)
    } else if took < SLOW_AHEAD / 4 {
        (now + 1).min(MAX_AHEAD)
    } else {
        now
    }
}

/// Takes out the one that has all these blocks.
fn take_out(ahead: &mut VecDeque<Place>, at: Location, blocks: u16) -> Option<Place> {
    let has_them = |(from, n): &Place| {
        (from.source(), from.chunk()) == (at.source(), at.chunk())
            && from.index() <= at.index()
            && at.index() + blocks <= from.index() + n
    };
    ahead.iter().position(has_them).and_then(|i| ahead.remove(i))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::ChunkNo;

    #[test]
    fn a_slow_store_is_asked_for_less_at_once() {
        let after = |now, millis| next_at_once(now, Duration::from_millis(millis));
        assert_eq!((after(FIRST_AHEAD, 20), after(MAX_AHEAD, 20), after(8, 1000)), (FIRST_AHEAD + 1, MAX_AHEAD, 8));
        assert_eq!((after(16, 2001), after(3, 60_000), after(1, 60_000)), (8, 1, 1));
    }

    #[test]
    fn only_what_has_all_of_it_is_taken_out() {
        let at = |chunk, index| Location::new(0, ChunkNo(chunk), index);
        let mut ahead = VecDeque::from([(at(1, 0), 100), (at(2, 100), 900), (at(2, 50), 20)]);
        for (chunk, index, blocks) in [(1, 99, 2), (2, 99, 2), (2, 990, 16), (3, 100, 1), (2, 70, 1)] {
            assert_eq!(take_out(&mut ahead, at(chunk, index), blocks), None, "{chunk} {index} {blocks}");
        }
        assert_eq!(take_out(&mut ahead, at(2, 984), 16), Some((at(2, 100), 900)));
        assert_eq!(take_out(&mut ahead, at(2, 984), 16), None);
        assert_eq!((take_out(&mut ahead, at(1, 0), 100), ahead.len()), (Some((at(1, 0), 100)), 1));
    }
}
