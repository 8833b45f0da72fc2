//! Shapes, checks and the schedule. Pure.

use core::marker::PhantomData;
use core::ops::Range;

use super::{Prepare, Traffic};
use crate::device::{Arch, DeviceInfo};
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::layout::{Access, Layout};

/// Places of the three tensors in the plan and in the params of the kernel.
pub(super) const Q: usize = 0;
pub(super) const K: usize = 1;
pub(super) const V: usize = 2;

const MOST_DIM: u64 = 256;
/// The kernel counts rows of heads in 32 bits.
const MOST_ITEMS: u64 = (1 << 31) - 1;
/// Threads in a block.
const THREADS: u32 = 128;
/// A row is shared within a warp.
const MOST_LANES: u64 = 32;
/// The least eps of the L2 norm whose square is a normal f32.
const LEAST_L2_EPS: f32 = 1e-18;

/// How queries and keys are normalised, over the elements of a head.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Norm {
    /// Not at all.
    #[default]
    None,
    /// `x / max(‖x‖, eps)`, as `torch.nn.functional.normalize` does, whose eps is 1e-12. From 1e-18 to 1.
    L2 {
        /// The least norm that is divided by.
        eps: f32,
    },
    /// `x / sqrt(mean(x²) + eps) * weight`. From 0 to 1.
    Rms {
        /// Added to the mean of squares.
        eps: f32,
    },
}

/// A rotary position embedding: which elements of a head are rotated together, and by what table.
///
/// Of each head the first `rotary_dim` elements are rotated, all unless told otherwise; the rest passes through. The
/// table has a row a position and `rotary_dim / 2` columns, one a pair.
///
/// - Infinity (2-D) and InfinityStar (4-D): [`Rope::interleaved`]. The axes are in the table: their angles follow each
///   other.
/// - LLaMA: [`Rope::half`].
/// - ACDiT: [`Rope::half`] with [`Rope::full_table`]. It rotates the halves of the whole head by cosines and sines that
///   are put together axis by axis, so that the two elements of a pair have different angles.
/// - Halves within each axis (EVA, DINOv3-like encoders): [`Rope::half`] with [`Rope::axes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Rope {
    half: bool,
    rotary_dim: Option<u64>,
    table_rows: u64,
    axes: u64,
    full: bool,
    stride: Option<i64>,
}

impl Rope {
    const fn new(half: bool, table_rows: usize) -> Self {
        Rope { half, rotary_dim: None, table_rows: table_rows as u64, axes: 1, full: false, stride: None }
    }

    /// Elements `2 j` and `2 j + 1` are pair `j`.
    pub const fn interleaved(table_rows: usize) -> Self {
        Self::new(false, table_rows)
    }

    /// Elements `j` and `j + rotary_dim / 2` are pair `j` (`rotate_half`).
    pub const fn half(table_rows: usize) -> Self {
        Self::new(true, table_rows)
    }

    /// Rotates only the first elements of each head. Even.
    pub const fn rotary_dim(mut self, rotary_dim: usize) -> Self {
        self.rotary_dim = Some(rotary_dim as u64);
        self
    }

    /// With [`Rope::half`]: the elements are `axes` blocks of one size, and each has halves of its own. Pairs are
    /// counted block by block.
    pub const fn axes(mut self, axes: usize) -> Self {
        self.axes = axes as u64;
        self
    }

    /// The table has `rotary_dim` columns, one an element: `y[a] = x[a] cos[a] - x[b] sin[a]` and
    /// `y[b] = x[b] cos[b] + x[a] sin[b]`. So are the tables of most Python code, where the columns of a pair are
    /// equal.
    pub const fn full_table(mut self) -> Self {
        self.full = true;
        self
    }

    /// Elements between rows of the table; its columns if not given.
    pub const fn table_stride(mut self, stride: i64) -> Self {
        self.stride = Some(stride);
        self
    }
}

