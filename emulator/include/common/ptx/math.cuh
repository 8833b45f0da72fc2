#pragma once
#include <bit>
#include <cmath>

#include "common/ptx/convert.cuh"
#include "common/ptx/simt.cuh"

namespace nxs {

// The approximate ones are the exact result, rounded; subnormals flush to zero as on the GPU.
namespace detail {
NXS_DEVICE float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
template <typename F> NXS_DEVICE float special(float x, emulator::Where where, F f) {
  emulator::check_registers(x, where);
  emulator::count_special();
  return flush(static_cast<float>(f(static_cast<double>(flush(x)))));
}
}  // namespace detail

NXS_DEVICE float exp2_approx(float x, NXS_WHERE) {
  return detail::special(x, where, [](double v) { return std::exp2(v); });
}
NXS_DEVICE float log2_approx(float x, NXS_WHERE) {
  return detail::special(x, where, [](double v) { return std::log2(v); });
}
NXS_DEVICE float rsqrt_approx(float x, NXS_WHERE) {
  return detail::special(x, where, [](double v) { return v == 0 ? std::copysign(HUGE_VAL, v) : 1 / std::sqrt(v); });
}
NXS_DEVICE float reciprocal_approx(float x, NXS_WHERE) {
  return detail::special(x, where, [](double v) { return v == 0 ? std::copysign(HUGE_VAL, v) : 1 / v; });
}
NXS_DEVICE float tanh_approx(float x, NXS_WHERE) {
  return detail::special(x, where, [](double v) { return std::tanh(v); });
}

NXS_DEVICE float fma(float a, float b, float c) { return std::fma(a, b, c); }
NXS_DEVICE float square_root(float x) { return std::sqrt(x); }
NXS_DEVICE float divide(float a, float b) { return a / b; }
NXS_DEVICE double fma_f64(double a, double b, double c) { return std::fma(a, b, c); }
NXS_DEVICE double divide_f64(double a, double b) { return a / b; }
NXS_DEVICE float multiply(float a, float b) { return a * b; }
NXS_DEVICE float maximum(float a, float b) {
  if (std::isnan(a)) return b;
  return std::isnan(b) || a > b || (a == b && !std::signbit(a)) ? a : b;
}
NXS_DEVICE float maximum_nan(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? std::bit_cast<float>(0x7fffffffu) : maximum(a, b);
}
namespace detail {
template <typename F> NXS_DEVICE u32 maximum_nan_pair(u32 a, u32 b, u32 exponent, F to_f32) {
  u32 pair = 0;
  for (u32 shift = 0; shift < 32; shift += 16) {
    const u32 x = a >> shift & 0xffff, y = b >> shift & 0xffff;
    const bool nan = (x & 0x7fff) > exponent || (y & 0x7fff) > exponent;
    const float fx = to_f32(static_cast<u16>(x)), fy = to_f32(static_cast<u16>(y));
    pair |= (nan ? 0x7fffu : fx > fy || (fx == fy && !(x >> 15)) ? x : y) << shift;
  }
  return pair;
}
}  // namespace detail
NXS_DEVICE u32 maximum_nan_f16x2(u32 a, u32 b) {
  return detail::maximum_nan_pair(a, b, 0x7c00, [](u16 h) { return f16_bits_to_f32(h); });
}
NXS_DEVICE u32 maximum_nan_bf16x2(u32 a, u32 b) {
  return detail::maximum_nan_pair(a, b, 0x7f80, [](u16 h) { return bf16_bits_to_f32(h); });
}
NXS_DEVICE u32 population_count(u32 x) { return std::popcount(x); }
NXS_DEVICE u32 leading_zeros(u32 x) { return std::countl_zero(x); }
NXS_DEVICE u32 float_bits(float x) { return std::bit_cast<u32>(x); }
NXS_DEVICE float bits_float(u32 x) { return std::bit_cast<float>(x); }

}  // namespace nxs
