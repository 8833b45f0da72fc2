// Norms of keys, and the sum of the unit keys, as keys are appended.
//
//   inverse_norms[j] = 1 / (|k[j]| + eps);  unit_sum = sum over j of k[j] * inverse_norms[j] (+ unit_sum)
//
// Two kernels. The first: grid x: spans of keys, y: sets and heads; 8 warps, a row of 64 (128) elements shared by 8 (16) lanes,
// kAtOnce rows of each under way together. A thread adds up its 8 elements over its rows, then rows of a warp, then warps,
// always in that order: a part for each span. The second adds the parts, spans ascending, a thread an element.
// Bytes   K once, 4 a key; parts of 4 kDim a span.
// FLOPs   4 kDim a key.
// Limits  dim 64, 96, 128; 16-byte aligned rows.
#include "common/check.h"
#include "common/ptx/launch.cuh"
#include "common/ptx/math.cuh"
#include "common/ptx/shared.cuh"
#include "compression/key_rows.cuh"

namespace nxs::compression {

using KeyNormsParams = nxs_key_norms_params;
constexpr u32 kNormThreads = 256, kNormWarps = kNormThreads / kWarpSize, kAtOnce = 4;

template <typename T, int kDim>
__global__ void __launch_bounds__(kNormThreads, 4) key_norms_kernel(const __grid_constant__ KeyNormsParams p) {
  const u32 heads = static_cast<u32>(p.heads), item = block_index_y(), set = item / heads, head = item - set * heads;
  const KeyPlaces places(p.places, set, head);
  const u32 length = length_of(p, places, set, head), tokens = static_cast<u32>(p.tokens);
  const u32 warp = thread_index() / kWarpSize, shared = dynamic_shared();
  const u32 begin = block_index_x() * static_cast<u32>(p.span), left = tokens - begin;
  const u32 end = begin + (left < static_cast<u32>(p.span) ? left : static_cast<u32>(p.span));
  const T* k = static_cast<const T*>(p.k) + set * p.k_stride_set + head * p.k_stride_head;
  float* norms = p.inverse_norms + set * p.norms_stride_set + head * p.norms_stride_head;
  const KeyRows<kDim> rows;
  constexpr u32 kStep = kNormWarps * KeyRows<kDim>::kRows;
  const u32 last = length > 0 ? length - 1 : 0;

  float sum[8] = {};
  // All lanes of a warp go on together: they add up rows in shuffles.
  for (u32 first = begin; first < end; first += kStep * kAtOnce) {
    Vec<T, 8> key[kAtOnce];
#pragma unroll
    for (u32 i = 0; i < kAtOnce; ++i) {
      const u32 j = first + i * kStep + warp * KeyRows<kDim>::kRows + rows.row;
      key[i] = rows.load(k + (length > 0 ? places(j < last ? j : last) : places.place_of_row(0)) * p.k_stride_token);
    }
#pragma unroll
    for (u32 i = 0; i < kAtOnce; ++i) {
      const u32 j = first + i * kStep + warp * KeyRows<kDim>::kRows + rows.row;
      float square = 0;
#pragma unroll
      for (u32 d = 0; d < 8; ++d) square = fma(to_f32(key[i].data[d]), to_f32(key[i].data[d]), square);
      square = rows.total(square);
      const float inverse = j < length ? divide(1.0f, square_root(square) + p.eps) : 0.0f;
      if (rows.lane == 0 && j < end) store_global(norms + j, inverse);
      const bool counts = j < end && j < length;
#pragma unroll
      for (u32 d = 0; d < 8; ++d) sum[d] = counts ? fma(to_f32(key[i].data[d]), inverse, sum[d]) : sum[d];
    }
  }
  // Rows of a warp, then warps: [warp][kDim].
#pragma unroll
  for (u32 d = 0; d < 8; ++d)
#pragma unroll
    for (u32 bits = KeyRows<kDim>::kLanes; bits < kWarpSize; bits *= 2) sum[d] += shuffle_xor(sum[d], bits);
  if (rows.row == 0 && rows.busy()) {
#pragma unroll
    for (u32 d = 0; d < 8; d += 4)
      store_shared(shared + (warp * kDim + rows.lane * 8 + d) * 4, Vec<float, 4>{{sum[d], sum[d + 1], sum[d + 2], sum[d + 3]}});
  }
  block_sync();
  if (thread_index() >= kDim) return;
  float all = 0;
  for (u32 w = 0; w < kNormWarps; ++w) all += load_shared<float>(shared + (w * kDim + thread_index()) * 4);
  store_global(p.parts + (static_cast<i64>(item) * grid_size_x() + block_index_x()) * kDim + thread_index(), all);
}

__global__ void __launch_bounds__(128) key_norms_sum_kernel(const __grid_constant__ KeyNormsParams p, const u32 spans) {
  const u32 heads = static_cast<u32>(p.heads), item = block_index_x(), set = item / heads, head = item - set * heads;
  const u32 dim = static_cast<u32>(p.dim), d = thread_index();
  if (d >= dim) return;
  float all = 0;
  const float* parts = p.parts + static_cast<i64>(item) * spans * dim + d;
  for (u32 span = 0; span < spans; ++span) all += load_global_nc(parts + span * dim);
  float* to = p.unit_sum + set * p.sum_stride_set + head * p.sum_stride_head + d;
  store_global(to, p.accumulate ? load_global(to) + all : all);
}

template <typename T, int kDim> static nxs_status key_norms(const KeyNormsParams& p, void* stream) {
  const u32 items = static_cast<u32>(p.sets * p.heads), spans = static_cast<u32>((p.tokens + p.span - 1) / p.span);
  LaunchShape shape;
  if (spans > 0) {
    shape.grid = dim3(spans, items);
    shape.block = kNormThreads;
    shape.dynamic_smem = kNormWarps * kDim * 4;
    NXS_TRY(launch(key_norms_kernel<T, kDim>, shape, stream, p));
  }
  shape.grid = dim3(items);
  shape.block = 128;
  shape.dynamic_smem = 0;
  return launch(key_norms_sum_kernel, shape, stream, p, spans);
}

template <typename T> static nxs_status key_norms_of_dim(const KeyNormsParams& p, void* stream) {
  return p.dim == 64 ? key_norms<T, 64>(p, stream) : p.dim == 96 ? key_norms<T, 96>(p, stream) : key_norms<T, 128>(p, stream);
}

}  // namespace nxs::compression

