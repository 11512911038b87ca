//! The built binary, as people and scripts use it.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

/// A command in surroundings of its own: no settings of this host, no rights beyond the folder.
struct Bench {
    dir: TempDir,
}

impl Bench {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("dir") }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn config(&self, text: &str) {
        std::fs::write(self.path().join("config.toml"), text).expect("config");
    }

    fn command(&self, args: &[&str]) -> Command {
        let config = self.path().join("config.toml");
        if !config.exists() {
            self.config("");
        }
        let mut c = Command::new(env!("CARGO_BIN_EXE_vb-ublk"));
        c.args(args)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("VB_UBLK_DATA_DIR", self.path().join("data"))
            .env("VB_UBLK_RUN_DIR", self.path().join("run"))
            .env("VB_UBLK_CONFIG", config)
            .stdin(Stdio::null());
        c
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("start")
    }

    fn ok(&self, args: &[&str]) -> String {
        let out = self.run(args);
        assert!(out.status.success(), "{args:?}: {out:?}");
        String::from_utf8(out.stdout).expect("text")
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.ok(args)).expect("JSON")
    }

    /// The one line on stderr of a command that has to fail with `code`.
    #[track_caller]
    fn fails(&self, args: &[&str], code: i32) -> String {
        failed(&self.run(args), code)
    }
}

#[track_caller]
fn failed(out: &Output, code: i32) -> String {
    let err = String::from_utf8(out.stderr.clone()).expect("text");
    assert_eq!(out.status.code(), Some(code), "{err}");
    assert_eq!(err.lines().count(), 1, "one line: {err}");
    assert!(err.starts_with("vb-ublk: ") && !err.contains("panicked") && !err.contains('\x1b'), "{err}");
    assert!(out.stdout.is_empty(), "{:?}", out.stdout);
    err
}

fn has_driver() -> bool {
    Path::new("/dev/ublk-control").exists()
}

#[test]
fn bad_usage_is_one_line_and_code_2() {
    let b = Bench::new();
    for (args, word) in [
        (&[][..], "--help"),
        (&["frobnicate"], "frobnicate"),
        (&["add"], "--volume"),
        (&["add", "--volume", "../etc"], "letter or a digit"),
        (&["add", "--volume", "v", "--create", "--size", "10GB"], "powers of 1024"),
        (&["add", "--volume", "v", "--create", "--size", "100"], "steps of 4K"),
        (&["add", "--volume", "v", "--wal-size", "1M"], "64M"),
        (&["add", "--volume", "v", "--wal-dir", "/x", "--wal-device", "/dev/x"], "cannot be used"),
        (&["add", "--volume", "v", "--queues", "0"], "--queues"),
        (&["add", "--volume", "v", "--metrics", "localhost:1"], "127.0.0.1:9150"),
        (&["add", "--volume", "v", "--logical-block-size", "1024"], "512 or 4096"),
        (&["del"], "--all"),
        (&["list", "--store", "ftp://x"], "scheme is unknown"),
        (&["list", "--store", "file:///x", "--bucket", "b"], "cannot be used"),
        (&["list", "-v", "-q"], "cannot be used"),
        (&["volume", "create", "v"], "--size"),
        (&["volume", "create", "v", "--size", "0"], "steps of 4K"),
        (&["volume", "rebuild"], "VOLUME"),
        (&["volume", "rebuild", "v", "--size", "100"], "steps of 4K"),
        (&["volume", "rebuild", "v", "--wal-dir", "/x", "--wal-device", "/dev/x"], "cannot be used"),
        (&["completions", "klingon"], "klingon"),
    ] {
        let line = b.fails(args, 2);
        assert!(line.contains(word), "{args:?}: {line}");
    }
}

#[test]
fn help_and_version_go_to_stdout() {
    let b = Bench::new();
    assert!(b.ok(&["--version"]).starts_with("vb-ublk "));
    for command in
        ["add", "nbd", "del", "list", "status", "features", "volume", "import", "export", "wal", "completions", "man"]
    {
        assert!(b.ok(&["--help"]).contains(command));
        assert!(b.ok(&[command, "--help"]).contains("--store"), "{command}");
    }
}

#[test]
fn without_a_driver_it_says_so_in_plain_words() {
    let b = Bench::new();
    if has_driver() {
        println!("SKIPPED: this host has a ublk driver");
        return;
    }
    for args in [
        &["features"][..],
        &["features", "--json"],
        &["add", "--volume", "v"],
        &["add", "--volume", "v", "--foreground"],
    ] {
        let line = b.fails(args, 1);
        assert!(line.contains("modprobe ublk_drv"), "{line}");
    }
    // Nothing is left behind by an attempt that could not work.
    assert!(!b.path().join("run").exists() && !b.path().join("data").exists());
}

