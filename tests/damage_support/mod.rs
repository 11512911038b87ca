//! Objects of a volume on a file store, to be damaged.

use std::fs;
use std::path::{Path, PathBuf};

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
