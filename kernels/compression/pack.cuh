// Keys and values in few bits, and back: formats, formulas and layouts are those of nextscale.h.
//
// Who does what
//            Rows: 2^n lanes share a row (token, head), eight elements each: a warp takes 1 (dim 256) to 32 rows at
//            once and kPasses times as many one after the other, whose loads are all under way before the first is
//            used. Extremes, sums and the rotation go by shuffles within a row's lanes. Grid x: rows times heads,
//            heads innermost; y: sets.
//            Groups of rows (NXS_PACK_CHANNEL): a block a group and head. It reads the group for the extremes of its
//            channels, which meet in shared memory, and again, from L1 or L2, for the codes.
// Bytes      inputs read once, outputs written once; a gathered row is one contiguous piece.
// FLOPs      an element: about 6 (scaled), 8 (uniform), 25 (Lloyd-Max), and log2(dim) + 1 to rotate it.
// Exact      single f32 operations in a fixed order, as src/compression/pack/host.rs has them; nothing is contracted.
// Limits     dim a multiple of 8 up to 256; rows * heads < 2^31.
#pragma once
#include "common/ptx/launch.cuh"
#include "common/ptx/shared.cuh"
#include "compression/rotation.cuh"

namespace nxs::compression {

constexpr u32 kPackThreads = 256, kPackWarps = kPackThreads / kWarpSize;
constexpr float kBeyond = 576460752303423488.0f;  // 2^59
constexpr float kInfinity = __builtin_huge_valf();

struct PackParams {
  nxs_pack_params p;
  Rotation rotation;
  u32 log2_lanes, group_lanes;  // lanes that share a row; those that share a group
  u32 inline_at;                // where in a slot its numbers are; 0: not there
  u32 most_code;                // 2^bits - 1
  float root, inverse_root;     // of dim
};

enum class Kind { kScaled, kUniform, kLloydMax };

// Rows that the lanes of a row take one after the other.
__host__ NXS_DEVICE constexpr int pack_passes(u64 element, bool wide) { return !wide ? 1 : element == 4 ? 2 : 4; }
__host__ NXS_DEVICE constexpr int unpack_passes(bool wide) { return wide ? 4 : 1; }

// ---- numbers

NXS_DEVICE float as_stored(const PackParams& q, float x) {
  if (q.p.numbers_dtype != NXS_F16) return x;
  x = x < -65504.0f ? -65504.0f : x > 65504.0f ? 65504.0f : x;
  return f16_bits_to_f32(f32_to_f16_bits(x));
}
NXS_DEVICE void store_number(const PackParams& q, i64 at, float x) {
  if (q.p.numbers_dtype == NXS_F16) store_global(static_cast<u16*>(q.p.numbers_or_null) + at, f32_to_f16_bits(x));
  else store_global(static_cast<float*>(q.p.numbers_or_null) + at, x);
}
NXS_DEVICE float load_number(const PackParams& q, const void* from, i64 at) {
  if (q.p.numbers_dtype == NXS_F16) return f16_bits_to_f32(load_global_nc(static_cast<const u16*>(from) + at));
  return load_global_nc(static_cast<const float*>(from) + at);
}
NXS_DEVICE float given_scale(const PackParams& q, u32 set, u32 head) {
  const float scale = load_global_nc(q.p.scales_or_null + set * q.p.scales_stride_set + head * q.p.scales_stride_head);
  return scale > 0 && scale < kInfinity ? scale : 0.0f;
}

// To nearest, ties away from 0.
NXS_DEVICE float to_17_bits(float x) { return bits_float((float_bits(x) + 0x40) & ~0x7fu); }

NXS_DEVICE void scale_and_min(const PackParams& q, float least, float most, float& scale, float& min) {
  min = as_stored(q, least + 0.0f);
  scale = as_stored(q, to_17_bits(divide(most - min, static_cast<float>(q.most_code))));
  if (!(scale >= 0x1p-126f)) scale = 0;
}
NXS_DEVICE float inverse_of(float scale) { return scale > 0 ? divide(1.0f, scale) : 0.0f; }

// To the nearest integer, ties to even, of 0 <= |x| < 2^22: the low bits are its two's complement.
NXS_DEVICE u32 nearest_integer(float x) { return float_bits(x + 12582912.0f); }
NXS_DEVICE u32 uniform_code(float x, float min, float inverse, float most) {
  const float v = multiply(x - min, inverse);
  return nearest_integer(v < 0 ? 0.0f : v > most ? most : v) & 0xff;
}

// ---- codes of eight elements

// All lanes of the warp take part. `to`: of this lane's bits.
template <bool kWide> NXS_DEVICE void store_codes(const PackParams& q, u8* slot, u32 lane, const u32 (&code)[8],
    bool there) {
  const u32 bits = static_cast<u32>(q.p.bits);
  u8* to = slot + lane * bits;
  u64 word = 0;
  if (bits == 8) {
#pragma unroll
    for (u32 i = 0; i < 8; ++i) word |= static_cast<u64>(code[i]) << 8 * i;
  } else {
    u32 low = 0;
#pragma unroll
    for (u32 i = 0; i < 8; ++i) low |= code[i] << (bits * i);
    word = low;
  }
  if constexpr (kWide) {
    if (bits == 8) {
      if (there) store_global(reinterpret_cast<u64*>(to), word);
      return;
    }
    if (bits == 4) {
      if (there) store_global(reinterpret_cast<u32*>(to), static_cast<u32>(word));
      return;
    }
    if (bits == 2) {
      if (there) store_global(reinterpret_cast<u16*>(to), static_cast<u16>(word));
      return;
    }
    if (q.p.dim % 32 == 0) {
      // Of four lanes' 24 bits three make a word each.
      const u32 mine = static_cast<u32>(word), part = lane % 4, next = shuffle_down(mine, 1);
      const u32 three = mine >> 8 * part | next << (24 - 8 * part);
      if (there && part < 3) store_global(reinterpret_cast<u32*>(slot + lane / 4 * 12) + part, three);
      return;
    }
  }
  if (there)
    for (u32 i = 0; i < bits; ++i) store_global(to + i, static_cast<u8>(word >> 8 * i));
}

template <bool kWide> NXS_DEVICE u64 load_codes(const PackParams& q, const u8* slot, u32 lane) {
  const u32 bits = static_cast<u32>(q.p.bits);
  const u8* from = slot + lane * bits;
  if constexpr (kWide) {
    if (bits == 8) return load_global_nc(reinterpret_cast<const u64*>(from));
    if (bits == 4) return load_global_nc(reinterpret_cast<const u32*>(from));
    if (bits == 2) return load_global_nc(reinterpret_cast<const u16*>(from));
  }
  u64 word = 0;
  for (u32 i = 0; i < bits; ++i) word |= static_cast<u64>(load_global_nc(from + i)) << 8 * i;
  return word;
}

// ---- rows

// Rows of a (set, head) that there are.
NXS_DEVICE u32 rows_of(const PackParams& q, u32 set, u32 head, u32& flags) {
  const i64 rows = q.p.rows;
  if (!q.p.counts_or_null) return static_cast<u32>(rows);
  const i64 count = load_global_nc(q.p.counts_or_null + set * q.p.counts_stride_set + head * q.p.counts_stride_head);
  const i64 clamped = count < 0 ? 0 : count > rows ? rows : count;
  if (clamped != count) flags |= NXS_PACK_COUNT_CLAMPED;
  return static_cast<u32>(clamped);
}
NXS_DEVICE i64 token_of(const PackParams& q, u32 set, u32 head, u32 row, u32& flags) {
  if (!q.p.kept_or_null) return row;
  const i64 kept = load_global_nc(q.p.kept_or_null + set * q.p.kept_stride_set + head * q.p.kept_stride_head + row);
  const i64 clamped = kept < 0 ? 0 : kept >= q.p.tokens ? q.p.tokens - 1 : kept;
  if (clamped != kept) flags |= NXS_PACK_ROW_CLAMPED;
  return clamped;
}
NXS_DEVICE void raise(const PackParams& q, u32 flags) {
  if (flags && q.p.flags_or_null) atomic_or_global(q.p.flags_or_null, flags);
}

// Among the `lanes` neighbours of a row or group.
template <typename F> NXS_DEVICE float among(float value, u32 lanes, const F& f) {
  for (u32 apart = 1; apart < lanes; apart *= 2) value = f(value, shuffle_xor(value, apart));
  return value;
}
NXS_DEVICE float greater(float a, float b) { return maximum(a, b); }
NXS_DEVICE float lesser(float a, float b) { return b < a ? b : a; }
NXS_DEVICE float plus(float a, float b) { return a + b; }

NXS_DEVICE float greatest_magnitude(const float (&x)[8]) {
  float most = 0;
#pragma unroll
  for (u32 i = 0; i < 8; ++i) most = maximum(most, fabsf(x[i]));
  return most;
}
NXS_DEVICE float tamed(float x, float most) {
  if (x != x) return 0.0f;
  return fabsf(x) < kBeyond ? x : x < 0 ? -most : most;
}

// A warp's share of rows times heads of a set, one lane's part of it.
struct Unit {
  u32 row, head;
  bool there;
};
template <int kPasses> NXS_DEVICE void find_units(const PackParams& q, u32 set, Unit (&unit)[kPasses], u32& flags) {
  const u32 lane = thread_index() % kWarpSize, within = lane & ((1u << q.log2_lanes) - 1);
  const u32 heads = static_cast<u32>(q.p.heads), units = static_cast<u32>(q.p.rows) * heads;
  const u32 at_once = kWarpSize >> q.log2_lanes;
  const u32 warp = block_index_x() * kPackWarps + thread_index() / kWarpSize;
  const u32 first = warp * kPasses * at_once + (lane >> q.log2_lanes);
#pragma unroll
  for (u32 i = 0; i < kPasses; ++i) {
    const u32 number = first + i * at_once;
    unit[i].row = number / heads;
    unit[i].head = number - unit[i].row * heads;
    unit[i].there = number < units && within * 8 < static_cast<u32>(q.p.dim);
    if (unit[i].there && q.p.counts_or_null) unit[i].there = unit[i].row < rows_of(q, set, unit[i].head, flags);
  }
}
NXS_DEVICE u8* slot_of(const PackParams& q, u32 set, const Unit& unit) {
  return q.p.codes + set * q.p.codes_stride_set + unit.row * q.p.codes_stride_row + unit.head * q.p.codes_stride_head;
}
NXS_DEVICE i64 numbers_of(const PackParams& q, u32 set, const Unit& unit) {
  return set * q.p.numbers_stride_set + unit.row * q.p.numbers_stride_row + unit.head * q.p.numbers_stride_head;
}

// Numbers of a row with one group, or of one of its groups, by the first lane of those that share them.
template <int kCount>
NXS_DEVICE void store_numbers(const PackParams& q, u32 set, const Unit& unit, u8* slot, u32 lane,
    const float (&number)[kCount]) {
  if (!unit.there || lane % q.group_lanes != 0) return;
  if (q.inline_at) {
    Vec<u32, 4> words = {{0, 0, 0, 0}};
    if (q.p.numbers_dtype == NXS_F16) {
      words.data[0] = f32_to_f16_bits(number[0]);
      if (kCount == 2) words.data[0] |= static_cast<u32>(f32_to_f16_bits(number[kCount - 1])) << 16;
    } else {
      words.data[0] = float_bits(number[0]);
      if (kCount == 2) words.data[1] = float_bits(number[kCount - 1]);
    }
    store_global(reinterpret_cast<Vec<u32, 4>*>(slot + q.inline_at), words);
    for (u32 i = static_cast<u32>(q.p.dim * q.p.bits) / 8; i < q.inline_at; ++i) store_global(slot + i, u8{0});
  } else if (q.p.numbers_or_null) {
    const i64 at = numbers_of(q, set, unit) + lane / q.group_lanes * kCount;
#pragma unroll
    for (u32 i = 0; i < kCount; ++i) store_number(q, at + i, number[i]);
  }
}

template <typename T, Kind kKind, bool kWide>
__global__ void __launch_bounds__(kPackThreads, 3) pack_kernel(const __grid_constant__ PackParams q) {
  constexpr int kPasses = pack_passes(sizeof(T), kWide);
  const nxs_pack_params& p = q.p;
  const u32 set = block_index_y(), lanes = 1u << q.log2_lanes, lane = thread_index() & (lanes - 1);
  u32 flags = 0;
  Unit unit[kPasses];
  find_units(q, set, unit, flags);
  i64 token[kPasses];
#pragma unroll
  for (u32 i = 0; i < kPasses; ++i) token[i] = unit[i].there ? token_of(q, set, unit[i].head, unit[i].row, flags) : 0;
  Vec<T, 8> raw[kPasses];
#pragma unroll
  for (u32 i = 0; i < kPasses; ++i) {
    raw[i] = Vec<T, 8>{};
    if (unit[i].there)
      raw[i] = load_eight<T, kWide>(static_cast<const T*>(p.unpacked) + set * p.unpacked_stride_set +
                                    token[i] * p.unpacked_stride_row + unit[i].head * p.unpacked_stride_head + lane * 8);
  }

#pragma unroll
  for (u32 pass = 0; pass < kPasses; ++pass) {
    float x[8];
    bool beyond = false;
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
      x[i] = to_f32(raw[pass].data[i]);
      beyond |= !(fabsf(x[i]) < kBeyond);
    }
    if (warp_any(beyond)) {
      float most = 0;
#pragma unroll
      for (u32 i = 0; i < 8; ++i) most = maximum(most, fabsf(x[i]) < kBeyond ? fabsf(x[i]) : 0.0f);
      most = among(most, lanes, greater);
#pragma unroll
      for (u32 i = 0; i < 8; ++i) x[i] = tamed(x[i], most);
      if (beyond) flags |= NXS_PACK_NOT_FINITE;
    }
    if (p.rotate) q.rotation.apply(x, lane);

    const Unit& here = unit[pass];
    u8* slot = slot_of(q, set, here);
    u32 code[8];
    if constexpr (kKind == Kind::kScaled) {
      float scale;
      if (p.scales_or_null) {
        scale = here.there ? given_scale(q, set, here.head) : 0.0f;
      } else {
        const float most = among(greatest_magnitude(x), lanes, greater);
        scale = maximum(divide(most, p.format == NXS_PACK_FP8 ? 448.0f : 127.0f), 0x1p-96f);
        scale = to_17_bits(scale);
      }
      const float inverse = inverse_of(scale);
      if (p.format == NXS_PACK_FP8) {
#pragma unroll
        for (u32 i = 0; i < 8; i += 2) {
          const u32 pair = f32x2_to_e4m3x2_bits(multiply(x[i], inverse), multiply(x[i + 1], inverse));
          code[i] = pair & 0xff;
          code[i + 1] = pair >> 8;
        }
      } else {
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
          const float v = multiply(x[i], inverse);
          code[i] = nearest_integer(v < -127.0f ? -127.0f : v > 127.0f ? 127.0f : v) & 0xff;
        }
      }
      store_numbers<1>(q, set, here, slot, lane, {scale});
    }
    if constexpr (kKind == Kind::kUniform) {
      const bool inside = lane * 8 < static_cast<u32>(p.dim);
      float least = x[0], most = x[0];
#pragma unroll
      for (u32 i = 1; i < 8; ++i) {
        least = lesser(least, x[i]);
        most = maximum(most, x[i]);
      }
      least = among(inside ? least : kInfinity, q.group_lanes, lesser);
      most = among(inside ? most : -kInfinity, q.group_lanes, greater);
      float scale, min;
      scale_and_min(q, least, most, scale, min);
      const float inverse = inverse_of(scale);
#pragma unroll
      for (u32 i = 0; i < 8; ++i) code[i] = uniform_code(x[i], min, inverse, static_cast<float>(q.most_code));
      store_numbers<2>(q, set, here, slot, lane, {scale, min});
    }
    if constexpr (kKind == Kind::kLloydMax) {
      const u32 half = (q.most_code + 1) / 2;
      float sum = 0;
#pragma unroll
      for (u32 i = 0; i < 8; ++i) sum = fma(x[i], x[i], sum);
      const float norm = square_root(among(sum, lanes, plus));
      const float inverse = norm > 0 ? divide(q.root, norm) : 0.0f;
      u32 place[8];
#pragma unroll
      for (u32 i = 0; i < 8; ++i) {
        const float u = multiply(x[i], inverse);
        place[i] = 0;
#pragma unroll
        for (u32 j = 0; j < 7; ++j) place[i] += fabsf(u) > p.thresholds[j] ? 1 : 0;
        code[i] = u < 0 ? half - 1 - place[i] : half + place[i];
      }
      float kept = norm;
      if (p.renormalize) {
        const float mine = p.centroids[thread_index() % 8];
        sum = 0;
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
          const float centroid = shuffle(mine, place[i]);
          sum = fma(centroid, centroid, sum);
        }
        sum = lane * 8 < static_cast<u32>(p.dim) ? sum : 0.0f;
        kept = multiply(norm, divide(q.root, square_root(among(sum, lanes, plus))));
      }
      store_numbers<1>(q, set, here, slot, lane, {as_stored(q, kept)});
    }
    store_codes<kWide>(q, slot, lane, code, here.there);
  }
  raise(q, flags);
}

