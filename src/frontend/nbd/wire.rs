//! What goes over an NBD socket, as pure functions: no I/O, no clock, no log. All integers are big-endian.
//!
//! Parsers take what has come so far and say `None` when more is needed; they allocate no more than the caller has
//! received. The layouts are those of the protocol's document.
//!
//! ```text
//! option        8 "IHAVEOPT"   4 option   4 length        then `length` bytes
//! option reply  8 magic        4 option   4 kind   4 length   then `length` bytes
//! request       4 magic 2 flags 2 command 8 cookie 8 offset 4 length          28 bytes
//! …, extended   4 magic 2 flags 2 command 8 cookie 8 offset 8 length          32 bytes
//! simple reply  4 magic 4 error 8 cookie                                      16 bytes
//! chunk         4 magic 2 flags 2 kind 8 cookie 4 length                      20 bytes
//! …, extended   4 magic 2 flags 2 kind 8 cookie 8 offset of the request 8 length  32 bytes
//! ```

pub mod client;
mod numbers;

pub use numbers::{export_flag, flag, info, option, reply};

/// The server's first words: "NBDMAGIC", "IHAVEOPT", and its flags.
#[must_use]
pub fn greeting() -> [u8; 18] {
    let mut g = [0; 18];
    g[..8].copy_from_slice(b"NBDMAGIC");
    g[8..16].copy_from_slice(IHAVEOPT);
    g[16..].copy_from_slice(&(HANDSHAKE_FIXED_NEWSTYLE | HANDSHAKE_NO_ZEROES).to_be_bytes());
    g
}

const IHAVEOPT: &[u8; 8] = b"IHAVEOPT";
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const REQUEST_EXTENDED: u32 = 0x21e4_1c71;
const SIMPLE_REPLY: u32 = 0x6744_6698;
const CHUNK: u32 = 0x668e_33ef;
const CHUNK_EXTENDED: u32 = 0x6e8a_278c;

const HANDSHAKE_FIXED_NEWSTYLE: u16 = 1;
const HANDSHAKE_NO_ZEROES: u16 = 2;

/// The longest option that is taken, in bytes: a name has at most 4096, and a few queries fit beside it.
pub const MAX_OPTION: usize = 16 << 10;
/// The longest name of an export, in bytes.
pub const MAX_NAME: usize = 4096;
/// The most data of a READ or a WRITE, in bytes.
pub const MAX_PAYLOAD: u32 = 32 << 20;
/// A WRITE that is too long is read past up to so many bytes, and refused; a longer one ends the connection.
pub const MAX_SKIPPED: u64 = 64 << 20;
/// The longest header of a request, in bytes.
pub const MAX_REQUEST_HEADER: usize = 32;
/// What the server calls `base:allocation`.
pub const ALLOCATION_ID: u32 = 1;
/// The one metadata context.
pub const ALLOCATION: &str = "base:allocation";

/// Error numbers of replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// Not permitted.
    Perm = 1,
    /// Input/output error.
    Io = 5,
    /// Makes no sense.
    Inval = 22,
    /// Past the end.
    NoSpc = 28,
    /// Not in this way.
    NotSup = 95,
    /// The volume is being taken away.
    Shutdown = 108,
}

/// The peer does not speak NBD, or not this dialect. Nothing it sends can be told apart any more: hang up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Nonsense(pub &'static str);

fn be16(b: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*b.get(at..)?.first_chunk()?))
}

fn be32(b: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*b.get(at..)?.first_chunk()?))
}

fn be64(b: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(*b.get(at..)?.first_chunk()?))
}

/// The client's answer to the greeting: whether it wants no zeros after `EXPORT_NAME`.
///
/// # Errors
/// Flags that nobody has offered.
pub fn client_flags(bytes: [u8; 4]) -> Result<bool, Nonsense> {
    let flags = u32::from_be_bytes(bytes);
    let known = u32::from(HANDSHAKE_FIXED_NEWSTYLE | HANDSHAKE_NO_ZEROES);
    if flags & !known != 0 {
        return Err(Nonsense("the client asks for flags that were not offered"));
    }
    Ok(flags & u32::from(HANDSHAKE_NO_ZEROES) != 0)
}

/// The header of an option: which, and how many bytes follow.
///
/// # Errors
/// A wrong magic.
pub fn option_header(bytes: &[u8; 16]) -> Result<(u32, u32), Nonsense> {
    if bytes[..8] != *IHAVEOPT {
        return Err(Nonsense("an option does not begin with IHAVEOPT"));
    }
    let number = |at| be32(bytes, at).unwrap_or_default();
    Ok((number(8), number(12)))
}

/// What INFO and GO ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InfoQuery {
    /// The export.
    pub name: String,
    /// See [`info`].
    pub wanted: Vec<u16>,
}

