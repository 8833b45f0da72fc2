//! Where a request runs: memory and a stream.
//!
//! A device is one variant of [`Runner`], one of [`Buffer`], and one arm in each match here. Ops see none of it.

use std::marker::PhantomData;
#[cfg(feature = "cudarc-0_19")]
use std::sync::Arc;

#[cfg(feature = "cudarc-0_19")]
use nextscale::cudarc_0_19::cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DriverError,
};
use nextscale::dtype::Element;
#[cfg(feature = "cudarc-0_19")]
use nextscale::{AsStream, Device};
use nextscale::{DeviceInfo, In, Out, Stream};

use crate::request::Failure;

/// What `--device` takes.
pub(crate) const DEVICES: &str = "host|cuda[:ordinal]|emulated";

const NO_CUDA: &str = "--device cuda: build this with --features cuda,cudarc-0_19";

/// A device, ready to run ops.
pub(crate) enum Runner {
    Host,
    #[cfg(feature = "emulate")]
    Emulated,
    #[cfg(feature = "cudarc-0_19")]
    Cuda(Arc<CudaStream>),
}

/// Elements on a runner's device.
pub(crate) enum Buffer<T> {
    /// On the 256-byte alignment of a device allocation, as workspaces want it.
    Host { lines: Vec<Line>, len: usize, elements: PhantomData<T> },
    /// Aligned alike, so that the sectors that are counted are those of a GPU.
    #[cfg(feature = "emulate")]
    Emulated { lines: Vec<Line>, len: usize },
    /// In bytes: cudarc does not know all of our element types. Never of size zero, which CUDA cannot allocate.
    #[cfg(feature = "cudarc-0_19")]
    Cuda { bytes: CudaSlice<u8>, len: usize },
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(256))]
pub(crate) struct Line([u8; 256]);

fn lines_of<T: Element>(elements: &[T]) -> Vec<Line> {
    let mut lines = vec![Line([0; 256]); size_of_val(elements).div_ceil(256)];
    bytemuck::cast_slice_mut(&mut lines)[..elements.len()].copy_from_slice(elements);
    lines
}

impl Runner {
    /// `counters`: the device must be one that counts.
    pub(crate) fn open(device: &str, counters: bool) -> Result<Self, Failure> {
        if counters && device != "emulated" {
            return Err(Failure::request(format!("--counters: only --device emulated counts, not {device}")));
        }
        match device.split_once(':').unwrap_or((device, "")) {
            ("host", "") => Ok(Runner::Host),
            ("cuda", "") => Self::open_cuda(0),
            ("cuda", ordinal) => match ordinal.parse() {
                Ok(ordinal) => Self::open_cuda(ordinal),
                Err(_) => Err(Failure::request(format!("--device {device}: {ordinal:?} is not an ordinal"))),
            },
            #[cfg(feature = "emulate")]
            ("emulated", "") => Ok(Runner::Emulated),
            #[cfg(not(feature = "emulate"))]
            ("emulated", "") => Err(Failure::Failed("--device emulated: build this with --features emulate".into())),
            _ => Err(Failure::request(format!("--device {device}: not one of {DEVICES}"))),
        }
    }

    #[cfg(feature = "cudarc-0_19")]
    fn open_cuda(ordinal: usize) -> Result<Self, Failure> {
        if !cfg!(feature = "cuda") {
            return Err(Failure::Failed(NO_CUDA.into()));
        }
        // cudarc panics where there is no driver.
        if !nextscale::driver_present() {
            return Err(Failure::Failed("--device cuda: this machine has no CUDA driver".into()));
        }
        Ok(Runner::Cuda(CudaContext::new(ordinal)?.new_stream()?))
    }

    #[cfg(not(feature = "cudarc-0_19"))]
    fn open_cuda(_ordinal: usize) -> Result<Self, Failure> {
        Err(Failure::Failed(NO_CUDA.into()))
    }

    pub(crate) const fn is_host(&self) -> bool {
        matches!(self, Runner::Host)
    }

    /// What this thread's runs did, a line for each counter that is not zero; empty where nothing counts.
    pub(crate) fn counters(&self) -> String {
        match self {
            #[cfg(feature = "emulate")]
            Runner::Emulated => nextscale::emulator::counters().to_string(),
            _ => String::new(),
        }
    }

    /// Facts for planning.
    pub(crate) fn info(&self) -> Result<DeviceInfo, Failure> {
        Ok(DeviceInfo::of(&self.stream())?)
    }

