//! Shapes, checks and the schedule. Pure.

use core::marker::PhantomData;

use super::ConfidenceRank;
use crate::device::{Arch, DeviceInfo};
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::verification::Traffic;
use crate::verification::rows::chunks;

const MOST_VOCAB: u64 = 1 << 24;
const MOST: u64 = 1 << 20;
const MOST_STEP: u64 = (1 << 24) - 1;
const ROW_BYTES: u64 = 16;
const BLOCKS_A_MULTIPROCESSOR: u64 = 3;

/// How sure the model is of a row's candidate `x`, by the row's probabilities at temperature 1 and before truncation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(i32)]
#[non_exhaustive]
pub enum Confidence {
    /// `p(x)` (Dimple's and MaskGIT's).
    #[default]
    Probability = 0,
    /// `ln p(x)`: what MaskGIT adds noise to.
    LogProbability = 1,
    /// The greatest probability less the second greatest.
    Margin = 2,
    /// The sum of `p ln p`: the entropy with its sign changed.
    Entropy = 3,
}

/// Describes a ranking; [`ConfidenceRankBuilder::build`] makes the plan.
#[derive(Debug, Clone)]
pub struct ConfidenceRankBuilder<T> {
    batch: u64,
    length: u64,
    vocab: u64,
    stride: Option<i64>,
    confidence: Confidence,
    step: u64,
    types: PhantomData<T>,
}

impl<T: Float> ConfidenceRankBuilder<T> {
    pub(super) fn new(batch: usize, length: usize, vocab: usize) -> Self {
        ConfidenceRankBuilder {
            batch: batch as u64,
            length: length as u64,
            vocab: vocab as u64,
            stride: None,
            confidence: Confidence::default(),
            step: 0,
            types: PhantomData,
        }
    }

    /// Elements from one row of `logits` to the next; `vocab` if not given.
    pub fn row_stride(mut self, stride: i64) -> Self {
        self.stride = Some(stride);
        self
    }

    /// What rows are ranked by; [`Confidence::Probability`] if not given.
    pub fn confidence(mut self, confidence: Confidence) -> Self {
        self.confidence = confidence;
        self
    }

    /// The number of the step: what two steps draw for one position is independent. 0 if not given.
    pub fn step(mut self, step: u32) -> Self {
        self.step = step.into();
        self
    }

    /// Checks the description.
    ///
    /// # Errors
    /// [`Error::Size`] for `vocab` outside 1 to 2^24, `batch` above 2^20, `length` outside 1 to 2^20, 2^31 rows and
    /// more, a step of 2^24 and above; [`Error::Stride`] for rows that overlap; [`Error::UnsupportedDevice`] below
    /// compute capability 8.0.
    pub fn build(self, device: &DeviceInfo) -> Result<ConfidenceRank<T>> {
        if device.arch < (Arch { major: 8, minor: 0 }) {
            return Err(Error::UnsupportedDevice { have: Some(device.arch), need: "sm_80 and newer" });
        }
        let size = |arg, got, min, max| {
            if (min..=max).contains(&got) { Ok(()) } else { Err(Error::Size { arg, got, min, max }) }
        };
        size("vocab", self.vocab, 1, MOST_VOCAB)?;
        size("batch", self.batch, 0, MOST)?;
        size("length", self.length, 1, MOST)?;
        size("step", self.step, 0, MOST_STEP)?;
        let rows = self.batch * self.length;
        size("rows", rows, 0, i32::MAX as u64)?;
        let stride = self.stride.unwrap_or(self.vocab as i64);
        let layout = Layout::strided([rows, self.vocab], [stride, 1]);
        if rows > 1 {
            layout.require_disjoint("logits")?;
        }
        let plan = Plan {
            batch: self.batch,
            length: self.length,
            vocab: self.vocab,
            stride,
            len: layout.required_len("logits")?,
            confidence: self.confidence,
            step: self.step as u32,
            multiprocessors: device.sm_count.max(1) as u64,
        };
        Ok(ConfidenceRank { inner: plan, types: PhantomData })
    }
}

/// The plan behind the types.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub(super) batch: u64,
    pub(super) length: u64,
    pub(super) vocab: u64,
    pub(super) stride: i64,
    pub(super) len: u64,
    pub(super) confidence: Confidence,
    pub(super) step: u32,
    multiprocessors: u64,
}

impl Plan {
    pub(super) fn rows(&self) -> u64 {
        self.batch * self.length
    }

    pub(super) fn blocks(&self) -> u32 {
        (self.multiprocessors * BLOCKS_A_MULTIPROCESSOR).min(self.rows()) as u32
    }

    /// Of the device; the host needs that of one block.
    pub(super) fn workspace_bytes(&self) -> u64 {
        let chunks = chunks(self.vocab);
        self.rows() * ROW_BYTES + u64::from(self.blocks()).max(1) * (chunks + chunks.div_ceil(2)) * 16
    }

    /// For elements of so many bytes.
    pub(super) fn traffic(&self, element: usize) -> Traffic {
        let read = self.rows() as u128 * self.vocab as u128 * element as u128;
        Traffic { read: read.try_into().unwrap_or(u64::MAX), written: self.rows() * 4 + self.batch * 8 }
    }
}
