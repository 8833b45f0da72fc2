//! Which tokens of a sequence under decoding are committed.

mod cuda;
mod host;
mod plan;

pub use plan::{Confidence, ConfidenceRankBuilder};

use core::marker::PhantomData;

use super::Traffic;
use crate::device::Device;
use crate::dtype::Float;
use crate::error::Result;
use crate::launch::Operands;
use crate::plan::typed_plan;
use crate::stream::AsStream;
use crate::view::{In, Out};

/// A plan that finds a candidate for each masked row and commits those of which the model is sure: confident decoding
/// of Dimple (arXiv 2505.16990), and the ranking of MaskGIT (arXiv 2202.04200), which HMAR and Hi-MAR use. **Lossy.**
///
/// All masked rows whose [`Confidence`] is above the request's threshold are committed; where there are none, the
/// `counts` of highest confidence, of ties the first; a negative count, as in a last step, means all. With noise the
/// `counts` are drawn without replacement, with probabilities that are the softmax of confidence / noise: for
/// [`Confidence::LogProbability`] that is MaskGIT's annealed ranking.
///
/// | operand | shape | |
/// |---|---|---|
/// | `logits` | `[batch * length, vocab]` | raw logits, `T`: f32, f16, bf16; a stride between rows; vocab up to 2^24 |
/// | `masked` | `[batch, length]` u8, optional | 0: decided already, not looked at; else all are masked |
/// | `temperature` | `[batch]` f32, optional | of candidates; else, and below 1e-5, the most probable token |
/// | `top_k`, `top_p`, `min_p` | `[batch]`, optional | of candidates, as those of [`Verifier`](super::Verifier) |
/// | `threshold` | `[batch]` f32, optional | else nothing is committed for being above it |
/// | `counts` | `[batch]` i32 | how many are committed where none is above the threshold; negative: all |
/// | `noise` | `[batch]` f32, optional | temperature of Gumbel noise; 0: none |
/// | `seeds`, `positions` | `[batch]` i64, optional | the request's seed, and the absolute position of row 0 |
/// | `tokens` | `[batch, length]` i32 | the candidate where it is committed, else -1 |
/// | `candidates` | `[batch, length]` i32, optional | of all masked rows; -1 elsewhere, and where no token is allowed |
/// | `confidence` | `[batch, length]` f32, optional | of all masked rows; NaN elsewhere |
/// | `committed` | `[batch]` i32 | how many |
/// | `status` | `[batch]` u32 | bits of [`status`](super::status), of all masked rows |
///
/// A masked row that allows no token has no candidate and is not committed.
///
/// **Draws** are the words of the Philox blocks of (seed, position of the row, use | step << 8, 0): use 9 for the
/// candidate, use 10 for the noise, which is the logarithm of an exponential variate with its sign changed.
///
/// **Determinism.** Everything is the same bit for bit on the host and on every device, in any batch.
///
/// **Workspace.** `workspace` may hold anything. `counters` must be all zero before the first run and is all zero after
/// each: it is not to be shared by runs that may overlap.
///
/// ```
/// use nextscale::verification::{ConfidenceOut, ConfidenceRank, ConfidenceRankArgs};
/// use nextscale::{DeviceInfo, In, Out, Stream};
/// let stream = Stream::host();
/// // Of three rows the second is the surest.
/// let logits = [1.0, 0.0, /* row 1 */ 0.0, 5.0, /* row 2 */ 2.0, 0.0f32];
/// let plan = ConfidenceRank::<f32>::builder(1, 3, 2).build(&DeviceInfo::of(&stream)?)?;
/// let (mut tokens, mut committed, mut status) = ([0; 3], [0], [0]);
/// let mut counters = vec![0; plan.counter_words()];
/// let mut workspace = vec![0f64; plan.workspace_bytes() as usize / 8 + 64];
/// # let workspace: &mut [u8] = bytemuck::cast_slice_mut(&mut workspace);
/// # let skip = workspace.as_ptr().align_offset(256);
/// # let workspace = &mut workspace[skip..];
/// plan.run(&stream, ConfidenceRankArgs {
///     logits: In::host(&logits),
///     masked: None,
///     temperature: None,
///     top_k: None,
///     top_p: None,
///     min_p: None,
///     threshold: None,
///     counts: In::host(&[1]),
///     noise: None,
///     seeds: None,
///     positions: None,
///     out: ConfidenceOut {
///         tokens: Out::host(&mut tokens),
///         candidates: None,
///         confidence: None,
///         committed: Out::host(&mut committed),
///         status: Out::host(&mut status),
///     },
///     workspace: Out::host(workspace),
///     counters: Out::host(&mut counters),
/// })?;
/// assert_eq!((tokens, committed), ([-1, 1, -1], [1]));
/// # Ok::<(), nextscale::Error>(())
/// ```
pub struct ConfidenceRank<T> {
    inner: plan::Plan,
    types: PhantomData<T>,
}
typed_plan!(ConfidenceRank<T>);

