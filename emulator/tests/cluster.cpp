// Clusters: a reduction through each other's shared memory, copies between blocks, multicast, arrivals at a peer's
// mbarrier.
#include "common/ptx/bulk.cuh"
#include "common/ptx/cluster.cuh"
#include "common/ptx/fence.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/memory.cuh"
#include "common/ptx/tensor_map.cuh"
#include "common/ptx/warp.cuh"
#include "device.h"

namespace nxs {

// Every block sums its part of a row of x; every block of the cluster gets the same total, to the bit.
__global__ void __launch_bounds__(256) cluster_sum_kernel(const float* x, float* out, u32 count) {
  const u32 slots = dynamic_shared(), warps = slots + 16 * 4, t = thread_index(), rank = cluster_rank(),
            size = cluster_size();
  float sum = 0;
  for (u32 i = rank * 256 + t; i < count; i += size * 256) sum += load_global_nc(x + block_index_y() * count + i);
#pragma unroll
  for (u32 bit = 16; bit; bit /= 2) sum += shuffle_xor(sum, bit);
  if (t % 32 == 0) store_shared(warps + t / 32 * 4, sum);
  cluster_arrive();
  cluster_wait();
  if (t < size) {
    float block = 0;
#pragma unroll
    for (u32 w = 0; w < 8; ++w) block += load_shared<float>(warps + w * 4);
    store_cluster(map_to_rank(slots + rank * 4, t), block);
  }
  cluster_arrive();
  cluster_wait();
  if (t == 0) {
    float total = 0;
    for (u32 i = 0; i < size; ++i) total += load_shared<float>(slots + i * 4);
    store_global(out + block_index_y() * size + rank, total);
  }
}

// Each block loads a piece of 1 KiB, passes it on to the next rank, and writes what it got from the one before. The
// receiver says that it is ready by an arrival at the sender's mbarrier.
__global__ void __launch_bounds__(64) ring_kernel(const u32* in, u32* out) {
  constexpr u32 kBytes = 1024;
  const u32 mine = dynamic_shared(), got = mine + kBytes, loaded = got + kBytes, received = loaded + 8,
            ready = received + 8;
  const u32 t = thread_index(), rank = cluster_rank(), size = cluster_size(), next = (rank + 1) % size,
            before = (rank + size - 1) % size;
  if (t == 0) {
    mbarrier_init(loaded, 1);
    mbarrier_init(received, 1);
    mbarrier_init(ready, 1);
    fence_mbarrier_init();
  }
  cluster_arrive();
  cluster_wait();
  if (t == 0) {
    mbarrier_arrive_expect(received, kBytes);
    mbarrier_arrive_cluster(map_to_rank(ready, before));
    mbarrier_arrive_expect(loaded, kBytes);
    bulk_load(mine, in + block_index_x() * (kBytes / 4), kBytes, loaded);
    mbarrier_wait(loaded, 0);
    mbarrier_wait_cluster(ready, 0);
    bulk_copy_cluster(map_to_rank(got, next), mine, kBytes, map_to_rank(received, next));
  }
  mbarrier_wait(received, 0);
  for (u32 i = t; i < kBytes / 4; i += 64)
    store_global(out + block_index_x() * (kBytes / 4) + i, load_shared<u32>(got + i * 4) + rank);
  cluster_arrive();  // the copy out of this block's memory has ended where it went
  cluster_wait();
}

// Each rank loads its quarter of a tile of 64 rows of 32 words into every block.
__global__ void __launch_bounds__(128) multicast_kernel(const __grid_constant__ TensorMap map, u32* out) {
  const u32 tile = dynamic_shared(), full = tile + 64 * 128, t = thread_index(), rank = cluster_rank();
  if (t == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(full, 64 * 128);
  }
  cluster_arrive();
  cluster_wait();
  if (t == 0)
    tensor_load_multicast(tile + rank * 16 * 128, &map, full,
                          {0, static_cast<i32>(rank * 16), static_cast<i32>(block_index_y())}, 0xf);
  mbarrier_wait(full, 0);
  for (u32 i = t; i < 64 * 32; i += 128) {
    const u32 word = load_shared<u32>(swizzled(tile + i * 4, Swizzle::k128));
    store_global(out + (block_index_y() * 4 + rank) * 64 * 32 + i, word);
  }
  cluster_arrive();
  cluster_wait();
}

}  // namespace nxs

