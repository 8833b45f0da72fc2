//! Shapes, checks and the schedule. Pure.

use core::marker::PhantomData;
use core::ops::Range;

use super::RvqDecode;
use crate::device::{Arch, DeviceInfo};
use crate::dtype::{Code, Float};
use crate::error::{Error, Result};
use crate::layout::Layout;

const MOST_LEVELS: u64 = 65_536;
const MOST_ENTRIES: u64 = i32::MAX as u64;
const MOST_DIM: u64 = 1 << 20;
/// A grid has fewer than 2^31 blocks, and a block owns at least a row.
const MOST_ROWS: u64 = (1 << 31) - 1;
const THREADS: u32 = 256;

/// How the kernel reaches memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Access {
    /// Wide where layouts and addresses allow it, else narrow.
    #[default]
    Auto,
    /// One element at a time.
    Narrow,
    /// 16 bytes at a time; refused where layouts or addresses do not allow it.
    Wide,
}

/// Describes a decode; [`RvqDecodeBuilder::build`] makes the plan.
#[derive(Debug, Clone)]
pub struct RvqDecodeBuilder<C, E, O> {
    levels: u64,
    entries: u64,
    dim: u64,
    batch: u64,
    rows: u64,
    codes: Option<[i64; 3]>,
    codebooks: Option<[i64; 2]>,
    out: Option<[i64; 2]>,
    null_code: Option<i64>,
    access: Access,
    types: PhantomData<(C, E, O)>,
}

impl<C: Code, E: Float, O: Float> RvqDecodeBuilder<C, E, O> {
    pub(super) fn new(levels: usize, entries: usize, dim: usize) -> Self {
        RvqDecodeBuilder {
            levels: levels as u64,
            entries: entries as u64,
            dim: dim as u64,
            batch: 1,
            rows: 1,
            codes: None,
            codebooks: None,
            out: None,
            null_code: None,
            access: Access::Auto,
            types: PhantomData,
        }
    }

    /// Rows (tokens, frames) of each batch entry.
    pub fn rows(mut self, rows: usize) -> Self {
        self.rows = rows as u64;
        self
    }

    /// Batch entries; 1 if not given.
    pub fn batch(mut self, batch: usize) -> Self {
        self.batch = batch as u64;
        self
    }

    /// Strides of `codes` in elements, `[batch, level, row]`; contiguous `[batch, levels, rows]` if not given.
    pub fn codes_strides(mut self, strides: [i64; 3]) -> Self {
        self.codes = Some(strides);
        self
    }

    /// Codes lie as contiguous `[batch, rows, levels]` (RQ-VAE).
    pub fn codes_rows_first(self) -> Self {
        let (rows, levels) = (self.rows as i64, self.levels as i64);
        self.codes_strides([rows.saturating_mul(levels), 1, levels])
    }

    /// Strides of `codebooks` in elements, `[level, entry]`; contiguous `[levels, entries, dim]` if not given.
    pub fn codebooks_strides(mut self, strides: [i64; 2]) -> Self {
        self.codebooks = Some(strides);
        self
    }

    /// All levels use one contiguous codebook `[entries, dim]`.
    pub fn shared_codebook(self) -> Self {
        let dim = self.dim as i64;
        self.codebooks_strides([0, dim])
    }

    /// Strides of `out` in elements, `[batch, row]`; contiguous `[batch, rows, dim]` if not given.
    pub fn out_strides(mut self, strides: [i64; 2]) -> Self {
        self.out = Some(strides);
        self
    }

