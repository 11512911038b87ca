//! What a daemon was ordered to do and takes its time for: begun by one request, looked after by others.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use tokio::sync::oneshot::Receiver;
use tokio::sync::oneshot::error::TryRecvError;

use crate::error::{Error, ErrorKind, Result};

/// Jobs that nobody has asked for to their end, at most.
const MOST: usize = 64;

#[derive(Default)]
struct Table {
    last: u64,
    running: BTreeMap<u64, Receiver<Result<()>>>,
}

/// See the module's page.
#[derive(Default)]
pub(super) struct Jobs(Mutex<Table>);

impl Jobs {
    /// Keeps a job; returns its number.
    pub(super) fn keep(&self, answer: Receiver<Result<()>>) -> u64 {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        table.last += 1;
        let id = table.last;
        table.running.insert(id, answer);
        while table.running.len() > MOST {
            // The oldest: who began it has not asked for its end.
            table.running.pop_first();
        }
        id
    }

    /// Whether a job is done.
    ///
    /// # Errors
    /// The job's own; `NotFound` for one that has been told of, or never was.
    pub(super) fn is_done(&self, id: u64) -> Result<bool> {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(answer) = table.running.get_mut(&id) else {
            return Err(Error::new(ErrorKind::NotFound, format!("this daemon knows of no job {id}")));
        };
        let done = match answer.try_recv() {
            Err(TryRecvError::Empty) => return Ok(false),
            Ok(done) => done,
            Err(TryRecvError::Closed) => {
                Err(Error::new(ErrorKind::Internal, "the daemon has ended before the job was done"))
            }
        };
        table.running.remove(&id);
        done.map(|()| true)
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot::channel;

    use super::*;

    #[test]
    fn a_job_is_told_of_once() {
        let jobs = Jobs::default();
        let (ends, answer) = channel();
        let (fails, other) = channel();
        let (a, b) = (jobs.keep(answer), jobs.keep(other));
        assert!(!jobs.is_done(a).expect("running"));
        ends.send(Ok(())).expect("sent");
        fails.send(Err(Error::new(ErrorKind::Exists, "twice"))).expect("sent");
        assert!(jobs.is_done(a).expect("done"));
        assert_eq!(jobs.is_done(b).expect_err("failed").kind(), ErrorKind::Exists);
        assert_eq!(jobs.is_done(a).expect_err("told").kind(), ErrorKind::NotFound);
        let first = jobs.keep(channel().1);
        assert_eq!(jobs.is_done(first).expect_err("gone").kind(), ErrorKind::Internal);
        let kept: Vec<_> = (0..MOST + 1).map(|_| channel()).collect();
        let ids: Vec<u64> = kept.into_iter().map(|(ends, answer)| (jobs.keep(answer), ends).0).collect();
        assert_eq!(jobs.is_done(ids[0]).expect_err("forgotten").kind(), ErrorKind::NotFound);
    }
}
