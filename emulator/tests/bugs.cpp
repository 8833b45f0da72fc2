// Planted bugs. Each kernel is right without its bug and wrong with it; the emulator must be silent about the one, and
// must report the other with the kind and at the line that are due, in every order of threads and landing of copies.
#include <memory>

#include "common/ptx/async_copy.cuh"
#include "common/ptx/atomic.cuh"
#include "common/ptx/barrier.cuh"
#include "common/ptx/bulk.cuh"
#include "common/ptx/cluster.cuh"
#include "common/ptx/fence.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/math.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/memory.cuh"
#include "common/ptx/tensor_map.cuh"
#include "common/ptx/warp.cuh"
#include "common/ptx/wgmma.cuh"
#include "device.h"

namespace nxs {

// Marks the line that the report must name; where an order of threads decides which of two comes second, both.
static int report_line = 0, other_line = 0;
#define HERE (report_line = __LINE__)
#define OR_HERE (other_line = __LINE__)

// Shared memory starts as zeroes, where reading it too early is not to be reported as reading what nobody wrote.
NXS_DEVICE void zero(u32 from, u32 bytes) {
  for (u32 i = thread_index() * 4; i < bytes; i += block_size() * 4) store_shared(from + i, 0u);
  block_sync();
}

struct Arguments {
  u32* words;  // 4096 of them, 0, 1, 2...
  u32* out;    // 4096, zero
  u32 count;   // 1000
};

// ---- missing waits

template <bool kBug> __global__ void cp_async_wait(Arguments p) {
  const u32 s = dynamic_shared(), t = thread_index();
  copy_async<16>(s + t * 16, p.words + t * 4);
  copy_async_commit();
  if (!kBug) copy_async_wait<0>();
  block_sync();
  HERE, store_global(p.out + t, load_shared<u32>(s + t * 16));
}

template <bool kBug> __global__ void cp_async_group(Arguments p) {  // waits for all but one group, and reads the last
  const u32 s = dynamic_shared(), t = thread_index();
  for (u32 i = 0; i < 2; ++i) {
    copy_async<16>(s + i * 2048 + t * 16, p.words + t * 4);
    copy_async_commit();
  }
  copy_async_wait<1>();
  block_sync();
  HERE, store_global(p.out + t, load_shared<u32>(s + (kBug ? 2048 : 0) + t * 16));
}

template <bool kBug> __global__ void cp_async_barrier(Arguments p) {  // waits for its own copies, reads its neighbour's
  const u32 s = dynamic_shared(), t = thread_index();
  zero(s, 2048);
  OR_HERE, copy_async<16>(s + t * 16, p.words + t * 4);
  copy_async_commit();
  copy_async_wait<0>();
  if (!kBug) block_sync();
  HERE, store_global(p.out + t, load_shared<u32>(s + (t ^ 64) * 16));
}

NXS_DEVICE u32 start_mbarrier(u32 mbarrier, u32 arrivals, bool fence = true) {
  if (thread_index() == 0) {
    mbarrier_init(mbarrier, arrivals);
    if (fence) fence_mbarrier_init();
  }
  block_sync();
  return mbarrier;
}

template <bool kBug> __global__ void bulk_wait_missing(Arguments p) {  // one warp reads without having waited itself
  const u32 s = dynamic_shared(), t = thread_index(), full = start_mbarrier(s + 4096, 1);
  if (t == 0) {
    mbarrier_arrive_expect(full, 2048);
    bulk_load(s, p.words, 2048, full);
  }
  block_sync();  // the copy has begun
  if (!kBug || t < 96) mbarrier_wait(full, 0);
  HERE, store_global(p.out + t, load_shared<u32>(s + t * 4));
}

template <bool kBug> __global__ void bulk_store_wait(Arguments p) {  // overwrites the source of a store
  const u32 s = dynamic_shared(), t = thread_index();
  store_shared(s + t * 4, t);
  fence_async_shared();
  block_sync();
  if (t == 0) {
    bulk_store(p.out, s, 512);
    bulk_commit();
    if (!kBug) bulk_wait_read<0>();
    HERE, store_shared(s, 7u);
    bulk_wait_read<0>();
  }
}

template <bool kBug> __global__ void bulk_store_end(Arguments p) {
  const u32 s = dynamic_shared(), t = thread_index();
  store_shared(s + t * 4, t);
  fence_async_shared();
  block_sync();
  if (t == 0) {
    HERE, bulk_store(p.out, s, 512);
    bulk_commit();
    if (!kBug) bulk_wait_read<0>();
  }
}

// ---- wgmma: a product of 64 x 16 by 16 x 8, both K-major in rows of 128 bytes

enum class WgmmaBug { kWait, kFence, kProxy, kStride };
template <WgmmaBug kWhich, bool kBug> __global__ void wgmma_bug(Arguments p) {
  const u32 s = dynamic_shared(), t = thread_index();
  zero(s, 10240);
  if (!(kBug && kWhich == WgmmaBug::kProxy)) fence_async_shared();
  block_sync();
  float d[4];
  u32 stride = 1024;
  if (kBug && kWhich == WgmmaBug::kStride) stride = 512;
  const u64 a = matrix_descriptor(s, 16, stride, Swizzle::k128),
            b = matrix_descriptor(s + 8192, 16, 1024, Swizzle::k128);
  if (!(kBug && kWhich == WgmmaBug::kFence)) wgmma_fence();
  if (kWhich == WgmmaBug::kWait)
    wgmma_bf16<8>(d, a, b, false);
  else
    HERE, wgmma_bf16<8>(d, a, b, false);
  wgmma_commit();
  if (!(kBug && kWhich == WgmmaBug::kWait)) wgmma_wait<0>();
  if (kWhich == WgmmaBug::kWait) HERE, store_global(p.out + t, float_bits(d[1] * 2));
  wgmma_wait<0>();
  store_global(p.out + t, float_bits(d[0]));
}

template <bool kBug> __global__ void wgmma_leading(Arguments p) {  // MN-major over two column blocks
  const u32 s = dynamic_shared(), t = thread_index();
  zero(s, 2 * 2048 + 2048);
  fence_async_shared();
  block_sync();
  float d[64];
  const u64 a = matrix_descriptor(s + 4096, 2048, 1024, Swizzle::k128),
            b = matrix_descriptor(s, kBug ? 8192 : 2048, 1024, Swizzle::k128);
  wgmma_fence();
  HERE, wgmma_bf16<128, Major::kMN, Major::kMN>(d, a, b, false);
  wgmma_commit();
  wgmma_wait<0>();
  store_global(p.out + t, float_bits(d[0]));
}

template <bool kBug> __global__ void wgmma_early_release(Arguments p) {  // arrives before the wait
  const u32 s = dynamic_shared(), t = thread_index(), empty = start_mbarrier(s + 12288, 4);
  if (t < 128) {
    for (u32 i = t * 4; i < 10240; i += 512) store_shared(s + i, 0u);
    fence_async_shared();
    barrier_sync(1, 128);
    float d[4];
    wgmma_fence();
    OR_HERE, wgmma_bf16<8>(d, matrix_descriptor(s, 16, 1024, Swizzle::k128),
                           matrix_descriptor(s + 8192, 16, 1024, Swizzle::k128), false);
    wgmma_commit();
    if (kBug && t % 32 == 0) mbarrier_arrive(empty);
    wgmma_wait<0>();
    if (!kBug && t % 32 == 0) mbarrier_arrive(empty);
    store_global(p.out + t, float_bits(d[0]));
  } else if (t == 128) {
    mbarrier_wait(empty, 0);
    HERE, store_shared(s, 5u);
  }
}

template <bool kBug> __global__ void wgmma_swizzle(const __grid_constant__ TensorMap map, Arguments p) {
  const u32 s = dynamic_shared(), t = thread_index(), full = start_mbarrier(s + 9216, 1);
  if (t == 0) {
    mbarrier_arrive_expect(full, 8192);
    tensor_load(s, &map, full, {0, 0});
  }
  mbarrier_wait(full, 0);
  float d[4];
  wgmma_fence();
  const Swizzle swizzle = kBug ? Swizzle::k64 : Swizzle::k128;
  HERE, wgmma_bf16<8>(d, matrix_descriptor(s, 16, 1024, swizzle), matrix_descriptor(s, 16, 1024, swizzle), false);
  wgmma_commit();
  wgmma_wait<0>();
  store_global(p.out + t, float_bits(d[0]));
}

// ---- proxy fences

template <bool kBug> __global__ void store_proxy(Arguments p) {  // the issuing thread's fence does not cover the others
  const u32 s = dynamic_shared(), t = thread_index();
  store_shared(s + t * 4, t);
  if (!kBug || t == 0) fence_async_shared();
  block_sync();
  if (t == 0) {
    HERE, bulk_store(p.out, s, 512);
    bulk_commit();
    bulk_wait_read<0>();
  }
}

template <bool kBug> __global__ void init_fence(Arguments p) {
  const u32 s = dynamic_shared(), full = start_mbarrier(s + 4096, 1, !kBug);
  if (thread_index() == 0) {
    mbarrier_arrive_expect(full, 512);
    HERE, bulk_load(s, p.words, 512, full);
  }
  mbarrier_wait(full, 0);
}

// ---- barriers and races

template <bool kBug> __global__ void missing_barrier(Arguments p) {
  const u32 s = dynamic_shared(), t = thread_index();
  zero(s, 512);
  OR_HERE, store_shared(s + t * 4, t);
  if (!kBug) block_sync();
  HERE, store_global(p.out + t, load_shared<u32>(s + (127 - t) * 4));
}

template <bool kBug> __global__ void missing_second_barrier(Arguments p) {
  const u32 s = dynamic_shared(), t = thread_index();
  u32 sum = 0;
  for (u32 i = 0; i < 3; ++i) {
    HERE, store_shared(s + t * 4, t + i);
    block_sync();
    for (u32 j = 0; j < 128; j += 16) OR_HERE, sum += load_shared<u32>(s + j * 4);
    if (!kBug) block_sync();
  }
  store_global(p.out + t, sum);
}

template <bool kBug> __global__ void missing_warp_sync(Arguments p) {
  const u32 s = dynamic_shared(), t = thread_index();
  zero(s, 512);
  OR_HERE, store_shared(s + t * 4, t);
  if (!kBug) warp_sync();
  HERE, store_global(p.out + t, load_shared<u32>(s + (t ^ 1) * 4));
}

template <bool kBug> __global__ void one_lane_arrives(Arguments p) {  // each lane releases only what it did itself
  const u32 s = dynamic_shared(), t = thread_index(), ready = start_mbarrier(s + 4096, 1);
  zero(s, 128);
  if (t < 32) {
    OR_HERE, store_shared(s + t * 4, t);
    if (!kBug) warp_sync();
    if (t == 0) mbarrier_arrive(ready);
  } else {
    mbarrier_wait(ready, 0);
    HERE, store_global(p.out + t, load_shared<u32>(s + t % 32 * 4));
  }
}

template <bool kBug> __global__ void global_race(Arguments p) {  // two blocks write one word
  HERE, store_global(p.out + (kBug ? 0 : block_index_x() * 128) + thread_index(), 1u);
}

template <bool kBug> __global__ void constant_read(Arguments p) {
  const u32 t = thread_index();
  store_global(p.out + t, t);
  block_sync();
  HERE, store_global(p.out + 1024 + t, kBug ? load_global_nc(p.out + (t ^ 1)) : load_global(p.out + (t ^ 1)));
}

template <bool kBug> __global__ void ticket_order(Arguments p) {  // a ticket that orders nothing
  const u32 t = thread_index(), blocks = grid_size_x();
  if (t != 0) return;
  store_global(p.out + 16 + block_index_x(), 3u);
  const u32 mine = kBug ? atomic_add_global(p.out, 1u) : atomic_add_acq_rel_global(p.out, 1);
  if (mine != blocks - 1) return;
  u32 sum = 0;
  for (u32 i = 0; i < blocks; ++i) HERE, sum += load_global(p.out + 16 + i);
  store_global(p.out + 1, sum);
}

template <bool kBug> __global__ void barrier_count(Arguments) {
  const u32 t = thread_index();
  if (t < 64)
    HERE, barrier_sync(1, kBug ? 128 : 96);
  else if (t < 96)
    OR_HERE, barrier_sync(1, 96);
}

template <bool kBug> __global__ void early_return(Arguments p) {
  const u32 t = thread_index();
  if (kBug && t >= p.count - 900) return;
  HERE, block_sync();
}

template <bool kBug> __global__ void missing_arrival(Arguments) {  // a warp too few at a named barrier
  const u32 t = thread_index();
  if (t < (kBug ? 64 : 96)) HERE, barrier_sync(2, 96);
}

// ---- mbarriers

template <bool kParity, bool kBug> __global__ void ring_parity(Arguments p) {
  const u32 s = dynamic_shared(), t = thread_index(), full = s + 4096, empty = s + 4104;
  start_mbarrier(full, 1);
  start_mbarrier(empty, 96);
  zero(s, 1024);
  u32 sum = 0;
  if (t == 0) {
    for (u32 i = 0; i < 4; ++i) {
      if (kParity || !kBug)
        mbarrier_wait(empty, (i & 1) ^ 1);
      else
        HERE, mbarrier_wait(empty, i & 1);
      mbarrier_arrive_expect(full, 1024);
      OR_HERE, bulk_load(s, p.words + i * 256, 1024, full);
    }
  } else if (t >= 32) {
    for (u32 i = 0; i < 4; ++i) {
      mbarrier_wait(full, kParity && kBug ? (i & 1) ^ 1 : i & 1);
      if (kParity)
        HERE, sum += load_shared<u32>(s + t * 4);
      else
        sum += load_shared<u32>(s + t * 4);
      mbarrier_arrive(empty);
    }
    store_global(p.out + t, sum);
  }
}

template <bool kBug> __global__ void double_arrival(Arguments) {
  const u32 t = thread_index(), full = start_mbarrier(dynamic_shared(), 2);
  if (t == 0) mbarrier_arrive(full);
  if (t == (kBug ? 0 : 1)) HERE, mbarrier_arrive(full);
  mbarrier_wait(full, 0);
}

template <bool kBug> __global__ void missing_bytes(Arguments p) {
  const u32 s = dynamic_shared(), full = start_mbarrier(s + 4096, 1);
  if (thread_index() == 0) {
    mbarrier_arrive_expect(full, kBug ? 1024 : 512);
    bulk_load(s, p.words, 512, full);
  }
  HERE, mbarrier_wait(full, 0);
}

template <bool kBug> __global__ void missing_init(Arguments) {
  const u32 s = dynamic_shared(), full = start_mbarrier(s, 128);
  HERE, mbarrier_arrive(kBug ? full + 8 : full);
}

// ---- bounds, alignment, initialisation

template <bool kBug> __global__ void global_bound(Arguments p) {
  const u32 i = block_index_x() * 128 + thread_index();
  if (kBug ? i <= p.count : i < p.count) HERE, store_global(p.out + i, i);
}

template <bool kBug> __global__ void shared_bound(Arguments) {
  const u32 s = dynamic_shared(), t = thread_index();
  HERE, store_shared(s + 16384 - 512 + (t + kBug) * 4, t);
}

template <bool kBug> __global__ void misaligned(Arguments p) {
  const u64* from = reinterpret_cast<const u64*>(p.words + (kBug ? 1 : 0));
  HERE, store_global(p.out + thread_index(), static_cast<u32>(load_global(from)));
}

template <bool kBug> __global__ void misaligned_shared(Arguments) {
  const u32 s = dynamic_shared(), t = thread_index();
  HERE, store_shared(s + t * 8 + (kBug ? 4 : 0), u64{t});
}

template <bool kBug> __global__ void uninitialised(Arguments p) {
  const u32 s = dynamic_shared(), t = thread_index();
  if (t < (kBug ? 127 : 128)) store_shared(s + t * 4, t);
  block_sync();
  HERE, store_global(p.out + t, load_shared<u32>(s + (127 - t) * 4));
}

// ---- collectives

template <bool kBug> __global__ void divergent_shuffle(Arguments p) {
  const u32 t = thread_index();
  u32 v = t;
  if (!kBug || t % 32 != 31) HERE, v = shuffle_xor(v, 1u);
  store_global(p.out + t, v);
}

template <bool kBug> __global__ void divergent_places(Arguments p) {
  const u32 t = thread_index();
  u32 v = t;
  if (kBug && t % 2) OR_HERE, v = shuffle(v, 0);
  HERE, v = shuffle(v, 1);
  store_global(p.out + t, v);
}

// ---- tensor maps, clusters, registers

template <bool kBug> __global__ void map_rank(const __grid_constant__ TensorMap map, Arguments) {
  const u32 s = dynamic_shared(), full = start_mbarrier(s + 8192, 1);
  if (thread_index() == 0) {
    mbarrier_arrive_expect(full, 8192);
    if (kBug)
      HERE, tensor_load(s, &map, full, {0, 0, 0});
    else
      tensor_load(s, &map, full, {0, 0});
  }
  mbarrier_wait(full, 0);
}

template <bool kBug> __global__ void cluster_start(Arguments) {
  const u32 s = dynamic_shared();
  if (!kBug) cluster_arrive(), cluster_wait();
  if (thread_index() == 0) HERE, store_cluster(map_to_rank(s, cluster_rank() ^ 1), 1u);
  cluster_arrive();
  cluster_wait();
}

template <bool kBug> __global__ void cluster_order(Arguments p) {
  const u32 s = dynamic_shared(), t = thread_index();
  zero(s, 4);
  cluster_arrive();
  cluster_wait();
  if (t == 0) OR_HERE, store_cluster(map_to_rank(s, cluster_rank() ^ 1), 1u);
  if (!kBug) cluster_arrive(), cluster_wait();
  block_sync();
  if (cluster_rank() == 0) HERE, store_global(p.out + t, load_shared<u32>(s));
  cluster_arrive();
  cluster_wait();
}

template <bool kBug> __global__ void register_pool(Arguments) {
  if (thread_index() < 128)
    lower_registers<40>();
  else
    HERE, raise_registers<kBug ? 256 : 232>();
}

}  // namespace nxs

