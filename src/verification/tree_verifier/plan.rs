//! Shapes, checks and the schedule. Pure.

use core::marker::PhantomData;

use super::TreeVerifier;
use crate::device::{Arch, DeviceInfo};
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::verification::rows::chunks;
use crate::verification::{Drafts, Rule, Traffic};

/// Columns of a row, and rows of a batch, are counted in 32 bits with room.
const MOST_VOCAB: u64 = 1 << 24;
const MOST_BATCH: u64 = 1 << 20;
const MOST_NODES: u64 = 1024;
const MOST_DEPTH: u64 = 64;
/// What the kernel keeps of a request.
const STATE_BYTES: u64 = 16;
/// Warps of a block, each with a chunk of its own.
const WARPS: u64 = 8;
/// Blocks that share a multiprocessor.
const BLOCKS_A_MULTIPROCESSOR: u64 = 2;
/// More chunks than these are passed on in global memory.
const MOST_SHARED_CHUNKS: u64 = 1024;
const CLUSTERS: [u32; 5] = [16, 8, 4, 2, 1];

/// How the children of a node were drawn from the drafter's distribution of the node. Of [`Rule::Reject`] only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Siblings {
    /// Independently of each other: one token may be several children, each of them in its place.
    #[default]
    WithReplacement,
    /// Each from what the ones before it left, renormalised: the children are distinct.
    WithoutReplacement,
}

/// Describes a verifier of trees; [`TreeVerifierBuilder::build`] makes the plan.
#[derive(Debug, Clone)]
pub struct TreeVerifierBuilder<P, Q> {
    batch: u64,
    max_nodes: u64,
    max_depth: u64,
    vocab: u64,
    target_rows: Option<u64>,
    target_stride: Option<i64>,
    draft_vocab: Option<u64>,
    draft_rows: Option<u64>,
    draft_stride: Option<i64>,
    allow_stride: Option<i64>,
    drafts: Drafts,
    siblings: Siblings,
    rule: Rule,
    rules_per_request: bool,
    fallback: i32,
    cluster: Option<u32>,
    types: PhantomData<(P, Q)>,
}

impl<P: Float, Q: Float> TreeVerifierBuilder<P, Q> {
    pub(super) fn new(batch: usize, max_nodes: usize, max_depth: usize, vocab: usize) -> Self {
        TreeVerifierBuilder {
            batch: batch as u64,
            max_nodes: max_nodes as u64,
            max_depth: max_depth as u64,
            vocab: vocab as u64,
            target_rows: None,
            target_stride: None,
            draft_vocab: None,
            draft_rows: None,
            draft_stride: None,
            allow_stride: None,
            drafts: Drafts::default(),
            siblings: Siblings::default(),
            rule: Rule::default(),
            rules_per_request: false,
            fallback: 0,
            cluster: None,
            types: PhantomData,
        }
    }

    /// Rows of `target`; `batch * max_nodes` if not given.
    pub fn target_rows(mut self, rows: usize) -> Self {
        self.target_rows = Some(rows as u64);
        self
    }

    /// Elements from one row of `target` to the next; `vocab` if not given.
    pub fn target_row_stride(mut self, stride: i64) -> Self {
        self.target_stride = Some(stride);
        self
    }

    /// How the drafts were made; [`Drafts::Deterministic`] if not given.
    pub fn drafts(mut self, drafts: Drafts) -> Self {
        self.drafts = drafts;
        self
    }

    /// How the children of a node were drawn; [`Siblings::WithReplacement`] if not given.
    pub fn siblings(mut self, siblings: Siblings) -> Self {
        self.siblings = siblings;
        self
    }

    /// Columns of `draft`; `vocab` if not given. A smaller vocabulary needs `target_to_draft`, unless it is the first
    /// columns.
    pub fn draft_vocab(mut self, vocab: usize) -> Self {
        self.draft_vocab = Some(vocab as u64);
        self
    }

    /// Rows of `draft` and of `draft_stats`; `batch * max_nodes` if not given.
    pub fn draft_rows(mut self, rows: usize) -> Self {
        self.draft_rows = Some(rows as u64);
        self
    }

    /// Elements from one row of `draft` to the next; its vocabulary if not given.
    pub fn draft_row_stride(mut self, stride: i64) -> Self {
        self.draft_stride = Some(stride);
        self
    }

    /// Words from one row of `allow` to the next; `ceil(vocab / 32)` if not given.
    pub fn allow_row_stride(mut self, stride: i64) -> Self {
        self.allow_stride = Some(stride);
        self
    }

