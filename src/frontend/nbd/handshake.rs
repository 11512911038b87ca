//! The talk before the first request: what is to be served, and in which dialect.
//!
//! Invariants:
//! - While TLS is required and not there, nothing is told about exports, and nothing is opened.
//! - What was agreed upon before TLS is forgotten, and no byte that came in the clear is taken for one that came under it.
//! - A client costs a small buffer until it has chosen an export.

use std::future::Future;
use std::io;

use super::ExportInfo;
use super::transport::{Input, Transport};
use super::wire::{self, Nonsense, export_flag, info, option, reply};
use crate::disk::IoBuf;
use crate::error::{Error, ErrorKind, Result};

/// An option that is too long is read past up to so many bytes.
const MAX_SKIPPED_OPTION: u32 = 1 << 20;

/// What the handshake asks of the server.
pub(super) trait Hall {
    /// An open export.
    type Opened;

    /// See [`super::Exports::names`].
    fn names(&self) -> impl Future<Output = Result<Vec<String>>>;

    /// See [`super::Exports::info`].
    fn info(&self, name: &str) -> impl Future<Output = Result<ExportInfo>>;

    /// See [`super::Exports::open`].
    fn open(&self, name: &str) -> impl Future<Output = Result<(Self::Opened, ExportInfo)>>;

    /// An export could not be opened, which people may want to know.
    fn lament(&self, name: &str, why: &Error);
}

/// What TLS is to this client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TlsState {
    /// There is none.
    Unavailable,
    /// The client may start it.
    Offered,
    /// The client has to start it.
    Required,
    /// It is on.
    On,
}

/// How replies are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    /// Simple replies only.
    Simple,
    /// Chunks where they are asked for.
    Structured,
    /// Chunks, with 64-bit lengths.
    Extended,
}

/// How it ended.
pub(super) enum Outcome<O> {
    /// TLS comes next, then the handshake goes on.
    StartTls,
    /// Requests come next.
    Serve(Agreed<O>),
    /// The client has left.
    Left,
}

/// What was agreed upon.
pub(super) struct Agreed<O> {
    pub(super) export: O,
    pub(super) info: ExportInfo,
    pub(super) dialect: Dialect,
    /// Block status may be asked for.
    pub(super) allocation: bool,
}

