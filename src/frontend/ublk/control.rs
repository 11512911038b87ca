//! Control commands from a process that is not the device's server: what is there, and removing what is dead.
//!
//! This is one of the marked files that may use `unsafe`.
//!
//! libublk's `UblkCtrl` would do, but it prints about files of its own to stderr, gives up waiting when a
//! signal comes, and tries a refused command again in another encoding, which hides the first error.
//!
//! Invariant: one command at a time; its buffer lives until its completion is seen, or is leaked.

#![allow(unsafe_code)]

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use io_uring::types::Fd;
use io_uring::{IoUring, opcode, squeue};
use libublk::sys;

use super::features::KernelFeatures;
use crate::error::{Context as _, Error, ErrorKind, Result};
use crate::units::SECTOR;

const CONTROL: &str = "/dev/ublk-control";
const CHAR_DEVICES: &str = "/sys/class/ublk-char";
const INFO_BYTES: usize = 64;
/// How long a deleted device's number may take to come free while nobody has it open.
const GONE_TIMEOUT: Duration = Duration::from_secs(2);

/// What the kernel says of a device's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceState {
    /// Added but never started, or stopped.
    Dead,
    /// It serves.
    Live,
    /// Its server died; requests wait for a recovery.
    Quiesced,
    /// Its server died; requests fail.
    FailIo,
    /// A state this program has no name for.
    Other(u16),
}

impl fmt::Display for DeviceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dead => f.write_str("dead"),
            Self::Live => f.write_str("live"),
            Self::Quiesced => f.write_str("quiesced"),
            Self::FailIo => f.write_str("failing"),
            Self::Other(n) => write!(f, "in state {n}"),
        }
    }
}

/// A device as the kernel describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceStatus {
    /// The number N in `/dev/ublkbN`.
    pub id: u32,
    /// Its life.
    pub state: DeviceState,
    /// The process that serves it, or did.
    pub pid: i32,
    /// Hardware queues.
    pub queues: u16,
    /// Requests in flight per queue.
    pub depth: u16,
    /// The largest request, in bytes.
    pub max_io_bytes: u32,
    /// Feature bits in use.
    pub flags: u64,
}

impl DeviceStatus {
    /// Whether another process can take it up when its server has died, with all that was in flight.
    #[must_use]
    pub fn is_recoverable(&self) -> bool {
        let both = u64::from(sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE);
        self.flags & both == both
    }

    /// Whether a living process serves it.
    #[must_use]
    pub fn is_served(&self) -> bool {
        self.state == DeviceState::Live && is_alive(self.pid)
    }

    /// From the driver's `ublksrv_ctrl_dev_info`.
    fn parse(b: &[u8; INFO_BYTES]) -> Self {
        let u16_at = |at: usize| u16::from_ne_bytes([b[at], b[at + 1]]);
        let u32_at = |at: usize| u32::from_ne_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        let low_first = cfg!(target_endian = "little");
        let (first, second) = (u64::from(u32_at(24)), u64::from(u32_at(28)));
        let state = u16_at(4);
        Self {
            id: u32_at(12),
            state: match u32::from(state) {
                sys::UBLK_S_DEV_DEAD => DeviceState::Dead,
                sys::UBLK_S_DEV_LIVE => DeviceState::Live,
                sys::UBLK_S_DEV_QUIESCED => DeviceState::Quiesced,
                sys::UBLK_S_DEV_FAIL_IO => DeviceState::FailIo,
                _ => DeviceState::Other(state),
            },
            pid: u32_at(16).cast_signed(),
            queues: u16_at(0),
            depth: u16_at(2),
            max_io_bytes: u32_at(8),
            flags: if low_first { second << 32 | first } else { first << 32 | second },
        }
    }
}

