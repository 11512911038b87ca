//! Handshakes over a script.

use std::cell::Cell;

use proptest::prelude::*;

use super::*;
use crate::frontend::nbd::testing::{Script, Tasks};

/// Two exports, one of which cannot be opened.
#[derive(Default)]
struct TwoDoors {
    opened: Cell<u32>,
}

impl Hall for TwoDoors {
    type Opened = ();

    async fn names(&self) -> Result<Vec<String>> {
        Ok(vec!["good".into(), "busy".into()])
    }

    async fn info(&self, name: &str) -> Result<ExportInfo> {
        match name {
            "" | "good" | "busy" => Ok(ExportInfo {
                name: if name.is_empty() { "good".into() } else { name.into() },
                description: "a door".into(),
                size_bytes: 1 << 20,
                read_only: false,
            }),
            _ => Err(Error::new(ErrorKind::NotFound, format!("no export {name}"))),
        }
    }

    fn lament(&self, _: &str, _: &Error) {}

    async fn open(&self, name: &str) -> Result<((), ExportInfo)> {
        let info = self.info(name).await?;
        if name == "busy" {
            return Err(Error::new(ErrorKind::Busy, "another host has it"));
        }
        self.opened.set(self.opened.get() + 1);
        Ok(((), info))
    }
}

fn opt(number: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT", &number.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat()
}

fn go(name: &str, wanted: &[u16]) -> Vec<u8> {
    let wanted: Vec<u8> = wanted.iter().flat_map(|w| w.to_be_bytes()).collect();
    let count = (wanted.len() as u16 / 2).to_be_bytes();
    [&(name.len() as u32).to_be_bytes(), name.as_bytes(), &count, &wanted[..]].concat()
}

fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut b = [&(name.len() as u32).to_be_bytes(), name.as_bytes(), &(queries.len() as u32).to_be_bytes()].concat();
    for q in queries {
        b.extend((q.len() as u32).to_be_bytes());
        b.extend(q.as_bytes());
    }
    b
}

/// What came of it, the kinds of the replies by option, and how often something was opened.
struct Ended {
    outcome: Result<Outcome<()>, Broken>,
    replies: Vec<(u32, u32, Vec<u8>)>,
    opened: u32,
    rest: Vec<u8>,
}

fn run(tls: TlsState, piece: usize, options: &[Vec<u8>]) -> Ended {
    let said = [b"\0\0\0\x03".to_vec(), options.concat()].concat();
    let (script, hall) = (Script::new(said, piece), TwoDoors::default());
    let mut input = Input::new(20 << 10);
    let outcome = Tasks::default().run(async {
        let mut h = Handshake::new(tls);
        h.greet(&mut input, &script).await?;
        h.options(&mut input, &script, &hall).await
    });
    let heard = script.heard.borrow();
    let mut rest = heard.strip_prefix(&wire::greeting()[..]).expect("a greeting");
    let mut replies = Vec::new();
    while rest.len() >= 20 && rest[..8] == 0x0003_e889_0455_65a9_u64.to_be_bytes() {
        let at = |i: usize| u32::from_be_bytes(rest[i..i + 4].try_into().unwrap());
        let (option, kind, len) = (at(8), at(12), at(16) as usize);
        replies.push((option, kind, rest[20..20 + len].to_vec()));
        rest = &rest[20 + len..];
    }
    Ended { outcome, replies, opened: hall.opened.get(), rest: rest.to_vec() }
}

fn kinds(e: &Ended) -> Vec<(u32, u32)> {
    e.replies.iter().map(|r| (r.0, r.1)).collect()
}

