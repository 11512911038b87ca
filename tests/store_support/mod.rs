//! What the store tests need around them: certificates, S3 servers, raw HTTP.

pub(crate) mod garage;
pub(crate) mod moto;
mod quirks;
pub(crate) mod s3s;
pub(crate) mod scripted;
pub(crate) mod tls;

use std::collections::BTreeMap;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use vb_ublk::store::{self, StaticCredentials, Store, StoreOptions, StoreUrl};

/// Ends the process when it goes out of scope, by its own id.
pub(crate) struct Ended(pub(crate) Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs this test binary's test `name` again in a process of its own, with exactly these variables
/// beside PATH; gives what it printed.
pub(crate) fn run_child(name: &str, vars: &BTreeMap<&str, String>) -> Ended {
    let child = Command::new(std::env::current_exe().expect("the test binary's path"))
        .args(["--exact", name, "--nocapture"])
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("VB_STORE_CHILD", name)
        .envs(vars)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("run the test binary again");
    Ended(child)
}

/// Waits for a child to end; its output, and whether it succeeded.
pub(crate) fn finished(mut child: Ended) -> (bool, String) {
    use std::io::Read;
    let mut text = String::new();
    child.0.stdout.take().expect("piped").read_to_string(&mut text).expect("stdout");
    child.0.stderr.take().expect("piped").read_to_string(&mut text).expect("stderr");
    (child.0.wait().expect("wait").success(), text)
}

/// Whether this process is the child that runs `name` for its parent.
pub(crate) fn is_child(name: &str) -> bool {
    std::env::var("VB_STORE_CHILD").is_ok_and(|v| v == name)
}

/// Options for a test server: quick time-outs, and keys that a server which checks none is content with.
pub(crate) fn options(endpoint: &str) -> StoreOptions {
    options_with(endpoint, ("test", "secret"))
}

/// The same with these keys.
pub(crate) fn options_with(endpoint: &str, (access_key, secret_key): (&str, &str)) -> StoreOptions {
    StoreOptions {
        endpoint: Some(endpoint.to_owned()),
        connect_timeout: Duration::from_secs(5),
        request_timeout: Duration::from_secs(30),
        credentials: Some(StaticCredentials {
            access_key: access_key.into(),
            secret_key: secret_key.into(),
            session_token: None,
        }),
        ..StoreOptions::default()
    }
}

/// Opens an S3 store.
pub(crate) async fn open_s3(url: &str, opts: &StoreOptions) -> Arc<dyn Store> {
    let url: StoreUrl = url.parse().expect("a store URL");
    store::open(&url, opts).await.expect("open the store")
}

/// `len` bytes that differ from place to place and from `seed` to `seed`.
pub(crate) fn pattern(seed: u64, len: usize) -> Bytes {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut v = Vec::with_capacity(len + 8);
    while v.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        v.extend_from_slice(&x.to_le_bytes());
    }
    v.truncate(len);
    v.into()
}
