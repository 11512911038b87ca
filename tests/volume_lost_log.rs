//! A log that is damaged where nothing may be missing: the refusal says what it is about, and `--accept-loss` ends the log
//! there, keeps it whole beside it, and leaves a log that is clean from then on.

mod support_rng;
#[allow(dead_code, reason = "not all of it is wanted here")]
mod volume_support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;

use vb_ublk::disk::file::DataFile;
use vb_ublk::disk::uring::UringDisk;
use vb_ublk::error::{Error, ErrorKind, Result};
use vb_ublk::units::Seq;
use vb_ublk::volume::engine::Engine;
use vb_ublk::volume::host::{AttachOptions, Host};
use vb_ublk::wal::inspect::{Inspection, inspect};
use volume_support::{Bench, get, on_lane, put};

const MIB: usize = 1 << 20;

fn with_loss(bench: &Bench) -> Result<Host> {
    Host::attach(AttachOptions { accept_loss: true, ..bench.options() })
}

fn inspected(bench: &Bench) -> Inspection {
    let file = DataFile::open_to_read(&bench.log()).unwrap();
    let size = file.size().unwrap();
    vb_ublk::disk::uring::run(async { inspect(&UringDisk::new(&file).unwrap(), size).await.unwrap() })
}

/// Flips a bit of the log.
fn rot(bench: &Bench, byte: u64) {
    let file = fs::OpenOptions::new().read(true).write(true).open(bench.log()).unwrap();
    let mut b = [0];
    file.read_exact_at(&mut b, byte).unwrap();
    file.write_all_at(&[b[0] ^ 4], byte).unwrap();
    file.sync_all().unwrap();
}

/// The copies of the log that were kept.
fn kept(bench: &Bench) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> =
        fs::read_dir(bench.log().parent().unwrap()).unwrap().map(|e| e.unwrap().path()).collect();
    all.retain(|p| *p != bench.log());
    all.sort();
    all
}

#[track_caller]
fn refusal(bench: &Bench) -> String {
    let e: Error = bench.attach().map(|_| ()).unwrap_err();
    let text = e.to_string();
    assert!(e.kind() == ErrorKind::Corrupt && !text.contains('\n'), "{text}");
    text
}

/// A volume whose process died with `n` writes in its log, each flushed: write i fills blocks 10 i and 10 i + 1 with i + 1.
fn dead_with(n: u8) -> Bench {
    let bench = Bench::new(MIB);
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| {
        for i in 0..n {
            put(&e, u64::from(i) * 10, 2, i + 1).await;
            e.flush().await.unwrap();
        }
    });
    host.abandon().unwrap();
    bench
}

/// How many of the writes are there: all up to some one, and none after it.
#[track_caller]
fn writes_there(host: &Host, n: u8) -> u8 {
    on_lane(host.volume(), async |e| {
        let mut there = Vec::new();
        for i in 0..n {
            let [a, b] = [get(&e, u64::from(i) * 10).await.unwrap(), get(&e, u64::from(i) * 10 + 1).await.unwrap()];
            assert!(a == b && (a == 0 || a == i + 1), "write {i}: {a} {b}");
            there.push(a != 0);
        }
        assert!(there.is_sorted_by(|a, b| a >= b), "no prefix: {there:?}");
        there.iter().filter(|t| **t).count() as u8
    })
}

#[test]
fn a_damaged_record_is_refused_with_what_it_concerns_and_may_be_given_up() {
    const N: u8 = 6;
    let records = inspected(&dead_with(N)).records.iter().filter(|r| !r.header.entries.is_empty()).count();
    let mut refusals = 0;
    for damaged in 0..records {
        let bench = dead_with(N);
        let found = inspected(&bench);
        let Some(record) = found.records.iter().filter(|r| !r.header.entries.is_empty()).nth(damaged) else { continue };
        let first = record.header.placement.first_seq;
        rot(&bench, found.byte_of(record.at()).unwrap() + 100);
        let before = fs::read(bench.log()).unwrap();
        if inspected(&bench).damage.is_empty() {
            // Nothing says that it was on stable storage: a torn tail.
            continue;
        }
        refusals += 1;
        let text = refusal(&bench);
        eprintln!("{text}");
        assert!(text.contains("--accept-loss") && text.contains(&format!("entries {first} to ")), "{text}");
        assert!(text.contains(&format!("end with entry {}", first.0 - 1)), "{text}");
        // What lies behind can be read: its sectors are named; those of the damaged one are not known.
        let behind: Vec<_> = found.items().filter(|i| i.entry.seq > Seq(first.0)).map(|i| i.entry.lba).collect();
        let last_of_damaged = first.0 + record.header.entries.len() as u64 - 1;
        for lba in behind.iter().skip(record.header.entries.len() - 1) {
            assert!(text.contains(&format!(" {lba} to {}", lba.0 + 15)), "{lba} in {text}");
        }
        assert!(behind.is_empty() || text.contains(&format!("the entries {first} to {last_of_damaged} ")), "{text}");
        assert!(before == fs::read(bench.log()).unwrap() && kept(&bench).is_empty(), "a refusal has changed something");

        let host = with_loss(&bench).unwrap();
        assert_eq!(u64::from(writes_there(&host, N)), first.0 - 1);
        // As little as can be: the process dies before it has written anything.
        host.abandon().unwrap();
        let copies = kept(&bench);
        assert_eq!(copies, [bench.log().with_file_name("vol.wal.lost-1")]);
        assert!(fs::read(&copies[0]).unwrap() == before, "the copy is not the log as it was");
        let host = bench.attach().unwrap();
        assert_eq!(u64::from(writes_there(&host, N)), first.0 - 1);
        on_lane(host.volume(), async |e| put(&e, 200, 1, 9).await);
        host.abandon().unwrap();
        let host = bench.attach().unwrap();
        on_lane(host.volume(), async |e| assert_eq!(get(&e, 200).await, Ok(9)));
        host.detach().unwrap();
        bench.attach().unwrap().detach().unwrap();
        bench.wipe_local();
        let host = bench.attach().unwrap();
        assert_eq!(u64::from(writes_there(&host, N)), first.0 - 1);
        on_lane(host.volume(), async |e| assert_eq!(get(&e, 200).await, Ok(9)));
        host.detach().unwrap();
    }
    assert!(refusals >= 3, "{refusals} of {records} records");
}

