//! Finds out by trying whether a store honours conditional writes. Some ignore them without a word.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{Precondition, Store, Version};
use crate::error::{Error, ErrorKind, Result};
use crate::units::Nonce;

/// What a store makes of [`Precondition`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Capability {
    /// A write whose precondition does not hold is refused.
    Honoured,
    /// It is written all the same: two hosts can take one volume.
    Ignored,
}

/// Tries conditional writes on a fresh key that begins with `prefix` (empty, or ending with a slash),
/// and removes it again. Up to six requests.
///
/// # Errors
/// Those of the store; `Unsupported` when it refuses writes whose precondition does hold.
pub async fn conditional_writes(store: &dyn Store, prefix: &str) -> Result<Capability> {
    let nonce = Nonce::draw().map_err(|e| Error::io("drawing a key for the probe", e))?;
    let key = format!("{prefix}probe-{nonce}");
    let outcome = attempt(store, &key, nonce).await;
    let cleaned = store.delete(&key).await;
    let capability = outcome
        .map_err(|e| e.context(format!("trying whether {} honours conditional writes (object {key})", store.url())))?;
    cleaned?;
    Ok(capability)
}

async fn attempt(store: &dyn Store, key: &str, nonce: Nonce) -> Result<Capability> {
    // Each write has a content of its own: a retry wrapper takes equal bytes for its own earlier try, and a
    // store whose version is a hash would see no change.
    let body = |step: u8| Bytes::from(format!("probe {nonce} step {step}"));
    let first = must_hold(store.put_if(key, body(1), Precondition::Absent).await)?;
    if !refused(store.put_if(key, body(2), Precondition::Absent).await)? {
        return Ok(Capability::Ignored);
    }
    must_hold(store.put_if(key, body(3), Precondition::Matches(first.clone())).await)?;
    if !refused(store.put_if(key, body(4), Precondition::Matches(first)).await)? {
        return Ok(Capability::Ignored);
    }
    Ok(Capability::Honoured)
}

fn must_hold(written: Result<Version>) -> Result<Version> {
    written.map_err(|e| match e.kind() {
        ErrorKind::Conflict => {
            Error::new(ErrorKind::Unsupported, "it refuses a write whose precondition holds").with_source(e)
        }
        _ => e,
    })
}

fn refused(written: Result<Version>) -> Result<bool> {
    match written {
        Ok(_) => Ok(false),
        Err(e) if e.kind() == ErrorKind::Conflict => Ok(true),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::store::fault::{Fault, FaultStore};
    use crate::store::memory::MemoryStore;
    use crate::store::{Op, fault::Call};

    #[tokio::test]
    async fn it_tells_the_stores_apart_and_leaves_nothing() {
        let m = Arc::new(MemoryStore::new());
        assert_eq!(conditional_writes(&*m, "v/").await.expect("probe"), Capability::Honoured);
        let ignoring = FaultStore::new(m.clone(), |_| Fault::None).with_conditions_ignored();
        assert_eq!(conditional_writes(&ignoring, "").await.expect("probe"), Capability::Ignored);
        let down =
            |call: Call<'_>| if call.op == Op::PutIf { Fault::After(ErrorKind::Unreachable) } else { Fault::None };
        let e = conditional_writes(&FaultStore::new(m.clone(), down), "v/").await.expect_err("down");
        assert_eq!(e.kind(), ErrorKind::Unreachable);
        assert!(m.list("", None).await.expect("list").is_empty());
    }
}
