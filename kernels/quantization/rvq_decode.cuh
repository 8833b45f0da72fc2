// RVQ decode: out[b, r, :] = round(sum over l ascending of codebooks[l, codes[b, l, r], :]), summed in f32 from +0.
//
// Layouts    codes [batch, levels, rows] strided; codebooks [levels, entries, dim] (level stride 0: shared);
//            out [batch, rows, dim]. Shapes, dtypes and flags are described in nextscale.h.
// Who does what
//            A row of `dim` elements is cut into chunks of kVec elements: 16 bytes of codebook, or one element. Two
//            kernels; the plan picks one. Neither needs shared memory or a barrier.
//            rows    one thread a chunk; 2^log2_lanes threads share a row and walk its chunks if they are more; a block of
//                    128 threads owns 128 >> log2_lanes rows. Each thread reads the codes itself. Any problem.
//            tiles   for many rows: a warp owns kPasses * (32 >> log2_lanes) rows, or a slice of 32 chunks of them
//                    (blockIdx.y). The lanes of a row read 8 codes together, clamp them and make them offsets once, and
//                    hand those round by shuffles. The loads of all passes stand in one stretch of code, and ptxas keeps as
//                    many in flight as registers allow. A third of the instructions of `rows`, which is what lets it reach
//                    the limit of L2. No null code; the codebooks span less than 4 GiB.
//            Both add the levels in ascending order, eight at a time, then four, two and one.
//            Schedule in src/quantization/rvq_decode/plan.rs walks the same cells; its tests prove that every output
//            is owned once.
// Bytes      gathered: batch * rows * levels * dim * sizeof(codebook); written: batch * rows * dim * sizeof(out);
//            codes read once per row and slice. The codebooks (4 MiB at 8 x 1024 x 128 f32) live
//            in L2, so the L2 read rate is the limit unless levels * sizeof(codebook) is small against sizeof(out).
// FLOPs      batch * rows * levels * dim additions.
// Determinism bitwise: one addition order, no atomics but the flag.
// Limits     levels <= 65536, dim <= 2^20, entries < 2^31, bytes between entries < 2^32, rows < 2^31.
#pragma once
#include "common/chunk.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/warp.cuh"

