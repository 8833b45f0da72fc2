//! Chains of image tokens.

mod cuda;
mod host;
mod plan;

pub use plan::{Grouped, Lantern, Redraft, VisualRule, VisualVerifierBuilder};

use core::marker::PhantomData;

use super::{Accepted, Drafts, Emitted, Traffic};
use crate::device::Device;
use crate::dtype::{Float, bf16, f16};
use crate::error::{Error, Result};
use crate::launch::Operands;
use crate::plan::typed_plan;
use crate::stream::AsStream;
use crate::view::{In, Out};
use plan::RuleOfPlan;

/// A plan that decides chains of drafts of image tokens, by rules that know that neighbouring tokens look alike, or
/// by the model's own guesses of the step before.
///
/// Requests, rows and draws are those of [`Verifier`](super::Verifier), and so are all operands that are not named
/// here.
///
/// | operand | shape | |
/// |---|---|---|
/// | `target` | `[target_rows, vocab]` | raw logits, `T`: f32, f16, bf16; a stride between rows; vocab up to 2^18 |
/// | `target_free` | as `target`, with [`VisualVerifierBuilder::guided`] | the logits without the condition |
/// | `draft` | `[draft_rows, vocab]`, with [`Drafts::Logits`] and [`Drafts::LogitsAndStats`] | the logits that drafts were drawn from |
/// | `draft_free` | as `draft`, with [`VisualVerifierBuilder::guided`] | those without the condition |
/// | `draft_stats` | `[draft_rows, 4]` f32, with [`Drafts::LogitsAndStats`] | what [`DraftSample`](super::DraftSample) stored, or `redraft_stats` of the step before |
/// | `guidance` | `[batch]` f32, optional | the scale s of `free + s (target - free)`; else 1 |
/// | `syntax` | `[ceil(vocab / 32)]` u32, optional | bit `v % 32` of word `v / 32`: draft `v` is accepted whatever its probability |
/// | `neighbours` | `[codes, k]` u16 or i32, for [`VisualRule::Lantern`] | for each code the nearest other ones, nearest first, as codes; what is no code, such as -1, is no neighbour. k is the greater of `accumulated` and `zeroed` |
/// | `embeddings` | `[codes, dim]` f32, f16 or bf16, for [`VisualRule::Grouped`] with a `dim` | a vector of each code |
/// | `redrafts` | `[batch, max_drafts + 1]` i32, with a [`Redraft`] | behind row `accepted`: for row `i` a draft of the token that row `i` is of; else -1 |
/// | `redraft_stats` | `[batch, max_drafts + 1, 4]` f32, optional, with a [`Redraft`] | beside them what the next step has to know of this row as its q; else NaN |
///
/// **Guidance.** A logit is `free + s (target - free)`, in f32, and -inf where either is; temperature, truncation and
/// rules see that. Rows without the condition lie as those with it do.
///
/// **Order.** A row that allows no token ends the step with the fallback token; a draft that is none is no draft; a
/// draft of `syntax` is accepted; a row with a peak (temperature 0, an infinite logit) accepts the peak and nothing
/// else, whatever the rule; else the rule decides.
///
/// **Lossy rules** accept tokens that the target would not have drawn as often. Only [`VisualRule::Jacobi`] without
/// `syntax` is lossless.
///
/// **Arithmetic** is that of [`Verifier`](super::Verifier). Probabilities of neighbours are summed in groups of 32,
/// those of a group by a scan over its members. A Gumbel race is run as the greatest weight over an exponential
/// variate of 32 bits, 2^-32 being its finest uniform; the variate of token `v` is word `v % 4` of the Philox block
/// of (seed, position, use 8, draw `v / 4`).
///
/// **Determinism.** Everything is the same bit for bit on the host and on every device, in any batch.
///
/// **Workspace.** `workspace` may hold anything. `counters` must be all zero before the first run and is all zero after
/// each: it is not to be shared by runs that may overlap.
///
/// ```
/// use nextscale::verification::{
///     Accepted, Emitted, Lantern, Neighbours, VisualOptions, VisualOut, VisualRule, VisualVerifier, VisualVerifierArgs,
/// };
/// use nextscale::{DeviceInfo, In, Out, Stream};
/// let stream = Stream::host();
/// // The target is sure of code 1, the draft is code 0, and 1 is what lies closest to it.
/// let target = [2.0, 3.0, -9.0, -9.0, /* row 1 */ 0.0, 9.0, 0.0, 0.0f32];
/// let rule = VisualRule::Lantern(Lantern { accumulated: 1, zeroed: 1, bound: 0.8 });
/// let plan = VisualVerifier::<f32>::builder(1, 1, 4, rule).build(&DeviceInfo::of(&stream)?)?;
/// let (mut tokens, mut emitted, mut accepted, mut status) = ([0; 2], [Emitted(0)], [Accepted(0)], [0]);
/// let mut counters = vec![0; plan.counter_words()];
/// let mut workspace = vec![0f64; plan.workspace_bytes() as usize / 8 + 64];
/// # let workspace: &mut [u8] = bytemuck::cast_slice_mut(&mut workspace);
/// # let skip = workspace.as_ptr().align_offset(256);
/// # let workspace = &mut workspace[skip..];
/// plan.run(&stream, VisualVerifierArgs {
///     target: In::host(&target),
///     cu_rows: In::host(&[0, 2]),
///     drafts: In::host(&[0, -1]),
///     options: VisualOptions {
///         neighbours: Some(Neighbours::U16(In::host(&[1, 0, 3, 2]))),
///         uniforms: Some(In::host(&[0.9, 0.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.5])),
///         ..VisualOptions::default()
///     },
///     out: VisualOut {
///         tokens: Out::host(&mut tokens),
///         emitted: Out::host(&mut emitted),
///         accepted: Out::host(&mut accepted),
///         status: Out::host(&mut status),
///         last_row: None,
///         redrafts: None,
///         redraft_stats: None,
///     },
///     workspace: Out::host(workspace),
///     counters: Out::host(&mut counters),
/// })?;
/// assert_eq!((tokens, accepted[0]), ([0, 1], Accepted(1)));
/// # Ok::<(), nextscale::Error>(())
/// ```
pub struct VisualVerifier<T> {
    inner: plan::Plan,
    types: PhantomData<T>,
}
typed_plan!(VisualVerifier<T>);

