// RVQ encode on Hopper: wgmma, bulk copies, a producer warp. rvq_encode.cuh has what is done with the products.
//
// Grid       a block for each 64 rows, or where these are few several, each with a part of the codes; two blocks share a
//            multiprocessor where their rows leave the room. Blocks of different rows and the same codes form a cluster: each asks
//            L2 for its part of a piece and multicasts it, for L2 cannot feed all blocks as fast as wgmma reads.
// Block      a consumer warpgroup, whose warps own 16 rows each, and a producer warpgroup, one thread of which streams pieces of
//            the operand by bulk copies: they lie in memory as wgmma wants them, without swizzle (8 rows of 16 bytes side by
//            side). All levels in a row, so that the next level's first pieces come while winners are chosen.
// Overlap    two tiles of sums: the maxima of one are taken while the next one's products are under way.
// Barriers   of a slot: full (the copies), empty (4 warps of each block that the piece goes to). The warpgroup meets when A is
//            written, and when it has been read.
// Limits     dim <= 256; sm_90a.
#pragma once
#include "common/ptx/barrier.cuh"
#include "common/ptx/bulk.cuh"
#include "common/ptx/fence.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/wgmma.cuh"
#include "quantization/rvq_encode.cuh"

namespace nxs::quantization {

constexpr u32 kEncodeSm90Rows = 64, kEncodeConsumers = 128, kEncodeSm90Threads = 2 * kEncodeConsumers;

// A place in the ring: its slot, and the parity that the consumer waits for.
struct RingPlace {
  u32 slot = 0, parity = 0;
  NXS_DEVICE void next(u32 stages) {
    if (++slot < stages) return;
    slot = 0;
    parity ^= 1;
  }
};

// The consumer warpgroup, as each of its warps sees it. kSteps: of 16, of a piece.
template <int kGroup, int kSteps> struct EncodeConsumer {
  EncodeWarp<kGroup, true>& warp;
  const PieceStream& stream;
  const u32 shared, full, empty, stages, lane;
  const u32 sharers;
  const u64 a;  // descriptor
  RingPlace at;
  u32 before = 0;  // slot of the piece that is under way

  NXS_DEVICE void start_piece(float (&now)[64], u32 piece, bool accumulate) {
    mbarrier_wait(full + 8 * at.slot, at.parity);
    const u64 b = matrix_descriptor(shared + at.slot * (kSteps * kStepBytes), kCodeTile * 16, 128, Swizzle::kNone);
    const u64 a_piece = a + piece * (kSteps * 2 * kEncodeSm90Rows * 16 >> 4);
    wgmma_fence();
#pragma unroll
    for (u32 k = 0; k < kSteps; ++k)
      wgmma_bf16<128>(now, a_piece + k * (2 * kEncodeSm90Rows * 16 >> 4), b + k * (2 * kCodeTile * 16 >> 4), accumulate || k > 0);
    wgmma_commit();
  }
  // The piece before the latest one has been read.
  NXS_DEVICE void release() {
    const u32 barrier = empty + 8 * before;
    if (sharers == 1) {
      if (lane == 0) mbarrier_arrive(barrier);
    } else if (lane < sharers) {
      mbarrier_arrive_read(map_to_rank(barrier, lane));
    }
  }
  NXS_DEVICE void step() {
    before = at.slot;
    at.next(stages);
  }
  NXS_DEVICE void rest_of_tile(float (&now)[64]) {
#pragma unroll 1
    for (u32 piece = 1; piece < stream.pieces; ++piece) {
      start_piece(now, piece, true);
      wgmma_wait<1>();
      release();
      step();
    }
  }
  // Issues the products of a tile. With the first piece on its way, those of the tile before are whole: takes them.
  NXS_DEVICE void next_tile(u32 tile, float (&now)[64], float (&last)[64]) {
    start_piece(now, 0, false);
    wgmma_wait<1>();
    keep_registers(last);
    release();
    step();
    warp.take_tile(stream.tile(tile - 1), last);
    rest_of_tile(now);
  }
  NXS_DEVICE void last_tile(u32 tile, float (&last)[64]) {
    wgmma_wait<0>();
    keep_registers(last);
    release();
    warp.take_tile(stream.tile(tile), last);
  }

  NXS_DEVICE void run(u32 levels) {
    const u32 tiles = stream.tiles;
    float even[64], odd[64];
    warp.load_rows();
#pragma unroll 1
    for (u32 level = 0; level < levels; ++level) {
      warp.begin_level(level);
      fence_async_shared();
      barrier_sync(1, kEncodeConsumers);
      start_piece(even, 0, false);
      step();
      rest_of_tile(even);
      u32 tile = 1;
#pragma unroll 1
      for (; tile + 2 <= tiles; tile += 2) {
        next_tile(tile, odd, even);
        next_tile(tile + 1, even, odd);
      }
      if (tile < tiles) {
        next_tile(tile, odd, even);
        last_tile(tile, odd);
      } else {
        last_tile(tile - 1, even);
      }
      warp.choose(level, stream.first, tiles);
      barrier_sync(1, kEncodeConsumers);  // A has been read
      warp.end_level(level);
    }
    warp.finish();
  }
};

template <int kGroup, int kSteps>
__global__ void __launch_bounds__(kEncodeSm90Threads, 2)
    rvq_encode_sm90_kernel(const __grid_constant__ nxs_rvq_encode_params p) {
  const u32 shared = dynamic_shared(), thread = thread_index(), stages = static_cast<u32>(p.stages);
  const u32 ranks = static_cast<u32>(p.splits), sharers = static_cast<u32>(p.sharers);  // one of them is 1
  const EncodeShared at = encode_shared(p.codebook, kEncodeSm90Rows, stages, ranks);
  const u32 full = shared + at.barriers, empty = full + 8 * stages, told = empty + 8 * stages;
  const u32 in_cluster = ranks * sharers > 1 ? cluster_rank() : 0, rank = ranks > 1 ? in_cluster : 0;
  if (thread == 0) {
    for (u32 i = 0; i < stages; ++i) {
      mbarrier_init(full + 8 * i, 1);
      mbarrier_init(empty + 8 * i, sharers * (kEncodeConsumers / kWarpSize));
    }
    if (ranks > 1)
      for (u32 i = 0; i < kEncodeConsumers / kWarpSize; ++i) mbarrier_init(told + 8 * i, ranks - 1);
    fence_mbarrier_init();
  }
  block_sync();
  if (ranks * sharers > 1) {
    cluster_arrive();  // the others tell this block's mbarriers
    cluster_wait();
  }
  const u32 tile = block_index_x() / ranks;
  const PieceStream stream(p, tile / sharers, rank, ranks);
  if (thread >= kEncodeConsumers) {
    lower_registers<40, 2>();
    if (thread == kEncodeConsumers) {
      const u16 all = static_cast<u16>((1 << sharers) - 1);
      PieceWalk walk(stream);
      RingPlace to;
#pragma unroll 1
      for (u32 i = 0; i < stream.all; ++i) {
        mbarrier_wait(empty + 8 * to.slot, to.parity ^ 1);
        mbarrier_arrive_expect(full + 8 * to.slot, kSteps * kStepBytes);
        const u32 slot = shared + to.slot * (kSteps * kStepBytes);
        if (sharers == 1) {
          bulk_load(slot, walk.from, kSteps * kStepBytes, full + 8 * to.slot);
        } else {
          // The others' mbarriers count what comes before they expect it.
          const u32 part = kSteps * kStepBytes / sharers, from = in_cluster * part;
          bulk_load_multicast(slot + from, walk.from + from, part, full + 8 * to.slot, all);
        }
        walk.next(stream);
        to.next(stages);
      }
    }
  } else {
    raise_registers<208, 2>();
    const u32 own = thread / kWarpSize;
    EncodeWarp<kGroup, true> warp(p, shared, at, kEncodeSm90Rows, tile, own);
    warp.rank = rank;
    warp.ranks = ranks;
    warp.peers = shared + at.peers + own * 2 * kPeerBytes;
    warp.told = told + 8 * own;
    EncodeConsumer<kGroup, kSteps>{warp, stream, shared, full, empty, stages, thread % kWarpSize, sharers,
                                   matrix_descriptor(shared + at.a, kEncodeSm90Rows * 16, 128, Swizzle::kNone), {}}
        .run(static_cast<u32>(p.levels));
  }
  if (sharers > 1) {
    warp_sync();
    cluster_arrive();  // the others still read pieces, and tell this block so
    cluster_wait();
  }
}

template <int kGroup, int kSteps> nxs_status rvq_encode_sm90_launch_steps(const nxs_rvq_encode_params& p, void* stream) {
  const EncodeShared at = encode_shared(p.codebook, kEncodeSm90Rows, static_cast<u32>(p.stages), static_cast<u32>(p.splits));
  const auto kernel = rvq_encode_sm90_kernel<kGroup, kSteps>;
  NXS_TRY(allow_dynamic_smem(kernel));
  LaunchShape shape;
  const i64 tiles = (p.batch * p.rows + kEncodeSm90Rows - 1) / kEncodeSm90Rows;
  const unsigned cluster = static_cast<unsigned>(p.splits * p.sharers);
  // Whole clusters: the last one may have blocks without rows.
  shape.grid = dim3(static_cast<unsigned>((tiles + p.sharers - 1) / p.sharers) * cluster);
  shape.block = kEncodeSm90Threads;
  shape.cluster = cluster;
  shape.dynamic_smem = at.bytes;
  return launch(kernel, shape, stream, p);
}
template <int kGroup> nxs_status rvq_encode_sm90_launch(const nxs_rvq_encode_params& p, void* stream) {
  switch (steps_of(static_cast<u32>(p.codebook.operand_dim))) {
    case 4: return rvq_encode_sm90_launch_steps<kGroup, 4>(p, stream);
    case 3: return rvq_encode_sm90_launch_steps<kGroup, 3>(p, stream);
    default: return rvq_encode_sm90_launch_steps<kGroup, 2>(p, stream);
  }
}

}  // namespace nxs::quantization