    /// The rule of all requests; [`Rule::Reject`] if not given.
    pub fn rule(mut self, rule: Rule) -> Self {
        self.rule = rule;
        self
    }

    /// Rules may come with the requests, in `rules`. The plan's is that of requests whose code is none of the three.
    pub fn rules_per_request(mut self) -> Self {
        self.rules_per_request = true;
        self
    }

    /// The token in place of one that cannot be drawn, because its row allows none; 0 if not given.
    pub fn fallback_token(mut self, token: i32) -> Self {
        self.fallback = token;
        self
    }

    /// Blocks that share a request, 1, or on compute capability 9.0 also 2, 4, 8 or 16; else as many as the device has
    /// room for and the vocabulary gives work. The results do not depend on it.
    pub fn cluster(mut self, blocks: u32) -> Self {
        self.cluster = Some(blocks);
        self
    }

    /// Checks the description.
    ///
    /// # Errors
    /// [`Error::Size`] for `vocab` or `draft_vocab` outside 1 to 2^24, `batch` above 2^20, `max_nodes` outside 1 to 1024,
    /// `max_depth` above 64, 2^31 rows or more; [`Error::Stride`] for rows that overlap; [`Error::Unsupported`] for
    /// rules that trees do not have, and for a `cluster` that the device does not; [`Error::UnsupportedDevice`] below
    /// compute capability 8.0.
    pub fn build(self, device: &DeviceInfo) -> Result<TreeVerifier<P, Q>> {
        if device.arch < (Arch { major: 8, minor: 0 }) {
            return Err(Error::UnsupportedDevice { have: Some(device.arch), need: "sm_80 and newer" });
        }
        let size = |arg, got, min, max| {
            if (min..=max).contains(&got) { Ok(()) } else { Err(Error::Size { arg, got, min, max }) }
        };
        size("vocab", self.vocab, 1, MOST_VOCAB)?;
        size("batch", self.batch, 0, MOST_BATCH)?;
        size("max_nodes", self.max_nodes, 1, MOST_NODES)?;
        size("max_depth", self.max_depth, 0, MOST_DEPTH)?;
        let draft_vocab = self.draft_vocab.unwrap_or(self.vocab);
        size("draft_vocab", draft_vocab, 1, MOST_VOCAB)?;
        let rows = self.batch * self.max_nodes;
        let target_rows = self.target_rows.unwrap_or(rows);
        let draft_rows = self.draft_rows.unwrap_or(rows);
        const MOST_ROWS: u64 = i32::MAX as u64;
        size("target_rows", target_rows, 0, MOST_ROWS)?;
        size("draft_rows", draft_rows, 0, MOST_ROWS)?;
        if tree_rule(self.rule as i32).is_none() {
            return Err(Error::Unsupported { arg: "rule", what: "trees have Greedy, Match and Reject" });
        }
        let clusters = device.arch >= (Arch { major: 9, minor: 0 });
        if let Some(cluster) = self.cluster
            && !(cluster == 1 || (clusters && CLUSTERS.contains(&cluster)))
        {
            return Err(Error::Unsupported { arg: "cluster", what: "1; 2, 4, 8 and 16 on sm_90 and newer" });
        }

        let tensor = |arg, rows, columns, stride: Option<i64>| {
            let layout = Layout::strided([rows, columns], [stride.unwrap_or(columns as i64), 1]);
            if rows > 1 {
                layout.require_disjoint(arg)?;
            }
            Ok::<_, Error>((layout.strides()[0], layout.required_len(arg)?))
        };
        let (target_stride, target_len) = tensor("target", target_rows, self.vocab, self.target_stride)?;
        let (draft_stride, draft_len) = tensor("draft", draft_rows, draft_vocab, self.draft_stride)?;
        let (allow_stride, allow_len) = tensor("allow", rows, self.vocab.div_ceil(32), self.allow_stride)?;
        let mut plan = Plan {
            batch: self.batch,
            max_nodes: self.max_nodes,
            max_depth: self.max_depth,
            vocab: self.vocab,
            target_rows,
            target_stride,
            target_len,
            draft_vocab,
            draft_rows,
            draft_stride,
            draft_len: if self.drafts == Drafts::Deterministic { 0 } else { draft_len },
            allow_stride,
            allow_len,
            drafts: self.drafts,
            siblings: self.siblings,
            rule: self.rule,
            rules_per_request: self.rules_per_request,
            fallback: self.fallback,
            cluster: 1,
        };
        // A warp without a chunk is of no use, and a block without room waits for the first ones to end.
        let room = device.sm_count.max(1) as u64 * BLOCKS_A_MULTIPROCESSOR;
        let useful = plan.chunks().div_ceil(WARPS).next_power_of_two();
        let fits = |&&of: &&u32| u64::from(of) <= useful && self.batch * u64::from(of) <= room;
        let most = if clusters { CLUSTERS.iter().find(fits).copied().unwrap_or(1) } else { 1 };
        plan.cluster = self.cluster.unwrap_or(most);
        Ok(TreeVerifier { inner: plan, types: PhantomData })
    }
}

