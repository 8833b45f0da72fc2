// The binary logarithm and exponential variates, from nothing that the host has not: src/verification/log2.rs is the same, bit
// for bit. About 14 instructions.
#pragma once
#include "common/ptx/math.cuh"

namespace nxs::verification {

constexpr u32 kRootHalf = 0x3f3504f3u;

// log2(1 + t) / t for 1 + t from sqrt(1/2) to sqrt(2): least relative error 2.6e-8 before rounding.
NXS_DEVICE float log2_polynomial(float t) {
  float p = fma(0x1.01b6d6p-3f, t, -0x1.a87d08p-3f);
  p = fma(p, t, 0x1.b9c91ap-3f);
  p = fma(p, t, -0x1.e95be8p-3f);
  p = fma(p, t, 0x1.26d384p-2f);
  p = fma(p, t, -0x1.715c4ep-2f);
  p = fma(p, t, 0x1.ec73d6p-2f);
  p = fma(p, t, -0x1.715470p-1f);
  return fma(p, t, 0x1.715476p+0f);
}

// Of a positive, normal number.
NXS_DEVICE float log2_exact(float x) {
  const u32 shifted = float_bits(x) - kRootHalf;
  const float exponent = static_cast<float>(static_cast<i32>(shifted) >> 23);
  const float t = bits_float((shifted & 0x7fffffu) + kRootHalf) - 1.0f;
  return fma(t, log2_polynomial(t), exponent);
}

// An exponential variate (in units of ln 2): -log2(u), u = (word + 1/2) / 2^32. Never 0.
NXS_DEVICE float exponential(u32 word) {
  constexpr float kScale = 0x1p-32f;
  if (word >= 0xb504f334u) {
    const float t = multiply(static_cast<float>(~word) + 0.5f, -kScale);
    return -multiply(t, log2_polynomial(t));
  }
  return -log2_exact(multiply(static_cast<float>(word) + 0.5f, kScale));
}

}  // namespace nxs::verification
