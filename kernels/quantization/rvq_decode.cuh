// RVQ decode: out[b, r, :] = round(sum over l ascending of codebooks[l, codes[b, l, r], :]), summed in f32 from +0.
//
// Layouts    codes [batch, levels, rows] strided; codebooks [levels, entries, dim] (level stride 0: shared);
//            out [batch, rows, dim]. Shapes, dtypes and flags are described in nextscale.h.
// Who does what
//            A row of `dim` elements is cut into chunks of kVec elements: 16 bytes of codebook, or one element. Two
//            kernels; the plan picks one. Neither needs shared memory or a barrier.
//            rows    one thread a chunk; 2^log2_lanes threads share a row and walk its chunks if they are more; a block of
//                    128 threads owns 128 >> log2_lanes rows. Each thread reads the codes itself. Any problem.
//            tiles   for many rows: a warp owns kRows * (32 >> log2_lanes) rows of one batch entry, or a slice of
//                    2^log2_lanes chunks of them. Of eight lanes each reads the codes of one level, clamps them and makes
//                    them offsets, counted in chunks, and hands those round by shuffles. The loads of all rows stand in
//                    one stretch of code, and ptxas keeps as many in flight as registers allow: without a branch in it
//                    for 8 levels, and 9 of f32. A third of the instructions of `rows`, which is what lets it reach the
//                    limit of L2. With 8 lanes a slice is the 128 bytes of a line: blocks walk all rows of one slice, then
//                    of the next (blockIdx.y), so that L1 keeps more of the few entries' lines at work. No null code; the
//                    codebooks span less than 2^32 chunks.
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
#include "common/ptx/math.cuh"
#include "common/ptx/warp.cuh"

