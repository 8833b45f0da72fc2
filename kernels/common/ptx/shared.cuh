// Shared memory, by 32-bit addresses of the shared window. Kernels have no __shared__ variables: all of it is dynamic.
#pragma once
#include "common/ptx/memory.cuh"

namespace nxs {

// Where this block's shared memory begins: a multiple of 1024, as there is no static shared memory before it.
NXS_DEVICE u32 dynamic_shared() {
  extern __shared__ __align__(1024) u8 nxs_dynamic_shared[];
  return static_cast<u32>(__cvta_generic_to_shared(nxs_dynamic_shared));
}

namespace detail {
// The instruction differs between the windows of a block and of a cluster only in the name of the space.
#define NXS_LOAD_WINDOW(name, ASM, space)                                                                  \
  template <typename T> NXS_DEVICE T name(u32 address) {                                                   \
    constexpr int n = sizeof(T);                                                                           \
    static_assert(n == 1 || n == 2 || n == 4 || n == 8 || n == 16, "an access is 1, 2, 4, 8 or 16 bytes"); \
    Word<n> v = {};                                                                                        \
    if constexpr (n == 1)                                                                                  \
      ASM("ld." space ".u8 %0, [%1];" : "=r"(v.w) : "r"(address) : "memory");                              \
    else if constexpr (n == 2)                                                                             \
      ASM("ld." space ".u16 %0, [%1];" : "=h"(v.w) : "r"(address) : "memory");                             \
    else if constexpr (n == 4)                                                                             \
      ASM("ld." space ".u32 %0, [%1];" : "=r"(v.w) : "r"(address) : "memory");                             \
    else if constexpr (n == 8)                                                                             \
      ASM("ld." space ".u64 %0, [%1];" : "=l"(v.w) : "r"(address) : "memory");                             \
    else                                                                                                   \
      ASM("ld." space ".v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]),           \
          "=r"(v.w[3]) : "r"(address) : "memory");                                                         \
    return from_word<T>(v);                                                                                \
  }
#define NXS_STORE_WINDOW(name, ASM, space)                                                                  \
  template <typename T> NXS_DEVICE void name(u32 address, const T& value) {                                 \
    constexpr int n = sizeof(T);                                                                            \
    static_assert(n == 1 || n == 2 || n == 4 || n == 8 || n == 16, "an access is 1, 2, 4, 8 or 16 bytes");  \
    [[maybe_unused]] const Word<n> v = to_word(value);                                                      \
    if constexpr (n == 1)                                                                                   \
      ASM("st." space ".u8 [%0], %1;" ::"r"(address), "r"(v.w) : "memory");                                 \
    else if constexpr (n == 2)                                                                              \
      ASM("st." space ".u16 [%0], %1;" ::"r"(address), "h"(v.w) : "memory");                                \
    else if constexpr (n == 4)                                                                              \
      ASM("st." space ".u32 [%0], %1;" ::"r"(address), "r"(v.w) : "memory");                                \
    else if constexpr (n == 8)                                                                              \
      ASM("st." space ".u64 [%0], %1;" ::"r"(address), "l"(v.w) : "memory");                                \
    else                                                                                                    \
      ASM("st." space ".v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), \
          "r"(v.w[3]) : "memory");                                                                          \
  }
NXS_LOAD_WINDOW(load_shared_window, asm volatile, "shared")
NXS_STORE_WINDOW(store_shared_window, asm volatile, "shared")
}  // namespace detail

// ld.shared, st.shared of 1, 2, 4, 8 or 16 bytes; the address is aligned to them.
template <typename T> NXS_DEVICE T load_shared(u32 address) { return detail::load_shared_window<T>(address); }
template <typename T> NXS_DEVICE void store_shared(u32 address, const T& value) {
  detail::store_shared_window(address, value);
}

}  // namespace nxs
