// Nearest codebook rows: codes[b, l] = argmin over i of sum over k of (z[b, l, k] - codebook[i, k])^2, exact in f32.
//
// Layouts    z [batch, rows, C] f32, codebook [V, C] f32, codes [batch, rows] with a stride of the batch.
// Who does what
//            A block of 256 threads has kTile vectors, a cluster of p.splits blocks the same ones; each block takes
//            its part of the codebook in chunks of up to 256 rows. A thread scores four of them against a quarter of the
//            vectors (broadcasts), four channels a load: a broadcast of 16 bytes takes as long to arrive as four
//            multiply-adds to issue, so each is used for four rows. Rows lie at C4 + 4 words, so that eight lanes reach
//            all banks. The next chunk is copied while one is scored. A thread compares scores in ascending order of
//            index; then (score, index) is reduced over the threads, and over the blocks of the cluster,
//            lexicographically: the lowest index among equals, whatever the cut.
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
constexpr u32 kCodes = 4, kPlaces = kSearchThreads / kCodes;  // rows that a thread scores; threads of the same vectors
constexpr u32 kMostShared = 99 << 10;  // every device has as much for a block
using Four = Vec<float, 4>;

struct SearchParams {
  nxs_nearest_code_params p;
  u32 chunk;  // rows that are scored at a time: 32 to 256
};

struct Best {
  float score;
  u32 index;
};
NXS_DEVICE bool better(const Best& a, const Best& b) {
  return a.score < b.score || (a.score == b.score && a.index < b.index);
}

// Bytes between rows.
__host__ NXS_DEVICE constexpr u32 stride_of(u32 channels) { return ((channels + 3) / 4 * 4 + 4) * 4; }

// Rows [from, from + chunk) of the codebook, those beyond `to` left as they are.
template <bool kVector> NXS_DEVICE void copy_chunk(const SearchParams& q, u32 from, u32 to, u32 at) {
  const u32 channels = q.p.channels, pieces = kVector ? channels / 4 : channels, bytes = kVector ? 16 : 4;
  for (u32 i = thread_index(); i < q.chunk * pieces; i += kSearchThreads) {
    const u32 row = i / pieces, piece = i % pieces;
    if (from + row >= to) continue;
    const float* source = q.p.codebook + static_cast<i64>(from + row) * channels + piece * (kVector ? 4 : 1);
    copy_async<kVector ? 16 : 4>(at + row * stride_of(channels) + piece * bytes, source);
  }
  copy_async_commit();
}

