// RVQ encode on any tensor cores since Ampere: mma.sync, cp.async. rvq_encode.cuh has what is done with the products.
//
// Grid       a block for each 16 to 64 rows.
// Block      1 to 4 warps of 16 rows each, through all levels; each for itself but for the stream.
// Stream     pieces of the operand, a tile's one after the other, all levels in a row, so that the next level's are under way
//            while winners are chosen; 2 or 3 slots.
// Products   128 codes at a time, f32 sums in registers; A and B by ldmatrix, 8 rows of 16 bytes side by side.
// Limits     each warp reads all of B from shared memory, about as fast as tensor cores multiply.
#pragma once
#include "common/ptx/async_copy.cuh"
#include "common/ptx/matrix.cuh"
#include "quantization/rvq_encode.cuh"

namespace nxs::quantization {

constexpr int kEncodeSm80Threads = 128;

template <int kGroup>
__global__ void __launch_bounds__(kEncodeSm80Threads)
    rvq_encode_sm80_kernel(const __grid_constant__ nxs_rvq_encode_params p) {
  const u32 shared = dynamic_shared(), thread = thread_index(), lane = thread % kWarpSize, threads = block_size();
  const u32 tile_rows = static_cast<u32>(p.tile_rows), stages = static_cast<u32>(p.stages);
  const EncodeShared at = encode_shared(p.codebook, tile_rows, stages, 1);
  const PieceStream stream(p, block_index_x(), 0, 1);
  PieceWalk ahead(stream);
  u32 sent = 0, sent_slot = 0;
  const auto send = [&] {
    if (sent < stream.all) {
      const u32 to = shared + sent_slot * at.stage_bytes;
      for (u32 o = thread * 16; o < stream.piece_bytes; o += threads * 16) copy_async<16>(to + o, ahead.from + o);
      ahead.next(stream);
      ++sent;
      if (++sent_slot == stages) sent_slot = 0;
    }
    copy_async_commit();
  };
  for (u32 i = 0; i + 1 < stages; ++i) send();

  EncodeWarp<kGroup, false> warp(p, shared, at, tile_rows, block_index_x(), thread / kWarpSize);
  warp.load_rows();
  const u32 a_from = warp.a + (lane / 16 * tile_rows + lane % 16) * 16;
  const u32 b_from = shared + (lane / 8 % 2 * kCodeTile + lane % 8 + lane / 16 * 8) * 16;
  u32 slot = 0;
#pragma unroll 1
  for (u32 level = 0; level < static_cast<u32>(p.levels); ++level) {
    warp.begin_level(level);
#pragma unroll 1
    for (u32 tile = 0; tile < stream.tiles; ++tile) {
      float s[64];
#pragma unroll
      for (u32 i = 0; i < 64; ++i) s[i] = 0;
#pragma unroll 1
      for (u32 piece = 0, q = 0; piece < stream.pieces; ++piece) {
        if (stages == 2)
          copy_async_wait<0>();
        else
          copy_async_wait<1>();
        block_sync();  // also: the slot that is sent into now has been read by all
        send();
        const u32 ends = q + 2 * stream.steps;
        u32 b_at = b_from + slot * at.stage_bytes;
#pragma unroll 1
        for (; q < ends; q += 2, b_at += 2 * kCodeTile * 16) {
          u32 a[4];
          load_matrix(a, a_from + q * tile_rows * 16);
#pragma unroll
          for (u32 n = 0; n < 8; ++n) {
            u32 b[4];
            load_matrix(b, b_at + n * 16 * 16);
            mma_bf16(reinterpret_cast<float(&)[4]>(s[8 * n]), a, b[0], b[1]);
            mma_bf16(reinterpret_cast<float(&)[4]>(s[8 * n + 4]), a, b[2], b[3]);
          }
        }
        if (++slot == stages) slot = 0;
      }
      warp.take_tile(stream.tile(tile), s);
    }
    warp.choose(level, 0, stream.tiles);
    warp.end_level(level);
  }
  copy_async_wait<0>();
  warp.finish();
}

template <int kGroup> nxs_status rvq_encode_sm80_launch(const nxs_rvq_encode_params& p, void* stream) {
  const EncodeShared at = encode_shared(p.codebook, static_cast<u32>(p.tile_rows), static_cast<u32>(p.stages), 1);
  const auto kernel = rvq_encode_sm80_kernel<kGroup>;
  NXS_TRY(allow_dynamic_smem(kernel));
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((p.batch * p.rows + p.tile_rows - 1) / p.tile_rows));
  shape.block = static_cast<unsigned>(p.tile_rows) * 2;
  shape.dynamic_smem = at.bytes;
  return launch(kernel, shape, stream, p);
}

}  // namespace nxs::quantization
