//! Trees of drafts.

mod cuda;
mod host;
mod plan;

pub use plan::{Siblings, TreeVerifierBuilder, TreeVerifierSchedule};

use core::marker::PhantomData;

use super::{Accepted, Drafts, Emitted, Traffic};
use crate::device::Device;
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::launch::Operands;
use crate::plan::typed_plan;
use crate::stream::AsStream;
use crate::view::{In, Out};

/// A plan that decides trees of drafts, a batch of requests in one call.
///
/// A request has a tree of nodes. Node 0 is its root, the last certain token; every other node is a draft, and comes after
/// its parent. Row `n` of a request is the target's distribution of the token after node `n`. The walk begins at the root
/// and goes on to a child as long as its [`Rule`](super::Rule) accepts one; a request emits the drafts on the path and one token more.
///
/// | operand | shape | |
/// |---|---|---|
/// | `target` | `[target_rows, vocab]` | raw logits, `P`: f32, f16, bf16; a stride between rows |
/// | `tree` | `[rows]` i32 | [`TreeLinks`], by the nodes' numbers in their trees |
/// | `drafts` | `[rows]` i32 | each node's token, the root's of no interest; outside the vocabulary: no draft |
/// | `cu_rows` | `[batch + 1]` i32, optional | where the nodes of a request begin, ascending; else request `b` has the `max_nodes` rows from `b * max_nodes` on, those being no nodes that nothing links |
/// | `row_index` | `[rows]` i32, optional | the row of `target` that row `r` of the step is; else `r` |
/// | `draft` | `[draft_rows, draft_vocab]`, with [`Drafts::Logits`] and [`Drafts::LogitsAndStats`] | the drafter's raw logits, `Q`; a stride between rows |
/// | `draft_row` | `[rows]` i32, optional | at row `r`, the row of `draft` that the children of this node were drawn from; else `r` |
/// | `draft_stats` | `[draft_rows, 4]` f32, with [`Drafts::LogitsAndStats`] | what [`DraftSample`](super::DraftSample) stored, of the row before anything was drawn from it |
/// | `target_to_draft` | `[vocab]` i32, optional | the column of `draft` of a token, -1 if it has none; else the token's own |
/// | `target_stats` | `[target_rows, ceil(vocab / 1024), 2]` f32, optional | what [`RowStats`](super::RowStats) says of `target`, so that its rows are not swept |
/// | `allow` | `[rows, ceil(vocab / 32)]` u32, optional | bit `v % 32` of word `v / 32`: whether token `v` may be drawn in this row |
/// | `rules` | `[batch]` i32, optional | `Rule as i32` |
/// | `temperature`, `draft_temperature`, `top_k`, `top_p`, `min_p` | `[batch]`, optional | as of [`Verifier`](super::Verifier) |
/// | `seeds`, `positions` | `[batch]` i64 | the request's seed (its bits), and the absolute position of the token after the root |
/// | `uniforms` | `[batch, max_nodes, 4]` f32, optional | of `[0, 1)`, in place of seeds: of a node its accept test, and three for a token after it |
/// | `kv_start` | `[batch]` i32, optional | node `n` of a request lies in row `kv_start + n` of its cache; else 0 |
/// | `kv_slots` | `[rows]` i32, optional | the row of the cache that each node lies in, in place of `kv_start` |
/// | `tokens` | `[batch, max_depth + 1]` i32 | what is emitted, then -1 |
/// | `emitted`, `accepted` | `[batch]` | how many; [`Emitted`] is [`Accepted`] + 1 |
/// | `last_row` | `[batch]` i32, optional | the row of the step whose hidden state goes on; -1 for a request without rows |
/// | `path` | `[batch, max_depth + 1]` i32, optional | the root and the nodes accepted, ascending, then -1 |
/// | `kv_source`, `kv_destination` | `[batch, max_depth + 1]` i32, optional | the rows of the cache in which the nodes of the path lie, and where they belong: one after the other from the root's row on; -1 behind. `emitted` says how many; a source is never before its destination, so they may be moved in place in ascending order |
/// | `log_probs` | `[batch, max_depth + 1]` f32, optional | natural logarithms of the target's probabilities of what is emitted, then NaN |
/// | `status` | `[batch]` u32 | bits of [`status`](super::status) |
///
/// **Rules.** p is the target's distribution after a node, q the drafter's; both as of [`Verifier`](super::Verifier).
/// - `Greedy`: on to the first child that is the lowest token of the greatest logit.
/// - `Match`: a token of p is drawn; on to the first child that is this token, else it is emitted. Tokens are those of a
///   request without drafts, byte for byte.
/// - `Reject`, recursive rejection: the children are tried in turn, `u q(x) < r(x)` with r = p at first; after each that
///   fails r becomes `max(r - q, 0)`, normalised, and with [`Siblings::WithoutReplacement`] q loses the token and is
///   normalised too. After the last one a token of r is emitted. As r is always `max(p - c q, 0)` for a growing number
///   c, nothing is written back. (SpecInfer, arXiv 2305.09781, multi-step speculative sampling; without replacement:
///   arXiv 2402.14160.) Where q is not random, `Reject` is `Match`: no lossless rule accepts more.
///
/// All are lossless, provided that the children of a node were drawn from the q given as the plan says (for `Greedy` and
/// `Match`: however they came about). A chain has the law, and but for rounding the tokens, of [`Verifier`](super::Verifier)
/// without trials.
///
/// **Randomness.** As the module says, with the depth of a node in place of the number of the row: the accept test of child
/// `j` of a node of depth `d` is draw `j` of use 1 at `position + d`; a residual's token use 2, a token of the target use 3.
///
/// **Bad rows and trees.** Rows as of [`Verifier`](super::Verifier). A node whose link is no node of the tree, or whose parent
/// does not come before it, is not reached. A node at depth `max_depth` has no children. Each sets a bit of
/// `status` of its request, and concerns no other.
///
/// **Determinism.** All outputs but `log_probs` are the same bit for bit on the host and on every device, in any batch.
/// Logarithms are within 1e-5 of the exact one and 2^-20 of it.
///
/// ```
/// use nextscale::verification::{
///     Emitted, Rule, TreeLinks, TreeVerifier, TreeVerifierArgs, TreeVerifierOptions, TreeVerifierOut,
/// };
/// use nextscale::{DeviceInfo, In, Out, Stream};
/// let stream = Stream::host();
/// // The root has the children 2 and 1, node 2 the child 3. Greedily: the target goes 1, 3, then 0.
/// let (parents, drafts) = ([-1, 0, 0, 2], [-1, 2, 1, 3]);
/// let target = [0.0, 9.0, 0.0, 0.0, /* */ 1.0, 0.0, 0.0, 0.0, /* */ 1.0, 0.0, 0.0, 5.0, /* */ 7.0, 0.0, 0.0, 0.0f32];
/// let plan = TreeVerifier::<f32, f32>::builder(1, 4, 2, 4).rule(Rule::Greedy).build(&DeviceInfo::of(&stream)?)?;
/// let (mut tokens, mut path) = ([0; 3], [0; 3]);
/// let (mut emitted, mut accepted, mut status) = ([Default::default()], [Default::default()], [0]);
/// let mut workspace = vec![0f64; plan.workspace_bytes() as usize / 8 + 64];
/// # let workspace: &mut [u8] = bytemuck::cast_slice_mut(&mut workspace);
/// # let skip = workspace.as_ptr().align_offset(256);
/// # let workspace = &mut workspace[skip..];
/// plan.run(&stream, TreeVerifierArgs {
///     target: In::host(&target),
///     tree: TreeLinks::Parents(In::host(&parents)),
///     drafts: In::host(&drafts),
///     options: TreeVerifierOptions::default(),
///     out: TreeVerifierOut {
///         path: Some(Out::host(&mut path)),
///         ..TreeVerifierOut::new(
///             Out::host(&mut tokens),
///             Out::host(&mut emitted),
///             Out::host(&mut accepted),
///             Out::host(&mut status),
///         )
///     },
///     workspace: Out::host(workspace),
/// })?;
/// assert_eq!((tokens, path, emitted[0], status[0]), ([1, 3, 0], [0, 2, 3], Emitted(3), 0));
/// # Ok::<(), nextscale::Error>(())
/// ```
pub struct TreeVerifier<P, Q> {
    inner: plan::Plan,
    types: PhantomData<(P, Q)>,
}
typed_plan!(TreeVerifier<P, Q>);

