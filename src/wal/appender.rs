//! One lane's side of the log: gathers what the lane's tasks write, seals it as one record, acknowledges.
//!
//! Invariants:
//! - Batches take their places in the log in the order in which they gathered. While a record is in flight the next
//!   batch gathers; a second record leaves beside the first once it is worth one ([`WORTH_ENTRIES`], [`WORTH_BLOCKS`]).
//! - A ticket is answered `Ok` only when the frontier has passed its record.
//! - Once the log has failed, every ticket is answered with [`NotLogged::Failed`].
//! - An entry that [`Appender::expire`] gives up has no place in the log and never gets one: a newer write to the same
//!   sectors cannot be overtaken by it.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures_util::future::{Either, select};

use super::batch::Batch;
use super::codec::{LogPos, MAX_HEADER_BYTES, RecordEntry, RecordKind, header_bytes, place_record, prepare_record};
use super::log::{Failed, Log, Refused, Room, number_entries};
use crate::checksum::block_crc;
use crate::disk::{Disk, IoBuf};
use crate::units::{BLOCK, BlockNo, Lba, SECTOR, SECTORS_PER_BLOCK, Seq};

/// Most data buffers in a record (a vectored write takes 1000, and headers need some).
const MAX_BUFFERS: usize = 990;
/// Most data bytes in a record, unless a single entry has more.
const MAX_BATCH_BYTES: usize = 2 << 20;

/// Records of a lane in flight at most: while one is on the disk, its successor's requests arrive.
const RECORDS_IN_FLIGHT: usize = 2;
/// A batch that leaves beside another has so many entries…
const WORTH_ENTRIES: usize = 8;
/// …or blocks: a header block for each small write would cost more than the wait.
const WORTH_BLOCKS: usize = 64;

/// What an appender has done: how well batching works.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct AppendCounters {
    /// Records written.
    pub records: u64,
    /// Entries in them.
    pub entries: u64,
    /// Records that left while another of the lane's was in flight.
    pub overlapped: u64,
}

/// Why an entry is not in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotLogged {
    /// The log has failed.
    Failed,
    /// It waited too long for room.
    Expired,
}

impl From<Failed> for NotLogged {
    fn from(_: Failed) -> Self {
        Self::Failed
    }
}

enum TicketState {
    Free,
    Waiting(Option<Waker>),
    Done(Result<LogPos, NotLogged>),
}

#[derive(Default)]
struct State {
    batches: VecDeque<Batch>,
    spare: Vec<Batch>,
    /// Batches at the front that may leave.
    sealed: usize,
    tickets: Vec<TicketState>,
    free_tickets: Vec<usize>,
    passing: VecDeque<(LogPos, Vec<usize>)>,
    spare_tickets: Vec<Vec<usize>>,
    /// Committers that have nothing to write.
    idle: Vec<Waker>,
    /// Committers that have.
    writing: usize,
    passer: Option<Waker>,
    /// Committers that wait for room.
    stalled: usize,
    /// Who wants to know of them.
    expirer: Option<Waker>,
    /// What has waited since before this is given up; how often that was looked at; who does it with a batch of its own.
    cutoff: Duration,
    looks: u64,
    lookers: Vec<Waker>,
    counters: AppendCounters,
}

/// See the module's page.
pub struct Appender<D: Disk> {
    log: Arc<Log>,
    disk: D,
    state: RefCell<State>,
}

/// Answers when the entry is in the log and everything before it too: the log's position after its record.
pub struct Ticket<'a, D: Disk> {
    appender: &'a Appender<D>,
    id: usize,
}

impl<D: Disk> Future for Ticket<'_, D> {
    type Output = Result<LogPos, NotLogged>;
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut s = self.appender.state.borrow_mut();
        match &mut s.tickets[self.id] {
            TicketState::Done(r) => Poll::Ready(*r),
            TicketState::Waiting(w) => {
                *w = Some(cx.waker().clone());
                Poll::Pending
            }
            TicketState::Free => Poll::Ready(Err(NotLogged::Failed)),
        }
    }
}

impl<D: Disk> Drop for Ticket<'_, D> {
    fn drop(&mut self) {
        let mut s = self.appender.state.borrow_mut();
        // A ticket dropped early keeps its place until the record is through; the place is then lost to reuse,
        // which happens only at shutdown.
        if matches!(s.tickets[self.id], TicketState::Done(_)) {
            s.tickets[self.id] = TicketState::Free;
            s.free_tickets.push(self.id);
        }
    }
}

