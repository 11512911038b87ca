//! Whether a folder or device lies on a ublk device: a write-ahead log there would wait for itself.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use nix::libc::dev_t;
use nix::sys::stat::{major, minor};

/// More devices than this below one device are not followed.
const MAX_DEVICES: usize = 256;

/// The ublk device that device `dev` is, is a partition of, or lies on (device mapper, md, loop), as `sys`
/// (`/sys`) tells. File systems with device numbers of their own (btrfs, overlay) are not seen through.
pub(super) fn ublk_below(sys: &Path, dev: dev_t) -> Option<String> {
    let mut todo = vec![sys.join(format!("dev/block/{}:{}", major(dev), minor(dev)))];
    let mut seen = HashSet::new();
    while let Some(path) = todo.pop() {
        let Ok(path) = fs::canonicalize(path) else { continue };
        if seen.len() >= MAX_DEVICES || !seen.insert(path.clone()) {
            continue;
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with("ublkb") {
            return Some(format!("/dev/{name}"));
        }
        // A partition's parent folder is the whole device.
        if path.join("partition").exists() {
            todo.extend(path.parent().map(Path::to_owned));
        }
        if let Ok(below) = fs::read_dir(path.join("slaves")) {
            todo.extend(below.flatten().map(|e| e.path()));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use nix::sys::stat::makedev;

    use super::*;

    #[test]
    fn it_sees_through_partitions_and_mapped_devices() {
        let dir = tempfile::tempdir().expect("dir");
        let sys = dir.path();
        let device = |path: &str, number: &str| {
            fs::create_dir_all(sys.join("devices").join(path).join("slaves")).expect("device");
            fs::create_dir_all(sys.join("dev/block")).expect("dev");
            symlink(sys.join("devices").join(path), sys.join("dev/block").join(number)).expect("link");
        };
        device("ublkb3", "259:3");
        device("ublkb3/ublkb3p1", "259:4");
        fs::write(sys.join("devices/ublkb3/ublkb3p1/partition"), "1").expect("partition");
        device("dm-0", "253:0");
        symlink(sys.join("devices/ublkb3/ublkb3p1"), sys.join("devices/dm-0/slaves/ublkb3p1")).expect("slave");
        device("nvme0n1", "259:0");
        device("nvme0n1/nvme0n1p1", "259:1");
        fs::write(sys.join("devices/nvme0n1/nvme0n1p1/partition"), "1").expect("partition");
        device("dm-1", "253:1");
        symlink(sys.join("devices/nvme0n1"), sys.join("devices/dm-1/slaves/nvme0n1")).expect("slave");
        symlink(sys.join("devices/dm-1"), sys.join("devices/dm-1/slaves/loop")).expect("circle");

        let below = |major, minor| ublk_below(sys, makedev(major, minor));
        assert_eq!(below(259, 3).as_deref(), Some("/dev/ublkb3"));
        assert_eq!(below(259, 4).as_deref(), Some("/dev/ublkb3p1"));
        assert_eq!(below(253, 0).as_deref(), Some("/dev/ublkb3p1"));
        assert_eq!(below(259, 1), None);
        assert_eq!(below(253, 1), None);
        assert_eq!(below(7, 7), None);
    }
}
