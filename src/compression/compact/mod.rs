//! Kept rows moved together.

mod cuda;
mod host;
mod plan;

pub use plan::{CompactBuilder, CompactSchedule};

use core::marker::PhantomData;

use super::Traffic;
use crate::device::Device;
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::launch::Operands;
use crate::plan::typed_plan;
use crate::stream::AsStream;
use crate::view::{In, Out};
use plan::{K, V};

/// Values of 4 bytes that can move with a row, besides its position.
pub const EXTRAS: usize = 4;

/// A plan that moves the kept rows of keys and values together, and what belongs to them.
///
/// For each set and head, and `r` below its count: `out[r] = convert(turn(input[indices[r]]))`; positions and extras move along.
///
/// | operand | shape | layout |
/// |---|---|---|
/// | `k`, `v` | `[sets, tokens, heads, dim]` | strides of all but `dim`; or in pages |
/// | `k_out`, `v_out` | `[sets, kept, heads, dim]` | the same; in place `[sets, tokens, heads, dim]` |
/// | `indices` | `[sets, heads, kept]` i32 | strides of sets and heads, 0 where shared; what [`Select`](super::Select) writes |
/// | `counts` | `[sets, heads]` i32, optional | strides; else all are `kept` |
/// | `positions` | `[sets, heads, tokens]` i32, optional | every stride; else a row's position is its row |
/// | `positions_out` | `[sets, heads, kept]` i32, optional | every stride |
/// | `extras`, `extras_out` | the same, f32 | norms, scales: any 4 bytes; strides of the positions |
/// | `input_pages` | `[sets, ceil(tokens / page_rows)]` i32, optional | [`CompactBuilder::input_pages`] |
/// | `out_pages` | `[sets, ceil(kept / page_rows)]` i32, optional | [`CompactBuilder::out_pages`] |
/// | `cos`, `sin` | `[table_rows, rotary_dim / 2]` f32 | one row stride: [`Turn`] |
///
/// With pages, tensors and values have `pages * page_rows` rows for each set, at places that the tables give. `I` is the type of
/// the inputs and `O` of the outputs: any one type, of which bytes move as they are, or two of `f32`, `f16` and `bf16`, rounded
/// once to nearest even. An interleaved cache `[tokens, heads, 2 * dim]` is one tensor: `k(2 * dim)`.
///
/// **In place** ([`CompactBuilder::in_place`]) there are no inputs: rows move down within the outputs, and so do positions and
/// extras. Indices then ascend strictly. What lies beyond a head's count afterwards is of no interest. With `out_pages` rows move
/// to other pages of the same pool, and theirs stay as they are.
///
/// **Turned keys** (StreamingLLM's positions in the cache, KeyRerotation): with [`CompactBuilder::renumber`] kept row `r` gets
/// position `first + r`, and with [`CompactBuilder::turn`] keys that hold their rotary embedding are rotated by the difference,
/// in f32, whatever their type.
///
/// **Bad indices.** The host path returns [`Error::RowOutOfRange`] and writes nothing. A kernel clamps indices, counts and
/// rotations, leaves out rows whose page is not there, and sets [`flags`].
///
/// **Determinism.** Bitwise, in any batch; host and kernels agree bit for bit.
///
/// ```
/// use nextscale::{DeviceInfo, In, Out, Stream, compression::{Compact, CompactArgs}};
/// let stream = Stream::host();
/// let plan = Compact::<f32, f32>::builder(1, 1, 4, 2).k(2).build(&DeviceInfo::of(&stream)?)?;
/// let (mut k, mut positions) = ([0f32; 4], [0; 2]);
/// plan.run(&stream, CompactArgs {
///     k: Some(In::host(&[0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5])),
///     k_out: Some(Out::host(&mut k)),
///     positions_out: Some(Out::host(&mut positions)),
///     ..CompactArgs::of(In::host(&[1, 3]))
/// })?;
/// assert_eq!((k, positions), ([1.0, 1.5, 3.0, 3.5], [1, 3]));
/// # Ok::<(), nextscale::Error>(())
/// ```
pub struct Compact<I, O> {
    inner: plan::Plan,
    types: PhantomData<(I, O)>,
}
typed_plan!(Compact<I, O>);

/// Which elements of a key are a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RopePairs {
    /// `2 j` and `2 j + 1`.
    Interleaved,
    /// `j` and `j + rotary_dim / 2`.
    Half,
}

/// How keys are turned to new positions. Row `p` of the table holds the cosines and sines of `p` times the pairs'
/// frequencies: a table of one axis, without a factor of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Turn {
    /// Which elements are a pair.
    pub pairs: RopePairs,
    /// Elements that are turned, the first of a key.
    pub rotary_dim: usize,
    /// Rows of the table: more than any difference of positions.
    pub table_rows: usize,
    /// Elements from one row to the next; `rotary_dim / 2` if not given.
    pub table_stride: Option<i64>,
}

/// Bits of `flags`.
pub mod flags {
    /// An index or a page was out of range, or in place an index was less than its target.
    pub const ROW_CLAMPED: u32 = 1;
    /// A rotation was beyond the table.
    pub const POSITION_CLAMPED: u32 = 2;
    /// A count was out of range.
    pub const COUNT_CLAMPED: u32 = 4;
}

