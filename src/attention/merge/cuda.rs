//! From plan and views to the C ABI.

use super::MergeArgs;
use super::plan::Plan;
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::stream::Stream;

#[cfg(nxs_kernels)]
pub(super) fn run<P: Float, O: Float>(plan: &Plan, stream: &Stream<'_>, args: &MergeArgs<'_, P, O>) -> Result<()> {
    use crate::ffi;
    use crate::layout::Access;

    let (parts, lse, out) = (args.parts.span(), args.lse.span(), args.out.span());
    // Wide access is a matter of the addresses too; narrow access is the fallback for a view at an odd offset.
    let misaligned =
        [("parts", parts.address, 16, plan.parts_len), ("out", out.address, plan.out_align as usize, plan.out_len)]
            .into_iter()
            .find(|(_, address, need, len)| *len > 0 && address % need != 0);
    if let (Access::Wide, Some((arg, _, need, _))) = (plan.access, misaligned) {
        return Err(Error::Alignment { arg, need });
    }
    let schedule = plan.schedule(plan.wide && misaligned.is_none());

    let [parts_stride_part, parts_stride_batch, parts_stride_row, parts_stride_head, _] = plan.parts.strides();
    let [lse_stride_part, lse_stride_batch, lse_stride_head, lse_stride_row] = plan.lse.strides();
    let [out_stride_batch, out_stride_row, out_stride_head, _] = plan.out.strides();
    let [out_lse_stride_batch, out_lse_stride_head, out_lse_stride_row] = plan.out_lse.strides();
    let [of_parts, batch, rows, heads, dim] = plan.parts.shape();
    let params = ffi::nxs_attention_merge_params {
        parts: parts.address as *const _,
        lse: lse.address as *const _,
        out: out.address as *mut _,
        out_lse_or_null: crate::launch::address_mut(&args.out_lse),
        parts_stride_part,
        parts_stride_batch,
        parts_stride_row,
        parts_stride_head,
        lse_stride_part,
        lse_stride_batch,
        lse_stride_head,
        lse_stride_row,
        out_stride_batch,
        out_stride_row,
        out_stride_head,
        out_lse_stride_batch,
        out_lse_stride_head,
        out_lse_stride_row,
        batch: batch as i64,
        rows: rows as i64,
        parts_count: of_parts as i32,
        heads: heads as i32,
        dim: dim as i32,
        parts_dtype: P::DTYPE as i32,
        out_dtype: O::DTYPE as i32,
        accumulate: plan.accumulate.into(),
        vector: (schedule.vec > 1).into(),
        log2_lanes: schedule.lanes.trailing_zeros() as i32,
        gate_or_null: core::ptr::null(),
        gate: 0,
    };
    crate::launch::launch("nxs_attention_merge", stream, |handle| {
        // SAFETY: every address the kernel reaches lies in the operands, which are checked against the layouts.
        unsafe { ffi::nxs_attention_merge(&params, handle) }
    })
}

#[cfg(not(nxs_kernels))]
pub(super) fn run<P: Float, O: Float>(plan: &Plan, _stream: &Stream<'_>, _args: &MergeArgs<'_, P, O>) -> Result<()> {
    let _ = (plan.wide, plan.access, plan.out_align);
    Err(Error::NotCompiled)
}