impl<D: Disk> Appender<D> {
    /// An appender for one lane; `disk` is the lane's own descriptor of the log.
    pub fn new(log: Arc<Log>, disk: D) -> Self {
        Self { log, disk, state: RefCell::default() }
    }

    /// The lane's descriptor of the log.
    pub const fn disk(&self) -> &D {
        &self.disk
    }

    /// Counts so far.
    #[must_use]
    pub fn counters(&self) -> AppendCounters {
        self.state.borrow().counters
    }

    /// Adds a write of `src` at `lba`, which waits since `since`. The bytes must not change until the ticket is answered.
    pub fn push_data(&self, lba: Lba, src: &IoBuf, fua: bool, since: Duration) -> Ticket<'_, D> {
        let entry = RecordEntry { lba, sectors: (src.len() / SECTOR) as u64, kind: RecordKind::Data };
        let whole = lba.0.is_multiple_of(SECTORS_PER_BLOCK) && src.is_aligned(BLOCK);
        let stored = if whole {
            src.clone()
        } else {
            // Each sector at its place within its block, the rest of the block zero: O_DIRECT wants whole blocks.
            let padded = IoBuf::zeroed(entry.stored_blocks() as usize * BLOCK);
            padded.copy_in((lba.0 % SECTORS_PER_BLOCK) as usize * SECTOR, src.bytes());
            padded
        };
        self.push(entry, Some(stored), fua, since)
    }

    /// Adds a discard or zeroing, which waits since `since`.
    pub fn push_hole(&self, lba: Lba, sectors: u64, kind: RecordKind, fua: bool, since: Duration) -> Ticket<'_, D> {
        self.push(RecordEntry { lba, sectors, kind }, None, fua, since)
    }

    fn push(&self, entry: RecordEntry, stored: Option<IoBuf>, fua: bool, since: Duration) -> Ticket<'_, D> {
        let mut s = self.state.borrow_mut();
        let s = &mut *s;
        let id = s.free_tickets.pop().unwrap_or_else(|| {
            s.tickets.push(TicketState::Free);
            s.tickets.len() - 1
        });
        s.tickets[id] = TicketState::Waiting(None);
        let bytes = stored.as_ref().map_or(0, IoBuf::len);
        let roomy = s.batches.len() > s.sealed
            && s.batches.back().is_some_and(|b| {
                let (entries, blocks) = (b.entries.len() + 1, b.crcs.len() + bytes / BLOCK);
                b.data.len() < MAX_BUFFERS
                    // Discards have no data to bound a batch, and a larger header would not be read back.
                    && header_bytes(entries, blocks) <= MAX_HEADER_BYTES
                    && blocks * BLOCK <= MAX_BATCH_BYTES
                    && header_bytes(entries, blocks) + blocks * BLOCK <= self.log.geometry().max_record() as usize
            });
        if !roomy {
            let fresh = s.spare.pop().unwrap_or_default();
            s.batches.push_back(Batch { all_fua: true, ..fresh });
        }
        if let Some(b) = s.batches.back_mut() {
            if let Some(buf) = stored {
                let first = entry.lba.block().0;
                for (i, block) in buf.bytes().chunks_exact(BLOCK).enumerate() {
                    b.crcs.push(block_crc(BlockNo(first + i as u64), block));
                }
                b.data.push(buf);
            }
            b.entries.push(entry);
            b.tickets.push(id);
            b.since.push(since);
            b.all_fua &= fua;
        }
        Ticket { appender: self, id }
    }

    /// What has gathered may leave, if no record is in flight or it is worth a second one.
    pub fn seal(&self) {
        let mut s = self.state.borrow_mut();
        let Some(first) = s.batches.front() else { return };
        let worth = first.entries.len() >= WORTH_ENTRIES || first.crcs.len() >= WORTH_BLOCKS;
        if s.sealed > 0 || s.writing > 0 && !worth {
            return;
        }
        if let Some(w) = s.idle.pop() {
            s.sealed = s.batches.len();
            w.wake();
        }
    }

    async fn next_batch(&self) -> Batch {
        std::future::poll_fn(|cx| {
            let mut s = self.state.borrow_mut();
            if s.sealed > 0
                && let Some(b) = s.batches.pop_front()
            {
                s.sealed -= 1;
                s.writing += 1;
                s.counters.overlapped += u64::from(s.writing > 1);
                return Poll::Ready(b);
            }
            if !s.idle.iter().any(|w| w.will_wake(cx.waker())) {
                s.idle.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await
    }

    /// Waits until a record waits for room in the log.
    pub async fn stalled(&self) {
        std::future::poll_fn(|cx| {
            let mut s = self.state.borrow_mut();
            if s.stalled > 0 {
                return Poll::Ready(());
            }
            s.expirer = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Gives up what waits for room since before `cutoff`.
    pub fn expire(&self, cutoff: Duration) {
        let mut s = self.state.borrow_mut();
        if s.stalled == 0 {
            return;
        }
        let expired: Vec<usize> = s.batches.iter_mut().flat_map(|b| b.expire(cutoff)).collect();
        s.answer(&expired, Err(NotLogged::Expired));
        s.cutoff = cutoff;
        s.looks += 1;
        std::mem::take(&mut s.lookers).into_iter().for_each(Waker::wake);
    }

    /// Waits for the next look for what has waited too long; returns its cutoff.
    async fn look(&self, seen: u64) -> Duration {
        std::future::poll_fn(|cx| {
            let mut s = self.state.borrow_mut();
            if s.looks != seen {
                return Poll::Ready(s.cutoff);
            }
            if !s.lookers.iter().any(|w| w.will_wake(cx.waker())) {
                s.lookers.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await
    }

    /// Waits for room, and meanwhile gives up what of the batch has waited too long. Whether any of it has.
    async fn wait_for_room(&self, batch: &mut Batch, record_bytes: u32) -> bool {
        {
            let mut s = self.state.borrow_mut();
            s.stalled += 1;
            if let Some(w) = s.expirer.take() {
                w.wake();
            }
        }
        let mut freed = std::pin::pin!(self.log.room_freed(record_bytes));
        let given_up = loop {
            let seen = self.state.borrow().looks;
            let Either::Right((cutoff, _)) = select(freed.as_mut(), std::pin::pin!(self.look(seen))).await else {
                break false;
            };
            let expired = batch.expire(cutoff);
            if !expired.is_empty() {
                self.state.borrow_mut().answer(&expired, Err(NotLogged::Expired));
                // What is left may fit in.
                break true;
            }
        };
        self.state.borrow_mut().stalled -= 1;
        given_up
    }

    /// What the lane has to run beside the requests, for ever.
    pub fn tasks(self: Rc<Self>) -> Vec<Pin<Box<dyn Future<Output = ()>>>>
    where
        D: 'static,
    {
        // The passer first: the committers hand its waker out.
        let mut tasks: Vec<Pin<Box<dyn Future<Output = ()>>>> = vec![Box::pin(self.clone().passer())];
        for _ in 0..RECORDS_IN_FLIGHT {
            tasks.push(Box::pin(self.clone().committer()));
        }
        tasks
    }

    /// Writes batch after batch, for ever.
    async fn committer(self: Rc<Self>) {
        // The passer's waker goes with each reservation: it is what waits for the frontier.
        let passer = std::future::poll_fn(|_| match &self.state.borrow().passer {
            Some(w) => Poll::Ready(w.clone()),
            None => Poll::Pending,
        })
        .await;
        loop {
            let mut batch = self.next_batch().await;
            let written = self.write(&mut batch, &passer).await;
            let mut s = self.state.borrow_mut();
            s.writing -= 1;
            match written {
                // All of it was given up.
                Ok(None) => {}
                Ok(Some(end)) => {
                    s.counters.records += 1;
                    s.counters.entries += batch.entries.len() as u64;
                    let spare = s.spare_tickets.pop().unwrap_or_default();
                    let tickets = std::mem::replace(&mut batch.tickets, spare);
                    s.passing.push_back((end, tickets));
                    passer.wake_by_ref();
                }
                Err(Failed) => s.answer(&std::mem::take(&mut batch.tickets), Err(NotLogged::Failed)),
            }
            batch.clear();
            s.spare.push(batch);
        }
    }

    /// Where the record ends; `None` when nothing is left to write.
    async fn write(&self, batch: &mut Batch, passer: &Waker) -> Result<Option<LogPos>, Failed> {
        let mut header = self.header(batch);
        let room = loop {
            if batch.entries.is_empty() {
                return Ok(None);
            }
            let record_bytes = (header.len() + batch.crcs.len() * BLOCK) as u32;
            match self.log.reserve(record_bytes, batch.entries.len() as u32, passer) {
                Ok(room) => break room,
                Err(Refused::Full) if self.wait_for_room(batch, record_bytes).await => header = self.header(batch),
                Err(Refused::Full) => {}
                Err(Refused::Failed) => return Err(Failed),
            }
        };
        let header_blocks = (header.len() / BLOCK) as u32;
        let dsync = batch.all_fua && room.clean && !batch.entries.is_empty();
        let first_block = room.record_block + header_blocks;
        for (i, crc) in batch.crcs.iter().enumerate() {
            self.log.set_crc(first_block + i as u32, *crc);
        }
        let last = Seq(room.placement.first_seq.0 + batch.entries.len() as u64 - 1);
        self.log.recent().keep(first_block, last, &batch.data);
        write_record(&self.log, &self.disk, &room, header, std::mem::take(&mut batch.data), dsync).await?;
        let entries = number_entries(&batch.entries, room.placement.first_seq, first_block).collect();
        self.log.complete(&room, entries);
        if dsync {
            self.log.durable_to(room.end);
        }
        Ok(Some(room.end))
    }

    fn header(&self, batch: &Batch) -> IoBuf {
        let mut header = IoBuf::zeroed(header_bytes(batch.entries.len(), batch.crcs.len()));
        prepare_record(header.bytes_mut(), self.log.volume(), &batch.entries, &batch.crcs);
        header
    }

    /// Answers tickets as the frontier passes their records, for ever.
    async fn passer(self: Rc<Self>) {
        std::future::poll_fn(|cx| {
            self.state.borrow_mut().passer = Some(cx.waker().clone());
            Poll::Ready(())
        })
        .await;
        loop {
            let end = std::future::poll_fn(|_| match self.state.borrow().passing.front() {
                Some((end, _)) => Poll::Ready(*end),
                None => Poll::Pending,
            })
            .await;
            let result = self.log.passed(end).await.map(|()| end).map_err(NotLogged::from);
            let mut s = self.state.borrow_mut();
            if let Some((_, tickets)) = s.passing.pop_front() {
                s.answer(&tickets, result);
                let mut tickets = tickets;
                tickets.clear();
                s.spare_tickets.push(tickets);
            }
        }
    }
}

impl State {
    fn answer(&mut self, tickets: &[usize], result: Result<LogPos, NotLogged>) {
        for &id in tickets {
            if let TicketState::Waiting(Some(w)) = std::mem::replace(&mut self.tickets[id], TicketState::Done(result)) {
                w.wake();
            }
        }
    }
}

/// Places the prepared header in `room` and writes the record (with its segment's header, if it is the first).
async fn write_record<D: Disk>(
    log: &Log,
    disk: &D,
    room: &Room,
    mut header: IoBuf,
    data: Vec<IoBuf>,
    dsync: bool,
) -> Result<(), Failed> {
    place_record(header.bytes_mut(), &room.placement);
    let mut bufs = Vec::with_capacity(data.len() + 2);
    if let Some(segment) = &room.segment {
        let mut block = IoBuf::zeroed(BLOCK);
        segment.encode_into(block.bytes_mut());
        bufs.push(block);
    }
    bufs.push(header);
    bufs.extend(data);
    disk.writev_at(room.file_offset, bufs, dsync).await.map_err(|e| {
        log.fail(format!("writing the log at byte {} failed: {e}", room.file_offset));
        Failed
    })
}

/// Appends a record without entries: it carries the durable mark.
///
/// # Errors
/// When the log has failed. A full log is no error: nothing is written.
pub async fn append_empty<D: Disk>(log: &Log, disk: &D) -> Result<(), Failed> {
    let mut header = IoBuf::zeroed(header_bytes(0, 0));
    prepare_record(header.bytes_mut(), log.volume(), &[], &[]);
    let room = match log.reserve(header.len() as u32, 0, Waker::noop()) {
        Ok(room) => room,
        Err(Refused::Full) => return Ok(()),
        Err(Refused::Failed) => return Err(Failed),
    };
    write_record(log, disk, &room, header, Vec::new(), false).await?;
    log.complete(&room, Vec::new());
    Ok(())
}
