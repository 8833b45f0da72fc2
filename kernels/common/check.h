// What the launchers check: early returns, sizes and alignments. Host code only.
#pragma once
#include <cstdint>

#include "nextscale.h"

// NXS_TRY(expression): return its status unless it is NXS_OK.
#define NXS_TRY(expression)                        \
  do {                                             \
    const nxs_status nxs_status_ = (expression);   \
    if (nxs_status_ != NXS_OK) return nxs_status_; \
  } while (0)

// NXS_REQUIRE(condition, NXS_E_SHAPE): refuse an argument.
#define NXS_REQUIRE(condition, error) \
  do {                                \
    if (!(condition)) return (error); \
  } while (0)

namespace nxs {

// Bytes of one element; 0 for a value that is no dtype.
constexpr int64_t dtype_bytes(nxs_dtype dtype) {
  switch (dtype) {
    case NXS_F8_E4M3:
    case NXS_I8:
    case NXS_U8: return 1;
    case NXS_F16:
    case NXS_BF16:
    case NXS_U16: return 2;
    case NXS_F32:
    case NXS_I32:
    case NXS_U32: return 4;
    case NXS_I64: return 8;
    default: return 0;
  }
}

inline bool is_aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace nxs
