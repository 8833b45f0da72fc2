//! From plan and views to the C ABI.

use super::CompactArgs;
use super::plan::Plan;
use crate::dtype::Element;
#[cfg(not(nxs_kernels))]
use crate::error::Error;
use crate::error::Result;
use crate::stream::Stream;

#[cfg(nxs_kernels)]
pub(super) fn run<I: Element, O: Element>(
    plan: &Plan,
    stream: &Stream<'_>,
    args: &CompactArgs<'_, I, O>,
) -> Result<()> {
    use super::RopePairs;
    use super::plan::{K, V};
    use crate::error::Error;
    use crate::ffi;
    use crate::launch::{address, address_mut};
    use crate::layout::Access;

    // A buffer of which nothing is reached may lie anywhere.
    let reached = plan.sets * plan.heads * plan.kept > 0;
    let at = |address: usize| if reached { address } else { 0 };
    let input = |view: &Option<crate::view::In<'_, I>>| view.as_ref().map_or(0, |view| at(view.span().address));
    let output = |view: &Option<crate::view::Out<'_, O>>| view.as_ref().map_or(0, |view| at(view.span().address));
    let inputs = [input(&args.k), input(&args.v)];
    let outputs = [output(&args.k_out), output(&args.v_out)];
    let table = [&args.cos, &args.sin].map(|view| view.as_ref().map_or(0, |view| view.span().address));

    // The widest unit that the addresses allow as well; narrow access is the fallback for views at odd offsets.
    let misaligned = |unit: u64| {
        let [in_align, out_align] = plan.align(unit);
        let table_align = if plan.rotary_dim > 0 && unit == 8 { 16 } else { 4 };
        [
            ("k", inputs[K], in_align),
            ("v", inputs[V], in_align),
            ("k_out", outputs[K], out_align),
            ("v_out", outputs[V], out_align),
            ("cos", table[0], table_align),
            ("sin", table[1], table_align),
        ]
        .into_iter()
        .find(|&(_, address, need)| !(address as u64).is_multiple_of(need))
    };
    let mut unit = plan.unit;
    if let (Access::Wide, Some((arg, _, need))) = (plan.access, misaligned(unit)) {
        return Err(Error::Alignment { arg, need: need as usize });
    }
    while unit > plan.narrow_unit() && misaligned(unit).is_some() {
        // 8 elements, then the least; bytes by halves.
        unit = if plan.copies { unit / 2 } else { plan.narrow_unit() };
    }
    let schedule = plan.schedule(unit);

    let tensor = |at: usize| {
        let tensor = &plan.tensors[at];
        let [input_stride_set, input_stride_row, input_stride_head, _] = tensor.input.strides();
        let [out_stride_set, out_stride_row, out_stride_head, _] = tensor.out.strides();
        ffi::nxs_compact_tensor {
            input_or_null: inputs[at] as *const _,
            out_or_null: outputs[at] as *mut _,
            input_stride_set,
            input_stride_row,
            input_stride_head,
            out_stride_set,
            out_stride_row,
            out_stride_head,
            dim: tensor.dim as i64,
        }
    };
    let [input_stride_set, input_stride_head, input_stride_row] = plan.values.strides();
    let [out_stride_set, out_stride_head, out_stride_row] = plan.values_out.strides();
    let extra = |input_or_null, out_or_null| ffi::nxs_compact_extra {
        input_or_null,
        out_or_null,
        input_stride_set,
        input_stride_row,
        input_stride_head,
        out_stride_set,
        out_stride_row,
        out_stride_head,
    };
    let page_strides = [plan.input_pages, plan.out_pages].map(|words| (words / plan.sets.max(1)) as i64);
    let follows = plan.in_place && !plan.paged[1];
    let params = ffi::nxs_compact_params {
        tensor: [tensor(K), tensor(V)],
        positions: extra(address(&args.positions), address_mut(&args.positions_out)),
        extra: core::array::from_fn(|i| extra(address(&args.extras[i]), address_mut(&args.extras_out[i]))),
        indices: args.indices.span().address as *const _,
        counts_or_null: address(&args.counts),
        input_pages_or_null: address(&args.input_pages),
        out_pages_or_null: if follows { address(&args.input_pages) } else { address(&args.out_pages) },
        cos_or_null: table[0] as *const _,
        sin_or_null: table[1] as *const _,
        flags_or_null: address_mut(&args.flags),
        indices_stride_set: plan.indices.strides()[0],
        indices_stride_head: plan.indices.strides()[1],
        counts_stride_set: plan.counts.strides()[0],
        counts_stride_head: plan.counts.strides()[1],
        input_pages_stride_set: page_strides[0],
        out_pages_stride_set: page_strides[if follows { 0 } else { 1 }],
        table_stride_row: plan.table.strides()[0],
        table_rows: plan.table.shape()[0] as i64,
        sets: plan.sets as i64,
        heads: plan.heads as i64,
        tokens: plan.tokens as i64,
        kept: plan.kept as i64,
        input_rows: plan.input_rows as i64,
        out_rows: plan.out_rows as i64,
        page_rows: plan.page_rows as i64,
        first_position: plan.renumber.unwrap_or(0),
        renumber: plan.renumber.is_some().into(),
        rope: match plan.pairs {
            RopePairs::Interleaved => ffi::NXS_ROPE_INTERLEAVED,
            RopePairs::Half => ffi::NXS_ROPE_HALF,
        } as i32,
        rotary_dim: plan.rotary_dim as i32,
        in_place: plan.in_place.into(),
        slices: schedule.slices as i32,
        unit: schedule.unit as i32,
        log2_lanes: schedule.lanes.trailing_zeros() as i32,
        in_dtype: I::DTYPE as i32,
        out_dtype: O::DTYPE as i32,
    };
    crate::launch::launch("nxs_compact", stream, |handle| {
        // SAFETY: every address the kernels reach lies in the operands, which are checked against the layouts; indices, counts
        // and rotations are clamped, and a row whose page is not there is left out.
        unsafe { ffi::nxs_compact(&params, handle) }
    })
}

#[cfg(not(nxs_kernels))]
pub(super) fn run<I: Element, O: Element>(
    plan: &Plan,
    _stream: &Stream<'_>,
    _args: &CompactArgs<'_, I, O>,
) -> Result<()> {
    let _ = (plan.align(1), plan.narrow_unit(), plan.access);
    Err(Error::NotCompiled)
}
