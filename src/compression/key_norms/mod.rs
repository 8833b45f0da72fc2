//! Norms of keys and the sum of unit keys, kept up to date as keys are appended.

mod cuda;
mod host;
pub(super) mod plan;

pub use plan::KeyNormsBuilder;

use core::marker::PhantomData;

use super::{KeyPages, Traffic};
use crate::device::Device;
use crate::dtype::Float;
use crate::error::Result;
use crate::launch::Operands;
use crate::plan::typed_plan;
use crate::stream::AsStream;
use crate::view::{In, Out};

/// A plan that takes in new keys: `inverse_norms[j] = 1 / (|k[j]| + eps)` and
/// `unit_sum = sum over j of k[j] * inverse_norms[j]`, for each set and KV head.
///
/// It is what [`Redundancy`](super::Redundancy) needs to know. Run when keys are appended, over the new keys alone and
/// accumulating, it costs one read of them; over all keys, not accumulating, after an event has moved or dropped some.
///
/// | operand | shape | layout |
/// |---|---|---|
/// | `k` | `[sets, tokens, heads, dim]` | strides of all but `dim`, multiples of 8; or in [pages](KeyNormsBuilder::pages) |
/// | `inverse_norms` | `[sets, heads, tokens]` f32 | strides of set and head; must not overlap |
/// | `unit_sum` | `[sets, heads, dim]` f32 | the same |
/// | `lengths` | `[sets, heads]` i32, optional | strides of both; keys there are, clamped into `0..=tokens` |
///
/// `T` is `bf16` or `f16`, on the host also `f32`; `dim` 64, 96 or 128; on CUDA `k` is 16-byte aligned. Views of a longer buffer
/// begin at the first new key.
///
/// **Arithmetic.** f32. An inverse norm is within a factor `1 +- 2^-17` of the exact one. `unit_sum` of `n` keys is within
/// `2^-17 n` of the exact sum, mostly far closer. Keys whose squares overflow f32 have a norm of infinity.
///
/// **Special values.** A zero key has the inverse norm `1 / eps` and adds nothing; with an `eps` of 0 it adds NaN. Keys beyond
/// the length get an inverse norm of 0, and are not looked at. A NaN stays in its set and head.
///
/// **Determinism.** Bitwise, from run to run, and of each set whatever the others are: sums in a fixed order of spans of keys. The
/// host adds in one piece.
///
/// ```
/// use nextscale::compression::{KeyNorms, KeyNormsArgs};
/// use nextscale::{DeviceInfo, In, Out, Stream};
/// let stream = Stream::host();
/// let k: Vec<f32> = (0..128).map(|i| if i == 3 { 2.0 } else if i == 64 { 5.0 } else { 0.0 }).collect();
/// let (mut inverse_norms, mut unit_sum) = ([0f32; 2], [0f32; 64]);
/// let plan = KeyNorms::builder(1, 64).tokens(2).build(&DeviceInfo::of(&stream)?)?;
/// let mut workspace = vec![0u8; plan.workspace_bytes() as usize + 256];
/// let skip = workspace.as_ptr().align_offset(256);
/// plan.run(&stream, KeyNormsArgs {
///     k: In::host(&k),
///     inverse_norms: Out::host(&mut inverse_norms),
///     unit_sum: Out::host(&mut unit_sum),
///     lengths: None,
///     pages: None,
///     workspace: Some(Out::host(&mut workspace[skip..])),
/// })?;
/// assert_eq!(inverse_norms, [0.5, 0.2]);
/// assert_eq!((unit_sum[0], unit_sum[3]), (1.0, 1.0));
/// # Ok::<(), nextscale::Error>(())
/// ```
pub struct KeyNorms<T> {
    inner: plan::Plan,
    types: PhantomData<T>,
}
typed_plan!(KeyNorms<T>);

/// The buffers of one update. See [`KeyNorms`] for shapes.
#[derive(Debug)]
pub struct KeyNormsArgs<'a, T>
where
    T: Float,
{
    /// `[sets, tokens, heads, dim]`.
    pub k: In<'a, T>,
    /// `[sets, heads, tokens]`.
    pub inverse_norms: Out<'a, f32>,
    /// `[sets, heads, dim]`. Read too when accumulating.
    pub unit_sum: Out<'a, f32>,
    /// Of plans with pages.
    pub pages: Option<KeyPages<'a>>,
    /// `[sets, heads]`: keys there are; all `tokens` if not given.
    pub lengths: Option<In<'a, i32>>,
    /// [`KeyNorms::workspace_bytes`], 256-byte aligned; its content is of no interest.
    pub workspace: Option<Out<'a, u8>>,
}

impl<T: Float> KeyNorms<T> {
    /// A plan for `heads` KV heads of `dim` elements, over one set and one key until told otherwise.
    pub fn builder(heads: usize, dim: usize) -> KeyNormsBuilder<T> {
        KeyNormsBuilder::new(heads, dim)
    }

    /// The bytes that any kernel must move.
    pub fn traffic(&self) -> Traffic {
        self.inner.traffic(size_of::<T>())
    }

    /// Bytes of `workspace`.
    pub fn workspace_bytes(&self) -> u64 {
        self.inner.workspace_bytes()
    }

    /// Runs on `stream`. On a CUDA stream it enqueues up to two kernels and returns.
    ///
    /// # Errors
    /// Nothing was launched or written: pages that the plan has no use for, a buffer missing, too short, misaligned,
    /// overlapping an output, on another device or ordered on another stream; on CUDA `f32`, and what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, mut args: KeyNormsArgs<'_, T>) -> Result<()> {
        let stream = stream.as_stream();
        let plan = &self.inner;
        plan.places
            .operands(Operands::of(&stream), plan.inverse_norms.shape(), &args.pages, args.lengths.is_some())?
            .input("k", &args.k, plan.k_len)?
            .input_if("lengths", &args.lengths, plan.lengths_len)?
            .output("inverse_norms", &args.inverse_norms, plan.inverse_norms_len)?
            .output("unit_sum", &args.unit_sum, plan.unit_sum_len)?
            .workspace_if(&args.workspace, plan.workspace_bytes())?
            .finish()?;
        match stream.device() {
            Device::Host => {
                host::run(plan, &mut args);
                Ok(())
            }
            _ if plan.unit_sum_len == 0 => Ok(()),
            _ => cuda::run(plan, &stream, &args),
        }
    }
}