using namespace test;

static nxs::LaunchShape shape_of(unsigned grid, unsigned block, unsigned cluster) {
  nxs::LaunchShape shape;
  shape.grid = dim3(grid);
  shape.block = block;
  shape.cluster = cluster;
  shape.dynamic_smem = 16384;
  return shape;
}

// `run(bug)` launches the kernel with or without its bug; one of `kinds` is due for the bug.
template <typename F> static void plant(const char* name, const std::string& kinds, F run) {
  for (const uint64_t seed : {0, 1, 2, 3})
    for (const int landing : {NXS_EMULATOR_LANDING_LATE, NXS_EMULATOR_LANDING_RANDOM, NXS_EMULATOR_LANDING_EARLY}) {
      const nxs_emulator_options options = {seed, landing, 1};
      nxs_emulator_configure(&options);
      const std::string label =
          std::string(name) + " (seed " + std::to_string(seed) + ", landing " + std::to_string(landing) + ")";
      nxs_emulator_reset();
      check(run(false) == NXS_OK, label + " without its bug: " + nxs_emulator_report());
      nxs::report_line = nxs::other_line = 0;
      const nxs_status status = run(true);
      const std::string report = nxs_emulator_report(), kernel = std::string("kernel nxs::") + name + "<";
      const auto names = [&](int line) {
        return report.find("bugs.cpp:" + std::to_string(line) + " in ") != std::string::npos;
      };
      const bool kind =
          (", " + kinds + ", ").find(", " + report.substr(0, report.find(": ")) + ", ") != std::string::npos;
      check(status == NXS_EMULATOR_FAILURE && kind && (names(nxs::report_line) || names(nxs::other_line)) &&
                report.find(kernel) != std::string::npos,
            label + " is due at line " + std::to_string(nxs::report_line) + " as " + kinds + ", but: " + report);
    }
  nxs_emulator_configure(nullptr);
}

