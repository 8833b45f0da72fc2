// RVQ decode: out[b, r, :] = round(sum over l ascending of codebooks[l, codes[b, l, r], :]), summed in f32 from +0.
//
// Layouts    codes [batch, levels, rows] strided; codebooks [levels, entries, dim] (level stride 0: shared);
//            out [batch, rows, dim]. Shapes, dtypes and flags are described in nextscale.h.
// Who does what
//            A row of `dim` elements is cut into chunks of kVec elements (16 bytes of codebook, or one element).
//            `lanes` = 2^log2_lanes threads share a row (the plan's choice); a block of 256 threads owns 256 / lanes rows;
//            the grid covers the flattened rows b * rows + r. Each thread walks its row's chunks lane, lane + lanes, ...
//            and for each one adds the levels in groups of eight, then of four, two and one: all codes of a group are
//            loaded, then all rows, then added in ascending order. No shared memory, no barrier.
//            Schedule in src/quantization/rvq_decode/plan.rs walks the same cells; its tests prove that every output
//            is owned once.
// Bytes      gathered: batch * rows * levels * dim * sizeof(codebook); written: batch * rows * dim * sizeof(out);
//            codes read once per chunk pass (broadcast in the warp). The codebooks (4 MiB at 8 x 1024 x 128 f32) live
//            in L2, so the L2 read rate is the limit unless levels * sizeof(codebook) is small against sizeof(out).
// FLOPs      batch * rows * levels * dim additions.
// Determinism bitwise: one addition order, no atomics but the flag.
// Limits     levels <= 65536, dim <= 2^20, entries < 2^31, bytes between entries < 2^32, fewer than 2^31 blocks.
#pragma once
#include "common/dtype.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/memory.cuh"

