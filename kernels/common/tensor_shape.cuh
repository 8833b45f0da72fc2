// What a tensor map is made from: a strided view of global memory, and the box of it that one copy moves.
#pragma once
#include "common/swizzle.cuh"
#include "nextscale.h"

namespace nxs {

// Dimension 0 is the innermost one, contiguous.
struct TensorShape {
  nxs_dtype dtype = NXS_BF16;
  u32 rank = 2;                      // 1 to 5
  const void* address = nullptr;     // 16-byte aligned
  u64 size[5] = {1, 1, 1, 1, 1};     // elements, 1 to 2^32
  u64 stride_bytes[4] = {};          // of dimensions 1 and up; multiples of 16, below 2^40
  u32 box[5] = {1, 1, 1, 1, 1};      // elements, 1 to 256; a row of the box is a multiple of 16 bytes
  Swizzle swizzle = Swizzle::kNone;  // otherwise a row of the box is at most 128, 64 or 32 bytes
  bool fill_nan = false;             // what is out of bounds loads as NaN instead of 0; float types only
};

}  // namespace nxs
