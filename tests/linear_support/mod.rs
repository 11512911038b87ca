//! A checker for histories of registers whose writes all have different values.
//!
//! Each 512-byte sector is a register: a write of several sectors is one operation on each of them, for the protocol promises
//! nothing about a request as a whole. So every sector has a history of its own, of writes and reads with the moments at which each
//! was sent (invoked) and answered (returned), taken from one clock. Linearizability is local: the whole is linearizable
//! when each register is, so each is checked alone.
//!
//! **The algorithm** is Gibbons and Korach's for registers with unique values ("Testing Shared Memories", 1997, section 4). As
//! each value is written once, every read names the write that it read from. The operations on one value are its *cluster*: the
//! write and its reads. In any legal order a cluster is contiguous, with the write first. For a cluster let
//!
//! - `f` = the earliest return of any of its operations, and
//! - `s` = the latest invocation of any of its operations.
//!
//! If `f < s`, the value must be in the register all through `[f, s]`: the cluster has a *forward zone*. Otherwise all its
//! operations overlap in `[s, f]`: a *backward zone*, and the cluster can take place at one point of it. The history is
//! linearizable if and only if
//!
//! 1. no read returns a value that nobody wrote,
//! 2. no read returns before its write was invoked,
//! 3. no two forward zones overlap, and
//! 4. no backward zone lies wholly inside a forward zone.
//!
//! The register's first value is a write before all others. A write that was never answered (the connection broke) has no
//! return: it counts if somebody read it, and is as if it had never been if nobody did.
//!
//! Moments are taken before the request is sent and after its answer was received. So the checker's intervals contain the
//! true ones: it can miss a fault of a few microseconds, and never reports one that is not there.

use std::collections::HashMap;

/// A moment on the one clock of a test.
pub(crate) type Moment = u64;
/// What is in a register; 0 at the beginning.
pub(crate) type Value = u64;

/// One operation on one register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Op {
    pub(crate) write: bool,
    pub(crate) value: Value,
    pub(crate) invoked: Moment,
    /// Absent when there was no answer.
    pub(crate) returned: Option<Moment>,
}

struct Zone {
    value: Value,
    /// The earliest return.
    first: Moment,
    /// The latest invocation.
    last: Moment,
    /// The write's invocation.
    begun: Option<Moment>,
}

