//! Scale attention: softmax attention over the keys that a [`Visibility`](super::Visibility) lets each query see.

mod cuda;
mod host;
mod plan;
mod schedule;

pub use plan::{ScaleAttentionBuilder, Variant};
pub use schedule::Schedule;

use core::marker::PhantomData;

use super::visibility::Visibility;
use crate::device::Device;
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::launch::Operands;
use crate::plan::typed_plan;
use crate::stream::{AsStream, Stream};
use crate::view::{In, Out};

/// A plan for `out[b, i, h, :] = sum over visible j of softmax_j(scale * q[b, i, h, :] . k[b, j, g, :]) v[b, j, g, :]`, with
/// `g = h / (heads / kv_heads)`.
///
/// The attention of next-scale models: whole sequences (teacher forcing, prefill, several scales verified at once) and single
/// steps against a cache are both a [`Visibility`](super::Visibility), and nothing of the size of queries x keys is ever made:
/// the plan lowers the table to runs of keys, and the kernels walk those at the speed of dense attention.
///
/// | operand | shape | layout |
/// |---|---|---|
/// | `q` | `[batch, q_rows, heads, dim]` | batch, row and head strides: packed QKV, any order of dimensions |
/// | `k`, `v` | `[batch, kv_rows, kv_heads, dim]` | the same; `kv_rows` may exceed the keys: a cache with room left |
/// | `out` | `[batch, rows, heads, dim]` | the same; rows must not overlap |
/// | `lse` | `[batch, heads, rows]` f32 | any strides |
/// | `schedule` | [`ScaleAttention::schedule`]'s words | in the memory of the stream's device, 16-byte aligned |
/// | `lengths` | `[lengths, batch, kv_heads]` i32 | any strides; keys that exist of the segments which name a length |
/// | `row_index` | `[batch, rows]` i32 | batch stride; the row of `q` that row i is |
/// | `kv_offset` | `[batch]` i32 | the row of `k` and `v` at which the keys of an entry begin |
/// | `workspace` | [`ScaleAttention::workspace_bytes`] | 256-byte aligned |
///
/// `T` is `bf16` or `f16` for kernels; the host also takes `f32`. `dim` is a multiple of 8 up to 128 (kernels are made for
/// 64, 96 and 128; others run as the next of these). Strides of `q`, `k`, `v` and `out` are multiples of 8 elements and their
/// addresses of 16 bytes.
///
/// **Semantics.** The log-sum-exp is a natural logarithm, of the scaled logits. A query that sees nothing gives 0, and
/// -inf as its log-sum-exp, never NaN. A logit of -inf is as good as not seen; +inf or NaN makes the query's whole row
/// NaN. Keys and values that no query of their batch entry sees may hold anything, NaN included, in `k` as in `v`;
/// infinity or NaN in a value that is seen may also reach queries of the same [`Schedule::groups`] x 64 rows that do
/// not see it.
///
/// **Arithmetic.** Products of 16-bit factors are summed in f32; the softmax is in f32; probabilities are rounded to
/// `T` before they weigh the values; the result is rounded once. The host path computes in f64 and rounds once. Bitwise
/// repeatable, and the same whatever else is in the batch, where it is cut alike: by the size of the problem the plan
/// chooses groups, splits, and whether heads are packed, unless they are forced.
///
/// **Lengths** live in device memory, so that a captured graph replays with others. Out-of-range lengths are clamped; row
/// indices too; a schedule that is not this plan's is noticed, and nothing is written.
///
/// **Packed caches.** Of a plan that is [`packed`](ScaleAttentionBuilder::packed), `k` and `v` are read in fp8 or 4 bits with their
/// scales: [`ScaleAttention::run_packed`].
///
/// Sources: VAR (arXiv 2404.02905) and those whose tables [`Visibility`](super::Visibility) makes.
pub struct ScaleAttention<T> {
    inner: plan::Plan,
    types: PhantomData<T>,
}
typed_plan!(ScaleAttention<T>);

