// Calls every wrapper, so that both implementations have the same functions and signatures. Nothing is launched.
#include "common/ptx/async_copy.cuh"
#include "common/ptx/atomic.cuh"
#include "common/ptx/barrier.cuh"
#include "common/ptx/bulk.cuh"
#include "common/ptx/cluster.cuh"
#include "common/ptx/convert.cuh"
#include "common/ptx/fence.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/math.cuh"
#include "common/ptx/matrix.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/memory.cuh"
#include "common/ptx/programmatic.cuh"
#include "common/ptx/shared.cuh"
#include "common/ptx/tensor_map.cuh"
#include "common/ptx/warp.cuh"
#include "common/ptx/wgmma.cuh"
#include "device.h"

namespace nxs {

template <int kN> NXS_DEVICE void every_wgmma(float* out, u64 a, u64 b) {
  float d[kN / 2];
  const u32 registers[4] = {1, 2, 3, 4};
  wgmma_fence();
  wgmma_bf16<kN>(d, a, b, false);
  wgmma_f16<kN, Major::kMN, Major::kMN>(d, a, b, true);
  wgmma_bf16<kN, Major::kMN>(d, registers, b, true);
  wgmma_f16<kN>(d, registers, b, true);
  wgmma_commit();
  wgmma_wait<0>();
  keep_registers(d);
  for (int i = 0; i < kN / 2; ++i) store_global(out + thread_index() * (kN / 2) + i, d[i]);
}

template <int kN> __global__ void __launch_bounds__(128, 1) wgmma_kernel(float* out, u64 a, u64 b) {
  every_wgmma<kN>(out, a, b);
}

template <int kN> void all_wgmma() {
  test::check(allow_dynamic_smem(wgmma_kernel<kN>) == NXS_OK, "a wgmma of every N is compiled");
  if constexpr (kN < 256) all_wgmma<kN + 8>();
}

struct alignas(16) Four {
  u32 word[4];
};

__global__ void __launch_bounds__(128, 1)
    every_wrapper(const __grid_constant__ TensorMap map, float* out, u32* words, u64* wide, i32 x) {
  const u32 s = dynamic_shared(), b = s + 4096, peer = map_to_rank(s, 1);
  u32 sum = block_size() + block_index_x() + block_index_y() + block_index_z() + grid_size_x() + grid_size_y() +
            grid_size_z();
  mbarrier_init(b, 1);
  mbarrier_arrive_expect(b, 4);
  mbarrier_expect(b, 4);
  mbarrier_arrive(b);
  mbarrier_arrive_read(map_to_rank(b, 1));
  mbarrier_arrive_cluster(map_to_rank(b, 1));
  mbarrier_wait(b, 0);
  mbarrier_wait_cluster(b, 0);
  if (mbarrier_test_wait(b, 1)) mbarrier_invalidate(b);
  prefetch_tensor_map(&map);
  tensor_load(s, &map, b, {x});
  tensor_load(s, &map, b, {x, 1});
  tensor_load(s, &map, b, {x, 1, 2});
  tensor_load(s, &map, b, {x, 1, 2, 3});
  tensor_load(s, &map, b, {x, 1, 2, 3, 4});
  tensor_load_multicast(s, &map, b, {x}, u16{3});
  tensor_load_multicast(s, &map, b, {x, 1}, u16{3});
  tensor_load_multicast(s, &map, b, {x, 1, 2}, u16{3});
  tensor_load_multicast(s, &map, b, {x, 1, 2, 3}, u16{3});
  tensor_load_multicast(s, &map, b, {x, 1, 2, 3, 4}, u16{3});
  tensor_store(&map, s, {x});
  tensor_store(&map, s, {x, 1});
  tensor_store(&map, s, {x, 1, 2});
  tensor_store(&map, s, {x, 1, 2, 3});
  tensor_store(&map, s, {x, 1, 2, 3, 4});
  tensor_add(&map, s, {x});
  tensor_add(&map, s, {x, 1});
  tensor_add(&map, s, {x, 1, 2});
  tensor_add(&map, s, {x, 1, 2, 3});
  tensor_add(&map, s, {x, 1, 2, 3, 4});
  tensor_prefetch(&map, {x});
  tensor_prefetch(&map, {x, 1});
  tensor_prefetch(&map, {x, 1, 2});
  tensor_prefetch(&map, {x, 1, 2, 3});
  tensor_prefetch(&map, {x, 1, 2, 3, 4});
  bulk_load(s, out, 16, b);
  bulk_load_multicast(s, out, 16, b, u16{3});
  bulk_copy_cluster(peer, s, 16, map_to_rank(b, 1));
  bulk_store(out, s, 16);
  bulk_add_f32(out, s, 16);
  bulk_add_u32(out, s, 16);
  bulk_add_bf16(out, s, 16);
  bulk_prefetch(out, 16);
  bulk_commit();
  bulk_wait_read<0>();
  bulk_wait<0>();
  fence_gpu();
  fence_async_shared();
  fence_async_global();
  fence_async();
  fence_mbarrier_init();
  copy_async<4>(s, out);
  copy_async<8>(s, out, 3);
  copy_async<16>(s, out, 0);
  copy_async_commit();
  copy_async_wait<1>();
  u32 one[1], two[2], four[4];
  load_matrix(one, s);
  load_matrix(two, s);
  load_matrix_transposed(four, s);
  store_matrix(four, s);
  store_matrix(one, s);
  store_matrix_transposed(two, s);
  float c[4] = {};
  mma_bf16(c, four, two[0], two[1]);
  mma_f16(c, four, two[0], one[0]);
  mma_tf32(c, four, 1, 2);
  store_shared(s, Four{{1, 2, 3, 4}});
  store_shared(s, u8{1});
  store_shared(s, u16{1});
  store_shared(s, u32{1});
  store_shared(s, u64{1});
  sum +=
      load_shared<Four>(s).word[2] + load_shared<u8>(s) + load_shared<u16>(s) + static_cast<u32>(load_shared<u64>(s));
  store_cluster(peer, Four{{1, 2, 3, 4}});
  store_cluster(peer, u16{1});
  sum += load_cluster<Four>(peer).word[1] + load_cluster<u32>(peer);
  cluster_arrive();
  cluster_wait();
  sum += cluster_rank() + cluster_size() + lane_index() + lanes_below();
  c[0] += shuffle(c[1], 1) + shuffle_xor(c[1], 1) + shuffle_up(c[1], 1) + shuffle_down(c[1], 1) +
          shuffle_among(c[1], 1, 8);
  sum += shuffle(sum, 2) + warp_ballot(x) + warp_any(x) + warp_all(x) + warp_match_any(sum) + elect_one();
  sum +=
      warp_reduce_add(sum) + warp_reduce_min(sum) + warp_reduce_max(sum) + warp_reduce_and(sum) + warp_reduce_or(sum);
  block_sync();
  warp_sync();
  barrier_sync(1, 64);
  barrier_arrive(2, 64);
  programmatic_wait();
  programmatic_trigger();
  c[1] += exp2_approx(c[2]) + log2_approx(c[2]) + rsqrt_approx(c[2]) + reciprocal_approx(c[2]) + tanh_approx(c[2]);
  c[2] += nxs::fma(c[0], c[1], c[2]) + bits_float(float_bits(c[1]));
  c[0] += multiply(c[0], c[1]) + maximum(c[1], c[2]) + maximum_nan(c[0], c[2]);
  sum += maximum_nan_f16x2(sum, 5) + maximum_nan_bf16x2(sum, 7);
  sum += population_count(sum) + leading_zeros(sum);
  sum += load_acquire_global(words) + static_cast<u32>(load_relaxed_global(wide)) + atomic_add_global(words, 1u);
  sum += static_cast<u32>(atomic_max_global(wide, u64{3})) + atomic_add_acq_rel_global(words, 1);
  sum +=
      atomic_inc_acq_rel_global(words, 4) + atomic_add_shared(s, 1) + atomic_max_shared(s, 1) + atomic_or_shared(s, 1);
  store_release_global(words, 1u);
  atomic_or_global(words, 1);
  sum += f32x2_to_f16x2_bits(c[0], c[1]) + f32x2_to_bf16x2_bits(c[0], c[1]) + f32_to_f16_bits(c[0]) +
         f32_to_bf16_bits(c[0]);
  c[3] += f16_bits_to_f32(static_cast<u16>(sum)) + bf16_bits_to_f32(static_cast<u16>(sum));
  lower_registers<24>();
  raise_registers<240>();
  store_global_streaming_if(reinterpret_cast<Four*>(out), Four{{1, 2, 3, 4}}, x);
  store_global_streaming_if(wide, u64{1}, x);
  store_global_streaming_if(words, u32{1}, x);
  store_global_streaming_if(reinterpret_cast<u16*>(words), u16{1}, x);
  store_global_streaming(words, load_global_nc(words) + load_global(words) + sum);
  store_global(out + thread_index(), c[0] + c[1] + c[2] + c[3]);
}

}  // namespace nxs

int main() {
  nxs::all_wgmma<8>();
  test::check(nxs::allow_dynamic_smem(nxs::every_wrapper) == NXS_OK, "a kernel of every wrapper is compiled");
  return test::finish();
}
