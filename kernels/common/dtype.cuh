// Element types of tensors as bit patterns, short vectors of them, and their way to and from f32.
#pragma once
#include "common/ptx/convert.cuh"
#include "nextscale.h"

namespace nxs {

struct f16 { u16 bits; };
struct bf16 { u16 bits; };

template <typename T> struct DType;
template <> struct DType<float> { static constexpr nxs_dtype value = NXS_F32; };
template <> struct DType<f16> { static constexpr nxs_dtype value = NXS_F16; };
template <> struct DType<bf16> { static constexpr nxs_dtype value = NXS_BF16; };
template <> struct DType<u16> { static constexpr nxs_dtype value = NXS_U16; };
template <> struct DType<u32> { static constexpr nxs_dtype value = NXS_U32; };
template <> struct DType<i64> { static constexpr nxs_dtype value = NXS_I64; };

NXS_DEVICE float to_f32(float x) { return x; }
NXS_DEVICE float to_f32(f16 x) { return f16_bits_to_f32(x.bits); }
NXS_DEVICE float to_f32(bf16 x) { return bf16_bits_to_f32(x.bits); }

// Round to nearest even.
template <typename T> NXS_DEVICE T from_f32(float x);
template <> NXS_DEVICE float from_f32<float>(float x) { return x; }
template <> NXS_DEVICE f16 from_f32<f16>(float x) { return f16{f32_to_f16_bits(x)}; }
template <> NXS_DEVICE bf16 from_f32<bf16>(float x) { return bf16{f32_to_bf16_bits(x)}; }

// N elements that move in one access of min(16, N * sizeof(T)) bytes.
template <typename T, int N> struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Vec {
  T data[N];
};

}  // namespace nxs
