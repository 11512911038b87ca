//! Brings flags, environment, configuration file and defaults together, in this order.
//!
//! The environment is a parameter, so that tests can own it. What the S3 client reads from the
//! environment by itself (`AWS_*`) is not read here, but goes before what the file says all the same.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::args::{CacheArgs, Global, TlsMode};
use super::metrics;
use super::nbd::listen;
use crate::config::{ByteSize, FileConfig, FlushTo, GarbageLimit};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::store::{StoreOptions, StoreUrl};

const SYSTEM_CONFIG: &str = "/etc/vb-ublk/config.toml";

/// What every command works with. All paths are absolute.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) store: StoreUrl,
    pub(crate) store_options: StoreOptions,
    pub(crate) data_dir: PathBuf,
    pub(crate) run_dir: PathBuf,
    pub(crate) add: AddDefaults,
    pub(crate) nbd: NbdDefaults,
}

/// What `add` does unless its own options say otherwise: from the environment, else from the file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct AddDefaults {
    pub(crate) queues: Option<u16>,
    pub(crate) depth: Option<u16>,
    pub(crate) log: Option<LogPlace>,
    pub(crate) wal_size: Option<ByteSize>,
    pub(crate) cache: CacheArgs,
    pub(crate) flush: Option<FlushTo>,
    pub(crate) gc_garbage: Option<GarbageLimit>,
    /// In seconds.
    pub(crate) io_timeout: Option<u32>,
    pub(crate) metrics: Option<SocketAddr>,
    pub(crate) strict: bool,
}

/// What `nbd` does unless its own options say otherwise; of `add`'s it has those about the log and the metrics, too.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct NbdDefaults {
    pub(crate) listen: Vec<SocketAddr>,
    pub(crate) unix: Vec<PathBuf>,
    pub(crate) tls_certs: Option<PathBuf>,
    pub(crate) tls: Option<TlsMode>,
    pub(crate) insecure_listen: bool,
    pub(crate) max_connections: Option<u16>,
    pub(crate) workers: Option<u16>,
    pub(crate) linger: Option<u32>,
}

/// Where a write-ahead log is. One setting of two forms: the place that says either goes before the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum LogPlace {
    /// In this folder, as a file.
    Dir(PathBuf),
    /// This device.
    Device(PathBuf),
}

impl LogPlace {
    /// Of two settings that exclude each other, which the caller has seen to.
    pub(crate) fn of(dir: Option<PathBuf>, device: Option<PathBuf>) -> Option<Self> {
        dir.map(Self::Dir).or_else(|| device.map(Self::Device))
    }
}

/// Where settings come from, besides the command line.
pub(crate) struct Surroundings<'a> {
    pub(crate) env: &'a dyn Fn(&str) -> Option<String>,
    pub(crate) root: bool,
}

impl Surroundings<'_> {
    /// The first of these that is set and not empty.
    fn first(&self, names: &[&str]) -> Option<String> {
        names.iter().find_map(|n| (self.env)(n).filter(|v| !v.is_empty()))
    }

    fn number<T: FromStr>(&self, name: &str) -> Result<Option<T>> {
        let parse = |v: String| {
            let what = || Error::new(ErrorKind::Usage, format!("{name} is {v:?}: set it to a whole number"));
            v.parse::<T>().map_err(|_| what())
        };
        self.first(&[name]).map(parse).transpose()
    }

    /// What says by itself what is wrong with it.
    fn parsed<T: FromStr<Err = Error>>(&self, name: &'static str) -> Result<Option<T>> {
        self.first(&[name]).map(|v| v.parse().map_err(|e: Error| e.context(name))).transpose()
    }

    fn flag(&self, name: &str) -> Result<Option<bool>> {
        match self.first(&[name]).as_deref() {
            None => Ok(None),
            Some("1" | "true" | "yes") => Ok(Some(true)),
            Some("0" | "false" | "no") => Ok(Some(false)),
            Some(other) => Err(Error::new(ErrorKind::Usage, format!("{name} is {other:?}: set it to true or false"))),
        }
    }

    /// An XDG folder; the specification says to ignore relative ones.
    fn xdg(&self, name: &str) -> Option<PathBuf> {
        self.first(&[name]).map(PathBuf::from).filter(|p| p.is_absolute())
    }
}

impl Settings {
    /// Where a volume's log is: as the command line says, else as `add` would have it.
    pub(crate) fn log_place(&self, given: Option<LogPlace>) -> LogPlace {
        given.or_else(|| self.add.log.clone()).unwrap_or_else(|| LogPlace::Dir(self.usual_wal_dir()))
    }

