// C entry of redundancy: refuse what the kernels cannot take, pick the dtype; and the pass that divides by the sum of exponentials.
#include "common/check.h"
#include "compression/redundancy.cuh"

namespace nxs::compression {

// scores[j] /= sum over spans, ascending. Grid x: 256 keys, y: sets and heads. Bytes: 8 a key.
__global__ void __launch_bounds__(kAnchorThreads)
    redundancy_divide_kernel(const __grid_constant__ RedundancyParams p, const u32 spans) {
  const RedundancyItem of(p, block_index_y());
  const u32 j = block_index_x() * kAnchorThreads + thread_index();
  if (j >= of.length) return;
  float sum = 0;
  const float* parts = p.parts_or_null + static_cast<i64>(of.item) * spans;
  for (u32 span = 0; span < spans; ++span) sum += load_global_nc(parts + span);
  float* score = of.scores(p) + j;
  store_global(score, divide(load_global(score), sum));
}

template <> nxs_status redundancy<bf16>(const RedundancyParams& p, void* stream);
template <> nxs_status redundancy<f16>(const RedundancyParams& p, void* stream);

}  // namespace nxs::compression

extern "C" nxs_status nxs_redundancy(const nxs_redundancy_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::compression;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_redundancy_params& p = *params;
  NXS_REQUIRE(p.dtype == NXS_BF16 || p.dtype == NXS_F16, NXS_E_DTYPE);
  NXS_REQUIRE(p.dim == 64 || p.dim == 96 || p.dim == 128, NXS_E_SHAPE);
  NXS_REQUIRE(p.form >= NXS_REDUNDANCY_COSINE && p.form <= NXS_REDUNDANCY_SIMILAR, NXS_E_UNSUPPORTED);
  const bool similar = p.form == NXS_REDUNDANCY_SIMILAR, softmax = p.form == NXS_REDUNDANCY_SOFTMAX;
  NXS_REQUIRE(p.heads > 0 && p.sets >= 0 && p.sets * p.heads <= 65535, NXS_E_SHAPE);
  NXS_REQUIRE(p.tokens >= 0 && p.tokens <= (similar ? NXS_REDUNDANCY_SIMILAR_TOKENS : INT32_MAX - (1 << 16)), NXS_E_SHAPE);
  NXS_REQUIRE(similar || (p.span > 0 && p.span % 64 == 0), NXS_E_SHAPE);
  NXS_REQUIRE(!similar || (p.nth >= 0 && p.threshold >= 0 && p.threshold <= 1 && p.ratio >= 0 && p.ratio <= 1),
              NXS_E_UNSUPPORTED);
  NXS_REQUIRE(!similar || !p.first || (p.nth == 1 && !p.nth_of_length), NXS_E_UNSUPPORTED);
  NXS_REQUIRE(are_places(p.places, p.tokens, p.lengths_or_null), NXS_E_SHAPE);
  if (p.sets == 0 || p.tokens == 0) return NXS_OK;
  for (const int64_t stride : {p.k_stride_set, p.k_stride_token, p.k_stride_head})
    NXS_REQUIRE(stride >= 0 && stride % 8 == 0, NXS_E_STRIDE);
  for (const int64_t stride : {p.norms_stride_set, p.norms_stride_head, p.sum_stride_set, p.sum_stride_head,
                               p.scores_stride_set, p.scores_stride_head, p.lengths_stride_set, p.lengths_stride_head})
    NXS_REQUIRE(stride >= 0, NXS_E_STRIDE);
  NXS_REQUIRE(p.k && p.inverse_norms && p.unit_sum && p.scores && (!softmax || p.parts_or_null) &&
                  (!similar || p.retained_or_null),
              NXS_E_NULL);
  for (const void* pointer : {p.k, static_cast<const void*>(p.parts_or_null), static_cast<const void*>(p.retained_or_null)})
    NXS_REQUIRE(is_aligned(pointer, 16), NXS_E_ALIGNMENT);
  for (const void* pointer : {static_cast<const void*>(p.inverse_norms), static_cast<const void*>(p.unit_sum),
                              static_cast<const void*>(p.scores), static_cast<const void*>(p.lengths_or_null)})
    NXS_REQUIRE(is_aligned(pointer, 4), NXS_E_ALIGNMENT);
  NXS_TRY(p.dtype == NXS_BF16 ? redundancy<bf16>(p, stream) : redundancy<f16>(p, stream));
  if (!softmax) return NXS_OK;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((p.tokens + kAnchorThreads - 1) / kAnchorThreads),
                    static_cast<unsigned>(p.sets * p.heads));
  shape.block = kAnchorThreads;
  return launch(redundancy_divide_kernel, shape, stream, p, static_cast<u32>((p.tokens + p.span - 1) / p.span));
}
