// Special functions of the MUFU unit, and single arithmetic instructions. Approximate ones flush subnormals to zero.
#pragma once
#include "common/ptx/simt.cuh"

namespace nxs {

#define NXS_SPECIAL(name, instruction)                  \
  NXS_DEVICE float name(float x) {                      \
    float r;                                            \
    asm(instruction ".f32 %0, %1;" : "=f"(r) : "f"(x)); \
    return r;                                           \
  }
// ex2.approx.ftz: 2^x; relative error about 2^-22
NXS_SPECIAL(exp2_approx, "ex2.approx.ftz")
// lg2.approx.ftz
NXS_SPECIAL(log2_approx, "lg2.approx.ftz")
// rsqrt.approx.ftz
NXS_SPECIAL(rsqrt_approx, "rsqrt.approx.ftz")
// rcp.approx.ftz
NXS_SPECIAL(reciprocal_approx, "rcp.approx.ftz")
// tanh.approx: relative error about 2^-11
NXS_SPECIAL(tanh_approx, "tanh.approx")
#undef NXS_SPECIAL

// fma.rn: a * b + c, rounded once
NXS_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// sqrt.rn, div.rn: rounded to nearest even
NXS_DEVICE float square_root(float x) { return __fsqrt_rn(x); }
NXS_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
// fma.rn.f64, div.rn.f64
NXS_DEVICE double fma_f64(double a, double b, double c) { return __fma_rn(a, b, c); }
NXS_DEVICE double divide_f64(double a, double b) { return __ddiv_rn(a, b); }
// mul.rn: never made one with an addition
NXS_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
// max.f32: of a number and a NaN the number; max.NaN: the NaN
NXS_DEVICE float maximum(float a, float b) { return fmaxf(a, b); }
NXS_DEVICE float maximum_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
// max.NaN.f16x2, .bf16x2: of two pairs; a NaN is 0x7fff
NXS_DEVICE u32 maximum_nan_f16x2(u32 a, u32 b) {
  u32 r;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
NXS_DEVICE u32 maximum_nan_bf16x2(u32 a, u32 b) {
  u32 r;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
// popc, clz
NXS_DEVICE u32 population_count(u32 x) { return static_cast<u32>(__popc(x)); }
NXS_DEVICE u32 leading_zeros(u32 x) { return static_cast<u32>(__clz(static_cast<int>(x))); }
// The bits of a float; no instruction.
NXS_DEVICE u32 float_bits(float x) { return __float_as_uint(x); }
NXS_DEVICE float bits_float(u32 x) { return __uint_as_float(x); }

}  // namespace nxs
