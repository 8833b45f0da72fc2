//! Redundancy of cached keys: how alike each is to the others.

mod cuda;
mod host;
mod plan;

pub use plan::{Form, RedundancyBuilder, Retain, Similar};

use core::marker::PhantomData;

use super::{KeyPages, Traffic};
use crate::device::Device;
use crate::dtype::Float;
use crate::error::Result;
use crate::launch::Operands;
use crate::plan::typed_plan;
use crate::stream::AsStream;
use crate::view::{In, Out};

/// A plan that scores every key of every set and KV head by how alike it is to the others, in memory and time linear in the keys.
///
/// With `u[j] = k[j] * inverse_norms[j]` and `unit_sum` the sum of all `u`, both from [`KeyNorms`](super::KeyNorms), and `n` keys,
///
/// | [`Form`] | score of key `j` | as in |
/// |---|---|---|
/// | `Cosine` | `u[j] . unit_sum / abs(unit_sum)` | KeyDiff (arXiv 2504.15364), there negated |
/// | `Softmax` | `softmax_j(u[j] . unit_sum / n)` | FlowCache (2602.10825) |
/// | `Similar` | `softmax_j(sum over i != j with retain(i) != j of u[i] . u[j] / n)` | R-KV (2505.24133) |
///
/// FlowCache states its score as the softmax of each key's mean cosine to the others: to all, less 1 for itself. The 1 moves
/// all logits alike, so that this is the same softmax; no pair of keys is ever looked at. (A zero key has a cosine of 0 to itself;
/// there the two readings differ, and this is the one that FlowCache computes.)
///
/// **Similar.** Each key `i` leaves one neighbour, `retain(i)`, out of account: one whose cosine to `i` is above a threshold
/// ([`Retain`] says which), so that of like keys one stays. Without a neighbour it leaves out key 0
/// ([`Similar::lonely_leave_first`]): the published code does so by accident, and that is the default. Only `retain` looks at
/// pairs of keys, from the last on until each key has found its own; nothing of size `n * n` is stored. R-KV drops the scores of
/// its window; here all keys have theirs.
///
/// | operand | shape | layout |
/// |---|---|---|
/// | `k` | `[sets, tokens, heads, dim]` | strides of all but `dim`, multiples of 8; or in [pages](RedundancyBuilder::pages) |
/// | `inverse_norms` | `[sets, heads, tokens]` f32 | strides of set and head |
/// | `unit_sum` | `[sets, heads, dim]` f32 | the same |
/// | `scores` | `[sets, heads, tokens]` f32 | the same; must not overlap |
/// | `lengths` | `[sets, heads]` i32, optional | strides of both; keys there are, clamped into `0..=tokens` |
///
/// `T` is `bf16` or `f16`, on the host also `f32`; `dim` 64, 96 or 128; on CUDA `k` is 16-byte aligned; up to 8192 tokens for
/// `Similar`. Keys beyond the length get 0.
///
/// **Arithmetic.** f32. With `unit_sum` exact a cosine is within `2^-15` of the exact one, a logit of a softmax too, and a score of
/// a softmax within a factor `1 +- 2^-14`; mostly far closer. What is left out is summed in units of 2^-17. A cosine that near the
/// threshold may fall on either side.
///
/// **Special values.** A zero key has a cosine of 0 to all others. A NaN makes all scores of its set and head NaN, of `Cosine`
/// too, as it is in the sum.
///
/// **Determinism.** Bitwise, from run to run, and of each set whatever the others are.
///
/// ```
/// use nextscale::compression::{Form, Redundancy, RedundancyArgs};
/// use nextscale::{DeviceInfo, In, Out, Stream};
/// let stream = Stream::host();
/// // Two keys alike, the third at a right angle; all of norm 1.
/// let k: Vec<f32> = (0..192).map(|i| if [0, 64, 129].contains(&i) { 1.0 } else { 0.0 }).collect();
/// let unit_sum: Vec<f32> = (0..64).map(|d| [2.0, 1.0].get(d).copied().unwrap_or(0.0)).collect();
/// let mut scores = [0f32; 3];
/// let plan = Redundancy::builder(1, 64).tokens(3).form(Form::Cosine).build(&DeviceInfo::of(&stream)?)?;
/// plan.run(&stream, RedundancyArgs {
///     k: In::host(&k),
///     inverse_norms: In::host(&[1.0; 3]),
///     unit_sum: In::host(&unit_sum),
///     scores: Out::host(&mut scores),
///     lengths: None,
///     pages: None,
///     workspace: None,
/// })?;
/// assert!((scores[0] - 2.0 / 5f32.sqrt()).abs() < 1e-6 && scores[0] == scores[1] && scores[2] < scores[1]);
/// # Ok::<(), nextscale::Error>(())
/// ```
pub struct Redundancy<T> {
    inner: plan::Plan,
    types: PhantomData<T>,
}
typed_plan!(Redundancy<T>);

