// C entry of importance: refuse what the kernels cannot take, pick dtype and dim; and the pass that pools.
//
//   raw[j] = factor * sum over splits of sums[split, j], -inf where j is masked;  scores[j] = pool(raw)[j] (+ scores[j]), with
//   `protect` +inf where j is masked
//
// Grid    x: 256 columns a block, a thread each; y: sets and heads.
// Shared  the raw scores of the block's columns and of up to 31 on either side.
// Bytes   the sums once and a little, and the scores: 8 a column.
// A kernel of its own: neighbours and splits are found by other blocks.
#include "common/ptx/launch.cuh"
#include "common/ptx/shared.cuh"
#include "compression/importance.cuh"

namespace nxs::compression {

constexpr u32 kPoolThreads = 256, kMostPool = 63;

__global__ void __launch_bounds__(kPoolThreads) importance_finish_kernel(const __grid_constant__ ImportanceParams p) {
  const u32 shared = dynamic_shared(), half = static_cast<u32>(p.pool_width) / 2;
  const Item item(p, block_index_y());
  const u32 first = block_index_x() * kPoolThreads, scored = item.scored;
  const i64 row = static_cast<i64>(item.set) * p.heads + item.head, stride = p.sets * p.heads * p.tokens;
  const float nothing = p.pool == NXS_POOL_MAX ? -kInfinity : 0.0f;
  // Columns first - half and up.
  for (u32 i = thread_index(); i < kPoolThreads + 2 * half; i += kPoolThreads) {
    float raw = nothing;
    const u32 column = first + i - half;  // wraps round before the first
    if (first + i >= half && column < scored) {
      raw = 0;
      const float* sums = p.sums_or_null + row * p.tokens + column;
      for (i32 split = 0; split < p.sum_splits; ++split) raw += load_global_nc(sums + split * stride);
      raw *= p.factor;
      for (i32 m = 0; m < p.masked; ++m)
        if (load_global_nc(p.masked_or_null + m) == static_cast<i32>(column)) raw = -kInfinity;
    }
    store_shared(shared + i * 4, raw);
  }
  block_sync();
  const u32 column = first + thread_index();
  if (column >= static_cast<u32>(p.tokens) || (p.accumulate && column >= scored)) return;
  float score = 0;
  if (column < scored) {
    score = nothing;
    for (u32 i = 0; i < 2 * half + 1; ++i) {
      const float raw = load_shared<float>(shared + (thread_index() + i) * 4);
      score = p.pool == NXS_POOL_MAX ? maximum_nan(score, raw) : score + raw;
    }
    if (p.pool == NXS_POOL_AVERAGE) score = divide(score, static_cast<float>(p.pool_width));
    if (p.protect)
      for (i32 m = 0; m < p.masked; ++m)
        if (load_global_nc(p.masked_or_null + m) == static_cast<i32>(column)) score = kInfinity;
  }
  float* to = p.scores + item.set * p.scores_stride_set + item.head * p.scores_stride_head + column;
  if (p.accumulate) score += load_global(to);
  store_global(to, score);
}

static nxs_status finish(const ImportanceParams& given, void* stream) {
  ImportanceParams p = given;
  if (p.aggregation == NXS_IMPORTANCE_LOGIT) p.factor *= p.scale;
  if (p.pool == NXS_POOL_NONE) p.pool_width = 1;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((p.tokens + kPoolThreads - 1) / kPoolThreads),
                    static_cast<unsigned>(p.sets * p.heads));
  shape.block = kPoolThreads;
  shape.dynamic_smem = (kPoolThreads + kMostPool) * 4;
  return launch(importance_finish_kernel, shape, stream, p);
}

#define NXS_DECLARE(type, dim)                                                       \
  template <> nxs_status importance_sm80<type, dim>(const ImportanceParams&, void*); \
  template <> nxs_status importance_sm90<type, dim>(const ImportanceParams&, void*);
NXS_DECLARE(bf16, 64)
NXS_DECLARE(bf16, 96)
NXS_DECLARE(bf16, 128)
NXS_DECLARE(f16, 64)
NXS_DECLARE(f16, 96)
NXS_DECLARE(f16, 128)
#undef NXS_DECLARE

template <typename T> static nxs_status for_dim(const ImportanceParams& p, void* stream) {
  if (p.variant == 1)
    return p.dim == 64   ? importance_sm90<T, 64>(p, stream)
           : p.dim == 96 ? importance_sm90<T, 96>(p, stream)
                         : importance_sm90<T, 128>(p, stream);
  return p.dim == 64   ? importance_sm80<T, 64>(p, stream)
         : p.dim == 96 ? importance_sm80<T, 96>(p, stream)
                       : importance_sm80<T, 128>(p, stream);
}

}  // namespace nxs::compression

