#pragma once
#include <bit>
#include <cmath>

#include "common/ptx/simt.cuh"

namespace nxs {

namespace detail {
// Rounds to nearest even into `exponent` and `mantissa` bits; subnormals and infinities as IEEE has them, NaN as
// 0x7fff.
NXS_DEVICE u16 round_to_16_bits(float x, int exponent, int mantissa) {
  const u32 bits = std::bit_cast<u32>(x), sign = bits >> 31 << 15, infinity = ((1u << exponent) - 1) << mantissa;
  const u32 magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  const int bias = (1 << (exponent - 1)) - 1;
  int e = static_cast<int>(magnitude >> 23) - 127 + bias;
  u64 m = (magnitude & 0x7fffffu) | (magnitude >> 23 ? 0x800000u : 0);
  int shift = 23 - mantissa;
  if (magnitude >> 23 == 0) ++e;  // subnormals have the exponent of the least normal
  if (e < 1) {
    shift += 1 - e;
    e = 1;
  }
  if (shift > 40) return static_cast<u16>(sign);
  const u64 half = u64{1} << (shift - 1), rest = m & ((u64{1} << shift) - 1);
  m >>= shift;
  if (rest > half || (rest == half && (m & 1))) ++m;
  const u64 result = (static_cast<u64>(e - 1) << mantissa) + m;
  return static_cast<u16>(sign | (result < infinity ? result : infinity));
}
}  // namespace detail

NXS_DEVICE u16 f32_to_f16_bits(float x, NXS_WHERE) {
  emulator::check_registers(x, where);
  return detail::round_to_16_bits(x, 5, 10);
}
NXS_DEVICE float f16_bits_to_f32(u16 h) {  // every NaN becomes 0x7fffffff
  const u32 sign = static_cast<u32>(h >> 15) << 31, e = h >> 10 & 31, m = h & 1023;
  if (e == 31) return std::bit_cast<float>(m ? 0x7fffffffu : sign | 0x7f800000u);
  if (e == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(m) * 0x1p-24f;
  return std::bit_cast<float>(sign | (e + 112) << 23 | m << 13);
}
NXS_DEVICE u16 f32_to_bf16_bits(float x, NXS_WHERE) {
  emulator::check_registers(x, where);
  return detail::round_to_16_bits(x, 8, 7);
}
NXS_DEVICE float bf16_bits_to_f32(u16 h) { return std::bit_cast<float>(static_cast<u32>(h) << 16); }
NXS_DEVICE u32 f32x2_to_f16x2_bits(float lo, float hi, NXS_WHERE) {
  return f32_to_f16_bits(lo, where) | static_cast<u32>(f32_to_f16_bits(hi, where)) << 16;
}
NXS_DEVICE u32 f32x2_to_bf16x2_bits(float lo, float hi, NXS_WHERE) {
  return f32_to_bf16_bits(lo, where) | static_cast<u32>(f32_to_bf16_bits(hi, where)) << 16;
}


namespace detail {
// To the nearest multiple of the step at the magnitude's exponent, in double precision.
NXS_DEVICE u32 round_to_e4m3(float x) {
  if (std::isnan(x)) return 0x7f;
  const u32 sign = std::signbit(x) ? 0x80 : 0;
  const double magnitude = std::fabs(static_cast<double>(x));
  if (magnitude >= 448) return sign | 0x7e;
  const int exponent = magnitude < 0x1p-6 ? -6 : std::ilogb(magnitude);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 3 - exponent)));
  return sign | (static_cast<u32>(exponent + 6) * 8 + static_cast<u32>(steps));
}
NXS_DEVICE u16 e4m3_to_f16(u32 code) {
  const u32 e = code >> 3 & 15, m = code & 7;
  if (e == 15 && m == 7) return 0x7fff;
  const double value = e ? std::ldexp(8 + m, static_cast<int>(e) - 10) : std::ldexp(m, -9);
  return round_to_16_bits(static_cast<float>(code >> 7 & 1 ? -value : value), 5, 10);
}
}  // namespace detail
NXS_DEVICE u16 f32x2_to_e4m3x2_bits(float lo, float hi, NXS_WHERE) {
  emulator::check_registers(lo, where);
  emulator::check_registers(hi, where);
  return static_cast<u16>(detail::round_to_e4m3(lo) | detail::round_to_e4m3(hi) << 8);
}
NXS_DEVICE u32 e4m3x2_to_f16x2_bits(u16 pair) {
  return detail::e4m3_to_f16(pair & 0xff) | static_cast<u32>(detail::e4m3_to_f16(pair >> 8)) << 16;
}

}  // namespace nxs
