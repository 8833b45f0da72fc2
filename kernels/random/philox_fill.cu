// Philox fill: out[i, 0..4] = Philox 4x32-10 of (seed, first_position + i, domain, draw), as words or as uniforms.
//
// Who does what  one thread a position, 256 a block; 16 bytes written per thread, coalesced.
// Bytes          16 a position, written once. FLOPs: none; 20 wide multiplies a position.
// Limits         fewer than 2^39 positions.
#include "common/check.h"
#include "common/dtype.cuh"
#include "common/philox.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/memory.cuh"

namespace nxs::random {

constexpr u32 kPhiloxThreads = 256;

template <bool kUniform>
__global__ void __launch_bounds__(kPhiloxThreads) philox_fill_kernel(const __grid_constant__ nxs_philox_fill_params p) {
  const i64 i = static_cast<i64>(block_index_x()) * kPhiloxThreads + thread_index();
  if (i >= p.positions) return;
  const PhiloxBlock block = philox(p.seed, p.first_position + static_cast<u64>(i), p.domain, p.draw);
  if constexpr (kUniform) {
    Vec<float, 4> uniform;
#pragma unroll
    for (int j = 0; j < 4; ++j) uniform.data[j] = philox_uniform(block.word[j]);
    store_global(static_cast<Vec<float, 4>*>(p.out) + i, uniform);
  } else {
    Vec<u32, 4> words;
#pragma unroll
    for (int j = 0; j < 4; ++j) words.data[j] = block.word[j];
    store_global(static_cast<Vec<u32, 4>*>(p.out) + i, words);
  }
}

}  // namespace nxs::random

extern "C" nxs_status nxs_philox_fill(const nxs_philox_fill_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::random;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_philox_fill_params& p = *params;
  NXS_REQUIRE(p.out_dtype == NXS_U32 || p.out_dtype == NXS_F32, NXS_E_DTYPE);
  NXS_REQUIRE(p.positions >= 0 && p.positions < (i64{1} << 39), NXS_E_SHAPE);
  if (p.positions == 0) return NXS_OK;
  NXS_REQUIRE(p.out, NXS_E_NULL);
  NXS_REQUIRE(is_aligned(p.out, 16), NXS_E_ALIGNMENT);

  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((p.positions + kPhiloxThreads - 1) / kPhiloxThreads));
  shape.block = kPhiloxThreads;
  return p.out_dtype == NXS_F32 ? launch(philox_fill_kernel<true>, shape, stream, p)
                                : launch(philox_fill_kernel<false>, shape, stream, p);
}