/// How the nodes of trees hang together; `[rows]` each, numbers within the tree. [`Tree`](super::Tree) has these and others on
/// the host, [`TreeBuilder`](super::TreeBuilder) on the device.
#[derive(Debug)]
pub enum TreeLinks<'a> {
    /// Each node's parent; -1 for the root and for what is no node. Children are tried in the order of their numbers.
    Parents(In<'a, i32>),
    /// Each node's first child and the next child of its parent, -1 for none. Children are tried in the order of the links.
    Children {
        /// First child.
        first_child: In<'a, i32>,
        /// Next sibling.
        next_sibling: In<'a, i32>,
    },
}

/// The buffers of one step. See [`TreeVerifier`] for shapes.
#[derive(Debug)]
pub struct TreeVerifierArgs<'a, P, Q>
where
    P: Float,
    Q: Float,
{
    /// `[target_rows, vocab]`.
    pub target: In<'a, P>,
    /// `[rows]`.
    pub tree: TreeLinks<'a>,
    /// `[rows]`.
    pub drafts: In<'a, i32>,
    /// What a step may have besides.
    pub options: TreeVerifierOptions<'a, Q>,
    /// What is written.
    pub out: TreeVerifierOut<'a>,
    /// [`TreeVerifier::workspace_bytes`], 256-byte aligned; may hold anything.
    pub workspace: Out<'a, u8>,
}

