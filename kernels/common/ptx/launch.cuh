// The one way a kernel is launched.
#pragma once
#include <cuda_runtime.h>

#include <atomic>
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

namespace detail {
constexpr unsigned kAttributeSlots = 1024;
inline std::atomic<uint64_t> attributes_set[kAttributeSlots];

// Does something to a kernel on the current device once: asking the runtime every time costs a fifth of a launch. What has
// been done is an entry of a table without locks; where that is full, it is done every time.
template <typename Do> nxs_status once(const void* kernel, unsigned what, Do act) {
  constexpr unsigned kProbes = 16;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    // An address has 48 bits.
    const uint64_t entry = reinterpret_cast<uint64_t>(kernel) << 16 | (static_cast<uint64_t>(device) & 0x7fff) << 1 | what;
    const uint64_t first = (entry * 0x9e3779b97f4a7c15u) >> 54;
    unsigned probe = 0;
    for (; probe < kProbes; ++probe)
      if (attributes_set[(first + probe) % kAttributeSlots].load(std::memory_order_relaxed) == entry) return NXS_OK;
    error = act(device);
    for (probe = 0; error == cudaSuccess && probe < kProbes; ++probe) {
      uint64_t empty = 0;
      if (attributes_set[(first + probe) % kAttributeSlots].compare_exchange_strong(empty, entry, std::memory_order_relaxed)) break;
    }
  }
  if (error != cudaSuccess) (void)cudaGetLastError();
  return static_cast<nxs_status>(error);
}
}  // namespace detail

// Lets `kernel` use as much dynamic shared memory as the current device has; without, 48 KiB.
template <typename... Params> nxs_status allow_dynamic_smem(void (*kernel)(Params...)) {
  const void* address = reinterpret_cast<const void*>(kernel);
  return detail::once(address, 0, [address](int device) {
    int most = 0;
    cudaFuncAttributes attributes;
    cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, address);
    if (error != cudaSuccess) return error;
    return cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                most - static_cast<int>(attributes.sharedSizeBytes));
  });
}

// Lets `kernel` be launched in clusters of more than 8 blocks on the current device.
template <typename... Params> nxs_status allow_large_clusters(void (*kernel)(Params...)) {
  const void* address = reinterpret_cast<const void*>(kernel);
  return detail::once(address, 1, [address](int) {
    return cudaFuncSetAttribute(address, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  });
}

}  // namespace nxs
