//! Runs are fetched some ahead of the reader, so that a distant bucket costs its bandwidth and not a round trip per run.
//!
//! Invariants:
//! - At most [`MAX_FETCHES`] runs are under way or held, and no more once they have [`MAX_BYTES`].
//! - What could not be read is never taken for zeros: a run that has failed goes on failing.
//! - The first run of a chunk that is fetched brings the chunk's first bytes, which are checked: a header, or none.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use tokio::task::JoinHandle;

use super::chain::chunk_key;
use super::codec::{self, CHUNK_HEAD, Cipher};
use super::config::encrypted;
use super::map::{Origin, Run};
use super::wal;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::store::Store;
use crate::units::BLOCK;

const MAX_FETCHES: usize = 16;
const MAX_BYTES: u64 = 32 << 20;

/// See the module's page.
#[derive(Debug)]
pub(super) struct Ahead {
    store: Arc<dyn Store>,
    origins: Vec<Origin>,
    /// All of the image's, in order.
    runs: Vec<Run>,
    /// The first run not fetched yet.
    next: usize,
    fetches: VecDeque<Fetch>,
    /// Chunks whose header was asked for: origin and number.
    checked: HashSet<(usize, u64)>,
    /// Nothing before this byte can be read any more.
    from: u64,
}

#[derive(Debug)]
struct Fetch {
    run: Run,
    state: State,
}

#[derive(Debug)]
enum State {
    UnderWay(JoinHandle<Result<Bytes>>),
    Here(Bytes),
    Failed(ErrorKind, String),
}

impl Drop for Fetch {
    fn drop(&mut self) {
        if let State::UnderWay(task) = &self.state {
            task.abort();
        }
    }
}

impl Fetch {
    async fn bytes(&mut self) -> Result<&[u8]> {
        if let State::UnderWay(task) = &mut self.state {
            let got = match task.await {
                Ok(got) => got,
                Err(e) => Err(Error::new(ErrorKind::Internal, "fetching ahead").with_source(e)),
            };
            self.state = match got {
                Ok(b) if b.len() == self.run.blocks as usize * BLOCK => State::Here(b),
                Ok(b) => State::Failed(ErrorKind::Internal, format!("{} bytes came for {:?}", b.len(), self.run)),
                Err(e) => State::Failed(e.kind(), e.to_string()),
            };
        }
        match &self.state {
            State::Here(b) => Ok(b),
            State::Failed(kind, why) => Err(Error::new(*kind, why.clone())),
            State::UnderWay(_) => Err(Error::new(ErrorKind::Internal, "a fetch is neither here nor failed")),
        }
    }
}

impl Ahead {
    pub(super) fn new(store: Arc<dyn Store>, origins: Vec<Origin>, runs: Vec<Run>) -> Self {
        Self { store, origins, runs, next: 0, fetches: VecDeque::new(), checked: HashSet::new(), from: 0 }
    }

    pub(super) fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Fills `buf` with the bytes from `at`.
    pub(super) async fn read(&mut self, at: u64, buf: &mut [u8]) -> Result<()> {
        if at < self.from {
            let why = format!("reading at byte {at} after byte {}: an image is read from front to back", self.from);
            return Err(Error::new(ErrorKind::Internal, why));
        }
        self.from = at;
        buf.fill(0);
        let (block, end) = (BLOCK as u64, at.saturating_add(buf.len() as u64));
        while self.fetches.front().is_some_and(|f| f.run.end() * block <= at) {
            self.fetches.pop_front();
        }
        if self.fetches.is_empty() {
            self.next += self.runs[self.next..].partition_point(|r| r.end() * block <= at);
        }
        // What `buf` spans may be more than may be held: then its first runs go while its last ones come.
        let mut n = 0;
        loop {
            if n == self.fetches.len() && n > 0 && self.is_full() {
                // Gone for good: to ask for it again would be to be told zeros.
                self.from = self.fetches.pop_front().map_or(self.from, |f| f.run.end() * block);
                n -= 1;
            }
            self.fetch();
            let Some(f) = self.fetches.get_mut(n) else { break };
            let (first, last) = ((f.run.block * block).max(at), (f.run.end() * block).min(end));
            if first >= end {
                break;
            }
            let skip = (first - f.run.block * block) as usize;
            let into = &mut buf[(first - at) as usize..(last - at) as usize];
            into.copy_from_slice(&f.bytes().await?[skip..skip + into.len()]);
            n += 1;
        }
        Ok(())
    }

    fn is_full(&self) -> bool {
        let held: u64 = self.fetches.iter().map(|f| u64::from(f.run.blocks) * BLOCK as u64).sum();
        self.fetches.len() >= MAX_FETCHES || held >= MAX_BYTES
    }

    /// Sends for as many runs as may be under way.
    fn fetch(&mut self) {
        while !self.is_full()
            && let Some(run) = self.runs.get(self.next).copied()
        {
            let state = match &self.origins[run.origin] {
                Origin::Log(path) => {
                    let path = path.clone();
                    State::UnderWay(tokio::task::spawn_blocking(move || {
                        wal::read(&path, run.at, run.block, run.blocks)
                    }))
                }
                Origin::Chunks { volume, .. } => {
                    let check = self.checked.insert((run.origin, run.object));
                    let (store, key) = (self.store.clone(), chunk_key(volume, run.object));
                    State::UnderWay(tokio::spawn(async move {
                        let what = || format!("reading {} blocks from block {} on from {key}", run.blocks, run.block);
                        from_chunk(&*store, &key, run, check).await.context(what)
                    }))
                }
            };
            self.fetches.push_back(Fetch { run, state });
            self.next += 1;
        }
    }
}

/// Reads a run, and before it, if `check`, where the chunk's header is or would be: in one request where they lie together.
async fn from_chunk(store: &dyn Store, key: &str, run: Run, check: bool) -> Result<Bytes> {
    let end = run.at + u64::from(run.blocks) * BLOCK as u64;
    let head = if run.header { CHUNK_HEAD } else { 0 };
    if !check {
        return store.get_range(key, run.at..end).await;
    }
    if run.at == head as u64 {
        let both = store.get_range(key, 0..end).await?;
        check_head(&both, run.header)?;
        return Ok(both.slice(head..));
    }
    let first = store.get_range(key, 0..CHUNK_HEAD as u64);
    let (first, data) = futures_util::future::try_join(first, store.get_range(key, run.at..end)).await?;
    check_head(&first, run.header)?;
    Ok(data)
}

/// Refuses what is not a plain chunk, with the header that its size promises or without one.
pub(super) fn check_head(bytes: &[u8], header: bool) -> Result<()> {
    match (codec::chunk_head(bytes), header) {
        (Ok(Cipher::Encrypted), _) => Err(encrypted()),
        (Ok(Cipher::Plain), true) | (Err(_), false) => Ok(()),
        (Err(e), true) => Err(e.into()),
        // Its blocks would all be read 10 bytes off. (The block of a chunk without a header may begin so by chance: then this
        // refuses a sound volume that has Viperblock's chunks in its own files.)
        (Ok(Cipher::Plain), false) => Err(Error::new(
            ErrorKind::Corrupt,
            "the chunk has a header, and the size of one that has none: it is cut short; restore it from a copy",
        )),
    }
}