#[test]
fn a_modern_client_gets_everything() {
    for piece in [1, 13, usize::MAX] {
        let e = run(
            TlsState::Unavailable,
            piece,
            &[
                opt(option::EXTENDED_HEADERS, b""),
                opt(option::STRUCTURED_REPLY, b""),
                opt(option::LIST, b""),
                opt(option::LIST_META_CONTEXT, &meta("good", &["base:"])),
                opt(option::SET_META_CONTEXT, &meta("good", &["base:allocation", "other:thing"])),
                opt(option::INFO, &go("good", &[info::BLOCK_SIZE, info::DESCRIPTION, 77])),
                opt(99, b"whatever"),
                opt(option::GO, &go("good", &[info::NAME])),
                b"and requests".to_vec(),
            ],
        );
        let Ok(Outcome::Serve(agreed)) = &e.outcome else { panic!("refused") };
        assert!(agreed.dialect == Dialect::Extended && agreed.allocation && agreed.info.name == "good");
        assert_eq!(e.opened, 1, "INFO opens nothing");
        assert_eq!(
            kinds(&e),
            [
                (option::EXTENDED_HEADERS, reply::ACK),
                (option::STRUCTURED_REPLY, reply::ERR_EXT_HEADER_REQD),
                (option::LIST, reply::SERVER),
                (option::LIST, reply::SERVER),
                (option::LIST, reply::ACK),
                (option::LIST_META_CONTEXT, reply::META_CONTEXT),
                (option::LIST_META_CONTEXT, reply::ACK),
                (option::SET_META_CONTEXT, reply::META_CONTEXT),
                (option::SET_META_CONTEXT, reply::ACK),
                (option::INFO, reply::INFO),
                (option::INFO, reply::INFO),
                (option::INFO, reply::INFO),
                (option::INFO, reply::ACK),
                (99, reply::ERR_UNSUP),
                (option::GO, reply::INFO),
                (option::GO, reply::INFO),
                (option::GO, reply::ACK),
            ]
        );
    }
}

#[test]
fn what_is_asked_wrongly_is_refused_and_the_talk_goes_on() {
    let e = run(
        TlsState::Unavailable,
        usize::MAX,
        &[
            opt(option::SET_META_CONTEXT, &meta("good", &["base:allocation"])),
            opt(option::STRUCTURED_REPLY, b"x"),
            opt(option::STRUCTURED_REPLY, b""),
            opt(option::LIST, b"x"),
            opt(option::GO, b"\0\0\0\x04abc"),
            opt(option::GO, &go("nobody", &[])),
            opt(option::GO, &go("busy", &[])),
            opt(option::SET_META_CONTEXT, &meta("nobody", &["base:allocation"])),
            opt(option::SET_META_CONTEXT, b"\0\0"),
            opt(option::SET_META_CONTEXT, &meta("good", &["base:allocation"])),
            opt(option::SET_META_CONTEXT, &meta("good", &["base:"])),
            opt(option::STARTTLS, b""),
            opt(option::LIST, &[0; wire::MAX_OPTION + 1]),
            opt(option::GO, &go("good", &[])),
        ],
    );
    let Ok(Outcome::Serve(agreed)) = &e.outcome else { panic!("refused") };
    assert!(!agreed.allocation, "the last choice counts, and it was for nothing");
    assert_eq!(
        kinds(&e)[..13],
        [
            (option::SET_META_CONTEXT, reply::ERR_INVALID),
            (option::STRUCTURED_REPLY, reply::ERR_INVALID),
            (option::STRUCTURED_REPLY, reply::ACK),
            (option::LIST, reply::ERR_INVALID),
            (option::GO, reply::ERR_INVALID),
            (option::GO, reply::ERR_UNKNOWN),
            (option::GO, reply::ERR_PLATFORM),
            (option::SET_META_CONTEXT, reply::ERR_UNKNOWN),
            (option::SET_META_CONTEXT, reply::ERR_INVALID),
            (option::SET_META_CONTEXT, reply::META_CONTEXT),
            (option::SET_META_CONTEXT, reply::ACK),
            (option::SET_META_CONTEXT, reply::ACK),
            (option::STARTTLS, reply::ERR_POLICY),
        ]
    );
    assert_eq!(kinds(&e)[13], (option::LIST, reply::ERR_TOO_BIG));
    assert!(String::from_utf8_lossy(&e.replies[6].2).contains("another host has it"));
}

#[test]
fn an_old_client_gets_its_zeros() {
    let said = [b"\0\0\0\x01".to_vec(), opt(option::EXPORT_NAME, b"good")].concat();
    let script = Script::new(said, 3);
    let mut input = Input::new(4096);
    let outcome = Tasks::default().run(async {
        let mut h = Handshake::new(TlsState::Unavailable);
        h.greet(&mut input, &script).await.unwrap();
        h.options(&mut input, &script, &TwoDoors::default()).await
    });
    assert!(matches!(outcome, Ok(Outcome::Serve(a)) if a.dialect == Dialect::Simple && !a.allocation));
    assert_eq!(script.heard.borrow().len(), 18 + 10 + 124);
    let e = run(TlsState::Unavailable, 3, &[opt(option::EXPORT_NAME, b"")]);
    assert!(matches!(e.outcome, Ok(Outcome::Serve(_))) && e.rest.len() == 10);
    for name in [&b"nobody"[..], b"\xff"] {
        let e = run(TlsState::Unavailable, 3, &[opt(option::EXPORT_NAME, name)]);
        assert!(!matches!(e.outcome, Ok(Outcome::Serve(_))) && e.rest.is_empty() && e.opened == 0);
    }
}

