//! From plan and views to the C ABI.

use super::CodebookArgs;
use super::plan::Codebook;
use crate::dtype::Float;
use crate::error::Result;
use crate::stream::Stream;

#[cfg(nxs_kernels)]
pub(super) fn prepare<E: Float>(codebook: &Codebook, stream: &Stream<'_>, args: &CodebookArgs<'_, E>) -> Result<()> {
    use crate::ffi;

    let [rows_stride_level, rows_stride_entry, _] = codebook.rows.strides();
    let params = ffi::nxs_codebook_prepare_params {
        codebook: codebook.geometry.params(args.prepared.span().address),
        rows: args.rows.span().address as *const _,
        usage_or_null: match (&args.usage, codebook.usage_eps) {
            (Some(usage), Some(_)) => usage.span().address as *const _,
            _ => core::ptr::null(),
        },
        flags_or_null: crate::launch::address_mut(&args.flags),
        rows_stride_level,
        rows_stride_entry,
        usage_stride_level: codebook.geometry.entries as i64,
        usage_eps: codebook.usage_eps.map_or(0.0, f32::from_bits),
        rows_dtype: E::DTYPE as i32,
    };
    crate::launch::launch("nxs_codebook_prepare", stream, |handle| {
        // SAFETY: every address the kernels reach lies in the operands, which are checked against the layouts.
        unsafe { ffi::nxs_codebook_prepare(&params, handle) }
    })
}

#[cfg(not(nxs_kernels))]
pub(super) fn prepare<E: Float>(codebook: &Codebook, _stream: &Stream<'_>, _args: &CodebookArgs<'_, E>) -> Result<()> {
    let _ = codebook.usage_eps;
    Err(crate::error::Error::NotCompiled)
}
