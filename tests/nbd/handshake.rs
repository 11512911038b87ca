//! What comes before the first request: greetings, options, names.

use std::io::Write;
use std::time::Duration;

use crate::nbd_support::client::{Handshake, Headers, named};
use crate::nbd_support::proto::{self, cmd, errno, opt, rep};
use crate::nbd_support::requests::{Client, Request};
use crate::nbd_support::server::{Place, Server};
use crate::nbd_support::tls::Authority;

const SOON: Duration = Duration::from_secs(10);

fn hello(server: &Server) -> Handshake {
    Handshake::new(&server.addr()).expect("a greeting")
}

#[test]
fn one_volume_is_the_default_export_and_has_its_name_too() {
    let place = Place::file();
    let server = place.serve("64M", &[]);
    for name in ["", "vol"] {
        let mut h = hello(&server);
        let info = h.info(name).expect("INFO").expect("the export");
        assert_eq!((info.size, info.name.as_deref()), (64 << 20, Some("vol")), "{name:?}");
        assert!(info.description.is_some());
        let (least, preferred, most) = info.blocks.expect("block sizes");
        assert!(least == 1 || least == 512, "the smallest request: {least}");
        assert_eq!((preferred, most), (4096, 32 << 20));
        // INFO decides nothing: any option may follow.
        assert_eq!(h.list().expect("LIST").expect("names"), ["vol"]);
        assert_eq!(h.go(name).info, info);
        // The old way, with and without its zeros.
        for flags in [proto::FIXED_NEWSTYLE | proto::NO_ZEROES, proto::FIXED_NEWSTYLE] {
            let h = Handshake::with_flags(&server.addr(), flags).expect("a greeting");
            let mut c = h.export_name(name).expect("EXPORT_NAME");
            assert_eq!((c.info.size, c.info.flags & !proto::can::DF), (info.size, info.flags & !proto::can::DF));
            c.write(512, &[7; 512]);
            assert_eq!(c.read(512, 512), [7; 512]);
            c.disconnect();
        }
    }
}

#[test]
fn names_that_are_not_there_are_refused_and_the_talk_goes_on() {
    let place = Place::file();
    place.create("here", "64M");
    let server = place.start(&["--listen", "127.0.0.1:0", "--volume", "here"]);
    let long = "n".repeat(4096);
    let mut h = hello(&server);
    for name in ["there", "../here", "here/", "HERE", "", &long].into_iter().filter(|n| !n.is_empty()) {
        assert_eq!(h.info(name).expect("INFO").expect_err(name), rep::ERR_UNKNOWN, "{name}");
        let (again, e) = h.try_go(name).expect("GO").err().expect("there is no such export");
        assert_eq!(e, rep::ERR_UNKNOWN, "{name}");
        h = again;
    }
    assert!(h.go("here").read(0, 512).iter().all(|b| *b == 0));
    for name in ["there", &long] {
        let e = hello(&server).export_name(name).err().expect("there is no such export");
        assert!(matches!(e.kind(), std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::ConnectionReset), "{e}");
    }
}

#[test]
fn all_volumes_of_a_store_are_exports_or_those_named() {
    let place = Place::file();
    let mut names: Vec<String> = (0..40).map(|n| format!("vol-{n:02}.x_y")).collect();
    names.push("Z".repeat(128));
    for n in &names {
        place.create(n, "64M");
    }
    names.sort();
    let server = place.start(&["--listen", "127.0.0.1:0"]);
    let mut h = hello(&server);
    let mut listed = h.list().expect("LIST").expect("names");
    listed.sort();
    assert_eq!(listed, names);
    // No one is the default of several.
    assert_eq!(h.info("").expect("INFO").expect_err("no default"), rep::ERR_UNKNOWN);
    // Listing and asking attach nothing.
    for n in &names {
        assert_eq!(h.info(n).expect("INFO").expect("an export").size, 64 << 20);
    }
    assert_eq!(place.ok(&["list", "--json"]).trim(), "[]");
    // One made later is there, too.
    place.create("later", "64M");
    assert!(h.list().expect("LIST").expect("names").contains(&"later".to_owned()));
    drop(h.go("later"));
    server.terminate();

    let server = place.start(&["--listen", "127.0.0.1:0", "--volume", "later", "--volume", "vol-07.x_y"]);
    let mut h = hello(&server);
    let mut listed = h.list().expect("LIST").expect("names");
    listed.sort();
    assert_eq!(listed, ["later", "vol-07.x_y"]);
    for n in ["vol-08.x_y", ""] {
        assert_eq!(h.info(n).expect("INFO").expect_err("not served"), rep::ERR_UNKNOWN, "{n:?}");
    }
    drop(h.go("vol-07.x_y"));
    server.terminate();
}

