//! RVQ decode: the sum over levels of the codes' codebook rows.

mod cuda;
mod host;
mod plan;

pub use plan::{RvqDecodeBuilder, RvqDecodeTraffic, Schedule, Variant};

use core::marker::PhantomData;

use crate::device::Device;
use crate::dtype::{Code, Float};
use crate::error::Result;
use crate::launch::Operands;
use crate::plan::typed_plan;
use crate::stream::AsStream;
use crate::view::{In, Out};

/// A plan for `out[b, r, :] = sum over l of codebooks[l, codes[b, l, r], :]`.
///
/// The decoder side of residual vector quantization: EnCodec and SoundStream (arXiv 2107.03312), Mimi's two halves, RQ-VAE
/// (one codebook shared by all levels, arXiv 2203.01941), DAC with tabulated projections.
///
/// | operand | shape | layout |
/// |---|---|---|
/// | `codes` | `[batch, levels, rows]` | any strides: `[levels, rows]`, `[rows, levels]`, EnCodec's `[batch, levels, time]` |
/// | `codebooks` | `[levels, entries, dim]` | level and entry strides; level stride 0 shares one codebook |
/// | `out` | `[batch, rows, dim]` | batch and row strides; rows must not overlap |
///
/// `C` is the type of the codes (`u16`, `u32`, `i64`), `E` of the codebooks and `O` of the output (`f32`, `f16`, `bf16`).
///
/// **Arithmetic.** Summed in f32 from +0, one addition a level in ascending order, rounded once to `O` (nearest even). The
/// result is the same bit for bit on the host and on every GPU, in any batch.
///
/// **Codes out of range.** The host path returns [`Error::CodeOutOfRange`](crate::Error::CodeOutOfRange) and writes
/// nothing. A kernel clamps the code to the nearest entry, so that nothing is read out of bounds, and sets
/// [`RvqDecode::CODE_CLAMPED`] in the `flags` word, if there is one, for the caller to read when it likes.
///
/// ```
/// use nextscale::{DeviceInfo, In, Out, Stream, quantization::{RvqDecode, RvqDecodeArgs}};
/// let stream = Stream::host();
/// let codebooks = [1.0, 2.0, 3.0, 4.0, /* level 1 */ 10.0, 20.0, 30.0, 40.0f32]; // [2 levels, 2 entries, 2 dims]
/// let codes = [0u32, 1, 1, /* level 1 */ 1, 0, 1]; // [2 levels, 3 rows]
/// let mut out = [0f32; 6];
/// let plan = RvqDecode::builder(2, 2, 2).rows(3).build(&DeviceInfo::of(&stream)?)?;
/// plan.run(&stream, RvqDecodeArgs {
///     codes: In::host(&codes),
///     codebooks: In::host(&codebooks),
///     out: Out::host(&mut out),
///     flags: None,
/// })?;
/// assert_eq!(out, [31.0, 42.0, 13.0, 24.0, 33.0, 44.0]);
/// # Ok::<(), nextscale::Error>(())
/// ```
pub struct RvqDecode<C, E, O> {
    inner: plan::Plan,
    types: PhantomData<(C, E, O)>,
}
typed_plan!(RvqDecode<C, E, O>);

/// The buffers of one decode. See [`RvqDecode`] for shapes.
#[derive(Debug)]
pub struct RvqDecodeArgs<'a, C, E, O>
where
    C: Code,
    E: Float,
    O: Float,
{
    /// `[batch, levels, rows]`.
    pub codes: In<'a, C>,
    /// `[levels, entries, dim]`. 16-byte alignment makes wide reads possible.
    pub codebooks: In<'a, E>,
    /// `[batch, rows, dim]`. 16-byte alignment makes wide writes possible.
    pub out: Out<'a, O>,
    /// `[1]`, or `None`: bits are only ever set, so the caller clears it. The host path leaves it alone.
    pub flags: Option<Out<'a, u32>>,
}

impl<C: Code, E: Float, O: Float> RvqDecode<C, E, O> {
    /// Set in `flags` when a kernel clamped a code.
    pub const CODE_CLAMPED: u32 = crate::ffi::NXS_FLAG_CODE_CLAMPED;

    /// A plan for `levels` codebooks of `entries` rows of `dim` elements, over one row until told otherwise.
    pub fn builder(levels: usize, entries: usize, dim: usize) -> RvqDecodeBuilder<C, E, O> {
        RvqDecodeBuilder::new(levels, entries, dim)
    }

    /// How the kernel cuts the work up when the buffers are aligned for wide access, as far as the plan allows it.
    pub fn schedule(&self) -> Schedule {
        self.inner.schedule(self.inner.wide)
    }

    /// The bytes that any kernel must move.
    pub fn traffic(&self) -> RvqDecodeTraffic {
        self.inner.traffic(size_of::<C>(), size_of::<O>())
    }

    /// None is needed.
    pub const fn workspace_bytes(&self) -> u64 {
        0
    }

    /// Decodes on `stream`. On a CUDA stream it enqueues one kernel and returns.
    ///
    /// # Errors
    /// Nothing was launched or written: a buffer too short, misaligned, overlapping the output, on another device or
    /// ordered on another stream; on the host a code out of range; on CUDA what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, mut args: RvqDecodeArgs<'_, C, E, O>) -> Result<()> {
        let stream = stream.as_stream();
        let plan = &self.inner;
        Operands::of(&stream)
            .input("codes", &args.codes, plan.codes_len)?
            .input("codebooks", &args.codebooks, plan.codebooks_len)?
            .output("out", &args.out, plan.out_len)?
            .output_if("flags", &args.flags, 1)?
            .finish()?;
        match stream.device() {
            Device::Host => host::run(plan, &mut args),
            _ => cuda::run(plan, &stream, &args),
        }
    }
}