template <u32 kTile, bool kVector>
__global__ void __launch_bounds__(kSearchThreads, 2) nearest_code_kernel(const __grid_constant__ SearchParams q) {
  const nxs_nearest_code_params& p = q.p;
  const u32 channels = p.channels, padded = (channels + 3) / 4 * 4, stride = stride_of(channels), chunk = q.chunk;
  const u32 shared = dynamic_shared(), chunks = shared + kTile * (stride + 8), results = shared + kTile * stride;
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

  if (begin < end) copy_chunk<kVector>(q, begin, end, chunks);
  // Channels beyond the last are zero on both sides: they add +0 to a sum that is not negative.
  for (u32 i = thread_index(); i < kTile * padded; i += kSearchThreads) {
    const u32 row = i / padded, k = i % padded;
    const bool there = first + row < all && k < channels;
    store_shared(shared + row * stride + k * 4, there ? load_global(p.z + (first + row) * channels + k) : 0.0f);
  }
  for (u32 i = thread_index(); i < 2 * chunk * (padded - channels); i += kSearchThreads)
    store_shared(chunks + i / (padded - channels) * stride + (channels + i % (padded - channels)) * 4, 0.0f);
  if (p.normalize) {
    block_sync();
    if (thread_index() < kTile) {
      const u32 row = shared + thread_index() * stride;
      float sum = 0;
#pragma unroll 1
      for (u32 k = 0; k < channels; ++k) {
        const float z = load_shared<float>(row + k * 4);
        sum = fma(z, z, sum);
      }
      const float norm = square_root(sum), divisor = norm < p.eps ? p.eps : norm;
#pragma unroll 1
      for (u32 k = 0; k < channels; ++k) store_shared(row + k * 4, divide(load_shared<float>(row + k * 4), divisor));
    }
  }

  constexpr u32 kOwn = kTile / kCodes;  // vectors of a thread
  const u32 place = thread_index() % kPlaces, own = thread_index() / kPlaces * kOwn, quarter = chunk / kCodes;
  float least[kOwn];
  u32 index[kOwn];
#pragma unroll
  for (u32 m = 0; m < kOwn; ++m) least[m] = bits_float(0x7f800000u), index[m] = 0;
  u32 buffer = 0;
  for (u32 from = begin; from < end; from += chunk) {
    if (from + chunk < end) {
      copy_chunk<kVector>(q, from + chunk, end, chunks + (1 - buffer) * chunk * stride);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    block_sync();
    if (place < quarter) {
      u32 line[kCodes];
#pragma unroll
      for (u32 n = 0; n < kCodes; ++n) {
        const u32 row = place + n * quarter;  // beyond the end, the last one is scored, and not taken
        line[n] = chunks + (buffer * chunk + (from + row < end ? row : end - from - 1)) * stride;
      }
      float score[kOwn][kCodes] = {};
#pragma unroll 1
      for (u32 k = 0; k < padded; k += 4) {
        Four row[kCodes];
#pragma unroll
        for (u32 n = 0; n < kCodes; ++n) row[n] = load_shared<Four>(line[n] + k * 4);
#pragma unroll
        for (u32 m = 0; m < kOwn; ++m) {
          const Four z = load_shared<Four>(shared + (own + m) * stride + k * 4);
#pragma unroll
          for (int i = 0; i < 4; ++i)
#pragma unroll
            for (u32 n = 0; n < kCodes; ++n) {
              const float difference = z.data[i] - row[n].data[i];
              score[m][n] = fma(difference, difference, score[m][n]);
            }
        }
      }
#pragma unroll
      for (u32 n = 0; n < kCodes; ++n) {
        const u32 code = from + place + n * quarter;
#pragma unroll
        for (u32 m = 0; m < kOwn; ++m)
          if (code < end && score[m][n] < least[m]) least[m] = score[m][n], index[m] = code;
      }
    }
    block_sync();
    buffer = 1 - buffer;
  }

  // [vector][place] where the chunks were.
  block_sync();
  if (place < quarter) {
#pragma unroll
    for (u32 m = 0; m < kOwn; ++m)
      store_shared(chunks + ((own + m) * quarter + place) * 8, Best{least[m], index[m]});
  }
  block_sync();
  for (u32 m = warp; m < kTile; m += kWarps) {
    Best best = load_shared<Best>(chunks + (m * quarter + lane % quarter) * 8);
    for (u32 i = lane + kWarpSize; i < quarter; i += kWarpSize) {
      const Best other = load_shared<Best>(chunks + (m * quarter + i) * 8);
      if (better(other, best)) best = other;
    }
#pragma unroll
    for (u32 distance = 16; distance > 0; distance /= 2) {
      const Best other = {shuffle_xor(best.score, distance), shuffle_xor(best.index, distance)};
      if (better(other, best)) best = other;
    }
    if (lane == 0) store_shared(results + m * 8, best);
  }
  if (splits > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    block_sync();
  }
  if (split == 0 && thread_index() < kTile && first + thread_index() < all) {
    Best best = load_shared<Best>(results + thread_index() * 8);
    for (u32 other = 1; other < splits; ++other) {
      const Best theirs = load_cluster<Best>(map_to_rank(results + thread_index() * 8, other));
      if (better(theirs, best)) best = theirs;
    }
    const i64 row = first + thread_index(), b = row / p.rows, to = b * p.codes_stride_batch + (row - b * p.rows);
    switch (p.codes_dtype) {
      case NXS_U16: store_global(static_cast<u16*>(p.codes) + to, static_cast<u16>(best.index)); break;
      case NXS_U32: store_global(static_cast<u32*>(p.codes) + to, best.index); break;
      default: store_global(static_cast<i64*>(p.codes) + to, static_cast<i64>(best.index)); break;
    }
  }
  if (splits > 1) {  // until everyone's results were read
    cluster_arrive();
    cluster_wait();
  }
}

template <u32 kTile, bool kVector> nxs_status launch_search(const nxs_nearest_code_params& p, void* stream) {
  const u32 stride = stride_of(p.channels);
  SearchParams q = {p, kSearchThreads};
  const auto bytes = [&] {
    const u32 rows = 2 * q.chunk * stride, bests = kTile * q.chunk / kCodes * 8;
    return kTile * (stride + 8) + (rows > bests ? rows : bests);
  };
  while (q.chunk > kWarpSize && bytes() > kMostShared) q.chunk /= 2;
  LaunchShape shape;
  shape.block = kSearchThreads;
  shape.cluster = static_cast<unsigned>(p.splits);
  shape.programmatic = p.programmatic;
  shape.grid = dim3(static_cast<unsigned>((p.batch * p.rows + kTile - 1) / kTile * p.splits));
  shape.dynamic_smem = bytes();
  if (shape.dynamic_smem > 48 << 10)
    NXS_TRY(allow_dynamic_smem(nearest_code_kernel<kTile, kVector>));
  return launch(nearest_code_kernel<kTile, kVector>, shape, stream, q);
}

template <bool kVector> nxs_status launch_tile(const nxs_nearest_code_params& p, void* stream) {
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
