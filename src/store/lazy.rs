//! A store that is opened when it is first used, and again if that fails: for those who must begin while it is away.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::OnceCell;

use super::{ObjectMeta, Precondition, Store, StoreOptions, StoreUrl, Version, open};
use crate::error::{Error, ErrorKind, Result};

/// See the module's page.
pub struct Lazy {
    url: StoreUrl,
    opts: StoreOptions,
    opened: OnceCell<Arc<dyn Store>>,
}

impl fmt::Debug for Lazy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lazy({})", self.url)
    }
}

impl Lazy {
    /// The store at `url`, to be opened later. Nothing is checked yet.
    #[must_use]
    pub fn new(url: StoreUrl, opts: StoreOptions) -> Self {
        Self { url, opts, opened: OnceCell::new() }
    }

    async fn store(&self) -> Result<&Arc<dyn Store>> {
        self.opened.get_or_try_init(|| open(&self.url, &self.opts)).await.map_err(|e| {
            // A folder that is not mounted, credentials that nobody hands out yet: what may pass by itself. It was open once.
            Error::new(ErrorKind::Unreachable, format!("opening the store {}", self.url)).with_source(e)
        })
    }
}

#[async_trait]
impl Store for Lazy {
    async fn get(&self, key: &str) -> Result<(Bytes, Version)> {
        self.store().await?.get(key).await
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.store().await?.get_range(key, range).await
    }

    async fn put(&self, key: &str, body: Bytes) -> Result<()> {
        self.store().await?.put(key, body).await
    }

    async fn put_if(&self, key: &str, body: Bytes, condition: Precondition) -> Result<Version> {
        self.store().await?.put_if(key, body, condition).await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectMeta>> {
        self.store().await?.list(prefix, start_after).await
    }

    async fn delete(&self, key: &str) -> Result<()> {
        self.store().await?.delete(key).await
    }

    fn url(&self) -> String {
        self.opened.get().map_or_else(|| self.url.to_string(), |s| s.url())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_folder_may_come_later() {
        let dir = tempfile::tempdir().expect("dir");
        let root = dir.path().join("mount");
        let lazy = Lazy::new(StoreUrl::File { root: root.clone() }, StoreOptions::default());
        let e = lazy.get("a").await.expect_err("not there yet");
        assert!(e.kind().is_transient() && e.to_string().contains("mount"), "{e}");
        std::fs::create_dir(&root).expect("mkdir");
        assert_eq!(lazy.get("a").await.expect_err("there, and empty").kind(), ErrorKind::NotFound);
        lazy.put("a", Bytes::from_static(b"1")).await.expect("put");
        assert_eq!(lazy.list("", None).await.expect("list").len(), 1);
    }
}
