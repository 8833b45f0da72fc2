// Keys as rows that lanes share: for what is bound by reading them once. Norms, sums and products with one vector.
#pragma once
#include "common/dtype.cuh"
#include "common/ptx/memory.cuh"
#include "common/ptx/warp.cuh"
#include "compression/key_places.cuh"

namespace nxs::compression {

// kLanes lanes have a row, 8 elements each; of dim 96 four of them are idle.
template <int kDim> struct KeyRows {
  static constexpr u32 kLanes = kDim == 64 ? 8 : 16, kRows = kWarpSize / kLanes;
  static constexpr bool kAllBusy = kLanes * 8 == kDim;

  u32 lane, row;  // of this thread: which eight elements, which row of its warp's
  NXS_DEVICE KeyRows() : lane(thread_index() % kLanes), row(thread_index() % kWarpSize / kLanes) {}

  NXS_DEVICE bool busy() const { return kAllBusy || lane * 8 < kDim; }
  // Without a branch, behind which ptxas would put the loads that follow.
  template <typename T> NXS_DEVICE Vec<T, 8> load(const T* of_row) const {
    auto words = load_global_nc(reinterpret_cast<const Vec<u32, 4>*>(of_row + (busy() ? lane * 8 : 0)));
#pragma unroll
    for (u32 i = 0; i < 4; ++i) words.data[i] = busy() ? words.data[i] : 0;
    Vec<T, 8> elements;
    memcpy(&elements, &words, sizeof(elements));
    return elements;
  }
  // The sum over the lanes of a row, in all of them.
  NXS_DEVICE static float total(float value) {
#pragma unroll
    for (u32 bits = 1; bits < kLanes; bits *= 2) value += shuffle_xor(value, bits);
    return value;
  }
};

}  // namespace nxs::compression