/// The buffers of one scoring. See [`Redundancy`] for shapes.
#[derive(Debug)]
pub struct RedundancyArgs<'a, T>
where
    T: Float,
{
    /// `[sets, tokens, heads, dim]`.
    pub k: In<'a, T>,
    /// `[sets, heads, tokens]`, of [`KeyNorms`](super::KeyNorms).
    pub inverse_norms: In<'a, f32>,
    /// `[sets, heads, dim]`, of [`KeyNorms`](super::KeyNorms): over the keys that are scored.
    pub unit_sum: In<'a, f32>,
    /// `[sets, heads, tokens]`.
    pub scores: Out<'a, f32>,
    /// Of plans with pages.
    pub pages: Option<KeyPages<'a>>,
    /// `[sets, heads]`: keys there are; all `tokens` if not given.
    pub lengths: Option<In<'a, i32>>,
    /// [`Redundancy::workspace_bytes`], 256-byte aligned; its content is of no interest.
    pub workspace: Option<Out<'a, u8>>,
}

impl<T: Float> Redundancy<T> {
    /// A plan for `heads` KV heads of `dim` elements, over one set and one key until told otherwise.
    pub fn builder(heads: usize, dim: usize) -> RedundancyBuilder<T> {
        RedundancyBuilder::new(heads, dim)
    }

    /// The bytes that any kernel must move.
    pub fn traffic(&self) -> Traffic {
        self.inner.traffic(size_of::<T>())
    }

    /// Bytes of `workspace`.
    pub fn workspace_bytes(&self) -> u64 {
        self.inner.workspace_bytes()
    }

    /// Scores on `stream`. On a CUDA stream it enqueues up to two kernels and returns.
    ///
    /// # Errors
    /// Nothing was launched or written: pages that the plan has no use for, a buffer missing, too short, misaligned,
    /// overlapping an output, on another device or ordered on another stream; on CUDA `f32`, and what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, mut args: RedundancyArgs<'_, T>) -> Result<()> {
        let stream = stream.as_stream();
        let plan = &self.inner;
        plan.places
            .operands(Operands::of(&stream), plan.scores.shape(), &args.pages, args.lengths.is_some())?
            .input("k", &args.k, plan.k_len)?
            .input("inverse_norms", &args.inverse_norms, plan.inverse_norms_len)?
            .input("unit_sum", &args.unit_sum, plan.unit_sum_len)?
            .input_if("lengths", &args.lengths, plan.lengths_len)?
            .output("scores", &args.scores, plan.scores_len)?
            .workspace_if(&args.workspace, plan.workspace_bytes())?
            .finish()?;
        match stream.device() {
            Device::Host => {
                host::run(plan, &mut args);
                Ok(())
            }
            _ if plan.scores_len == 0 => Ok(()),
            _ => cuda::run(plan, &stream, &args),
        }
    }
}
