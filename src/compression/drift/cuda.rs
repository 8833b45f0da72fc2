//! From plan and views to the C ABI.

use super::DriftArgs;
use super::plan::Plan;
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::stream::Stream;

#[cfg(nxs_kernels)]
pub(super) fn run<P: Float>(plan: &Plan, stream: &Stream<'_>, args: &DriftArgs<'_, P>) -> Result<()> {
    use crate::ffi;
    use crate::launch::{address, address_mut};
    use crate::layout::Access;

    let (features, previous) = (args.features.span().address, args.previous.span().address);
    // A buffer of which nothing is reached may lie anywhere.
    let reached = plan.chunks > 0 && plan.elements > 0;
    let misaligned =
        [("features", features), ("previous", previous)].into_iter().find(|(_, at)| reached && at % 16 != 0);
    if let (Access::Wide, Some((arg, _))) = (plan.access, misaligned) {
        return Err(Error::Alignment { arg, need: 16 });
    }
    let params = ffi::nxs_drift_params {
        features: features as *const _,
        previous: previous as *mut _,
        accumulated: args.accumulated.span().address as *mut _,
        steps: args.steps.span().address as *mut _,
        force_or_null: address(&args.force),
        decision: args.decision.span().address as *mut _,
        change_or_null: address_mut(&args.change),
        workspace: args.workspace.span().address as *mut _,
        counters: args.counters.span().address as *mut _,
        features_stride_chunk: plan.features_stride,
        previous_stride_chunk: plan.previous_stride,
        chunks: plan.chunks as i64,
        elements: plan.elements as i64,
        eps: plan.eps(),
        polynomial: plan.polynomial(),
        polynomial_terms: plan.terms as i32,
        threshold: plan.threshold(),
        warmup: plan.warmup,
        compute_before: plan.compute_before,
        compute_from: plan.compute_from,
        reset_forced: plan.reset_forced.into(),
        keep: plan.keep.into(),
        vector: (plan.wide && misaligned.is_none()).into(),
        dtype: P::DTYPE as i32,
    };
    crate::launch::launch("nxs_drift", stream, |handle| {
        // SAFETY: every address the kernel reaches lies in the operands, which are checked against the layouts.
        unsafe { ffi::nxs_drift(&params, handle) }
    })
}

#[cfg(not(nxs_kernels))]
pub(super) fn run<P: Float>(plan: &Plan, _stream: &Stream<'_>, _args: &DriftArgs<'_, P>) -> Result<()> {
    let _ = (plan.wide, plan.access);
    Err(Error::NotCompiled)
}