template <typename T, Kind kKind, bool kWide>
__global__ void __launch_bounds__(kPackThreads) unpack_kernel(const __grid_constant__ PackParams q) {
  constexpr int kPasses = unpack_passes(kWide);
  const nxs_pack_params& p = q.p;
  const u32 set = block_index_y(), lanes = 1u << q.log2_lanes, lane = thread_index() & (lanes - 1);
  u32 flags = 0;
  Unit unit[kPasses];
  find_units(q, set, unit, flags);
  u64 word[kPasses];
  float number[kPasses][2];
#pragma unroll
  for (u32 i = 0; i < kPasses; ++i) {
    word[i] = 0;
    number[i][0] = 0;
    number[i][1] = 0;
    if (!unit[i].there) continue;
    const u8* slot = slot_of(q, set, unit[i]);
    word[i] = load_codes<kWide>(q, slot, lane);
    if (kKind == Kind::kScaled && p.scales_or_null) {
      number[i][0] = given_scale(q, set, unit[i].head);
      continue;
    }
    constexpr u32 kCount = kKind == Kind::kUniform ? 2 : 1;
    const void* from = q.inline_at ? static_cast<const void*>(slot + q.inline_at) : p.numbers_or_null;
    const i64 at = q.inline_at ? 0 : numbers_of(q, set, unit[i]) + lane / q.group_lanes * kCount;
#pragma unroll
    for (u32 j = 0; j < kCount; ++j) number[i][j] = load_number(q, from, at + j);
  }
  float table = 0;
  if (kKind == Kind::kLloydMax) table = p.centroids[thread_index() % 8];

#pragma unroll
  for (u32 pass = 0; pass < kPasses; ++pass) {
    float x[8];
    if constexpr (kKind == Kind::kScaled) {
      const float scale = number[pass][0];
      if (p.format == NXS_PACK_FP8) {
#pragma unroll
        for (u32 i = 0; i < 8; i += 2) {
          const u32 pair = e4m3x2_to_f16x2_bits(static_cast<u16>(word[pass] >> 8 * i));
          x[i] = multiply(f16_bits_to_f32(static_cast<u16>(pair)), scale);
          x[i + 1] = multiply(f16_bits_to_f32(static_cast<u16>(pair >> 16)), scale);
        }
      } else {
#pragma unroll
        for (u32 i = 0; i < 8; ++i)
          x[i] = multiply(static_cast<float>(static_cast<int8_t>(word[pass] >> 8 * i)), scale);
      }
    } else {
      const u32 bits = static_cast<u32>(p.bits), half = (q.most_code + 1) / 2;
      const float gain = multiply(number[pass][0], q.inverse_root);
#pragma unroll
      for (u32 i = 0; i < 8; ++i) {
        const u32 code = static_cast<u32>(word[pass] >> bits * i) & q.most_code;
        if constexpr (kKind == Kind::kUniform) {
          x[i] = fma(static_cast<float>(code), number[pass][0], number[pass][1]);
        } else {
          const float centroid = shuffle(table, code >= half ? code - half : half - 1 - code);
          x[i] = multiply(gain, code >= half ? centroid : -centroid);
        }
      }
    }
    if (p.rotate) q.rotation.invert(x, lane);
    const Unit& here = unit[pass];
    T* to = static_cast<T*>(p.unpacked) + set * p.unpacked_stride_set + here.row * p.unpacked_stride_row +
            here.head * p.unpacked_stride_head + lane * 8;
    store_eight_if<T, kWide>(to, x, here.there);
  }
  raise(q, flags);
}

