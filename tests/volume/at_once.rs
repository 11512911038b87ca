//! Two hosts that attach one volume at the same moment, on a store that heeds conditional writes and on one that ignores them.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::join;
use vb_ublk::disk::file::DataFile;
use vb_ublk::disk::uring::{TokioTimer, UringDisk};
use vb_ublk::error::{Error, ErrorKind, Result};
use vb_ublk::manifest::{Published, Writer};
use vb_ublk::store::fault::{Call, Fault, FaultStore};
use vb_ublk::store::memory::MemoryStore;
use vb_ublk::store::{Op, Store};
use vb_ublk::units::Nonce;
use vb_ublk::volume::admin::{self, CreateOptions};
use vb_ublk::volume::attach::{OpenLog, Request, Stores, attach};
use vb_ublk::wal::create::{MIN_LOG_BYTES, geometry_for};

async fn take(store: Arc<dyn Store>, dir: &Path, host: u64) -> Result<()> {
    let published = Published::load(&*store, "v").await?;
    let file = Arc::new(DataFile::open(&dir.join(format!("{host}.wal")), true)?);
    let disk = UringDisk::new(&file).expect("a second descriptor");
    let geometry = geometry_for(MIN_LOG_BYTES)?;
    let log = OpenLog { file, disk, superblock: None, geometry, salt: Box::new(move || host) };
    let writer = Writer { host: format!("host-{host}"), pid: 1, since: 1 };
    let request = Request { writer, ..super::latch::request(host) };
    let stores = Stores { attach: store.clone(), background: store };
    attach(stores, published, log, TokioTimer, request).await.map(drop)
}

/// Both have looked before either writes; of the two writes the second comes `late`.
fn two_at_once(conditions: bool, late: Duration) -> Error {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("dir");
    vb_ublk::disk::uring::run(async {
        // The first is the creation's.
        let writes = AtomicU64::new(0);
        let decide = move |c: Call<'_>| match c.op {
            Op::PutIf if c.key.ends_with("manifest.json") && writes.fetch_add(1, Ordering::SeqCst) == 2 => {
                Fault::Delay(late)
            }
            _ => Fault::None,
        };
        let mut store = FaultStore::new(Arc::new(MemoryStore::new()), decide).with_latency(Duration::from_millis(30));
        if !conditions {
            store = store.with_conditions_ignored();
        }
        let store: Arc<dyn Store> = Arc::new(store);
        let opts = CreateOptions { size_bytes: 1 << 20, logical_block: 512 };
        admin::create(&*store, "v", &opts, 1).await.expect("created");
        let both = join(take(store.clone(), dir.path(), 1), take(store.clone(), dir.path(), 2)).await;
        let (winner, loser) = match both {
            (Ok(()), Err(e)) => (1, e),
            (Err(e), Ok(())) => (2, e),
            both => panic!("{both:?}"),
        };
        assert!(loser.to_string().contains(&format!("host-{winner}")), "who has it: {loser}");
        assert_eq!(Published::load(&*store, "v").await.expect("manifest").manifest.nonce, Nonce(winner));
        loser
    })
}

#[test]
fn of_two_at_once_one_goes_on() {
    for late in [Duration::ZERO, Duration::from_millis(200)] {
        let loser = two_at_once(true, late);
        assert_eq!(loser.kind(), ErrorKind::Fenced, "{loser}");
    }
}

/// The later write wins there, and the earlier one finds out by looking again.
#[test]
fn of_two_at_once_one_goes_on_where_conditions_are_ignored() {
    for late in [Duration::ZERO, Duration::from_secs(1)] {
        let loser = two_at_once(false, late);
        assert_eq!(loser.kind(), ErrorKind::Fenced, "{loser}");
    }
}
