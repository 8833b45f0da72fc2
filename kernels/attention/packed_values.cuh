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

// Code k of eight in a word, exactly: its bits become those of a float between 2^n and 2^(n + 1) in which they count ones. That
// is cheaper than a shift and a conversion. Codes from 5 on come from the word moved by 20 bits.
template <int k> NXS_DEVICE float four_bits(u32 word, u32 moved) {
  constexpr int at = k < 5 ? k : k - 5;
  constexpr u32 none = static_cast<u32>(150 - 4 * at) << 23;
  return bits_float(((k < 5 ? word : moved) & (15u << 4 * at)) | none) - bits_float(none);
}

// Eight elements, rounded to T: from two words of codes in fp8, or one of 4 bits.
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
    const u32 moved = codes >> 20;
    const auto at = [&](float code) { return fma(code, of.scale, of.min); };
    value.data[0] = round_pair<T>(at(four_bits<0>(codes, moved)), at(four_bits<1>(codes, moved)));
    value.data[1] = round_pair<T>(at(four_bits<2>(codes, moved)), at(four_bits<3>(codes, moved)));
    value.data[2] = round_pair<T>(at(four_bits<4>(codes, moved)), at(four_bits<5>(codes, moved)));
    value.data[3] = round_pair<T>(at(four_bits<6>(codes, moved)), at(four_bits<7>(codes, moved)));
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
