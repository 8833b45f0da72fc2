// What the kernels that make prepared codebooks share with those that read them.
#pragma once
#include "common/dtype.cuh"
#include "common/ptx/atomic.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/math.cuh"
#include "common/ptx/memory.cuh"
#include "common/ptx/warp.cuh"

namespace nxs::quantization {

constexpr u32 kCodeTile = 128;  // codes of a tile of the operand
constexpr u32 kCodeLanes = 32;  // codes side by side in the searched rows

NXS_DEVICE bool is_finite(float x) { return (float_bits(x) & 0x7f800000u) != 0x7f800000u; }

// An element by its number and a dtype that is known when the kernel runs.
NXS_DEVICE float load_element(const void* from, i64 at, nxs_dtype dtype) {
  if (dtype == NXS_F32) return load_global_nc(static_cast<const float*>(from) + at);
  if (dtype == NXS_F16) return to_f32(load_global_nc(static_cast<const f16*>(from) + at));
  return to_f32(load_global_nc(static_cast<const bf16*>(from) + at));
}

}  // namespace nxs::quantization
