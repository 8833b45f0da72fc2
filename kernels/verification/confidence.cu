// C entry of ranking by confidence: refuse what the kernel cannot take, then pick the dtype.
#include "common/check.h"
#include "verification/confidence.cuh"

extern "C" nxs_status nxs_confidence_rank(const nxs_confidence_rank_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::verification;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_confidence_rank_params& p = *params;
  NXS_REQUIRE(p.dtype == NXS_F32 || p.dtype == NXS_F16 || p.dtype == NXS_BF16, NXS_E_DTYPE);
  const i64 most = i64{1} << 20;
  NXS_REQUIRE(p.batch >= 0 && p.batch <= most && p.length >= 1 && p.length <= most &&
                  p.batch * p.length <= INT32_MAX && p.vocab >= 1 && p.vocab <= i64{1} << 24,
              NXS_E_SHAPE);
  NXS_REQUIRE(p.row_in_step >= 0 && p.row_in_step < 1 << 24, NXS_E_SHAPE);
  NXS_REQUIRE(p.stride_row >= 0, NXS_E_STRIDE);
  NXS_REQUIRE(p.confidence >= NXS_CONFIDENCE_PROBABILITY && p.confidence <= NXS_CONFIDENCE_ENTROPY, NXS_E_UNSUPPORTED);
  if (p.batch == 0) return NXS_OK;
  NXS_REQUIRE(p.blocks >= 1, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.logits && p.counts && p.tokens && p.committed && p.status && p.workspace && p.counters, NXS_E_NULL);
  for (const void* word :
       {static_cast<const void*>(p.temperature_or_null), static_cast<const void*>(p.top_k_or_null),
        static_cast<const void*>(p.top_p_or_null), static_cast<const void*>(p.min_p_or_null),
        static_cast<const void*>(p.threshold_or_null), static_cast<const void*>(p.counts),
        static_cast<const void*>(p.noise_or_null), static_cast<const void*>(p.tokens),
        static_cast<const void*>(p.candidates_or_null), static_cast<const void*>(p.confidence_or_null),
        static_cast<const void*>(p.committed), static_cast<const void*>(p.status),
        static_cast<const void*>(p.counters)})
    NXS_REQUIRE(is_aligned(word, 4), NXS_E_ALIGNMENT);
  NXS_REQUIRE(is_aligned(p.logits, dtype_bytes(p.dtype)) && is_aligned(p.seeds_or_null, 8) &&
                  is_aligned(p.positions_or_null, 8) && is_aligned(p.workspace, 16),
              NXS_E_ALIGNMENT);
  switch (p.dtype) {
    case NXS_F32: return confidence_launch<float>(p, stream);
    case NXS_F16: return confidence_launch<f16>(p, stream);
    default: return confidence_launch<bf16>(p, stream);
  }
}