    /// The folder of logs, if nobody says another.
    pub(crate) fn usual_wal_dir(&self) -> PathBuf {
        self.data_dir.join("wal")
    }

    /// The folder of logs, also where `add` would have a device.
    pub(crate) fn wal_dir(&self) -> PathBuf {
        match &self.add.log {
            Some(LogPlace::Dir(dir)) => dir.clone(),
            Some(LogPlace::Device(_)) | None => self.usual_wal_dir(),
        }
    }

    /// Of this process.
    pub(crate) fn of_process(global: &Global) -> Result<Self> {
        let env = |name: &str| std::env::var(name).ok();
        Self::resolve(global, &Surroundings { env: &env, root: nix::unistd::geteuid().is_root() })
    }

    pub(crate) fn resolve(global: &Global, around: &Surroundings<'_>) -> Result<Self> {
        let named = global.config.clone().or_else(|| around.first(&["VB_UBLK_CONFIG"]).map(PathBuf::from));
        let file = match &named {
            Some(path) => FileConfig::load(path, true)?,
            None => FileConfig::load(Path::new(SYSTEM_CONFIG), false)?,
        };
        let path = |flag: &Option<PathBuf>, name: &str, file: &Option<PathBuf>| {
            flag.clone().or_else(|| around.first(&[name]).map(PathBuf::from)).or_else(|| file.clone())
        };

        let data_dir = path(&global.data_dir, "VB_UBLK_DATA_DIR", &file.data_dir);
        let data_dir = absolute(data_dir.map_or_else(|| default_data_dir(around), Ok)?)?;
        let run_dir = path(&global.run_dir, "VB_UBLK_RUN_DIR", &file.run_dir);
        let run_dir = absolute(run_dir.map_or_else(|| default_run_dir(around), Ok)?)?;
        let ca_cert = path(&global.ca_cert, "VB_UBLK_CA_CERT", &file.ca_cert).map(absolute).transpose()?;

        let bucket = |b: &str| format!("s3://{b}");
        let from_flag = global.store.clone().or_else(|| global.bucket.as_deref().map(bucket));
        let from_env =
            || around.first(&["VB_UBLK_STORE"]).or_else(|| around.first(&["AWS_BUCKET"]).map(|b| bucket(&b)));
        let from_file = || file.store.clone().or_else(|| file.bucket.as_deref().map(bucket));
        let (store, is_default) = match from_flag.or_else(from_env).or_else(from_file) {
            Some(url) => (StoreUrl::parse(&url, around.env)?, false),
            None => (StoreUrl::File { root: data_dir.join("store") }, true),
        };

        // The S3 client reads these itself; here they only keep the file's settings back.
        let unless_env = |flag: &Option<String>, names: &[&str], file: &Option<String>| {
            flag.clone().or_else(|| if around.first(names).is_some() { None } else { file.clone() })
        };
        let store_options = StoreOptions {
            create: is_default,
            bulk: false,
            fetch_aside: false,
            endpoint: unless_env(
                &global.endpoint,
                &["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_HOST"],
                &file.endpoint,
            ),
            region: unless_env(&global.region, &["AWS_REGION", "AWS_DEFAULT_REGION"], &file.region),
            profile: unless_env(
                &global.profile,
                &["AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_ACCESS_KEY"],
                &file.profile,
            ),
            ca_cert,
            insecure: global.insecure || around.flag("VB_UBLK_INSECURE")?.or(file.insecure).unwrap_or(false),
            ..StoreOptions::default()
        };
        let nbd = NbdDefaults::resolve(around, &file)?;
        let add = AddDefaults::resolve(around, file)?;
        Ok(Self { store, store_options, data_dir, run_dir, add, nbd })
    }
}