// ---- groups of rows

// Shared memory: of each warp the extremes and the greatest magnitude of each channel; then of the block min, 1 /
// scale (or scale) and that magnitude.
constexpr u32 kChannels = 256, kChannelBytes = (kPackWarps + 1) * 3 * kChannels * 4;
NXS_DEVICE u32 channel_at(u32 shared, u32 warp, u32 which, u32 channel) {
  return shared + ((warp * 3 + which) * kChannels + channel) * 4;
}

struct Group {
  u32 set, head, number, first, rows;
};
NXS_DEVICE Group group_of(const PackParams& q, u32& flags) {
  const u32 heads = static_cast<u32>(q.p.heads), size = static_cast<u32>(q.p.group);
  Group group;
  group.set = block_index_y();
  group.number = block_index_x() / heads;
  group.head = block_index_x() - group.number * heads;
  group.first = group.number * size;
  const u32 rows = rows_of(q, group.set, group.head, flags);
  group.rows = rows <= group.first ? 0 : rows - group.first < size ? rows - group.first : size;
  return group;
}

template <typename T, bool kWide>
__global__ void __launch_bounds__(kPackThreads, 3) pack_channels_kernel(const __grid_constant__ PackParams q) {
  const nxs_pack_params& p = q.p;
  const u32 shared = dynamic_shared(), thread = thread_index(), lanes = 1u << q.log2_lanes, lane = thread & (lanes - 1);
  const u32 dim = static_cast<u32>(p.dim), rows_at_once = kPackThreads >> q.log2_lanes, mine = thread >> q.log2_lanes;
  u32 flags = 0;
  const Group group = group_of(q, flags);
  if (group.rows == 0) return raise(q, flags);
  const bool inside = lane * 8 < dim;
  const T* input = static_cast<const T*>(p.unpacked) + group.set * p.unpacked_stride_set + group.head * p.unpacked_stride_head +
                   lane * 8;

  float least[8], most[8], magnitude[8];
#pragma unroll
  for (u32 i = 0; i < 8; ++i) {
    least[i] = kInfinity;
    most[i] = -kInfinity;
    magnitude[i] = 0;
  }
  // What is beyond goes into the extremes as an infinity, which becomes the greatest magnitude at the end.
#pragma unroll 4
  for (u32 row = mine; row < group.rows; row += rows_at_once) {
    if (!inside) break;
    const i64 token = token_of(q, group.set, group.head, group.first + row, flags);
    const auto raw = load_eight<T, kWide>(input + token * p.unpacked_stride_row);
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
      const float x = tamed(to_f32(raw.data[i]), kInfinity);
      if (!(fabsf(to_f32(raw.data[i])) < kBeyond)) flags |= NXS_PACK_NOT_FINITE;
      least[i] = lesser(least[i], x);
      most[i] = maximum(most[i], x);
      magnitude[i] = maximum(magnitude[i], fabsf(x) < kInfinity ? fabsf(x) : 0.0f);
    }
  }
