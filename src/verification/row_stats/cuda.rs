//! From plan and views to the C ABI.

use super::RowStatsArgs;
use super::plan::Plan;
use crate::dtype::Float;
use crate::error::Result;
use crate::stream::Stream;

#[cfg(nxs_kernels)]
pub(super) fn run<P: Float>(plan: &Plan, stream: &Stream<'_>, args: &RowStatsArgs<'_, P>) -> Result<()> {
    use crate::ffi;
    use crate::launch::address;

    let partials = args.partials.span().address;
    if plan.rows > 0 && !partials.is_multiple_of(8) {
        return Err(crate::Error::Alignment { arg: "partials", need: 8 });
    }
    let params = ffi::nxs_row_stats_params {
        logits: args.logits.span().address as *const _,
        temperature_or_null: address(&args.temperature),
        allow_or_null: address(&args.allow),
        partials: partials as *mut _,
        stride_row: plan.stride,
        allow_stride_row: plan.allow_stride,
        rows: plan.rows as i64,
        vocab: plan.vocab as i64,
        dtype: P::DTYPE as i32,
    };
    crate::launch::launch("nxs_row_stats", stream, |handle| {
        // SAFETY: every address the kernel reaches lies in the operands, which are checked against the layouts.
        unsafe { ffi::nxs_row_stats(&params, handle) }
    })
}

#[cfg(not(nxs_kernels))]
pub(super) fn run<P: Float>(_plan: &Plan, _stream: &Stream<'_>, _args: &RowStatsArgs<'_, P>) -> Result<()> {
    Err(crate::Error::NotCompiled)
}
