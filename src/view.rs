//! Views of buffers that ops read and write.
//!
//! A view borrows; it says where the elements are, how many, and on which device. Ops take views **by value** inside an
//! argument struct, so that an engine's guard travels with the view and is dropped after the launch, not before.

use core::fmt;
use core::marker::PhantomData;

use crate::device::Device;
use crate::dtype::Element;
use crate::stream::StreamId;

/// What an engine wants to be told when the launch is done: dropped after it.
enum Guard<'a> {
    None(PhantomData<&'a ()>),
    #[cfg(feature = "cudarc-0_19")]
    Cudarc(#[allow(dead_code)] cudarc_0_19::driver::SyncOnDrop<'a>),
}

/// The part of a view that does not depend on the element type.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Span {
    pub(crate) address: usize,
    pub(crate) len: usize,
    pub(crate) device: Device,
    /// The stream that the view's accesses were ordered on, if it matters.
    pub(crate) stream: Option<StreamId>,
}

/// A buffer that an op reads.
pub struct In<'a, T> {
    span: Span,
    _guard: Guard<'a>,
    _elements: PhantomData<&'a [T]>,
}

/// A buffer that an op writes.
pub struct Out<'a, T> {
    span: Span,
    _guard: Guard<'a>,
    _elements: PhantomData<&'a mut [T]>,
}

impl<'a, T: Element> In<'a, T> {
    /// Host memory for the emulator.
    #[cfg(feature = "emulate")]
    pub fn emulated(elements: &'a [T]) -> Self {
        let mut view = Self::host(elements);
        view.span.device = Device::Emulated;
        view
    }

    /// Host memory.
    pub fn host(elements: &'a [T]) -> Self {
        In {
            span: Span { address: elements.as_ptr() as usize, len: elements.len(), device: Device::Host, stream: None },
            _guard: Guard::None(PhantomData),
            _elements: PhantomData,
        }
    }

    /// Device memory: `len` elements from the device address `address` on.
    ///
    /// # Safety
    /// Until the work that reads it is done on its stream, the range is valid memory of device `ordinal` and nothing
    /// unordered with that stream writes it.
    pub const unsafe fn from_raw(address: u64, len: usize, ordinal: i32) -> Self {
        In {
            span: Span { address: address as usize, len, device: Device::Cuda(ordinal), stream: None },
            _guard: Guard::None(PhantomData),
            _elements: PhantomData,
        }
    }

    #[cfg(feature = "cudarc-0_19")]
    pub(crate) fn from_cudarc(span: Span, guard: cudarc_0_19::driver::SyncOnDrop<'a>) -> Self {
        In { span, _guard: Guard::Cudarc(guard), _elements: PhantomData }
    }

    /// The elements, if they are the host's.
    pub(crate) fn as_host(&self) -> Option<&[T]> {
        // SAFETY: a host span is made only from a slice that is borrowed for as long as the view lives.
        (self.span.device == Device::Host)
            .then(|| unsafe { core::slice::from_raw_parts(self.span.address as *const T, self.span.len) })
    }
}

impl<'a, T: Element> Out<'a, T> {
    /// Host memory for the emulator.
    #[cfg(feature = "emulate")]
    pub fn emulated(elements: &'a mut [T]) -> Self {
        let mut view = Self::host(elements);
        view.span.device = Device::Emulated;
        view
    }

    /// Host memory.
    pub fn host(elements: &'a mut [T]) -> Self {
        Out {
            span: Span {
                address: elements.as_mut_ptr() as usize,
                len: elements.len(),
                device: Device::Host,
                stream: None,
            },
            _guard: Guard::None(PhantomData),
            _elements: PhantomData,
        }
    }

    /// Device memory: `len` elements from the device address `address` on.
    ///
    /// # Safety
    /// Until the work that writes it is done on its stream, the range is valid memory of device `ordinal` and nothing
    /// unordered with that stream reads or writes it.
    pub const unsafe fn from_raw(address: u64, len: usize, ordinal: i32) -> Self {
        Out {
            span: Span { address: address as usize, len, device: Device::Cuda(ordinal), stream: None },
            _guard: Guard::None(PhantomData),
            _elements: PhantomData,
        }
    }

