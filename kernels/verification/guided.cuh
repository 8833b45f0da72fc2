// Rows of two sources: logit = free + s (with - free), in f32, and -inf where either is. Classifier-free guidance (with and
// without the condition), and two heads mixed by a gate.
//
// Guided<T> stands for the element type of such a row; what sample.cuh does with rows it does with these too.
#pragma once
#include <type_traits>

#include "verification/sample.cuh"

namespace nxs {
namespace verification {
// Of the size of what is left of it: an f32.
template <typename T> struct Guided { u32 bits; };
}  // namespace verification

template <typename T> struct DType<verification::Guided<T>> { static constexpr nxs_dtype value = NXS_F32; };
}  // namespace nxs

namespace nxs::verification {

template <typename E> struct StorageOf { using Type = E; };
template <typename T> struct StorageOf<Guided<T>> { using Type = T; };
template <typename E> using Storage = typename StorageOf<E>::Type;
template <typename E> constexpr bool kGuided = !std::is_same_v<E, Storage<E>>;

template <typename T> struct Row<Guided<T>> {
  const T* with;
  const T* free;
  float scale;
  const u32* allow;  // or null
  u32 columns;
};

// Of E or of Guided<E>, from `at` elements on.
template <typename E>
NXS_DEVICE Row<E> make_row(const void* with, const void* free, i64 at, float scale, const u32* allow, u32 columns) {
  using T = Storage<E>;
  if constexpr (kGuided<E>)
    return Row<E>{static_cast<const T*>(with) + at, static_cast<const T*>(free) + at, scale, allow, columns};
  else
    return Row<E>{static_cast<const T*>(with) + at, allow, columns};
}

NXS_DEVICE float guide(float with, float free, float scale) {
  return with == -INFINITY || free == -INFINITY ? -INFINITY : fma(scale, with - free, free);
}

template <typename T> NXS_DEVICE float logit_at(const Row<Guided<T>>& row, u32 column) {
  if (column >= row.columns) return -INFINITY;
  if (row.allow && !(load_global_nc(row.allow + column / 32) >> (column % 32) & 1)) return -INFINITY;
  return guide(to_f32(load_global_nc(row.with + column)), to_f32(load_global_nc(row.free + column)), row.scale);
}

template <typename T> NXS_DEVICE Logits<Guided<T>> load_logits(const Row<Guided<T>>& row, u32 chunk) {
  const Logits<T> with = load_logits(Row<T>{row.with, nullptr, row.columns}, chunk);
  const Logits<T> free = load_logits(Row<T>{row.free, nullptr, row.columns}, chunk);
  Logits<Guided<T>> logits;
#pragma unroll
  for (u32 place = 0; place < 32; ++place)
    logits.word[place] = float_bits(guide(with.at(place), free.at(place), row.scale));
  if (row.allow) {
#pragma unroll
    for (u32 j = 0; j < kGroups; ++j) {
      const u32 column = chunk * kChunk + j * 256 + lane_index() * kGroup;
      const u32 bits = column < row.columns ? load_global_nc(row.allow + column / 32) >> (column % 32) : 0;
#pragma unroll
      for (u32 k = 0; k < kGroup; ++k)
        if (!(bits >> k & 1)) logits.word[j * kGroup + k] = 0xff800000u;
    }
  }
  return logits;
}

// weight_of without a branch, for loops over places.
NXS_DEVICE float weight_straight(const Summary& row, float logit) {
  const float least = maximum(row.cut, floor_of(row.scale, row.reference));
  const Power p = power(row.scale, (kMagic + 127.0f) - row.reference, maximum(logit, least));
  return logit >= least ? multiply(p.fraction, p.whole) : 0.0f;
}

// summarize for rows of few chunks: one of a lane's partials at a time, which needs two registers instead of 16.
template <typename Load> NXS_DEVICE Summary summarize_few(u32 chunks, const Scale& scale, Load load) {
  Summary row = {kPeak, false, false, -INFINITY, 0, 0, -INFINITY, scale};
  bool nan = false;
  float top = -INFINITY;
#pragma unroll 1
  for (u32 chunk = lane_index(); chunk < chunks; chunk += 32) {
    const Partial partial = load(chunk);
    nan = nan || says_nan(partial);
    top = maximum(top, partial.max);
  }
  warp_sync();
  row.nan = warp_any(nan);
  row.top = key_float(warp_reduce_max(key_of(top)));
  if (row.top == -INFINITY) {
    row.shape = kEmpty;
  } else if (!scale.greedy()) {
    if (has_reference(scale, row.top)) {
      row.shape = kSpread;
      row.reference = reference_of(scale, row.top);
      float sum = 0;
#pragma unroll 1
      for (u32 chunk = lane_index(); chunk < chunks; chunk += 32)
        sum = sum + share_of(load(chunk), scale, row.reference);
      warp_sync();
      row.sum = sum_of_lanes(sum);
    } else {
      row.beyond = true;
    }
  }
  return row;
}

// The column of a lane's place of a chunk.
NXS_DEVICE u32 column_of(u32 chunk, u32 lane, u32 place) {
  return chunk * kChunk + place / 8 * 256 + lane * 8 + place % 8;
}

}  // namespace nxs::verification