#pragma unroll
  for (u32 i = 0; i < 8; ++i)
    for (u32 apart = lanes; apart < kWarpSize; apart *= 2) {
      least[i] = lesser(least[i], shuffle_xor(least[i], apart));
      most[i] = maximum(most[i], shuffle_xor(most[i], apart));
      magnitude[i] = maximum(magnitude[i], shuffle_xor(magnitude[i], apart));
    }
  const u32 warp = thread / kWarpSize;
  if (thread % kWarpSize < lanes && inside) {
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
      store_shared(channel_at(shared, warp, 0, lane * 8 + i), least[i]);
      store_shared(channel_at(shared, warp, 1, lane * 8 + i), most[i]);
      store_shared(channel_at(shared, warp, 2, lane * 8 + i), magnitude[i]);
    }
  }
  block_sync();
  for (u32 channel = thread; channel < dim; channel += kPackThreads) {
    float low = kInfinity, high = -kInfinity, all = 0;
#pragma unroll
    for (u32 w = 0; w < kPackWarps; ++w) {
      low = lesser(low, load_shared<float>(channel_at(shared, w, 0, channel)));
      high = maximum(high, load_shared<float>(channel_at(shared, w, 1, channel)));
      all = maximum(all, load_shared<float>(channel_at(shared, w, 2, channel)));
    }
    float scale, min;
    scale_and_min(q, tamed(low, all), tamed(high, all), scale, min);
    const i64 at = group.set * p.numbers_stride_set + group.number * p.numbers_stride_row + group.head * p.numbers_stride_head;
    store_number(q, at + 2 * channel, scale);
    store_number(q, at + 2 * channel + 1, min);
    store_shared(channel_at(shared, kPackWarps, 0, channel), min);
    store_shared(channel_at(shared, kPackWarps, 1, channel), inverse_of(scale));
    store_shared(channel_at(shared, kPackWarps, 2, channel), all);
  }
  block_sync();
  float min[8], inverse[8];
