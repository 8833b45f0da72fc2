// RVQ encode of few rows: one frame of live audio, or some. Bound by latency: every level waits for the one before.
//
//   as nextscale.h has it; every code is scored, exactly.
//
// Grid       a cluster of p.splits blocks for each p.tile_rows rows (1 to 8).
// Block      4 warps. Tiles of 32 codes are dealt out to the warps of the cluster; a lane scores a code, against all rows of the
//            cluster. Each block holds the rows, and takes the winners from them itself.
// Stream     a warp's tiles of all levels, one after the other, in its own ring of bulk copies, so that the next level's codes
//            come while this level's winner is found. They lie in memory as lanes read them: 32 codes times 16 bytes.
// Winner     a warp's least (score, code) of a row goes to a word of its own in every block of the cluster; a barrier of the
//            cluster; each block takes the least of the words. Words of odd and even levels differ, so that one barrier does.
// Bytes      the searched rows in f32, once for each cluster, split among its blocks.
// FLOPs      3 * rows * entries * dim a level.
// Limits     sm_90; 1 to 16 blocks a cluster.
#pragma once
#include "common/ptx/bulk.cuh"
#include "common/ptx/cluster.cuh"
#include "common/ptx/fence.cuh"
#include "common/ptx/mbarrier.cuh"
#include "quantization/rvq_io.cuh"

