//! What the clients of one lane may take of its memory, and the buffers themselves.
//!
//! Each connection has an allowance of its own ([`OWN`]), so small requests always get on; beyond it, connections share the
//! lane's [`SHARED`] bytes, at most [`SHARE`] each. Who finds nothing left waits, which ends in the client's socket: it
//! is not read.
//!
//! Not reckoned here: what a connection receives into (at most 256 KiB), headers of answers (about as much), and a sector's copy for each
//! change of parts of sectors.
//!
//! Invariants:
//! - The bytes of all living [`Lease`]s are at most `SHARED` + `OWN` for each connection.
//! - Who waits is served in order; a lease that is dropped lets the next ones on. What is a client's own comes back to that client
//!   at once, whoever else waits: nobody can hold up another's small requests.
//! - A buffer goes back to the pool only when nobody else looks at it.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;

use crate::disk::IoBuf;
use crate::time::monotonic_now;

/// Bytes that a lane's clients share.
pub(super) const SHARED: usize = 128 << 20;
/// Bytes of it that one client may have: as much as the largest request, and as much again.
const SHARE: usize = 64 << 20;
/// Bytes that a client has for itself.
pub(super) const OWN: usize = 1 << 20;
/// Buffers are kept for the next request, by powers of two from 4 KiB…
const SMALLEST: u32 = 12;
/// …to 32 MiB: a fresh one has to be zeroed, which takes longer than to fill it.
const LARGEST: u32 = 25;
/// The most bytes that are kept.
const KEPT: usize = 64 << 20;

/// A client's part.
#[derive(Debug, Default)]
pub(super) struct Account {
    own: Cell<usize>,
    shared: Cell<usize>,
    /// Since when the client has neither given nor taken a byte that the server waits for.
    waits: [Cell<Option<Duration>>; 2],
}

/// What the server may wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    /// The rest of a request.
    Payload,
    /// That it takes its answers.
    Taking,
}

impl Account {
    /// The server begins to wait for this client, or goes on to after something has moved.
    pub(super) fn waits(&self, what: Wait) {
        self.waits[what as usize].set(Some(monotonic_now()));
    }

    /// The server does not wait for that any more.
    pub(super) fn goes_on(&self, what: Wait) {
        self.waits[what as usize].set(None);
    }

    /// Whether it has not taken a byte of what is being sent since `then`.
    pub(super) fn has_not_taken_since(&self, then: Duration) -> bool {
        self.waits[Wait::Taking as usize].get().is_some_and(|s| s < then)
    }

    /// Whether it has memory that others could use and has not moved since `then`.
    pub(super) fn hoards_since(&self, then: Duration) -> bool {
        self.shared.get() > 0 && self.waits.iter().any(|w| w.get().is_some_and(|s| s < then))
    }
}

struct Waiter {
    id: u64,
    bytes: usize,
    account: Rc<Account>,
    waker: Waker,
    granted: Option<Granted>,
    since: Duration,
}

/// Where the memory that somebody has been given comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Granted {
    Own,
    Shared,
}

#[derive(Default)]
struct Inner {
    taken: Cell<usize>,
    queue: RefCell<VecDeque<Waiter>>,
    next_id: Cell<u64>,
    kept_bytes: Cell<usize>,
    kept: RefCell<[Vec<IoBuf>; (LARGEST - SMALLEST + 1) as usize]>,
}

/// See the module's page. Clones are the same memory.
#[derive(Clone, Default)]
pub(super) struct Memory(Rc<Inner>);

/// A buffer on loan.
pub(super) struct Lease {
    /// Present until the drop.
    buf: Option<IoBuf>,
    len: usize,
    memory: Memory,
    account: Rc<Account>,
    charge: usize,
    own: bool,
}

