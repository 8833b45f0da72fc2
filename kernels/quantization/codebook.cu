// C entry of codebook preparation: refuse what the kernels cannot take, then launch them.
#include "quantization/codebook.h"
#include "quantization/codebook_prepare.cuh"

extern "C" nxs_status nxs_codebook_prepare(const nxs_codebook_prepare_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::quantization;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_codebook_prepare_params& p = *params;
  const nxs_codebook& book = p.codebook;
  NXS_TRY(check_codebook(book));
  NXS_REQUIRE(p.rows_dtype == NXS_F32 || p.rows_dtype == NXS_F16 || p.rows_dtype == NXS_BF16, NXS_E_DTYPE);
  NXS_REQUIRE(p.rows, NXS_E_NULL);
  NXS_REQUIRE(p.rows_stride_level >= 0 && p.rows_stride_entry >= 0 && p.usage_stride_level >= 0, NXS_E_STRIDE);
  NXS_REQUIRE(is_aligned(p.rows, dtype_bytes(p.rows_dtype)) && is_aligned(p.usage_or_null, 4) &&
                  is_aligned(p.flags_or_null, 4),
              NXS_E_ALIGNMENT);
  NXS_REQUIRE(!p.usage_or_null || p.usage_eps > 0, NXS_E_UNSUPPORTED);
  const i64 blocks = book.levels * ((book.entries + kCodeTile - 1) / kCodeTile);
  NXS_REQUIRE(blocks <= INT32_MAX, NXS_E_SHAPE);
  LaunchShape shape;
  shape.block = kPrepareThreads;
  shape.grid = dim3(static_cast<unsigned>((book.levels * 4 + kPrepareThreads - 1) / kPrepareThreads));
  NXS_TRY(launch(codebook_clear_kernel, shape, stream, book));
  shape.grid = dim3(static_cast<unsigned>(blocks));
  return launch(codebook_prepare_kernel, shape, stream, p);
}
