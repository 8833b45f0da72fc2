// cp.async.bulk: copies of contiguous bytes; addresses and size are multiples of 16; sm_90.
//
// Loads end on an mbarrier, stores on groups of the thread that starts them. What ordinary stores wrote to the source
// of a store needs fence_async_shared by each writing thread, then a barrier, before.
#pragma once
#include "common/ptx/sm90.cuh"

namespace nxs {

// cp.async.bulk.shared::cluster.global; multicast: to the same address of every rank in the mask, signalling the
// mbarrier at the same address there.
NXS_DEVICE void bulk_load(u32 to, const void* from, u32 bytes, u32 mbarrier) {
  NXS_SM90("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
           "l"(from), "r"(bytes), "r"(mbarrier) : "memory");
}
NXS_DEVICE void bulk_load_multicast(u32 to, const void* from, u32 bytes, u32 mbarrier, u16 ranks) {
  NXS_SM90(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
      "%4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(mbarrier), "h"(ranks) : "memory");
}
// cp.async.bulk.shared::cluster.shared::cta: to a peer; `to` and `mbarrier` are addresses of the cluster's window.
NXS_DEVICE void bulk_copy_cluster(u32 to, u32 from, u32 bytes, u32 mbarrier) {
  NXS_SM90("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
           "r"(from), "r"(bytes), "r"(mbarrier) : "memory");
}
// cp.async.bulk.global.shared::cta
NXS_DEVICE void bulk_store(void* to, u32 from, u32 bytes) {
  NXS_SM90("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes) : "memory");
}
// cp.reduce.async.bulk.add. Floating-point sums depend on the order of blocks.
NXS_DEVICE void bulk_add_f32(void* to, u32 from, u32 bytes) {
  NXS_SM90("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
           "r"(bytes) : "memory");
}
NXS_DEVICE void bulk_add_u32(void* to, u32 from, u32 bytes) {
  NXS_SM90("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%0], [%1], %2;" ::"l"(to), "r"(from),
           "r"(bytes) : "memory");
}
NXS_DEVICE void bulk_add_bf16(void* to, u32 from, u32 bytes) {
  NXS_SM90("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.bf16 [%0], [%1], %2;" ::"l"(to), "r"(from),
           "r"(bytes) : "memory");
}
// cp.async.bulk.prefetch.L2
NXS_DEVICE void bulk_prefetch(const void* from, u32 bytes) {
  NXS_SM90("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// cp.async.bulk.commit_group: this thread's stores since are a group.
NXS_DEVICE void bulk_commit() { NXS_SM90("cp.async.bulk.commit_group;" :: : "memory"); }
// cp.async.bulk.wait_group: until at most kPending of this thread's latest groups are under way; .read: until they have
// read their source, which a block must await before it ends.
template <int kPending> NXS_DEVICE void bulk_wait_read() {
  NXS_SM90("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
template <int kPending> NXS_DEVICE void bulk_wait() {
  NXS_SM90("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace nxs
