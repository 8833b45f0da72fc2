// Stretches of kVec elements that one thread moves, 16 bytes at a time where they are more.
#pragma once
#include "common/dtype.cuh"
#include "common/ptx/memory.cuh"

namespace nxs {

namespace detail {
template <typename T, int kVec> constexpr int kPiece = kVec * sizeof(T) > 16 ? 16 / sizeof(T) : kVec;
}

// Through the non-coherent path: only what nothing writes while the kernel runs.
template <typename T, int kVec> NXS_DEVICE Vec<T, kVec> load_chunk_nc(const T* from) {
  constexpr int kPiece = detail::kPiece<T, kVec>;
  Vec<T, kVec> chunk;
#pragma unroll
  for (int i = 0; i < kVec; i += kPiece) {
    const auto piece = load_global_nc(reinterpret_cast<const Vec<T, kPiece>*>(from + i));
#pragma unroll
    for (int j = 0; j < kPiece; ++j) chunk.data[i + j] = piece.data[j];
  }
  return chunk;
}

// Ordered among the kernel's other accesses.
template <typename T, int kVec> NXS_DEVICE Vec<T, kVec> load_chunk(const T* from) {
  constexpr int kPiece = detail::kPiece<T, kVec>;
  Vec<T, kVec> chunk;
#pragma unroll
  for (int i = 0; i < kVec; i += kPiece) {
    const auto piece = load_global(reinterpret_cast<const Vec<T, kPiece>*>(from + i));
#pragma unroll
    for (int j = 0; j < kPiece; ++j) chunk.data[i + j] = piece.data[j];
  }
  return chunk;
}

// Rounds and writes. kStreaming: written once and not read again soon.
template <bool kStreaming, typename T, int kVec> NXS_DEVICE void store_chunk(T* to, const float (&value)[kVec]) {
  constexpr int kPiece = detail::kPiece<T, kVec>;
#pragma unroll
  for (int i = 0; i < kVec; i += kPiece) {
    Vec<T, kPiece> rounded;
#pragma unroll
    for (int j = 0; j < kPiece; ++j) rounded.data[j] = from_f32<T>(value[i + j]);
    if constexpr (kStreaming)
      store_global_streaming(reinterpret_cast<Vec<T, kPiece>*>(to + i), rounded);
    else
      store_global(reinterpret_cast<Vec<T, kPiece>*>(to + i), rounded);
  }
}

// Rounds and writes what is not read again soon, where `go`: without a branch. 16-bit floats are rounded in pairs, two an
// instruction.
template <typename T, int kVec> NXS_DEVICE void store_chunk_streaming_if(T* to, const float (&value)[kVec], bool go) {
  constexpr int kPiece = detail::kPiece<T, kVec>;
#pragma unroll
  for (int i = 0; i < kVec; i += kPiece) {
    Vec<T, kPiece> rounded;
    if constexpr (sizeof(T) == 2 && kPiece > 1) {
      u32 pair[kPiece / 2];
#pragma unroll
      for (int j = 0; j < kPiece / 2; ++j) {
        const float low = value[i + 2 * j], high = value[i + 2 * j + 1];
        pair[j] = DType<T>::value == NXS_BF16 ? f32x2_to_bf16x2_bits(low, high) : f32x2_to_f16x2_bits(low, high);
      }
      memcpy(&rounded, pair, sizeof(rounded));
    } else {
#pragma unroll
      for (int j = 0; j < kPiece; ++j) rounded.data[j] = from_f32<T>(value[i + j]);
    }
    store_global_streaming_if(reinterpret_cast<Vec<T, kPiece>*>(to + i), rounded, go);
  }
}

}  // namespace nxs
