//! Requests and replies of a blocking NBD client: any number outstanding, answered in any order. Every reply is checked
//! against the request that it answers; a server that breaks the protocol makes this panic.

use std::collections::HashMap;
use std::io::{self, Write};

use super::client::{Addr, Handshake, Headers, Info, Stream};
use super::proto::{self, chunk, cmd, flag, opt};

/// A command with its arguments; `payload` is what follows it on the wire.
#[derive(Clone, Debug, Default)]
pub(crate) struct Request {
    pub(crate) command: u16,
    pub(crate) flags: u16,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) payload: Vec<u8>,
}

impl Request {
    pub(crate) fn new(command: u16, flags: u16, offset: u64, length: u64) -> Self {
        Self { command, flags, offset, length, payload: Vec::new() }
    }

    pub(crate) fn write(flags: u16, offset: u64, data: &[u8]) -> Self {
        Self { command: cmd::WRITE, flags, offset, length: data.len() as u64, payload: data.to_vec() }
    }
}

/// A piece of what was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) hole: bool,
}

/// The whole answer to a request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reply {
    pub(crate) cookie: u64,
    /// 0 when all went well.
    pub(crate) error: u32,
    /// Of a read.
    pub(crate) data: Vec<u8>,
    pub(crate) pieces: Vec<Piece>,
    /// Of `BLOCK_STATUS`: length and flags.
    pub(crate) extents: Vec<(u64, u64)>,
}

struct Waiting {
    request: Request,
    reply: Reply,
}

/// A connection that is about an export.
pub(crate) struct Client {
    pub(crate) stream: Stream,
    pub(crate) headers: Headers,
    pub(crate) info: Info,
    context: Option<u32>,
    next: u64,
    waiting: HashMap<u64, Waiting>,
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

impl Client {
    pub(crate) fn new(stream: Stream, headers: Headers, info: Info, context: Option<u32>) -> Self {
        // Cookies that look like nothing else on the wire.
        Self { stream, headers, info, context, next: 0xc00c_1e00_0000_0001, waiting: HashMap::new() }
    }

    /// Connects to an export with these headers, and asks for `base:allocation` where that is possible.
    #[track_caller]
    pub(crate) fn connect(addr: &Addr, export: &str, headers: Headers) -> Self {
        Self::try_connect(addr, export, headers).unwrap_or_else(|e| panic!("export {export:?} at {addr:?}: {e}"))
    }

    pub(crate) fn try_connect(addr: &Addr, export: &str, headers: Headers) -> io::Result<Self> {
        let mut h = Handshake::new(addr)?;
        match headers {
            Headers::Simple => {}
            Headers::Structured => h.structured()?.map_err(|e| bad(&format!("no structured replies: {e:#x}")))?,
            Headers::Extended => h.extended()?.map_err(|e| bad(&format!("no extended headers: {e:#x}")))?,
        }
        if headers != Headers::Simple {
            let met = h.meta(opt::SET_META_CONTEXT, export, &["base:allocation"])?;
            met.map_err(|e| bad(&format!("no contexts: {e:#x}")))?;
        }
        h.try_go(export)?.map_err(|(_, e)| bad(&format!("refused: {e:#x}")))
    }

    /// Requests without an answer so far.
    pub(crate) fn outstanding(&self) -> usize {
        self.waiting.len()
    }

    /// The header of a request as it goes over the wire.
    pub(crate) fn header(&self, r: &Request, cookie: u64) -> Vec<u8> {
        let mut b = Vec::with_capacity(32 + r.payload.len());
        let extended = self.headers == Headers::Extended;
        let mut flags = r.flags;
        if extended && r.command == cmd::WRITE {
            flags |= flag::PAYLOAD_LEN;
        }
        let magic = if extended { proto::REQUEST_EXT } else { proto::REQUEST };
        b.extend_from_slice(&magic.to_be_bytes());
        b.extend_from_slice(&flags.to_be_bytes());
        b.extend_from_slice(&r.command.to_be_bytes());
        b.extend_from_slice(&cookie.to_be_bytes());
        b.extend_from_slice(&r.offset.to_be_bytes());
        if extended {
            b.extend_from_slice(&r.length.to_be_bytes());
        } else {
            b.extend_from_slice(&u32::try_from(r.length).expect("a length of 32 bits").to_be_bytes());
        }
        b
    }

    /// Sends a request; its cookie.
    pub(crate) fn send(&mut self, request: Request) -> io::Result<u64> {
        let cookie = self.next;
        self.next += 1;
        let mut b = self.header(&request, cookie);
        b.extend_from_slice(&request.payload);
        // Before it is sent: a write that fails half way leaves a connection of no more use.
        self.waiting.insert(cookie, Waiting { request, reply: Reply { cookie, ..Reply::default() } });
        self.stream.write_all(&b)?;
        Ok(cookie)
    }