impl Memory {
    /// A buffer of `len` bytes, with anything in it. Waits until there is room; `None` when it is no longer `wanted` then.
    pub(super) async fn lease_if(&self, account: &Rc<Account>, len: usize, wanted: impl Fn() -> bool) -> Option<Lease> {
        let charge = match len {
            0..=0x1000 => 0x1000,
            0x1001..=0x200_0000 => len.next_power_of_two(),
            _ => len.next_multiple_of(1 << SMALLEST),
        };
        let own = if account.own.get() + charge <= OWN {
            account.own.set(account.own.get() + charge);
            true
        } else if self.0.queue.borrow().is_empty() && self.has_room(account, charge) {
            self.take(account, charge);
            false
        } else {
            self.wait(account, charge).await == Granted::Own
        };
        let mut lease = Lease { buf: None, len, memory: self.clone(), account: Rc::clone(account), charge, own };
        if !wanted() {
            return None;
        }
        lease.buf = Some(self.buffer(charge));
        Some(lease)
    }

    /// The same for what is wanted in any case.
    #[cfg(test)]
    async fn lease(&self, account: &Rc<Account>, len: usize) -> Lease {
        self.lease_if(account, len, || true).await.expect("it is wanted")
    }

    fn has_room(&self, account: &Account, charge: usize) -> bool {
        self.0.taken.get() + charge <= SHARED && account.shared.get() + charge <= SHARE
    }

    fn take(&self, account: &Account, charge: usize) {
        self.0.taken.set(self.0.taken.get() + charge);
        account.shared.set(account.shared.get() + charge);
    }

    async fn wait(&self, account: &Rc<Account>, bytes: usize) -> Granted {
        let id = self.0.next_id.get();
        self.0.next_id.set(id + 1);
        let mut ticket = Ticket { memory: self, id, queued: false };
        std::future::poll_fn(|cx| {
            let mut queue = self.0.queue.borrow_mut();
            let Some(at) = queue.iter().position(|w| w.id == id) else {
                let (account, waker) = (Rc::clone(account), cx.waker().clone());
                queue.push_back(Waiter { id, bytes, account, waker, granted: None, since: monotonic_now() });
                ticket.queued = true;
                drop(queue);
                // Those before it may all be waiting for shares of their own.
                self.grant();
                if self.0.queue.borrow_mut().pop_back_if(|w| w.granted.is_some()).is_none() {
                    return Poll::Pending;
                }
                ticket.queued = false;
                return Poll::Ready(Granted::Shared);
            };
            if let Some(granted) = queue[at].granted {
                queue.remove(at);
                ticket.queued = false;
                return Poll::Ready(granted);
            }
            queue[at].waker.clone_from(cx.waker());
            Poll::Pending
        })
        .await
    }

    /// Lets those go on for whom there is room. One who waits for its own share does not hold up the others.
    fn grant(&self) {
        for w in self.0.queue.borrow_mut().iter_mut().filter(|w| w.granted.is_none()) {
            if self.0.taken.get() + w.bytes > SHARED {
                break;
            }
            if w.account.shared.get() + w.bytes <= SHARE {
                self.take(&w.account, w.bytes);
                w.granted = Some(Granted::Shared);
                w.waker.wake_by_ref();
            }
        }
    }

    /// What a client has for itself lets its own requests go on, however long others hold what is shared.
    fn give_back_own(&self, account: &Rc<Account>, charge: usize) {
        account.own.set(account.own.get() - charge);
        for w in self.0.queue.borrow_mut().iter_mut().filter(|w| w.granted.is_none() && Rc::ptr_eq(&w.account, account))
        {
            if account.own.get() + w.bytes <= OWN {
                account.own.set(account.own.get() + w.bytes);
                w.granted = Some(Granted::Own);
                w.waker.wake_by_ref();
            }
        }
    }

    fn give_back(&self, account: &Account, charge: usize) {
        self.0.taken.set(self.0.taken.get() - charge);
        account.shared.set(account.shared.get() - charge);
        self.grant();
    }

    /// Whether somebody has been waiting since `then` for what others have.
    pub(super) fn is_short_since(&self, then: Duration) -> bool {
        let queue = self.0.queue.borrow();
        queue.iter().any(|w| w.granted.is_none() && w.since < then && w.account.shared.get() + w.bytes <= SHARE)
    }

