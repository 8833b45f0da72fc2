#pragma once
#include "common/ptx/simt.cuh"

namespace nxs {

template <int kCount> NXS_DEVICE void load_matrix(u32 (&registers)[kCount], u32 address, NXS_WHERE) {
  emulator::load_matrix(registers, kCount, address, false, where);
}
template <int kCount> NXS_DEVICE void load_matrix_transposed(u32 (&registers)[kCount], u32 address, NXS_WHERE) {
  emulator::load_matrix(registers, kCount, address, true, where);
}
template <int kCount> NXS_DEVICE void store_matrix(const u32 (&registers)[kCount], u32 address, NXS_WHERE) {
  emulator::store_matrix(registers, kCount, address, false, where);
}
template <int kCount> NXS_DEVICE void store_matrix_transposed(const u32 (&registers)[kCount], u32 address, NXS_WHERE) {
  emulator::store_matrix(registers, kCount, address, true, where);
}

#define NXS_MMA(name, type)                                                          \
  NXS_DEVICE void name(float (&c)[4], const u32(&a)[4], u32 b0, u32 b1, NXS_WHERE) { \
    const u32 b[2] = {b0, b1};                                                       \
    emulator::check_registers(c, where);                                             \
    emulator::mma(emulator::MmaType::type, c, a, b, where);                          \
  }
NXS_MMA(mma_bf16, kBf16)
NXS_MMA(mma_f16, kF16)
NXS_MMA(mma_tf32, kTf32)
#undef NXS_MMA

}  // namespace nxs
