// C entry of the multi-scale quantizers: refuse what the kernels cannot take, work out alignment, pick the kind of
// tokens.
#include "quantization/multi_scale.cuh"

#include "common/check.h"

namespace nxs::quantization {

template <> nxs_status multi_scale_launch<Codes>(const ScaleParams&, void*);
template <> nxs_status multi_scale_launch<float>(const ScaleParams&, void*);
template <> nxs_status multi_scale_launch<f16>(const ScaleParams&, void*);
template <> nxs_status multi_scale_launch<bf16>(const ScaleParams&, void*);
template <> nxs_status multi_scale_launch<u8>(const ScaleParams&, void*);

namespace {

bool is_float(nxs_dtype dtype) { return dtype == NXS_F32 || dtype == NXS_F16 || dtype == NXS_BF16; }

nxs_status check_scales(const Params& p) {
  for (int s = 0; s < p.scales; ++s) {
    const int height = p.scale_height[s], width = p.scale_width[s];
    NXS_REQUIRE(height >= 1 && height <= p.height && width >= 1 && width <= p.width, NXS_E_SHAPE);
    NXS_REQUIRE(height % p.patch == 0 && width % p.patch == 0, NXS_E_SHAPE);
    NXS_REQUIRE(p.scale_phi[s] < 0 || p.phi_or_null, NXS_E_NULL);
    NXS_REQUIRE(p.scale_phi[s] < 0 || !p.independent, NXS_E_UNSUPPORTED);
  }
  return NXS_OK;
}

nxs_status check_tokens(const Params& p) {
  NXS_REQUIRE(p.tokens_or_null, NXS_E_NULL);
  NXS_REQUIRE(p.tokens_stride_batch >= 0, NXS_E_STRIDE);
  NXS_REQUIRE(is_aligned(p.tokens_or_null, dtype_bytes(p.tokens_dtype)), NXS_E_ALIGNMENT);
  switch (p.tokens_kind) {
    case NXS_TOKENS_CODES:
      NXS_REQUIRE(p.tokens_dtype == NXS_U16 || p.tokens_dtype == NXS_U32 || p.tokens_dtype == NXS_I64, NXS_E_DTYPE);
      NXS_REQUIRE(p.entries >= 1 && p.entries <= INT32_MAX && p.patch == 1, NXS_E_SHAPE);
      NXS_REQUIRE(p.codebook_or_null, NXS_E_NULL);
      NXS_REQUIRE(is_aligned(p.codebook_or_null, 4), NXS_E_ALIGNMENT);
      return NXS_OK;
    case NXS_TOKENS_EMBEDDINGS: NXS_REQUIRE(is_float(p.tokens_dtype), NXS_E_DTYPE); return NXS_OK;
    case NXS_TOKENS_BITS: NXS_REQUIRE(p.tokens_dtype == NXS_U8, NXS_E_DTYPE); return NXS_OK;
    default: return NXS_E_UNSUPPORTED;
  }
}

nxs_status check_next(const Params& p) {
  NXS_REQUIRE(p.next_height <= p.height && p.next_width >= 1 && p.next_width <= p.width, NXS_E_SHAPE);
  NXS_REQUIRE(p.next_height % p.patch == 0 && p.next_width % p.patch == 0, NXS_E_SHAPE);
  NXS_REQUIRE(p.next_stride_batch >= 0 && p.labels_stride_batch >= 0, NXS_E_STRIDE);
  NXS_REQUIRE(p.down == NXS_RESIZE_AREA || p.down == NXS_RESIZE_BILINEAR, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.repeat == 1 || p.repeat == 2, NXS_E_SHAPE);
  NXS_REQUIRE(!p.next_or_null || is_float(p.next_dtype), NXS_E_DTYPE);
  NXS_REQUIRE(!p.next_or_null || is_aligned(p.next_or_null, dtype_bytes(p.next_dtype)), NXS_E_ALIGNMENT);
  NXS_REQUIRE(p.target_or_null || (!p.labels_or_null && !p.next_of_residual), NXS_E_NULL);
  NXS_REQUIRE(!p.flipped_or_null || (p.labels_or_null && p.seeds_or_null), NXS_E_NULL);
  NXS_REQUIRE(is_aligned(p.target_or_null, 4) && is_aligned(p.seeds_or_null, 8), NXS_E_ALIGNMENT);
  // What it is made from.
  if (p.independent)
    NXS_REQUIRE(p.rows, NXS_E_UNSUPPORTED);
  else
    NXS_REQUIRE(p.rows || p.scales == 0 || p.f_hat_out_or_null, NXS_E_NULL);
  return NXS_OK;
}

nxs_status check_rows(const Params& p) {
  NXS_REQUIRE(p.scales == 1 && p.scale_phi[0] < 0 && !p.prefixes && !p.labels_or_null && !p.next_of_residual,
              NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.next_height == 0 || p.independent || p.down == NXS_RESIZE_BILINEAR, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.f_hat_or_null != p.f_hat_out_or_null || !p.f_hat_or_null || p.independent, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.f_hat_out_or_null || p.next_or_null, NXS_E_NULL);
  return NXS_OK;
}

}  // namespace
}  // namespace nxs::quantization