/// Whether the history of one register is linearizable.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn check(history: &[Op]) -> Result<(), String> {
    let mut zones: HashMap<Value, Zone> = HashMap::new();
    let never = Moment::MAX;
    zones.insert(0, Zone { value: 0, first: 0, last: 0, begun: Some(0) });
    for op in history {
        // A read without an answer says nothing.
        if !op.write && op.returned.is_none() {
            continue;
        }
        let returned = op.returned.unwrap_or(never);
        assert!(op.invoked > 0 && op.invoked <= returned, "moments run forward: {op:?}");
        let zone = zones.entry(op.value).or_insert(Zone { value: op.value, first: never, last: 0, begun: None });
        if op.write {
            assert!(zone.begun.is_none(), "the test wrote {} twice", op.value);
            zone.begun = Some(op.invoked);
        }
        zone.first = zone.first.min(returned);
        zone.last = zone.last.max(op.invoked);
    }
    for op in history.iter().filter(|op| !op.write) {
        let Some(returned) = op.returned else { continue };
        match zones[&op.value].begun {
            None => return Err(format!("a read returned {:#x}, which nobody wrote: {op:?}", op.value)),
            Some(begun) if returned < begun => {
                return Err(format!("a read returned {:#x} before it was written at {begun}: {op:?}", op.value));
            }
            Some(_) => {}
        }
    }
    // A write that nobody answered or read has no part in this.
    let (mut forward, backward): (Vec<&Zone>, Vec<&Zone>) =
        zones.values().filter(|z| z.first != never).partition(|z| z.first < z.last);
    forward.sort_by_key(|z| z.first);
    for pair in forward.windows(2) {
        if pair[1].first < pair[0].last {
            return Err(format!(
                "{:#x} must be there from {} to {}, and {:#x} from {} to {}",
                pair[0].value, pair[0].first, pair[0].last, pair[1].value, pair[1].first, pair[1].last
            ));
        }
    }
    for b in backward {
        // Forward zones do not overlap: only the last that begins before this one can contain it.
        let n = forward.partition_point(|f| f.first < b.last);
        if let Some(f) = n.checked_sub(1).map(|n| forward[n])
            && b.first < f.last
        {
            return Err(format!(
                "{:#x} was there at some time from {} to {}, when {:#x} must have been, from {} to {}",
                b.value, b.last, b.first, f.value, f.first, f.last
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn w(value: Value, invoked: Moment, returned: Moment) -> Op {
        Op { write: true, value, invoked, returned: Some(returned) }
    }

    fn r(value: Value, invoked: Moment, returned: Moment) -> Op {
        Op { write: false, value, invoked, returned: Some(returned) }
    }

    fn lost(value: Value, invoked: Moment) -> Op {
        Op { write: true, value, invoked, returned: None }
    }

    /// Tries all orders: slow, and plainly right.
    fn by_trying(history: &[Op]) -> bool {
        fn go(left: &mut Vec<Op>, now: Value) -> bool {
            // Done when only writes without an answer are left.
            if left.iter().all(|o| o.returned.is_none()) {
                return true;
            }
            let earliest = left.iter().filter_map(|o| o.returned).min().unwrap_or(Moment::MAX);
            for n in 0..left.len() {
                let op = left[n];
                // It must not have begun after another, not yet placed, had ended.
                if op.invoked > earliest || (!op.write && op.value != now) {
                    continue;
                }
                left.swap_remove(n);
                let fits = go(left, op.value);
                left.push(op);
                let end = left.len() - 1;
                left.swap(n, end);
                if fits {
                    return true;
                }
            }
            false
        }
        go(&mut history.iter().copied().filter(|o| o.write || o.returned.is_some()).collect(), 0)
    }

    #[test]
    fn histories_that_are_right() {
        for h in [
            vec![],
            vec![r(0, 1, 2)],
            vec![w(1, 1, 2), r(1, 3, 4)],
            // Concurrent with the write: the old or the new.
            vec![w(1, 1, 10), r(0, 2, 3), r(1, 4, 5)],
            vec![w(1, 1, 10), r(1, 2, 3), r(1, 11, 12)],
            // Two concurrent writes, in either order.
            vec![w(1, 1, 10), w(2, 1, 10), r(1, 11, 12)],
            vec![w(1, 1, 10), w(2, 1, 10), r(2, 11, 12)],
            vec![w(1, 1, 10), w(2, 1, 10), r(2, 2, 3), r(1, 4, 5), r(1, 11, 12)],
            // No answer: took place late, or never.
            vec![lost(1, 1), r(0, 2, 3), r(1, 100, 101)],
            vec![lost(1, 1), r(0, 2, 3), r(0, 100, 101)],
        ] {
            assert_eq!(check(&h), Ok(()), "{h:?}");
            assert!(by_trying(&h), "{h:?}");
        }
    }

    #[test]
    fn histories_that_must_fail() {
        for (why, h) in [
            ("a stale read", vec![w(1, 1, 2), r(0, 3, 4)]),
            ("an overwritten value", vec![w(1, 1, 2), w(2, 3, 4), r(1, 5, 6)]),
            ("a value out of nothing", vec![w(1, 1, 2), r(9, 3, 4)]),
            ("a read from the future", vec![r(1, 1, 2), w(1, 3, 4)]),
            ("new, then old", vec![w(1, 1, 10), r(1, 2, 3), r(0, 4, 5)]),
            ("two readers in different orders", vec![w(1, 1, 20), w(2, 1, 20), r(1, 2, 3), r(2, 4, 5), r(1, 6, 7)]),
            ("a lost write comes and goes", vec![lost(1, 1), r(1, 2, 3), r(0, 4, 5)]),
            ("an acknowledged write is undone by one before it", vec![w(1, 1, 3), w(2, 4, 5), r(2, 6, 7), r(1, 8, 9)]),
            ("a write within another's reads", vec![w(1, 1, 2), r(1, 3, 4), w(2, 5, 6), r(1, 7, 8)]),
            ("an unread write within another's time", vec![w(1, 1, 2), w(2, 3, 4), r(1, 5, 6)]),
        ] {
            assert!(check(&h).is_err(), "{why}: {h:?}");
            assert!(!by_trying(&h), "{why}: {h:?}");
        }
    }

    /// Against the plain way, on many small histories of all kinds.
    #[test]
    fn it_agrees_with_trying_all_orders() {
        let mut rng = crate::support_rng::Rng(1);
        let (mut right, mut wrong) = (0, 0);
        for _ in 0..60_000 {
            let writes = 1 + rng.below(3);
            let mut h = Vec::new();
            // No two moments are the same, as with a real clock's ticks taken one after the other.
            let mut moments: Vec<Moment> = (1..40).collect();
            let mut moment =
                |rng: &mut crate::support_rng::Rng| moments.swap_remove(rng.below(moments.len() as u64) as usize);
            for value in 1..=writes {
                let (a, b) = (moment(&mut rng), moment(&mut rng));
                h.push(if rng.below(8) == 0 { lost(value, a) } else { w(value, a.min(b), a.max(b)) });
            }
            for _ in 0..rng.below(4) {
                let (a, b) = (moment(&mut rng), moment(&mut rng));
                h.push(r(rng.below(writes + 1), a.min(b), a.max(b)));
            }
            let plain = by_trying(&h);
            assert_eq!(check(&h).is_ok(), plain, "{h:?}: {:?}", check(&h));
            *(if plain { &mut right } else { &mut wrong }) += 1;
        }
        assert!(right > 5000 && wrong > 5000, "{right} right, {wrong} wrong: a one-sided trial");
    }
}
