//! Where a store is: `file:///dir`, `memory:NAME`, `s3://bucket/prefix`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::store::check_key;

/// A parsed store URL.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum StoreUrl {
    /// A folder on this host.
    File {
        /// An absolute path.
        root: PathBuf,
    },
    /// Memory of this process.
    Memory {
        /// Stores of the same name share their objects; may be empty.
        name: String,
    },
    /// A bucket, or a part of one.
    S3 {
        /// The bucket's name.
        bucket: String,
        /// What all keys begin with, without slashes at its ends; may be empty.
        prefix: String,
    },
}

impl StoreUrl {
    /// Parses a URL. `s3://` and `s3:///prefix` take the bucket from `env("AWS_BUCKET")`.
    ///
    /// # Errors
    /// `Usage`, saying what is wrong and which forms there are.
    pub fn parse(text: &str, env: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let wrong = |why: &str| {
            Error::new(
                ErrorKind::Usage,
                format!("{text:?} is not a store: {why}; use file:///folder, memory:NAME or s3://bucket/prefix"),
            )
        };
        if let Some(path) = text.strip_prefix("file:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            if !path.starts_with('/') {
                return Err(wrong("the folder's path must be absolute"));
            }
            if path.contains('\0') {
                return Err(wrong("the path has a NUL character"));
            }
            return Ok(Self::File { root: Path::new(path).components().collect() });
        }
        if let Some(name) = text.strip_prefix("memory:") {
            let name = name.strip_prefix("//").unwrap_or(name);
            if !name.is_empty() {
                check_key(name).map_err(|e| wrong("the name is no good").with_source(e))?;
            }
            return Ok(Self::Memory { name: name.to_owned() });
        }
        if let Some(rest) = text.strip_prefix("s3:") {
            let rest = rest.strip_prefix("//").ok_or_else(|| wrong("`//` must follow `s3:`"))?;
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            let bucket = match bucket {
                "" => env("AWS_BUCKET")
                    .filter(|b| !b.is_empty())
                    .ok_or_else(|| wrong("it names no bucket, and AWS_BUCKET is not set"))?,
                b => b.to_owned(),
            };
            if bucket.len() > 255 || !bucket.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
                return Err(wrong("a bucket's name has letters, digits, `.`, `_` and `-` only"));
            }
            let prefix = prefix.trim_matches('/');
            if !prefix.is_empty() {
                check_key(prefix).map_err(|e| wrong("the prefix is no good").with_source(e))?;
            }
            return Ok(Self::S3 { bucket, prefix: prefix.to_owned() });
        }
        Err(wrong(if text.contains(':') { "the scheme is unknown" } else { "it has no scheme" }))
    }
}

impl FromStr for StoreUrl {
    type Err = Error;
    /// [`StoreUrl::parse`] with the process's environment.
    fn from_str(s: &str) -> Result<Self> {
        Self::parse(s, |name| std::env::var(name).ok())
    }
}

impl TryFrom<String> for StoreUrl {
    type Error = Error;
    fn try_from(s: String) -> Result<Self> {
        s.parse()
    }
}

impl From<StoreUrl> for String {
    fn from(u: StoreUrl) -> Self {
        u.to_string()
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { root } => write!(f, "file://{}", root.display()),
            Self::Memory { name } => write!(f, "memory:{name}"),
            Self::S3 { bucket, prefix } if prefix.is_empty() => write!(f, "s3://{bucket}"),
            Self::S3 { bucket, prefix } => write!(f, "s3://{bucket}/{prefix}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(s: &str) -> Result<StoreUrl> {
        StoreUrl::parse(s, |_| None)
    }

    #[test]
    fn good_ones_come_back_as_they_were() {
        for s in ["file:///srv/store", "file:///", "memory:", "memory:a", "s3://bucket", "s3://my.bucket-1/a/b"] {
            assert_eq!(parse(s).expect(s).to_string(), s);
        }
        for (given, shown) in [("file:///srv//store/", "file:///srv/store"), ("file:/srv", "file:///srv")] {
            assert_eq!(parse(given).expect(given).to_string(), shown);
        }
        assert_eq!(parse("s3://b/p/").expect("trailing slash").to_string(), "s3://b/p");
    }

    #[test]
    fn bad_ones_say_why() {
        for (s, why) in [
            ("", "no scheme"),
            ("/srv", "no scheme"),
            ("http://x", "scheme is unknown"),
            ("file://srv", "absolute"),
            ("file:", "absolute"),
            ("s3://", "AWS_BUCKET"),
            ("s3:bucket", "must follow"),
            ("s3://a b", "letters"),
            ("s3://b/../c", "prefix"),
            ("memory:a/../b", "name"),
        ] {
            let e = parse(s).expect_err(s);
            assert_eq!(e.kind(), ErrorKind::Usage);
            assert!(e.to_string().contains(why), "{s}: {e}");
        }
    }

    #[test]
    fn the_bucket_may_come_from_the_environment() {
        let env = |n: &str| (n == "AWS_BUCKET").then(|| "seed".to_owned());
        assert_eq!(StoreUrl::parse("s3://", env).expect("bucket").to_string(), "s3://seed");
        assert_eq!(StoreUrl::parse("s3:///p", env).expect("bucket").to_string(), "s3://seed/p");
    }
}
