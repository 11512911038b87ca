//! Answers on their way out.

use std::rc::Rc;

use super::Session;
use crate::disk::IoBuf;
use crate::frontend::nbd::memory::{Lease, Wait};
use crate::frontend::nbd::transport::Transport;
use crate::units::BLOCK;

/// No new requests are read while more bytes of headers than this wait to be taken.
const MAX_HEADS: usize = 256 << 10;

/// Replies that wait to be sent.
#[derive(Default)]
pub(super) struct Outgoing {
    pub(super) heads: Vec<u8>,
    /// Answers that end among them.
    answers: usize,
    /// Data, and where among the heads it goes.
    data: Vec<(usize, IoBuf, Rc<Lease>)>,
    pub(super) closing: bool,
}

impl Outgoing {
    fn is_empty(&self) -> bool {
        self.heads.is_empty()
    }

    /// More may be added.
    pub(super) fn is_small(&self) -> bool {
        self.heads.len() < MAX_HEADS
    }
}

impl<T: Transport, E> Session<T, E> {
    /// Queues an answer without data.
    pub(super) fn reply(&self, write: impl FnOnce(&mut Vec<u8>)) {
        let Outgoing { heads, answers, .. } = &mut *self.outgoing.borrow_mut();
        write(heads);
        *answers += 1;
        self.to_send.tell();
    }

    /// Queues an answer with parts of `lease`, which is given back when they have gone.
    pub(super) fn answer(&self, lease: &Rc<Lease>, write: impl FnOnce(&mut Vec<u8>, &mut dyn FnMut(usize, IoBuf))) {
        let Outgoing { heads, data, answers, .. } = &mut *self.outgoing.borrow_mut();
        write(heads, &mut |at, buf| data.push((at, buf, Rc::clone(lease))));
        *answers += 1;
        self.to_send.tell();
    }

    /// Sends until the session is closing and nothing is left.
    pub(super) async fn send_replies(&self) {
        let mut spare = Outgoing::default();
        let mut room = IoBuf::zeroed(BLOCK);
        loop {
            let something = || {
                let o = self.outgoing.borrow();
                o.closing || !o.is_empty()
            };
            self.to_send.until(something).await;
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
            self.in_flight.set(self.in_flight.get() - std::mem::take(&mut now.answers));
            self.one_ended.tell();
            self.may_look.tell();
            if room.len() > 2 * MAX_HEADS {
                room = IoBuf::zeroed(BLOCK);
                now.heads = Vec::new();
            }
            spare = now;
        }
    }
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
