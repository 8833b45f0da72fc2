//! The drafter's sampler.

mod cuda;
mod host;
mod plan;

pub use plan::{DraftSampleBuilder, DraftSampleSchedule};

use core::marker::PhantomData;

use super::Traffic;
use crate::device::Device;
use crate::dtype::Float;
use crate::error::Result;
use crate::launch::Operands;
use crate::plan::typed_plan;
use crate::stream::AsStream;
use crate::view::{In, Out};

/// A plan that draws one or several drafts of each row, and stores what [`Verifier`](super::Verifier) and
/// [`TreeVerifier`](super::TreeVerifier) need to know of the row.
///
/// For chains it is called once for each draft of a step, with [`DraftSampleBuilder::row_in_step`] counting, and with
/// the seeds and positions that the verifier gets: its draws are then independent of the verifier's, as losslessness
/// demands.
///
/// For trees it is called once for each level, with [`DraftSampleBuilder::drafts`], a row for each node that gets
/// children: `rows_in_step` has the nodes' numbers, and `positions` those of the children, the verifier's plus the depth
/// of the node. Distinct drafts of a row are drawn one after the other, each with the probabilities that the ones before
/// it left: the law that recursive rejection without replacement takes siblings to have (arXiv 2402.14160). What is
/// drawn is taken out of the sum of its chunk, which is made again without it. A greedy row gives its greatest logits in
/// turn, ties by column. Where nothing is left, drafts are -1, which is none.
///
/// | operand | shape | |
/// |---|---|---|
/// | `logits` | `[rows, vocab]` | raw logits, `Q`: f32, f16, bf16; a stride between rows |
/// | `temperature`, `top_k`, `top_p`, `min_p` | `[rows]` f32, i32, f32, f32, optional | as the verifier's |
/// | `draft_to_target` | `[vocab]` i32, optional | the token of a column; else the column itself |
/// | `seeds`, `positions` | `[rows]` i64, optional | the request's seed, the absolute position of the step's first draft; else 0 |
/// | `rows_in_step` | `[rows]` i32, optional | the number of each row in its step, of a tree its node, below 2^24, in place of the plan's; `positions` are then those of the drafts themselves |
/// | `uniforms` | `[rows, drafts, 4]` f32, optional | of `[0, 1)`, in place of seeds; three are used |
/// | `tokens` | `[rows, drafts]` i32 | the drafts, as tokens of the target |
/// | `stats` | `[rows, 4]` f32, optional | greatest logit; sum of weights by its reference (its sign: a NaN); least logit kept; log2(e) / temperature, 0 for a greedy row |
/// | `log_probs` | `[rows, drafts]` f32, optional | natural logarithm of the draft's probability in the row before anything was drawn from it; NaN if there is no draft |
/// | `status` | `[rows]` u32 | bits of [`status`](super::status), the row being the target |
///
/// Draft `j` of a row is draw `j` of use 0. Arithmetic, bad rows, determinism and `counters` are as
/// [`Verifier`](super::Verifier) has them.
///
/// ```
/// use nextscale::{DeviceInfo, In, Out, Stream, verification::{DraftSample, DraftSampleArgs}};
/// let stream = Stream::host();
/// let plan = DraftSample::<f32>::builder(1, 3).build(&DeviceInfo::of(&stream)?)?;
/// let (mut tokens, mut stats, mut status) = ([0], [0f32; 4], [0]);
/// let mut counters = vec![0; plan.counter_words()];
/// let mut workspace = vec![0f64; plan.workspace_bytes() as usize / 8 + 64];
/// # let workspace: &mut [u8] = bytemuck::cast_slice_mut(&mut workspace);
/// # let skip = workspace.as_ptr().align_offset(256);
/// # let workspace = &mut workspace[skip..];
/// plan.run(&stream, DraftSampleArgs {
///     logits: In::host(&[f32::NEG_INFINITY, f32::NEG_INFINITY, 2.0]),
///     temperature: None,
///     top_k: None,
///     top_p: None,
///     min_p: None,
///     draft_to_target: None,
///     seeds: Some(In::host(&[42])),
///     positions: Some(In::host(&[7])),
///     rows_in_step: None,
///     uniforms: None,
///     tokens: Out::host(&mut tokens),
///     stats: Some(Out::host(&mut stats)),
///     log_probs: None,
///     status: Out::host(&mut status),
///     workspace: Out::host(workspace),
///     counters: Out::host(&mut counters),
/// })?;
/// assert_eq!((tokens[0], stats[0], status[0]), (2, 2.0, 0));
/// # Ok::<(), nextscale::Error>(())
/// ```
pub struct DraftSample<Q> {
    inner: plan::Plan,
    types: PhantomData<Q>,
}
typed_plan!(DraftSample<Q>);

