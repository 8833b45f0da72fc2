//! What the nodes of trees need, on the device.

mod cuda;
mod host;
mod plan;

pub use plan::TreeBuilderBuilder;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::launch::Operands;
use crate::plan::Traffic;
use crate::stream::AsStream;
use crate::view::{In, Out};

/// A plan that makes what the nodes of trees of drafts need from their parents: links, depths, positions, who sees whom and
/// the paths to the leaves; and before it, with [`TreeBuilderBuilder::candidates`], chooses the nodes among candidates by
/// their scores, as EAGLE-2 does (arXiv 2406.16858).
///
/// Candidate 0 of a request is its root; every other candidate comes after its parent. One whose parent is -1 is no node;
/// neither is one at a depth beyond `max_depth`, nor one that hangs on either.
///
/// **Choice.** The value of a candidate is its score, or with sums the value of its parent plus its score, f32, from the root's 0
/// on; NaN counts as -inf. Candidates rank by the least value on their path, greatest first, lower numbers first among
/// equals, so that parents come with their children; the first `nodes` are taken, the root always, in the order of their numbers.
/// Without choice node `n` is candidate `n`.
///
/// | operand | shape | |
/// |---|---|---|
/// | `parents` | `[batch, candidates]` i32, or with `cu_rows` ragged | by number in the tree; -1: the root, or no node |
/// | `cu_rows` | `[batch + 1]` i32, optional | where the candidates of a request begin; else at `b * candidates` |
/// | `drafts` | as `parents`, optional | tokens; goes with the output `drafts` |
/// | `scores` | as `parents`, f32, of a plan with candidates | log-probabilities, of a draft given those before it unless the plan has sums |
/// | `positions` | `[batch]` i64, optional | of the root; else 0 |
///
/// All outputs but `status` are optional; -1 where there is no node unless said otherwise:
///
/// | output | shape | |
/// |---|---|---|
/// | `counts` | `[batch]` i32 | nodes; without choice the rows of the request |
/// | `selected` | `[batch, nodes]` i32 | the candidate that each node is |
/// | `parents`, `drafts`, `first_child`, `next_sibling`, `depths` | `[batch, nodes]` i32 | of each node, for [`TreeVerifier`](super::TreeVerifier) with `max_nodes` of `nodes` |
/// | `node_positions` | `[batch, nodes]` i64 | position of the root plus depth; that of the root where there is no node |
/// | `mask` | `[batch, nodes, ceil(nodes / 32)]` u32 | bit `j % 32` of word `j / 32`: whether the node sees node `j`, which is itself or on the path to it; 0 where there is no node. What lies before the root every node sees |
/// | `paths` | `[batch, leaves, max_depth + 1]` i32 | the nodes from the root to each leaf, in the order of trial (Medusa's and EAGLE's `retrieve_indices`) |
/// | `leaf_counts` | `[batch]` i32 | leaves in `paths`, 0 for a request without rows |
/// | `status` | `[batch]` u32 | [`TREE_BAD`](super::status::TREE_BAD) for a parent that does not come before its child; [`DRAFTS_IGNORED`](super::status::DRAFTS_IGNORED) for more rows, deeper nodes or more leaves than the plan has |
///
/// All results are the same bit for bit on the host and on every device, in any batch.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TreeBuilder {
    inner: plan::Plan,
}

/// The inputs of a run. See [`TreeBuilder`] for shapes.
#[derive(Debug)]
pub struct TreeBuilderArgs<'a> {
    /// `[batch, candidates]`, or ragged.
    pub parents: In<'a, i32>,
    /// `[batch + 1]`.
    pub cu_rows: Option<In<'a, i32>>,
    /// As `parents`.
    pub drafts: Option<In<'a, i32>>,
    /// As `parents`; goes with [`TreeBuilderBuilder::candidates`].
    pub scores: Option<In<'a, f32>>,
    /// `[batch]`.
    pub positions: Option<In<'a, i64>>,
    /// What is written.
    pub out: TreeBuilderOut<'a>,
}