/// Describes a preparation; [`PrepareBuilder::build`] makes the plan.
#[derive(Debug, Clone)]
pub struct PrepareBuilder<I, O, C> {
    dim: u64,
    batch: u64,
    rows: u64,
    tensors: [Option<Described>; 3],
    in_strides: [Option<[i64; 3]>; 3],
    out_strides: [Option<[i64; 3]>; 3],
    norm: Norm,
    rope: Option<Rope>,
    positions: Option<[i64; 2]>,
    access: Access,
    types: PhantomData<(I, O, C)>,
}

/// A tensor of the description.
#[derive(Debug, Clone, Copy)]
struct Described {
    heads: u64,
    /// `None`: as many as are read.
    out_rows: Option<u64>,
}

impl<I: Float, O: Float, C: Float> PrepareBuilder<I, O, C> {
    pub(super) fn new(dim: usize) -> Self {
        PrepareBuilder {
            dim: dim as u64,
            batch: 1,
            rows: 1,
            tensors: [None; 3],
            in_strides: [None; 3],
            out_strides: [None; 3],
            norm: Norm::None,
            rope: None,
            positions: None,
            access: Access::Auto,
            types: PhantomData,
        }
    }

    /// Tokens of each batch entry; 1 if not given.
    pub fn rows(mut self, rows: usize) -> Self {
        self.rows = rows as u64;
        self
    }

    /// Batch entries; 1 if not given.
    pub fn batch(mut self, batch: usize) -> Self {
        self.batch = batch as u64;
        self
    }

    /// There are queries, of this many heads.
    pub fn q(mut self, heads: usize) -> Self {
        self.tensors[Q] = Some(Described { heads: heads as u64, out_rows: None });
        self
    }

    /// There are keys, of this many heads, and a cache of `cache_rows` rows for them.
    pub fn k(mut self, heads: usize, cache_rows: usize) -> Self {
        self.tensors[K] = Some(Described { heads: heads as u64, out_rows: Some(cache_rows as u64) });
        self
    }

    /// There are values, of this many heads, and a cache of `cache_rows` rows for them.
    pub fn v(mut self, heads: usize, cache_rows: usize) -> Self {
        self.tensors[V] = Some(Described { heads: heads as u64, out_rows: Some(cache_rows as u64) });
        self
    }

    /// The norm of queries and keys; none if not given.
    pub fn norm(mut self, norm: Norm) -> Self {
        self.norm = norm;
        self
    }

    /// The rotary position embedding of queries and keys; none if not given.
    pub fn rope(mut self, rope: Rope) -> Self {
        self.rope = Some(rope);
        self
    }

    /// Strides of `q` in elements, `[batch, row, head]`; contiguous if not given.
    pub fn q_strides(mut self, strides: [i64; 3]) -> Self {
        self.in_strides[Q] = Some(strides);
        self
    }

    /// Strides of `k` in elements, `[batch, row, head]`; contiguous if not given.
    pub fn k_strides(mut self, strides: [i64; 3]) -> Self {
        self.in_strides[K] = Some(strides);
        self
    }

    /// Strides of `v` in elements, `[batch, row, head]`; contiguous if not given.
    pub fn v_strides(mut self, strides: [i64; 3]) -> Self {
        self.in_strides[V] = Some(strides);
        self
    }

    /// Strides of `q_out` in elements, `[batch, row, head]`; contiguous if not given.
    pub fn q_out_strides(mut self, strides: [i64; 3]) -> Self {
        self.out_strides[Q] = Some(strides);
        self
    }

    /// Strides of `k_cache` in elements, `[batch, row, head]`; contiguous `[batch, cache_rows, heads, dim]` if not
    /// given.
    pub fn k_cache_strides(mut self, strides: [i64; 3]) -> Self {
        self.out_strides[K] = Some(strides);
        self
    }

    /// Strides of `v_cache` in elements, `[batch, row, head]`; contiguous `[batch, cache_rows, heads, dim]` if not
    /// given.
    pub fn v_cache_strides(mut self, strides: [i64; 3]) -> Self {
        self.out_strides[V] = Some(strides);
        self
    }

