//! Shapes and checks. Pure.

use super::TreeBuilder;
use crate::device::{Arch, DeviceInfo};
use crate::error::{Error, Result};
use crate::plan::Traffic;

const MOST_BATCH: u64 = 1 << 20;
pub(super) const MOST_NODES: u64 = 1024;
pub(super) const MOST_CANDIDATES: u64 = 2048;
const MOST_DEPTH: u64 = 64;

/// Describes a builder of trees; [`TreeBuilderBuilder::build`] makes the plan.
#[derive(Debug, Clone)]
pub struct TreeBuilderBuilder {
    batch: u64,
    nodes: u64,
    candidates: Option<u64>,
    leaves: Option<u64>,
    max_depth: u64,
    sums: bool,
}

impl TreeBuilderBuilder {
    pub(super) fn new(batch: usize, nodes: usize) -> Self {
        TreeBuilderBuilder {
            batch: batch as u64,
            nodes: nodes as u64,
            candidates: None,
            leaves: None,
            max_depth: MOST_DEPTH,
            sums: false,
        }
    }

    /// The nodes are chosen among so many candidates, by their scores. Else the candidates are the nodes.
    pub fn candidates(mut self, candidates: usize) -> Self {
        self.candidates = Some(candidates as u64);
        self
    }

    /// Scores are sums over the path already.
    pub fn scores_are_sums(mut self) -> Self {
        self.sums = true;
        self
    }

    /// Rows of `paths`; `nodes` if not given.
    pub fn leaves(mut self, leaves: usize) -> Self {
        self.leaves = Some(leaves as u64);
        self
    }

    /// Drafts on a path, and columns of `paths` less one; 64 if not given.
    pub fn max_depth(mut self, drafts: usize) -> Self {
        self.max_depth = drafts as u64;
        self
    }

    /// Checks the description.
    ///
    /// # Errors
    /// [`Error::Size`] for `batch` above 2^20, `nodes` outside 1 to 1024, `candidates` outside `nodes` to 2048, `leaves`
    /// outside 1 to `nodes`, `max_depth` above 64; [`Error::UnsupportedDevice`] below compute capability 8.0.
    pub fn build(self, device: &DeviceInfo) -> Result<TreeBuilder> {
        if device.arch < (Arch { major: 8, minor: 0 }) {
            return Err(Error::UnsupportedDevice { have: Some(device.arch), need: "sm_80 and newer" });
        }
        let size = |arg, got, min, max| {
            if (min..=max).contains(&got) { Ok(()) } else { Err(Error::Size { arg, got, min, max }) }
        };
        size("batch", self.batch, 0, MOST_BATCH)?;
        size("nodes", self.nodes, 1, MOST_NODES)?;
        let candidates = self.candidates.unwrap_or(self.nodes);
        size("candidates", candidates, self.nodes, MOST_CANDIDATES)?;
        let leaves = self.leaves.unwrap_or(self.nodes);
        size("leaves", leaves, 1, self.nodes)?;
        size("max_depth", self.max_depth, 0, MOST_DEPTH)?;
        let plan = Plan {
            batch: self.batch,
            nodes: self.nodes,
            candidates,
            leaves,
            max_depth: self.max_depth,
            chooses: self.candidates.is_some(),
            sums: self.sums,
        };
        Ok(TreeBuilder { inner: plan })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub(super) batch: u64,
    pub(super) nodes: u64,
    pub(super) candidates: u64,
    pub(super) leaves: u64,
    pub(super) max_depth: u64,
    pub(super) chooses: bool,
    pub(super) sums: bool,
}

impl Plan {
    pub(super) fn traffic(&self) -> Traffic {
        let read = self.batch * self.candidates * if self.chooses { 12 } else { 8 };
        let a_node = 6 * 4 + 8 + self.nodes.div_ceil(32) * 4;
        let written = self.batch * (self.nodes * a_node + self.leaves * (self.max_depth + 1) * 4 + 12);
        Traffic { read, written }
    }
}
