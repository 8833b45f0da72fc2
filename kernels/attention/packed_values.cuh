// From the codes of packed keys and values to what they stand for, as nxs_unpack defines it. For all kernels that attend.
#pragma once
#include "attention/scale_rows.cuh"
#include "common/ptx/math.cuh"

namespace nxs::attention {

// A row's numbers: its scale and, of 4 bits, what is added.
template <int kFormat> struct RowNumbers {
  float scale, min;
};
template <int kFormat> NXS_DEVICE RowNumbers<kFormat> load_row_numbers(u32 address) {
  if constexpr (kFormat == NXS_KV_FP8) {
    return {load_shared<float>(address), 0.0f};
  } else {
    const auto pair = load_shared<Vec<float, 2>>(address);
    return {pair.data[0], pair.data[1]};
  }
}

// Eight elements, rounded to T: from two words of codes in fp8, or one of 4 bits. Two codes of 4 bits at a time are the digits of
// two subnormal numbers of f16, 2^-24 or 2^-20 of what they say: that is cheaper than to move and convert each.
template <typename T, int kFormat>
NXS_DEVICE Vec<u32, 4> eight_values(u32 codes, u32 more, const RowNumbers<kFormat>& of) {
  Vec<u32, 4> value;
  if constexpr (kFormat == NXS_KV_FP8) {
#pragma unroll
    for (u32 k = 0; k < 4; ++k) {
      const u32 both = e4m3x2_to_f16x2_bits(static_cast<u16>((k < 2 ? codes : more) >> 16 * (k % 2)));
      value.data[k] = round_pair<T>(nxs::multiply(f16_bits_to_f32(static_cast<u16>(both)), of.scale),
                                    nxs::multiply(f16_bits_to_f32(static_cast<u16>(both >> 16)), of.scale));
    }
  } else {
    const float even = of.scale * 0x1p24f, odd = of.scale * 0x1p20f;
#pragma unroll
    for (u32 k = 0; k < 2; ++k) {
      const u32 first = codes >> 8 * k & 0x000f000fu, second = codes >> 8 * k & 0x00f000f0u;  // of codes 2 k and 2 k + 4, and the next
      const auto at = [&](u32 bits, float scale) { return fma(f16_bits_to_f32(static_cast<u16>(bits)), scale, of.min); };
      value.data[k] = round_pair<T>(at(first, even), at(second, odd));
      value.data[k + 2] = round_pair<T>(at(first >> 16, even), at(second >> 16, odd));
    }
  }
  return value;
}
// Number j of the eights that 16 bytes of codes are.
template <typename T, int kFormat>
NXS_DEVICE Vec<u32, 4> eight_of(const Vec<u32, 4>& codes, u32 j, const RowNumbers<kFormat>& of) {
  if constexpr (kFormat == NXS_KV_FP8) return eight_values<T, kFormat>(codes.data[2 * j], codes.data[2 * j + 1], of);
  else return eight_values<T, kFormat>(codes.data[j], 0, of);
}

}  // namespace nxs::attention