    /// Strides of the array of positions in elements, `[batch, row]`; `[0, 1]` if not given: one for all batch entries.
    pub fn positions_strides(mut self, strides: [i64; 2]) -> Self {
        self.positions = Some(strides);
        self
    }

    /// Forces how memory is reached.
    pub fn access(mut self, access: Access) -> Self {
        self.access = access;
        self
    }

    /// Checks the description.
    ///
    /// # Errors
    /// [`Error::Size`] for `dim` outside 1 to 256, 2^31 or more heads over batch and rows, a `rotary_dim` or `axes`
    /// beyond the head, a table without rows; [`Error::Stride`] for a negative stride, an output that overlaps itself,
    /// or wide access that the strides do not allow; [`Error::Unsupported`] for a plan without tensors, an eps outside
    /// its limits, a
    /// `rotary_dim` that is odd or does not divide into the axes, axes of interleaved pairs, or wide access that the
    /// sizes do not allow; [`Error::UnsupportedDevice`] below compute capability 8.0.
    pub fn build(self, device: &DeviceInfo) -> Result<Prepare<I, O, C>> {
        if device.arch < (Arch { major: 8, minor: 0 }) {
            return Err(Error::UnsupportedDevice { have: Some(device.arch), need: "sm_80 and newer" });
        }
        let Self { dim, batch, rows, .. } = self;
        size("dim", dim, 1, MOST_DIM)?;
        size("batch", batch, 0, i64::MAX as u64)?;
        size("rows", rows, 0, i64::MAX as u64)?;
        let tokens = batch.saturating_mul(rows);
        size("batch * rows", tokens, 0, MOST_ITEMS)?;
        if self.tensors.iter().all(Option::is_none) {
            return Err(Error::Unsupported { arg: "q, k, v", what: "a plan has at least one of them" });
        }

        let tensor = |at: usize, names: [&'static str; 4]| -> Result<Tensor> {
            let [heads_name, in_name, out_name, rows_name] = names;
            let described = self.tensors[at].unwrap_or(Described { heads: 0, out_rows: None });
            let (heads, out_rows) = (described.heads, described.out_rows.unwrap_or(rows));
            size(heads_name, heads, 0, MOST_ITEMS)?;
            size(heads_name, tokens.saturating_mul(heads), 0, MOST_ITEMS)?;
            size(rows_name, out_rows, 0, i64::MAX as u64)?;
            let layout = |shape: [u64; 4], strides: Option<[i64; 3]>| {
                strides.map_or(Layout::contiguous(shape), |[b, r, h]| Layout::strided(shape, [b, r, h, 1]))
            };
            let input = layout([batch, rows, heads, dim], self.in_strides[at]);
            let out = layout([batch, out_rows, heads, dim], self.out_strides[at]);
            out.require_disjoint(out_name)?;
            let in_len = input.required_len(in_name)?;
            // What is not written need not be there.
            let out_len = if in_len == 0 { 0 } else { out.required_len(out_name)? };
            Ok(Tensor { present: self.tensors[at].is_some(), heads, input, out, in_len, out_len })
        };
        let tensors = [
            tensor(Q, ["heads of q", "q", "q_out", "rows"])?,
            tensor(K, ["heads of k", "k", "k_cache", "rows of k_cache"])?,
            tensor(V, ["heads of v", "v", "v_cache", "rows of v_cache"])?,
        ];
        let rope = self.rope.map(|rope| rope.check(dim)).transpose()?;
        let positions = Layout::strided([batch, rows], self.positions.unwrap_or([0, 1]));

        let vec = 16 / size_of::<I>();
        let aligned = |bytes: usize| (vec * bytes).min(16) as u32;
        let (q_align, cache_align) = (aligned(size_of::<O>()), aligned(size_of::<C>()));
        let mut plan = Plan {
            dim,
            batch,
            rows,
            table_len: rope.as_ref().map_or(Ok(0), |rope| rope.table.required_len("cos"))?,
            positions_len: positions.required_len("positions")?,
            positions,
            tensors,
            norm: CheckedNorm::of(self.norm)?,
            rope,
            vec: vec as u32,
            out_align: [q_align, cache_align, cache_align],
            access: self.access,
            wide: false,
        };
        if plan.tensors.iter().all(|tensor| tensor.in_len == 0) {
            (plan.table_len, plan.positions_len) = (0, 0);
        }
        plan.wide = match self.access {
            Access::Narrow => false,
            Access::Auto => plan.check_wide().is_ok(),
            Access::Wide => plan.check_wide().map(|()| true)?,
        };
        Ok(Prepare { inner: plan, types: PhantomData })
    }
}