#pragma unroll
  for (u32 i = 0; i < 8; ++i) {
    min[i] = inside ? load_shared<float>(channel_at(shared, kPackWarps, 0, lane * 8 + i)) : 0.0f;
    inverse[i] = inside ? load_shared<float>(channel_at(shared, kPackWarps, 1, lane * 8 + i)) : 0.0f;
    magnitude[i] = inside ? load_shared<float>(channel_at(shared, kPackWarps, 2, lane * 8 + i)) : 0.0f;
  }
  // As many rounds for each thread: the lanes of a warp store together.
#pragma unroll 4
  for (u32 first = 0; first < group.rows; first += rows_at_once) {
    const u32 row = first + mine;
    const Unit unit = {group.first + row, group.head, inside && row < group.rows};
    Vec<T, 8> raw = {};
    if (unit.there)
      raw = load_eight<T, kWide>(input + token_of(q, group.set, group.head, unit.row, flags) * p.unpacked_stride_row);
    u32 code[8];
#pragma unroll
    for (u32 i = 0; i < 8; ++i)
      code[i] = uniform_code(tamed(to_f32(raw.data[i]), magnitude[i]), min[i], inverse[i],
          static_cast<float>(q.most_code));
    store_codes<kWide>(q, slot_of(q, group.set, unit), lane, code, unit.there);
  }
  raise(q, flags);
}

