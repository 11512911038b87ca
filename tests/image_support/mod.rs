//! Images to import, the commands that do it, and what they leave.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::support_rng::Rng;
use crate::volume_support::Bench;

/// A store without a volume.
pub(crate) fn bench() -> Bench {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR"));
    Bench { dir: tempfile::tempdir_in(root).unwrap(), log_bytes: 64 << 20 }
}

pub(crate) fn path(bench: &Bench, name: &str) -> PathBuf {
    bench.dir.path().join(name)
}

/// `vb-ublk COMMAND …` on the bench's store, in the bench's folder.
pub(crate) fn command(bench: &Bench, args: &[&str]) -> Command {
    let dir = bench.dir.path();
    let mut c = Command::new(env!("CARGO_BIN_EXE_vb-ublk"));
    c.arg(args[0])
        .args(["--store", &bench.url().to_string()])
        .args(&args[1..])
        .env_clear()
        .env("VB_UBLK_DATA_DIR", dir)
        .env("VB_UBLK_RUN_DIR", dir.join("run"))
        .current_dir(dir)
        .stdin(Stdio::null());
    c
}

#[track_caller]
pub(crate) fn ok(bench: &Bench, args: &[&str]) -> String {
    let out = command(bench, args).output().unwrap();
    assert!(out.status.success(), "{args:?}: {out:?}");
    assert!(out.stderr.is_empty(), "nothing but the result, where nobody looks: {out:?}");
    String::from_utf8(out.stdout).unwrap()
}

#[track_caller]
pub(crate) fn json(bench: &Bench, args: &[&str]) -> Value {
    serde_json::from_str(&ok(bench, args)).unwrap()
}

/// The one line of a command that has to fail.
#[track_caller]
pub(crate) fn fails(bench: &Bench, args: &[&str], code: i32, words: &[&str]) -> String {
    failed(&command(bench, args).output().unwrap(), code, words)
}

#[track_caller]
pub(crate) fn failed(out: &Output, code: i32, words: &[&str]) -> String {
    let err = String::from_utf8(out.stderr.clone()).unwrap();
    eprint!("{err}");
    assert_eq!(out.status.code(), Some(code), "{err}");
    assert!(err.starts_with("vb-ublk: ") && err.lines().count() == 1 && !err.contains("panicked"), "{err}");
    words.iter().for_each(|w| assert!(err.contains(w), "{w:?} is not in {err:?}"));
    err
}

/// The store's objects.
pub(crate) fn objects(bench: &Bench) -> Vec<PathBuf> {
    let (mut all, mut folders) = (Vec::new(), vec![path(bench, "store")]);
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(folder) else { continue };
        for p in entries.map(|e| e.unwrap().path()) {
            match p.is_dir() {
                true if !p.ends_with(".vb-locks") => folders.push(p),
                false => all.push(p),
                true => {}
            }
        }
    }
    all
}

/// A disk's content: data, zeros, and blocks of zeros but for a byte, in stretches of all lengths.
pub(crate) fn disk(len: usize, rng: &mut Rng) -> Vec<u8> {
    let mut all = vec![0; len];
    let mut at = 0;
    while at < len {
        let n = match rng.below(3) {
            0 => 1 + rng.below(8192),
            1 => 4096 * (1 + rng.below(64)),
            _ => 4096 * (1 + rng.below(1500)),
        };
        let end = len.min(at + n as usize);
        match rng.below(3) {
            0 => all[at..end].chunks_mut(8).for_each(|c| c.copy_from_slice(&rng.next().to_le_bytes()[..c.len()])),
            1 => all[at + rng.below((end - at) as u64) as usize] = 1,
            _ => {}
        }
        at = end;
    }
    all
}
