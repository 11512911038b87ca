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
/// Memory that one can do without is had only while there is so much more, and given back when there is not.
const PLENTY_BYTES: u64 = 3 * SHORT_BYTES;

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
        self.look().is_some_and(|m| m.is_short())
    }

    /// Whether so many bytes could be had and memory would be far from short.
    pub(super) fn is_plenty(&mut self, beside: u64) -> bool {
        self.look().is_none_or(|m| m.at_hand >= PLENTY_BYTES + beside)
    }

    /// `None`: nobody knows.
    fn look(&mut self) -> Option<Look> {
        let n = self.meminfo.as_ref()?.read_at(&mut self.buf, 0).ok()?;
        Look::of(&String::from_utf8_lossy(&self.buf[..n]))
    }
}

/// What there is, in bytes.
struct Look {
    total: u64,
    /// What can be had at once: what is free, and the pages of files that are not waiting to be written.
    at_hand: u64,
}

impl Look {
    fn is_short(&self) -> bool {
        self.at_hand < SHORT_BYTES.min(self.total / SHORT_PART)
    }

    fn of(meminfo: &str) -> Option<Self> {
        let kib = |name: &str| {
            let line = meminfo.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|l| l.trim().split(' ').next()?.parse::<u64>().ok())
        };
        let field = |name| kib(name).unwrap_or(0);
        let (total, free) = (kib("MemTotal")?, kib("MemFree")?);
        let files = field("Active(file)") + field("Inactive(file)");
        let clean = files.saturating_sub(field("Dirty") + field("Writeback"));
        Some(Self { total: total << 10, at_hand: (free + clean) << 10 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dirty_pages_are_no_memory() {
        let says_short = |text: &str| Look::of(text).is_some_and(|m| m.is_short());
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
