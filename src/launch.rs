//! What every `run` does: check the operands, then call a launcher. No step here allocates.

use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::stream::Stream;
use crate::view::{In, Out, Span};

/// More operands than any op has.
const MOST: usize = 40;

/// Checks the buffers of one call: on the stream's device and ordered on the stream, long enough, aligned to their
/// elements, and nothing written that is also another operand.
///
/// ```text
/// Operands::of(&stream).input("codes", &args.codes, need)?.output("out", &args.out, need)?.finish()?
/// ```
pub(crate) struct Operands<'s> {
    stream: &'s Stream<'s>,
    used: usize,
    ranges: [Range; MOST],
}

#[derive(Clone, Copy)]
struct Range {
    arg: &'static str,
    start: usize,
    end: usize,
    written: bool,
}

impl<'s> Operands<'s> {
    pub(crate) fn of(stream: &'s Stream<'s>) -> Self {
        Operands { stream, used: 0, ranges: [Range { arg: "", start: 0, end: 0, written: false }; MOST] }
    }

    /// `need`: elements that the op's shape and strides reach over.
    pub(crate) fn input<T: Element>(mut self, arg: &'static str, view: &In<'_, T>, need: u64) -> Result<Self> {
        self.add(arg, view.span(), T::DTYPE.size(), need, false)?;
        Ok(self)
    }

    pub(crate) fn input_if<T: Element>(self, arg: &'static str, view: &Option<In<'_, T>>, need: u64) -> Result<Self> {
        match view {
            Some(view) => self.input(arg, view, need),
            None => Ok(self),
        }
    }

    pub(crate) fn output<T: Element>(mut self, arg: &'static str, view: &Out<'_, T>, need: u64) -> Result<Self> {
        self.add(arg, view.span(), T::DTYPE.size(), need, true)?;
        Ok(self)
    }

    pub(crate) fn output_if<T: Element>(self, arg: &'static str, view: &Option<Out<'_, T>>, need: u64) -> Result<Self> {
        match view {
            Some(view) => self.output(arg, view, need),
            None => Ok(self),
        }
    }

    /// An operand that the plan may not need: `need` is then 0.
    pub(crate) fn input_needed<T: Element>(
        self,
        arg: &'static str,
        view: &Option<In<'_, T>>,
        need: u64,
    ) -> Result<Self> {
        match view {
            Some(view) => self.input(arg, view, need),
            None if need > 0 => Err(Error::Length { arg, need, got: 0 }),
            None => Ok(self),
        }
    }

    /// [`Operands::workspace`], which may be left out where none is needed.
    pub(crate) fn workspace_if(self, view: &Option<Out<'_, u8>>, need: u64) -> Result<Self> {
        match view {
            Some(view) => self.workspace(view, need),
            None if need > 0 => Err(Error::Workspace { need, got: 0 }),
            None => Ok(self),
        }
    }

    /// Scratch memory of at least `need` bytes, 256-byte aligned; its content is of no interest.
    pub(crate) fn workspace(mut self, view: &Out<'_, u8>, need: u64) -> Result<Self> {
        let span = view.span();
        if (span.len as u64) < need {
            return Err(Error::Workspace { need, got: span.len as u64 });
        }
        if need > 0 && !span.address.is_multiple_of(256) {
            return Err(Error::Alignment { arg: "workspace", need: 256 });
        }
        self.add("workspace", span, 1, need, true)?;
        Ok(self)
    }

    fn add(&mut self, arg: &'static str, span: Span, size: usize, need: u64, written: bool) -> Result<()> {
        if span.device != self.stream.device() {
            return Err(Error::DeviceMismatch { arg, stream: self.stream.device(), got: span.device });
        }
        if span.stream.is_some_and(|id| id != self.stream.id()) {
            return Err(Error::StreamMismatch { arg });
        }
        if (span.len as u64) < need {
            return Err(Error::Length { arg, need, got: span.len as u64 });
        }
        if !span.address.is_multiple_of(size) {
            return Err(Error::Alignment { arg, need: size });
        }
        let range = Range { arg, start: span.address, end: span.address + need as usize * size, written };
        self.ranges[self.used] = range;
        self.used += 1;
        Ok(())
    }

    /// The last check, over pairs.
    pub(crate) fn finish(self) -> Result<()> {
        let ranges = &self.ranges[..self.used];
        for (i, a) in ranges.iter().enumerate() {
            for b in &ranges[i + 1..] {
                if (a.written || b.written) && a.start < b.end && b.start < a.end {
                    let (written, other) = if a.written { (a.arg, b.arg) } else { (b.arg, a.arg) };
                    return Err(Error::Overlap { written, other });
                }
            }
        }
        Ok(())
    }
}

