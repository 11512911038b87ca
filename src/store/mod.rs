//! The object store: a small trait, its backends (file, memory, S3) and wrappers, one per file.
//!
//! Keys are relative to the store's root, `/`-separated, without a leading slash; [`check_key`] says
//! which are allowed.
//!
//! [`open`] gives a bare backend. What the volume uses is wrapped: `Retry(Metrics(backend))`, so that
//! every try is counted, and the tests put a [`fault::FaultStore`] below that.

pub mod fault;
pub mod file;
pub mod lazy;
pub mod memory;
pub mod metrics;
pub mod probe;
pub mod retry;
pub mod s3;
mod url;

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub use self::url::StoreUrl;
use crate::error::{Error, ErrorKind, Result};

/// The longest key, in bytes (S3's limit, prefix included).
pub const MAX_KEY_BYTES: usize = 1024;
/// The largest object that a store takes or hands out whole, in bytes: 1 GiB. The engine's own objects
/// stay far below; the bound keeps a broken or hostile server from exhausting memory.
pub const MAX_OBJECT_BYTES: u64 = 1 << 30;
/// Key parts that begin so belong to the stores themselves (temporary files, locks).
pub(crate) const RESERVED: &str = ".vb-";

/// What a backend knows an object's version by (an ETag or the like). Opaque; compared for equality only by the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version(pub String);

/// What a conditional put demands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Precondition {
    /// No object has this key.
    Absent,
    /// The object is still this version.
    Matches(Version),
}

/// An object in a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectMeta {
    /// The whole key.
    pub key: String,
    /// Size in bytes.
    pub size: u64,
}

/// An object store. Every method may be called from any thread and may be retried by a wrapper:
/// all but `put_if` are idempotent.
///
/// Errors: `NotFound`, `Conflict` (a precondition failed), `Denied`, `Full`, `Unsupported`, `Corrupt`
/// (a body that is not what was announced), and the transient `Unreachable`, `Throttled`, `TimedOut`.
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug {
    /// The whole object and its version.
    async fn get(&self, key: &str) -> Result<(Bytes, Version)>;

    /// Bytes `range` of the object (absolute, not empty). An object that ends before `range.end` is an
    /// error of kind `Corrupt`; the answer has exactly `range.len()` bytes.
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes>;

    /// Writes the whole object, replacing what is there; on return it is durable and visible.
    async fn put(&self, key: &str, body: Bytes) -> Result<()>;

    /// Writes the object if the precondition holds, atomically, else fails with `Conflict`.
    /// A store that ignores conditions is found out by `probe::conditional_writes`.
    async fn put_if(&self, key: &str, body: Bytes, condition: Precondition) -> Result<Version>;

    /// All objects whose key starts with `prefix` and is greater than `start_after` (if given), in key order.
    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectMeta>>;

    /// Deletes the object; a missing one is no error.
    async fn delete(&self, key: &str) -> Result<()>;

    /// Where this is, as a URL, for people: `file:///srv/store`, `s3://bucket/prefix`.
    fn url(&self) -> String;
}

/// The kinds of calls, for wrappers that count or disturb them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// [`Store::get`].
    Get,
    /// [`Store::get_range`].
    GetRange,
    /// [`Store::put`].
    Put,
    /// [`Store::put_if`].
    PutIf,
    /// [`Store::list`].
    List,
    /// [`Store::delete`].
    Delete,
}

impl Op {
    /// All of them, in the order of their discriminants.
    pub const ALL: [Self; 6] = [Self::Get, Self::GetRange, Self::Put, Self::PutIf, Self::List, Self::Delete];

    /// Whether the same call may be let in later though it was refused like that: a read, while somebody changes keys, a clock is
    /// wrong, or a server that has no room says so to whatever it is asked.
    pub(crate) const fn may_be_let_in_later(self, why: ErrorKind) -> bool {
        matches!(self, Self::Get | Self::GetRange) && matches!(why, ErrorKind::Denied | ErrorKind::Full)
    }

    /// What people read: `reading`, `writing`, …
    #[must_use]
    pub const fn verb(self) -> &'static str {
        match self {
            Self::Get | Self::GetRange => "reading",
            Self::Put => "writing",
            Self::PutIf => "conditionally writing",
            Self::List => "listing",
            Self::Delete => "deleting",
        }
    }
}

/// A key pair given by the program rather than found in the environment.
#[derive(Clone, PartialEq, Eq)]
pub struct StaticCredentials {
    /// The access key's id.
    pub access_key: String,
    /// The secret.
    pub secret_key: String,
    /// For temporary credentials.
    pub session_token: Option<String>,
}

impl fmt::Debug for StaticCredentials {
    /// Without the secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StaticCredentials").field("access_key", &self.access_key).finish_non_exhaustive()
    }
}

/// How to reach a store. All but `create` and `bulk` matter to S3 alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreOptions {
    /// Make the root folder of a `file:` store when it is missing.
    pub create: bool,
    /// This process reads much of a `file:` store and serves no device: it may wait for memory, and so read through the page cache.
    pub bulk: bool,
    /// Somebody waits for what is read: large bodies are fetched on threads of their own, in no order with what steps back for others.
    pub fetch_aside: bool,
    /// The server's URL, for all but AWS; makes requests path-style.
    pub endpoint: Option<String>,
    /// The region to sign for.
    pub region: Option<String>,
    /// The section of the AWS profile files to use; then the environment's keys are not looked at.
    pub profile: Option<String>,
    /// A PEM file with certificate authorities to trust, and no others.
    pub ca_cert: Option<PathBuf>,
    /// Accept any certificate.
    pub insecure: bool,
    /// Bound on setting up a connection.
    pub connect_timeout: Duration,
    /// Bound on one request, its body included.
    pub request_timeout: Duration,
    /// A key pair that goes before the environment and the profiles.
    pub credentials: Option<StaticCredentials>,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            create: false,
            bulk: false,
            fetch_aside: false,
            endpoint: None,
            region: None,
            profile: None,
            ca_cert: None,
            insecure: false,
            connect_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(60),
            credentials: None,
        }
    }
}

