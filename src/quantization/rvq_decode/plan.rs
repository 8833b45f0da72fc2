//! Shapes, checks and the schedule. Pure.

use core::marker::PhantomData;
use core::ops::Range;

use super::RvqDecode;
use crate::device::{Arch, DeviceInfo};
use crate::dtype::{Code, Float};
use crate::error::{Error, Result};
use crate::layout::{Access, Layout};

const MOST_LEVELS: u64 = 65_536;
const MOST_ENTRIES: u64 = i32::MAX as u64;
const MOST_DIM: u64 = 1 << 20;
/// The kernels count rows in 32 bits.
const MOST_ROWS: u64 = (1 << 31) - 1;
/// Threads in a block of the kernel without tiles.
const ROWS_THREADS: u32 = 128;
/// Fewer warps than this on a multiprocessor hide less latency than the tiles' long stretches of loads gain.
const TILES_WARPS_PER_SM: u64 = 8;

/// Which kernel decodes. Both give the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Variant {
    /// The faster one for the shape and the device.
    #[default]
    Auto,
    /// A thread a chunk: any problem, and the fastest for few rows.
    Rows,
    /// A warp several rows: the fastest for many. Refused without levels, with a null code, with codebooks that span 2^32
    /// chunks or more, and for rows of less than 5 chunks (16 bytes of codebook each, or one element).
    Tiles,
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
    variant: Variant,
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
            variant: Variant::Auto,
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

    /// Forces the kernel.
    pub fn variant(mut self, variant: Variant) -> Self {
        self.variant = variant;
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
            variant: self.variant,
            wide: false,
            element: size_of::<E>() as u32,
            sm_count: device.sm_count.max(1) as u32,
            streams: false,
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
        if self.variant == Variant::Tiles {
            plan.check_tiles(plan.wide)?;
        }
        let traffic = plan.traffic(size_of::<C>(), size_of::<O>());
        plan.streams = traffic.codes.saturating_add(traffic.written) > device.l2_bytes.max(0) as u64;
        plan.fold_batch();
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
    variant: Variant,
    /// The layouts allow wide access.
    pub(super) wide: bool,
    /// Bytes of an element of the codebooks.
    element: u32,
    sm_count: u32,
    /// L2 does not hold the codes and the outputs.
    streams: bool,
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

    /// For codes and outputs of so many bytes.
    pub(super) fn traffic(&self, code: usize, out: usize) -> RvqDecodeTraffic {
        let [batch, levels, rows] = self.codes.shape();
        let bytes = |counts: &[u64]| counts.iter().fold(1u64, |product, &n| product.saturating_mul(n));
        if self.out_len == 0 {
            return RvqDecodeTraffic { codes: 0, gathered: 0, written: 0 };
        }
        RvqDecodeTraffic {
            codes: bytes(&[batch, rows, levels, code as u64]),
            gathered: bytes(&[batch, rows, levels, self.dim(), u64::from(self.element)]),
            written: bytes(&[batch, rows, self.dim(), out as u64]),
        }
    }

    /// Makes one batch entry of entries whose rows continue each other: a tile takes rows of one entry.
    fn fold_batch(&mut self) {
        let [batch, levels, rows] = self.codes.shape();
        let ([codes_batch, codes_level, codes_row], [out_batch, out_row, _]) =
            (self.codes.strides(), self.out.strides());
        let (codes_row, out_row) = if rows == 1 { (codes_batch, out_batch) } else { (codes_row, out_row) };
        let continues = |batch: i64, row: i64| row.checked_mul(rows as i64) == Some(batch);
        if batch > 1 && rows > 0 && continues(codes_batch, codes_row) && continues(out_batch, out_row) {
            self.codes = Layout::strided([1, levels, batch * rows], [0, codes_level, codes_row]);
            self.out = Layout::strided([1, batch * rows, self.dim()], [0, out_row, 1]);
        }
    }

    fn lanes(&self, vec: u32, most: u32) -> u32 {
        self.dim().div_ceil(u64::from(vec)).next_power_of_two().clamp(1, u64::from(most)) as u32
    }

    /// Whether the kernel for many rows can take this.
    fn check_tiles(&self, wide: bool) -> Result<()> {
        let refuse = |arg, what| Err(Error::Unsupported { arg, what });
        let vec = if wide { self.vec } else { 1 };
        if self.codes.shape()[1] == 0 {
            return refuse("levels", "tiles take one or more");
        }
        if self.null_code.is_some() {
            return refuse("null_code", "tiles take none");
        }
        if self.codebooks_len.div_ceil(u64::from(vec)) > u64::from(u32::MAX) {
            return refuse("codebooks", "tiles take codebooks that span less than 2^32 chunks");
        }
        if self.lanes(vec, 8) < 8 {
            return refuse("dim", "tiles take 5 or more chunks a row");
        }
        Ok(())
    }

    /// The kernel's cut of the work.
    pub(super) fn schedule(&self, wide: bool) -> Schedule {
        let [batch, rows, dim] = self.out.shape();
        let levels = self.codes.shape()[1];
        let vec = if wide { self.vec } else { 1 };
        let cut = |tiles| Schedule {
            tiles,
            vec,
            lanes: match (tiles, wide) {
                (false, _) => self.lanes(vec, ROWS_THREADS),
                (true, false) => self.lanes(vec, 32),
                // A line of 128 bytes: of the entries of so narrow a slice L1 keeps more. But each slice reads the codes,
                // and where they come from memory again, codebooks of 16 bits gain more from reading them half as often.
                (true, true) => self.lanes(vec, if self.element == 2 && self.streams { 16 } else { 8 }),
            },
            passes: match (tiles, wide && self.element == 4) {
                (false, _) => 1,
                (true, true) if levels == 8 || levels == 9 => 2,
                (true, _) => 4,
            },
            batch,
            rows,
            dim,
        };
        let tiles = match self.variant {
            Variant::Rows => false,
            // Narrow access after all may leave too many chunks.
            Variant::Tiles => self.check_tiles(wide).is_ok(),
            Variant::Auto => {
                let tiles = cut(true);
                self.check_tiles(wide).is_ok()
                    && tiles.warps() >= TILES_WARPS_PER_SM * u64::from(self.sm_count)
                    // The rest of a batch entry's last tile is work for nothing: no more than a quarter.
                    && 4 * rows >= 3 * rows.next_multiple_of(tiles.rows_per_warp())
            }
        };
        cut(tiles)
    }
}