/// Opens the control device, or says what is missing.
pub(super) fn open() -> Result<File> {
    OpenOptions::new().read(true).write(true).open(CONTROL).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => {
            let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
            let what = format!(
                "there is no {CONTROL}: the kernel's ublk driver is not loaded; try `modprobe ublk_drv` as root. It is part of \
                 Linux 6.0 and later when built with CONFIG_BLK_DEV_UBLK (some distributions keep the module in a package of \
                 extra modules); this kernel is {}",
                kernel.trim()
            );
            Error::new(ErrorKind::Unsupported, what).with_source(e)
        }
        io::ErrorKind::PermissionDenied => {
            let what = format!("no rights to open {CONTROL}: run as root, or with CAP_SYS_ADMIN and access to that device");
            Error::new(ErrorKind::Denied, what).with_source(e)
        }
        _ => Error::io(format!("opening {CONTROL}"), e),
    })
}

/// What the driver's refusal of a command means.
pub(super) fn refusal(e: io::Error) -> Error {
    match e.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            let what = "the ublk driver refused: run as root, or with CAP_SYS_ADMIN";
            Error::new(ErrorKind::Denied, what).with_source(e)
        }
        Some(libc::ENODEV | libc::ENOENT) => Error::new(ErrorKind::NotFound, "there is no such device").with_source(e),
        Some(libc::EBUSY) => Error::new(ErrorKind::Busy, "the device is busy").with_source(e),
        Some(libc::EOPNOTSUPP | libc::ENOTTY) => {
            Error::new(ErrorKind::Unsupported, "this kernel's ublk driver does not know the command").with_source(e)
        }
        _ => Error::io("the ublk driver refused", e),
    }
}

/// The control device and a ring to ask it through.
pub(super) struct Control {
    file: File,
    ring: IoUring<squeue::Entry128>,
}

impl Control {
    pub(super) fn open() -> Result<Self> {
        let file = open()?;
        let ring = IoUring::<squeue::Entry128>::builder().build(4);
        Ok(Self { file, ring: ring.context(|| "making an io_uring for control commands")? })
    }

    /// Runs a command to its end. `buf` is what the driver fills.
    fn command(&mut self, op: u32, id: u32, buf: Option<&mut [u8; INFO_BYTES]>, len: u16) -> io::Result<()> {
        self.command_with(op, id, buf, len, 0)
    }

