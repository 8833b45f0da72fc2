// Fences.
#pragma once
#include "common/ptx/sm90.cuh"

namespace nxs {

// fence.acq_rel.gpu: orders this thread's accesses around it for every thread of the device that sees it through an
// atomic.
NXS_DEVICE void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// fence.proxy.async: what this thread wrote with ordinary stores is visible to the async proxy (wgmma operands, bulk
// and tensor copies) of whoever a barrier orders after this. Each writing thread calls it. Of shared memory, of global,
// of both.
NXS_DEVICE void fence_async_shared() { NXS_SM90("fence.proxy.async.shared::cta;" :: : "memory"); }
NXS_DEVICE void fence_async_global() { NXS_SM90("fence.proxy.async.global;" :: : "memory"); }
NXS_DEVICE void fence_async() { NXS_SM90("fence.proxy.async;" :: : "memory"); }

// fence.mbarrier_init: this thread's initialised mbarriers are visible to copies and to the cluster, after a barrier.
NXS_DEVICE void fence_mbarrier_init() { NXS_SM90("fence.mbarrier_init.release.cluster;" :: : "memory"); }

}  // namespace nxs
