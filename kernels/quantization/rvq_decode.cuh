// RVQ decode: out[b, r, :] = round(sum over l ascending of codebooks[l, codes[b, l, r], :]), summed in f32 from +0.
//
// Layouts    codes [batch, levels, rows] strided; codebooks [levels, entries, dim] (level stride 0: shared);
//            out [batch, rows, dim]. Shapes, dtypes and flags are described in nextscale.h.
// Who does what
//            A row of `dim` elements is cut into chunks of kVec elements (16 bytes of codebook, or one element).
//            `lanes` = 2^log2_lanes threads share a row (the plan's choice); a block of 256 threads owns 256 / lanes rows;
//            the grid covers the flattened rows b * rows + r. Each thread walks its row's chunks lane, lane + lanes, ...
//            and for each one adds the levels in groups of kLevelsInFlight: all codes of a group are loaded, then all
//            gathers, then added in ascending order. No shared memory, no barrier.
//            Schedule in src/quantization/rvq_decode/plan.rs walks the same cells; its tests prove that every output
//            is owned once.
// Bytes      gathered: batch * rows * levels * dim * sizeof(codebook); written: batch * rows * dim * sizeof(out);
//            codes read once per chunk pass (broadcast in the warp). The codebooks (4 MiB at 8 x 1024 x 128 f32) live
//            in L2, so the L2 read rate is the limit unless levels * sizeof(codebook) is small against sizeof(out).
// FLOPs      batch * rows * levels * dim additions.
// Determinism bitwise: one addition order, no atomics but the flag.
// Limits     levels <= 65536, dim <= 2^20, fewer than 2^31 blocks.
#pragma once
#include "common/dtype.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/memory.cuh"

namespace nxs::quantization {

constexpr int kRvqDecodeThreads = 256;
constexpr int kLevelsInFlight = 8;

template <typename Code, typename E, typename O, int kVec>
__global__ void __launch_bounds__(kRvqDecodeThreads)
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
  const E* books = static_cast<const E*>(p.codebooks);
  O* out = static_cast<O*>(p.out) + b * p.out_stride_batch + r * p.out_stride_row;

  bool clamped = false;
  for (i32 d = static_cast<i32>(lane) * kVec; d < p.dim; d += kVec << log2_lanes) {
    float sum[kVec] = {};
    for (i32 level = 0; level < p.levels; level += kLevelsInFlight) {
      i64 entry[kLevelsInFlight];
      bool add[kLevelsInFlight];
#pragma unroll
      for (int i = 0; i < kLevelsInFlight; ++i) {
        add[i] = level + i < p.levels;
        const i64 code = add[i] ? static_cast<i64>(load_global_nc(codes + (level + i) * p.codes_stride_level)) : 0;
        if (p.has_null_code && code == p.null_code) add[i] = false;
        entry[i] = code < 0 ? 0 : code >= p.entries ? p.entries - 1 : code;
        clamped |= add[i] && entry[i] != code;
      }
      Vec<E, kVec> value[kLevelsInFlight];
#pragma unroll
      for (int i = 0; i < kLevelsInFlight; ++i) {
        value[i] = {};
        if (add[i])
          value[i] = load_global_nc(reinterpret_cast<const Vec<E, kVec>*>(
              books + (level + i) * p.codebooks_stride_level + entry[i] * p.codebooks_stride_entry + d));
      }
      // A level that is not there adds +0, which changes no sum: the running sum starts at +0 and is never -0.
#pragma unroll
      for (int i = 0; i < kLevelsInFlight; ++i)
#pragma unroll
        for (int j = 0; j < kVec; ++j) sum[j] += to_f32(value[i].data[j]);
    }
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