/// The buffers of one call. See [`ScaleAttention`] for shapes.
#[derive(Debug)]
pub struct ScaleAttentionArgs<'a, T: Float> {
    /// `[batch, q_rows, heads, dim]`.
    pub q: In<'a, T>,
    /// `[batch, kv_rows, kv_heads, dim]`.
    pub k: In<'a, T>,
    /// `[batch, kv_rows, kv_heads, dim]`.
    pub v: In<'a, T>,
    /// `[batch, rows, heads, dim]`.
    pub out: Out<'a, T>,
    /// `[batch, heads, rows]`, if wanted.
    pub lse: Option<Out<'a, f32>>,
    /// The plan's own words. The host path leaves them alone.
    pub schedule: In<'a, u32>,
    /// Needed if a segment of the keys names a length.
    pub lengths: Option<In<'a, i32>>,
    /// Needed if the plan gathers rows.
    pub row_index: Option<In<'a, i32>>,
    /// Needed if the plan's keys are packed.
    pub kv_offset: Option<In<'a, i32>>,
    /// Needed if [`ScaleAttention::workspace_bytes`] is not 0. Its content is of no interest.
    pub workspace: Option<Out<'a, u8>>,
}

/// The buffers of one call of a plan of packed keys and values. See [`ScaleAttention`] for what is not said here.
#[derive(Debug)]
pub struct ScaleAttentionPackedArgs<'a, T: Float> {
    /// `[batch, q_rows, heads, dim]`.
    pub q: In<'a, T>,
    /// `[batch, kv_rows, kv_heads, slot]`, 16-byte aligned on a device.
    pub k: In<'a, u8>,
    /// `[batch, kv_rows, kv_heads, n]`, 16-byte aligned on a device; needed unless inline.
    pub k_numbers: Option<In<'a, f32>>,
    /// `[batch, kv_rows, kv_heads, slot]`, as `k`.
    pub v: In<'a, u8>,
    /// As `k_numbers`.
    pub v_numbers: Option<In<'a, f32>>,
    /// `[batch, rows, heads, dim]`.
    pub out: Out<'a, T>,
    /// `[batch, heads, rows]`, if wanted.
    pub lse: Option<Out<'a, f32>>,
    /// The plan's own words. The host path leaves them alone.
    pub schedule: In<'a, u32>,
    /// Needed if a segment of the keys names a length.
    pub lengths: Option<In<'a, i32>>,
    /// Needed if the plan gathers rows.
    pub row_index: Option<In<'a, i32>>,
    /// Needed if the plan's keys are those of several entries in one row of memory.
    pub kv_offset: Option<In<'a, i32>>,
    /// Needed if [`ScaleAttention::workspace_bytes`] is not 0. Its content is of no interest.
    pub workspace: Option<Out<'a, u8>>,
}

/// Keys and values as they come.
enum KeysAndValues<'a, T> {
    Plain { k: In<'a, T>, v: In<'a, T> },
    Packed { k: In<'a, u8>, k_numbers: Option<In<'a, f32>>, v: In<'a, u8>, v_numbers: Option<In<'a, f32>> },
}

/// The other operands.
struct Rest<'a, T> {
    q: In<'a, T>,
    out: Out<'a, T>,
    lse: Option<Out<'a, f32>>,
    schedule: In<'a, u32>,
    lengths: Option<In<'a, i32>>,
    row_index: Option<In<'a, i32>>,
    kv_offset: Option<In<'a, i32>>,
    workspace: Option<Out<'a, u8>>,
}

impl<T: Float> ScaleAttention<T> {
    /// A plan for one batch entry and one head of 64 until told otherwise.
    pub fn builder(visibility: &Visibility) -> ScaleAttentionBuilder<T> {
        ScaleAttentionBuilder::new(visibility)
    }

    /// What the kernels walk. Copy [`Schedule::words`] to the device once, and pass them to every run.
    pub fn schedule(&self) -> &Schedule {
        &self.inner.schedule
    }

    /// The kernel that runs on a GPU.
    pub fn variant(&self) -> Variant {
        self.inner.variant
    }

