// Nearest codebook rows: codes[b, l] = argmin over i of sum over k of (z[b, l, k] - codebook[i, k])^2, exact in f32.
//
// Layouts    z [batch, rows, C] f32, codebook [V, C] f32, codes [batch, rows] with a stride of the batch.
// Who does what
//            A block of 256 threads has kTile vectors, a cluster of p.splits blocks the same ones; each block takes its
//            part of the codebook in chunks of 128 rows. Of a chunk warp w scores vectors w, w + 8, ... (the same for all
//            lanes: broadcasts) against rows lane, lane + 32, lane + 64, lane + 96, four channels a load. Rows lie at C4 + 4
//            words, so that eight lanes reach all banks. The next chunk is copied while one is scored. Scores are
//            compared in ascending order of index within a thread; then (score, index) is reduced over lanes, and over the
//            blocks of the cluster, lexicographically: the lowest index among equals, whatever the cut.
// Bytes      z once a split, the codebook once a block, from L2.
// FLOPs      2 instructions, a subtraction and a fused multiply-add, for each vector, row and channel.
// Limits     C <= 256; splits on sm_90 only.
#include "common/check.h"
#include "common/dtype.cuh"
#include "common/ptx/async_copy.cuh"
#include "common/ptx/cluster.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/math.cuh"
#include "common/ptx/memory.cuh"
#include "common/ptx/programmatic.cuh"
#include "common/ptx/shared.cuh"
#include "common/ptx/warp.cuh"

namespace nxs::quantization {

namespace {

constexpr u32 kSearchThreads = 256, kWarps = kSearchThreads / kWarpSize;
constexpr u32 kLines = 4;                      // rows of a chunk that a lane scores
constexpr u32 kChunk = kLines * kWarpSize;
using SearchParams = nxs_nearest_code_params;
using Four = Vec<float, 4>;

struct Best {
  float score;
  u32 index;
};
NXS_DEVICE bool better(const Best& a, const Best& b) {
  return a.score < b.score || (a.score == b.score && a.index < b.index);
}

constexpr u32 channels4(u32 channels) { return (channels + 3) / 4 * 4; }

// Rows [from, from + kChunk) of the codebook, those beyond `to` left as they are.
template <bool kVector>
NXS_DEVICE void copy_chunk(const SearchParams& p, u32 from, u32 to, u32 at, u32 stride_bytes) {
  const u32 channels = p.channels, pieces = kVector ? channels / 4 : channels, bytes = kVector ? 16 : 4;
  for (u32 i = thread_index(); i < kChunk * pieces; i += kSearchThreads) {
    const u32 row = i / pieces, piece = i % pieces;
    if (from + row >= to) continue;
    const float* source = p.codebook + static_cast<i64>(from + row) * channels + piece * (kVector ? 4 : 1);
    copy_async<kVector ? 16 : 4>(at + row * stride_bytes + piece * bytes, source);
  }
  copy_async_commit();
}

template <u32 kTile, bool kVector>
__global__ void __launch_bounds__(kSearchThreads) nearest_code_kernel(const __grid_constant__ SearchParams p) {
  constexpr u32 kMine = kTile / kWarps;  // vectors of a warp
  const u32 channels = p.channels, padded = (channels + 3) / 4 * 4, stride = (padded + 4) * 4;
  const u32 shared = dynamic_shared(), chunks = shared + kTile * stride, results = chunks + 2 * kChunk * stride;
  const u32 warp = thread_index() / kWarpSize, lane = lane_index(), splits = p.splits;
  const u32 split = block_index_x() % splits;
  if (p.programmatic) {
    programmatic_trigger();
    programmatic_wait();
  }
  const i64 all = p.batch * p.rows, first = static_cast<i64>(block_index_x() / splits) * kTile;
  const u32 share = (static_cast<u32>(p.entries) + splits - 1) / splits;
  const u32 begin = split * share < p.entries ? split * share : static_cast<u32>(p.entries);
  const u32 end = begin + share < p.entries ? begin + share : static_cast<u32>(p.entries);

  if (begin < end) copy_chunk<kVector>(p, begin, end, chunks, stride);
  // Channels beyond the last are zero on both sides: they add +0 to a sum that is not negative.
  for (u32 i = thread_index(); i < kTile * padded; i += kSearchThreads) {
    const u32 row = i / padded, k = i % padded;
    const bool there = first + row < all && k < channels;
    store_shared(shared + row * stride + k * 4, there ? load_global_nc(p.z + (first + row) * channels + k) : 0.0f);
  }
  for (u32 i = thread_index(); i < 2 * kChunk * (padded - channels); i += kSearchThreads)
    store_shared(chunks + i / (padded - channels) * stride + (channels + i % (padded - channels)) * 4, 0.0f);
  if (p.normalize) {
    block_sync();
    if (thread_index() < kTile) {
      const u32 row = shared + thread_index() * stride;
      float sum = 0;
      for (u32 k = 0; k < channels; ++k) {
        const float z = load_shared<float>(row + k * 4);
        sum = fma(z, z, sum);
      }
      const float norm = square_root(sum), least = norm > p.eps ? norm : p.eps;
      const float divisor = norm == norm ? least : norm;
      for (u32 k = 0; k < channels; ++k) store_shared(row + k * 4, divide(load_shared<float>(row + k * 4), divisor));
    }
  }

  Best best[kMine];
#pragma unroll
  for (u32 m = 0; m < kMine; ++m) best[m] = {bits_float(0x7f800000u), 0};
  u32 buffer = 0;
  for (u32 from = begin; from < end; from += kChunk) {
    if (from + kChunk < end) copy_chunk<kVector>(p, from + kChunk, end, chunks + (1 - buffer) * kChunk * stride, stride);
    if (from + kChunk < end)
      copy_async_wait<1>();
    else
      copy_async_wait<0>();
    block_sync();
    const u32 lines = chunks + (buffer * kChunk + lane) * stride, vectors = shared + warp * stride;
    float score[kMine][kLines] = {};
    const u32 rest = end - from;
    for (u32 k = 0; k < padded; k += 4) {
      Four row[kLines];
#pragma unroll
      for (u32 j = 0; j < kLines; ++j)
        row[j] = lane + j * kWarpSize < rest ? load_shared<Four>(lines + j * kWarpSize * stride + k * 4) : Four{};
#pragma unroll
      for (u32 m = 0; m < kMine; ++m) {
        const Four z = load_shared<Four>(vectors + m * kWarps * stride + k * 4);
#pragma unroll
        for (u32 j = 0; j < kLines; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float difference = z.data[i] - row[j].data[i];
            score[m][j] = fma(difference, difference, score[m][j]);
          }
      }
    }
#pragma unroll
    for (u32 j = 0; j < kLines; ++j) {
      const u32 index = from + lane + j * kWarpSize;
      if (index >= end) break;
#pragma unroll
      for (u32 m = 0; m < kMine; ++m)
        if (score[m][j] < best[m].score) best[m] = {score[m][j], index};
    }
    block_sync();
    buffer = 1 - buffer;
  }

#pragma unroll
  for (u32 m = 0; m < kMine; ++m) {
#pragma unroll
    for (u32 distance = 16; distance > 0; distance /= 2) {
      const Best other = {shuffle_xor(best[m].score, distance), shuffle_xor(best[m].index, distance)};
      if (better(other, best[m])) best[m] = other;
    }
    if (lane == 0) store_shared(results + (warp + m * kWarps) * 8, best[m]);
  }
  if (splits > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    block_sync();
  }
  if (split == 0 && thread_index() < kTile && first + thread_index() < all) {
    Best least = load_shared<Best>(results + thread_index() * 8);
    for (u32 other = 1; other < splits; ++other) {
      const Best theirs = load_cluster<Best>(map_to_rank(results + thread_index() * 8, other));
      if (better(theirs, least)) least = theirs;
    }
    const i64 row = first + thread_index(), b = row / p.rows, to = b * p.codes_stride_batch + (row - b * p.rows);
    switch (p.codes_dtype) {
      case NXS_U16: store_global(static_cast<u16*>(p.codes) + to, static_cast<u16>(least.index)); break;
      case NXS_U32: store_global(static_cast<u32*>(p.codes) + to, least.index); break;
      default: store_global(static_cast<i64*>(p.codes) + to, static_cast<i64>(least.index)); break;
    }
  }
  if (splits > 1) {  // until everyone's results were read
    cluster_arrive();
    cluster_wait();
  }
}

template <u32 kTile, bool kVector> nxs_status launch_search(const SearchParams& p, void* stream) {
  LaunchShape shape;
  shape.block = kSearchThreads;
  shape.cluster = static_cast<unsigned>(p.splits);
  shape.programmatic = p.programmatic;
  shape.grid = dim3(static_cast<unsigned>((p.batch * p.rows + kTile - 1) / kTile * p.splits));
  shape.dynamic_smem = (kTile + 2 * kChunk) * (channels4(p.channels) + 4) * 4 + kTile * 8;
  if (shape.dynamic_smem > 48 << 10)
    NXS_TRY(allow_dynamic_smem(nearest_code_kernel<kTile, kVector>, shape.dynamic_smem));
  return launch(nearest_code_kernel<kTile, kVector>, shape, stream, p);
}

template <bool kVector> nxs_status launch_tile(const SearchParams& p, void* stream) {
  switch (p.log2_tile) {
    case 3: return launch_search<8, kVector>(p, stream);
    case 4: return launch_search<16, kVector>(p, stream);
    default: return launch_search<32, kVector>(p, stream);
  }
}

}  // namespace
}  // namespace nxs::quantization

