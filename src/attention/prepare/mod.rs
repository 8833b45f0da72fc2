//! Norm, rotary position embedding and cache append of queries, keys and values.

mod cuda;
mod host;
mod plan;

pub use plan::{Norm, PrepareBuilder, PrepareCell, PrepareSchedule, Rope};

use core::marker::PhantomData;

use super::Traffic;
use crate::device::Device;
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::launch::Operands;
use crate::plan::typed_plan;
use crate::stream::AsStream;
use crate::view::{In, Out};
use plan::{K, Plan, Q, V};

/// A plan for what queries, keys and values go through before attention, in one pass over them.
///
/// For each row `x` of `dim` elements (one head of one token):
/// 1. **norm**, of queries and keys: none, L2 (`x / max(‖x‖, eps)`; VAR and Infinity), or RMS
///    (`x / sqrt(mean(x²) + eps) * weight`; LLaMA, InfinityStar, ACDiT);
/// 2. **multiplier** of queries, a number a head: `exp(min(s, ln 100))` of VAR and Infinity, computed by the caller;
/// 3. **rotary position embedding** of queries and keys ([`Rope`]): pairs of elements are rotated by the angles of the
///    token's row in a table of cosines and sines;
/// 4. **store**: queries to `q_out`; keys and values to row `append_at + i` of their caches.
///
/// | operand | shape | layout |
/// |---|---|---|
/// | `q` | `[batch, rows, heads, dim]` | strides of all but `dim`: also views of a packed QKV projection |
/// | `k`, `v` | `[batch, rows, kv_heads, dim]` | the same |
/// | `q_out` | `[batch, rows, heads, dim]` | the same; rows must not overlap |
/// | `k_cache`, `v_cache` | `[batch, cache_rows, kv_heads, dim]` | the same; so also heads before rows |
/// | `q_weight`, `k_weight` | `[dim]` f32 | contiguous |
/// | `q_multiplier` | `[heads]` f32 | contiguous |
/// | `cos`, `sin` | `[table_rows, rotary_dim / 2 or rotary_dim]` f32 | one row stride; may be of one buffer |
/// | `positions` | `[rows]` or `[batch, rows]` i32 | any strides |
/// | `append_at` | `[batch]` i32 | contiguous |
///
/// Each of the three tensors may be left out of the plan: queries alone for cross-attention, keys and values alone for
/// a prompt. `I` is the type of `q`, `k` and `v`, `O` of `q_out`, `C` of the caches (each `f32`, `f16`, `bf16`).
///
/// **Arithmetic.** f32 throughout, rounded once at the store (nearest even). Rotating, `y[a] = fma(x[a], cos, -(x[b] *
/// sin))` and `y[b] = fma(x[b], cos, x[a] * sin)`. Without a norm the result is the same bit for bit on the host and on
/// every GPU. With one it is, before its rounding, within `2^-19 * (|x[a] cos| + |x[b] sin|)` of the exact value of the
/// normalised `x` (`2^-19 * |x|` where nothing rotates), as long as the sum of squares does not overflow f32.
///
/// **Rows that do not fit.** A row whose place in a cache does not exist is not written; positions outside the table
/// are clamped to the nearest row. Numbers of the caller are checked before anything is launched
/// ([`Error::RowOutOfRange`]), and so are device arrays on the host path. A kernel that reads them from device memory
/// sets [`Prepare::APPEND_SKIPPED`] or [`Prepare::POSITION_CLAMPED`] in the `flags` word, if there is one.
///
/// **Determinism.** Bitwise, from run to run and in any batch.
///
/// ```
/// use nextscale::attention::{AppendAt, Norm, Positions, Prepare, PrepareArgs, Rope};
/// use nextscale::{DeviceInfo, In, Out, Stream};
/// let stream = Stream::host();
/// let (q, k, v) = ([3.0, 4.0f32], [0.0, -2.0f32], [5.0, 6.0f32]); // one token, one head, two dims
/// let (cos, sin) = ([1.0, 0.0f32], [0.0, 1.0f32]); // row 0 turns by nothing, row 1 by a right angle
/// let (mut q_out, mut k_cache, mut v_cache) = ([0f32; 2], [0f32; 4], [0f32; 4]); // caches of two rows
/// let plan = Prepare::<f32, f32, f32>::builder(2)
///     .q(1)
///     .k(1, 2)
///     .v(1, 2)
///     .norm(Norm::L2 { eps: 1e-12 })
///     .rope(Rope::interleaved(2))
///     .build(&DeviceInfo::of(&stream)?)?;
/// plan.run(&stream, PrepareArgs {
///     q: Some(In::host(&q)),
///     q_out: Some(Out::host(&mut q_out)),
///     k: Some(In::host(&k)),
///     k_cache: Some(Out::host(&mut k_cache)),
///     v: Some(In::host(&v)),
///     v_cache: Some(Out::host(&mut v_cache)),
///     cos: Some(In::host(&cos)),
///     sin: Some(In::host(&sin)),
///     positions: Positions::From(1),
///     append_at: AppendAt::Row(1),
///     ..PrepareArgs::default()
/// })?;
/// assert_eq!(q_out, [-0.8, 0.6]);
/// assert_eq!(k_cache, [0.0, 0.0, 1.0, 0.0]);
/// assert_eq!(v_cache, [0.0, 0.0, 5.0, 6.0]);
/// # Ok::<(), nextscale::Error>(())
/// ```
pub struct Prepare<I, O, C> {
    inner: Plan,
    types: PhantomData<(I, O, C)>,
}
typed_plan!(Prepare<I, O, C>);