impl AddDefaults {
    fn resolve(around: &Surroundings<'_>, file: FileConfig) -> Result<Self> {
        const DIR: &str = "VB_UBLK_WAL_DIR";
        const DEVICE: &str = "VB_UBLK_WAL_DEVICE";
        let path = |name| around.first(&[name]).map(PathBuf::from);
        let (dir, device) = (path(DIR), path(DEVICE));
        if dir.is_some() && device.is_some() {
            return Err(Error::new(ErrorKind::Usage, format!("both {DIR} and {DEVICE} are set: keep one of them")));
        }
        const METRICS: &str = "VB_UBLK_METRICS";
        let cache =
            CacheArgs { cache_dir: path("VB_UBLK_CACHE_DIR"), cache_size: around.parsed("VB_UBLK_CACHE_SIZE")? };
        let (address, place) = match around.first(&[METRICS]) {
            Some(v) => (Some(v), METRICS),
            None => (file.metrics, "`metrics` in the configuration file"),
        };
        let metrics = address.map(|v| metrics::parse(&v).map_err(|e| e.context(place))).transpose()?;
        Ok(Self {
            queues: around.number("VB_UBLK_QUEUES")?.or(file.queues),
            depth: around.number("VB_UBLK_DEPTH")?.or(file.depth),
            log: LogPlace::of(dir, device).or_else(|| LogPlace::of(file.wal_dir, file.wal_device)),
            wal_size: around.parsed("VB_UBLK_WAL_SIZE")?.or(file.wal_size),
            cache: cache.or(&CacheArgs { cache_dir: file.cache_dir, cache_size: file.cache_size }),
            flush: around.parsed("VB_UBLK_FLUSH")?.or(file.flush),
            gc_garbage: around.parsed("VB_UBLK_GC_GARBAGE")?.or(file.gc_garbage),
            io_timeout: around.number("VB_UBLK_IO_TIMEOUT")?.or(file.io_timeout),
            metrics,
            strict: around.flag("VB_UBLK_STRICT")?.or(file.strict).unwrap_or(false),
        })
    }
}

impl NbdDefaults {
    fn resolve(around: &Surroundings<'_>, file: &FileConfig) -> Result<Self> {
        const LISTEN: &str = "VB_UBLK_LISTEN";
        const TLS: &str = "VB_UBLK_TLS";
        // The first place that has any says all.
        let (listen, place) = match around.first(&[LISTEN]) {
            Some(v) => {
                let parts = v.split([',', ' ']).filter(|p| !p.is_empty());
                (parts.map(str::to_owned).collect(), LISTEN)
            }
            None => (file.listen.clone(), "`listen` in the configuration file"),
        };
        let listen = listen.iter().map(|a| listen::parse(a).map_err(|e| e.context(place))).collect::<Result<_>>()?;
        let unix = match around.first(&["VB_UBLK_UNIX"]) {
            Some(v) => v.split(':').filter(|p| !p.is_empty()).map(PathBuf::from).collect(),
            None => file.unix.iter().map(PathBuf::from).collect(),
        };
        let (tls, place) = match around.first(&[TLS]) {
            Some(v) => (Some(v), TLS),
            None => (file.tls.clone(), "`tls` in the configuration file"),
        };
        let bad = |v: &str, why| Error::new(ErrorKind::Usage, format!("{place} is {v:?}: {why}"));
        let tls = tls.map(|v| TlsMode::parse(&v).map_err(|why| bad(&v, why))).transpose()?;
        Ok(Self {
            listen,
            unix,
            tls_certs: around.first(&["VB_UBLK_TLS_CERTS"]).map(PathBuf::from).or_else(|| file.tls_certs.clone()),
            tls,
            insecure_listen: around.flag("VB_UBLK_INSECURE_LISTEN")?.or(file.insecure_listen).unwrap_or(false),
            max_connections: around.number("VB_UBLK_MAX_CONNECTIONS")?.or(file.max_connections),
            workers: around.number("VB_UBLK_WORKERS")?.or(file.workers),
            linger: around.number("VB_UBLK_LINGER")?.or(file.linger),
        })
    }
}

fn absolute(path: PathBuf) -> Result<PathBuf> {
    std::path::absolute(&path).context(|| format!("finding the absolute path of {:?}", path.display()))
}

fn default_data_dir(around: &Surroundings<'_>) -> Result<PathBuf> {
    if around.root {
        return Ok("/var/lib/vb-ublk".into());
    }
    around
        .xdg("XDG_STATE_HOME")
        .or_else(|| around.xdg("HOME").map(|h| h.join(".local/state")))
        .map(|d| d.join("vb-ublk"))
        .ok_or_else(|| Error::new(ErrorKind::Usage, "neither XDG_STATE_HOME nor HOME is set: give --data-dir"))
}

fn default_run_dir(around: &Surroundings<'_>) -> Result<PathBuf> {
    if around.root {
        return Ok("/run/vb-ublk".into());
    }
    match around.xdg("XDG_RUNTIME_DIR") {
        Some(d) => Ok(d.join("vb-ublk")),
        // Not a folder in /tmp, which others could have made before us.
        None => Ok(default_data_dir(around)?.join("run")),
    }
}

#[cfg(test)]
mod tests;
