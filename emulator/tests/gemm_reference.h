// What the matrix programs share: inputs whose sums are exact, inputs that are not, and the double-precision product.
#pragma once
#include "device.h"

namespace test {

struct Gemm {
  int m, n, k;
  bool a_transposed, b_transposed;  // stored [k][m], [k][n] instead of [m][k], [n][k]
};

inline uint16_t to_f16(float x) {  // of values that f16 holds, or rounded toward zero
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const int e = static_cast<int>(bits >> 23 & 255) - 112;
  return static_cast<uint16_t>(e <= 0 ? 0 : (bits >> 31 << 15) | e << 10 | (bits >> 13 & 1023));
}
inline float from_f16(uint16_t h) {
  const float m = static_cast<float>(h & 1023), sign = h >> 15 ? -1.0f : 1.0f;
  return sign * ((h >> 10 & 31) ? std::ldexp(1024 + m, (h >> 10 & 31) - 25) : std::ldexp(m, -24));
}

// 16-bit elements: small integers, or random ones.
inline std::vector<uint16_t> make_matrix(size_t count, bool integers, bool f16, uint64_t seed) {
  Random random(seed);
  std::vector<uint16_t> values(count);
  for (auto& v : values) {
    const float x = integers ? static_cast<float>(random.below(9)) - 4 : random.symmetric();
    v = f16 ? to_f16(x) : to_bf16(x);
  }
  return values;
}

// Every element of `got` ([m][n], rows of `pitch`): exact for integers; else within 2^-20 of the sum of magnitudes, as
// the order and width of a tensor core's additions are not specified.
inline void check_product(const std::string& name, const Gemm& g, const std::vector<uint16_t>& a,
                          const std::vector<uint16_t>& b, bool integers, bool f16, const std::vector<float>& got,
                          size_t pitch) {
  double worst = 0;
  for (int i = 0; i < g.m; ++i)
    for (int j = 0; j < g.n; ++j) {
      double sum = 0, magnitude = 0;
      for (int k = 0; k < g.k; ++k) {
        const uint16_t x = a[g.a_transposed ? size_t(k) * g.m + i : size_t(i) * g.k + k];
        const uint16_t y = b[g.b_transposed ? size_t(k) * g.n + j : size_t(j) * g.k + k];
        const double product = f16 ? double(from_f16(x)) * from_f16(y) : double(from_bf16(x)) * from_bf16(y);
        sum += product;
        magnitude += std::fabs(product);
      }
      const double error = std::fabs(got[i * pitch + j] - sum);
      worst = std::fmax(worst, std::isnan(error) ? HUGE_VAL
                               : integers        ? (error == 0 ? 0 : HUGE_VAL)
                                                 : error / (magnitude + 1e-30));
    }
  check(worst <= 0x1p-20, name + ": error " + std::to_string(worst * 0x1p20) + " of 2^-20");
  if (integers) print_checksum(name.c_str(), got);
}

}  // namespace test
