//! RVQ encode: the nearest codebook row, level by level.

mod cuda;
mod host;
mod plan;

pub use plan::{EncodeKernel, EncodeSchedule, EncodeVariant, EncodeWork, RvqEncodeBuilder};

use core::marker::PhantomData;

use super::Codebook;
use super::codebook::alignment;
use crate::device::Device;
use crate::dtype::{Code, Float};
use crate::error::{Error, Result};
use crate::launch::Operands;
use crate::plan::typed_plan;
use crate::stream::AsStream;
use crate::view::{In, Out};

/// A plan for residual vector quantization, level by level:
/// `codes[b, l, r] = argmin over c of |x - codebook[l, c]|^2`, and `x -= codebook[l, codes[b, l, r]]` for the next level.
///
/// The encoder side of EnCodec and SoundStream (arXiv 2107.03312), of each half of Mimi (after its projection, which is a
/// matrix product outside), of RQ-VAE (one codebook for all levels, arXiv 2203.01941) and of DAC (a projection in and out of
/// each level, [`RvqEncodeBuilder::projected`]); with one level plain vector quantization (LlamaGen, GigaTok, FlexVAR, a scale
/// of VAR). What is nearest, and what is subtracted, is the codebook's [`Metric`](super::Metric).
///
/// | operand | shape | layout |
/// |---|---|---|
/// | `input`, `quantized`, `residual` | `[batch, rows, dim]`, projected `[batch, rows, latent]` | any strides, such as `[batch, dim, time]` |
/// | `codes`, `distances` | `[batch, levels, rows]` | any strides: `[levels, rows]`, `[rows, levels]` |
/// | `histogram` | `[levels, entries]` | contiguous |
///
/// `X` is the type of the vectors (`f32`, `f16`, `bf16`), `C` of the codes (`u16`, `u32`, `i64`).
///
/// **Exact.** The score of a code is f32, `acc = fma(x[k] - c[k], x[k] - c[k], acc)` for `k` ascending from 0; the code of the
/// least score wins, the lowest of equals. That is the answer bit for bit on the host and in every kernel, for a row alone or
/// in any batch, and the first levels of many are those of few. Kernels filter with 16-bit products whose error is bounded,
/// and score what is left; where too much is left they score every code. With a cosine metric `x` is divided by
/// `max(norm, eps)` first, the norm being the square root of a chain of fma.
///
/// **Rows that are not finite.** A code with a score that is NaN or infinite does not win. If all codes have one, the row gets
/// code 0 and the distance +inf, and [`RvqEncode::NOT_FINITE`] is set in `flags`, on the host too. Other rows do not change.
///
/// ```
/// use nextscale::{DeviceInfo, In, Out, Stream};
/// use nextscale::quantization::{Codebook, CodebookArgs, RvqEncode, RvqEncodeArgs};
/// let stream = Stream::host();
/// let device = DeviceInfo::of(&stream)?;
/// let rows = [0.0, 0.0, 4.0, 4.0, /* level 1 */ 0.5, 0.0, 0.0, -0.5f32]; // [2 levels, 2 entries, 2 dims]
/// let codebook = Codebook::builder(2, 2, 2).build(&device)?;
/// // What is searched later; kept. On a GPU 256-byte aligned, as every allocation is.
/// let mut prepared = vec![0u32; codebook.bytes() as usize / 4];
/// let prepared: &mut [u8] = bytemuck::cast_slice_mut(&mut prepared);
/// codebook.prepare(&stream, CodebookArgs {
///     rows: In::host(&rows),
///     usage: None,
///     prepared: Out::host(prepared),
///     flags: None,
/// })?;
///
/// let mut codes = [0u32; 4]; // [2 levels, 2 rows]
/// let plan = RvqEncode::builder(&codebook).rows(2).build(&device)?;
/// plan.run(&stream, RvqEncodeArgs::new(In::host(&[3.0f32, 4.0, 0.7, 0.1]), In::host(prepared), Out::host(&mut codes)))?;
/// assert_eq!(codes, [1, 0, /* level 1 */ 1, 0]);
/// # Ok::<(), nextscale::Error>(())
/// ```
pub struct RvqEncode<X, C> {
    inner: plan::Plan,
    types: PhantomData<(X, C)>,
}

typed_plan!(RvqEncode<X, C>);

/// The weights of projections into and out of the codebooks' dimensions, contiguous. Weight norm is folded in.
#[derive(Debug)]
pub struct Projections<'a> {
    /// `[levels, dim, latent]`.
    pub in_weight: In<'a, f32>,
    /// `[levels, dim]`.
    pub in_bias: In<'a, f32>,
    /// `[levels, latent, dim]`.
    pub out_weight: In<'a, f32>,
    /// `[levels, latent]`.
    pub out_bias: In<'a, f32>,
}

