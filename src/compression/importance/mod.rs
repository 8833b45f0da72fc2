//! Importance of cached keys: column scores of the attention that queries pay them.

mod cuda;
mod host;
mod plan;

pub use plan::{Aggregation, ImportanceBuilder, ImportanceSchedule, ImportanceVariant, Pool, Reduction};

use core::marker::PhantomData;

use super::{KeyPages, Traffic};
use crate::device::Device;
use crate::dtype::Float;
use crate::error::Result;
use crate::launch::Operands;
use crate::plan::typed_plan;
use crate::stream::AsStream;
use crate::view::{In, Out};

/// A plan that scores every key of every set and KV head by the attention that queries pay it: column sums of
/// `softmax(scale * Q K^T)`, without ever storing that matrix.
///
/// With `s[g, i, j] = scale * q[i, h * groups + g] . k[j, h]`, softmax taken over the keys `j` that query `i` sees,
///
/// | [`Aggregation`] | `x[i, j]` | as in |
/// |---|---|---|
/// | `MaxLogit` | `softmax_j(max_g s[g, i, j])` | FlowCache (arXiv 2602.10825), R-KV (2505.24133) |
/// | `MeanProb` | `sum_g softmax_j(s[g, i, j])` | SnapKV (2404.14469), kvpress, H2O (2306.14048) |
/// | `MaxProb` | `max_g softmax_j(s[g, i, j])` | |
/// | `Logit` | `sum_g s[g, i, j]`, no softmax | ScaleKV (2505.19602) |
///
/// and 0 for keys that query `i` does not see: `raw[j] = sum_i x[i, j]`, or with [`Reduction::Mean`] that over `queries`
/// (`MeanProb`, `Logit`: over `queries * groups`), and `scores[j] = pool(raw)[j]`, added to the old ones if so wanted.
///
/// | operand | shape | layout |
/// |---|---|---|
/// | `q` | `[sets, q_rows, heads * groups, dim]` | strides of all but `dim`, multiples of 8; the queries of a KV head together |
/// | `k` | `[sets, tokens, heads, dim]` | the same; or in [pages](ImportanceBuilder::pages) |
/// | `scores` | `[sets, heads, tokens]` f32 | strides of set and head; must not overlap |
/// | `rows` | `[queries]` i32, optional | rows of `q` that are the queries; for all sets |
/// | `masked` | `[masked]` i32, optional | columns that are -inf before the pooling; for all sets |
/// | `lengths` | `[sets, heads]` i32, optional | strides of both; keys there are, clamped into `0..=tokens` |
/// | `lse` | `[sets, heads * groups, queries]` f32, optional | every stride |
///
/// `T` is `bf16` or `f16`, on the host also `f32`; `dim` 64, 96 or 128; on CUDA `q` and `k` are 16-byte aligned.
/// Last queries, a frame or a chunk are views of `q`; a grid is a list of rows.
///
/// **Which keys.** A query sees the first `length - excluded` keys; if causal, of these up to `length - queries + i`. Scored
/// are the first `length - excluded - unscored`; all others get 0, or keep their old score when accumulating. R-KV excludes
/// its window; SnapKV's is causal and unscored. A query that sees nothing adds nothing.
///
/// **A given LSE** saves one of the two passes over the keys. It is exact where each row is normalised for itself: not for
/// `MaxLogit` with `groups > 1`. It must be of the same scaled logits over the same keys; a row of -inf adds nothing.
///
/// **Arithmetic.** Products exact, sums and everything else f32. With `l` the largest `scale * sum |q_d k_d|` of a query
/// and key, a probability is within a factor `1 +- 2^-15 (1 + l)` of the exact one, mostly far closer; a logit within
/// `2^-16 l`. Sums over queries add a factor `1 +- 2^-24 (64 + queries / 64)`. Probabilities below 2^-126 count as 0.
///
/// **Special values.** A NaN among the keys seen, or the queries, makes all scores of its set and head NaN (of `Logit` only those
/// of the key), and no others; keys beyond the length are never looked at.
///
/// **Determinism.** Bitwise, from run to run, and of each set whatever the others are. Another device or variant cuts sums up
/// in another way, and the host takes them in one piece: they agree within the bounds above.
///
/// ```
/// use nextscale::compression::{Aggregation, Importance, ImportanceArgs};
/// use nextscale::{DeviceInfo, In, Out, Stream};
/// let stream = Stream::host();
/// // One query head of 64 dims, one query, two keys: twice the query itself, and nothing.
/// let q = [0.25f32; 64];
/// let k: Vec<f32> = (0..128).map(|i| if i < 64 { 0.5 } else { 0.0 }).collect();
/// let mut scores = [0f32; 2];
/// let plan = Importance::builder(1, 1, 64).tokens(2).build(&DeviceInfo::of(&stream)?)?;
/// let mut workspace = vec![0u8; plan.workspace_bytes() as usize + 256];
/// let skip = workspace.as_ptr().align_offset(256);
/// plan.run(&stream, ImportanceArgs {
///     q: In::host(&q),
///     k: In::host(&k),
///     scores: Out::host(&mut scores),
///     rows: None,
///     masked: None,
///     lengths: None,
///     pages: None,
///     lse: None,
///     workspace: Some(Out::host(&mut workspace[skip..])),
/// })?;
/// // Logits 1 and 0.
/// assert!((scores[0] - 0.7310586).abs() < 1e-6 && (scores[1] - 0.2689414).abs() < 1e-6);
/// # Ok::<(), nextscale::Error>(())
/// ```
pub struct Importance<T> {
    inner: plan::Plan,
    types: PhantomData<T>,
}
typed_plan!(Importance<T>);