    fn place(charge: usize) -> Option<usize> {
        (charge.is_power_of_two() && charge <= 1 << LARGEST).then(|| (charge.trailing_zeros() - SMALLEST) as usize)
    }

    fn buffer(&self, charge: usize) -> IoBuf {
        match Self::place(charge).and_then(|i| self.0.kept.borrow_mut()[i].pop()) {
            Some(buf) => {
                self.0.kept_bytes.set(self.0.kept_bytes.get() - charge);
                buf
            }
            None => IoBuf::zeroed(charge),
        }
    }

    fn keep(&self, buf: IoBuf) {
        if buf.is_shared() {
            return;
        }
        if let Some(i) = Self::place(buf.len()) {
            let bytes = self.0.kept_bytes.get() + buf.len();
            if bytes <= KEPT {
                self.0.kept_bytes.set(bytes);
                self.0.kept.borrow_mut()[i].push(buf);
            }
        }
    }
}

/// A place in the queue; left when the wait is given up.
struct Ticket<'a> {
    memory: &'a Memory,
    id: u64,
    queued: bool,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        if !self.queued {
            return;
        }
        let mut queue = self.memory.0.queue.borrow_mut();
        let Some(w) = queue.iter().position(|w| w.id == self.id).and_then(|i| queue.remove(i)) else { return };
        drop(queue);
        match w.granted {
            Some(Granted::Own) => self.memory.give_back_own(&w.account, w.bytes),
            Some(Granted::Shared) => self.memory.give_back(&w.account, w.bytes),
            None => self.memory.grant(),
        }
    }
}

impl Lease {
    /// The bytes that were asked for.
    pub(super) fn all(&self) -> IoBuf {
        self.slice(0..self.len)
    }

