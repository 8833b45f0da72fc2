//! Shapes, checks and the schedule. Pure.

use core::marker::PhantomData;

use super::{Compact, RopePairs, Turn};
use crate::compression::Traffic;
use crate::device::{Arch, DeviceInfo};
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::layout::{Access, Layout};

pub(super) const K: usize = 0;
pub(super) const V: usize = 1;
pub(super) const MOST_DIM: u64 = 1024;
const MOST_ROWS: u64 = i32::MAX as u64;
const MOST_SLICES: u64 = 64;
const MOST_LANES: u64 = 32;
/// Bytes of a row that a slice has at least.
const LEAST_SLICE: u64 = 64;
/// Threads of a block, and rows that each has on the way.
const THREADS: u64 = 256;

/// Describes a compaction; [`CompactBuilder::build`] makes the plan.
#[derive(Debug, Clone)]
pub struct CompactBuilder<I, O> {
    sets: u64,
    heads: u64,
    tokens: u64,
    kept: u64,
    dims: [Option<u64>; 2],
    input: [Option<[i64; 3]>; 2],
    out: [Option<[i64; 3]>; 2],
    indices: Option<[i64; 2]>,
    counts: Option<[i64; 2]>,
    values: Option<[i64; 3]>,
    values_out: Option<[i64; 3]>,
    input_pages: Option<[u64; 2]>,
    out_pages: Option<[u64; 2]>,
    first_position: Option<i64>,
    turn: Option<Turn>,
    in_place: bool,
    access: Access,
    types: PhantomData<(I, O)>,
}

impl<I: Element, O: Element> CompactBuilder<I, O> {
    pub(super) fn new([sets, heads, tokens, kept]: [usize; 4]) -> Self {
        CompactBuilder {
            sets: sets as u64,
            heads: heads as u64,
            tokens: tokens as u64,
            kept: kept as u64,
            dims: [None; 2],
            input: [None; 2],
            out: [None; 2],
            indices: None,
            counts: None,
            values: None,
            values_out: None,
            input_pages: None,
            out_pages: None,
            first_position: None,
            turn: None,
            in_place: false,
            access: Access::Auto,
            types: PhantomData,
        }
    }

    /// Another number of sets.
    pub(in crate::compression) fn sets(mut self, sets: usize) -> Self {
        self.sets = sets as u64;
        self
    }

    /// There are keys of `dim` elements.
    pub fn k(mut self, dim: usize) -> Self {
        self.dims[K] = Some(dim as u64);
        self
    }

    /// There are values of `dim` elements.
    pub fn v(mut self, dim: usize) -> Self {
        self.dims[V] = Some(dim as u64);
        self
    }

    /// Strides of `k` in elements, `[set, row, head]`; contiguous `[sets, rows, heads, dim]` if not given.
    pub fn k_strides(mut self, strides: [i64; 3]) -> Self {
        self.input[K] = Some(strides);
        self
    }

    /// Strides of `v` in elements, `[set, row, head]`; contiguous if not given.
    pub fn v_strides(mut self, strides: [i64; 3]) -> Self {
        self.input[V] = Some(strides);
        self
    }

    /// Strides of `k_out` in elements, `[set, row, head]`; contiguous if not given.
    pub fn k_out_strides(mut self, strides: [i64; 3]) -> Self {
        self.out[K] = Some(strides);
        self
    }

    /// Strides of `v_out` in elements, `[set, row, head]`; contiguous if not given.
    pub fn v_out_strides(mut self, strides: [i64; 3]) -> Self {
        self.out[V] = Some(strides);
        self
    }

    /// Strides of `indices` in elements, `[set, head]`; contiguous `[sets, heads, kept]` if not given. 0 where lists are
    /// shared: `[kept, 0]` by the heads of a set, `[0, 0]` by all.
    pub fn indices_strides(mut self, strides: [i64; 2]) -> Self {
        self.indices = Some(strides);
        self
    }

    /// Strides of `counts` in elements, `[set, head]`; contiguous `[sets, heads]` if not given.
    pub fn counts_strides(mut self, strides: [i64; 2]) -> Self {
        self.counts = Some(strides);
        self
    }

