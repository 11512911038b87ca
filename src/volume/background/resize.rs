//! Making an attached volume larger: the manifest says so first, then the log, then the maps; so a size that a client has seen is found again
//! after any crash.

use super::{Background, Event, Reply, lost};
use crate::disk::Disk;
use crate::error::{ErrorKind, Result};
use crate::manifest::{self, Published};
use crate::time::Timer;
use crate::volume::resize::may_grow;
use crate::wal::create::SuperblockFile;

impl<D: Disk + Clone, T: Timer> Background<D, T> {
    /// Begins what was ordered, when manifest and superblock are free.
    pub(super) fn resize(&mut self) {
        if self.resizes.is_empty() || self.superblock.is_none() {
            return;
        }
        let Some(mut published) = self.published.take() else { return };
        let (Some(mut sb), Some((size_bytes, reply))) = (self.superblock.take(), self.resizes.pop_front()) else {
            self.published = Some(published);
            return;
        };
        let (store, disk, volume) = (self.store.clone(), self.disk.clone(), self.volume.clone());
        self.spawn(async move {
            let grown = async {
                may_grow(&published.manifest, size_bytes)?;
                manifest::check_size(size_bytes, published.manifest.logical_block)?;
                if published.manifest.size_bytes != size_bytes {
                    published.publish(&*store, |m| m.size_bytes = size_bytes).await?;
                }
                sb.set_size(&disk, size_bytes).await.inspect_err(|e| {
                    // The kernel tells of a failed write once.
                    volume.log.fail(format!("the log's superblock cannot be written: {e}"));
                })
            };
            let result = grown.await;
            Event::Resized { published, sb, result, reply }
        });
    }

    pub(super) fn resized(
        &mut self,
        published: Box<Published>,
        sb: Box<SuperblockFile>,
        result: Result<()>,
        reply: Reply,
    ) {
        let size_bytes = published.manifest.size_bytes;
        self.published = Some(published);
        self.superblock = Some(sb);
        let result = match result {
            Ok(()) => {
                self.volume.grow(size_bytes);
                tracing::info!("volume {} has {size_bytes} bytes now", self.volume.name());
                Ok(())
            }
            Err(e) if e.kind() == ErrorKind::Fenced => {
                self.fenced(&e);
                Err(lost(&self.volume))
            }
            Err(e) => Err(e),
        };
        let _ = reply.send(result);
    }
}
