//! `wal inspect` and `wal export`: logs that the engine wrote and nobody has, whole and damaged.

mod support_rng;
// Not all of it is wanted here.
#[allow(dead_code)]
mod volume_support;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use support_rng::Rng;
use vb_ublk::disk::IoBuf;
use vb_ublk::units::{Lba, SECTOR};
use vb_ublk::volume::Command as Order;
use vb_ublk::volume::engine::Engine;
use vb_ublk::volume::host::{AttachOptions, Host};
use volume_support::{Bench, block_on, buf_of, churn, on_lane};

const SIZE: usize = 32 << 20;
const BLOCK: u64 = 4096;

fn wal(args: &[&str], paths: &[&Path]) -> Output {
    let mut c = Command::new(env!("CARGO_BIN_EXE_vb-ublk"));
    c.arg("wal").args(args).args(paths).env_clear().stdin(Stdio::null());
    c.output().unwrap()
}

/// The JSON that a command prints, and what it says on stderr; it has to end with `code`.
#[track_caller]
fn json(args: &[&str], paths: &[&Path], code: i32) -> (Value, String) {
    let out = wal(&[args, &["--json"]].concat(), paths);
    let err = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(code), "{err}");
    assert!(err.lines().all(|l| l.starts_with("vb-ublk: ")) && (code == 0) == err.is_empty(), "{err}");
    (serde_json::from_slice(&out.stdout).unwrap(), err)
}

/// The one line of a command that does nothing.
#[track_caller]
fn refused(args: &[&str], paths: &[&Path]) -> String {
    let out = wal(args, paths);
    let err = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(1), "{err}");
    assert!(out.stdout.is_empty() && err.lines().count() == 1 && err.starts_with("vb-ublk: "), "{err}");
    err
}

/// Lays an image over a copy of the volume, as the help says.
fn lay_over(copy: &mut [u8], out: &Path, told: &Value) {
    let image = fs::read(out).unwrap();
    for e in told["extents"].as_array().unwrap() {
        let from = e["lba"].as_u64().unwrap() as usize * SECTOR;
        let range = from..from + e["sectors"].as_u64().unwrap() as usize * SECTOR;
        match e["kind"].as_str().unwrap() {
            "data" => copy[range.clone()].copy_from_slice(&image[range]),
            "hole" => copy[range].fill(0),
            other => panic!("an extent is {other}"),
        }
    }
}

fn read_all(host: &Host) -> Vec<u8> {
    on_lane(host.volume(), async |e| {
        let mut all = Vec::new();
        while all.len() < SIZE {
            let b = IoBuf::zeroed(1 << 20);
            e.read(Lba((all.len() / SECTOR) as u64), b.clone()).await.unwrap();
            all.extend_from_slice(b.bytes());
        }
        all
    })
}

