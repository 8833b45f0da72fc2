//! Chains of drafts.

mod cuda;
mod host;
mod plan;

pub use plan::{Drafts, Rule, VerifierBuilder, VerifierSchedule};

use core::marker::PhantomData;

use super::{Accepted, Emitted, Traffic};
use crate::device::Device;
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::launch::Operands;
use crate::plan::typed_plan;
use crate::stream::AsStream;
use crate::view::{In, Out};

/// A plan that decides chains of drafts, a batch of requests in one call.
///
/// Request `b` has the rows `cu_rows[b]` to `cu_rows[b + 1] - 1` of the step: one for each of its drafts, up to
/// `max_drafts`, and one more. Row `i` of a request is the target's distribution of the token after the first `i` drafts:
/// it scores draft `i`, and the last row gives the token after all of them. A request with one row has no drafts and is
/// sampled; one with none is passed over. A request emits the drafts that its [`Rule`] accepts and one token more.
///
/// | operand | shape | |
/// |---|---|---|
/// | `target` | `[target_rows, vocab]` | raw logits, `P`: f32, f16, bf16; a stride between rows |
/// | `row_index` | `[rows]` i32, optional | the row of `target` that row `r` of the step is; else `r` |
/// | `cu_rows` | `[batch + 1]` i32 | where requests begin; ascending |
/// | `drafts` | `[rows]` i32 | at row `r`, the draft that this row scores; at last rows anything. -1: no draft from here on, a token of the target instead |
/// | `draft` | `[draft_rows, draft_vocab]`, with [`Drafts::Logits`] and [`Drafts::LogitsAndStats`] | the drafter's raw logits, `Q`; a stride between rows |
/// | `draft_row` | `[rows]` i32, optional | at row `r`, the row of `draft` that its draft was drawn from; else `b * max_drafts + i` for draft `i` of request `b` |
/// | `draft_stats` | `[draft_rows, 4]` f32, with [`Drafts::LogitsAndStats`] | what [`DraftSample`](super::DraftSample) stored |
/// | `target_to_draft` | `[vocab]` i32, optional | the column of `draft` of a token, -1 if it has none; else the token's own |
/// | `target_stats` | `[target_rows, ceil(vocab / 1024), 2]` f32, optional | what [`RowStats`](super::RowStats) says of `target`, so that its rows are not swept |
/// | `allow` | `[rows, ceil(vocab / 32)]` u32, optional | bit `v % 32` of word `v / 32`: whether token `v` may be drawn in this row |
/// | `rules` | `[batch]` i32, optional | `Rule as i32` |
/// | `temperature` | `[batch]` f32, optional | else 1; below 1e-5: greedy |
/// | `draft_temperature` | `[batch]` f32, optional | that of the drafter; else `temperature` |
/// | `top_k`, `top_p`, `min_p` | `[batch]` i32, f32, f32, optional | of the target; 0, 1, 0: off |
/// | `seeds`, `positions` | `[batch]` i64 | the request's seed (its bits), and the absolute position of the token after row 0 |
/// | `uniforms` | `[batch, max_drafts + 1, 4]` f32, optional | of `[0, 1)`, in place of seeds: of row `i` the accept test, and three for a token |
/// | `tokens` | `[batch, max_drafts + 1]` i32 | what is emitted, then -1 |
/// | `emitted`, `accepted` | `[batch]` | how many; [`Emitted`] is [`Accepted`] + 1 |
/// | `last_row` | `[batch]` i32, optional | the row of the step whose hidden state goes on, `cu_rows[b] + accepted`; -1 for a request without rows |
/// | `log_probs` | `[batch, max_drafts + 1]` f32, optional | natural logarithms of the target's probabilities of what is emitted, then NaN |
/// | `status` | `[batch]` u32 | bits of [`status`](super::status) |
///
/// **Probabilities.** p is the softmax of `logits / temperature` over what is allowed, then cut down: `top_k` greatest
/// logits, then `min_p`, then `top_p` of what is left, logits that tie with the last one kept; then normalised. q is the
/// softmax of `draft / draft_temperature`, or what [`DraftSample`](super::DraftSample) drew from. Greedy is the limit of
/// temperature 0: p is 1 for the lowest token of the greatest logit; so every rule works for it. Its logarithms of
/// probabilities are those at temperature 1.
///
/// **Arithmetic.** f32; weights have a relative error below 2^-21, those below 2^-120 of a row's greatest are 0. A
/// token is drawn by the inverse of the cumulative sum over chunks of 1024 columns, then over lanes, then over a lane's
/// columns, each with a uniform of its own of 24 bits, so that rare tokens are not lost. Acceptance is `u q < p` with
/// `u` of `[0, 1)`, multiplied out.
///
/// **Bad rows.** NaNs have no probability. An infinite greatest logit has all of it. A row that allows no token ends the
/// step with the plan's fallback token. Each sets a bit of `status` of its request, and concerns no other.
///
/// **Determinism.** Tokens, counts, `last_row` and `status` are the same bit for bit on the host and on every device, in
/// any batch. Logarithms are within 1e-5 of the exact one and 2^-20 of it.
///
/// **Workspace.** `workspace` may hold anything. `counters` must be all zero before the first run and is all zero after
/// each: it is not to be shared by runs that may overlap.
///
/// ```
/// use nextscale::verification::{Emitted, Rule, Verifier, VerifierArgs, VerifierOptions, VerifierOut};
/// use nextscale::{DeviceInfo, In, Out, Stream};
/// let stream = Stream::host();
/// // One request with two drafts, greedily: the target prefers 1, then 3, where the second draft was 0.
/// let target = [0.0, 9.0, 0.0, 0.0, /* row 1 */ 1.0, 0.0, 0.0, 5.0, /* row 2 */ 0.0, 0.0, 0.0, 0.0f32];
/// let plan = Verifier::<f32, f32>::builder(1, 2, 4).rule(Rule::Greedy).build(&DeviceInfo::of(&stream)?)?;
/// let (mut tokens, mut emitted, mut accepted, mut status) = ([0; 3], [Default::default()], [Default::default()], [0]);
/// let mut counters = vec![0; plan.counter_words()];
/// let mut workspace = vec![0f64; plan.workspace_bytes() as usize / 8 + 64];
/// # let workspace: &mut [u8] = bytemuck::cast_slice_mut(&mut workspace);
/// # let skip = workspace.as_ptr().align_offset(256);
/// # let workspace = &mut workspace[skip..];
/// plan.run(&stream, VerifierArgs {
///     target: In::host(&target),
///     cu_rows: In::host(&[0, 3]),
///     drafts: In::host(&[1, 0, -1]),
///     options: VerifierOptions::default(),
///     out: VerifierOut {
///         tokens: Out::host(&mut tokens),
///         emitted: Out::host(&mut emitted),
///         accepted: Out::host(&mut accepted),
///         status: Out::host(&mut status),
///         last_row: None,
///         log_probs: None,
///     },
///     workspace: Out::host(workspace),
///     counters: Out::host(&mut counters),
/// })?;
/// assert_eq!((tokens, emitted[0], status[0]), ([1, 3, -1], Emitted(2), 0));
/// # Ok::<(), nextscale::Error>(())
/// ```
pub struct Verifier<P, Q> {
    inner: plan::Plan,
    types: PhantomData<(P, Q)>,
}
typed_plan!(Verifier<P, Q>);

