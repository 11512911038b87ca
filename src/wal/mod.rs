//! The write-ahead log: one file or device of fixed slots, written with O_DIRECT by all lanes.
//!
//! - [`codec`]: superblock, segment and record headers as bytes.
//! - [`log`]: the state that lanes share: tail, frontier, durable mark, slots.
//! - [`appender`]: one lane's side: gathers writes, seals batches, acknowledges.
//! - `batch`: what gathers until it leaves as one record.
//! - [`recent`]: what was written lately, in memory, until it is packed.
//! - [`replay`]: reads a log back.
//! - [`inspect`]: looks into a log that nobody has, damaged or not, and reads its data.
//! - [`salvage`]: ends a damaged log before its damage.
//! - [`create`](mod@create): makes a new log and grows it.

pub mod appender;
mod batch;
pub mod codec;
pub mod create;
pub mod inspect;
pub(crate) mod legible;
pub mod log;
pub mod recent;
pub mod replay;
pub mod salvage;
