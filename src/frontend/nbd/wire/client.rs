//! The client's side, as far as a benchmark needs it: simple replies, no metadata. What it says is what the server's parsers take.

use super::{
    Command, HANDSHAKE_FIXED_NEWSTYLE, HANDSHAKE_NO_ZEROES, IHAVEOPT, Nonsense, OPTION_REPLY, REQUEST, SIMPLE_REPLY,
    be16, be32, be64,
};

/// Bytes of the server's greeting.
pub const GREETING: usize = 18;
/// Bytes of the header of a reply to an option.
pub const OPTION_REPLY_HEADER: usize = 20;
/// Bytes of a simple reply, before its data.
pub const REPLY_HEADER: usize = 16;

/// The answer to the server's greeting.
///
/// # Errors
/// No NBD server, or one of the time before options.
pub fn hello(greeting: &[u8; GREETING]) -> Result<[u8; 4], Nonsense> {
    if greeting[..8] != *b"NBDMAGIC" || greeting[8..16] != *IHAVEOPT {
        return Err(Nonsense("this is no NBD server, or an old one"));
    }
    let offered = be16(greeting, 16).unwrap_or_default();
    if offered & HANDSHAKE_FIXED_NEWSTYLE == 0 {
        return Err(Nonsense("the NBD server knows no options"));
    }
    Ok(u32::from(offered & (HANDSHAKE_FIXED_NEWSTYLE | HANDSHAKE_NO_ZEROES)).to_be_bytes())
}

/// An option with its data.
#[must_use]
pub fn say_option(option: u32, data: &[u8]) -> Vec<u8> {
    [&IHAVEOPT[..], &option.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
}

/// The data of GO: an export, and nothing else that would be told of it.
#[must_use]
pub fn go_data(name: &str) -> Vec<u8> {
    [&(name.len() as u32).to_be_bytes()[..], name.as_bytes(), &[0; 2]].concat()
}

/// A reply to an option: its kind, and how many bytes follow.
///
/// # Errors
/// A wrong magic, or a reply to another option.
pub fn option_reply_header(bytes: &[u8; OPTION_REPLY_HEADER], option: u32) -> Result<(u32, u32), Nonsense> {
    if be64(bytes, 0) != Some(OPTION_REPLY) {
        return Err(Nonsense("a reply to an option does not begin with its magic"));
    }
    if be32(bytes, 8) != Some(option) {
        return Err(Nonsense("a reply to an option that was not asked for"));
    }
    Ok((be32(bytes, 12).unwrap_or_default(), be32(bytes, 16).unwrap_or_default()))
}

/// What an INFO reply about the export says: size in bytes and flags. `None` when it is about something else.
#[must_use]
pub fn export_info(data: &[u8]) -> Option<(u64, u16)> {
    (be16(data, 0)? == super::info::EXPORT).then_some(())?;
    Some((be64(data, 2)?, be16(data, 10)?))
}

/// A request's header.
#[must_use]
pub fn request(command: Command, flags: u16, cookie: u64, offset: u64, length: u32) -> [u8; 28] {
    let number: u16 = match command {
        Command::Read => 0,
        Command::Write => 1,
        Command::Disc => 2,
        Command::Flush => 3,
        Command::Trim => 4,
        Command::Cache => 5,
        Command::WriteZeroes => 6,
        Command::BlockStatus => 7,
        Command::Unknown(n) => n,
    };
    let mut out = [0; 28];
    out[..4].copy_from_slice(&REQUEST.to_be_bytes());
    out[4..6].copy_from_slice(&flags.to_be_bytes());
    out[6..8].copy_from_slice(&number.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out[16..24].copy_from_slice(&offset.to_be_bytes());
    out[24..].copy_from_slice(&length.to_be_bytes());
    out
}

/// The simple reply at the head of `bytes`: its error (0 is none) and cookie.
///
/// # Errors
/// A wrong magic.
pub fn parse_simple_reply(bytes: &[u8]) -> Result<Option<(u32, u64)>, Nonsense> {
    if be32(bytes, 0).is_some_and(|m| m != SIMPLE_REPLY) {
        return Err(Nonsense("a reply does not begin with the magic that was agreed upon"));
    }
    Ok(be32(bytes, 4).zip(be64(bytes, 8)))
}

#[cfg(test)]
mod tests {
    use super::super::*;
    use super::*;

    #[test]
    fn the_server_takes_what_the_client_says() {
        assert!(client_flags(hello(&greeting()).expect("ours")).expect("known"));
        let said = say_option(option::GO, &go_data("vol"));
        let header = said.first_chunk().expect("header");
        assert_eq!(option_header(header).expect("an option"), (option::GO, 9));
        assert_eq!(parse_info(&said[16..]), Some(InfoQuery { name: "vol".into(), wanted: Vec::new() }));
        for (command, length) in [(Command::Read, 7), (Command::Write, 8), (Command::Flush, 0), (Command::Disc, 0)] {
            let wanted = Request { flags: flag::FUA, command, cookie: 3, offset: 5, length };
            let bytes = request(command, flag::FUA, 3, 5, length as u32);
            assert_eq!(parse_request(&bytes, false).expect("a request"), Some((wanted, 28)));
        }
    }

    #[test]
    fn the_client_takes_what_the_server_says() {
        let said = option_reply(option::GO, reply::INFO, &export_data(1 << 30, export_flag::HAS_FLAGS));
        let header = said.first_chunk().expect("header");
        assert_eq!(option_reply_header(header, option::GO).expect("a reply"), (reply::INFO, 12));
        assert!(option_reply_header(header, option::LIST).is_err());
        assert_eq!(export_info(&said[20..]), Some((1 << 30, export_flag::HAS_FLAGS)));
        assert_eq!(export_info(&text_data(info::NAME, "vol")), None);
        let mut out = Vec::new();
        simple_reply(&mut out, 5, 77);
        assert_eq!(parse_simple_reply(&out).expect("a reply"), Some((5, 77)));
        assert_eq!(parse_simple_reply(&out[..15]).expect("a part of one"), None);
        assert!(parse_simple_reply(&[0; 16]).is_err());
        assert!(hello(&[0; GREETING]).is_err());
        let mut old = greeting();
        old[17] = 0;
        assert!(hello(&old).is_err());
    }
}