    /// The next answer that is complete, to whichever request.
    pub(crate) fn receive(&mut self) -> io::Result<Reply> {
        loop {
            let cookie = match self.headers {
                Headers::Simple => Some(self.simple()?),
                _ => self.chunk()?,
            };
            if let Some(cookie) = cookie {
                let done = self.waiting.remove(&cookie).expect("a request that waits");
                check(&done.request, &done.reply, self.headers);
                return Ok(done.reply);
            }
        }
    }

    fn simple(&mut self) -> io::Result<u64> {
        assert_eq!(u32::from_be_bytes(self.stream.array()?), proto::REPLY_SIMPLE, "the magic of a simple reply");
        let error = u32::from_be_bytes(self.stream.array()?);
        let cookie = u64::from_be_bytes(self.stream.array()?);
        let w = self.waiting.get_mut(&cookie).unwrap_or_else(|| panic!("a reply to nothing: {cookie:#x}"));
        w.reply.error = error;
        if error == 0 && w.request.command == cmd::READ {
            w.reply.data = self.stream.vec(usize::try_from(w.request.length).expect("a length"))?;
            w.reply.pieces.push(Piece { offset: w.request.offset, length: w.request.length, hole: false });
        }
        Ok(cookie)
    }

    /// One chunk; the cookie when it was the last.
    fn chunk(&mut self) -> io::Result<Option<u64>> {
        let extended = self.headers == Headers::Extended;
        let magic = u32::from_be_bytes(self.stream.array()?);
        if !extended && magic == proto::REPLY_SIMPLE {
            // Allowed for all but reads and errors with a text.
            let error = u32::from_be_bytes(self.stream.array()?);
            let cookie = u64::from_be_bytes(self.stream.array()?);
            let w = self.waiting.get_mut(&cookie).unwrap_or_else(|| panic!("a reply to nothing: {cookie:#x}"));
            assert!(w.request.command != cmd::READ, "a simple reply to a read among structured ones");
            w.reply.error = error;
            return Ok(Some(cookie));
        }
        let expected = if extended { proto::REPLY_EXT } else { proto::REPLY_STRUCTURED };
        assert_eq!(magic, expected, "the magic of a chunk");
        let flags = u16::from_be_bytes(self.stream.array()?);
        let kind = u16::from_be_bytes(self.stream.array()?);
        let cookie = u64::from_be_bytes(self.stream.array()?);
        let offset = if extended { Some(u64::from_be_bytes(self.stream.array()?)) } else { None };
        let length = if extended {
            u64::from_be_bytes(self.stream.array()?)
        } else {
            u64::from(u32::from_be_bytes(self.stream.array()?))
        };
        assert!(length <= (64 << 20) + 8, "a chunk of {length} bytes");
        assert_eq!(flags & !chunk::DONE, 0, "unknown flags of a chunk");
        let payload = self.stream.vec(usize::try_from(length).expect("a length"))?;
        let w = self.waiting.get_mut(&cookie).unwrap_or_else(|| panic!("a reply to nothing: {cookie:#x}"));
        if let Some(offset) = offset {
            assert_eq!(offset, w.request.offset, "an extended reply repeats the request's offset");
        }
        take_chunk(w, kind, &payload, self.context, extended);
        let done = flags & chunk::DONE != 0;
        assert!(done || kind != chunk::NONE, "a chunk of no content is the last");
        Ok(done.then_some(cookie))
    }

    /// Sends one request and waits for its answer; there must be no other outstanding.
    pub(crate) fn call(&mut self, request: Request) -> io::Result<Reply> {
        assert_eq!(self.outstanding(), 0, "call() is for one at a time");
        let cookie = self.send(request)?;
        let reply = self.receive()?;
        assert_eq!(reply.cookie, cookie);
        Ok(reply)
    }

    /// The error number of a request, 0 for none.
    #[track_caller]
    pub(crate) fn outcome(&mut self, command: u16, flags: u16, offset: u64, length: u64) -> u32 {
        let mut r = Request::new(command, flags, offset, length);
        if command == cmd::WRITE {
            r.payload = vec![0x5a; usize::try_from(length).expect("a length")];
        }
        self.call(r).unwrap_or_else(|e| panic!("command {command} flags {flags:#x} {offset}+{length}: {e}")).error
    }

    #[track_caller]
    pub(crate) fn read(&mut self, offset: u64, length: usize) -> Vec<u8> {
        let r = self.call(Request::new(cmd::READ, 0, offset, length as u64)).expect("a read");
        assert_eq!(r.error, 0, "reading {length} bytes at {offset}");
        r.data
    }

    #[track_caller]
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        let r = self.call(Request::write(0, offset, data)).expect("a write");
        assert_eq!(r.error, 0, "writing {} bytes at {offset}", data.len());
    }

    #[track_caller]
    pub(crate) fn flush(&mut self) {
        assert_eq!(self.outcome(cmd::FLUSH, 0, 0, 0), 0, "flush");
    }

    /// Allocation, as length and flags.
    #[track_caller]
    pub(crate) fn status(&mut self, flags: u16, offset: u64, length: u64) -> Vec<(u64, u64)> {
        let r = self.call(Request::new(cmd::BLOCK_STATUS, flags, offset, length)).expect("a block status");
        assert_eq!(r.error, 0, "the block status of {length} bytes at {offset}");
        r.extents
    }

