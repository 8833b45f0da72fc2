//! Shapes, checks and the schedule. Pure.

use core::marker::PhantomData;
use core::ops::Range;

use super::RvqEncode;
use crate::device::{Arch, DeviceInfo};
use crate::dtype::{Code, Float};
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::quantization::codebook::{Codebook, Geometry};

const MOST_LEVELS: u64 = 32;
const MOST_LATENT: u64 = 1024;
/// Of rows that are projected.
const MOST_PROJECTED_DIM: u64 = 32;
/// The kernels count rows in 32 bits.
const MOST_ROWS: u64 = (1 << 31) - 64;
/// Above it wgmma's residuals do not fit.
const MOST_HOPPER_DIM: u64 = 256;
/// Rows up to which the kernel for few is the fastest.
const STREAM_ROWS: u64 = 64;

/// Which kernel encodes. All give the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum EncodeVariant {
    /// The fastest for the shape and the device.
    #[default]
    Auto,
    /// Tensor cores through `mma.sync`: any device.
    Portable,
    /// Tensor cores through `wgmma`: compute capability 9.0, up to 256 dimensions.
    Hopper,
    /// For few rows, one cluster of blocks for each one to eight: compute capability 9.0.
    Stream,
}

/// Describes an encode; [`RvqEncodeBuilder::build`] makes the plan.
#[derive(Debug, Clone)]
pub struct RvqEncodeBuilder<X, C> {
    codebook: Codebook,
    levels: u64,
    batch: u64,
    rows: u64,
    latent: u64,
    input: Option<[i64; 3]>,
    codes: Option<[i64; 3]>,
    quantized: Option<[i64; 3]>,
    residual: Option<[i64; 3]>,
    distances: Option<[i64; 3]>,
    variant: EncodeVariant,
    types: PhantomData<(X, C)>,
}

impl<X: Float, C: Code> RvqEncodeBuilder<X, C> {
    pub(super) fn new(codebook: &Codebook) -> Self {
        RvqEncodeBuilder {
            codebook: codebook.clone(),
            levels: codebook.geometry.levels,
            batch: 1,
            rows: 1,
            latent: 0,
            input: None,
            codes: None,
            quantized: None,
            residual: None,
            distances: None,
            variant: EncodeVariant::Auto,
            types: PhantomData,
        }
    }

