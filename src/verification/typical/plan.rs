//! Shapes, checks and the schedule. Pure.

use core::marker::PhantomData;

use super::TypicalVerifier;
use crate::device::{Arch, DeviceInfo};
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::verification::Traffic;
use crate::verification::rows::chunks;

const MOST_VOCAB: u64 = 1 << 24;
const MOST_BATCH: u64 = 1 << 20;
const MOST_NODES: u64 = 1024;
/// What is kept of a row, and of a chunk.
const ROW_BYTES: u64 = 32;
const CHUNK_BYTES: u64 = 16;
const BLOCKS_A_MULTIPROCESSOR: u64 = 3;

/// Describes a verifier; [`TypicalVerifierBuilder::build`] makes the plan.
#[derive(Debug, Clone)]
pub struct TypicalVerifierBuilder<T> {
    batch: u64,
    nodes: u64,
    vocab: u64,
    paths: Option<(u64, u64)>,
    target_rows: Option<u64>,
    target_stride: Option<i64>,
    epsilon: f32,
    alpha: f32,
    fallback: i32,
    types: PhantomData<T>,
}

impl<T: Float> TypicalVerifierBuilder<T> {
    pub(super) fn new(batch: usize, nodes: usize, vocab: usize) -> Self {
        TypicalVerifierBuilder {
            batch: batch as u64,
            nodes: nodes as u64,
            vocab: vocab as u64,
            paths: None,
            target_rows: None,
            target_stride: None,
            epsilon: 0.3,
            alpha: 0.09,
            fallback: 0,
            types: PhantomData,
        }
    }

    /// How many candidate paths there are, and of how many nodes the longest is, node 0 included. Not given: a chain,
    /// one path of all nodes.
    pub fn paths(mut self, paths: usize, depth: usize) -> Self {
        self.paths = Some((paths as u64, depth as u64));
        self
    }

    /// Rows of `target`; `batch * nodes` if not given.
    pub fn target_rows(mut self, rows: usize) -> Self {
        self.target_rows = Some(rows as u64);
        self
    }

    /// Elements from one row of `target` to the next; `vocab` if not given.
    pub fn target_row_stride(mut self, stride: i64) -> Self {
        self.target_stride = Some(stride);
        self
    }

    /// The threshold's greatest value; 0.3 if not given, as published.
    pub fn epsilon(mut self, epsilon: f32) -> Self {
        self.epsilon = epsilon;
        self
    }

    /// The threshold for a row without entropy; 0.09 if not given, as published.
    pub fn alpha(mut self, alpha: f32) -> Self {
        self.alpha = alpha;
        self
    }

    /// The token in place of one that cannot be drawn, because its row allows none; 0 if not given.
    pub fn fallback_token(mut self, token: i32) -> Self {
        self.fallback = token;
        self
    }

    /// Checks the description.
    ///
    /// # Errors
    /// [`Error::Size`] for `vocab` outside 1 to 2^24, `batch` above 2^20, `nodes`, `paths` or `depth` outside 1 to
    /// 1024, 2^31 rows and more; [`Error::Unsupported`] for an `epsilon` or `alpha` that is negative or NaN;
    /// [`Error::Stride`] for rows that overlap; [`Error::UnsupportedDevice`] below compute capability 8.0.
    pub fn build(self, device: &DeviceInfo) -> Result<TypicalVerifier<T>> {
        if device.arch < (Arch { major: 8, minor: 0 }) {
            return Err(Error::UnsupportedDevice { have: Some(device.arch), need: "sm_80 and newer" });
        }
        let size = |arg, got, min, max| {
            if (min..=max).contains(&got) { Ok(()) } else { Err(Error::Size { arg, got, min, max }) }
        };
        size("vocab", self.vocab, 1, MOST_VOCAB)?;
        size("batch", self.batch, 0, MOST_BATCH)?;
        size("nodes", self.nodes, 1, MOST_NODES)?;
        let (paths, depth) = self.paths.unwrap_or((1, self.nodes));
        size("paths", paths, 1, MOST_NODES)?;
        size("depth", depth, 1, MOST_NODES)?;
        let target_rows = self.target_rows.unwrap_or(self.batch * self.nodes);
        size("target_rows", target_rows, 0, i32::MAX as u64)?;
        size("rows", self.batch * self.nodes, 0, i32::MAX as u64)?;
        for (arg, x) in [("epsilon", self.epsilon), ("alpha", self.alpha)] {
            if x < 0.0 || x.is_nan() {
                return Err(Error::Unsupported { arg, what: "0 and above" });
            }
        }
        let stride = self.target_stride.unwrap_or(self.vocab as i64);
        let layout = Layout::strided([target_rows, self.vocab], [stride, 1]);
        if target_rows > 1 {
            layout.require_disjoint("target")?;
        }
        let plan = Plan {
            batch: self.batch,
            nodes: self.nodes,
            vocab: self.vocab,
            paths,
            depth,
            listed: self.paths.is_some(),
            target_rows,
            target_stride: stride,
            target_len: layout.required_len("target")?,
            epsilon: self.epsilon.to_bits(),
            alpha: self.alpha.to_bits(),
            fallback: self.fallback,
            multiprocessors: device.sm_count.max(1) as u64,
        };
        Ok(TypicalVerifier { inner: plan, types: PhantomData })
    }
}

/// The plan behind the types.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub(super) batch: u64,
    pub(super) nodes: u64,
    pub(super) vocab: u64,
    pub(super) paths: u64,
    pub(super) depth: u64,
    /// Whether paths are given.
    pub(super) listed: bool,
    pub(super) target_rows: u64,
    pub(super) target_stride: i64,
    pub(super) target_len: u64,
    pub(super) epsilon: u32,
    pub(super) alpha: u32,
    pub(super) fallback: i32,
    multiprocessors: u64,
}

impl Plan {
    pub(super) fn rows(&self) -> u64 {
        self.batch * self.nodes
    }

    pub(super) fn blocks(&self) -> u32 {
        (self.multiprocessors * BLOCKS_A_MULTIPROCESSOR).min(self.rows()) as u32
    }

    pub(super) fn workspace_bytes(&self) -> u64 {
        self.rows() * (ROW_BYTES + chunks(self.vocab) * CHUNK_BYTES)
    }

    /// For elements of so many bytes.
    pub(super) fn traffic(&self, element: usize) -> Traffic {
        let read = self.rows() as u128 * self.vocab as u128 * element as u128;
        Traffic { read: read.try_into().unwrap_or(u64::MAX), written: self.batch * (self.depth * 4 + 12) }
    }
}
