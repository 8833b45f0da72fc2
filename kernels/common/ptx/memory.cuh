// Loads, stores and atomics of 1, 2, 4, 8 or 16 bytes. Every access of a kernel to global memory goes through here.
//
// T is any trivially copyable type of one of those sizes; the address must be aligned to sizeof(T).
#pragma once
#include <cstring>

#include "common/ptx/simt.cuh"

namespace nxs {

namespace detail {
// The register image of a T: what the asm operands below can name.
template <int kBytes> struct Word;
template <> struct Word<1> { u32 w; };
template <> struct Word<2> { u16 w; };
template <> struct Word<4> { u32 w; };
template <> struct Word<8> { u64 w; };
template <> struct Word<16> { u32 w[4]; };

template <typename T> NXS_DEVICE T from_word(const Word<sizeof(T)>& word) {
  T value;
  memcpy(&value, &word, sizeof(T));
  return value;
}
template <typename T> NXS_DEVICE Word<sizeof(T)> to_word(const T& value) {
  Word<sizeof(T)> word = {};
  memcpy(&word, &value, sizeof(T));
  return word;
}
}  // namespace detail

#define NXS_LOAD(name, ASM, instruction, ...)                                                              \
  template <typename T> NXS_DEVICE T name(const T* p) {                                                    \
    constexpr int n = sizeof(T);                                                                           \
    static_assert(n == 1 || n == 2 || n == 4 || n == 8 || n == 16, "an access is 1, 2, 4, 8 or 16 bytes"); \
    detail::Word<n> v = {};                                                                                \
    if constexpr (n == 1)                                                                                  \
      ASM(instruction ".u8 %0, [%1];" : "=r"(v.w) : "l"(p) __VA_ARGS__);                                   \
    else if constexpr (n == 2)                                                                             \
      ASM(instruction ".u16 %0, [%1];" : "=h"(v.w) : "l"(p) __VA_ARGS__);                                  \
    else if constexpr (n == 4)                                                                             \
      ASM(instruction ".u32 %0, [%1];" : "=r"(v.w) : "l"(p) __VA_ARGS__);                                  \
    else if constexpr (n == 8)                                                                             \
      ASM(instruction ".u64 %0, [%1];" : "=l"(v.w) : "l"(p) __VA_ARGS__);                                  \
    else                                                                                                   \
      ASM(instruction ".v4.u32 {%0,%1,%2,%3}, [%4];"                                                       \
          : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])                                         \
          : "l"(p) __VA_ARGS__);                                                                           \
    return detail::from_word<T>(v);                                                                        \
  }
#define NXS_STORE(name, instruction)                                                                           \
  template <typename T> NXS_DEVICE void name(T* p, const T& value) {                                           \
    constexpr int n = sizeof(T);                                                                               \
    static_assert(n == 1 || n == 2 || n == 4 || n == 8 || n == 16, "an access is 1, 2, 4, 8 or 16 bytes");     \
    const detail::Word<n> v = detail::to_word(value);                                                          \
    if constexpr (n == 1)                                                                                      \
      asm volatile(instruction ".u8 [%0], %1;" ::"l"(p), "r"(v.w) : "memory");                                 \
    else if constexpr (n == 2)                                                                                 \
      asm volatile(instruction ".u16 [%0], %1;" ::"l"(p), "h"(v.w) : "memory");                                \
    else if constexpr (n == 4)                                                                                 \
      asm volatile(instruction ".u32 [%0], %1;" ::"l"(p), "r"(v.w) : "memory");                                \
    else if constexpr (n == 8)                                                                                 \
      asm volatile(instruction ".u64 [%0], %1;" ::"l"(p), "l"(v.w) : "memory");                                \
    else                                                                                                       \
      asm volatile(instruction ".v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), \
                   "r"(v.w[3])                                                                                 \
                   : "memory");                                                                                \
  }

// Ordered among the kernel's other memory accesses.
NXS_LOAD(load_global, asm volatile, "ld.global", : "memory")
// Through the non-coherent path: only for memory that nothing writes while the kernel runs. Volatile, so that loads
// written together stay together: otherwise the compiler sinks each one to its use and one is in flight at a time.
NXS_LOAD(load_global_nc, asm volatile, "ld.global.nc")
NXS_STORE(store_global, "st.global")
// Written once and not read again by this kernel: marked first to leave the caches.
NXS_STORE(store_global_streaming, "st.global.cs")


// store_global_streaming where `go`: predicated, not a branch, into which ptxas would sink loads that stand before it.
template <typename T> NXS_DEVICE void store_global_streaming_if(T* p, const T& value, bool go) {
  constexpr int n = sizeof(T);
  static_assert(n == 2 || n == 4 || n == 8 || n == 16, "a conditional store is 2, 4, 8 or 16 bytes");
  const detail::Word<n> v = detail::to_word(value);
  const u32 go32 = go;
#define NXS_IF(rest) "{ .reg .pred go; setp.ne.u32 go, %1, 0; @go st.global.cs" rest "; }"
  if constexpr (n == 2)
    asm volatile(NXS_IF(".u16 [%0], %2") ::"l"(p), "r"(go32), "h"(v.w) : "memory");
  else if constexpr (n == 4)
    asm volatile(NXS_IF(".u32 [%0], %2") ::"l"(p), "r"(go32), "r"(v.w) : "memory");
  else if constexpr (n == 8)
    asm volatile(NXS_IF(".u64 [%0], %2") ::"l"(p), "r"(go32), "l"(v.w) : "memory");
  else
    asm volatile(NXS_IF(".v4.u32 [%0], {%2,%3,%4,%5}") ::"l"(p), "r"(go32), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]),
                 "r"(v.w[3])
                 : "memory");
#undef NXS_IF
}

#undef NXS_LOAD
#undef NXS_STORE

// red.global.or
NXS_DEVICE void atomic_or_global(u32* p, u32 bits) {
  asm volatile("red.relaxed.gpu.global.or.b32 [%0], %1;" ::"l"(p), "r"(bits) : "memory");
}

}  // namespace nxs
