//! Where things live, and what planning needs to know of it.

use core::fmt;

use crate::error::{Error, Result};
use crate::stream::AsStream;

/// Where a buffer or a stream lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Device {
    /// The host: ops run at once, on the calling thread.
    Host,
    /// A CUDA device by ordinal.
    Cuda(i32),
    /// The emulator: kernels on the CPU, at once, in host memory.
    #[cfg(feature = "emulate")]
    Emulated,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Host => f.write_str("the host"),
            Device::Cuda(ordinal) => write!(f, "CUDA device {ordinal}"),
            #[cfg(feature = "emulate")]
            Device::Emulated => f.write_str("the emulator"),
        }
    }
}

/// A compute capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Arch {
    /// 9 in 9.0.
    pub major: i32,
    /// 0 in 9.0.
    pub minor: i32,
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sm_{}{}", self.major, self.minor)
    }
}

/// What a plan needs to know of the device it is made for. Plain data: plans can be made where no device is.
///
/// A plan runs on any device that has its kernels; made for another device it is correct, only not tuned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// Compute capability.
    pub arch: Arch,
    /// Multiprocessors.
    pub sm_count: i32,
    /// Bytes of shared memory a block may have.
    pub smem_per_block: i32,
    /// Bytes of L2 cache.
    pub l2_bytes: i64,
}

impl DeviceInfo {
    /// An A100, the least device the kernels run on: what a plan for the host stream assumes.
    pub const A100: DeviceInfo =
        DeviceInfo { arch: Arch { major: 8, minor: 0 }, sm_count: 108, smem_per_block: 163 << 10, l2_bytes: 40 << 20 };
    /// An H200 (and but for its L2 of 50 MiB an H100).
    pub const H200: DeviceInfo =
        DeviceInfo { arch: Arch { major: 9, minor: 0 }, sm_count: 132, smem_per_block: 227 << 10, l2_bytes: 60 << 20 };

    /// Facts of the stream's device; [`DeviceInfo::A100`] for the host. Asks the driver a few attributes: microseconds,
    /// no allocation. Keep the result.
    ///
    /// # Errors
    /// [`Error::NotCompiled`], [`Error::DriverUnavailable`], or what CUDA said.
    pub fn of<S: AsStream + ?Sized>(stream: &S) -> Result<Self> {
        match stream.as_stream().device() {
            Device::Host => Ok(Self::A100),
            Device::Cuda(ordinal) => Self::of_cuda(ordinal),
            #[cfg(feature = "emulate")]
            Device::Emulated => Ok(Self::H200),
        }
    }

    #[cfg(all(nxs_kernels, not(feature = "emulate")))]
    fn of_cuda(ordinal: i32) -> Result<Self> {
        require_driver()?;
        let mut info = crate::ffi::nxs_device_info::default();
        // SAFETY: `info` is a valid place for the call to fill.
        let status = unsafe { crate::ffi::nxs_get_device_info(ordinal, &mut info) };
        crate::launch::check("nxs_get_device_info", status)?;
        Ok(DeviceInfo {
            arch: Arch { major: info.cc_major, minor: info.cc_minor },
            sm_count: info.sm_count,
            smem_per_block: info.smem_per_block_max,
            l2_bytes: info.l2_bytes,
        })
    }

    #[cfg(any(not(nxs_kernels), feature = "emulate"))]
    fn of_cuda(_ordinal: i32) -> Result<Self> {
        Err(Error::NotCompiled)
    }
}

const DRIVER: &str = if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1" };

/// Whether a CUDA driver can be loaded. Looks once; creates no context.
pub fn driver_present() -> bool {
    use std::sync::OnceLock;
    static PRESENT: OnceLock<bool> = OnceLock::new();
    *PRESENT.get_or_init(|| {
        // SAFETY: the driver's own initialisers run, as in every CUDA program; it stays loaded for good, as it expects.
        unsafe { libloading::Library::new(DRIVER) }.map(core::mem::forget).is_ok()
    })
}

/// Before any call that would need the driver: an error value instead of CUDA's own ways of failing.
#[cfg_attr(any(not(nxs_kernels), feature = "emulate"), allow(dead_code))]
pub(crate) fn require_driver() -> Result<()> {
    if driver_present() { Ok(()) } else { Err(Error::DriverUnavailable { searched: DRIVER }) }
}
