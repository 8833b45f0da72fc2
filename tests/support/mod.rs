//! What the tests and benches of all ops share: the devices to run on, buffers that notice stray writes, tolerances.
//!
//! A test is written once and runs on every [`TestDevice`]. Without a GPU the CUDA part prints that it was skipped;
//! `NXS_REQUIRE_GPU=1` turns the skip into a failure. `NXS_CASES` sets the number of random cases a property test draws.

#![allow(dead_code)] // each test file uses its part

use std::fmt::Debug;

use nextscale::dtype::{Code, Element, Float};
use nextscale::{DType, In, Out, Stream, bf16, f16};

#[cfg(feature = "cudarc-0_19")]
use nextscale::cudarc_0_19::cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr};
#[cfg(feature = "cudarc-0_19")]
use std::sync::Arc;

/// A place to run the ops under test.
#[derive(Clone)]
pub enum TestDevice {
    Host,
    #[cfg(feature = "emulate")]
    Emulated,
    #[cfg(feature = "cudarc-0_19")]
    Cuda(Arc<CudaStream>),
}

impl Debug for TestDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.stream().device())
    }
}

impl TestDevice {
    /// Every device of this build and machine.
    pub fn all() -> Vec<TestDevice> {
        let mut devices = vec![TestDevice::Host];
        devices.extend(Self::kernels());
        devices
    }

    /// The devices that run kernels, each with a stream of its own.
    pub fn kernels() -> Vec<TestDevice> {
        let devices = Self::cuda().into_iter();
        #[cfg(feature = "emulate")]
        let devices = std::iter::once(TestDevice::Emulated).chain(devices);
        devices.collect()
    }

    /// A new stream of the first GPU, if this build has kernels and this machine a driver and a device.
    pub fn cuda() -> Option<TestDevice> {
        let missing = if !cfg!(all(feature = "cuda", feature = "cudarc-0_19")) {
            "built without the features cuda and cudarc-0_19"
        } else if !nextscale::driver_present() {
            "no CUDA driver"
        } else {
            #[cfg(feature = "cudarc-0_19")]
            if let Ok(context) = CudaContext::new(0) {
                // SAFETY: buffers of these tests are used on one stream each; capture needs tracking off.
                unsafe { context.disable_event_tracking() };
                return Some(TestDevice::Cuda(context.new_stream().expect("a stream")));
            }
            "no CUDA device"
        };
        assert!(std::env::var_os("NXS_REQUIRE_GPU").is_none(), "NXS_REQUIRE_GPU is set: {missing}");
        static SAID: std::sync::Once = std::sync::Once::new();
        SAID.call_once(|| eprintln!("SKIPPED on CUDA: {missing}"));
        None
    }

    /// Whether it runs kernels, but on the CPU: too slow for large problems.
    pub fn is_emulated(&self) -> bool {
        !self.is_host() && !matches!(self.stream().device(), nextscale::Device::Cuda(_))
    }

    pub fn is_host(&self) -> bool {
        matches!(self, TestDevice::Host)
    }

    pub fn stream(&self) -> Stream<'_> {
        match self {
            TestDevice::Host => Stream::host(),
            #[cfg(feature = "emulate")]
            TestDevice::Emulated => Stream::emulated(),
            #[cfg(feature = "cudarc-0_19")]
            TestDevice::Cuda(stream) => nextscale::AsStream::as_stream(stream),
        }
    }

    /// Waits for the stream; a fault inside a kernel shows here.
    pub fn sync(&self) {
        match self {
            TestDevice::Host => {}
            #[cfg(feature = "emulate")]
            TestDevice::Emulated => {}
            #[cfg(feature = "cudarc-0_19")]
            TestDevice::Cuda(stream) => stream.synchronize().expect("the kernels ran without a fault"),
        }
    }
}

/// Something to be done for types that are known only at run time: integer codes and two floats.
pub trait ForDTypes {
    fn call<C: Code, E: Float, O: Float>(self);
}

