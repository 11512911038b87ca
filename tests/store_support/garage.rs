//! A garage cluster, as child processes: three nodes, every object on all of them, two make a quorum. For the long forms alone: its
//! program takes a quarter of an hour to build.
//!
//! What it does otherwise than S3:
//! - It takes conditional puts and ignores their conditions, without a word.
//! - A request counts when two nodes have it. A node that is back answers for what it has missed, by asking the others.
//! - Signatures name a region, which has to be its own (`s3_region`).

use std::fs::File;
use std::io::Write as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Ended, moto};

/// Nodes of the cluster.
pub(crate) const NODES: usize = 3;

/// What the nodes know each other by.
const RPC_SECRET: &str = "6d5a4c3b2a190817263544536271809f6d5a4c3b2a190817263544536271809f";

/// A running cluster; ends when dropped.
pub(crate) struct Garage {
    program: PathBuf,
    nodes: Vec<Node>,
    /// An access key and its secret.
    pub(crate) keys: (String, String),
    _dir: tempfile::TempDir,
}

struct Node {
    dir: PathBuf,
    s3: SocketAddr,
    rpc: SocketAddr,
    /// `ID@ADDRESS`, once it is known.
    name: String,
    child: Option<Ended>,
}

impl Node {
    fn write_config(&self, peers: &[String]) {
        let Self { dir, s3, rpc, .. } = self;
        let text = format!(
            "metadata_dir = {:?}\ndata_dir = {:?}\ndb_engine = \"lmdb\"\nreplication_factor = {NODES}\n\
             rpc_bind_addr = \"{rpc}\"\nrpc_public_addr = \"{rpc}\"\nrpc_secret = \"{RPC_SECRET}\"\n\
             bootstrap_peers = {peers:?}\n\n[s3_api]\ns3_region = \"us-east-1\"\napi_bind_addr = \"{s3}\"\n",
            dir.join("meta"),
            dir.join("data"),
        );
        std::fs::write(dir.join("garage.toml"), text).expect("a configuration");
    }
}

/// Waits until `done`, at most two minutes: much else may be going on.
#[track_caller]
fn until(what: &str, mut done: impl FnMut() -> Result<(), String>) {
    let begun = Instant::now();
    while let Err(e) = done() {
        assert!(begun.elapsed() < Duration::from_secs(120), "not in two minutes: {what}: {e}");
        std::thread::park_timeout(Duration::from_millis(200));
    }
}

impl Garage {
    /// A cluster with these buckets, which one key may read and write. `None` where the long forms were not asked for.
    pub(crate) fn long_form(buckets: &[&str]) -> Option<Self> {
        if !std::env::var("VB_SOAK").is_ok_and(|v| v == "1") {
            println!("garage is for the long forms: make soak, or VB_SOAK=1");
            return None;
        }
        let program = moto::program("garage", "VB_GARAGE", "garage-root/bin/garage", "garage")?;
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        // All at once, so that they differ; and free again when the nodes want them.
        let listeners: Vec<_> = (0..2 * NODES).map(|_| TcpListener::bind("127.0.0.1:0").expect("bind")).collect();
        let ports: Vec<_> = listeners.iter().map(|p| p.local_addr().expect("address")).collect();
        drop(listeners);
        let node = |(n, ports): (usize, &[SocketAddr])| {
            let dir = dir.path().join(format!("node-{n}"));
            std::fs::create_dir(&dir).expect("a node's folder");
            Node { dir, s3: ports[0], rpc: ports[1], name: String::new(), child: None }
        };
        let nodes = ports.chunks(2).enumerate().map(node).collect();
        let mut cluster = Self { program, nodes, keys: Default::default(), _dir: dir };
        cluster.found(buckets);
        Some(cluster)
    }