#[test]
fn options_that_make_no_sense_are_refused_and_the_talk_goes_on() {
    let place = Place::file();
    let server = place.serve("64M", &[]);
    let mut h = hello(&server);
    for unknown in [0, 12, 4096, u32::MAX] {
        assert_eq!(h.option(unknown, b"whatever").expect("an answer").expect_err("unknown"), rep::ERR_UNSUP);
    }
    assert!(h.option(opt::STARTTLS, &[]).expect("an answer").is_err(), "no certificates, no TLS");
    let bad: &[(u32, &[u8])] = &[
        (opt::LIST, b"x"),
        (opt::STRUCTURED_REPLY, b"x"),
        (opt::EXTENDED_HEADERS, b"x"),
        (opt::GO, b""),
        (opt::GO, &[0, 0, 0]),
        (opt::GO, &[0, 0, 0, 9, b'v', 0, 0]),
        (opt::GO, &[0xff, 0xff, 0xff, 0xff, b'v', 0, 0]),
        (opt::INFO, &[0, 0, 0, 3, b'v', b'o', b'l', 0, 9, 0, 3]),
        (opt::INFO, &[0, 0, 0, 3, b'v', b'o', b'l', 0, 0, 0, 3]),
        (opt::INFO, &[0, 0, 0, 3, b'v', 0xff, b'l', 0, 0]),
        (opt::LIST_META_CONTEXT, &[0, 0, 0, 3, b'v', b'o', b'l', 0, 0, 0, 9]),
        (opt::LIST_META_CONTEXT, b""),
    ];
    for (option, data) in bad {
        let e = h.option(*option, data).expect("an answer").expect_err("it is malformed");
        // A name that is no text is a name of nothing.
        assert!(e == rep::ERR_INVALID || (data.contains(&0xff) && e == rep::ERR_UNKNOWN), "{option} {data:?}: {e:#x}");
    }
    assert!(h.go("vol").read(0, 512).iter().all(|b| *b == 0));

    // Too long to be anything: refused after it was read, or the connection is given up.
    let mut h = hello(&server);
    match h.option(opt::GO, &vec![0; 1 << 20]) {
        Ok(r) => assert!(matches!(r.expect_err("1 MiB"), rep::ERR_TOO_BIG | rep::ERR_INVALID)),
        Err(e) => println!("it hangs up: {e}"),
    }
    // A greeting with flags that nobody knows: the connection is given up.
    let mut h = Handshake::with_flags(&server.addr(), 1 << 7 | 3).expect("a greeting");
    let _ = h.send_option(opt::LIST, &[]);
    assert!(h.stream.closes_within(SOON));
    // An option that does not begin as one.
    let mut h = hello(&server);
    h.stream.write_all(&[0x55; 16]).expect("send");
    assert!(h.stream.closes_within(SOON));
    // Goodbye.
    let mut h = hello(&server);
    assert!(h.option(opt::ABORT, &[]).expect("an answer").expect("it is acknowledged").is_empty());
    assert!(h.stream.closes_within(SOON));
}

#[test]
fn contexts_are_negotiated() {
    let place = Place::file();
    let server = place.serve("64M", &[]);
    let mut h = hello(&server);
    let e = h.meta(opt::SET_META_CONTEXT, "vol", &["base:allocation"]).expect("an answer");
    assert_eq!(e.expect_err("without structured replies"), rep::ERR_INVALID);
    h.structured().expect("an answer").expect("structured replies");
    let names = |h: &mut Handshake, option, queries: &[&str]| {
        let all = h.meta(option, "vol", queries).expect("an answer").expect("contexts");
        all.into_iter().map(|(_, n)| n).collect::<Vec<_>>()
    };
    assert_eq!(names(&mut h, opt::LIST_META_CONTEXT, &[]), ["base:allocation"]);
    assert_eq!(names(&mut h, opt::LIST_META_CONTEXT, &["base:"]), ["base:allocation"]);
    assert!(names(&mut h, opt::LIST_META_CONTEXT, &["nobody:knows"]).is_empty());
    assert!(names(&mut h, opt::SET_META_CONTEXT, &["base:", "base:allocatio", "base:allocation2", "x:y"]).is_empty());
    let both = ["qemu:dirty-bitmap:x", "base:allocation", "base:allocation"];
    assert_eq!(names(&mut h, opt::SET_META_CONTEXT, &both), ["base:allocation"]);
    let e = h.meta(opt::LIST_META_CONTEXT, "there", &[]).expect("an answer");
    assert_eq!(e.expect_err("no such export"), rep::ERR_UNKNOWN);
    let mut c = h.go("vol");
    assert_eq!(c.status(0, 0, 4096).len(), 1);

    // The last one counts, and none of it without structured replies before.
    let mut h = hello(&server);
    h.structured().expect("an answer").expect("structured replies");
    assert_eq!(names(&mut h, opt::SET_META_CONTEXT, &["base:allocation"]).len(), 1);
    assert!(names(&mut h, opt::SET_META_CONTEXT, &[]).is_empty());
    let mut c = h.go("vol");
    assert_eq!(c.outcome(cmd::BLOCK_STATUS, 0, 0, 4096), errno::EINVAL, "no context was chosen");
    // That of the default export is not that of the volume's name.
    let mut h = hello(&server);
    h.structured().expect("an answer").expect("structured replies");
    h.meta(opt::SET_META_CONTEXT, "", &["base:allocation"]).expect("an answer").expect("contexts");
    let mut c = h.go("vol");
    let e = c.call(Request::new(cmd::BLOCK_STATUS, 0, 0, 4096)).map(|r| r.error);
    assert!(matches!(e, Ok(errno::EINVAL)), "a context of another name: {e:?}");
}

