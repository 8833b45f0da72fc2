//! From plan and views to the C ABI.

use super::VerifierArgs;
use super::plan::Plan;
use crate::dtype::Float;
use crate::error::Result;
use crate::stream::Stream;

#[cfg(nxs_kernels)]
pub(super) fn run<P: Float, Q: Float>(plan: &Plan, stream: &Stream<'_>, args: &VerifierArgs<'_, P, Q>) -> Result<()> {
    use crate::ffi;
    use crate::launch::{address, address_mut};

    let schedule = plan.schedule();
    let options = &args.options;
    let params = ffi::nxs_verify_params {
        target: args.target.span().address as *const _,
        draft_or_null: address(&options.draft),
        cu_rows: args.cu_rows.span().address as *const _,
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
        tokens: args.out.tokens.span().address as *mut _,
        emitted: args.out.emitted.span().address as *mut _,
        accepted: args.out.accepted.span().address as *mut _,
        status: args.out.status.span().address as *mut _,
        last_row_or_null: address_mut(&args.out.last_row),
        log_probs_or_null: address_mut(&args.out.log_probs),
        workspace: args.workspace.span().address as *mut _,
        counters: args.counters.span().address as *mut _,
        target_stride_row: plan.target_stride,
        draft_stride_row: plan.draft_stride,
        allow_stride_row: plan.allow_stride,
        batch: plan.batch as i64,
        vocab: plan.vocab as i64,
        draft_vocab: plan.draft_vocab as i64,
        target_rows: plan.target_rows as i64,
        draft_rows: plan.draft_rows as i64,
        max_drafts: plan.max_drafts as i32,
        rule: plan.rule as i32,
        may_block: plan.may_block().into(),
        trials: plan.trials as i32,
        fallback: plan.fallback,
        chunks_per_item: schedule.chunks_per_item as i32,
        blocks: schedule.blocks as i32,
        cluster: schedule.cluster as i32,
        target_dtype: P::DTYPE as i32,
        draft_dtype: Q::DTYPE as i32,
    };
    crate::launch::launch("nxs_verify", stream, |handle| {
        // SAFETY: every address the kernel reaches lies in the operands, which are checked against the layouts; indices
        // from device memory are checked by the kernel against the sizes in the params.
        unsafe { ffi::nxs_verify(&params, handle) }
    })
}

#[cfg(not(nxs_kernels))]
pub(super) fn run<P: Float, Q: Float>(plan: &Plan, _: &Stream<'_>, _: &VerifierArgs<'_, P, Q>) -> Result<()> {
    let _ = plan.may_block();
    Err(crate::Error::NotCompiled)
}