namespace nxs::quantization {

constexpr int kRowsThreads = 128, kTilesThreads = 64;

// The entry nearest to a code, and whether they differ. Unsigned codes stay in 32 bits.
template <typename Code> NXS_DEVICE u32 clamp_code(Code code, u32 last_entry, bool& clamped) {
  if constexpr (sizeof(Code) == 8) {
    // Both halves at once only here: a code that fits has an upper half of zeroes.
    const u32 low = static_cast<u32>(code);
    const bool fits = static_cast<u64>(code) <= last_entry;
    clamped |= !fits;
    return fits ? low : code < 0 ? 0 : last_entry;
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

// A row of the whole batch as batch entry and row of it. 64-bit division costs a hundred instructions, and rows fit in 32.
struct BatchRow {
  u32 batch, row;
};
NXS_DEVICE BatchRow split_row(const nxs_rvq_decode_params& p, u32 row) {
  const u32 batch = p.batch == 1 ? 0 : row / static_cast<u32>(p.rows);
  return {batch, row - batch * static_cast<u32>(p.rows)};
}

template <typename Code, typename E, typename O, int kVec>
__global__ void __launch_bounds__(kRowsThreads, 6)
    rvq_decode_rows_kernel(const __grid_constant__ nxs_rvq_decode_params p) {
  const u32 log2_lanes = static_cast<u32>(p.log2_lanes);
  const u32 lane = thread_index() & ((1u << log2_lanes) - 1);
  const u64 row = static_cast<u64>(block_index_x()) * (kRowsThreads >> log2_lanes) + (thread_index() >> log2_lanes);
  if (row >= static_cast<u64>(p.batch * p.rows)) return;
  const BatchRow at = split_row(p, static_cast<u32>(row));
  const Code* codes = static_cast<const Code*>(p.codes) + at.batch * p.codes_stride_batch + at.row * p.codes_stride_row;
  O* out = static_cast<O*>(p.out) + at.batch * p.out_stride_batch + at.row * p.out_stride_row;

  bool clamped = false;
  for (i32 d = static_cast<i32>(lane) * kVec; d < p.dim; d += kVec << log2_lanes) {
    const E* books = static_cast<const E*>(p.codebooks) + d;
    float sum[kVec] = {};
    if (p.has_null_code)
      add_all_levels<true>(p, codes, books, sum, clamped);
    else
      add_all_levels<false>(p, codes, books, sum, clamped);

    store_chunk<true>(out + d, sum);
  }
  if (clamped && p.flags_or_null) atomic_or_global(p.flags_or_null, NXS_FLAG_CODE_CLAMPED);
}

// Passes of a tile: sums of 16 registers.
template <int kVec> constexpr int kPasses = kVec >= 4 ? 16 / kVec : 4;

// Warps of tiles a multiprocessor: as many as leave each the registers that it needs, 72, 80 or 96, without a spill.
template <typename E, typename O>
constexpr int kTilesWarps = sizeof(E) == 4 && sizeof(O) == 2 ? 20 : DType<E>::value == NXS_BF16 ? 28 : 24;

// Adds levels [level, level + kLevels) to the sums of all passes; the lane's row in pass j is first + j * rows_a_pass, or
// the last one.
template <int kLevels, typename Code, typename E, int kVec>
NXS_DEVICE void add_tile_levels(const nxs_rvq_decode_params& p, u32 first, u32 rows_a_pass, const char* books, u32 level,
                                u32 leader, float (&sum)[kPasses<kVec>][kVec], bool& clamped) {
  constexpr int kRows = kPasses<kVec>;
  // Lane i of every eight has level i; with fewer levels they repeat.
  const u32 mine = level + thread_index() % kLevels;
  const u32 last_row = static_cast<u32>(p.batch * p.rows) - 1, last_entry = static_cast<u32>(p.entries - 1);
  const u32 entry_bytes = static_cast<u32>(p.codebooks_stride_entry * sizeof(E));
  const u32 level_bytes = mine * static_cast<u32>(p.codebooks_stride_level * sizeof(E));
  u32 offset[kRows];
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    const u32 row = first + j * rows_a_pass;
    const BatchRow at = split_row(p, row < last_row ? row : last_row);
    const Code code = load_global_nc(static_cast<const Code*>(p.codes) + at.batch * p.codes_stride_batch +
                                     at.row * p.codes_stride_row + mine * p.codes_stride_level);
    offset[j] = clamp_code(code, last_entry, clamped) * entry_bytes + level_bytes;
  }
  Vec<E, kVec> value[kRows][kLevels];
#pragma unroll
  for (int j = 0; j < kRows; ++j)
#pragma unroll
    for (int i = 0; i < kLevels; ++i)
      value[j][i] = load_global_nc(reinterpret_cast<const Vec<E, kVec>*>(books + shuffle(offset[j], leader + i)));
#pragma unroll
  for (int j = 0; j < kRows; ++j)
#pragma unroll
    for (int i = 0; i < kLevels; ++i)
#pragma unroll
      for (int k = 0; k < kVec; ++k) sum[j][k] += to_f32(value[j][i].data[k]);
}

template <typename Code, typename E, typename O, int kVec>
__global__ void __launch_bounds__(kTilesThreads, kTilesWarps<E, O> * 32 / kTilesThreads)
    rvq_decode_tiles_kernel(const __grid_constant__ nxs_rvq_decode_params p) {
  constexpr int kRows = kPasses<kVec>;
  const u32 log2_lanes = static_cast<u32>(p.log2_lanes), lanes = 1u << log2_lanes;
  const u32 lane = thread_index() % kWarpSize, member = lane & (lanes - 1);
  const u32 rows = static_cast<u32>(p.batch * p.rows), rows_a_pass = kWarpSize >> log2_lanes;
  const u32 warp = block_index_x() * (kTilesThreads / kWarpSize) + thread_index() / kWarpSize;
  const u32 first = warp * (kRows * rows_a_pass) + (lane >> log2_lanes);
  // A lane beyond the last row or the end of a row does as its neighbours do, with the last row and the first chunk, so that
  // shuffles stay whole; it stores nothing.
  u32 d = (block_index_y() * lanes + member) * kVec;
  const bool inside = d < static_cast<u32>(p.dim);
  d = inside ? d : 0;
  const char* books = reinterpret_cast<const char*>(static_cast<const E*>(p.codebooks) + d);
  const u32 levels = static_cast<u32>(p.levels), leader = lane - member;
  float sum[kRows][kVec] = {};
  bool clamped = false;
  u32 level = 0;
  for (; level + 8 <= levels; level += 8) add_tile_levels<8, Code, E>(p, first, rows_a_pass, books, level, leader, sum, clamped);
  if (levels & 4) add_tile_levels<4, Code, E>(p, first, rows_a_pass, books, level, leader, sum, clamped), level += 4;
  if (levels & 2) add_tile_levels<2, Code, E>(p, first, rows_a_pass, books, level, leader, sum, clamped), level += 2;
  if (levels & 1) add_tile_levels<1, Code, E>(p, first, rows_a_pass, books, level, leader, sum, clamped);
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    const u32 row = first + j * rows_a_pass;
    if (inside && row < rows) {
      const BatchRow at = split_row(p, row);
      store_chunk<true>(static_cast<O*>(p.out) + at.batch * p.out_stride_batch + at.row * p.out_stride_row + d, sum[j]);
    }
  }
  if (clamped && p.flags_or_null) atomic_or_global(p.flags_or_null, NXS_FLAG_CODE_CLAMPED);
}

template <typename Code, typename E, typename O, int kVec>
nxs_status rvq_decode_launch_at(const nxs_rvq_decode_params& p, void* stream) {
  const auto ceil_div = [](i64 a, i64 b) { return static_cast<unsigned>((a + b - 1) / b); };
  const i64 rows = p.batch * p.rows, lanes = i64{1} << p.log2_lanes;
  LaunchShape shape;
  if (p.tiles) {
    const i64 rows_a_block = kTilesThreads * kPasses<kVec> / lanes;
    shape.grid = dim3(ceil_div(rows, rows_a_block), ceil_div(p.dim, lanes * kVec));
    shape.block = kTilesThreads;
    return launch(rvq_decode_tiles_kernel<Code, E, O, kVec>, shape, stream, p);
  }
  shape.grid = dim3(ceil_div(rows, kRowsThreads / lanes));
  shape.block = kRowsThreads;
  return launch(rvq_decode_rows_kernel<Code, E, O, kVec>, shape, stream, p);
}

template <typename Code, typename E, typename O>
nxs_status rvq_decode_launch(const nxs_rvq_decode_params& p, void* stream) {
  return p.vector ? rvq_decode_launch_at<Code, E, O, 16 / sizeof(E)>(p, stream)
                  : rvq_decode_launch_at<Code, E, O, 1>(p, stream);
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
