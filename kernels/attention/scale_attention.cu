// C entry of scale attention: refuse what the kernels cannot take, pick dtype and dim, combine the splits.
#include "attention/merge.h"
#include "attention/scale_attention_sm90.cuh"
#include "common/check.h"

namespace nxs::attention {

// Of scale_attention_sm80.cuh.
template <typename T, int kDim> nxs_status scale_attention_sm80(const ScaleParams& p, void* stream);
template <typename T, int kDim> nxs_status scale_attention_packed(const ScaleParams& p, void* stream);
// Of scale_attention_packed_sm90.cuh.
template <typename T, int kDim> nxs_status scale_attention_packed_sm90(const ScaleParams& p, void* stream);

#define NXS_DECLARE(type, dim)                       \
  template <> nxs_status scale_attention_sm80<type, dim>(const ScaleParams&, void*); \
  template <> nxs_status scale_attention_packed<type, dim>(const ScaleParams&, void*); \
  template <> nxs_status scale_attention_packed_sm90<type, dim>(const ScaleParams&, void*); \
  template <> nxs_status scale_attention_sm90<type, dim>(const ScaleParams&, void*);
NXS_DECLARE(bf16, 64)
NXS_DECLARE(bf16, 96)
NXS_DECLARE(bf16, 128)
NXS_DECLARE(f16, 64)
NXS_DECLARE(f16, 96)
NXS_DECLARE(f16, 128)
#undef NXS_DECLARE

template <typename T> static nxs_status for_dim(const ScaleParams& p, void* stream) {
  if (p.kv_format != NXS_KV_PLAIN && p.variant == 1)
    return p.dim == 64   ? scale_attention_packed_sm90<T, 64>(p, stream)
           : p.dim == 96 ? scale_attention_packed_sm90<T, 96>(p, stream)
                         : scale_attention_packed_sm90<T, 128>(p, stream);
  if (p.kv_format != NXS_KV_PLAIN)
    return p.dim == 64   ? scale_attention_packed<T, 64>(p, stream)
           : p.dim == 96 ? scale_attention_packed<T, 96>(p, stream)
                         : scale_attention_packed<T, 128>(p, stream);
  if (p.variant == 0)
    return p.dim <= 64   ? scale_attention_sm80<T, 64>(p, stream)
           : p.dim <= 96 ? scale_attention_sm80<T, 96>(p, stream)
                         : scale_attention_sm80<T, 128>(p, stream);
  return p.dim <= 64   ? scale_attention_sm90<T, 64>(p, stream)
         : p.dim <= 96 ? scale_attention_sm90<T, 96>(p, stream)
                       : scale_attention_sm90<T, 128>(p, stream);
}

// The parts that the splits have left in the workspace.
static nxs_status combine(const ScaleParams& p, void* stream) {
  const i64 rows = p.batch * p.heads * p.rows;
  nxs_attention_merge_params m = {};
  m.parts = p.parts_or_null;
  m.lse = p.parts_or_null + p.splits * rows * p.dim;
  m.out = p.out;
  m.out_lse_or_null = p.lse_or_null;
  m.gate_or_null = p.schedule + 3;
  m.gate = p.digest;
  m.parts_stride_part = rows * p.dim;
  m.parts_stride_batch = p.heads * p.rows * p.dim;
  m.parts_stride_head = p.rows * p.dim;
  m.parts_stride_row = p.dim;
  m.lse_stride_part = rows;
  m.lse_stride_batch = p.heads * p.rows;
  m.lse_stride_head = p.rows;
  m.lse_stride_row = 1;
  m.out_stride_batch = p.out_stride_batch;
  m.out_stride_row = p.out_stride_row;
  m.out_stride_head = p.out_stride_head;
  m.out_lse_stride_batch = p.lse_stride_batch;
  m.out_lse_stride_head = p.lse_stride_head;
  m.out_lse_stride_row = p.lse_stride_row;
  m.parts_count = p.splits;
  m.batch = p.batch;
  m.rows = p.rows;
  m.heads = p.heads;
  m.dim = p.dim;
  m.parts_dtype = NXS_F32;
  m.out_dtype = p.dtype;
  m.vector = 1;
  while (m.log2_lanes < 5 && (4 << m.log2_lanes) < p.dim) ++m.log2_lanes;
  return merge(m, stream);
}

}  // namespace nxs::attention

