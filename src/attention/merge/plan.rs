//! Shapes, checks and the schedule. Pure.

use core::marker::PhantomData;
use core::ops::Range;

use super::{Merge, Traffic};
use crate::device::{Arch, DeviceInfo};
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::layout::{Access, Layout};

pub(super) const MOST_PARTS: u64 = 256;
const MOST_DIM: u64 = 1024;
/// The kernel counts rows of heads in 32 bits.
const MOST_ITEMS: u64 = (1 << 31) - 1;
/// Threads in a block.
const THREADS: u32 = 128;
/// A row is shared within a warp.
const MOST_LANES: u64 = 32;

/// Describes a merge; [`MergeBuilder::build`] makes the plan.
#[derive(Debug, Clone)]
pub struct MergeBuilder<P, O> {
    of_parts: u64,
    heads: u64,
    dim: u64,
    batch: u64,
    rows: u64,
    parts: Option<[i64; 4]>,
    lse: Option<[i64; 4]>,
    out: Option<[i64; 3]>,
    out_lse: Option<[i64; 3]>,
    accumulate: bool,
    access: Access,
    types: PhantomData<(P, O)>,
}

impl<P: Float, O: Float> MergeBuilder<P, O> {
    pub(super) fn new(parts: usize, heads: usize, dim: usize) -> Self {
        MergeBuilder {
            of_parts: parts as u64,
            heads: heads as u64,
            dim: dim as u64,
            batch: 1,
            rows: 1,
            parts: None,
            lse: None,
            out: None,
            out_lse: None,
            accumulate: false,
            access: Access::Auto,
            types: PhantomData,
        }
    }

    /// Rows (queries) of each batch entry; 1 if not given.
    pub fn rows(mut self, rows: usize) -> Self {
        self.rows = rows as u64;
        self
    }

    /// Batch entries; 1 if not given.
    pub fn batch(mut self, batch: usize) -> Self {
        self.batch = batch as u64;
        self
    }

    /// Strides of `parts` in elements, `[part, batch, row, head]`; contiguous `[parts, batch, rows, heads, dim]` if not
    /// given.
    pub fn parts_strides(mut self, strides: [i64; 4]) -> Self {
        self.parts = Some(strides);
        self
    }

    /// Strides of `lse` in elements, `[part, batch, head, row]`; contiguous `[parts, batch, heads, rows]` if not given.
    pub fn lse_strides(mut self, strides: [i64; 4]) -> Self {
        self.lse = Some(strides);
        self
    }

    /// Strides of `out` in elements, `[batch, row, head]`; contiguous `[batch, rows, heads, dim]` if not given.
    pub fn out_strides(mut self, strides: [i64; 3]) -> Self {
        self.out = Some(strides);
        self
    }

    /// Strides of `out_lse` in elements, `[batch, head, row]`; contiguous `[batch, heads, rows]` if not given.
    pub fn out_lse_strides(mut self, strides: [i64; 3]) -> Self {
        self.out_lse = Some(strides);
        self
    }

    /// `out` and `out_lse` are the part before part 0, and are written over.
    pub fn accumulate(mut self) -> Self {
        self.accumulate = true;
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
    /// [`Error::Size`] for `parts` outside 1 to 256, `dim` outside 1 to 1024, 2^31 or more rows over batch and heads;
    /// [`Error::Stride`] for a negative stride, an output that overlaps itself, or wide access that the strides do not
    /// allow; [`Error::Unsupported`] for wide access that `dim` does not allow; [`Error::UnsupportedDevice`] below
    /// compute capability 8.0.
    pub fn build(self, device: &DeviceInfo) -> Result<Merge<P, O>> {
        if device.arch < (Arch { major: 8, minor: 0 }) {
            return Err(Error::UnsupportedDevice { have: Some(device.arch), need: "sm_80 and newer" });
        }
        let size = |arg, got, min, max| {
            if (min..=max).contains(&got) { Ok(()) } else { Err(Error::Size { arg, got, min, max }) }
        };
        size("parts", self.of_parts, 1, MOST_PARTS)?;
        size("dim", self.dim, 1, MOST_DIM)?;
        size("heads", self.heads, 0, MOST_ITEMS)?;
        size("batch", self.batch, 0, i64::MAX as u64)?;
        size("rows", self.rows, 0, i64::MAX as u64)?;
        let items = self.batch.saturating_mul(self.rows).saturating_mul(self.heads);
        size("batch * rows * heads", items, 0, MOST_ITEMS)?;

        let Self { of_parts, batch, rows, heads, dim, .. } = self;
        let parts_shape = [of_parts, batch, rows, heads, dim];
        let parts = self.parts.map_or(Layout::contiguous(parts_shape), |[part, batch, row, head]| {
            Layout::strided(parts_shape, [part, batch, row, head, 1])
        });
        let lse_shape = [of_parts, batch, heads, rows];
        let lse = self.lse.map_or(Layout::contiguous(lse_shape), |s| Layout::strided(lse_shape, s));
        let out_shape = [batch, rows, heads, dim];
        let out = self.out.map_or(Layout::contiguous(out_shape), |[batch, row, head]| {
            Layout::strided(out_shape, [batch, row, head, 1])
        });
        let out_lse_shape = [batch, heads, rows];
        let out_lse = self.out_lse.map_or(Layout::contiguous(out_lse_shape), |s| Layout::strided(out_lse_shape, s));
        out.require_disjoint("out")?;
        out_lse.require_disjoint("out_lse")?;

        let vec = 16 / size_of::<P>();
        let mut plan = Plan {
            parts_len: parts.required_len("parts")?,
            lse_len: lse.required_len("lse")?,
            out_len: out.required_len("out")?,
            out_lse_len: out_lse.required_len("out_lse")?,
            parts,
            lse,
            out,
            out_lse,
            accumulate: self.accumulate,
            vec: vec as u32,
            out_align: (vec * size_of::<O>()).min(16) as u32,
            access: self.access,
            wide: false,
        };
        plan.wide = match self.access {
            Access::Narrow => false,
            Access::Auto => plan.check_wide().is_ok(),
            Access::Wide => plan.check_wide().map(|()| true)?,
        };
        Ok(Merge { inner: plan, types: PhantomData })
    }
}

/// The plan behind the types.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub(super) parts: Layout<5>,
    pub(super) lse: Layout<4>,
    pub(super) out: Layout<4>,
    pub(super) out_lse: Layout<3>,
    pub(super) parts_len: u64,
    pub(super) lse_len: u64,
    pub(super) out_len: u64,
    pub(super) out_lse_len: u64,
    pub(super) accumulate: bool,
    /// Elements in a wide read of a part.
    vec: u32,
    /// Alignment of the writes that go with it.
    pub(super) out_align: u32,
    pub(super) access: Access,
    /// The layouts allow wide access.
    pub(super) wide: bool,
}