    /// Levels to encode: the first ones of the codebook, or any number if it has one, which all share (RQ-VAE). As many as
    /// the codebook has if not given.
    pub fn levels(mut self, levels: usize) -> Self {
        self.levels = levels as u64;
        self
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

    /// Rows have `latent` elements, and each level projects them to and from the codebook's dimensions (DAC).
    pub fn projected(mut self, latent: usize) -> Self {
        self.latent = latent as u64;
        self
    }

    /// Strides of `input` in elements, `[batch, row, dim]`; contiguous if not given.
    pub fn input_strides(mut self, strides: [i64; 3]) -> Self {
        self.input = Some(strides);
        self
    }

    /// `input`, `quantized` and `residual` lie as contiguous `[batch, dim, rows]` (audio, images).
    pub fn channels_first(self) -> Self {
        let (rows, width) =
            (self.rows as i64, if self.latent > 0 { self.latent } else { self.codebook.geometry.dim } as i64);
        let strides = [rows.saturating_mul(width), 1, rows];
        self.input_strides(strides).quantized_strides(strides).residual_strides(strides)
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

    /// Strides of `quantized` in elements, `[batch, row, dim]`; contiguous if not given.
    pub fn quantized_strides(mut self, strides: [i64; 3]) -> Self {
        self.quantized = Some(strides);
        self
    }

    /// Strides of `residual` in elements, `[batch, row, dim]`; contiguous if not given.
    pub fn residual_strides(mut self, strides: [i64; 3]) -> Self {
        self.residual = Some(strides);
        self
    }

    /// Strides of `distances` in elements, `[batch, level, row]`; contiguous if not given.
    pub fn distances_strides(mut self, strides: [i64; 3]) -> Self {
        self.distances = Some(strides);
        self
    }

    /// Forces the kernel.
    pub fn variant(mut self, variant: EncodeVariant) -> Self {
        self.variant = variant;
        self
    }

    /// Checks the description.
    ///
    /// # Errors
    /// [`Error::Size`] for no levels, more than 32 or more than the codebook has, for entries beyond what `C` can hold, a
    /// latent beyond 1024 or for more than 32 dimensions, too many rows; [`Error::Stride`] for a negative stride or an output
    /// that overlaps itself; [`Error::Unsupported`] for a kernel that does not take this; [`Error::UnsupportedDevice`] below
    /// compute capability 8.0.
    pub fn build(self, device: &DeviceInfo) -> Result<RvqEncode<X, C>> {
        if device.arch < (Arch { major: 8, minor: 0 }) {
            return Err(Error::UnsupportedDevice { have: Some(device.arch), need: "sm_80 and newer" });
        }
        let g = self.codebook.geometry;
        let size = |arg, got, min, max| {
            if (min..=max).contains(&got) { Ok(()) } else { Err(Error::Size { arg, got, min, max }) }
        };
        size("levels", self.levels, 1, if g.levels == 1 { MOST_LEVELS } else { g.levels.min(MOST_LEVELS) })?;
        if C::from_i64(g.entries as i64 - 1).is_none() {
            return Err(Error::Size { arg: "entries", got: g.entries, min: 1, max: 1 << 16 });
        }
        size("batch", self.batch, 0, i64::MAX as u64)?;
        size("rows", self.rows, 0, i64::MAX as u64)?;
        size("batch * rows", self.batch.saturating_mul(self.rows), 0, MOST_ROWS)?;
        size("latent", self.latent, 0, MOST_LATENT)?;
        if self.latent > 0 {
            size("dim", g.dim, 1, MOST_PROJECTED_DIM)?;
        }
        let width = if self.latent > 0 { self.latent } else { g.dim };
        let layout = |shape, strides: Option<_>| {
            strides.map_or(Layout::contiguous(shape), |strides| Layout::strided(shape, strides))
        };
        let vectors = [self.batch, self.rows, width];
        let per_code = [self.batch, self.levels, self.rows];
        let mut plan = Plan {
            lens: Lens::default(),
            geometry: g,
            levels: self.levels,
            latent: self.latent,
            input: layout(vectors, self.input),
            codes: layout(per_code, self.codes),
            quantized: layout(vectors, self.quantized),
            residual: layout(vectors, self.residual),
            distances: layout(per_code, self.distances),
            schedule: EncodeSchedule {
                kernel: EncodeKernel::Portable,
                tile_rows: 0,
                stages: 0,
                splits: 1,
                sharers: 1,
                rows: 0,
            },
        };
        plan.codes.require_disjoint("codes")?;
        plan.quantized.require_disjoint("quantized")?;
        plan.residual.require_disjoint("residual")?;
        plan.distances.require_disjoint("distances")?;
        plan.lens = Lens {
            input: plan.input.required_len("input")?,
            codes: plan.codes.required_len("codes")?,
            quantized: plan.quantized.required_len("quantized")?,
            residual: plan.residual.required_len("residual")?,
            distances: plan.distances.required_len("distances")?,
        };
        plan.schedule = plan.schedule_for(device, self.variant)?;
        Ok(RvqEncode { inner: plan, types: PhantomData })
    }
}

/// Elements that the operands need.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct Lens {
    pub(super) input: u64,
    pub(super) codes: u64,
    pub(super) quantized: u64,
    pub(super) residual: u64,
    pub(super) distances: u64,
}

/// The plan behind the types.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub(super) lens: Lens,
    pub(super) geometry: Geometry,
    pub(super) levels: u64,
    pub(super) latent: u64,
    pub(super) input: Layout<3>,
    pub(super) codes: Layout<3>,
    pub(super) quantized: Layout<3>,
    pub(super) residual: Layout<3>,
    pub(super) distances: Layout<3>,
    pub(super) schedule: EncodeSchedule,
}

