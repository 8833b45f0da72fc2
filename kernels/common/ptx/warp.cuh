// What the lanes of a warp do together. Every lane of `mask` must come to the same call.
#pragma once
#include "common/ptx/sm90.cuh"

namespace nxs {

// %laneid
NXS_DEVICE u32 lane_index() {
  u32 lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}
// %lanemask_lt: a bit for each lower lane
NXS_DEVICE u32 lanes_below() {
  u32 lanes;
  asm("mov.u32 %0, %%lanemask_lt;" : "=r"(lanes));
  return lanes;
}

// shfl.sync.idx, .bfly, .up, .down of 4 bytes. Out of the warp: one's own value.
template <typename T> NXS_DEVICE T shuffle(T value, u32 lane, u32 mask = kFullWarp) {
  static_assert(sizeof(T) == 4);
  return __shfl_sync(mask, value, static_cast<int>(lane));
}
template <typename T> NXS_DEVICE T shuffle_xor(T value, u32 bits, u32 mask = kFullWarp) {
  static_assert(sizeof(T) == 4);
  return __shfl_xor_sync(mask, value, static_cast<int>(bits));
}
template <typename T> NXS_DEVICE T shuffle_up(T value, u32 distance, u32 mask = kFullWarp) {
  static_assert(sizeof(T) == 4);
  return __shfl_up_sync(mask, value, distance);
}
template <typename T> NXS_DEVICE T shuffle_down(T value, u32 distance, u32 mask = kFullWarp) {
  static_assert(sizeof(T) == 4);
  return __shfl_down_sync(mask, value, distance);
}

// shfl.sync.idx among each `lanes` neighbours, a power of two: the value of lane `lane` of them.
template <typename T> NXS_DEVICE T shuffle_among(T value, u32 lane, u32 lanes, u32 mask = kFullWarp) {
  static_assert(sizeof(T) == 4);
  return __shfl_sync(mask, value, static_cast<int>(lane), static_cast<int>(lanes));
}

// vote.sync.ballot, .any, .all
NXS_DEVICE u32 warp_ballot(bool vote, u32 mask = kFullWarp) { return __ballot_sync(mask, vote); }
NXS_DEVICE bool warp_any(bool vote, u32 mask = kFullWarp) { return __any_sync(mask, vote); }
NXS_DEVICE bool warp_all(bool vote, u32 mask = kFullWarp) { return __all_sync(mask, vote); }
// match.any.sync: the lanes with this lane's value
NXS_DEVICE u32 warp_match_any(u32 value, u32 mask = kFullWarp) { return __match_any_sync(mask, value); }

// redux.sync
NXS_DEVICE u32 warp_reduce_add(u32 value, u32 mask = kFullWarp) { return __reduce_add_sync(mask, value); }
NXS_DEVICE u32 warp_reduce_min(u32 value, u32 mask = kFullWarp) { return __reduce_min_sync(mask, value); }
NXS_DEVICE u32 warp_reduce_max(u32 value, u32 mask = kFullWarp) { return __reduce_max_sync(mask, value); }
NXS_DEVICE u32 warp_reduce_and(u32 value, u32 mask = kFullWarp) { return __reduce_and_sync(mask, value); }
NXS_DEVICE u32 warp_reduce_or(u32 value, u32 mask = kFullWarp) { return __reduce_or_sync(mask, value); }

// elect.sync: true for one lane of a whole, converged warp; sm_90
NXS_DEVICE bool elect_one() {
  u32 elected = 0;
  NXS_SM90("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(elected)::"memory");
  return elected;
}

}  // namespace nxs
