//! What an importer reads from.

use async_trait::async_trait;

use crate::error::Result;

/// An image that is read once, from front to back.
#[async_trait(?Send)]
pub trait ImageSource {
    /// Its size in bytes; `None` for a pipe, whose end is not known before it comes.
    fn size_bytes(&self) -> Option<u64>;

    /// The next stretch at or after byte `from` that may hold anything but zeros, as (start, end) in bytes; `None`: zeros up to the end,
    /// or the end. Never asked for less than it was asked before.
    ///
    /// # Errors
    /// The image's own; damage is `Corrupt`.
    async fn next_data(&mut self, from: u64) -> Result<Option<(u64, u64)>>;

    /// Fills `buf` with the bytes from `at`; what lies past the end of the image is zeros. Never asked for bytes before those it was asked for last.
    ///
    /// # Errors
    /// The image's own; damage is `Corrupt`.
    async fn read(&mut self, at: u64, buf: &mut [u8]) -> Result<()>;

    /// What the image says of itself, to be kept with the volume (`volume info` shows it).
    fn metadata(&self) -> serde_json::Map<String, serde_json::Value> {
        serde_json::Map::new()
    }
}
