//! From plan and views to the C ABI.

use super::TreeVerifierArgs;
use super::plan::Plan;
use crate::dtype::Float;
use crate::error::Result;
use crate::stream::Stream;

#[cfg(nxs_kernels)]
pub(super) fn run<P: Float, Q: Float>(
    plan: &Plan,
    stream: &Stream<'_>,
    args: &TreeVerifierArgs<'_, P, Q>,
) -> Result<()> {
    use super::TreeLinks;
    use crate::ffi;
    use crate::launch::{address, address_mut};
    use crate::verification::Siblings;
    use core::ptr::null;

    let options = &args.options;
    let (parents, first_child, next_sibling) = match &args.tree {
        TreeLinks::Parents(parents) => (parents.span().address as *const i32, null(), null()),
        TreeLinks::Children { first_child, next_sibling } => {
            (null(), first_child.span().address as *const i32, next_sibling.span().address as *const i32)
        }
    };
    let params = ffi::nxs_tree_verify_params {
        target: args.target.span().address as *const _,
        draft_or_null: address(&options.draft),
        cu_rows_or_null: address(&options.cu_rows),
        parents_or_null: parents,
        first_child_or_null: first_child,
        next_sibling_or_null: next_sibling,
        drafts: args.drafts.span().address as *const _,
        row_index_or_null: address(&options.row_index),
        draft_row_or_null: address(&options.draft_row),
        draft_stats_or_null: address(&options.draft_stats),
        target_to_draft_or_null: address(&options.target_to_draft),
        target_stats_or_null: address(&options.target_stats),
        allow_or_null: address(&options.allow),
        rules_or_null: address(&options.rules),
        temperature_or_null: address(&options.temperature),
        draft_temperature_or_null: address(&options.draft_temperature),
        top_k_or_null: address(&options.top_k),
        top_p_or_null: address(&options.top_p),
        min_p_or_null: address(&options.min_p),
        seeds_or_null: address(&options.seeds),
        positions_or_null: address(&options.positions),
        uniforms_or_null: address(&options.uniforms),
        kv_start_or_null: address(&options.kv_start),
        kv_slots_or_null: address(&options.kv_slots),
        tokens: args.out.tokens.span().address as *mut _,
        emitted: args.out.emitted.span().address as *mut _,
        accepted: args.out.accepted.span().address as *mut _,
        status: args.out.status.span().address as *mut _,
        last_row_or_null: address_mut(&args.out.last_row),
        path_or_null: address_mut(&args.out.path),
        kv_source_or_null: address_mut(&args.out.kv_source),
        kv_destination_or_null: address_mut(&args.out.kv_destination),
        log_probs_or_null: address_mut(&args.out.log_probs),
        workspace: args.workspace.span().address as *mut _,
        target_stride_row: plan.target_stride,
        draft_stride_row: plan.draft_stride,
        allow_stride_row: plan.allow_stride,
        batch: plan.batch as i64,
        vocab: plan.vocab as i64,
        draft_vocab: plan.draft_vocab as i64,
        target_rows: plan.target_rows as i64,
        draft_rows: plan.draft_rows as i64,
        max_nodes: plan.max_nodes as i32,
        max_depth: plan.max_depth as i32,
        rule: plan.rule as i32,
        without_replacement: (plan.siblings == Siblings::WithoutReplacement).into(),
        fallback: plan.fallback,
        cluster: plan.cluster as i32,
        shared_partials: plan.shared_partials().into(),
        target_dtype: P::DTYPE as i32,
        draft_dtype: Q::DTYPE as i32,
    };
    crate::launch::launch("nxs_tree_verify", stream, |handle| {
        // SAFETY: every address the kernel reaches lies in the operands, which are checked against the layouts; indices
        // from device memory are checked by the kernel against the sizes in the params.
        unsafe { ffi::nxs_tree_verify(&params, handle) }
    })
}

#[cfg(not(nxs_kernels))]
pub(super) fn run<P: Float, Q: Float>(plan: &Plan, _: &Stream<'_>, _: &TreeVerifierArgs<'_, P, Q>) -> Result<()> {
    let _ = plan.cluster;
    Err(crate::Error::NotCompiled)
}