/// The inputs that a step may have besides. See [`TreeVerifier`] for shapes.
#[derive(Debug)]
pub struct TreeVerifierOptions<'a, Q>
where
    Q: Float,
{
    /// `[batch + 1]`; `max_nodes` rows a request if not given.
    pub cu_rows: Option<In<'a, i32>>,
    /// `[rows]`; row `r` if not given.
    pub row_index: Option<In<'a, i32>>,
    /// `[draft_rows, draft_vocab]`; goes with [`Drafts::Logits`] and [`Drafts::LogitsAndStats`].
    pub draft: Option<In<'a, Q>>,
    /// `[rows]`; row `r` if not given.
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
    /// `[batch]`; the plan's if not given. Needs a plan with [`TreeVerifierBuilder::rules_per_request`].
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
    /// `[batch, max_nodes, 4]`; drawn if not given.
    pub uniforms: Option<In<'a, f32>>,
    /// `[batch]`; 0 if not given.
    pub kv_start: Option<In<'a, i32>>,
    /// `[rows]`; `kv_start` and on if not given.
    pub kv_slots: Option<In<'a, i32>>,
}

impl<Q: Float> Default for TreeVerifierOptions<'_, Q> {
    fn default() -> Self {
        TreeVerifierOptions {
            cu_rows: None,
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
            kv_start: None,
            kv_slots: None,
        }
    }
}