/// A log over several segments, none of it in the store.
fn dead_over_segments() -> Bench {
    let bench = Bench::new(32 * MIB);
    // Uploads fail while this file is where their folder should be.
    let obstacle = bench.dir.path().join("store/vol/chunks");
    let host = bench.attach().unwrap();
    fs::write(&obstacle, b"").unwrap();
    on_lane(host.volume(), async |e| {
        for i in 0..14u8 {
            put(&e, u64::from(i) * 256, 256, i + 1).await;
        }
        e.flush().await.unwrap();
        put(&e, 14 * 256, 256, 15).await;
        e.flush().await.unwrap();
    });
    host.abandon().unwrap();
    // The store's threads outlive the host, other than a process's: an upload that is late must find nothing.
    let copy = Bench { dir: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap(), log_bytes: bench.log_bytes };
    for part in ["store", "wal"] {
        let copied = Command::new("cp").arg("-r").arg(bench.dir.path().join(part)).arg(copy.dir.path()).status();
        assert!(copied.unwrap().success());
    }
    fs::remove_file(copy.dir.path().join("store/vol/chunks")).unwrap();
    copy
}

#[test]
fn a_damaged_segment_may_be_given_up_with_all_behind_it() {
    let segments = inspected(&dead_over_segments()).segments.len();
    assert!(segments >= 3, "{segments} segments");
    let mut ends = Vec::new();
    for damaged in 0..segments {
        let bench = dead_over_segments();
        let found = inspected(&bench);
        let geometry = found.geometry();
        rot(&bench, geometry.slot_offset(found.segments[damaged].slot) + 33);
        let text = refusal(&bench);
        assert!(text.contains("--accept-loss has the log end with entry"), "{text}");
        let host = with_loss(&bench).unwrap();
        let state = |host: &Host| {
            on_lane(host.volume(), async |e| {
                let mut there = Vec::new();
                for i in 0..15u64 {
                    there.push(get(&e, i * 256 + 7).await.unwrap());
                }
                let n = there.iter().position(|b| *b == 0).unwrap_or(there.len());
                assert!(
                    there[..n].iter().zip(1..).all(|(b, want)| *b == want) && there[n..].iter().all(|b| *b == 0),
                    "{there:?}"
                );
                n
            })
        };
        let n = state(&host);
        host.abandon().unwrap();
        let host = bench.attach().unwrap();
        assert_eq!(state(&host), n);
        host.detach().unwrap();
        bench.wipe_local();
        let host = bench.attach().unwrap();
        assert_eq!(state(&host), n);
        host.detach().unwrap();
        ends.push(n);
    }
    eprintln!("{segments} segments: the volume ends after {ends:?} writes of 1 MiB");
    assert!(ends[0] == 0 && ends.is_sorted() && ends[segments - 1] > 3, "{ends:?}");
}

#[test]
fn there_is_nothing_to_accept_where_nothing_is_damaged() {
    for damage in [false, true] {
        let bench = dead_with(4);
        if damage {
            // A damaged block is an error for that block alone, and no loss of the log's.
            let found = inspected(&bench);
            let item = found.items().next().unwrap();
            rot(&bench, item.entry.data_byte() + 5);
        }
        let host = with_loss(&bench).unwrap();
        on_lane(host.volume(), async |e| {
            assert_eq!((get(&e, 0).await.is_err(), get(&e, 1).await, get(&e, 31).await), (damage, Ok(1), Ok(4)));
        });
        host.abandon().unwrap();
        assert!(kept(&bench).is_empty());
        // Nor is another's log touched: it is set aside whole, as ever.
        let other = AttachOptions { force: true, log_path: bench.dir.path().join("other/vol.wal"), ..bench.options() };
        Host::attach(other).unwrap().detach().unwrap();
        with_loss(&bench).unwrap().detach().unwrap();
        assert_eq!(kept(&bench), [bench.log().with_file_name("vol.wal.aside-1")]);
    }
}

#[test]
fn each_loss_keeps_a_log_of_its_own() {
    let bench = dead_with(5);
    for n in 1..3usize {
        let found = inspected(&bench);
        let record = found.records.iter().filter(|r| !r.header.entries.is_empty()).nth(3 - n).unwrap();
        rot(&bench, found.byte_of(record.at()).unwrap() + 100);
        let host = with_loss(&bench).unwrap();
        assert_eq!(usize::from(writes_there(&host, 5)), 3 - n);
        // Something behind it that was promised.
        on_lane(host.volume(), async |e| {
            for _ in 0..3 {
                put(&e, 240, 1, 1).await;
                e.flush().await.unwrap();
            }
        });
        host.abandon().unwrap();
        assert_eq!(kept(&bench).len(), n);
    }
}
