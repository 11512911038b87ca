//! Objects in a bucket: `s3://bucket/prefix`. This folder is the only one that knows the S3 client.
//!
//! - Bodies are in memory, lengths are announced, ranges are absolute; no request needs multipart,
//!   copies, trailers or deletions in bulk: what the plainest servers lack.
//! - An ETag is an opaque version, never a statement about the content.
//! - A request is one attempt: [`super::retry`] decides about more. One timeout covers it, body included.
//! - Connections belong to the runtime that opened them ([`http`]), so one store may be shared by many
//!   threads with a runtime each.

mod aside;
mod config;
mod error;
mod http;

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_s3::Client;
use aws_sdk_s3::primitives::ByteStream;
use bytes::{Bytes, BytesMut};

pub(super) use self::aside::{FETCHES, UPLOADS};
use self::error::{Failure, broken_body};
use super::{
    MAX_OBJECT_BYTES, ObjectMeta, Op, Precondition, Store, StoreOptions, StoreUrl, Version, check_key, check_prefix,
    check_range, check_size, short_object,
};
use crate::error::{Error, ErrorKind, Result};

/// See the module's page.
#[derive(Clone)]
pub struct S3Store {
    client: Client,
    bucket: String,
    /// What all keys begin with; ends with a slash unless empty.
    prefix: String,
    /// Where requests go, for messages.
    endpoint: String,
    request_timeout: Duration,
    /// Large bodies are fetched on threads of their own.
    fetch_aside: bool,
}

impl fmt::Debug for S3Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Store").field("url", &self.url()).field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

impl S3Store {
    /// Finds settings and credentials and makes a client. The bucket is not looked at.
    ///
    /// # Errors
    /// `Denied` without credentials, `Usage` for settings that make no sense.
    pub async fn open(bucket: &str, prefix: &str, opts: &StoreOptions) -> Result<Self> {
        let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
        let (client, endpoint) = config::client(opts).await?;
        let (request_timeout, fetch_aside) = (opts.request_timeout, opts.fetch_aside);
        Ok(Self { client, bucket: bucket.to_owned(), prefix, endpoint, request_timeout, fetch_aside })
    }

    fn full_key(&self, key: &str) -> Result<String> {
        check_key(key)?;
        let full = format!("{}{key}", self.prefix);
        if full.len() > super::MAX_KEY_BYTES {
            return Err(Error::new(ErrorKind::Usage, format!("{key}: longer than 1024 bytes with the store's prefix")));
        }
        Ok(full)
    }

    fn failure<'a>(&'a self, op: Op, key: &'a str) -> Failure<'a> {
        Failure { op, key, store: self }
    }

    /// Runs one request, body included, under the request timeout.
    async fn timed<T>(&self, op: Op, key: &str, request: impl Future<Output = Result<T>>) -> Result<T> {
        match tokio::time::timeout(self.request_timeout, request).await {
            Ok(result) => result,
            Err(_) => Err(self.failure(op, key).timed_out(self.request_timeout)),
        }
    }

