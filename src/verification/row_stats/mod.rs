//! What a verifier needs to know of the target's rows, chunk by chunk.

mod cuda;
mod host;
mod plan;

pub use plan::{RowStatsBuilder, RowStatsSchedule};

use core::marker::PhantomData;

use super::Traffic;
use crate::device::Device;
use crate::dtype::Float;
use crate::error::Result;
use crate::launch::Operands;
use crate::plan::typed_plan;
use crate::stream::AsStream;
use crate::view::{In, Out};

/// A plan that finds the greatest logit and the sum of exponentials of each chunk of 1024 columns.
///
/// For chunk `c` of a row, `max` is the greatest logit of columns `1024 c` to `1024 c + 1023` (-inf if there is none), and
/// with `s = log2(e) / temperature` and `r` the integer nearest to `s * max`,
/// `sum = sum over the columns of 2^(s * logit - r)`; 0 where `max` is infinite or `|s * max| > 2^21`. The sign of `sum` is
/// set if the chunk holds a NaN, which has no part in either. A temperature below 1e-5 is greedy: `sum` is 0.
///
/// An engine whose LM head writes these numbers needs no such pass; its sums may be added in any order.
///
/// | operand | shape | |
/// |---|---|---|
/// | `logits` | `[rows, vocab]` | `P`: f32, f16, bf16; a stride between rows |
/// | `temperature` | `[rows]` f32, optional | else 1 |
/// | `allow` | `[rows, ceil(vocab / 32)]` u32, optional | bit `v % 32` of word `v / 32`: whether column `v` counts |
/// | `partials` | `[rows, ceil(vocab / 1024), 2]` f32 | `max`, `sum` |
///
/// **Determinism.** The same bits on the host and on every device, in any batch.
///
/// ```
/// use nextscale::{DeviceInfo, In, Out, Stream, verification::{RowStats, RowStatsArgs}};
/// let stream = Stream::host();
/// let mut partials = [0f32; 2];
/// let plan = RowStats::<f32>::builder(1, 4).build(&DeviceInfo::of(&stream)?)?;
/// plan.run(&stream, RowStatsArgs {
///     logits: In::host(&[0.0, 0.0, f32::NEG_INFINITY, 0.0]),
///     temperature: None,
///     allow: None,
///     partials: Out::host(&mut partials),
/// })?;
/// assert_eq!(partials[0], 0.0);
/// assert!((partials[1] - 3.0).abs() < 1e-6);
/// # Ok::<(), nextscale::Error>(())
/// ```
pub struct RowStats<P> {
    inner: plan::Plan,
    types: PhantomData<P>,
}
typed_plan!(RowStats<P>);

/// The buffers of one run. See [`RowStats`] for shapes.
#[derive(Debug)]
pub struct RowStatsArgs<'a, P>
where
    P: Float,
{
    /// `[rows, vocab]`.
    pub logits: In<'a, P>,
    /// `[rows]`; 1 if not given.
    pub temperature: Option<In<'a, f32>>,
    /// `[rows, ceil(vocab / 32)]`; all columns if not given.
    pub allow: Option<In<'a, u32>>,
    /// `[rows, ceil(vocab / 1024), 2]`.
    pub partials: Out<'a, f32>,
}

impl<P: Float> RowStats<P> {
    /// A plan for `rows` rows of `vocab` columns.
    pub fn builder(rows: usize, vocab: usize) -> RowStatsBuilder<P> {
        RowStatsBuilder::new(rows, vocab)
    }

    /// How the kernel cuts the work up.
    pub fn schedule(&self) -> RowStatsSchedule {
        self.inner.schedule()
    }

    /// The bytes that any kernel must move.
    pub fn traffic(&self) -> Traffic {
        self.inner.traffic(size_of::<P>())
    }

    /// Runs on `stream`. On a CUDA stream it enqueues one kernel and returns.
    ///
    /// # Errors
    /// Nothing was launched or written: a buffer too short, misaligned, overlapping the output, on another device or
    /// ordered on another stream; on CUDA what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, mut args: RowStatsArgs<'_, P>) -> Result<()> {
        let stream = stream.as_stream();
        let plan = &self.inner;
        Operands::of(&stream)
            .input("logits", &args.logits, plan.len)?
            .input_if("temperature", &args.temperature, plan.rows)?
            .input_if("allow", &args.allow, plan.allow_len)?
            .output("partials", &args.partials, plan.schedule().chunks * 2)?
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
