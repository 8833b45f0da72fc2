//! Rows of keys or values into few bits, and back.

mod cuda;
mod host;
mod plan;

pub use plan::PackBuilder;

use core::marker::PhantomData;

use crate::device::Device;
use crate::dtype::{DType, Float};
use crate::error::{Error, Result};
use crate::launch::Operands;
use crate::packed::Format;
use crate::plan::{Traffic, typed_plan};
use crate::stream::AsStream;
use crate::view::{In, Out};

/// A plan that packs rows of keys or of values in a [`Format`], and unpacks them: gathering, rotating, quantizing and storing
/// in one pass.
///
/// | operand | shape | layout |
/// |---|---|---|
/// | `input` | `[sets, tokens, heads, dim]` | set, token and head strides |
/// | `codes` | `[sets, rows, heads, slot]` u8 | strides in bytes; slots must not overlap |
/// | `numbers` | `[sets, rows, heads, groups * n]`; of [`Format::Channel`] `[sets, rows / group, heads, dim * 2]` | set, row and head strides; none if inline or given |
/// | `scales` | `[sets, heads]` f32 | set and head strides, 0 shares: scales that are given, of fp8 and int8 |
/// | `kept` | `[sets, heads, rows]` i32 | set and head strides, 0 shares: the token that a row is |
/// | `counts` | `[sets, heads]` i32 | set and head strides: rows that there are of a head |
/// | `out` | `[sets, rows, heads, dim]` | set, row and head strides: what is unpacked |
///
/// `T` is the type of what is packed and unpacked (`f32`, `f16`, `bf16`), `N` of the numbers: `f32`, and for all formats but fp8
/// and int8 `f16`. `dim` is a multiple of 8 up to 256. Without kept indices rows are the tokens. Rows beyond a head's count are
/// left alone. The numbers of a group are `scale`, or `scale, min`, or `norm`. A cache is appended to by packing into views of
/// it; with [`Format::Channel`] a group at a time, so that the newest rows stay as they are until they are one.
///
/// **Arithmetic** is in f32, and the same bit for bit on the host and on every GPU, in any batch: nextscale.h has the formulas,
/// [`Format`] the bounds of the errors. A group of equal elements is restored exactly as far as `N` holds them (f16 holds every
/// bf16 and f16 from 2^-16 to 65504): its scale is 0.
///
/// **NaN and infinity.** A NaN counts as 0; what is 2^59 or more in magnitude, infinity included, as the greatest magnitude
/// below that in its row (for [`Format::Channel`], in its channel and group), with its sign. Both set
/// [`Pack::NOT_FINITE`] in `flags`.
///
/// **Requantizing.** What was packed from `T`, unpacked to `T` or to f32 and packed again gives the same bytes, in a plan
/// without rotation: rotated rows come back as rotated ones from the plan that is the same but for
/// [`PackBuilder::rotation`], and their codes hold in f32. This cannot hold:
/// - for a rotated row that was rotated back, which rounds it;
/// - for [`Format::LloydMax`], where the norm of what is unpacked is rounded (renormalized: within `2^-11` with numbers of f16,
///   `2^-20` with f32) or that of the centroids (not renormalized);
/// - for fp8 where the result is a subnormal f16;
/// - for [`Format::Uniform`] and [`Format::Channel`] where `T` is f32 and a min is rounded to f16, where numbers of f16 are beyond
///   65504 or subnormal, where values are 2^16 scales or more from 0 in f32, and where a scale or a value lies halfway between two numbers
///   (which takes some care to construct).
///
/// Caches that are compacted need not be requantized: slots and numbers move as they are.
///
/// Sources: KIVI (arXiv 2402.02750), QuaRot (arXiv 2404.00456), TurboQuant (arXiv 2504.19874), the slots of vLLM and FlashInfer.
///
/// ```
/// use nextscale::compression::{Format, Pack, PackArgs, UnpackArgs};
/// use nextscale::{DeviceInfo, In, Out, Stream};
/// let stream = Stream::host();
/// let rows: [f32; 16] = core::array::from_fn(|k| k as f32 - 8.0); // [1 set, 2 tokens, 1 head, 8]
/// let (mut codes, mut scales, mut back) = ([0u8; 16], [0f32; 2], [0f32; 16]);
/// let plan = Pack::<f32, f32>::builder(Format::Int8, 2, 1, 8).build(&DeviceInfo::of(&stream)?)?;
/// plan.pack(&stream, PackArgs {
///     input: In::host(&rows),
///     codes: Out::host(&mut codes),
///     numbers: Some(Out::host(&mut scales)),
///     scales: None,
///     kept: None,
///     counts: None,
///     flags: None,
/// })?;
/// plan.unpack(&stream, UnpackArgs {
///     codes: In::host(&codes),
///     numbers: Some(In::host(&scales)),
///     scales: None,
///     counts: None,
///     out: Out::host(&mut back),
///     flags: None,
/// })?;
/// assert!(rows.iter().zip(back).all(|(x, y)| (x - y).abs() <= 8.0 / 127.0));
/// # Ok::<(), nextscale::Error>(())
/// ```
pub struct Pack<T, N> {
    inner: plan::Plan,
    types: PhantomData<(T, N)>,
}
typed_plan!(Pack<T, N>);