    /// The same with a number for the driver.
    fn command_with(
        &mut self,
        op: u32,
        id: u32,
        buf: Option<&mut [u8; INFO_BYTES]>,
        len: u16,
        data: u64,
    ) -> io::Result<()> {
        let own = Box::new([0_u8; INFO_BYTES]);
        let addr = if buf.is_some() { own.as_ptr() as u64 } else { 0 };
        // struct ublksrv_ctrl_cmd: dev_id, queue_id, len, addr, data[1], dev_path_len, pad, reserved.
        let mut cmd = [0_u8; 80];
        cmd[0..4].copy_from_slice(&id.to_ne_bytes());
        cmd[4..6].copy_from_slice(&u16::MAX.to_ne_bytes());
        cmd[6..8].copy_from_slice(&len.to_ne_bytes());
        cmd[8..16].copy_from_slice(&addr.to_ne_bytes());
        cmd[16..24].copy_from_slice(&data.to_ne_bytes());
        let entry = opcode::UringCmd80::new(Fd(self.file.as_raw_fd()), op).cmd(cmd).build();
        // SAFETY: the command is copied into the entry; the buffer it points at, `own`, lives until the completion
        // below has been seen, or is leaked when it is not. `len` is at most its size: see the callers.
        unsafe { self.ring.submission().push(&entry) }.map_err(io::Error::other)?;
        let result = loop {
            // A signal may interrupt the wait, not the command.
            if let Some(cqe) = self.ring.completion().next() {
                break cqe.result();
            }
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    Box::leak(own);
                    return Err(e);
                }
            }
        };
        if result < 0 {
            return Err(io::Error::from_raw_os_error(-result));
        }
        if let Some(buf) = buf {
            *buf = *own;
        }
        Ok(())
    }

    pub(super) fn features(&mut self) -> Result<KernelFeatures> {
        let mut buf = [0; INFO_BYTES];
        match self.command(sys::UBLK_U_CMD_GET_FEATURES, u32::MAX, Some(&mut buf), 8) {
            Ok(()) => {
                let mut bits = [0; 8];
                bits.copy_from_slice(&buf[..8]);
                Ok(KernelFeatures { bits: Some(u64::from_ne_bytes(bits)) })
            }
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENODEV)) => {
                Ok(KernelFeatures { bits: None })
            }
            Err(e) => Err(refusal(e).context("asking the ublk driver for its features")),
        }
    }

    fn info(&mut self, id: u32) -> Result<Option<DeviceStatus>> {
        let mut buf = [0; INFO_BYTES];
        let mut asked = self.command(sys::UBLK_U_CMD_GET_DEV_INFO, id, Some(&mut buf), INFO_BYTES as u16);
        if asked.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::EOPNOTSUPP)) {
            // Before Linux 6.4 commands were plain numbers.
            asked = self.command(sys::UBLK_CMD_GET_DEV_INFO, id, Some(&mut buf), INFO_BYTES as u16);
        }
        match asked {
            Ok(()) => Ok(Some(DeviceStatus::parse(&buf))),
            Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(e) => Err(refusal(e).context(format!("asking the ublk driver about /dev/ublkb{id}"))),
        }
    }

    /// See [`delete_stopped`]. Before Linux 6.9 it waits until the last one has closed it.
    fn delete(&mut self, id: u32) -> Result<()> {
        let mut result = self.command(sys::UBLK_U_CMD_DEL_DEV_ASYNC, id, None, 0);
        let unknown = |e: &io::Error| matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOTTY));
        if result.as_ref().is_err_and(unknown) {
            loop {
                result = self.simple(sys::UBLK_U_CMD_DEL_DEV, id);
                // Interrupted while it waited: it is gone already, and will be found so.
                if !result.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::EINTR)) {
                    break;
                }
            }
        }
        match result {
            Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            Err(e) => Err(refusal(e).context(format!("deleting /dev/ublkb{id}"))),
            Ok(()) => {
                // With nobody there it takes no time; who adds it again at once finds the number free.
                let node = PathBuf::from(format!("/dev/ublkc{id}"));
                let begun = Instant::now();
                while node.exists() && begun.elapsed() < GONE_TIMEOUT {
                    super::pause(Duration::from_millis(5));
                }
                Ok(())
            }
        }
    }

    /// A command without a buffer, in either encoding.
    fn simple(&mut self, op: u32, id: u32) -> io::Result<()> {
        match self.command(op, id, None, 0) {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => self.command(op & 0xff, id, None, 0),
            other => other,
        }
    }
}

/// Whether a process runs; one that nobody has waited for yet does not.
#[must_use]
pub fn is_alive(pid: i32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    // "pid (name) state ...", where the name may hold anything.
    let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next());
    !matches!(state, Some('Z' | 'X'))
}

/// What the kernel says of device `id`; `None` when there is none.
///
/// # Errors
/// No driver, or no rights.
pub fn device_info(id: u32) -> Result<Option<DeviceStatus>> {
    Control::open()?.info(id)
}

/// All ublk devices, of whatever server, by number. Without a driver there are none.
///
/// # Errors
/// No rights to ask.
pub fn list_devices() -> Result<Vec<DeviceStatus>> {
    let entries = match std::fs::read_dir(CHAR_DEVICES) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(format!("listing {CHAR_DEVICES}"), e)),
    };
    let mut control = None;
    let mut found = Vec::new();
    for entry in entries {
        let name = entry.context(|| format!("listing {CHAR_DEVICES}"))?.file_name();
        let Some(id) = name.to_str().and_then(|n| n.strip_prefix("ublkc")).and_then(|n| n.parse().ok()) else {
            continue;
        };
        let control = match &mut control {
            Some(control) => control,
            none => none.insert(Control::open()?),
        };
        // It may have gone meanwhile.
        found.extend(control.info(id)?);
    }
    found.sort_by_key(|d| d.id);
    Ok(found)
}

