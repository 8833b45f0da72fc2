//! From plan and views to the C ABI.

use super::TreeBuilderArgs;
use super::plan::Plan;
use crate::error::Result;
use crate::stream::Stream;

#[cfg(nxs_kernels)]
pub(super) fn run(plan: &Plan, stream: &Stream<'_>, args: &TreeBuilderArgs<'_>) -> Result<()> {
    use crate::ffi;
    use crate::launch::{address, address_mut};

    let out = &args.out;
    let params = ffi::nxs_tree_build_params {
        cu_rows_or_null: address(&args.cu_rows),
        parents: args.parents.span().address as *const _,
        drafts_or_null: address(&args.drafts),
        scores_or_null: address(&args.scores),
        positions_or_null: address(&args.positions),
        counts_or_null: address_mut(&out.counts),
        selected_or_null: address_mut(&out.selected),
        parents_or_null: address_mut(&out.parents),
        drafts_out_or_null: address_mut(&out.drafts),
        first_child_or_null: address_mut(&out.first_child),
        next_sibling_or_null: address_mut(&out.next_sibling),
        depths_or_null: address_mut(&out.depths),
        node_positions_or_null: address_mut(&out.node_positions),
        mask_or_null: address_mut(&out.mask),
        paths_or_null: address_mut(&out.paths),
        leaf_counts_or_null: address_mut(&out.leaf_counts),
        status: out.status.span().address as *mut _,
        batch: plan.batch as i64,
        candidates: plan.candidates as i32,
        nodes: plan.nodes as i32,
        leaves: plan.leaves as i32,
        max_depth: plan.max_depth as i32,
        cumulative: plan.sums.into(),
    };
    crate::launch::launch("nxs_tree_build", stream, |handle| {
        // SAFETY: every address the kernel reaches lies in the operands, which are checked against the shapes; indices
        // from device memory are checked by the kernel against the sizes in the params.
        unsafe { ffi::nxs_tree_build(&params, handle) }
    })
}

#[cfg(not(nxs_kernels))]
pub(super) fn run(_: &Plan, _: &Stream<'_>, _: &TreeBuilderArgs<'_>) -> Result<()> {
    Err(crate::Error::NotCompiled)
}
