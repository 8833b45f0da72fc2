#pragma once
#include <tuple>
#include <utility>

#include "common/check.h"
#include "emulator/runtime.h"

namespace nxs {

struct LaunchShape {
  dim3 grid = dim3(1);
  unsigned block = 1;
  unsigned dynamic_smem = 0;
  unsigned cluster = 1;
  bool programmatic = false;
};

template <typename... Params, typename... Args>
nxs_status launch_named(const char* text, void (*kernel)(Params...), const LaunchShape& shape, void*, Args&&... args) {
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> params;
  } call{kernel, std::tuple<Params...>(std::forward<Args>(args)...)};
  return emulator::run({text, reinterpret_cast<const void*>(kernel), shape.grid, shape.block, shape.dynamic_smem,
                        shape.cluster,
                        [](const void* p) {
                          const Call& call = *static_cast<const Call*>(p);
                          std::apply(call.kernel, call.params);
                        },
                        &call});
}
// A macro, for the kernel's name as it is written at the launch.
#define launch(...) launch_named(#__VA_ARGS__, __VA_ARGS__)

template <typename... Params> nxs_status allow_dynamic_smem(void (*kernel)(Params...)) {
  return emulator::allow_dynamic_smem(reinterpret_cast<const void*>(kernel));
}

template <typename... Params> nxs_status allow_large_clusters(void (*)(Params...)) { return NXS_OK; }

}  // namespace nxs