/// Stops and deletes a device whose server is dead. What waited in it fails.
///
/// # Errors
/// There is none; its server lives; the driver refused.
pub fn delete_dead(id: u32) -> Result<()> {
    let mut control = Control::open()?;
    let Some(status) = control.info(id)? else {
        return Err(Error::new(ErrorKind::NotFound, format!("there is no /dev/ublkb{id}")));
    };
    if status.is_served() {
        let what = format!("/dev/ublkb{id} is served by process {}: stop that instead", status.pid);
        return Err(Error::new(ErrorKind::Busy, what));
    }
    let stopped = control.simple(sys::UBLK_U_CMD_STOP_DEV, id);
    stopped.map_err(|e| refusal(e).context(format!("stopping /dev/ublkb{id}")))?;
    control.delete(id)
}

/// Tells the kernel the new size of a device that is served.
///
/// # Errors
/// `Unsupported` before Linux 6.16; there is none; the driver's.
pub fn resize(id: u32, size_bytes: u64) -> Result<()> {
    let mut control = Control::open()?;
    let Some(status) = control.info(id)? else {
        return Err(Error::new(ErrorKind::NotFound, format!("there is no /dev/ublkb{id}")));
    };
    // Older drivers fall over when there is no disk yet, or no more.
    if !status.is_served() {
        return Err(Error::new(ErrorKind::Busy, format!("/dev/ublkb{id} is not served at the moment")));
    }
    let asking = |e| refusal(e).context(format!("resizing /dev/ublkb{id} to {size_bytes} bytes"));
    control.command_with(sys::UBLK_U_CMD_UPDATE_SIZE, id, None, 0, size_bytes / SECTOR as u64).map_err(asking)
}

/// Removes a stopped device. Who still has it open, as when it is mounted, sees errors; its number is free when the last
/// one has closed it.
///
/// # Errors
/// The driver's. One that is gone already is none.
pub(super) fn delete_stopped(id: u32) -> Result<()> {
    Control::open()?.delete(id)
}

/// Whether a block device is mounted, or held by something else that wants it alone.
#[must_use]
pub fn is_in_use(path: &Path) -> bool {
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(path);
    opened.is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_drivers_description_is_read() {
        let mut b = [0_u8; INFO_BYTES];
        b[0..2].copy_from_slice(&4_u16.to_ne_bytes());
        b[2..4].copy_from_slice(&128_u16.to_ne_bytes());
        b[4..6].copy_from_slice(&2_u16.to_ne_bytes());
        b[8..12].copy_from_slice(&(512_u32 << 10).to_ne_bytes());
        b[12..16].copy_from_slice(&7_u32.to_ne_bytes());
        b[16..20].copy_from_slice(&1234_i32.to_ne_bytes());
        b[24..32].copy_from_slice(&0x1_0000_0018_u64.to_ne_bytes());
        let expect = DeviceStatus {
            id: 7,
            state: DeviceState::Quiesced,
            pid: 1234,
            queues: 4,
            depth: 128,
            max_io_bytes: 512 << 10,
            flags: 0x1_0000_0018,
        };
        assert_eq!(DeviceStatus::parse(&b), expect);
        assert_eq!(std::mem::size_of::<sys::ublksrv_ctrl_dev_info>(), INFO_BYTES);
    }

    #[test]
    fn what_is_missing_is_said() {
        if Path::new(CONTROL).exists() {
            return;
        }
        let e = super::super::features().unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Unsupported);
        for word in ["ublk_drv", "CONFIG_BLK_DEV_UBLK", "6.0", "modprobe"] {
            assert!(e.to_string().contains(word), "{e}");
        }
        assert!(list_devices().unwrap().is_empty());
    }

    #[test]
    fn the_living_are_told_from_the_dead() {
        assert!(is_alive(std::process::id().cast_signed()));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id().cast_signed();
        // Dead from here on at the latest, and not waited for before.
        let begun = std::time::Instant::now();
        while is_alive(pid) && begun.elapsed().as_secs() < 20 {
            std::thread::yield_now();
        }
        assert!(!is_alive(pid));
        child.wait().unwrap();
        assert!(!is_alive(pid));
    }

    #[test]
    fn a_plain_file_is_in_nobodys_use() {
        assert!(!is_in_use(Path::new("/proc/self/exe")));
    }
}