impl Plan {
    /// The codebook of a level.
    pub(super) fn book(&self, level: u64) -> u64 {
        if self.geometry.levels == 1 { 0 } else { level }
    }

    fn rows(&self) -> u64 {
        self.input.shape()[0] * self.input.shape()[1]
    }

    /// Bytes of a piece of the operand that is streamed at once: 4, 3 or 2 steps of 16, whichever divides a tile evenly.
    fn stage_bytes(&self) -> u64 {
        let steps = self.geometry.operand_dim / 16;
        [4, 3].into_iter().find(|n| steps.is_multiple_of(*n)).unwrap_or(2) * 4096
    }

    /// Shared memory of a block of the tensor-core kernels, without the stages; `rvq_encode.cuh` has the same sum.
    fn tile_bytes(&self, tile_rows: u64, splits: u64) -> u64 {
        let g = &self.geometry;
        let vectors = tile_rows * (g.padded_dim + 4) * 4 * if g.cosine() { 2 } else { 1 };
        let operand = tile_rows * g.operand_dim * 2;
        let warp = 5632 + if splits > 1 { 2048 } else { 0 };
        vectors + operand + tile_rows / 16 * warp + 256
    }

    fn schedule_for(&self, device: &DeviceInfo, variant: EncodeVariant) -> Result<EncodeSchedule> {
        let g = &self.geometry;
        let shared = device.smem_per_block.max(0) as u64;
        let refuse = |what| Err(Error::Unsupported { arg: "variant", what });
        let sm90 = device.arch.major == 9;
        let rows = self.rows();
        if self.latent > 0 {
            return match variant {
                EncodeVariant::Auto | EncodeVariant::Portable => Ok(EncodeSchedule {
                    kernel: EncodeKernel::Projected,
                    tile_rows: 16,
                    stages: 0,
                    splits: 1,
                    sharers: 1,
                    rows,
                }),
                _ => refuse("projected rows have one kernel, the portable one"),
            };
        }
        let stage = self.stage_bytes();
        let hopper = || {
            // Where blocks would leave multiprocessors idle, a cluster deals out the codes: to each at least two tiles.
            let sms = device.sm_count.max(1) as u64;
            let sharing = if (shared.saturating_sub(1024) / 2) >= self.tile_bytes(64, 1) + 2 * stage { 2 } else { 1 };
            let (blocks, tiles) = (rows.div_ceil(64), g.padded_entries / 128);
            let splits = [8, 4, 2].into_iter().find(|&n| blocks * n <= sms * sharing && tiles >= 2 * n).unwrap_or(1);
            // L2 is what limits the products. Clusters of 4 do not fill every GPC: only where blocks come in turns.
            let sharers = match blocks {
                _ if splits > 1 => 1,
                _ if blocks >= 2 * sms * sharing => 4,
                2.. => 2,
                _ => 1,
            };
            let base = self.tile_bytes(64, splits);
            // Two blocks on a multiprocessor hide each other's waits; each has a KiB reserved.
            let half = (shared.saturating_sub(1024) / 2).saturating_sub(base) / stage;
            let whole = shared.saturating_sub(base) / stage;
            let stages = if half >= 2 { half.min(4) } else { whole.min(6) };
            (sm90 && g.dim <= MOST_HOPPER_DIM && stages >= 2).then_some(EncodeSchedule {
                kernel: EncodeKernel::Hopper,
                tile_rows: 64,
                stages: stages as u32,
                splits: splits as u32,
                sharers,
                rows,
            })
        };
        let portable = || {
            let mut tile_rows = 64;
            let sms = device.sm_count.max(1) as u64;
            while tile_rows > 16 && rows.div_ceil(tile_rows) < sms {
                tile_rows /= 2;
            }
            while tile_rows > 16 && self.tile_bytes(tile_rows, 1) + 2 * stage > shared {
                tile_rows /= 2;
            }
            let stages = (shared.saturating_sub(self.tile_bytes(tile_rows, 1)) / stage).min(3);
            EncodeSchedule {
                kernel: EncodeKernel::Portable,
                tile_rows: tile_rows as u32,
                stages: stages as u32,
                splits: 1,
                sharers: 1,
                rows,
            }
        };
        let stream = || {
            // A cluster of 16 blocks takes most of a GPC: seven or so run at a time.
            let tile_rows = [1, 2, 4].into_iter().find(|&n| rows.div_ceil(n) <= 7).unwrap_or(8);
            let tiles = g.padded_entries / 32;
            let splits = [16, 8, 4, 2].into_iter().find(|&n| n <= tiles).unwrap_or(1);
            EncodeSchedule {
                kernel: EncodeKernel::Stream,
                tile_rows: tile_rows as u32,
                stages: 0,
                splits: splits as u32,
                sharers: 1,
                rows,
            }
        };
        match variant {
            EncodeVariant::Portable => Ok(portable()),
            EncodeVariant::Hopper => match hopper() {
                Some(schedule) => Ok(schedule),
                None => refuse("the Hopper kernel takes up to 256 dimensions, on compute capability 9.0"),
            },
            EncodeVariant::Stream if sm90 => Ok(stream()),
            EncodeVariant::Stream => refuse("the kernel for few rows needs compute capability 9.0"),
            EncodeVariant::Auto if sm90 && rows <= STREAM_ROWS => Ok(stream()),
            EncodeVariant::Auto => Ok(hopper().unwrap_or_else(portable)),
        }
    }
}