#[test]
fn without_tls_nothing_is_told_where_it_is_required() {
    let before = [
        opt(option::LIST, b""),
        opt(option::INFO, &go("good", &[])),
        opt(option::GO, &go("good", &[])),
        opt(option::STRUCTURED_REPLY, b""),
    ];
    let e = run(TlsState::Required, usize::MAX, &before);
    assert!(e.replies.iter().all(|r| r.1 == reply::ERR_TLS_REQD) && e.replies.len() == 4 && e.opened == 0);
    assert!(matches!(e.outcome, Ok(Outcome::Left)));
    let e = run(TlsState::Required, 5, &[opt(option::EXPORT_NAME, b"good")]);
    assert!(matches!(e.outcome, Err(Broken::Nonsense(_))) && e.opened == 0);
    let e = run(TlsState::Required, 5, &[opt(option::ABORT, b"")]);
    assert!(matches!(e.outcome, Ok(Outcome::Left)) && kinds(&e) == [(option::ABORT, reply::ACK)]);
    let e = run(TlsState::Offered, 5, &[opt(option::STARTTLS, b"")]);
    assert!(matches!(e.outcome, Ok(Outcome::StartTls)));
    // In one go with what follows: somebody in between may have added it.
    let e = run(TlsState::Required, usize::MAX, &[opt(option::STARTTLS, b""), opt(option::LIST, b"")]);
    assert!(matches!(e.outcome, Err(Broken::Nonsense(_))), "bytes in the clear behind STARTTLS");
    let e = run(TlsState::On, 5, &[opt(option::STARTTLS, b""), opt(option::GO, &go("good", &[]))]);
    assert_eq!(kinds(&e)[0], (option::STARTTLS, reply::ERR_INVALID));
}

#[test]
fn what_was_agreed_before_tls_is_forgotten() {
    let said = [opt(option::STRUCTURED_REPLY, b""), opt(option::SET_META_CONTEXT, &meta("good", &["base:allocation"]))];
    let script = Script::new([b"\0\0\0\x03".to_vec(), said.concat(), opt(option::STARTTLS, b"")].concat(), usize::MAX);
    let agreed = Tasks::default().run(async {
        let hall = TwoDoors::default();
        let (mut h, mut input) = (Handshake::new(TlsState::Offered), Input::new(4096));
        h.greet(&mut input, &script).await.unwrap();
        assert!(matches!(h.options(&mut input, &script, &hall).await, Ok(Outcome::StartTls)));
        h.under_tls();
        let secure = Script::new(opt(option::GO, &go("good", &[])), usize::MAX);
        h.options(&mut input, &secure, &hall).await
    });
    assert!(matches!(agreed, Ok(Outcome::Serve(a)) if a.dialect == Dialect::Simple && !a.allocation));
}

#[test]
fn nonsense_ends_it() {
    for said in [&b"\0\0\0\x04"[..], b"\0\0\0\x03IHAVEOPSxxxxxxxx", b"GET / HTTP/1.1\r\n\r\n", b"\0\0", b""] {
        let script = Script::new(said.to_vec(), 2);
        let ended = Tasks::default().run(async {
            let (mut h, mut input) = (Handshake::new(TlsState::Unavailable), Input::new(4096));
            h.greet(&mut input, &script).await?;
            h.options(&mut input, &script, &TwoDoors::default()).await
        });
        assert!(ended.is_err(), "{said:?}");
    }
}

proptest! {
    #[test]
    fn noise_opens_nothing_without_tls(noise in prop::collection::vec(prop_oneof![
        (0u32..14, prop::collection::vec(any::<u8>(), 0..40)).prop_map(|(n, data)| opt(n, &data)),
        prop::collection::vec(any::<u8>(), 0..30),
        Just(opt(option::GO, &go("good", &[]))),
    ], 0..8), piece in 1usize..50) {
        let e = run(TlsState::Required, piece, &noise);
        prop_assert_eq!(e.opened, 0);
        prop_assert!(!matches!(e.outcome, Ok(Outcome::Serve(_))));
        // Without TLS being required, anything may come of it, but it comes to an end.
        let _ = run(TlsState::Unavailable, piece, &noise);
    }
}
