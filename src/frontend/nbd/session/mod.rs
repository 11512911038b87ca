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

mod replies;
mod work;

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::ops::Range;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{Either, select};

use super::guard::{Enter, Guard, Pass};
use super::handshake::{Broken, Dialect};
use super::memory::{Account, Lease, Memory, Wait};
use super::signal::Signal;
use super::transport::{Input, Transport};
use super::wire::{self, Chunks, Command, Errno, Nonsense, Request, flag};
use crate::disk::IoBuf;
use crate::time::monotonic_now;
use crate::units::SECTOR;
use crate::volume::engine::{Engine, IoFault};
use replies::Outgoing;
use work::{SECTOR_BYTES, count, is_whole, sectors_around};

/// Received at once, in bytes: at first, and when a client sends much.
const INPUT: usize = 64 << 10;
const MAX_INPUT: usize = 256 << 10;
/// A payload of more than this is received straight into its place, if it is not there already.
const DIRECT: usize = 32 << 10;
/// …in steps, so that a slow client can be told from one that has stopped.
const STEP: usize = 1 << 20;
/// Requests of a client under way at once.
const MAX_IN_FLIGHT: usize = 1024;
/// Requests of a client that wait for others' changes of the same sectors.
const MAX_TURNS: usize = 64;
/// How long a client that has ended may take to take its last answers…
const FAREWELL: Duration = Duration::from_secs(10);
/// …and to hang up itself, so that they are not thrown away with what it still sends.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A future that a lane runs.
pub(super) type Task = Pin<Box<dyn Future<Output = ()>>>;

/// What a session asks of its lane.
pub(super) struct Beside {
    /// Runs a future beside the others.
    pub(super) spawn: Box<dyn Fn(Task)>,
    /// Lets so much time pass; with none, the others of the lane have a turn, the kernel included.
    pub(super) sleep: Box<dyn Fn(Duration) -> Task>,
}

impl Beside {
    fn rest(&self) -> Task {
        (self.sleep)(Duration::ZERO)
    }
}

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

/// See the module's page.
pub(super) struct Session<T, E> {
    transport: T,
    served: Served<E>,
    memory: Memory,
    account: Rc<Account>,
    beside: Beside,
    outgoing: RefCell<Outgoing>,
    to_send: Signal,
    /// Requests whose answers have not gone.
    in_flight: Cell<usize>,
    one_ended: Signal,
    /// Requests that wait at the guard.
    at_guard: Cell<usize>,
    /// Extents are being looked for.
    looking: Cell<bool>,
    may_look: Signal,
    sender_ended: Cell<bool>,
    /// The client's socket has failed: answers go nowhere.
    broken: Cell<bool>,
    /// The client has ended without a word: reads that have not begun are not worth it any more.
    hung_up: Cell<bool>,
    /// The volume is.
    gone: Cell<bool>,
    stopping: Rc<Cell<bool>>,
}

/// How a client ended.
enum Ending {
    /// It said so, or the server did.
    GoodBye,
    /// Without a word: it may be gone.
    HungUp,
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

impl<T: Transport, E: Engine> Session<T, E> {
    pub(super) fn new(
        transport: T,
        served: Served<E>,
        (memory, account): (Memory, Rc<Account>),
        beside: Beside,
        stopping: Rc<Cell<bool>>,
    ) -> Rc<Self> {
        Rc::new(Self {
            transport,
            served,
            memory,
            account,
            beside,
            outgoing: RefCell::default(),
            to_send: Signal::default(),
            in_flight: Cell::new(0),
            one_ended: Signal::default(),
            at_guard: Cell::new(0),
            looking: Cell::new(false),
            may_look: Signal::default(),
            sender_ended: Cell::new(false),
            broken: Cell::new(false),
            hung_up: Cell::new(false),
            gone: Cell::new(false),
            stopping,
        })
    }

    fn extended(&self) -> bool {
        self.served.dialect == Dialect::Extended
    }

    /// Serves until the client leaves, breaks the rules, or the server stops.
    pub(super) async fn run(self: Rc<Self>, input: Input) -> Result<(), Broken> {
        let sender = Rc::clone(&self);
        (self.beside.spawn)(Box::pin(async move {
            sender.send_replies().await;
            sender.sender_ended.set(true);
            sender.one_ended.tell();
        }));
        let read = self.read_requests(input).await;
        self.account.goes_on(Wait::Payload);
        self.hung_up.set(!matches!(read, Ok(Ending::GoodBye)));
        let last_answers = async {
            self.one_ended.until(|| self.in_flight.get() == 0).await;
            self.outgoing.borrow_mut().closing = true;
            self.to_send.tell();
            self.one_ended.until(|| self.sender_ended.get()).await;
        };
        let mut last_answers = pin!(last_answers);
        // As long as the volume takes for them; but a client that does not take them is left.
        while let Either::Right(_) = select(last_answers.as_mut(), (self.beside.sleep)(LAST_WORDS)).await {
            if self.account.has_not_taken_since(monotonic_now().saturating_sub(FAREWELL)) {
                self.transport.close();
            }
        }
        if !self.broken.get() {
            select(pin!(self.say_good_bye()), (self.beside.sleep)(LAST_WORDS)).await;
        }
        self.transport.close();
        read.map(drop)
    }

