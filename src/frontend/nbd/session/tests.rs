//! Whole sessions over a script, against a flat model.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::frontend::nbd::testing::{Script, Sectors, Tasks};

const SECTORS: usize = 64;
const SIZE: u64 = (SECTORS * SECTOR) as u64;

fn request(extended: bool, flags: u16, command: u16, cookie: u64, offset: u64, length: u64) -> Vec<u8> {
    let mut b = Vec::new();
    b.extend(if extended { 0x21e4_1c71_u32 } else { 0x2560_9513 }.to_be_bytes());
    b.extend(flags.to_be_bytes());
    b.extend(command.to_be_bytes());
    b.extend(cookie.to_be_bytes());
    b.extend(offset.to_be_bytes());
    if extended {
        b.extend(length.to_be_bytes())
    } else {
        b.extend((length as u32).to_be_bytes())
    }
    b
}

/// An answer, put together from its chunks: error, data with its place, extents.
#[derive(Debug, Default, PartialEq, Eq)]
struct Answer {
    error: u32,
    data: Vec<(u64, Vec<u8>)>,
    extents: Vec<(u64, u64)>,
    chunks: usize,
    done: bool,
}

fn number(b: &mut &[u8], n: usize) -> u64 {
    let (head, rest) = b.split_at(n);
    *b = rest;
    head.iter().fold(0, |v, x| v << 8 | u64::from(*x))
}

/// Everything the client heard. `reads`: the lengths of reads by cookie, for simple replies.
fn answers(mut heard: &[u8], reads: &HashMap<u64, (u64, usize)>) -> HashMap<u64, Answer> {
    let mut found: HashMap<u64, Answer> = HashMap::new();
    let b = &mut heard;
    while !b.is_empty() {
        let magic = number(b, 4);
        if magic == 0x6744_6698 {
            let error = number(b, 4) as u32;
            let cookie = number(b, 8);
            let a = found.entry(cookie).or_default();
            assert!(!a.done, "answered twice");
            (a.error, a.done) = (error, true);
            if let Some((at, len)) = reads.get(&cookie).filter(|_| error == 0) {
                let (data, rest) = b.split_at(*len);
                *b = rest;
                a.data.push((*at, data.to_vec()));
            }
            continue;
        }
        let extended = magic == 0x6e8a_278c;
        assert!(extended || magic == 0x668e_33ef, "{magic:x}");
        let (flags, kind) = (number(b, 2), number(b, 2));
        let cookie = number(b, 8);
        if extended {
            number(b, 8);
        }
        let len = number(b, if extended { 8 } else { 4 }) as usize;
        let (mut body, rest) = b.split_at(len);
        *b = rest;
        let body = &mut body;
        let a = found.entry(cookie).or_default();
        assert!(!a.done, "answered twice");
        a.chunks += 1;
        a.done = flags & 1 == 1;
        match kind {
            0 => {}
            1 => {
                let at = number(body, 8);
                a.data.push((at, body.to_vec()));
            }
            2 => {
                let at = number(body, 8);
                let len = number(body, 4) as usize;
                a.data.push((at, vec![0; len]));
            }
            5 | 6 => {
                let wide = if kind == 6 { 8 } else { 4 };
                assert_eq!(number(body, 4), 1);
                if kind == 6 {
                    number(body, 4);
                }
                while !body.is_empty() {
                    a.extents.push((number(body, wide), number(body, wide)));
                }
            }
            0x8001 => a.error = number(body, 4) as u32,
            _ => panic!("kind {kind}"),
        }
    }
    found
}

struct Talk {
    said: Vec<u8>,
    dialect: Dialect,
    read_only: bool,
    piece: usize,
    /// Says good-bye in the end.
    polite: bool,
    disk: Rc<Sectors>,
}

impl Talk {
    fn new(dialect: Dialect) -> Self {
        Self {
            said: Vec::new(),
            dialect,
            read_only: false,
            piece: usize::MAX,
            polite: true,
            disk: Sectors::new(SECTORS),
        }
    }

    fn run(&self) -> (Result<(), Broken>, Vec<u8>) {
        let mut said = self.said.clone();
        if self.polite {
            said.extend(request(self.dialect == Dialect::Extended, 0, 2, 0, 0, 0));
        }
        let script = Script::new(said, self.piece);
        let served = Served {
            engine: Rc::clone(&self.disk),
            guard: Arc::default(),
            size: SIZE,
            read_only: self.read_only,
            dialect: self.dialect,
            allocation: self.dialect != Dialect::Simple,
        };
        let tasks = Tasks::default();
        let memory = (Memory::default(), Rc::default());
        let session = Session::new(Rc::clone(&script), served, memory, tasks.beside(), Rc::default());
        let ended = tasks.run(session.run(Input::new(64)));
        assert!(tasks.is_empty(), "something is still under way");
        assert!(script.closed.get());
        let heard = script.heard.borrow().clone();
        (ended, heard)
    }
}

