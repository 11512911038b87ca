use std::future::Future;
use std::pin::Pin;

use super::*;
use crate::lane::OwnRing;

/// Answers with what it was called with.
#[derive(Default)]
struct Spy {
    calls: RefCell<Vec<String>>,
    fault: Cell<Option<IoFault>>,
}

impl Spy {
    fn note(&self, call: String) -> Result<(), IoFault> {
        self.calls.borrow_mut().push(call);
        self.fault.get().map_or(Ok(()), Err)
    }
}

impl Engine for Spy {
    async fn read(&self, lba: Lba, dst: IoBuf) -> Result<(), IoFault> {
        self.note(format!("read {lba} {}", dst.len()))
    }
    async fn write(&self, lba: Lba, src: IoBuf, fua: bool) -> Result<(), IoFault> {
        self.note(format!("write {lba} {} {fua}", src.len()))
    }
    async fn flush(&self) -> Result<(), IoFault> {
        self.note("flush".into())
    }
    async fn discard(&self, lba: Lba, sectors: u64, fua: bool) -> Result<(), IoFault> {
        self.note(format!("discard {lba} {sectors} {fua}"))
    }
    async fn write_zeroes(&self, lba: Lba, sectors: u64, fua: bool) -> Result<(), IoFault> {
        self.note(format!("zero {lba} {sectors} {fua}"))
    }
    fn seal(&self) {}
    fn tasks(self: Rc<Self>) -> Vec<Pin<Box<dyn Future<Output = ()>>>> {
        Vec::new()
    }
}

fn request(op: u32, flags: u32, sectors: u32) -> Request {
    Request { op, flags, lba: Lba(9), sectors }
}

#[test]
fn requests_become_calls_and_results() {
    let lane = Lane::new(OwnRing::new(8, RingMode::default()).unwrap()).unwrap();
    let spy = Spy::default();
    let buf = IoBuf::zeroed(8192);
    let run = |r| lane.run_until(handle(&spy, r, &buf)).unwrap();
    let fua = sys::UBLK_IO_F_FUA;
    assert_eq!(run(request(sys::UBLK_IO_OP_READ, 0, 16)), 8192);
    assert_eq!(run(request(sys::UBLK_IO_OP_WRITE, sys::UBLK_IO_F_META, 1)), 512);
    assert_eq!(run(request(sys::UBLK_IO_OP_WRITE, fua, 8)), 4096);
    assert_eq!(run(request(sys::UBLK_IO_OP_FLUSH, 0, 0)), 0);
    assert_eq!(run(request(sys::UBLK_IO_OP_DISCARD, 0, 1 << 20)), 0);
    assert_eq!(run(request(sys::UBLK_IO_OP_WRITE_ZEROES, sys::UBLK_IO_F_NOUNMAP | fua, 8)), 0);
    let calls =
        ["read 9 8192", "write 9 512 false", "write 9 4096 true", "flush", "discard 9 1048576 false", "zero 9 8 true"];
    assert_eq!(*spy.calls.borrow(), calls);
    assert_eq!(run(request(sys::UBLK_IO_OP_ZONE_APPEND, 0, 8)), -libc::EOPNOTSUPP);
    assert_eq!(run(request(sys::UBLK_IO_OP_READ, 0, 17)), -libc::EINVAL, "more than the buffer holds");
    assert_eq!(spy.calls.borrow().len(), calls.len(), "neither reached the engine");
    spy.fault.set(Some(IoFault::NoSpace));
    for op in [sys::UBLK_IO_OP_READ, sys::UBLK_IO_OP_WRITE, sys::UBLK_IO_OP_FLUSH] {
        assert_eq!(run(request(op, 0, 1)), -libc::ENOSPC);
    }
}

#[test]
fn a_tag_serves_until_its_end() {
    let lane = Lane::new(OwnRing::new(8, RingMode::default()).unwrap()).unwrap();
    let spy = Rc::new(Spy::default());
    let tags = Rc::new(Tags::new(2, 4096));
    for tag in 0..2 {
        lane.spawn(serve_tag(Rc::clone(&tags), tag, Rc::clone(&spy)));
    }
    tags.deliver(1, Arrival::Request(request(sys::UBLK_IO_OP_WRITE, 0, 8)));
    lane.run_until(async {
        while tags.results.borrow().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .unwrap();
    assert_eq!(tags.results.take(), [(1, 4096)]);
    tags.deliver(0, Arrival::End);
    tags.deliver(1, Arrival::End);
    lane.run_until(tags.wait_for_end()).unwrap();
    assert_eq!(lane.tasks(), 0);
    lane.shutdown(&mut crate::lane::NoDriver).unwrap();
}
