#pragma once
#include "common/ptx/simt.cuh"
#include "common/swizzle.cuh"

namespace nxs {

NXS_DEVICE void wgmma_fence(NXS_WHERE) { emulator::wgmma_fence(where); }
NXS_DEVICE void wgmma_commit(NXS_WHERE) { emulator::wgmma_commit(where); }
template <int kPending> NXS_DEVICE void wgmma_wait(NXS_WHERE) { emulator::wgmma_wait(kPending, where); }
template <int kCount> NXS_DEVICE void keep_registers(float (&)[kCount]) {}

NXS_DEVICE u64 matrix_descriptor(u32 address, u32 leading_bytes, u32 stride_bytes, Swizzle swizzle) {
  return static_cast<u64>((address & 0x3ffff) >> 4) | static_cast<u64>(leading_bytes >> 4) << 16 |
         static_cast<u64>(stride_bytes >> 4) << 32 | static_cast<u64>(swizzle) << 62;
}
NXS_DEVICE u64 advanced(u64 descriptor, u32 bytes) {
  return (descriptor & 0xffffffff00000000) | (static_cast<u32>(descriptor) + (bytes >> 4));
}

enum class Major : int { kK = 0, kMN = 1 };

#define NXS_WGMMA(name, type)                                                                                      \
  template <int kN, Major kMajorA = Major::kK, Major kMajorB = Major::kK>                                          \
  NXS_DEVICE void name(float (&d)[kN / 2], u64 a, u64 b, bool accumulate, NXS_WHERE) {                             \
    static_assert(kN >= 8 && kN <= 256 && kN % 8 == 0);                                                            \
    emulator::wgmma(                                                                                               \
        {emulator::MmaType::type, kN, d, nullptr, a, b, kMajorA == Major::kMN, kMajorB == Major::kMN, accumulate}, \
        where);                                                                                                    \
  }                                                                                                                \
  template <int kN, Major kMajorB = Major::kK>                                                                     \
  NXS_DEVICE void name(float (&d)[kN / 2], const u32(&a)[4], u64 b, bool accumulate, NXS_WHERE) {                  \
    static_assert(kN >= 8 && kN <= 256 && kN % 8 == 0);                                                            \
    emulator::wgmma({emulator::MmaType::type, kN, d, a, 0, b, false, kMajorB == Major::kMN, accumulate}, where);   \
  }
NXS_WGMMA(wgmma_bf16, kBf16)
NXS_WGMMA(wgmma_f16, kF16)
#undef NXS_WGMMA

template <int kRegisters, int kBlocks = 1> NXS_DEVICE void raise_registers(NXS_WHERE) {
  emulator::change_registers(kRegisters, kBlocks, true, where);
}
template <int kRegisters, int kBlocks = 1> NXS_DEVICE void lower_registers(NXS_WHERE) {
  emulator::change_registers(kRegisters, kBlocks, false, where);
}

}  // namespace nxs
