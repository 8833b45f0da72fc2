// C entry of the verification of trees: refuse what the kernel cannot take, then pick the dtype of the target.
#include "common/check.h"
#include "verification/tree_verify.cuh"

namespace nxs::verification::tree {
template <> nxs_status tree_verify_target<float>(const nxs_tree_verify_params&, void*);
template <> nxs_status tree_verify_target<f16>(const nxs_tree_verify_params&, void*);
template <> nxs_status tree_verify_target<bf16>(const nxs_tree_verify_params&, void*);
}  // namespace nxs::verification::tree

extern "C" nxs_status nxs_tree_verify(const nxs_tree_verify_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::verification;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_tree_verify_params& p = *params;
  const i64 most_vocab = i64{1} << 24;
  for (const nxs_dtype dtype : {p.target_dtype, p.draft_dtype})
    NXS_REQUIRE(dtype == NXS_F32 || dtype == NXS_F16 || dtype == NXS_BF16, NXS_E_DTYPE);
  NXS_REQUIRE(p.batch >= 0 && p.batch <= i64{1} << 20, NXS_E_SHAPE);
  NXS_REQUIRE(p.max_nodes >= 1 && p.max_nodes <= static_cast<i32>(tree::kMostNodes) && p.max_depth >= 0 &&
                  p.max_depth <= static_cast<i32>(tree::kMostDepth),
              NXS_E_SHAPE);
  NXS_REQUIRE(p.vocab >= 1 && p.vocab <= most_vocab && p.draft_vocab >= 1 && p.draft_vocab <= most_vocab, NXS_E_SHAPE);
  NXS_REQUIRE(p.target_rows >= 0 && p.target_rows <= INT32_MAX && p.draft_rows >= 0 && p.draft_rows <= INT32_MAX,
              NXS_E_SHAPE);
  NXS_REQUIRE(p.target_stride_row >= 0 && p.draft_stride_row >= 0 && p.allow_stride_row >= 0, NXS_E_STRIDE);
  NXS_REQUIRE(p.rule >= NXS_RULE_GREEDY && p.rule <= NXS_RULE_REJECT, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.cluster >= 1 && p.cluster <= static_cast<i32>(tree::kMostCluster) && (p.cluster & (p.cluster - 1)) == 0,
              NXS_E_UNSUPPORTED);
  if (p.shared_partials) {
    const i64 of_draft = p.draft_or_null ? (p.draft_vocab + kChunk - 1) / kChunk : 0;
    NXS_REQUIRE((p.vocab + kChunk - 1) / kChunk + of_draft <= tree::kMostShared, NXS_E_UNSUPPORTED);
  }
  if (p.batch == 0) return NXS_OK;
  NXS_REQUIRE(p.target && p.drafts && p.tokens && p.emitted && p.accepted && p.status && p.workspace, NXS_E_NULL);
  NXS_REQUIRE(p.draft_or_null || !p.draft_stats_or_null, NXS_E_NULL);
  NXS_REQUIRE(p.parents_or_null || (p.first_child_or_null && p.next_sibling_or_null), NXS_E_NULL);
  for (const void* word :
       {static_cast<const void*>(p.cu_rows_or_null), static_cast<const void*>(p.parents_or_null),
        static_cast<const void*>(p.first_child_or_null), static_cast<const void*>(p.next_sibling_or_null),
        static_cast<const void*>(p.drafts), static_cast<const void*>(p.row_index_or_null),
        static_cast<const void*>(p.draft_row_or_null), static_cast<const void*>(p.draft_stats_or_null),
        static_cast<const void*>(p.target_to_draft_or_null), static_cast<const void*>(p.target_stats_or_null),
        static_cast<const void*>(p.allow_or_null), static_cast<const void*>(p.rules_or_null),
        static_cast<const void*>(p.temperature_or_null), static_cast<const void*>(p.draft_temperature_or_null),
        static_cast<const void*>(p.top_k_or_null), static_cast<const void*>(p.top_p_or_null),
        static_cast<const void*>(p.min_p_or_null), static_cast<const void*>(p.uniforms_or_null),
        static_cast<const void*>(p.kv_start_or_null), static_cast<const void*>(p.kv_slots_or_null),
        static_cast<const void*>(p.tokens), static_cast<const void*>(p.emitted), static_cast<const void*>(p.accepted),
        static_cast<const void*>(p.status), static_cast<const void*>(p.last_row_or_null),
        static_cast<const void*>(p.path_or_null), static_cast<const void*>(p.kv_source_or_null),
        static_cast<const void*>(p.kv_destination_or_null), static_cast<const void*>(p.log_probs_or_null)})
    NXS_REQUIRE(is_aligned(word, 4), NXS_E_ALIGNMENT);
  NXS_REQUIRE(is_aligned(p.target, dtype_bytes(p.target_dtype)) && is_aligned(p.seeds_or_null, 8) &&
                  is_aligned(p.draft_or_null, dtype_bytes(p.draft_dtype)) && is_aligned(p.positions_or_null, 8) &&
                  is_aligned(p.workspace, 16),
              NXS_E_ALIGNMENT);
  switch (p.target_dtype) {
    case NXS_F32: return tree::tree_verify_target<float>(p, stream);
    case NXS_F16: return tree::tree_verify_target<f16>(p, stream);
    default: return tree::tree_verify_target<bf16>(p, stream);
  }
}
