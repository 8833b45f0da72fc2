// Rotation of rows, and its inverse: queries for rotated keys, sums of rotated values.
//
// Who does what
//            2^n lanes share a row, eight elements each; a warp takes four times as many rows as fit, whose loads are under way
//            together. Grid x: rows times heads; y: batch.
// Bytes      input read once, out written once.  FLOPs  log2(dim) + 1 an element.
// Limits     dim a multiple of 8 up to 256; rows * heads < 2^31.
#include "common/check.h"
#include "common/ptx/launch.cuh"
#include "compression/rotation.cuh"

namespace nxs::compression {

constexpr u32 kRotateThreads = 256, kRotatePasses = 4;

struct RotateParams {
  nxs_rotate_params p;
  Rotation rotation;
  u32 log2_lanes;
};

template <typename T, bool kWide>
__global__ void __launch_bounds__(kRotateThreads) rotate_kernel(const __grid_constant__ RotateParams q) {
  const nxs_rotate_params& p = q.p;
  const u32 thread = thread_index(), lane = thread & ((1u << q.log2_lanes) - 1), at_once = kWarpSize >> q.log2_lanes;
  const u32 heads = static_cast<u32>(p.heads), units = static_cast<u32>(p.rows) * heads, batch = block_index_y();
  const u32 warp = block_index_x() * (kRotateThreads / kWarpSize) + thread / kWarpSize;
  const u32 first = warp * kRotatePasses * at_once + (thread % kWarpSize >> q.log2_lanes);
  const T* input = static_cast<const T*>(p.input) + batch * p.input_stride_batch + lane * 8;
  T* out = static_cast<T*>(p.out) + batch * p.out_stride_batch + lane * 8;
  Vec<T, 8> raw[kRotatePasses];
  bool there[kRotatePasses];
#pragma unroll
  for (u32 i = 0; i < kRotatePasses; ++i) {
    const u32 number = first + i * at_once, row = number / heads, head = number - row * heads;
    there[i] = number < units && lane * 8 < static_cast<u32>(p.dim);
    raw[i] = Vec<T, 8>{};
    if (there[i]) raw[i] = load_eight<T, kWide>(input + row * p.input_stride_row + head * p.input_stride_head);
  }
#pragma unroll
  for (u32 i = 0; i < kRotatePasses; ++i) {
    float x[8];
#pragma unroll
    for (u32 k = 0; k < 8; ++k) x[k] = to_f32(raw[i].data[k]);
    if (p.inverse) q.rotation.invert(x, lane);
    else q.rotation.apply(x, lane);
    const u32 number = first + i * at_once, row = number / heads, head = number - row * heads;
    store_eight_if<T, kWide>(out + row * p.out_stride_row + head * p.out_stride_head, x, there[i]);
  }
}

template <typename T> static nxs_status rotate(const RotateParams& q, void* stream) {
  const i64 units = i64{kRotateThreads >> q.log2_lanes} * kRotatePasses;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((q.p.rows * q.p.heads + units - 1) / units), static_cast<unsigned>(q.p.batch));
  shape.block = kRotateThreads;
  return q.p.vector ? launch(rotate_kernel<T, true>, shape, stream, q) : launch(rotate_kernel<T, false>, shape, stream, q);
}

}  // namespace nxs::compression

extern "C" nxs_status nxs_rotate(const nxs_rotate_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::compression;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_rotate_params& p = *params;
  NXS_REQUIRE(p.dtype == NXS_F32 || p.dtype == NXS_F16 || p.dtype == NXS_BF16, NXS_E_DTYPE);
  NXS_REQUIRE(p.dim >= 8 && p.dim <= 256 && p.dim % 8 == 0 && p.heads >= 1, NXS_E_SHAPE);
  NXS_REQUIRE(p.batch >= 0 && p.batch <= 65535 && p.rows >= 0 && p.rows <= INT32_MAX / p.heads, NXS_E_SHAPE);
  if (p.batch == 0 || p.rows == 0) return NXS_OK;
  NXS_REQUIRE(p.input && p.out, NXS_E_NULL);
  const i64 vec = p.vector ? 16 / dtype_bytes(p.dtype) : 1;
  for (const i64 stride : {p.input_stride_batch, p.input_stride_row, p.input_stride_head, p.out_stride_batch, p.out_stride_row,
                           p.out_stride_head})
    NXS_REQUIRE(stride >= 0 && stride % vec == 0, NXS_E_STRIDE);
  const i64 alignment = p.vector ? 16 : dtype_bytes(p.dtype);
  NXS_REQUIRE(is_aligned(p.input, alignment) && is_aligned(p.out, alignment), NXS_E_ALIGNMENT);
  RotateParams q = {p, Rotation::of(p.signs, p.dim), log2_lanes_of(p.dim)};
  switch (p.dtype) {
    case NXS_F32: return rotate<float>(q, stream);
    case NXS_F16: return rotate<f16>(q, stream);
    default: return rotate<bf16>(q, stream);
  }
}