    fn found(&mut self, buckets: &[&str]) {
        // A node draws its id when it is first started, and its peers' configurations need it.
        for n in 0..NODES {
            self.nodes[n].write_config(&[]);
            self.spawn(n);
            until("a node has an id", || {
                self.nodes[n].name = self.cli(n, &["node", "id", "-q"])?.trim().to_owned();
                Ok(())
            });
        }
        let peers: Vec<_> = self.nodes.iter().map(|n| n.name.clone()).collect();
        for n in 0..NODES {
            self.nodes[n].write_config(&peers);
            for peer in &peers[n + 1..] {
                until("a node knows another", || self.cli(n, &["node", "connect", peer]).map(drop));
            }
        }
        for (n, peer) in peers.iter().enumerate() {
            let id = peer.split('@').next().expect("an id");
            let zone = format!("zone-{n}");
            until("a role", || self.cli(0, &["layout", "assign", id, "-z", &zone, "-c", "10GB"]).map(drop));
        }
        self.must(&["layout", "apply", "--version", "1"]);
        self.wait_until_healthy();
        let made: Value =
            serde_json::from_str(&self.must(&["json-api", "CreateKey", "{\"name\": \"vb\"}"])).expect("JSON");
        let field = |name: &str| made[name].as_str().unwrap_or_else(|| panic!("no {name}: {made}")).to_owned();
        self.keys = (field("accessKeyId"), field("secretAccessKey"));
        for bucket in buckets {
            self.must(&["bucket", "create", bucket]);
            self.must(&["bucket", "allow", "--read", "--write", "--owner", bucket, "--key", &self.keys.0]);
        }
    }

    /// The command line, on node `n`.
    fn cli(&self, n: usize, args: &[&str]) -> Result<String, String> {
        let out = self.command(n).args(args).stdin(Stdio::null()).output().expect("start garage");
        let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        if out.status.success() { Ok(text(&out.stdout)) } else { Err(format!("{args:?}: {}", text(&out.stderr))) }
    }

    #[track_caller]
    fn must(&self, args: &[&str]) -> String {
        self.cli(0, args).unwrap_or_else(|e| panic!("garage {e}"))
    }

    fn command(&self, n: usize) -> Command {
        let mut c = Command::new(&self.program);
        c.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("NO_COLOR", "1");
        c.arg("-c").arg(self.nodes[n].dir.join("garage.toml"));
        c
    }

    fn log(&self, n: usize) -> PathBuf {
        self.nodes[n].dir.join("log")
    }

    fn spawn(&mut self, n: usize) {
        let log = File::options().create(true).append(true).open(self.log(n)).expect("a log");
        let both = log.try_clone().expect("a second handle");
        let mut command = self.command(n);
        let child = command.arg("server").stdin(Stdio::null()).stdout(both).stderr(log).spawn();
        self.nodes[n].child = Some(Ended(child.expect("start garage")));
        until("a node listens", || {
            let ended = self.nodes[n].child.as_mut().and_then(|c| c.0.try_wait().expect("wait"));
            assert!(ended.is_none(), "node {n} ended: {ended:?}\n{}", tail(&self.log(n)));
            TcpStream::connect(self.nodes[n].rpc).map(drop).map_err(|e| e.to_string())
        });
    }

    /// Where node `n` answers.
    pub(crate) fn endpoint(&self, n: usize) -> String {
        format!("http://{}", self.nodes[n].s3)
    }

    /// Kills node `n` as a crash would.
    pub(crate) fn kill(&mut self, n: usize) {
        assert!(self.nodes[n].child.take().is_some(), "node {n} is dead already");
    }

    /// Starts node `n` again, with what it had on its disk, and waits until all that run are one cluster.
    pub(crate) fn restart(&mut self, n: usize) {
        assert!(self.nodes[n].child.is_none(), "node {n} runs");
        let mut log = File::options().append(true).open(self.log(n)).expect("a log");
        log.write_all(b"--- started again ---\n").expect("write");
        self.spawn(n);
        self.wait_until_healthy();
    }

    /// Waits until every node that runs knows the layout, and sees as many others as there are.
    fn wait_until_healthy(&self) {
        let running = self.nodes.iter().filter(|n| n.child.is_some()).count();
        for n in (0..NODES).filter(|n| self.nodes[*n].child.is_some()) {
            until("the cluster is whole", || {
                let health: Value = serde_json::from_str(&self.cli(n, &["json-api", "GetClusterHealth"])?)
                    .map_err(|e| e.to_string())?;
                if health["storageNodesUp"] == running && health["partitionsQuorum"] == health["partitions"] {
                    return TcpStream::connect(self.nodes[n].s3).map(drop).map_err(|e| e.to_string());
                }
                Err(format!("node {n}: {health}\n{}", tail(&self.log(n))))
            });
        }
    }
}

fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let from = text.lines().count().saturating_sub(15);
    text.lines().skip(from).collect::<Vec<_>>().join("\n")
}