#[test]
fn what_a_dead_host_had_not_uploaded_is_laid_over_what_the_store_has() {
    let bench = Bench::new(SIZE);
    let (mut model, mut rng) = (vec![0; SIZE], Rng(11));
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 300).await);
    block_on(host.volume().command(Order::Barrier)).unwrap();
    take_store_away(&bench);
    on_lane(host.volume(), async |e| churn(&e, &mut model, &mut rng, 200).await);
    host.abandon().unwrap();
    bring_store_back(&bench);
    // Another host takes the volume over, as the store has it, and the log here is set aside.
    let other = AttachOptions { force: true, log_path: bench.dir.path().join("other/vol.wal"), ..bench.options() };
    let host = Host::attach(other).unwrap();
    let store = read_all(&host);
    host.detach().unwrap();
    bench.attach().unwrap().detach().unwrap();
    assert!(store != model);

    let log = bench.dir.path().join("wal/vol.wal.aside-1");
    let before = fs::read(&log).unwrap();
    let (about, _) = json(&["inspect"], &[&log], 0);
    assert_eq!(about["superblock"]["volume_size_bytes"], SIZE as u64);
    assert!(about["unpacked"]["entries"].as_u64() >= Some(1), "{about:#}");
    assert!(about["holds"]["entries"].as_u64() > about["unpacked"]["entries"].as_u64(), "{about:#}");
    for all in [false, true] {
        let out = bench.dir.path().join(format!("out-{all}"));
        let args: &[&str] = if all { &["export", "--all"] } else { &["export"] };
        let (told, _) = json(args, &[&log, &out], 0);
        let counted = if all { &about["holds"] } else { &about["unpacked"] };
        assert_eq!((&told["entries"], &told["last_seq"]), (&counted["entries"], &counted["last_seq"]));
        assert_eq!((fs::metadata(&out).unwrap().len(), &told["size_known"]), (SIZE as u64, &Value::Bool(true)));
        assert!(fs::metadata(&out).unwrap().blocks() * 512 < SIZE as u64, "sparse");
        let mut copy = store.clone();
        lay_over(&mut copy, &out, &told);
        let bad = copy.iter().zip(&model).position(|(a, b)| a != b);
        assert_eq!(bad, None, "all: {all}");
    }
    assert!(fs::read(&log).unwrap() == before, "reading a log changed it");
    let line = refused(&["export"], &[&log, &bench.dir.path().join("out-true")]);
    assert!(line.contains("exists already"), "{line}");
}

/// A log of which nothing is packed: blocks 0, 10, 20, … are written one by one, each filled with its turn's number, all
/// synced before the last. Then the process dies.
fn blocks_one_by_one(blocks: u8) -> (Bench, PathBuf) {
    let bench = Bench::new(SIZE);
    let host = bench.attach().unwrap();
    take_store_away(&bench);
    on_lane(host.volume(), async |e| {
        for i in 0..blocks {
            e.flush().await.unwrap();
            e.write(Lba(u64::from(i) * 80), buf_of(&[i + 1; 4096]), false).await.unwrap();
        }
    });
    host.abandon().unwrap();
    let log = bench.log();
    (bench, log)
}

/// Else groups would be packed meanwhile.
fn take_store_away(bench: &Bench) {
    let store = bench.dir.path().join("store");
    fs::rename(&store, store.with_extension("away")).unwrap();
    fs::write(&store, b"").unwrap();
}

fn bring_store_back(bench: &Bench) {
    let store = bench.dir.path().join("store");
    fs::remove_file(&store).unwrap();
    fs::rename(store.with_extension("away"), &store).unwrap();
}

/// Where the data of each entry is in the file.
fn data_bytes(log: &Path) -> Vec<u64> {
    let (about, _) = json(&["inspect", "--records"], &[log], 0);
    about["entries"].as_array().unwrap().iter().map(|e| e["data_byte"].as_u64().unwrap()).collect()
}

/// Why a log ends, and the last entry that is not packed.
fn ending(about: &Value) -> (&str, Option<u64>) {
    (about["end"]["why"].as_str().unwrap(), about["unpacked"]["last_seq"].as_u64())
}

fn flip(log: &Path, byte: u64) {
    let file = fs::File::options().read(true).write(true).open(log).unwrap();
    let mut b = [0];
    file.read_exact_at(&mut b, byte).unwrap();
    file.write_all_at(&[b[0] ^ 0x20], byte).unwrap();
}

/// Which of the blocks 0, 10, 20, … an export says it has, by their turns; checks that the image has them and nothing else.
fn turns(out: &Path, told: &Value) -> Vec<u64> {
    let mut want = vec![0; SIZE];
    let extents = told["extents"].as_array().unwrap().iter();
    let turns = extents.map(|e| (e["lba"].as_u64().unwrap() / 80, e["sectors"].as_u64().unwrap()));
    let turns: Vec<_> = turns.inspect(|t| assert_eq!(t.1, 8)).map(|t| t.0 + 1).collect();
    for turn in &turns {
        let at = (*turn as usize - 1) * 80 * SECTOR;
        want[at..at + BLOCK as usize].fill(*turn as u8);
    }
    assert!(fs::read(out).unwrap() == want);
    turns
}