    /// Ends our direction, and reads past what the client has sent meanwhile until it ends its own: a socket that is closed
    /// over unread bytes resets the connection, and the client may never see its last answers.
    async fn say_good_bye(&self) {
        let rubbish = IoBuf::zeroed(SECTOR);
        if self.transport.finish().await.is_ok() {
            while matches!(self.transport.recv(rubbish.clone(), false).await, Ok(1..)) {}
        }
    }

    async fn read_requests(self: &Rc<Self>, input: Input) -> Result<Ending, Broken> {
        let mut input = input.grown(INPUT);
        let may_go_on = || {
            self.in_flight.get() < MAX_IN_FLIGHT && self.at_guard.get() < MAX_TURNS && self.outgoing.borrow().is_small()
        };
        while !self.stopping.get() && !self.broken.get() && !self.gone.get() {
            let Some((request, header)) = wire::parse_request(input.bytes(), self.extended())? else {
                let begun = !input.bytes().is_empty();
                if input.is_full() {
                    input = input.grown(MAX_INPUT);
                }
                if !input.fill(&self.transport).await? {
                    return if begun { Err(cut_off()) } else { Ok(Ending::HungUp) };
                }
                continue;
            };
            // Small payloads that are not all there yet are waited for here: more requests may come in the same go.
            let payload = request.payload(self.extended());
            let have = input.bytes().len() - header;
            if payload > have as u64 && payload <= DIRECT as u64 {
                if input.is_full() {
                    input = input.grown(MAX_INPUT);
                }
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
                return Ok(Ending::GoodBye);
            }
            if !may_go_on() {
                self.one_ended.until(may_go_on).await;
            }
            self.in_flight.set(self.in_flight.get() + 1);
            if let Err(e) = self.take(request, payload, &mut input).await {
                self.in_flight.set(self.in_flight.get() - 1);
                return Err(e);
            }
        }
        Ok(Ending::GoodBye)
    }

    /// Begins a request, or refuses it. An error ends the session, and the request has no answer.
    async fn take(self: &Rc<Self>, request: Request, payload: u64, input: &mut Input) -> Result<(), Broken> {
        match self.check(&request) {
            Ok(range) => {
                let writes = request.command == Command::Write;
                let data = if writes { Some(self.receive(&range, input).await?) } else { None };
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
        if r.flags & flag::FAST_ZERO != 0 && !is_whole(&(r.offset..r.offset.saturating_add(r.length))) {
            return Err((Errno::NotSup, "parts of sectors cannot be zeroed fast"));
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
        let len = count(&sectors) as usize * SECTOR;
        let lease = self.memory.lease_if(&self.account, len, || !self.broken.get()).await.ok_or_else(cut_off)?;
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
        let session = Rc::clone(self);
        (self.beside.spawn)(Box::pin(async move { session.work(&request, work).await }));
    }

    /// Waits at the guard; who has many there is not read from.
    async fn turn<'a>(&self, enter: Enter<'a>) -> Pass<'a> {
        self.at_guard.set(self.at_guard.get() + 1);
        let pass = enter.await;
        self.at_guard.set(self.at_guard.get() - 1);
        if self.at_guard.get() + 1 == MAX_TURNS {
            self.one_ended.tell();
        }
        pass
    }

    async fn work(&self, request: &Request, work: Work) {
        let done = match work {
            Work::Read { range, one_chunk } => match self.read(request, range, one_chunk).await {
                Ok(()) => return,
                Err(fault) => Err(fault),
            },
            Work::BlockStatus { range, one } => match self.block_status(request, &range, one).await {
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
            Err(fault) => {
                self.refuse(request, of_fault(fault));
                if fault == IoFault::Gone && !self.hung_up.get() {
                    // It does not come back on this connection; a client that connects anew may get it.
                    self.gone.set(true);
                    self.transport.stop_reading();
                }
            }
        }
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
}

fn cut_off() -> Broken {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the client hung up in the middle of a request").into()
}

#[cfg(test)]
mod tests;