/// The rules that trees have, by their numbers.
pub(super) fn tree_rule(code: i32) -> Option<Rule> {
    [Rule::Greedy, Rule::Match, Rule::Reject].into_iter().find(|&rule| rule as i32 == code)
}

/// The plan behind the types.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub(super) batch: u64,
    pub(super) max_nodes: u64,
    pub(super) max_depth: u64,
    pub(super) vocab: u64,
    pub(super) target_rows: u64,
    pub(super) target_stride: i64,
    pub(super) target_len: u64,
    pub(super) draft_vocab: u64,
    pub(super) draft_rows: u64,
    pub(super) draft_stride: i64,
    pub(super) draft_len: u64,
    pub(super) allow_stride: i64,
    pub(super) allow_len: u64,
    pub(super) drafts: Drafts,
    pub(super) siblings: Siblings,
    pub(super) rule: Rule,
    pub(super) rules_per_request: bool,
    pub(super) fallback: i32,
    pub(super) cluster: u32,
}

impl Plan {
    pub(super) fn rows(&self) -> u64 {
        self.batch * self.max_nodes
    }

    /// Of a row of the target and one of the draft, if there is any.
    pub(super) fn chunks(&self) -> u64 {
        let of_draft = if self.drafts == Drafts::Deterministic { 0 } else { chunks(self.draft_vocab) };
        chunks(self.vocab) + of_draft
    }

    pub(super) fn shared_partials(&self) -> bool {
        self.chunks() <= MOST_SHARED_CHUNKS
    }

    /// Of the device, and of the host, which needs less. On the device the partials of a row and the sums of a residual, each
    /// in two places by turns.
    pub(super) fn workspace_bytes(&self) -> u64 {
        let device = self.batch * (STATE_BYTES + 4 * self.chunks() * 8);
        device.max(super::host::workspace_bytes(self.vocab, self.draft_vocab, self.max_nodes))
    }

    /// For elements of so many bytes, if a path of `drafts` is accepted.
    pub(super) fn traffic(&self, target: usize, draft: usize, drafts: u64) -> Traffic {
        let drafts = drafts.min(self.max_depth) as u128;
        let rows = (drafts + 1) * self.vocab as u128 * target as u128;
        let sweeps = self.drafts == Drafts::Logits && self.rule == Rule::Reject;
        let of_draft = if sweeps { drafts * self.draft_vocab as u128 * draft as u128 } else { 0 };
        let read = (rows + of_draft) * self.batch as u128;
        let written = self.batch * ((self.max_depth + 1) * 4 + 12);
        Traffic { read: read.try_into().unwrap_or(u64::MAX), written }
    }

    pub(super) fn schedule(&self) -> TreeVerifierSchedule {
        TreeVerifierSchedule {
            of_target: chunks(self.vocab),
            of_draft: self.chunks() - chunks(self.vocab),
            cluster: self.cluster,
            blocks: self.batch * u64::from(self.cluster),
            shared_partials: self.shared_partials(),
        }
    }
}

/// How the kernel cuts a step up. Request `b` has the blocks `b * cluster` to `b * cluster + cluster - 1`, which walk down its
/// tree together; of the chunks of a row, warp `w` of block `r` has those that leave the rest `8 r + w` by `8 cluster`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TreeVerifierSchedule {
    /// Chunks of 1024 columns of a row of the target.
    pub of_target: u64,
    /// Chunks of a row of the draft, 0 if there is none.
    pub of_draft: u64,
    /// Blocks that share a request.
    pub cluster: u32,
    /// Blocks of the grid.
    pub blocks: u64,
    /// Whether what is known of chunks is passed on in shared memory.
    pub shared_partials: bool,
}
