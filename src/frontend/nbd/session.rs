//! The requests of one client, and their answers.
//!
//! One task reads and parses; each request then is a task of the lane, so that answers go out in the order in which they are
//! ready; one task sends what has gathered while its last send was under way.
//!
//! Invariants:
//! - Every request that was parsed is answered once, unless the client's socket has failed.
//! - A request's buffer is leased before its data is received, and given back when its answer has gone: what a client makes
//!   the server hold is bounded, see [`super::memory`].
//! - When the session ends nothing of it is under way: no request, no send.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;

use super::guard::Guard;
use super::handshake::{Broken, Dialect};
use super::memory::{Account, Lease, Memory, Wait};
use super::signal::Signal;
use super::transport::{Input, Transport};
use super::wire::{self, Chunks, Command, Errno, Nonsense, Request, flag};
use crate::disk::IoBuf;
use crate::units::{BLOCK, Lba, SECTOR};
use crate::volume::engine::{Engine, Extent, IoFault};

/// Received at once, in bytes.
pub(super) const INPUT: usize = 256 << 10;
/// A payload of more than this is received straight into its place, if it is not there already.
const DIRECT: usize = 32 << 10;
/// …in steps, so that a slow client can be told from one that has stopped.
const STEP: usize = 1 << 20;
/// Requests of a client under way at once.
const MAX_IN_FLIGHT: usize = 1024;
/// A hole in an answer to READ is worth a chunk of its own from so many bytes.
const WORTH_A_HOLE: u64 = BLOCK as u64;
/// The most extents in an answer to `BLOCK_STATUS`.
const MAX_EXTENTS: usize = 2048;
/// The most bytes that `BLOCK_STATUS` looks at, and how many at a time: it holds up the lane.
const MAX_LOOK: u64 = 8 << 30;
const LOOK: u64 = 64 << 20;

const SECTOR_BYTES: u64 = SECTOR as u64;

/// Runs a future beside the others of the lane.
pub(super) type Spawn = Box<dyn Fn(Pin<Box<dyn Future<Output = ()>>>)>;

/// What a session works on.
pub(super) struct Served<E> {
    pub(super) engine: Rc<E>,
    pub(super) guard: Arc<Guard>,
    pub(super) size: u64,
    pub(super) read_only: bool,
    pub(super) dialect: Dialect,
    /// Block status may be asked for.
    pub(super) allocation: bool,
}

/// Replies that wait to be sent.
#[derive(Default)]
struct Outgoing {
    heads: Vec<u8>,
    /// Data, and where among the heads it goes.
    data: Vec<(usize, IoBuf, Rc<Lease>)>,
    closing: bool,
}

impl Outgoing {
    fn is_empty(&self) -> bool {
        self.heads.is_empty()
    }
}

/// See the module's page.
pub(super) struct Session<T, E> {
    transport: T,
    served: Served<E>,
    memory: Memory,
    account: Rc<Account>,
    spawn: Spawn,
    outgoing: RefCell<Outgoing>,
    to_send: Signal,
    in_flight: Cell<usize>,
    one_ended: Signal,
    sender_ended: Cell<bool>,
    /// The client's socket has failed: answers go nowhere.
    broken: Cell<bool>,
    stopping: Rc<Cell<bool>>,
}

/// A request that has been found good, and what it needs.
enum Work {
    Read { range: Range<u64>, one_chunk: bool },
    Write { range: Range<u64>, fua: bool, data: Lease },
    Flush,
    Trim { range: Range<u64>, fua: bool },
    WriteZeroes { range: Range<u64>, fua: bool },
    BlockStatus { range: Range<u64>, one: bool },
    Nothing,
}