#[test]
fn an_empty_host_has_nothing_attached() {
    let b = Bench::new();
    assert!(b.ok(&["list"]).starts_with("DEVICE"));
    assert_eq!(b.json(&["list", "--json"]), Value::Array(vec![]));
    assert_eq!(b.json(&["status", "--json"]), Value::Array(vec![]));
    assert!(b.ok(&["status"]).contains("no volume"));
    assert!(b.fails(&["status", "v"], 1).contains("not attached"));
    assert!(b.fails(&["del", "--volume", "v"], 1).contains("not attached"));
    assert!(b.fails(&["del", "-n", "7"], 1).contains("/dev/ublkb7"));
    b.ok(&["del", "--all"]);
}

/// The state file of a daemon that is dead.
fn leave_a_dead_one(b: &Bench) {
    let run = b.path().join("run");
    std::fs::create_dir_all(&run).expect("run");
    let state = serde_json::json!({
        "version": 1, "volume": "v", "pid": 1_999_999_999, "started_unix_secs": 1, "device": 1_000_000,
        "store": "file:///s", "wal": "/srv/v.wal", "daemon_log": null, "failure": null,
    });
    std::fs::write(run.join("v.json"), state.to_string()).expect("state");
}

#[test]
fn a_dead_daemon_is_shown_and_cleared_up() {
    let b = Bench::new();
    leave_a_dead_one(&b);
    let text = b.ok(&["list"]);
    assert!(text.contains("/dev/ublkb1000000") && text.contains("dead") && text.contains("del --volume v"), "{text}");
    let list = b.json(&["list", "--json"]);
    assert_eq!((&list[0]["state"], &list[0]["pid"]), (&Value::from("dead"), &Value::from(1_999_999_999)));
    assert_eq!(b.json(&["status", "v", "--json"])["volume"], "v");
    assert!(b.ok(&["status", "v"]).contains("store: file:///s\n"));
    let said = b.ok(&["del", "-n", "1000000"]);
    assert!(said.contains("/srv/v.wal") && said.contains("vb-ublk add"), "{said}");
    assert_eq!(b.json(&["list", "--json"]), Value::Array(vec![]));
}

#[test]
fn a_damaged_state_is_named() {
    let b = Bench::new();
    leave_a_dead_one(&b);
    std::fs::write(b.path().join("run/w.json"), "{").expect("state");
    let list = b.json(&["list", "--json"]);
    assert_eq!((&list[0]["state"], &list[1]["state"]), (&Value::from("dead"), &Value::from("unknown")));
    assert!(b.fails(&["status", "w"], 1).contains("w.json"));
    let out = b.run(&["del", "--all"]);
    let err = String::from_utf8(out.stderr).expect("text");
    assert_eq!(out.status.code(), Some(1));
    assert!(err.contains("w.json") && err.contains("not detached: w;"), "{err}");
}

#[test]
fn volumes_are_made_listed_shown_and_deleted() {
    let b = Bench::new();
    assert_eq!(b.ok(&["volume", "list"]), "");
    assert_eq!(b.json(&["volume", "list", "--json"]), Value::Array(vec![]));
    assert!(b.ok(&["volume", "create", "b", "--size", "64M"]).contains("64 MiB"));
    let made = b.json(&["volume", "create", "a", "--size", "10G", "--logical-block-size", "4096", "--json"]);
    assert_eq!((&made["name"], &made["size_bytes"]), (&Value::from("a"), &Value::from(10_u64 << 30)));
    assert_eq!(b.ok(&["volume", "list"]), "a\nb\n");
    assert_eq!(b.json(&["volume", "list", "--json"]), serde_json::json!(["a", "b"]));
    let info = b.json(&["volume", "info", "a", "--json"]);
    assert_eq!((&info["uuid"], &info["logical_block"]), (&made["uuid"], &Value::from(4096)));
    assert!(b.ok(&["volume", "info", "a"]).contains("size: 10 GiB (10737418240)\n"));
    assert!(b.fails(&["volume", "create", "a", "--size", "1G"], 1).contains("already"));
    assert!(b.ok(&["volume", "delete", "a"]).contains("deleted"));
    assert_eq!(b.ok(&["volume", "list"]), "b\n");
    for args in [&["volume", "info", "a"][..], &["volume", "delete", "a"], &["volume", "rebuild", "a"]] {
        let line = b.fails(args, 1);
        assert!(line.contains('a') && line.contains("file://"), "{line}");
    }
    assert_eq!(b.json(&["volume", "delete", "b", "--json"])["volume"], "b");
}

