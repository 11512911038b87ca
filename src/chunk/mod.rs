//! Chunks: the objects of up to 4 MiB that hold the volume's data in the store.
//!
//! - [`bodies`]: memory for chunks in the making.
//! - [`header`]: the codec of a chunk's header.
//! - [`plan`]: what a range of log entries comes to, cut into chunks.
//! - [`pack`]: builds the chunks' bytes from the log.
//! - [`reader`]: reads blocks out of chunks.
//! - [`verify`]: checks all that a map names of a chunk.

pub mod bodies;
pub mod header;
pub mod pack;
pub mod plan;
pub mod reader;
pub mod verify;