extern "C" nxs_status nxs_nearest_code(const nxs_nearest_code_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::quantization;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_nearest_code_params& p = *params;
  NXS_REQUIRE(p.codes_dtype == NXS_U16 || p.codes_dtype == NXS_U32 || p.codes_dtype == NXS_I64, NXS_E_DTYPE);
  NXS_REQUIRE(p.batch >= 0 && p.rows >= 0 && p.channels >= 1 && p.channels <= 256, NXS_E_SHAPE);
  NXS_REQUIRE(p.entries >= 1 && p.entries <= (p.codes_dtype == NXS_U16 ? 65536 : INT32_MAX), NXS_E_SHAPE);
  NXS_REQUIRE(p.log2_tile >= 3 && p.log2_tile <= 5, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.splits == 1 || p.splits == 2 || p.splits == 4 || p.splits == 8, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.codes_stride_batch >= 0, NXS_E_STRIDE);
  if (p.batch == 0 || p.rows == 0) return NXS_OK;
  // As many blocks as a grid has along x.
  NXS_REQUIRE(p.rows <= INT32_MAX / p.batch, NXS_E_SHAPE);
  NXS_REQUIRE(p.z && p.codebook && p.codes, NXS_E_NULL);
  NXS_REQUIRE(is_aligned(p.z, 4) && is_aligned(p.codebook, 4) && is_aligned(p.codes, dtype_bytes(p.codes_dtype)),
              NXS_E_ALIGNMENT);
  NXS_REQUIRE(!p.normalize || (p.eps >= 0 && p.eps <= 1), NXS_E_UNSUPPORTED);
  const bool vector = p.channels % 4 == 0 && is_aligned(p.codebook, 16);
  return vector ? launch_tile<true>(p, stream) : launch_tile<false>(p, stream);
}
