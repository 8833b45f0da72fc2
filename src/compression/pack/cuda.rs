//! From plan and views to the C ABI.

use super::plan::Plan;
use super::{PackArgs, UnpackArgs};
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::stream::Stream;

#[cfg(nxs_kernels)]
use crate::ffi;

#[cfg(nxs_kernels)]
pub(super) fn pack<T: Float, N: Float>(plan: &Plan, stream: &Stream<'_>, args: &PackArgs<'_, T, N>) -> Result<()> {
    let input = args.input.span().address;
    let codes = args.codes.span().address;
    let mut params = params::<T, N>(plan, ("input", input, &plan.input), codes)?;
    params.unpacked = input as *mut _;
    params.numbers_or_null = crate::launch::address_mut(&args.numbers);
    params.scales_or_null = crate::launch::address(&args.scales);
    params.kept_or_null = crate::launch::address(&args.kept);
    params.counts_or_null = crate::launch::address(&args.counts);
    params.flags_or_null = crate::launch::address_mut(&args.flags);
    run(plan, params, stream)
}

#[cfg(nxs_kernels)]
pub(super) fn unpack<T: Float, N: Float>(plan: &Plan, stream: &Stream<'_>, args: &UnpackArgs<'_, T, N>) -> Result<()> {
    let out = args.out.span().address;
    let codes = args.codes.span().address;
    let mut params = params::<T, N>(plan, ("out", out, &plan.out), codes)?;
    params.unpack = 1;
    params.unpacked = out as *mut _;
    params.numbers_or_null = crate::launch::address::<N, core::ffi::c_void>(&args.numbers).cast_mut();
    params.scales_or_null = crate::launch::address(&args.scales);
    params.counts_or_null = crate::launch::address(&args.counts);
    params.flags_or_null = crate::launch::address_mut(&args.flags);
    run(plan, params, stream)
}

/// All but the operands that differ by direction.
#[cfg(nxs_kernels)]
fn params<T: Float, N: Float>(
    plan: &Plan,
    (name, unpacked, layout): (&'static str, usize, &crate::layout::Layout<4>),
    codes: usize,
) -> Result<ffi::nxs_pack_params> {
    use crate::layout::Access;
    use crate::packed::{Codebook, Format};

    // Wide access is a matter of the addresses too; narrow access is the fallback for a view at an odd offset.
    let misaligned = [(name, unpacked, 16), ("codes", codes, plan.codes_align())]
        .into_iter()
        .find(|(_, address, need)| plan.codes_len > 0 && address % need != 0);
    if let (Access::Wide, Some((arg, _, need))) = (plan.access, misaligned) {
        return Err(Error::Alignment { arg, need });
    }
    let vector = plan.access != Access::Narrow && misaligned.is_none() && plan.check_wide(name, layout).is_ok();

    let [unpacked_stride_set, unpacked_stride_row, unpacked_stride_head, _] = layout.strides();
    let [codes_stride_set, codes_stride_row, codes_stride_head, _] = plan.codes.strides();
    let [numbers_stride_set, numbers_stride_row, numbers_stride_head, _] = plan.numbers.strides();
    let [scales_stride_set, scales_stride_head] = plan.scales.strides();
    let [kept_stride_set, kept_stride_head, _] = plan.kept.strides();
    let [counts_stride_set, counts_stride_head] = plan.counts.strides();
    let [sets, rows, heads, _] = plan.codes.shape();
    let mut params = ffi::nxs_pack_params {
        codes: codes as *mut _,
        unpacked_stride_set,
        unpacked_stride_row,
        unpacked_stride_head,
        codes_stride_set,
        codes_stride_row,
        codes_stride_head,
        numbers_stride_set,
        numbers_stride_row,
        numbers_stride_head,
        scales_stride_set,
        scales_stride_head,
        kept_stride_set,
        kept_stride_head,
        counts_stride_set,
        counts_stride_head,
        sets: sets as i64,
        tokens: plan.input.shape()[1] as i64,
        rows: rows as i64,
        heads: heads as i32,
        dim: plan.dim() as i32,
        bits: plan.format.bits() as i32,
        rotate: plan.rotation.is_some().into(),
        signs: plan.rotation.unwrap_or_default().sign_words(),
        vector: vector.into(),
        dtype: T::DTYPE as i32,
        numbers_dtype: N::DTYPE as i32,
        ..Default::default()
    };
    let format = match plan.format {
        Format::Fp8 => ffi::NXS_PACK_FP8,
        Format::Int8 => ffi::NXS_PACK_INT8,
        Format::Uniform { group, .. } => {
            params.group = group.map_or(plan.dim() as i32, |group| group as i32);
            ffi::NXS_PACK_UNIFORM
        }
        Format::Channel { rows, .. } => {
            params.group = rows as i32;
            ffi::NXS_PACK_CHANNEL
        }
        Format::LloydMax { bits, renormalize } => {
            let book = Codebook::of(bits);
            params.centroids[..book.centroids.len()].copy_from_slice(book.centroids);
            params.thresholds[..book.thresholds.len()].copy_from_slice(book.thresholds);
            params.renormalize = renormalize.into();
            ffi::NXS_PACK_LLOYD_MAX
        }
    };
    params.format = format as i32;
    Ok(params)
}

#[cfg(nxs_kernels)]
fn run(plan: &Plan, mut params: ffi::nxs_pack_params, stream: &Stream<'_>) -> Result<()> {
    // Operands that the plan does not need may be there all the same.
    if plan.numbers_len == 0 {
        params.numbers_or_null = core::ptr::null_mut();
    }
    if !plan.given {
        params.scales_or_null = core::ptr::null();
    }
    if !plan.gathers {
        params.kept_or_null = core::ptr::null();
    }
    if !plan.counted {
        params.counts_or_null = core::ptr::null();
    }
    crate::launch::launch("nxs_pack", stream, |handle| {
        // SAFETY: every address the kernel reaches lies in the operands, which are checked against the layouts; kept
        // indices and counts are clamped.
        unsafe { ffi::nxs_pack(&params, handle) }
    })
}

#[cfg(not(nxs_kernels))]
pub(super) fn pack<T: Float, N: Float>(plan: &Plan, _: &Stream<'_>, _: &PackArgs<'_, T, N>) -> Result<()> {
    let _ = (plan.access, plan.codes_align());
    Err(Error::NotCompiled)
}

#[cfg(not(nxs_kernels))]
pub(super) fn unpack<T: Float, N: Float>(_: &Plan, _: &Stream<'_>, _: &UnpackArgs<'_, T, N>) -> Result<()> {
    Err(Error::NotCompiled)
}
