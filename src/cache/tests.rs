//! Where the cache's disk has no room, or a bad place.

use std::io;
use std::sync::atomic::Ordering;

use futures_util::FutureExt;
use uuid::Uuid;

use super::*;
use crate::chunk::header::ChunkHeader;
use crate::units::{Epoch, GroupNo, Nonce, Seq};

/// A disk on which nothing is kept; writes that touch one place fail. It tells where it was written, and how much at once.
#[derive(Default)]
struct Nowhere {
    bad: Option<u64>,
    writes: Mutex<Vec<Range<u64>>>,
}

impl Disk for Nowhere {
    async fn read_at(&self, _: u64, _: IoBuf) -> io::Result<()> {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
    async fn writev_at(&self, offset: u64, bufs: Vec<IoBuf>, _: bool) -> io::Result<()> {
        let range = offset..offset + bufs.iter().map(|b| b.len() as u64).sum::<u64>();
        let is_bad = self.bad.is_some_and(|bad| range.contains(&bad));
        self.writes.lock().expect("the lock").push(range);
        if is_bad { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
    }
    async fn sync(&self) -> io::Result<()> {
        unreachable!("nothing is ever synced")
    }
}

fn cache(dir: &tempfile::TempDir) -> Cache {
    let path = dir.path().join("v.cache");
    Cache::open(&Place { path, bytes: 8 * MIN_BYTES }).expect("a cache")
}

/// A page of chunk `n`.
fn admit(cache: &Cache, disk: &Nowhere, n: u64) {
    admit_pages(cache, disk, n, 1);
}

fn admit_pages(cache: &Cache, disk: &Nowhere, n: u64, pages: usize) {
    let header = ChunkHeader {
        volume: Uuid::from_u128(1),
        chunk: ChunkNo(n),
        epoch: Epoch(1),
        nonce: Nonce(2),
        after: Seq(0),
        through: Seq(1),
        group: GroupNo(n),
        index: 0,
        count: 1,
        applied_through: GroupNo(0),
        extents: Vec::new(),
        crcs: vec![0; pages * PAGE_BLOCKS],
        masks: Vec::new(),
    };
    let data = vec![0; pages * PAGE_BLOCKS * BLOCK];
    cache.admit(disk, 0, &header, 0, &data, &[]).now_or_never().expect("a disk that answers at once");
}

fn has(cache: &Cache, n: u64) -> bool {
    cache.has(Location::new(0, ChunkNo(n), 0), PAGE_BLOCKS as u16)
}

#[test]
fn a_bad_place_is_not_written_again_while_there_are_others() {
    let dir = tempfile::tempdir().expect("dir");
    let cache = cache(&dir);
    let disk = Nowhere { bad: Some(0), ..Nowhere::default() };
    (1..100).for_each(|n| admit(&cache, &disk, n));
    assert_eq!(cache.status().failed_writes, 1);
    assert!(!has(&cache, 1) && (2..100).all(|n| has(&cache, n)));
}

#[test]
fn pages_side_by_side_are_one_write_and_a_bad_place_is_of_one_page() {
    let dir = tempfile::tempdir().expect("dir");
    let cache = cache(&dir);
    let disk = Nowhere { bad: Some(3 * SLOT_BYTES + 5), ..Nowhere::default() };
    admit_pages(&cache, &disk, 1, 20);
    let mut writes = std::mem::take(&mut *disk.writes.lock().expect("the lock"));
    writes.sort_unstable_by_key(|w| (w.start, w.end));
    let slots = |from: u64, to: u64| from * SLOT_BYTES..to * SLOT_BYTES;
    let alone = (1..8).map(|n| slots(n, n + 1));
    let want: Vec<_> =
        [slots(0, 1), slots(0, 8)].into_iter().chain(alone).chain([slots(8, 16), slots(16, 20)]).collect();
    assert_eq!(writes, want, "after the failure each page alone");
    assert_eq!(cache.status().failed_writes, 1);
    assert_eq!(cache.status().written_bytes, 19 * SLOT_BYTES);
    let page = |n: u16| Location::new(0, ChunkNo(1), n * PAGE_BLOCKS as u16);
    assert!((0..20).all(|n| cache.has(page(n), PAGE_BLOCKS as u16) == (n != 3)));
}

#[test]
fn pages_make_room_for_others_where_the_file_cannot_grow() {
    let dir = tempfile::tempdir().expect("dir");
    let cache = cache(&dir);
    let disk = Nowhere::default();
    (1..=700).for_each(|n| admit(&cache, &disk, n));
    assert!((1..=700).all(|n| has(&cache, n)));
    cache.room.spare.store(0, Ordering::Relaxed);
    let size = cache.file().size().expect("size");
    (701..3000).for_each(|n| admit(&cache, &disk, n));
    assert_eq!(cache.file().size().expect("size"), size);
    let new = (2000..3000).filter(|n| has(&cache, *n)).count();
    let all = (1..3000).filter(|n| has(&cache, *n)).count();
    // What is read once passes through a small part of it.
    assert!(new > 5 && all as u64 <= size / SLOT_BYTES, "{new} of {all}");
    // And when there is room again.
    cache.room.spare.store(u64::MAX, Ordering::Relaxed);
    (3000..5000).for_each(|n| admit(&cache, &disk, n));
    assert!(cache.file().size().expect("size") > size);
    assert!((4000..5000).filter(|n| has(&cache, *n)).count() > 900);
}
