//! Objects in this process's memory, for tests and trials: `memory:` and `memory:NAME`.
//!
//! Invariant: a version number is given once in the life of the process, so a version never comes
//! back, not even for the same content.

use std::collections::BTreeMap;
use std::ops::{Bound, Range};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;

use super::{
    ObjectMeta, Precondition, Store, Version, check_key, check_prefix, check_range, no_such_object, short_object,
};
use crate::error::{Error, ErrorKind, Result};

type Objects = Arc<Mutex<BTreeMap<String, (Bytes, u64)>>>;

static NAMED: LazyLock<Mutex<BTreeMap<String, Objects>>> = LazyLock::new(Mutex::default);
static VERSIONS: AtomicU64 = AtomicU64::new(1);

/// See the module's page.
#[derive(Debug, Clone, Default)]
pub struct MemoryStore {
    name: String,
    objects: Objects,
}

impl MemoryStore {
    /// A store that nobody else sees.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The store of this name: all that are opened with the same name, in this process, share their objects.
    #[must_use]
    pub fn named(name: &str) -> Self {
        let mut all = NAMED.lock().unwrap_or_else(PoisonError::into_inner);
        Self { name: name.to_owned(), objects: all.entry(name.to_owned()).or_default().clone() }
    }

    // Every change is one insertion or removal, so a panic elsewhere leaves no half-made state behind.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, (Bytes, u64)>> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn next_version() -> u64 {
    VERSIONS.fetch_add(1, Ordering::Relaxed)
}

#[async_trait]
impl Store for MemoryStore {
    async fn get(&self, key: &str) -> Result<(Bytes, Version)> {
        check_key(key)?;
        let objects = self.lock();
        let (body, version) = objects.get(key).ok_or_else(|| no_such_object(&self.url(), key))?;
        Ok((body.clone(), Version(version.to_string())))
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        check_range(key, &range)?;
        let (body, _) = self.get(key).await?;
        if range.end > body.len() as u64 {
            return Err(short_object(key, &range, body.len() as u64));
        }
        Ok(body.slice(range.start as usize..range.end as usize))
    }

    async fn put(&self, key: &str, body: Bytes) -> Result<()> {
        check_key(key)?;
        self.lock().insert(key.to_owned(), (body, next_version()));
        Ok(())
    }

    async fn put_if(&self, key: &str, body: Bytes, condition: Precondition) -> Result<Version> {
        check_key(key)?;
        let mut objects = self.lock();
        let holds = match (&condition, objects.get(key)) {
            (Precondition::Absent, found) => found.is_none(),
            (Precondition::Matches(wanted), Some((_, version))) => wanted.0 == version.to_string(),
            (Precondition::Matches(_), None) => false,
        };
        if !holds {
            return Err(Error::new(ErrorKind::Conflict, format!("{key} in {} has been written meanwhile", self.url())));
        }
        let version = next_version();
        objects.insert(key.to_owned(), (body, version));
        Ok(Version(version.to_string()))
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectMeta>> {
        check_prefix(prefix)?;
        let objects = self.lock();
        let from = match start_after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        Ok(objects
            .range::<str, _>((from, Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, (body, _))| ObjectMeta { key: key.clone(), size: body.len() as u64 })
            .collect())
    }

    async fn delete(&self, key: &str) -> Result<()> {
        check_key(key)?;
        self.lock().remove(key);
        Ok(())
    }

    fn url(&self) -> String {
        format!("memory:{}", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_same_name_shares_its_objects() {
        let a = MemoryStore::named("shared");
        let b = MemoryStore::named("shared");
        a.put("k", Bytes::from_static(b"v")).await.expect("put");
        assert_eq!(&b.get("k").await.expect("get").0[..], b"v");
        let other = MemoryStore::named("other").get("k").await;
        assert_eq!(other.expect_err("another name").kind(), ErrorKind::NotFound);
        assert_eq!(MemoryStore::new().get("k").await.expect_err("private").kind(), ErrorKind::NotFound);
    }
}
