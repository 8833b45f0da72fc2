//! What prepared codebooks hold, and where. Pure.

use crate::device::{Arch, DeviceInfo};
use crate::error::{Error, Result};
use crate::layout::Layout;

const MOST_LEVELS: u64 = 65_536;
pub(crate) const MOST_ENTRIES: u64 = 131_072;
pub(crate) const MOST_DIM: u64 = 512;
/// Codes in a tile of the operand.
pub(crate) const TILE: u64 = 128;
/// Codes that lie side by side in the searched rows.
pub(crate) const LANES: u64 = 32;
/// What every section of the prepared memory begins at a multiple of, in bytes.
const SECTION: u64 = 256;

/// What is nearest, and what a code stands for.
///
/// `eps` is the least norm that a row is divided by: 1e-12 for what PyTorch's `normalize` does (VAR, DAC, LlamaGen), 1e-6
/// for lucidrains' vector-quantize-pytorch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Metric {
    /// The row of least distance.
    L2,
    /// The row of least angle; codes stand for rows as they came (DAC, VAR with `using_znorm`).
    CosineRaw {
        /// Least norm that a row is divided by.
        eps: f32,
    },
    /// The row of least angle; codes stand for rows of norm 1 (LlamaGen, FlexVAR, GigaTok, DetailFlow).
    CosineUnit {
        /// Least norm that a row is divided by.
        eps: f32,
    },
}

/// How many products of 16-bit floats a kernel filters codes with, before it scores those that are left exactly. Results do
/// not depend on it, only time does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Filter {
    /// [`Filter::Bf16`] from 24 dimensions on, else [`Filter::Bf16x3`].
    #[default]
    Auto,
    /// One: fast, and leaves more codes.
    Bf16,
    /// Three: for codebooks with many codes about equally near.
    Bf16x3,
}

/// Describes codebooks; [`CodebookBuilder::build`] makes the plan.
#[derive(Debug, Clone)]
pub struct CodebookBuilder {
    levels: u64,
    entries: u64,
    dim: u64,
    metric: Metric,
    filter: Filter,
    usage_eps: Option<f32>,
    padding_row: bool,
    strides: Option<[i64; 2]>,
}

impl CodebookBuilder {
    pub(super) fn new(levels: usize, entries: usize, dim: usize) -> Self {
        CodebookBuilder {
            levels: levels as u64,
            entries: entries as u64,
            dim: dim as u64,
            metric: Metric::L2,
            filter: Filter::Auto,
            usage_eps: None,
            padding_row: false,
            strides: None,
        }
    }

    /// What is nearest; [`Metric::L2`] if not given.
    pub fn metric(mut self, metric: Metric) -> Self {
        self.metric = metric;
        self
    }

    /// How kernels filter.
    pub fn filter(mut self, filter: Filter) -> Self {
        self.filter = filter;
        self
    }

    /// `rows` are sums and `usage` counts of an exponential moving average: a row is `sum / max(usage, eps)` (Mimi: 1e-5).
    pub fn moving_average(mut self, eps: f32) -> Self {
        self.usage_eps = Some(eps);
        self
    }

    /// Each level of `rows` has one row more than entries, the last one, which stands for nothing and is left out (RQ-VAE).
    pub fn padding_row(mut self) -> Self {
        self.padding_row = true;
        self
    }

    /// Strides of `rows` in elements, `[level, entry]`; contiguous if not given.
    pub fn strides(mut self, strides: [i64; 2]) -> Self {
        self.strides = Some(strides);
        self
    }

