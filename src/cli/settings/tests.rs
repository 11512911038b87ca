//! Which of several places a setting comes from.

use super::*;

fn resolve(global: &Global, env: &[(&str, &str)], file: &str) -> Result<Settings> {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("c.toml");
    std::fs::write(&path, file).expect("write");
    let global = Global { config: Some(path), ..global.clone() };
    let env = |name: &str| env.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
    Settings::resolve(&global, &Surroundings { env: &env, root: true })
}

#[test]
fn flag_then_environment_then_file_then_default() {
    let file = "store = \"file:///file\"\nrun-dir = \"/file\"\nendpoint = \"http://file\"\nprofile = \"file\"\n";
    let none = Global::default();
    let flags = Global {
        store: Some("file:///flag".into()),
        run_dir: Some("/flag".into()),
        endpoint: Some("http://flag".into()),
        ..Global::default()
    };
    let env = [
        ("VB_UBLK_STORE", "file:///env"),
        ("VB_UBLK_RUN_DIR", "/env"),
        ("AWS_HOST", "env"),
        ("AWS_ACCESS_KEY_ID", "k"),
    ];
    let seen = |g: &Global, env: &[(&str, &str)], file: &str| {
        let s = resolve(g, env, file).expect("resolve");
        (s.store.to_string(), s.run_dir.display().to_string(), s.store_options.endpoint, s.store_options.profile)
    };
    let some = |s: &str| Some(s.to_owned());
    assert_eq!(seen(&flags, &env, file), ("file:///flag".into(), "/flag".into(), some("http://flag"), None));
    assert_eq!(seen(&none, &env, file), ("file:///env".into(), "/env".into(), None, None));
    assert_eq!(seen(&none, &[], file), ("file:///file".into(), "/file".into(), some("http://file"), some("file")));
    assert_eq!(seen(&none, &[], ""), ("file:///var/lib/vb-ublk/store".into(), "/run/vb-ublk".into(), None, None));
    assert!(resolve(&none, &[], "").expect("default").store_options.create);
    assert!(!resolve(&none, &[], file).expect("file").store_options.create);
}

#[test]
fn a_bucket_is_a_short_store() {
    let flag = Global { bucket: Some("flag".into()), ..Global::default() };
    let store = |g: &Global, env: &[(&str, &str)], file: &str| resolve(g, env, file).expect("store").store.to_string();
    assert_eq!(store(&flag, &[("AWS_BUCKET", "env")], "bucket = \"file\""), "s3://flag");
    assert_eq!(store(&Global::default(), &[("AWS_BUCKET", "env")], "bucket = \"file\""), "s3://env");
    assert_eq!(store(&Global::default(), &[("AWS_BUCKET", "")], "bucket = \"file\""), "s3://file");
    let bad = Global { bucket: Some("a b".into()), ..Global::default() };
    assert_eq!(resolve(&bad, &[], "").expect_err("bad bucket").kind(), ErrorKind::Usage);
}

#[test]
fn insecure_is_a_yes_or_no() {
    let none = Global::default();
    let insecure = |env: &[(&str, &str)], file: &str| resolve(&none, env, file).map(|s| s.store_options.insecure);
    assert!(insecure(&[("VB_UBLK_INSECURE", "true")], "").expect("env"));
    assert!(!insecure(&[("VB_UBLK_INSECURE", "0")], "insecure = true").expect("env first"));
    assert!(insecure(&[], "insecure = true").expect("file"));
    assert!(insecure(&[("VB_UBLK_INSECURE", "maybe")], "").is_err());
}

