//! What `bench` takes.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueHint};

use super::{CacheArgs, JsonArg, LogArgs};
use crate::bench::nbd::NbdUri;
use crate::config::{ByteSize, FlushTo, VolumeName};

#[derive(Debug, Clone, Args)]
pub(crate) struct BenchArgs {
    /// A volume, which this process attaches for as long as it takes [default: one that is made for it, and deleted afterwards]
    #[arg(long, conflicts_with_all = ["nbd", "device"])]
    pub(crate) volume: Option<VolumeName>,
    /// An export of an NBD server, as in nbd://127.0.0.1:10809/vol-1 or nbd+unix:///vol-1?socket=/run/nbd.sock
    #[arg(long, value_name = "URI", conflicts_with = "device")]
    pub(crate) nbd: Option<NbdUri>,
    /// A block device or a file, with O_DIRECT
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub(crate) device: Option<PathBuf>,
    /// read, write, randread, randwrite, or mixed: rw, randrw
    #[arg(long, value_name = "KIND", default_value = "randwrite")]
    pub(crate) rw: Rw,
    /// Of rw and randrw, how many of a hundred requests are reads
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) reads: u8,
    /// Bytes of a request
    #[arg(long, value_name = "SIZE", default_value = "4K")]
    pub(crate) bs: ByteSize,
    /// Requests in flight, of each job
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub(crate) depth: u32,
    /// Jobs, each a thread with a lane or a connection and a part of the bytes of its own
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) jobs: u16,
    /// For how long
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub(crate) seconds: u32,
    /// The bytes to do it in, from the beginning on [default: all; of a volume that is made for it: 1G]
    #[arg(long, value_name = "SIZE")]
    pub(crate) size: Option<ByteSize>,
    /// Flush after so many writes, and wait for it
    #[arg(long, value_name = "N")]
    pub(crate) fsync: Option<u32>,
    /// Write with FUA: each write survives the loss of power when it is answered
    #[arg(long)]
    pub(crate) fua: bool,
    /// Write blocks that say which write they are of, check what is read, and in the end everything that was written
    #[arg(long)]
    pub(crate) verify: bool,
    /// Write all of it once first, which is not counted
    #[arg(long)]
    pub(crate) fill: bool,
    /// The same number draws the same requests
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
    /// Tell how it went in intervals of this length, too (with --json)
    #[arg(long, value_name = "MILLISECONDS", requires = "json")]
    pub(crate) interval: Option<u32>,
    /// What is there may be written over
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// The most that the volume's write-ahead log takes in its folder [default: as for `add`]
    #[arg(long, value_name = "SIZE")]
    pub(crate) wal_size: Option<ByteSize>,
    #[command(flatten)]
    pub(crate) log: LogArgs,
    #[command(flatten)]
    pub(crate) cache: CacheArgs,
    /// How far the volume's flushes go, as for `add`
    #[arg(long, value_name = "wal|store")]
    pub(crate) flush: Option<FlushTo>,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

impl BenchArgs {
    /// Whether anything is written.
    pub(crate) const fn writes(&self) -> bool {
        self.rw.writes() || self.fill
    }
}

/// Kinds of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rw {
    Read,
    Write,
    RandRead,
    RandWrite,
    Mixed,
    RandMixed,
}

const WORDS: [(Rw, &str); 6] = [
    (Rw::Read, "read"),
    (Rw::Write, "write"),
    (Rw::RandRead, "randread"),
    (Rw::RandWrite, "randwrite"),
    (Rw::Mixed, "rw"),
    (Rw::RandMixed, "randrw"),
];

impl Rw {
    /// How many of a hundred requests are reads; `mixed` where both are wanted.
    pub(crate) const fn read_percent(self, mixed: u8) -> u8 {
        match self {
            Self::Read | Self::RandRead => 100,
            Self::Write | Self::RandWrite => 0,
            Self::Mixed | Self::RandMixed => mixed,
        }
    }

    pub(crate) const fn sequential(self) -> bool {
        matches!(self, Self::Read | Self::Write | Self::Mixed)
    }

    pub(crate) const fn writes(self) -> bool {
        !matches!(self, Self::Read | Self::RandRead)
    }
}

impl FromStr for Rw {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let found = WORDS.into_iter().find(|(_, word)| *word == s);
        found.map(|(rw, _)| rw).ok_or_else(|| "read, write, randread, randwrite, rw or randrw is possible".to_owned())
    }
}

impl fmt::Display for Rw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(WORDS.into_iter().find(|(rw, _)| rw == self).map_or("", |(_, word)| word))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_requests() {
        for (word, read, sequential) in [
            ("read", 100, true),
            ("randread", 100, false),
            ("write", 0, true),
            ("randwrite", 0, false),
            ("rw", 70, true),
            ("randrw", 70, false),
        ] {
            let rw: Rw = word.parse().expect(word);
            assert_eq!((rw.read_percent(70), rw.sequential(), rw.to_string().as_str()), (read, sequential, word));
        }
        assert!("readrand".parse::<Rw>().is_err());
    }
}