/// What a step writes. See [`TreeVerifier`] for shapes.
#[derive(Debug)]
pub struct TreeVerifierOut<'a> {
    /// `[batch, max_depth + 1]`.
    pub tokens: Out<'a, i32>,
    /// `[batch]`.
    pub emitted: Out<'a, Emitted>,
    /// `[batch]`.
    pub accepted: Out<'a, Accepted>,
    /// `[batch]`.
    pub status: Out<'a, u32>,
    /// `[batch]`.
    pub last_row: Option<Out<'a, i32>>,
    /// `[batch, max_depth + 1]`.
    pub path: Option<Out<'a, i32>>,
    /// `[batch, max_depth + 1]`.
    pub kv_source: Option<Out<'a, i32>>,
    /// `[batch, max_depth + 1]`.
    pub kv_destination: Option<Out<'a, i32>>,
    /// `[batch, max_depth + 1]`.
    pub log_probs: Option<Out<'a, f32>>,
}

impl<'a> TreeVerifierOut<'a> {
    /// What every step writes, and nothing besides.
    pub fn new(
        tokens: Out<'a, i32>,
        emitted: Out<'a, Emitted>,
        accepted: Out<'a, Accepted>,
        status: Out<'a, u32>,
    ) -> Self {
        TreeVerifierOut {
            tokens,
            emitted,
            accepted,
            status,
            last_row: None,
            path: None,
            kv_source: None,
            kv_destination: None,
            log_probs: None,
        }
    }
}

impl<P: Float, Q: Float> TreeVerifier<P, Q> {
    /// A plan for up to `batch` requests of up to `max_nodes` nodes, the root among them, and up to `max_depth` drafts on a
    /// path.
    pub fn builder(batch: usize, max_nodes: usize, max_depth: usize, vocab: usize) -> TreeVerifierBuilder<P, Q> {
        TreeVerifierBuilder::new(batch, max_nodes, max_depth, vocab)
    }

    /// How the kernel cuts a step up.
    pub fn schedule(&self) -> TreeVerifierSchedule {
        self.inner.schedule()
    }

    /// The bytes that any kernel must move if each request accepts `accepted` drafts: the rows of the target that the walk
    /// comes to, and of the draft where it is swept, once; and `tokens`, counts and `status`.
    pub fn traffic(&self, accepted: usize) -> Traffic {
        self.inner.traffic(size_of::<P>(), size_of::<Q>(), accepted as u64)
    }

    /// Bytes of `workspace`.
    pub fn workspace_bytes(&self) -> u64 {
        self.inner.workspace_bytes()
    }

    /// Decides a step on `stream`. On a CUDA stream it enqueues one kernel and returns.
    ///
    /// # Errors
    /// Nothing was launched or written: a buffer too short, misaligned, overlapping an output, on another device or
    /// ordered on another stream; an operand that the plan needs and that is missing, or that it does not take; on CUDA
    /// what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, mut args: TreeVerifierArgs<'_, P, Q>) -> Result<()> {
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
        let written = batch * (plan.max_depth + 1);
        let stats = crate::verification::rows::chunks(plan.vocab) * 2;
        let operands = Operands::of(&stream)
            .input("target", &args.target, plan.target_len)?
            .input("drafts", &args.drafts, rows)?
            .input_if("cu_rows", &options.cu_rows, if batch > 0 { batch + 1 } else { 0 })?
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
            .input_if("kv_start", &options.kv_start, batch)?
            .input_if("kv_slots", &options.kv_slots, rows)?;
        let operands = match &args.tree {
            TreeLinks::Parents(parents) => operands.input("parents", parents, rows)?,
            TreeLinks::Children { first_child, next_sibling } => {
                operands.input("first_child", first_child, rows)?.input("next_sibling", next_sibling, rows)?
            }
        };
        operands
            .output("tokens", &args.out.tokens, written)?
            .output("emitted", &args.out.emitted, batch)?
            .output("accepted", &args.out.accepted, batch)?
            .output("status", &args.out.status, batch)?
            .output_if("last_row", &args.out.last_row, batch)?
            .output_if("path", &args.out.path, written)?
            .output_if("kv_source", &args.out.kv_source, written)?
            .output_if("kv_destination", &args.out.kv_destination, written)?
            .output_if("log_probs", &args.out.log_probs, written)?
            .workspace(&args.workspace, plan.workspace_bytes())?
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
