//! Settings as people write them: sizes, volume names, and the configuration file.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize};

use crate::error::{Context, Error, ErrorKind, Result};

/// The most bytes that a configuration file may have.
pub const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// The most characters of a volume's name.
pub const MAX_NAME: usize = 128;

/// A number of bytes, written `512M`, `10G`, `4KiB` or `1048576`. The units are powers of 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

impl FromStr for ByteSize {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let bad = |why: &str| {
            Error::new(
                ErrorKind::Usage,
                format!("{:?} is not a size: {why}, as in 512M, 10G, 4KiB or 1048576", shown(s)),
            )
        };
        let digits = s.len() - s.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, unit) = s.split_at(digits);
        if number.is_empty() {
            return Err(bad("give a whole number with a unit"));
        }
        if unit.starts_with(['.', ',']) {
            return Err(bad("only whole numbers are taken"));
        }
        let lower = unit.to_ascii_lowercase();
        let shift = match lower.strip_suffix("ib").unwrap_or(&lower) {
            "" if lower.is_empty() => 0,
            "b" if lower == "b" => 0,
            "k" => 10,
            "m" => 20,
            "g" => 30,
            "t" => 40,
            "kb" | "mb" | "gb" | "tb" => return Err(bad("units are powers of 1024, written K, M, G or T")),
            _ => return Err(bad("the unit must be K, M, G or T")),
        };
        let too_large = || bad("it is too large");
        let number: u64 = number.parse().map_err(|_| too_large())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(too_large)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&crate::units::human_bytes(self.0))
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        match NumberOrText::deserialize(d) {
            Ok(NumberOrText::Number(n)) => Ok(Self(n)),
            Ok(NumberOrText::Text(s)) => s.parse().map_err(serde::de::Error::custom),
            Err(_) => Err(serde::de::Error::custom("a size must be a whole number or a text such as \"10G\"")),
        }
    }
}

/// How far a FLUSH, or a write with FUA, goes before it is answered: `wal` or `store`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FlushTo {
    /// To the local log: what it covers survives the loss of power.
    #[default]
    Wal,
    /// To the store, too: it survives the loss of this host.
    Store,
}

impl FromStr for FlushTo {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "wal" => Ok(Self::Wal),
            "store" => Ok(Self::Store),
            _ => Err(Error::new(ErrorKind::Usage, format!("a flush goes to `wal` or `store`, not {:?}", shown(s)))),
        }
    }
}

/// How much garbage the store may keep before a running volume collects some, in percent of its live data: `40%`, `40` or `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct GarbageLimit(
    /// None: nothing is copied to have its room back.
    pub Option<u16>,
);

impl GarbageLimit {
    /// Below, moving what lives would cost more than all that is written.
    const LEAST: u16 = 5;
    const MOST: u16 = 1000;
}

impl Default for GarbageLimit {
    fn default() -> Self {
        Self(Some(35))
    }
}

impl FromStr for GarbageLimit {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        if s == "off" {
            return Ok(Self(None));
        }
        let percent = s.strip_suffix('%').unwrap_or(s).parse().ok();
        match percent.filter(|p| (Self::LEAST..=Self::MOST).contains(p)) {
            Some(p) => Ok(Self(Some(p))),
            None => {
                let (least, most) = (Self::LEAST, Self::MOST);
                let why = format!("garbage may be {least}% to {most}% of the live data, or `off`, not {:?}", shown(s));
                Err(Error::new(ErrorKind::Usage, why))
            }
        }
    }
}

impl<'de> Deserialize<'de> for GarbageLimit {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        match Option::<NumberOrText>::deserialize(d) {
            Ok(None) => Ok(Self(None)),
            Ok(Some(NumberOrText::Number(n))) => n.to_string().parse().map_err(serde::de::Error::custom),
            Ok(Some(NumberOrText::Text(s))) => s.parse().map_err(serde::de::Error::custom),
            Err(_) => Err(serde::de::Error::custom("it must be a percentage such as 40, or \"off\"")),
        }
    }
}

