// What the kernels of importance share with their launchers.
#pragma once
#include "nextscale.h"

namespace nxs::compression {

using ImportanceParams = nxs_importance_params;

// Keys that a block of the portable kernels takes at once, and of each of its 8 warps.
constexpr int kImportanceSpan = 256, kImportanceWarpKeys = 32;
// Shared memory for queries, within what every device has.
constexpr int kImportanceQueryBytes = 96 << 10;

// The first pass, where it is needed, and the second: importance_sm80.cuh, importance_sm90.cuh.
template <typename T, int kDim> nxs_status importance_sm80(const ImportanceParams& p, void* stream);
template <typename T, int kDim> nxs_status importance_sm90(const ImportanceParams& p, void* stream);

}  // namespace nxs::compression