    /// Scratch memory that a run on a GPU needs.
    pub fn workspace_bytes(&self) -> u64 {
        self.inner.workspace_bytes
    }

    /// Floating-point operations that the visible pairs of queries and keys need, lengths left aside: 4 for each element.
    pub fn useful_flops(&self) -> u64 {
        self.inner.useful_flops
    }

    /// Attends on `stream`. On a CUDA stream it enqueues one kernel, two if the schedule is split, and returns.
    ///
    /// # Errors
    /// Nothing was launched or written: an operand that is missing, too short, misaligned, overlapping one that is written, on
    /// another device or ordered on another stream; a plan of packed keys; on the host an index or a length out of range; on CUDA
    /// what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, args: ScaleAttentionArgs<'_, T>) -> Result<()> {
        if self.inner.packed.is_some() {
            return Err(Error::Unsupported { arg: "k", what: "a plan of packed keys: run_packed" });
        }
        let ScaleAttentionArgs { q, k, v, out, lse, schedule, lengths, row_index, kv_offset, workspace } = args;
        let rest = Rest { q, out, lse, schedule, lengths, row_index, kv_offset, workspace };
        self.run_on(stream.as_stream(), KeysAndValues::Plain { k, v }, rest)
    }

    /// [`ScaleAttention::run`] of a plan whose keys and values are [packed](ScaleAttentionBuilder::packed): each row is unpacked
    /// to `T`, as [`Pack`](crate::compression::Pack) unpacks it, where it is used, so that the result is that of the same
    /// [`Variant`] on the unpacked cache, bit for bit, where it is cut alike ([`Schedule::groups`], splits, packed heads).
    ///
    /// # Errors
    /// As [`ScaleAttention::run`]; a plan of keys that are not packed.
    pub fn run_packed<S: AsStream + ?Sized>(&self, stream: &S, args: ScaleAttentionPackedArgs<'_, T>) -> Result<()> {
        if self.inner.packed.is_none() {
            return Err(Error::Unsupported { arg: "k", what: "a plan of keys that are not packed: run" });
        }
        let ScaleAttentionPackedArgs { q, k, k_numbers, v, v_numbers, out, lse, schedule, lengths, .. } = args;
        let (row_index, kv_offset, workspace) = (args.row_index, args.kv_offset, args.workspace);
        let rest = Rest { q, out, lse, schedule, lengths, row_index, kv_offset, workspace };
        self.run_on(stream.as_stream(), KeysAndValues::Packed { k, k_numbers, v, v_numbers }, rest)
    }

    fn run_on(&self, stream: Stream<'_>, kv: KeysAndValues<'_, T>, mut rest: Rest<'_, T>) -> Result<()> {
        let plan = &self.inner;
        let host = stream.device() == Device::Host;
        let operands = Operands::of(&stream).input("q", &rest.q, plan.q_len)?;
        let operands = match &kv {
            KeysAndValues::Plain { k, v } => operands.input("k", k, plan.k_len)?.input("v", v, plan.v_len)?,
            KeysAndValues::Packed { k, k_numbers, v, v_numbers } => operands
                .input("k", k, plan.k_len)?
                .input("v", v, plan.v_len)?
                .input_needed("k_numbers", k_numbers, plan.numbers_len[0])?
                .input_needed("v_numbers", v_numbers, plan.numbers_len[1])?,
        };
        operands
            .output("out", &rest.out, plan.out_len)?
            .output_if("lse", &rest.lse, plan.lse_len)?
            .input("schedule", &rest.schedule, if host { 0 } else { plan.schedule.words().len() as u64 })?
            .input_needed("lengths", &rest.lengths, plan.lengths_len)?
            .input_needed("row_index", &rest.row_index, plan.row_index_len)?
            .input_needed("kv_offset", &rest.kv_offset, plan.kv_offset_len)?
            .workspace_if(&rest.workspace, if host { 0 } else { plan.workspace_bytes })?
            .finish()?;
        if host { host::run(plan, &kv, &mut rest) } else { cuda::run(plan, &stream, &kv, &rest) }
    }
}
