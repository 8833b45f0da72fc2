//! Where it runs: memory, a stream, and what a launch needs. The host, the emulator (a feature of maintainers) or CUDA.
//!
//! Models are written once, for any activation type `A`: f32 on the host, f16 on CUDA. They see buffers and views
//! alone.

use std::marker::PhantomData;
use std::ops::Range;

use nextscale::dtype::Element;
use nextscale::{DeviceInfo, In, Out, Stream};

#[cfg(feature = "cudarc-0_19")]
use crate::cuda::Cuda;
use crate::failure::{Failure, Result};

/// What `--device` takes.
pub(crate) const DEVICES: &str = "host|cuda[:ordinal]";

const NO_CUDA: &str = "--device cuda: build this with --features cuda,cudarc-0_19";

pub(crate) enum Device {
    Host,
    #[cfg(feature = "emulate")]
    Emulated,
    #[cfg(feature = "cudarc-0_19")]
    Cuda(Cuda),
}

/// Elements on a device, from a 256-byte boundary on.
pub(crate) struct Buffer<T> {
    memory: Memory,
    len: usize,
    elements: PhantomData<T>,
}

enum Memory {
    Host(Vec<Line>),
    #[cfg(feature = "emulate")]
    Emulated(Vec<Line>),
    #[cfg(feature = "cudarc-0_19")]
    Cuda(crate::cuda::Bytes),
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(256))]
struct Line([u8; 256]);

fn lines(bytes: usize) -> Vec<Line> {
    vec![Line([0; 256]); bytes.div_ceil(256)]
}

impl Device {
    pub(crate) fn open(name: &str) -> Result<Self> {
        match name.split_once(':').unwrap_or((name, "")) {
            ("host", "") => Ok(Device::Host),
            #[cfg(feature = "emulate")]
            ("emulated", "") => Ok(Device::Emulated),
            ("cuda", "") => Self::open_cuda(0),
            ("cuda", ordinal) => match ordinal.parse() {
                Ok(ordinal) => Self::open_cuda(ordinal),
                Err(_) => Err(Failure::request(format!("--device {name}: {ordinal:?} is not an ordinal"))),
            },
            _ => Err(Failure::request(format!("--device {name}: not one of {DEVICES}"))),
        }
    }

    #[cfg(feature = "cudarc-0_19")]
    fn open_cuda(ordinal: usize) -> Result<Self> {
        match cfg!(feature = "cuda") {
            true => Ok(Device::Cuda(Cuda::open(ordinal)?)),
            false => Err(Failure::failed(NO_CUDA)),
        }
    }

    #[cfg(not(feature = "cudarc-0_19"))]
    fn open_cuda(_ordinal: usize) -> Result<Self> {
        Err(Failure::failed(NO_CUDA))
    }

    pub(crate) fn stream(&self) -> Stream<'_> {
        match self {
            Device::Host => Stream::host(),
            #[cfg(feature = "emulate")]
            Device::Emulated => Stream::emulated(),
            #[cfg(feature = "cudarc-0_19")]
            Device::Cuda(cuda) => cuda.stream(),
        }
    }

    /// Facts for planning.
    pub(crate) fn info(&self) -> Result<DeviceInfo> {
        Ok(DeviceInfo::of(&self.stream())?)
    }

    /// Zeros.
    pub(crate) fn zeros<T: Element>(&self, len: usize) -> Result<Buffer<T>> {
        let bytes = len * size_of::<T>();
        let memory = match self {
            Device::Host => Memory::Host(lines(bytes)),
            #[cfg(feature = "emulate")]
            Device::Emulated => Memory::Emulated(lines(bytes)),
            #[cfg(feature = "cudarc-0_19")]
            Device::Cuda(cuda) => Memory::Cuda(cuda.zeros(bytes)?),
        };
        Ok(Buffer { memory, len, elements: PhantomData })
    }

    pub(crate) fn upload<T: Element>(&self, elements: &[T]) -> Result<Buffer<T>> {
        let mut buffer = self.zeros(elements.len())?;
        self.write(&mut buffer, elements)?;
        Ok(buffer)
    }

    /// Overwrites the first elements.
    pub(crate) fn write<T: Element>(&self, buffer: &mut Buffer<T>, elements: &[T]) -> Result<()> {
        assert!(elements.len() <= buffer.len, "{} elements for a buffer of {}", elements.len(), buffer.len);
        let source: &[u8] = bytemuck::cast_slice(elements);
        match &mut buffer.memory {
            #[cfg(feature = "cudarc-0_19")]
            Memory::Cuda(bytes) => bytes.write(source)?,
            Memory::Host(lines) => bytemuck::cast_slice_mut(lines)[..source.len()].copy_from_slice(source),
            #[cfg(feature = "emulate")]
            Memory::Emulated(lines) => bytemuck::cast_slice_mut(lines)[..source.len()].copy_from_slice(source),
        }
        Ok(())
    }

    /// Waits for what was enqueued.
    pub(crate) fn download<T: Element>(&self, buffer: &Buffer<T>) -> Result<Vec<T>> {
        match &buffer.memory {
            #[cfg(feature = "cudarc-0_19")]
            Memory::Cuda(bytes) => Ok(bytemuck::pod_collect_to_vec(&bytes.read(buffer.len * size_of::<T>())?)),
            _ => Ok(buffer.host().to_vec()),
        }
    }

    /// Waits, so that time can be told and faults show where they happen.
    pub(crate) fn wait(&self) -> Result<()> {
        match self {
            #[cfg(feature = "cudarc-0_19")]
            Device::Cuda(cuda) => cuda.wait(),
            _ => Ok(()),
        }
    }
}