    /// Strides of `positions` and `extras` in elements, `[set, head, row]`; contiguous `[sets, heads, rows]` if not given.
    pub fn values_strides(mut self, strides: [i64; 3]) -> Self {
        self.values = Some(strides);
        self
    }

    /// Strides of `positions_out` and `extras_out` in elements, `[set, head, row]`; contiguous if not given.
    pub fn values_out_strides(mut self, strides: [i64; 3]) -> Self {
        self.values_out = Some(strides);
        self
    }

    /// The rows of the inputs lie in pages: row `r` of a set at place `input_pages[set, r / page_rows] * page_rows + r %
    /// page_rows`, of `pages` pages that there are. In place these are the pages of the outputs too, if there are no others.
    pub fn input_pages(mut self, page_rows: usize, pages: usize) -> Self {
        self.input_pages = Some([page_rows as u64, pages as u64]);
        self
    }

    /// The rows of the outputs lie in pages, of as many rows as those of the inputs if both have pages. Sets may share a pool of
    /// pages, at a stride of 0; no page may then be in two tables. In place the pages are other ones of the same pool: what is kept
    /// of rows that someone else needs yet.
    pub fn out_pages(mut self, page_rows: usize, pages: usize) -> Self {
        self.out_pages = Some([page_rows as u64, pages as u64]);
        self
    }

    /// Kept row `r` gets position `first + r`, as in StreamingLLM, where it would else keep its own.
    pub fn renumber(mut self, first: u32) -> Self {
        self.first_position = Some(first.into());
        self
    }

    /// Keys hold their rotary embedding, and are turned to their new positions: after [`CompactBuilder::renumber`].
    pub fn turn(mut self, turn: Turn) -> Self {
        self.turn = Some(turn);
        self
    }

