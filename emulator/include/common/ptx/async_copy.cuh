#pragma once
#include "common/ptx/simt.cuh"

namespace nxs {

template <int kBytes> NXS_DEVICE void copy_async(u32 to, const void* from, u32 source_bytes = kBytes, NXS_WHERE) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulator::copy_async(to, from, kBytes, source_bytes, where);
}
NXS_DEVICE void copy_async_commit() { emulator::copy_async_commit(); }
template <int kPending> NXS_DEVICE void copy_async_wait(NXS_WHERE) { emulator::copy_async_wait(kPending, where); }

}  // namespace nxs
