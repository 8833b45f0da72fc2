// Named barriers: ids 1 to 15 (0 is block_sync). `threads` counts all that come, to sync and to arrive; a multiple
// of 32.
#pragma once
#include "common/ptx/simt.cuh"

namespace nxs {

// bar.sync id, threads
NXS_DEVICE void barrier_sync(u32 id, u32 threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// bar.arrive id, threads
NXS_DEVICE void barrier_arrive(u32 id, u32 threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace nxs
