//! From plan and views to the C ABI.

use super::DraftSampleArgs;
use super::plan::Plan;
use crate::dtype::Float;
use crate::error::Result;
use crate::stream::Stream;

#[cfg(nxs_kernels)]
pub(super) fn run<Q: Float>(plan: &Plan, stream: &Stream<'_>, args: &DraftSampleArgs<'_, Q>) -> Result<()> {
    use crate::ffi;
    use crate::launch::{address, address_mut};
    use crate::verification::Siblings;

    let schedule = plan.schedule();
    let params = ffi::nxs_draft_sample_params {
        logits: args.logits.span().address as *const _,
        temperature_or_null: address(&args.temperature),
        top_k_or_null: address(&args.top_k),
        top_p_or_null: address(&args.top_p),
        min_p_or_null: address(&args.min_p),
        draft_to_target_or_null: address(&args.draft_to_target),
        seeds_or_null: address(&args.seeds),
        positions_or_null: address(&args.positions),
        rows_in_step_or_null: address(&args.rows_in_step),
        uniforms_or_null: address(&args.uniforms),
        tokens: args.tokens.span().address as *mut _,
        stats_or_null: address_mut(&args.stats),
        log_probs_or_null: address_mut(&args.log_probs),
        status: args.status.span().address as *mut _,
        workspace: args.workspace.span().address as *mut _,
        counters: args.counters.span().address as *mut _,
        stride_row: plan.stride,
        rows: plan.rows as i64,
        vocab: plan.vocab as i64,
        row_in_step: plan.row_in_step as i32,
        drafts: plan.drafts as i32,
        with_replacement: i32::from(plan.siblings == Siblings::WithReplacement),
        fallback: plan.fallback,
        chunks_per_item: schedule.chunks_per_item as i32,
        blocks: schedule.blocks as i32,
        dtype: Q::DTYPE as i32,
    };
    crate::launch::launch("nxs_draft_sample", stream, |handle| {
        // SAFETY: every address the kernel reaches lies in the operands, which are checked against the layouts.
        unsafe { ffi::nxs_draft_sample(&params, handle) }
    })
}

#[cfg(not(nxs_kernels))]
pub(super) fn run<Q: Float>(_plan: &Plan, _stream: &Stream<'_>, _args: &DraftSampleArgs<'_, Q>) -> Result<()> {
    Err(crate::Error::NotCompiled)
}