    #[cfg(feature = "cudarc-0_19")]
    pub(crate) fn from_cudarc(span: Span, guard: cudarc_0_19::driver::SyncOnDrop<'a>) -> Self {
        Out { span, _guard: Guard::Cudarc(guard), _elements: PhantomData }
    }

    /// The elements, if they are the host's.
    pub(crate) fn as_host(&mut self) -> Option<&mut [T]> {
        // SAFETY: a host span is made only from a slice that is mutably borrowed for as long as the view lives.
        (self.span.device == Device::Host)
            .then(|| unsafe { core::slice::from_raw_parts_mut(self.span.address as *mut T, self.span.len) })
    }
}

impl<'a, T: Element> Out<'a, T> {
    /// The same memory to read, while nobody writes it.
    pub(crate) fn as_in(&self) -> In<'_, T> {
        In { span: self.span, _guard: Guard::None(PhantomData), _elements: PhantomData }
    }

    /// The same view for a while.
    pub(crate) fn whole(&mut self) -> Out<'_, T> {
        self.part(0, self.span.len)
    }

    /// `len` elements from `first` on; as many as there are.
    pub(crate) fn part(&mut self, first: usize, len: usize) -> Out<'_, T> {
        Out { span: self.span.part::<T>(first, len), _guard: Guard::None(PhantomData), _elements: PhantomData }
    }
}

impl Out<'_, u8> {
    /// Parts by their first bytes and lengths, ascending and apart.
    pub(crate) fn parts<const N: usize>(&mut self, parts: [(usize, usize); N]) -> [Out<'_, u8>; N] {
        assert!(parts.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "parts lie apart");
        parts.map(|(first, len)| Out {
            span: self.span.part::<u8>(first, len),
            _guard: Guard::None(PhantomData),
            _elements: PhantomData,
        })
    }

    /// The bytes as elements, as many as they make; they are aligned to them.
    pub(crate) fn cast<T: Element>(&mut self) -> Out<'_, T> {
        assert!(self.span.address.is_multiple_of(align_of::<T>()), "elements are aligned");
        let span = Span { len: self.span.len / size_of::<T>(), ..self.span };
        Out { span, _guard: Guard::None(PhantomData), _elements: PhantomData }
    }
}

impl<'a, T: Element> In<'a, T> {
    /// `len` elements from `first` on; as many as there are.
    pub(crate) fn part(&self, first: usize, len: usize) -> In<'_, T> {
        In { span: self.span.part::<T>(first, len), _guard: Guard::None(PhantomData), _elements: PhantomData }
    }
}

impl Span {
    fn part<T>(self, first: usize, len: usize) -> Self {
        let first = first.min(self.len);
        Span { address: self.address + first * size_of::<T>(), len: len.min(self.len - first), ..self }
    }
}

macro_rules! common {
    ($view:ident) => {
        impl<T> $view<'_, T> {
            /// Number of elements.
            pub const fn len(&self) -> usize {
                self.span.len
            }

            /// Whether there are none.
            pub const fn is_empty(&self) -> bool {
                self.span.len == 0
            }

            /// Where it lives.
            pub const fn device(&self) -> Device {
                self.span.device
            }

            pub(crate) const fn span(&self) -> Span {
                self.span
            }
        }

        impl<T: Element> fmt::Debug for $view<'_, T> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({} x {} on {})", stringify!($view), self.span.len, T::DTYPE, self.span.device)
            }
        }
    };
}
common!(In);
common!(Out);

impl<'a, T: Element> From<&'a [T]> for In<'a, T> {
    fn from(elements: &'a [T]) -> Self {
        In::host(elements)
    }
}

impl<'a, T: Element> From<&'a mut [T]> for Out<'a, T> {
    fn from(elements: &'a mut [T]) -> Self {
        Out::host(elements)
    }
}
