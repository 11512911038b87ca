//! Every command with its flags, and every refusal with its number, in each of the three forms of replies.

use crate::nbd_support::client::{Headers, Info};
use crate::nbd_support::pattern;
use crate::nbd_support::proto::{self, can, cmd, errno, flag};
use crate::nbd_support::requests::{Client, Piece, Request};
use crate::nbd_support::server::Place;

const SIZE: u64 = 64 << 20;
const MIB: u64 = 1 << 20;
const ALL: [Headers; 3] = [Headers::Simple, Headers::Structured, Headers::Extended];

fn offers(info: &Info) {
    let expected =
        can::HAS_FLAGS | can::FLUSH | can::FUA | can::TRIM | can::WRITE_ZEROES | can::MULTI_CONN | can::CACHE;
    assert_eq!(info.flags & expected, expected, "{:#x}", info.flags);
    assert_eq!(info.size, SIZE);
}

#[test]
fn what_is_written_is_read() {
    let place = Place::file();
    let server = place.serve("64M", &[]);
    for (round, headers) in (1..).zip(ALL) {
        let mut c = server.client(headers);
        offers(&c.info);
        for (offset, len) in [(0, 512), (512, 512), (3584, 1024), (4096, 4096), (8192, 65536), (MIB - 512, 1024)] {
            c.write(offset, &pattern(offset, 1, round, len));
            assert_eq!(c.read(offset, len), pattern(offset, 1, round, len), "{offset}+{len}");
        }
        // As large as a request may be, up to the very end.
        let big = 32 * MIB;
        c.write(SIZE - big, &pattern(SIZE - big, 2, round, 32 << 20));
        assert!(c.read(SIZE - big, 32 << 20) == pattern(SIZE - big, 2, round, 32 << 20), "32 MiB at the end");
        c.disconnect();
    }
}

#[test]
fn no_byte_beside_a_write_changes() {
    let place = Place::file();
    let server = place.serve("64M", &[]);
    let mut c = server.client(Headers::Structured);
    let base = 1 << 16;
    let mut model = pattern(base, 3, 0, 16384);
    c.write(base, &model);
    for (round, (from, len)) in (1..).zip([(0, 1), (511, 2), (1, 510), (513, 4096), (4095, 1), (4097, 8191), (9000, 7)])
    {
        let data = pattern(round, 4, round, len);
        c.write(base + from as u64, &data);
        model[from..from + len].copy_from_slice(&data);
        assert!(c.read(base, model.len()) == model, "after a write of {len} bytes at {from}");
        assert_eq!(c.read(base + from as u64, len), data);
    }
    for (from, len) in [(100, 300), (1000, 5000), (8191, 2)] {
        assert_eq!(c.outcome(cmd::WRITE_ZEROES, 0, base + from, len), 0);
        let (from, len) = (usize::try_from(from).expect("small"), usize::try_from(len).expect("small"));
        model[from..from + len].fill(0);
        assert!(c.read(base, model.len()) == model, "after zeroes of {len} bytes at {from}");
    }
    c.disconnect();
}