/// Calls `work` with the types of three dtypes: codes, an input float, an output float.
pub fn for_dtypes(codes: DType, input: DType, output: DType, work: impl ForDTypes) {
    fn with_codes<E: Float, O: Float>(codes: DType, work: impl ForDTypes) {
        match codes {
            DType::U16 => work.call::<u16, E, O>(),
            DType::U32 => work.call::<u32, E, O>(),
            DType::I64 => work.call::<i64, E, O>(),
            other => panic!("{other} is no type of codes"),
        }
    }
    fn with_input<E: Float>(codes: DType, output: DType, work: impl ForDTypes) {
        match output {
            DType::F32 => with_codes::<E, f32>(codes, work),
            DType::F16 => with_codes::<E, f16>(codes, work),
            DType::BF16 => with_codes::<E, bf16>(codes, work),
            other => panic!("{other} is no float"),
        }
    }
    match input {
        DType::F32 => with_input::<f32>(codes, output, work),
        DType::F16 => with_input::<f16>(codes, output, work),
        DType::BF16 => with_input::<bf16>(codes, output, work),
        other => panic!("{other} is no float"),
    }
}

/// Something to be done for two floats that are known only at run time: an input and an output.
pub trait ForFloats {
    fn call<E: Float, O: Float>(self);
}

/// Calls `work` with the types of two dtypes.
pub fn for_floats(input: DType, output: DType, work: impl ForFloats) {
    struct IgnoringCodes<W>(W);
    impl<W: ForFloats> ForDTypes for IgnoringCodes<W> {
        fn call<C: Code, E: Float, O: Float>(self) {
            self.0.call::<E, O>();
        }
    }
    for_dtypes(DType::U32, input, output, IgnoringCodes(work));
}

/// Something to be done for three floats that are known only at run time.
pub trait ForThreeFloats {
    fn call<A: Float, B: Float, C: Float>(self);
}

/// Calls `work` with the types of three dtypes.
pub fn for_three_floats(first: DType, second: DType, third: DType, work: impl ForThreeFloats) {
    struct WithThird<W>(DType, W);
    impl<W: ForThreeFloats> ForFloats for WithThird<W> {
        fn call<A: Float, B: Float>(self) {
            match self.0 {
                DType::F32 => self.1.call::<A, B, f32>(),
                DType::F16 => self.1.call::<A, B, f16>(),
                DType::BF16 => self.1.call::<A, B, bf16>(),
                other => panic!("{other} is no float"),
            }
        }
    }
    for_floats(first, second, WithThird(third, work));
}

pub const CODES: [DType; 3] = [DType::U16, DType::U32, DType::I64];
pub const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// A dtype by the name it has in files.
pub fn dtype(name: &str) -> DType {
    let all = CODES.into_iter().chain(FLOATS);
    all.into_iter().find(|dtype| dtype.to_string() == name).unwrap_or_else(|| panic!("no dtype {name}"))
}

