//! The moto S3 server, as a child process.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Mutex;

use super::Ended;
use super::tls::Authority;

/// A running server; ends when dropped.
pub(crate) struct Moto {
    pub(crate) addr: SocketAddr,
    /// With TLS: who signed its certificate.
    pub(crate) authority: Option<Authority>,
    _child: Ended,
}

static PLAIN: Mutex<Weak<Moto>> = Mutex::const_new(Weak::new());
static TLS: Mutex<Weak<Moto>> = Mutex::const_new(Weak::new());

/// A server's program: what the variable says, what `scripts/setup` has made, or what is in PATH. `None` where the user allows that
/// there is none, which is said loudly.
///
/// # Panics
/// Without the program, unless `VB_SKIP_S3=1`.
pub(crate) fn program(name: &str, variable: &str, made: &str, part: &str) -> Option<PathBuf> {
    let cache = std::env::var_os("VB_CACHE")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guest"), PathBuf::from);
    let found = std::env::var_os(variable)
        .map(PathBuf::from)
        .or_else(|| Some(cache.join(made)).filter(|p| p.exists()))
        .or_else(|| {
            let path = std::env::var_os("PATH")?;
            std::env::split_paths(&path).map(|d| d.join(name)).find(|p| p.exists())
        });
    if found.is_none() {
        assert!(
            std::env::var("VB_SKIP_S3").is_ok_and(|v| v == "1"),
            "no {name}: run scripts/setup {part}, set {variable}, or set VB_SKIP_S3=1 to go without the S3 tests"
        );
        eprintln!("SKIPPED: a test against S3: no {name}, and VB_SKIP_S3=1");
    }
    found
}

/// The server that `command` starts on a port, when it listens there.
///
/// # Panics
/// When it ends, or does not listen after a minute, three times.
pub(crate) async fn listening(name: &str, command: impl Fn(u16) -> Command) -> (SocketAddr, Ended) {
    let mut why = String::new();
    for _ in 0..3 {
        // Between finding the port free and the server's bind somebody else may take it: try again then.
        let port = std::net::TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("address").port();
        let mut child = Ended(command(port).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect(name));
        let addr = SocketAddr::from(([127, 0, 0, 1], port));
        for _ in 0..600 {
            if let Some(status) = child.0.try_wait().expect("wait") {
                why = format!("it ended: {status}");
                break;
            }
            if TcpStream::connect(addr).await.is_ok() {
                return (addr, child);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            why = "it does not listen after a minute".into();
        }
    }
    panic!("{name} does not start: {why}");
}

impl Moto {
    /// The server that tests share while any of them runs; `None` (said loudly) when S3 is skipped.
    pub(crate) async fn shared(tls: bool) -> Option<Arc<Self>> {
        let mut slot = if tls { &TLS } else { &PLAIN }.lock().await;
        if let Some(running) = slot.upgrade() {
            return Some(running);
        }
        let started = Arc::new(Self::start(tls).await?);
        *slot = Arc::downgrade(&started);
        Some(started)
    }

    /// A server of one's own.
    pub(crate) async fn start(tls: bool) -> Option<Self> {
        let program = program("moto_server", "VB_MOTO", "moto/bin/moto_server", "test")?;
        let authority = tls.then(Authority::new);
        let (addr, child) = listening("moto_server", |port| {
            let mut command = Command::new(&program);
            command.args(["-H", "127.0.0.1", "-p", &port.to_string()]);
            if let Some(a) = &authority {
                command.arg("-c").arg(a.file("server.pem")).arg("-k").arg(a.file("server.key"));
            }
            command
        })
        .await;
        Some(Self { addr, authority, _child: child })
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("{}://{}", if self.authority.is_some() { "https" } else { "http" }, self.addr)
    }

    /// Makes a bucket (plain HTTP only; moto checks no signature until asked to).
    pub(crate) async fn make_bucket(&self, name: &str) {
        let answer = self.raw("PUT", &format!("/{name}"), "s3", "text/plain", "").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    /// Makes a user who may do everything, and has moto check signatures from now on. Gives the user's keys.
    pub(crate) async fn check_signatures(&self) -> (String, String) {
        let form = "application/x-www-form-urlencoded";
        let policy = "%7B%22Version%22%3A%222012-10-17%22%2C%22Statement%22%3A%5B%7B%22Effect%22%3A%22Allow%22%2C\
                      %22Action%22%3A%22%2A%22%2C%22Resource%22%3A%22%2A%22%7D%5D%7D";
        let mut answer = String::new();
        for body in [
            "Action=CreateUser&UserName=u&Version=2010-05-08".to_owned(),
            format!("Action=PutUserPolicy&UserName=u&PolicyName=p&PolicyDocument={policy}&Version=2010-05-08"),
            "Action=CreateAccessKey&UserName=u&Version=2010-05-08".to_owned(),
        ] {
            answer = self.raw("POST", "/", "iam", form, &body).await;
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        }
        let field = |name: &str| {
            let from = answer.split_once(&format!("<{name}>")).expect("an access key in the answer").1;
            from.split_once('<').expect("its end").0.to_owned()
        };
        let keys = (field("AccessKeyId"), field("SecretAccessKey"));
        let answer = self.raw("POST", "/moto-api/reset-auth", "s3", "text/plain", "0").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        keys
    }

    async fn raw(&self, method: &str, path: &str, service: &str, content_type: &str, body: &str) -> String {
        let mut s = TcpStream::connect(self.addr).await.expect("connect");
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Type: {content_type}\r\n\
             Authorization: AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/{service}/aws4_request, \
             SignedHeaders=host, Signature=0\r\nContent-Length: {}\r\n\r\n{body}",
            self.addr,
            body.len()
        );
        s.write_all(request.as_bytes()).await.expect("send");
        let mut answer = String::new();
        s.read_to_string(&mut answer).await.expect("receive");
        answer
    }
}
