//! Which tokens to keep.

mod cuda;
mod host;
mod plan;
mod weights;

pub use plan::SelectBuilder;
pub use weights::PositionWeight;

use super::Traffic;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::launch::Operands;
use crate::stream::AsStream;
use crate::view::{In, Out};

/// A plan that chooses the tokens of a cache that are kept.
///
/// From importance (FlowCache, R-KV, SnapKV, H2O) and redundancy (FlowCache, R-KV, KeyDiff), or one of them, or none
/// (StreamingLLM: a sink, and of equal scores the newest):
/// ```text
/// raw   = lambda * importance - (1 - lambda) * redundancy     (or importance, or -redundancy, or 0)
///         mean over the heads of a set, sum over sets, mean over the tokens of a block: as scope and block say
/// score = (raw - least raw) * weight - demotion               (each only if asked for)
/// ```
/// Of each list the first `sink` and last `recent` tokens are kept, and of those between them the ones of the greatest scores,
/// until there are `budget`. What shares a list, [`Scope`] says. The `active` tokens after it are kept besides.
///
/// | operand | shape | |
/// |---|---|---|
/// | `importance`, `redundancy` | `[sets, heads, tokens]` f32 | both optional; strides of sets and heads |
/// | `weights` | `[items]` f32, optional | items: tokens, or blocks of them; [`PositionWeight::table`] |
/// | `lengths` | `[lists]` i32, optional | tokens that a list has; else the plan's `length` |
/// | `budgets` | `[lists]` i32, optional | else the plan's `budget` |
/// | `indices` | `[lists, capacity]` i32 | ascending, -1 after them |
/// | `counts` | `[lists]` i32 | how many they are; read too with [`SelectBuilder::first_rows`] |
/// | `status` | `[lists]` u32, optional | bits of [`status`](super::status) |
///
/// `[lists]` is `[sets, heads]`, `[sets]` or `[1]`.
///
/// **Exactly the budget** is kept: `min(budget, length)` tokens of each list, whatever the scores are (with blocks, as many as
/// whole blocks make). Of equal scores, 0 and -0 among them, the oldest are kept, or the newest ([`Tie`]). A NaN is less than
/// every number: such tokens are kept only if the numbers do not fill the budget. A length or budget beyond its limits is
/// clamped.
///
/// **Ada-KV** (arXiv 2407.11550): the tokens of all heads of a set compete for the sum of the heads' budgets (less what is
/// protected); with floor `a`, a head gets `(1 - a)` times what it wins, and `a` times its own budget. The published code
/// rounds these, and may miss the sum; here largest remainders make up what rounding down leaves, the lowest head first, so that
/// it is exact. The floor is rounded to a multiple of 2^-16.
///
/// **Arithmetic.** f32, operation by operation as written (lambda by fma; sums over sets and heads in ascending order). A list's
/// choice depends on nothing else.
///
/// **Determinism.** The same bits on the host and on every device, in any batch.
///
/// ```
/// use nextscale::{DeviceInfo, In, Out, Stream, compression::{Select, SelectArgs}};
/// let stream = Stream::host();
/// let plan = Select::builder(1, 1, 8).budget(4).sink(1).recent(1).build(&DeviceInfo::of(&stream)?)?;
/// let (mut indices, mut counts) = ([0; 4], [0]);
/// plan.run(&stream, SelectArgs {
///     importance: Some(In::host(&[0.0, 0.1, 0.5, 0.2, 0.5, 0.7, 0.1, 0.0])),
///     indices: Out::host(&mut indices),
///     counts: Out::host(&mut counts),
///     redundancy: None,
///     weights: None,
///     lengths: None,
///     budgets: None,
///     status: None,
///     workspace: None,
/// })?;
/// assert_eq!(indices, [0, 2, 5, 7]);
/// # Ok::<(), nextscale::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Select {
    inner: plan::Plan,
}

/// Who shares a set of kept tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scope {
    /// Nobody: each head of each set has its own, of the same number.
    PerHead,
    /// The heads of a set, by the mean of their scores.
    PerSet,
    /// All heads of all sets, by the means over heads added over sets: one block table for all layers (R-KV in vLLM).
    Shared,
    /// Nobody, and the numbers differ too: Ada-KV.
    Ada {
        /// The part of the budget that every head gets, from 0 to 1; 0.2 is usual.
        floor: f32,
    },
}