/// The buffers of one step. See [`ConfidenceRank`] for shapes.
#[derive(Debug)]
pub struct ConfidenceRankArgs<'a, T>
where
    T: Float,
{
    /// `[batch * length, vocab]`.
    pub logits: In<'a, T>,
    /// `[batch, length]`; all are masked if not given.
    pub masked: Option<In<'a, u8>>,
    /// `[batch]`; 0 if not given.
    pub temperature: Option<In<'a, f32>>,
    /// `[batch]`; off if not given.
    pub top_k: Option<In<'a, i32>>,
    /// `[batch]`; off if not given.
    pub top_p: Option<In<'a, f32>>,
    /// `[batch]`; off if not given.
    pub min_p: Option<In<'a, f32>>,
    /// `[batch]`; off if not given.
    pub threshold: Option<In<'a, f32>>,
    /// `[batch]`.
    pub counts: In<'a, i32>,
    /// `[batch]`; 0 if not given.
    pub noise: Option<In<'a, f32>>,
    /// `[batch]`, bits of 64-bit seeds; 0 if not given.
    pub seeds: Option<In<'a, i64>>,
    /// `[batch]`; 0 if not given.
    pub positions: Option<In<'a, i64>>,
    /// What is written.
    pub out: ConfidenceOut<'a>,
    /// [`ConfidenceRank::workspace_bytes`], 256-byte aligned.
    pub workspace: Out<'a, u8>,
    /// [`ConfidenceRank::counter_words`]; all zero before the first run.
    pub counters: Out<'a, u32>,
}

/// What a step writes. See [`ConfidenceRank`] for shapes.
#[derive(Debug)]
pub struct ConfidenceOut<'a> {
    /// `[batch, length]`.
    pub tokens: Out<'a, i32>,
    /// `[batch, length]`.
    pub candidates: Option<Out<'a, i32>>,
    /// `[batch, length]`.
    pub confidence: Option<Out<'a, f32>>,
    /// `[batch]`.
    pub committed: Out<'a, i32>,
    /// `[batch]`.
    pub status: Out<'a, u32>,
}

impl<T: Float> ConfidenceRank<T> {
    /// A plan for `batch` requests of `length` rows.
    pub fn builder(batch: usize, length: usize, vocab: usize) -> ConfidenceRankBuilder<T> {
        ConfidenceRankBuilder::new(batch, length, vocab)
    }

    /// The bytes that any kernel must move if all rows are masked: each row once, and the outputs that are not
    /// optional.
    pub fn traffic(&self) -> Traffic {
        self.inner.traffic(size_of::<T>())
    }

    /// Blocks of the kernel's grid.
    pub fn blocks(&self) -> u32 {
        self.inner.blocks()
    }

    /// Bytes of `workspace`.
    pub fn workspace_bytes(&self) -> u64 {
        self.inner.workspace_bytes()
    }

    /// Words of `counters`.
    pub fn counter_words(&self) -> usize {
        self.inner.batch as usize
    }

    /// Ranks on `stream`. On a CUDA stream it enqueues one kernel and returns.
    ///
    /// # Errors
    /// Nothing was launched or written: a buffer too short, misaligned, overlapping an output, on another device or
    /// ordered on another stream; on CUDA what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, mut args: ConfidenceRankArgs<'_, T>) -> Result<()> {
        let stream = stream.as_stream();
        let plan = &self.inner;
        let (batch, rows) = (plan.batch, plan.rows());
        Operands::of(&stream)
            .input("logits", &args.logits, plan.len)?
            .input_if("masked", &args.masked, rows)?
            .input_if("temperature", &args.temperature, batch)?
            .input_if("top_k", &args.top_k, batch)?
            .input_if("top_p", &args.top_p, batch)?
            .input_if("min_p", &args.min_p, batch)?
            .input_if("threshold", &args.threshold, batch)?
            .input("counts", &args.counts, batch)?
            .input_if("noise", &args.noise, batch)?
            .input_if("seeds", &args.seeds, batch)?
            .input_if("positions", &args.positions, batch)?
            .output("tokens", &args.out.tokens, rows)?
            .output_if("candidates", &args.out.candidates, rows)?
            .output_if("confidence", &args.out.confidence, rows)?
            .output("committed", &args.out.committed, batch)?
            .output("status", &args.out.status, batch)?
            .workspace(&args.workspace, plan.workspace_bytes())?
            .output("counters", &args.counters, batch)?
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
