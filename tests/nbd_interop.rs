//! Real clients against `vb-ublk nbd`: libnbd's tools, QEMU's, and fio. All of them have to be there.

mod nbd_support;

use std::path::Path;
use std::process::{Command, Output};

use nbd_support::client::Headers;
use nbd_support::pattern;
use nbd_support::server::{Place, Server, Store};
use nbd_support::tls::Authority;
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// Runs a tool of the system: not one of another name that a user's PATH puts first.
#[track_caller]
fn tool(name: &str, args: &[&str]) -> Output {
    let out =
        Command::new(name).args(args).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C.UTF-8").output();
    out.unwrap_or_else(|e| panic!("{name} cannot be started ({e}): run scripts/setup test"))
}

#[track_caller]
fn ok(name: &str, args: &[&str]) -> String {
    let out = tool(name, args);
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    assert!(out.status.success(), "{name} {args:?}: {}\n{}{}", out.status, text(&out.stdout), text(&out.stderr));
    text(&out.stdout)
}

#[track_caller]
fn fails(name: &str, args: &[&str]) -> String {
    let out = tool(name, args);
    assert!(!out.status.success(), "{name} {args:?} should have failed: {out:?}");
    String::from_utf8_lossy(&out.stderr).into_owned()
}

#[track_caller]
fn json(name: &str, args: &[&str]) -> Value {
    serde_json::from_str(&ok(name, args)).expect("JSON")
}

/// A script for libnbd's shell, with `h` connected to `uri`. It is the system's Python that has libnbd.
#[track_caller]
fn nbdsh(uri: &str, script: &str) {
    let has = tool("/usr/bin/python3", &["-c", "import nbd"]);
    assert!(has.status.success(), "python3-libnbd is missing: run scripts/setup test");
    let head = "import nbd\nh = nbd.NBD()\nh.add_meta_context('base:allocation')\n";
    ok("/usr/bin/python3", &["-c", &format!("{head}h.connect_uri('{uri}')\n{script}")]);
}

fn text(path: &Path) -> &str {
    path.to_str().expect("text")
}

/// A raw image of 64 MiB with known bytes where partition tables and boot sectors are, data in clumps, and holes. It ends in data.
fn image(path: &Path) -> Vec<u8> {
    let mut all = vec![0; 64 << 20];
    for (n, at) in (1..).zip([0_usize, 512, 4096, 8192]) {
        all[at..at + 16]
            .copy_from_slice(format!("known bytes at {n}").as_bytes().first_chunk::<16>().expect("16 bytes"));
    }
    for n in 1..40_usize {
        let at = n * 1_600_000 + n * n * 100;
        let len = 512 * (1 + n * 37 % 300);
        all[at..at + len].copy_from_slice(&pattern(at as u64, 1, n as u64, len));
    }
    let end = all.len() - 1000;
    all[end..].copy_from_slice(&pattern(7, 1, 1, 1000));
    let file = std::fs::File::create(path).expect("an image");
    file.set_len(all.len() as u64).expect("its length");
    for at in (0..all.len()).step_by(4096).filter(|at| all[*at..*at + 4096].iter().any(|b| *b != 0)) {
        std::os::unix::fs::FileExt::write_all_at(&file, &all[at..at + 4096], at as u64).expect("data");
    }
    all
}

#[track_caller]
fn same(path: &Path, expected: &[u8]) {
    let found = std::fs::read(path).expect("what was read back");
    assert_eq!(found.len(), expected.len(), "{}", path.display());
    let differs = (0..found.len()).step_by(512).find(|at| found[*at..*at + 512] != expected[*at..*at + 512]);
    assert_eq!(differs, None, "the first sector that differs in {}", path.display());
}

fn uri(server: &Server, export: &str) -> String {
    server.addr().uri(export)
}

