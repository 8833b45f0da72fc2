#pragma once
#include "common/ptx/simt.cuh"

namespace nxs {

// Launches run one after the other.
NXS_DEVICE void programmatic_wait() {}
NXS_DEVICE void programmatic_trigger() {}

}  // namespace nxs