#[test]
fn a_flipped_bit_of_data_costs_its_block_alone() {
    let (bench, log) = blocks_one_by_one(6);
    let at = data_bytes(&log);
    flip(&log, at[2] + 99);
    assert_eq!(json(&["inspect"], &[&log], 0).0["end"]["why"], "clean");
    let out = bench.dir.path().join("out");
    let (told, err) = json(&["export"], &[&log, &out], 1);
    assert_eq!(turns(&out, &told), [1, 2, 4, 5, 6]);
    let bad = &told["bad_blocks"][0];
    assert_eq!((bad["lba"].as_u64(), bad["seq"].as_u64(), bad["byte"].as_u64()), (Some(160), Some(3), Some(at[2])));
    for words in ["sectors 160 to 167", "entry 3", &format!("byte {}", at[2]), "1 damaged block"] {
        assert!(err.contains(words), "{words}: {err}");
    }
}

#[test]
fn a_flipped_bit_in_the_last_record_is_a_torn_tail() {
    let (bench, log) = blocks_one_by_one(6);
    flip(&log, data_bytes(&log)[5]);
    let (about, _) = json(&["inspect", "--records"], &[&log], 0);
    assert_eq!(ending(&about), ("torn", Some(5)));
    assert_eq!((about["entries"][5]["state"].as_str(), about["left"]["entries"].as_u64()), (Some("left"), Some(1)));
    let out = bench.dir.path().join("out");
    for all in [&["export"][..], &["export", "--all"]] {
        // It was never promised, so nobody gets it.
        let (told, _) = json(all, &[&log, &out], 0);
        assert_eq!(turns(&out, &told), [1, 2, 3, 4, 5]);
        fs::remove_file(&out).unwrap();
    }
}

#[test]
fn a_flipped_bit_of_a_header_is_corruption_and_the_rest_can_be_had() {
    let (bench, log) = blocks_one_by_one(6);
    let at = data_bytes(&log);
    flip(&log, at[2] - BLOCK + 80);
    let (about, err) = json(&["inspect"], &[&log], 1);
    assert_eq!(ending(&about), ("damaged", Some(2)));
    assert_eq!(about["left"]["entries"], 3);
    let place = format!("byte {} of the file", at[2] - BLOCK);
    assert!(err.contains(&place) && about["damage"][0].as_str().unwrap().contains(&place), "{err}");
    let out = bench.dir.path().join("out");
    let (told, err) = json(&["export"], &[&log, &out], 1);
    assert_eq!(turns(&out, &told), [1, 2]);
    assert!(err.contains(&place), "{err}");
    fs::remove_file(&out).unwrap();
    let (told, _) = json(&["export", "--all"], &[&log, &out], 1);
    assert_eq!(turns(&out, &told), [1, 2, 4, 5, 6]);
    // For people, too: what was found is on stdout, why it is not all on stderr.
    let people = wal(&["inspect", "--records"], &[&log]);
    let text = String::from_utf8(people.stdout).unwrap();
    assert_eq!(people.status.code(), Some(1));
    for line in [
        "end:\n",
        "  why: damaged\n",
        "damage: the log is damaged at ",
        "         2  data    unpacked             80         8  generation 1 offset ",
    ] {
        assert!(text.contains(line), "{line:?} in\n{text}");
    }
}