impl Plan {
    fn check_wide(&self) -> Result<()> {
        const NEED: &str = "wide access needs multiples of 16 bytes of parts";
        let vec = i64::from(self.vec);
        if self.parts.shape()[4] as i64 % vec != 0 {
            return Err(Error::Unsupported { arg: "dim", what: NEED });
        }
        // As the launcher does: strides count even where a dimension has one element.
        let [parts, out] = [&self.parts.strides()[..4], &self.out.strides()[..3]];
        for (arg, strides) in [("parts", parts), ("out", out)] {
            if let Some(dim) = strides.iter().position(|stride| stride % vec != 0) {
                return Err(Error::Stride { arg, dim, got: strides[dim], need: NEED });
            }
        }
        Ok(())
    }

    /// For parts and outputs of so many bytes an element.
    pub(super) fn traffic(&self, part: usize, out: usize) -> Traffic {
        let [of_parts, batch, rows, heads, dim] = self.parts.shape();
        let items = batch * rows * heads;
        let row = |bytes: usize| dim * bytes as u64 + size_of::<f32>() as u64;
        let old = if self.accumulate { row(out) } else { 0 };
        Traffic { read: items.saturating_mul(of_parts * row(part) + old), written: items.saturating_mul(row(out)) }
    }

    /// The kernel's cut of the work.
    pub(super) fn schedule(&self, wide: bool) -> MergeSchedule {
        let [batch, rows, heads, dim] = self.out.shape();
        let vec = if wide { self.vec } else { 1 };
        let lanes = dim.div_ceil(u64::from(vec)).next_power_of_two().min(MOST_LANES) as u32;
        MergeSchedule { vec, lanes, items: batch * rows * heads, dim }
    }
}

/// How the kernel cuts a merge up. An item is one head of one row of one batch entry, heads innermost. It is cut into
/// chunks of `vec` elements; a thread takes the chunks `lane`, `lane + lanes`, ... of one item, and lane 0 its
/// `out_lse`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MergeSchedule {
    /// Elements in a chunk.
    pub vec: u32,
    /// Threads that share an item: a power of two up to 32.
    pub lanes: u32,
    /// Items of the whole batch.
    pub items: u64,
    /// Elements an item.
    pub dim: u64,
}

impl MergeSchedule {
    /// Threads in a block.
    pub fn threads(&self) -> u32 {
        THREADS
    }

    /// Blocks.
    pub fn grid(&self) -> u64 {
        self.items.div_ceil(u64::from(THREADS / self.lanes))
    }

    /// What one thread of one block writes: an item and elements of it.
    pub fn cells(&self, block: u64, thread: u32) -> Vec<(u64, Range<u64>)> {
        let item = block * u64::from(THREADS / self.lanes) + u64::from(thread / self.lanes);
        let (vec, lanes) = (u64::from(self.vec), u64::from(self.lanes));
        let first = u64::from(thread) % lanes * vec;
        let chunks = (first..self.dim).step_by((vec * lanes) as usize).map(|d| (item, d..d + vec));
        if item < self.items { chunks.collect() } else { Vec::new() }
    }
}
