//! From plan and views to the C ABI.

use super::RvqEncodeArgs;
use super::plan::Plan;
use crate::dtype::{Code, Float};
use crate::error::Result;
use crate::stream::Stream;

#[cfg(nxs_kernels)]
pub(super) fn run<X: Float, C: Code>(plan: &Plan, stream: &Stream<'_>, args: &RvqEncodeArgs<'_, X, C>) -> Result<()> {
    use super::EncodeKernel;
    use crate::ffi;
    use crate::view::{In, Out};

    fn of<T, P>(view: &Option<Out<'_, T>>) -> *mut P {
        view.as_ref().map_or(core::ptr::null_mut(), |view| view.span().address as *mut P)
    }
    let weight = |pick: fn(&super::Projections<'_>) -> usize| {
        args.projections.as_ref().map_or(core::ptr::null(), |p| pick(p) as *const f32)
    };
    fn at(view: &In<'_, f32>) -> usize {
        view.span().address
    }
    let schedule = plan.schedule;
    let [batch, rows, _] = plan.input.shape();
    let [input_stride_batch, input_stride_row, input_stride_dim] = plan.input.strides();
    let [codes_stride_batch, codes_stride_level, codes_stride_row] = plan.codes.strides();
    let [quantized_stride_batch, quantized_stride_row, quantized_stride_dim] = plan.quantized.strides();
    let [residual_stride_batch, residual_stride_row, residual_stride_dim] = plan.residual.strides();
    let [distances_stride_batch, distances_stride_level, distances_stride_row] = plan.distances.strides();
    let params = ffi::nxs_rvq_encode_params {
        codebook: plan.geometry.params(args.codebook.span().address),
        input: args.input.span().address as *const _,
        codes: args.codes.span().address as *mut _,
        quantized_or_null: of(&args.quantized),
        residual_or_null: of(&args.residual),
        distances_or_null: of(&args.distances),
        histogram_or_null: of(&args.histogram),
        flags_or_null: of(&args.flags),
        in_weight_or_null: weight(|p| at(&p.in_weight)),
        in_bias_or_null: weight(|p| at(&p.in_bias)),
        out_weight_or_null: weight(|p| at(&p.out_weight)),
        out_bias_or_null: weight(|p| at(&p.out_bias)),
        input_stride_batch,
        input_stride_row,
        input_stride_dim,
        codes_stride_batch,
        codes_stride_level,
        codes_stride_row,
        quantized_stride_batch,
        quantized_stride_row,
        quantized_stride_dim,
        residual_stride_batch,
        residual_stride_row,
        residual_stride_dim,
        distances_stride_batch,
        distances_stride_level,
        distances_stride_row,
        batch: batch as i64,
        rows: rows as i64,
        levels: plan.levels as i32,
        latent: plan.latent as i32,
        dtype: X::DTYPE as i32,
        codes_dtype: C::DTYPE as i32,
        variant: match schedule.kernel {
            EncodeKernel::Portable => ffi::NXS_RVQ_ENCODE_SM80,
            EncodeKernel::Hopper => ffi::NXS_RVQ_ENCODE_SM90,
            EncodeKernel::Stream => ffi::NXS_RVQ_ENCODE_STREAM,
            EncodeKernel::Projected => ffi::NXS_RVQ_ENCODE_PROJECTED,
        } as i32,
        tile_rows: schedule.tile_rows as i32,
        stages: schedule.stages as i32,
        splits: schedule.splits as i32,
        sharers: schedule.sharers as i32,
    };
    crate::launch::launch("nxs_rvq_encode", stream, |handle| {
        // SAFETY: every address the kernel reaches lies in the operands, which are checked against the layouts; codes are
        // less than the entries, whatever the input and the prepared memory hold.
        unsafe { ffi::nxs_rvq_encode(&params, handle) }
    })
}

#[cfg(not(nxs_kernels))]
pub(super) fn run<X: Float, C: Code>(plan: &Plan, _stream: &Stream<'_>, _args: &RvqEncodeArgs<'_, X, C>) -> Result<()> {
    let _ = plan.schedule;
    Err(crate::error::Error::NotCompiled)
}
