//! One error type: a matchable kind, a sentence of context, and the source.
//!
//! The sentence says what was tried, on what, why it failed and what to do next; the command line
//! prints it, with its sources, on one line.

use std::error::Error as StdError;
use std::fmt;

/// What went wrong, for code that has to decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An argument or a setting makes no sense.
    Usage,
    /// The volume, object, device or file is not there.
    NotFound,
    /// It is there already.
    Exists,
    /// Somebody else holds it.
    Busy,
    /// A conditional write found another version.
    Conflict,
    /// Not allowed: credentials, permissions, capabilities.
    Denied,
    /// The other side cannot be reached (worth a retry).
    Unreachable,
    /// The other side asks for a pause (worth a retry).
    Throttled,
    /// It took too long (worth a retry; it may have happened).
    TimedOut,
    /// No room left.
    Full,
    /// Data fails its check.
    Corrupt,
    /// This version, kernel or store cannot do it.
    Unsupported,
    /// Another attachment has taken the volume over.
    Fenced,
    /// A local read, write or sync failed.
    Io,
    /// Somebody asked to stop.
    Interrupted,
    /// A fault in this program.
    Internal,
}

impl ErrorKind {
    /// Whether the same call may succeed later without anyone's help.
    #[must_use]
    pub const fn is_transient(self) -> bool {
        matches!(self, Self::Unreachable | Self::Throttled | Self::TimedOut)
    }
}

/// See the module's page.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// A result with this crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error without a source.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None }
    }

    /// Adds what lies below.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// What went wrong.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The same kind, one sentence further out.
    #[must_use]
    pub fn context(self, context: impl Into<String>) -> Self {
        let kind = self.kind;
        Self { kind, context: context.into(), source: Some(Box::new(self)) }
    }

    /// A local I/O error; the kind follows errno.
    pub fn io(context: impl Into<String>, source: std::io::Error) -> Self {
        use std::io::ErrorKind as K;
        let kind = match source.kind() {
            K::NotFound => ErrorKind::NotFound,
            K::PermissionDenied => ErrorKind::Denied,
            K::AlreadyExists => ErrorKind::Exists,
            K::StorageFull | K::QuotaExceeded => ErrorKind::Full,
            _ => ErrorKind::Io,
        };
        Self { kind, context: context.into(), source: Some(Box::new(source)) }
    }
}

impl fmt::Display for Error {
    /// The whole chain, on one line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)?;
        // An `Error` below prints its own chain, so the walk ends there.
        let mut below: Option<&(dyn StdError + 'static)> = self.source.as_deref().map(|s| s as _);
        while let Some(e) = below {
            write!(f, ": {e}")?;
            below = if e.is::<Self>() { None } else { e.source() };
        }
        Ok(())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|s| s as _)
    }
}

/// Adds context to foreign results.
pub trait Context<T> {
    /// Wraps the error in one more sentence.
    ///
    /// # Errors
    /// The wrapped error.
    fn context<S: Into<String>>(self, f: impl FnOnce() -> S) -> Result<T>;
}

impl<T> Context<T> for Result<T> {
    fn context<S: Into<String>>(self, f: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| e.context(f()))
    }
}

impl<T> Context<T> for std::io::Result<T> {
    fn context<S: Into<String>>(self, f: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| Error::io(f(), e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_is_one_line_and_says_each_thing_once() {
        let io = std::io::Error::from_raw_os_error(libc::ENOSPC);
        let e = Error::io("writing segment 3", io).context("growing the log");
        assert_eq!(e.kind(), ErrorKind::Full);
        assert_eq!(e.to_string(), "growing the log: writing segment 3: No space left on device (os error 28)");
    }
}