fn size(arg: &'static str, got: u64, min: u64, max: u64) -> Result<()> {
    if (min..=max).contains(&got) { Ok(()) } else { Err(Error::Size { arg, got, min, max }) }
}

/// A norm with an eps that has an order, as bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum CheckedNorm {
    None,
    L2 { eps: u32 },
    Rms { eps: u32 },
}

impl CheckedNorm {
    fn of(norm: Norm) -> Result<Self> {
        let check = |eps: f32, least: f32, what| match (least..=1.0).contains(&eps) {
            true => Ok(eps.to_bits()),
            false => Err(Error::Unsupported { arg: "eps", what }),
        };
        Ok(match norm {
            Norm::None => CheckedNorm::None,
            Norm::L2 { eps } => CheckedNorm::L2 { eps: check(eps, LEAST_L2_EPS, "from 1e-18 to 1 with an L2 norm")? },
            Norm::Rms { eps } => CheckedNorm::Rms { eps: check(eps, 0.0, "from 0 to 1 with an RMS norm")? },
        })
    }

    pub(super) fn takes_weights(self) -> bool {
        matches!(self, CheckedNorm::Rms { .. })
    }
}

/// A rope that fits the heads.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct CheckedRope {
    pub(super) half: bool,
    pub(super) rotary_dim: u64,
    /// Elements whose halves rotate together.
    pub(super) block: u64,
    pub(super) full: bool,
    pub(super) table_rows: u64,
    /// `[rows, columns]`.
    pub(super) table: Layout<2>,
}

impl Rope {
    fn check(self, dim: u64) -> Result<CheckedRope> {
        let rotary_dim = self.rotary_dim.unwrap_or(dim);
        size("rotary_dim", rotary_dim, 2, dim)?;
        size("axes", self.axes, 1, rotary_dim / 2)?;
        size("table_rows", self.table_rows, 1, i64::MAX as u64)?;
        if !rotary_dim.is_multiple_of(2 * self.axes) {
            return Err(Error::Unsupported { arg: "rotary_dim", what: "it is an even number for each axis" });
        }
        if !self.half && self.axes != 1 {
            return Err(Error::Unsupported { arg: "axes", what: "interleaved pairs have none: the table has them" });
        }
        let columns = if self.full { rotary_dim } else { rotary_dim / 2 };
        let table = Layout::strided([self.table_rows, columns], [self.stride.unwrap_or(columns as i64), 1]);
        let block = rotary_dim / self.axes;
        Ok(CheckedRope { half: self.half, rotary_dim, block, full: self.full, table_rows: self.table_rows, table })
    }
}

impl CheckedRope {
    /// The pair that an element below `rotary_dim` belongs to: its first and second element, and their columns.
    pub(super) fn pair(&self, pair: u64) -> ([u64; 2], [u64; 2]) {
        let elements = if self.half {
            let half = self.block / 2;
            let first = pair / half * self.block + pair % half;
            [first, first + half]
        } else {
            [2 * pair, 2 * pair + 1]
        };
        (elements, if self.full { elements } else { [pair; 2] })
    }
}

