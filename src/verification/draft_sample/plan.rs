//! Shapes, checks and the schedule. Pure.

use core::marker::PhantomData;

use super::DraftSample;
use crate::device::{Arch, DeviceInfo};
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::verification::items::{self, BLOCKS_A_MULTIPROCESSOR, WARPS};
use crate::verification::rows::chunks;
use crate::verification::{Siblings, Traffic};

const MOST_VOCAB: u64 = 1 << 24;
const MOST_ROWS: u64 = 1 << 20;
/// Drafts of a row: a lane keeps the column of each.
pub(super) const MOST_DRAFTS: u64 = 32;

/// Describes a drafter's sampler; [`DraftSampleBuilder::build`] makes the plan.
#[derive(Debug, Clone)]
pub struct DraftSampleBuilder<Q> {
    rows: u64,
    vocab: u64,
    stride: Option<i64>,
    row_in_step: u32,
    drafts: u64,
    siblings: Siblings,
    fallback: i32,
    types: PhantomData<Q>,
}

impl<Q: Float> DraftSampleBuilder<Q> {
    pub(super) fn new(rows: usize, vocab: usize) -> Self {
        DraftSampleBuilder {
            rows: rows as u64,
            vocab: vocab as u64,
            stride: None,
            row_in_step: 0,
            drafts: 1,
            siblings: Siblings::WithoutReplacement,
            fallback: 0,
            types: PhantomData,
        }
    }

    /// Elements from one row of `logits` to the next; `vocab` if not given.
    pub fn row_stride(mut self, stride: i64) -> Self {
        self.stride = Some(stride);
        self
    }

    /// Which draft of its step this is, from 0 on: it has the absolute position `positions + row`. 0 if not given.
    pub fn row_in_step(mut self, row: u32) -> Self {
        self.row_in_step = row;
        self
    }

    /// How many drafts of each row, 1 to 32; 1 if not given. Those of a row are the children of a node of a tree, in
    /// the order in which [`TreeVerifier`](super::super::TreeVerifier) is to try them.
    pub fn drafts(mut self, drafts: u32) -> Self {
        self.drafts = drafts.into();
        self
    }

    /// Whether the drafts of a row are distinct; [`Siblings::WithoutReplacement`] if not given. The verifier is to be
    /// told the same.
    pub fn siblings(mut self, siblings: Siblings) -> Self {
        self.siblings = siblings;
        self
    }

    /// The first draft of a row in which none can be drawn; 0 if not given.
    pub fn fallback_token(mut self, token: i32) -> Self {
        self.fallback = token;
        self
    }

    /// Checks the description.
    ///
    /// # Errors
    /// [`Error::Size`] for `vocab` outside 1 to 2^24, more than 2^20 rows, `row_in_step` above 1023, `drafts` outside 1
    /// to 32; [`Error::Stride`] for rows that overlap; [`Error::UnsupportedDevice`] below compute capability 8.0.
    pub fn build(self, device: &DeviceInfo) -> Result<DraftSample<Q>> {
        if device.arch < (Arch { major: 8, minor: 0 }) {
            return Err(Error::UnsupportedDevice { have: Some(device.arch), need: "sm_80 and newer" });
        }
        let size = |arg, got, min, max| {
            if (min..=max).contains(&got) { Ok(()) } else { Err(Error::Size { arg, got, min, max }) }
        };
        size("vocab", self.vocab, 1, MOST_VOCAB)?;
        size("rows", self.rows, 0, MOST_ROWS)?;
        size("row_in_step", self.row_in_step.into(), 0, 1023)?;
        size("drafts", self.drafts, 1, MOST_DRAFTS)?;
        let layout = Layout::strided([self.rows, self.vocab], [self.stride.unwrap_or(self.vocab as i64), 1]);
        if self.rows > 1 {
            layout.require_disjoint("logits")?;
        }
        let plan = Plan {
            rows: self.rows,
            vocab: self.vocab,
            stride: layout.strides()[0],
            len: layout.required_len("logits")?,
            row_in_step: self.row_in_step,
            drafts: self.drafts,
            siblings: self.siblings,
            fallback: self.fallback,
            multiprocessors: device.sm_count.max(1) as u64,
        };
        Ok(DraftSample { inner: plan, types: PhantomData })
    }
}

/// The plan behind the types.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub(super) rows: u64,
    pub(super) vocab: u64,
    pub(super) stride: i64,
    pub(super) len: u64,
    pub(super) row_in_step: u32,
    pub(super) drafts: u64,
    pub(super) siblings: Siblings,
    pub(super) fallback: i32,
    multiprocessors: u64,
}

impl Plan {
    pub(super) fn workspace_bytes(&self) -> u64 {
        self.rows.max(1) * chunks(self.vocab) * 8
    }

    pub(super) fn traffic(&self, element: usize) -> Traffic {
        let read = self.rows.saturating_mul(self.vocab).saturating_mul(element as u64);
        Traffic { read, written: self.rows * (self.drafts + 1) * 4 }
    }

    pub(super) fn schedule(&self) -> DraftSampleSchedule {
        let chunks = chunks(self.vocab);
        let blocks = self.multiprocessors * BLOCKS_A_MULTIPROCESSOR;
        let items_of = |rounds: u64| self.rows * chunks.div_ceil(rounds * WARPS);
        let rounds = items::rounds(self.multiprocessors, items_of);
        let items = items_of(rounds);
        DraftSampleSchedule {
            chunks,
            slices: chunks.div_ceil(rounds * WARPS),
            chunks_per_item: (rounds * WARPS) as u32,
            items,
            blocks: blocks.min(items) as u32,
        }
    }
}

/// How the kernel cuts the work up. An item is `chunks_per_item` chunks of a row; items are numbered by row, then by
/// slice, and block `i` takes those that leave the rest `i` by `blocks`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DraftSampleSchedule {
    /// Chunks of 1024 columns of a row.
    pub chunks: u64,
    /// Items of a row.
    pub slices: u64,
    /// Chunks in an item.
    pub chunks_per_item: u32,
    /// Items of all rows.
    pub items: u64,
    /// Blocks of the grid.
    pub blocks: u32,
}