#[test]
fn flag_then_environment_then_file_then_default() {
    let b = Bench::new();
    let store = |name: &str| format!("file://{}", b.path().join(name).display());
    for place in ["flag", "env", "bucketless", "file", "default"] {
        let args = ["volume", "create", place, "--size", "1M", "--store", &store(place)];
        b.ok(if place == "default" { &args[..5] } else { &args });
    }
    let list = |flag: Option<&str>, env: Option<&str>| {
        let mut c = b.command(&["volume", "list"]);
        flag.map(|f| c.args(["--store", &store(f)]));
        env.map(|e| c.env("VB_UBLK_STORE", store(e)));
        let out = c.output().expect("start");
        assert!(out.status.success(), "{out:?}");
        String::from_utf8(out.stdout).expect("text")
    };
    assert_eq!(list(None, None), "default\n");
    b.config(&format!("store = {:?}\n", store("file")));
    assert_eq!(list(None, None), "file\n");
    assert_eq!(list(None, Some("env")), "env\n");
    assert_eq!(list(Some("flag"), Some("env")), "flag\n");
}

/// The options in a help text: the long name, and what is said about it.
fn options_in(help: &str) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = Vec::new();
    for line in help.lines() {
        let text = line.trim();
        if text.starts_with('-') {
            let (_, long) = text.split_once("--").expect("a long name");
            let end = long.find(|c: char| c != '-' && !c.is_ascii_alphanumeric()).unwrap_or(long.len());
            found.push((long[..end].to_owned(), String::new()));
        } else if !line.starts_with(' ') {
            // A heading: what follows is not about the option before it.
            continue;
        }
        if let Some((_, said)) = found.last_mut() {
            said.push_str(text);
            said.push(' ');
        }
    }
    found
}

/// What the help says at its end, and the tables of the README: where a setting is looked for.
#[test]
fn the_help_is_right_about_environment_and_file() {
    let b = Bench::new();
    let help = b.ok(&["--help"]);
    assert!(
        help.split_whitespace().collect::<Vec<_>>().join(" ").contains("An option with an [env: ...] is looked for")
    );
    let readme = include_str!("../README.md");
    let mut seen = Vec::new();
    let options = ["add", "nbd"].map(|command| options_in(&b.ok(&[command, "--help"])));
    for (option, said) in options.into_iter().flatten() {
        // A list of lists is a value of no setting.
        b.config(&format!("{option} = [[]]\n"));
        let line = b.fails(&["list"], 2);
        let known = !line.contains("unknown field");
        assert_eq!(said.contains("[env:") && option != "config", known, "{option}: {said}\n{line}");
        let Some((_, variables)) = said.split_once("[env: ") else { continue };
        let variables = variables.split([';', ']']).next().expect("the names").split(", ").map(str::trim);
        let named = |l: &str| [" ", "`"].iter().any(|end| l.contains(&format!("`--{option}{end}")));
        let row = |l: &&str| l.starts_with("| `--") && named(l) && l.contains('_');
        let row = readme.lines().find(row).unwrap_or_else(|| panic!("no row for --{option} in the README"));
        for variable in variables {
            assert!(row.contains(&format!("`{variable}`")), "{option}: {variable} is not in {row}");
            seen.push(variable.to_owned());
        }
        assert!(option == "config" || readme.contains(&format!("`{option}`")), "{option}: no key in the README");
    }
    for expected in [
        "VB_UBLK_STORE",
        "AWS_BUCKET",
        "VB_UBLK_QUEUES",
        "VB_UBLK_WAL_DEVICE",
        "VB_UBLK_STRICT",
        "VB_UBLK_LISTEN",
        "VB_UBLK_LINGER",
    ] {
        assert!(seen.iter().any(|s| s == expected), "{expected} is not in {seen:?}");
    }
}