#[test]
fn a_cut_file_is_told() {
    let bench = Bench::new(SIZE);
    let host = bench.attach().unwrap();
    take_store_away(&bench);
    on_lane(host.volume(), async |e| {
        for i in 0..10u8 {
            e.write(Lba(u64::from(i) * 2048), buf_of(&vec![i + 1; 1 << 20]), false).await.unwrap();
        }
        e.flush().await.unwrap();
    });
    host.abandon().unwrap();
    let log = bench.log();
    let (about, _) = json(&["inspect"], &[&log], 0);
    assert_eq!((ending(&about), about["segments"].as_u64()), (("clean", Some(10)), Some(4)), "{about:#}");
    let end = about["end"]["at"]["file_byte"].as_u64().unwrap();
    let file = fs::File::options().write(true).open(&log).unwrap();
    file.set_len(end - 500_001).unwrap();
    let (about, err) = json(&["inspect"], &[&log], 1);
    assert!(err.contains("the file was cut"), "{err}");
    assert_eq!(ending(&about), ("damaged", Some(9)));
    let out = bench.dir.path().join("out");
    let (told, _) = json(&["export"], &[&log, &out], 1);
    assert_eq!(told["extents"], serde_json::json!([{ "lba": 0, "sectors": 9 * 2048, "kind": "data" }]));
    let image = fs::read(&out).unwrap();
    assert!(
        image.chunks(1 << 20).enumerate().all(|(i, c)| c.iter().all(|b| *b == if i < 9 { i as u8 + 1 } else { 0 }))
    );
}

/// Changes both copies of the superblock, and mends their checksums.
fn change_superblock(log: &Path, change: impl Fn(&mut [u8])) {
    let file = fs::File::options().read(true).write(true).open(log).unwrap();
    for at in [0, 64 << 10] {
        let mut block = [0; BLOCK as usize];
        file.read_exact_at(&mut block, at).unwrap();
        change(&mut block);
        block[8..12].fill(0);
        let crc = crc32fast::hash(&block);
        block[8..12].copy_from_slice(&crc.to_le_bytes());
        file.write_all_at(&block, at).unwrap();
    }
}

#[test]
fn a_log_that_does_not_know_the_volume_s_size_is_exported_as_far_as_it_goes() {
    let (bench, log) = blocks_one_by_one(3);
    change_superblock(&log, |b| b[56..64].fill(0));
    let out = bench.dir.path().join("out");
    let (told, _) = json(&["export"], &[&log, &out], 0);
    assert_eq!((told["size_known"].as_bool(), told["size_bytes"].as_u64()), (Some(false), Some(168 * 512)));
    fs::remove_file(&out).unwrap();
    let text = String::from_utf8(wal(&["export"], &[&log, &out]).stdout).unwrap();
    assert!(text.contains("does not know the volume's size") && text.contains("3 entries (1 to 3, 12 KiB"), "{text}");
}

#[test]
fn a_log_of_a_newer_version_is_refused() {
    let (bench, log) = blocks_one_by_one(1);
    change_superblock(&log, |b| b[4] = 2);
    let out = bench.dir.path().join("out");
    for line in [refused(&["inspect"], &[&log]), refused(&["export"], &[&log, &out])] {
        assert!(line.contains("version 2") && line.contains(log.to_str().unwrap()), "{line}");
    }
    assert!(!out.exists());
}

#[test]
fn a_log_in_use_is_refused() {
    let bench = Bench::new(1 << 20);
    let host = bench.attach().unwrap();
    let line = refused(&["inspect"], &[&bench.log()]);
    assert!(line.contains("in use by another process") && line.contains("vb-ublk list"), "{line}");
    host.detach().unwrap();
    // Detached, all of it is packed: there is nothing to write, and that is no failure.
    let (about, _) = json(&["inspect"], &[&bench.log()], 0);
    assert_eq!((ending(&about), about["unpacked"]["entries"].as_u64()), (("clean", None), Some(0)));
}

#[test]
fn what_is_no_log_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let out = dir.path().join("out");
    for (path, words) in [
        (dir.path().join("none"), "No such file"),
        (file("empty", b""), "there is no log"),
        (file("zeros", &[0; 1 << 20]), "there is no log"),
        (file("text", &[b'x'; 1 << 17]), "no copy of the log's superblock is valid"),
    ] {
        for line in [refused(&["inspect"], &[&path]), refused(&["export"], &[&path, &out])] {
            assert!(line.contains(words) && line.contains(path.to_str().unwrap()), "{line}");
        }
    }
    assert_eq!(wal(&["inspect"], &[dir.path()]).status.code(), Some(2), "a folder");
    assert!(!out.exists());
}
