// What the emulated wrappers (emulator/include/common/ptx/) call. One function for each thing an instruction can do;
// emulator/src/ implements them. All are called from inside a launch, on the fiber of one CUDA thread.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>

#include "nextscale.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__
#define NXS_DEVICE inline
#define NXS_DEVICE_CALL inline

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace nxs {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i32 = int32_t;
using i64 = int64_t;

struct LaunchShape;
enum class Swizzle : u8;
struct TensorMap;

namespace emulator {

using Where = std::source_location;
// The trailing parameter of a wrapper: the kernel's line, for reports.
#define NXS_WHERE ::nxs::emulator::Where where = ::nxs::emulator::Where::current()

// Where the running thread is.
struct Place {
  u32 thread, block_threads, rank, cluster_blocks;
  dim3 block, grid;
};
const Place& place();

// ---- launches
struct Launch {
  const char* text;  // the arguments of launch() as written; the kernel's name comes first
  const void* kernel;
  dim3 grid;
  unsigned block, dynamic_smem, cluster;
  void (*call)(const void* arguments);
  const void* arguments;
};
nxs_status run(const Launch& launch);
nxs_status allow_dynamic_smem(const void* kernel);

// ---- memory
// What one instruction loads or stores.
template <typename T>
constexpr bool kIsAccess = sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16;
enum class Access : u8 { kRead, kReadConstant, kReadAtomically, kWrite, kAtomic };
void global_access(const void* p, u32 bytes, Access access, Where where);
// The bytes of this block, or of a peer for an address of the cluster window.
u8* shared_access(u32 address, u32 bytes, Access access, Where where, bool cluster = false);
constexpr u32 kDynamicShared = 1024;
u32 map_to_rank(u32 address, u32 rank, Where where);

// Orderings of an atomic on global memory, and fences.
void atomic_order(const void* p, bool acquire, bool release, bool writes, Where where);
void spin(Where where);  // a read that others may change: lets them run
void fence_memory();
void fence_proxy();
void fence_mbarrier();

// ---- barriers
void block_barrier(u32 id, u32 threads, bool wait, bool whole_block, Where where);
void cluster_arrive(Where where);
void cluster_wait(Where where);
void change_registers(u32 registers, u32 blocks, bool raise, Where where);

// ---- warps: every lane of `mask` calls with its own slot; the last one to come runs `finish` over all.
enum class Collective : u8 { kSync, kShuffle, kVote, kMatch, kReduce, kElect, kLoadMatrix, kStoreMatrix, kMma };
using Slots = void* [32];
void warp_collective(Collective kind, u32 mask, void* slot, void (*finish)(Slots& slots, u32 mask), Where where);
inline u32 lane() { return place().thread % 32; }

// ---- mbarriers; `address` may lie in a peer for arrivals
void mbarrier_init(u32 address, u32 count, Where where);
void mbarrier_invalidate(u32 address, Where where);
void mbarrier_arrive(u32 address, u32 expected_bytes, bool arrives, bool cluster, Where where, bool publishes = true);
bool mbarrier_wait(u32 address, u32 parity, bool block, bool cluster, Where where);

// ---- asynchronous copies
void copy_async(u32 to, const void* from, u32 bytes, u32 source_bytes, Where where);
void copy_async_commit();
void copy_async_wait(u32 pending, Where where);
void bulk_load(u32 to, const void* from, u32 bytes, u32 mbarrier, u32 multicast, Where where);
void bulk_copy_cluster(u32 to, u32 from, u32 bytes, u32 mbarrier, Where where);
enum class Reduction : u8 { kNone, kAddF32, kAddU32, kAddBf16, kAddF16 };
void bulk_store(void* to, u32 from, u32 bytes, Reduction reduction, Where where);
void bulk_commit();
void bulk_wait(u32 pending, bool read_only, Where where);
void tensor_load(u32 to, const TensorMap* map, u32 mbarrier, const i32* at, u32 rank, u32 multicast, Where where);
void tensor_store(const TensorMap* map, u32 from, const i32* at, u32 rank, bool add, Where where);
void check_tensor_map(const TensorMap* map, u32 rank, Where where);

// ---- matrices
enum class MmaType : u8 { kBf16, kF16, kTf32 };
void load_matrix(u32* registers, u32 count, u32 address, bool transposed, Where where);
void store_matrix(const u32* registers, u32 count, u32 address, bool transposed, Where where);
void mma(MmaType type, float* c, const u32* a, const u32* b, Where where);
struct Wgmma {
  MmaType type;
  u32 n;
  float* d;
  const u32* a_registers;  // or null: A comes from its descriptor
  u64 a, b;
  bool a_transposed, b_transposed, accumulate;
};
void wgmma(const Wgmma& op, Where where);
void wgmma_fence(Where where);
void wgmma_commit(Where where);
void wgmma_wait(u32 pending, Where where);

// An accumulator between its wgmma and the wait holds this NaN; a wrapper that meets it reports.
constexpr u32 kInFlight = 0x7fe0dead;
[[noreturn]] void fail_in_flight(Where where);
template <typename T> inline void check_registers(const T& value, Where where) {
  if constexpr (sizeof(T) % 4 == 0)
    for (u32 i = 0; i < sizeof(T); i += 4) {
      u32 word;
      memcpy(&word, reinterpret_cast<const char*>(&value) + i, 4);
      if (word == kInFlight) fail_in_flight(where);
    }
}

void count_special();

}  // namespace emulator
}  // namespace nxs