/// The buffers of one step. See [`Verifier`] for shapes.
#[derive(Debug)]
pub struct VerifierArgs<'a, P, Q>
where
    P: Float,
    Q: Float,
{
    /// `[target_rows, vocab]`.
    pub target: In<'a, P>,
    /// `[batch + 1]`.
    pub cu_rows: In<'a, i32>,
    /// `[rows]`.
    pub drafts: In<'a, i32>,
    /// What a step may have besides.
    pub options: VerifierOptions<'a, Q>,
    /// What is written.
    pub out: VerifierOut<'a>,
    /// [`Verifier::workspace_bytes`], 256-byte aligned.
    pub workspace: Out<'a, u8>,
    /// [`Verifier::counter_words`]; all zero before the first run.
    pub counters: Out<'a, u32>,
}

/// The inputs that a step may have besides. See [`Verifier`] for shapes.
#[derive(Debug)]
pub struct VerifierOptions<'a, Q>
where
    Q: Float,
{
    /// `[rows]`; row `r` if not given.
    pub row_index: Option<In<'a, i32>>,
    /// `[draft_rows, draft_vocab]`; goes with [`Drafts::Logits`] and [`Drafts::LogitsAndStats`].
    pub draft: Option<In<'a, Q>>,
    /// `[rows]`; `b * max_drafts + i` for draft `i` of request `b` if not given.
    pub draft_row: Option<In<'a, i32>>,
    /// `[draft_rows, 4]`; goes with [`Drafts::LogitsAndStats`].
    pub draft_stats: Option<In<'a, f32>>,
    /// `[vocab]`; the token's own column if not given.
    pub target_to_draft: Option<In<'a, i32>>,
    /// `[target_rows, ceil(vocab / 1024), 2]`; rows are swept if not given. It must be that of each request's temperature,
    /// and of `allow`.
    pub target_stats: Option<In<'a, f32>>,
    /// `[rows, ceil(vocab / 32)]`; all tokens if not given.
    pub allow: Option<In<'a, u32>>,
    /// `[batch]`; the plan's if not given. Needs a plan with [`VerifierBuilder::rules_per_request`].
    pub rules: Option<In<'a, i32>>,
    /// `[batch]`; 1 if not given.
    pub temperature: Option<In<'a, f32>>,
    /// `[batch]`; `temperature` if not given.
    pub draft_temperature: Option<In<'a, f32>>,
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
    /// `[batch, max_drafts + 1, 4]`; drawn if not given.
    pub uniforms: Option<In<'a, f32>>,
}

