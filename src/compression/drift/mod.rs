//! Whether a chunk has changed enough to be computed anew.

mod cuda;
mod host;
mod plan;

pub use plan::DriftBuilder;

use core::marker::PhantomData;

use super::Traffic;
use crate::device::Device;
use crate::dtype::Float;
use crate::error::Result;
use crate::launch::Operands;
use crate::plan::typed_plan;
use crate::stream::AsStream;
use crate::view::{In, Out};

/// A plan that decides, for each chunk of a step, whether the work of the step before is used again: FlowCache
/// (arXiv 2602.10825) and, with one chunk and a polynomial, TeaCache (arXiv 2411.19108).
///
/// For a chunk that is tested, with means over its elements:
/// ```text
/// change = mean|features - previous| / (mean|previous| + eps)
/// accumulated + p(change) <  threshold:  accumulated += p(change),  decision 0: reuse
///                         else:          accumulated  = 0,          decision 1: compute
/// ```
/// A chunk is computed without a test where `force` says so, in its steps before `compute_before` (1) and from `compute_from`
/// on; else in its first `warmup` steps, after which `accumulated` is 0. Every run adds 1 to `steps`, and with
/// [`DriftBuilder::keep`] writes `features` to `previous`.
///
/// | operand | shape | |
/// |---|---|---|
/// | `features` | `[chunks, elements]` | `P`: f32, f16, bf16; a stride between chunks |
/// | `previous` | `[chunks, elements]` | the same; of the step before |
/// | `accumulated` | `[chunks]` f32 | 0 before a chunk's first step |
/// | `steps` | `[chunks]` i32 | 0 before a chunk's first step |
/// | `force` | `[chunks]` i32, optional | [`Force`] |
/// | `decision` | `[chunks]` i32 | 1: compute, 0: reuse |
/// | `change` | `[chunks]` f32, optional | before the polynomial; NaN where nothing was tested |
///
/// Without `keep`, a caller that exchanges two buffers saves the copy.
///
/// **Arithmetic.** Differences and sums of 16384 elements in f32, in an order that does not depend on the batch or the device;
/// beyond that f64; the change is rounded to f32 once, relative error below 2e-6. The polynomial is f64 by Horner. A NaN among
/// the features is a change of NaN, which is no less than any threshold: compute.
///
/// **Determinism.** The same bits on the host and on every device, in any batch.
///
/// ```
/// use nextscale::{DeviceInfo, In, Out, Stream, compression::{Drift, DriftArgs}};
/// let stream = Stream::host();
/// let plan = Drift::<f32>::builder(1, 4).threshold(0.1).keep(true).build(&DeviceInfo::of(&stream)?)?;
/// let (mut previous, mut accumulated, mut steps, mut decision) = ([0f32; 4], [0f32], [0], [0]);
/// let (mut workspace, mut counters) = (vec![0u8; 512], [0u32]);
/// let skip = workspace.as_ptr().align_offset(256);
/// let mut decisions = Vec::new();
/// for features in [[1.0, 1.0, 1.0, 1.0f32], [1.0, 1.0, 1.0, 1.2], [1.0, 1.0, 1.0, 0.8]] {
///     plan.run(&stream, DriftArgs {
///         features: In::host(&features),
///         previous: Out::host(&mut previous),
///         accumulated: Out::host(&mut accumulated),
///         steps: Out::host(&mut steps),
///         force: None,
///         decision: Out::host(&mut decision),
///         change: None,
///         workspace: Out::host(&mut workspace[skip..]),
///         counters: Out::host(&mut counters),
///     })?;
///     decisions.push(decision[0]);
/// }
/// assert_eq!(decisions, [1, 0, 1]); // the first; a change of 0.05; and one of 0.095 more
/// # Ok::<(), nextscale::Error>(())
/// ```
pub struct Drift<P> {
    inner: plan::Plan,
    types: PhantomData<P>,
}
typed_plan!(Drift<P>);

/// What `force` holds for a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum Force {
    /// Nothing.
    Test = 0,
    /// It is computed.
    Compute = 1,
    /// It has no part in this step: nothing of it is read or written.
    Leave = 2,
}

/// The buffers of one run. See [`Drift`] for shapes.
#[derive(Debug)]
pub struct DriftArgs<'a, P>
where
    P: Float,
{
    /// `[chunks, elements]`. 16-byte alignment makes wide reads possible, here and in `previous`.
    pub features: In<'a, P>,
    /// `[chunks, elements]`; written only with [`DriftBuilder::keep`].
    pub previous: Out<'a, P>,
    /// `[chunks]`, read and written.
    pub accumulated: Out<'a, f32>,
    /// `[chunks]`, read and written.
    pub steps: Out<'a, i32>,
    /// `[chunks]` of [`Force`]; [`Force::Test`] if not given.
    pub force: Option<In<'a, i32>>,
    /// `[chunks]`.
    pub decision: Out<'a, i32>,
    /// `[chunks]`.
    pub change: Option<Out<'a, f32>>,
    /// [`Drift::workspace_bytes`], 256-byte aligned.
    pub workspace: Out<'a, u8>,
    /// `[chunks]`, all zero before the first run, and zero after each; runs that may overlap have their own.
    pub counters: Out<'a, u32>,
}

impl<P: Float> Drift<P> {
    /// A plan for `chunks` chunks of `elements` elements.
    pub fn builder(chunks: usize, elements: usize) -> DriftBuilder<P> {
        DriftBuilder::new(chunks, elements)
    }

    /// The bytes that any kernel must move if every chunk is tested.
    pub fn traffic(&self) -> Traffic {
        self.inner.traffic(size_of::<P>())
    }

    /// Bytes of `workspace`.
    pub fn workspace_bytes(&self) -> u64 {
        self.inner.workspace_bytes()
    }

    /// Runs on `stream`. On a CUDA stream it enqueues one kernel and returns; the decisions are in device memory.
    ///
    /// # Errors
    /// Nothing was launched or written: a buffer too short, misaligned, overlapping an output, on another device or
    /// ordered on another stream; on CUDA what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, mut args: DriftArgs<'_, P>) -> Result<()> {
        let stream = stream.as_stream();
        let plan = &self.inner;
        Operands::of(&stream)
            .input("features", &args.features, plan.features_len)?
            .output("previous", &args.previous, plan.previous_len)?
            .output("accumulated", &args.accumulated, plan.chunks)?
            .output("steps", &args.steps, plan.chunks)?
            .input_if("force", &args.force, plan.chunks)?
            .output("decision", &args.decision, plan.chunks)?
            .output_if("change", &args.change, plan.chunks)?
            .workspace(&args.workspace, plan.workspace_bytes())?
            .output("counters", &args.counters, plan.chunks)?
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
