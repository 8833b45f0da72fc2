//! From plan and views to the C ABI.

use super::SelectArgs;
use super::plan::Plan;
#[cfg(not(nxs_kernels))]
use crate::error::Error;
use crate::error::Result;
use crate::stream::Stream;

#[cfg(nxs_kernels)]
pub(super) fn run(plan: &Plan, stream: &Stream<'_>, args: &SelectArgs<'_>) -> Result<()> {
    use super::plan::Kind;
    use crate::ffi;
    use crate::launch::{address, address_mut};

    let [importance_stride_set, importance_stride_head, _] = plan.importance.strides();
    let [redundancy_stride_set, redundancy_stride_head, _] = plan.redundancy.strides();
    let params = ffi::nxs_select_params {
        importance_or_null: address(&args.importance),
        redundancy_or_null: address(&args.redundancy),
        weights_or_null: address(&args.weights),
        lengths_or_null: address(&args.lengths),
        budgets_or_null: address(&args.budgets),
        indices: args.indices.span().address as *mut _,
        counts: args.counts.span().address as *mut _,
        status_or_null: address_mut(&args.status),
        workspace_or_null: address_mut(&args.workspace),
        importance_stride_set,
        importance_stride_head,
        redundancy_stride_set,
        redundancy_stride_head,
        sets: plan.sets() as i64,
        heads: plan.heads() as i64,
        tokens: plan.tokens() as i64,
        capacity: plan.capacity as i64,
        scope: match plan.scope {
            Kind::PerHead => ffi::NXS_SELECT_PER_HEAD,
            Kind::PerSet => ffi::NXS_SELECT_PER_SET,
            Kind::Shared => ffi::NXS_SELECT_SHARED,
            Kind::Ada => ffi::NXS_SELECT_ADA,
        } as i32,
        first_rows: plan.first_rows as i32,
        length: plan.length as i32,
        budget: plan.budget as i32,
        sink: plan.sink as i32,
        recent: plan.recent as i32,
        active: plan.active as i32,
        block: plan.block as i32,
        lambda: plan.lambda(),
        relative: plan.relative.into(),
        demoted: plan.demoted as i32,
        demotion: plan.demotion(),
        newest: plan.newest.into(),
        floor_alpha: plan.floor_alpha as i32,
        shared_bytes: plan.shared_bytes as i32,
        threads: plan.threads() as i32,
    };
    crate::launch::launch("nxs_select", stream, |handle| {
        // SAFETY: every address the kernels reach lies in the operands, which are checked against the layouts; lengths and
        // budgets are clamped to them.
        unsafe { ffi::nxs_select(&params, handle) }
    })
}

#[cfg(not(nxs_kernels))]
pub(super) fn run(plan: &Plan, _stream: &Stream<'_>, _args: &SelectArgs<'_>) -> Result<()> {
    let _ = plan.threads();
    Err(Error::NotCompiled)
}