/// Random cases a property test draws.
pub fn cases() -> u32 {
    std::env::var("NXS_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(64)
}

/// Bytes of a known pattern on either side of a buffer.
const CANARY: usize = 256;
const CANARY_BYTE: u8 = 0xA5;
/// NaN in every float type, the greatest value or -1 in every integer type.
pub const POISON_BYTE: u8 = 0xFF;

/// The element that a poisoned buffer is full of.
pub fn poison<T: Element>() -> T {
    bytemuck::pod_read_unaligned(&vec![POISON_BYTE; size_of::<T>()])
}

/// How far rounding to `T` moves a value of a magnitude at most: half a unit in the last place.
pub fn rounding<T: Float>(magnitude: f64) -> f64 {
    let (bits, smallest) = match T::DTYPE {
        DType::F32 => (24, -149),
        DType::F16 => (11, -24),
        _ => (8, -133),
    };
    (magnitude * 0.5f64.powi(bits)).max(2f64.powi(smallest - 1))
}

/// A device buffer between two canaries. It starts `shift` elements off its 256-byte alignment.
pub struct Buffer<T> {
    device: TestDevice,
    storage: Storage,
    start: usize,
    len: usize,
    _elements: std::marker::PhantomData<T>,
}

enum Storage {
    Host(Vec<Line>),
    #[cfg(feature = "cudarc-0_19")]
    Cuda(CudaSlice<u8>),
}

/// Memory with the alignment of a device allocation.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(256))]
struct Line([u8; 256]);

impl<T: Element> Buffer<T> {
    /// A buffer that holds `elements`.
    pub fn of(device: &TestDevice, elements: &[T], shift: usize) -> Self {
        Self::with_payload(device, bytemuck::cast_slice(elements), shift)
    }

    /// A buffer full of poison.
    pub fn poisoned(device: &TestDevice, len: usize, shift: usize) -> Self {
        Self::with_payload(device, &vec![POISON_BYTE; len * size_of::<T>()], shift)
    }

    fn with_payload(device: &TestDevice, payload: &[u8], shift: usize) -> Self {
        let start = CANARY + shift * size_of::<T>();
        let bytes = start + payload.len() + CANARY;
        let mut lines = vec![Line([CANARY_BYTE; 256]); bytes.div_ceil(256)];
        bytemuck::cast_slice_mut::<_, u8>(&mut lines)[start..start + payload.len()].copy_from_slice(payload);
        let storage = match device {
            TestDevice::Host => Storage::Host(lines),
            #[cfg(feature = "emulate")]
            TestDevice::Emulated => Storage::Host(lines),
            #[cfg(feature = "cudarc-0_19")]
            TestDevice::Cuda(stream) => {
                Storage::Cuda(stream.clone_htod(bytemuck::cast_slice::<_, u8>(&lines)).expect("device memory"))
            }
        };
        let len = payload.len() / size_of::<T>();
        Buffer { device: device.clone(), storage, start, len, _elements: std::marker::PhantomData }
    }

    #[cfg(feature = "cudarc-0_19")]
    fn address(&self) -> Option<u64> {
        match (&self.storage, &self.device) {
            (Storage::Cuda(slice), TestDevice::Cuda(stream)) => Some(slice.device_ptr(stream).0 + self.start as u64),
            _ => None,
        }
    }

    pub fn input(&self) -> In<'_, T> {
        self.input_of(self.len)
    }

    /// A view of the first `len` elements.
    pub fn input_of(&self, len: usize) -> In<'_, T> {
        self.input_from(0, len)
    }

    /// A view of `len` elements from element `first` on.
    pub fn input_from(&self, first: usize, len: usize) -> In<'_, T> {
        match &self.storage {
            Storage::Host(lines) => {
                let bytes = &bytemuck::cast_slice::<_, u8>(lines)[self.start..][..self.len * size_of::<T>()];
                let elements = &bytemuck::cast_slice(bytes)[first..first + len];
                #[cfg(feature = "emulate")]
                if self.device.is_emulated() {
                    return In::emulated(elements);
                }
                In::host(elements)
            }
            #[cfg(feature = "cudarc-0_19")]
            // SAFETY: the memory is this buffer's, and tests sync before they drop it.
            Storage::Cuda(_) => unsafe {
                In::from_raw(self.address().unwrap() + (first * size_of::<T>()) as u64, len, 0)
            },
        }
    }

    pub fn output(&mut self) -> Out<'_, T> {
        self.output_of(self.len)
    }

    /// A view of the first `len` elements.
    pub fn output_of(&mut self, len: usize) -> Out<'_, T> {
        #[cfg(feature = "cudarc-0_19")]
        if let Some(address) = self.address() {
            // SAFETY: the memory is this buffer's, mutably borrowed, and tests sync before they drop it.
            return unsafe { Out::from_raw(address, len, 0) };
        }
        match &mut self.storage {
            Storage::Host(lines) => {
                let bytes = &mut bytemuck::cast_slice_mut::<_, u8>(lines)[self.start..][..self.len * size_of::<T>()];
                let elements = &mut bytemuck::cast_slice_mut(bytes)[..len];
                #[cfg(feature = "emulate")]
                if self.device.is_emulated() {
                    return Out::emulated(elements);
                }
                Out::host(elements)
            }
            #[cfg(feature = "cudarc-0_19")]
            Storage::Cuda(_) => unreachable!("a device buffer has an address"),
        }
    }

    /// Overwrites the elements, in the order of the stream.
    pub fn write(&mut self, elements: &[T]) {
        let payload: &[u8] = bytemuck::cast_slice(elements);
        assert_eq!(elements.len(), self.len);
        let range = self.start..self.start + payload.len();
        match &mut self.storage {
            Storage::Host(lines) => bytemuck::cast_slice_mut::<_, u8>(lines)[range].copy_from_slice(payload),
            #[cfg(feature = "cudarc-0_19")]
            Storage::Cuda(slice) => match &self.device {
                TestDevice::Cuda(stream) => {
                    stream.memcpy_htod(payload, &mut slice.slice_mut(range)).expect("a copy to the device");
                }
                _ => unreachable!("a device buffer has a device"),
            },
        }
    }

    /// Overwrites one byte at an offset from the start of the elements, inside or outside of them: what a broken kernel
    /// might do. Host only.
    pub fn scribble(&mut self, offset: isize, byte: u8) {
        match &mut self.storage {
            Storage::Host(lines) => {
                bytemuck::cast_slice_mut::<_, u8>(lines)[self.start.checked_add_signed(offset).unwrap()] = byte;
            }
            #[cfg(feature = "cudarc-0_19")]
            Storage::Cuda(_) => unreachable!("only host buffers are scribbled on"),
        }
    }

    /// Waits for the device and returns the elements. Panics if a canary was written over.
    pub fn read(&self) -> Vec<T> {
        self.device.sync();
        let bytes = match &self.storage {
            Storage::Host(lines) => bytemuck::cast_slice::<_, u8>(lines).to_vec(),
            #[cfg(feature = "cudarc-0_19")]
            Storage::Cuda(slice) => match &self.device {
                TestDevice::Cuda(stream) => stream.clone_dtoh(slice).expect("a copy to the host"),
                _ => unreachable!("a device buffer has a device"),
            },
        };
        let end = self.start + self.len * size_of::<T>();
        for (at, &byte) in bytes.iter().enumerate() {
            if !(self.start..end).contains(&at) {
                assert_eq!(byte, CANARY_BYTE, "canary written at byte {} of the buffer", at as i64 - self.start as i64);
            }
        }
        bytemuck::allocation::pod_collect_to_vec(&bytes[self.start..end])
    }
}

