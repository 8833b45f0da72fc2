//! Candidate paths, accepted where they are typical.

mod cuda;
mod host;
mod plan;

pub use plan::TypicalVerifierBuilder;

use core::marker::PhantomData;

use super::{Accepted, Emitted, Traffic};
use crate::device::Device;
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::launch::Operands;
use crate::plan::typed_plan;
use crate::stream::AsStream;
use crate::view::{In, Out};

/// A plan that accepts what the model finds typical: typical acceptance of chains and of candidate paths. **Lossy.**
/// Medusa (arXiv 2401.10774).
///
/// A request has `nodes` nodes: node 0 is the last token that is certain, the others are drafts. Row `b * nodes + n`
/// is the target's distribution of the token after node `n` of request `b`. On a path, node `n` is accepted after
/// node `m` if `p_m(d_n) > min(epsilon, alpha exp(-H_m))`, with `H_m` the entropy of `p_m` in nats, and all before it
/// are. The path with the most accepted nodes is taken, of those the one with the greatest sum of `ln p`, of those
/// the first. Then a token is drawn from the row of its last accepted node.
///
/// | operand | shape | |
/// |---|---|---|
/// | `target` | `[target_rows, vocab]` | raw logits, `T`: f32, f16, bf16; a stride between rows; vocab up to 2^24 |
/// | `drafts` | `[batch, nodes]` i32 | the token of each node; node 0's is not looked at; -1 is not accepted |
/// | `paths` | `[paths, depth]` i32, with [`TypicalVerifierBuilder::paths`] | nodes of each path from 0 on, then -1 (or any number that is no node), the same for all requests |
/// | `row_index` | `[batch, nodes]` i32, optional | the row of `target`; else `b * nodes + n` |
/// | `temperature` | `[batch]` f32, optional | else 1; below 1e-5: greedy, p is 1 for the most probable token |
/// | `seeds`, `positions` | `[batch]` i64, optional | the request's seed, and the absolute position of the token after node 0 |
/// | `uniforms` | `[batch, 3]` f32, optional | of `[0, 1)`, in place of seeds |
/// | `tokens` | `[batch, depth]` i32 | accepted drafts, the token that follows, then -1 |
/// | `emitted`, `accepted` | `[batch]` | how many; [`Emitted`] is [`Accepted`] + 1 |
/// | `nodes` | `[batch, depth]` i32, optional | node 0 and the accepted ones, in order, then -1: what the cache keeps |
/// | `path` | `[batch]` i32, optional | which path |
/// | `last_row` | `[batch]` i32, optional | `b * nodes` + the last accepted node: the row whose hidden state goes on |
/// | `status` | `[batch]` u32 | bits of [`status`](super::status), of all rows |
///
/// The published code has `ln(p + 1e-5)` in the entropy; here it is `ln p`, which one sweep of the row gives.
///
/// **Determinism.** Everything is the same bit for bit on the host and on every device, in any batch.
///
/// **Workspace.** `workspace` may hold anything. `counters` must be all zero before the first run and is all zero after
/// each: it is not to be shared by runs that may overlap.
///
/// ```
/// use nextscale::verification::{Accepted, Emitted, TypicalOut, TypicalVerifier, TypicalVerifierArgs};
/// use nextscale::{DeviceInfo, In, Out, Stream};
/// let stream = Stream::host();
/// // A chain: node 1 is certain after node 0, node 2 is not after node 1.
/// let target = [0.0, 9.0, 0.0, /* node 1 */ 9.0, 0.0, 0.0, /* node 2 */ 0.0, 0.0, 0.0f32];
/// let plan = TypicalVerifier::<f32>::builder(1, 3, 3).build(&DeviceInfo::of(&stream)?)?;
/// let (mut tokens, mut emitted, mut accepted, mut status) = ([0; 3], [Emitted(0)], [Accepted(0)], [0]);
/// let mut counters = vec![0; plan.counter_words()];
/// let mut workspace = vec![0f64; plan.workspace_bytes() as usize / 8 + 64];
/// # let workspace: &mut [u8] = bytemuck::cast_slice_mut(&mut workspace);
/// # let skip = workspace.as_ptr().align_offset(256);
/// # let workspace = &mut workspace[skip..];
/// plan.run(&stream, TypicalVerifierArgs {
///     target: In::host(&target),
///     drafts: In::host(&[2, 1, 1]),
///     paths: None,
///     row_index: None,
///     temperature: Some(In::host(&[0.0])),
///     seeds: None,
///     positions: None,
///     uniforms: None,
///     out: TypicalOut {
///         tokens: Out::host(&mut tokens),
///         emitted: Out::host(&mut emitted),
///         accepted: Out::host(&mut accepted),
///         nodes: None,
///         path: None,
///         last_row: None,
///         status: Out::host(&mut status),
///     },
///     workspace: Out::host(workspace),
///     counters: Out::host(&mut counters),
/// })?;
/// assert_eq!((tokens, accepted[0]), ([1, 0, -1], Accepted(1)));
/// # Ok::<(), nextscale::Error>(())
/// ```
pub struct TypicalVerifier<T> {
    inner: plan::Plan,
    types: PhantomData<T>,
}
typed_plan!(TypicalVerifier<T>);

