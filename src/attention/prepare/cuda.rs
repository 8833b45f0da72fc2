//! From plan and views to the C ABI.

use super::PrepareArgs;
use super::plan::Plan;
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::stream::Stream;

#[cfg(nxs_kernels)]
pub(super) fn run<I: Float, O: Float, C: Float>(
    plan: &Plan,
    stream: &Stream<'_>,
    args: &PrepareArgs<'_, I, O, C>,
) -> Result<()> {
    use super::plan::{CheckedNorm, K, Q, V};
    use super::{AppendAt, Positions};
    use crate::dtype::Element;
    use crate::ffi;
    use crate::layout::Access;
    use crate::view::{In, Out};

    // A buffer of which nothing is reached may lie anywhere.
    fn input<T: Element>(view: &Option<In<'_, T>>, len: u64) -> usize {
        view.as_ref().filter(|_| len > 0).map_or(0, |view| view.span().address)
    }
    fn output<T: Element>(view: &Option<Out<'_, T>>, len: u64) -> usize {
        view.as_ref().filter(|_| len > 0).map_or(0, |view| view.span().address)
    }
    let [q, k, v] = &plan.tensors;
    let inputs = [input(&args.q, q.in_len), input(&args.k, k.in_len), input(&args.v, v.in_len)];
    let outputs = [output(&args.q_out, q.out_len), output(&args.k_cache, k.out_len), output(&args.v_cache, v.out_len)];
    let weights = [input(&args.q_weight, plan.dim), input(&args.k_weight, plan.dim), 0];
    let (cos, sin) = (input(&args.cos, plan.table_len), input(&args.sin, plan.table_len));

    // Wide access is a matter of the addresses too; narrow access is the fallback for a view at an odd offset.
    let [q_align, k_align, v_align] = plan.out_align.map(|align| align as usize);
    let misaligned = [
        ("q", inputs[Q], 16),
        ("k", inputs[K], 16),
        ("v", inputs[V], 16),
        ("q_out", outputs[Q], q_align),
        ("k_cache", outputs[K], k_align),
        ("v_cache", outputs[V], v_align),
        ("q_weight", weights[Q], 16),
        ("k_weight", weights[K], 16),
        ("cos", cos, 16),
        ("sin", sin, 16),
    ]
    .into_iter()
    .find(|(_, address, need)| address % need != 0);
    if let (Access::Wide, Some((arg, _, need))) = (plan.access, misaligned) {
        return Err(Error::Alignment { arg, need });
    }
    let schedule = plan.schedule(plan.wide && misaligned.is_none());

    let (norm, norm_eps) = match plan.norm {
        CheckedNorm::None => (ffi::NXS_NORM_NONE, 0),
        CheckedNorm::L2 { eps } => (ffi::NXS_NORM_L2, eps),
        CheckedNorm::Rms { eps } => (ffi::NXS_NORM_RMS, eps),
    };
    let tensor = |at: usize| {
        let tensor = &plan.tensors[at];
        let [input_stride_batch, input_stride_row, input_stride_head, _] = tensor.input.strides();
        let [out_stride_batch, out_stride_row, out_stride_head, _] = tensor.out.strides();
        // Values keep their length and direction.
        let norm = if at == V { ffi::NXS_NORM_NONE } else { norm };
        ffi::nxs_attention_prepare_tensor {
            input: inputs[at] as *const _,
            out: outputs[at] as *mut _,
            weight_or_null: weights[at] as *const _,
            head_scale_or_null: if at == Q {
                input(&args.q_multiplier, q.heads) as *const _
            } else {
                core::ptr::null()
            },
            input_stride_batch,
            input_stride_row,
            input_stride_head,
            out_stride_batch,
            out_stride_row,
            out_stride_head,
            out_rows: tensor.out.shape()[1] as i64,
            heads: tensor.heads as i32,
            out_dtype: if at == Q { O::DTYPE } else { C::DTYPE } as i32,
            norm: norm as i32,
            norm_eps: f32::from_bits(norm_eps),
            rotate: (at != V && plan.rope.is_some()).into(),
            append: (at != Q).into(),
        }
    };
    // A number that nothing uses may be any.
    let appends = plan.tensors[K..].iter().any(|tensor| tensor.heads > 0);
    let follows = plan.rope.is_some() && matches!(args.positions, Positions::Appended);
    let (append_at_or_null, append_at) = match &args.append_at {
        AppendAt::Rows(rows) => (rows.span().address as *const _, 0),
        AppendAt::Row(row) if appends || follows => (core::ptr::null(), *row),
        AppendAt::Row(_) => (core::ptr::null(), 0),
    };
    let (positions_or_null, position) = match &args.positions {
        Positions::Of(array) => (array.span().address as *const _, 0),
        Positions::From(first) if plan.rope.is_some() => (core::ptr::null(), *first),
        _ => (core::ptr::null(), 0),
    };
    let [positions_stride_batch, positions_stride_row] = plan.positions.strides();
    let rope = plan.rope.as_ref();
    let params =
        ffi::nxs_attention_prepare_params {
            tensor: [tensor(Q), tensor(K), tensor(V)],
            cos_or_null: cos as *const _,
            sin_or_null: sin as *const _,
            positions_or_null,
            append_at_or_null,
            flags_or_null: crate::launch::address_mut(&args.flags),
            table_stride_row: rope.map_or(0, |rope| rope.table.strides()[0]),
            positions_stride_batch,
            positions_stride_row,
            batch: plan.batch as i64,
            rows: plan.rows as i64,
            table_rows: rope.map_or(0, |rope| rope.table_rows as i64),
            append_at: append_at as i64,
            position: position as i64,
            dim: plan.dim as i32,
            rope: rope.map_or(ffi::NXS_ROPE_NONE, |rope| {
                if rope.half { ffi::NXS_ROPE_HALF } else { ffi::NXS_ROPE_INTERLEAVED }
            }) as i32,
            rotary_dim: rope.map_or(0, |rope| rope.rotary_dim as i32),
            rope_block: rope.map_or(0, |rope| rope.block as i32),
            table_full: rope.is_some_and(|rope| rope.full).into(),
            position_at_append: follows.into(),
            in_dtype: I::DTYPE as i32,
            vector: (schedule.vec > 1).into(),
            log2_lanes: schedule.lanes.trailing_zeros() as i32,
        };
    crate::launch::launch("nxs_attention_prepare", stream, |handle| {
        // SAFETY: every address the kernel reaches lies in the operands, which are checked against the layouts;
        // positions are clamped to the table, and rows that are not in a cache are not written.
        unsafe { ffi::nxs_attention_prepare(&params, handle) }
    })
}

#[cfg(not(nxs_kernels))]
pub(super) fn run<I: Float, O: Float, C: Float>(
    plan: &Plan,
    _stream: &Stream<'_>,
    _args: &PrepareArgs<'_, I, O, C>,
) -> Result<()> {
    let _ = (plan.wide, plan.access, plan.out_align);
    Err(Error::NotCompiled)
}
