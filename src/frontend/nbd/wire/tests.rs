//! Golden bytes, and parsers against noise.

use proptest::prelude::*;

use super::*;

#[test]
fn golden_greeting_and_options() {
    assert_eq!(&greeting(), b"NBDMAGICIHAVEOPT\0\x03");
    assert_eq!(option_header(b"IHAVEOPT\0\0\0\x07\0\0\x01\x02"), Ok((option::GO, 0x102)));
    assert!(option_header(b"IHAVEOPS\0\0\0\x07\0\0\x01\x02").is_err());
    assert_eq!(client_flags([0, 0, 0, 3]), Ok(true));
    assert_eq!(client_flags([0, 0, 0, 1]), Ok(false));
    assert!(client_flags([0, 0, 0, 4]).is_err());
    let reply = option_reply(option::LIST, reply::SERVER, &server_data("vol"));
    assert_eq!(reply, b"\x00\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x03\0\0\0\x02\0\0\0\x07\0\0\0\x03vol");
    assert_eq!(option_reply(9, reply::ERR_UNSUP, b"")[12..16], [0x80, 0, 0, 1]);
    assert_eq!(export_data(1 << 30, 0x1ed), *b"\0\0\0\0\0\0\x40\0\0\0\x01\xed");
    assert_eq!(block_size_data(512, 4096, 1 << 25), *b"\0\x03\0\0\x02\0\0\0\x10\0\x02\0\0\0");
    assert_eq!(text_data(info::NAME, "v"), b"\0\x01v");
    assert_eq!(meta_data(ALLOCATION_ID), b"\0\0\0\x01base:allocation");
}

#[test]
fn golden_requests() {
    let plain = b"\x25\x60\x95\x13\0\x01\0\x01cookie42\0\0\0\0\0\0\x10\0\0\0\x02\0";
    let want = Request {
        flags: flag::FUA,
        command: Command::Write,
        cookie: u64::from_be_bytes(*b"cookie42"),
        offset: 4096,
        length: 512,
    };
    assert_eq!(parse_request(plain, false), Ok(Some((want, 28))));
    assert_eq!(want.payload(false), 512);
    let extended = b"\x21\xe4\x1c\x71\0\x21\0\x01cookie42\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x02\0";
    let want = Request { flags: flag::FUA | flag::PAYLOAD_LEN, ..want };
    assert_eq!(parse_request(extended, true), Ok(Some((want, 32))));
    // Not one byte less, and no other dialect.
    assert_eq!(parse_request(&plain[..27], false), Ok(None));
    assert_eq!(parse_request(&extended[..31], true), Ok(None));
    assert!(parse_request(plain, true).is_err() && parse_request(extended, false).is_err());
    let of = |command, flags| Request { command, flags, ..want };
    assert_eq!(of(Command::Read, 0).payload(true), 0);
    assert_eq!(of(Command::BlockStatus, flag::PAYLOAD_LEN).payload(true), 512);
    assert_eq!(of(Command::BlockStatus, flag::PAYLOAD_LEN).payload(false), 0);
    for n in 0..8 {
        assert!(!matches!(Command::from(n), Command::Unknown(_)), "{n}");
    }
    assert_eq!(Command::from(8), Command::Unknown(8));
}

