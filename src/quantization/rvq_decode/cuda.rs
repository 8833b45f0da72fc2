//! From plan and views to the C ABI.

use super::RvqDecodeArgs;
use super::plan::Plan;
use crate::dtype::{Code, Float};
use crate::error::{Error, Result};
use crate::stream::Stream;

#[cfg(nxs_kernels)]
pub(super) fn run<C: Code, E: Float, O: Float>(
    plan: &Plan,
    stream: &Stream<'_>,
    args: &RvqDecodeArgs<'_, C, E, O>,
) -> Result<()> {
    use crate::ffi;
    use crate::layout::Access;

    let (codes, codebooks, out) = (args.codes.span(), args.codebooks.span(), args.out.span());
    // Wide access is a matter of the addresses too; narrow access is the fallback for a view at an odd offset.
    // A buffer that nothing reaches may lie anywhere.
    let misaligned = [
        ("codebooks", codebooks.address, 16, plan.codebooks_len),
        ("out", out.address, plan.out_align as usize, plan.out_len),
    ]
    .into_iter()
    .find(|(_, address, need, len)| *len > 0 && address % need != 0);
    if let (Access::Wide, Some((arg, _, need, _))) = (plan.access, misaligned) {
        return Err(Error::Alignment { arg, need });
    }
    let schedule = plan.schedule(plan.wide && misaligned.is_none());

    let [codes_stride_batch, codes_stride_level, codes_stride_row] = plan.codes.strides();
    let [codebooks_stride_level, codebooks_stride_entry, _] = plan.codebooks.strides();
    let [out_stride_batch, out_stride_row, _] = plan.out.strides();
    let [batch, levels, rows] = plan.codes.shape();
    let params = ffi::nxs_rvq_decode_params {
        codes: codes.address as *const _,
        codebooks: codebooks.address as *const _,
        out: out.address as *mut _,
        flags_or_null: crate::launch::address_mut(&args.flags),
        codes_stride_batch,
        codes_stride_level,
        codes_stride_row,
        codebooks_stride_level,
        codebooks_stride_entry,
        out_stride_batch,
        out_stride_row,
        batch: batch as i64,
        rows: rows as i64,
        entries: plan.entries as i64,
        levels: levels as i32,
        dim: plan.dim() as i32,
        null_code: plan.null_code.unwrap_or(0),
        has_null_code: plan.null_code.is_some().into(),
        codes_dtype: C::DTYPE as i32,
        codebooks_dtype: E::DTYPE as i32,
        out_dtype: O::DTYPE as i32,
        vector: (schedule.vec > 1).into(),
        tiles: schedule.tiles.into(),
        log2_lanes: schedule.lanes.trailing_zeros() as i32,
    };
    crate::launch::launch("nxs_rvq_decode", stream, |handle| {
        // SAFETY: every address the kernel reaches lies in the operands, which are checked against the layouts; codes
        // are clamped to the entries.
        unsafe { ffi::nxs_rvq_decode(&params, handle) }
    })
}

#[cfg(not(nxs_kernels))]
pub(super) fn run<C: Code, E: Float, O: Float>(
    plan: &Plan,
    _stream: &Stream<'_>,
    _args: &RvqDecodeArgs<'_, C, E, O>,
) -> Result<()> {
    let _ = (plan.wide, plan.access, plan.out_align);
    Err(Error::NotCompiled)
}
