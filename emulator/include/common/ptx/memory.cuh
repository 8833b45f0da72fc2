#pragma once
#include "common/ptx/simt.cuh"

namespace nxs {

namespace detail {
template <typename T> NXS_DEVICE T load(const T* p, emulator::Access access, emulator::Where where) {
  static_assert(emulator::kIsAccess<T>);
  emulator::global_access(p, sizeof(T), access, where);
  T value;
  memcpy(&value, static_cast<const void*>(p), sizeof(T));
  return value;
}
template <typename T> NXS_DEVICE void store(T* p, const T& value, emulator::Where where) {
  static_assert(emulator::kIsAccess<T>);
  emulator::check_registers(value, where);
  emulator::global_access(p, sizeof(T), emulator::Access::kWrite, where);
  memcpy(static_cast<void*>(p), &value, sizeof(T));
}
}  // namespace detail

template <typename T> NXS_DEVICE T load_global(const T* p, NXS_WHERE) {
  return detail::load(p, emulator::Access::kRead, where);
}
template <typename T> NXS_DEVICE T load_global_nc(const T* p, NXS_WHERE) {
  return detail::load(p, emulator::Access::kReadConstant, where);
}
template <typename T> NXS_DEVICE void store_global(T* p, const T& value, NXS_WHERE) { detail::store(p, value, where); }
template <typename T> NXS_DEVICE void store_global_streaming(T* p, const T& value, NXS_WHERE) {
  detail::store(p, value, where);
}
template <typename T> NXS_DEVICE void store_global_streaming_if(T* p, const T& value, bool go, NXS_WHERE) {
  if (go) detail::store(p, value, where);
}

NXS_DEVICE void atomic_or_global(u32* p, u32 bits, NXS_WHERE) {
  emulator::atomic_order(p, false, false, true, where);
  emulator::global_access(p, 4, emulator::Access::kAtomic, where);
  *p |= bits;
}

}  // namespace nxs
