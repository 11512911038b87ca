//! A manifest that is older than the volume: one that was put back from a copy of the store, or that a store shows which has lost its
//! newest writes. Attached by it, the volume would go back in time without a word, and what it has since then would count for garbage.
//!
//! What shows it:
//! - a chunk of the volume's under an epoch above the manifest's: an epoch is published before anything is uploaded under it;
//! - a log here whose attachment the store has confirmed, and which the manifest's history does not know: a history only grows. (One that
//!   was inferred once, by a rebuild without a manifest, lacks the attachments that left no chunk, and says nothing.)
//!
//! A volume that was attached since, and was given nothing to keep, shows neither; nothing of it is lost.

use crate::chunk::reader::fetch_header;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::{Manifest, Published, key};
use crate::store::Store;
use crate::units::{Epoch, Nonce};
use crate::wal::codec::Superblock;

/// Chunks that are looked at: late uploads of a volume that was deleted, under the same name, are none of this one's.
const MOST_LOOKED_AT: usize = 8;

/// Refuses a manifest of which `later` show that it is old: keys of chunks under epochs above its own.
///
/// # Errors
/// `Corrupt` when it is old; the store's.
pub(super) async fn check_chunks(store: &dyn Store, m: &Manifest, later: &[(Epoch, String)]) -> Result<()> {
    if later.is_empty() {
        return Ok(());
    }
    // Another host may have taken the volume since the manifest was read: that will show to whoever replaces it.
    let known = Published::load(store, &m.name).await?.manifest.epoch.max(m.epoch);
    for (epoch, chunk) in later.iter().filter(|l| l.0 > known).take(MOST_LOOKED_AT) {
        match fetch_header(store, chunk).await {
            Ok(h) if h.volume == m.uuid => {
                return Err(stale(store, m, &format!("{chunk} was written under epoch {epoch}")));
            }
            Ok(_) => {}
            // What cannot be read tells nothing.
            Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::NotFound | ErrorKind::Unsupported) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Refuses a manifest that does not know an attachment which it has confirmed once, as a log says.
///
/// # Errors
/// `Corrupt` when it is old.
pub(super) fn check_log(store: &dyn Store, m: &Manifest, sb: &Superblock) -> Result<()> {
    let is_known = sb.confirmed == Nonce(0) || m.history.iter().any(|e| e.nonce == sb.confirmed);
    let is_whole = m.history.iter().zip(1..).all(|(e, n)| e.epoch == Epoch(n));
    // Where two may write at once, one of them may be wiped out of the history.
    if sb.volume != m.uuid || is_known || !is_whole || !m.conditional_writes {
        return Ok(());
    }
    Err(stale(store, m, &format!("the log here is of an attachment (nonce {}) that came after it", sb.confirmed)))
}

fn stale(store: &dyn Store, m: &Manifest, why: &str) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!(
            "{} in {} is older than the volume: it is as of epoch {}, and {why}. Put the newest manifest.json back; if there is none, see what \
             `vb-ublk volume rebuild {} --dry-run` says",
            key(&m.name),
            store.url(),
            m.epoch,
            m.name
        ),
    )
}
