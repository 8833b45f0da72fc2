// Scalar quantizers: bits between their forms (LFQ, BSQ), finite scalar quantization, tables of labels.
//
// Layouts    rows [rows, dim] contiguous; integers one a row. Formulas in nextscale.h.
// Who does what
//            Bits: 2^n lanes share a row, each with chunks of 8 channels (16 bytes of 16-bit values) or one; the bits
//            of an integer meet by shuffles. FSQ: a thread a row, for rows are short and odd; neighbouring threads
//            share lines. Remap: a thread takes 8 codes.
// Bytes      inputs read once, outputs written once.
// FLOPs      FSQ about 40 an element and quantizer, in operations that the host does bit for bit alike: fused
//            multiply-adds, correctly rounded divisions, no special functions. Flips: a Philox block for 4 bits.
// Limits     rows < 2^31 blocks.
#pragma once
#include "common/chunk.cuh"
#include "common/dtype.cuh"
#include "common/philox.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/math.cuh"
#include "common/ptx/memory.cuh"
#include "common/ptx/warp.cuh"

namespace nxs::quantization {

constexpr u32 kScalarThreads = 256;

NXS_DEVICE i64 load_integer(const void* from, nxs_dtype dtype, i64 at) {
  switch (dtype) {
    case NXS_U16: return load_global_nc(static_cast<const u16*>(from) + at);
    case NXS_U32: return load_global_nc(static_cast<const u32*>(from) + at);
    default: return load_global_nc(static_cast<const i64*>(from) + at);
  }
}
NXS_DEVICE void store_integer(void* to, nxs_dtype dtype, i64 at, i64 value) {
  switch (dtype) {
    case NXS_U16: store_global(static_cast<u16*>(to) + at, static_cast<u16>(value)); break;
    case NXS_U32: store_global(static_cast<u32*>(to) + at, static_cast<u32>(value)); break;
    default: store_global(static_cast<i64*>(to) + at, value); break;
  }
}

// ---- bits

enum class Source { kF32, kF16, kBF16, kLabels, kIntegers };

struct BitsParams {
  nxs_bits_params p;
  u32 log2_lanes;
};

// The bits of a chunk, and which of its channels are NaN.
struct BitChunk {
  u32 bits, nans;
};

template <typename T, int kVec> NXS_DEVICE BitChunk signs(const T* from) {
  const Vec<T, kVec> chunk = load_chunk_nc<T, kVec>(from);
  BitChunk made = {0, 0};
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const float value = to_f32(chunk.data[i]);
    made.bits |= (value > 0 ? 1u : 0u) << i;
    made.nans |= (value != value ? 1u : 0u) << i;
  }
  return made;
}

template <typename O, int kVec> NXS_DEVICE void store_values(void* to, i64 at, const BitChunk& chunk, float scale) {
  float value[kVec];
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    value[i] = chunk.bits >> i & 1 ? scale : -scale;
    if (chunk.nans >> i & 1) value[i] = bits_float(0x7fffffffu);
  }
  store_chunk<false>(static_cast<O*>(to) + at, value);
}