impl<Q: Float> Default for VerifierOptions<'_, Q> {
    fn default() -> Self {
        VerifierOptions {
            row_index: None,
            draft: None,
            draft_row: None,
            draft_stats: None,
            target_to_draft: None,
            target_stats: None,
            allow: None,
            rules: None,
            temperature: None,
            draft_temperature: None,
            top_k: None,
            top_p: None,
            min_p: None,
            seeds: None,
            positions: None,
            uniforms: None,
        }
    }
}

/// What a step writes. See [`Verifier`] for shapes.
#[derive(Debug)]
pub struct VerifierOut<'a> {
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
    /// `[batch, max_drafts + 1]`.
    pub log_probs: Option<Out<'a, f32>>,
}

impl<P: Float, Q: Float> Verifier<P, Q> {
    /// A plan for up to `batch` requests of up to `max_drafts` drafts.
    pub fn builder(batch: usize, max_drafts: usize, vocab: usize) -> VerifierBuilder<P, Q> {
        VerifierBuilder::new(batch, max_drafts, vocab)
    }

    /// How the kernel cuts a step up.
    pub fn schedule(&self) -> VerifierSchedule {
        self.inner.schedule()
    }

    /// The bytes that any kernel must move if all drafts are accepted: each row of the target once, and of the draft where
    /// it is swept, and the outputs without `log_probs` and `last_row`.
    pub fn traffic(&self) -> Traffic {
        self.inner.traffic(size_of::<P>(), size_of::<Q>())
    }

    /// Bytes of `workspace`.
    pub fn workspace_bytes(&self) -> u64 {
        self.inner.workspace_bytes()
    }

    /// Words of `counters`.
    pub fn counter_words(&self) -> usize {
        self.inner.counter_words() as usize
    }

    /// Decides a step on `stream`. On a CUDA stream it enqueues one kernel, with [`Rule::Block`] two, and returns.
    ///
    /// # Errors
    /// Nothing was launched or written: a buffer too short, misaligned, overlapping an output, on another device or
    /// ordered on another stream; an operand that the plan needs and that is missing, or that it does not take; on CUDA
    /// what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, mut args: VerifierArgs<'_, P, Q>) -> Result<()> {
        let stream = stream.as_stream();
        let plan = &self.inner;
        let options = &args.options;
        let refuse = |arg, what| Err(Error::Unsupported { arg, what });
        match plan.drafts {
            Drafts::Deterministic if options.draft.is_some() => {
                return refuse("draft", "drafts of this plan are deterministic");
            }
            Drafts::LogitsAndStats if options.draft_stats.is_none() => {
                return refuse("draft_stats", "this plan needs them");
            }
            Drafts::Deterministic | Drafts::Logits if options.draft_stats.is_some() => {
                return refuse("draft_stats", "this plan does not take them");
            }
            Drafts::Logits | Drafts::LogitsAndStats if options.draft.is_none() => {
                return refuse("draft", "this plan needs it");
            }
            _ => {}
        }
        if options.rules.is_some() && !plan.rules_per_request {
            return refuse("rules", "the plan has one rule");
        }
        let (batch, rows) = (plan.batch, plan.rows());
        let stats = crate::verification::rows::chunks(plan.vocab) * 2;
        Operands::of(&stream)
            .input("target", &args.target, plan.target_len)?
            .input("cu_rows", &args.cu_rows, if batch > 0 { batch + 1 } else { 0 })?
            .input("drafts", &args.drafts, rows)?
            .input_if("row_index", &options.row_index, rows)?
            .input_if("draft", &options.draft, plan.draft_len)?
            .input_if("draft_row", &options.draft_row, rows)?
            .input_if("draft_stats", &options.draft_stats, plan.draft_rows * 4)?
            .input_if("target_to_draft", &options.target_to_draft, plan.vocab)?
            .input_if("target_stats", &options.target_stats, plan.target_rows * stats)?
            .input_if("allow", &options.allow, plan.allow_len)?
            .input_if("rules", &options.rules, batch)?
            .input_if("temperature", &options.temperature, batch)?
            .input_if("draft_temperature", &options.draft_temperature, batch)?
            .input_if("top_k", &options.top_k, batch)?
            .input_if("top_p", &options.top_p, batch)?
            .input_if("min_p", &options.min_p, batch)?
            .input_if("seeds", &options.seeds, batch)?
            .input_if("positions", &options.positions, batch)?
            .input_if("uniforms", &options.uniforms, rows * 4)?
            .output("tokens", &args.out.tokens, rows)?
            .output("emitted", &args.out.emitted, batch)?
            .output("accepted", &args.out.accepted, batch)?
            .output("status", &args.out.status, batch)?
            .output_if("last_row", &args.out.last_row, batch)?
            .output_if("log_probs", &args.out.log_probs, rows)?
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
