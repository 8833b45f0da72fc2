#pragma once
#include "common/ptx/shared.cuh"

namespace nxs {

NXS_DEVICE u32 cluster_rank() { return emulator::place().rank; }
NXS_DEVICE u32 cluster_size() { return emulator::place().cluster_blocks; }
NXS_DEVICE void cluster_arrive(NXS_WHERE) { emulator::cluster_arrive(where); }
NXS_DEVICE void cluster_wait(NXS_WHERE) { emulator::cluster_wait(where); }
NXS_DEVICE u32 map_to_rank(u32 address, u32 rank, NXS_WHERE) { return emulator::map_to_rank(address, rank, where); }
template <typename T> NXS_DEVICE T load_cluster(u32 address, NXS_WHERE) {
  return detail::load_window<T>(address, true, where);
}
template <typename T> NXS_DEVICE void store_cluster(u32 address, const T& value, NXS_WHERE) {
  detail::store_window(address, value, true, where);
}

}  // namespace nxs