/// Why a connection ended, other than as it should.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error("{0}")]
    Nonsense(#[from] Nonsense),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// See the module's page.
pub(super) struct Handshake {
    tls: TlsState,
    no_zeroes: bool,
    dialect: Dialect,
    /// The export that block status was agreed upon for.
    allocation_of: Option<String>,
}

/// The export's flags.
pub(super) const fn export_flags(read_only: bool, dialect: Dialect) -> u16 {
    use export_flag as f;
    let mut flags = f::HAS_FLAGS
        | f::SEND_FLUSH
        | f::SEND_FUA
        | f::SEND_TRIM
        | f::SEND_WRITE_ZEROES
        | f::CAN_MULTI_CONN
        | f::SEND_CACHE
        | f::SEND_FAST_ZERO;
    if read_only {
        flags |= f::READ_ONLY;
    }
    if !matches!(dialect, Dialect::Simple) {
        flags |= f::SEND_DF;
    }
    flags
}

async fn send(to: &impl Transport, bytes: &[u8]) -> io::Result<()> {
    let buf = IoBuf::zeroed(bytes.len());
    buf.copy_in(0, bytes);
    to.send(vec![buf], &|| {}).await
}

impl Handshake {
    /// For a client that has just come.
    pub(super) const fn new(tls: TlsState) -> Self {
        Self { tls, no_zeroes: false, dialect: Dialect::Simple, allocation_of: None }
    }

    /// The first words of both sides.
    pub(super) async fn greet(&mut self, input: &mut Input, client: &impl Transport) -> Result<(), Broken> {
        send(client, &wire::greeting()).await?;
        input.need(4, client).await?;
        self.no_zeroes = wire::client_flags(*input.bytes().first_chunk().unwrap_or(&[0; 4]))?;
        input.consume(4);
        Ok(())
    }

    /// TLS is on: what was said before does not count.
    pub(super) fn under_tls(&mut self) {
        self.tls = TlsState::On;
        self.dialect = Dialect::Simple;
        self.allocation_of = None;
    }

    /// Takes options until one of them ends the talk.
    pub(super) async fn options<H: Hall>(
        &mut self,
        input: &mut Input,
        client: &impl Transport,
        hall: &H,
    ) -> Result<Outcome<H::Opened>, Broken> {
        loop {
            if input.bytes().is_empty() && !input.fill(client).await? {
                return Ok(Outcome::Left);
            }
            input.need(16, client).await?;
            let (number, len) = wire::option_header(input.bytes().first_chunk().unwrap_or(&[0; 16]))?;
            input.consume(16);
            if len as usize > wire::MAX_OPTION {
                // Told, then skipped if that can be done in sensible time.
                if len > MAX_SKIPPED_OPTION || number == option::EXPORT_NAME || self.tls == TlsState::Required {
                    return Err(Nonsense("an option is too long to be one").into());
                }
                input.skip(len.into(), client).await?;
                self.answer(client, number, reply::ERR_TOO_BIG, b"the option is too long").await?;
                continue;
            }
            input.need(len as usize, client).await?;
            let data = input.bytes()[..len as usize].to_vec();
            input.consume(len as usize);
            if self.tls == TlsState::Required && !matches!(number, option::STARTTLS | option::ABORT) {
                if number == option::EXPORT_NAME {
                    return Err(Nonsense("the client asks for an export without TLS, which is required").into());
                }
                self.answer(client, number, reply::ERR_TLS_REQD, b"this server wants TLS first").await?;
                continue;
            }
            match number {
                option::ABORT => {
                    // The client may be gone already.
                    let _ = self.answer(client, number, reply::ACK, b"").await;
                    return Ok(Outcome::Left);
                }
                option::STARTTLS => {
                    if self.start_tls(input, client, &data).await? {
                        return Ok(Outcome::StartTls);
                    }
                }
                option::EXPORT_NAME if self.dialect == Dialect::Extended => {
                    return Err(Nonsense("EXPORT_NAME does not go with extended headers").into());
                }
                option::EXPORT_NAME => return self.export_name(client, hall, &data).await,
                option::GO | option::INFO => {
                    if let Some(agreed) = self.go(client, hall, number, &data).await? {
                        return Ok(Outcome::Serve(agreed));
                    }
                }
                option::LIST => self.list(client, hall, &data).await?,
                option::STRUCTURED_REPLY | option::EXTENDED_HEADERS => self.choose(client, number, &data).await?,
                option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                    self.meta(client, hall, number, &data).await?;
                }
                _ => self.answer(client, number, reply::ERR_UNSUP, b"this server does not know the option").await?,
            }
        }
    }

    async fn answer(&self, client: &impl Transport, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        send(client, &wire::option_reply(option, kind, data)).await
    }

    async fn refuse(&self, client: &impl Transport, option: u32, e: &Error) -> io::Result<()> {
        let kind = match e.kind() {
            ErrorKind::NotFound | ErrorKind::Usage => reply::ERR_UNKNOWN,
            ErrorKind::Denied => reply::ERR_POLICY,
            _ => reply::ERR_PLATFORM,
        };
        let words = e.to_string();
        let cut = words.floor_char_boundary(4096);
        self.answer(client, option, kind, &words.as_bytes()[..cut]).await
    }

    async fn start_tls(&self, input: &Input, client: &impl Transport, data: &[u8]) -> Result<bool, Broken> {
        const OPTION: u32 = option::STARTTLS;
        let (kind, words): (_, &[u8]) = match self.tls {
            _ if !data.is_empty() => (reply::ERR_INVALID, b"STARTTLS has no data"),
            TlsState::Unavailable => (reply::ERR_POLICY, b"this server has no TLS"),
            TlsState::On => (reply::ERR_INVALID, b"TLS is on already"),
            TlsState::Offered | TlsState::Required => {
                // Somebody in between may have put them there.
                if !input.bytes().is_empty() {
                    return Err(Nonsense("bytes came in the clear behind STARTTLS").into());
                }
                self.answer(client, OPTION, reply::ACK, b"").await?;
                return Ok(true);
            }
        };
        self.answer(client, OPTION, kind, words).await?;
        Ok(false)
    }

    fn agreed<O>(&self, export: O, info: ExportInfo, asked_for: &str) -> Agreed<O> {
        let allocation = self.dialect != Dialect::Simple && self.allocation_of.as_deref() == Some(asked_for);
        Agreed { export, info, dialect: self.dialect, allocation }
    }

    async fn export_name<H: Hall>(
        &self,
        client: &impl Transport,
        hall: &H,
        data: &[u8],
    ) -> Result<Outcome<H::Opened>, Broken> {
        // This option has no way to say no.
        let Some(name) = wire::export_name(data) else {
            return Err(Nonsense("the name of an export is too long, or not UTF-8").into());
        };
        let (export, info) = match hall.open(&name).await {
            Ok(opened) => opened,
            Err(e) => {
                hall.lament(&name, &e);
                return Ok(Outcome::Left);
            }
        };
        let mut words = wire::export_data(info.size_bytes, export_flags(info.read_only, self.dialect))[2..].to_vec();
        if !self.no_zeroes {
            words.resize(words.len() + 124, 0);
        }
        send(client, &words).await?;
        Ok(Outcome::Serve(self.agreed(export, info, &name)))
    }

    async fn go<H: Hall>(
        &self,
        client: &impl Transport,
        hall: &H,
        number: u32,
        data: &[u8],
    ) -> Result<Option<Agreed<H::Opened>>, Broken> {
        let Some(query) = wire::parse_info(data) else {
            self.answer(client, number, reply::ERR_INVALID, b"the option's data makes no sense").await?;
            return Ok(None);
        };
        let found = if number == option::GO {
            hall.open(&query.name).await.map(|(export, info)| (Some(export), info))
        } else {
            hall.info(&query.name).await.map(|info| (None, info))
        };
        let (export, info) = match found {
            Ok(found) => found,
            Err(e) => {
                if number == option::GO {
                    hall.lament(&query.name, &e);
                }
                self.refuse(client, number, &e).await?;
                return Ok(None);
            }
        };
        let flags = export_flags(info.read_only, self.dialect);
        let mut words = wire::option_reply(number, reply::INFO, &wire::export_data(info.size_bytes, flags));
        // Once each, however often it is asked for. Smaller requests are served, too; who asks is told what is good for it.
        let block_size = || wire::block_size_data(512, 4096, wire::MAX_PAYLOAD).to_vec();
        for (kind, data) in [
            (info::NAME, &(|| wire::text_data(info::NAME, &info.name)) as &dyn Fn() -> Vec<u8>),
            (info::DESCRIPTION, &|| wire::text_data(info::DESCRIPTION, &info.description)),
            (info::BLOCK_SIZE, &block_size),
        ] {
            if query.wanted.contains(&kind) {
                words.extend(wire::option_reply(number, reply::INFO, &data()));
            }
        }
        words.extend(wire::option_reply(number, reply::ACK, b""));
        send(client, &words).await?;
        Ok(export.map(|export| self.agreed(export, info, &query.name)))
    }

    async fn list(&self, client: &impl Transport, hall: &impl Hall, data: &[u8]) -> Result<(), Broken> {
        const OPTION: u32 = option::LIST;
        if !data.is_empty() {
            return Ok(self.answer(client, OPTION, reply::ERR_INVALID, b"LIST has no data").await?);
        }
        let names = match hall.names().await {
            Ok(names) => names,
            Err(e) => return Ok(self.refuse(client, OPTION, &e).await?),
        };
        let mut words = Vec::new();
        for name in names {
            words.extend(wire::option_reply(OPTION, reply::SERVER, &wire::server_data(&name)));
        }
        words.extend(wire::option_reply(OPTION, reply::ACK, b""));
        Ok(send(client, &words).await?)
    }

    async fn choose(&mut self, client: &impl Transport, number: u32, data: &[u8]) -> io::Result<()> {
        if !data.is_empty() {
            return self.answer(client, number, reply::ERR_INVALID, b"the option has no data").await;
        }
        self.dialect = match (number, self.dialect) {
            (option::STRUCTURED_REPLY, Dialect::Extended) => {
                let words = b"extended headers have been agreed upon";
                return self.answer(client, number, reply::ERR_EXT_HEADER_REQD, words).await;
            }
            (option::STRUCTURED_REPLY, _) => Dialect::Structured,
            _ => Dialect::Extended,
        };
        self.answer(client, number, reply::ACK, b"").await
    }

    async fn meta(
        &mut self,
        client: &impl Transport,
        hall: &impl Hall,
        number: u32,
        data: &[u8],
    ) -> Result<(), Broken> {
        let set = number == option::SET_META_CONTEXT;
        if set {
            // Whatever comes of this one: the one before counts no more.
            self.allocation_of = None;
        }
        if self.dialect == Dialect::Simple {
            let words = b"structured replies have to be agreed upon first";
            return Ok(self.answer(client, number, reply::ERR_INVALID, words).await?);
        }
        let Some(query) = wire::parse_meta(data) else {
            let words = b"the option's data makes no sense";
            return Ok(self.answer(client, number, reply::ERR_INVALID, words).await?);
        };
        if let Err(e) = hall.info(&query.name).await {
            return Ok(self.refuse(client, number, &e).await?);
        }
        // A list without queries, or for a whole namespace, is about everything there is; a choice has to be exact.
        let named = query.allocation || !set && (query.base || !query.any);
        let mut words = Vec::new();
        if named {
            let id = if set { wire::ALLOCATION_ID } else { 0 };
            words = wire::option_reply(number, reply::META_CONTEXT, &wire::meta_data(id));
        }
        words.extend(wire::option_reply(number, reply::ACK, b""));
        if set && named {
            self.allocation_of = Some(query.name);
        }
        Ok(send(client, &words).await?)
    }
}

#[cfg(test)]
mod tests;
