// Row statistics: one warp a chunk of 1024 columns, 8 warps a block; see row_stats.cuh.
//
// Bytes   rows * vocab * sizeof(dtype) read once, 8 a chunk written. FLOPs: about 22 a column.
#include "common/check.h"
#include "common/ptx/launch.cuh"
#include "verification/row_stats.cuh"

namespace nxs::verification {

template <typename T>
__global__ void __launch_bounds__(256, 4) row_stats_kernel(const __grid_constant__ nxs_row_stats_params p) {
  const u32 of_row = chunks_of(static_cast<u32>(p.vocab));
  const u32 number = block_index_x() * 8 + thread_index() / 32;
  const u32 row = number / of_row, chunk = number - row * of_row;
  if (row >= p.rows) return;
  const Scale scale = scale_of(p.temperature_or_null ? load_global_nc(p.temperature_or_null + row) : 1.0f);
  const Row<T> logits_row = {static_cast<const T*>(p.logits) + row * p.stride_row,
                             p.allow_or_null ? p.allow_or_null + row * p.allow_stride_row : nullptr,
                             static_cast<u32>(p.vocab)};
  Logits<T> logits = load_logits(logits_row, chunk);
  const Partial partial = chunk_partial(logits, scale);
  if (lane_index() == 0) store_global(reinterpret_cast<Partial*>(p.partials) + number, partial);
}

template <typename T> nxs_status row_stats(const nxs_row_stats_params& p, i64 chunks, void* stream) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((chunks + 7) / 8));
  shape.block = 256;
  return launch(row_stats_kernel<T>, shape, stream, p);
}

}  // namespace nxs::verification

extern "C" nxs_status nxs_row_stats(const nxs_row_stats_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::verification;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_row_stats_params& p = *params;
  NXS_REQUIRE(p.dtype == NXS_F32 || p.dtype == NXS_F16 || p.dtype == NXS_BF16, NXS_E_DTYPE);
  NXS_REQUIRE(p.rows >= 0 && p.rows <= INT32_MAX && p.vocab >= 1 && p.vocab <= i64{1} << 24, NXS_E_SHAPE);
  const i64 chunks = p.rows * ((p.vocab + NXS_CHUNK_COLUMNS - 1) / NXS_CHUNK_COLUMNS);
  NXS_REQUIRE(chunks <= INT32_MAX, NXS_E_SHAPE);
  NXS_REQUIRE(p.stride_row >= 0 && p.allow_stride_row >= 0, NXS_E_STRIDE);
  if (p.rows == 0) return NXS_OK;
  NXS_REQUIRE(p.logits && p.partials, NXS_E_NULL);
  NXS_REQUIRE(is_aligned(p.logits, dtype_bytes(p.dtype)) && is_aligned(p.temperature_or_null, 4) &&
                  is_aligned(p.allow_or_null, 4) && is_aligned(p.partials, 8),
              NXS_E_ALIGNMENT);
  switch (p.dtype) {
    case NXS_F32: return row_stats<float>(p, chunks, stream);
    case NXS_F16: return row_stats<f16>(p, chunks, stream);
    default: return row_stats<bf16>(p, chunks, stream);
  }
}
