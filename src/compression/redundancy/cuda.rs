//! From plan and views to the C ABI.

use super::RedundancyArgs;
use super::plan::Plan;
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::stream::Stream;

#[cfg(nxs_kernels)]
pub(super) fn run<T: Float>(plan: &Plan, stream: &Stream<'_>, args: &RedundancyArgs<'_, T>) -> Result<()> {
    use core::ptr::null_mut;

    use super::plan::{Kind, Neighbour};
    use crate::dtype::DType;
    use crate::ffi;

    if T::DTYPE == DType::F32 {
        return Err(Error::DType { arg: "k", what: "kernels take bf16 and f16" });
    }
    if !args.k.span().address.is_multiple_of(16) {
        return Err(Error::Alignment { arg: "k", need: 16 });
    }
    let [k_stride_set, k_stride_token, k_stride_head, _] = plan.k.strides();
    let [norms_stride_set, norms_stride_head, _] = plan.inverse_norms.strides();
    let [sum_stride_set, sum_stride_head, _] = plan.unit_sum.strides();
    let [scores_stride_set, scores_stride_head, _] = plan.scores.strides();
    let [lengths_stride_set, lengths_stride_head] = plan.lengths.strides();
    let [sets, tokens, heads, dim] = plan.sizes();
    let workspace = args.workspace.as_ref().map_or(null_mut(), |view| view.span().address as *mut f32);
    let mut params = ffi::nxs_redundancy_params {
        k: args.k.span().address as *const _,
        inverse_norms: args.inverse_norms.span().address as *const _,
        unit_sum: args.unit_sum.span().address as *const _,
        scores: args.scores.span().address as *mut _,
        lengths_or_null: crate::launch::address(&args.lengths),
        places: plan.places.params(&args.pages, plan.scores.shape()),
        k_stride_set,
        k_stride_token,
        k_stride_head,
        norms_stride_set,
        norms_stride_head,
        sum_stride_set,
        sum_stride_head,
        scores_stride_set,
        scores_stride_head,
        lengths_stride_set,
        lengths_stride_head,
        sets: sets as i64,
        tokens: tokens as i64,
        heads: heads as i32,
        dim: dim as i32,
        span: plan.span() as i32,
        dtype: T::DTYPE as i32,
        ..Default::default()
    };
    match plan.form {
        Kind::Anchor { softmax: false } => params.form = ffi::NXS_REDUNDANCY_COSINE as i32,
        Kind::Anchor { softmax: true } => {
            params.form = ffi::NXS_REDUNDANCY_SOFTMAX as i32;
            params.parts_or_null = workspace;
        }
        Kind::Similar { threshold, neighbour, lonely } => {
            params.form = ffi::NXS_REDUNDANCY_SIMILAR as i32;
            params.retained_or_null = workspace.cast();
            params.threshold = f32::from_bits(threshold);
            params.lonely = lonely.into();
            params.first = (neighbour == Neighbour::First).into();
            params.nth = 1;
            match neighbour {
                Neighbour::Zero => params.nth = 0,
                Neighbour::FirstPercent(ratio) => (params.nth_of_length, params.ratio) = (1, f32::from_bits(ratio)),
                Neighbour::Last | Neighbour::First => {}
            }
        }
    }
    crate::launch::launch("nxs_redundancy", stream, |handle| {
        // SAFETY: every address the kernels reach lies in the operands, which are checked against the layouts; lengths are
        // clamped, and the workspace is as large as the plan says.
        unsafe { ffi::nxs_redundancy(&params, handle) }
    })
}

#[cfg(not(nxs_kernels))]
pub(super) fn run<T: Float>(plan: &Plan, _stream: &Stream<'_>, _args: &RedundancyArgs<'_, T>) -> Result<()> {
    let _ = plan.span();
    Err(Error::NotCompiled)
}