/// What goes in comes out again, whichever client took it in or out; and from the store alone, where the store outlives the server.
fn import(mut place: Place) {
    let (raw, back) = (place.path("image.raw"), place.path("back.raw"));
    let expected = image(&raw);
    let keeps = !matches!(place.store(), Store::Memory);
    for (round, host) in (0..).zip(["b", "c"]) {
        let server = place.serve("64M", &[]);
        let u = uri(&server, "vol");
        if round == 0 {
            ok("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", text(&raw), &u]);
        } else {
            ok("nbdcopy", &["--connections=4", text(&raw), &u]);
        }
        let server = if keeps {
            server.terminate();
            place.wipe_host();
            place.move_to(host);
            place.serve("64M", &[])
        } else {
            server
        };
        let u = uri(&server, "");
        let mut c = server.client(Headers::Structured);
        for (n, at) in (1..).zip([0, 512, 4096, 8192]) {
            assert_eq!(&c.read(at, 16)[..], format!("known bytes at {n}").as_bytes()[..16].as_ref(), "at {at}");
        }
        c.disconnect();
        ok("nbdcopy", &["--connections=4", &u, text(&back)]);
        same(&back, &expected);
        std::fs::remove_file(&back).expect("remove");
        ok("qemu-img", &["convert", "-f", "raw", "-O", "raw", &u, text(&back)]);
        same(&back, &expected);
        assert!(ok("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&raw), &u]).contains("identical"));
        // It must see a difference of one byte.
        let mut c = server.client(Headers::Structured);
        c.write(4097, b"X");
        assert!(tool("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&raw), &u]).status.code() == Some(1));
        c.disconnect();
        server.terminate();
    }
}

#[test]
fn an_image_goes_through_a_file_store_unchanged() {
    import(Place::file());
}

#[test]
fn an_image_goes_through_a_memory_store_unchanged() {
    import(Place::new(Store::Memory));
}

#[test]
fn an_image_goes_through_an_s3_store_unchanged() {
    if let Some(place) = Place::s3() {
        import(place);
    }
}

#[test]
fn nbdinfo_tells_all() {
    let place = Place::file();
    for v in ["alpha", "beta"] {
        place.create(v, "64M");
    }
    let server = place.start(&["--listen", "127.0.0.1:0"]);
    let u = uri(&server, "alpha");
    assert_eq!(ok("nbdinfo", &["--size", &u]).trim(), "67108864");
    let info = &json("nbdinfo", &["--json", &u])["exports"][0];
    assert_eq!((&info["export-name"], &info["export-size"]), (&Value::from("alpha"), &Value::from(64 * MIB)));
    for yes in ["can_cache", "can_df", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero"] {
        assert_eq!(info[yes], true, "{yes} in {info}");
    }
    assert_eq!(info["is_read_only"], false);
    assert_eq!((&info["block_size_preferred"], &info["block_size_maximum"]), (&4096.into(), &(32 << 20).into()));
    assert!(info["contexts"].as_array().expect("contexts").contains(&"base:allocation".into()), "{info}");
    let list = json("nbdinfo", &["--list", "--json", &uri(&server, "")]);
    let names: Vec<_> = list["exports"].as_array().expect("exports").iter().map(|e| &e["export-name"]).collect();
    assert!(names.len() == 2 && names.contains(&&"alpha".into()) && names.contains(&&"beta".into()), "{names:?}");
    fails("nbdinfo", &[&uri(&server, "gamma")]);

    nbdsh(&u, "h.pwrite(b'x' * 1048576, 8 << 20)\nh.pwrite(b'y' * 4096, 20 << 20)\nh.shutdown()");
    let map = json("nbdinfo", &["--map", "--json", &u]);
    let map: Vec<_> = map
        .as_array()
        .expect("extents")
        .iter()
        .map(|e| (e["offset"].as_u64(), e["length"].as_u64(), e["type"].as_u64()))
        .collect();
    let e = |offset: u64, length: u64, kind: u64| (Some(offset), Some(length), Some(kind));
    let expected = [
        e(0, 8 * MIB, 3),
        e(8 * MIB, MIB, 0),
        e(9 * MIB, 11 * MIB, 3),
        e(20 * MIB, 4096, 0),
        e(20 * MIB + 4096, 44 * MIB - 4096, 3),
    ];
    assert_eq!(map, expected);
    server.terminate();
}

#[test]
fn nbdcopy_copies_between_volumes() {
    let place = Place::file();
    let (raw, back) = (place.path("image.raw"), place.path("back.raw"));
    let expected = image(&raw);
    for v in ["one", "two"] {
        place.create(v, "64M");
    }
    let server = place.start(&["--listen", "127.0.0.1:0"]);
    let (one, two) = (uri(&server, "one"), uri(&server, "two"));
    ok("nbdcopy", &["--connections=4", "--requests=64", "--flush", text(&raw), &one]);
    ok("nbdcopy", &["--connections=4", &one, &two]);
    ok("nbdcopy", &["--connections=4", "--allocated", &two, text(&back)]);
    same(&back, &expected);
    // Over what is there already, and with zeros asked to be written.
    std::fs::write(&raw, vec![0; 64 << 20]).expect("zeros");
    ok("nbdcopy", &["--connections=4", "--allocated", text(&raw), &one]);
    ok("nbdcopy", &["--connections=4", &one, text(&back)]);
    same(&back, &vec![0; 64 << 20]);
    server.terminate();
}

#[test]
fn nbdsh_finds_what_the_protocol_promises() {
    let place = Place::file();
    let server = place.serve("64M", &[]);
    nbdsh(&uri(&server, "vol"), include_str!("nbd_support/script.py"));
    // Over a unix socket, too.
    let socket = place.path("nbd.sock");
    let unix = place.start(&["--unix", text(&socket), "--volume", "other", "--create-size", "64M"]);
    nbdsh(&uri(&unix, ""), include_str!("nbd_support/script.py"));
    unix.terminate();
    server.terminate();
}

#[test]
fn qemu_img_converts_compares_and_maps() {
    let place = Place::file();
    let (raw, cow, back) = (place.path("image.raw"), place.path("image.qcow2"), place.path("back.raw"));
    let expected = image(&raw);
    let server = place.serve("64M", &[]);
    let u = uri(&server, "vol");
    let info = json("qemu-img", &["info", "--output=json", "-f", "raw", &u]);
    assert_eq!(info["virtual-size"], 64 * MIB);
    ok("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&cow)]);
    // Into a volume that is known to be empty, no zeros are written.
    ok("qemu-img", &["convert", "-n", "--target-is-zero", "-W", "-m", "8", "-f", "qcow2", "-O", "raw", text(&cow), &u]);
    ok("qemu-img", &["convert", "-f", "raw", "-O", "raw", &u, text(&back)]);
    same(&back, &expected);
    assert!(ok("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", text(&cow), &u]).contains("identical"));
    let map = json("qemu-img", &["map", "--output=json", "-f", "raw", &u]);
    let data = |e: &&Value| e["data"] == true;
    let mapped: u64 =
        map.as_array().expect("extents").iter().filter(data).map(|e| e["length"].as_u64().expect("a length")).sum();
    let written = expected.chunks(4096).filter(|b| b.iter().any(|b| *b != 0)).count() as u64 * 4096;
    assert!(mapped >= written && mapped < 16 * MIB, "{mapped} bytes mapped, {written} written");
    // Over what is there: all else becomes zeros.
    let mut c = server.client(Headers::Simple);
    c.write(30 * MIB, &vec![0xdd; 8 << 20]);
    c.disconnect();
    ok("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", text(&raw), &u]);
    ok("qemu-img", &["convert", "-O", "qcow2", "-f", "raw", &u, text(&cow)]);
    ok("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&cow), text(&back)]);
    same(&back, &expected);
    // A qcow2 image *in* the volume is bytes like any other.
    ok("qemu-img", &["create", "-f", "qcow2", &u, "32M"]);
    ok("qemu-io", &["-f", "qcow2", "-c", "write -P 0x33 1M 3M", "-c", "read -P 0x33 1M 3M", &u]);
    ok("qemu-img", &["check", "-f", "qcow2", &u]);
    server.terminate();
}

#[test]
fn qemu_io_patterns_are_read_back() {
    let place = Place::file();
    let server = place.serve("64M", &[]);
    let u = uri(&server, "vol");
    let io = |commands: &[&str]| {
        let mut args = vec!["-f", "raw"];
        commands.iter().for_each(|c| args.extend(["-c", c]));
        args.push(&u);
        // Its exit code says nothing of a pattern that does not fit.
        let said = ok("qemu-io", &args);
        assert!(!said.contains("Pattern verification failed") && !said.contains("error"), "{said}");
    };
    let fill = ["write -P 0xa1 0 1M", "write -f -P 0xa2 512 512", "write -P 0xa3 1000 3000", "flush"];
    io(&fill);
    let seen = ["read -P 0xa1 0 512", "read -P 0xa2 512 488", "read -P 0xa3 1000 3000", "read -P 0xa1 4000 1044576"];
    io(&seen);
    io(&["write -z 64k 64k", "discard 256k 64k", "write -z -u 512k 4k"]);
    io(&[
        "read -P 0 64k 64k",
        "read -P 0 256k 64k",
        "read -P 0 512k 4k",
        "read -P 0xa1 128k 128k",
        "read -P 0xa1 516k 508k",
    ]);
    io(&[
        "aio_write -P 7 2M 1M",
        "aio_write -P 8 3M 1M",
        "aio_flush",
        "aio_read -P 7 2M 1M",
        "aio_read -P 8 3M 1M",
        "aio_flush",
    ]);
    // The tool does see it when a pattern is another.
    let said = String::from_utf8(tool("qemu-io", &["-f", "raw", "-c", "read -P 9 2M 1M", &u]).stdout).expect("text");
    assert!(said.contains("Pattern verification failed"), "{said}");
    server.terminate();
    let server = place.serve("64M", &[]);
    let u = uri(&server, "vol");
    let said = ok("qemu-io", &["-r", "-f", "raw", "-c", "read -P 8 3M 1M", "-c", "read -P 0xa3 1000 3000", &u]);
    assert!(!said.contains("failed"), "{said}");
}

#[test]
fn fio_verifies_on_four_connections() {
    assert!(ok("fio", &["--enghelp"]).contains("nbd"), "fio without its nbd engine: run scripts/setup test");
    let place = Place::file();
    let server = place.serve("256M", &["--wal-size", "128M"]);
    let size = if nbd_support::soak() { "48m" } else { "12m" };
    let job = |server: &Server, mode: &str| {
        let u = format!("--uri={}", uri(server, "vol"));
        let size = format!("--size={size}");
        let args = [
            "--name=four",
            "--ioengine=nbd",
            &u,
            "--rw=randwrite",
            "--bsrange=512-128k",
            "--bs_unaligned=0",
            "--numjobs=4",
            "--offset_increment=64m",
            &size,
            "--iodepth=16",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--fsync=64",
            mode,
            "--randrepeat=1",
            "--group_reporting=1",
            "--thread=0",
        ];
        let said = ok("fio", &args);
        assert!(said.contains("err= 0"), "{said}");
        args.map(str::to_owned)
    };
    job(&server, "--do_verify=1");
    server.terminate();
    place.wipe_host();
    let server = place.serve("256M", &["--wal-size", "128M"]);
    let args = job(&server, "--verify_only");
    // One byte in the midst of a block that fio wrote: it must see it.
    let mut c = server.client(Headers::Simple);
    let map = c.read(0, 8 << 20);
    let at = map.chunks(512).position(|s| s.iter().all(|b| *b != 0)).map_or(4096, |n| n * 512 + 300);
    c.write(at as u64, &[!map[at]]);
    c.disconnect();
    fails("fio", &args.each_ref().map(String::as_str));
    server.terminate();
}

/// A client's certificate of the authority's, with the names that libnbd and QEMU look for.
fn client_folder(place: &Place, name: &str, authority: &Authority) -> std::path::PathBuf {
    let dir = place.path(name);
    std::fs::create_dir(&dir).expect("a folder");
    std::fs::copy(authority.file("ca.pem"), dir.join("ca-cert.pem")).expect("copy");
    let at = |f: &str| text(&dir.join(f)).to_owned();
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=client"];
    ok("openssl", &[&["req", "-keyout", &at("client-key.pem"), "-out", &at("csr")], &key[..]].concat());
    // Without an extension it would be of version 1, which rustls takes for none.
    std::fs::write(dir.join("ext"), "basicConstraints=CA:FALSE\nextendedKeyUsage=clientAuth\n").expect("write");
    let (ca, ca_key) = (authority.file("ca.pem"), authority.file("ca.key"));
    let sign =
        ["x509", "-req", "-in", &at("csr"), "-CA", text(&ca), "-CAkey", text(&ca_key), "-CAcreateserial", "-days", "2"];
    ok("openssl", &[&sign[..], &["-extfile", &at("ext"), "-out", &at("client-cert.pem")]].concat());
    dir
}

/// The server's folder, with QEMU's names.
fn server_folder(place: &Place, name: &str, authority: &Authority, clients_too: bool) -> std::path::PathBuf {
    let dir = place.path(name);
    std::fs::create_dir(&dir).expect("a folder");
    for (from, to) in [("server.pem", "server-cert.pem"), ("server.key", "server-key.pem"), ("ca.pem", "ca-cert.pem")] {
        if to != "ca-cert.pem" || clients_too {
            std::fs::copy(authority.file(from), dir.join(to)).expect("copy");
        }
    }
    dir
}

#[test]
fn tls_with_libnbd_and_qemu() {
    let place = Place::file();
    let (raw, back) = (place.path("image.raw"), place.path("back.raw"));
    let expected = image(&raw);
    let (ours, others) = (Authority::new(), Authority::new());
    let with = client_folder(&place, "with", &ours);
    let foreign = client_folder(&place, "foreign", &others);
    let without = place.path("without");
    std::fs::create_dir(&without).expect("a folder");
    std::fs::copy(with.join("ca-cert.pem"), without.join("ca-cert.pem")).expect("copy");
    for (clients_too, name) in [(false, "server-only"), (true, "both")] {
        let dir = server_folder(&place, name, &ours, clients_too);
        let server = place.serve("64M", &["--tls-certs", text(&dir), "--tls", "required"]);
        let nbds = |folder: &Path| {
            format!("{}?tls-certificates={}", uri(&server, "vol").replace("nbd:", "nbds:"), text(folder))
        };
        ok("nbdcopy", &["--connections=4", text(&raw), &nbds(&with)]);
        ok("nbdcopy", &["--connections=4", &nbds(&with), text(&back)]);
        same(&back, &expected);
        assert_eq!(json("nbdinfo", &["--json", &nbds(&with)])["protocol"], "newstyle-fixed");
        assert_eq!(json("nbdinfo", &["--json", &nbds(&with)])["TLS"], true);
        // In the clear, or with an authority that is another's: nothing.
        fails("nbdinfo", &[&uri(&server, "vol")]);
        fails("nbdinfo", &[&nbds(&foreign)]);
        // Who has no certificate is let in where none is asked for.
        let bare = tool("nbdinfo", &["--size", &nbds(&without)]);
        assert_eq!(bare.status.success(), !clients_too, "{bare:?}");

        let qemu = |folder: &Path| {
            let nbd_support::client::Addr::Tcp(addr) = server.addr() else { panic!("TLS over TCP") };
            let creds = format!("tls-creds-x509,id=tls0,dir={},endpoint=client", text(folder));
            let image = format!("driver=nbd,host={},port={},export=vol,tls-creds=tls0", addr.ip(), addr.port());
            tool("qemu-img", &["convert", "-O", "raw", "--object", &creds, "--image-opts", &image, text(&back)])
        };
        std::fs::remove_file(&back).expect("remove");
        let out = qemu(&with);
        assert!(out.status.success(), "{out:?}");
        same(&back, &expected);
        assert!(!qemu(&foreign).status.success(), "an authority that is another's");
        server.terminate();
    }
    // Allowed: both ways in.
    let server = place.serve("64M", &["--tls-certs", text(&place.path("server-only")), "--tls", "allowed"]);
    assert_eq!(ok("nbdinfo", &["--size", &uri(&server, "vol")]).trim(), "67108864");
    let nbds = format!("{}?tls-certificates={}", uri(&server, "vol").replace("nbd:", "nbds:"), text(&with));
    assert_eq!(ok("nbdinfo", &["--size", &nbds]).trim(), "67108864");
    server.terminate();
}
