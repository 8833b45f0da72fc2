#pragma once
#include <bit>
#include <cmath>

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
NXS_DEVICE u32 population_count(u32 x) { return std::popcount(x); }
NXS_DEVICE u32 leading_zeros(u32 x) { return std::countl_zero(x); }
NXS_DEVICE u32 float_bits(float x) { return std::bit_cast<u32>(x); }
NXS_DEVICE float bits_float(u32 x) { return std::bit_cast<float>(x); }

}  // namespace nxs
