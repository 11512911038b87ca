//! What a device looks like to the kernel.

use libublk::sys;

use crate::error::{Error, ErrorKind, Result};
use crate::lane::RingMode;
use crate::units::{BLOCK, MAX_VOLUME_BYTES, SECTOR, human_bytes};

/// The driver's limit of a queue's depth.
const MAX_DEPTH: u16 = 4096;
/// The driver's limit of a request.
const MAX_IO_BYTES: u32 = 32 << 20;
/// Buffers of all queues together.
const MAX_BUFFER_BYTES: u64 = 4 << 30;
/// The longest discard or zeroing: requests count their bytes in 32 bits, in whole blocks.
const MAX_DISCARD_SECTORS: u32 = (u32::MAX >> 9) & !7;

/// A device to be added (or recovered).
#[derive(Debug, Clone)]
pub struct DeviceSpec {
    /// The number N in `/dev/ublkbN`; `None` takes the first free one.
    pub id: Option<u32>,
    /// Hardware queues, each a thread.
    pub queues: u16,
    /// Requests in flight per queue.
    pub depth: u16,
    /// The largest request, in bytes; each request in flight has a buffer of this size.
    pub max_io_bytes: u32,
    /// Size of the device, in bytes.
    pub size_bytes: u64,
    /// Logical block size, in bytes: 512 or 4096.
    pub logical_block: u32,
    /// Refuse writes in the kernel.
    pub read_only: bool,
    /// Take over the device `id`, whose server died. Its settings stay as they were: all of the above but
    /// `id` goes without effect.
    pub recover: bool,
    /// How the kernel delivers completions.
    pub ring_mode: RingMode,
}

impl Default for DeviceSpec {
    fn default() -> Self {
        Self {
            id: None,
            queues: 2,
            depth: 128,
            max_io_bytes: 512 << 10,
            size_bytes: 0,
            logical_block: 512,
            read_only: false,
            recover: false,
            ring_mode: RingMode::default(),
        }
    }
}

impl DeviceSpec {
    /// Whether the driver would take it.
    ///
    /// # Errors
    /// A sentence that names the setting and what it may be.
    pub fn check(&self) -> Result<()> {
        let refuse = |what: String| Err(Error::new(ErrorKind::Usage, what));
        if self.recover {
            return Ok(());
        }
        let block = u64::from(self.logical_block);
        if self.queues == 0 || u32::from(self.queues) > 1024 {
            return refuse(format!("{} queues: a device has 1 to 1024", self.queues));
        }
        if !(1..=MAX_DEPTH).contains(&self.depth) {
            return refuse(format!("depth {}: it may be 1 to {MAX_DEPTH}", self.depth));
        }
        if !self.max_io_bytes.is_multiple_of(BLOCK as u32)
            || !(BLOCK as u32..=MAX_IO_BYTES).contains(&self.max_io_bytes)
        {
            let what = "it may be 4 KiB to 32 MiB, in steps of 4 KiB";
            return refuse(format!("a largest request of {} bytes: {what}", self.max_io_bytes));
        }
        let buffers = u64::from(self.queues) * u64::from(self.depth) * u64::from(self.max_io_bytes);
        if buffers > MAX_BUFFER_BYTES {
            let (buffers, most) = (human_bytes(buffers), human_bytes(MAX_BUFFER_BYTES));
            return refuse(format!("queues × depth × largest request is {buffers} of buffers; at most {most}"));
        }
        if block != SECTOR as u64 && block != BLOCK as u64 {
            return refuse(format!("a logical block of {block} bytes: it may be 512 or 4096"));
        }
        if self.size_bytes == 0 || !self.size_bytes.is_multiple_of(block) || self.size_bytes > MAX_VOLUME_BYTES {
            let most = human_bytes(MAX_VOLUME_BYTES);
            return refuse(format!("a size of {} bytes: it may be up to {most}, in steps of {block}", self.size_bytes));
        }
        if self.id.is_some_and(|id| id > i32::MAX.cast_unsigned()) {
            return refuse("the device's number is too large".into());
        }
        Ok(())
    }
}

/// The parameters for SET_PARAMS.
pub(super) fn kernel_params(spec: &DeviceSpec) -> sys::ublk_params {
    // Both attributes, or the driver drops FUA silently.
    let mut attrs = sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA;
    if spec.read_only {
        attrs |= sys::UBLK_ATTR_READ_ONLY;
    }
    let shift = |bytes: u32| u8::try_from(bytes.max(1).ilog2()).unwrap_or(12);
    sys::ublk_params {
        types: sys::UBLK_PARAM_TYPE_BASIC | sys::UBLK_PARAM_TYPE_DISCARD,
        basic: sys::ublk_param_basic {
            attrs,
            logical_bs_shift: shift(spec.logical_block),
            physical_bs_shift: shift(BLOCK as u32),
            io_min_shift: shift(BLOCK as u32),
            io_opt_shift: shift(spec.max_io_bytes),
            max_sectors: spec.max_io_bytes >> 9,
            dev_sectors: spec.size_bytes >> 9,
            ..Default::default()
        },
        discard: sys::ublk_param_discard {
            discard_alignment: 0,
            discard_granularity: BLOCK as u32,
            max_discard_sectors: MAX_DISCARD_SECTORS,
            max_write_zeroes_sectors: MAX_DISCARD_SECTORS,
            // The driver takes no other number.
            max_discard_segments: 1,
            reserved0: 0,
        },
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> DeviceSpec {
        DeviceSpec { size_bytes: 1 << 30, ..DeviceSpec::default() }
    }

    #[test]
    fn bad_settings_are_named() {
        assert!(good().check().is_ok());
        type Spoil = fn(&mut DeviceSpec);
        let cases: [(Spoil, &str); 9] = [
            (|s| s.queues = 0, "queues"),
            (|s| s.depth = 0, "depth"),
            (|s| s.depth = 4097, "depth"),
            (|s| s.max_io_bytes = 5000, "largest request"),
            (|s| s.max_io_bytes = 64 << 20, "largest request"),
            (|s| (s.queues, s.depth, s.max_io_bytes) = (64, 4096, 1 << 20), "buffers"),
            (|s| s.logical_block = 1024, "logical block"),
            (|s| s.size_bytes = 513, "size"),
            (|s| s.size_bytes = 0, "size"),
        ];
        for (spoil, word) in cases {
            let mut spec = good();
            spoil(&mut spec);
            let e = spec.check().unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Usage);
            assert!(e.to_string().contains(word), "{e}");
        }
    }

    #[test]
    fn the_kernel_is_told_what_the_spec_says() {
        let p = kernel_params(&DeviceSpec { read_only: true, logical_block: 4096, ..good() });
        assert_eq!(p.basic.attrs, sys::UBLK_ATTR_READ_ONLY | sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA);
        assert_eq!((p.basic.logical_bs_shift, p.basic.physical_bs_shift), (12, 12));
        assert_eq!((p.basic.dev_sectors, p.basic.max_sectors), (1 << 21, 1024));
        assert_eq!(kernel_params(&good()).basic.logical_bs_shift, 9);
        assert_eq!(p.discard.max_discard_segments, 1);
        assert!(p.discard.max_discard_sectors.is_multiple_of(8));
    }
}
