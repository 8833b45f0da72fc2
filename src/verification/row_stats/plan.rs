//! Shapes, checks and the schedule. Pure.

use core::marker::PhantomData;

use super::RowStats;
use crate::device::{Arch, DeviceInfo};
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::verification::Traffic;
use crate::verification::rows::chunks;

const MOST_VOCAB: u64 = 1 << 24;
const MOST_ROWS: u64 = i32::MAX as u64;
/// Warps of a block, each with a chunk of its own.
const WARPS: u64 = 8;

/// Describes the statistics of rows; [`RowStatsBuilder::build`] makes the plan.
#[derive(Debug, Clone)]
pub struct RowStatsBuilder<P> {
    rows: u64,
    vocab: u64,
    stride: Option<i64>,
    allow_stride: Option<i64>,
    types: PhantomData<P>,
}

impl<P: Float> RowStatsBuilder<P> {
    pub(super) fn new(rows: usize, vocab: usize) -> Self {
        RowStatsBuilder { rows: rows as u64, vocab: vocab as u64, stride: None, allow_stride: None, types: PhantomData }
    }

    /// Elements from one row of `logits` to the next; `vocab` if not given.
    pub fn row_stride(mut self, stride: i64) -> Self {
        self.stride = Some(stride);
        self
    }

    /// Words from one row of `allow` to the next; `ceil(vocab / 32)` if not given.
    pub fn allow_row_stride(mut self, stride: i64) -> Self {
        self.allow_stride = Some(stride);
        self
    }

    /// Checks the description.
    ///
    /// # Errors
    /// [`Error::Size`] for `vocab` outside 1 to 2^24 or more than 2^31 - 1 rows or chunks; [`Error::Stride`] for rows
    /// that overlap; [`Error::UnsupportedDevice`] below compute capability 8.0.
    pub fn build(self, device: &DeviceInfo) -> Result<RowStats<P>> {
        if device.arch < (Arch { major: 8, minor: 0 }) {
            return Err(Error::UnsupportedDevice { have: Some(device.arch), need: "sm_80 and newer" });
        }
        let size = |arg, got, min, max| {
            if (min..=max).contains(&got) { Ok(()) } else { Err(Error::Size { arg, got, min, max }) }
        };
        size("vocab", self.vocab, 1, MOST_VOCAB)?;
        size("rows", self.rows, 0, MOST_ROWS)?;
        size("rows * chunks", self.rows * chunks(self.vocab), 0, MOST_ROWS)?;
        let tensor = |arg, columns, stride: Option<i64>| {
            let layout = Layout::strided([self.rows, columns], [stride.unwrap_or(columns as i64), 1]);
            if self.rows > 1 {
                layout.require_disjoint(arg)?;
            }
            Ok::<_, Error>((layout.strides()[0], layout.required_len(arg)?))
        };
        let (stride, len) = tensor("logits", self.vocab, self.stride)?;
        let (allow_stride, allow_len) = tensor("allow", self.vocab.div_ceil(32), self.allow_stride)?;
        let plan = Plan { rows: self.rows, vocab: self.vocab, stride, len, allow_stride, allow_len };
        Ok(RowStats { inner: plan, types: PhantomData })
    }
}

/// The plan behind the types.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub(super) rows: u64,
    pub(super) vocab: u64,
    pub(super) stride: i64,
    pub(super) len: u64,
    pub(super) allow_stride: i64,
    pub(super) allow_len: u64,
}

impl Plan {
    pub(super) fn traffic(&self, element: usize) -> Traffic {
        let read = self.rows.saturating_mul(self.vocab).saturating_mul(element as u64);
        Traffic { read, written: self.rows * chunks(self.vocab) * 8 }
    }

    pub(super) fn schedule(&self) -> RowStatsSchedule {
        let chunks = self.rows * chunks(self.vocab);
        RowStatsSchedule { chunks, blocks: chunks.div_ceil(WARPS) as u32 }
    }
}

/// How the kernel cuts the work up: a warp takes one chunk of 1024 columns, the chunks of a row one after the other, row
/// after row; 8 warps are a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RowStatsSchedule {
    /// Chunks of all rows.
    pub chunks: u64,
    /// Blocks of the grid.
    pub blocks: u32,
}