/// All objects whose keys begin with `folder`.
///
/// # Errors
/// The store's, with what was listed, and where.
pub async fn list_folder(store: &dyn Store, folder: &str) -> Result<Vec<ObjectMeta>> {
    store.list(folder, None).await.map_err(|e| e.context(format!("listing {folder} in {}", store.url())))
}

/// Opens the backend that `url` names, without any wrapper. To be called on a tokio runtime with time and I/O.
///
/// # Errors
/// `NotFound` for a missing folder (without `create`), `Denied` when no credentials are found,
/// `Usage` for settings that make no sense. A bucket is first looked at when it is used.
pub async fn open(url: &StoreUrl, opts: &StoreOptions) -> Result<Arc<dyn Store>> {
    Ok(match url {
        StoreUrl::File { root } => Arc::new(file::FileStore::open_for(root, opts.create, opts.bulk).await?),
        StoreUrl::Memory { name } => Arc::new(memory::MemoryStore::named(name)),
        StoreUrl::S3 { bucket, prefix } => Arc::new(s3::S3Store::open(bucket, prefix, opts).await?),
    })
}

/// Has threads ready that large uploads will want, with the calling thread's priority: for a process that may not get them later.
pub fn prepare_uploads(url: &StoreUrl) {
    if let StoreUrl::S3 { .. } = url {
        s3::UPLOADS.prepare();
    }
}

/// The same for what large reads will want.
pub fn prepare_fetches(url: &StoreUrl) {
    if let StoreUrl::S3 { .. } = url {
        s3::FETCHES.prepare();
    }
}

/// Whether a key may be used: 1 to 1024 bytes; parts between slashes not empty, of at most 255 bytes, neither
/// `.` nor `..`, not starting with `.vb-`; no control characters and no backslash.
///
/// # Errors
/// `Usage`, saying what is wrong.
pub fn check_key(key: &str) -> Result<()> {
    let fault = if key.is_empty() {
        Some("it is empty")
    } else if key.len() > MAX_KEY_BYTES {
        Some("it is longer than 1024 bytes")
    } else if key.chars().any(|c| c.is_control() || c == '\\') {
        Some("it has a control character or a backslash")
    } else {
        key.split('/').find_map(|part| match part {
            "" => Some("it has an empty part (a leading, trailing or double slash)"),
            "." | ".." => Some("it has a part `.` or `..`"),
            p if p.starts_with(RESERVED) => Some("parts that begin with `.vb-` are the store's own"),
            p if p.len() > 255 => Some("a part is longer than 255 bytes"),
            _ => None,
        })
    };
    fault.map_or(Ok(()), |why| {
        let shown: String = key.chars().take(80).collect();
        Err(Error::new(ErrorKind::Usage, format!("{shown:?} cannot be the key of an object: {why}")))
    })
}

/// Whether `prefix` may be listed: what could begin a key, or nothing.
pub(crate) fn check_prefix(prefix: &str) -> Result<()> {
    if prefix.is_empty() {
        return Ok(());
    }
    // A trailing slash, or a part of a name: either becomes a key with a letter behind it.
    check_key(&format!("{prefix}x")).map_err(|e| e.context(format!("listing {prefix:?}")))
}

/// Whether `range` may be read: not empty, and not more than one object may have.
pub(crate) fn check_range(key: &str, range: &Range<u64>) -> Result<()> {
    if range.start >= range.end || range.end - range.start > MAX_OBJECT_BYTES {
        return Err(Error::new(
            ErrorKind::Usage,
            format!("reading bytes {}..{} of {key}: the range is empty or longer than 1 GiB", range.start, range.end),
        ));
    }
    Ok(())
}

/// Whether an object of `size` bytes may be handled whole.
pub(crate) fn check_size(key: &str, size: u64) -> Result<()> {
    if size > MAX_OBJECT_BYTES {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!("object {key} has {size} bytes; at most 1 GiB is expected"),
        ));
    }
    Ok(())
}

/// The error for an object that ends before the range does.
pub(crate) fn short_object(key: &str, range: &Range<u64>, size: u64) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!("reading bytes {}..{} of {key}: the object has only {size} bytes", range.start, range.end),
    )
}

/// The error for an object that is not there.
pub(crate) fn no_such_object(root: &str, key: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("{root} has no object {key}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_could_leave_the_root_are_refused() {
        for bad in ["", "/a", "a/", "a//b", "..", "a/../b", "./a", "a\0b", "a\nb", "a/.vb-tmp-1", "a\\b"] {
            assert_eq!(check_key(bad).expect_err(bad).kind(), ErrorKind::Usage);
        }
        assert!(check_key(&"x/".repeat(600)).is_err());
        assert!(check_key(&"x".repeat(256)).is_err());
        for good in ["a", "vol-1/chunks/0001-2-3.chunk", "A.b_c-d/é", "a..b", ".hidden"] {
            check_key(good).expect(good);
        }
        for good in ["", "a/", "a/b"] {
            check_prefix(good).expect(good);
        }
        assert!(check_prefix("../").is_err());
        assert!(check_prefix("/").is_err());
    }

    #[test]
    fn secrets_stay_out_of_debug_output() {
        let c = StaticCredentials { access_key: "AK".into(), secret_key: "s3cr3t".into(), session_token: None };
        assert!(!format!("{c:?}").contains("s3cr3t"));
    }
}