    fn stream(&self) -> Stream<'_> {
        match self {
            Runner::Host => Stream::host(),
            #[cfg(feature = "emulate")]
            Runner::Emulated => Stream::emulated(),
            #[cfg(feature = "cudarc-0_19")]
            Runner::Cuda(stream) => stream.as_stream(),
        }
    }

    /// A copy of `elements`.
    pub(crate) fn upload<T: Element>(&self, elements: &[T]) -> Result<Buffer<T>, Failure> {
        match self {
            Runner::Host => Ok(Buffer::Host { lines: lines_of(elements), len: elements.len(), elements: PhantomData }),
            #[cfg(feature = "emulate")]
            Runner::Emulated => Ok(Buffer::Emulated { lines: lines_of(elements), len: elements.len() }),
            #[cfg(feature = "cudarc-0_19")]
            Runner::Cuda(stream) => {
                let source: &[u8] = bytemuck::cast_slice(elements);
                let mut bytes = stream.alloc_zeros::<u8>(source.len().max(1))?;
                if !source.is_empty() {
                    stream.memcpy_htod(source, &mut bytes)?;
                }
                Ok(Buffer::Cuda { bytes, len: elements.len() })
            }
        }
    }

    /// For an op to write: every bit is set (NaN in every float), so that what it leaves out is seen.
    pub(crate) fn output<T: Element>(&self, len: usize) -> Result<Buffer<T>, Failure> {
        let too_large = |_| Failure::Failed(format!("no memory for an output of {len} elements"));
        let bytes = len.checked_mul(size_of::<T>()).ok_or(()).map_err(too_large)?;
        let mut poison = Vec::new();
        poison.try_reserve_exact(bytes).map_err(|_| too_large(()))?;
        poison.resize(bytes, u8::MAX);
        self.upload(&bytemuck::pod_collect_to_vec::<u8, T>(&poison))
    }

    /// Enqueues an op and waits for it, so that what goes wrong inside a kernel is told here.
    pub(crate) fn run(&self, op: impl FnOnce(&Stream<'_>) -> nextscale::Result<()>) -> Result<(), Failure> {
        op(&self.stream())?;
        match self {
            Runner::Host => {}
            #[cfg(feature = "emulate")]
            Runner::Emulated => {}
            #[cfg(feature = "cudarc-0_19")]
            Runner::Cuda(stream) => stream.synchronize()?,
        }
        Ok(())
    }
}

impl<T: Element> Buffer<T> {
    /// For an op to read.
    pub(crate) fn as_in(&self) -> In<'_, T> {
        match self {
            Buffer::Host { lines, len, .. } => In::host(&bytemuck::cast_slice(lines)[..*len]),
            #[cfg(feature = "emulate")]
            Buffer::Emulated { lines, len } => In::emulated(&bytemuck::cast_slice(lines)[..*len]),
            #[cfg(feature = "cudarc-0_19")]
            Buffer::Cuda { bytes, len } => {
                let (address, _guard) = bytes.device_ptr(bytes.stream());
                // SAFETY: the allocation holds `len` elements and outlives the view, and `Runner::run` waits for the
                // work; there is one stream, so all accesses are ordered.
                unsafe { In::from_raw(address, *len, ordinal(bytes)) }
            }
        }
    }

    /// For an op to write.
    pub(crate) fn as_out(&mut self) -> Out<'_, T> {
        match self {
            Buffer::Host { lines, len, .. } => Out::host(&mut bytemuck::cast_slice_mut(lines)[..*len]),
            #[cfg(feature = "emulate")]
            Buffer::Emulated { lines, len } => Out::emulated(&mut bytemuck::cast_slice_mut(lines)[..*len]),
            #[cfg(feature = "cudarc-0_19")]
            Buffer::Cuda { bytes, len } => {
                let (stream, ordinal) = (bytes.stream().clone(), ordinal(bytes));
                let (address, _guard) = bytes.device_ptr_mut(&stream);
                // SAFETY: as in `as_in`; the exclusive borrow keeps other views away.
                unsafe { Out::from_raw(address, *len, ordinal) }
            }
        }
    }

    /// The elements, in host memory.
    pub(crate) fn download(self) -> Result<Vec<T>, Failure> {
        match self {
            Buffer::Host { lines, len, .. } => Ok(bytemuck::cast_slice(&lines)[..len].to_vec()),
            #[cfg(feature = "emulate")]
            Buffer::Emulated { lines, len } => Ok(bytemuck::cast_slice(&lines)[..len].to_vec()),
            #[cfg(feature = "cudarc-0_19")]
            Buffer::Cuda { bytes, len } => {
                let bytes = bytes.stream().clone_dtoh(&bytes)?;
                Ok(bytemuck::pod_collect_to_vec(&bytes[..len * size_of::<T>()]))
            }
        }
    }
}

#[cfg(feature = "cudarc-0_19")]
fn ordinal(bytes: &CudaSlice<u8>) -> i32 {
    match bytes.stream().as_stream().device() {
        Device::Cuda(ordinal) => ordinal,
        other => unreachable!("a CUDA stream on {other}"),
    }
}

#[cfg(feature = "cudarc-0_19")]
impl From<DriverError> for Failure {
    fn from(error: DriverError) -> Self {
        Failure::Failed(format!("CUDA: {error}"))
    }
}
