#pragma once
#include "common/ptx/simt.cuh"

namespace nxs {

NXS_DEVICE u32 dynamic_shared() { return emulator::kDynamicShared; }

namespace detail {
template <typename T> NXS_DEVICE T load_window(u32 address, bool cluster, emulator::Where where) {
  static_assert(emulator::kIsAccess<T>);
  T value;
  memcpy(static_cast<void*>(&value),
         emulator::shared_access(address, sizeof(T), emulator::Access::kRead, where, cluster), sizeof(T));
  return value;
}
template <typename T> NXS_DEVICE void store_window(u32 address, const T& value, bool cluster, emulator::Where where) {
  static_assert(emulator::kIsAccess<T>);
  emulator::check_registers(value, where);
  memcpy(emulator::shared_access(address, sizeof(T), emulator::Access::kWrite, where, cluster), &value, sizeof(T));
}
}  // namespace detail

template <typename T> NXS_DEVICE T load_shared(u32 address, NXS_WHERE) {
  return detail::load_window<T>(address, false, where);
}
template <typename T> NXS_DEVICE void store_shared(u32 address, const T& value, NXS_WHERE) {
  detail::store_window(address, value, false, where);
}

}  // namespace nxs