/// One of the three tensors.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Tensor {
    pub(super) present: bool,
    pub(super) heads: u64,
    /// `[batch, rows, heads, dim]`.
    pub(super) input: Layout<4>,
    /// `[batch, out_rows, heads, dim]`.
    pub(super) out: Layout<4>,
    pub(super) in_len: u64,
    pub(super) out_len: u64,
}

/// The plan behind the types.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub(super) dim: u64,
    pub(super) batch: u64,
    pub(super) rows: u64,
    pub(super) tensors: [Tensor; 3],
    pub(super) norm: CheckedNorm,
    pub(super) rope: Option<CheckedRope>,
    pub(super) table_len: u64,
    /// `[batch, rows]`.
    pub(super) positions: Layout<2>,
    pub(super) positions_len: u64,
    /// Elements in a wide read.
    vec: u32,
    /// Alignment of the writes that go with it.
    pub(super) out_align: [u32; 3],
    pub(super) access: Access,
    /// The layouts allow wide access.
    pub(super) wide: bool,
}

impl Plan {
    fn check_wide(&self) -> Result<()> {
        const NEED: &str = "wide access needs multiples of 16 bytes of input";
        let vec = u64::from(self.vec);
        if !self.dim.is_multiple_of(vec) {
            return Err(Error::Unsupported { arg: "dim", what: NEED });
        }
        if let Some(rope) = &self.rope {
            if (if rope.half { rope.block / 2 } else { rope.rotary_dim }) % vec != 0 {
                return Err(Error::Unsupported { arg: "rotary_dim", what: NEED });
            }
            let got = rope.table.strides()[0];
            if got % 4 != 0 {
                return Err(Error::Stride { arg: "cos", dim: 0, got, need: "wide access needs multiples of 16 bytes" });
            }
        }
        // As the launcher does: strides count even where a dimension has one element.
        let names = [["q", "q_out"], ["k", "k_cache"], ["v", "v_cache"]];
        for (tensor, names) in self.tensors.iter().zip(names).filter(|(tensor, _)| tensor.heads > 0) {
            for (arg, layout) in names.into_iter().zip([&tensor.input, &tensor.out]) {
                let strides = &layout.strides()[..3];
                if let Some(dim) = strides.iter().position(|stride| stride % vec as i64 != 0) {
                    return Err(Error::Stride { arg, dim, got: strides[dim], need: NEED });
                }
            }
        }
        Ok(())
    }

    /// For inputs and outputs of so many bytes an element.
    pub(super) fn traffic(&self, input: usize, outs: [usize; 3]) -> Traffic {
        let elements = |at: usize| self.batch * self.rows * self.tensors[at].heads * self.dim;
        let bytes = |at: usize, size: usize| elements(at).saturating_mul(size as u64);
        let sum = |sizes: [usize; 3]| [Q, K, V].iter().fold(0u64, |sum, &at| sum.saturating_add(bytes(at, sizes[at])));
        Traffic { read: sum([input; 3]), written: sum(outs) }
    }

    /// The kernel's cut of the work.
    pub(super) fn schedule(&self, wide: bool) -> PrepareSchedule {
        let vec = if wide { self.vec } else { 1 };
        let pairs = (self.dim / u64::from(vec)).div_ceil(2);
        // Chunks that rotate with another, and how.
        let together = match &self.rope {
            Some(rope) if rope.half => Together::Halves { rotary: rope.rotary_dim, block: rope.block },
            Some(rope) if vec == 1 => Together::Neighbours { rotary: rope.rotary_dim },
            _ => Together::None,
        };
        PrepareSchedule {
            vec,
            lanes: pairs.next_power_of_two().min(MOST_LANES) as u32,
            tokens: self.batch * self.rows,
            heads: [Q, K, V].map(|at| self.tensors[at].heads),
            dim: self.dim,
            together,
        }
    }
}

/// Which chunks must be in one thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Together {
    None,
    Neighbours { rotary: u64 },
    Halves { rotary: u64, block: u64 },
}

