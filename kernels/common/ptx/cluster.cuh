// Clusters of blocks and each other's shared memory; sm_90.
//
// A block's memory may be touched from outside only between a cluster barrier that shows it has begun and one that it
// passes before it ends.
#pragma once
#include "common/ptx/shared.cuh"
#include "common/ptx/sm90.cuh"

namespace nxs {

// %cluster_ctarank, %cluster_nctarank
NXS_DEVICE u32 cluster_rank() {
  u32 rank = 0;
  NXS_SM90("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
NXS_DEVICE u32 cluster_size() {
  u32 size = 1;
  NXS_SM90("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// barrier.cluster.arrive.release, barrier.cluster.wait.acquire: all threads of all blocks, in converged warps.
NXS_DEVICE void cluster_arrive() { NXS_SM90("barrier.cluster.arrive.release.aligned;" :: : "memory"); }
NXS_DEVICE void cluster_wait() { NXS_SM90("barrier.cluster.wait.acquire.aligned;" :: : "memory"); }

// mapa: the address in the cluster's window of what block `rank` has at `address`.
NXS_DEVICE u32 map_to_rank(u32 address, u32 rank) {
  u32 mapped = 0;
  NXS_SM90("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

namespace detail {
NXS_LOAD_WINDOW(load_cluster_window, NXS_SM90, "shared::cluster")
NXS_STORE_WINDOW(store_cluster_window, NXS_SM90, "shared::cluster")
}  // namespace detail

// ld.shared::cluster, st.shared::cluster
template <typename T> NXS_DEVICE T load_cluster(u32 address) { return detail::load_cluster_window<T>(address); }
template <typename T> NXS_DEVICE void store_cluster(u32 address, const T& value) {
  detail::store_cluster_window(address, value);
}

}  // namespace nxs