    /// A part of an object.
    async fn fetch(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        let wanted = (range.end - range.start) as usize;
        let request = self.client.get_object().bucket(&self.bucket).key(self.full_key(key)?).range(format!(
            "bytes={}-{}",
            range.start,
            range.end - 1
        ));
        let out = match request.send().await {
            Ok(out) => out,
            Err(e) if error::status(&e) == Some(416) => {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!(
                        "reading bytes {}..{} of {key} in {}: the object ends before them",
                        range.start,
                        range.end,
                        self.url()
                    ),
                ));
            }
            Err(e) => return Err(self.failure(Op::GetRange, key).translate(e)),
        };
        let content_range = out.content_range;
        let body = self.collect(Op::GetRange, key, out.body, out.content_length).await?;
        match content_range {
            // The server does not do ranges: this is the whole object.
            None => {
                if range.end > body.len() as u64 {
                    return Err(short_object(key, &range, body.len() as u64));
                }
                Ok(body.slice(range.start as usize..range.end as usize))
            }
            Some(sent) => {
                let expected = format!("bytes {}-{}", range.start, range.end - 1);
                let told = sent.split('/').next().unwrap_or_default().trim();
                if told != expected || body.len() != wanted {
                    return Err(Error::new(
                        ErrorKind::Corrupt,
                        format!(
                            "reading bytes {}..{} of {key} in {}: the server sent {} bytes as {told:?}; the object \
                             is shorter than expected, or the server does not do ranges right",
                            range.start,
                            range.end,
                            self.url(),
                            body.len()
                        ),
                    ));
                }
                Ok(body)
            }
        }
    }

    /// Reads a body to its end, bounded.
    async fn collect(&self, op: Op, key: &str, mut body: ByteStream, announced: Option<i64>) -> Result<Bytes> {
        let announced = announced.and_then(|n| u64::try_from(n).ok());
        check_size(key, announced.unwrap_or(0))?;
        let mut whole = BytesMut::with_capacity(announced.unwrap_or(0) as usize);
        while let Some(part) = body.next().await {
            let part = part.map_err(|e| broken_body(&self.failure(op, key), e))?;
            check_size(key, (whole.len() + part.len()) as u64)?;
            whole.extend_from_slice(&part);
        }
        if announced.is_some_and(|n| n != whole.len() as u64) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "reading {key} in {}: {} bytes came, {} were announced",
                    self.url(),
                    whole.len(),
                    announced.unwrap_or(0)
                ),
            ));
        }
        Ok(whole.freeze())
    }

    /// One page of a listing; the keys are whole ones of the bucket.
    async fn page(&self, prefix: &str, at: &Position) -> Result<Page> {
        let request = self.client.list_objects_v2().bucket(&self.bucket).prefix(prefix);
        let request = match at {
            Position::After(key) => request.set_start_after(key.clone()),
            Position::Token(token) => request.continuation_token(token),
        };
        self.timed(Op::List, prefix, async {
            let out = request.send().await.map_err(|e| self.failure(Op::List, prefix).translate(e))?;
            let truncated = out.is_truncated().unwrap_or(false);
            let token = out.next_continuation_token().map(str::to_owned);
            let objects = out
                .contents
                .unwrap_or_default()
                .into_iter()
                .filter_map(|o| Some((o.key?, o.size.and_then(|n| u64::try_from(n).ok()).unwrap_or(0))))
                .collect();
            Ok(Page { objects, truncated, token })
        })
        .await
    }
}

enum Position {
    After(Option<String>),
    Token(String),
}

struct Page {
    objects: Vec<(String, u64)>,
    truncated: bool,
    token: Option<String>,
}

#[async_trait]
impl Store for S3Store {
    async fn get(&self, key: &str) -> Result<(Bytes, Version)> {
        let request = self.client.get_object().bucket(&self.bucket).key(self.full_key(key)?);
        self.timed(Op::Get, key, async {
            let out = request.send().await.map_err(|e| self.failure(Op::Get, key).translate(e))?;
            let version = Version(out.e_tag.unwrap_or_default());
            Ok((self.collect(Op::Get, key, out.body, out.content_length).await?, version))
        })
        .await
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        check_range(key, &range)?;
        let fetch = async {
            if !self.fetch_aside || range.end - range.start < aside::LARGE {
                return self.fetch(key, range).await;
            }
            let (this, key) = (self.clone(), key.to_owned());
            FETCHES.run(async move { this.fetch(&key, range).await }).await?
        };
        self.timed(Op::GetRange, key, fetch).await
    }

    async fn put(&self, key: &str, body: Bytes) -> Result<()> {
        check_size(key, body.len() as u64)?;
        let is_large = body.len() as u64 >= aside::LARGE;
        let request =
            self.client.put_object().bucket(&self.bucket).key(self.full_key(key)?).body(ByteStream::from(body));
        self.timed(Op::Put, key, async {
            let sent = if is_large { UPLOADS.run(request.send()).await? } else { request.send().await };
            sent.map_err(|e| self.failure(Op::Put, key).translate(e))?;
            Ok(())
        })
        .await
    }