int main() {
  std::vector<uint32_t> counting(4096);
  for (uint32_t i = 0; i < counting.size(); ++i) counting[i] = i;
  const Buffer<uint32_t> words(counting);

  nxs::TensorShape tensor;
  tensor.address = words.get();
  tensor.size[0] = 64, tensor.size[1] = 64;
  tensor.stride_bytes[0] = 128;
  tensor.box[0] = 64, tensor.box[1] = 64;
  tensor.swizzle = nxs::Swizzle::k128;
  nxs::TensorMap map;
  check(nxs::encode_tensor_map(&map, tensor) == NXS_OK, "a tensor map is encoded");
  tensor.stride_bytes[0] = 120;
  check(nxs::encode_tensor_map(&map, tensor) != NXS_OK, "a stride that is no multiple of 16 is refused");
  tensor.stride_bytes[0] = 128;
  tensor.box[0] = 128;
  check(nxs::encode_tensor_map(&map, tensor) != NXS_OK, "rows longer than the swizzle are refused");
  tensor.box[0] = 64;
  check(nxs::encode_tensor_map(&map, tensor) == NXS_OK, "a tensor map is encoded");

#define PLANT_WITH(name, kind, grid, block, cluster, ...)                      \
  plant(#name, kind, [&](bool bug) {                                           \
    const Buffer<uint32_t> out(std::vector<uint32_t>(4096));                   \
    const nxs::Arguments p = {words.get(), out.get(), 1000};                   \
    const auto shape = shape_of(grid, block, cluster);                         \
    return bug ? nxs::launch(nxs::name<__VA_ARGS__ true>, shape, nullptr, p)   \
               : nxs::launch(nxs::name<__VA_ARGS__ false>, shape, nullptr, p); \
  })
