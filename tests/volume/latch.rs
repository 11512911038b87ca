//! A failed sync of the log is everybody's, whoever hears of it: the kernel tells once.

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::select;
use vb_ublk::config::FlushTo;
use vb_ublk::disk::file::DataFile;
use vb_ublk::disk::uring::{TokioTimer, UringDisk};
use vb_ublk::disk::{Disk, IoBuf};
use vb_ublk::gc::Policy;
use vb_ublk::manifest::{Published, Writer};
use vb_ublk::store::Store;
use vb_ublk::store::memory::MemoryStore;
use vb_ublk::units::{BLOCK, Nonce};
use vb_ublk::volume::admin::{self, CreateOptions};
use vb_ublk::volume::attach::{OpenLog, Request, Stores, attach};
use vb_ublk::volume::resume::resume;
use vb_ublk::wal::codec::{SUPERBLOCK_AT, Superblock};
use vb_ublk::wal::create::{MIN_LOG_BYTES, SuperblockFile, geometry_for};

/// Its next sync fails, once, when it is told so.
#[derive(Clone)]
struct Failing(UringDisk, Rc<Cell<bool>>);

impl Disk for Failing {
    async fn read_at(&self, offset: u64, dst: IoBuf) -> io::Result<()> {
        self.0.read_at(offset, dst).await
    }

    async fn writev_at(&self, offset: u64, bufs: Vec<IoBuf>, dsync: bool) -> io::Result<()> {
        self.0.writev_at(offset, bufs, dsync).await
    }

    async fn sync(&self) -> io::Result<()> {
        if self.1.take() { Err(io::Error::other("injected")) } else { self.0.sync().await }
    }
}

pub(crate) fn request(nonce: u64) -> Request {
    let writer = Writer { host: "here".into(), pid: 1, since: 1 };
    Request {
        force: false,
        read_only: false,
        flush_to: FlushTo::Wal,
        io_timeout: None,
        gc: Policy::off(),
        writer,
        nonce: Nonce(nonce),
    }
}

#[test]
fn who_takes_the_volume_in_the_background_latches_the_log() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("dir");
    let open = || Arc::new(DataFile::open(&dir.path().join("v.wal"), true).expect("the log"));
    let geometry = geometry_for(MIN_LOG_BYTES).expect("a size");
    vb_ublk::disk::uring::run(async {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let stores = || Stores { attach: store.clone(), background: store.clone() };
        let opts = CreateOptions { size_bytes: 1 << 20, logical_block: 512 };
        admin::create(&*store, "v", &opts, 1).await.expect("created");
        let file = open();
        let disk = UringDisk::new(&file).expect("a second descriptor");
        let log = OpenLog { file, disk, superblock: None, geometry, salt: Box::new(|| 7) };
        let published = Published::load(&*store, "v").await.expect("manifest");
        drop(attach(stores(), published, log, TokioTimer, request(1)).await.expect("attached"));

        let file = open();
        let fails = Rc::new(Cell::new(false));
        let disk = Failing(UringDisk::new(&file).expect("a second descriptor"), fails.clone());
        let superblock = SuperblockFile::load(&disk, file.size().expect("size")).await.expect("read");
        let log = OpenLog { file, disk, superblock, geometry, salt: Box::new(|| 8) };
        let resumed = resume(stores(), "v", log, TokioTimer, request(2)).await.expect("resumed");
        fails.set(true);
        let volume = resumed.volume.clone();
        let seen = async {
            for _ in 0..500 {
                if volume.is_confirmed() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        select(std::pin::pin!(resumed.background.run()), std::pin::pin!(seen)).await;
        let failure = volume.status().failure.expect("the log has failed");
        assert!(failure.contains("superblock") && failure.contains("injected"), "{failure}");
        // What was drawn in vain is drawn again: the nonce in the manifest is one that the log knows.
        assert!(volume.is_confirmed(), "reads go on");
        let m = Published::load(&*store, "v").await.expect("manifest").manifest;
        let bytes = std::fs::read(dir.path().join("v.wal")).expect("the log's bytes");
        let copies = SUPERBLOCK_AT.map(|at| Superblock::decode(&bytes[at as usize..][..BLOCK]).expect("whole"));
        let newest = copies.into_iter().max_by_key(|sb| sb.update).expect("two");
        assert_eq!((m.nonce, newest.confirmed), (Nonce(2), Nonce(2)));
    });
}