    /// A code that stands for "no code at this level" and adds nothing: -1 for levels dropped by quantizer dropout.
    pub fn null_code(mut self, code: i64) -> Self {
        self.null_code = Some(code);
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
    /// [`Error::Size`] for `levels` beyond 65536, `dim` beyond 2^20, `entries` beyond 2^31 - 1 or
    /// none, too many rows; [`Error::Stride`] for a
    /// negative stride, codebook entries 4 GiB or more apart, an output that overlaps itself, or wide access that the strides do not allow;
    /// [`Error::UnsupportedDevice`] below compute capability 8.0.
    pub fn build(self, device: &DeviceInfo) -> Result<RvqDecode<C, E, O>> {
        if device.arch < (Arch { major: 8, minor: 0 }) {
            return Err(Error::UnsupportedDevice { have: Some(device.arch), need: "sm_80 and newer" });
        }
        let size = |arg, got, min, max| {
            if (min..=max).contains(&got) { Ok(()) } else { Err(Error::Size { arg, got, min, max }) }
        };
        size("levels", self.levels, 0, MOST_LEVELS)?;
        size("dim", self.dim, 0, MOST_DIM)?;
        size("entries", self.entries, u64::from(self.levels > 0), MOST_ENTRIES)?;
        size("batch", self.batch, 0, i64::MAX as u64)?;
        size("rows", self.rows, 0, i64::MAX as u64)?;
        size("batch * rows", self.batch.saturating_mul(self.rows), 0, MOST_ROWS)?;

        let codes_shape = [self.batch, self.levels, self.rows];
        let codes = self.codes.map_or(Layout::contiguous(codes_shape), |s| Layout::strided(codes_shape, s));
        let books_shape = [self.levels, self.entries, self.dim];
        let codebooks = self
            .codebooks
            .map_or(Layout::contiguous(books_shape), |[level, entry]| Layout::strided(books_shape, [level, entry, 1]));
        let out_shape = [self.batch, self.rows, self.dim];
        let out =
            self.out.map_or(Layout::contiguous(out_shape), |[batch, row]| Layout::strided(out_shape, [batch, row, 1]));
        out.require_disjoint("out")?;
        let got = codebooks.strides()[1];
        if got > i64::from(u32::MAX) / size_of::<E>() as i64 {
            return Err(Error::Stride { arg: "codebooks", dim: 1, got, need: "entries must be less than 4 GiB apart" });
        }

        let mut plan = Plan {
            codes_len: codes.required_len("codes")?,
            codebooks_len: codebooks.required_len("codebooks")?,
            out_len: out.required_len("out")?,
            codes,
            codebooks,
            out,
            entries: self.entries,
            null_code: self.null_code,
            vec: (16 / size_of::<E>()) as u32,
            out_align: (16 / size_of::<E>() * size_of::<O>()).min(16) as u32,
            access: self.access,
            wide: false,
        };
        // A buffer that no index reaches needs no elements, so none may be asked of it.
        if plan.out_len == 0 {
            (plan.codes_len, plan.codebooks_len) = (0, 0);
        }
        plan.wide = match self.access {
            Access::Narrow => false,
            Access::Auto => plan.check_wide().is_ok(),
            Access::Wide => plan.check_wide().map(|()| true)?,
        };
        Ok(RvqDecode { inner: plan, types: PhantomData })
    }
}

/// The plan behind the types.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub(super) codes: Layout<3>,
    pub(super) codebooks: Layout<3>,
    pub(super) out: Layout<3>,
    pub(super) codes_len: u64,
    pub(super) codebooks_len: u64,
    pub(super) out_len: u64,
    pub(super) entries: u64,
    pub(super) null_code: Option<i64>,
    /// Elements in a wide read of a codebook.
    vec: u32,
    /// Alignment of the writes that go with it.
    pub(super) out_align: u32,
    pub(super) access: Access,
    /// The layouts allow wide access.
    pub(super) wide: bool,
}

impl Plan {
    pub(super) fn dim(&self) -> u64 {
        self.out.shape()[2]
    }

    fn check_wide(&self) -> Result<()> {
        const NEED: &str = "wide access needs multiples of 16 bytes of codebook";
        let vec = i64::from(self.vec);
        if self.dim() as i64 % vec != 0 {
            return Err(Error::Unsupported { arg: "dim", what: NEED });
        }
        // As the launcher does: strides count even where a dimension has one element.
        for (arg, layout) in [("codebooks", &self.codebooks), ("out", &self.out)] {
            for dim in 0..2 {
                let got = layout.strides()[dim];
                if got % vec != 0 {
                    return Err(Error::Stride { arg, dim, got, need: NEED });
                }
            }
        }
        Ok(())
    }

    /// The kernel's cut of the work.
    pub(super) fn schedule(&self, wide: bool) -> Schedule {
        let [batch, rows, dim] = self.out.shape();
        let vec = if wide { self.vec } else { 1 };
        // Enough threads for a row that each takes one chunk; beyond a block they take turns. (A warp a row, taking turns,
        // left a third of the GPU idle in the last wave of blocks.)
        let lanes = dim.div_ceil(u64::from(vec)).next_power_of_two().clamp(1, u64::from(THREADS)) as u32;
        Schedule { vec, lanes, rows: batch * rows, dim }
    }
}

/// How a kernel cuts a decode up: blocks of 256 threads, `lanes` threads a row, chunks of `vec` elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Schedule {
    /// Elements a thread takes at a time.
    pub vec: u32,
    /// Threads that share a row: a power of two up to 256.
    pub lanes: u32,
    /// Rows of the whole batch.
    pub rows: u64,
    /// Elements a row.
    pub dim: u64,
}

impl Schedule {
    /// Rows a block owns.
    pub fn rows_per_block(&self) -> u64 {
        u64::from(THREADS / self.lanes)
    }

    /// Blocks in the grid.
    pub fn blocks(&self) -> u64 {
        self.rows.div_ceil(self.rows_per_block())
    }

    /// What one thread of one block writes: its row (counted over the batch) and the elements of it, chunk by chunk.
    pub fn cells(&self, block: u64, thread: u32) -> impl Iterator<Item = (u64, Range<u64>)> {
        let row = block * self.rows_per_block() + u64::from(thread / self.lanes);
        let first = u64::from(thread % self.lanes) * u64::from(self.vec);
        let (vec, step) = (u64::from(self.vec), u64::from(self.vec) * u64::from(self.lanes));
        let dim = if row < self.rows { self.dim } else { 0 };
        (first..dim).step_by(step as usize).map(move |d| (row, d..d + vec))
    }

    /// Threads in a block.
    pub const fn threads(&self) -> u32 {
        THREADS
    }
}
