//! The commands that look at a volume which nobody has attached, and what they leave in the store.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Command as Process, Output, Stdio};

use crate::volume_support::Bench;

/// `vb-ublk volume VERB …` on the bench's store.
pub(crate) fn volume_command(bench: &Bench, verb: &str, args: &[&str]) -> Output {
    let dir = bench.dir.path();
    Process::new(env!("CARGO_BIN_EXE_vb-ublk"))
        .args(["volume", verb, "--store", &bench.url().to_string()])
        .args(args)
        .env_clear()
        // Where the bench has its log.
        .env("VB_UBLK_DATA_DIR", dir)
        .env("VB_UBLK_RUN_DIR", dir.join("run"))
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// All files of the store, with their content.
pub(crate) fn everything(bench: &Bench) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut folders = vec![bench.dir.path().join("store")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                all.insert(path.clone(), fs::read(&path).unwrap());
            }
        }
    }
    all
}
