// Atomics, and loads and stores that order others.
#pragma once
#include "common/ptx/simt.cuh"

namespace nxs {

namespace detail {
template <typename T> constexpr bool is_atomic_word = sizeof(T) == 4 || sizeof(T) == 8;
}

// ld.acquire.gpu: what the thread whose store_release_global it reads did before is visible after. u32 or u64.
// ld.relaxed.gpu: no order.
#define NXS_LOAD_ORDERED(name, order)                                                          \
  template <typename T> NXS_DEVICE T name(const T* p) {                                        \
    static_assert(detail::is_atomic_word<T>);                                                  \
    T value;                                                                                   \
    if constexpr (sizeof(T) == 4)                                                              \
      asm volatile("ld." order ".gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory"); \
    else                                                                                       \
      asm volatile("ld." order ".gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(p) : "memory"); \
    return value;                                                                              \
  }
NXS_LOAD_ORDERED(load_acquire_global, "acquire")
NXS_LOAD_ORDERED(load_relaxed_global, "relaxed")
#undef NXS_LOAD_ORDERED

// st.release.gpu
template <typename T> NXS_DEVICE void store_release_global(T* p, T value) {
  static_assert(detail::is_atomic_word<T>);
  if constexpr (sizeof(T) == 4)
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
  else
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
}

// atom.relaxed.gpu.add, .max of u32 or u64; the old value
#define NXS_ATOMIC(name, operation)                                          \
  template <typename T> NXS_DEVICE T name(T* p, T value) {                   \
    static_assert(detail::is_atomic_word<T>);                                \
    T old;                                                                   \
    if constexpr (sizeof(T) == 4)                                            \
      asm volatile("atom.relaxed.gpu.global." operation ".u32 %0, [%1], %2;" \
                   : "=r"(old)                                               \
                   : "l"(p), "r"(value)                                      \
                   : "memory");                                              \
    else                                                                     \
      asm volatile("atom.relaxed.gpu.global." operation ".u64 %0, [%1], %2;" \
                   : "=l"(old)                                               \
                   : "l"(p), "l"(value)                                      \
                   : "memory");                                              \
    return old;                                                              \
  }
NXS_ATOMIC(atomic_add_global, "add")
NXS_ATOMIC(atomic_max_global, "max")
#undef NXS_ATOMIC

// atom.acq_rel.gpu.add; .inc: old >= last ? 0 : old + 1, so that a ticket word returns to zero by itself.
NXS_DEVICE u32 atomic_add_acq_rel_global(u32* p, u32 value) {
  u32 old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(value) : "memory");
  return old;
}
NXS_DEVICE u32 atomic_inc_acq_rel_global(u32* p, u32 last) {
  u32 old;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(last) : "memory");
  return old;
}

// atom.relaxed.cta.shared; the old value
#define NXS_ATOMIC_SHARED(name, operation)                                  \
  NXS_DEVICE u32 name(u32 address, u32 value) {                             \
    u32 old;                                                                \
    asm volatile("atom.relaxed.cta.shared::cta." operation " %0, [%1], %2;" \
                 : "=r"(old)                                                \
                 : "r"(address), "r"(value)                                 \
                 : "memory");                                               \
    return old;                                                             \
  }
NXS_ATOMIC_SHARED(atomic_add_shared, "add.u32")
NXS_ATOMIC_SHARED(atomic_max_shared, "max.u32")
NXS_ATOMIC_SHARED(atomic_or_shared, "or.b32")
#undef NXS_ATOMIC_SHARED
// atom.relaxed.cta.shared.min.u64
NXS_DEVICE u64 atomic_min_shared(u32 address, u64 value) {
  u64 old;
  asm volatile("atom.relaxed.cta.shared::cta.min.u64 %0, [%1], %2;" : "=l"(old) : "r"(address), "l"(value) : "memory");
  return old;
}

}  // namespace nxs