/// The buffers of one encode. See [`RvqEncode`] for shapes.
#[derive(Debug)]
pub struct RvqEncodeArgs<'a, X: Float, C: Code> {
    /// `[batch, rows, dim]`, or `[batch, rows, latent]`.
    pub input: In<'a, X>,
    /// What [`Codebook::prepare`] wrote.
    pub codebook: In<'a, u8>,
    /// `[batch, levels, rows]`.
    pub codes: Out<'a, C>,
    /// `[batch, rows, dim]`: the sum of what the codes stand for, f32 from +0 in ascending order, rounded once: what
    /// [`RvqDecode`](super::RvqDecode) gives.
    pub quantized: Option<Out<'a, X>>,
    /// `[batch, rows, dim]`: what is left of the input.
    pub residual: Option<Out<'a, X>>,
    /// `[batch, levels, rows]`: the winners' scores.
    pub distances: Option<Out<'a, f32>>,
    /// `[levels, entries]`: how often each code was chosen is added to what is there.
    pub histogram: Option<Out<'a, u32>>,
    /// `[1]`: bits are only ever set, so the caller clears it.
    pub flags: Option<Out<'a, u32>>,
    /// For a plan with [`RvqEncodeBuilder::projected`].
    pub projections: Option<Projections<'a>>,
}

impl<'a, X: Float, C: Code> RvqEncodeArgs<'a, X, C> {
    /// Codes alone.
    pub fn new(input: In<'a, X>, codebook: In<'a, u8>, codes: Out<'a, C>) -> Self {
        RvqEncodeArgs {
            input,
            codebook,
            codes,
            quantized: None,
            residual: None,
            distances: None,
            histogram: None,
            flags: None,
            projections: None,
        }
    }
}

impl<X: Float, C: Code> RvqEncode<X, C> {
    /// Set in `flags` when a row had no finite distance to any code.
    pub const NOT_FINITE: u32 = crate::ffi::NXS_FLAG_ROW_NOT_FINITE;

    /// A plan for all levels of a codebook, over one row until told otherwise.
    pub fn builder(codebook: &Codebook) -> RvqEncodeBuilder<X, C> {
        RvqEncodeBuilder::new(codebook)
    }

    /// How the kernel cuts the work up.
    pub fn schedule(&self) -> EncodeSchedule {
        self.inner.schedule
    }

    /// What any way to do it takes.
    pub fn work(&self) -> EncodeWork {
        self.inner.work(size_of::<X>(), size_of::<C>())
    }

    /// None is needed.
    pub const fn workspace_bytes(&self) -> u64 {
        0
    }

    /// Encodes on `stream`. On a CUDA stream it enqueues one kernel and returns.
    ///
    /// # Errors
    /// Nothing was launched or written: a buffer too short, misaligned, overlapping an output, on another device or ordered
    /// on another stream; projections missing or not wanted; on CUDA what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, mut args: RvqEncodeArgs<'_, X, C>) -> Result<()> {
        let stream = stream.as_stream();
        let plan = &self.inner;
        let lens = &plan.lens;
        let g = &plan.geometry;
        if args.projections.is_some() != (plan.latent > 0) {
            return Err(Error::Unsupported { arg: "projections", what: "they go with a plan that is projected" });
        }
        let prepared = if lens.codes == 0 { 0 } else { g.bytes };
        let mut operands = Operands::of(&stream)
            .input("input", &args.input, lens.input)?
            .input("codebook", &args.codebook, prepared)?
            .output("codes", &args.codes, lens.codes)?
            .output_if("quantized", &args.quantized, lens.quantized)?
            .output_if("residual", &args.residual, lens.residual)?
            .output_if("distances", &args.distances, lens.distances)?
            .output_if("histogram", &args.histogram, plan.levels * g.entries)?
            .output_if("flags", &args.flags, 1)?;
        if let Some(projections) = &args.projections {
            let (levels, dim, latent) = (plan.levels, g.dim, plan.latent);
            operands = operands
                .input("in_weight", &projections.in_weight, levels * dim * latent)?
                .input("in_bias", &projections.in_bias, levels * dim)?
                .input("out_weight", &projections.out_weight, levels * dim * latent)?
                .input("out_bias", &projections.out_bias, levels * latent)?;
        }
        operands.finish()?;
        if lens.codes == 0 {
            return Ok(());
        }
        let need = alignment(stream.device());
        if !args.codebook.span().address.is_multiple_of(need) {
            return Err(Error::Alignment { arg: "codebook", need });
        }
        match stream.device() {
            Device::Host => {
                host::run(plan, &mut args);
                Ok(())
            }
            _ => cuda::run(plan, &stream, &args),
        }
    }
}
