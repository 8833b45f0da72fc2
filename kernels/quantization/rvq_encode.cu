// C entry of RVQ encode: refuse what the kernels cannot take, then pick one.
#include "quantization/rvq_encode.h"

#include <initializer_list>

#include "common/ptx/simt.cuh"
#include "quantization/codebook.h"

extern "C" nxs_status nxs_rvq_encode(const nxs_rvq_encode_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::quantization;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_rvq_encode_params& p = *params;
  const nxs_codebook& book = p.codebook;
  NXS_REQUIRE(p.dtype == NXS_F32 || p.dtype == NXS_F16 || p.dtype == NXS_BF16, NXS_E_DTYPE);
  NXS_REQUIRE(p.codes_dtype == NXS_U16 || p.codes_dtype == NXS_U32 || p.codes_dtype == NXS_I64, NXS_E_DTYPE);
  NXS_REQUIRE(p.batch >= 0 && p.rows >= 0 && p.levels >= 1 && p.levels <= 32, NXS_E_SHAPE);
  NXS_REQUIRE(p.latent >= 0 && p.latent <= 1024, NXS_E_SHAPE);
  if (p.batch == 0 || p.rows == 0) return NXS_OK;
  NXS_REQUIRE(p.rows <= (INT32_MAX - 63) / p.batch, NXS_E_SHAPE);
  NXS_TRY(check_codebook(book));
  NXS_REQUIRE(book.levels == 1 || p.levels <= book.levels, NXS_E_SHAPE);
  NXS_REQUIRE(p.codes_dtype != NXS_U16 || book.entries <= 65536, NXS_E_SHAPE);
  for (const i64 stride :
       {p.input_stride_batch, p.input_stride_row, p.input_stride_dim, p.codes_stride_batch, p.codes_stride_level,
        p.codes_stride_row, p.quantized_stride_batch, p.quantized_stride_row, p.quantized_stride_dim,
        p.residual_stride_batch, p.residual_stride_row, p.residual_stride_dim, p.distances_stride_batch,
        p.distances_stride_level, p.distances_stride_row})
    NXS_REQUIRE(stride >= 0, NXS_E_STRIDE);
  const i64 bytes = dtype_bytes(p.dtype);
  NXS_REQUIRE(p.input && p.codes, NXS_E_NULL);
  NXS_REQUIRE(is_aligned(p.input, bytes) && is_aligned(p.codes, dtype_bytes(p.codes_dtype)) &&
                  is_aligned(p.quantized_or_null, bytes) && is_aligned(p.residual_or_null, bytes) &&
                  is_aligned(p.distances_or_null, 4) && is_aligned(p.histogram_or_null, 4) &&
                  is_aligned(p.flags_or_null, 4),
              NXS_E_ALIGNMENT);

  if (p.latent > 0) {
    NXS_REQUIRE(p.variant == NXS_RVQ_ENCODE_PROJECTED && p.tile_rows == 16, NXS_E_UNSUPPORTED);
    NXS_REQUIRE(book.dim <= 32, NXS_E_SHAPE);
    NXS_REQUIRE(p.in_weight_or_null && p.in_bias_or_null && p.out_weight_or_null && p.out_bias_or_null, NXS_E_NULL);
    NXS_REQUIRE(is_aligned(p.in_weight_or_null, 4) && is_aligned(p.in_bias_or_null, 4) &&
                    is_aligned(p.out_weight_or_null, 4) && is_aligned(p.out_bias_or_null, 4),
                NXS_E_ALIGNMENT);
    return rvq_encode_projected(p, stream);
  }
  // Where a product costs little, more of them go into one maximum: scoring them costs little too.
  const bool narrow = book.dim < 64;
  switch (p.variant) {
    case NXS_RVQ_ENCODE_SM80:
      NXS_REQUIRE(p.tile_rows == 16 || p.tile_rows == 32 || p.tile_rows == 64, NXS_E_UNSUPPORTED);
      NXS_REQUIRE(p.stages == 2 || p.stages == 3, NXS_E_UNSUPPORTED);
      return narrow ? rvq_encode_sm80<16>(p, stream) : rvq_encode_sm80<4>(p, stream);
    case NXS_RVQ_ENCODE_SM90:
      NXS_REQUIRE(p.tile_rows == 64 && p.stages >= 2 && p.stages <= 8, NXS_E_UNSUPPORTED);
      NXS_REQUIRE(book.dim <= 256, NXS_E_UNSUPPORTED);
      NXS_REQUIRE(p.splits == 1 || p.splits == 2 || p.splits == 4 || p.splits == 8, NXS_E_UNSUPPORTED);
      NXS_REQUIRE((p.sharers == 1 || p.sharers == 2 || p.sharers == 4) && (p.splits == 1 || p.sharers == 1),
                  NXS_E_UNSUPPORTED);
      NXS_REQUIRE((book.entries + 127) / 128 >= p.splits, NXS_E_UNSUPPORTED);
      NXS_REQUIRE(p.rows * p.batch <= INT32_MAX / 8, NXS_E_SHAPE);
      return narrow ? rvq_encode_sm90<16>(p, stream) : rvq_encode_sm90<4>(p, stream);
    case NXS_RVQ_ENCODE_STREAM:
      NXS_REQUIRE(p.splits >= 1 && p.splits <= 16 && (p.splits & (p.splits - 1)) == 0, NXS_E_UNSUPPORTED);
      NXS_REQUIRE(p.rows * p.batch <= INT32_MAX / 16, NXS_E_SHAPE);
      return rvq_encode_stream(p, stream);
    default: return NXS_E_UNSUPPORTED;
  }
}
