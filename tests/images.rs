//! qcow2 images in and out, held against QEMU's own tools; and what an export may not do.

mod image_support;
mod support_rng;
#[expect(dead_code, reason = "what is exported is compared by QEMU, not here")]
mod volume_support;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use image_support::{bench, command, disk, failed, fails, json, objects, ok, path};
use serde_json::Value;
use support_rng::Rng;
use vb_ublk::error::{ErrorKind, Result};
use vb_ublk::image::{self, Backing};
use vb_ublk::units::Lba;
use vb_ublk::volume::engine::Engine;
use volume_support::{Bench, TestLane, block_on, on_lane, put};

const MIB: usize = 1 << 20;

/// `qemu-img …` in the bench's folder; what it prints.
#[track_caller]
fn qemu_img(bench: &Bench, args: &str) -> String {
    let out = Command::new("qemu-img").args(args.split(' ')).current_dir(bench.dir.path()).output();
    let out = out.expect("qemu-img: scripts/setup test installs it");
    assert!(out.status.success(), "qemu-img {args}: {out:?}");
    String::from_utf8(out.stdout).unwrap()
}

/// A raw image of 12 MiB and a bit, `disk`, and what it has.
fn raw(bench: &Bench, seed: u64) -> Vec<u8> {
    let content = disk(12 * MIB + 512, &mut Rng(seed));
    fs::write(path(bench, "disk"), &content).unwrap();
    content
}

/// Imports an image, and sees whether the volume is what QEMU reads in it.
#[track_caller]
fn comes_back(bench: &Bench, image: &str, args: &[&str]) {
    ok(bench, &[&["import", image, "--volume", "vol"], args].concat());
    ok(bench, &["export", "vol", "out.raw"]);
    // What is longer in one of them is zeros: the volume is rounded up.
    qemu_img(bench, &format!("compare -F raw {image} out.raw"));
    ok(bench, &["volume", "verify", "vol"]);
    ok(bench, &["volume", "delete", "vol"]);
    fs::remove_file(path(bench, "out.raw")).unwrap();
}

#[test]
fn images_of_all_kinds_are_what_qemu_reads_in_them() {
    let bench = bench();
    raw(&bench, 7);
    for options in [
        "-O qcow2",
        "-O qcow2 -c",
        "-O qcow2 -o compat=0.10",
        "-O qcow2 -c -o compat=0.10",
        "-O qcow2 -o cluster_size=512",
        "-O qcow2 -c -o cluster_size=4k",
        "-O qcow2 -o cluster_size=2M",
        "-O qcow2 -c -o cluster_size=2M",
        "-O qcow2 -o preallocation=metadata",
        "-O qcow2 -o preallocation=full",
        "-O qcow2 -o refcount_bits=1,lazy_refcounts=on",
    ] {
        qemu_img(&bench, &format!("convert {options} disk image.qcow2"));
        comes_back(&bench, "image.qcow2", &[]);
        fs::remove_file(path(&bench, "image.qcow2")).unwrap();
    }
}

#[test]
fn an_image_with_snapshots_is_its_present_state() {
    let bench = bench();
    raw(&bench, 8);
    qemu_img(&bench, "convert -O qcow2 disk image.qcow2");
    qemu_img(&bench, "snapshot -c before image.qcow2");
    raw(&bench, 9);
    qemu_img(&bench, "convert -n -O qcow2 disk image.qcow2");
    qemu_img(&bench, "snapshot -c after image.qcow2");
    comes_back(&bench, "image.qcow2", &[]);
}

#[test]
fn backing_files_are_read_through() {
    let bench = bench();
    raw(&bench, 10);
    fs::create_dir(path(&bench, "below")).unwrap();
    fs::rename(path(&bench, "disk"), path(&bench, "below/base.raw")).unwrap();
    qemu_img(&bench, "create -q -f qcow2 -b below/base.raw -F raw middle.qcow2 16M");
    qemu_img(&bench, "create -q -f qcow2 -b middle.qcow2 -F qcow2 top.qcow2 20M");
    comes_back(&bench, "top.qcow2", &[]);
    // Something of its own in each.
    for (image, at) in [("middle.qcow2", 3), ("top.qcow2", 15)] {
        let write = format!("write -P 9 {at}M 100k");
        let out = Command::new("qemu-io").current_dir(bench.dir.path()).args(["-c", &write, image]).output().unwrap();
        assert!(out.status.success(), "{out:?}");
    }
    comes_back(&bench, "top.qcow2", &[]);
}