    /// Says goodbye, and waits until the server has hung up.
    pub(crate) fn disconnect(mut self) {
        let b = self.header(&Request::new(cmd::DISC, 0, 0, 0), 0);
        self.stream.write_all(&b).expect("NBD_CMD_DISC");
        assert!(self.stream.closes_within(std::time::Duration::from_secs(20)), "a connection that is left is closed");
    }
}

fn be64(b: &[u8]) -> u64 {
    u64::from_be_bytes(b[..8].try_into().expect("8 bytes"))
}

fn be32(b: &[u8]) -> u32 {
    u32::from_be_bytes(b[..4].try_into().expect("4 bytes"))
}

fn take_chunk(w: &mut Waiting, kind: u16, payload: &[u8], context: Option<u32>, extended: bool) {
    let (r, reply) = (&w.request, &mut w.reply);
    let mut piece = |offset: u64, length: u64, data: Option<&[u8]>| {
        assert!(r.command == cmd::READ, "data in answer to command {}", r.command);
        assert!(length > 0, "an empty piece");
        assert!(offset >= r.offset && offset + length <= r.offset + r.length, "{offset}+{length} was not asked for");
        let overlaps = |p: &Piece| p.offset < offset + length && offset < p.offset + p.length;
        assert!(!reply.pieces.iter().any(overlaps), "{offset}+{length} is sent twice");
        reply.data.resize(usize::try_from(r.length).expect("a length"), 0xee);
        let from = usize::try_from(offset - r.offset).expect("an offset");
        let place = &mut reply.data[from..from + usize::try_from(length).expect("a length")];
        match data {
            Some(data) => place.copy_from_slice(data),
            None => place.fill(0),
        }
        reply.pieces.push(Piece { offset, length, hole: data.is_none() });
    };
    match kind {
        chunk::NONE => assert!(payload.is_empty(), "a chunk of no content has content"),
        chunk::OFFSET_DATA => piece(be64(payload), payload.len() as u64 - 8, Some(&payload[8..])),
        chunk::OFFSET_HOLE => {
            assert_eq!(payload.len(), 12, "a hole");
            piece(be64(payload), u64::from(be32(&payload[8..])), None);
        }
        chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT => {
            assert_eq!(r.command, cmd::BLOCK_STATUS, "extents in answer to command {}", r.command);
            assert_eq!(kind == chunk::BLOCK_STATUS_EXT, extended, "extents of the other kind");
            assert_eq!(Some(be32(payload)), context, "the context's id");
            assert!(reply.extents.is_empty(), "extents are sent twice");
            reply.extents = if extended {
                let all: Vec<_> = payload[8..].chunks_exact(16).map(|e| (be64(e), be64(&e[8..]))).collect();
                assert_eq!(be32(&payload[4..]) as usize, all.len(), "the number of extents");
                all
            } else {
                assert_eq!((payload.len() - 4) % 8, 0, "whole extents");
                payload[4..].chunks_exact(8).map(|e| (be32(e).into(), be32(&e[4..]).into())).collect()
            };
        }
        chunk::ERROR | chunk::ERROR_OFFSET => {
            let text = usize::from(u16::from_be_bytes(payload[4..6].try_into().expect("2 bytes")));
            let rest = if kind == chunk::ERROR { 0 } else { 8 };
            assert_eq!(payload.len(), 6 + text + rest, "the length of an error");
            std::str::from_utf8(&payload[6..6 + text]).expect("an error says why, in UTF-8");
            assert_ne!(be32(payload), 0, "an error chunk without an error");
            reply.error = be32(payload);
        }
        k => panic!("a chunk of unknown kind {k}"),
    }
}

/// What holds of every complete answer.
fn check(r: &Request, reply: &Reply, headers: Headers) {
    if reply.error != 0 {
        return;
    }
    match r.command {
        cmd::READ => {
            let sent: u64 = reply.pieces.iter().map(|p| p.length).sum();
            assert_eq!(sent, r.length, "a read is answered whole");
            assert!(r.flags & flag::DF == 0 || reply.pieces.len() == 1, "DF: one piece");
        }
        cmd::BLOCK_STATUS => {
            assert!(!reply.extents.is_empty() && reply.extents.iter().all(|e| e.0 > 0), "extents that are not empty");
            // Neighbours of the same kind are one; the last may be longer than asked for, but for REQ_ONE.
            let before: u64 = reply.extents[..reply.extents.len() - 1].iter().map(|e| e.0).sum();
            assert!(before < r.length, "extents beyond what was asked for");
            if r.flags & flag::REQ_ONE != 0 {
                assert_eq!(reply.extents.len(), 1, "REQ_ONE: one extent");
                assert!(reply.extents[0].0 <= r.length, "REQ_ONE: no longer than asked for");
            }
            assert!(headers != Headers::Simple, "extents without structured replies");
        }
        _ => assert!(reply.pieces.is_empty() && reply.extents.is_empty(), "content in answer to {}", r.command),
    }
}