template <typename T, bool kWide>
__global__ void __launch_bounds__(kPackThreads, 3) unpack_channels_kernel(const __grid_constant__ PackParams q) {
  const nxs_pack_params& p = q.p;
  const u32 thread = thread_index(), lanes = 1u << q.log2_lanes, lane = thread & (lanes - 1);
  const u32 rows_at_once = kPackThreads >> q.log2_lanes, mine = thread >> q.log2_lanes, bits = static_cast<u32>(p.bits);
  u32 flags = 0;
  const Group group = group_of(q, flags);
  raise(q, flags);
  if (group.rows == 0 || lane * 8 >= static_cast<u32>(p.dim)) return;
  float scale[8], min[8];
  const i64 at = group.set * p.numbers_stride_set + group.number * p.numbers_stride_row + group.head * p.numbers_stride_head +
                 lane * 16;
#pragma unroll
  for (u32 i = 0; i < 8; ++i) {
    scale[i] = load_number(q, p.numbers_or_null, at + 2 * i);
    min[i] = load_number(q, p.numbers_or_null, at + 2 * i + 1);
  }
#pragma unroll 4
  for (u32 row = mine; row < group.rows; row += rows_at_once) {
    const Unit unit = {group.first + row, group.head, true};
    const u64 word = load_codes<kWide>(q, slot_of(q, group.set, unit), lane);
    float x[8];
#pragma unroll
    for (u32 i = 0; i < 8; ++i)
      x[i] = fma(static_cast<float>(static_cast<u32>(word >> bits * i) & q.most_code), scale[i], min[i]);
    T* to = static_cast<T*>(p.unpacked) + group.set * p.unpacked_stride_set + unit.row * p.unpacked_stride_row +
            unit.head * p.unpacked_stride_head + lane * 8;
    store_eight_if<T, kWide>(to, x, true);
  }
}