extern "C" nxs_status nxs_importance(const nxs_importance_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::compression;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_importance_params& p = *params;
  // Rows and keys are counted in 32 bits, with room for a tile beyond the last.
  constexpr int64_t kMost = INT32_MAX - (1 << 16);
  NXS_REQUIRE(p.dtype == NXS_BF16 || p.dtype == NXS_F16, NXS_E_DTYPE);
  NXS_REQUIRE(p.variant == 0 || p.variant == 1, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.aggregation >= NXS_IMPORTANCE_MAX_LOGIT && p.aggregation <= NXS_IMPORTANCE_LOGIT, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.pool >= NXS_POOL_NONE && p.pool <= NXS_POOL_AVERAGE, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.dim == 64 || p.dim == 96 || p.dim == 128, NXS_E_SHAPE);
  NXS_REQUIRE(p.heads > 0 && p.groups > 0 && p.sets >= 0 && p.sets * p.heads <= 65535, NXS_E_SHAPE);
  NXS_REQUIRE(p.tokens >= 0 && p.tokens <= kMost && p.queries >= 0 && p.queries <= kMost / p.groups && p.q_rows >= 0,
              NXS_E_SHAPE);
  NXS_REQUIRE(p.excluded >= 0 && p.unscored >= 0 && p.masked >= 0 && p.masked <= 1024, NXS_E_SHAPE);
  NXS_REQUIRE(p.pool == NXS_POOL_NONE ||
                  (p.pool_width > 0 && p.pool_width <= static_cast<int>(kMostPool) && p.pool_width % 2 == 1),
              NXS_E_SHAPE);
  const bool maximum = p.aggregation == NXS_IMPORTANCE_MAX_LOGIT || p.aggregation == NXS_IMPORTANCE_MAX_PROB;
  const bool logits = p.aggregation == NXS_IMPORTANCE_LOGIT;
  NXS_REQUIRE(!maximum || p.groups <= 16, NXS_E_SHAPE);
  NXS_REQUIRE(!p.lse_or_null || (!logits && (p.aggregation != NXS_IMPORTANCE_MAX_LOGIT || p.groups == 1)), NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.masked == 0 || !p.accumulate, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.scale > 0, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.stat_splits >= 1 && p.sum_splits >= 1, NXS_E_SHAPE);
  NXS_REQUIRE(are_places(p.places, p.tokens, p.lengths_or_null), NXS_E_SHAPE);
  NXS_REQUIRE(!p.protect || p.masked > 0, NXS_E_UNSUPPORTED);
  if (p.sets == 0 || p.tokens == 0) return NXS_OK;

  for (const int64_t stride : {p.q_stride_set, p.q_stride_row, p.q_stride_head, p.k_stride_set, p.k_stride_token,
                               p.k_stride_head})
    NXS_REQUIRE(stride >= 0 && stride % 8 == 0, NXS_E_STRIDE);
  for (const int64_t stride : {p.scores_stride_set, p.scores_stride_head, p.lengths_stride_set, p.lengths_stride_head,
                               p.lse_stride_set, p.lse_stride_head, p.lse_stride_query})
    NXS_REQUIRE(stride >= 0, NXS_E_STRIDE);
  NXS_REQUIRE(p.k && p.scores && (p.queries == 0 || (p.q && p.q_rows > 0)), NXS_E_NULL);
  NXS_REQUIRE(p.rows_or_null || p.queries <= p.q_rows, NXS_E_SHAPE);
  NXS_REQUIRE(logits || p.lse_or_null || p.queries == 0 || p.stats_or_null, NXS_E_NULL);
  NXS_REQUIRE(p.masked == 0 || p.masked_or_null, NXS_E_NULL);
  const bool finishes = p.pool != NXS_POOL_NONE || p.masked > 0 || p.sum_splits > 1;
  NXS_REQUIRE(finishes == (p.sums_or_null != nullptr), NXS_E_NULL);
  for (const void* pointer : {p.q, p.k, static_cast<const void*>(p.stats_or_null), static_cast<const void*>(p.sums_or_null)})
    NXS_REQUIRE(is_aligned(pointer, 16), NXS_E_ALIGNMENT);
  for (const void* pointer : {static_cast<const void*>(p.scores), static_cast<const void*>(p.rows_or_null),
                              static_cast<const void*>(p.masked_or_null), static_cast<const void*>(p.lengths_or_null),
                              static_cast<const void*>(p.lse_or_null)})
    NXS_REQUIRE(is_aligned(pointer, 4), NXS_E_ALIGNMENT);
  NXS_TRY(p.dtype == NXS_BF16 ? for_dim<bf16>(p, stream) : for_dim<f16>(p, stream));
  return finishes ? finish(p, stream) : NXS_OK;
}