/// A refusal, in numbers and words.
type Refusal = (Errno, &'static str);

const fn of_fault(fault: IoFault) -> Refusal {
    match fault {
        IoFault::Io => (Errno::Io, "the volume has an input/output error"),
        IoFault::ReadOnly => (Errno::Perm, "the volume is read-only"),
        IoFault::BadRange => (Errno::Inval, "the range does not fit the volume"),
        IoFault::NoSpace => (Errno::NoSpc, "there is no space left"),
        IoFault::TimedOut => (Errno::Io, "it took too long"),
        IoFault::Gone => (Errno::Shutdown, "the volume is being detached"),
    }
}

const fn sectors_around(range: &Range<u64>) -> Range<u64> {
    range.start / SECTOR_BYTES..range.end.div_ceil(SECTOR_BYTES)
}

const fn is_whole(range: &Range<u64>) -> bool {
    range.start.is_multiple_of(SECTOR_BYTES) && range.end.is_multiple_of(SECTOR_BYTES)
}

const fn count(sectors: &Range<u64>) -> u64 {
    sectors.end - sectors.start
}

impl<T: Transport, E: Engine> Session<T, E> {
    pub(super) fn new(
        transport: T,
        served: Served<E>,
        (memory, account): (Memory, Rc<Account>),
        spawn: Spawn,
        stopping: Rc<Cell<bool>>,
    ) -> Rc<Self> {
        Rc::new(Self {
            transport,
            served,
            memory,
            account,
            spawn,
            outgoing: RefCell::default(),
            to_send: Signal::default(),
            in_flight: Cell::new(0),
            one_ended: Signal::default(),
            sender_ended: Cell::new(false),
            broken: Cell::new(false),
            stopping,
        })
    }

    fn extended(&self) -> bool {
        self.served.dialect == Dialect::Extended
    }

    /// Serves until the client leaves, breaks the rules, or the server stops.
    pub(super) async fn run(self: Rc<Self>, input: Input) -> Result<(), Broken> {
        let sender = Rc::clone(&self);
        (self.spawn)(Box::pin(async move {
            sender.send_replies().await;
            sender.sender_ended.set(true);
            sender.one_ended.tell();
        }));
        let read = self.read_requests(input).await;
        self.account.goes_on(Wait::Payload);
        self.one_ended.until(|| self.in_flight.get() == 0).await;
        self.outgoing.borrow_mut().closing = true;
        self.to_send.tell();
        self.one_ended.until(|| self.sender_ended.get()).await;
        self.transport.close();
        read
    }

    async fn read_requests(self: &Rc<Self>, input: Input) -> Result<(), Broken> {
        let mut input = input.grown(INPUT);
        while !self.stopping.get() && !self.broken.get() {
            let Some((request, header)) = wire::parse_request(input.bytes(), self.extended())? else {
                let begun = !input.bytes().is_empty();
                if !input.fill(&self.transport).await? {
                    return if begun { Err(cut_off()) } else { Ok(()) };
                }
                continue;
            };
            // Small payloads that are not all there yet are waited for here: more requests may come in the same go.
            let payload = request.payload(self.extended());
            let have = input.bytes().len() - header;
            if payload > have as u64 && payload <= DIRECT as u64 {
                self.account.waits(Wait::Payload);
                let more = input.fill(&self.transport).await?;
                self.account.goes_on(Wait::Payload);
                if !more {
                    return Err(cut_off());
                }
                continue;
            }
            input.consume(header);
            if request.command == Command::Disc {
                return Ok(());
            }
            if self.in_flight.get() >= MAX_IN_FLIGHT {
                self.one_ended.until(|| self.in_flight.get() < MAX_IN_FLIGHT).await;
            }
            match self.check(&request) {
                Ok(range) => {
                    let data = if request.command == Command::Write {
                        Some(self.receive(&range, &mut input).await?)
                    } else {
                        None
                    };
                    self.begin(request, range, data);
                }
                Err(refusal) => {
                    if payload > wire::MAX_SKIPPED {
                        return Err(Nonsense("a request brings more data than any may").into());
                    }
                    input.skip(payload, &self.transport).await?;
                    self.refuse(&request, refusal);
                }
            }
        }
        Ok(())
    }

    /// The bytes that a request is about, or why it is refused.
    fn check(&self, r: &Request) -> Result<Range<u64>, Refusal> {
        let inval = |words| Err((Errno::Inval, words));
        let extended = self.extended();
        let (allowed, changes) = match r.command {
            Command::Read if self.served.dialect == Dialect::Simple => (0, false),
            Command::Read => (flag::DF, false),
            Command::Write if extended => (flag::FUA | flag::PAYLOAD_LEN, true),
            Command::Write | Command::Trim => (flag::FUA, true),
            Command::WriteZeroes => (flag::FUA | flag::NO_HOLE | flag::FAST_ZERO, true),
            Command::Flush | Command::Cache | Command::Disc => (0, false),
            Command::BlockStatus => (flag::REQ_ONE, false),
            Command::Unknown(_) => return inval("this server does not know the command"),
        };
        // FUA says nothing about requests that change nothing; the protocol allows it on all of them.
        if r.flags & !(allowed | flag::FUA) != 0 {
            return inval("the command does not take these flags");
        }
        if changes && self.served.read_only {
            return Err((Errno::Perm, "the export is read-only"));
        }
        if r.command == Command::Flush {
            return Ok(0..0);
        }
        if r.command == Command::BlockStatus && !self.served.allocation {
            return inval("no metadata context has been agreed upon");
        }
        if r.length == 0 {
            return inval("the request is about no bytes");
        }
        let past = if matches!(r.command, Command::Write | Command::WriteZeroes) { Errno::NoSpc } else { Errno::Inval };
        let Some(end) = r.offset.checked_add(r.length).filter(|end| *end <= self.served.size) else {
            return Err((past, "the request ends past the end of the export"));
        };
        if matches!(r.command, Command::Read | Command::Write) && r.length > wire::MAX_PAYLOAD.into() {
            return inval("the request is longer than 32 MiB");
        }
        Ok(r.offset..end)
    }

    /// Leases room for a write's sectors and receives its data to its place there.
    async fn receive(&self, range: &Range<u64>, input: &mut Input) -> Result<Lease, Broken> {
        let sectors = sectors_around(range);
        let lease = self.memory.lease(&self.account, count(&sectors) as usize * SECTOR).await;
        let pad = (range.start % SECTOR_BYTES) as usize;
        let place = lease.slice(pad..pad + (range.end - range.start) as usize);
        let mut have = input.bytes().len().min(place.len());
        place.copy_in(0, &input.bytes()[..have]);
        input.consume(have);
        while have < place.len() {
            self.account.waits(Wait::Payload);
            let to = place.len().min(have + STEP);
            let n = self.transport.recv(place.slice(have..to), true).await?;
            if n == 0 {
                return Err(cut_off());
            }
            have += n;
        }
        self.account.goes_on(Wait::Payload);
        Ok(lease)
    }

    fn begin(self: &Rc<Self>, request: Request, range: Range<u64>, data: Option<Lease>) {
        let fua = request.flags & flag::FUA != 0;
        let work = match (request.command, data) {
            (Command::Write, Some(data)) => Work::Write { range, fua, data },
            (Command::Read, _) => Work::Read { range, one_chunk: request.flags & flag::DF != 0 },
            (Command::Flush, _) => Work::Flush,
            (Command::Trim, _) => Work::Trim { range, fua },
            (Command::WriteZeroes, _) => Work::WriteZeroes { range, fua },
            (Command::BlockStatus, _) => Work::BlockStatus { range, one: request.flags & flag::REQ_ONE != 0 },
            // A wish to have something at hand; there is nothing to prepare.
            _ => Work::Nothing,
        };
        self.in_flight.set(self.in_flight.get() + 1);
        let session = Rc::clone(self);
        (self.spawn)(Box::pin(async move {
            session.work(&request, work).await;
            session.in_flight.set(session.in_flight.get() - 1);
            session.one_ended.tell();
        }));
    }

    async fn work(&self, request: &Request, work: Work) {
        let done = match work {
            Work::Read { range, one_chunk } => match self.read(request, range, one_chunk).await {
                Ok(()) => return,
                Err(fault) => Err(fault),
            },
            Work::BlockStatus { range, one } => match self.block_status(request, &range, one) {
                Ok(()) => return,
                Err(fault) => Err(fault),
            },
            Work::Write { range, fua, data } => self.write(&range, fua, data).await,
            Work::Flush => self.served.engine.flush().await,
            Work::Trim { range, fua } => self.trim(&range, fua).await,
            Work::WriteZeroes { range, fua } => self.write_zeroes(&range, fua).await,
            Work::Nothing => Ok(()),
        };
        match done {
            Ok(()) => self.reply(|heads| {
                if self.extended() {
                    self.chunks(request).none(heads);
                } else {
                    wire::simple_reply(heads, 0, request.cookie);
                }
            }),
            Err(fault) => self.refuse(request, of_fault(fault)),
        }
    }

    async fn write(&self, range: &Range<u64>, fua: bool, data: Lease) -> Result<(), IoFault> {
        let Served { engine, guard, .. } = &self.served;
        let sectors = sectors_around(range);
        if is_whole(range) {
            let _pass = guard.shared(sectors.clone()).await;
            return engine.write(Lba(sectors.start), data.all(), fua).await;
        }
        let _pass = guard.exclusive(sectors.clone()).await;
        let (all, old) = (data.all(), IoBuf::zeroed(SECTOR));
        let (head, tail) = ((range.start % SECTOR_BYTES) as usize, (range.end % SECTOR_BYTES) as usize);
        if head > 0 {
            engine.read(Lba(sectors.start), old.clone()).await?;
            all.copy_in(0, &old.bytes()[..head]);
        }
        if tail > 0 {
            engine.read(Lba(sectors.end - 1), old.clone()).await?;
            all.copy_in(all.len() - SECTOR + tail, &old.bytes()[tail..]);
        }
        engine.write(Lba(sectors.start), all, fua).await
    }

    async fn trim(&self, range: &Range<u64>, fua: bool) -> Result<(), IoFault> {
        // What is not a whole sector stays: a trim is a hint.
        let whole = range.start.div_ceil(SECTOR_BYTES)..range.end / SECTOR_BYTES;
        if whole.is_empty() {
            return Ok(());
        }
        let _pass = self.served.guard.shared(whole.clone()).await;
        self.served.engine.discard(Lba(whole.start), count(&whole), fua).await
    }

    async fn write_zeroes(&self, range: &Range<u64>, fua: bool) -> Result<(), IoFault> {
        let Served { engine, guard, .. } = &self.served;
        let sectors = sectors_around(range);
        if is_whole(range) {
            let _pass = guard.shared(sectors.clone()).await;
            return engine.write_zeroes(Lba(sectors.start), count(&sectors), fua).await;
        }
        let _pass = guard.exclusive(sectors.clone()).await;
        let whole = range.start.div_ceil(SECTOR_BYTES)..range.end / SECTOR_BYTES;
        let edges = [sectors.start, sectors.end - 1];
        for sector in &edges[..if edges[0] == edges[1] { 1 } else { 2 }] {
            if whole.contains(sector) {
                continue;
            }
            let base = sector * SECTOR_BYTES;
            let from = range.start.max(base) - base;
            let to = range.end.min(base + SECTOR_BYTES) - base;
            let buf = IoBuf::zeroed(SECTOR);
            engine.read(Lba(*sector), buf.clone()).await?;
            buf.zero(from as usize..to as usize);
            engine.write(Lba(*sector), buf, fua).await?;
        }
        if whole.is_empty() {
            return Ok(());
        }
        engine.write_zeroes(Lba(whole.start), count(&whole), fua).await
    }

    async fn read(&self, request: &Request, range: Range<u64>, one_chunk: bool) -> Result<(), IoFault> {
        let engine = &self.served.engine;
        let sectors = sectors_around(&range);
        let len = (range.end - range.start) as u32;
        let chunked = self.served.dialect != Dialect::Simple;
        let mut extents = Vec::new();
        if chunked {
            engine.extents(Lba(sectors.start), count(&sectors), &mut extents)?;
            if extents.iter().all(|e| e.hole) {
                self.reply(|heads| self.chunks(request).hole(heads, true, range.start, len));
                return Ok(());
            }
        }
        let lease = Rc::new(self.memory.lease(&self.account, count(&sectors) as usize * SECTOR).await);
        engine.read(Lba(sectors.start), lease.all()).await?;
        let first = sectors.start * SECTOR_BYTES;
        let part = |r: &Range<u64>| lease.slice((r.start - first) as usize..(r.end - first) as usize);
        if !chunked {
            self.answer(&lease, |heads, data| {
                wire::simple_reply(heads, 0, request.cookie);
                data(heads.len(), part(&range));
            });
            return Ok(());
        }
        let parts = if one_chunk { vec![(range.clone(), false)] } else { cut(&extents, first, &range) };
        let chunks = self.chunks(request);
        self.answer(&lease, |heads, data| {
            for (i, (r, hole)) in parts.iter().enumerate() {
                let (done, len) = (i + 1 == parts.len(), (r.end - r.start) as u32);
                if *hole {
                    chunks.hole(heads, done, r.start, len);
                } else {
                    chunks.data(heads, done, r.start, len);
                    data(heads.len(), part(r));
                }
            }
        });
        Ok(())
    }

    fn block_status(&self, request: &Request, range: &Range<u64>, one: bool) -> Result<(), IoFault> {
        let sectors = sectors_around(range);
        let end = sectors.end.min(sectors.start + MAX_LOOK / SECTOR_BYTES);
        let mut found: Vec<Extent> = Vec::new();
        let mut at = sectors.start;
        while at < end && found.len() < if one { 2 } else { MAX_EXTENTS } {
            let step = (end - at).min(LOOK / SECTOR_BYTES);
            let before = found.len();
            self.served.engine.extents(Lba(at), step, &mut found)?;
            at += step;
            // What goes on over the step's border is one extent.
            if before > 0
                && let Some(next) = found.get(before).copied()
                && found[before - 1].hole == next.hole
            {
                found[before - 1].sectors += next.sectors;
                found.remove(before);
            }
        }
        found.truncate(if one { 1 } else { MAX_EXTENTS });
        let mut extents = Vec::with_capacity(found.len());
        let mut from = sectors.start * SECTOR_BYTES;
        for e in found {
            let to = from + e.sectors * SECTOR_BYTES;
            let clipped = from.max(range.start)..to.min(range.end);
            if !clipped.is_empty() {
                extents.push((clipped.end - clipped.start, e.hole));
            }
            from = to;
        }
        self.reply(|heads| self.chunks(request).block_status(heads, &extents));
        Ok(())
    }

    const fn chunks(&self, request: &Request) -> Chunks {
        let extended = matches!(self.served.dialect, Dialect::Extended);
        Chunks { cookie: request.cookie, offset: request.offset, extended }
    }

    fn refuse(&self, request: &Request, (errno, words): Refusal) {
        self.reply(|heads| {
            if self.served.dialect == Dialect::Simple {
                wire::simple_reply(heads, errno as u32, request.cookie);
            } else {
                self.chunks(request).error(heads, errno, words);
            }
        });
    }

    /// Queues a reply without data.
    fn reply(&self, write: impl FnOnce(&mut Vec<u8>)) {
        write(&mut self.outgoing.borrow_mut().heads);
        self.to_send.tell();
    }

    /// Queues a reply with parts of `lease`, which is given back when they have gone.
    fn answer(&self, lease: &Rc<Lease>, write: impl FnOnce(&mut Vec<u8>, &mut dyn FnMut(usize, IoBuf))) {
        let Outgoing { heads, data, .. } = &mut *self.outgoing.borrow_mut();
        write(heads, &mut |at, buf| data.push((at, buf, Rc::clone(lease))));
        self.to_send.tell();
    }

    async fn send_replies(&self) {
        let mut spare = Outgoing::default();
        let mut room = IoBuf::zeroed(BLOCK);
        loop {
            self.to_send
                .until(|| {
                    let o = self.outgoing.borrow();
                    o.closing || !o.is_empty()
                })
                .await;
            let mut now = {
                let mut o = self.outgoing.borrow_mut();
                if o.is_empty() {
                    return;
                }
                spare.closing = o.closing;
                std::mem::replace(&mut *o, spare)
            };
            if !self.broken.get() {
                if room.len() < now.heads.len() {
                    room = IoBuf::zeroed(now.heads.len().next_power_of_two());
                }
                room.copy_in(0, &now.heads);
                let bufs = interleave(&room, now.heads.len(), &now.data);
                self.account.waits(Wait::Taking);
                let sent = self.transport.send(bufs, &|| self.account.waits(Wait::Taking)).await;
                self.account.goes_on(Wait::Taking);
                if let Err(e) = sent {
                    tracing::debug!("sending to a client failed: {e}");
                    self.broken.set(true);
                    // Whoever reads from it hears of it, too.
                    self.transport.close();
                }
            }
            now.heads.clear();
            now.data.clear();
            spare = now;
        }
    }
}

fn cut_off() -> Broken {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the client hung up in the middle of a request").into()
}

/// Heads and data in the order in which they go out.
fn interleave(heads: &IoBuf, len: usize, data: &[(usize, IoBuf, Rc<Lease>)]) -> Vec<IoBuf> {
    let mut bufs = Vec::with_capacity(2 * data.len() + 1);
    let mut from = 0;
    for (at, buf, _) in data {
        if *at > from {
            bufs.push(heads.slice(from..*at));
            from = *at;
        }
        bufs.push(buf.clone());
    }
    if len > from {
        bufs.push(heads.slice(from..len));
    }
    bufs
}

/// The bytes of `range`, cut where holes begin and end that are worth it. `first` is where the extents begin.
fn cut(extents: &[Extent], first: u64, range: &Range<u64>) -> Vec<(Range<u64>, bool)> {
    let mut parts: Vec<(Range<u64>, bool)> = Vec::new();
    let mut from = first;
    for e in extents {
        let to = from + e.sectors * SECTOR_BYTES;
        let here = from.max(range.start)..to.min(range.end);
        from = to;
        if here.is_empty() {
            continue;
        }
        let hole = e.hole && here.end - here.start >= WORTH_A_HOLE;
        match parts.last_mut() {
            Some((last, kind)) if *kind == hole => last.end = here.end,
            _ => parts.push((here, hole)),
        }
    }
    parts
}

#[cfg(test)]
mod tests;