    /// Rows move within the outputs: there are no inputs, and `I` is `O`.
    pub fn in_place(mut self) -> Self {
        self.in_place = true;
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
    /// [`Error::Size`] for `dim` outside 1 to 1024, 2^31 rows or more in `sets * heads`, `heads * kept` or `tokens`, more kept
    /// than tokens, pages of no rows, or an empty table; [`Error::Stride`] for a negative stride, rows of an output that overlap,
    /// or wide access that the strides do not allow; [`Error::Unsupported`] for neither keys nor values, two dtypes of which
    /// one is no float, two dtypes in place, pages of different sizes or in place of another pool, a rotation without new positions or
    /// keys, of more than `dim` elements or an odd number, or wide access that sizes do not allow;
    /// [`Error::UnsupportedDevice`] below compute capability 8.0.
    pub fn build(self, device: &DeviceInfo) -> Result<Compact<I, O>> {
        if device.arch < (Arch { major: 8, minor: 0 }) {
            return Err(Error::UnsupportedDevice { have: Some(device.arch), need: "sm_80 and newer" });
        }
        let size = |arg, got, min, max| {
            if (min..=max).contains(&got) { Ok(()) } else { Err(Error::Size { arg, got, min, max }) }
        };
        let unsupported = |arg, what| Err(Error::Unsupported { arg, what });
        let Self { sets, heads, tokens, kept, in_place, .. } = self;
        size("tokens", tokens, 0, MOST_ROWS)?;
        size("kept", kept, 0, tokens)?;
        size("sets", sets, 0, MOST_ROWS)?;
        size("heads", heads, 0, MOST_ROWS)?;
        size("sets * heads", sets * heads, 0, MOST_ROWS)?;
        size("heads * kept", heads * kept, 0, MOST_ROWS)?;
        let same = I::DTYPE == O::DTYPE;
        if !(same || is_float(I::DTYPE) && is_float(O::DTYPE)) {
            return unsupported("dtypes", "equal ones, or f32, f16 and bf16");
        }
        if in_place && !same {
            return unsupported("in_place", "one dtype");
        }
        if self.dims == [None; 2] {
            return unsupported("k", "keys, values or both");
        }

        let pages_of = |arg, pages: Option<[u64; 2]>| match pages {
            Some([page_rows, pages]) => {
                size(arg, page_rows, 1, MOST_ROWS)?;
                size(arg, page_rows.saturating_mul(pages), 0, i64::MAX as u64)
            }
            None => Ok(()),
        };
        pages_of("input_pages", self.input_pages)?;
        pages_of("out_pages", self.out_pages)?;
        if in_place && self.out_pages.is_some() && self.out_pages != self.input_pages {
            return unsupported("out_pages", "in place pages of the pool that input_pages are of");
        }
        if let (Some([a, _]), Some([b, _])) = (self.input_pages, self.out_pages)
            && a != b
        {
            return unsupported("out_pages", "pages of one size");
        }
        let places = |pages: Option<[u64; 2]>, rows: u64| pages.map_or(rows, |[page_rows, pages]| page_rows * pages);
        let input_rows = places(self.input_pages, tokens);
        let out_rows = if in_place { input_rows } else { places(self.out_pages, kept) };
        let page_rows = self.input_pages.or(self.out_pages).map_or(0, |[page_rows, _]| page_rows);

        let pooled = if in_place { self.input_pages.is_some() } else { self.out_pages.is_some() };
        let mut tensors = [const { Tensor::NONE }; 2];
        let names = [["k", "k_out"], ["v", "v_out"]];
        for (at, tensor) in tensors.iter_mut().enumerate() {
            let Some(dim) = self.dims[at] else { continue };
            size(if at == K { "k" } else { "v" }, dim, 1, MOST_DIM)?;
            let layout = |rows, strides: Option<[i64; 3]>| {
                let shape = [sets, rows, heads, dim];
                strides
                    .map_or(Layout::contiguous(shape), |[set, row, head]| Layout::strided(shape, [set, row, head, 1]))
            };
            let (input, out) = (layout(input_rows, self.input[at]), layout(out_rows, self.out[at]));
            // The sets of a pool of pages lie among each other: that tables name no page twice is the caller's word.
            Layout::strided([if pooled { 1 } else { sets }, out_rows, heads, dim], out.strides())
                .require_disjoint(names[at][1])?;
            *tensor = Tensor {
                dim,
                input_len: if in_place { 0 } else { input.required_len(names[at][0])? },
                out_len: out.required_len(names[at][1])?,
                input: if in_place { out } else { input },
                out,
            };
        }
        let values_layout = |rows, strides: Option<[i64; 3]>| {
            strides.map_or(Layout::contiguous([sets, heads, rows]), |s| Layout::strided([sets, heads, rows], s))
        };
        let values_out = values_layout(out_rows, self.values_out);
        Layout::strided([if pooled { 1 } else { sets }, heads, out_rows], values_out.strides())
            .require_disjoint("positions_out")?;
        let values = if in_place { values_out } else { values_layout(input_rows, self.values) };
        let indices_shape = [sets, heads, kept];
        let indices = self
            .indices
            .map_or(Layout::contiguous(indices_shape), |[set, head]| Layout::strided(indices_shape, [set, head, 1]));
        let counts =
            self.counts.map_or(Layout::contiguous([sets, heads]), |strides| Layout::strided([sets, heads], strides));

        if let Some(turn) = &self.turn {
            let Some(dim) = self.dims[K] else { return unsupported("turn", "there are no keys") };
            if self.first_position.is_none() {
                return unsupported("turn", "to new positions: renumber");
            }
            if !is_float(I::DTYPE) {
                return unsupported("turn", "f32, f16 or bf16");
            }
            size("table_rows", turn.table_rows as u64, 1, MOST_ROWS)?;
            size("rotary_dim", turn.rotary_dim as u64, 2, dim)?;
            if !turn.rotary_dim.is_multiple_of(2) {
                return unsupported("rotary_dim", "pairs of elements");
            }
            // Elements that are not turned move in pairs too.
            if !tensors.iter().all(|tensor| tensor.dim.is_multiple_of(2)) {
                return unsupported("dim", "pairs of elements where keys are turned");
            }
        }
        let rotary_dim = self.turn.map_or(0, |turn| turn.rotary_dim as u64);
        let table_shape = [self.turn.map_or(0, |turn| turn.table_rows as u64), rotary_dim / 2];
        let table = match self.turn.and_then(|turn| turn.table_stride) {
            Some(stride) => Layout::strided(table_shape, [stride, 1]),
            None => Layout::contiguous(table_shape),
        };

        let mut plan = Plan {
            sets,
            heads,
            tokens,
            kept,
            input_rows,
            out_rows,
            page_rows,
            values_len: values.required_len("positions")?,
            values_out_len: values_out.required_len("positions_out")?,
            indices_len: indices.required_len("indices")?,
            counts_len: counts.required_len("counts")?,
            table_len: table.required_len("cos")?,
            input_pages: self.input_pages.map_or(0, |[rows, _]| sets * tokens.div_ceil(rows)),
            out_pages: self.out_pages.map_or(0, |[rows, _]| sets * kept.div_ceil(rows)),
            paged: [self.input_pages.is_some(), self.out_pages.is_some()],
            tensors,
            values,
            values_out,
            indices,
            counts,
            table,
            renumber: self.first_position,
            pairs: self.turn.map_or(RopePairs::Interleaved, |turn| turn.pairs),
            rotary_dim,
            in_place,
            copies: same && rotary_dim == 0,
            element: [size_of::<I>() as u64, size_of::<O>() as u64],
            access: self.access,
            unit: 0,
            sm_count: device.sm_count.max(1) as u64,
        };
        plan.unit = plan.widest_unit();
        match self.access {
            Access::Narrow => plan.unit = plan.narrow_unit(),
            Access::Wide if plan.unit < plan.wide_unit() => return Err(plan.why_not_wide()),
            _ => {}
        }
        Ok(Compact { inner: plan, types: PhantomData })
    }
}

pub(super) fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

/// K or V; `dim` 0: there is none.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Tensor {
    pub(super) dim: u64,
    pub(super) input: Layout<4>,
    pub(super) out: Layout<4>,
    pub(super) input_len: u64,
    pub(super) out_len: u64,
}