// ---- launches: one file for each dtype and direction

template <typename T, bool kWide> nxs_status pack_for_access(const PackParams& q, const LaunchShape& shape,
    void* stream) {
  switch (q.p.format) {
    case NXS_PACK_UNIFORM: return launch(pack_kernel<T, Kind::kUniform, kWide>, shape, stream, q);
    case NXS_PACK_LLOYD_MAX: return launch(pack_kernel<T, Kind::kLloydMax, kWide>, shape, stream, q);
    case NXS_PACK_CHANNEL: return launch(pack_channels_kernel<T, kWide>, shape, stream, q);
    default: return launch(pack_kernel<T, Kind::kScaled, kWide>, shape, stream, q);
  }
}
template <typename T, bool kWide> nxs_status unpack_for_access(const PackParams& q, const LaunchShape& shape,
    void* stream) {
  switch (q.p.format) {
    case NXS_PACK_UNIFORM: return launch(unpack_kernel<T, Kind::kUniform, kWide>, shape, stream, q);
    case NXS_PACK_LLOYD_MAX: return launch(unpack_kernel<T, Kind::kLloydMax, kWide>, shape, stream, q);
    case NXS_PACK_CHANNEL: return launch(unpack_channels_kernel<T, kWide>, shape, stream, q);
    default: return launch(unpack_kernel<T, Kind::kScaled, kWide>, shape, stream, q);
  }
}

