// How tiles in shared memory are permuted so that rows and columns are both read without bank conflicts.
#pragma once
#include "common/ptx/simt.cuh"

namespace nxs {

// Rows of 128, 64 or 32 bytes whose 16-byte chunks change places by row; the values are those of a wgmma descriptor.
enum class Swizzle : u8 { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };

__host__ NXS_DEVICE constexpr u32 swizzle_bytes(Swizzle swizzle) {
  return swizzle == Swizzle::kNone ? 16 : 256u >> u32(swizzle);
}

// Where the byte that a plain layout has at `address` is stored. The pattern repeats every 8 rows, counted from address
// 0.
__host__ NXS_DEVICE constexpr u32 swizzled(u32 address, Swizzle swizzle) {
  const u32 mask = swizzle == Swizzle::kNone ? 0 : swizzle == Swizzle::k128 ? 7 : swizzle == Swizzle::k64 ? 3 : 1;
  return address ^ (((address >> 7) & mask) << 4);
}

}  // namespace nxs
