#pragma once
#include "common/ptx/simt.cuh"

namespace nxs {

NXS_DEVICE void barrier_sync(u32 id, u32 threads, NXS_WHERE) {
  emulator::block_barrier(id, threads, true, false, where);
}
NXS_DEVICE void barrier_arrive(u32 id, u32 threads, NXS_WHERE) {
  emulator::block_barrier(id, threads, false, false, where);
}

}  // namespace nxs