extern "C" nxs_status nxs_multi_scale(const nxs_multi_scale_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::quantization;
  NXS_REQUIRE(params, NXS_E_NULL);
  const Params& p = *params;
  NXS_REQUIRE(p.up == NXS_RESIZE_BICUBIC || p.up == NXS_RESIZE_BILINEAR, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.batch >= 0 && p.batch <= 65535 && p.channels >= 1 && p.channels <= 256, NXS_E_SHAPE);
  NXS_REQUIRE(p.height >= 1 && p.height <= 1024 && p.width >= 1 && p.width <= 1024, NXS_E_SHAPE);
  NXS_REQUIRE(p.patch == 1 || p.patch == 2, NXS_E_SHAPE);
  NXS_REQUIRE(p.scales >= 0 && p.scales <= NXS_MAX_SCALES && p.next_height >= 0, NXS_E_SHAPE);
  if (p.batch == 0 || (p.scales == 0 && p.next_height == 0)) return NXS_OK;
  NXS_TRY(check_scales(p));
  if (p.scales > 0) NXS_TRY(check_tokens(p));
  if (p.next_height > 0) NXS_TRY(check_next(p));
  if (p.rows) {
    NXS_TRY(check_rows(p));
  } else {
    NXS_REQUIRE(p.group >= 4 && p.group % 4 == 0 && p.band >= 2 && p.band % 2 == 0, NXS_E_SHAPE);
    NXS_REQUIRE(p.blocks == 1 || (p.blocks > 1 && p.blocks <= 8 && !p.plane_shared), NXS_E_UNSUPPORTED);
    NXS_REQUIRE(p.scales == 0 || p.f_hat_out_or_null, NXS_E_NULL);
  }
  NXS_REQUIRE(is_aligned(p.phi_or_null, 16) && is_aligned(p.f_hat_or_null, 4) && is_aligned(p.f_hat_out_or_null, 4) &&
                  is_aligned(p.flags_or_null, 4),
              NXS_E_ALIGNMENT);

  ScaleParams q = {};
  q.p = p;
  const bool fours = p.channels % 4 == 0 && p.patch == 1;
  const bool codes = p.tokens_kind == NXS_TOKENS_CODES;
  q.vector_rows = fours && (codes ? is_aligned(p.codebook_or_null, 16)
                                  : is_aligned(p.tokens_or_null, 4 * dtype_bytes(p.tokens_dtype)) &&
                                        p.tokens_stride_batch % 4 == 0);
  q.vector_map = p.width % 4 == 0 && is_aligned(p.f_hat_or_null, 16) && is_aligned(p.f_hat_out_or_null, 16);
  q.vector_next = fours && p.next_or_null && is_aligned(p.next_or_null, 4 * dtype_bytes(p.next_dtype)) &&
                  p.next_stride_batch % 4 == 0;
  // A window of more than eight pixels is shared by lanes, about four pixels each.
  q.lanes = 1;
  if (p.next_height > 0) {
    const u32 window = ceil_div(p.height, p.next_height) * ceil_div(p.width, p.next_width);
    while (q.lanes < 32 && q.lanes * 8 < window) q.lanes *= 2;
  }
  // Without tokens it does not matter of what kind they are.
  if (codes || p.scales == 0) return multi_scale_launch<Codes>(q, stream);
  switch (p.tokens_dtype) {
    case NXS_F32: return multi_scale_launch<float>(q, stream);
    case NXS_F16: return multi_scale_launch<f16>(q, stream);
    case NXS_BF16: return multi_scale_launch<bf16>(q, stream);
    default: return multi_scale_launch<u8>(q, stream);
  }
}
