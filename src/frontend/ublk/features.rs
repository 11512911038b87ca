//! What the kernel's ublk driver can do, by name.

use libublk::sys;

use super::control::Control;
use crate::error::Result;

/// One feature bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feature {
    /// The kernel's name, without `UBLK_F_`.
    pub name: &'static str,
    /// The bit.
    pub bit: u64,
    /// Whether vb-ublk asks for it.
    pub used: bool,
    /// What it is for.
    pub about: &'static str,
}

const fn feature(name: &'static str, bit: u32, used: bool, about: &'static str) -> Feature {
    Feature { name, bit: bit as u64, used, about }
}

/// Every feature this program knows by name.
pub(super) const KNOWN: [Feature; 20] = [
    feature("SUPPORT_ZERO_COPY", sys::UBLK_F_SUPPORT_ZERO_COPY, false, "request pages in registered buffers"),
    feature("URING_CMD_COMP_IN_TASK", sys::UBLK_F_URING_CMD_COMP_IN_TASK, false, "completion in the server's task"),
    feature("NEED_GET_DATA", sys::UBLK_F_NEED_GET_DATA, false, "buffers for writes are given late"),
    feature("USER_RECOVERY", sys::UBLK_F_USER_RECOVERY, true, "the device outlives its server"),
    feature("USER_RECOVERY_REISSUE", sys::UBLK_F_USER_RECOVERY_REISSUE, true, "requests in flight are issued again"),
    feature("UNPRIVILEGED_DEV", sys::UBLK_F_UNPRIVILEGED_DEV, false, "devices of ordinary users"),
    feature("CMD_IOCTL_ENCODE", sys::UBLK_F_CMD_IOCTL_ENCODE, true, "commands encoded like ioctls"),
    feature("USER_COPY", sys::UBLK_F_USER_COPY, false, "the server copies data itself"),
    feature("ZONED", sys::UBLK_F_ZONED, false, "zoned devices"),
    feature(
        "USER_RECOVERY_FAIL_IO",
        sys::UBLK_F_USER_RECOVERY_FAIL_IO,
        false,
        "requests fail while no server is there",
    ),
    feature("UPDATE_SIZE", sys::UBLK_F_UPDATE_SIZE, false, "a device can be resized"),
    feature("AUTO_BUF_REG", sys::UBLK_F_AUTO_BUF_REG, false, "buffers registered by the driver"),
    feature("QUIESCE", sys::UBLK_F_QUIESCE, false, "a device can be quiesced on request"),
    feature("PER_IO_DAEMON", sys::UBLK_F_PER_IO_DAEMON, false, "several threads per queue"),
    feature("BUF_REG_OFF_DAEMON", sys::UBLK_F_BUF_REG_OFF_DAEMON, false, "buffers registered from other threads"),
    feature("BATCH_IO", sys::UBLK_F_BATCH_IO, false, "commands in batches"),
    feature("INTEGRITY", sys::UBLK_F_INTEGRITY, false, "integrity metadata"),
    feature("SAFE_STOP_DEV", sys::UBLK_F_SAFE_STOP_DEV, false, "a stop that refuses devices in use"),
    feature("NO_AUTO_PART_SCAN", sys::UBLK_F_NO_AUTO_PART_SCAN, false, "no partition scan at start"),
    feature("SHMEM_ZC", sys::UBLK_F_SHMEM_ZC, false, "zero copy through shared memory"),
];

/// What the running kernel's driver offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelFeatures {
    /// The bits; `None` when the kernel cannot be asked (before Linux 6.5).
    pub bits: Option<u64>,
}

impl KernelFeatures {
    /// The known features, each with whether this kernel has it.
    pub fn known(&self) -> impl Iterator<Item = (&'static Feature, bool)> + use<> {
        let bits = self.bits.unwrap_or(0);
        KNOWN.iter().map(move |f| (f, bits & f.bit != 0))
    }

    /// Bits without a name here.
    #[must_use]
    pub fn unknown(&self) -> u64 {
        KNOWN.iter().fold(self.bits.unwrap_or(0), |rest, f| rest & !f.bit)
    }

    /// The features that vb-ublk asks for and this kernel lacks.
    pub fn missing(&self) -> impl Iterator<Item = &'static Feature> + use<> {
        let asked = self.bits.is_some();
        self.known().filter(move |(f, has)| asked && f.used && !has).map(|(f, _)| f)
    }
}

/// Asks the kernel's driver what it can do.
///
/// # Errors
/// No driver, or no rights: says what is missing and how to get it.
pub fn features() -> Result<KernelFeatures> {
    Control::open()?.features()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_have_names() {
        let k = KernelFeatures { bits: Some(1 << 3 | 1 << 40) };
        let has: Vec<_> = k.known().filter(|(_, has)| *has).map(|(f, _)| f.name).collect();
        assert_eq!(has, ["USER_RECOVERY"]);
        assert_eq!(k.unknown(), 1 << 40);
        let missing: Vec<_> = k.missing().map(|f| f.name).collect();
        assert_eq!(missing, ["USER_RECOVERY_REISSUE", "CMD_IOCTL_ENCODE"]);
        assert_eq!(KernelFeatures { bits: None }.missing().count(), 0);
        let all = KNOWN.iter().fold(0, |bits, f| bits | f.bit);
        assert_eq!(all, (1 << KNOWN.len()) - 1, "each bit once, none left out");
    }
}
