//! From plan and views to the C ABI.

use super::ConfidenceRankArgs;
use super::plan::Plan;
use crate::dtype::Float;
use crate::error::Result;
use crate::stream::Stream;

#[cfg(nxs_kernels)]
pub(super) fn run<T: Float>(plan: &Plan, stream: &Stream<'_>, args: &ConfidenceRankArgs<'_, T>) -> Result<()> {
    use crate::ffi;
    use crate::launch::{address, address_mut};

    let params = ffi::nxs_confidence_rank_params {
        logits: args.logits.span().address as *const _,
        masked_or_null: address(&args.masked),
        temperature_or_null: address(&args.temperature),
        top_k_or_null: address(&args.top_k),
        top_p_or_null: address(&args.top_p),
        min_p_or_null: address(&args.min_p),
        threshold_or_null: address(&args.threshold),
        counts: args.counts.span().address as *const _,
        noise_or_null: address(&args.noise),
        seeds_or_null: address(&args.seeds),
        positions_or_null: address(&args.positions),
        tokens: args.out.tokens.span().address as *mut _,
        candidates_or_null: address_mut(&args.out.candidates),
        confidence_or_null: address_mut(&args.out.confidence),
        committed: args.out.committed.span().address as *mut _,
        status: args.out.status.span().address as *mut _,
        workspace: args.workspace.span().address as *mut _,
        counters: args.counters.span().address as *mut _,
        stride_row: plan.stride,
        batch: plan.batch as i64,
        length: plan.length as i64,
        vocab: plan.vocab as i64,
        confidence: plan.confidence as i32,
        row_in_step: plan.step as i32,
        blocks: plan.blocks() as i32,
        dtype: T::DTYPE as i32,
    };
    crate::launch::launch("nxs_confidence_rank", stream, |handle| {
        // SAFETY: every address the kernel reaches lies in the operands, which are checked against the layouts.
        unsafe { ffi::nxs_confidence_rank(&params, handle) }
    })
}

#[cfg(not(nxs_kernels))]
pub(super) fn run<T: Float>(plan: &Plan, _: &Stream<'_>, _: &ConfidenceRankArgs<'_, T>) -> Result<()> {
    let _ = plan.blocks();
    Err(crate::Error::NotCompiled)
}
