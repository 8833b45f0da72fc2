#pragma once
#include "common/ptx/simt.cuh"

namespace nxs {

NXS_DEVICE void mbarrier_init(u32 mbarrier, u32 arrivals, NXS_WHERE) {
  emulator::mbarrier_init(mbarrier, arrivals, where);
}
NXS_DEVICE void mbarrier_invalidate(u32 mbarrier, NXS_WHERE) { emulator::mbarrier_invalidate(mbarrier, where); }
NXS_DEVICE void mbarrier_arrive(u32 mbarrier, NXS_WHERE) { emulator::mbarrier_arrive(mbarrier, 0, true, false, where); }
NXS_DEVICE void mbarrier_arrive_expect(u32 mbarrier, u32 bytes, NXS_WHERE) {
  emulator::mbarrier_arrive(mbarrier, bytes, true, false, where);
}
NXS_DEVICE void mbarrier_expect(u32 mbarrier, u32 bytes, NXS_WHERE) {
  emulator::mbarrier_arrive(mbarrier, bytes, false, false, where);
}
NXS_DEVICE void mbarrier_arrive_read(u32 mbarrier, NXS_WHERE) {
  emulator::mbarrier_arrive(mbarrier, 0, true, true, where, false);
}
NXS_DEVICE void mbarrier_arrive_cluster(u32 mbarrier, NXS_WHERE) {
  emulator::mbarrier_arrive(mbarrier, 0, true, true, where);
}

NXS_DEVICE bool mbarrier_test_wait(u32 mbarrier, u32 parity, NXS_WHERE) {
  return emulator::mbarrier_wait(mbarrier, parity, false, false, where);
}
NXS_DEVICE bool mbarrier_try_wait(u32 mbarrier, u32 parity, NXS_WHERE) {
  return emulator::mbarrier_wait(mbarrier, parity, true, false, where);
}
NXS_DEVICE bool mbarrier_try_wait_cluster(u32 mbarrier, u32 parity, NXS_WHERE) {
  return emulator::mbarrier_wait(mbarrier, parity, true, true, where);
}
NXS_DEVICE void mbarrier_wait(u32 mbarrier, u32 parity, NXS_WHERE) { mbarrier_try_wait(mbarrier, parity, where); }
NXS_DEVICE void mbarrier_wait_cluster(u32 mbarrier, u32 parity, NXS_WHERE) {
  mbarrier_try_wait_cluster(mbarrier, parity, where);
}

}  // namespace nxs