    /// Checks the description.
    ///
    /// # Errors
    /// [`Error::Size`] for no or too many `levels` (65536), `entries` (131072) or `dim` (512); [`Error::Unsupported`] for an
    /// eps that is not finite and positive; [`Error::Stride`] for a negative stride; [`Error::UnsupportedDevice`] below
    /// compute capability 8.0.
    pub fn build(self, device: &DeviceInfo) -> Result<Codebook> {
        if device.arch < (Arch { major: 8, minor: 0 }) {
            return Err(Error::UnsupportedDevice { have: Some(device.arch), need: "sm_80 and newer" });
        }
        let size = |arg, got, max| {
            if (1..=max).contains(&got) { Ok(()) } else { Err(Error::Size { arg, got, min: 1, max }) }
        };
        size("levels", self.levels, MOST_LEVELS)?;
        size("entries", self.entries, MOST_ENTRIES)?;
        size("dim", self.dim, MOST_DIM)?;
        let (metric, eps) = match self.metric {
            Metric::L2 => (crate::ffi::NXS_METRIC_L2, None),
            Metric::CosineRaw { eps } => (crate::ffi::NXS_METRIC_COSINE_RAW, Some(eps)),
            Metric::CosineUnit { eps } => (crate::ffi::NXS_METRIC_COSINE_UNIT, Some(eps)),
        };
        let positive = |arg, eps: Option<f32>| match eps {
            Some(eps) if !(eps.is_finite() && eps > 0.0) => {
                Err(Error::Unsupported { arg, what: "eps must be finite and positive" })
            }
            _ => Ok(()),
        };
        positive("metric", eps)?;
        positive("moving_average", self.usage_eps)?;

        let shape = [self.levels, self.entries, self.dim];
        let of_source = [self.levels, self.entries + u64::from(self.padding_row), self.dim];
        let [level, entry, _] = Layout::contiguous(of_source).strides();
        let [level, entry] = self.strides.unwrap_or([level, entry]);
        let rows = Layout::strided(shape, [level, entry, 1]);
        let rows_len = rows.required_len("rows")?;

        let pieces = match self.filter {
            Filter::Bf16 => 1,
            Filter::Bf16x3 => 3,
            Filter::Auto if self.dim >= 24 => 1,
            Filter::Auto => 3,
        };
        let padded_dim = self.dim.next_multiple_of(8);
        // Kernels take the products' steps of 16 in twos, threes or fours.
        let steps = (pieces * padded_dim + 3).div_ceil(16);
        let operand_dim = 16 * [2, 3, 4].map(|n| steps.next_multiple_of(n)).into_iter().min().unwrap_or(steps);
        let padded_entries = self.entries.next_multiple_of(TILE);
        // The greatest product is 2^16 * 2^17 * 2^11 * 4 bytes: no overflow.
        let section = |at: u64, bytes: u64| (at + bytes).next_multiple_of(SECTION);
        let values_at = section(0, self.levels * 16);
        let search_at = section(values_at, self.levels * self.entries * padded_dim * 4);
        let operand_at = section(search_at, self.levels * padded_entries * padded_dim * 4);
        let bytes = section(operand_at, self.levels * padded_entries * operand_dim * 2);
        Ok(Codebook {
            rows,
            rows_len,
            usage_eps: self.usage_eps.map(f32::to_bits),
            geometry: Geometry {
                levels: self.levels,
                entries: self.entries,
                dim: self.dim,
                padded_dim,
                operand_dim,
                padded_entries,
                pieces,
                metric: metric as i32,
                eps: eps.unwrap_or(0.0).to_bits(),
                values_at,
                search_at,
                operand_at,
                bytes,
            },
        })
    }
}

/// Codebooks and the memory that they are made ready for search in. See [`Codebook::prepare`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Codebook {
    pub(super) rows: Layout<3>,
    pub(super) rows_len: u64,
    pub(super) usage_eps: Option<u32>,
    pub(crate) geometry: Geometry,
}

/// What lies where in prepared memory; `nextscale.h` has the layouts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Geometry {
    pub(crate) levels: u64,
    pub(crate) entries: u64,
    pub(crate) dim: u64,
    pub(crate) padded_dim: u64,
    /// Elements of a code's row in the operand of the products.
    pub(crate) operand_dim: u64,
    pub(crate) padded_entries: u64,
    pub(crate) pieces: u64,
    pub(crate) metric: i32,
    /// The bits: a plan is a key.
    pub(crate) eps: u32,
    /// Bytes from the start.
    pub(crate) values_at: u64,
    pub(crate) search_at: u64,
    pub(crate) operand_at: u64,
    pub(crate) bytes: u64,
}

impl Geometry {
    pub(crate) fn eps(&self) -> f32 {
        f32::from_bits(self.eps)
    }

    pub(crate) fn cosine(&self) -> bool {
        self.metric != crate::ffi::NXS_METRIC_L2 as i32
    }

    /// Position of an element of a value, in f32 from the start of the memory.
    pub(crate) fn value(&self, level: u64, entry: u64, k: u64) -> usize {
        (self.values_at / 4 + (level * self.entries + entry) * self.padded_dim + k) as usize
    }

    /// Position of an element of a searched row, in f32 from the start of the memory.
    pub(crate) fn search(&self, level: u64, entry: u64, k: u64) -> usize {
        let (tile, chunk) = (level * self.padded_entries / LANES + entry / LANES, k / 4);
        let at = ((tile * (self.padded_dim / 4) + chunk) * LANES + entry % LANES) * 4 + k % 4;
        (self.search_at / 4 + at) as usize
    }

    /// Position of an element of the operand, in bf16 from the start of the memory.
    pub(crate) fn operand(&self, level: u64, entry: u64, q: u64) -> usize {
        let tile = level * self.padded_entries / TILE + entry / TILE;
        let at = ((tile * (self.operand_dim / 8) + q / 8) * TILE + entry % TILE) * 8 + q % 8;
        (self.operand_at / 2 + at) as usize
    }

    #[cfg(nxs_kernels)]
    pub(crate) fn params(&self, prepared: usize) -> crate::ffi::nxs_codebook {
        crate::ffi::nxs_codebook {
            prepared: prepared as *mut _,
            values_at: self.values_at as i64,
            search_at: self.search_at as i64,
            operand_at: self.operand_at as i64,
            bytes: self.bytes as i64,
            entries: self.entries as i64,
            levels: self.levels as i32,
            dim: self.dim as i32,
            padded_dim: self.padded_dim as i32,
            operand_dim: self.operand_dim as i32,
            pieces: self.pieces as i32,
            metric: self.metric,
            eps: self.eps(),
        }
    }
}
