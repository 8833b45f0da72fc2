// The one way a kernel is launched.
#pragma once
#include <cuda_runtime.h>

#include <utility>

#include "common/check.h"

namespace nxs {

struct LaunchShape {
  dim3 grid = dim3(1);
  unsigned block = 1;
  unsigned dynamic_smem = 0;  // bytes; above 48 KiB call allow_dynamic_smem first
  unsigned cluster = 1;       // blocks along x that share a cluster; more than 8 are not portable
  bool programmatic = false;  // may start before the kernel before it on the stream has ended: programmatic.cuh
};

// Enqueues kernel<<<shape>>>(args...) on `stream`. The error slot of the runtime is left clean.
template <typename... Params, typename... Args>
nxs_status launch(void (*kernel)(Params...), const LaunchShape& shape, void* stream, Args&&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.block);
  config.dynamicSmemBytes = shape.dynamic_smem;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = shape.cluster;
    cluster.val.clusterDim.y = 1;
    cluster.val.clusterDim.z = 1;
  }
  if (shape.programmatic) {
    cudaLaunchAttribute& programmatic = attributes[config.numAttrs++];
    programmatic.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    programmatic.val.programmaticStreamSerializationAllowed = 1;
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
  if (error != cudaSuccess) (void)cudaGetLastError();
  return static_cast<nxs_status>(error);
}

// Lets `kernel` use more than 48 KiB of dynamic shared memory on the current device. Idempotent.
template <typename... Params> nxs_status allow_dynamic_smem(void (*kernel)(Params...), unsigned bytes) {
  const cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) (void)cudaGetLastError();
  return static_cast<nxs_status>(error);
}

// Lets `kernel` be launched in clusters of more than 8 blocks on the current device. Idempotent.
template <typename... Params> nxs_status allow_large_clusters(void (*kernel)(Params...)) {
  const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                 cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) (void)cudaGetLastError();
  return static_cast<nxs_status>(error);
}

}  // namespace nxs
