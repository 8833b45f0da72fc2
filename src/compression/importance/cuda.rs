//! From plan and views to the C ABI.

use super::ImportanceArgs;
use super::plan::Plan;
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::stream::Stream;

#[cfg(nxs_kernels)]
pub(super) fn run<T: Float>(plan: &Plan, stream: &Stream<'_>, args: &ImportanceArgs<'_, T>) -> Result<()> {
    use core::ptr::{null, null_mut};

    use super::plan::{Aggregation, Pool};
    use crate::dtype::DType;
    use crate::ffi;

    if T::DTYPE == DType::F32 {
        return Err(Error::DType { arg: "q", what: "kernels take bf16 and f16" });
    }
    for (arg, address, len) in [("q", args.q.span().address, plan.q_len), ("k", args.k.span().address, plan.k_len)] {
        if len > 0 && address % 16 != 0 {
            return Err(Error::Alignment { arg, need: 16 });
        }
    }
    let [q_stride_set, q_stride_row, q_stride_head, _] = plan.q.strides();
    let [k_stride_set, k_stride_token, k_stride_head, _] = plan.k.strides();
    let [scores_stride_set, scores_stride_head, _] = plan.scores.strides();
    let [lengths_stride_set, lengths_stride_head] = plan.lengths.strides();
    let [lse_stride_set, lse_stride_head, lse_stride_query] = plan.lse.strides();
    let [sets, heads, tokens] = plan.scores.shape();
    let (pool, pool_width) = match plan.pool {
        Pool::None => (ffi::NXS_POOL_NONE, 1),
        Pool::Max(width) => (ffi::NXS_POOL_MAX, width),
        Pool::Average(width) => (ffi::NXS_POOL_AVERAGE, width),
    };
    let workspace = args.workspace.as_ref().map_or(0, |view| view.span().address);
    let part = |bytes: u64, at: u64| if bytes > 0 { (workspace + at as usize) as *mut f32 } else { null_mut() };
    let schedule = &plan.schedule;
    let params = ffi::nxs_importance_params {
        // Of an empty view only the length is meant.
        q: if plan.q_len > 0 { args.q.span().address as *const _ } else { null() },
        k: args.k.span().address as *const _,
        scores: args.scores.span().address as *mut _,
        rows_or_null: args.rows.as_ref().filter(|_| plan.listed).map_or(null(), |view| view.span().address as *const _),
        masked_or_null: args
            .masked
            .as_ref()
            .filter(|_| plan.masked > 0)
            .map_or(null(), |view| view.span().address as *const _),
        lengths_or_null: crate::launch::address(&args.lengths),
        lse_or_null: args
            .lse
            .as_ref()
            .filter(|_| plan.given_lse)
            .map_or(null(), |view| view.span().address as *const _),
        stats_or_null: part(plan.stats_bytes(), 0),
        sums_or_null: part(plan.sums_bytes(), plan.stats_bytes()),
        q_stride_set,
        q_stride_row,
        q_stride_head,
        k_stride_set,
        k_stride_token,
        k_stride_head,
        places: plan.places.params(&args.pages, plan.scores.shape()),
        scores_stride_set,
        scores_stride_head,
        lengths_stride_set,
        lengths_stride_head,
        lse_stride_set,
        lse_stride_head,
        lse_stride_query,
        sets: sets as i64,
        tokens: tokens as i64,
        queries: plan.queries as i64,
        q_rows: plan.q.shape()[1] as i64,
        heads: heads as i32,
        groups: plan.groups as i32,
        dim: plan.k.shape()[3] as i32,
        aggregation: match plan.aggregation {
            Aggregation::MaxLogit => ffi::NXS_IMPORTANCE_MAX_LOGIT,
            Aggregation::MeanProb => ffi::NXS_IMPORTANCE_MEAN_PROB,
            Aggregation::MaxProb => ffi::NXS_IMPORTANCE_MAX_PROB,
            Aggregation::Logit => ffi::NXS_IMPORTANCE_LOGIT,
        } as i32,
        causal: plan.causal.into(),
        excluded: plan.excluded as i32,
        unscored: plan.unscored as i32,
        pool: pool as i32,
        pool_width: pool_width as i32,
        masked: plan.masked as i32,
        protect: plan.protect.into(),
        accumulate: plan.accumulate.into(),
        dtype: T::DTYPE as i32,
        variant: schedule.hopper.into(),
        scale: plan.scale(),
        factor: plan.factor(),
        stat_rows: schedule.stat_rows as i32,
        stat_span: schedule.stat_span as i32,
        stat_splits: schedule.stat_splits as i32,
        sum_rows: schedule.sum_rows as i32,
        sum_span: schedule.sum_span as i32,
        sum_rows_split: schedule.sum_rows_split as i32,
        sum_splits: schedule.sum_splits as i32,
    };
    crate::launch::launch("nxs_importance", stream, |handle| {
        // SAFETY: every address the kernels reach lies in the operands, which are checked against the layouts; listed rows,
        // lengths and columns are clamped or compared by the kernels, and the workspace is as large as the plan says.
        unsafe { ffi::nxs_importance(&params, handle) }
    })
}

#[cfg(not(nxs_kernels))]
pub(super) fn run<T: Float>(_plan: &Plan, _stream: &Stream<'_>, _args: &ImportanceArgs<'_, T>) -> Result<()> {
    Err(Error::NotCompiled)
}
