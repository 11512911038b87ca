//! Where the cache's disk has no room, or a bad place.

use std::io;
use std::sync::atomic::Ordering;

use futures_util::FutureExt;
use uuid::Uuid;

use super::*;
use crate::units::{Epoch, GroupNo, Nonce, Seq};

/// A disk on which nothing is kept; writes at one place fail.
struct Nowhere {
    bad: Option<u64>,
}

impl Disk for Nowhere {
    async fn read_at(&self, _: u64, _: IoBuf) -> io::Result<()> {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
    async fn writev_at(&self, offset: u64, _: Vec<IoBuf>, _: bool) -> io::Result<()> {
        if self.bad == Some(offset) { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
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
        crcs: vec![0; PAGE_BLOCKS],
        masks: Vec::new(),
    };
    let data = vec![0; PAGE_BLOCKS * BLOCK];
    cache.admit(disk, 0, &header, 0, &data, &[]).now_or_never().expect("a disk that answers at once");
}

fn has(cache: &Cache, n: u64) -> bool {
    cache.has(Location::new(0, ChunkNo(n), 0), PAGE_BLOCKS as u16)
}

#[test]
fn a_bad_place_is_not_written_again_while_there_are_others() {
    let dir = tempfile::tempdir().expect("dir");
    let cache = cache(&dir);
    let disk = Nowhere { bad: Some(0) };
    (1..100).for_each(|n| admit(&cache, &disk, n));
    assert_eq!(cache.status().failed_writes, 1);
    assert!(!has(&cache, 1) && (2..100).all(|n| has(&cache, n)));
}

#[test]
fn pages_make_room_for_others_where_the_file_cannot_grow() {
    let dir = tempfile::tempdir().expect("dir");
    let cache = cache(&dir);
    let disk = Nowhere { bad: None };
    (1..=700).for_each(|n| admit(&cache, &disk, n));
    assert!((1..=700).all(|n| has(&cache, n)));
    cache.room.full.store(true, Ordering::Relaxed);
    let size = cache.file().size().expect("size");
    (701..3000).for_each(|n| admit(&cache, &disk, n));
    assert_eq!(cache.file().size().expect("size"), size);
    let new = (2000..3000).filter(|n| has(&cache, *n)).count();
    let all = (1..3000).filter(|n| has(&cache, *n)).count();
    // What is read once passes through a small part of it.
    assert!(new > 5 && all <= 704, "{new} of {all}");
    // And when there is room again.
    cache.room.full.store(false, Ordering::Relaxed);
    (3000..5000).for_each(|n| admit(&cache, &disk, n));
    assert!(cache.file().size().expect("size") > size);
    assert!((4000..5000).filter(|n| has(&cache, *n)).count() > 900);
}