#[test]
fn what_add_does_unless_told_otherwise() {
    let none = Global::default();
    let add = |env: &[(&str, &str)], file: &str| resolve(&none, env, file).map(|s| s.add);
    let file = "queues = 1\ndepth = 2\nwal-dir = \"/file\"\nwal-size = \"3G\"\ncache-dir = \"/cf\"\ncache-size = 0\nflush = \"store\"\ngc-garbage = \"off\"\nio-timeout = 8\nmetrics = 7\n\
                strict = true\n";
    let from_file = AddDefaults {
        queues: Some(1),
        depth: Some(2),
        log: Some(LogPlace::Dir("/file".into())),
        wal_size: Some(ByteSize(3 << 30)),
        cache: CacheArgs { cache_dir: Some("/cf".into()), cache_size: Some(ByteSize(0)) },
        flush: Some(FlushTo::Store),
        gc_garbage: Some(GarbageLimit(None)),
        io_timeout: Some(8),
        metrics: Some("127.0.0.1:7".parse().expect("address")),
        strict: true,
    };
    assert_eq!(add(&[], "").expect("nothing"), AddDefaults::default());
    assert_eq!(add(&[], file).expect("file"), from_file);
    let empty = [
        "QUEUES",
        "DEPTH",
        "WAL_DIR",
        "WAL_DEVICE",
        "WAL_SIZE",
        "CACHE_DIR",
        "CACHE_SIZE",
        "FLUSH",
        "GC_GARBAGE",
        "IO_TIMEOUT",
        "METRICS",
        "STRICT",
    ]
    .map(|n| format!("VB_UBLK_{n}"));
    let empty: Vec<_> = empty.iter().map(|n| (n.as_str(), "")).collect();
    assert_eq!(add(&empty, file).expect("empty is not set"), from_file);
    let env = [
        ("VB_UBLK_QUEUES", "4"),
        ("VB_UBLK_DEPTH", "5"),
        ("VB_UBLK_WAL_DEVICE", "/dev/env"),
        ("VB_UBLK_WAL_SIZE", "6G"),
        ("VB_UBLK_CACHE_DIR", "/ce"),
        ("VB_UBLK_CACHE_SIZE", "8G"),
        ("VB_UBLK_FLUSH", "wal"),
        ("VB_UBLK_GC_GARBAGE", "25%"),
        ("VB_UBLK_IO_TIMEOUT", "9"),
        ("VB_UBLK_METRICS", "[::1]:0"),
        ("VB_UBLK_STRICT", "no"),
    ];
    let from_env = AddDefaults {
        queues: Some(4),
        depth: Some(5),
        log: Some(LogPlace::Device("/dev/env".into())),
        wal_size: Some(ByteSize(6 << 30)),
        cache: CacheArgs { cache_dir: Some("/ce".into()), cache_size: Some(ByteSize(8 << 30)) },
        flush: Some(FlushTo::Wal),
        gc_garbage: Some(GarbageLimit(Some(25))),
        io_timeout: Some(9),
        metrics: Some("[::1]:0".parse().expect("address")),
        strict: false,
    };
    assert_eq!(add(&env, file).expect("env"), from_env);
    let device = add(&[("VB_UBLK_WAL_DIR", "/env")], "wal-device = \"/dev/file\"").expect("another form");
    assert_eq!(device.log, Some(LogPlace::Dir("/env".into())));
    for (name, value) in [
        ("VB_UBLK_QUEUES", "many"),
        ("VB_UBLK_QUEUES", "-1"),
        ("VB_UBLK_DEPTH", "70000"),
        ("VB_UBLK_WAL_SIZE", "1GB"),
        ("VB_UBLK_FLUSH", "disk"),
        ("VB_UBLK_GC_GARBAGE", "4%"),
        ("VB_UBLK_METRICS", "70000"),
        ("VB_UBLK_STRICT", "perhaps"),
    ] {
        let e = add(&[(name, value)], "").expect_err(name);
        assert_eq!(e.kind(), ErrorKind::Usage);
        assert!(e.to_string().contains(name) && e.to_string().contains(value), "{e}");
    }
    for (text, word) in [("metrics = \"here\"", "here"), ("metrics = 65536", "65536"), ("metrics = true", "number")] {
        let e = add(&[], text).expect_err(text);
        assert!(e.kind() == ErrorKind::Usage && e.to_string().contains(word), "{e}");
    }
}

