// C entry of the selection: refuse what the kernels cannot take, then enqueue the one or two that are needed.
#include "compression/select.cuh"
#include "common/check.h"

namespace nxs::compression {

// Tiles that are cached within the shared memory that is allowed; 0: not all of them fit.
inline unsigned cached_bytes(i64 rows, i64 items, i64 fixed, i64 allowed) {
  const i64 bytes = rows * ((items + kTile - 1) / kTile * kTile) * 4;
  return fixed + bytes <= allowed ? static_cast<unsigned>(bytes) : 0;
}

nxs_status select(const nxs_select_params& p, i64 lists, void* stream) {
  const i64 items = (p.tokens + (p.block > 1 ? p.block : 1) - 1) / (p.block > 1 ? p.block : 1);
  const bool aggregated = p.block > 1 || p.scope == NXS_SELECT_PER_SET || p.scope == NXS_SELECT_SHARED;
  float* scores = aggregated ? static_cast<float*>(p.workspace_or_null) : nullptr;
  i32* ids = nullptr;
  i32* budgets = nullptr;
  if (aggregated) {
    ids = reinterpret_cast<i32*>(scores + lists * ((items + 3) / 4 * 4));
    const i64 of_block = p.block > 1 ? kAggregateThreads / 32 : kAggregateThreads;
    const i64 blocks = (items + of_block - 1) / of_block * lists;
    NXS_REQUIRE(blocks <= INT32_MAX, NXS_E_SHAPE);
    LaunchShape shape;
    shape.grid = dim3(static_cast<unsigned>(blocks));
    shape.block = kAggregateThreads;
    if (blocks > 0) NXS_TRY(launch(aggregate_kernel, shape, stream, p, scores));
  }
  LaunchShape shape;
  shape.block = static_cast<unsigned>(p.threads);
  if (p.scope == NXS_SELECT_ADA) {
    budgets = static_cast<i32*>(p.workspace_or_null);
    const i64 fixed = kSelectFixed + split_bytes(static_cast<u32>(p.heads));
    const unsigned cached = cached_bytes(p.heads, p.tokens, fixed, p.shared_bytes);
    const auto kernel = cached ? split_kernel<true> : split_kernel<false>;
    shape.grid = dim3(static_cast<unsigned>(p.sets));
    shape.block = kSelectThreads;
    shape.dynamic_smem = static_cast<unsigned>(fixed) + cached;
    NXS_TRY(allow_dynamic_smem(kernel));
    NXS_TRY(launch(kernel, shape, stream, p, budgets));
    shape.block = static_cast<unsigned>(p.threads);
  }
  const unsigned cached = cached_bytes(1, items, kSelectFixed, p.shared_bytes);
  const auto kernel = cached ? select_kernel<true> : select_kernel<false>;
  shape.grid = dim3(static_cast<unsigned>(lists));
  shape.dynamic_smem = kSelectFixed + cached;
  NXS_TRY(allow_dynamic_smem(kernel));
  return launch(kernel, shape, stream, p, static_cast<const float*>(scores), ids, static_cast<const i32*>(budgets));
}

}  // namespace nxs::compression

extern "C" nxs_status nxs_select(const nxs_select_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::compression;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_select_params& p = *params;
  constexpr i64 kMost = i64{1} << 30;
  NXS_REQUIRE(p.sets >= 0 && p.heads >= 0 && p.tokens >= 0 && p.tokens < kMost, NXS_E_SHAPE);
  NXS_REQUIRE(p.capacity >= 0 && p.capacity < kMost && p.active >= 0 && p.active <= p.capacity, NXS_E_SHAPE);
  NXS_REQUIRE(p.scope >= NXS_SELECT_PER_HEAD && p.scope <= NXS_SELECT_ADA, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.length >= 0 && p.length <= p.tokens && p.budget >= 0 && p.sink >= 0 && p.recent >= 0 && p.block >= 0 &&
                  p.demoted >= 0,
              NXS_E_SHAPE);
  NXS_REQUIRE(p.first_rows >= 0 && p.first_rows <= p.tokens && (p.first_rows == 0 || !p.lengths_or_null), NXS_E_SHAPE);
  NXS_REQUIRE(p.floor_alpha >= 0 && p.floor_alpha <= 65536, NXS_E_SHAPE);
  NXS_REQUIRE(p.threads == 128 || p.threads == 256 || p.threads == 512, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.shared_bytes >= 16384 && p.shared_bytes <= 232448, NXS_E_UNSUPPORTED);
  if (p.sets == 0 || p.heads == 0) return NXS_OK;
  NXS_REQUIRE(p.heads <= INT32_MAX && p.sets <= INT32_MAX / p.heads, NXS_E_SHAPE);
  const bool ada = p.scope == NXS_SELECT_ADA;
  if (ada) {
    NXS_REQUIRE(p.heads <= kSelectHeads && p.tokens < kMost / p.heads, NXS_E_SHAPE);
    NXS_REQUIRE(p.block <= 1 && !p.relative && split_bytes(static_cast<u32>(p.heads)) + kSelectFixed <= static_cast<u32>(p.shared_bytes), NXS_E_UNSUPPORTED);
  }
  NXS_REQUIRE(p.importance_stride_set >= 0 && p.importance_stride_head >= 0 && p.redundancy_stride_set >= 0 &&
                  p.redundancy_stride_head >= 0,
              NXS_E_STRIDE);
  NXS_REQUIRE(p.indices && p.counts, NXS_E_NULL);
  NXS_REQUIRE(is_aligned(p.importance_or_null, 4) && is_aligned(p.redundancy_or_null, 4) &&
                  is_aligned(p.weights_or_null, 4) && is_aligned(p.lengths_or_null, 4) &&
                  is_aligned(p.budgets_or_null, 4) && is_aligned(p.indices, 4) && is_aligned(p.counts, 4) &&
                  is_aligned(p.status_or_null, 4) && is_aligned(p.workspace_or_null, 16),
              NXS_E_ALIGNMENT);
  const bool works = ada || p.block > 1 || p.scope == NXS_SELECT_PER_SET || p.scope == NXS_SELECT_SHARED;
  NXS_REQUIRE(p.workspace_or_null || !works, NXS_E_NULL);
  const i64 lists = p.scope == NXS_SELECT_SHARED ? 1 : p.scope == NXS_SELECT_PER_SET ? p.sets : p.sets * p.heads;
  return select(p, lists, stream);
}
