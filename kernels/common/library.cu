// The part of the C ABI that belongs to no op: version, status names, device facts.
#include <cuda_runtime.h>

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
  const char* name = cudaGetErrorName(static_cast<cudaError_t>(status));
  return name ? name : "cudaErrorUnknown";
}

static nxs_status clean(cudaError_t error) {
  if (error != cudaSuccess) (void)cudaGetLastError();
  return static_cast<nxs_status>(error);
}

extern "C" nxs_status nxs_get_device_info(int32_t ordinal, nxs_device_info* info) {
  if (!info) return NXS_E_NULL;
  *info = nxs_device_info{};
  int l2 = 0;
  const struct {
    int32_t* value;
    cudaDeviceAttr attribute;
  } queries[] = {
      {&info->cc_major, cudaDevAttrComputeCapabilityMajor},
      {&info->cc_minor, cudaDevAttrComputeCapabilityMinor},
      {&info->sm_count, cudaDevAttrMultiProcessorCount},
      {&info->smem_per_block_max, cudaDevAttrMaxSharedMemoryPerBlockOptin},
      {&l2, cudaDevAttrL2CacheSize},
  };
  for (const auto& query : queries) {
    const cudaError_t error = cudaDeviceGetAttribute(query.value, query.attribute, ordinal);
    if (error != cudaSuccess) return clean(error);
  }
  info->l2_bytes = l2;
  return NXS_OK;
}

extern "C" nxs_status nxs_current_device(int32_t* ordinal) {
  if (!ordinal) return NXS_E_NULL;
  int current = 0;
  const cudaError_t error = cudaGetDevice(&current);
  *ordinal = current;
  return clean(error);
}
