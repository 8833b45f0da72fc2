//! Where work is enqueued.

use core::ffi::c_void;
use core::marker::PhantomData;

use crate::device::Device;
use crate::error::Result;

/// A place to run: the host, or a CUDA stream that someone else owns.
///
/// Copy it freely; it owns nothing.
#[derive(Debug, Clone, Copy)]
pub struct Stream<'a> {
    device: Device,
    handle: usize,
    owner: Owner<'a>,
}

/// Who makes the stream's context current before a launch.
#[derive(Debug, Clone, Copy)]
enum Owner<'a> {
    /// The caller has.
    Caller(PhantomData<&'a ()>),
    #[cfg(feature = "cudarc-0_19")]
    Cudarc(&'a cudarc_0_19::driver::CudaContext),
}

impl<'a> Stream<'a> {
    /// The host: `run` computes at once and returns when the result is there.
    pub const fn host() -> Stream<'static> {
        Stream { device: Device::Host, handle: 0, owner: Owner::Caller(PhantomData) }
    }

    /// The emulator: `run` executes the kernels on the CPU and returns when they are done.
    #[cfg(feature = "emulate")]
    pub const fn emulated() -> Stream<'static> {
        Stream { device: Device::Emulated, handle: 0, owner: Owner::Caller(PhantomData) }
    }

    /// A CUDA stream by its handle (`cudaStream_t` or `CUstream`; null is the legacy default stream).
    ///
    /// # Safety
    /// `handle` is a stream of device `ordinal`, alive for `'a`, and that device (or the context the stream belongs to)
    /// is current on every thread that runs an op on it.
    pub unsafe fn from_raw(handle: *mut c_void, ordinal: i32) -> Stream<'a> {
        // Kept as a number, for `Send` and `Sync`: a handle belongs to the process, not to a thread.
        Stream { device: Device::Cuda(ordinal), handle: handle as usize, owner: Owner::Caller(PhantomData) }
    }

    #[cfg(feature = "cudarc-0_19")]
    pub(crate) fn from_cudarc(stream: &'a cudarc_0_19::driver::CudaStream) -> Self {
        Stream {
            device: Device::Cuda(stream.context().ordinal() as i32),
            handle: stream.cu_stream() as usize,
            owner: Owner::Cudarc(stream.context()),
        }
    }

    /// Where it lives.
    pub const fn device(&self) -> Device {
        self.device
    }

    /// The handle for CUDA; null for the host.
    pub fn handle(&self) -> *mut c_void {
        self.handle as *mut c_void
    }

    /// A name to compare streams by.
    pub(crate) const fn id(&self) -> StreamId {
        StreamId { device: self.device, handle: self.handle }
    }

    /// Makes the stream's context current on this thread, where its owner knows how.
    #[cfg_attr(any(not(nxs_kernels), feature = "emulate"), allow(dead_code))]
    pub(crate) fn bind(&self) -> Result<()> {
        match self.owner {
            Owner::Caller(_) => Ok(()),
            #[cfg(feature = "cudarc-0_19")]
            Owner::Cudarc(context) => context.bind_to_thread().map_err(|e| crate::error::Error::Launch {
                op: "cuCtxSetCurrent",
                code: e.0 as i32,
                name: "cudarc could not make the context current",
            }),
        }
    }
}

/// Which stream a view was ordered on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StreamId {
    device: Device,
    handle: usize,
}

/// Anything an op can run on: [`Stream`], and the stream types of the enabled engines.
pub trait AsStream {
    /// The stream to enqueue on.
    fn as_stream(&self) -> Stream<'_>;
}

impl AsStream for Stream<'_> {
    fn as_stream(&self) -> Stream<'_> {
        *self
    }
}
