//! What a world's volume may have been cloned from.

use std::sync::Arc;

use futures_util::FutureExt;
use vb_ublk::error::{ErrorKind, Result};
use vb_ublk::image::ImageSource;
use vb_ublk::store::Store;
use vb_ublk::units::Nonce;
use vb_ublk::volume::{admin, import, snapshots};

/// An image in memory.
struct Content(Vec<u8>);

#[async_trait::async_trait(?Send)]
impl ImageSource for Content {
    fn size_bytes(&self) -> Option<u64> {
        Some(self.0.len() as u64)
    }

    async fn next_data(&mut self, from: u64) -> Result<Option<(u64, u64)>> {
        let end = self.0.len() as u64;
        Ok((from < end).then_some((from, end)))
    }

    async fn read(&mut self, at: u64, buf: &mut [u8]) -> Result<()> {
        buf.copy_from_slice(&self.0[at as usize..at as usize + buf.len()]);
        Ok(())
    }
}

/// Memory never waits: at most it gives way.
fn at_once<T>(work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    (0..1000).find_map(|_| work.as_mut().now_or_never()).expect("memory never waits")
}

/// Makes the volume `v`, a clone of `p@s`, which holds `content`.
pub(crate) fn make(store: &Arc<dyn Store>, content: Vec<u8>) {
    let opts = import::Options {
        size_bytes: None,
        logical_block: 512,
        metadata: serde_json::Map::new(),
        nonce: Nonce(99),
        now_unix: 1,
    };
    let making = async {
        import::import(&**store, "p", &mut Content(content), &opts, std::future::pending(), &mut |_| {}).await?;
        snapshots::create(&**store, "p", "s", 1).await?;
        snapshots::clone(&**store, "p", "s", "v", None, 1).await
    };
    at_once(making).expect("made");
}

/// Deletes the parent, which the clone has said that it does not need.
pub(crate) fn delete_parent(store: &Arc<dyn Store>) {
    match at_once(admin::delete(&**store, "p", false)) {
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        done => drop(done.expect("nobody needs it")),
    }
}
