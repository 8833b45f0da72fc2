//! cudarc 0.19: its streams run ops, its buffers become views.
//!
//! ```no_run
//! use nextscale::cudarc_0_19::{AsIn, AsOut, cudarc::driver::CudaContext};
//! use nextscale::{DeviceInfo, quantization::{RvqDecode, RvqDecodeArgs}};
//! let stream = CudaContext::new(0)?.new_stream()?;
//! let codes = stream.clone_htod(&vec![0u32; 8 * 1000])?;
//! let codebooks = stream.clone_htod(&vec![0f32; 8 * 1024 * 128])?;
//! let mut out = stream.alloc_zeros::<f32>(1000 * 128)?;
//! let plan = RvqDecode::builder(8, 1024, 128).rows(1000).build(&DeviceInfo::of(&stream)?)?;
//! plan.run(&stream, RvqDecodeArgs {
//!     codes: codes.as_in(&stream),
//!     codebooks: codebooks.as_in(&stream),
//!     out: out.as_out(&stream),
//!     flags: None,
//! })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! cudarc's own ordering holds: making a view makes its stream wait for the buffer's pending accesses, and dropping it,
//! which happens when `run` returns, records the new one. For CUDA graph capture turn cudarc's event tracking off before
//! the buffers are allocated, or use raw views.

use std::sync::Arc;

/// The cudarc that this adapter is for.
pub use ::cudarc_0_19 as cudarc;

use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};

use crate::device::Device;
use crate::dtype::Element;
use crate::stream::{AsStream, Stream};
use crate::view::{In, Out, Span};

impl AsStream for Arc<CudaStream> {
    fn as_stream(&self) -> Stream<'_> {
        Stream::from_cudarc(self)
    }
}

impl AsStream for CudaStream {
    fn as_stream(&self) -> Stream<'_> {
        Stream::from_cudarc(self)
    }
}

fn span(address: u64, len: usize, stream: &CudaStream) -> Span {
    let id = Stream::from_cudarc(stream).id();
    let device = Device::Cuda(stream.context().ordinal() as i32);
    Span { address: address as usize, len, device, stream: Some(id) }
}

/// Device buffers that can be read: `CudaSlice`, `CudaView`, `CudaViewMut`.
pub trait AsIn<T: Element> {
    /// A view for an op that runs on `stream`, and on no other.
    fn as_in<'a>(&'a self, stream: &'a CudaStream) -> In<'a, T>;
}

impl<T: Element, B: DevicePtr<T>> AsIn<T> for B {
    fn as_in<'a>(&'a self, stream: &'a CudaStream) -> In<'a, T> {
        let len = self.len();
        let (address, guard) = self.device_ptr(stream);
        In::from_cudarc(span(address, len, stream), guard)
    }
}

/// Device buffers that can be written: `CudaSlice`, `CudaViewMut`.
pub trait AsOut<T: Element> {
    /// A view for an op that runs on `stream`, and on no other.
    fn as_out<'a>(&'a mut self, stream: &'a CudaStream) -> Out<'a, T>;
}

impl<T: Element, B: DevicePtrMut<T>> AsOut<T> for B {
    fn as_out<'a>(&'a mut self, stream: &'a CudaStream) -> Out<'a, T> {
        let len = self.len();
        let (address, guard) = self.device_ptr_mut(stream);
        Out::from_cudarc(span(address, len, stream), guard)
    }
}
