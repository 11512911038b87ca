//! vb-ublk: a block device whose data lives in an object store.
//!
//! The map of the house, from the outside in; knowledge flows downwards only:
//! `cli → frontend → volume → gc → wal, map, chunk, cache, manifest → disk, store → units, error, config`. Beside them
//! [`image`]: what a volume is imported from and exported to; [`bench`]: a workload over any of it.
//! `docs/ARCHITECTURE.md` follows a write through these rooms.

pub mod bench;
pub mod cache;
pub mod checksum;
pub mod chunk;
pub mod cli;
pub mod codec;
pub mod config;
pub mod disk;
pub mod error;
pub mod frontend;
pub mod gc;
pub mod image;
pub mod lane;
pub mod machine;
pub mod manifest;
pub mod map;
pub mod store;
pub mod time;
pub mod units;
pub mod volume;
pub mod wal;
