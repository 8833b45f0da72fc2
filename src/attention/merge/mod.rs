//! Merge of partial attention outputs by their log-sum-exps.

mod cuda;
mod host;
mod plan;

pub use plan::{MergeBuilder, MergeSchedule};

use core::marker::PhantomData;

use super::Traffic;
use crate::device::Device;
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::launch::Operands;
use crate::plan::typed_plan;
use crate::stream::AsStream;
use crate::view::{In, Out};

/// A plan that merges attention outputs over disjoint sets of keys into the one over all of them.
///
/// With `m = max over i of lse[i]` and `w[i] = exp(lse[i] - m)`, for every batch entry, row and head:
/// `out = sum over i of w[i] * parts[i] / sum over i of w[i]` and `out_lse = m + ln(sum over i of w[i])`.
///
/// For keys that are split (Flash-Decoding), that lie on several devices (ring attention, arXiv 2310.01889), or rows
/// that see several intervals of keys.
///
/// | operand | shape | layout |
/// |---|---|---|
/// | `parts` | `[parts, batch, rows, heads, dim]` | strides of all but `dim` |
/// | `lse` | `[parts, batch, heads, rows]` f32 | every stride; natural logarithm |
/// | `out` | `[batch, rows, heads, dim]` | strides of all but `dim`; rows must not overlap |
/// | `out_lse` | `[batch, heads, rows]` f32, optional | every stride; elements must not overlap |
///
/// `P` is the type of the parts and `O` of the output (`f32`, `f16`, `bf16`).
///
/// **Accumulating** ([`MergeBuilder::accumulate`]): `out` and `out_lse` are read first, as the part before part 0, and
/// written over. Started with `out_lse` all -inf, a chain of such merges gives what one merge of all parts gives, up to
/// the rounding of `out` to `O` at each call.
///
/// **Arithmetic.** f32, the parts in ascending order, rounded once to `O` (nearest even). A single part with a finite
/// `lse` is copied. With `u = 2^-24`, `out_lse` is within `u * (|out_lse| + parts + 64)` of the exact value, and `out`
/// before its rounding within `u * sum over i of (2 * parts + 64 + 3 * (m - lse[i])) * w[i] * |parts[i]| / sum of w`.
/// Weights below 2^-126 count as 0.
///
/// **Special values.** A part whose `lse` is -inf adds nothing, whatever it holds, NaN included (its memory is read all
/// the same). If that is every part, `out` is 0 and `out_lse` -inf. An `lse` of NaN or +inf makes the row's `out` and
/// `out_lse` NaN.
///
/// **Determinism.** Bitwise, from run to run and in any batch. Host and kernels use different exponential functions:
/// they agree within the bounds above, not bit for bit.
///
/// ```
/// use nextscale::{DeviceInfo, In, Out, Stream, attention::{Merge, MergeArgs}};
/// let stream = Stream::host();
/// let parts = [1.0, 2.0, /* part 1 */ 4.0, 5.0f32]; // [2 parts, 1 batch entry, 1 row, 1 head, 2 dims]
/// let lse = [0.5, 0.5f32 + 2f32.ln()]; // the second part saw twice the weight
/// let (mut out, mut out_lse) = ([0f32; 2], [0f32; 1]);
/// let plan = Merge::<f32, f32>::builder(2, 1, 2).build(&DeviceInfo::of(&stream)?)?;
/// plan.run(&stream, MergeArgs {
///     parts: In::host(&parts),
///     lse: In::host(&lse),
///     out: Out::host(&mut out),
///     out_lse: Some(Out::host(&mut out_lse)),
/// })?;
/// assert!((out[0] - 3.0).abs() < 1e-6 && (out[1] - 4.0).abs() < 1e-6);
/// assert!((out_lse[0] - (0.5 + 3f32.ln())).abs() < 1e-6);
/// # Ok::<(), nextscale::Error>(())
/// ```
pub struct Merge<P, O> {
    inner: plan::Plan,
    types: PhantomData<(P, O)>,
}
typed_plan!(Merge<P, O>);

/// The buffers of one merge. See [`Merge`] for shapes.
#[derive(Debug)]
pub struct MergeArgs<'a, P, O>
where
    P: Float,
    O: Float,
{
    /// `[parts, batch, rows, heads, dim]`. 16-byte alignment makes wide reads possible.
    pub parts: In<'a, P>,
    /// `[parts, batch, heads, rows]`, natural logarithm.
    pub lse: In<'a, f32>,
    /// `[batch, rows, heads, dim]`. 16-byte alignment makes wide writes possible. Read too when accumulating.
    pub out: Out<'a, O>,
    /// `[batch, heads, rows]`, or `None` if it is of no interest. Required, and read too, when accumulating.
    pub out_lse: Option<Out<'a, f32>>,
}

impl<P: Float, O: Float> Merge<P, O> {
    /// A plan for `parts` outputs of `heads` heads of `dim` elements, over one row until told otherwise.
    pub fn builder(parts: usize, heads: usize, dim: usize) -> MergeBuilder<P, O> {
        MergeBuilder::new(parts, heads, dim)
    }

    /// How the kernel cuts the work up when the buffers are aligned for wide access, as far as the plan allows it.
    pub fn schedule(&self) -> MergeSchedule {
        self.inner.schedule(self.inner.wide)
    }

    /// The bytes that any kernel must move, `out_lse` among them.
    pub fn traffic(&self) -> Traffic {
        self.inner.traffic(size_of::<P>(), size_of::<O>())
    }

    /// None is needed.
    pub const fn workspace_bytes(&self) -> u64 {
        0
    }

    /// Merges on `stream`. On a CUDA stream it enqueues one kernel and returns.
    ///
    /// # Errors
    /// Nothing was launched or written: a buffer too short, misaligned, overlapping an output, on another device or
    /// ordered on another stream; no `out_lse` when accumulating; on CUDA what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, mut args: MergeArgs<'_, P, O>) -> Result<()> {
        let stream = stream.as_stream();
        let plan = &self.inner;
        if plan.accumulate && args.out_lse.is_none() {
            return Err(Error::Unsupported { arg: "out_lse", what: "accumulating reads it" });
        }
        Operands::of(&stream)
            .input("parts", &args.parts, plan.parts_len)?
            .input("lse", &args.lse, plan.lse_len)?
            .output("out", &args.out, plan.out_len)?
            .output_if("out_lse", &args.out_lse, plan.out_lse_len)?
            .finish()?;
        match stream.device() {
            Device::Host => {
                host::run(plan, &mut args);
                Ok(())
            }
            _ => cuda::run(plan, &stream, &args),
        }
    }
}