#[test]
fn trims_and_zeroes_read_as_zeros() {
    let place = Place::file();
    let server = place.serve("64M", &[]);
    for (round, headers) in (1..).zip(ALL) {
        let mut c = server.client(headers);
        let zeroes = [flag::NO_HOLE, flag::FUA, 0, flag::NO_HOLE | flag::FUA];
        for (n, flags) in (0..).zip(zeroes) {
            let at = (n + 1) * MIB;
            c.write(at, &pattern(at, 5, round, 16384));
            assert_eq!(c.outcome(cmd::WRITE_ZEROES, flags, at + 4096, 8192), 0, "flags {flags:#x}");
            assert_eq!(c.read(at + 4096, 8192), [0; 8192]);
            assert_eq!(c.read(at, 4096), pattern(at, 5, round, 16384)[..4096]);
            assert_eq!(c.read(at + 12288, 4096), pattern(at, 5, round, 16384)[12288..]);
        }
        for (n, flags) in (8..).zip([0, flag::FUA]) {
            let at = (n + 1) * MIB;
            c.write(at, &pattern(at, 6, round, 16384));
            assert_eq!(c.outcome(cmd::TRIM, flags, at + 4096, 8192), 0);
            assert_eq!(c.read(at + 4096, 8192), [0; 8192], "this volume's trims are zeros");
            assert_eq!(c.read(at, 4096), pattern(at, 5 + 1, round, 16384)[..4096]);
        }
        // Far more than a read may be: no data goes over the wire for these.
        assert_eq!(c.outcome(cmd::TRIM, 0, 0, SIZE), 0);
        assert_eq!(c.outcome(cmd::WRITE_ZEROES, 0, 0, SIZE), 0);
        assert_eq!(c.read(MIB, 65536), vec![0; 65536]);
        if c.info.flags & can::FAST_ZERO != 0 {
            let e = c.outcome(cmd::WRITE_ZEROES, flag::FAST_ZERO, 4096, 4096);
            assert!(e == 0 || e == errno::ENOTSUP, "a fast zeroing: {e}");
        }
        assert_eq!(c.outcome(cmd::CACHE, 0, 0, 32 * MIB), 0);
        c.flush();
        let r = c.call(Request::write(flag::FUA, 4096, &pattern(4096, 7, round, 4096))).expect("a write");
        assert_eq!(r.error, 0, "a write with FUA");
        c.disconnect();
    }
}

#[test]
fn every_refusal_has_its_number_and_the_connection_goes_on() {
    let place = Place::file();
    let server = place.serve("64M", &[]);
    for headers in ALL {
        let mut c = server.client(headers);
        let known = pattern(SIZE - 4096, 8, 1, 4096);
        c.write(SIZE - 4096, &known);
        let past = [(SIZE, 512), (SIZE - 512, 1024), (SIZE + (1 << 40), 512), (u64::MAX - 511, 512), (u64::MAX, 4096)];
        for (offset, len) in past {
            for command in [cmd::READ, cmd::TRIM, cmd::CACHE] {
                assert_eq!(c.outcome(command, 0, offset, len), errno::EINVAL, "{command} of {len} at {offset}");
            }
            for command in [cmd::WRITE, cmd::WRITE_ZEROES] {
                assert_eq!(c.outcome(command, 0, offset, len), errno::ENOSPC, "{command} of {len} at {offset}");
            }
            assert_eq!(c.outcome(cmd::BLOCK_STATUS, 0, offset, len), errno::EINVAL, "a status of {len} at {offset}");
        }
        for command in [cmd::READ, cmd::WRITE, cmd::TRIM, cmd::CACHE, cmd::WRITE_ZEROES, cmd::BLOCK_STATUS] {
            assert_eq!(c.outcome(command, 0, 4096, 0), errno::EINVAL, "{command} of no bytes");
        }
        // Flags that the command does not have, and those that nobody knows.
        let strange = [
            (cmd::READ, flag::REQ_ONE),
            (cmd::READ, flag::NO_HOLE),
            (cmd::READ, 1 << 9),
            (cmd::WRITE, flag::DF),
            (cmd::WRITE, 1 << 15),
            (cmd::TRIM, flag::NO_HOLE),
            (cmd::WRITE_ZEROES, flag::REQ_ONE),
            (cmd::WRITE_ZEROES, 1 << 8),
            (cmd::BLOCK_STATUS, flag::DF),
            (cmd::CACHE, flag::DF),
        ];
        for (command, flags) in strange {
            assert_eq!(c.outcome(command, flags, 4096, 512), errno::EINVAL, "{command} with flags {flags:#x}");
        }
        assert_eq!(c.outcome(cmd::FLUSH, 1 << 9, 0, 0), errno::EINVAL, "a flush with flags");
        for command in [cmd::RESIZE, 9, 0x7fff, u16::MAX] {
            assert_eq!(c.outcome(command, 0, 0, 512), errno::EINVAL, "command {command}");
        }
        if c.info.flags & can::FAST_ZERO == 0 {
            assert_eq!(c.outcome(cmd::WRITE_ZEROES, flag::FAST_ZERO, 0, 512), errno::EINVAL, "it was not offered");
        }
        assert_eq!(c.outcome(cmd::READ, 0, 0, 32 * MIB + 512), errno::EINVAL, "a read of more than 32 MiB");
        if headers == Headers::Simple {
            assert_eq!(c.outcome(cmd::READ, flag::DF, 0, 512), errno::EINVAL, "DF without structured replies");
            assert_eq!(c.outcome(cmd::BLOCK_STATUS, 0, 0, 512), errno::EINVAL, "a status without a context");
        }
        if headers == Headers::Extended {
            for command in [cmd::READ, cmd::TRIM, cmd::CACHE, cmd::BLOCK_STATUS] {
                let e = c.outcome(command, 0, 0, 1 << 40);
                assert_eq!(e, errno::EINVAL, "{command} of 2^40 bytes");
            }
            assert_eq!(c.outcome(cmd::WRITE_ZEROES, 0, 0, u64::MAX - 511), errno::ENOSPC);
        }
        // Nothing of it has changed a thing, and it still answers.
        assert_eq!(c.read(SIZE - 4096, 4096), known);
        c.disconnect();
    }
}