/// A CUDA graph of `launches`, or what went wrong.
#[cfg(feature = "cudarc-0_19")]
pub fn capture(stream: &Arc<CudaStream>, launches: impl FnOnce()) -> nextscale::cudarc_0_19::cudarc::driver::CudaGraph {
    use nextscale::cudarc_0_19::cudarc::driver::sys;
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).expect("capture begins");
    launches();
    stream
        .end_capture(sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH)
        .expect("capture ends")
        .expect("the graph has nodes")
}

/// How far a result may be from an f64 reference: `|a - r| <= atol + rtol * |r|` for every element, and over all of them
/// `‖a - r‖ <= rel_l2 * ‖r‖`. A NaN is never close.
#[derive(Debug, Clone, Copy)]
pub struct Tolerance {
    pub atol: f64,
    pub rtol: f64,
    pub rel_l2: f64,
}

impl Tolerance {
    /// For a result that was computed in f32 and rounded once to a type of `bits` of precision (24, 11, 8, 4).
    pub const fn rounded_to(bits: u32) -> Self {
        let ulp = 1.0 / (1u64 << bits) as f64;
        Tolerance { atol: 1e-6, rtol: ulp + 1e-6, rel_l2: ulp + 1e-6 }
    }

    pub fn check(&self, actual: &[f64], reference: &[f64]) -> Result<(), String> {
        if actual.len() != reference.len() {
            return Err(format!("{} elements, {} expected", actual.len(), reference.len()));
        }
        let (mut error2, mut norm2) = (0.0, 0.0);
        for (i, (&a, &r)) in actual.iter().zip(reference).enumerate() {
            let error = (a - r).abs();
            // A comparison with NaN is false: NaN fails.
            let close = error <= self.atol + self.rtol * r.abs();
            if !close {
                return Err(format!("element {i}: {a} instead of {r}"));
            }
            error2 += error * error;
            norm2 += r * r;
        }
        if f64::sqrt(error2) <= self.rel_l2 * f64::sqrt(norm2) + self.atol {
            Ok(())
        } else {
            Err(format!("relative L2 error {}", f64::sqrt(error2 / norm2)))
        }
    }
}
