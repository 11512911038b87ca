//! The protocol's numbers.

/// Bits of an export's flags.
pub mod export_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is served.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// FUA is served.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM is served.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// `WRITE_ZEROES` is served.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// DF is understood.
    pub const SEND_DF: u16 = 1 << 7;
    /// A FLUSH covers what other connections have written.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE is served.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// `FAST_ZERO` is understood.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Bits of a request's flags.
pub mod flag {
    /// The request survives power loss when it is answered.
    pub const FUA: u16 = 1;
    /// Zeros shall be allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// The answer shall be one chunk.
    pub const DF: u16 = 1 << 2;
    /// One extent suffices.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Zeroes fast or not at all.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// The length is that of a payload.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Options of the handshake.
pub mod option {
    /// Choose an export, the old way.
    pub const EXPORT_NAME: u32 = 1;
    /// End.
    pub const ABORT: u32 = 2;
    /// Which exports are there?
    pub const LIST: u32 = 3;
    /// TLS from here on.
    pub const STARTTLS: u32 = 5;
    /// What is this export?
    pub const INFO: u32 = 6;
    /// Choose an export.
    pub const GO: u32 = 7;
    /// Chunked answers.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Which metadata contexts are there?
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// 64-bit lengths.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Kinds of replies to options.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export's name.
    pub const SERVER: u32 = 2;
    /// Something about an export.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Not known.
    pub const ERR_UNSUP: u32 = 1 << 31 | 1;
    /// Not allowed.
    pub const ERR_POLICY: u32 = 1 << 31 | 2;
    /// Makes no sense.
    pub const ERR_INVALID: u32 = 1 << 31 | 3;
    /// Not possible here.
    pub const ERR_PLATFORM: u32 = 1 << 31 | 4;
    /// Not without TLS.
    pub const ERR_TLS_REQD: u32 = 1 << 31 | 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = 1 << 31 | 6;
    /// Too long.
    pub const ERR_TOO_BIG: u32 = 1 << 31 | 9;
    /// Not after extended headers.
    pub const ERR_EXT_HEADER_REQD: u32 = 1 << 31 | 10;
}

/// What an INFO reply is about.
pub mod info {
    /// Size and flags.
    pub const EXPORT: u16 = 0;
    /// Its proper name.
    pub const NAME: u16 = 1;
    /// For people.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred and maximum block size.
    pub const BLOCK_SIZE: u16 = 3;
}
