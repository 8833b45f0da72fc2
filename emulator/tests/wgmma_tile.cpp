// TMA and wgmma: C[m][n] = sum over k of A B. A block of three warpgroups owns 128 x kN: one loads, two multiply. Every
// layout of operands, swizzle, and A from registers; ragged sizes rely on the fill and on dropped stores.
#include "common/ptx/barrier.cuh"
#include "common/ptx/bulk.cuh"
#include "common/ptx/fence.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/matrix.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/shared.cuh"
#include "common/ptx/tensor_map.cuh"
#include "common/ptx/warp.cuh"
#include "common/ptx/wgmma.cuh"
#include "gemm_reference.h"

namespace nxs {

constexpr u32 kRows = 128, kDepth = 64, kStages = 2;

template <int kN> constexpr u32 kStageBytes = (kRows + kN) * kDepth * 2;
template <int kN> constexpr u32 kSharedBytes = kStages * kStageBytes<kN> + kRows * kN * 4 + 64;

// What both operands have in common: kExtent rows (of M or N) by 64 of k, in column blocks of `swizzle_bytes`.
template <Major kMajor, u32 kExtent, Swizzle kSwizzle> struct Operand {
  static constexpr u32 kWidth = swizzle_bytes(kSwizzle);  // bytes of a row of a column block
  static constexpr u32 kBlockRows = kMajor == Major::kK ? kExtent : kDepth;
  static constexpr u32 kBlocks = (kMajor == Major::kK ? kDepth : kExtent) * 2 / kWidth,
                       kBlockBytes = kBlockRows * kWidth;

  NXS_DEVICE static void load(u32 to, const TensorMap* map, u32 full, i32 first, i32 k) {
    for (u32 i = 0; i < kBlocks; ++i) {
      const i32 along = static_cast<i32>(i * kWidth / 2);
      if constexpr (kMajor == Major::kK)
        tensor_load(to + i * kBlockBytes, map, full, {k + along, first});
      else
        tensor_load(to + i * kBlockBytes, map, full, {first + along, k});
    }
  }
  // Rows `first` and up (a multiple of 64), k 16 * step and up.
  NXS_DEVICE static u64 descriptor(u32 tile, u32 first, u32 step) {
    constexpr bool kPlain = kSwizzle == Swizzle::kNone;
    if constexpr (kMajor == Major::kK) {
      const u32 offset = kPlain ? step * 2 * kBlockBytes : step * 32 % kWidth + step * 32 / kWidth * kBlockBytes;
      return matrix_descriptor(tile + first * kWidth + offset, kPlain ? kBlockBytes : 16, 8 * kWidth, kSwizzle);
    } else {
      const u32 start = tile + first * 2 / kWidth * kBlockBytes + step * 16 * kWidth;
      return matrix_descriptor(start, kPlain ? 128 : kBlockBytes, kPlain ? kBlockBytes : 8 * kWidth, kSwizzle);
    }
  }
};

enum class SourceA { kShared, kRegisters };

template <int kN, Major kMajorA, Major kMajorB, Swizzle kSwizzle, SourceA kSourceA, bool kF16>
__global__ void __launch_bounds__(384, 1)
    wgmma_tile_kernel(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
                      const __grid_constant__ TensorMap map_c, i32 k) {
  using A = Operand<kMajorA, kRows, kSwizzle>;
  using B = Operand<kMajorB, u32(kN), kSwizzle>;
  const u32 tiles = dynamic_shared(), tile_c = tiles + kStages * kStageBytes<kN>, full = tile_c + kRows * kN * 4,
            empty = full + 8 * kStages;
  const u32 t = thread_index(), group = t / 128;
  const i32 m0 = static_cast<i32>(block_index_y() * kRows), n0 = static_cast<i32>(block_index_x() * kN);
  const u32 steps = static_cast<u32>(k + static_cast<i32>(kDepth) - 1) / kDepth;
  if (t == 0) {
    for (u32 s = 0; s < kStages; ++s) {
      mbarrier_init(full + 8 * s, 1);
      mbarrier_init(empty + 8 * s, 8);  // consumer warps
    }
    fence_mbarrier_init();
  }
  block_sync();
  if (group == 0) {
    lower_registers<40>();
    if (t == 0) {
      prefetch_tensor_map(&map_a);
      prefetch_tensor_map(&map_b);
      for (u32 step = 0; step < steps; ++step) {
        const u32 s = step % kStages, tile = tiles + s * kStageBytes<kN>;
        mbarrier_wait(empty + 8 * s, (step / kStages & 1) ^ 1);
        mbarrier_arrive_expect(full + 8 * s, kStageBytes<kN>);
        A::load(tile, &map_a, full + 8 * s, m0, static_cast<i32>(step * kDepth));
        B::load(tile + kRows * kDepth * 2, &map_b, full + 8 * s, n0, static_cast<i32>(step * kDepth));
      }
    }
    return;
  }
  raise_registers<232>();
  const u32 consumer = group - 1, lane = t % 32, warp = t % 128 / 32;
  float d[kN / 2];
  u32 a[kDepth / 16][4];
  for (u32 step = 0; step < steps; ++step) {
    const u32 s = step % kStages, tile = tiles + s * kStageBytes<kN>, tile_b = tile + kRows * kDepth * 2;
    mbarrier_wait(full + 8 * s, step / kStages & 1);
    if constexpr (kSourceA == SourceA::kRegisters) {
#pragma unroll
      for (u32 i = 0; i < kDepth / 16; ++i) {
        const u32 plain = tile + (consumer * 64 + warp * 16 + lane % 16) * 128 + i * 32 + lane / 16 * 16;
        load_matrix(a[i], swizzled(plain, kSwizzle));
      }
    }
    wgmma_fence();
#pragma unroll
    for (u32 i = 0; i < kDepth / 16; ++i) {
      const u64 db = B::descriptor(tile_b, 0, i);
      const bool more = step > 0 || i > 0;
      if constexpr (kSourceA == SourceA::kRegisters) {
        if constexpr (kF16)
          wgmma_f16<kN, kMajorB>(d, a[i], db, more);
        else
          wgmma_bf16<kN, kMajorB>(d, a[i], db, more);
      } else {
        const u64 da = A::descriptor(tile, consumer * 64, i);
        if constexpr (kF16)
          wgmma_f16<kN, kMajorA, kMajorB>(d, da, db, more);
        else
          wgmma_bf16<kN, kMajorA, kMajorB>(d, da, db, more);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
    keep_registers(d);
    warp_sync();  // lane 0 speaks for all, whose ldmatrix it does not order by itself
    if (lane == 0) mbarrier_arrive(empty + 8 * s);
  }
  const u32 mine = tile_c + consumer * 64 * kN * 4;
#pragma unroll
  for (u32 i = 0; i < kN / 2; ++i) {
    const u32 row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    store_shared(mine + (row * kN + column) * 4, d[i]);
  }
  fence_async_shared();
  barrier_sync(1 + consumer, 128);
  if (t % 128 == 0) {
    tensor_store(&map_c, mine, {n0, m0 + static_cast<i32>(consumer) * 64});
    bulk_commit();
    bulk_wait_read<0>();
  }
}

}  // namespace nxs

using nxs::Major;
using nxs::SourceA;
using nxs::Swizzle;

static nxs::TensorMap make_map(const void* p, nxs_dtype type, uint64_t inner, uint64_t outer, uint64_t pitch_bytes,
                               uint32_t box_inner, uint32_t box_outer, Swizzle swizzle) {
  nxs::TensorShape shape;
  shape.dtype = type;
  shape.address = p;
  shape.size[0] = inner, shape.size[1] = outer;
  shape.stride_bytes[0] = pitch_bytes;
  shape.box[0] = box_inner, shape.box[1] = box_outer;
  shape.swizzle = swizzle;
  nxs::TensorMap map;
  test::check(nxs::encode_tensor_map(&map, shape) == NXS_OK, "a tensor map is encoded");
  return map;
}

template <int kN, Major kMajorA, Major kMajorB, Swizzle kSwizzle, SourceA kSourceA = SourceA::kShared,
          bool kF16 = false>
static void run(const char* name) {
  constexpr uint32_t width = nxs::swizzle_bytes(kSwizzle) / 2;
  constexpr bool a_mn = kMajorA == Major::kMN, b_mn = kMajorB == Major::kMN;
  const nxs_dtype type = kF16 ? NXS_F16 : NXS_BF16;
  for (const bool integers : {true, false}) {
    const test::Gemm g = {200, kN + 8, 136, a_mn, b_mn};
    const auto a = test::make_matrix(size_t(g.m) * g.k, integers, kF16, 1),
               b = test::make_matrix(size_t(g.n) * g.k, integers, kF16, 2);
    test::Buffer<uint16_t> da(a), db(b);
    const size_t pitch = (g.n + 3) / 4 * 4;
    test::Buffer<float> c(g.m * pitch);
    const auto map_a = a_mn ? make_map(da.get(), type, g.m, g.k, g.m * 2, width, nxs::kDepth, kSwizzle)
                            : make_map(da.get(), type, g.k, g.m, g.k * 2, width, nxs::kRows, kSwizzle);
    const auto map_b = b_mn ? make_map(db.get(), type, g.n, g.k, g.n * 2, width, nxs::kDepth, kSwizzle)
                            : make_map(db.get(), type, g.k, g.n, g.k * 2, width, kN, kSwizzle);
    const auto map_c = make_map(c.get(), NXS_F32, g.n, g.m, pitch * 4, kN, 64, Swizzle::kNone);
    const auto kernel = nxs::wgmma_tile_kernel<kN, kMajorA, kMajorB, kSwizzle, kSourceA, kF16>;
    nxs::LaunchShape shape;
    shape.grid = dim3((g.n + kN - 1) / kN, (g.m + nxs::kRows - 1) / nxs::kRows);
    shape.block = 384;
    shape.dynamic_smem = nxs::kSharedBytes<kN>;
    const std::string label = std::string("wgmma ") + name + (integers ? " integers" : " random");
    test::check(nxs::allow_dynamic_smem(kernel) == NXS_OK, label + " may use its shared memory");
#if !defined(__CUDACC__)
    nxs_emulator_reset();
#endif
    test::check(test::finish_launch(nxs::launch(kernel, shape, nullptr, map_a, map_b, map_c, g.k)) == NXS_OK,
                label + " runs");
    test::check_product(label, g, a, b, integers, kF16, c.read(), pitch);
#if !defined(__CUDACC__)
    nxs_emulator_counts counts;
    nxs_emulator_counters(&counts);
    test::check(
        (kF16 ? counts.wgmma_f16_flops : counts.wgmma_bf16_flops) == 4ull * 3 * 2 * nxs::kRows * kN * nxs::kDepth,
        label + " counts its FLOPs");
    test::check(
        counts.global_store_bytes >= uint64_t(g.m) * g.n * 4 && counts.global_store_bytes <= uint64_t(g.m) * g.n * 5,
        label + " stores what its plan says");
#endif
  }
}

int main() {
  constexpr Major K = Major::kK, MN = Major::kMN;
  run<128, K, K, Swizzle::k128>("128B K K n128");
  run<64, K, K, Swizzle::k64>("64B K K n64");
  run<64, K, K, Swizzle::k32>("32B K K n64");
  run<64, K, K, Swizzle::kNone>("plain K K n64");
  run<128, K, MN, Swizzle::k128>("128B K MN n128");
  run<64, MN, MN, Swizzle::k128>("128B MN MN n64");
  run<96, MN, MN, Swizzle::k64>("64B MN MN n96");
  run<48, MN, MN, Swizzle::k32>("32B MN MN n48");
  run<64, MN, MN, Swizzle::kNone>("plain MN MN n64");
  run<8, K, K, Swizzle::k128>("128B K K n8");
  run<200, K, K, Swizzle::k128>("128B K K n200");
  run<64, K, MN, Swizzle::k128, SourceA::kRegisters>("128B registers MN n64");
  run<128, K, K, Swizzle::k128, SourceA::kRegisters, true>("128B registers K n128 f16");
  run<64, K, K, Swizzle::k128, SourceA::kShared, true>("128B K K n64 f16");
  return test::finish();
}