/// The buffers of packing. See [`Pack`] for shapes.
#[derive(Debug)]
pub struct PackArgs<'a, T: Float, N: Float> {
    /// `[sets, tokens, heads, dim]`.
    pub input: In<'a, T>,
    /// `[sets, rows, heads, slot]`.
    pub codes: Out<'a, u8>,
    /// Needed unless inline or given.
    pub numbers: Option<Out<'a, N>>,
    /// `[sets, heads]`, needed if the plan is of given scales.
    pub scales: Option<In<'a, f32>>,
    /// `[sets, heads, rows]`, needed if the plan is of kept tokens.
    pub kept: Option<In<'a, i32>>,
    /// `[sets, heads]`, needed if the plan is of counted rows.
    pub counts: Option<In<'a, i32>>,
    /// `[1]`, or none: bits are only ever set, so the caller clears it.
    pub flags: Option<Out<'a, u32>>,
}

/// The buffers of unpacking. See [`Pack`] for shapes.
#[derive(Debug)]
pub struct UnpackArgs<'a, T: Float, N: Float> {
    /// `[sets, rows, heads, slot]`.
    pub codes: In<'a, u8>,
    /// Needed unless inline or given.
    pub numbers: Option<In<'a, N>>,
    /// `[sets, heads]`, needed if the plan is of given scales.
    pub scales: Option<In<'a, f32>>,
    /// `[sets, heads]`, needed if the plan is of counted rows.
    pub counts: Option<In<'a, i32>>,
    /// `[sets, rows, heads, dim]`.
    pub out: Out<'a, T>,
    /// `[1]`, or none.
    pub flags: Option<Out<'a, u32>>,
}

impl<T: Float, N: Float> Pack<T, N> {
    /// Set in `flags`: an element was NaN, or 2^59 or more in magnitude.
    pub const NOT_FINITE: u32 = crate::ffi::NXS_PACK_NOT_FINITE;
    /// Set in `flags` when a kernel clamped a kept index. The host path refuses it.
    pub const ROW_CLAMPED: u32 = crate::ffi::NXS_PACK_ROW_CLAMPED;
    /// Set in `flags` when a kernel clamped a count. The host path refuses it.
    pub const COUNT_CLAMPED: u32 = crate::ffi::NXS_PACK_COUNT_CLAMPED;

    /// A plan for one set of `tokens` tokens of `heads` heads of `dim` elements.
    pub fn builder(format: Format, tokens: usize, heads: usize, dim: usize) -> PackBuilder<T, N> {
        PackBuilder::new(format, tokens, heads, dim)
    }

    /// How a row is packed.
    pub fn format(&self) -> Format {
        self.inner.format
    }

    /// Bytes of a slot: the codes of a row, and its numbers if they are inline.
    pub fn slot_bytes(&self) -> usize {
        self.inner.codes.shape()[3] as usize
    }

    /// Elements that `numbers` must hold; 0 if they are inline or given.
    pub fn numbers_len(&self) -> u64 {
        self.inner.numbers_len
    }

