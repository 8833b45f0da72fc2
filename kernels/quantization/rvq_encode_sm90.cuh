// RVQ encode on Hopper: wgmma, bulk copies, a producer warp. rvq_encode.cuh has what is done with the products.
//
// Grid       a block for each 64 rows; two share a multiprocessor where their rows leave the room.
// Block      a consumer warpgroup, whose warps own 16 rows each, and a producer warp, which streams pieces of the operand by bulk
//            copies: they lie in memory as wgmma wants them, without swizzle (8 rows of 16 bytes side by side). All levels in a
//            row, so that the next level's first pieces come while winners are chosen.
// Overlap    two tiles of sums: the maxima of one are taken while the next one's products are under way.
// Barriers   of a slot: full (the copy), empty (4 warps). The warpgroup meets when A is written, and when it has been read.
// Limits     dim <= 256; sm_90a.
#pragma once
#include "common/ptx/barrier.cuh"
#include "common/ptx/bulk.cuh"
#include "common/ptx/fence.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/wgmma.cuh"
#include "quantization/rvq_encode.cuh"

namespace nxs::quantization {

constexpr u32 kEncodeSm90Rows = 64, kEncodeConsumers = 128, kEncodeSm90Threads = kEncodeConsumers + kWarpSize;

// A place in the ring: its slot, and the parity that the consumer waits for.
struct RingPlace {
  u32 slot = 0, parity = 0;
  NXS_DEVICE void next(u32 stages) {
    if (++slot < stages) return;
    slot = 0;
    parity ^= 1;
  }
};

// The consumer warpgroup, as each of its warps sees it.
template <int kGroup> struct EncodeConsumer {
  EncodeWarp<kGroup>& warp;
  const PieceStream& stream;
  const u32 shared, full, empty, stages, stage_bytes, lane;
  const u64 a;  // descriptor
  RingPlace at, before;
  bool under_way = false;
  PieceWalk walk;

  NXS_DEVICE void release() {
    if (lane == 0) mbarrier_arrive(empty + 8 * before.slot);
  }
  // Issues the products of a tile. With the first piece on its way, those of the tile before are whole: takes them.
  NXS_DEVICE void start_tile(u32 tile, float (&now)[64], const float (&last)[64]) {
    u32 q = 0;
#pragma unroll 1
    for (u32 piece = 0; piece < stream.pieces; ++piece) {
      const u32 eights = walk.bytes(stream) / 2048;
      mbarrier_wait(full + 8 * at.slot, at.parity);
      u64 b = matrix_descriptor(shared + at.slot * stage_bytes, kCodeTile * 16, 128, Swizzle::kNone);
      wgmma_fence();
#pragma unroll 1
      for (u32 k = 0; k < eights; k += 2, q += 2, b += 2 * kCodeTile * 16 >> 4)
        wgmma_bf16<128>(now, a + q * (kEncodeSm90Rows * 16 >> 4), b, q != 0);
      wgmma_commit();
      if (under_way) {
        wgmma_wait<1>();
        release();
        if (piece == 0) {
          keep_registers(const_cast<float(&)[64]>(last));
          warp.take_tile(tile - 1, last);
        }
      }
      under_way = true;
      before = at;
      at.next(stages);
      walk.next(stream);
    }
  }
  NXS_DEVICE void last_tile(u32 tile, float (&last)[64]) {
    wgmma_wait<0>();
    keep_registers(last);
    release();
    under_way = false;
    warp.take_tile(tile, last);
  }

  NXS_DEVICE void run(u32 levels) {
    float even[64], odd[64];
#pragma unroll
    for (u32 i = 0; i < 64; ++i) even[i] = odd[i] = 0;
    warp.load_rows();
#pragma unroll 1
    for (u32 level = 0; level < levels; ++level) {
      warp.begin_level(level);
      fence_async_shared();
      barrier_sync(1, kEncodeConsumers);
      u32 tile = 0;
#pragma unroll 1
      for (; tile + 2 <= stream.tiles; tile += 2) {
        start_tile(tile, even, odd);
        start_tile(tile + 1, odd, even);
      }
      if (tile < stream.tiles) {
        start_tile(tile, even, odd);
        last_tile(tile, even);
      } else {
        last_tile(tile - 1, odd);
      }
      warp.choose(level);
      barrier_sync(1, kEncodeConsumers);  // A has been read
      warp.end_level(level);
    }
    warp.finish();
  }
};

template <int kGroup>
__global__ void __launch_bounds__(kEncodeSm90Threads, 2)
    rvq_encode_sm90_kernel(const __grid_constant__ nxs_rvq_encode_params p) {
  const u32 shared = dynamic_shared(), thread = thread_index(), stages = static_cast<u32>(p.stages);
  const EncodeShared at = encode_shared(p.codebook, kEncodeSm90Rows, stages);
  const u32 full = shared + at.barriers, empty = full + 8 * stages;
  if (thread == 0) {
    for (u32 i = 0; i < stages; ++i) {
      mbarrier_init(full + 8 * i, 1);
      mbarrier_init(empty + 8 * i, kEncodeConsumers / kWarpSize);
    }
    fence_mbarrier_init();
  }
  block_sync();
  const PieceStream stream(p);
  if (thread >= kEncodeConsumers) {
    if (thread == kEncodeConsumers) {
      PieceWalk walk;
      RingPlace to;
#pragma unroll 1
      for (u32 i = 0; i < stream.all; ++i) {
        mbarrier_wait(empty + 8 * to.slot, to.parity ^ 1);
        const u32 bytes = walk.bytes(stream);
        mbarrier_arrive_expect(full + 8 * to.slot, bytes);
        bulk_load(shared + to.slot * at.stage_bytes, walk.from(stream), bytes, full + 8 * to.slot);
        walk.next(stream);
        to.next(stages);
      }
    }
    return;
  }
  EncodeWarp<kGroup> warp(p, shared, at, kEncodeSm90Rows, block_index_x(), thread / kWarpSize);
  EncodeConsumer<kGroup>{warp, stream, shared, full, empty, stages, at.stage_bytes, thread % kWarpSize,
                         matrix_descriptor(shared + at.a, kEncodeSm90Rows * 16, 128, Swizzle::kNone), {}, {}, false, {}}
      .run(static_cast<u32>(p.levels));
}

template <int kGroup> nxs_status rvq_encode_sm90_launch(const nxs_rvq_encode_params& p, void* stream) {
  const EncodeShared at = encode_shared(p.codebook, kEncodeSm90Rows, static_cast<u32>(p.stages));
  const auto kernel = rvq_encode_sm90_kernel<kGroup>;
  NXS_TRY(allow_dynamic_smem(kernel, at.bytes));
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((p.batch * p.rows + kEncodeSm90Rows - 1) / kEncodeSm90Rows));
  shape.block = kEncodeSm90Threads;
  shape.dynamic_smem = at.bytes;
  return launch(kernel, shape, stream, p);
}

}  // namespace nxs::quantization
