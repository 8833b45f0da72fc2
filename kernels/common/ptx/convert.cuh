// Conversions between f32, the 16-bit floats and e4m3, one instruction each, on bit patterns.
// All round to nearest even; a NaN stays a NaN; overflow goes to infinity, of e4m3 to 448.
#pragma once
#include "common/ptx/simt.cuh"

namespace nxs {

NXS_DEVICE u16 f32_to_f16_bits(float x) {
  u16 r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}
NXS_DEVICE float f16_bits_to_f32(u16 h) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(h));
  return r;
}
NXS_DEVICE u16 f32_to_bf16_bits(float x) {
  u16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}
// bf16 is the upper half of an f32: a shift, no conversion instruction.
NXS_DEVICE float bf16_bits_to_f32(u16 h) { return __uint_as_float(static_cast<u32>(h) << 16); }
// Two at once; `lo` lands in the low half.
NXS_DEVICE u32 f32x2_to_f16x2_bits(float lo, float hi) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
NXS_DEVICE u32 f32x2_to_bf16x2_bits(float lo, float hi) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}

// cvt.rn.satfinite.e4m3x2.f32, cvt.rn.f16x2.e4m3x2: sm_89; before that the same in a few instructions. A NaN is 0x7f.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
namespace detail {
NXS_DEVICE u32 f32_to_e4m3_bits(float x) {
  const u32 bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7f;
  // Below 2^-6 steps are 2^-9, those of f32 from 2^14 on.
  const u32 small = __float_as_uint(__fadd_rn(__uint_as_float(magnitude), 16384.0f)) - 0x46800000u;
  const u32 normal = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1)) >> 20) - (120u << 3);
  const u32 code = magnitude < 0x3c800000u ? small : magnitude >= 0x43e00000u ? 0x7eu : normal;
  return (code < 0x7e ? code : 0x7eu) | (bits >> 24 & 0x80u);
}
}  // namespace detail
#endif
NXS_DEVICE u16 f32x2_to_e4m3x2_bits(float lo, float hi) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  return static_cast<u16>(detail::f32_to_e4m3_bits(lo) | detail::f32_to_e4m3_bits(hi) << 8);
#else
  u16 r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(hi), "f"(lo));
  return r;
#endif
}
NXS_DEVICE u32 e4m3x2_to_f16x2_bits(u16 pair) {
  u32 r;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  const u32 both = (pair & 0xffu) | (pair & 0xff00u) << 8;
  // The same digits with f16's exponents are 2^8 too small.
  const u32 small = (both & 0x00800080u) << 8 | (both & 0x007f007fu) << 7;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(small), "r"(0x5c005c00u));
  if ((both & 0x7fu) == 0x7fu) r = (r & 0xffff0000u) | 0x7fffu;
  if ((both & 0x7f0000u) == 0x7f0000u) r = (r & 0xffffu) | 0x7fff0000u;
#else
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(pair));
#endif
  return r;
}

}  // namespace nxs
