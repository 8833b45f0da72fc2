#pragma once
#include "common/ptx/simt.cuh"

namespace nxs {

NXS_DEVICE void fence_gpu() { emulator::fence_memory(); }
NXS_DEVICE void fence_async_shared() { emulator::fence_proxy(); }
NXS_DEVICE void fence_async_global() { emulator::fence_proxy(); }
NXS_DEVICE void fence_async() { emulator::fence_proxy(); }
NXS_DEVICE void fence_mbarrier_init() { emulator::fence_mbarrier(); }

}  // namespace nxs