template <Source kSource, int kVec>
__global__ void __launch_bounds__(kScalarThreads) bits_kernel(const __grid_constant__ BitsParams q) {
  const nxs_bits_params& p = q.p;
  const u32 lanes = 1u << q.log2_lanes, lane = thread_index() & (lanes - 1), dim = p.dim;
  const u32 block_rows = kScalarThreads >> q.log2_lanes;
  const i64 row = static_cast<i64>(block_index_x()) * block_rows + (thread_index() >> q.log2_lanes);
  const bool there = row < p.rows;
  u64 integer = 0, source = 0, seed = 0, position = 0;
  if (there && kSource == Source::kIntegers) source = static_cast<u64>(load_integer(p.input, p.input_dtype, row));
  if (there && p.seeds_or_null) {
    const i64 entry = row / p.rows_per_seed;
    seed = static_cast<u64>(load_global_nc(p.seeds_or_null + entry));
    position = static_cast<u64>(p.first_row + (row - entry * p.rows_per_seed)) * ((dim + 3) / 4);
  }
  for (u32 k = lane * kVec; there && k < dim; k += lanes * kVec) {
    const i64 at = row * dim + k;
    BitChunk chunk = {0, 0};
    if constexpr (kSource == Source::kF32) chunk = signs<float, kVec>(static_cast<const float*>(p.input) + at);
    if constexpr (kSource == Source::kF16) chunk = signs<f16, kVec>(static_cast<const f16*>(p.input) + at);
    if constexpr (kSource == Source::kBF16) chunk = signs<bf16, kVec>(static_cast<const bf16*>(p.input) + at);
    if constexpr (kSource == Source::kLabels) {
      const auto labels = load_global_nc(reinterpret_cast<const Vec<u8, kVec>*>(static_cast<const u8*>(p.input) + at));
#pragma unroll
      for (int i = 0; i < kVec; ++i) chunk.bits |= (labels.data[i] ? 1u : 0u) << i;
    }
    if constexpr (kSource == Source::kIntegers) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const u32 bit = p.order == NXS_BITS_MSB_FIRST ? dim - 1 - (k + i) : k + i;
        chunk.bits |= static_cast<u32>(source >> bit & 1) << i;
      }
    }
    if (p.seeds_or_null) {
      PhiloxBlock block = {};
#pragma unroll
      for (u32 i = 0; i < kVec; ++i) {
        if (kVec == 1 || i % 4 == 0) block = philox(seed, position + (k + i) / 4, NXS_DOMAIN_BIT_FLIP, 0);
        const u32 word = kVec == 1 ? philox_word(block, k) : block.word[i % 4];
        chunk.bits ^= (philox_uniform(word) < p.flip_rate ? 1u : 0u) << i;
      }
    }
    if (p.labels_or_null) {
      Vec<u8, kVec> labels;
#pragma unroll
      for (int i = 0; i < kVec; ++i) labels.data[i] = static_cast<u8>(chunk.bits >> i & 1);
      store_global(reinterpret_cast<Vec<u8, kVec>*>(p.labels_or_null + at), labels);
    }
    if (p.values_or_null) {
      switch (p.values_dtype) {
        case NXS_F32: store_values<float, kVec>(p.values_or_null, at, chunk, p.scale); break;
        case NXS_F16: store_values<f16, kVec>(p.values_or_null, at, chunk, p.scale); break;
        default: store_values<bf16, kVec>(p.values_or_null, at, chunk, p.scale); break;
      }
    }
    if (p.codes_or_null) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const u32 bit = p.order == NXS_BITS_MSB_FIRST ? dim - 1 - (k + i) : k + i;
        integer |= static_cast<u64>(chunk.bits >> i & 1) << bit;
      }
    }
  }
  if (p.codes_or_null) {
    u32 low = static_cast<u32>(integer), high = static_cast<u32>(integer >> 32);
    for (u32 distance = lanes / 2; distance > 0; distance /= 2) {
      low |= shuffle_xor(low, distance);
      high |= shuffle_xor(high, distance);
    }
    if (there && lane == 0)
      store_integer(p.codes_or_null, p.codes_dtype, row, static_cast<i64>(static_cast<u64>(high) << 32 | low));
  }
}

// ---- finite scalar quantization

struct FsqParams {
  nxs_fsq_params p;
  float half[NXS_FSQ_MOST_DIM], offset[NXS_FSQ_MOST_DIM], shift[NXS_FSQ_MOST_DIM];
  i64 product;
};

// To the nearest integer, ties to even, of |x| < 2^22.
NXS_DEVICE float round_even(float x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23
  return (x + magic) - magic;
}
NXS_DEVICE float round_down(float x) {
  const float near = round_even(x);
  return near > x ? near - 1.0f : near;
}

// Within 2e-7 of tanh. src/quantization/scalar/fsq.rs is the same function, bit for bit.
NXS_DEVICE float tanh_exactly(float x) {
  const float magnitude = x < 0 ? -x : x;
  if (!(magnitude < 9.5f)) return x != x ? x : x < 0 ? -1.0f : 1.0f;
  // e = exp(2 |x|): 2^n times a polynomial of the rest.
  const float twice = magnitude + magnitude, magic = 12582912.0f;
  const float n = fma(twice, 1.44269504f, magic) - magic;
  float r = fma(n, -0.693145752f, twice);
  r = fma(n, -1.42860677e-6f, r);
  float e = 1.0f / 5040;
  e = fma(e, r, 1.0f / 720);
  e = fma(e, r, 1.0f / 120);
  e = fma(e, r, 1.0f / 24);
  e = fma(e, r, 1.0f / 6);
  e = fma(e, r, 0.5f);
  e = fma(e, r, 1.0f);
  e = fma(e, r, 1.0f);
  e = e * bits_float(static_cast<u32>(static_cast<i32>(n) + 127) << 23);
  const float result = divide(e - 1.0f, e + 1.0f);
  return x < 0 ? -result : result;
}

