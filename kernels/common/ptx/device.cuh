// What the runtime says of devices and of its own status codes. Host code.
#pragma once
#include <cuda_runtime.h>

#include "nextscale.h"

namespace nxs {

namespace detail {
// The error slot of the runtime is left clean.
inline nxs_status clean_status(cudaError_t error) {
  if (error != cudaSuccess) (void)cudaGetLastError();
  return static_cast<nxs_status>(error);
}
}  // namespace detail

// CUDA's own name of a positive status, or null.
inline const char* runtime_status_name(nxs_status status) { return cudaGetErrorName(static_cast<cudaError_t>(status)); }

// Fills *info, which comes zeroed. Does not create a context.
inline nxs_status device_info(int32_t ordinal, nxs_device_info* info) {
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
    if (error != cudaSuccess) return detail::clean_status(error);
  }
  info->l2_bytes = l2;
  return NXS_OK;
}

inline nxs_status current_device(int32_t* ordinal) {
  int current = 0;
  const cudaError_t error = cudaGetDevice(&current);
  *ordinal = current;
  return detail::clean_status(error);
}

}  // namespace nxs
