#pragma once
#include "common/ptx/simt.cuh"

namespace nxs {

NXS_DEVICE void bulk_load(u32 to, const void* from, u32 bytes, u32 mbarrier, NXS_WHERE) {
  emulator::bulk_load(to, from, bytes, mbarrier, 0, where);
}
NXS_DEVICE void bulk_load_multicast(u32 to, const void* from, u32 bytes, u32 mbarrier, u16 ranks, NXS_WHERE) {
  emulator::bulk_load(to, from, bytes, mbarrier, ranks, where);
}
NXS_DEVICE void bulk_copy_cluster(u32 to, u32 from, u32 bytes, u32 mbarrier, NXS_WHERE) {
  emulator::bulk_copy_cluster(to, from, bytes, mbarrier, where);
}
NXS_DEVICE void bulk_store(void* to, u32 from, u32 bytes, NXS_WHERE) {
  emulator::bulk_store(to, from, bytes, emulator::Reduction::kNone, where);
}
NXS_DEVICE void bulk_add_f32(void* to, u32 from, u32 bytes, NXS_WHERE) {
  emulator::bulk_store(to, from, bytes, emulator::Reduction::kAddF32, where);
}
NXS_DEVICE void bulk_add_u32(void* to, u32 from, u32 bytes, NXS_WHERE) {
  emulator::bulk_store(to, from, bytes, emulator::Reduction::kAddU32, where);
}
NXS_DEVICE void bulk_add_bf16(void* to, u32 from, u32 bytes, NXS_WHERE) {
  emulator::bulk_store(to, from, bytes, emulator::Reduction::kAddBf16, where);
}
NXS_DEVICE void bulk_prefetch(const void*, u32) {}
NXS_DEVICE void bulk_commit() { emulator::bulk_commit(); }
template <int kPending> NXS_DEVICE void bulk_wait_read(NXS_WHERE) { emulator::bulk_wait(kPending, true, where); }
template <int kPending> NXS_DEVICE void bulk_wait(NXS_WHERE) { emulator::bulk_wait(kPending, false, where); }

}  // namespace nxs