#[test]
fn every_refusal_has_its_number() {
    const READ: u16 = 0;
    const WRITE: u16 = 1;
    const TRIM: u16 = 4;
    const CACHE: u16 = 5;
    const ZEROES: u16 = 6;
    const STATUS: u16 = 7;
    // flags, command, offset, length, expected error; extended, read-only.
    let cases = [
        (0, READ, SIZE - 512, 1024, 22, false),
        (0, READ, u64::MAX - 3, 1024, 22, false),
        (0, READ, 0, 0, 22, false),
        (0, READ, 0, (32 << 20) + 1, 22, false),
        (flag::REQ_ONE, READ, 0, 512, 22, false),
        (0, WRITE, SIZE - 512, 1024, 28, false),
        (0, WRITE, u64::MAX, 1, 28, false),
        (flag::DF, WRITE, 0, 512, 22, false),
        (0, WRITE, 0, 512, 1, true),
        (0, TRIM, SIZE, 512, 22, false),
        (0, TRIM, 0, 512, 1, true),
        (0, ZEROES, SIZE, 512, 28, false),
        (flag::REQ_ONE, ZEROES, 0, 512, 22, false),
        (flag::FAST_ZERO, TRIM, 0, 512, 22, false),
        (0, CACHE, SIZE, 512, 22, false),
        (0, CACHE, 0, 512, 0, false),
        (0, STATUS, SIZE - 1, 2, 22, false),
        (0, 3, 0, 0, 0, true),
        (0, 8, 0, 0, 22, false),
        (0, 999, 0, 512, 22, false),
        (flag::FUA, 3, 0, 0, 0, false),
    ];
    for dialect in [Dialect::Simple, Dialect::Structured, Dialect::Extended] {
        let extended = dialect == Dialect::Extended;
        for (i, (flags, command, offset, length, error, read_only)) in cases.into_iter().enumerate() {
            if dialect == Dialect::Simple && command == STATUS {
                continue;
            }
            let mut talk = Talk { read_only, ..Talk::new(dialect) };
            // A good one before and after: the stream stays in step.
            talk.said.extend(request(extended, 0, READ, 1, 0, 512));
            talk.said.extend(request(extended, flags, command, 2, offset, length));
            if command == WRITE {
                talk.said.extend(vec![7; length as usize]);
            }
            talk.said.extend(request(extended, 0, READ, 3, 0, 512));
            let (ended, heard) = talk.run();
            ended.unwrap();
            let found = answers(&heard, &HashMap::from([(1, (0, 512)), (3, (0, 512))]));
            assert_eq!(found[&2].error, error, "case {i} in {dialect:?}");
            assert!(found.len() == 3 && found.values().all(|a| a.done), "case {i} in {dialect:?}");
            assert!([1, 3].iter().all(|c| found[c].error == 0 && found[c].data[0].1 == [0; 512]));
            assert!(talk.disk.bytes.borrow().iter().all(|b| *b == 0), "case {i}: a refused request changed something");
        }
    }
}

#[test]
fn payloads_nobody_asked_for_are_read_past_or_end_it() {
    let mut talk = Talk::new(Dialect::Extended);
    talk.said.extend(request(true, flag::PAYLOAD_LEN, 7, 1, 0, 100));
    talk.said.extend([0xaa; 100]);
    talk.said.extend(request(true, 0, 3, 2, 0, 0));
    let (ended, heard) = talk.run();
    ended.unwrap();
    let found = answers(&heard, &HashMap::new());
    assert_eq!((found[&1].error, found[&2].error), (22, 0));
    let mut talk = Talk::new(Dialect::Extended);
    talk.said.extend(request(true, 0, 1, 1, 0, wire::MAX_SKIPPED + 1));
    assert!(matches!(talk.run().0, Err(Broken::Nonsense(_))));
}

#[test]
fn an_end_in_the_middle_is_an_error_and_a_good_bye_is_not() {
    let whole = [request(false, 0, 1, 1, 0, 1024), vec![9; 1024]].concat();
    for cut in [1, 27, 28, 500, whole.len() - 1] {
        let talk = Talk { said: whole[..cut].to_vec(), polite: false, ..Talk::new(Dialect::Simple) };
        let (ended, heard) = talk.run();
        assert!(matches!(ended, Err(Broken::Io(e)) if e.kind() == io::ErrorKind::UnexpectedEof), "cut at {cut}");
        assert!(heard.is_empty() && talk.disk.bytes.borrow().iter().all(|b| *b == 0), "cut at {cut}");
    }
    let mut said = whole;
    said.extend(request(false, 0, 2, 2, 0, 0));
    said.extend(b"what comes after good-bye is not looked at");
    let (ended, heard) = Talk { said, ..Talk::new(Dialect::Simple) }.run();
    ended.unwrap();
    assert_eq!(answers(&heard, &HashMap::new()).len(), 1);
    let talk = Talk { said: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), ..Talk::new(Dialect::Simple) };
    assert!(matches!(talk.run().0, Err(Broken::Nonsense(_))));
}