/// The start of what somebody wrote, for an error message.
fn shown(s: &str) -> String {
    s.chars().take(80).collect()
}

/// A volume's name: `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`; or, where a snapshot may be meant, two of them: `VOLUME@SNAPSHOT`. Never empty, never a path.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct VolumeName(String);

impl VolumeName {
    /// The name, with the snapshot's.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The volume, and the snapshot of it that is meant.
    #[must_use]
    pub fn parts(&self) -> (&str, Option<&str>) {
        split_snapshot(&self.0)
    }
}

impl FromStr for VolumeName {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let bad = |what: &str, why: &str| {
            Error::new(ErrorKind::Usage, format!("{:?} cannot be {what}'s name: {why}", shown(s)))
        };
        let (volume, snapshot) = split_snapshot(s);
        if let Some(why) = unfit_name(volume) {
            return Err(bad("a volume", why));
        }
        if let Some(why) = snapshot.and_then(unfit_name) {
            return Err(bad("a snapshot", why));
        }
        Ok(Self(s.to_owned()))
    }
}

/// `VOLUME` or `VOLUME@SNAPSHOT` taken apart; neither has been looked at.
#[must_use]
pub fn split_snapshot(s: &str) -> (&str, Option<&str>) {
    s.split_once('@').map_or((s, None), |(v, s)| (v, Some(s)))
}

/// Why it cannot be a volume's or a snapshot's name.
#[must_use]
pub fn unfit_name(s: &str) -> Option<&'static str> {
    if s.is_empty() {
        Some("it is empty")
    } else if s.len() > MAX_NAME {
        Some("it is longer than 128 characters")
    } else if !s.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        Some("it must begin with a letter or a digit")
    } else if !s.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
        Some("only letters, digits, `.`, `_` and `-` are allowed")
    } else {
        None
    }
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for VolumeName {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The configuration file: its keys are long options of the command line.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct FileConfig {
    /// `--store`.
    pub store: Option<String>,
    /// `--bucket`.
    pub bucket: Option<String>,
    /// `--endpoint`.
    pub endpoint: Option<String>,
    /// `--region`.
    pub region: Option<String>,
    /// `--profile`.
    pub profile: Option<String>,
    /// `--ca-cert`.
    pub ca_cert: Option<PathBuf>,
    /// `--insecure`.
    pub insecure: Option<bool>,
    /// `--data-dir`.
    pub data_dir: Option<PathBuf>,
    /// `--run-dir`.
    pub run_dir: Option<PathBuf>,
    /// `nbd --listen`: one address, or several.
    #[serde(default, deserialize_with = "one_or_several")]
    pub listen: Vec<String>,
    /// `nbd --unix`: one path, or several.
    #[serde(default, deserialize_with = "one_or_several")]
    pub unix: Vec<String>,
    /// `nbd --tls-certs`.
    pub tls_certs: Option<PathBuf>,
    /// `nbd --tls`.
    pub tls: Option<String>,
    /// `nbd --insecure-listen`.
    pub insecure_listen: Option<bool>,
    /// `nbd --max-connections`.
    pub max_connections: Option<u16>,
    /// `nbd --workers`.
    pub workers: Option<u16>,
    /// `nbd --linger`.
    pub linger: Option<u32>,
    /// `add --queues`.
    pub queues: Option<u16>,
    /// `add --depth`.
    pub depth: Option<u16>,
    /// `--wal-dir` of `add` and `nbd`.
    pub wal_dir: Option<PathBuf>,
    /// `add --wal-device`.
    pub wal_device: Option<PathBuf>,
    /// `--wal-size` of `add` and `nbd`.
    pub wal_size: Option<ByteSize>,
    /// `--cache-dir` of `add` and `nbd`.
    pub cache_dir: Option<PathBuf>,
    /// `--cache-size` of `add` and `nbd`.
    pub cache_size: Option<ByteSize>,
    /// `--flush` of `add` and `nbd`.
    pub flush: Option<FlushTo>,
    /// `--gc-garbage` of `add` and `nbd`.
    pub gc_garbage: Option<GarbageLimit>,
    /// `--io-timeout` of `add` and `nbd`, in seconds.
    pub io_timeout: Option<u32>,
    /// `--metrics` of `add` and `nbd`: a port, or an address with a port.
    #[serde(default, deserialize_with = "text_or_number")]
    pub metrics: Option<String>,
    /// `--strict` of `add` and `nbd`.
    pub strict: Option<bool>,
}

fn one_or_several<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        One(String),
        Several(Vec<String>),
    }
    match Written::deserialize(d) {
        Ok(Written::One(text)) => Ok(vec![text]),
        Ok(Written::Several(texts)) => Ok(texts),
        Err(_) => Err(serde::de::Error::custom("it must be a text, or a list of texts")),
    }
}