#[test]
fn what_nbd_does_unless_told_otherwise() {
    let none = Global::default();
    let nbd = |env: &[(&str, &str)], file: &str| resolve(&none, env, file).map(|s| s.nbd);
    let addresses = |all: &[&str]| all.iter().map(|a| a.parse().expect("address")).collect::<Vec<_>>();
    let file = "listen = [\"127.0.0.1:1\", \"::1\"]\nunix = \"/file\"\ntls-certs = \"/file\"\ntls = \"allowed\"\n\
                insecure-listen = true\nmax-connections = 1\nworkers = 2\nlinger = 3\n";
    let from_file = NbdDefaults {
        listen: addresses(&["127.0.0.1:1", "[::1]:10809"]),
        unix: vec!["/file".into()],
        tls_certs: Some("/file".into()),
        tls: Some(TlsMode::Allowed),
        insecure_listen: true,
        max_connections: Some(1),
        workers: Some(2),
        linger: Some(3),
    };
    assert_eq!(nbd(&[], "").expect("nothing"), NbdDefaults::default());
    assert_eq!(nbd(&[], file).expect("file"), from_file);
    let env = [
        ("VB_UBLK_LISTEN", "127.0.0.1:7, [::1]:8"),
        ("VB_UBLK_UNIX", "/env:/more"),
        ("VB_UBLK_TLS_CERTS", "/env"),
        ("VB_UBLK_TLS", "required"),
        ("VB_UBLK_INSECURE_LISTEN", "no"),
        ("VB_UBLK_MAX_CONNECTIONS", "4"),
        ("VB_UBLK_WORKERS", "5"),
        ("VB_UBLK_LINGER", "6"),
    ];
    let empty: Vec<_> = env.iter().map(|(n, _)| (*n, "")).collect();
    assert_eq!(nbd(&empty, file).expect("empty is not set"), from_file);
    let from_env = NbdDefaults {
        listen: addresses(&["127.0.0.1:7", "[::1]:8"]),
        unix: vec!["/env".into(), "/more".into()],
        tls_certs: Some("/env".into()),
        tls: Some(TlsMode::Required),
        insecure_listen: false,
        max_connections: Some(4),
        workers: Some(5),
        linger: Some(6),
    };
    assert_eq!(nbd(&env, file).expect("env"), from_env);
    for (name, value) in [
        ("VB_UBLK_LISTEN", "here"),
        ("VB_UBLK_TLS", "perhaps"),
        ("VB_UBLK_INSECURE_LISTEN", "perhaps"),
        ("VB_UBLK_MAX_CONNECTIONS", "70000"),
        ("VB_UBLK_WORKERS", "many"),
        ("VB_UBLK_LINGER", "-1"),
    ] {
        let e = nbd(&[(name, value)], "").expect_err(name);
        assert!(e.kind() == ErrorKind::Usage && e.to_string().contains(name) && e.to_string().contains(value), "{e}");
    }
    for (text, word) in [("listen = [\"here\"]", "here"), ("tls = \"perhaps\"", "perhaps"), ("unix = 7", "text")] {
        let e = nbd(&[], text).expect_err(text);
        assert!(e.kind() == ErrorKind::Usage && e.to_string().contains(word), "{e}");
    }
}

#[test]
fn an_ordinary_user_has_folders_of_their_own() {
    let of = |env: &[(&str, &str)]| {
        let env = |name: &str| env.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
        let around = Surroundings { env: &env, root: false };
        (default_data_dir(&around).ok(), default_run_dir(&around).ok())
    };
    let paths = |a: &str, b: &str| (Some(a.into()), Some(b.into()));
    assert_eq!(of(&[("HOME", "/h"), ("XDG_RUNTIME_DIR", "/r")]), paths("/h/.local/state/vb-ublk", "/r/vb-ublk"));
    assert_eq!(of(&[("HOME", "/h"), ("XDG_STATE_HOME", "/s")]), paths("/s/vb-ublk", "/s/vb-ublk/run"));
    assert_eq!(of(&[("HOME", "relative")]), (None, None));
}