impl<T: Element> Buffer<T> {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// All of it, for an op to read.
    pub(crate) fn input(&self) -> In<'_, T> {
        self.input_of(0..self.len)
    }

    /// A part of it, for an op to read.
    pub(crate) fn input_of(&self, part: Range<usize>) -> In<'_, T> {
        match &self.memory {
            Memory::Host(_) => In::host(&self.host()[part]),
            #[cfg(feature = "emulate")]
            Memory::Emulated(_) => In::emulated(&self.host()[part]),
            #[cfg(feature = "cudarc-0_19")]
            Memory::Cuda(bytes) => {
                assert!(part.start <= part.end && part.end <= self.len);
                // SAFETY: the part lies in an allocation that the view borrows; there is one stream, which orders all
                // accesses.
                unsafe { In::from_raw(bytes.address(part.start * size_of::<T>()), part.len(), bytes.ordinal()) }
            }
        }
    }

    /// The same bits as another type of the same size.
    pub(crate) fn input_as<U: Element>(&self) -> In<'_, U> {
        assert_eq!(size_of::<T>(), size_of::<U>());
        match &self.memory {
            Memory::Host(_) => In::host(bytemuck::cast_slice(self.host())),
            #[cfg(feature = "emulate")]
            Memory::Emulated(_) => In::emulated(bytemuck::cast_slice(self.host())),
            #[cfg(feature = "cudarc-0_19")]
            // SAFETY: as in `input_of`; elements are plain data.
            Memory::Cuda(bytes) => unsafe { In::from_raw(bytes.address(0), self.len, bytes.ordinal()) },
        }
    }

    /// All of it, for an op to write.
    pub(crate) fn output(&mut self) -> Out<'_, T> {
        self.output_of(0..self.len)
    }

    /// A part of it, for an op to write.
    pub(crate) fn output_of(&mut self, part: Range<usize>) -> Out<'_, T> {
        match &self.memory {
            Memory::Host(_) => Out::host(&mut self.host_mut()[part]),
            #[cfg(feature = "emulate")]
            Memory::Emulated(_) => Out::emulated(&mut self.host_mut()[part]),
            #[cfg(feature = "cudarc-0_19")]
            Memory::Cuda(bytes) => {
                assert!(part.start <= part.end && part.end <= self.len);
                // SAFETY: as in `input_of`, and the borrow is exclusive.
                unsafe { Out::from_raw(bytes.address(part.start * size_of::<T>()), part.len(), bytes.ordinal()) }
            }
        }
    }

    /// The elements, where they are in host memory; else none.
    pub(crate) fn host(&self) -> &[T] {
        match &self.memory {
            Memory::Host(lines) => &bytemuck::cast_slice(lines)[..self.len],
            #[cfg(feature = "emulate")]
            Memory::Emulated(lines) => &bytemuck::cast_slice(lines)[..self.len],
            #[cfg(feature = "cudarc-0_19")]
            Memory::Cuda(_) => unreachable!("the elements are on the GPU"),
        }
    }

    pub(crate) fn host_mut(&mut self) -> &mut [T] {
        match &mut self.memory {
            Memory::Host(lines) => &mut bytemuck::cast_slice_mut(lines)[..self.len],
            #[cfg(feature = "emulate")]
            Memory::Emulated(lines) => &mut bytemuck::cast_slice_mut(lines)[..self.len],
            #[cfg(feature = "cudarc-0_19")]
            Memory::Cuda(_) => unreachable!("the elements are on the GPU"),
        }
    }

    /// The address of an element on the GPU, for this program's own kernels.
    #[cfg(feature = "cudarc-0_19")]
    pub(crate) fn address(&self, at: usize) -> u64 {
        match &self.memory {
            Memory::Cuda(bytes) => bytes.address(at * size_of::<T>()),
            _ => unreachable!("the elements are not on a GPU"),
        }
    }
}