/// Each of these is refused before anything is done, so it can be seen without a driver that it was read.
#[test]
fn settings_of_add_come_from_the_environment_and_the_file() {
    let b = Bench::new();
    let add = |env: &[(&str, &str)], file: &str, more: &[&str]| {
        b.config(file);
        b.command(&["add", "--volume", "v"]).args(more).envs(env.iter().copied()).output().expect("start")
    };
    for (variable, bad, file, word, flag) in [
        ("VB_UBLK_QUEUES", "33", "queues = 33", "33 queues", ["--queues", "2"]),
        ("VB_UBLK_DEPTH", "0", "depth = 0", "depth 0", ["--depth", "64"]),
        ("VB_UBLK_WAL_SIZE", "1M", "wal-size = \"1M\"", "64M", ["--wal-size", "64M"]),
    ] {
        let line = failed(&add(&[(variable, bad)], "", &[]), 2);
        assert!(line.contains(word), "{variable}: {line}");
        let line = failed(&add(&[], file, &[]), 2);
        assert!(line.contains(word), "{file}: {line}");
        // What goes before it is good, so the next thing is in the way: the driver or the volume that are not there.
        failed(&add(&[(variable, bad)], file, &flag), 1);
        failed(&add(&[(variable, flag[1])], file, &[]), 1);
    }
    let line = failed(&add(&[("VB_UBLK_STRICT", "perhaps")], "", &[]), 2);
    assert!(line.contains("VB_UBLK_STRICT") && line.contains("true or false"), "{line}");
    // One of the two forms of a log's place, from the first place that has one.
    let size = &["--wal-size", "64M"];
    let dir = b.path().join("log");
    let dir = dir.to_str().expect("text");
    for (env, file) in [(&[("VB_UBLK_WAL_DEVICE", "/dev/x")][..], ""), (&[], "wal-device = \"/dev/x\"")] {
        let line = failed(&add(env, file, size), 2);
        assert!(line.contains("/dev/x") && line.contains("--wal-size"), "{line}");
        failed(&add(env, file, &[&size[..], &["--wal-dir", dir]].concat()), 1);
    }
    failed(&add(&[("VB_UBLK_WAL_DIR", dir)], "wal-device = \"/dev/x\"", size), 1);
    let line = failed(&add(&[("VB_UBLK_WAL_DIR", "/x"), ("VB_UBLK_WAL_DEVICE", "/dev/x")], "", &[]), 2);
    assert!(line.contains("VB_UBLK_WAL_DIR and VB_UBLK_WAL_DEVICE"), "{line}");
    let line = failed(&add(&[], "wal-dir = \"/x\"\nwal-device = \"/dev/x\"", &[]), 2);
    assert!(line.contains("`wal-dir` and `wal-device`"), "{line}");
}

#[test]
fn the_help_is_right_about_the_device_of_a_log() {
    let help = Bench::new().ok(&["add", "--help"]);
    let (_, said) = options_in(&help).into_iter().find(|(o, _)| o == "wal-device").expect("--wal-device");
    assert!(said.contains("refused") && !said.contains("lost"), "{said}");
}

#[test]
fn a_bad_configuration_file_is_named_with_the_key() {
    let b = Bench::new();
    b.config("region = \"x\"\nstroe = \"file:///x\"\n");
    let line = b.fails(&["list"], 2);
    assert!(line.contains("config.toml, line 2") && line.contains("stroe"), "{line}");
    // What needs no settings works all the same.
    b.ok(&["completions", "bash"]);
    let line = b.fails(&["list", "--config", "/does/not/exist.toml"], 1);
    assert!(line.contains("/does/not/exist.toml"), "{line}");
    assert!(b.fails(&["list", "--config", "/dev/zero"], 2).contains("larger than 1 MiB"));
}

#[test]
fn a_store_that_is_not_there_is_an_error() {
    let b = Bench::new();
    let line = b.fails(&["volume", "list", "--store", "file:///does/not/exist"], 1);
    assert!(line.contains("/does/not/exist"), "{line}");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let b = Bench::new();
    let mut child =
        b.command(&["completions", "zsh"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start");
    drop(child.stdout.take());
    let out = child.wait_with_output().expect("wait");
    assert!(out.status.success() && out.stderr.is_empty(), "{out:?}");
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("open");
    let out = b.command(&["completions", "zsh"]).stdout(full).stderr(Stdio::piped()).output().expect("start");
    assert!(failed(&out, 1).contains("stdout"));
}

#[test]
fn completions_for_each_shell() {
    let b = Bench::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let text = b.ok(&["completions", shell]);
        assert!(text.contains("vb-ublk") && text.contains("wal-size"), "{shell}");
    }
}

#[test]
fn man_pages_for_each_command() {
    let b = Bench::new();
    let dir = b.path().join("man");
    let to = dir.to_str().expect("text");
    assert!(b.fails(&["man", to], 1).contains("is not a folder"));
    std::fs::create_dir(&dir).expect("mkdir");
    b.ok(&["man", to]);
    for (page, word) in [("vb-ublk", "EXIT|Exit"), ("vb-ublk-add", "wal"), ("vb-ublk-volume-create", "size")] {
        let text = std::fs::read_to_string(dir.join(format!("{page}.1"))).expect(page);
        assert!(text.contains(".TH ") && word.split('|').any(|w| text.contains(w)), "{page}");
    }
}
