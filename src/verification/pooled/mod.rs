//! Blocks of image tokens.

mod cuda;
mod host;
mod plan;

pub use plan::PooledVerifierBuilder;

use core::marker::PhantomData;

use super::{Neighbours, Traffic};
use crate::device::Device;
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::launch::Operands;
use crate::plan::typed_plan;
use crate::stream::AsStream;
use crate::view::{In, Out};

/// A plan that accepts the tokens of whole images at once, and says which are to be drawn again. **Lossy.**
/// Multi-scale local speculation (MuLo-SD, arXiv 2601.05149).
///
/// The draft of token `t` is accepted if the target's probability of the draft and of the `neighbours` codes nearest
/// to it is together at least the threshold; nothing is drawn. Around each rejected token those within `radius` rows
/// and columns that come after it in raster order are drawn again too. What is drawn again falls into islands,
/// 8-connected, which may be drawn side by side.
///
/// | operand | shape | |
/// |---|---|---|
/// | `target` | `[batch * height * width, vocab]` | raw logits of each token, `T`: f32, f16, bf16; a stride between rows; vocab up to 2^18 |
/// | `drafts` | `[batch, height, width]` i32 | what is no token, such as -1, is rejected |
/// | `target_free` | as `target`, with [`PooledVerifierBuilder::guided`] | the logits without the condition |
/// | `guidance` | `[batch]` f32, optional | the scale s of `free + s (target - free)`; else 1 |
/// | `neighbours` | `[codes, neighbours]` u16 or i32, with [`PooledVerifierBuilder::neighbours`] | for each code the nearest other ones, as codes; what is no code is no neighbour |
/// | `temperature`, `top_k`, `top_p`, `min_p` | `[batch]`, optional | as those of [`Verifier`](super::Verifier) |
/// | `threshold` | `[batch]` f32, optional | else the plan's |
/// | `resample` | `[batch, height, width]` u8 | 0 accepted, 1 rejected, 2 near and behind a rejected token |
/// | `positions` | `[batch, height * width]` i32, optional | the tokens to be drawn again, `row * width + column`, ascending, then -1 |
/// | `islands` | `[batch, height, width]` i32, optional | the number of the island, islands in the order of their first tokens; -1 where accepted |
/// | `counts` | `[batch, 2]` i32 | how many positions, how many islands |
/// | `pooled` | `[batch, height, width]` f32, optional | the probability that was compared; 0 where there was none |
/// | `status` | `[batch]` u32 | bits of [`status`](super::status) |
///
/// A row that allows no token rejects its draft. Tokens that are no codes have no neighbours.
///
/// **Determinism.** Everything is the same bit for bit on the host and on every device, in any batch. Neighbours are
/// added up in groups of 32, those of a group by a scan.
///
/// **Workspace.** `workspace` may hold anything. `counters` must be all zero before the first run and is all zero after
/// each: it is not to be shared by runs that may overlap.
///
/// ```
/// use nextscale::verification::{PooledOptions, PooledOut, PooledVerifier, PooledVerifierArgs};
/// use nextscale::{DeviceInfo, In, Out, Stream};
/// let stream = Stream::host();
/// // A row of three tokens of a vocabulary of two; the target knows what it wants.
/// let target = [9.0, 0.0, /* token 1 */ 0.0, 9.0, /* token 2 */ 9.0, 0.0f32];
/// let plan = PooledVerifier::<f32>::builder(1, [1, 3], 2).radius(1).build(&DeviceInfo::of(&stream)?)?;
/// let (mut resample, mut positions, mut counts, mut status) = ([9; 3], [9; 3], [9; 2], [9]);
/// let mut counters = vec![0; plan.counter_words()];
/// let mut workspace = vec![0f64; plan.workspace_bytes() as usize / 8 + 64];
/// # let workspace: &mut [u8] = bytemuck::cast_slice_mut(&mut workspace);
/// # let skip = workspace.as_ptr().align_offset(256);
/// # let workspace = &mut workspace[skip..];
/// plan.run(&stream, PooledVerifierArgs {
///     target: In::host(&target),
///     drafts: In::host(&[0, 0, 0]),
///     options: PooledOptions::default(),
///     out: PooledOut {
///         resample: Out::host(&mut resample),
///         positions: Some(Out::host(&mut positions)),
///         islands: None,
///         counts: Out::host(&mut counts),
///         pooled: None,
///         status: Out::host(&mut status),
///     },
///     workspace: Out::host(workspace),
///     counters: Out::host(&mut counters),
/// })?;
/// assert_eq!((resample, positions, counts), ([0, 1, 2], [1, 2, -1], [2, 1]));
/// # Ok::<(), nextscale::Error>(())
/// ```
pub struct PooledVerifier<T> {
    inner: plan::Plan,
    types: PhantomData<T>,
}
typed_plan!(PooledVerifier<T>);