/// The bytes of INFO or GO. `None` when they make no sense.
#[must_use]
pub fn parse_info(data: &[u8]) -> Option<InfoQuery> {
    let (name, rest) = string(data)?;
    let count = usize::from(be16(rest, 0)?);
    let rest = &rest[2..];
    if rest.len() != count * 2 {
        return None;
    }
    let wanted = rest.chunks_exact(2).map(|b| u16::from_be_bytes([b[0], b[1]])).collect();
    Some(InfoQuery { name: export_name(name)?, wanted })
}

/// What `LIST_META_CONTEXT` and `SET_META_CONTEXT` ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaQuery {
    /// The export.
    pub name: String,
    /// Whether there were queries at all.
    pub any: bool,
    /// Whether one of them is for `base:allocation` by name.
    pub allocation: bool,
    /// Whether one of them is for all of `base:`.
    pub base: bool,
}

/// The bytes of `LIST_META_CONTEXT` or `SET_META_CONTEXT`. `None` when they make no sense.
#[must_use]
pub fn parse_meta(data: &[u8]) -> Option<MetaQuery> {
    let (name, mut rest) = string(data)?;
    let count = be32(rest, 0)?;
    rest = &rest[4..];
    let mut q = MetaQuery { name: export_name(name)?, any: count > 0, allocation: false, base: false };
    for _ in 0..count {
        let (query, after) = string(rest)?;
        q.allocation |= query == ALLOCATION.as_bytes();
        q.base |= query == b"base:";
        rest = after;
    }
    rest.is_empty().then_some(q)
}

/// A name of an export. `None` when it is too long, not UTF-8, or has a NUL in it.
#[must_use]
pub fn export_name(bytes: &[u8]) -> Option<String> {
    if bytes.len() > MAX_NAME || bytes.contains(&0) {
        return None;
    }
    String::from_utf8(bytes.to_vec()).ok()
}

/// A length and so many bytes, and what follows.
fn string(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let len = be32(data, 0)? as usize;
    data.get(4..)?.split_at_checked(len)
}

/// A reply to an option.
#[must_use]
pub fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(20 + data.len());
    out.extend_from_slice(&OPTION_REPLY.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
    out
}

/// The data of a SERVER reply.
#[must_use]
pub fn server_data(name: &str) -> Vec<u8> {
    [&(name.len() as u32).to_be_bytes(), name.as_bytes()].concat()
}

/// The data of a `META_CONTEXT` reply.
#[must_use]
pub fn meta_data(id: u32) -> Vec<u8> {
    [&id.to_be_bytes(), ALLOCATION.as_bytes()].concat()
}

/// The data of an INFO reply with size and flags; without its first two bytes, what follows `EXPORT_NAME`.
#[must_use]
pub fn export_data(size: u64, flags: u16) -> [u8; 12] {
    let mut d = [0; 12];
    d[..2].copy_from_slice(&info::EXPORT.to_be_bytes());
    d[2..10].copy_from_slice(&size.to_be_bytes());
    d[10..].copy_from_slice(&flags.to_be_bytes());
    d
}

/// The data of an INFO reply with text.
#[must_use]
pub fn text_data(kind: u16, text: &str) -> Vec<u8> {
    [&kind.to_be_bytes(), text.as_bytes()].concat()
}

/// The data of an INFO reply with block sizes.
#[must_use]
pub fn block_size_data(minimum: u32, preferred: u32, maximum: u32) -> [u8; 14] {
    let mut d = [0; 14];
    d[..2].copy_from_slice(&info::BLOCK_SIZE.to_be_bytes());
    d[2..6].copy_from_slice(&minimum.to_be_bytes());
    d[6..10].copy_from_slice(&preferred.to_be_bytes());
    d[10..].copy_from_slice(&maximum.to_be_bytes());
    d
}

/// What a request wants done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Data, please.
    Read,
    /// Take data.
    Write,
    /// Good-bye.
    Disc,
    /// Make completed writes durable.
    Flush,
    /// These bytes are not needed any more.
    Trim,
    /// These bytes will be read soon.
    Cache,
    /// These bytes shall be zero.
    WriteZeroes,
    /// What is there?
    BlockStatus,
    /// Not known.
    Unknown(u16),
}

impl From<u16> for Command {
    fn from(n: u16) -> Self {
        match n {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disc,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            n => Self::Unknown(n),
        }
    }
}

/// A request's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// See [`flag`].
    pub flags: u16,
    /// What to do.
    pub command: Command,
    /// The client's name for it.
    pub cookie: u64,
    /// The first byte.
    pub offset: u64,
    /// How many bytes.
    pub length: u64,
}

impl Request {
    /// Bytes of data that follow the header.
    #[must_use]
    pub fn payload(&self, extended: bool) -> u64 {
        let follows = self.command == Command::Write || extended && self.flags & flag::PAYLOAD_LEN != 0;
        if follows { self.length } else { 0 }
    }
}