    async fn put_if(&self, key: &str, body: Bytes, condition: Precondition) -> Result<Version> {
        check_size(key, body.len() as u64)?;
        let request =
            self.client.put_object().bucket(&self.bucket).key(self.full_key(key)?).body(ByteStream::from(body));
        let matching = matches!(condition, Precondition::Matches(_));
        let request = match condition {
            Precondition::Absent => request.if_none_match("*"),
            Precondition::Matches(Version(etag)) => request.if_match(etag),
        };
        self.timed(Op::PutIf, key, async {
            match request.send().await {
                // A server without ETags gives an empty version: it then matches nothing where conditions count.
                Ok(out) => Ok(Version(out.e_tag.unwrap_or_default())),
                Err(e) => {
                    let gone = matching && error::code(&e) != Some("NoSuchBucket") && error::status(&e) == Some(404);
                    let e = self.failure(Op::PutIf, key).translate(e);
                    if gone {
                        return Err(
                            Error::new(ErrorKind::Conflict, format!("{key} in {} is gone", self.url())).with_source(e)
                        );
                    }
                    Err(e)
                }
            }
        })
        .await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectMeta>> {
        check_prefix(prefix)?;
        let whole_prefix = format!("{}{prefix}", self.prefix);
        // One before the prefix says nothing, and garage would begin there, see a key of another prefix, and end.
        let start_after = start_after.filter(|key| *key >= prefix);
        let mut at = Position::After(start_after.map(|key| format!("{}{key}", self.prefix)));
        let mut found: Vec<ObjectMeta> = Vec::new();
        loop {
            let page = self.page(&whole_prefix, &at).await?;
            let last = page.objects.iter().map(|(key, _)| key).max().cloned();
            for (key, size) in page.objects {
                // Checked here as well: some servers ignore `start-after`, and "folder" objects end with a slash.
                let Some(key) = key.strip_prefix(&self.prefix) else { continue };
                if key.starts_with(prefix) && start_after.is_none_or(|after| key > after) && check_key(key).is_ok() {
                    found.push(ObjectMeta { key: key.to_owned(), size });
                }
            }
            if !page.truncated {
                break;
            }
            at = match (page.token, last, &at) {
                (Some(token), _, Position::Token(before)) if token == *before => return Err(self.endless(prefix)),
                (Some(token), _, _) => Position::Token(token),
                // Truncated without a token: go on behind the last key, as long as that moves.
                (None, Some(last), Position::After(before)) if before.as_ref().is_none_or(|b| last > *b) => {
                    Position::After(Some(last))
                }
                (None, Some(last), Position::Token(_)) => Position::After(Some(last)),
                (None, ..) => return Err(self.endless(prefix)),
            };
        }
        found.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        found.dedup_by(|a, b| a.key == b.key);
        Ok(found)
    }

    async fn delete(&self, key: &str) -> Result<()> {
        let request = self.client.delete_object().bucket(&self.bucket).key(self.full_key(key)?);
        self.timed(Op::Delete, key, async {
            match request.send().await {
                Ok(_) => Ok(()),
                Err(e) if error::status(&e) == Some(404) && error::code(&e) != Some("NoSuchBucket") => Ok(()),
                Err(e) => Err(self.failure(Op::Delete, key).translate(e)),
            }
        })
        .await
    }

    fn url(&self) -> String {
        StoreUrl::S3 { bucket: self.bucket.clone(), prefix: self.prefix.trim_end_matches('/').to_owned() }.to_string()
    }
}

impl S3Store {
    fn endless(&self, prefix: &str) -> Error {
        Error::new(
            ErrorKind::Corrupt,
            format!("listing {prefix:?} in {}: the server says there is more, but not how to get it", self.url()),
        )
    }
}

// The bound also keeps `as usize` above exact on every target.
const _: () = assert!(MAX_OBJECT_BYTES <= u32::MAX as u64);
