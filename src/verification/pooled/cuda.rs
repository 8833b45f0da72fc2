//! From plan and views to the C ABI.

use super::PooledVerifierArgs;
use super::plan::Plan;
use crate::dtype::Float;
use crate::error::Result;
use crate::stream::Stream;

#[cfg(nxs_kernels)]
pub(super) fn run<T: Float>(plan: &Plan, stream: &Stream<'_>, args: &PooledVerifierArgs<'_, T>) -> Result<()> {
    use crate::dtype::DType;
    use crate::ffi;
    use crate::launch::{address, address_mut};
    use crate::verification::Neighbours;

    let options = &args.options;
    let (neighbours, neighbours_dtype) = match &options.neighbours {
        Some(Neighbours::U16(view)) => (view.span().address, DType::U16),
        Some(Neighbours::I32(view)) => (view.span().address, DType::I32),
        None => (0, DType::U16),
    };
    let params = ffi::nxs_pooled_verify_params {
        target: args.target.span().address as *const _,
        target_free_or_null: address(&options.target_free),
        drafts: args.drafts.span().address as *const _,
        neighbours_or_null: neighbours as *const _,
        temperature_or_null: address(&options.temperature),
        guidance_or_null: address(&options.guidance),
        top_k_or_null: address(&options.top_k),
        top_p_or_null: address(&options.top_p),
        min_p_or_null: address(&options.min_p),
        threshold_or_null: address(&options.threshold),
        resample: args.out.resample.span().address as *mut _,
        positions_or_null: address_mut(&args.out.positions),
        islands_or_null: address_mut(&args.out.islands),
        counts: args.out.counts.span().address as *mut _,
        pooled_or_null: address_mut(&args.out.pooled),
        status: args.out.status.span().address as *mut _,
        workspace: args.workspace.span().address as *mut _,
        counters: args.counters.span().address as *mut _,
        target_stride_row: plan.target_stride,
        neighbours_stride_row: plan.neighbours_stride,
        batch: plan.batch as i64,
        height: plan.height as i64,
        width: plan.width as i64,
        vocab: plan.vocab as i64,
        first_code: plan.first_code as i64,
        codes: plan.codes as i64,
        neighbours: plan.neighbours as i32,
        radius: plan.radius as i32,
        threshold: f32::from_bits(plan.threshold),
        blocks: plan.blocks() as i32,
        dtype: T::DTYPE as i32,
        neighbours_dtype: neighbours_dtype as i32,
    };
    crate::launch::launch("nxs_pooled_verify", stream, |handle| {
        // SAFETY: every address the kernel reaches lies in the operands, which are checked against the layouts; ids from
        // device memory are checked by the kernel against the sizes in the params.
        unsafe { ffi::nxs_pooled_verify(&params, handle) }
    })
}

#[cfg(not(nxs_kernels))]
pub(super) fn run<T: Float>(plan: &Plan, _: &Stream<'_>, _: &PooledVerifierArgs<'_, T>) -> Result<()> {
    let _ = plan.blocks();
    Err(crate::Error::NotCompiled)
}