extern "C" nxs_status nxs_scale_attention(const nxs_scale_attention_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::attention;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_scale_attention_params& p = *params;
  NXS_REQUIRE(p.dtype == NXS_BF16 || p.dtype == NXS_F16, NXS_E_DTYPE);
  NXS_REQUIRE(p.variant == 0 || p.variant == 1, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.batch >= 0 && p.batch <= INT32_MAX && p.rows >= 0 && p.rows <= INT32_MAX && p.q_rows >= 0 && p.kv_rows >= 0 &&
                  p.kv_rows <= INT32_MAX && p.items >= 0 && p.length_count >= 0 && p.section >= 0,
              NXS_E_SHAPE);
  NXS_REQUIRE(p.heads > 0 && p.kv_heads > 0 && p.heads % p.kv_heads == 0, NXS_E_SHAPE);
  NXS_REQUIRE(p.dim > 0 && p.dim <= 128 && p.dim % 8 == 0, NXS_E_SHAPE);
  NXS_REQUIRE(p.pack == 1 || p.pack == p.heads / p.kv_heads, NXS_E_SHAPE);
  NXS_REQUIRE(p.groups >= 1 && p.groups <= (p.variant == 0 ? 1 : 4), NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.splits >= 1 && p.splits <= 256, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.scale > 0, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.logit_bound >= 0 && p.logit_bound <= 40 && (p.logit_bound == 0 || p.dtype == NXS_BF16), NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.kv_format >= NXS_KV_PLAIN && p.kv_format <= NXS_KV_INT4, NXS_E_UNSUPPORTED);
  const bool packed = p.kv_format != NXS_KV_PLAIN;
  NXS_REQUIRE(!packed || (p.groups <= (p.dim == 64 ? 3 : 2) && (p.dim == 64 || p.dim == 96 || p.dim == 128)), NXS_E_UNSUPPORTED);
  if (p.batch == 0 || p.rows == 0 || p.items == 0) return NXS_OK;
  NXS_REQUIRE(p.batch * (p.heads / p.pack) <= INT32_MAX / p.items, NXS_E_SHAPE);
  NXS_REQUIRE(p.variant == 0 || (p.blocks > 0 && (p.groups < 4 || p.blocks % 2 == 0)), NXS_E_SHAPE);

  for (const i64 stride : {p.q_stride_batch, p.q_stride_row, p.q_stride_head, p.k_stride_batch, p.k_stride_row, p.k_stride_head,
                           p.v_stride_batch, p.v_stride_row, p.v_stride_head, p.out_stride_batch, p.out_stride_row,
                           p.out_stride_head})
    NXS_REQUIRE(stride >= 0 && stride % 8 == 0, NXS_E_STRIDE);
  NXS_REQUIRE((p.q_rows <= 1 || p.q_stride_row > 0) && (p.heads == 1 || p.q_stride_head > 0), NXS_E_STRIDE);
  NXS_REQUIRE(p.kv_rows <= 1 || (p.k_stride_row > 0 && p.v_stride_row > 0), NXS_E_STRIDE);
  NXS_REQUIRE(p.kv_heads == 1 || p.kv_rows == 0 || (p.k_stride_head > 0 && p.v_stride_head > 0), NXS_E_STRIDE);
  for (const i64 stride : {p.lse_stride_batch, p.lse_stride_head, p.lse_stride_row, p.lengths_stride_index,
                           p.lengths_stride_batch, p.lengths_stride_head, p.row_index_stride_batch})
    NXS_REQUIRE(stride >= 0, NXS_E_STRIDE);
  if (packed) {
    const i64 numbers = p.kv_format == NXS_KV_FP8 ? 1 : 2;
    for (const i64 stride : {p.k_stride_batch, p.k_stride_row, p.k_stride_head, p.v_stride_batch, p.v_stride_row, p.v_stride_head})
      NXS_REQUIRE(stride % 16 == 0, NXS_E_STRIDE);
    for (const i64 stride : {p.k_numbers_stride_batch, p.k_numbers_stride_row, p.k_numbers_stride_head, p.v_numbers_stride_batch,
                             p.v_numbers_stride_row, p.v_numbers_stride_head})
      NXS_REQUIRE(stride >= 0 && stride % numbers == 0, NXS_E_STRIDE);
    NXS_REQUIRE(is_aligned(p.k_numbers_or_null, 16) && is_aligned(p.v_numbers_or_null, 16), NXS_E_ALIGNMENT);
  }
  NXS_REQUIRE(p.q && p.out && p.schedule && (p.kv_rows == 0 || (p.k && p.v)), NXS_E_NULL);
  NXS_REQUIRE((p.length_count == 0 || p.lengths_or_null) && (p.splits == 1 || p.parts_or_null), NXS_E_NULL);
  for (const void* pointer : {p.q, p.k, p.v, static_cast<const void*>(p.out), static_cast<const void*>(p.schedule),
                              static_cast<const void*>(p.parts_or_null)})
    NXS_REQUIRE(is_aligned(pointer, 16), NXS_E_ALIGNMENT);
  for (const void* pointer : {static_cast<const void*>(p.lse_or_null), static_cast<const void*>(p.lengths_or_null),
                              static_cast<const void*>(p.row_index_or_null), static_cast<const void*>(p.kv_offset_or_null)})
    NXS_REQUIRE(is_aligned(pointer, 4), NXS_E_ALIGNMENT);
  NXS_TRY(p.dtype == NXS_BF16 ? for_dim<bf16>(p, stream) : for_dim<f16>(p, stream));
  return p.splits > 1 ? combine(p, stream) : NXS_OK;
}
