// C entry of pooled acceptance: refuse what the kernel cannot take, then pick the dtype.
#include "common/check.h"
#include "verification/pooled.cuh"

extern "C" nxs_status nxs_pooled_verify(const nxs_pooled_verify_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::verification;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_pooled_verify_params& p = *params;
  NXS_REQUIRE(p.dtype == NXS_F32 || p.dtype == NXS_F16 || p.dtype == NXS_BF16, NXS_E_DTYPE);
  const i64 most = i64{1} << 20;
  NXS_REQUIRE(p.batch >= 0 && p.batch <= most && p.height >= 1 && p.height <= most && p.width >= 1 && p.width <= most &&
                  p.height * p.width <= most && p.batch * p.height * p.width <= INT32_MAX,
              NXS_E_SHAPE);
  NXS_REQUIRE(p.vocab >= 1 && p.vocab <= i64{1} << 18, NXS_E_SHAPE);
  NXS_REQUIRE(p.first_code >= 0 && p.codes >= 1 && p.codes <= p.vocab && p.first_code <= p.vocab - p.codes, NXS_E_SHAPE);
  NXS_REQUIRE(p.neighbours >= 0 && p.neighbours <= 65535 && p.radius >= 0 && p.radius <= 255, NXS_E_SHAPE);
  NXS_REQUIRE(p.target_stride_row >= 0 && p.neighbours_stride_row >= 0, NXS_E_STRIDE);
  NXS_REQUIRE(p.neighbours == 0 || p.neighbours_dtype == NXS_U16 || p.neighbours_dtype == NXS_I32, NXS_E_DTYPE);
  if (p.batch == 0) return NXS_OK;
  NXS_REQUIRE(p.blocks >= 1, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.target && p.drafts && p.resample && p.counts && p.status && p.workspace && p.counters, NXS_E_NULL);
  NXS_REQUIRE(p.neighbours_or_null || p.neighbours == 0, NXS_E_NULL);
  for (const void* word :
       {static_cast<const void*>(p.drafts), static_cast<const void*>(p.temperature_or_null),
        static_cast<const void*>(p.guidance_or_null), static_cast<const void*>(p.top_k_or_null),
        static_cast<const void*>(p.top_p_or_null), static_cast<const void*>(p.min_p_or_null),
        static_cast<const void*>(p.threshold_or_null), static_cast<const void*>(p.positions_or_null),
        static_cast<const void*>(p.islands_or_null), static_cast<const void*>(p.counts),
        static_cast<const void*>(p.pooled_or_null), static_cast<const void*>(p.status),
        static_cast<const void*>(p.counters)})
    NXS_REQUIRE(is_aligned(word, 4), NXS_E_ALIGNMENT);
  NXS_REQUIRE(is_aligned(p.target, dtype_bytes(p.dtype)) && is_aligned(p.target_free_or_null, dtype_bytes(p.dtype)) &&
                  is_aligned(p.workspace, 16),
              NXS_E_ALIGNMENT);
  NXS_REQUIRE(p.neighbours == 0 || is_aligned(p.neighbours_or_null, dtype_bytes(p.neighbours_dtype)), NXS_E_ALIGNMENT);
  const bool guided = p.target_free_or_null != nullptr;
  switch (p.dtype) {
    case NXS_F32: return guided ? pooled_launch<Guided<float>>(p, stream) : pooled_launch<float>(p, stream);
    case NXS_F16: return guided ? pooled_launch<Guided<f16>>(p, stream) : pooled_launch<f16>(p, stream);
    default: return guided ? pooled_launch<Guided<bf16>>(p, stream) : pooled_launch<bf16>(p, stream);
  }
}
