//! What the machine has for this process.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::unistd::{SysconfVar, sysconf};

/// Where cgroups are.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Memory in bytes: the machine's, or what the process's cgroups (version 2) let it have, where that is less; where nothing is told, that of
/// a small machine. Looked up once.
pub fn memory_bytes() -> u64 {
    static BYTES: OnceLock<u64> = OnceLock::new();
    *BYTES.get_or_init(|| {
        let of = |what| sysconf(what).ok().flatten().and_then(|n| u64::try_from(n).ok());
        let machine = of(SysconfVar::_PHYS_PAGES)
            .zip(of(SysconfVar::PAGE_SIZE))
            .map_or(1 << 30, |(pages, each)| pages.saturating_mul(each));
        machine.min(limit(|path| std::fs::read_to_string(path).ok()).unwrap_or(u64::MAX))
    })
}

/// The least that the process's cgroup or one above it allows, as the files say that `read` reads.
fn limit(read: impl Fn(&Path) -> Option<String>) -> Option<u64> {
    let own = read(Path::new("/proc/self/cgroup"))?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let folder = PathBuf::from(CGROUPS).join(own);
    let above = folder.ancestors().take_while(|f| f.starts_with(CGROUPS));
    above.filter_map(|f| read(&f.join("memory.max"))?.trim().parse().ok()).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_limit_on_the_way_up_counts() {
        let files = |own: &'static str| {
            move |path: &Path| match path.to_str()? {
                "/proc/self/cgroup" => Some(format!("1:cpu:/else\n0::{own}\n")),
                "/sys/fs/cgroup/a/b/memory.max" => Some("max\n".into()),
                "/sys/fs/cgroup/a/memory.max" => Some("1073741824\n".into()),
                "/sys/fs/cgroup/memory.max" => Some("536870912\n".into()),
                "/memory.max" => Some("1\n".into()),
                _ => None,
            }
        };
        assert_eq!(limit(files("/a/b")), Some(512 << 20));
        assert_eq!(limit(files("/")), Some(512 << 20));
        assert_eq!(limit(files("/elsewhere")), Some(512 << 20));
        assert_eq!(limit(|_| None), None);
        assert_eq!(limit(|path| path.ends_with("cgroup").then(|| "1:cpu:/\n".into())), None, "no version 2");
        assert!(memory_bytes() > 64 << 20);
    }
}
