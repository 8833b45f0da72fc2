//! From plan and views to the C ABI.

use super::KeyNormsArgs;
use super::plan::Plan;
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::stream::Stream;

#[cfg(nxs_kernels)]
pub(super) fn run<T: Float>(plan: &Plan, stream: &Stream<'_>, args: &KeyNormsArgs<'_, T>) -> Result<()> {
    use crate::dtype::DType;
    use crate::ffi;

    if T::DTYPE == DType::F32 {
        return Err(Error::DType { arg: "k", what: "kernels take bf16 and f16" });
    }
    if plan.k_len > 0 && !args.k.span().address.is_multiple_of(16) {
        return Err(Error::Alignment { arg: "k", need: 16 });
    }
    let [k_stride_set, k_stride_token, k_stride_head, _] = plan.k.strides();
    let [norms_stride_set, norms_stride_head, _] = plan.inverse_norms.strides();
    let [sum_stride_set, sum_stride_head, _] = plan.unit_sum.strides();
    let [lengths_stride_set, lengths_stride_head] = plan.lengths.strides();
    let [sets, tokens, heads, dim] = plan.sizes();
    let params = ffi::nxs_key_norms_params {
        // Of an empty view only the length is meant.
        k: if plan.k_len > 0 { args.k.span().address as *const _ } else { core::ptr::null() },
        inverse_norms: args.inverse_norms.span().address as *mut _,
        unit_sum: args.unit_sum.span().address as *mut _,
        lengths_or_null: crate::launch::address(&args.lengths),
        parts: args
            .workspace
            .as_ref()
            .filter(|_| plan.workspace_bytes() > 0)
            .map_or(core::ptr::null_mut(), |view| view.span().address as *mut _),
        places: plan.places.params(&args.pages, plan.inverse_norms.shape()),
        k_stride_set,
        k_stride_token,
        k_stride_head,
        norms_stride_set,
        norms_stride_head,
        sum_stride_set,
        sum_stride_head,
        lengths_stride_set,
        lengths_stride_head,
        sets: sets as i64,
        tokens: tokens as i64,
        heads: heads as i32,
        dim: dim as i32,
        span: plan.span() as i32,
        accumulate: plan.accumulate.into(),
        dtype: T::DTYPE as i32,
        eps: plan.eps(),
    };
    crate::launch::launch("nxs_key_norms", stream, |handle| {
        // SAFETY: every address the kernels reach lies in the operands, which are checked against the layouts; lengths are
        // clamped, and the workspace is as large as the plan says.
        unsafe { ffi::nxs_key_norms(&params, handle) }
    })
}

#[cfg(not(nxs_kernels))]
pub(super) fn run<T: Float>(plan: &Plan, _stream: &Stream<'_>, _args: &KeyNormsArgs<'_, T>) -> Result<()> {
    let _ = plan.span();
    Err(Error::NotCompiled)
}