// The level of a value, as a float; NaN for NaN.
NXS_DEVICE float fsq_level(const FsqParams& q, u32 k, float z) {
  const float levels = static_cast<float>(q.p.levels[k]);
  float level;
  if (q.p.bound == NXS_FSQ_TANH) {
    const float bounded = fma(tanh_exactly(z + q.shift[k]), q.half[k], -q.offset[k]);
    level = round_even(bounded) + static_cast<float>(q.p.levels[k] / 2);
  } else {
    const float bounded = q.p.bound == NXS_FSQ_SYMMETRIC ? tanh_exactly(z) : z < -1.0f ? -1.0f : z > 1.0f ? 1.0f : z;
    level = round_down(fma((levels - 1.0f) * 0.5f, bounded + 1.0f, 0.5f));
  }
  return level < 0 ? 0.0f : level > levels - 1.0f ? levels - 1.0f : level;
}
NXS_DEVICE float fsq_value(const FsqParams& q, u32 k, float level) {
  const float halves = static_cast<float>(q.p.levels[k] / 2), last = static_cast<float>(q.p.levels[k] - 1);
  return q.p.bound == NXS_FSQ_TANH ? divide(level - halves, halves) : divide(level + level - last, last);
}

template <typename Z, typename O>
__global__ void __launch_bounds__(kScalarThreads) fsq_kernel(const __grid_constant__ FsqParams q) {
  const nxs_fsq_params& p = q.p;
  const i64 row = static_cast<i64>(block_index_x()) * kScalarThreads + thread_index();
  if (row >= p.rows) return;
  const u32 dim = p.dim, quantizers = p.quantizers;
  float rest[NXS_FSQ_MOST_DIM], sum[NXS_FSQ_MOST_DIM];
#pragma unroll
  for (u32 k = 0; k < NXS_FSQ_MOST_DIM; ++k) {
    sum[k] = 0;
    rest[k] = 0;
    if (k < dim && p.z_or_null) {
      rest[k] = to_f32(load_global_nc(static_cast<const Z*>(p.z_or_null) + row * dim + k));
      if (p.soft[k] > 0) rest[k] = tanh_exactly(divide(rest[k], p.soft[k])) * p.soft[k];
    }
  }
  bool clamped = false;
  for (u32 n = 0; n < quantizers; ++n) {
    i64 index = 0, basis = 1, left = 0;
    if (!p.z_or_null) {
      const i64 given = load_integer(p.indices_or_null, p.indices_dtype, row * quantizers + n);
      left = given < 0 ? 0 : given >= q.product ? q.product - 1 : given;
      clamped |= left != given;
    }
#pragma unroll
    for (u32 k = 0; k < NXS_FSQ_MOST_DIM; ++k) {
      if (k >= dim) continue;
      const float scale = p.scales[n * NXS_FSQ_MOST_DIM + k];
      float level;
      if (p.z_or_null) {
        level = fsq_level(q, k, divide(rest[k], scale));
        index += (level == level ? static_cast<i64>(level) : 0) * basis;
      } else {
        level = static_cast<float>(left % p.levels[k]);
        left /= p.levels[k];
      }
      basis *= p.levels[k];
      const float value = fsq_value(q, k, level);
      rest[k] = fma(-value, scale, rest[k]);
      sum[k] = fma(value, scale, sum[k]);
    }
    if (p.z_or_null && p.indices_or_null)
      store_integer(p.indices_or_null, p.indices_dtype, row * quantizers + n, index);
  }
  if (p.values_or_null) {
#pragma unroll
    for (u32 k = 0; k < NXS_FSQ_MOST_DIM; ++k)
      if (k < dim) store_global(static_cast<O*>(p.values_or_null) + row * dim + k, from_f32<O>(sum[k]));
  }
  if (clamped && p.flags_or_null) atomic_or_global(p.flags_or_null, NXS_FLAG_CODE_CLAMPED);
}

// ---- tables

template <typename C, typename O, int kVec>
__global__ void __launch_bounds__(kScalarThreads) remap_kernel(const __grid_constant__ nxs_remap_params p) {
  const i64 at = (static_cast<i64>(block_index_x()) * kScalarThreads + thread_index()) * kVec;
  if (at >= p.count) return;
  const Vec<C, kVec> codes = load_chunk_nc<C, kVec>(static_cast<const C*>(p.codes) + at);
  Vec<O, kVec> labels;
  bool clamped = false;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const i64 code = static_cast<i64>(codes.data[i]), entry = code < 0 ? 0 : code >= p.entries ? p.entries - 1 : code;
    clamped |= entry != code;
    labels.data[i] = load_global_nc(static_cast<const O*>(p.table) + entry);
  }
  constexpr int kPiece = detail::kPiece<O, kVec>;
#pragma unroll
  for (int i = 0; i < kVec; i += kPiece) {
    Vec<O, kPiece> piece;
#pragma unroll
    for (int j = 0; j < kPiece; ++j) piece.data[j] = labels.data[i + j];
    store_global(reinterpret_cast<Vec<O, kPiece>*>(static_cast<O*>(p.out) + at + i), piece);
  }
  if (clamped && p.flags_or_null) atomic_or_global(p.flags_or_null, NXS_FLAG_CODE_CLAMPED);
}

}  // namespace nxs::quantization
