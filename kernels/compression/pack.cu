// C entry of packing and unpacking: refuse what the kernels cannot take, then pick the dtype.
#include <cmath>

#include "common/check.h"
#include "compression/pack.cuh"

namespace nxs::compression {

#define NXS_DECLARE(type)                                        \
  template <> nxs_status pack_of<type>(const PackParams&, void*); \
  template <> nxs_status unpack_of<type>(const PackParams&, void*);
NXS_DECLARE(float)
NXS_DECLARE(f16)
NXS_DECLARE(bf16)
#undef NXS_DECLARE

static bool is_power_of_two(i32 n) { return n > 0 && (n & (n - 1)) == 0; }

static nxs_status check_format(const nxs_pack_params& p) {
  const bool scaled = p.format == NXS_PACK_FP8 || p.format == NXS_PACK_INT8;
  NXS_REQUIRE(p.format >= NXS_PACK_FP8 && p.format <= NXS_PACK_LLOYD_MAX, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.numbers_dtype == NXS_F32 || (p.numbers_dtype == NXS_F16 && !scaled) || p.scales_or_null, NXS_E_DTYPE);
  NXS_REQUIRE(!p.scales_or_null || scaled, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(!p.scales_or_null || !p.numbers_or_null, NXS_E_UNSUPPORTED);
  switch (p.format) {
    case NXS_PACK_FP8:
    case NXS_PACK_INT8: NXS_REQUIRE(p.bits == 8, NXS_E_UNSUPPORTED); break;
    case NXS_PACK_LLOYD_MAX: NXS_REQUIRE(p.bits >= 2 && p.bits <= 4, NXS_E_UNSUPPORTED); break;
    default: NXS_REQUIRE((p.bits >= 2 && p.bits <= 4) || p.bits == 8, NXS_E_UNSUPPORTED); break;
  }
  if (p.format == NXS_PACK_UNIFORM)
    NXS_REQUIRE(p.group == p.dim || (is_power_of_two(p.group) && p.group >= 8 && p.dim % p.group == 0), NXS_E_UNSUPPORTED);
  if (p.format == NXS_PACK_CHANNEL) {
    NXS_REQUIRE(p.group == 32 || p.group == 64 || p.group == 128, NXS_E_UNSUPPORTED);
    NXS_REQUIRE(p.rows % p.group == 0, NXS_E_SHAPE);
    NXS_REQUIRE(!p.rotate, NXS_E_UNSUPPORTED);
  }
  return NXS_OK;
}

}  // namespace nxs::compression

extern "C" nxs_status nxs_pack(const nxs_pack_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::compression;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_pack_params& p = *params;
  NXS_REQUIRE(p.dtype == NXS_F32 || p.dtype == NXS_F16 || p.dtype == NXS_BF16, NXS_E_DTYPE);
  NXS_REQUIRE(p.dim >= 8 && p.dim <= 256 && p.dim % 8 == 0 && p.heads >= 1, NXS_E_SHAPE);
  NXS_REQUIRE(p.sets >= 0 && p.sets <= 65535 && p.tokens >= 0 && p.tokens <= INT32_MAX && p.rows >= 0, NXS_E_SHAPE);
  NXS_REQUIRE(p.rows <= INT32_MAX / p.heads, NXS_E_SHAPE);
  NXS_TRY(check_format(p));
  if (p.sets == 0 || p.rows == 0) return NXS_OK;

  const i64 strides[] = {p.unpacked_stride_set, p.unpacked_stride_row, p.unpacked_stride_head, p.codes_stride_set,
                         p.codes_stride_row, p.codes_stride_head, p.numbers_stride_set, p.numbers_stride_row,
                         p.numbers_stride_head, p.scales_stride_set, p.scales_stride_head, p.kept_stride_set,
                         p.kept_stride_head, p.counts_stride_set, p.counts_stride_head};
  for (const i64 stride : strides) NXS_REQUIRE(stride >= 0, NXS_E_STRIDE);
  NXS_REQUIRE(p.unpacked && p.codes, NXS_E_NULL);
  NXS_REQUIRE(p.unpack || !p.kept_or_null || p.tokens > 0, NXS_E_SHAPE);
  NXS_REQUIRE(p.unpack || p.kept_or_null || p.tokens >= p.rows, NXS_E_SHAPE);
  const bool in_slot = !p.numbers_or_null && !p.scales_or_null;
  if (in_slot) {
    NXS_REQUIRE(p.format != NXS_PACK_CHANNEL && (p.format != NXS_PACK_UNIFORM || p.group == p.dim), NXS_E_NULL);
    NXS_REQUIRE(p.codes_stride_set % 16 == 0 && p.codes_stride_row % 16 == 0 && p.codes_stride_head % 16 == 0, NXS_E_STRIDE);
    NXS_REQUIRE(is_aligned(p.codes, 16), NXS_E_ALIGNMENT);
  }
  NXS_REQUIRE(is_aligned(p.unpacked, dtype_bytes(p.dtype)), NXS_E_ALIGNMENT);
  NXS_REQUIRE(is_aligned(p.numbers_or_null, dtype_bytes(p.numbers_dtype)), NXS_E_ALIGNMENT);
  NXS_REQUIRE(is_aligned(p.scales_or_null, 4) && is_aligned(p.kept_or_null, 4) && is_aligned(p.counts_or_null, 4) &&
                  is_aligned(p.flags_or_null, 4),
              NXS_E_ALIGNMENT);
  if (p.vector) {
    const i64 vec = 16 / dtype_bytes(p.dtype), codes = p.bits == 8 ? 8 : p.bits == 2 ? 2 : 4;
    for (u32 i = 0; i < 6; ++i) NXS_REQUIRE(strides[i] % (i < 3 ? vec : codes) == 0, NXS_E_STRIDE);
    NXS_REQUIRE(is_aligned(p.unpacked, 16) && is_aligned(p.codes, codes), NXS_E_ALIGNMENT);
  }

  PackParams q = {};
  q.p = p;
  if (p.unpack) q.p.kept_or_null = nullptr;
  q.rotation = Rotation::of(p.signs, p.dim);
  q.log2_lanes = log2_lanes_of(p.dim);
  q.group_lanes = p.format == NXS_PACK_UNIFORM && p.group != p.dim ? static_cast<u32>(p.group) / 8 : 1u << q.log2_lanes;
  q.inline_at = in_slot ? static_cast<u32>(p.dim * p.bits / 8 + 15) / 16 * 16 : 0;
  q.most_code = (1u << p.bits) - 1;
  const double root = std::sqrt(static_cast<double>(p.dim));
  q.root = static_cast<float>(root);
  q.inverse_root = static_cast<float>(1.0 / root);
  // Those that there are not lie beyond every value.
  for (u32 i = (1u << (p.bits < 5 ? p.bits - 1 : 3)) - 1; i < 7; ++i) q.p.thresholds[i] = __builtin_huge_valf();
  switch (p.dtype) {
    case NXS_F32: return p.unpack ? unpack_of<float>(q, stream) : pack_of<float>(q, stream);
    case NXS_F16: return p.unpack ? unpack_of<f16>(q, stream) : pack_of<f16>(q, stream);
    default: return p.unpack ? unpack_of<bf16>(q, stream) : pack_of<bf16>(q, stream);
  }
}