/// The buffers of one step. See [`TypicalVerifier`] for shapes.
#[derive(Debug)]
pub struct TypicalVerifierArgs<'a, T>
where
    T: Float,
{
    /// `[target_rows, vocab]`.
    pub target: In<'a, T>,
    /// `[batch, nodes]`.
    pub drafts: In<'a, i32>,
    /// `[paths, depth]`; goes with [`TypicalVerifierBuilder::paths`].
    pub paths: Option<In<'a, i32>>,
    /// `[batch, nodes]`; the row itself if not given.
    pub row_index: Option<In<'a, i32>>,
    /// `[batch]`; 1 if not given.
    pub temperature: Option<In<'a, f32>>,
    /// `[batch]`, bits of 64-bit seeds; 0 if not given.
    pub seeds: Option<In<'a, i64>>,
    /// `[batch]`; 0 if not given.
    pub positions: Option<In<'a, i64>>,
    /// `[batch, 3]`; drawn if not given.
    pub uniforms: Option<In<'a, f32>>,
    /// What is written.
    pub out: TypicalOut<'a>,
    /// [`TypicalVerifier::workspace_bytes`], 256-byte aligned.
    pub workspace: Out<'a, u8>,
    /// [`TypicalVerifier::counter_words`]; all zero before the first run.
    pub counters: Out<'a, u32>,
}

/// What a step writes. See [`TypicalVerifier`] for shapes.
#[derive(Debug)]
pub struct TypicalOut<'a> {
    /// `[batch, depth]`.
    pub tokens: Out<'a, i32>,
    /// `[batch]`.
    pub emitted: Out<'a, Emitted>,
    /// `[batch]`.
    pub accepted: Out<'a, Accepted>,
    /// `[batch, depth]`.
    pub nodes: Option<Out<'a, i32>>,
    /// `[batch]`.
    pub path: Option<Out<'a, i32>>,
    /// `[batch]`.
    pub last_row: Option<Out<'a, i32>>,
    /// `[batch]`.
    pub status: Out<'a, u32>,
}

impl<T: Float> TypicalVerifier<T> {
    /// A plan for `batch` requests of `nodes` nodes, the last certain token among them.
    pub fn builder(batch: usize, nodes: usize, vocab: usize) -> TypicalVerifierBuilder<T> {
        TypicalVerifierBuilder::new(batch, nodes, vocab)
    }

    /// The bytes that any kernel must move: each row once, and the outputs that are not optional.
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

    /// Decides a step on `stream`. On a CUDA stream it enqueues one kernel and returns.
    ///
    /// # Errors
    /// Nothing was launched or written: a buffer too short, misaligned, overlapping an output, on another device or
    /// ordered on another stream; paths that the plan needs and that are missing, or that it does not take; on CUDA
    /// what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, mut args: TypicalVerifierArgs<'_, T>) -> Result<()> {
        let stream = stream.as_stream();
        let plan = &self.inner;
        match (args.paths.is_some(), plan.listed) {
            (true, false) => return Err(Error::Unsupported { arg: "paths", what: "the plan is of a chain" }),
            (false, true) => return Err(Error::Unsupported { arg: "paths", what: "this plan needs them" }),
            _ => {}
        }
        let (batch, rows, out) = (plan.batch, plan.rows(), plan.batch * plan.depth);
        Operands::of(&stream)
            .input("target", &args.target, plan.target_len)?
            .input("drafts", &args.drafts, rows)?
            .input_if("paths", &args.paths, if batch > 0 { plan.paths * plan.depth } else { 0 })?
            .input_if("row_index", &args.row_index, rows)?
            .input_if("temperature", &args.temperature, batch)?
            .input_if("seeds", &args.seeds, batch)?
            .input_if("positions", &args.positions, batch)?
            .input_if("uniforms", &args.uniforms, batch * 3)?
            .output("tokens", &args.out.tokens, out)?
            .output("emitted", &args.out.emitted, batch)?
            .output("accepted", &args.out.accepted, batch)?
            .output_if("nodes", &args.out.nodes, out)?
            .output_if("path", &args.out.path, batch)?
            .output_if("last_row", &args.out.last_row, batch)?
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