namespace nxs::quantization {

constexpr int kRowsThreads = 128;

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

// Adds a chunk of an entry to its sums.
template <typename E, int kVec> NXS_DEVICE void add_chunk(float (&sum)[kVec], const Vec<E, kVec>& chunk) {
  if constexpr (DType<E>::value == NXS_BF16 && kVec > 1) {
    // An instruction an element out of words; out of halves ptxas makes it three for two.
    u32 word[kVec / 2];
    memcpy(word, &chunk, sizeof(chunk));
#pragma unroll
    for (int k = 0; k < kVec / 2; ++k) {
      sum[2 * k] += bits_float(word[k] << 16);
      sum[2 * k + 1] += bits_float(word[k] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kVec; ++k) sum[k] += to_f32(chunk.data[k]);
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
    if (add[i]) add_chunk(sum, value[i]);
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
__global__ void __launch_bounds__(kRowsThreads, 6)
    rvq_decode_rows_kernel(const __grid_constant__ nxs_rvq_decode_params p) {
  const u32 log2_lanes = static_cast<u32>(p.log2_lanes);
  const u32 lane = thread_index() & ((1u << log2_lanes) - 1);
  const u64 row = static_cast<u64>(block_index_x()) * (kRowsThreads >> log2_lanes) + (thread_index() >> log2_lanes);
  if (row >= static_cast<u64>(p.batch * p.rows)) return;
  // 64-bit division costs a hundred instructions, and rows fit in 32 bits.
  const u32 batch = p.batch == 1 ? 0 : static_cast<u32>(row) / static_cast<u32>(p.rows);
  const u32 r = static_cast<u32>(row) - batch * static_cast<u32>(p.rows);
  const Code* codes = static_cast<const Code*>(p.codes) + batch * p.codes_stride_batch + r * p.codes_stride_row;
  O* out = static_cast<O*>(p.out) + batch * p.out_stride_batch + r * p.out_stride_row;

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

// Tiles are compiled for kLevels 8 and 9 without a loop, and for any number as 0. Rows a lane takes: two are enough loads in a
// straight line of f32, and make more warps; Schedule::passes says the same.
template <typename E, int kLevels> constexpr int kTilesRows = kLevels > 0 && sizeof(E) == 4 ? 2 : 4;
template <int kRows> constexpr int kTilesThreads = kRows == 2 ? 128 : 64;
// Warps a multiprocessor: as many as leave each the registers that it needs, 48, 64 or 80, without a spill.
template <int kRows, int kLevels> constexpr int kTilesWarps = kRows == 4 ? 24 : kLevels == 9 ? 32 : 40;

// What tiles take: the parameters, worked out for them.
struct TilesParams {
  const char* codes;
  const char* codebooks;
  char* out;
  u32* flags_or_null;
  u64 codes_stride_batch, codes_stride_level, codes_stride_row, out_stride_batch, out_stride_row;  // bytes
  u32 codebooks_stride_level, codebooks_stride_entry;                                              // chunks
  u32 batch, rows, levels, dim, log2_lanes;
  u32 last_entry;
  u32 tiles;  // of a batch entry
};

// What a lane of a tile works on.
template <typename E, int kVec> struct TileLane {
  const char* codes;          // of the batch entry
  const Vec<E, kVec>* books;  // its chunk of level 0, entry 0
  u32 row;                    // in pass j it takes row + j * (kWarpSize >> log2_lanes), or the last one
};

// Adds levels [level, level + kLevels) to the sums of a lane's rows. Everything is loaded before anything is added.
template <int kLevels, typename Code, typename E, int kVec, int kRows>
NXS_DEVICE void add_tile_levels(const TilesParams& p, const TileLane<E, kVec>& at, u32 level, float (&sum)[kRows][kVec],
                                bool& clamped) {
  // Of eight lanes, lane i reads the codes of level i; of fewer levels they repeat. Those of a ninth every lane reads.
  constexpr int kReads = kLevels == 9 ? 2 : 1;
  const u32 read[2] = {level + thread_index() % (kLevels < 8 ? kLevels : 8), level + 8};
  static_assert(kLevels <= 9);
  Code code[kRows][kReads];
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    const u32 row = at.row + j * (kWarpSize >> p.log2_lanes);
    const char* codes = at.codes + (row < p.rows ? row : p.rows - 1) * p.codes_stride_row;
#pragma unroll
    for (int k = 0; k < kReads; ++k)
      code[j][k] = load_global_nc(reinterpret_cast<const Code*>(codes + read[k] * p.codes_stride_level));
  }
  u32 offset[kRows][kReads];
#pragma unroll
  for (int j = 0; j < kRows; ++j)
#pragma unroll
    for (int k = 0; k < kReads; ++k)
      offset[j][k] = clamp_code(code[j][k], p.last_entry, clamped) * p.codebooks_stride_entry +
                     read[k] * p.codebooks_stride_level;
  Vec<E, kVec> value[kRows][kLevels];
#pragma unroll
  for (int j = 0; j < kRows; ++j)
#pragma unroll
    for (int i = 0; i < kLevels; ++i) {
      const u32 from = i < 8 ? shuffle_among(offset[j][0], i, 1u << p.log2_lanes) : offset[j][kReads - 1];
      value[j][i] = load_global_nc(at.books + from);
    }
#pragma unroll
  for (int j = 0; j < kRows; ++j)
#pragma unroll
    for (int i = 0; i < kLevels; ++i) add_chunk(sum[j], value[j][i]);
}

template <typename Code, typename E, typename O, int kVec, int kLevels, int kRows = kTilesRows<E, kLevels>>
__global__ void __launch_bounds__(kTilesThreads<kRows>, kTilesWarps<kRows, kLevels> * 32 / kTilesThreads<kRows>)
    rvq_decode_tiles_kernel(const __grid_constant__ TilesParams p) {
  const u32 tile = block_index_x() * (kTilesThreads<kRows> / kWarpSize) + thread_index() / kWarpSize;
  if (tile >= p.batch * p.tiles) return;
  const u32 batch = p.batch == 1 ? 0 : tile / p.tiles, levels = p.levels;
  const u32 lane = thread_index() % kWarpSize, lanes = 1u << p.log2_lanes;
  const u32 slice = block_index_y() * lanes * kVec, d = slice + (lane & (lanes - 1)) * kVec;
  // A lane beyond the last row or the end of a row does as its neighbours do, with the last row and the slice's first chunk,
  // so that shuffles stay whole; it stores nothing.
  TileLane<E, kVec> at;
  at.codes = p.codes + batch * p.codes_stride_batch;
  at.books = reinterpret_cast<const Vec<E, kVec>*>(p.codebooks + (d < p.dim ? d : slice) * sizeof(E));
  at.row = (tile - batch * p.tiles) * (kRows * kWarpSize >> p.log2_lanes) + (lane >> p.log2_lanes);

  float sum[kRows][kVec] = {};
  bool clamped = false;
  if constexpr (kLevels > 0) {
    add_tile_levels<kLevels, Code>(p, at, 0, sum, clamped);
  } else {
    u32 level = 0;
    for (; levels - level >= 8; level += 8) add_tile_levels<8, Code>(p, at, level, sum, clamped);
    if (levels & 4) add_tile_levels<4, Code>(p, at, level, sum, clamped), level += 4;
    if (levels & 2) add_tile_levels<2, Code>(p, at, level, sum, clamped), level += 2;
    if (levels & 1) add_tile_levels<1, Code>(p, at, level, sum, clamped);
  }

  // After a loop `d` once more, of another register: where it was kept over the loop, ptxas spilled it.
  const u32 column = kLevels > 0 ? d : slice + (lane_index() & (lanes - 1)) * kVec;
  char* out = p.out + batch * p.out_stride_batch + column * sizeof(O);
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    const u32 row = at.row + j * (kWarpSize >> p.log2_lanes);
    store_chunk_streaming_if(reinterpret_cast<O*>(out + row * p.out_stride_row), sum[j], column < p.dim && row < p.rows);
  }
  if (clamped && p.flags_or_null) atomic_or_global(p.flags_or_null, NXS_FLAG_CODE_CLAMPED);
}

constexpr unsigned ceil_div(i64 a, i64 b) { return static_cast<unsigned>((a + b - 1) / b); }

template <typename Code, typename E, typename O, int kVec, int kLevels>
nxs_status rvq_decode_launch_tiles(const nxs_rvq_decode_params& p, void* stream) {
  constexpr int kRows = kTilesRows<E, kLevels>;
  const i64 lanes = i64{1} << p.log2_lanes;
  TilesParams t = {};
  t.codes = static_cast<const char*>(p.codes);
  t.codebooks = static_cast<const char*>(p.codebooks);
  t.out = static_cast<char*>(p.out);
  t.flags_or_null = p.flags_or_null;
  // Strides of dimensions with one element may be anything: they wrap and are multiplied by zero.
  t.codes_stride_batch = static_cast<u64>(p.codes_stride_batch) * sizeof(Code);
  t.codes_stride_level = static_cast<u64>(p.codes_stride_level) * sizeof(Code);
  t.codes_stride_row = static_cast<u64>(p.codes_stride_row) * sizeof(Code);
  t.out_stride_batch = static_cast<u64>(p.out_stride_batch) * sizeof(O);
  t.out_stride_row = static_cast<u64>(p.out_stride_row) * sizeof(O);
  t.codebooks_stride_level = static_cast<u32>(p.codebooks_stride_level / kVec);
  t.codebooks_stride_entry = static_cast<u32>(p.codebooks_stride_entry / kVec);
  t.batch = static_cast<u32>(p.batch), t.rows = static_cast<u32>(p.rows);
  t.levels = static_cast<u32>(p.levels), t.dim = static_cast<u32>(p.dim);
  t.log2_lanes = static_cast<u32>(p.log2_lanes);
  t.last_entry = static_cast<u32>(p.entries - 1);
  t.tiles = ceil_div(p.rows, kRows * kWarpSize / lanes);
  LaunchShape shape;
  shape.grid = dim3(ceil_div(p.batch * t.tiles, kTilesThreads<kRows> / kWarpSize), ceil_div(p.dim, lanes * kVec));
  shape.block = kTilesThreads<kRows>;
  return launch(rvq_decode_tiles_kernel<Code, E, O, kVec, kLevels>, shape, stream, t);
}

template <typename Code, typename E, typename O, int kVec>
nxs_status rvq_decode_launch_at(const nxs_rvq_decode_params& p, void* stream) {
  if (p.tiles) {
    if constexpr (kVec > 1) {
      if (p.levels == 8) return rvq_decode_launch_tiles<Code, E, O, kVec, 8>(p, stream);
      if constexpr (sizeof(E) == 4)
        if (p.levels == 9) return rvq_decode_launch_tiles<Code, E, O, kVec, 9>(p, stream);
    }
    return rvq_decode_launch_tiles<Code, E, O, kVec, 0>(p, stream);
  }
  LaunchShape shape;
  shape.grid = dim3(ceil_div(p.batch * p.rows, kRowsThreads >> p.log2_lanes));
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
