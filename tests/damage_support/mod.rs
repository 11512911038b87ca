//! Objects of a volume on a file store, to be damaged.

use std::fs;
use std::path::{Path, PathBuf};

use vb_ublk::units::SECTOR;

use crate::volume_support::{Bench, drain, on_lane, put};

/// The objects of a folder of the volume, in order.
pub(crate) fn objects(bench: &Bench, folder: &str) -> Vec<PathBuf> {
    let dir = bench.dir.path().join("store/vol").join(folder);
    let mut all: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    all.retain(|p| !name(p).starts_with('.'));
    all.sort();
    all
}

pub(crate) fn name(p: &Path) -> String {
    p.file_name().unwrap().to_string_lossy().into_owned()
}

pub(crate) fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 0x10;
    fs::write(path, bytes).unwrap();
}

/// Three groups: blocks 0 to 9 hold 1, 10 to 19 hold 2, 20 to 29 hold 3; a chunk each.
pub(crate) fn three_groups(clean: bool) -> Bench {
    let bench = Bench::new(1 << 20);
    let host = bench.attach().unwrap();
    for n in 0..3u8 {
        on_lane(host.volume(), async |e| put(&e, u64::from(n) * 10, 10, n + 1).await);
        drain(host.volume());
    }
    if clean {
        host.detach().unwrap()
    } else {
        host.abandon().unwrap()
    }
    bench.wipe_local();
    assert_eq!(objects(&bench, "chunks").len(), 3);
    bench
}

/// A chunk with blocks 0 to 99, and a group of three chunks over them and more, blocks 0 to 2559; not detached.
pub(crate) fn a_group_of_three() -> Bench {
    // In a large log, a group has room for all of it.
    let bench = Bench { log_bytes: 512 << 20, ..Bench::new(32 << 20) };
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 0, 100, 1).await);
    drain(host.volume());
    on_lane(host.volume(), async |e| {
        for mib in 0..10 {
            put(&e, mib * 256, 256, 2).await;
        }
    });
    drain(host.volume());
    host.abandon().unwrap();
    bench
}

/// Flips a bit in the log's copy of the one block that begins with `mark`.
pub(crate) fn rot(bench: &Bench, mark: &[u8]) {
    let log = fs::read(bench.log()).unwrap();
    let found: Vec<usize> = (0..log.len()).step_by(SECTOR).filter(|at| log[*at..].starts_with(mark)).collect();
    let [at] = found[..] else { panic!("{} copies in the log", found.len()) };
    use std::os::unix::fs::FileExt;
    let file = fs::OpenOptions::new().write(true).open(bench.log()).unwrap();
    file.write_all_at(&[log[at + 40] ^ 1], at as u64 + 40).unwrap();
    file.sync_all().unwrap();
}