impl Tensor {
    const NONE: Tensor = Tensor { dim: 0, input: Layout::empty(), out: Layout::empty(), input_len: 0, out_len: 0 };
}

/// The plan behind the types.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub(super) sets: u64,
    pub(super) heads: u64,
    pub(super) tokens: u64,
    pub(super) kept: u64,
    pub(super) input_rows: u64,
    pub(super) out_rows: u64,
    /// 0: none.
    pub(super) page_rows: u64,
    pub(super) tensors: [Tensor; 2],
    /// `[sets, heads, rows]`
    pub(super) values: Layout<3>,
    pub(super) values_out: Layout<3>,
    pub(super) values_len: u64,
    pub(super) values_out_len: u64,
    pub(super) indices: Layout<3>,
    pub(super) indices_len: u64,
    pub(super) counts: Layout<2>,
    pub(super) counts_len: u64,
    /// Words of page tables; 0: none.
    pub(super) input_pages: u64,
    pub(super) out_pages: u64,
    /// Whether there are page tables, of the inputs and the outputs.
    pub(super) paged: [bool; 2],
    pub(super) table: Layout<2>,
    pub(super) table_len: u64,
    pub(super) renumber: Option<i64>,
    pub(super) pairs: RopePairs,
    pub(super) rotary_dim: u64,
    pub(super) in_place: bool,
    /// Bytes move as they are.
    pub(super) copies: bool,
    /// Bytes of an element, of the inputs and the outputs.
    pub(super) element: [u64; 2],
    pub(super) access: Access,
    /// Bytes where bytes move as they are, else elements.
    pub(super) unit: u64,
    sm_count: u64,
}

impl Plan {
    pub(super) fn narrow_unit(&self) -> u64 {
        match (self.copies, self.rotary_dim > 0) {
            (true, _) => self.element[0],
            (false, true) => 2,
            (false, false) => 1,
        }
    }

    fn wide_unit(&self) -> u64 {
        if self.copies { 16 } else { 8 }
    }

    /// Bytes that addresses of inputs and outputs are multiples of for a unit.
    pub(super) fn align(&self, unit: u64) -> [u64; 2] {
        self.element.map(|element| match (self.copies, unit) {
            (true, _) => unit,
            (false, 8) => 16,
            _ => element,
        })
    }

