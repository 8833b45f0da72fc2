// C entry of RVQ decode: refuse what the kernel cannot take, then pick the codebook dtype.
#include "common/check.h"
#include "quantization/rvq_decode.cuh"

namespace nxs::quantization {
template <> nxs_status rvq_decode<float>(const nxs_rvq_decode_params&, void*);
template <> nxs_status rvq_decode<f16>(const nxs_rvq_decode_params&, void*);
template <> nxs_status rvq_decode<bf16>(const nxs_rvq_decode_params&, void*);
}  // namespace nxs::quantization

extern "C" nxs_status nxs_rvq_decode(const nxs_rvq_decode_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::quantization;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_rvq_decode_params& p = *params;

  const i64 code_bytes = dtype_bytes(p.codes_dtype), book_bytes = dtype_bytes(p.codebooks_dtype),
            out_bytes = dtype_bytes(p.out_dtype);
  NXS_REQUIRE(p.codes_dtype == NXS_U16 || p.codes_dtype == NXS_U32 || p.codes_dtype == NXS_I64, NXS_E_DTYPE);
  NXS_REQUIRE(p.codebooks_dtype == NXS_F32 || p.codebooks_dtype == NXS_F16 || p.codebooks_dtype == NXS_BF16, NXS_E_DTYPE);
  NXS_REQUIRE(p.out_dtype == NXS_F32 || p.out_dtype == NXS_F16 || p.out_dtype == NXS_BF16, NXS_E_DTYPE);

  NXS_REQUIRE(p.batch >= 0 && p.rows >= 0 && p.entries >= 0 && p.dim >= 0 && p.levels >= 0, NXS_E_SHAPE);
  NXS_REQUIRE(p.levels <= 65536 && p.dim <= (1 << 20) && p.entries <= INT32_MAX, NXS_E_SHAPE);
  NXS_REQUIRE(p.log2_lanes >= (p.tiles ? 3 : 0) && p.log2_lanes <= (p.tiles ? 5 : 7), NXS_E_UNSUPPORTED);
  if (p.batch == 0 || p.rows == 0 || p.dim == 0) return NXS_OK;
  NXS_REQUIRE(p.rows <= INT32_MAX / p.batch, NXS_E_SHAPE);
  NXS_REQUIRE(p.levels == 0 || p.entries > 0, NXS_E_SHAPE);

  for (const i64 stride : {p.codes_stride_batch, p.codes_stride_level, p.codes_stride_row, p.codebooks_stride_level,
                           p.codebooks_stride_entry, p.out_stride_batch, p.out_stride_row})
    NXS_REQUIRE(stride >= 0, NXS_E_STRIDE);
  NXS_REQUIRE(p.codebooks_stride_entry <= UINT32_MAX / book_bytes, NXS_E_STRIDE);
  NXS_REQUIRE(p.out && (p.levels == 0 || (p.codes && p.codebooks)), NXS_E_NULL);
  NXS_REQUIRE(is_aligned(p.codes, code_bytes) && is_aligned(p.codebooks, book_bytes) && is_aligned(p.out, out_bytes) &&
                  is_aligned(p.flags_or_null, 4),
              NXS_E_ALIGNMENT);
  if (p.vector) {
    const i64 vec = 16 / book_bytes, store = vec * out_bytes < 16 ? vec * out_bytes : 16;
    NXS_REQUIRE(p.dim % vec == 0 && p.codebooks_stride_level % vec == 0 && p.codebooks_stride_entry % vec == 0 &&
                    p.out_stride_batch % vec == 0 && p.out_stride_row % vec == 0,
                NXS_E_STRIDE);
    NXS_REQUIRE((p.levels == 0 || is_aligned(p.codebooks, 16)) && is_aligned(p.out, store), NXS_E_ALIGNMENT);
  }

  if (p.tiles) {
    // Tiles count the chunks from the first entry in 32 bits.
    const i64 vec = p.vector ? 16 / book_bytes : 1, most = UINT32_MAX * vec;
    NXS_REQUIRE(p.levels > 0 && !p.has_null_code, NXS_E_UNSUPPORTED);
    NXS_REQUIRE(p.levels == 1 || p.codebooks_stride_level <= most, NXS_E_UNSUPPORTED);
    const i64 last = (p.levels - 1) * p.codebooks_stride_level + (p.entries - 1) * p.codebooks_stride_entry;
    NXS_REQUIRE(last <= most, NXS_E_UNSUPPORTED);
    NXS_REQUIRE(p.dim / (vec << p.log2_lanes) < 65535, NXS_E_UNSUPPORTED);
  }

  switch (p.codebooks_dtype) {
    case NXS_F32: return rvq_decode<float>(p, stream);
    case NXS_F16: return rvq_decode<f16>(p, stream);
    default: return rvq_decode<bf16>(p, stream);
  }
}
