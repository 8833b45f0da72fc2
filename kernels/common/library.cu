// The part of the C ABI that belongs to no op: version, status names, device facts.
#include "common/ptx/device.cuh"
#include "nextscale.h"

extern "C" uint32_t nxs_abi_version(void) { return NXS_ABI_VERSION; }

extern "C" const char* nxs_status_name(nxs_status status) {
  switch (status) {
    case NXS_OK: return "NXS_OK";
    case NXS_E_NULL: return "NXS_E_NULL";
    case NXS_E_SHAPE: return "NXS_E_SHAPE";
    case NXS_E_STRIDE: return "NXS_E_STRIDE";
    case NXS_E_ALIGNMENT: return "NXS_E_ALIGNMENT";
    case NXS_E_DTYPE: return "NXS_E_DTYPE";
    case NXS_E_UNSUPPORTED: return "NXS_E_UNSUPPORTED";
    default: break;
  }
  if (status < 0) return "NXS_E_UNKNOWN";
  const char* name = nxs::runtime_status_name(status);
  return name ? name : "cudaErrorUnknown";
}

extern "C" nxs_status nxs_get_device_info(int32_t ordinal, nxs_device_info* info) {
  if (!info) return NXS_E_NULL;
  *info = nxs_device_info{};
  return nxs::device_info(ordinal, info);
}

extern "C" nxs_status nxs_current_device(int32_t* ordinal) {
  if (!ordinal) return NXS_E_NULL;
  return nxs::current_device(ordinal);
}
