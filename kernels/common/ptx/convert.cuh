// Conversions between f32 and the 16-bit floats, one instruction each, on bit patterns.
// All round to nearest even; overflow goes to infinity; a NaN stays a NaN.
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

}  // namespace nxs