/// The buffers of one scoring. See [`Importance`] for shapes.
#[derive(Debug)]
pub struct ImportanceArgs<'a, T>
where
    T: Float,
{
    /// `[sets, q_rows, heads * groups, dim]`.
    pub q: In<'a, T>,
    /// `[sets, tokens, heads, dim]`.
    pub k: In<'a, T>,
    /// `[sets, heads, tokens]`. Read too when accumulating.
    pub scores: Out<'a, f32>,
    /// `[queries]`, if the plan's queries are listed: rows of `q`; clamped into it.
    pub rows: Option<In<'a, i32>>,
    /// `[masked]`, if the plan masks columns. Those that a set does not have are ignored.
    pub masked: Option<In<'a, i32>>,
    /// Of plans with pages.
    pub pages: Option<KeyPages<'a>>,
    /// `[sets, heads]`: keys there are; all `tokens` if not given.
    pub lengths: Option<In<'a, i32>>,
    /// `[sets, heads * groups, queries]`, if the plan is given an LSE: natural logarithm.
    pub lse: Option<In<'a, f32>>,
    /// [`Importance::workspace_bytes`], 256-byte aligned; its content is of no interest.
    pub workspace: Option<Out<'a, u8>>,
}

impl<T: Float> Importance<T> {
    /// A plan for `heads` KV heads of `groups` query heads each, of `dim` elements, over one set, one key and one query until
    /// told otherwise.
    pub fn builder(heads: usize, groups: usize, dim: usize) -> ImportanceBuilder<T> {
        ImportanceBuilder::new(heads, groups, dim)
    }

    /// How the kernels cut the work up.
    pub fn schedule(&self) -> ImportanceSchedule {
        self.inner.schedule
    }

    /// The bytes that any kernels must move: keys and queries once.
    pub fn traffic(&self) -> Traffic {
        self.inner.traffic(size_of::<T>())
    }

    /// Floating-point operations of the products: two passes, or one where one is enough.
    pub fn flops(&self) -> u64 {
        self.inner.flops()
    }

    /// Bytes of `workspace`.
    pub fn workspace_bytes(&self) -> u64 {
        self.inner.stats_bytes() + self.inner.sums_bytes()
    }

    /// Scores on `stream`. On a CUDA stream it enqueues up to three kernels and returns.
    ///
    /// # Errors
    /// Nothing was launched or written: pages that the plan has no use for, a buffer missing, too short, misaligned,
    /// overlapping an output, on another device or ordered on another stream; on CUDA `f32`, and what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, mut args: ImportanceArgs<'_, T>) -> Result<()> {
        let stream = stream.as_stream();
        let plan = &self.inner;
        let nothing = plan.scores_len == 0;
        let needed = |is: bool, len: u64| if is && !nothing { len } else { 0 };
        plan.places
            .operands(Operands::of(&stream), plan.scores.shape(), &args.pages, args.lengths.is_some())?
            .input("q", &args.q, plan.q_len)?
            .input("k", &args.k, plan.k_len)?
            .input_needed("rows", &args.rows, needed(plan.listed, plan.queries))?
            .input_needed("masked", &args.masked, needed(true, plan.masked))?
            .input_if("lengths", &args.lengths, plan.lengths_len)?
            .input_needed("lse", &args.lse, needed(plan.given_lse, plan.lse_len))?
            .output("scores", &args.scores, plan.scores_len)?
            .workspace_if(&args.workspace, self.workspace_bytes())?
            .finish()?;
        match stream.device() {
            Device::Host => {
                host::run(plan, &mut args);
                Ok(())
            }
            _ if nothing => Ok(()),
            _ => cuda::run(plan, &stream, &args),
        }
    }
}