    /// Whether sizes and strides allow a unit, or what does not.
    fn allows(&self, unit: u64) -> Result<()> {
        const NEED: &str = "wide access needs multiples of 16 bytes, or of 8 elements where they are converted";
        let [input, out] = self.align(unit);
        for (tensor, names) in self.tensors.iter().zip([["k", "k_out"], ["v", "v_out"]]) {
            if tensor.dim == 0 {
                continue;
            }
            let width = if self.copies { tensor.dim * self.element[0] } else { tensor.dim };
            if width % unit != 0 {
                return Err(Error::Unsupported { arg: "dim", what: NEED });
            }
            for ((layout, arg), (align, element)) in
                [&tensor.input, &tensor.out].into_iter().zip(names).zip([input, out].into_iter().zip(self.element))
            {
                let bad =
                    layout.strides()[..3].iter().position(|&stride| !(stride as u64 * element).is_multiple_of(align));
                if let Some(dim) = bad {
                    return Err(Error::Stride { arg, dim, got: layout.strides()[dim], need: NEED });
                }
            }
        }
        if !self.rotary_dim.is_multiple_of(unit) && !self.copies {
            return Err(Error::Unsupported { arg: "rotary_dim", what: NEED });
        }
        if self.rotary_dim > 0 && unit == 8 && self.table.strides()[0] % 4 != 0 {
            return Err(Error::Stride { arg: "cos", dim: 0, got: self.table.strides()[0], need: NEED });
        }
        Ok(())
    }

    fn widest_unit(&self) -> u64 {
        let candidates: &[u64] = match (self.copies, self.rotary_dim > 0) {
            (true, _) => &[16, 8, 4, 2, 1],
            // Two elements, for what is converted and not turned, only if one does not do.
            (false, true) => &[8, 2],
            (false, false) => &[8, 2, 1],
        };
        let fits = candidates.iter().copied().find(|&unit| self.allows(unit).is_ok());
        fits.unwrap_or(self.narrow_unit()).max(self.narrow_unit())
    }

    fn why_not_wide(&self) -> Error {
        self.allows(self.wide_unit()).expect_err("the widest unit is not wide")
    }

    /// Units of a row of K and of V.
    pub(super) fn units(&self, unit: u64) -> [u64; 2] {
        [K, V].map(|at| self.tensors[at].dim * if self.copies { self.element[0] } else { 1 } / unit)
    }

    pub(super) fn schedule(&self, unit: u64) -> CompactSchedule {
        let units = self.units(unit);
        let most = units[K].max(units[V]).max(1);
        let mut slices = 1;
        if self.in_place {
            slices = most.div_ceil(MOST_LANES);
            let blocks = self.sets * self.heads * self.tensors.iter().filter(|tensor| tensor.dim > 0).count() as u64;
            let bytes = unit * if self.copies { 1 } else { self.element[0] };
            while slices * 2 <= MOST_SLICES
                && blocks * slices < 2 * self.sm_count
                && most.div_ceil(slices * 2) * bytes >= LEAST_SLICE
            {
                slices *= 2;
            }
        }
        let lanes = most.div_ceil(slices).next_power_of_two().min(MOST_LANES);
        CompactSchedule {
            unit,
            lanes: lanes as u32,
            slices: slices as u32,
            rows_at_once: (THREADS / lanes * if self.copies { 4 } else { 2 }) as u32,
        }
    }

    /// With all rows kept that there is place for.
    pub(super) fn traffic(&self) -> Traffic {
        let rows = self.sets.saturating_mul(self.heads).saturating_mul(self.kept);
        let dims = self.tensors[K].dim + self.tensors[V].dim;
        Traffic {
            read: rows.saturating_mul(dims * self.element[0]),
            written: rows.saturating_mul(dims * self.element[1]),
        }
    }
}

/// How the kernel cuts a compaction up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CompactSchedule {
    /// Bytes that a thread moves at once, or elements where they are converted or turned.
    pub unit: u64,
    /// Threads that share a row.
    pub lanes: u32,
    /// In place: blocks that share the rows of a head, each with some of their units.
    pub slices: u32,
    /// Rows of a block between two barriers.
    pub rows_at_once: u32,
}
