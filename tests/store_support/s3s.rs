//! s3s-fs, another S3 server, in this process: unlike moto it verifies each signature and each checksum, always.
//!
//! It is odd in ways that are its own, not S3's:
//! - A conditional put looks first and writes afterwards: two that race may both win. So it gets the suite without
//!   [`race`](crate::race).
//! - An object is a file, so a key and a key below it cannot both be there.
//! - A listing asked for with `encoding-type=url` says that its keys are encoded, and they are not: a client that
//!   believes it garbles those with `+` or `%`. The store does not ask; the suite has such keys.
//! - A put makes the bucket, and a get does not say that there is none: a folder's name is all that a bucket is.

use std::net::SocketAddr;

use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use tokio::net::TcpListener;

/// The only keys that it knows.
pub(crate) const KEYS: (&str, &str) = ("s3s-fs-user", "not-to-be-printed");

/// A running server; it ends with the runtime, what it stores when dropped.
pub(crate) struct S3sFs {
    addr: SocketAddr,
    dir: tempfile::TempDir,
}

impl S3sFs {
    pub(crate) async fn start() -> Self {
        let dir = tempfile::tempdir().expect("a folder for the objects");
        let mut service = S3ServiceBuilder::new(s3s_fs::FileSystem::new(dir.path()).expect("a file system"));
        service.set_auth(SimpleAuth::from_single(KEYS.0, KEYS.1));
        let service = service.build();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let addr = listener.local_addr().expect("address");
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let service = service.clone();
                tokio::spawn(async move {
                    // A connection that breaks is the client's to notice: the test looks at the client.
                    let _ = http1::Builder::new().serve_connection(TokioIo::new(client), service).await;
                });
            }
        });
        Self { addr, dir }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Makes a bucket, which to this server is a folder.
    pub(crate) fn make_bucket(&self, name: &str) {
        std::fs::create_dir(self.dir.path().join(name)).expect("a folder for the bucket");
    }
}