#[test]
fn holes_are_chunks_and_df_is_one() {
    for (flags, chunks) in [(0, 3), (flag::DF, 1)] {
        let mut talk = Talk::new(Dialect::Structured);
        talk.disk.bytes.borrow_mut()[8192..12288].fill(5);
        let (ended, heard) = {
            let mut t = Talk { disk: Rc::clone(&talk.disk), ..Talk::new(Dialect::Structured) };
            t.said.extend(request(false, 0, 1, 1, 8192, 4096));
            t.said.extend([5; 4096]);
            t.run()
        };
        ended.unwrap();
        assert_eq!(answers(&heard, &HashMap::new())[&1].error, 0);
        talk.said.extend(request(false, flags, 0, 2, 0, 16384));
        talk.said.extend(request(false, flags, 0, 3, 20000, 100));
        talk.said.extend(request(false, 0, 7, 4, 100, 16000));
        talk.said.extend(request(false, flag::REQ_ONE, 7, 5, 100, 16000));
        let (ended, heard) = talk.run();
        ended.unwrap();
        let found = answers(&heard, &HashMap::new());
        assert_eq!(found[&2].chunks, chunks, "flags {flags}");
        assert_eq!(found[&3].data, [(20000, vec![0; 100])]);
        assert_eq!(found[&4].extents, [(8092, 3), (4096, 0), (3812, 3)]);
        assert_eq!(found[&5].extents, [(8092, 3)]);
    }
}

#[derive(Debug, Clone)]
enum Op {
    Read,
    Write(u8),
    Zeroes,
    Trim,
}

proptest! {
    /// Pipelined requests at any byte, cut into any pieces: those that do not overlap are as if done one by one, and bytes
    /// beside a request never change.
    #[test]
    fn bytes_land_where_they_should(
        ops in prop::collection::vec((prop_oneof![
            Just(Op::Read), any::<u8>().prop_map(Op::Write), Just(Op::Zeroes), Just(Op::Trim)
        ], 0u64..8, 1u64..1500), 1..24),
        dialect in prop_oneof![Just(Dialect::Simple), Just(Dialect::Structured), Just(Dialect::Extended)],
        piece in prop_oneof![1usize..80, Just(usize::MAX)],
    ) {
        let extended = dialect == Dialect::Extended;
        let mut talk = Talk { piece, ..Talk::new(dialect) };
        let mut model = vec![0u8; SIZE as usize];
        let mut reads = HashMap::new();
        let mut expected = HashMap::new();
        // Neighbours share sectors, but no byte: each has its own stretch.
        let mut at = 0;
        for (i, (op, gap, len)) in ops.into_iter().enumerate() {
            let (from, len) = (at + gap, len.min(SIZE.saturating_sub(at + gap)));
            if len == 0 {
                break;
            }
            at = from + len;
            let place = from as usize..(from + len) as usize;
            let cookie = i as u64;
            match op {
                Op::Read => {
                    talk.said.extend(request(extended, 0, 0, cookie, from, len));
                    reads.insert(cookie, (from, len as usize));
                    expected.insert(cookie, model[place].to_vec());
                }
                Op::Write(b) => {
                    let flags = if extended { flag::PAYLOAD_LEN } else { 0 };
                    talk.said.extend(request(extended, flags, 1, cookie, from, len));
                    talk.said.extend(vec![b; len as usize]);
                    model[place].fill(b);
                }
                Op::Zeroes => {
                    talk.said.extend(request(extended, flag::NO_HOLE, 6, cookie, from, len));
                    model[place].fill(0);
                }
                Op::Trim => {
                    talk.said.extend(request(extended, 0, 4, cookie, from, len));
                    let whole = from.next_multiple_of(512)..(from + len) / 512 * 512;
                    if !whole.is_empty() {
                        model[whole.start as usize..whole.end as usize].fill(0);
                    }
                }
            }
        }
        let (ended, heard) = talk.run();
        prop_assert!(ended.is_ok());
        let found = answers(&heard, &reads);
        prop_assert!(found.values().all(|a| a.error == 0 && a.done));
        for (cookie, want) in expected {
            let mut data: Vec<_> = found[&cookie].data.clone();
            data.sort();
            let (from, len) = reads[&cookie];
            prop_assert_eq!(data[0].0, from);
            let all: Vec<u8> = data.into_iter().flat_map(|d| d.1).collect();
            prop_assert_eq!(all.len(), len);
            prop_assert_eq!(all, want);
        }
        prop_assert!(*talk.disk.bytes.borrow() == model);
    }

    /// Whatever comes, a session ends, and nothing is left behind.
    #[test]
    fn noise_ends_a_session(
        mut said in prop::collection::vec(any::<u8>(), 0..300),
        dialect in prop_oneof![Just(Dialect::Simple), Just(Dialect::Structured), Just(Dialect::Extended)],
        sensible: bool,
        command in 0u16..9,
        length in 0u64..2000,
    ) {
        if sensible {
            let head = request(dialect == Dialect::Extended, 0, command, 1, 0, length);
            said.splice(0..0, head);
        }
        let _ = Talk { said, piece: 7, polite: false, ..Talk::new(dialect) }.run();
    }
}