/// The buffers of one run. See [`PooledVerifier`] for shapes.
#[derive(Debug)]
pub struct PooledVerifierArgs<'a, T>
where
    T: Float,
{
    /// `[batch * height * width, vocab]`.
    pub target: In<'a, T>,
    /// `[batch, height, width]`.
    pub drafts: In<'a, i32>,
    /// What a run may have besides.
    pub options: PooledOptions<'a, T>,
    /// What is written.
    pub out: PooledOut<'a>,
    /// [`PooledVerifier::workspace_bytes`], 256-byte aligned.
    pub workspace: Out<'a, u8>,
    /// [`PooledVerifier::counter_words`]; all zero before the first run.
    pub counters: Out<'a, u32>,
}

/// The inputs that a run may have besides. See [`PooledVerifier`] for shapes.
#[derive(Debug)]
pub struct PooledOptions<'a, T>
where
    T: Float,
{
    /// As `target`; goes with [`PooledVerifierBuilder::guided`].
    pub target_free: Option<In<'a, T>>,
    /// `[codes, neighbours]`; goes with [`PooledVerifierBuilder::neighbours`].
    pub neighbours: Option<Neighbours<'a>>,
    /// `[batch]`; 1 if not given.
    pub guidance: Option<In<'a, f32>>,
    /// `[batch]`; 1 if not given.
    pub temperature: Option<In<'a, f32>>,
    /// `[batch]`; off if not given.
    pub top_k: Option<In<'a, i32>>,
    /// `[batch]`; off if not given.
    pub top_p: Option<In<'a, f32>>,
    /// `[batch]`; off if not given.
    pub min_p: Option<In<'a, f32>>,
    /// `[batch]`; the plan's if not given.
    pub threshold: Option<In<'a, f32>>,
}

impl<T: Float> Default for PooledOptions<'_, T> {
    fn default() -> Self {
        PooledOptions {
            target_free: None,
            neighbours: None,
            guidance: None,
            temperature: None,
            top_k: None,
            top_p: None,
            min_p: None,
            threshold: None,
        }
    }
}

/// What a run writes. See [`PooledVerifier`] for shapes.
#[derive(Debug)]
pub struct PooledOut<'a> {
    /// `[batch, height, width]`.
    pub resample: Out<'a, u8>,
    /// `[batch, height * width]`.
    pub positions: Option<Out<'a, i32>>,
    /// `[batch, height, width]`.
    pub islands: Option<Out<'a, i32>>,
    /// `[batch, 2]`.
    pub counts: Out<'a, i32>,
    /// `[batch, height, width]`.
    pub pooled: Option<Out<'a, f32>>,
    /// `[batch]`.
    pub status: Out<'a, u32>,
}

impl<T: Float> PooledVerifier<T> {
    /// A plan for `batch` images of `[height, width]` tokens.
    pub fn builder(batch: usize, image: [usize; 2], vocab: usize) -> PooledVerifierBuilder<T> {
        PooledVerifierBuilder::new(batch, image, vocab)
    }

    /// The bytes that any kernel must move: each row once, with and without the condition, and the outputs that are not
    /// optional. The table is not counted.
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

    /// Decides on `stream`. On a CUDA stream it enqueues one kernel and returns.
    ///
    /// # Errors
    /// Nothing was launched or written: a buffer too short, misaligned, overlapping an output, on another device or
    /// ordered on another stream; an operand that the plan needs and that is missing, or that it does not take; on CUDA
    /// what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, mut args: PooledVerifierArgs<'_, T>) -> Result<()> {
        let stream = stream.as_stream();
        let plan = &self.inner;
        let options = &args.options;
        let goes = |arg, given: bool, needed: bool| match (given, needed) {
            (true, false) => Err(Error::Unsupported { arg, what: "this plan does not take it" }),
            (false, true) => Err(Error::Unsupported { arg, what: "this plan needs it" }),
            _ => Ok(()),
        };
        goes("target_free", options.target_free.is_some(), plan.guided)?;
        goes("neighbours", options.neighbours.is_some(), plan.neighbours > 0)?;
        if !plan.guided {
            goes("guidance", options.guidance.is_some(), false)?;
        }
        let (batch, rows) = (plan.batch, plan.rows());
        let mut operands = Operands::of(&stream)
            .input("target", &args.target, plan.target_len)?
            .input("drafts", &args.drafts, rows)?
            .input_if("target_free", &options.target_free, plan.target_len)?
            .input_if("guidance", &options.guidance, batch)?
            .input_if("temperature", &options.temperature, batch)?
            .input_if("top_k", &options.top_k, batch)?
            .input_if("top_p", &options.top_p, batch)?
            .input_if("min_p", &options.min_p, batch)?
            .input_if("threshold", &options.threshold, batch)?;
        operands = match &options.neighbours {
            Some(Neighbours::U16(view)) => operands.input("neighbours", view, plan.neighbours_len)?,
            Some(Neighbours::I32(view)) => operands.input("neighbours", view, plan.neighbours_len)?,
            None => operands,
        };
        operands
            .output("resample", &args.out.resample, rows)?
            .output_if("positions", &args.out.positions, rows)?
            .output_if("islands", &args.out.islands, rows)?
            .output("counts", &args.out.counts, batch * 2)?
            .output_if("pooled", &args.out.pooled, rows)?
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