extern "C" nxs_status nxs_key_norms(const nxs_key_norms_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::compression;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_key_norms_params& p = *params;
  NXS_REQUIRE(p.dtype == NXS_BF16 || p.dtype == NXS_F16, NXS_E_DTYPE);
  NXS_REQUIRE(p.dim == 64 || p.dim == 96 || p.dim == 128, NXS_E_SHAPE);
  NXS_REQUIRE(p.heads > 0 && p.sets >= 0 && p.sets * p.heads <= 65535, NXS_E_SHAPE);
  NXS_REQUIRE(p.tokens >= 0 && p.tokens <= INT32_MAX - (1 << 16) && p.span > 0 && p.span % 64 == 0, NXS_E_SHAPE);
  NXS_REQUIRE(p.eps >= 0, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(are_places(p.places, p.tokens, p.lengths_or_null), NXS_E_SHAPE);
  if (p.sets == 0) return NXS_OK;
  for (const int64_t stride : {p.k_stride_set, p.k_stride_token, p.k_stride_head})
    NXS_REQUIRE(stride >= 0 && stride % 8 == 0, NXS_E_STRIDE);
  for (const int64_t stride : {p.norms_stride_set, p.norms_stride_head, p.sum_stride_set, p.sum_stride_head,
                               p.lengths_stride_set, p.lengths_stride_head})
    NXS_REQUIRE(stride >= 0, NXS_E_STRIDE);
  NXS_REQUIRE(p.unit_sum && (p.tokens == 0 || (p.k && p.inverse_norms && p.parts)), NXS_E_NULL);
  for (const void* pointer : {p.k, static_cast<const void*>(p.parts)}) NXS_REQUIRE(is_aligned(pointer, 16), NXS_E_ALIGNMENT);
  for (const void* pointer : {static_cast<const void*>(p.inverse_norms), static_cast<const void*>(p.unit_sum),
                              static_cast<const void*>(p.lengths_or_null)})
    NXS_REQUIRE(is_aligned(pointer, 4), NXS_E_ALIGNMENT);
  return p.dtype == NXS_BF16 ? key_norms_of_dim<bf16>(p, stream) : key_norms_of_dim<f16>(p, stream);
}