/// The first row of the caches that is written, for each batch entry.
#[derive(Debug)]
pub enum AppendAt<'a> {
    /// The same for all.
    Row(u64),
    /// `[batch]`, read when the work runs: a captured graph appends where the array says at each replay.
    Rows(In<'a, i32>),
}

/// The row of the table that a token's angles are in.
#[derive(Debug)]
pub enum Positions<'a> {
    /// This one for token 0, the next for token 1, and so on.
    From(u64),
    /// The row of the cache that the token is appended at.
    Appended,
    /// `[rows]` or `[batch, rows]`, as the plan says; read when the work runs.
    Of(In<'a, i32>),
}

/// The buffers of one preparation: `None` is what the plan has no use for. See [`Prepare`] for shapes.
#[derive(Debug)]
pub struct PrepareArgs<'a, I, O, C>
where
    I: Float,
    O: Float,
    C: Float,
{
    /// `[batch, rows, heads, dim]`. 16-byte alignment of this and of the other tensors makes wide access possible.
    pub q: Option<In<'a, I>>,
    /// `[batch, rows, kv_heads, dim]`.
    pub k: Option<In<'a, I>>,
    /// `[batch, rows, kv_heads, dim]`.
    pub v: Option<In<'a, I>>,
    /// `[batch, rows, heads, dim]`.
    pub q_out: Option<Out<'a, O>>,
    /// `[batch, cache_rows, kv_heads, dim]`; only the rows of this call are written.
    pub k_cache: Option<Out<'a, C>>,
    /// `[batch, cache_rows, kv_heads, dim]`; only the rows of this call are written.
    pub v_cache: Option<Out<'a, C>>,
    /// `[dim]`, with [`Norm::Rms`]; `None` stands for ones.
    pub q_weight: Option<In<'a, f32>>,
    /// `[dim]`, with [`Norm::Rms`]; `None` stands for ones.
    pub k_weight: Option<In<'a, f32>>,
    /// `[heads]`, positive or not; `None` stands for ones.
    pub q_multiplier: Option<In<'a, f32>>,
    /// `[table_rows, columns]`.
    pub cos: Option<In<'a, f32>>,
    /// `[table_rows, columns]`.
    pub sin: Option<In<'a, f32>>,
    /// Without a rope of no interest.
    pub positions: Positions<'a>,
    /// Without keys and values of no interest, but for [`Positions::Appended`].
    pub append_at: AppendAt<'a>,
    /// `[1]`, or `None`: bits are only ever set, so the caller clears it. The host path leaves it alone.
    pub flags: Option<Out<'a, u32>>,
}

impl<I: Float, O: Float, C: Float> Default for PrepareArgs<'_, I, O, C> {
    /// Nothing, from row and position 0.
    fn default() -> Self {
        PrepareArgs {
            q: None,
            k: None,
            v: None,
            q_out: None,
            k_cache: None,
            v_cache: None,
            q_weight: None,
            k_weight: None,
            q_multiplier: None,
            cos: None,
            sin: None,
            positions: Positions::From(0),
            append_at: AppendAt::Row(0),
            flags: None,
        }
    }
}

impl<I: Float, O: Float, C: Float> Prepare<I, O, C> {
    /// Set in `flags` when a kernel did not write a row, for its cache has no place for it.
    pub const APPEND_SKIPPED: u32 = crate::ffi::NXS_FLAG_APPEND_SKIPPED;
    /// Set in `flags` when a kernel clamped a position.
    pub const POSITION_CLAMPED: u32 = crate::ffi::NXS_FLAG_POSITION_CLAMPED;

    /// A plan for heads of `dim` elements: no tensors, no norm, no rope, one token, until told otherwise.
    pub fn builder(dim: usize) -> PrepareBuilder<I, O, C> {
        PrepareBuilder::new(dim)
    }

    /// How the kernel cuts the work up when the buffers are aligned for wide access, as far as the plan allows it.
    pub fn schedule(&self) -> PrepareSchedule {
        self.inner.schedule(self.inner.wide)
    }