/// The data of a write that is too long may be read and dropped, or the connection given up; never stored, and never taken for
/// further requests.
#[test]
fn a_write_that_is_too_long_changes_nothing() {
    let place = Place::file();
    let server = place.serve("64M", &[]);
    for headers in ALL {
        let mut c = server.client(headers);
        let r = c.call(Request::write(0, 0, &vec![0xaa; (32 << 20) + 512]));
        match r {
            Ok(r) => assert!(r.error == errno::EINVAL || r.error == errno::EOVERFLOW, "error {}", r.error),
            Err(e) => println!("it hangs up: {e}"),
        }
        let mut c = server.client(headers);
        assert!(c.read(0, 4 << 20).iter().all(|b| *b == 0), "nothing of it was stored");
        c.disconnect();
    }
}

#[test]
fn a_read_only_export_refuses_all_that_writes() {
    let place = Place::file();
    let server = place.serve("64M", &[]);
    let mut c = server.client(Headers::Structured);
    c.write(4096, &pattern(4096, 1, 1, 4096));
    c.disconnect();
    server.terminate();
    let server = place.start(&["--listen", "127.0.0.1:0", "--volume", "vol", "--read-only"]);
    for headers in ALL {
        let mut c = server.client(headers);
        assert_ne!(c.info.flags & can::READ_ONLY, 0);
        for command in [cmd::WRITE, cmd::WRITE_ZEROES, cmd::TRIM] {
            assert_eq!(c.outcome(command, 0, 4096, 4096), errno::EPERM, "command {command}");
        }
        // The order of refusals is the server's; that it is one is not.
        let e = c.outcome(cmd::WRITE, 0, SIZE, 4096);
        assert!(e == errno::EPERM || e == errno::ENOSPC, "{e}");
        assert_eq!(c.read(4096, 4096), pattern(4096, 1, 1, 4096));
        assert_eq!(c.outcome(cmd::FLUSH, 0, 0, 0), 0, "a flush writes nothing");
        c.disconnect();
    }
    server.terminate();
}

