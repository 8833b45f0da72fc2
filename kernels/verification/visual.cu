// C entry of the verification of image tokens: refuse what the kernels cannot take, then pick the dtype.
#include "common/check.h"
#include "verification/visual.cuh"

namespace nxs::verification {
template <> nxs_status visual_verify<float>(const nxs_visual_verify_params&, void*);
template <> nxs_status visual_verify<f16>(const nxs_visual_verify_params&, void*);
template <> nxs_status visual_verify<bf16>(const nxs_visual_verify_params&, void*);
}  // namespace nxs::verification

extern "C" nxs_status nxs_visual_verify(const nxs_visual_verify_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::verification;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_visual_verify_params& p = *params;
  const auto is_float = [](nxs_dtype dtype) { return dtype == NXS_F32 || dtype == NXS_F16 || dtype == NXS_BF16; };
  NXS_REQUIRE(is_float(p.dtype), NXS_E_DTYPE);
  NXS_REQUIRE(p.batch >= 0 && p.batch <= i64{1} << 20 && p.max_drafts >= 0 && p.max_drafts <= 1023, NXS_E_SHAPE);
  NXS_REQUIRE(p.vocab >= 1 && p.vocab <= i64{1} << 18, NXS_E_SHAPE);
  NXS_REQUIRE(p.target_rows >= 0 && p.target_rows <= INT32_MAX && p.draft_rows >= 0 && p.draft_rows <= INT32_MAX,
              NXS_E_SHAPE);
  NXS_REQUIRE(p.first_code >= 0 && p.codes >= 1 && p.codes <= p.vocab && p.first_code <= p.vocab - p.codes, NXS_E_SHAPE);
  NXS_REQUIRE(p.accumulated >= 0 && p.accumulated <= 65535 && p.zeroed >= 0 && p.zeroed <= 65535, NXS_E_SHAPE);
  NXS_REQUIRE(p.below >= 0 && p.below <= static_cast<i32>(kMostBeside) && p.above >= 0 &&
                  p.above <= static_cast<i32>(kMostBeside),
              NXS_E_SHAPE);
  NXS_REQUIRE(p.dim >= 0 && p.dim <= 65536, NXS_E_SHAPE);
  NXS_REQUIRE(p.target_stride_row >= 0 && p.draft_stride_row >= 0 && p.allow_stride_row >= 0 &&
                  p.neighbours_stride_row >= 0 && p.embeddings_stride_row >= 0,
              NXS_E_STRIDE);
  NXS_REQUIRE(p.rule >= NXS_VISUAL_LANTERN && p.rule <= NXS_VISUAL_JACOBI, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.redraft >= NXS_REDRAFT_NONE && p.redraft <= NXS_REDRAFT_GUMBEL, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.redraft != NXS_REDRAFT_GUMBEL || !p.uniforms_or_null, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.bound >= 0 && p.probability_gap >= 0 && p.distance >= 0, NXS_E_UNSUPPORTED);
  if (p.batch == 0) return NXS_OK;
  NXS_REQUIRE(p.blocks >= 1, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.target && p.cu_rows && p.drafts && p.tokens && p.emitted && p.accepted && p.status && p.workspace &&
                  p.counters,
              NXS_E_NULL);
  NXS_REQUIRE(p.draft_or_null || !p.draft_stats_or_null, NXS_E_NULL);
  NXS_REQUIRE((p.draft_free_or_null != nullptr) == (p.draft_or_null && p.target_free_or_null), NXS_E_NULL);
  NXS_REQUIRE(p.redraft == NXS_REDRAFT_NONE || p.redrafts_or_null, NXS_E_NULL);
  if (p.rule == NXS_VISUAL_LANTERN) {
    NXS_REQUIRE(p.neighbours_dtype == NXS_U16 || p.neighbours_dtype == NXS_I32, NXS_E_DTYPE);
    NXS_REQUIRE(p.neighbours_or_null || (p.accumulated == 0 && p.zeroed == 0), NXS_E_NULL);
  }
  if (p.rule == NXS_VISUAL_GROUPED && p.embeddings_or_null) {
    NXS_REQUIRE(is_float(p.embeddings_dtype), NXS_E_DTYPE);
    NXS_REQUIRE(p.dim >= 1, NXS_E_SHAPE);
  }
  for (const void* word :
       {static_cast<const void*>(p.cu_rows), static_cast<const void*>(p.drafts),
        static_cast<const void*>(p.row_index_or_null), static_cast<const void*>(p.draft_row_or_null),
        static_cast<const void*>(p.draft_stats_or_null), static_cast<const void*>(p.allow_or_null),
        static_cast<const void*>(p.syntax_or_null), static_cast<const void*>(p.temperature_or_null),
        static_cast<const void*>(p.draft_temperature_or_null), static_cast<const void*>(p.guidance_or_null),
        static_cast<const void*>(p.top_k_or_null), static_cast<const void*>(p.top_p_or_null),
        static_cast<const void*>(p.min_p_or_null), static_cast<const void*>(p.uniforms_or_null),
        static_cast<const void*>(p.tokens), static_cast<const void*>(p.emitted), static_cast<const void*>(p.accepted),
        static_cast<const void*>(p.status), static_cast<const void*>(p.last_row_or_null),
        static_cast<const void*>(p.redrafts_or_null), static_cast<const void*>(p.redraft_stats_or_null),
        static_cast<const void*>(p.counters)})
    NXS_REQUIRE(is_aligned(word, 4), NXS_E_ALIGNMENT);
  for (const void* rows : {p.target, p.target_free_or_null, p.draft_or_null, p.draft_free_or_null})
    NXS_REQUIRE(is_aligned(rows, dtype_bytes(p.dtype)), NXS_E_ALIGNMENT);
  NXS_REQUIRE(is_aligned(p.seeds_or_null, 8) && is_aligned(p.positions_or_null, 8) && is_aligned(p.workspace, 16),
              NXS_E_ALIGNMENT);
  NXS_REQUIRE(p.rule != NXS_VISUAL_LANTERN || is_aligned(p.neighbours_or_null, dtype_bytes(p.neighbours_dtype)),
              NXS_E_ALIGNMENT);
  NXS_REQUIRE(p.rule != NXS_VISUAL_GROUPED || !p.embeddings_or_null ||
                  is_aligned(p.embeddings_or_null, dtype_bytes(p.embeddings_dtype)),
              NXS_E_ALIGNMENT);
  switch (p.dtype) {
    case NXS_F32: return visual_verify<float>(p, stream);
    case NXS_F16: return visual_verify<f16>(p, stream);
    default: return visual_verify<bf16>(p, stream);
  }
}