/// The buffers of one run; what a plan does not need is `None`. See [`Compact`] for shapes.
#[derive(Debug)]
pub struct CompactArgs<'a, I, O>
where
    I: Element,
    O: Element,
{
    /// Keys; `None` in place.
    pub k: Option<In<'a, I>>,
    /// Values; `None` in place.
    pub v: Option<In<'a, I>>,
    /// Where keys go, in place also where they are.
    pub k_out: Option<Out<'a, O>>,
    /// Where values go.
    pub v_out: Option<Out<'a, O>>,
    /// Kept rows.
    pub indices: In<'a, i32>,
    /// How many.
    pub counts: Option<In<'a, i32>>,
    /// Positions of rows; `None` in place.
    pub positions: Option<In<'a, i32>>,
    /// Where they go.
    pub positions_out: Option<Out<'a, i32>>,
    /// Other values of rows; `None` in place.
    pub extras: [Option<In<'a, f32>>; EXTRAS],
    /// Where they go.
    pub extras_out: [Option<Out<'a, f32>>; EXTRAS],
    /// Pages of the inputs, in place of the outputs.
    pub input_pages: Option<In<'a, i32>>,
    /// Pages of the outputs.
    pub out_pages: Option<In<'a, i32>>,
    /// Cosines.
    pub cos: Option<In<'a, f32>>,
    /// Sines.
    pub sin: Option<In<'a, f32>>,
    /// One word, into which kernels OR [`flags`].
    pub flags: Option<Out<'a, u32>>,
}

impl<'a, I: Element, O: Element> CompactArgs<'a, I, O> {
    /// Nothing but indices.
    pub fn of(indices: In<'a, i32>) -> Self {
        CompactArgs {
            k: None,
            v: None,
            k_out: None,
            v_out: None,
            indices,
            counts: None,
            positions: None,
            positions_out: None,
            extras: [const { None }; EXTRAS],
            extras_out: [const { None }; EXTRAS],
            input_pages: None,
            out_pages: None,
            cos: None,
            sin: None,
            flags: None,
        }
    }
}

impl<I: Element, O: Element> Compact<I, O> {
    /// A plan for up to `kept` of the `tokens` rows of each head of each set; of keys or values or both, once they are told
    /// of.
    pub fn builder(sets: usize, heads: usize, tokens: usize, kept: usize) -> CompactBuilder<I, O> {
        CompactBuilder::new([sets, heads, tokens, kept])
    }

    /// How the kernel cuts the work up when the buffers are aligned as well as the plan allows.
    pub fn schedule(&self) -> CompactSchedule {
        self.inner.schedule(self.inner.unit)
    }

    /// The bytes of keys and values that any kernel must move if all heads keep `kept` rows.
    pub fn traffic(&self) -> Traffic {
        self.inner.traffic()
    }

    /// None is needed.
    pub const fn workspace_bytes(&self) -> u64 {
        0
    }

    /// Runs on `stream`. On a CUDA stream it enqueues one kernel, in place with positions or extras two, and returns.
    ///
    /// # Errors
    /// Nothing was launched or written: an operand that the plan needs and is missing, or has no use for; a buffer too short,
    /// misaligned, overlapping an output, on another device or ordered on another stream; on the host
    /// [`Error::RowOutOfRange`]; on CUDA what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, mut args: CompactArgs<'_, I, O>) -> Result<()> {
        let stream = stream.as_stream();
        let plan = &self.inner;
        let rule = |arg, given: bool, wanted: bool, what| match given == wanted {
            true => Ok(()),
            false => Err(Error::Unsupported { arg, what }),
        };
        const PLANNED: &str = "given if and only if the plan has it, and no inputs in place";
        let (has_k, has_v) = (plan.tensors[K].dim > 0, plan.tensors[V].dim > 0);
        rule("k", args.k.is_some(), has_k && !plan.in_place, PLANNED)?;
        rule("v", args.v.is_some(), has_v && !plan.in_place, PLANNED)?;
        rule("k_out", args.k_out.is_some(), has_k, PLANNED)?;
        rule("v_out", args.v_out.is_some(), has_v, PLANNED)?;
        rule("input_pages", args.input_pages.is_some(), plan.paged[0], PLANNED)?;
        rule("out_pages", args.out_pages.is_some(), plan.paged[1], PLANNED)?;
        rule("cos", args.cos.is_some(), plan.rotary_dim > 0, PLANNED)?;
        rule("sin", args.sin.is_some(), plan.rotary_dim > 0, PLANNED)?;
        if plan.in_place {
            rule("positions", args.positions.is_some(), false, PLANNED)?;
        }
        for (input, out) in args.extras.iter().zip(&args.extras_out) {
            rule(
                "extras",
                input.is_some(),
                out.is_some() && !plan.in_place,
                "each with its output, and none in place",
            )?;
        }
        let mut operands = Operands::of(&stream)
            .input_if("k", &args.k, plan.tensors[K].input_len)?
            .input_if("v", &args.v, plan.tensors[V].input_len)?
            .output_if("k_out", &args.k_out, plan.tensors[K].out_len)?
            .output_if("v_out", &args.v_out, plan.tensors[V].out_len)?
            .input("indices", &args.indices, plan.indices_len)?
            .input_if("counts", &args.counts, plan.counts_len)?
            .input_if("positions", &args.positions, plan.values_len)?
            .output_if("positions_out", &args.positions_out, plan.values_out_len)?
            .input_if("input_pages", &args.input_pages, plan.input_pages)?
            .input_if("out_pages", &args.out_pages, plan.out_pages)?
            .input_if("cos", &args.cos, plan.table_len)?
            .input_if("sin", &args.sin, plan.table_len)?
            .output_if("flags", &args.flags, 1)?;
        for (input, out) in args.extras.iter().zip(&args.extras_out) {
            operands = operands.input_if("extras", input, plan.values_len)?.output_if(
                "extras_out",
                out,
                plan.values_out_len,
            )?;
        }
        operands.finish()?;
        match stream.device() {
            Device::Host => host::run(plan, &mut args),
            _ => cuda::run(plan, &stream, &args),
        }
    }
}