template <typename T> LaunchShape pack_shape(const PackParams& q) {
  const i64 heads = q.p.heads;
  LaunchShape shape;
  shape.block = kPackThreads;
  i64 blocks = q.p.rows / (q.p.group > 0 ? q.p.group : 1) * heads;
  if (q.p.format == NXS_PACK_CHANNEL) {
    if (!q.p.unpack) shape.dynamic_smem = kChannelBytes;
  } else {
    const i64 passes = q.p.unpack ? unpack_passes(q.p.vector) : pack_passes(sizeof(T), q.p.vector);
    const i64 units = (i64{kPackThreads} >> q.log2_lanes) * passes;
    blocks = (q.p.rows * heads + units - 1) / units;
  }
  shape.grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(q.p.sets));
  return shape;
}
template <typename T> nxs_status pack_rows(const PackParams& q, void* stream) {
  return q.p.vector ? pack_for_access<T, true>(q, pack_shape<T>(q), stream)
                    : pack_for_access<T, false>(q, pack_shape<T>(q), stream);
}
template <typename T> nxs_status unpack_rows(const PackParams& q, void* stream) {
  return q.p.vector ? unpack_for_access<T, true>(q, pack_shape<T>(q), stream)
                    : unpack_for_access<T, false>(q, pack_shape<T>(q), stream);
}

// Of the instantiation files.
template <typename T> nxs_status pack_of(const PackParams& q, void* stream);
template <typename T> nxs_status unpack_of(const PackParams& q, void* stream);

}  // namespace nxs::compression
