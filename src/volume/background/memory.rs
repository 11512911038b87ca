//! Whether memory is so short that whatever is not there yet may never come.
//!
//! The pages that fill a machine may be those that wait to be written to this very volume: what packing them needs has to be there before.
//! So a process that serves a device of this machine keeps a few chunks' buffers ([`RESERVED_BODIES`], beside what may wait for the
//! cache), and while memory is short a group takes no more than those, and there is one at a time.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// Chunks' buffers that are there from the start.
pub(super) const RESERVED_BODIES: usize = 6;
/// Data of a group while memory is short, in bytes of log: with its last chunk, which is not full, it takes one buffer less than that.
pub(super) const SHORT_GROUP_BYTES: u64 = 16 << 20;
/// Memory is short when less than this could be had at once…
const SHORT_BYTES: u64 = 96 << 20;
/// …or less than this part of all there is, in a small machine.
const SHORT_PART: u64 = 5;

/// Looks at the system's memory.
pub(super) struct Memory {
    /// Kept open, as is what the kernel keeps for it.
    meminfo: Option<File>,
    buf: Vec<u8>,
}

impl Memory {
    /// One that looks.
    pub(super) fn watched() -> Self {
        let meminfo = File::open("/proc/meminfo");
        if let Err(e) = &meminfo {
            tracing::warn!("opening /proc/meminfo: {e}: nobody will know when memory is short");
        }
        Self { meminfo: meminfo.ok(), buf: vec![0; 8192] }
    }

    /// One for which there is always enough.
    pub(super) const fn plenty() -> Self {
        Self { meminfo: None, buf: Vec::new() }
    }

    /// Whether memory is short now.
    pub(super) fn is_short(&mut self) -> bool {
        let Some(file) = &self.meminfo else { return false };
        let Ok(n) = file.read_at(&mut self.buf, 0) else { return false };
        let text = String::from_utf8_lossy(&self.buf[..n]);
        says_short(&text)
    }
}

/// What can be had at once is what is free, and the pages of files that are not waiting to be written.
fn says_short(meminfo: &str) -> bool {
    let kib = |name: &str| {
        let line = meminfo.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|l| l.trim().split(' ').next()?.parse::<u64>().ok())
    };
    let field = |name| kib(name).unwrap_or(0);
    let (Some(total), Some(free)) = (kib("MemTotal"), kib("MemFree")) else { return false };
    let files = field("Active(file)") + field("Inactive(file)");
    let clean = files.saturating_sub(field("Dirty") + field("Writeback"));
    ((free + clean) << 10) < SHORT_BYTES.min((total << 10) / SHORT_PART)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dirty_pages_are_no_memory() {
        let text = |free: u64, file: u64, dirty: u64| {
            format!(
                "MemTotal:         469000 kB\nMemFree:    {free} kB\nMemAvailable:   1 kB\nActive(file):  {file} kB\nInactive(file): 20000 kB\n\
                 Dirty:  {dirty} kB\nWriteback:   900 kB\n"
            )
        };
        assert!(!says_short(&text(200_000, 1000, 500)));
        assert!(!says_short(&text(8000, 250_000, 20_000)));
        assert!(says_short(&text(8000, 250_000, 260_000)));
        assert!(says_short(&text(8000, 0, 0)));
        assert!(!says_short("MemTotal: 1 kB\n"), "nobody knows");
        assert!(!says_short(""));
    }

    #[test]
    fn what_is_looked_at_is_there() {
        let mut m = Memory::watched();
        let _ = m.is_short();
        let text = String::from_utf8_lossy(&m.buf);
        assert!(["MemTotal:", "MemFree:", "Active(file):", "Dirty:", "Writeback:"].iter().all(|f| text.contains(f)));
        assert!(!Memory::plenty().is_short());
    }
}