#[test]
fn golden_replies() {
    let written = |f: &dyn Fn(&mut Vec<u8>)| {
        let mut out = Vec::new();
        f(&mut out);
        out
    };
    assert_eq!(written(&|o| simple_reply(o, 22, 7)), b"\x67\x44\x66\x98\0\0\0\x16\0\0\0\0\0\0\0\x07");
    let c = Chunks { cookie: 7, offset: 0x1000, extended: false };
    assert_eq!(written(&|o| c.none(o)), b"\x66\x8e\x33\xef\0\x01\0\0\0\0\0\0\0\0\0\x07\0\0\0\0");
    assert_eq!(
        written(&|o| c.data(o, false, 0x1000, 0x200)),
        b"\x66\x8e\x33\xef\0\0\0\x01\0\0\0\0\0\0\0\x07\0\0\x02\x08\0\0\0\0\0\0\x10\0"
    );
    assert_eq!(
        written(&|o| c.hole(o, true, 0x1200, 0x200)),
        b"\x66\x8e\x33\xef\0\x01\0\x02\0\0\0\0\0\0\0\x07\0\0\0\x0c\0\0\0\0\0\0\x12\0\0\0\x02\0"
    );
    assert_eq!(
        written(&|o| c.error(o, Errno::Inval, "no")),
        b"\x66\x8e\x33\xef\0\x01\x80\x01\0\0\0\0\0\0\0\x07\0\0\0\x08\0\0\0\x16\0\x02no"
    );
    assert_eq!(
        written(&|o| c.block_status(o, &[(512, false), (1024, true)])),
        b"\x66\x8e\x33\xef\0\x01\0\x05\0\0\0\0\0\0\0\x07\0\0\0\x14\0\0\0\x01\0\0\x02\0\0\0\0\0\0\0\x04\0\0\0\0\x03"
    );
    let x = Chunks { extended: true, ..c };
    assert_eq!(
        written(&|o| x.none(o)),
        b"\x6e\x8a\x27\x8c\0\x01\0\0\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\0"
    );
    assert_eq!(
        written(&|o| x.block_status(o, &[(1 << 33, true)])),
        b"\x6e\x8a\x27\x8c\0\x01\0\x06\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x18\
          \0\0\0\x01\0\0\0\x01\0\0\0\x02\0\0\0\0\0\0\0\0\0\0\0\x03"
    );
}

#[test]
fn queries_are_exact() {
    let q = parse_info(b"\0\0\0\x03vol\0\x02\0\x01\0\x03").unwrap();
    assert_eq!(q, InfoQuery { name: "vol".into(), wanted: vec![info::NAME, info::BLOCK_SIZE] });
    for bad in [
        &b""[..],
        b"\0\0\0",
        b"\0\0\0\x04vol\0\0",
        b"\0\0\0\x03vol",
        b"\0\0\0\x03vol\0\x01",
        b"\0\0\0\x03vol\0\0x",
        b"\xff\xff\xff\xffvol\0\0",
        b"\0\0\0\x01\xff\0\0",
    ] {
        assert_eq!(parse_info(bad), None, "{bad:?}");
    }
    let q = parse_meta(b"\0\0\0\0\0\0\0\x02\0\0\0\x05base:\0\0\0\x0fbase:allocation").unwrap();
    assert!(q.any && q.allocation && q.base && q.name.is_empty());
    let q = parse_meta(b"\0\0\0\x01v\0\0\0\x01\0\0\0\x10base:allocation2").unwrap();
    assert!(q.any && !q.allocation && !q.base);
    assert!(!parse_meta(b"\0\0\0\x01v\0\0\0\0").unwrap().any);
    for bad in [&b"\0\0\0\0"[..], b"\0\0\0\0\0\0\0\x01", b"\0\0\0\0\0\0\0\0x", b"\0\0\0\0\xff\xff\xff\xff"] {
        assert_eq!(parse_meta(bad), None, "{bad:?}");
    }
    assert!(export_name(&[b'a'; MAX_NAME]).is_some() && export_name(&[b'a'; MAX_NAME + 1]).is_none());
}

proptest! {
    /// Nothing panics, nothing is read that is not there, and a request is what its bytes say, however it is cut.
    #[test]
    fn noise_is_harmless(bytes in prop::collection::vec(any::<u8>(), 0..200), extended: bool) {
        let _ = (parse_info(&bytes), parse_meta(&bytes), export_name(&bytes));
        if let Ok(Some((_, n))) = parse_request(&bytes, extended) {
            prop_assert!(n <= bytes.len() && n <= MAX_REQUEST_HEADER);
        }
    }

    #[test]
    fn a_request_is_found_once_it_is_whole(
        flags: u16, command: u16, cookie: u64, offset: u64, length: u64, extended: bool, cut in 0usize..32,
    ) {
        let mut bytes = Vec::new();
        bytes.extend(if extended { REQUEST_EXTENDED } else { REQUEST }.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        let length = if extended { length } else { length & 0xffff_ffff };
        if extended { bytes.extend(length.to_be_bytes()) } else { bytes.extend((length as u32).to_be_bytes()) }
        let whole = bytes.len();
        let want = Request { flags, command: command.into(), cookie, offset, length };
        prop_assert_eq!(parse_request(&bytes, extended), Ok(Some((want, whole))));
        if cut < whole {
            prop_assert_eq!(parse_request(&bytes[..cut], extended), Ok(None));
        }
    }
}
