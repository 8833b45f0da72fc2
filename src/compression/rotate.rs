//! Rotation of rows: queries for rotated keys, and sums of rotated values back.

use core::marker::PhantomData;

use crate::device::{Arch, Device, DeviceInfo};
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::launch::Operands;
use crate::layout::Layout;
use crate::packed::{MOST_DIM, Rotation};
use crate::plan::{Traffic, typed_plan};
use crate::stream::{AsStream, Stream};
use crate::view::{In, Out};

const HERE: &str = "operands are on the stream's device";
const MOST: u64 = (1 << 31) - 1;

/// A plan for `out = R input`, row by row, with an orthonormal [`Rotation`], or with its inverse.
///
/// `input` and `out` are `[batch, rows, heads, dim]`, batch, row and head strides each; `dim` is a multiple of 8 up to 256. Of
/// rotated keys `(R q) . (R k) = q . k`; of rotated values the inverse is applied to what attention gives, once a query
/// instead of once a value.
///
/// In f32, rounded once to `T`; the same bit for bit on the host and on every device. A NaN or an infinity spoils its block of
/// the row.
///
/// ```
/// use nextscale::compression::{Rotate, RotateArgs, Rotation};
/// use nextscale::{DeviceInfo, In, Out, Stream};
/// let q = [1f32, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
/// let mut out = [0f32; 8];
/// let plan = Rotate::<f32>::builder(Rotation::HADAMARD, 1, 1, 8).build(&DeviceInfo::A100)?;
/// plan.run(&Stream::host(), RotateArgs { input: In::host(&q), out: Out::host(&mut out) })?;
/// assert!(out.iter().all(|x| (x - 8f32.sqrt().recip()).abs() < 1e-7));
/// # Ok::<(), nextscale::Error>(())
/// ```
pub struct Rotate<T> {
    inner: Plan,
    types: PhantomData<T>,
}
typed_plan!(Rotate<T>);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Plan {
    rotation: Rotation,
    inverse: bool,
    input: Layout<4>,
    out: Layout<4>,
    input_len: u64,
    out_len: u64,
}

/// Describes a [`Rotate`]; [`RotateBuilder::build`] makes the plan.
#[derive(Debug, Clone)]
pub struct RotateBuilder<T> {
    rotation: Rotation,
    shape: [u64; 4],
    inverse: bool,
    input: Option<[i64; 3]>,
    out: Option<[i64; 3]>,
    types: PhantomData<T>,
}

/// The buffers of a rotation, `[batch, rows, heads, dim]`.
#[derive(Debug)]
pub struct RotateArgs<'a, T: Float> {
    /// What is rotated.
    pub input: In<'a, T>,
    /// Another buffer.
    pub out: Out<'a, T>,
}

impl<T: Float> RotateBuilder<T> {
    /// Batch entries; 1 if not given.
    pub fn batch(mut self, batch: usize) -> Self {
        self.shape[0] = batch as u64;
        self
    }

    /// Rotates back.
    pub fn inverse(mut self) -> Self {
        self.inverse = true;
        self
    }

    /// Strides of `input` in elements, `[batch, row, head]`; contiguous if not given.
    pub fn input_strides(mut self, strides: [i64; 3]) -> Self {
        self.input = Some(strides);
        self
    }

    /// Strides of `out` in elements, `[batch, row, head]`; contiguous if not given.
    pub fn out_strides(mut self, strides: [i64; 3]) -> Self {
        self.out = Some(strides);
        self
    }

    /// Checks the description.
    ///
    /// # Errors
    /// [`Error::Size`] for a `dim` outside 8 to 256, heads of 0, a batch beyond 65535, 2^31 rows times heads;
    /// [`Error::Unsupported`] for a `dim` that is no multiple of 8; [`Error::Stride`] for negative strides or an output that
    /// overlaps itself; [`Error::UnsupportedDevice`] below compute capability 8.0.
    pub fn build(self, device: &DeviceInfo) -> Result<Rotate<T>> {
        if device.arch < (Arch { major: 8, minor: 0 }) {
            return Err(Error::UnsupportedDevice { have: Some(device.arch), need: "sm_80 and newer" });
        }
        let [batch, rows, heads, dim] = self.shape;
        for (arg, got, min, max) in [
            ("head_dim", dim, 8, MOST_DIM as u64),
            ("batch", batch, 0, 65_535),
            ("heads", heads, 1, MOST),
            ("rows * heads", rows.saturating_mul(heads), 0, MOST),
        ] {
            if !(min..=max).contains(&got) {
                return Err(Error::Size { arg, got, min, max });
            }
        }
        if !dim.is_multiple_of(8) {
            return Err(Error::Unsupported { arg: "head_dim", what: "multiples of 8" });
        }
        let layout = |strides: Option<[i64; 3]>| {
            strides.map_or(Layout::contiguous(self.shape), |[b, r, h]| Layout::strided(self.shape, [b, r, h, 1]))
        };
        let (input, out) = (layout(self.input), layout(self.out));
        out.require_disjoint("out")?;
        let (input_len, out_len) = (input.required_len("input")?, out.required_len("out")?);
        let inner = Plan { rotation: self.rotation, inverse: self.inverse, input, out, input_len, out_len };
        Ok(Rotate { inner, types: PhantomData })
    }
}