namespace nxs::quantization {

constexpr u32 kStreamWarps = 4, kStreamThreads = kStreamWarps * kWarpSize;
constexpr u32 kStreamPiece = 16;  // chunks of 4 elements of 32 codes: 8 KiB
constexpr u32 kStreamPieceBytes = kStreamPiece * kCodeLanes * 16;
constexpr u32 kStreamSlots = 5;   // of a warp
constexpr u32 kMostCluster = 16;

template <int kRows> struct StreamShared {
  u32 padded;
  static constexpr u32 kRing = 0, kWords = kStreamWarps * kStreamSlots * kStreamPieceBytes,
                       kWordBytes = kRows * kMostCluster * kStreamWarps * 8, kBarriers = kWords + 2 * kWordBytes,
                       kCodes = kBarriers + kStreamWarps * kStreamSlots * 8, kNorms = kCodes + kRows * 8 + 32,
                       kX = (kNorms + kRows * 4 + 127) / 128 * 128;
  // Rows lie side by side: all lanes read the same element.
  __host__ NXS_DEVICE u32 stride() const { return padded * 4; }
  __host__ NXS_DEVICE u32 search(bool cosine) const { return kX + (cosine ? kRows * stride() : 0); }
  __host__ NXS_DEVICE u32 bytes(bool cosine) const { return search(cosine) + kRows * stride(); }
};

// The pieces of a warp, of all its tiles and levels.
struct StreamWalk {
  u32 piece = 0, tile, level = 0;
  NXS_DEVICE explicit StreamWalk(u32 first) : tile(first) {}
  NXS_DEVICE void next(u32 pieces, u32 tiles, u32 first, u32 step) {
    if (++piece < pieces) return;
    piece = 0;
    tile += step;
    if (tile < tiles) return;
    tile = first;
    ++level;
  }
};

template <int kRows>
__global__ void __launch_bounds__(kStreamThreads, 1) rvq_encode_stream_kernel(const __grid_constant__ nxs_rvq_encode_params p) {
  using C = StreamShared<kRows>;
  const nxs_codebook& book = p.codebook;
  const u32 shared = dynamic_shared(), thread = thread_index(), lane = thread % kWarpSize, warp = thread / kWarpSize;
  const u32 padded = static_cast<u32>(book.padded_dim), entries = static_cast<u32>(book.entries),
            levels = static_cast<u32>(p.levels);
  const C at{padded};
  const bool cosine = book.metric != NXS_METRIC_L2;
  const u32 blocks = cluster_size(), rank = cluster_rank(), x = shared + C::kX, search = shared + at.search(cosine);
  const u32 first_row = block_index_x() / blocks * kRows, all_rows = static_cast<u32>(p.batch * p.rows);
  const u32 rows = all_rows - first_row < kRows ? all_rows - first_row : kRows;

  // This warp's tiles and ring.
  const u32 chunks = padded / 4, pieces = (chunks + kStreamPiece - 1) / kStreamPiece;
  const u32 tiles = (entries + 127) / 128 * 4, first = warp * blocks + rank, step = blocks * kStreamWarps;
  const u32 ring = shared + warp * kStreamSlots * kStreamPieceBytes, full = shared + C::kBarriers + warp * kStreamSlots * 8;
  const u8* searched = static_cast<const u8*>(book.prepared) + book.search_at;
  if (lane == 0)
    for (u32 i = 0; i < kStreamSlots; ++i) mbarrier_init(full + 8 * i, 1);
  if (lane == 0) fence_mbarrier_init();
  warp_sync();
  StreamWalk ahead(first);
  u32 sent_slot = 0;
  const auto send = [&] {  // lane 0
    if (first >= tiles || ahead.level >= levels) return;
    const u32 left = chunks - ahead.piece * kStreamPiece, bytes = (left < kStreamPiece ? left : kStreamPiece) * kCodeLanes * 16;
    const u64 tile = static_cast<u64>(book.levels == 1 ? 0 : ahead.level) * tiles + ahead.tile;
    const u32 barrier = full + 8 * sent_slot;
    mbarrier_arrive_expect(barrier, bytes);
    bulk_load(ring + sent_slot * kStreamPieceBytes, searched + (tile * chunks + ahead.piece * kStreamPiece) * (kCodeLanes * 16),
              bytes, barrier);
    ahead.next(pieces, tiles, first, step);
    if (++sent_slot == kStreamSlots) sent_slot = 0;
  };
  if (lane == 0)
    for (u32 i = 0; i < kStreamSlots; ++i) send();

  if (warp == 0) load_tile(p, first_row, rows, kRows, padded, x, at.stride());
  RowOut out;
  if (thread < rows) out = RowOut(p, first_row + thread);
  block_sync();
  cluster_arrive();  // all blocks have begun
  cluster_wait();

  u32 slot = 0, parity = 0;
#pragma unroll 1
  for (u32 level = 0; level < levels; ++level) {
    if (cosine) {
      if (thread < kRows) {
        float sum = 0;
        for (u32 k = 0; k < padded; ++k) {
          const float v = load_shared<float>(x + thread * at.stride() + k * 4);
          sum = fma(v, v, sum);
        }
        const float norm = square_root(sum);
        store_shared(shared + C::kNorms + thread * 4, norm < book.eps ? book.eps : norm);
      }
      block_sync();
#pragma unroll
      for (u32 r = 0; r < kRows; ++r)
        for (u32 k = thread; k < padded; k += kStreamThreads)
          store_shared(search + r * at.stride() + k * 4, divide(load_shared<float>(x + r * at.stride() + k * 4),
                                                                load_shared<float>(shared + C::kNorms + r * 4)));
      block_sync();
    }
    // The least of this lane's codes.
    u64 least[kRows];
#pragma unroll
    for (u32 r = 0; r < kRows; ++r) least[r] = static_cast<u64>(float_bits(__builtin_huge_valf())) << 32;
#pragma unroll 1
    for (u32 tile = first; tile < tiles; tile += step) {
      float sum[kRows] = {};
#pragma unroll 1
      for (u32 piece = 0; piece < pieces; ++piece) {
        mbarrier_wait(full + 8 * slot, parity);
        const u32 left = chunks - piece * kStreamPiece, here = left < kStreamPiece ? left : kStreamPiece;
        u32 from = ring + slot * kStreamPieceBytes + lane * 16, v_at = search + piece * kStreamPiece * 16;
#pragma unroll 2
        for (u32 k = 0; k < here; ++k, from += kCodeLanes * 16, v_at += 16) {
          const auto c = load_shared<Vec<float, 4>>(from);
          Vec<float, 4> v[kRows];
#pragma unroll
          for (u32 r = 0; r < kRows; ++r) v[r] = load_shared<Vec<float, 4>>(v_at + r * at.stride());
#pragma unroll
          for (u32 i = 0; i < 4; ++i)
#pragma unroll
            for (u32 r = 0; r < kRows; ++r) {
              const float difference = v[r].data[i] - c.data[i];
              sum[r] = fma(difference, difference, sum[r]);
            }
        }
        warp_sync();  // all lanes have read it
        if (lane == 0) send();
        if (++slot == kStreamSlots) slot = 0, parity ^= 1;
      }
      const u32 code = tile * kCodeLanes + lane;
#pragma unroll
      for (u32 r = 0; r < kRows; ++r) {
        const u64 key = static_cast<u64>(float_bits(sum[r])) << 32 | code;
        // Scores are not negative; those that are NaN or infinite are above what stands there.
        if (code < entries && key < least[r]) least[r] = key;
      }
    }
    // The warp's word in every block.
    const u32 words = shared + C::kWords + level % 2 * C::kWordBytes;
#pragma unroll
    for (u32 r = 0; r < kRows; ++r) {
      const u32 score = static_cast<u32>(least[r] >> 32), best = warp_reduce_min(score);
      const u32 code = warp_reduce_min(score == best ? static_cast<u32>(least[r]) : ~0u);
      const u32 word = words + ((r * kMostCluster + rank) * kStreamWarps + warp) * 8;
      if (lane < blocks) store_cluster(map_to_rank(word, lane), static_cast<u64>(best) << 32 | code);
    }
    cluster_arrive();
    cluster_wait();
#pragma unroll 1
    for (u32 r = warp; r < kRows; r += kStreamWarps) {
      u32 score = ~0u, code = ~0u;
      for (u32 i = lane; i < blocks * kStreamWarps; i += kWarpSize) {
        const u64 word = load_shared<u64>(words + (r * kMostCluster * kStreamWarps + i) * 8);
        const u32 s = static_cast<u32>(word >> 32), c = static_cast<u32>(word);
        if (s < score || (s == score && c < code)) score = s, code = c;
      }
      const u32 best = warp_reduce_min(score);
      code = warp_reduce_min(score == best ? code : ~0u);
      if (lane == 0) store_shared(shared + C::kCodes + r * 8, static_cast<u64>(best) << 32 | code);
    }
    block_sync();
    if (rank == 0 && thread < rows) {
      const u64 winner = load_shared<u64>(shared + C::kCodes + thread * 8);
      out.write(p, level, static_cast<u32>(winner), bits_float(static_cast<u32>(winner >> 32)));
    }
    const float* values = values_of(p, level);
#pragma unroll
    for (u32 r = 0; r < kRows; ++r) {
      const u32 code = static_cast<u32>(load_shared<u64>(shared + C::kCodes + r * 8));
      for (u32 k = thread; k < padded; k += kStreamThreads) {
        const u32 place = x + r * at.stride() + k * 4;
        store_shared(place, load_shared<float>(place) - load_global_nc(values + static_cast<u64>(code) * padded + k));
      }
    }
    block_sync();
  }
  // The words of the last level have been read by the block that they lie in; nothing of another block's is touched any more.
  if (rank == 0 && warp == 0) {
    if (p.residual_or_null) store_residual(p, first_row, rows, x, at.stride());
    if (p.quantized_or_null) store_quantized(p, first_row, rows);
  }
}

template <int kRows> nxs_status rvq_encode_stream_launch(const nxs_rvq_encode_params& p, void* stream) {
  const u32 bytes = StreamShared<kRows>{static_cast<u32>(p.codebook.padded_dim)}.bytes(p.codebook.metric != NXS_METRIC_L2);
  const auto kernel = rvq_encode_stream_kernel<kRows>;
  NXS_TRY(allow_dynamic_smem(kernel));
  if (p.splits > 8) NXS_TRY(allow_large_clusters(kernel));
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((p.batch * p.rows + kRows - 1) / kRows * p.splits));
  shape.block = kStreamThreads;
  shape.dynamic_smem = bytes;
  shape.cluster = static_cast<unsigned>(p.splits);
  return launch(kernel, shape, stream, p);
}

}  // namespace nxs::quantization
