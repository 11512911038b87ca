//! What a codec (chunk header, checkpoint part) finds wrong with its bytes.

use crate::error::{Error, ErrorKind};

/// Why bytes were refused, or why a value cannot be written in the format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The input ends early, or goes on too long.
    #[error("{what} has {got} bytes where {need} are due; the object is cut short or is something else")]
    Length {
        /// The structure.
        what: &'static str,
        /// Bytes given.
        got: u64,
        /// Bytes due.
        need: u64,
    },
    /// The magic number is another.
    #[error("{0} does not start with its magic number; the object is something else")]
    Magic(&'static str),
    /// A version, flag or kind that this program does not know.
    #[error("{what}: {field} {value} is not known to this version of the program; a newer one may read it")]
    Unknown {
        /// The structure.
        what: &'static str,
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// A checksum does not match.
    #[error("{what} fails its checksum (stored {stored:08x}, computed {computed:08x}); the object is damaged")]
    Checksum {
        /// The structure.
        what: &'static str,
        /// As stored.
        stored: u32,
        /// As computed.
        computed: u32,
    },
    /// Intact, but not what was asked for: another volume, chunk, checkpoint or part.
    #[error("{what}: {field} is {got} where {want} was expected; the object sits under a wrong name")]
    Mismatch {
        /// The structure.
        what: &'static str,
        /// The field.
        field: &'static str,
        /// What it says.
        got: String,
        /// What was expected.
        want: String,
    },
    /// A value that makes no sense.
    #[error("{what}: {why}")]
    Invalid {
        /// The structure.
        what: &'static str,
        /// The reason.
        why: String,
    },
}

impl CodecError {
    /// A value that makes no sense.
    pub(crate) fn invalid(what: &'static str, why: impl Into<String>) -> Self {
        Self::Invalid { what, why: why.into() }
    }

    /// Refuses a version, flags or a kind other than the one that is known.
    pub(crate) fn known(what: &'static str, field: &'static str, value: u64, want: u64) -> Result<(), Self> {
        if value == want { Ok(()) } else { Err(Self::Unknown { what, field, value }) }
    }

    /// The kind for an [`Error`].
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        match self {
            Self::Unknown { .. } => ErrorKind::Unsupported,
            _ => ErrorKind::Corrupt,
        }
    }
}

impl From<CodecError> for Error {
    fn from(e: CodecError) -> Self {
        Self::new(e.kind(), e.to_string())
    }
}
