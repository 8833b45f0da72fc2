//! From plan and views to the C ABI.

use super::VisualVerifierArgs;
use super::plan::Plan;
use crate::dtype::Float;
use crate::error::Result;
use crate::stream::Stream;

#[cfg(nxs_kernels)]
pub(super) fn run<T: Float>(plan: &Plan, stream: &Stream<'_>, args: &VisualVerifierArgs<'_, T>) -> Result<()> {
    use super::plan::RuleOfPlan;
    use super::{Embeddings, Neighbours};
    use crate::dtype::DType;
    use crate::ffi;
    use crate::launch::{address, address_mut};

    let options = &args.options;
    let (neighbours, neighbours_dtype) = match &options.neighbours {
        Some(Neighbours::U16(view)) => (view.span().address, DType::U16),
        Some(Neighbours::I32(view)) => (view.span().address, DType::I32),
        None => (0, DType::U16),
    };
    let (embeddings, embeddings_dtype) = match &options.embeddings {
        Some(Embeddings::F32(view)) => (view.span().address, DType::F32),
        Some(Embeddings::F16(view)) => (view.span().address, DType::F16),
        Some(Embeddings::BF16(view)) => (view.span().address, DType::BF16),
        None => (0, DType::F32),
    };
    let mut params = ffi::nxs_visual_verify_params {
        target: args.target.span().address as *const _,
        target_free_or_null: address(&options.target_free),
        draft_or_null: address(&options.draft),
        draft_free_or_null: address(&options.draft_free),
        cu_rows: args.cu_rows.span().address as *const _,
        drafts: args.drafts.span().address as *const _,
        row_index_or_null: address(&options.row_index),
        draft_row_or_null: address(&options.draft_row),
        draft_stats_or_null: address(&options.draft_stats),
        allow_or_null: address(&options.allow),
        syntax_or_null: address(&options.syntax),
        neighbours_or_null: neighbours as *const _,
        embeddings_or_null: embeddings as *const _,
        temperature_or_null: address(&options.temperature),
        draft_temperature_or_null: address(&options.draft_temperature),
        guidance_or_null: address(&options.guidance),
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
        redrafts_or_null: address_mut(&args.out.redrafts),
        redraft_stats_or_null: address_mut(&args.out.redraft_stats),
        workspace: args.workspace.span().address as *mut _,
        counters: args.counters.span().address as *mut _,
        target_stride_row: plan.target_stride,
        draft_stride_row: plan.draft_stride,
        allow_stride_row: plan.allow_stride,
        neighbours_stride_row: plan.neighbours_stride,
        embeddings_stride_row: plan.embeddings_stride,
        batch: plan.batch as i64,
        vocab: plan.vocab as i64,
        target_rows: plan.target_rows as i64,
        draft_rows: plan.draft_rows as i64,
        first_code: plan.first_code as i64,
        codes: plan.codes as i64,
        max_drafts: plan.max_drafts as i32,
        redraft: plan.redraft as i32,
        fallback: plan.fallback,
        blocks: plan.blocks() as i32,
        dtype: T::DTYPE as i32,
        neighbours_dtype: neighbours_dtype as i32,
        embeddings_dtype: embeddings_dtype as i32,
        ..Default::default()
    };
    match plan.rule {
        RuleOfPlan::Lantern { accumulated, zeroed, bound } => {
            params.rule = ffi::NXS_VISUAL_LANTERN as i32;
            (params.accumulated, params.zeroed) = (accumulated as i32, zeroed as i32);
            params.bound = f32::from_bits(bound);
        }
        RuleOfPlan::Grouped { below, above, probability_gap, distance, dim } => {
            params.rule = ffi::NXS_VISUAL_GROUPED as i32;
            (params.below, params.above, params.dim) = (below as i32, above as i32, dim as i32);
            params.probability_gap = f32::from_bits(probability_gap);
            params.distance = f32::from_bits(distance);
        }
        RuleOfPlan::Jacobi => params.rule = ffi::NXS_VISUAL_JACOBI as i32,
    }
    crate::launch::launch("nxs_visual_verify", stream, |handle| {
        // SAFETY: every address the kernel reaches lies in the operands, which are checked against the layouts; indices
        // from device memory are checked by the kernel against the sizes in the params.
        unsafe { ffi::nxs_visual_verify(&params, handle) }
    })
}

#[cfg(not(nxs_kernels))]
pub(super) fn run<T: Float>(plan: &Plan, _: &Stream<'_>, _: &VisualVerifierArgs<'_, T>) -> Result<()> {
    let _ = plan.blocks();
    Err(crate::Error::NotCompiled)
}