/// As a setting may be written.
#[derive(Deserialize)]
#[serde(untagged)]
enum NumberOrText {
    Number(u64),
    Text(String),
}

fn text_or_number<'de, D: Deserializer<'de>>(d: D) -> Result<Option<String>, D::Error> {
    match NumberOrText::deserialize(d) {
        Ok(NumberOrText::Number(n)) => Ok(Some(n.to_string())),
        Ok(NumberOrText::Text(text)) => Ok(Some(text)),
        Err(_) => Err(serde::de::Error::custom("it must be a number, or a text")),
    }
}

impl FileConfig {
    /// Parses the text of a file; `path` is for messages.
    ///
    /// # Errors
    /// `Usage`, with the file, the line and the key.
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let config: Self = toml::from_str(text).map_err(|e| {
            let line =
                e.span().map_or(1, |s| text.as_bytes().iter().take(s.start).filter(|b| **b == b'\n').count() + 1);
            let message: Vec<&str> = e.message().lines().map(str::trim).collect();
            Error::new(
                ErrorKind::Usage,
                format!("configuration file {}, line {line}: {}", path.display(), message.join(" ")),
            )
        })?;
        let both = [
            ("store", config.store.is_some(), "bucket", config.bucket.is_some()),
            ("wal-dir", config.wal_dir.is_some(), "wal-device", config.wal_device.is_some()),
        ];
        if let Some((one, _, other, _)) = both.into_iter().find(|(_, one, _, other)| *one && *other) {
            let what =
                format!("configuration file {} has both `{one}` and `{other}`: keep one of them", path.display());
            return Err(Error::new(ErrorKind::Usage, what));
        }
        Ok(config)
    }

    /// Reads a file. A missing one is an error only when it is `required`; else it has no settings.
    ///
    /// # Errors
    /// `Usage` for what it says, else the kind of the I/O error.
    pub fn load(path: &Path, required: bool) -> Result<Self> {
        use std::io::Read;
        let file = match std::fs::File::open(path) {
            Ok(f) => f,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && !required => return Ok(Self::default()),
            Err(e) => return Err(e).context(|| format!("opening the configuration file {}", path.display())),
        };
        let mut text = Vec::new();
        file.take(MAX_CONFIG_BYTES + 1)
            .read_to_end(&mut text)
            .context(|| format!("reading the configuration file {}", path.display()))?;
        let bad = |why| Error::new(ErrorKind::Usage, format!("the configuration file {} is {why}", path.display()));
        if text.len() as u64 > MAX_CONFIG_BYTES {
            return Err(bad("larger than 1 MiB"));
        }
        Self::parse(&String::from_utf8(text).map_err(|_| bad("not UTF-8 text"))?, path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn garbage() {
        for (text, percent) in [("40%", Some(40)), ("5", Some(5)), ("1000%", Some(1000)), ("off", None)] {
            let limit: GarbageLimit = text.parse().expect(text);
            assert_eq!(limit.0, percent, "{text}");
            let written = serde_json::to_string(&limit).expect("JSON");
            assert_eq!(serde_json::from_str::<GarbageLimit>(&written).expect(&written), limit);
        }
        for text in ["", "%", "4%", "1001%", "-5%", "1.5%", "40 %", "on"] {
            let e = text.parse::<GarbageLimit>().expect_err(text);
            assert!(e.kind() == ErrorKind::Usage && e.to_string().contains("5% to 1000%"), "{e}");
        }
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("1048576", 1 << 20),
            ("10G", 10 << 30),
            ("10GiB", 10 << 30),
            ("512m", 512 << 20),
            ("4KiB", 4096),
            ("3T", 3 << 40),
            ("7B", 7),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(text.parse::<ByteSize>().expect(text).0, bytes, "{text}");
        }
        for (text, why) in [
            ("", "whole number"),
            ("G", "whole number"),
            ("-1", "whole number"),
            (" 1G", "whole number"),
            ("1 G", "unit"),
            ("1.5G", "whole numbers"),
            ("10GB", "powers of 1024"),
            ("10X", "unit"),
            ("10iB", "unit"),
            ("10BiB", "unit"),
            ("18446744073709551616", "too large"),
            ("99999999T", "too large"),
            ("1\u{0660}", "unit"),
        ] {
            let e = text.parse::<ByteSize>().expect_err(text);
            assert_eq!(e.kind(), ErrorKind::Usage);
            assert!(e.to_string().contains(why), "{text}: {e}");
        }
        assert!("9".repeat(100_000).parse::<ByteSize>().expect_err("long").to_string().len() < 300);
    }

    #[test]
    fn names() {
        for good in ["a", "0", "vol-0123456789abcdef0", "A.b_c-d", &"x".repeat(128)] {
            assert_eq!(good.parse::<VolumeName>().expect(good).as_str(), good);
        }
        for bad in ["", ".", "..", "-a", ".a", "_a", "a/b", "a b", "a\n", "é", "a\0", &"x".repeat(129)] {
            assert_eq!(bad.parse::<VolumeName>().expect_err(bad).kind(), ErrorKind::Usage);
        }
    }

    #[test]
    fn the_file_has_the_long_options() {
        let c = FileConfig::parse(
            "bucket = \"b\"\nca-cert = \"/c.pem\"\ninsecure = true\nwal-size = \"2G\"\nqueues = 2\n",
            Path::new("/etc/x.toml"),
        )
        .expect("parse");
        assert_eq!(c.bucket.as_deref(), Some("b"));
        assert_eq!(c.wal_size, Some(ByteSize(2 << 30)));
        assert_eq!(c.queues, Some(2));
        assert_eq!(FileConfig::parse("", Path::new("x")).expect("empty"), FileConfig::default());
    }

    #[test]
    fn bad_files_are_refused_on_one_line() {
        for (text, words) in [
            ("region = \"x\"\nstroe = \"s3://b\"\n", &["/etc/x.toml", "line 2", "stroe"][..]),
            ("store = 5\n", &["/etc/x.toml", "line 1"]),
            ("store = \"a\"\nbucket = \"b\"\n", &["both", "bucket"]),
            ("wal-dir = \"/a\"\nwal-device = \"/dev/b\"\n", &["both", "wal-device"]),
            ("wal-size = \"2Q\"\n", &["2Q", "unit"]),
            ("wal-size = -1\n", &["size"]),
            ("queues = 70000\n", &["line 1"]),
            ("]]]", &["line 1"]),
        ] {
            let e = FileConfig::parse(text, Path::new("/etc/x.toml")).expect_err(text);
            assert_eq!(e.kind(), ErrorKind::Usage, "{e}");
            let e = e.to_string();
            assert!(!e.contains('\n'), "{e}");
            for w in words {
                assert!(e.contains(w), "{text}: {e}");
            }
        }
    }

    #[test]
    fn only_a_named_file_has_to_be_there() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("none.toml");
        assert_eq!(FileConfig::load(&path, false).expect("default"), FileConfig::default());
        assert_eq!(FileConfig::load(&path, true).expect_err("named").kind(), ErrorKind::NotFound);
        std::fs::write(&path, [0xff, 0xfe]).expect("write");
        assert_eq!(FileConfig::load(&path, false).expect_err("binary").kind(), ErrorKind::Usage);
    }
}