/// The kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EncodeKernel {
    /// `mma.sync`.
    Portable,
    /// `wgmma`.
    Hopper,
    /// Few rows, clusters.
    Stream,
    /// Rows that each level projects.
    Projected,
}

/// How a kernel cuts an encode up: a block, or some blocks that have the codes dealt out to them, takes `tile_rows` rows that follow each other, counted
/// over the batch, through all levels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EncodeSchedule {
    /// Which kernel.
    pub kernel: EncodeKernel,
    /// Rows of these blocks.
    pub tile_rows: u32,
    /// Pieces of the codebooks under way at a time.
    pub stages: u32,
    /// Blocks that the codes of a level are dealt out to, of one cluster.
    pub splits: u32,
    /// Tiles of rows whose blocks form a cluster and share what they stream.
    pub sharers: u32,
    /// Rows of all batch entries.
    pub rows: u64,
}

impl EncodeSchedule {
    /// Blocks, in whole clusters: the last few may have no rows.
    pub fn blocks(&self) -> u64 {
        self.rows.div_ceil(u64::from(self.tile_rows)).next_multiple_of(u64::from(self.sharers)) * u64::from(self.splits)
    }

    /// The rows that a block takes, alone or with those that have the other codes.
    pub fn rows_of(&self, block: u64) -> Range<u64> {
        let (tile, rows) = (block / u64::from(self.splits), u64::from(self.tile_rows));
        (tile * rows).min(self.rows)..((tile + 1) * rows).min(self.rows)
    }
}

/// What an encode takes at least, however it is cut up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EncodeWork {
    /// Multiplications and additions of the search by products: 2 * rows * entries * dim * levels.
    pub flops: u64,
    /// Distances, one for each row, entry and level.
    pub distances: u64,
    /// Bytes read of the input and of f32 codebooks, once each, and written as codes.
    pub bytes: u64,
}

impl Plan {
    pub(super) fn work(&self, input: usize, code: usize) -> EncodeWork {
        let g = &self.geometry;
        let product = |counts: &[u64]| counts.iter().fold(1u64, |product, &n| product.saturating_mul(n));
        let rows = self.rows();
        let distances = product(&[rows, g.entries, self.levels]);
        let books = g.levels.min(self.levels);
        let bytes = [
            product(&[rows, self.input.shape()[2], input as u64]),
            if rows == 0 { 0 } else { product(&[books, g.entries, g.dim, 4]) },
            product(&[rows, self.levels, code as u64]),
        ];
        EncodeWork {
            flops: product(&[distances, g.dim, 2]),
            distances,
            bytes: bytes.iter().fold(0, |sum: u64, &n| sum.saturating_add(n)),
        }
    }
}
