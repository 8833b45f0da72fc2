// C entry of typical acceptance: refuse what the kernel cannot take, then pick the dtype.
#include "common/check.h"
#include "verification/typical.cuh"

extern "C" nxs_status nxs_typical_verify(const nxs_typical_verify_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::verification;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_typical_verify_params& p = *params;
  NXS_REQUIRE(p.dtype == NXS_F32 || p.dtype == NXS_F16 || p.dtype == NXS_BF16, NXS_E_DTYPE);
  NXS_REQUIRE(p.batch >= 0 && p.batch <= i64{1} << 20 && p.vocab >= 1 && p.vocab <= i64{1} << 24, NXS_E_SHAPE);
  NXS_REQUIRE(p.nodes >= 1 && p.nodes <= 1024 && p.paths >= 1 && p.paths <= 1024 && p.depth >= 1 && p.depth <= 1024,
              NXS_E_SHAPE);
  NXS_REQUIRE(p.paths_or_null || (p.paths == 1 && p.depth == p.nodes), NXS_E_SHAPE);
  NXS_REQUIRE(p.target_rows >= 0 && p.target_rows <= INT32_MAX && p.batch * p.nodes <= INT32_MAX, NXS_E_SHAPE);
  NXS_REQUIRE(p.target_stride_row >= 0, NXS_E_STRIDE);
  NXS_REQUIRE(p.epsilon >= 0 && p.alpha >= 0, NXS_E_UNSUPPORTED);
  if (p.batch == 0) return NXS_OK;
  NXS_REQUIRE(p.blocks >= 1, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.target && p.drafts && p.tokens && p.emitted && p.accepted && p.status && p.workspace && p.counters,
              NXS_E_NULL);
  for (const void* word :
       {static_cast<const void*>(p.drafts), static_cast<const void*>(p.paths_or_null),
        static_cast<const void*>(p.row_index_or_null), static_cast<const void*>(p.temperature_or_null),
        static_cast<const void*>(p.uniforms_or_null), static_cast<const void*>(p.tokens),
        static_cast<const void*>(p.accepted_nodes_or_null), static_cast<const void*>(p.emitted),
        static_cast<const void*>(p.accepted), static_cast<const void*>(p.path_or_null),
        static_cast<const void*>(p.last_row_or_null), static_cast<const void*>(p.status),
        static_cast<const void*>(p.counters)})
    NXS_REQUIRE(is_aligned(word, 4), NXS_E_ALIGNMENT);
  NXS_REQUIRE(is_aligned(p.target, dtype_bytes(p.dtype)) && is_aligned(p.seeds_or_null, 8) &&
                  is_aligned(p.positions_or_null, 8) && is_aligned(p.workspace, 16),
              NXS_E_ALIGNMENT);
  switch (p.dtype) {
    case NXS_F32: return typical_launch<float>(p, stream);
    case NXS_F16: return typical_launch<f16>(p, stream);
    default: return typical_launch<bf16>(p, stream);
  }
}