    /// A part of them.
    pub(super) fn slice(&self, range: Range<usize>) -> IoBuf {
        self.buf.as_ref().expect("the buffer is there until the drop").slice(range)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(buf) = self.buf.take() {
            self.memory.keep(buf);
        }
        if self.own {
            self.memory.give_back_own(&self.account, self.charge);
        } else {
            self.memory.give_back(&self.account, self.charge);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::{Pin, pin};
    use std::task::Context;

    use super::*;

    fn poll<F: Future>(f: Pin<&mut F>) -> Poll<F::Output> {
        f.poll(&mut Context::from_waker(Waker::noop()))
    }

    fn now(m: &Memory, a: &Rc<Account>, len: usize) -> Option<Lease> {
        match poll(pin!(m.lease(a, len))) {
            Poll::Ready(l) => Some(l),
            Poll::Pending => None,
        }
    }

    #[test]
    fn buffers_are_used_again_unless_somebody_looks() {
        let (m, a) = (Memory::default(), Rc::default());
        let first = now(&m, &a, 5000).expect("own");
        assert!(first.all().len() == 5000 && first.all().is_aligned(8));
        let at = first.all().as_ptr();
        drop(first);
        let again = now(&m, &a, 8192).expect("own");
        assert_eq!(again.all().as_ptr(), at);
        let looked_at = again.all();
        drop(again);
        assert_ne!(now(&m, &a, 8192).expect("own").all().as_ptr(), at, "a buffer under somebody's eyes");
        drop(looked_at);
    }

    #[test]
    fn a_client_has_its_own_and_its_share() {
        let (m, greedy, other) = (Memory::default(), Rc::default(), Rc::default());
        let held: Vec<_> = (0..3).map_while(|_| now(&m, &greedy, 32 << 20)).collect();
        assert_eq!(held.len(), 2, "its share is used up");
        let own: Vec<_> = (0..300).map_while(|_| now(&m, &greedy, 4096)).collect();
        assert_eq!(own.len(), OWN / 4096, "small ones go on with its own memory");
        let theirs: Vec<_> = (0..3).map_while(|_| now(&m, &other, 32 << 20)).collect();
        assert_eq!(theirs.len(), 2, "the other's share is there");
        assert_eq!(m.0.taken.get(), SHARED);
        drop((held, own, theirs));
        assert_eq!((m.0.taken.get(), greedy.own.get(), greedy.shared.get()), (0, 0, 0));
    }

    #[test]
    fn who_waits_is_served_in_order_and_may_give_up() {
        let m = Memory::default();
        let accounts: [Rc<Account>; 4] = Default::default();
        let mut held: Vec<_> =
            accounts[..2].iter().flat_map(|a| [now(&m, a, 32 << 20), now(&m, a, 32 << 20)]).flatten().collect();
        assert_eq!(held.len(), 4);
        let mut gives_up = Box::pin(m.lease(&accounts[2], 32 << 20));
        let mut waits = pin!(m.lease(&accounts[3], 32 << 20));
        assert!(poll(gives_up.as_mut()).is_pending() && poll(waits.as_mut()).is_pending());
        assert!(m.is_short_since(monotonic_now() + Duration::from_secs(1)));
        assert!(!m.is_short_since(Duration::ZERO));
        assert!(now(&m, &accounts[3], 2 << 20).is_none(), "nobody overtakes");
        held.pop();
        assert!(poll(waits.as_mut()).is_pending(), "it is the first one's turn");
        drop(gives_up);
        let Poll::Ready(lease) = poll(waits.as_mut()) else { panic!("what was granted to the other is free again") };
        drop((lease, held));
        assert_eq!(m.0.taken.get(), 0);
        assert!(m.0.queue.borrow().is_empty());
    }

    #[test]
    fn who_waits_for_its_own_share_holds_up_nobody() {
        let (m, greedy, other) = (Memory::default(), Rc::default(), Rc::default());
        let held = [now(&m, &greedy, 32 << 20), now(&m, &greedy, 32 << 20)];
        let mut third = pin!(m.lease(&greedy, 32 << 20));
        assert!(held.iter().all(Option::is_some) && poll(third.as_mut()).is_pending());
        assert!(now(&m, &other, 2 << 20).is_some(), "there is room for the other");
        drop(held);
        assert!(poll(third.as_mut()).is_ready());
    }

    #[test]
    fn own_memory_that_comes_back_lets_one_go_on_while_others_hoard() {
        let m = Memory::default();
        let accounts: [Rc<Account>; 4] = Default::default();
        let _hoarded: Vec<_> =
            accounts[..2].iter().flat_map(|a| [now(&m, a, 32 << 20), now(&m, a, 32 << 20)]).flatten().collect();
        assert_eq!(m.0.taken.get(), SHARED);
        let (good, other) = (&accounts[2], &accounts[3]);
        let mut own: Vec<_> = (0..3).map_while(|_| now(&m, good, OWN / 2)).collect();
        assert_eq!(own.len(), 2);
        let mut large = pin!(m.lease(other, OWN + 1));
        let (mut waits, mut gives_up) = (pin!(m.lease(good, OWN / 2)), Box::pin(m.lease(good, OWN / 2)));
        assert!(poll(large.as_mut()).is_pending());
        assert!(poll(gives_up.as_mut()).is_pending() && poll(waits.as_mut()).is_pending());
        own.pop();
        assert!(poll(waits.as_mut()).is_pending(), "it is the first one's turn");
        drop(gives_up);
        let Poll::Ready(lease) = poll(waits.as_mut()) else { panic!("what the other gave up is its own again") };
        assert!(poll(large.as_mut()).is_pending(), "it is nobody else's");
        drop((lease, own));
        assert_eq!((good.own.get(), good.shared.get(), m.0.taken.get()), (0, 0, SHARED));
    }

    #[test]
    fn hoarders_are_known() {
        let (m, a) = (Memory::default(), Rc::<Account>::default());
        let later = monotonic_now() + Duration::from_secs(60);
        a.waits(Wait::Taking);
        a.waits(Wait::Payload);
        a.goes_on(Wait::Payload);
        assert!(!a.hoards_since(later), "it has nothing that others could use");
        let lease = now(&m, &a, 2 << 20).expect("room");
        assert!(a.hoards_since(later) && !a.hoards_since(Duration::ZERO));
        a.goes_on(Wait::Taking);
        assert!(!a.hoards_since(later));
        drop(lease);
    }
}
