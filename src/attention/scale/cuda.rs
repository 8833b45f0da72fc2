//! From plan and views to the C ABI.

use super::ScaleAttentionArgs;
use super::plan::Plan;
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::stream::Stream;

#[cfg(nxs_kernels)]
pub(super) fn run<T: Float>(plan: &Plan, stream: &Stream<'_>, args: &ScaleAttentionArgs<'_, T>) -> Result<()> {
    use super::plan::Variant;
    use crate::dtype::DType;
    use crate::ffi;
    use core::ptr::{null, null_mut};

    if T::DTYPE == DType::F32 {
        return Err(Error::DType { arg: "q", what: "kernels take bf16 and f16" });
    }
    for (arg, address, len) in [
        ("q", args.q.span().address, plan.q_len),
        ("k", args.k.span().address, plan.k_len),
        ("v", args.v.span().address, plan.v_len),
        ("out", args.out.span().address, plan.out_len),
        ("schedule", args.schedule.span().address, plan.out_len),
    ] {
        if len > 0 && address % 16 != 0 {
            return Err(Error::Alignment { arg, need: 16 });
        }
    }
    let of = |strides: [i64; 4]| [strides[0], strides[1], strides[2]];
    let [q_stride_batch, q_stride_row, q_stride_head] = of(plan.q.strides());
    let [k_stride_batch, k_stride_row, k_stride_head] = of(plan.k.strides());
    let [v_stride_batch, v_stride_row, v_stride_head] = of(plan.v.strides());
    let [out_stride_batch, out_stride_row, out_stride_head] = of(plan.out.strides());
    let [lse_stride_batch, lse_stride_head, lse_stride_row] = plan.lse.strides();
    let [lengths_stride_index, lengths_stride_batch, lengths_stride_head] = plan.lengths.strides();
    let [batch, rows, heads, dim] = plan.out.shape();
    let [_, kv_rows, kv_heads, _] = plan.k.shape();
    let batch_stride = |stride| if plan.packed_keys { 0 } else { stride };
    let params = ffi::nxs_scale_attention_params {
        q: args.q.span().address as *const _,
        // The launcher looks at every address that it gets, also at those of which nothing is needed.
        k: if plan.k_len > 0 { args.k.span().address as *const _ } else { null() },
        v: if plan.v_len > 0 { args.v.span().address as *const _ } else { null() },
        out: args.out.span().address as *mut _,
        lse_or_null: crate::launch::address_mut(&args.lse),
        schedule: args.schedule.span().address as *const _,
        schedule_head_or_null: plan.schedule.words().as_ptr(),
        lengths_or_null: crate::launch::address(&args.lengths),
        row_index_or_null: args
            .row_index
            .as_ref()
            .filter(|_| plan.gathers)
            .map_or(null(), |view| view.span().address as *const _),
        kv_offset_or_null: args
            .kv_offset
            .as_ref()
            .filter(|_| plan.packed_keys)
            .map_or(null(), |view| view.span().address as *const _),
        parts_or_null: args
            .workspace
            .as_ref()
            .filter(|_| plan.workspace_bytes > 0)
            .map_or(null_mut(), |view| view.span().address as *mut _),
        q_stride_batch,
        q_stride_row,
        q_stride_head,
        k_stride_batch: batch_stride(k_stride_batch),
        k_stride_row,
        k_stride_head,
        v_stride_batch: batch_stride(v_stride_batch),
        v_stride_row,
        v_stride_head,
        out_stride_batch,
        out_stride_row,
        out_stride_head,
        lse_stride_batch,
        lse_stride_head,
        lse_stride_row,
        lengths_stride_index,
        lengths_stride_batch,
        lengths_stride_head,
        row_index_stride_batch: plan.row_index.strides()[0],
        batch: batch as i64,
        rows: rows as i64,
        q_rows: plan.q.shape()[1] as i64,
        kv_rows: kv_rows as i64,
        heads: heads as i32,
        kv_heads: kv_heads as i32,
        dim: dim as i32,
        items: plan.schedule.items() as i32,
        splits: plan.schedule.splits() as i32,
        pack: plan.schedule.pack() as i32,
        groups: plan.schedule.groups() as i32,
        section: plan.section as i32,
        length_count: plan.length_count as i32,
        schedule_head_words: plan.schedule.head_words() as i32,
        digest: plan.schedule.digest(),
        dtype: T::DTYPE as i32,
        variant: i32::from(plan.variant == Variant::Hopper),
        blocks: plan.blocks as i32,
        scale: plan.scale,
        logit_bound: plan.logit_bound,
    };
    crate::launch::launch("nxs_scale_attention", stream, |handle| {
        // SAFETY: every address the kernels reach lies in the operands, which are checked against the layouts: rows of q and
        // out by the items of the schedule, whose digest is compared on the device, or by clamped indices; keys by the tensor
        // maps or the bounds that the launcher gets; partial results by the size of the workspace.
        unsafe { ffi::nxs_scale_attention(&params, handle) }
    })
}

#[cfg(not(nxs_kernels))]
pub(super) fn run<T: Float>(_: &Plan, _: &Stream<'_>, _: &ScaleAttentionArgs<'_, T>) -> Result<()> {
    Err(Error::NotCompiled)
}
