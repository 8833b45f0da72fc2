// C entry of the preparation: refuse what the kernel cannot take, then pick the dtype of the input.
#include "attention/prepare.cuh"
#include "common/check.h"

namespace nxs::attention {

template <> nxs_status prepare<float>(const nxs_attention_prepare_params&, void*);
template <> nxs_status prepare<f16>(const nxs_attention_prepare_params&, void*);
template <> nxs_status prepare<bf16>(const nxs_attention_prepare_params&, void*);

namespace {

bool is_float(nxs_dtype dtype) { return dtype == NXS_F32 || dtype == NXS_F16 || dtype == NXS_BF16; }

nxs_status check_tensor(const nxs_attention_prepare_params& p, const nxs_attention_prepare_tensor& t) {
  NXS_REQUIRE(is_float(t.out_dtype), NXS_E_DTYPE);
  NXS_REQUIRE(t.norm >= NXS_NORM_NONE && t.norm <= NXS_NORM_RMS, NXS_E_UNSUPPORTED);
  // Written so that a NaN is refused.
  NXS_REQUIRE(t.norm == NXS_NORM_NONE || (t.norm_eps >= (t.norm == NXS_NORM_L2 ? 1e-18f : 0) && t.norm_eps <= 1),
              NXS_E_UNSUPPORTED);
  NXS_REQUIRE(t.out_rows >= 0 && (t.append || t.out_rows >= p.rows), NXS_E_SHAPE);
  NXS_REQUIRE(p.batch * p.rows <= INT32_MAX / t.heads, NXS_E_SHAPE);
  const i64 strides[] = {t.input_stride_batch, t.input_stride_row, t.input_stride_head,
                         t.out_stride_batch,   t.out_stride_row,   t.out_stride_head};
  for (const i64 stride : strides) NXS_REQUIRE(stride >= 0, NXS_E_STRIDE);
  NXS_REQUIRE(t.input && (t.out || t.out_rows == 0), NXS_E_NULL);
  const i64 in_bytes = dtype_bytes(p.in_dtype), out_bytes = dtype_bytes(t.out_dtype);
  NXS_REQUIRE(is_aligned(t.input, in_bytes) && is_aligned(t.out, out_bytes) && is_aligned(t.weight_or_null, 4) &&
                  is_aligned(t.head_scale_or_null, 4),
              NXS_E_ALIGNMENT);
  if (p.vector) {
    const i64 vec = 16 / in_bytes, store = vec * out_bytes < 16 ? vec * out_bytes : 16;
    for (const i64 stride : strides) NXS_REQUIRE(stride % vec == 0, NXS_E_STRIDE);
    NXS_REQUIRE(is_aligned(t.input, 16) && is_aligned(t.out, store) && is_aligned(t.weight_or_null, 16),
                NXS_E_ALIGNMENT);
  }
  return NXS_OK;
}

nxs_status check_rope(const nxs_attention_prepare_params& p) {
  NXS_REQUIRE(p.rotary_dim >= 2 && p.rotary_dim <= p.dim && p.rotary_dim % 2 == 0 && p.table_rows >= 1, NXS_E_SHAPE);
  NXS_REQUIRE(p.rope != NXS_ROPE_HALF ||
                  (p.rope_block >= 2 && p.rope_block % 2 == 0 && p.rotary_dim % p.rope_block == 0),
              NXS_E_SHAPE);
  NXS_REQUIRE(p.table_stride_row >= 0 && p.positions_stride_batch >= 0 && p.positions_stride_row >= 0, NXS_E_STRIDE);
  NXS_REQUIRE(p.cos_or_null && p.sin_or_null, NXS_E_NULL);
  NXS_REQUIRE(is_aligned(p.cos_or_null, 4) && is_aligned(p.sin_or_null, 4) && is_aligned(p.positions_or_null, 4),
              NXS_E_ALIGNMENT);
  if (p.vector) {
    const i64 vec = 16 / dtype_bytes(p.in_dtype);
    NXS_REQUIRE((p.rope == NXS_ROPE_HALF ? p.rope_block / 2 : p.rotary_dim) % vec == 0, NXS_E_SHAPE);
    NXS_REQUIRE(p.table_stride_row % 4 == 0, NXS_E_STRIDE);
    NXS_REQUIRE(is_aligned(p.cos_or_null, 16) && is_aligned(p.sin_or_null, 16), NXS_E_ALIGNMENT);
  }
  return NXS_OK;
}

}  // namespace
}  // namespace nxs::attention

extern "C" nxs_status nxs_attention_prepare(const nxs_attention_prepare_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::attention;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_attention_prepare_params& p = *params;
  NXS_REQUIRE(p.in_dtype == NXS_F32 || p.in_dtype == NXS_F16 || p.in_dtype == NXS_BF16, NXS_E_DTYPE);
  NXS_REQUIRE(p.rope >= NXS_ROPE_NONE && p.rope <= NXS_ROPE_HALF, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.batch >= 0 && p.rows >= 0 && p.dim >= 1 && p.dim <= 256, NXS_E_SHAPE);
  NXS_REQUIRE(p.log2_lanes >= 0 && p.log2_lanes <= 5, NXS_E_UNSUPPORTED);
  bool any = false;
  for (const nxs_attention_prepare_tensor& t : p.tensor) {
    NXS_REQUIRE(t.heads >= 0, NXS_E_SHAPE);
    any |= t.heads > 0;
  }
  if (!any || p.batch == 0 || p.rows == 0) return NXS_OK;
  NXS_REQUIRE(p.rows <= INT32_MAX / p.batch, NXS_E_SHAPE);

  if (p.rope != NXS_ROPE_NONE) NXS_TRY(check_rope(p));
  for (const nxs_attention_prepare_tensor& t : p.tensor)
    if (t.heads > 0) NXS_TRY(check_tensor(p, t));
  NXS_REQUIRE(is_aligned(p.append_at_or_null, 4) && is_aligned(p.flags_or_null, 4), NXS_E_ALIGNMENT);
  // A place that 64 bits cannot hold would wrap.
  NXS_REQUIRE(p.append_at >= INT32_MIN && p.append_at <= INT64_MAX / 2 && p.position >= INT32_MIN &&
                  p.position <= INT64_MAX / 2,
              NXS_E_SHAPE);

  // A row that rotates has pairs; the others are taken by twos. What does not divide takes one pair more.
  const i32 vec = p.vector ? static_cast<i32>(16 / dtype_bytes(p.in_dtype)) : 1, owned = p.vector ? 1 : 4;
  NXS_REQUIRE(p.dim % vec == 0, NXS_E_SHAPE);
  NXS_REQUIRE((p.dim / vec + 1) / 2 <= owned << p.log2_lanes, NXS_E_UNSUPPORTED);

  switch (p.in_dtype) {
    case NXS_F32: return prepare<float>(p, stream);
    case NXS_F16: return prepare<f16>(p, stream);
    default: return prepare<bf16>(p, stream);
  }
}