namespace nxs::quantization {

constexpr int kRvqDecodeThreads = 256;

// The entry nearest to a code, and whether they differ. Unsigned codes stay in 32 bits: this runs per level and chunk, and
// the kernel is nearly as short of instruction slots as of L2 bandwidth.
template <typename Code> NXS_DEVICE u32 clamp_code(Code code, u32 last_entry, bool& clamped) {
  if constexpr (sizeof(Code) == 8) {
    const i64 entry = code < 0 ? 0 : code > last_entry ? last_entry : code;
    clamped |= entry != code;
    return static_cast<u32>(entry);
  } else {
    clamped |= code > last_entry;
    return code > last_entry ? last_entry : code;
  }
}

// Adds levels [level, level + kLevels) to the sums of one chunk. Everything is loaded before anything is added, so that
// kLevels rows are in flight. A null code is loaded as entry 0 and left out of the sum; without kNull there is none, which
// spares the predicates that would make ptxas serialise the loads.
template <int kLevels, bool kNull, typename Code, typename E, int kVec>
NXS_DEVICE void add_levels(const nxs_rvq_decode_params& p, const Code* codes, const E* books, i32 level,
                           float (&sum)[kVec], bool& clamped) {
  codes += level * p.codes_stride_level;
  books += level * p.codebooks_stride_level;
  const u32 last_entry = static_cast<u32>(p.entries - 1), stride = static_cast<u32>(p.codebooks_stride_entry * sizeof(E));
  Code code[kLevels];
#pragma unroll
  for (int i = 0; i < kLevels; ++i) code[i] = load_global_nc(codes + i * p.codes_stride_level);
  Vec<E, kVec> value[kLevels];
  bool add[kLevels];
#pragma unroll
  for (int i = 0; i < kLevels; ++i) {
    add[i] = !kNull || static_cast<i64>(code[i]) != p.null_code;
    const u32 entry = clamp_code(add[i] ? code[i] : Code{0}, last_entry, clamped);
    const char* row = reinterpret_cast<const char*>(books + i * p.codebooks_stride_level);
    value[i] = load_global_nc(reinterpret_cast<const Vec<E, kVec>*>(row + static_cast<u64>(entry) * stride));
  }
#pragma unroll
  for (int i = 0; i < kLevels; ++i)
    if (add[i])
#pragma unroll
      for (int j = 0; j < kVec; ++j) sum[j] += to_f32(value[i].data[j]);
}

template <bool kNull, typename Code, typename E, int kVec>
NXS_DEVICE void add_all_levels(const nxs_rvq_decode_params& p, const Code* codes, const E* books, float (&sum)[kVec],
                               bool& clamped) {
  i32 level = 0;
  for (; level + 8 <= p.levels; level += 8) add_levels<8, kNull>(p, codes, books, level, sum, clamped);
  if (p.levels & 4) add_levels<4, kNull>(p, codes, books, level, sum, clamped), level += 4;
  if (p.levels & 2) add_levels<2, kNull>(p, codes, books, level, sum, clamped), level += 2;
  if (p.levels & 1) add_levels<1, kNull>(p, codes, books, level, sum, clamped);
}

template <typename Code, typename E, typename O, int kVec>
__global__ void __launch_bounds__(kRvqDecodeThreads, 4)
    rvq_decode_kernel(const __grid_constant__ nxs_rvq_decode_params p) {
  const u32 log2_lanes = static_cast<u32>(p.log2_lanes);
  const u32 lane = thread_index() & ((1u << log2_lanes) - 1);
  const i64 row = static_cast<i64>(block_index_x()) * (kRvqDecodeThreads >> log2_lanes) + (thread_index() >> log2_lanes);
  if (row >= p.batch * p.rows) return;

  // 64-bit division costs a hundred instructions; real problems fit in 32 bits.
  i64 b = 0, r = row;
  if (p.batch > 1) {
    b = (row >> 32) == 0 && (p.rows >> 32) == 0 ? static_cast<i64>(static_cast<u32>(row) / static_cast<u32>(p.rows))
                                                : row / p.rows;
    r = row - b * p.rows;
  }
  const Code* codes = static_cast<const Code*>(p.codes) + b * p.codes_stride_batch + r * p.codes_stride_row;
  O* out = static_cast<O*>(p.out) + b * p.out_stride_batch + r * p.out_stride_row;

  bool clamped = false;
  for (i32 d = static_cast<i32>(lane) * kVec; d < p.dim; d += kVec << log2_lanes) {
    const E* books = static_cast<const E*>(p.codebooks) + d;
    float sum[kVec] = {};
    if (p.has_null_code)
      add_all_levels<true>(p, codes, books, sum, clamped);
    else
      add_all_levels<false>(p, codes, books, sum, clamped);

    // kVec outputs are up to 32 bytes (f32 from a 16-bit codebook): store them 16 bytes at a time.
    constexpr int kStore = kVec * sizeof(O) > 16 ? 16 / sizeof(O) : kVec;
#pragma unroll
    for (int j = 0; j < kVec; j += kStore) {
      Vec<O, kStore> rounded;
#pragma unroll
      for (int k = 0; k < kStore; ++k) rounded.data[k] = from_f32<O>(sum[j + k]);
      store_global_streaming(reinterpret_cast<Vec<O, kStore>*>(out + d + j), rounded);
    }
  }
  if (clamped && p.flags_or_null) atomic_or_global(p.flags_or_null, NXS_FLAG_CODE_CLAMPED);
}

template <typename Code, typename E, typename O>
nxs_status rvq_decode_launch(const nxs_rvq_decode_params& p, void* stream) {
  const i64 rows_per_block = kRvqDecodeThreads >> p.log2_lanes;
  const i64 blocks = (p.batch * p.rows + rows_per_block - 1) / rows_per_block;
  NXS_REQUIRE(blocks < (i64{1} << 31), NXS_E_SHAPE);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(blocks));
  shape.block = kRvqDecodeThreads;
  return p.vector ? launch(rvq_decode_kernel<Code, E, O, 16 / sizeof(E)>, shape, stream, p)
                  : launch(rvq_decode_kernel<Code, E, O, 1>, shape, stream, p);
}

// One instantiation file per codebook dtype (rvq_decode_<dtype>.cu) picks the rest.
template <typename E> nxs_status rvq_decode(const nxs_rvq_decode_params& p, void* stream);

template <typename E, typename O> nxs_status rvq_decode_for_codes(const nxs_rvq_decode_params& p, void* stream) {
  switch (p.codes_dtype) {
    case NXS_U16: return rvq_decode_launch<u16, E, O>(p, stream);
    case NXS_U32: return rvq_decode_launch<u32, E, O>(p, stream);
    case NXS_I64: return rvq_decode_launch<i64, E, O>(p, stream);
    default: return NXS_E_DTYPE;
  }
}

template <typename E> nxs_status rvq_decode_for_out(const nxs_rvq_decode_params& p, void* stream) {
  switch (p.out_dtype) {
    case NXS_F32: return rvq_decode_for_codes<E, float>(p, stream);
    case NXS_F16: return rvq_decode_for_codes<E, f16>(p, stream);
    case NXS_BF16: return rvq_decode_for_codes<E, bf16>(p, stream);
    default: return NXS_E_DTYPE;
  }
}

}  // namespace nxs::quantization
