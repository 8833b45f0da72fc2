// cp.async: copies from global to shared memory that a thread starts, and waits for, by groups.
#pragma once
#include "common/ptx/simt.cuh"

namespace nxs {

// cp.async of kBytes (4, 8; 16 around L1), both addresses aligned to them: `source_bytes` are read, the rest becomes
// zero. With source_bytes 0 nothing is read, but `from` still is an address of the buffer.
template <int kBytes> NXS_DEVICE void copy_async(u32 to, const void* from, u32 source_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(source_bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes), "r"(source_bytes)
                 : "memory");
}
// cp.async.commit_group: what this thread has started since is a group, even if it is nothing.
NXS_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// cp.async.wait_group: until at most kPending of this thread's latest groups are under way. Other threads see the bytes
// after a barrier that follows.
template <int kPending> NXS_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace nxs