/// Structured reads say where nothing is; DF gets one piece all the same.
#[test]
fn holes_are_sent_as_holes() {
    let place = Place::file();
    let server = place.serve("64M", &[]);
    for (round, headers) in (1..).zip([Headers::Structured, Headers::Extended]) {
        let mut c = server.client(headers);
        assert_ne!(c.info.flags & can::DF, 0, "DF is offered with structured replies");
        assert_eq!(c.outcome(cmd::TRIM, 0, 0, SIZE), 0);
        c.write(MIB, &pattern(MIB, 9, round, 65536));
        let r = c.call(Request::new(cmd::READ, 0, MIB - 65536, 3 * 65536)).expect("a read");
        let mut pieces = r.pieces.clone();
        pieces.sort_by_key(|p| p.offset);
        let hole = |offset| Piece { offset, length: 65536, hole: true };
        assert_eq!(pieces.first(), Some(&hole(MIB - 65536)), "{pieces:?}");
        assert_eq!(pieces.last(), Some(&hole(MIB + 65536)), "{pieces:?}");
        assert!(pieces[1..pieces.len() - 1].iter().all(|p| !p.hole), "{pieces:?}");
        assert_eq!(r.data[65536..2 * 65536], pattern(MIB, 9, round, 65536));
        let r = c.call(Request::new(cmd::READ, flag::DF, MIB - 65536, 3 * 65536)).expect("a read");
        assert_eq!((r.error, r.pieces.len()), (0, 1));
        assert_eq!(r.data[65536..2 * 65536], pattern(MIB, 9, round, 65536));
        // Nothing but a hole: as little on the wire as can be.
        let r = c.call(Request::new(cmd::READ, 0, 8 * MIB, 16 * MIB)).expect("a read");
        assert!(r.pieces.iter().all(|p| p.hole), "{:?}", r.pieces);
        // A hole that ends in the midst of a block.
        c.write(2 * MIB + 100, &[1; 10]);
        let r = c.call(Request::new(cmd::READ, 0, 2 * MIB, 4096)).expect("a read");
        let expected: Vec<u8> = (0..4096).map(|n| u8::from((100..110).contains(&n))).collect();
        assert_eq!(r.data, expected);
        c.disconnect();
    }
}

/// What is said of a range, byte class by byte class: `true` where it is a hole that reads as zeros.
fn holes(extents: &[(u64, u64)]) -> Vec<(u64, bool)> {
    let mut all: Vec<(u64, bool)> = Vec::new();
    for (length, flags) in extents {
        assert!(*flags == 0 || *flags == proto::HOLE | proto::ZERO || *flags == proto::ZERO, "flags {flags}");
        let hole = *flags & proto::HOLE != 0;
        match all.last_mut() {
            Some((sum, h)) if *h == hole => *sum += length,
            _ => all.push((*length, hole)),
        }
    }
    all
}

#[test]
fn the_status_of_blocks_is_told() {
    let place = Place::file();
    let server = place.serve("64M", &[]);
    for headers in [Headers::Structured, Headers::Extended] {
        let mut c = server.client(headers);
        assert_eq!(c.outcome(cmd::TRIM, 0, 0, SIZE), 0);
        assert_eq!(holes(&c.status(0, 0, SIZE)), [(SIZE, true)]);
        c.write(4 * MIB, &pattern(4 * MIB, 1, 1, 1 << 20));
        c.write(8 * MIB, &pattern(8 * MIB, 1, 1, 4096));
        let whole = [(4 * MIB, true), (MIB, false), (3 * MIB, true), (4096, false), (SIZE - 8 * MIB - 4096, true)];
        assert_eq!(holes(&c.status(0, 0, SIZE)), whole);
        assert_eq!(holes(&c.status(0, 4 * MIB, 65536))[0], (65536, false), "no more than was asked for, or the same");
        assert_eq!(c.status(flag::REQ_ONE, 0, SIZE)[0], (4 * MIB, proto::HOLE | proto::ZERO));
        assert_eq!(c.status(flag::REQ_ONE, 4 * MIB, SIZE - 4 * MIB)[0].0, MIB);
        assert_eq!(c.status(flag::REQ_ONE, 4 * MIB + 512, 512), [(512, 0)]);
        assert_eq!(c.status(flag::REQ_ONE, 5 * MIB - 512, 1024)[0], (512, 0));
        // What was taken away is a hole again.
        assert_eq!(c.outcome(cmd::WRITE_ZEROES, 0, 4 * MIB, 1 << 20), 0);
        assert_eq!(c.status(flag::REQ_ONE, 0, SIZE)[0].1 & proto::ZERO, proto::ZERO);
        c.disconnect();
    }
}

/// The status of all, asked for again and again from where the last answer ended: a server may tell of less than it was asked for.
fn status_of_all(c: &mut Client, size: u64, most: u64) -> Vec<(u64, u64)> {
    let (mut at, mut seen) = (0, Vec::new());
    while at < size {
        let told = c.status(0, at, (size - at).min(most));
        at += told.iter().map(|e| e.0).sum::<u64>();
        seen.extend(told);
    }
    seen
}