using namespace test;

static void test_sum() {
  for (const unsigned size : {2u, 4u, 8u})
    for (const bool integers : {true, false}) {
      const uint32_t rows = 3, count = 5000;
      Random random(size);
      std::vector<float> x(rows * count);
      for (auto& v : x) v = integers ? static_cast<float>(random.below(100)) : random.symmetric();
      Buffer<float> dx(x), out(rows * size);
      nxs::LaunchShape shape;
      shape.grid = dim3(size, rows);
      shape.block = 256;
      shape.cluster = size;
      shape.dynamic_smem = 128;
      const std::string label = "cluster sum of " + std::to_string(size) + (integers ? " integers" : " random");
      check(finish_launch(nxs::launch(nxs::cluster_sum_kernel, shape, nullptr, dx.get(), out.get(), count)) == NXS_OK,
            label + " runs");
      const auto got = out.read();
      bool same = true, near = true;
      for (uint32_t row = 0; row < rows; ++row) {
        double want = 0, magnitude = 0;
        for (uint32_t i = 0; i < count; ++i) want += x[row * count + i], magnitude += std::fabs(x[row * count + i]);
        for (unsigned rank = 0; rank < size; ++rank) same &= got[row * size + rank] == got[row * size];
        near &= std::fabs(got[row * size] - want) <= (integers ? 0 : magnitude * 0x1p-20);
      }
      check(same, label + " is the same in every block");
      check(near, label + " is the sum");
      print_checksum(label.c_str(), got);  // additions in one order: equal on every device
    }
}

static void test_ring() {
  const uint32_t blocks = 8, words = 256;
  std::vector<uint32_t> in(blocks * words);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint32_t>(i * 2654435761u);
  Buffer<uint32_t> din(in), out(in.size());
  nxs::LaunchShape shape;
  shape.grid = dim3(blocks);
  shape.block = 64;
  shape.cluster = 4;
  shape.dynamic_smem = 2 * 1024 + 24;
  check(finish_launch(nxs::launch(nxs::ring_kernel, shape, nullptr, din.get(), out.get())) == NXS_OK, "ring runs");
  const auto got = out.read();
  bool equal = true;
  for (uint32_t b = 0; b < blocks; ++b)
    for (uint32_t i = 0; i < words; ++i)
      equal &= got[b * words + i] == in[(b / 4 * 4 + (b + 3) % 4) * words + i] + b % 4;
  check(equal, "ring passes each piece on");
  print_checksum("ring", got);
}

static void test_multicast() {
  const uint32_t planes = 2, rows = 50, words = 32;
  std::vector<uint32_t> in(planes * rows * words);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint32_t>(i * 2246822519u + 1);
  Buffer<uint32_t> din(in), out(planes * 4 * 64 * words);
  nxs::TensorShape tensor;
  tensor.dtype = NXS_U32;
  tensor.rank = 3;
  tensor.address = din.get();
  tensor.size[0] = words, tensor.size[1] = rows, tensor.size[2] = planes;
  tensor.stride_bytes[0] = words * 4, tensor.stride_bytes[1] = rows * words * 4;
  tensor.box[0] = words, tensor.box[1] = 16;
  tensor.swizzle = nxs::Swizzle::k128;
  nxs::TensorMap map;
  check(nxs::encode_tensor_map(&map, tensor) == NXS_OK, "a tensor map is encoded");
  nxs::LaunchShape shape;
  shape.grid = dim3(4, planes);
  shape.block = 128;
  shape.cluster = 4;
  shape.dynamic_smem = 64 * 128 + 8;
  check(finish_launch(nxs::launch(nxs::multicast_kernel, shape, nullptr, map, out.get())) == NXS_OK, "multicast runs");
  const auto got = out.read();
  bool equal = true;
  for (uint32_t p = 0; p < planes; ++p)
    for (uint32_t rank = 0; rank < 4; ++rank)
      for (uint32_t r = 0; r < 64; ++r)
        for (uint32_t w = 0; w < words; ++w)
          equal &= got[((p * 4 + rank) * 64 + r) * words + w] == (r < rows ? in[(p * rows + r) * words + w] : 0);
  check(equal, "multicast brings every row to every block, and zeroes beyond the last");
  print_checksum("multicast", got);
}

int main() {
  test_sum();
  test_ring();
  test_multicast();
  return finish();
}