#[test]
fn a_backing_file_elsewhere_is_opened_with_leave_alone() {
    let (bench, elsewhere) = (bench(), tempfile::tempdir().unwrap());
    raw(&bench, 11);
    let base = elsewhere.path().join("base.raw");
    fs::copy(path(&bench, "disk"), &base).unwrap();
    qemu_img(&bench, &format!("create -q -f qcow2 -b {} -F raw far.qcow2", base.display()));
    let refused = |image: &str, words: &[&str]| {
        fails(&bench, &["import", image, "--volume", "vol"], 1, words);
        assert!(objects(&bench).is_empty());
    };
    refused("far.qcow2", &["base.raw", "--allow-backing"]);
    comes_back(&bench, "far.qcow2", &["--allow-backing", elsewhere.path().to_str().unwrap()]);
    // By a link, and by a way around.
    symlink(&base, path(&bench, "link.raw")).unwrap();
    qemu_img(&bench, "create -q -f qcow2 -b link.raw -F raw link.qcow2");
    refused("link.qcow2", &["outside", "--allow-backing"]);
    qemu_img(&bench, "create -q -u -f qcow2 -b ../../../../../../../../etc/shadow -F raw up.qcow2 1M");
    refused("up.qcow2", &["/etc/shadow", "--allow-backing"]);
    qemu_img(&bench, "create -q -u -f qcow2 -b nowhere.raw -F raw gone.qcow2 1M");
    refused("gone.qcow2", &["nowhere.raw"]);
    qemu_img(&bench, "create -q -u -f qcow2 -b nbd://127.0.0.1/x -F raw net.qcow2 1M");
    refused("net.qcow2", &["not a plain file"]);
    qemu_img(&bench, "create -q -f qcow2 circle.qcow2 1M");
    qemu_img(&bench, "rebase -u -b circle.qcow2 -F qcow2 circle.qcow2");
    refused("circle.qcow2", &["circle"]);
    qemu_img(&bench, "create -q -u -f qcow2 -b disk -F vmdk odd.qcow2 1M");
    refused("odd.qcow2", &["vmdk"]);
    nix::unistd::mkfifo(&path(&bench, "fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    qemu_img(&bench, "create -q -u -f qcow2 -b fifo -F raw fifo.qcow2 1M");
    refused("fifo.qcow2", &["not a regular file"]);
}

#[test]
fn what_cannot_be_read_here_is_refused_with_advice() {
    let bench = bench();
    raw(&bench, 12);
    for (options, word) in [
        ("-O qcow2 -c -o compression_type=zstd", "deflate"),
        ("-O qcow2 -o extended_l2=on", "extended L2"),
        ("-O qcow2 -o data_file=data.raw", "another file"),
        ("--object secret,id=s,data=x -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s", "encrypted"),
    ] {
        qemu_img(&bench, &format!("convert {options} disk image.qcow2"));
        fails(&bench, &["import", "image.qcow2", "--volume", "vol"], 1, &[word, "qemu-img convert"]);
        fs::remove_file(path(&bench, "image.qcow2")).unwrap();
    }
    assert!(objects(&bench).is_empty());
}

/// Opens an image and reads all of it.
fn read_all(file: &Path) -> Result<u64> {
    block_on(async {
        let mut source = image::open(file, Some(image::Format::Qcow2), &Backing::default()).await?;
        let (mut at, mut read, mut buf) = (0, 0, vec![0; 64 << 10]);
        while let Some((start, end)) = source.next_data(at).await? {
            assert!(start >= at && end > start, "{at}: {start} to {end}");
            at = start;
            // Of a large stretch some will do.
            while at < end && read < 64 << 20 {
                let n = (end - at).min(64 << 10) as usize;
                source.read(at, &mut buf[..n]).await?;
                (at, read) = (at + n as u64, read + n as u64);
            }
            at = end;
        }
        Ok(read)
    })
}

#[test]
fn an_image_that_is_cut_off_is_damaged_wherever_that_is() {
    let bench = bench();
    raw(&bench, 13);
    for options in ["-O qcow2", "-O qcow2 -c", "-O qcow2 -o cluster_size=4k"] {
        qemu_img(&bench, &format!("convert {options} disk image.qcow2"));
        let image = path(&bench, "image.qcow2");
        let whole = fs::read(&image).unwrap();
        read_all(&image).unwrap();
        let file = OpenOptions::new().write(true).open(&image).unwrap();
        for eighth in 0..8 {
            let len = whole.len() * eighth / 8 + eighth;
            file.set_len(len as u64).unwrap();
            let e = read_all(&image).expect_err("it is cut off");
            assert!(matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Usage), "{len} of {}: {e}", whole.len());
            file.write_all_at(&whole, 0).unwrap();
        }
        file.set_len(whole.len() as u64 * 3 / 4).unwrap();
        drop(file);
        fails(&bench, &["import", "image.qcow2", "--volume", "vol"], 1, &["image.qcow2"]);
        assert!(objects(&bench).is_empty());
    }
}

/// Random damage to header, L1 and L2 tables: it shows or it does not, but the program neither panics nor takes all memory.
#[test]
fn damaged_tables_are_errors_or_other_data() {
    let bench = bench();
    raw(&bench, 14);
    let (mut good, mut bad) = (0, 0);
    for options in ["-O qcow2", "-O qcow2 -c", "-O qcow2 -o compat=0.10,cluster_size=512"] {
        qemu_img(&bench, &format!("convert {options} disk image.qcow2"));
        let image = path(&bench, "image.qcow2");
        let whole = fs::read(&image).unwrap();
        let word = |at: usize| u64::from_be_bytes(whole[at..at + 8].try_into().unwrap());
        let l1 = word(40) as usize;
        let l2 = (word(l1) & 0x00ff_ffff_ffff_fe00) as usize;
        let file = OpenOptions::new().write(true).open(&image).unwrap();
        let mut rng = Rng(options.len() as u64);
        for _ in 0..1500 {
            let mut spoilt = Vec::new();
            for _ in 0..=rng.below(2) {
                let at = match rng.below(4) {
                    0 => rng.below(112) as usize,
                    1 => l1,
                    _ => l2 + rng.below(40) as usize * 8,
                };
                let bytes: Vec<u8> = (0..1 + rng.below(8))
                    .map(|_| [0, 0xff, 0x80, 0x40, rng.next() as u8][rng.below(5) as usize])
                    .collect();
                file.write_all_at(&bytes, at as u64).unwrap();
                spoilt.push((at, bytes.len()));
            }
            match read_all(&image) {
                Ok(_) => good += 1,
                Err(e) => {
                    assert!(!e.to_string().contains('\n'), "{e}");
                    bad += 1;
                }
            }
            spoilt.into_iter().for_each(|(at, n)| file.write_all_at(&whole[at..at + n], at as u64).unwrap());
        }
    }
    assert!(good > 100 && bad > 1000, "{good} read, {bad} refused");
}

/// A volume of an image's content.
fn volume(seed: u64) -> (Bench, Vec<u8>) {
    let bench = bench();
    let mut content = raw(&bench, seed);
    ok(&bench, &["import", "disk", "--volume", "vol"]);
    content.resize(content.len().next_multiple_of(4096), 0);
    (bench, content)
}

#[test]
fn qcow2_images_are_what_qemu_takes_for_whole() {
    let (bench, content) = volume(15);
    let told = json(&bench, &["export", "vol", "out.qcow2", "--format", "qcow2", "--json"]);
    assert_eq!((told["format"].as_str(), told["size_bytes"].as_u64()), (Some("qcow2"), Some(content.len() as u64)));
    qemu_img(&bench, "check -q out.qcow2");
    qemu_img(&bench, "compare -f raw -F qcow2 disk out.qcow2");
    assert!(qemu_img(&bench, "info out.qcow2").contains("compat: 1.1"));
    let used = fs::metadata(path(&bench, "out.qcow2")).unwrap().len();
    assert!(used < content.len() as u64 * 3 / 4, "{used}: it is not sparse");
    comes_back_under_another_name(&bench, "out.qcow2");
    // A large one with little in it.
    ok(&bench, &["volume", "create", "large", "--size", "1T"]);
    ok(&bench, &["export", "large", "large.qcow2", "--format", "qcow2"]);
    qemu_img(&bench, "check -q large.qcow2");
    assert!(fs::metadata(path(&bench, "large.qcow2")).unwrap().len() < MIB as u64);
}

fn comes_back_under_another_name(bench: &Bench, image: &str) {
    ok(bench, &["import", image, "--volume", "again"]);
    ok(bench, &["export", "again", "again.raw"]);
    qemu_img(bench, "compare -f raw -F raw disk again.raw");
}

#[test]
fn standard_output_gets_all_of_it_and_nothing_else() {
    let (bench, content) = volume(16);
    let out = command(&bench, &["export", "vol", "-"]).output().unwrap();
    assert!(out.status.success() && out.stderr.is_empty());
    assert!(out.stdout == content);
    // A reader that goes away.
    let mut child =
        command(&bench, &["export", "vol", "-"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    failed(&child.wait_with_output().unwrap(), 1, &["standard output"]);
}

#[test]
fn a_damaged_block_ends_the_export_and_is_named() {
    let (bench, _) = volume(17);
    fs::write(path(&bench, "out"), "precious").unwrap();
    let chunk = objects(&bench).into_iter().filter(|p| p.extension().is_some_and(|e| e == "chunk")).min().unwrap();
    let mut bytes = fs::read(&chunk).unwrap();
    bytes[32768 + 3 * 4096 + 7] ^= 1;
    fs::write(&chunk, &bytes).unwrap();
    for format in ["raw", "qcow2"] {
        fails(
            &bench,
            &["export", "vol", "out", "--force", "--format", format],
            1,
            &["bytes ", "damaged", "volume verify"],
        );
        assert_eq!(fs::read(path(&bench, "out")).unwrap(), b"precious");
        assert!(!path(&bench, "out.partial").exists());
    }
    fs::remove_file(&chunk).unwrap();
    fails(&bench, &["export", "vol", "new"], 1, &["bytes ", "not in the store"]);
    assert!(!path(&bench, "new").exists() && !path(&bench, "new.partial").exists());
}

#[test]
fn a_volume_that_somebody_has_is_not_exported() {
    let (bench, _) = volume(18);
    let host = bench.attach().unwrap();
    fails(&bench, &["export", "vol", "out"], 1, &["attached by", "detach it first"]);
    host.abandon().unwrap();
    fails(&bench, &["export", "vol", "out"], 1, &["attached by"]);
    bench.attach().unwrap().detach().unwrap();
    ok(&bench, &["export", "vol", "out"]);
}

#[test]
fn two_exports_to_one_file_do_not_mix() {
    let (bench, content) = volume(19);
    // What another export holds, and what a killed one has left.
    let partial = fs::File::create(path(&bench, "out.partial")).unwrap();
    partial.set_len(1 << 30).unwrap();
    partial.lock().unwrap();
    fails(&bench, &["export", "vol", "out"], 1, &["another export"]);
    drop(partial);
    ok(&bench, &["export", "vol", "out"]);
    assert!(fs::read(path(&bench, "out")).unwrap() == content && !path(&bench, "out.partial").exists());
}

/// A lane's requests to `vol`, which is attached for as long as they take.
fn attached(bench: &Bench, f: impl AsyncFnOnce(&TestLane)) {
    let host = bench.attach().unwrap();
    on_lane(host.volume(), async |e| f(&e).await);
    host.detach().unwrap();
}

/// Writes all over a volume of 64 MiB and more; some of it leaves clusters of 64 KiB without data, or with a part of it.
async fn change(e: &TestLane, rng: &mut Rng) {
    for _ in 0..60 {
        let (block, blocks) = (rng.below(16000), 1 + rng.below(60));
        match rng.below(3) {
            0 => e.discard(Lba(block * 8), blocks * 8, false).await.unwrap(),
            1 => e.write_zeroes(Lba(block * 8), blocks * 8, false).await.unwrap(),
            _ => put(e, block, blocks as usize, rng.next() as u8).await,
        }
    }
}

/// A volume of 64 MiB and a bit, full of data but for its last quarter, with snapshot `a` and full exports of that.
fn with_full_exports(seed: u64) -> (Bench, Rng) {
    let bench = bench();
    let rng = Rng(seed);
    ok(&bench, &["volume", "create", "vol", "--size", &(64 * MIB + 12288).to_string()]);
    attached(&bench, async |e| {
        for i in 0..48 {
            put(e, i * 256, 256, i as u8 + 1).await;
        }
    });
    ok(&bench, &["snapshot", "create", "vol", "a"]);
    ok(&bench, &["export", "vol@a", "a.raw"]);
    ok(&bench, &["export", "vol@a", "a.qcow2", "--format", "qcow2"]);
    (bench, rng)
}

#[test]
fn increments_over_a_full_image_are_the_volume() {
    let (bench, mut rng) = with_full_exports(20);
    let export = |of: &str, to: &str, more: &[&str]| {
        json(&bench, &[&["export", of, to, "--format", "qcow2", "--json"], more].concat())
    };
    let same = |image: &str, raw: &str| {
        qemu_img(&bench, &format!("check -q {image}"));
        qemu_img(&bench, &format!("compare -f qcow2 -F raw {image} {raw}"));
    };
    attached(&bench, async |e| {
        change(e, &mut rng).await;
        // Whole clusters, which have to hide what lies below; and a part of one.
        e.discard(Lba(1024 * 8), 40 * 8, false).await.unwrap();
        put(e, 2048, 1, 0xee).await;
        // The last cluster, which is cut off.
        put(e, 16386, 1, 0xdd).await;
    });
    ok(&bench, &["snapshot", "create", "vol", "b"]);
    ok(&bench, &["export", "vol@b", "b.raw"]);
    for (format, full) in [("qcow2", "a.qcow2"), ("raw", "a.raw")] {
        let told = export("vol@b", "b.qcow2", &["--since", "a", "--backing", full, "--force"]);
        assert_eq!((&told["since"], &told["backing"]), (&Value::from("a"), &Value::from(full)));
        assert!(told["zero_bytes"].as_u64().unwrap() >= 2 * 65536, "{told}");
        let info: Value = serde_json::from_str(&qemu_img(&bench, "info --output=json b.qcow2")).unwrap();
        assert_eq!((&info["backing-filename"], &info["backing-filename-format"]), (&full.into(), &format.into()));
        let used = fs::metadata(path(&bench, "b.qcow2")).unwrap().len();
        assert!(used < told["data_bytes"].as_u64().unwrap() + MIB as u64 && used < 12 * MIB as u64, "{used}: {told}");
        same("b.qcow2", "b.raw");
    }
    // Larger, and once more: an increment over an increment, of the volume itself.
    ok(&bench, &["volume", "resize", "vol", "80M"]);
    attached(&bench, async |e| {
        change(e, &mut rng).await;
        put(e, 16390, 3, 0xcc).await;
        put(e, 20479, 1, 0xcc).await;
    });
    ok(&bench, &["export", "vol", "now.raw"]);
    export("vol", "now.qcow2", &["--since", "b", "--backing", "b.qcow2"]);
    same("now.qcow2", "now.raw");
    // The chain comes back as a volume.
    ok(&bench, &["import", "now.qcow2", "--volume", "again"]);
    ok(&bench, &["export", "again", "again.raw"]);
    qemu_img(&bench, "compare -f raw -F raw again.raw now.raw");
    // Without a name in it, it is laid over the image by hand; and from newer to older goes as well.
    export("vol@a", "back.qcow2", &["--since", "b"]);
    assert!(!qemu_img(&bench, "info back.qcow2").contains("backing file"));
    qemu_img(&bench, "rebase -u -b b.qcow2 -F qcow2 back.qcow2");
    same("back.qcow2", "a.raw");
    // Nothing has changed.
    ok(&bench, &["snapshot", "create", "vol", "c"]);
    let told = export("vol", "none.qcow2", &["--since", "c", "--backing", "now.raw"]);
    assert_eq!((told["data_bytes"].as_u64(), told["zero_bytes"].as_u64()), (Some(0), Some(0)));
    same("none.qcow2", "now.raw");
}

#[test]
fn increments_that_cannot_be_are_refused() {
    let (bench, _) = with_full_exports(21);
    ok(&bench, &["snapshot", "create", "vol", "b"]);
    let increment = ["export", "vol@b", "out", "--format", "qcow2", "--since"];
    let with = |more: &[&'static str]| [&increment[..], more].concat();
    fails(&bench, &["export", "vol@b", "out", "--since", "a"], 2, &["raw", "--format qcow2"]);
    fails(&bench, &["export", "vol@b", "-", "--format", "qcow2", "--since", "a"], 2, &["standard output"]);
    fails(&bench, &with(&["b"]), 2, &["itself"]);
    fails(&bench, &with(&["x"]), 1, &["no snapshot \"x\"", "it has a, b"]);
    fails(&bench, &["export", "vol", "out", "--backing", "a.raw"], 2, &["--since"]);
    fails(&bench, &with(&["a", "--backing", "nowhere"]), 1, &["backing file nowhere"]);
    fs::write(path(&bench, "small"), [1; 4096]).unwrap();
    fails(&bench, &with(&["a", "--backing", "small"]), 2, &["4096 bytes", "exported of that snapshot"]);
    fails(&bench, &with(&["a", "--backing", "."]), 2, &["neither a file"]);
    // It would lie over itself.
    let own = ["export", "vol@b", "a.qcow2", "--force", "--format", "qcow2", "--since", "a", "--backing", "a.qcow2"];
    fails(&bench, &own, 2, &["very file"]);
    let host = bench.attach().unwrap();
    fails(&bench, &["export", "vol", "out", "--format", "qcow2", "--since", "a"], 1, &["attached by", "snapshot"]);
    ok(&bench, &with(&["a"]));
    host.detach().unwrap();
    assert!(!path(&bench, "out.partial").exists());
}

#[test]
fn what_has_changed_between_snapshots_is_printed() {
    let (bench, _) = with_full_exports(22);
    attached(&bench, async |e| {
        put(e, 3, 2, 0xee).await;
        e.discard(Lba(512 * 8), 8, false).await.unwrap();
    });
    ok(&bench, &["snapshot", "create", "vol", "b"]);
    let text = ok(&bench, &["snapshot", "diff", "vol", "a", "b"]);
    let words: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(words[..2], [["12288", "8192", "data"], ["2097152", "4096", "zero"]]);
    assert_eq!(text.lines().nth(2), Some("2 extents: 8192 bytes of data, 4096 bytes of zeros"));
    let told = json(&bench, &["snapshot", "diff", "vol", "a", "b", "--json"]);
    let want = serde_json::json!({
        "volume": "vol", "from": "a", "to": "b", "block_bytes": 4096, "size_bytes": 64 * MIB + 12288,
        "extents": [
            { "offset": 12288, "length": 8192, "kind": "data" }, { "offset": 2_097_152, "length": 4096, "kind": "zero" },
        ],
        "changed_bytes": 12288,
    });
    assert_eq!(told, want);
    let told = json(&bench, &["snapshot", "diff", "vol", "b", "--json"]);
    assert_eq!((&told["to"], &told["extents"]), (&Value::Null, &serde_json::json!([])));
    assert_eq!(ok(&bench, &["snapshot", "diff", "vol", "b"]), "0 extents: 0 bytes of data, 0 bytes of zeros\n");
    fails(&bench, &["snapshot", "diff", "vol", "a", "a"], 2, &["itself"]);
    fails(&bench, &["snapshot", "diff", "vol", "a", "x"], 1, &["no snapshot \"x\""]);
    fails(&bench, &["snapshot", "diff", "vol@a", "a", "b"], 2, &["name a volume"]);
}