/// The buffers of one run. See [`DraftSample`] for shapes.
#[derive(Debug)]
pub struct DraftSampleArgs<'a, Q>
where
    Q: Float,
{
    /// `[rows, vocab]`.
    pub logits: In<'a, Q>,
    /// `[rows]`; 1 if not given.
    pub temperature: Option<In<'a, f32>>,
    /// `[rows]`; off if not given.
    pub top_k: Option<In<'a, i32>>,
    /// `[rows]`; off if not given.
    pub top_p: Option<In<'a, f32>>,
    /// `[rows]`; off if not given.
    pub min_p: Option<In<'a, f32>>,
    /// `[vocab]`; the column itself if not given.
    pub draft_to_target: Option<In<'a, i32>>,
    /// `[rows]`, bits of 64-bit seeds; 0 if not given.
    pub seeds: Option<In<'a, i64>>,
    /// `[rows]`; 0 if not given.
    pub positions: Option<In<'a, i64>>,
    /// `[rows]`; the plan's if not given.
    pub rows_in_step: Option<In<'a, i32>>,
    /// `[rows, drafts, 4]`; drawn if not given.
    pub uniforms: Option<In<'a, f32>>,
    /// `[rows, drafts]`.
    pub tokens: Out<'a, i32>,
    /// `[rows, 4]`.
    pub stats: Option<Out<'a, f32>>,
    /// `[rows, drafts]`.
    pub log_probs: Option<Out<'a, f32>>,
    /// `[rows]`.
    pub status: Out<'a, u32>,
    /// [`DraftSample::workspace_bytes`], 256-byte aligned.
    pub workspace: Out<'a, u8>,
    /// [`DraftSample::counter_words`]; all zero before the first run.
    pub counters: Out<'a, u32>,
}

impl<Q: Float> DraftSample<Q> {
    /// A plan for `rows` rows of `vocab` columns.
    pub fn builder(rows: usize, vocab: usize) -> DraftSampleBuilder<Q> {
        DraftSampleBuilder::new(rows, vocab)
    }

    /// How the kernel cuts the work up.
    pub fn schedule(&self) -> DraftSampleSchedule {
        self.inner.schedule()
    }

    /// The bytes that any kernel must move, without optional operands.
    pub fn traffic(&self) -> Traffic {
        self.inner.traffic(size_of::<Q>())
    }

    /// Bytes of `workspace`.
    pub fn workspace_bytes(&self) -> u64 {
        self.inner.workspace_bytes()
    }

    /// Words of `counters`.
    pub fn counter_words(&self) -> usize {
        self.inner.rows as usize
    }

    /// Draws on `stream`. On a CUDA stream it enqueues one kernel and returns.
    ///
    /// # Errors
    /// Nothing was launched or written: a buffer too short, misaligned, overlapping an output, on another device or
    /// ordered on another stream; on CUDA what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, mut args: DraftSampleArgs<'_, Q>) -> Result<()> {
        let stream = stream.as_stream();
        let plan = &self.inner;
        let (rows, drafts) = (plan.rows, plan.rows * plan.drafts);
        Operands::of(&stream)
            .input("logits", &args.logits, plan.len)?
            .input_if("temperature", &args.temperature, rows)?
            .input_if("top_k", &args.top_k, rows)?
            .input_if("top_p", &args.top_p, rows)?
            .input_if("min_p", &args.min_p, rows)?
            .input_if("draft_to_target", &args.draft_to_target, plan.vocab)?
            .input_if("seeds", &args.seeds, rows)?
            .input_if("positions", &args.positions, rows)?
            .input_if("rows_in_step", &args.rows_in_step, rows)?
            .input_if("uniforms", &args.uniforms, drafts * 4)?
            .output("tokens", &args.tokens, drafts)?
            .output_if("stats", &args.stats, rows * 4)?
            .output_if("log_probs", &args.log_probs, drafts)?
            .output("status", &args.status, rows)?
            .workspace(&args.workspace, plan.workspace_bytes())?
            .output("counters", &args.counters, rows)?
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