    /// Bytes that `codes` must hold.
    pub fn codes_len(&self) -> u64 {
        self.inner.codes_len
    }

    /// Bytes that a row takes, of all heads, with its share of the numbers that rows have in common.
    pub fn bytes_per_row(&self) -> f64 {
        let [_, _, heads, slot] = self.inner.codes.shape();
        let [_, _, _, numbers] = self.inner.numbers.shape();
        let numbers = if self.inner.numbers_len > 0 { numbers as usize * size_of::<N>() } else { 0 };
        heads as f64 * (slot as f64 + numbers as f64 / self.inner.format.rows() as f64)
    }

    /// The bytes that packing must move, counts and flags left aside; all rows there.
    pub fn pack_traffic(&self) -> Traffic {
        let [unpacked, packed, kept] = self.inner.bytes(size_of::<T>(), size_of::<N>());
        Traffic { read: unpacked.saturating_add(kept), written: packed }
    }

    /// The bytes that unpacking must move.
    pub fn unpack_traffic(&self) -> Traffic {
        let [unpacked, packed, _] = self.inner.bytes(size_of::<T>(), size_of::<N>());
        Traffic { read: packed, written: unpacked }
    }

    /// None is needed.
    pub const fn workspace_bytes(&self) -> u64 {
        0
    }

    /// Packs on `stream`; on a CUDA stream it enqueues one kernel.
    ///
    /// # Errors
    /// Nothing was launched or written: a buffer missing, too short, misaligned, overlapping one that is written, on another
    /// device or ordered on another stream; on the host a kept index or a count out of range; on CUDA what CUDA said.
    pub fn pack<S: AsStream + ?Sized>(&self, stream: &S, mut args: PackArgs<'_, T, N>) -> Result<()> {
        let stream = stream.as_stream();
        let plan = &self.inner;
        Operands::of(&stream)
            .input("input", &args.input, plan.input_len)?
            .output("codes", &args.codes, plan.codes_len)?
            .input_needed("scales", &args.scales, plan.scales_len)?
            .input_needed("kept", &args.kept, plan.kept_len)?
            .input_needed("counts", &args.counts, plan.counts_len)?
            .output_if("flags", &args.flags, 1)?
            .output_if("numbers", &args.numbers, plan.numbers_len)?
            .finish()?;
        if args.numbers.is_none() && plan.numbers_len > 0 {
            return Err(Error::Length { arg: "numbers", need: plan.numbers_len, got: 0 });
        }
        plan.check_inline(args.codes.span().address)?;
        match stream.device() {
            Device::Host => host::pack(plan, &mut args),
            _ => cuda::pack(plan, &stream, &args),
        }
    }

    /// Unpacks on `stream`; on a CUDA stream it enqueues one kernel.
    ///
    /// # Errors
    /// As [`Pack::pack`].
    pub fn unpack<S: AsStream + ?Sized>(&self, stream: &S, mut args: UnpackArgs<'_, T, N>) -> Result<()> {
        let stream = stream.as_stream();
        let plan = &self.inner;
        Operands::of(&stream)
            .input("codes", &args.codes, plan.codes_len)?
            .input_needed("numbers", &args.numbers, plan.numbers_len)?
            .input_needed("scales", &args.scales, plan.scales_len)?
            .input_needed("counts", &args.counts, plan.counts_len)?
            .output("out", &args.out, plan.out_len)?
            .output_if("flags", &args.flags, 1)?
            .finish()?;
        plan.check_inline(args.codes.span().address)?;
        match stream.device() {
            Device::Host => host::unpack(plan, &mut args),
            _ => cuda::unpack(plan, &stream, &args),
        }
    }
}

/// The numbers of a format may be of these.
fn check_numbers(format: Format, numbers: DType) -> Result<()> {
    let scaled = matches!(format, Format::Fp8 | Format::Int8);
    match numbers {
        DType::F32 => Ok(()),
        DType::F16 if !scaled => Ok(()),
        _ if scaled => Err(Error::DType { arg: "numbers", what: "f32 of fp8 and int8" }),
        _ => Err(Error::DType { arg: "numbers", what: "f32 or f16" }),
    }
}
