//! Serves memory, or nothing, over NBD: what the protocol and its server cost by themselves.
//!
//! `nbd_ram [--null] [--size 1G] [--unix PATH] [--workers N] [--tls-certs DIR]`: on the socket, or on a free port of 127.0.0.1, which
//! it prints. Ends when its standard input does.

mod ram;

use std::io::Read;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ram::{Ram, RamEngine, bytes};
use vb_ublk::error::{Context, Error, ErrorKind, Result};
use vb_ublk::frontend::nbd::server::Server;
use vb_ublk::frontend::nbd::{Export, ExportInfo, Exports, Listener, ServerSpec, Tls, tls};
use vb_ublk::lane::Lane;

struct One {
    ram: Arc<Ram>,
    info: ExportInfo,
}

struct Only(Arc<One>);

impl Export for One {
    type Engine = RamEngine;

    fn info(&self) -> ExportInfo {
        self.info.clone()
    }

    fn engine(&self, _: &Lane) -> Result<Rc<RamEngine>> {
        Ok(Rc::new(RamEngine(Arc::clone(&self.ram))))
    }
}

impl Exports for Only {
    type Export = One;

    fn names(&self) -> Result<Vec<String>> {
        Ok(vec![self.0.info.name.clone()])
    }

    fn info(&self, name: &str) -> Result<ExportInfo> {
        self.open(name).map(|one| one.info())
    }

    fn open(&self, name: &str) -> Result<Arc<One>> {
        if name.is_empty() || name == self.0.info.name {
            return Ok(Arc::clone(&self.0));
        }
        Err(Error::new(ErrorKind::NotFound, format!("there is no export {name:?}")))
    }
}

fn serve() -> Result<()> {
    let usage = || {
        Error::new(
            ErrorKind::Usage,
            "usage: nbd_ram [--null] [--size 1G] [--unix PATH] [--workers N] [--tls-certs DIR]",
        )
    };
    let (mut size, mut null, mut unix, mut workers, mut certs) = (1 << 30, false, None, 1, None);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(usage);
        match arg.as_str() {
            "--null" => null = true,
            "--size" => size = bytes(&value()?).ok_or_else(usage)?,
            "--unix" => unix = Some(value()?),
            "--workers" => workers = value()?.parse().map_err(|_| usage())?,
            "--tls-certs" => certs = Some(value()?),
            _ => return Err(usage()),
        }
    }
    let listener = match unix {
        Some(path) => Listener::Unix(UnixListener::bind(&path).context(|| format!("listening on {path}"))?),
        None => {
            let l = TcpListener::bind("127.0.0.1:0").context(|| "listening on 127.0.0.1")?;
            println!("{}", l.local_addr().context(|| "asking for the port")?);
            Listener::Tcp(l)
        }
    };
    let tls = certs.map(|dir| tls::load(Path::new(&dir)).map(|config| Tls { config, required: true })).transpose()?;
    let spec = ServerSpec {
        listeners: vec![listener],
        workers,
        max_connections: 128,
        tls,
        handshake_timeout: Duration::from_secs(10),
    };
    let info = ExportInfo { name: "ram".into(), description: "memory".into(), size_bytes: size, read_only: false };
    let server = Server::start(spec, Arc::new(Only(Arc::new(One { ram: Ram::new(size, null), info }))))?;
    std::io::stdin().read_to_end(&mut Vec::new()).context(|| "waiting for the end of standard input")?;
    server.stop()
}

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("nbd_ram: {e}");
            ExitCode::FAILURE
        }
    }
}