/// Only 64-bit headers can speak of more than 4 GiB at once.
#[test]
fn extended_headers_go_beyond_four_gib() {
    let place = Place::file();
    let server = place.serve("16G", &[]);
    let size = 16_u64 << 30;
    let mut c = server.client(Headers::Extended);
    assert_eq!(c.info.size, size);
    c.write(size - 4096, &pattern(size - 4096, 1, 1, 4096));
    let told = status_of_all(&mut c, size, size);
    assert_eq!(holes(&told), [(size - 4096, true), (4096, false)]);
    assert!(told[0].0 > 4 << 30, "an extent of 64 bits: {told:?}");
    assert!(c.status(flag::REQ_ONE, 0, size)[0].0 > 4 << 30);
    assert_eq!(c.outcome(cmd::WRITE_ZEROES, 0, 4096, size - 4096), 0, "zeroes of 16 GiB in one request");
    assert_eq!(c.read(size - 4096, 4096), [0; 4096]);
    c.write(size - 4096, &pattern(size - 4096, 1, 2, 4096));
    assert_eq!(c.outcome(cmd::TRIM, 0, 0, size), 0, "a trim of 16 GiB in one request");
    assert_eq!(c.read(size - 4096, 4096), [0; 4096]);
    c.disconnect();
    // The same volume through 32 bits, piece by piece.
    let mut c = server.client(Headers::Structured);
    c.write(size - 4096, &pattern(size - 4096, 1, 3, 4096));
    let told = status_of_all(&mut c, size, u64::from(u32::MAX) & !0xffff);
    assert_eq!(holes(&told), [(size - 4096, true), (4096, false)]);
    c.disconnect();
}

/// Around every power of two, where buffers end; many at once, so that they lie across each other's borders.
#[test]
fn writes_of_every_size_arrive_whole() {
    let place = Place::file();
    let server = place.serve("64M", &[]);
    let sizes = (9..20)
        .flat_map(|n| [-512_i64, -32, -28, -1, 0, 1, 28, 512].map(|d| usize::try_from((1 << n) + d).expect("small")));
    for size in sizes.filter(|n| *n > 0) {
        for headers in [Headers::Structured, Headers::Extended] {
            let mut c = server.client(headers);
            let step = size.next_multiple_of(4096) as u64;
            for n in 0..6 {
                c.send(Request::write(0, n * step, &pattern(n, n, size as u64, size))).expect("send");
            }
            for _ in 0..6 {
                assert_eq!(c.receive().unwrap_or_else(|e| panic!("writes of {size} bytes: {e}")).error, 0);
            }
            for n in 0..6 {
                assert!(c.read(n * step, size) == pattern(n, n, size as u64, size), "write {n} of {size} bytes");
            }
        }
    }
}

/// Many requests before the first answer is looked at: each is answered once, under its own cookie.
#[test]
fn requests_can_be_outstanding_in_numbers() {
    let place = Place::file();
    let server = place.serve("64M", &[]);
    for (round, headers) in (1..).zip(ALL) {
        let mut c: Client = server.client(headers);
        for n in 0..256 {
            c.send(Request::write(0, n * 8192, &pattern(n * 8192, n, round, 8192))).expect("send");
        }
        for _ in 0..256 {
            assert_eq!(c.receive().expect("an answer").error, 0);
        }
        let mut at = std::collections::HashMap::new();
        for n in (0..256).rev() {
            at.insert(c.send(Request::new(cmd::READ, 0, n * 8192, 8192)).expect("send"), n);
            if n % 16 == 0 {
                at.insert(c.send(Request::new(cmd::FLUSH, 0, 0, 0)).expect("send"), 999);
            }
        }
        while c.outstanding() > 0 {
            let r = c.receive().expect("an answer");
            let n = at.remove(&r.cookie).expect("once");
            assert!(n == 999 || r.data == pattern(n * 8192, n, round, 8192), "block {n}");
        }
        c.disconnect();
    }
}
