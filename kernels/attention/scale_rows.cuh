// Where the rows of a tile lie in the tensors of a scale attention, and how results get there. For all of its kernels.
#pragma once
#include "attention/scale_schedule.cuh"
#include "common/ptx/math.cuh"
#include "common/ptx/shared.cuh"

namespace nxs::attention {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;
// Log2 of how far a row may run ahead of its reference before O is rescaled: P stays below 2^8, exact in both types.
constexpr float kLazyRescale = 8.0f;
// A row with no visible key yet.
constexpr float kNothing = -__builtin_huge_valf();

template <typename T> NXS_DEVICE u32 round_pair(float low, float high) {
  return DType<T>::value == NXS_BF16 ? f32x2_to_bf16x2_bits(low, high) : f32x2_to_f16x2_bits(low, high);
}

// A row of a work's tile in the tensors of the call.
struct RowAt {
  u32 row, head;
};
NXS_DEVICE RowAt row_at(const ScaleParams& p, u32 head, u32 row) {
  if (p.pack <= 1) return {row, head};
  const u32 pack = static_cast<u32>(p.pack), token = row / pack;
  return {token, head * pack + row - token * pack};
}

template <typename T> NXS_DEVICE const T* query_at(const ScaleParams& p, u32 batch, const RowAt& at) {
  i64 source = at.row;
  if (p.row_index_or_null) {
    source = load_global_nc(p.row_index_or_null + batch * p.row_index_stride_batch + at.row);
    source = source < 0 ? 0 : source < p.q_rows ? source : p.q_rows - 1;
  }
  return static_cast<const T*>(p.q) + batch * p.q_stride_batch + source * p.q_stride_row + at.head * p.q_stride_head;
}

NXS_DEVICE i64 part_row(const ScaleParams& p, u32 split, u32 batch, const RowAt& at) {
  return ((split * p.batch + batch) * p.heads + at.head) * p.rows + at.row;
}

// The log-sum-exp of a row, from its reference of base 2 and the sum of its exponentials.
NXS_DEVICE float lse_of(float reference, float total) {
  return total == 0 ? kNothing : (reference + log2_approx(total)) * kLn2;
}
// Writes it, if it is wanted.
NXS_DEVICE void store_lse(const ScaleParams& p, u32 split, u32 batch, const RowAt& at, float lse) {
  float* to = p.lse_or_null;
  if (p.splits > 1)
    to = p.parts_or_null + p.splits * p.batch * p.heads * p.rows * p.dim + part_row(p, split, batch, at);
  else if (to)
    to += batch * p.lse_stride_batch + at.head * p.lse_stride_head + at.row * p.lse_stride_row;
  if (to) store_global(to, lse);
}

// A thread's share of a row of partial results: value(2 i) is of column 8 i + 2 (lane % 4), value(2 i + 1) of the next.
template <int kDim, typename Value>
NXS_DEVICE void store_part(const ScaleParams& p, u32 split, u32 batch, const RowAt& at, const Value& value) {
  float* part = p.parts_or_null + part_row(p, split, batch, at) * p.dim;
#pragma unroll
  for (u32 i = 0; i < kDim / 8; ++i) {
    const u32 column = 8 * i + 2 * (thread_index() % 4);
    if (column < static_cast<u32>(p.dim))
      store_global(reinterpret_cast<Vec<float, 2>*>(part + column), Vec<float, 2>{{value(2 * i), value(2 * i + 1)}});
  }
}

// A warp's 16 rows, or fewer, from shared memory, where 16-byte piece j of row i is at place(i, j), to `out`: row `first` of
// the schedule and up.
template <typename T, int kDim, typename Place>
NXS_DEVICE void store_rows(const ScaleParams& p, u32 batch, u32 head, u32 first, u32 rows, const Place& place) {
  constexpr u32 kPieces = kDim / 8;
  for (u32 i = thread_index() % kWarpSize; i < 16 * kPieces; i += kWarpSize) {
    const u32 row = i / kPieces, piece = i % kPieces;
    if (row >= rows || piece * 8 >= static_cast<u32>(p.dim)) continue;
    const auto value = load_shared<Vec<u32, 4>>(place(row, piece));
    const RowAt at = row_at(p, head, first + row);
    const i64 to = batch * p.out_stride_batch + at.row * p.out_stride_row + at.head * p.out_stride_head + piece * 8;
    store_global(reinterpret_cast<Vec<u32, 4>*>(static_cast<T*>(p.out) + to), value);
  }
}

}  // namespace nxs::attention