#define PLANT(name, kind) PLANT_WITH(name, kind, 1, 128, 1)
#define PLANT_MAP(name, kind)                                           \
  plant(#name, kind, [&](bool bug) {                                    \
    const Buffer<uint32_t> out(std::vector<uint32_t>(4096));            \
    const nxs::Arguments p = {words.get(), out.get(), 1000};            \
    const auto shape = shape_of(1, 128, 1);                             \
    return bug ? nxs::launch(nxs::name<true>, shape, nullptr, map, p)   \
               : nxs::launch(nxs::name<false>, shape, nullptr, map, p); \
  })
  PLANT(cp_async_wait, "unwaited copy");
  PLANT(cp_async_group, "unwaited copy");
  PLANT(cp_async_barrier, "race");
  PLANT(bulk_wait_missing, "unwaited copy");
  PLANT(bulk_store_wait, "async read");
  PLANT(bulk_store_end, "unwaited copy");
  PLANT_WITH(wgmma_bug, "registers", 1, 128, 1, nxs::WgmmaBug::kWait, );
  PLANT_WITH(wgmma_bug, "registers", 1, 128, 1, nxs::WgmmaBug::kFence, );
  PLANT_WITH(wgmma_bug, "proxy fence", 1, 128, 1, nxs::WgmmaBug::kProxy, );
  PLANT_WITH(wgmma_bug, "descriptor", 1, 128, 1, nxs::WgmmaBug::kStride, );
  PLANT(wgmma_leading, "uninitialised");
  PLANT_WITH(wgmma_early_release, "async read, race", 1, 256, 1);
  PLANT_MAP(wgmma_swizzle, "descriptor");
  PLANT(store_proxy, "proxy fence");
  PLANT(init_fence, "proxy fence");
  PLANT(missing_barrier, "race");
  PLANT(missing_second_barrier, "race");
  PLANT(missing_warp_sync, "race");
  PLANT(one_lane_arrives, "race");
  PLANT_WITH(global_race, "race", 2, 128, 1);
  PLANT(constant_read, "race");
  PLANT_WITH(ticket_order, "race", 3, 128, 1);
  PLANT(barrier_count, "barrier");
  PLANT(early_return, "barrier");
  PLANT(missing_arrival, "barrier");
  PLANT_WITH(ring_parity, "unwaited copy, race", 1, 128, 1, true, );
  PLANT_WITH(ring_parity, "deadlock", 1, 128, 1, false, );
  PLANT(double_arrival, "arrival");
  PLANT(missing_bytes, "deadlock");
  PLANT(missing_init, "uninitialised");
#if defined(__SANITIZE_ADDRESS__)
  plant("global_bound", "out of bounds", [&](bool bug) {
    const std::unique_ptr<uint32_t[]> exact(new uint32_t[1000]);
    const nxs::Arguments p = {words.get(), exact.get(), 1000};
    const auto shape = shape_of(8, 128, 1);
    return bug ? nxs::launch(nxs::global_bound<true>, shape, nullptr, p)
               : nxs::launch(nxs::global_bound<false>, shape, nullptr, p);
  });
#endif
  PLANT(shared_bound, "out of bounds");
  PLANT(misaligned, "misaligned");
  PLANT(misaligned_shared, "misaligned");
  PLANT(uninitialised, "uninitialised");
  PLANT(divergent_shuffle, "divergence");
  PLANT(divergent_places, "divergence");
  PLANT_MAP(map_rank, "tensor map");
  PLANT_WITH(cluster_start, "race", 2, 64, 2);
  PLANT_WITH(cluster_order, "race", 2, 64, 2);
  PLANT_WITH(register_pool, "deadlock", 1, 384, 1);
  return finish();
}