impl<T: Float> Rotate<T> {
    /// A plan for one batch entry of `rows` rows of `heads` heads of `dim` elements.
    pub fn builder(rotation: Rotation, rows: usize, heads: usize, dim: usize) -> RotateBuilder<T> {
        let shape = [1, rows as u64, heads as u64, dim as u64];
        RotateBuilder { rotation, shape, inverse: false, input: None, out: None, types: PhantomData }
    }

    /// The bytes that any kernel must move.
    pub fn traffic(&self) -> Traffic {
        let bytes = self.inner.out.shape().iter().fold(size_of::<T>() as u64, |all, &n| all.saturating_mul(n));
        Traffic { read: bytes, written: bytes }
    }

    /// None is needed.
    pub const fn workspace_bytes(&self) -> u64 {
        0
    }

    /// Rotates on `stream`; on a CUDA stream it enqueues one kernel.
    ///
    /// # Errors
    /// Nothing was launched or written: a buffer too short, misaligned, overlapping, on another device or ordered on another
    /// stream; on CUDA what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, args: RotateArgs<'_, T>) -> Result<()> {
        let stream = stream.as_stream();
        Operands::of(&stream)
            .input("input", &args.input, self.inner.input_len)?
            .output("out", &args.out, self.inner.out_len)?
            .finish()?;
        match stream.device() {
            Device::Host => {
                self.on_host(args);
                Ok(())
            }
            _ => self.on_cuda(&stream, &args),
        }
    }

    fn on_host(&self, mut args: RotateArgs<'_, T>) {
        let Plan { rotation, inverse, input, out, .. } = &self.inner;
        let [batch, rows, heads, dim] = out.shape();
        let (from, to) = (args.input.as_host().expect(HERE), args.out.as_host().expect(HERE));
        for (b, r, h) in (0..batch).flat_map(|b| (0..rows).flat_map(move |r| (0..heads).map(move |h| (b, r, h)))) {
            let mut row = [0f32; MOST_DIM];
            let row = &mut row[..dim as usize];
            let at = input.offset([b, r, h, 0]) as usize;
            row.iter_mut().zip(&from[at..]).for_each(|(x, from)| *x = from.to_f32());
            if *inverse {
                rotation.invert(row)
            } else {
                rotation.apply(row)
            }
            let at = out.offset([b, r, h, 0]) as usize;
            to[at..].iter_mut().zip(row).for_each(|(to, x)| *to = T::from_f32(*x));
        }
    }

    #[cfg(nxs_kernels)]
    fn on_cuda(&self, stream: &Stream<'_>, args: &RotateArgs<'_, T>) -> Result<()> {
        use crate::ffi;
        let Plan { rotation, inverse, input, out, .. } = &self.inner;
        let (from, to) = (args.input.span().address, args.out.span().address);
        let whole = |address: usize, layout: &Layout<4>| {
            let multiple = (16 / size_of::<T>()) as i64;
            address.is_multiple_of(16) && layout.strides()[..3].iter().all(|stride| stride % multiple == 0)
        };
        let [input_stride_batch, input_stride_row, input_stride_head, _] = input.strides();
        let [out_stride_batch, out_stride_row, out_stride_head, _] = out.strides();
        let [batch, rows, heads, dim] = out.shape();
        let params = ffi::nxs_rotate_params {
            input: from as *const _,
            out: to as *mut _,
            input_stride_batch,
            input_stride_row,
            input_stride_head,
            out_stride_batch,
            out_stride_row,
            out_stride_head,
            batch: batch as i64,
            rows: rows as i64,
            heads: heads as i32,
            dim: dim as i32,
            inverse: (*inverse).into(),
            vector: (whole(from, input) && whole(to, out)).into(),
            signs: rotation.sign_words(),
            dtype: T::DTYPE as i32,
        };
        crate::launch::launch("nxs_rotate", stream, |handle| {
            // SAFETY: the operands are checked against the layouts.
            unsafe { ffi::nxs_rotate(&params, handle) }
        })
    }

    #[cfg(not(nxs_kernels))]
    fn on_cuda(&self, _: &Stream<'_>, _: &RotateArgs<'_, T>) -> Result<()> {
        Err(Error::NotCompiled)
    }
}