/// Which of equal scores are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Tie {
    /// Those of the lowest index.
    #[default]
    Oldest,
    /// Those of the highest index.
    Newest,
}

/// Bits of a list's status.
pub mod status {
    /// A score was NaN: its token is kept only where numbers do not fill the budget.
    pub const NAN: u32 = 1;
    /// A length or a budget was out of range, and was clamped.
    pub const CLAMPED: u32 = 2;
}

/// The buffers of one run. See [`Select`] for shapes.
#[derive(Debug)]
pub struct SelectArgs<'a> {
    /// `[sets, heads, tokens]`. 16-byte alignment of a list's first score makes wide reads possible.
    pub importance: Option<In<'a, f32>>,
    /// `[sets, heads, tokens]`.
    pub redundancy: Option<In<'a, f32>>,
    /// `[items]`.
    pub weights: Option<In<'a, f32>>,
    /// `[lists]`.
    pub lengths: Option<In<'a, i32>>,
    /// `[lists]`.
    pub budgets: Option<In<'a, i32>>,
    /// `[lists, capacity]`.
    pub indices: Out<'a, i32>,
    /// `[lists]`.
    pub counts: Out<'a, i32>,
    /// `[lists]`.
    pub status: Option<Out<'a, u32>>,
    /// [`Select::workspace_bytes`], 256-byte aligned; none is needed per head and token.
    pub workspace: Option<Out<'a, u8>>,
}

impl Select {
    /// A plan for the scores of `sets * heads` lists of up to `tokens` tokens, of which none are kept until a budget is
    /// given.
    pub fn builder(sets: usize, heads: usize, tokens: usize) -> SelectBuilder {
        SelectBuilder::new(sets, heads, tokens)
    }

    /// Lists: rows of `indices`, elements of `counts`, `lengths`, `budgets` and `status`.
    pub fn lists(&self) -> usize {
        self.inner.lists() as usize
    }

    /// Places of a list in `indices`.
    pub fn capacity(&self) -> usize {
        self.inner.capacity as usize
    }

    /// Tokens or blocks of a list: elements of `weights`.
    pub fn items(&self) -> usize {
        self.inner.items() as usize
    }

    /// Bytes of `workspace`.
    pub fn workspace_bytes(&self) -> u64 {
        self.inner.workspace_bytes()
    }

    /// Whether the scores of a list are read once, and lie in shared memory until they are chosen from.
    pub fn cached(&self) -> bool {
        self.inner.cached()
    }

    /// The bytes that any kernel must move for so many of importance and redundancy, at the plan's length.
    pub fn traffic(&self, operands: usize) -> Traffic {
        self.inner.traffic(operands as u64)
    }

    /// Runs on `stream`. On a CUDA stream it enqueues one kernel, or two where scores are averaged or budgets split, and
    /// returns.
    ///
    /// # Errors
    /// Nothing was launched or written: lengths that the plan has no use for, a buffer too short, misaligned,
    /// overlapping an output, on another device or ordered on another stream; on CUDA what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, mut args: SelectArgs<'_>) -> Result<()> {
        let stream = stream.as_stream();
        let plan = &self.inner;
        if plan.first_rows > 0 && args.lengths.is_some() {
            return Err(Error::Unsupported { arg: "lengths", what: "none where `counts` has those of the first rows" });
        }
        Operands::of(&stream)
            .input_if("importance", &args.importance, plan.importance_len)?
            .input_if("redundancy", &args.redundancy, plan.redundancy_len)?
            .input_if("weights", &args.weights, plan.items())?
            .input_if("lengths", &args.lengths, plan.lists())?
            .input_if("budgets", &args.budgets, plan.lists())?
            .output("indices", &args.indices, plan.lists() * plan.capacity)?
            .output("counts", &args.counts, plan.lists())?
            .output_if("status", &args.status, plan.lists())?
            .workspace_if(&args.workspace, plan.workspace_bytes())?
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
