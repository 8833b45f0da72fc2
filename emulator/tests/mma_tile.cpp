// cp.async, ldmatrix and mma.sync: C[m][n] = sum over k of A[m][k] B, a tile of 64 x 64 a block, two stages of 32 k.
#include "common/ptx/async_copy.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/matrix.cuh"
#include "common/ptx/memory.cuh"
#include "common/ptx/shared.cuh"
#include "gemm_reference.h"

namespace nxs {

constexpr u32 kTile = 64, kDepth = 32, kStage = kTile * kDepth * 2;

// Rows of 64 bytes (A, and B as [n][k]) or of 128 (B as [k][n]); 16-byte chunks change places by row.
NXS_DEVICE u32 chunk64(u32 row, u32 chunk) { return row * 64 + ((chunk ^ (row >> 1 & 3)) << 4); }
NXS_DEVICE u32 chunk128(u32 row, u32 chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

template <bool kF16, bool kTransposedB> __global__ void __launch_bounds__(128)
    mma_tile_kernel(const u16* a, const u16* b, float* c, i32 m, i32 n, i32 k) {
  const u32 shared_a = dynamic_shared(), shared_b = shared_a + 2 * kStage;
  const u32 t = thread_index(), lane = t % 32, warp = t / 32;
  const i32 m0 = static_cast<i32>(block_index_y() * kTile), n0 = static_cast<i32>(block_index_x() * kTile);
  const auto load = [&](i32 k0, u32 stage) {
    for (u32 i = t; i < kTile * kDepth / 8; i += 128) {
      const u32 row = i / 4, chunk = i % 4;
      const i32 x = k0 + static_cast<i32>(chunk * 8), y = m0 + static_cast<i32>(row);
      const bool in = y < m && x < k;
      copy_async<16>(shared_a + stage + chunk64(row, chunk), a + (in ? static_cast<i64>(y) * k + x : 0), in ? 16 : 0);
    }
    for (u32 i = t; i < kTile * kDepth / 8; i += 128) {
      if constexpr (kTransposedB) {
        const u32 row = i / 8, chunk = i % 8;
        const i32 x = n0 + static_cast<i32>(chunk * 8), y = k0 + static_cast<i32>(row);
        const bool in = y < k && x < n;
        copy_async<16>(shared_b + stage + chunk128(row, chunk), b + (in ? static_cast<i64>(y) * n + x : 0),
                       in ? 16 : 0);
      } else {
        const u32 row = i / 4, chunk = i % 4;
        const i32 x = k0 + static_cast<i32>(chunk * 8), y = n0 + static_cast<i32>(row);
        const bool in = y < n && x < k;
        copy_async<16>(shared_b + stage + chunk64(row, chunk), b + (in ? static_cast<i64>(y) * k + x : 0), in ? 16 : 0);
      }
    }
  };
  float sum[8][4] = {};
  const i32 steps = (k + static_cast<i32>(kDepth) - 1) / static_cast<i32>(kDepth);
  load(0, 0);
  copy_async_commit();
  for (i32 step = 0; step < steps; ++step) {
    const u32 stage = (static_cast<u32>(step) & 1) * kStage;
    if (step + 1 < steps) load((step + 1) * static_cast<i32>(kDepth), stage ^ kStage);
    copy_async_commit();
    copy_async_wait<1>();
    block_sync();
#pragma unroll
    for (u32 kk = 0; kk < 2; ++kk) {
      u32 fa[4];
      load_matrix(fa, shared_a + stage + chunk64(warp * 16 + lane % 16, kk * 2 + lane / 16));
#pragma unroll
      for (u32 j = 0; j < 4; ++j) {
        u32 fb[4];
        if constexpr (kTransposedB)
          load_matrix_transposed(fb, shared_b + stage + chunk128(kk * 16 + lane % 16, j * 2 + lane / 16));
        else
          load_matrix(fb, shared_b + stage + chunk64(j * 16 + lane % 8 + lane / 16 * 8, kk * 2 + lane / 8 % 2));
        if constexpr (kF16) {
          mma_f16(sum[2 * j], fa, fb[0], fb[1]);
          mma_f16(sum[2 * j + 1], fa, fb[2], fb[3]);
        } else {
          mma_bf16(sum[2 * j], fa, fb[0], fb[1]);
          mma_bf16(sum[2 * j + 1], fa, fb[2], fb[3]);
        }
      }
    }
    block_sync();
  }
#pragma unroll
  for (i32 j = 0; j < 8; ++j)
#pragma unroll
    for (i32 i = 0; i < 4; ++i) {
      const i32 row = m0 + static_cast<i32>(warp * 16 + lane / 4) + i / 2 * 8,
                column = n0 + j * 8 + static_cast<i32>(lane % 4 * 2) + i % 2;
      if (row < m && column < n) store_global(c + static_cast<i64>(row) * n + column, sum[j][i]);
    }
}

// One mma of tf32: A [16][8], B [8][8] as [n][k].
__global__ void __launch_bounds__(32) tf32_kernel(const u32* a, const u32* b, float* c) {
  const u32 g = thread_index() / 4, t = thread_index() % 4;
  const u32 fa[4] = {load_global(a + g * 8 + t), load_global(a + (g + 8) * 8 + t), load_global(a + g * 8 + t + 4),
                     load_global(a + (g + 8) * 8 + t + 4)};
  float sum[4] = {1, 2, 3, 4};
  mma_tf32(sum, fa, load_global(b + g * 8 + t), load_global(b + g * 8 + t + 4));
#pragma unroll
  for (u32 i = 0; i < 4; ++i) store_global(c + (g + i / 2 * 8) * 8 + 2 * t + i % 2, sum[i]);
}

}  // namespace nxs

template <bool kF16, bool kTransposedB> static void run_tile(const char* name) {
  for (const bool integers : {true, false})
    for (const test::Gemm g :
         {test::Gemm{64, 64, 32, false, kTransposedB}, test::Gemm{100, 80, 144, false, kTransposedB}}) {
      const auto a = test::make_matrix(size_t(g.m) * g.k, integers, kF16, 1),
                 b = test::make_matrix(size_t(g.n) * g.k, integers, kF16, 2);
      test::Buffer<uint16_t> da(a), db(b);
      test::Buffer<float> c(size_t(g.m) * g.n);
      nxs::LaunchShape shape;
      shape.grid = dim3((g.n + 63) / 64, (g.m + 63) / 64);
      shape.block = 128;
      shape.dynamic_smem = 4 * nxs::kStage;
      const std::string label = std::string(name) + (integers ? " integers " : " random ") + std::to_string(g.m);
#if !defined(__CUDACC__)
      nxs_emulator_reset();
#endif
      test::check(test::finish_launch(nxs::launch(nxs::mma_tile_kernel<kF16, kTransposedB>, shape, nullptr, da.get(),
                                                  db.get(), c.get(), g.m, g.n, g.k)) == NXS_OK,
                  label + " runs");
      test::check_product(label, g, a, b, integers, kF16, c.read(), g.n);
#if !defined(__CUDACC__)
      nxs_emulator_counts counts;
      nxs_emulator_counters(&counts);
      const uint64_t steps = (g.k + 31) / 32, blocks = uint64_t(shape.grid.x) * shape.grid.y;
      test::check((kF16 ? counts.mma_f16_flops : counts.mma_bf16_flops) == blocks * steps * 2 * 64 * 64 * 32,
                  label + " counts its FLOPs");
      test::check(counts.shared_conflicts == 0, label + " has no bank conflicts");
      // The plan: each operand once for each tile of the other. Every row here is a whole number of sectors.
      const uint64_t plan = 2ull * g.k * (uint64_t(g.m) * shape.grid.x + uint64_t(g.n) * shape.grid.y);
      test::check(counts.global_load_bytes == plan, label + " loads what its plan says");
      test::check(counts.barriers == blocks * steps * 2, label + " counts its barriers");
#endif
    }
}

static void run_tf32() {
  std::vector<float> a(16 * 8), b(8 * 8);
  test::Random random(3);
  for (auto& x : a) x = static_cast<float>(random.below(2001)) - 1000;
  for (auto& x : b) x = static_cast<float>(random.below(2001)) - 1000;
  a[5] = 1 + 0x1p-12f;  // the last bits of an operand are not looked at
  test::Buffer<float> da(a), db(b), c(16 * 8);
  nxs::LaunchShape shape;
  shape.block = 32;
  test::check(
      test::finish_launch(nxs::launch(nxs::tf32_kernel, shape, nullptr, reinterpret_cast<const uint32_t*>(da.get()),
                                      reinterpret_cast<const uint32_t*>(db.get()), c.get())) == NXS_OK,
      "tf32 runs");
  a[5] = 1;
  bool equal = true;
  const auto got = c.read();
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      float sum = static_cast<float>(1 + m / 8 * 2 + n % 2);
      for (int k = 0; k < 8; ++k) sum += a[m * 8 + k] * b[n * 8 + k];
      equal &= got[m * 8 + n] == sum;
    }
  test::check(equal, "tf32 product");
  test::print_checksum("tf32", got);
}

int main() {
  run_tile<false, false>("mma bf16 [n][k]");
  run_tile<false, true>("mma bf16 [k][n]");
  run_tile<true, false>("mma f16 [n][k]");
  run_tile<true, true>("mma f16 [k][n]");
  run_tf32();
  return test::finish();
}
