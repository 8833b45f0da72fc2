//! From plan and views to the C ABI.

use super::TypicalVerifierArgs;
use super::plan::Plan;
use crate::dtype::Float;
use crate::error::Result;
use crate::stream::Stream;

#[cfg(nxs_kernels)]
pub(super) fn run<T: Float>(plan: &Plan, stream: &Stream<'_>, args: &TypicalVerifierArgs<'_, T>) -> Result<()> {
    use crate::ffi;
    use crate::launch::{address, address_mut};

    let params = ffi::nxs_typical_verify_params {
        target: args.target.span().address as *const _,
        drafts: args.drafts.span().address as *const _,
        paths_or_null: address(&args.paths),
        row_index_or_null: address(&args.row_index),
        temperature_or_null: address(&args.temperature),
        seeds_or_null: address(&args.seeds),
        positions_or_null: address(&args.positions),
        uniforms_or_null: address(&args.uniforms),
        tokens: args.out.tokens.span().address as *mut _,
        accepted_nodes_or_null: address_mut(&args.out.nodes),
        emitted: args.out.emitted.span().address as *mut _,
        accepted: args.out.accepted.span().address as *mut _,
        path_or_null: address_mut(&args.out.path),
        last_row_or_null: address_mut(&args.out.last_row),
        status: args.out.status.span().address as *mut _,
        workspace: args.workspace.span().address as *mut _,
        counters: args.counters.span().address as *mut _,
        target_stride_row: plan.target_stride,
        batch: plan.batch as i64,
        vocab: plan.vocab as i64,
        target_rows: plan.target_rows as i64,
        nodes: plan.nodes as i32,
        paths: plan.paths as i32,
        depth: plan.depth as i32,
        epsilon: f32::from_bits(plan.epsilon),
        alpha: f32::from_bits(plan.alpha),
        fallback: plan.fallback,
        blocks: plan.blocks() as i32,
        dtype: T::DTYPE as i32,
    };
    crate::launch::launch("nxs_typical_verify", stream, |handle| {
        // SAFETY: every address the kernel reaches lies in the operands, which are checked against the layouts; nodes and
        // ids from device memory are checked by the kernel against the sizes in the params.
        unsafe { ffi::nxs_typical_verify(&params, handle) }
    })
}

#[cfg(not(nxs_kernels))]
pub(super) fn run<T: Float>(plan: &Plan, _: &Stream<'_>, _: &TypicalVerifierArgs<'_, T>) -> Result<()> {
    let _ = plan.blocks();
    Err(crate::Error::NotCompiled)
}
