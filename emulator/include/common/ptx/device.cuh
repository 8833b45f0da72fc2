#pragma once
#include "nextscale.h"

namespace nxs {

// The emulator says it is one device of compute capability 9.0.
inline const char* runtime_status_name(nxs_status status) {
  switch (status) {
    case 1: return "cudaErrorInvalidValue";
    case 101: return "cudaErrorInvalidDevice";
    case 719: return "cudaErrorLaunchFailure";
    default: return nullptr;
  }
}
inline nxs_status device_info(int32_t ordinal, nxs_device_info* info) {
  if (ordinal != 0) return 101;
  *info = {9, 0, 132, 232448, 50 << 20};
  return NXS_OK;
}
inline nxs_status current_device(int32_t* ordinal) {
  *ordinal = 0;
  return NXS_OK;
}

}  // namespace nxs