    /// The bytes of `q`, `k` and `v` and of what becomes of them. Tables, weights and positions are not counted: rows
    /// share them.
    pub fn traffic(&self) -> Traffic {
        self.inner.traffic(size_of::<I>(), [size_of::<O>(), size_of::<C>(), size_of::<C>()])
    }

    /// None is needed.
    pub const fn workspace_bytes(&self) -> u64 {
        0
    }

    /// Prepares on `stream`. On a CUDA stream it enqueues one kernel and returns.
    ///
    /// # Errors
    /// Nothing was launched or written: a buffer missing, of no use to the plan, too short, misaligned, overlapping an
    /// output, on another device or ordered on another stream; a row or position that is known and out of range; on
    /// CUDA what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, mut args: PrepareArgs<'_, I, O, C>) -> Result<()> {
        let stream = stream.as_stream();
        let plan = &self.inner;
        check_presence(plan, &args)?;
        let [q, k, v] = &plan.tensors;
        let mut operands = Operands::of(&stream)
            .input_if("q", &args.q, q.in_len)?
            .input_if("k", &args.k, k.in_len)?
            .input_if("v", &args.v, v.in_len)?
            .output_if("q_out", &args.q_out, q.out_len)?
            .output_if("k_cache", &args.k_cache, k.out_len)?
            .output_if("v_cache", &args.v_cache, v.out_len)?
            .input_if("q_weight", &args.q_weight, plan.dim)?
            .input_if("k_weight", &args.k_weight, plan.dim)?
            .input_if("q_multiplier", &args.q_multiplier, q.heads)?
            .input_if("cos", &args.cos, plan.table_len)?
            .input_if("sin", &args.sin, plan.table_len)?;
        if let Positions::Of(positions) = &args.positions {
            operands = operands.input("positions", positions, plan.positions_len)?;
        }
        if let AppendAt::Rows(rows) = &args.append_at {
            operands = operands.input("append_at", rows, plan.batch)?;
        }
        operands.output_if("flags", &args.flags, 1)?.finish()?;
        check_numbers(plan, &args)?;
        match stream.device() {
            Device::Host => host::run(plan, &mut args),
            _ => cuda::run(plan, &stream, &args),
        }
    }
}

/// What the plan has is there, and nothing else.
fn check_presence<I: Float, O: Float, C: Float>(plan: &Plan, args: &PrepareArgs<'_, I, O, C>) -> Result<()> {
    let [q, k, v] = [Q, K, V].map(|at| plan.tensors[at].present);
    for (arg, given, wanted) in [
        ("q", args.q.is_some(), q),
        ("q_out", args.q_out.is_some(), q),
        ("k", args.k.is_some(), k),
        ("k_cache", args.k_cache.is_some(), k),
        ("v", args.v.is_some(), v),
        ("v_cache", args.v_cache.is_some(), v),
        ("cos", args.cos.is_some(), plan.rope.is_some()),
        ("sin", args.sin.is_some(), plan.rope.is_some()),
    ] {
        match (given, wanted) {
            (false, true) => return Err(Error::Unsupported { arg, what: "the plan needs it" }),
            (true, false) => return Err(Error::Unsupported { arg, what: "the plan has no use for it" }),
            _ => {}
        }
    }
    for (arg, given, useful) in [
        ("q_weight", args.q_weight.is_some(), q && plan.norm.takes_weights()),
        ("k_weight", args.k_weight.is_some(), k && plan.norm.takes_weights()),
        ("q_multiplier", args.q_multiplier.is_some(), q),
    ] {
        if given && !useful {
            return Err(Error::Unsupported { arg, what: "the plan has no use for it" });
        }
    }
    Ok(())
}

/// Rows and positions that are given as numbers.
fn check_numbers<I: Float, O: Float, C: Float>(plan: &Plan, args: &PrepareArgs<'_, I, O, C>) -> Result<()> {
    if plan.batch == 0 || plan.rows == 0 {
        return Ok(());
    }
    let check = |arg, first: u64, rows: u64| match first.checked_add(plan.rows) {
        Some(end) if end <= rows => Ok(()),
        _ => {
            let row = first.saturating_add(plan.rows - 1).min(i64::MAX as u64) as i64;
            Err(Error::RowOutOfRange { arg, at: 0, row, rows })
        }
    };
    if let AppendAt::Row(first) = args.append_at {
        for tensor in plan.tensors[K..].iter().filter(|tensor| tensor.heads > 0) {
            check("append_at", first, tensor.out.shape()[1])?;
        }
    }
    if let Some(rope) = &plan.rope {
        match (&args.positions, &args.append_at) {
            (Positions::From(first), _) => check("positions", *first, rope.table_rows)?,
            (Positions::Appended, AppendAt::Row(first)) => check("append_at", *first, rope.table_rows)?,
            _ => {}
        }
    }
    Ok(())
}
