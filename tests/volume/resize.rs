//! Volumes made larger and smaller.

use vb_ublk::error::{ErrorKind, Result};
use vb_ublk::units::{BLOCK, Lba, Nonce};
use vb_ublk::volume::engine::{Engine, IoFault};
use vb_ublk::volume::host::{AttachOptions, Host};
use vb_ublk::volume::resize::{Options, resize};
use vb_ublk::volume::{Command, Volume, snapshots};

use crate::snapshots::is_well;
use crate::support_rng::Rng;
use crate::volume_support::{Bench, block_on, buf_of, churn, compare, drain, get, on_lane, put};

const MIB: u64 = 1 << 20;

fn grow(volume: &Volume, size_bytes: u64) -> Result<()> {
    block_on(volume.command(|reply| Command::Grow { size_bytes, reply }))
}

fn to(bench: &Bench, size_bytes: u64, discard_tail: bool) -> Result<()> {
    let how = Options { size_bytes, discard_tail, nonce: Nonce::draw().unwrap() };
    let store = bench.store();
    block_on(resize(&*store, "vol", &how)).map(drop)
}

#[test]
fn a_volume_grows_while_it_is_written() {
    let bench = Bench::new(8 << 20);
    let (mut model, mut rng) = (vec![0; 8 << 20], Rng(5));
    let mut host = bench.attach().unwrap();
    for (round, mib) in [9, 40, 300].into_iter().enumerate() {
        let size = mib * MIB;
        on_lane(host.volume(), async |e| {
            churn(&e, &mut model, &mut rng, 100).await;
            assert_eq!(
                e.write(Lba(model.len() as u64 / 512), buf_of(&[1; BLOCK]), false).await,
                Err(IoFault::BadRange)
            );
        });
        if round == 1 {
            drain(host.volume());
        }
        grow(host.volume(), size).unwrap();
        assert_eq!(host.volume().size_bytes(), size);
        model.resize(size as usize, 0);
        on_lane(host.volume(), async |e| {
            compare(&e, &model, "larger").await;
            put(&e, size / 4096 - 1, 1, 77).await;
        });
        model[size as usize - BLOCK..].fill(77);
        // Each end that there is: the log has entries behind the old end of the volume.
        match round {
            0 => host.abandon().unwrap(),
            1 => host.detach().unwrap(),
            _ => {
                host.abandon().unwrap();
                host = Host::attach(AttachOptions { resume: true, ..bench.options() }).unwrap();
                on_lane(host.volume(), async |e| compare(&e, &model, "taken up").await);
                host.detach().unwrap();
            }
        }
        host = bench.attach().unwrap();
        assert_eq!(host.volume().size_bytes(), size);
        on_lane(host.volume(), async |e| compare(&e, &model, "attached anew").await);
    }
    for (size, kind) in
        [(299 * MIB, ErrorKind::Usage), (300 * MIB + 512, ErrorKind::Usage), (65 << 40, ErrorKind::Usage)]
    {
        assert_eq!(grow(host.volume(), size).unwrap_err().kind(), kind, "{size}");
    }
    // As large as it is: nothing changes.
    grow(host.volume(), 300 * MIB).unwrap();
    host.detach().unwrap();
    bench.wipe_local();
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| compare(&e, &model, "from the store alone").await);
    host.detach().unwrap();
    is_well(&bench, "vol");
}

#[test]
fn a_process_that_dies_before_it_has_noted_the_size_leaves_it_to_the_next() {
    let bench = Bench::new(8 << 20);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| put(&e, 7, 1, 3).await);
    let copy = bench.dir.path().join("copy");
    drain(host.volume());
    std::fs::copy(bench.log(), &copy).unwrap();
    grow(host.volume(), 20 * MIB).unwrap();
    host.abandon().unwrap();
    for resume in [true, false] {
        std::fs::copy(&copy, bench.log()).unwrap();
        let host = Host::attach(AttachOptions { resume, ..bench.options() }).unwrap();
        for _ in 0..500 {
            if host.volume().is_confirmed() {
                break;
            }
            crate::volume_support::pause(std::time::Duration::from_millis(10));
        }
        assert_eq!(host.volume().size_bytes(), 20 * MIB, "resume {resume}");
        on_lane(host.volume(), async |e| {
            assert_eq!(get(&e, 7).await, Ok(3));
            put(&e, 5000, 1, 4).await;
        });
        drain(host.volume());
        std::fs::copy(bench.log(), &copy).unwrap();
        host.abandon().unwrap();
    }
}

#[test]
fn a_detached_volume_shrinks_when_nothing_is_behind_its_end() {
    let bench = Bench::new(32 << 20);
    let (mut model, mut rng) = (vec![0; 32 << 20], Rng(9));
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| {
        churn(&e, &mut model[..20 << 20], &mut rng, 300).await;
        put(&e, (20 << 20) / 4096 + 2, 1, 8).await;
    });
    assert_eq!(to(&bench, 40 * MIB, false).unwrap_err().kind(), ErrorKind::Busy);
    host.detach().unwrap();
    let store = bench.store();
    block_on(snapshots::create(&*store, "vol", "before", 1)).unwrap();
    let e = to(&bench, 20 * MIB, false).unwrap_err();
    assert!(e.kind() == ErrorKind::Usage && e.to_string().contains("4096 bytes of data behind byte 20971520"), "{e}");
    assert_eq!(to(&bench, 20 * MIB + 1, true).unwrap_err().kind(), ErrorKind::Usage);
    to(&bench, 20 * MIB, true).unwrap();
    is_well(&bench, "vol");
    model.truncate(20 << 20);
    // Larger again, what was cut off is zeros; the snapshot has it still.
    for (size, resized) in [(20, false), (28, true)] {
        if resized {
            to(&bench, size * MIB, false).unwrap();
            model.resize((size * MIB) as usize, 0);
        }
        let host = bench.attach().unwrap();
        assert_eq!(host.volume().size_bytes(), size * MIB);
        on_lane(host.volume(), async |e| {
            compare(&e, &model, "smaller").await;
            churn(&e, &mut model, &mut rng, 100).await;
        });
        host.detach().unwrap();
        bench.wipe_local();
        let host = bench.attach().unwrap();
        on_lane(host.volume(), async |e| compare(&e, &model, "from the store alone").await);
        host.detach().unwrap();
    }
    let log_path = bench.dir.path().join("wal/before.wal");
    let view = Host::attach(AttachOptions { volume: "vol@before".into(), log_path, ..bench.options() }).unwrap();
    assert_eq!(view.volume().size_bytes(), 32 * MIB);
    on_lane(view.volume(), async |e| assert_eq!(get(&e, (20 << 20) / 4096 + 2).await, Ok(8)));
    view.detach().unwrap();
    is_well(&bench, "vol");
}
