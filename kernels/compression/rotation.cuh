// An orthonormal rotation of rows that lie in registers, eight neighbouring elements a lane: signs and a Walsh-Hadamard
// transform of blocks of `block` elements. nextscale.h has the definition; src/packed.rs is the same, bit for bit.
#pragma once
#include <cmath>

#include "common/chunk.cuh"
#include "common/ptx/math.cuh"
#include "common/ptx/warp.cuh"

namespace nxs::compression {

struct Rotation {
  u32 signs[8];
  u32 block;   // a power of two from 8 to 256
  float norm;  // 1 / sqrt(block)

  static Rotation of(const u32 (&signs)[8], i32 dim) {
    Rotation made = {};
    for (u32 i = 0; i < 8; ++i) made.signs[i] = signs[i];
    made.block = static_cast<u32>(dim & -dim);
    made.norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(made.block)));
    return made;
  }

  // Elements 8 lane and up of a row whose lanes are neighbours; x[i] is negated where its sign says.
  NXS_DEVICE void flip(float (&x)[8], u32 lane) const {
    u32 word = signs[0];
#pragma unroll
    for (u32 i = 1; i < 8; ++i) word = lane / 4 == i ? signs[i] : word;
    const u32 bits = word >> (lane % 4 * 8);
#pragma unroll
    for (u32 i = 0; i < 8; ++i) x[i] = bits_float(float_bits(x[i]) ^ (bits >> i & 1) << 31);
  }

  // All lanes of the warp take part.
  NXS_DEVICE void transform(float (&x)[8], u32 lane) const {
#pragma unroll
    for (u32 apart = 1; apart < 8; apart *= 2)
#pragma unroll
      for (u32 i = 0; i < 8; ++i)
        if ((i & apart) == 0) {
          const float a = x[i], b = x[i + apart];
          x[i] = a + b;
          x[i + apart] = a - b;
        }
    for (u32 apart = 1; apart < block / 8; apart *= 2) {
      const u32 minus = lane & apart ? 0x80000000u : 0u;
#pragma unroll
      for (u32 i = 0; i < 8; ++i) x[i] = shuffle_xor(x[i], apart) + bits_float(float_bits(x[i]) ^ minus);
    }
#pragma unroll
    for (u32 i = 0; i < 8; ++i) x[i] = multiply(x[i], norm);
  }
  NXS_DEVICE void apply(float (&x)[8], u32 lane) const {
    flip(x, lane);
    transform(x, lane);
  }
  NXS_DEVICE void invert(float (&x)[8], u32 lane) const {
    transform(x, lane);
    flip(x, lane);
  }
};

// Eight elements of a row in memory: in accesses of 16 bytes, or one by one.
template <typename T, bool kWide> NXS_DEVICE Vec<T, 8> load_eight(const T* from) {
  if constexpr (kWide) return load_chunk_nc<T, 8>(from);
  Vec<T, 8> eight;
#pragma unroll
  for (u32 i = 0; i < 8; ++i) eight.data[i] = load_global_nc(from + i);
  return eight;
}
template <typename T, bool kWide> NXS_DEVICE void store_eight_if(T* to, const float (&x)[8], bool go) {
  if constexpr (kWide) {
    store_chunk_streaming_if(to, x, go);
  } else if (go) {
#pragma unroll
    for (u32 i = 0; i < 8; ++i) store_global(to + i, from_f32<T>(x[i]));
  }
}

// Log2 of the lanes that share a row.
inline u32 log2_lanes_of(i32 dim) {
  u32 log2 = 0;
  while ((8 << log2) < dim) ++log2;
  return log2;
}

}  // namespace nxs::compression