/// The bytes that a decode must move, however it is cut up: each code once, a codebook row for each code, each output
/// once.
///
/// What a kernel moves is more by whole sectors of 32 bytes, by codes that several warps read, and by rows that fill
/// the last tile up; it is less where rows of one warp have a code in common. Saturates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RvqDecodeTraffic {
    /// Read from `codes`.
    pub codes: u64,
    /// Read from `codebooks` if no code is null.
    pub gathered: u64,
    /// Written to `out`.
    pub written: u64,
}

/// How a kernel cuts a decode up. A row is cut into chunks of `vec` elements. Without `tiles` a thread takes the chunks
/// `lane`, `lane + lanes`, ... of one row. With `tiles` a warp takes `passes * 32 / lanes` rows of one batch entry, one chunk
/// a lane and pass, and blocks along y take the next `lanes` chunks of all rows.
///
/// Batch entries whose rows continue each other, in codes and outputs, count as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Schedule {
    /// Which kernel.
    pub tiles: bool,
    /// Elements in a chunk.
    pub vec: u32,
    /// Threads that share a row: a power of two.
    pub lanes: u32,
    /// Rows that a thread takes.
    pub passes: u32,
    /// Batch entries.
    pub batch: u64,
    /// Rows of a batch entry.
    pub rows: u64,
    /// Elements a row.
    pub dim: u64,
}

impl Schedule {
    /// Threads in a block.
    pub fn threads(&self) -> u32 {
        match (self.tiles, self.passes) {
            (false, _) => ROWS_THREADS,
            (true, 2) => 128,
            (true, _) => 64,
        }
    }

    /// Rows that a warp takes, of one batch entry with `tiles`; fewer may be left for the last one.
    pub fn rows_per_warp(&self) -> u64 {
        u64::from(32 * self.passes / self.lanes).max(1)
    }

    /// Blocks along x and y.
    pub fn grid(&self) -> [u64; 2] {
        if self.tiles {
            let warps = self.batch * self.rows.div_ceil(self.rows_per_warp());
            let slices = self.dim.div_ceil(u64::from(self.vec * self.lanes));
            [warps.div_ceil(u64::from(self.threads() / 32)), slices]
        } else {
            [(self.batch * self.rows).div_ceil(u64::from(ROWS_THREADS / self.lanes)), 1]
        }
    }

    fn warps(&self) -> u64 {
        self.grid().iter().product::<u64>() * u64::from(self.threads() / 32)
    }

    /// What one thread of one block writes: rows (counted over the batch) and elements of them.
    pub fn cells(&self, block: [u64; 2], thread: u32) -> Vec<(u64, Range<u64>)> {
        let (vec, lanes, thread) = (u64::from(self.vec), u64::from(self.lanes), u64::from(thread));
        let chunk = |d: u64| d..d + vec;
        let mut cells = Vec::new();
        if self.tiles {
            let tile = block[0] * u64::from(self.threads() / 32) + thread / 32;
            let tiles = self.rows.div_ceil(self.rows_per_warp());
            let (batch, first, lane) = (tile / tiles, tile % tiles * self.rows_per_warp(), thread % 32);
            let d = (block[1] * lanes + lane % lanes) * vec;
            for pass in 0..u64::from(self.passes) {
                let row = first + pass * (32 / lanes) + lane / lanes;
                if batch < self.batch && row < self.rows && d < self.dim {
                    cells.push((batch * self.rows + row, chunk(d)));
                }
            }
        } else {
            let row = block[0] * (u64::from(ROWS_THREADS) / lanes) + thread / lanes;
            let first = thread % lanes * vec;
            if row < self.batch * self.rows {
                cells.extend((first..self.dim).step_by((vec * lanes) as usize).map(|d| (row, chunk(d))));
            }
        }
        cells
    }
}
