// C entry of the drift test: refuse what the kernel cannot take, then pick the dtype.
#include "compression/drift.cuh"
#include "common/check.h"

extern "C" nxs_status nxs_drift(const nxs_drift_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::compression;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_drift_params& p = *params;
  NXS_REQUIRE(p.dtype == NXS_F32 || p.dtype == NXS_F16 || p.dtype == NXS_BF16, NXS_E_DTYPE);
  NXS_REQUIRE(p.chunks >= 0 && p.chunks < 65536 && p.elements >= 1, NXS_E_SHAPE);
  NXS_REQUIRE((p.elements - 1) / NXS_DRIFT_SLAB < INT32_MAX, NXS_E_SHAPE);
  NXS_REQUIRE(p.polynomial_terms >= 0 && p.polynomial_terms <= NXS_DRIFT_TERMS, NXS_E_SHAPE);
  NXS_REQUIRE(p.features_stride_chunk >= 0 && p.previous_stride_chunk >= 0, NXS_E_STRIDE);
  if (p.chunks == 0) return NXS_OK;
  NXS_REQUIRE(p.features && p.previous && p.accumulated && p.steps && p.decision && p.workspace && p.counters,
              NXS_E_NULL);
  const i64 bytes = dtype_bytes(p.dtype);
  NXS_REQUIRE(is_aligned(p.features, bytes) && is_aligned(p.previous, bytes) && is_aligned(p.workspace, 8),
              NXS_E_ALIGNMENT);
  NXS_REQUIRE(is_aligned(p.accumulated, 4) && is_aligned(p.steps, 4) && is_aligned(p.force_or_null, 4) &&
                  is_aligned(p.decision, 4) && is_aligned(p.change_or_null, 4) && is_aligned(p.counters, 4),
              NXS_E_ALIGNMENT);
  if (p.vector) {
    const i64 vec = 16 / bytes;
    NXS_REQUIRE(p.features_stride_chunk % vec == 0 && p.previous_stride_chunk % vec == 0, NXS_E_STRIDE);
    NXS_REQUIRE(is_aligned(p.features, 16) && is_aligned(p.previous, 16), NXS_E_ALIGNMENT);
  }
  switch (p.dtype) {
    case NXS_F32: return drift_launch<float>(p, stream);
    case NXS_F16: return drift_launch<f16>(p, stream);
    default: return drift_launch<bf16>(p, stream);
  }
}