/// What a run writes. See [`TreeBuilder`] for shapes.
#[derive(Debug)]
pub struct TreeBuilderOut<'a> {
    /// `[batch]`.
    pub status: Out<'a, u32>,
    /// `[batch]`.
    pub counts: Option<Out<'a, i32>>,
    /// `[batch, nodes]`.
    pub selected: Option<Out<'a, i32>>,
    /// `[batch, nodes]`.
    pub parents: Option<Out<'a, i32>>,
    /// `[batch, nodes]`.
    pub drafts: Option<Out<'a, i32>>,
    /// `[batch, nodes]`.
    pub first_child: Option<Out<'a, i32>>,
    /// `[batch, nodes]`.
    pub next_sibling: Option<Out<'a, i32>>,
    /// `[batch, nodes]`.
    pub depths: Option<Out<'a, i32>>,
    /// `[batch, nodes]`.
    pub node_positions: Option<Out<'a, i64>>,
    /// `[batch, nodes, ceil(nodes / 32)]`.
    pub mask: Option<Out<'a, u32>>,
    /// `[batch, leaves, max_depth + 1]`.
    pub paths: Option<Out<'a, i32>>,
    /// `[batch]`.
    pub leaf_counts: Option<Out<'a, i32>>,
}

impl<'a> TreeBuilderOut<'a> {
    /// `status`, and nothing besides.
    pub fn new(status: Out<'a, u32>) -> Self {
        TreeBuilderOut {
            status,
            counts: None,
            selected: None,
            parents: None,
            drafts: None,
            first_child: None,
            next_sibling: None,
            depths: None,
            node_positions: None,
            mask: None,
            paths: None,
            leaf_counts: None,
        }
    }
}

impl TreeBuilder {
    /// A plan for up to `batch` trees of up to `nodes` nodes, the root among them.
    pub fn builder(batch: usize, nodes: usize) -> TreeBuilderBuilder {
        TreeBuilderBuilder::new(batch, nodes)
    }

    /// The bytes that any kernel must move for all outputs, of full trees.
    pub fn traffic(&self) -> Traffic {
        self.inner.traffic()
    }

    /// Makes the trees on `stream`. On a CUDA stream it enqueues one kernel and returns.
    ///
    /// # Errors
    /// Nothing was launched or written: a buffer too short, misaligned, overlapping an output, on another device or
    /// ordered on another stream; scores of a plan without candidates, or none of one with; the output `drafts` without the
    /// input; on CUDA what CUDA said.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, mut args: TreeBuilderArgs<'_>) -> Result<()> {
        let stream = stream.as_stream();
        let plan = &self.inner;
        let refuse = |arg, what| Err(Error::Unsupported { arg, what });
        match (&args.scores, plan.chooses) {
            (Some(_), false) => return refuse("scores", "the plan has no candidates to choose from"),
            (None, true) => return refuse("scores", "this plan needs them"),
            _ => {}
        }
        if args.out.drafts.is_some() && args.drafts.is_none() {
            return refuse("drafts", "the output needs the input");
        }
        let (batch, rows, nodes) = (plan.batch, plan.batch * plan.candidates, plan.batch * plan.nodes);
        let out = &args.out;
        Operands::of(&stream)
            .input("parents", &args.parents, rows)?
            .input_if("cu_rows", &args.cu_rows, if batch > 0 { batch + 1 } else { 0 })?
            .input_if("drafts", &args.drafts, rows)?
            .input_if("scores", &args.scores, rows)?
            .input_if("positions", &args.positions, batch)?
            .output("status", &out.status, batch)?
            .output_if("counts", &out.counts, batch)?
            .output_if("selected", &out.selected, nodes)?
            .output_if("out.parents", &out.parents, nodes)?
            .output_if("out.drafts", &out.drafts, nodes)?
            .output_if("first_child", &out.first_child, nodes)?
            .output_if("next_sibling", &out.next_sibling, nodes)?
            .output_if("depths", &out.depths, nodes)?
            .output_if("node_positions", &out.node_positions, nodes)?
            .output_if("mask", &out.mask, nodes * plan.nodes.div_ceil(32))?
            .output_if("paths", &out.paths, batch * plan.leaves * (plan.max_depth + 1))?
            .output_if("leaf_counts", &out.leaf_counts, batch)?
            .finish()?;
        match stream.device() {
            Device::Host => {
                host::run(plan, &mut args);
                Ok(())
            }
            _ => cuda::run(plan, &stream, &args),
        }
    }
}
