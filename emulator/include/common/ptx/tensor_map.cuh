#pragma once
#include "common/ptx/simt.cuh"
#include "common/tensor_shape.cuh"

namespace nxs {

struct alignas(64) TensorMap {
  u8 bytes[128];
};
nxs_status encode_tensor_map(TensorMap* map, const TensorShape& shape);

template <int kRank>
NXS_DEVICE void tensor_load(u32 to, const TensorMap* map, u32 mbarrier, const i32 (&at)[kRank], NXS_WHERE) {
  emulator::tensor_load(to, map, mbarrier, at, kRank, 0, where);
}
template <int kRank> NXS_DEVICE void tensor_load_multicast(u32 to, const TensorMap* map, u32 mbarrier,
                                                           const i32 (&at)[kRank], u16 ranks, NXS_WHERE) {
  emulator::tensor_load(to, map, mbarrier, at, kRank, ranks, where);
}
template <int kRank> NXS_DEVICE void tensor_store(const TensorMap* map, u32 from, const i32 (&at)[kRank], NXS_WHERE) {
  emulator::tensor_store(map, from, at, kRank, false, where);
}
template <int kRank> NXS_DEVICE void tensor_add(const TensorMap* map, u32 from, const i32 (&at)[kRank], NXS_WHERE) {
  emulator::tensor_store(map, from, at, kRank, true, where);
}
template <int kRank> NXS_DEVICE void tensor_prefetch(const TensorMap* map, const i32 (&)[kRank], NXS_WHERE) {
  emulator::check_tensor_map(map, kRank, where);
}
NXS_DEVICE void prefetch_tensor_map(const TensorMap* map, NXS_WHERE) { emulator::check_tensor_map(map, 0, where); }

}  // namespace nxs
