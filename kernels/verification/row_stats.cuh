// Rows of logits, chunk by chunk: the arithmetic of weights, and the partial of a chunk by one warp.
//
//   partial = { max, sum over the chunk's columns of 2^(s * logit - r) },  s = log2(e) / temperature, r = rint(s * max)
//
// Layouts      A chunk is 1024 columns. Lane l has the columns 256 j + 8 l + k of it, j from 0 to 3 and k from 0 to 7: place
//              8 j + k. Sums run over a lane's places in order, then over lanes by `scan`.
// Who does what
//              A warp has a chunk: every lane its 32 logits in registers, 4 reads of 16 bytes (f32: 8) in flight at once.
//              Rows that are not 16-byte aligned, and the last chunk of a row, are read one element at a time.
// Arithmetic   f32, and nothing that the host has not: fma, multiply, add, a polynomial for 2^f. src/verification/rows.rs is
//              the same, bit for bit. About 12 instructions a column.
// Determinism  bitwise; nothing depends on the batch, the grid, or where the row lies.
#pragma once
#include "common/dtype.cuh"
#include "common/ptx/math.cuh"
#include "common/ptx/memory.cuh"
#include "common/ptx/warp.cuh"

namespace nxs::verification {

constexpr u32 kChunk = NXS_CHUNK_COLUMNS, kGroups = 4, kGroup = 8;
constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;
// Adding it rounds a float to an integer, which then stands in its low bits.
constexpr float kMagic = 12582912.0f;
constexpr float kMostExponent = 2097152.0f;

NXS_DEVICE u32 chunks_of(u32 columns) { return (columns + kChunk - 1) / kChunk; }

// What turns logits into exponents of two. Greedy: both 0.
struct Scale {
  float per_logit, per_exponent;
  NXS_DEVICE bool greedy() const { return !(per_logit > 0); }
};

NXS_DEVICE Scale scale_from_per_logit(float per_logit) {
  return per_logit > 0 ? Scale{per_logit, 1.0f / per_logit} : Scale{0, 0};
}
NXS_DEVICE Scale scale_of(float temperature) {
  if (!(temperature >= 1e-5f)) return Scale{0, 0};  // NaN too
  return scale_from_per_logit(kLog2E / (temperature < 1e6f ? temperature : 1e6f));
}

// Whether a greatest logit is small enough for its exponent to have a fraction.
NXS_DEVICE bool has_reference(const Scale& scale, float top) {
  const float exponent = multiply(top, scale.per_logit);
  return exponent <= kMostExponent && exponent >= -kMostExponent;
}
// The exponent that a row or chunk with this greatest logit refers to.
NXS_DEVICE float reference_of(const Scale& scale, float top) { return fma(top, scale.per_logit, kMagic) - kMagic; }
// Logits below it have no weight beside the reference.
NXS_DEVICE float floor_of(const Scale& scale, float reference) {
  return multiply(reference - 120.0f, scale.per_exponent);
}

// 2^f for |f| <= 1/2: least relative error 7.5e-8 before rounding.
NXS_DEVICE float power_of_fraction(float f) {
  float p = fma(0x1.5c08e6p-10f, f, 0x1.3d0c52p-7f);
  p = fma(p, f, 0x1.c6b6e4p-5f);
  p = fma(p, f, 0x1.ebf918p-3f);
  p = fma(p, f, 0x1.62e428p-1f);
  return fma(p, f, 0x1.000002p+0f);
}

// 2^(logit * per_logit - reference) as two factors, of which the second is a power of two; `shift` is
// (kMagic + 127) - reference. For logits that are not below the floor; their product is exact.
struct Power {
  float fraction, whole;
};
NXS_DEVICE Power power(const Scale& scale, float shift, float logit) {
  const float whole = fma(logit, scale.per_logit, shift);
  const float fraction = fma(logit, scale.per_logit, -(whole - shift));
  return Power{power_of_fraction(fraction), bits_float(float_bits(whole) << 23)};
}
// 0 below the floor, below `cut`, and for NaN.
NXS_DEVICE float weight_of(const Scale& scale, float reference, float cut, float logit) {
  const float least = maximum(cut, floor_of(scale, reference));
  if (!(logit >= least)) return 0;
  const Power p = power(scale, (kMagic + 127.0f) - reference, logit);
  return multiply(p.fraction, p.whole);
}
// 2^n for an integer n up to 0; 0 below -100.
NXS_DEVICE float power_of_integer(float n) {
  return n < -100.0f ? 0.0f : bits_float(static_cast<u32>(static_cast<i32>(n) + 127) << 23);
}

// Inclusive sums over lanes.
NXS_DEVICE float scan(float value) {
#pragma unroll
  for (u32 distance = 1; distance < 32; distance *= 2) {
    const float before = shuffle_up(value, distance);
    if (lane_index() >= distance) value = value + before;
  }
  return value;
}

// The last of them, in every lane: what `scan` adds up for the last lane is a tree, and additions commute.
NXS_DEVICE float sum_of_lanes(float value) {
#pragma unroll
  for (u32 distance = 1; distance < 32; distance *= 2) value = value + shuffle_xor(value, distance);
  return value;
}

// Unsigned integers in the order of the floats; -0 is 0.
NXS_DEVICE u32 key_of(float x) {
  const u32 bits = float_bits(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
NXS_DEVICE float key_float(u32 key) { return bits_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// A row of logits. Without columns: nothing is read.
template <typename T> struct Row {
  const T* logits;
  const u32* allow;  // or null
  u32 columns;
};

template <typename T> NXS_DEVICE bool is_wide(const T* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// One logit; -inf where there is none.
template <typename T> NXS_DEVICE float logit_at(const Row<T>& row, u32 column) {
  if (column >= row.columns) return -INFINITY;
  if (row.allow && !(load_global_nc(row.allow + column / 32) >> (column % 32) & 1)) return -INFINITY;
  return to_f32(load_global_nc(row.logits + column));
}

// A lane's logits of a chunk, by place: in registers, two 16-bit floats a word.
template <typename T> struct Logits {
  static constexpr u32 kPlaces = kGroups * kGroup, kPacked = 4 / sizeof(T), kWords = kPlaces / kPacked;
  u32 word[kWords];

  NXS_DEVICE float at(u32 place) const {
    if constexpr (sizeof(T) == 4)
      return bits_float(word[place]);
    else
      return to_f32(T{static_cast<u16>(word[place / 2] >> place % 2 * 16)});
  }
  // Bits of T.
  NXS_DEVICE void set(u32 place, u32 bits) {
    if constexpr (sizeof(T) == 4)
      word[place] = bits;
    else if (place % 2 == 0)
      word[place / 2] = (word[place / 2] & 0xffff0000u) | bits;
    else
      word[place / 2] = (word[place / 2] & 0xffffu) | bits << 16;
  }
  static NXS_DEVICE u32 minus_infinity() {
    return sizeof(T) == 4 ? 0xff800000u : DType<T>::value == NXS_F16 ? 0xfc00u : 0xff80u;
  }
};

namespace detail {
NXS_DEVICE u32 bits_of(float x) { return float_bits(x); }
NXS_DEVICE u32 bits_of(f16 x) { return x.bits; }
NXS_DEVICE u32 bits_of(bf16 x) { return x.bits; }
NXS_DEVICE u32 maximum_nan_pair(f16, u32 a, u32 b) { return maximum_nan_f16x2(a, b); }
NXS_DEVICE u32 maximum_nan_pair(bf16, u32 a, u32 b) { return maximum_nan_bf16x2(a, b); }
}  // namespace detail

namespace detail {
template <typename T> NXS_DEVICE Logits<T> load_wide(const T* logits, u32 chunk) {
  constexpr u32 kReads = Logits<T>::kWords / kGroups / 4;
  Logits<T> to;
  const T* first = logits + (chunk * kChunk + lane_index() * kGroup);
#pragma unroll
  for (u32 j = 0; j < kGroups; ++j) {
#pragma unroll
    for (u32 k = 0; k < kReads; ++k) {
      const auto words = load_global_nc(reinterpret_cast<const Vec<u32, 4>*>(first + j * 256 + k * (16 / sizeof(T))));
#pragma unroll
      for (u32 n = 0; n < 4; ++n) to.word[(j * kReads + k) * 4 + n] = words.data[n];
    }
  }
  return to;
}

template <typename T>
NXS_DEVICE_CALL void load_any(const T* logits, const u32* allow, u32 columns, u32 chunk, Logits<T>& to) {
  const u32 first = chunk * kChunk + lane_index() * kGroup;
  if (is_wide(logits) && chunk * kChunk + kChunk <= columns) {
    to = load_wide(logits, chunk);
  } else {
#pragma unroll
    for (u32 i = 0; i < Logits<T>::kWords; ++i) to.word[i] = 0;
#pragma unroll
    for (u32 place = 0; place < Logits<T>::kPlaces; ++place) {
      const u32 column = first + place / 8 * 256 + place % 8;
      u32 bits = Logits<T>::minus_infinity();
      if (column < columns) bits = bits_of(load_global_nc(logits + column));
      to.set(place, bits);
    }
  }
  if (allow) {
#pragma unroll
    for (u32 j = 0; j < kGroups; ++j) {
      const u32 column = first + j * 256;
      const u32 bits = column < columns ? load_global_nc(allow + column / 32) >> (column % 32) : 0;
#pragma unroll
      for (u32 k = 0; k < kGroup; ++k)
        if (!(bits >> k & 1)) to.set(j * kGroup + k, Logits<T>::minus_infinity());
    }
  }
}
}  // namespace detail

template <typename T> NXS_DEVICE Logits<T> load_logits(const Row<T>& row, u32 chunk) {
  if (is_wide(row.logits) && chunk * kChunk + kChunk <= row.columns && !row.allow)
    return detail::load_wide(row.logits, chunk);
  // In memory of its own, so that those of the other way stay in registers.
  Logits<T> logits;
  detail::load_any(row.logits, row.allow, row.columns, chunk, logits);
  const Logits<T> copied = logits;
  return copied;
}

// The greatest of a lane's logits; NaN if one is.
template <typename T> NXS_DEVICE float lane_maximum(const Logits<T>& logits) {
  if constexpr (sizeof(T) == 4) {
    float top = logits.at(0);
#pragma unroll
    for (u32 place = 1; place < Logits<T>::kPlaces; ++place) top = maximum_nan(top, logits.at(place));
    return top;
  } else {
    u32 pair = logits.word[0];
#pragma unroll
    for (u32 i = 1; i < Logits<T>::kWords; ++i) pair = detail::maximum_nan_pair(T{}, pair, logits.word[i]);
    return maximum_nan(to_f32(T{static_cast<u16>(pair)}), to_f32(T{static_cast<u16>(pair >> 16)}));
  }
}

struct alignas(8) Partial {
  float max, sum;
};

// The partial of the warp's chunk, in every lane, from the greatest logits of the lanes; anything if one is NaN.
// Greedy: only max.
template <typename T> NXS_DEVICE Partial partial_of_numbers(const Logits<T>& logits, float lane_top, const Scale& scale) {
  const float top = key_float(warp_reduce_max(key_of(lane_top)));
  float sum = 0;
  if (!scale.greedy() && has_reference(scale, top)) {
    const float reference = reference_of(scale, top), shift = (kMagic + 127.0f) - reference;
    const float floor = floor_of(scale, reference);
#pragma unroll
    for (u32 place = 0; place < Logits<T>::kPlaces; ++place) {
      const Power p = power(scale, shift, maximum(logits.at(place), floor));
      sum = fma(p.fraction, p.whole, sum);
    }
    sum = sum_of_lanes(sum);
  }
  return Partial{top, sum};
}

// The same with NaNs, which become -inf and set the sign of the sum.
template <typename T> NXS_DEVICE Partial chunk_partial(Logits<T>& logits, const Scale& scale) {
  float top = lane_maximum(logits);
  const bool nan = warp_any(top != top);
  if (nan) {
    top = -INFINITY;
#pragma unroll
    for (u32 place = 0; place < Logits<T>::kPlaces; ++place) {
      const float x = logits.at(place);
      if (x != x) logits.set(place, Logits<T>::minus_infinity());
      top = maximum(top, x);
    }
  }
  const Partial partial = partial_of_numbers(logits, top, scale);
  return Partial{partial.max, nan ? -partial.sum : partial.sum};
}

}  // namespace nxs::verification
