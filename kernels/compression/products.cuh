// Products of a warp's 32 keys, in registers, with vectors in shared memory: mma.sync without ldmatrix.
//
// The order of a product's k is free as long as both factors have the same. Lane (g, t) of m16n8k16 loads the 16-byte pieces
// 4 b + t of keys g, g + 8, ... straight from global memory: piece 4 b + t holds the elements that the lane needs of steps
// 2 b and 2 b + 1. Of vector g it reads the same pieces from shared memory, 16 bytes at once. So keys need no shared memory
// and no barrier; a block of d 32 costs one read of 16 bytes a lane for 4 products.
#pragma once
#include "common/dtype.cuh"
#include "common/ptx/matrix.cuh"
#include "common/ptx/shared.cuh"

namespace nxs::compression {

constexpr u32 kWarpKeys = 32;

// Vectors in shared memory, in rows.
template <int kDim> struct VectorTile {
  static constexpr u32 kPieces = kDim / 8, kRowBytes = kDim * 2, kBlocks = kDim / 32;
  // Of two rows that follow each other, 64 bytes each are in other banks.
  NXS_DEVICE static u32 piece_at(u32 row, u32 piece) {
    return row * kRowBytes + (kDim == 96 ? piece : piece ^ row % 2 * 4) * 16;
  }
  // Of this lane: its piece of block b of the eight rows that begin at `address`, which is a multiple of 256.
  u32 lane_at;
  NXS_DEVICE explicit VectorTile(u32 lane) : lane_at(piece_at(lane / 4, lane % 4)) {}
  NXS_DEVICE u32 at(u32 address, u32 block) const {
    return kDim == 96 ? address + lane_at + block * 64 : address + (lane_at ^ block * 64);
  }
};

// A warp's 32 keys: two factors A of 16 rows.
template <typename T, int kDim> struct Keys {
  u32 a[2][kDim / 16][4];

  // Keys beyond the last are the last one again. `rows` is the row at place 0.
  template <typename Places>
  NXS_DEVICE void load(const T* rows, i64 stride, u32 key, u32 last, const Places& places) {
    const u32 lane = thread_index() % kWarpSize;
#pragma unroll
    for (u32 m = 0; m < 2; ++m)
#pragma unroll
      for (u32 half = 0; half < 2; ++half) {
        u32 row = key + m * 16 + half * 8 + lane / 4;
        if (row > last) row = last;
        const T* from = rows + places(row) * stride + lane % 4 * 8;
#pragma unroll
        for (u32 block = 0; block < kDim / 32; ++block) {
          const auto piece = load_global_nc(reinterpret_cast<const Vec<u32, 4>*>(from + block * 32));
#pragma unroll
          for (u32 i = 0; i < 4; ++i) a[m][2 * block + i / 2][half + i % 2 * 2] = piece.data[i];
        }
      }
  }
  // d = K V^T of eight vectors: element i of d[m] is of key 16 m + 8 (i / 2) + lane / 4, vector 2 (lane % 4) + i % 2.
  NXS_DEVICE void multiply(float (&d)[2][4], const VectorTile<kDim>& tile, u32 address) const {
#pragma unroll
    for (u32 i = 0; i < 8; ++i) d[i / 4][i % 4] = 0;
#pragma unroll
    for (u32 block = 0; block < kDim / 32; ++block) {
      const auto b = load_shared<Vec<u32, 4>>(tile.at(address, block));
#pragma unroll
      for (u32 step = 0; step < 2; ++step)
#pragma unroll
        for (u32 m = 0; m < 2; ++m) product(d[m], a[m][2 * block + step], b.data[2 * step], b.data[2 * step + 1]);
    }
  }
  NXS_DEVICE static void product(float (&d)[4], const u32 (&factor)[4], u32 b0, u32 b1) {
    if constexpr (DType<T>::value == NXS_BF16) mma_bf16(d, factor, b0, b1);
    else mma_f16(d, factor, b0, b1);
  }
};

}  // namespace nxs::compression