/// Where an optional operand lies, for the C ABI.
#[cfg(nxs_kernels)]
pub(crate) fn address<T: Element, C>(view: &Option<In<'_, T>>) -> *const C {
    view.as_ref().map_or(core::ptr::null(), |view| view.span().address as *const C)
}

/// Where an optional output lies, for the C ABI.
#[cfg(nxs_kernels)]
pub(crate) fn address_mut<T: Element, C>(view: &Option<Out<'_, T>>) -> *mut C {
    view.as_ref().map_or(core::ptr::null_mut(), |view| view.span().address as *mut C)
}

/// Calls a launcher on a CUDA stream and turns its status into a `Result`.
///
/// `launcher` gets the raw stream; it is called with the stream's device current, or not at all.
#[cfg(nxs_kernels)]
pub(crate) fn launch(
    op: &'static str,
    stream: &Stream<'_>,
    launcher: impl FnOnce(*mut core::ffi::c_void) -> crate::ffi::nxs_status,
) -> Result<()> {
    #[cfg(feature = "emulate")]
    return match stream.device() {
        crate::device::Device::Emulated => check(op, launcher(core::ptr::null_mut())),
        _ => Err(Error::NotCompiled),
    };
    #[cfg(not(feature = "emulate"))]
    launch_on_cuda(op, stream, launcher)
}

#[cfg(all(nxs_kernels, not(feature = "emulate")))]
fn launch_on_cuda(
    op: &'static str,
    stream: &Stream<'_>,
    launcher: impl FnOnce(*mut core::ffi::c_void) -> crate::ffi::nxs_status,
) -> Result<()> {
    crate::device::require_driver()?;
    stream.bind()?;
    // A stream of another device than the current one would fault late and far away.
    let mut current = 0;
    // SAFETY: `current` is a valid place for the call to fill.
    check("nxs_current_device", unsafe { crate::ffi::nxs_current_device(&mut current) })?;
    let current = crate::device::Device::Cuda(current);
    if stream.device() != current {
        return Err(Error::DeviceMismatch { arg: "stream", stream: stream.device(), got: current });
    }
    check(op, launcher(stream.handle()))
}

#[cfg(nxs_kernels)]
pub(crate) fn check(op: &'static str, status: crate::ffi::nxs_status) -> Result<()> {
    // cudaError_t values that mean something to a caller.
    const INSUFFICIENT_DRIVER: i32 = 35;
    const NO_DEVICE: i32 = 100;
    const NO_KERNEL_IMAGE: i32 = 209;
    const UNSUPPORTED_PTX: i32 = 222;
    match status {
        0 => Ok(()),
        INSUFFICIENT_DRIVER => Err(Error::DriverUnavailable { searched: "a driver as new as the build's toolkit" }),
        NO_DEVICE => Err(Error::DriverUnavailable { searched: "a CUDA device" }),
        NO_KERNEL_IMAGE | UNSUPPORTED_PTX => {
            Err(Error::UnsupportedDevice { have: None, need: "the architectures in NXS_CUDA_ARCHS" })
        }
        code => {
            // SAFETY: the function takes any status and returns a static C string.
            let name = unsafe { core::ffi::CStr::from_ptr(crate::ffi::nxs_status_name(code)) };
            Err(Error::Launch { op, code, name: name.to_str().unwrap_or("?") })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workspace_is_checked() {
        let stream = Stream::host();
        let mut bytes = vec![0u8; 1024];
        let skip = bytes.as_ptr().align_offset(256);
        let check = |view: Out<'_, u8>, need| Operands::of(&stream).workspace(&view, need).and_then(Operands::finish);
        assert_eq!(check(Out::host(&mut bytes[skip..skip + 100]), 100), Ok(()));
        assert_eq!(check(Out::host(&mut bytes[skip..skip + 99]), 100), Err(Error::Workspace { need: 100, got: 99 }));
        assert_eq!(
            check(Out::host(&mut bytes[skip + 1..skip + 101]), 100),
            Err(Error::Alignment { arg: "workspace", need: 256 })
        );
        assert_eq!(check(Out::host(&mut []), 0), Ok(()));
    }

    #[test]
    fn overlap_counts_only_what_is_reached_and_written() {
        // SAFETY: nothing is launched; the addresses are only compared.
        let (stream, a, b) = unsafe {
            let stream = Stream::from_raw(core::ptr::null_mut(), 0);
            (stream, In::<u32>::from_raw(4096, 4, 0), Out::<u32>::from_raw(4096 + 3 * 4, 4, 0))
        };
        let check = |need| Operands::of(&stream).input("a", &a, need)?.output("b", &b, 4)?.finish();
        assert_eq!(check(3), Ok(()));
        assert_eq!(check(4), Err(Error::Overlap { written: "b", other: "a" }));
        let both = Operands::of(&stream).input("a", &a, 4).unwrap().input("c", &a, 4).unwrap();
        assert_eq!(both.finish(), Ok(()));
    }
}