/// The request at the head of `bytes`, and the length of its header.
///
/// # Errors
/// A wrong magic.
pub fn parse_request(bytes: &[u8], extended: bool) -> Result<Option<(Request, usize)>, Nonsense> {
    let (magic, header) = if extended { (REQUEST_EXTENDED, 32) } else { (REQUEST, 28) };
    if be32(bytes, 0).is_some_and(|m| m != magic) {
        return Err(Nonsense("a request does not begin with the magic that was agreed upon"));
    }
    let parse = || {
        let length = if extended { be64(bytes, 24)? } else { be32(bytes, 24)?.into() };
        let request = Request {
            flags: be16(bytes, 4)?,
            command: be16(bytes, 6)?.into(),
            cookie: be64(bytes, 8)?,
            offset: be64(bytes, 16)?,
            length,
        };
        Some((request, header))
    };
    Ok(parse())
}

/// Appends a simple reply. `error` is 0 or an [`Errno`].
pub fn simple_reply(out: &mut Vec<u8>, error: u32, cookie: u64) {
    out.extend_from_slice(&SIMPLE_REPLY.to_be_bytes());
    out.extend_from_slice(&error.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
}

/// Kinds of chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
enum ChunkKind {
    None = 0,
    Data = 1,
    Hole = 2,
    BlockStatus = 5,
    BlockStatusExtended = 6,
    Error = 0x8001,
}

/// Writes the chunks of one answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunks {
    /// The client's name for the request.
    pub cookie: u64,
    /// Where the request begins; goes into extended headers.
    pub offset: u64,
    /// Extended headers were agreed upon.
    pub extended: bool,
}

impl Chunks {
    fn header(&self, out: &mut Vec<u8>, kind: ChunkKind, done: bool, len: u64) {
        let magic = if self.extended { CHUNK_EXTENDED } else { CHUNK };
        out.extend_from_slice(&magic.to_be_bytes());
        out.extend_from_slice(&u16::from(done).to_be_bytes());
        out.extend_from_slice(&(kind as u16).to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
        if self.extended {
            out.extend_from_slice(&self.offset.to_be_bytes());
            out.extend_from_slice(&len.to_be_bytes());
        } else {
            // Every chunk is far smaller: 32 MiB of data, or a few extents.
            out.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
        }
    }

    /// Done, without anything to say.
    pub fn none(&self, out: &mut Vec<u8>) {
        self.header(out, ChunkKind::None, true, 0);
    }

    /// `len` bytes of data follow, which are those at `at`.
    pub fn data(&self, out: &mut Vec<u8>, done: bool, at: u64, len: u32) {
        self.header(out, ChunkKind::Data, done, 8 + u64::from(len));
        out.extend_from_slice(&at.to_be_bytes());
    }

    /// `len` zeros at `at`.
    pub fn hole(&self, out: &mut Vec<u8>, done: bool, at: u64, len: u32) {
        self.header(out, ChunkKind::Hole, done, 12);
        out.extend_from_slice(&at.to_be_bytes());
        out.extend_from_slice(&len.to_be_bytes());
    }

    /// It failed.
    pub fn error(&self, out: &mut Vec<u8>, error: Errno, words: &str) {
        let words = &words.as_bytes()[..words.len().min(4096)];
        self.header(out, ChunkKind::Error, true, 6 + words.len() as u64);
        out.extend_from_slice(&(error as u32).to_be_bytes());
        out.extend_from_slice(&(words.len() as u16).to_be_bytes());
        out.extend_from_slice(words);
    }

    /// Extents: bytes, and whether they are a hole. Lengths are below 4 GiB unless headers are extended.
    pub fn block_status(&self, out: &mut Vec<u8>, extents: &[(u64, bool)]) {
        const HOLE_AND_ZERO: u32 = 3;
        let (n, of) = (extents.len() as u64, |hole: bool| if hole { HOLE_AND_ZERO } else { 0 });
        if self.extended {
            self.header(out, ChunkKind::BlockStatusExtended, true, 8 + 16 * n);
            out.extend_from_slice(&ALLOCATION_ID.to_be_bytes());
            out.extend_from_slice(&(extents.len() as u32).to_be_bytes());
            for (len, hole) in extents {
                out.extend_from_slice(&len.to_be_bytes());
                out.extend_from_slice(&u64::from(of(*hole)).to_be_bytes());
            }
        } else {
            self.header(out, ChunkKind::BlockStatus, true, 4 + 8 * n);
            out.extend_from_slice(&ALLOCATION_ID.to_be_bytes());
            for (len, hole) in extents {
                out.extend_from_slice(&u32::try_from(*len).unwrap_or(u32::MAX).to_be_bytes());
                out.extend_from_slice(&of(*hole).to_be_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests;