/// How the kernel cuts a preparation up. A row (one head of one token) is cut into chunks of `vec` elements, and these
/// go by pairs: such as rotate together, or any two. `lanes` threads share `heads_at_once` rows of one token and
/// tensor; a thread owns the pairs `lane`, `lane + lanes`, ... of them. The blocks of `q` come first, then those of `k`
/// and of `v`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PrepareSchedule {
    /// Elements in a chunk.
    pub vec: u32,
    /// Threads that share a row: a power of two up to 32.
    pub lanes: u32,
    /// Tokens of the whole batch.
    pub tokens: u64,
    /// Heads of `q`, `k` and `v`.
    pub heads: [u64; 3],
    /// Elements a row.
    pub dim: u64,
    together: Together,
}

/// A stretch of a row that a thread writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrepareCell {
    /// 0, 1, 2: of `q`, `k`, `v`.
    pub tensor: usize,
    /// Counted over the batch.
    pub token: u64,
    /// The head.
    pub head: u64,
    /// Elements of the row.
    pub elements: Range<u64>,
}

impl PrepareSchedule {
    /// Threads in a block.
    pub fn threads(&self) -> u32 {
        THREADS
    }

    /// Heads of a token that a thread takes together.
    pub fn heads_at_once(&self) -> u64 {
        if self.vec > 1 { 2 } else { 1 }
    }

    /// Pairs of chunks of a row that a thread owns at most.
    pub fn pairs(&self) -> u64 {
        if self.vec > 1 { 1 } else { 4 }
    }

    fn blocks(&self, tensor: usize) -> u64 {
        let groups = self.tokens * self.heads[tensor].div_ceil(self.heads_at_once());
        groups.div_ceil(u64::from(THREADS / self.lanes))
    }

    /// Blocks.
    pub fn grid(&self) -> u64 {
        (0..3).map(|tensor| self.blocks(tensor)).sum()
    }

    /// Where the chunks of a pair begin.
    fn pair(&self, index: u64) -> [Option<u64>; 2] {
        let vec = u64::from(self.vec);
        let rotary = match self.together {
            Together::None => 0,
            Together::Neighbours { rotary } | Together::Halves { rotary, .. } => rotary,
        };
        let together = rotary / (2 * vec);
        if index >= together {
            let (begin, others) = (2 * together, self.dim / vec - 2 * together);
            let (first, span) = (index - together, others.div_ceil(2));
            let there = |chunk: u64, end: u64| (chunk < end).then_some((begin + chunk) * vec);
            return if first < span { [there(first, span), there(first + span, others)] } else { [None; 2] };
        }
        match self.together {
            Together::Halves { block, .. } => {
                let half = block / 2;
                let first = index * vec / half * block + index * vec % half;
                [Some(first), Some(first + half)]
            }
            _ => [Some(2 * index), Some(2 * index + 1)],
        }
    }

    /// What one thread of one block writes.
    pub fn cells(&self, block: u64, thread: u32) -> Vec<PrepareCell> {
        let (mut block, mut tensor) = (block, 0);
        while tensor < 2 && block >= self.blocks(tensor) {
            block -= self.blocks(tensor);
            tensor += 1;
        }
        let groups = self.heads[tensor].div_ceil(self.heads_at_once());
        let item = block * u64::from(THREADS / self.lanes) + u64::from(thread / self.lanes);
        if item >= self.tokens * groups {
            return Vec::new();
        }
        let (token, group) = (item / groups, item % groups);
        let mut cells = Vec::new();
        for owned in 0..self.pairs() {
            let pair = self.pair(u64::from(thread % self.lanes) + owned * u64::from(self.lanes));
            for first in pair.into_iter().flatten() {
                for head in (group * self.heads_at_once()..).take(self.heads_at_once() as usize) {
                    if head < self.heads[tensor] {
                        cells.push(PrepareCell { tensor, token, head, elements: first..first + u64::from(self.vec) });
                    }
                }
            }
        }
        cells
    }
}
