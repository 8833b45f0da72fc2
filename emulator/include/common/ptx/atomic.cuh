#pragma once
#include "common/ptx/simt.cuh"

namespace nxs {

namespace detail {
template <typename T, typename F>
NXS_DEVICE T atomic_global(T* p, bool acquire, bool release, emulator::Where where, F next) {
  emulator::atomic_order(p, acquire, release, true, where);
  emulator::global_access(p, sizeof(T), emulator::Access::kAtomic, where);
  const T old = *p;
  *p = next(old);
  return old;
}
template <typename T = u32, typename F> NXS_DEVICE T atomic_shared(u32 address, emulator::Where where, F next) {
  u8* p = emulator::shared_access(address, sizeof(T), emulator::Access::kAtomic, where);
  T old;
  memcpy(&old, p, sizeof(T));
  const T value = next(old);
  memcpy(p, &value, sizeof(T));
  return old;
}
}  // namespace detail

template <typename T> NXS_DEVICE T load_acquire_global(const T* p, NXS_WHERE) {
  emulator::atomic_order(p, true, false, false, where);
  emulator::global_access(p, sizeof(T), emulator::Access::kReadAtomically, where);
  return *p;
}
template <typename T> NXS_DEVICE T load_relaxed_global(const T* p, NXS_WHERE) {
  emulator::atomic_order(p, false, false, false, where);
  emulator::global_access(p, sizeof(T), emulator::Access::kReadAtomically, where);
  return *p;
}
template <typename T> NXS_DEVICE void store_release_global(T* p, T value, NXS_WHERE) {
  detail::atomic_global(p, false, true, where, [&](T) { return value; });
}
template <typename T> NXS_DEVICE T atomic_add_global(T* p, T value, NXS_WHERE) {
  return detail::atomic_global(p, false, false, where, [&](T old) { return static_cast<T>(old + value); });
}
template <typename T> NXS_DEVICE T atomic_max_global(T* p, T value, NXS_WHERE) {
  return detail::atomic_global(p, false, false, where, [&](T old) { return old > value ? old : value; });
}
NXS_DEVICE u32 atomic_add_acq_rel_global(u32* p, u32 value, NXS_WHERE) {
  return detail::atomic_global(p, true, true, where, [&](u32 old) { return old + value; });
}
NXS_DEVICE u32 atomic_inc_acq_rel_global(u32* p, u32 last, NXS_WHERE) {
  return detail::atomic_global(p, true, true, where, [&](u32 old) { return old >= last ? 0 : old + 1; });
}

NXS_DEVICE u32 atomic_add_shared(u32 address, u32 value, NXS_WHERE) {
  return detail::atomic_shared(address, where, [&](u32 old) { return old + value; });
}
NXS_DEVICE u32 atomic_max_shared(u32 address, u32 value, NXS_WHERE) {
  return detail::atomic_shared(address, where, [&](u32 old) { return old > value ? old : value; });
}
NXS_DEVICE u32 atomic_or_shared(u32 address, u32 value, NXS_WHERE) {
  return detail::atomic_shared(address, where, [&](u32 old) { return old | value; });
}
NXS_DEVICE u64 atomic_min_shared(u32 address, u64 value, NXS_WHERE) {
  return detail::atomic_shared<u64>(address, where, [&](u64 old) { return old < value ? old : value; });
}

}  // namespace nxs
