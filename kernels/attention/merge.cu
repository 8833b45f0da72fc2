// C entry of the merge: refuse what the kernel cannot take, then pick the dtype of the parts.
#include "attention/merge.cuh"
#include "attention/merge.h"
#include "common/check.h"

namespace nxs::attention {

template <> nxs_status merge_parts<float>(const nxs_attention_merge_params&, void*);
template <> nxs_status merge_parts<f16>(const nxs_attention_merge_params&, void*);
template <> nxs_status merge_parts<bf16>(const nxs_attention_merge_params&, void*);

nxs_status merge(const nxs_attention_merge_params& p, void* stream) {
  const i64 part_bytes = dtype_bytes(p.parts_dtype), out_bytes = dtype_bytes(p.out_dtype);
  NXS_REQUIRE(p.parts_dtype == NXS_F32 || p.parts_dtype == NXS_F16 || p.parts_dtype == NXS_BF16, NXS_E_DTYPE);
  NXS_REQUIRE(p.out_dtype == NXS_F32 || p.out_dtype == NXS_F16 || p.out_dtype == NXS_BF16, NXS_E_DTYPE);
  NXS_REQUIRE(p.batch >= 0 && p.rows >= 0 && p.heads >= 0, NXS_E_SHAPE);
  NXS_REQUIRE(p.parts_count >= 1 && p.parts_count <= 256 && p.dim >= 1 && p.dim <= 1024, NXS_E_SHAPE);
  NXS_REQUIRE(p.log2_lanes >= 0 && p.log2_lanes <= 5, NXS_E_UNSUPPORTED);
  if (p.batch == 0 || p.rows == 0 || p.heads == 0) return NXS_OK;
  NXS_REQUIRE(p.rows <= INT32_MAX / p.batch && p.batch * p.rows <= INT32_MAX / p.heads, NXS_E_SHAPE);

  for (const i64 stride : {p.parts_stride_part, p.parts_stride_batch, p.parts_stride_row, p.parts_stride_head,
                           p.lse_stride_part, p.lse_stride_batch, p.lse_stride_head, p.lse_stride_row,
                           p.out_stride_batch, p.out_stride_row, p.out_stride_head, p.out_lse_stride_batch,
                           p.out_lse_stride_head, p.out_lse_stride_row})
    NXS_REQUIRE(stride >= 0, NXS_E_STRIDE);
  NXS_REQUIRE(p.parts && p.lse && p.out && (p.out_lse_or_null || !p.accumulate), NXS_E_NULL);
  NXS_REQUIRE(is_aligned(p.parts, part_bytes) && is_aligned(p.lse, 4) && is_aligned(p.out, out_bytes) &&
                  is_aligned(p.out_lse_or_null, 4),
              NXS_E_ALIGNMENT);
  if (p.vector) {
    const i64 vec = 16 / part_bytes, store = vec * out_bytes < 16 ? vec * out_bytes : 16;
    for (const i64 stride : {i64{p.dim}, p.parts_stride_part, p.parts_stride_batch, p.parts_stride_row,
                             p.parts_stride_head, p.out_stride_batch, p.out_stride_row, p.out_stride_head})
      NXS_REQUIRE(stride % vec == 0, NXS_E_STRIDE);
    NXS_REQUIRE(is_aligned(p.parts, 16) && is_aligned(p.out, store), NXS_E_ALIGNMENT);
  }

  switch (p.parts_dtype) {
    case NXS_F32: return merge_parts<float>(p, stream);
    case NXS_F16: return merge_parts<f16>(p, stream);
    default: return merge_parts<bf16>(p, stream);
  }
}

}  // namespace nxs::attention

extern "C" nxs_status nxs_attention_merge(const nxs_attention_merge_params* params, void* stream) {
  NXS_REQUIRE(params, NXS_E_NULL);
  return nxs::attention::merge(*params, stream);
}