#[test]
fn both_kinds_of_headers_can_be_asked_for() {
    let place = Place::file();
    let server = place.serve("64M", &[]);
    let mut h = hello(&server);
    h.structured().expect("an answer").expect("structured replies");
    h.extended().expect("an answer").expect("extended headers after structured replies");
    h.meta(opt::SET_META_CONTEXT, "vol", &["base:allocation"]).expect("an answer").expect("contexts");
    let mut c = h.go("vol");
    assert_eq!(c.status(0, 0, 4096), [(4096, proto::HOLE | proto::ZERO)]);
    c.write(0, &[1; 512]);
    assert_eq!(c.read(0, 512), [1; 512]);
    let mut h = hello(&server);
    h.extended().expect("an answer").expect("extended headers alone");
    // Too late, and needless; whichever answer, the headers stay as they are.
    let _ = h.structured().expect("an answer");
    h.headers = Headers::Extended;
    assert_eq!(h.go("vol").read(0, 512), [1; 512]);
}

/// From connecting on; a client that sends a byte now and then is no better than a silent one.
#[test]
fn a_handshake_has_its_time() {
    let place = Place::file();
    let server = place.serve("64M", &[]);
    let mut silent = server.addr().connect().expect("connect");
    let mut slow = hello(&server);
    let mut idle = server.client(Headers::Structured);
    let mut writer = slow.stream.try_clone().expect("another handle");
    let dripping = std::thread::spawn(move || {
        let option =
            [&proto::IHAVEOPT.to_be_bytes()[..], &opt::GO.to_be_bytes(), &[0, 0, 0x20, 0], &named("vol")].concat();
        for b in option.iter().chain([0; 300].iter()) {
            if writer.write_all(&[*b]).is_err() {
                return;
            }
            crate::nbd_support::pause(Duration::from_millis(500));
        }
    });
    let begun = std::time::Instant::now();
    assert!(silent.closes_within(Duration::from_secs(60)), "a silent client is hung up on");
    println!("a silent client was hung up on after {:?}", begun.elapsed());
    assert!(begun.elapsed() > Duration::from_secs(2), "but not at once");
    assert!(slow.stream.closes_within(Duration::from_secs(30)), "a slow client is hung up on");
    dripping.join().expect("the slow client");
    // One that has come through may be silent for as long as it likes.
    assert_eq!(idle.read(0, 512), [0; 512]);
}

#[test]
fn where_tls_is_required_nothing_is_told_without_it() {
    let place = Place::file();
    let authority = Authority::new();
    let certs = place.path("certs");
    std::fs::create_dir(&certs).expect("a folder");
    for (from, to) in [("server.pem", "server-cert.pem"), ("server.key", "server-key.pem")] {
        std::fs::copy(authority.file(from), certs.join(to)).expect("copy");
    }
    let certs = certs.to_str().expect("text");
    let server = place.serve("64M", &["--tls-certs", certs, "--tls", "required"]);
    assert!(server.uris[0].starts_with("nbds://"), "{:?}", server.uris);
    let mut h = hello(&server);
    for (option, data) in
        [(opt::LIST, vec![]), (opt::STRUCTURED_REPLY, vec![]), (opt::INFO, [named("vol"), vec![0, 0]].concat())]
    {
        assert_eq!(h.option(option, &data).expect("an answer").expect_err("in the clear"), rep::ERR_TLS_REQD);
    }
    let (mut h, e) = h.try_go("vol").expect("an answer").err().expect("in the clear");
    assert_eq!(e, rep::ERR_TLS_REQD);
    assert!(h.option(opt::STARTTLS, b"x").expect("an answer").is_err(), "STARTTLS has no data");
    assert!(hello(&server).export_name("vol").is_err(), "the old way, in the clear");
    // What was sent before the change of keys must not be taken for what comes after it.
    let mut h = hello(&server);
    let mut two = Vec::new();
    for option in [opt::STARTTLS, opt::LIST] {
        two.extend_from_slice(&proto::IHAVEOPT.to_be_bytes());
        two.extend_from_slice(&option.to_be_bytes());
        two.extend_from_slice(&[0; 4]);
    }
    h.stream.write_all(&two).expect("send");
    let mut heard = vec![0; 20];
    let _ = std::io::Read::read_exact(&mut h.stream, &mut heard);
    assert!(h.stream.closes_within(Duration::from_secs(60)), "an option is not the beginning of TLS");
    server.terminate();

    let server = place.serve("64M", &["--tls-certs", certs, "--tls", "allowed"]);
    assert!(server.uris[0].starts_with("nbd://"), "{:?}", server.uris);
    let mut c: Client = server.client(Headers::Structured);
    c.write(0, &[3; 512]);
    c.disconnect();
    server.terminate();
}
