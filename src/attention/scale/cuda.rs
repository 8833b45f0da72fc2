//! From plan and views to the C ABI.

use super::plan::Plan;
use super::{KeysAndValues, Rest};
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::stream::Stream;

#[cfg(nxs_kernels)]
pub(super) fn run<T: Float>(
    plan: &Plan,
    stream: &Stream<'_>,
    kv: &KeysAndValues<'_, T>,
    args: &Rest<'_, T>,
) -> Result<()> {
    use super::plan::Variant;
    use crate::dtype::DType;
    use crate::ffi;
    use crate::packed::Format;
    use core::ptr::{null, null_mut};

    if T::DTYPE == DType::F32 {
        return Err(Error::DType { arg: "q", what: "kernels take bf16 and f16" });
    }
    let (k, v, numbers) = match kv {
        KeysAndValues::Plain { k, v } => (k.span().address, v.span().address, [null(), null()]),
        KeysAndValues::Packed { k, k_numbers, v, v_numbers } => {
            let of = |numbers: &Option<crate::view::In<'_, f32>>, len: u64| match numbers {
                Some(view) if len > 0 => view.span().address as *const f32,
                _ => null(),
            };
            let numbers = [of(k_numbers, plan.numbers_len[0]), of(v_numbers, plan.numbers_len[1])];
            (k.span().address, v.span().address, numbers)
        }
    };
    for (arg, address, len) in [
        ("q", args.q.span().address, plan.q_len),
        ("k", k, plan.k_len),
        ("v", v, plan.v_len),
        ("k_numbers", numbers[0] as usize, plan.numbers_len[0]),
        ("v_numbers", numbers[1] as usize, plan.numbers_len[1]),
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
    let [k_numbers_stride_batch, k_numbers_stride_row, k_numbers_stride_head] = of(plan.numbers[0].strides());
    let [v_numbers_stride_batch, v_numbers_stride_row, v_numbers_stride_head] = of(plan.numbers[1].strides());
    let [lse_stride_batch, lse_stride_head, lse_stride_row] = plan.lse.strides();
    let [lengths_stride_index, lengths_stride_batch, lengths_stride_head] = plan.lengths.strides();
    let [batch, rows, heads, dim] = plan.out.shape();
    let [_, kv_rows, kv_heads, _] = plan.k.shape();
    let batch_stride = |stride| if plan.packed_keys { 0 } else { stride };
    let params = ffi::nxs_scale_attention_params {
        q: args.q.span().address as *const _,
        // The launcher looks at every address that it gets, also at those of which nothing is needed.
        k: if plan.k_len > 0 { k as *const _ } else { null() },
        v: if plan.v_len > 0 { v as *const _ } else { null() },
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
        kv_format: match plan.packed {
            None => ffi::NXS_KV_PLAIN,
            Some((Format::Fp8, _)) => ffi::NXS_KV_FP8,
            Some(_) => ffi::NXS_KV_INT4,
        } as i32,
        k_numbers_or_null: numbers[0],
        v_numbers_or_null: numbers[1],
        k_numbers_stride_batch: batch_stride(k_numbers_stride_batch),
        k_numbers_stride_row,
        k_numbers_stride_head,
        v_numbers_stride_batch: batch_stride(v_numbers_stride_batch),
        v_numbers_stride_row,
        v_numbers_stride_head,
    };
    crate::launch::launch("nxs_scale_attention", stream, |handle| {
        // SAFETY: every address the kernels reach lies in the operands, which are checked against the layouts: rows of q and
        // out by the items of the schedule, whose digest is compared on the device, or by clamped indices; keys by the tensor
        // maps or the bounds that the launcher gets; partial results by the size of the workspace.
        unsafe { ffi::nxs_scale_attention(&params, handle) }
    })
}

#[cfg(not(nxs_kernels))]
pub(super) fn run<T: Float>(_: &Plan, _: &Stream<'_>, _: &KeysAndValues<'_, T>, args: &Rest<'_, T>) -> Result<()> {
    let _ = (&args.schedule, &args.workspace);
    Err(Error::NotCompiled)
}