/// The codes nearest to each code.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum Neighbours<'a> {
    U16(In<'a, u16>),
    I32(In<'a, i32>),
}

/// A vector of each code.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum Embeddings<'a> {
    F32(In<'a, f32>),
    F16(In<'a, f16>),
    BF16(In<'a, bf16>),
}

/// The buffers of one step. See [`VisualVerifier`] for shapes.
#[derive(Debug)]
pub struct VisualVerifierArgs<'a, T>
where
    T: Float,
{
    /// `[target_rows, vocab]`.
    pub target: In<'a, T>,
    /// `[batch + 1]`.
    pub cu_rows: In<'a, i32>,
    /// `[rows]`.
    pub drafts: In<'a, i32>,
    /// What a step may have besides.
    pub options: VisualOptions<'a, T>,
    /// What is written.
    pub out: VisualOut<'a>,
    /// [`VisualVerifier::workspace_bytes`], 256-byte aligned.
    pub workspace: Out<'a, u8>,
    /// [`VisualVerifier::counter_words`]; all zero before the first run.
    pub counters: Out<'a, u32>,
}

/// The inputs that a step may have besides. See [`VisualVerifier`] and [`Verifier`](super::Verifier) for shapes.
#[derive(Debug)]
pub struct VisualOptions<'a, T>
where
    T: Float,
{
    /// `[target_rows, vocab]`; goes with [`VisualVerifierBuilder::guided`].
    pub target_free: Option<In<'a, T>>,
    /// `[rows]`; row `r` if not given.
    pub row_index: Option<In<'a, i32>>,
    /// `[draft_rows, vocab]`; goes with [`Drafts::Logits`] and [`Drafts::LogitsAndStats`].
    pub draft: Option<In<'a, T>>,
    /// `[draft_rows, vocab]`; goes with `draft` and [`VisualVerifierBuilder::guided`].
    pub draft_free: Option<In<'a, T>>,
    /// `[rows]`; `b * max_drafts + i` for draft `i` of request `b` if not given.
    pub draft_row: Option<In<'a, i32>>,
    /// `[draft_rows, 4]`; goes with [`Drafts::LogitsAndStats`].
    pub draft_stats: Option<In<'a, f32>>,
    /// `[rows, ceil(vocab / 32)]`; all tokens if not given.
    pub allow: Option<In<'a, u32>>,
    /// `[ceil(vocab / 32)]`; none if not given.
    pub syntax: Option<In<'a, u32>>,
    /// `[codes, k]`; goes with [`VisualRule::Lantern`].
    pub neighbours: Option<Neighbours<'a>>,
    /// `[codes, dim]`; goes with [`VisualRule::Grouped`] that has a `dim`.
    pub embeddings: Option<Embeddings<'a>>,
    /// `[batch]`; 1 if not given.
    pub temperature: Option<In<'a, f32>>,
    /// `[batch]`; `temperature` if not given.
    pub draft_temperature: Option<In<'a, f32>>,
    /// `[batch]`; 1 if not given.
    pub guidance: Option<In<'a, f32>>,
    /// `[batch]`; off if not given.
    pub top_k: Option<In<'a, i32>>,
    /// `[batch]`; off if not given.
    pub top_p: Option<In<'a, f32>>,
    /// `[batch]`; off if not given.
    pub min_p: Option<In<'a, f32>>,
    /// `[batch]`, bits of 64-bit seeds; 0 if not given.
    pub seeds: Option<In<'a, i64>>,
    /// `[batch]`; 0 if not given.
    pub positions: Option<In<'a, i64>>,
    /// `[batch, max_drafts + 1, 4]`; drawn if not given. Not with [`Redraft::Gumbel`].
    pub uniforms: Option<In<'a, f32>>,
}

impl<T: Float> Default for VisualOptions<'_, T> {
    fn default() -> Self {
        VisualOptions {
            target_free: None,
            row_index: None,
            draft: None,
            draft_free: None,
            draft_row: None,
            draft_stats: None,
            allow: None,
            syntax: None,
            neighbours: None,
            embeddings: None,
            temperature: None,
            draft_temperature: None,
            guidance: None,
            top_k: None,
            top_p: None,
            min_p: None,
            seeds: None,
            positions: None,
            uniforms: None,
        }
    }
}

/// What a step writes. See [`VisualVerifier`] for shapes.
#[derive(Debug)]
pub struct VisualOut<'a> {
    /// `[batch, max_drafts + 1]`.
    pub tokens: Out<'a, i32>,
    /// `[batch]`.
    pub emitted: Out<'a, Emitted>,
    /// `[batch]`.
    pub accepted: Out<'a, Accepted>,
    /// `[batch]`.
    pub status: Out<'a, u32>,
    /// `[batch]`.
    pub last_row: Option<Out<'a, i32>>,
    /// `[batch, max_drafts + 1]`; goes with a [`Redraft`].
    pub redrafts: Option<Out<'a, i32>>,
    /// `[batch, max_drafts + 1, 4]`; may go with a [`Redraft`].
    pub redraft_stats: Option<Out<'a, f32>>,
}

impl<T: Float> VisualVerifier<T> {
    /// A plan for up to `batch` requests of up to `max_drafts` drafts.
    pub fn builder(batch: usize, max_drafts: usize, vocab: usize, rule: VisualRule) -> VisualVerifierBuilder<T> {
        VisualVerifierBuilder::new(batch, max_drafts, vocab, rule)
    }

    /// The bytes that any kernel must move if all drafts are accepted: each row once, with and without the condition,
    /// of the draft where it is swept, and the outputs without `last_row` and `redraft_stats`. Tables are not
    /// counted.
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
        self.inner.counter_words() as usize
    }

    /// Decides a step on `stream`. On a CUDA stream it enqueues one kernel and returns.
    ///
    /// # Errors
    /// Nothing was launched or written: a buffer too short, misaligned, overlapping an output, on another device or
    /// ordered on another stream; an operand that the plan needs and that is missing, or that it does not take; on CUDA
    /// what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, mut args: VisualVerifierArgs<'_, T>) -> Result<()> {
        let stream = stream.as_stream();
        let plan = &self.inner;
        let options = &args.options;
        let goes = |arg, given: bool, needed: bool| match (given, needed) {
            (true, false) => Err(Error::Unsupported { arg, what: "this plan does not take it" }),
            (false, true) => Err(Error::Unsupported { arg, what: "this plan needs it" }),
            _ => Ok(()),
        };
        let random = plan.drafts != Drafts::Deterministic;
        let lantern = matches!(plan.rule, RuleOfPlan::Lantern { .. });
        let embedded = matches!(plan.rule, RuleOfPlan::Grouped { dim, .. } if dim > 0);
        let redraft = plan.redraft != Redraft::None;
        goes("target_free", options.target_free.is_some(), plan.guided)?;
        goes("draft", options.draft.is_some(), random)?;
        goes("draft_free", options.draft_free.is_some(), random && plan.guided)?;
        goes("draft_stats", options.draft_stats.is_some(), plan.drafts == Drafts::LogitsAndStats)?;
        goes("neighbours", options.neighbours.is_some(), lantern)?;
        goes("embeddings", options.embeddings.is_some(), embedded)?;
        goes("redrafts", args.out.redrafts.is_some(), redraft)?;
        goes("redraft_stats", args.out.redraft_stats.is_some(), redraft && args.out.redraft_stats.is_some())?;
        if plan.redraft == Redraft::Gumbel {
            goes("uniforms", options.uniforms.is_some(), false)?;
        }
        if !plan.guided {
            goes("guidance", options.guidance.is_some(), false)?;
        }
        let (batch, rows) = (plan.batch, plan.rows());
        let mut operands = Operands::of(&stream)
            .input("target", &args.target, plan.target_len)?
            .input_if("target_free", &options.target_free, plan.target_len)?
            .input("cu_rows", &args.cu_rows, if batch > 0 { batch + 1 } else { 0 })?
            .input("drafts", &args.drafts, rows)?
            .input_if("row_index", &options.row_index, rows)?
            .input_if("draft", &options.draft, plan.draft_len)?
            .input_if("draft_free", &options.draft_free, plan.draft_len)?
            .input_if("draft_row", &options.draft_row, rows)?
            .input_if("draft_stats", &options.draft_stats, plan.draft_rows * 4)?
            .input_if("allow", &options.allow, plan.allow_len)?
            .input_if("syntax", &options.syntax, plan.vocab.div_ceil(32))?
            .input_if("temperature", &options.temperature, batch)?
            .input_if("draft_temperature", &options.draft_temperature, batch)?
            .input_if("guidance", &options.guidance, batch)?
            .input_if("top_k", &options.top_k, batch)?
            .input_if("top_p", &options.top_p, batch)?
            .input_if("min_p", &options.min_p, batch)?
            .input_if("seeds", &options.seeds, batch)?
            .input_if("positions", &options.positions, batch)?
            .input_if("uniforms", &options.uniforms, rows * 4)?;
        operands = match &options.neighbours {
            Some(Neighbours::U16(view)) => operands.input("neighbours", view, plan.neighbours_len)?,
            Some(Neighbours::I32(view)) => operands.input("neighbours", view, plan.neighbours_len)?,
            None => operands,
        };
        operands = match &options.embeddings {
            Some(Embeddings::F32(view)) => operands.input("embeddings", view, plan.embeddings_len)?,
            Some(Embeddings::F16(view)) => operands.input("embeddings", view, plan.embeddings_len)?,
            Some(Embeddings::BF16(view)) => operands.input("embeddings", view, plan.embeddings_len)?,
            None => operands,
        };
        operands
            .output("tokens", &args.out.tokens, rows)?
            .output("emitted", &args.out.emitted, batch)?
            .output("accepted", &args.out.accepted, batch)?
            .output("status", &args.out.status, batch)?
            .output_if("last_row", &args.out.last_row, batch)?
            .output_if("redrafts", &args.out.redrafts, rows)?
            .output_if("redraft_stats", &args.out.redraft_stats, rows * 4)?
            .workspace(&args.workspace, plan.workspace_bytes())?
            .output("counters", &args.counters, plan.counter_words())?
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
