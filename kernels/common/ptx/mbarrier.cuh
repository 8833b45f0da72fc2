// mbarriers: 8 bytes of shared memory, aligned to them, that count arrivals and bytes of copies; sm_90.
//
// A phase ends when all arrivals and all expected bytes are there. wait(parity) returns once the phase of that parity
// has ended: for the n-th use (0, 1, ...) the consumer waits for n & 1, the producer for its slot to be free with (n &
// 1) ^ 1. The initialising thread calls fence_mbarrier_init, then a barrier of the block (of the cluster, if others
// arrive).
#pragma once
#include "common/ptx/sm90.cuh"

namespace nxs {

// mbarrier.init, .inval
NXS_DEVICE void mbarrier_init(u32 mbarrier, u32 arrivals) {
  NXS_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(mbarrier), "r"(arrivals) : "memory");
}
NXS_DEVICE void mbarrier_invalidate(u32 mbarrier) {
  NXS_SM90("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(mbarrier) : "memory");
}
// mbarrier.arrive: releases what this thread did before. A thread arrives at most once a phase.
NXS_DEVICE void mbarrier_arrive(u32 mbarrier) {
  NXS_SM90("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(mbarrier) : "memory");
}
// mbarrier.arrive.expect_tx: also `bytes` more must be copied in this phase; whole boxes, out of bounds or not.
NXS_DEVICE void mbarrier_arrive_expect(u32 mbarrier, u32 bytes) {
  NXS_SM90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(mbarrier), "r"(bytes) : "memory");
}
// mbarrier.expect_tx: no arrival
NXS_DEVICE void mbarrier_expect(u32 mbarrier, u32 bytes) {
  NXS_SM90("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(mbarrier), "r"(bytes) : "memory");
}
// mbarrier.arrive at an address of the cluster's window, of the block's scope: what this thread has read may be overwritten
// by copies. Publishes nothing to the other block, so that it needs no fence of all memory, as the next one does.
NXS_DEVICE void mbarrier_arrive_read(u32 mbarrier) {
  NXS_SM90("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(mbarrier) : "memory");
}
// mbarrier.arrive.release.cluster at an address of the cluster's window
NXS_DEVICE void mbarrier_arrive_cluster(u32 mbarrier) {
  NXS_SM90("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(mbarrier) : "memory");
}

#define NXS_MBARRIER_WAIT(name, instruction)                                                        \
  NXS_DEVICE bool name(u32 mbarrier, u32 parity) {                                                  \
    u32 ended = 0;                                                                                  \
    NXS_SM90("{ .reg .pred p; mbarrier." instruction                                                \
             ".shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(ended) : "r"(mbarrier), \
             "r"(parity) : "memory");                                                               \
    return ended;                                                                                   \
  }
// mbarrier.test_wait: whether the phase has ended
NXS_MBARRIER_WAIT(mbarrier_test_wait, "test_wait.parity")
// mbarrier.try_wait: the same, after a wait of limited time
NXS_MBARRIER_WAIT(mbarrier_try_wait, "try_wait.parity")
// The cluster's scope is needed when other blocks arrive.
NXS_MBARRIER_WAIT(mbarrier_try_wait_cluster, "try_wait.parity.acquire.cluster")
#undef NXS_MBARRIER_WAIT

// Until the phase has ended.
NXS_DEVICE void mbarrier_wait(u32 mbarrier, u32 parity) {
  while (!mbarrier_try_wait(mbarrier, parity)) {
  }
}
NXS_DEVICE void mbarrier_wait_cluster(u32 mbarrier, u32 parity) {
  while (!mbarrier_try_wait_cluster(mbarrier, parity)) {
  }
}

}  // namespace nxs
