#pragma once
#include <bit>

#include "common/ptx/simt.cuh"

namespace nxs {

namespace detail {
struct LaneSlot {
  u32 value, argument, result;
};
// Every lane gives a word and an argument; `result(slots, mask, lane)` is what each gets.
template <typename F>
NXS_DEVICE u32 meet(emulator::Collective kind, u32 mask, u32 value, u32 argument, emulator::Where where, F) {
  LaneSlot slot = {value, argument, 0};
  emulator::warp_collective(
      kind, mask, &slot,
      [](emulator::Slots& slots, u32 mask) {
        const auto at = [&](u32 lane) -> LaneSlot& { return *static_cast<LaneSlot*>(slots[lane]); };
        for (u32 lane = 0; lane < 32; ++lane)
          if (mask >> lane & 1) at(lane).result = F()(at, mask, lane);
      },
      where);
  return slot.result;
}
// The value of lane source(lane, argument), or one's own where that is outside of the warp.
template <typename T, typename Source>
NXS_DEVICE T shuffle(T value, u32 argument, u32 mask, emulator::Where where, Source) {
  static_assert(sizeof(T) == 4);
  emulator::check_registers(value, where);
  const u32 result = meet(emulator::Collective::kShuffle, mask, std::bit_cast<u32>(value), argument, where,
                          [](auto at, u32 mask, u32 lane) {
                            const u32 source = Source()(lane, at(lane).argument);
                            if (source > 31) return at(lane).value;
                            return mask >> source & 1 ? at(source).value : 0xfefefefeu;  // undefined
                          });
  return std::bit_cast<T>(result);
}
template <typename F> NXS_DEVICE u32 reduce(u32 value, u32 mask, emulator::Where where, F) {
  return meet(emulator::Collective::kReduce, mask, value, 0, where, [](auto at, u32 mask, u32) {
    u32 sum = at(std::countr_zero(mask)).value;
    for (u32 i = std::countr_zero(mask) + 1; i < 32; ++i)
      if (mask >> i & 1) sum = F()(sum, at(i).value);
    return sum;
  });
}
}  // namespace detail

NXS_DEVICE u32 lane_index() { return emulator::lane(); }
NXS_DEVICE u32 lanes_below() { return (1u << emulator::lane()) - 1; }

template <typename T> NXS_DEVICE T shuffle(T value, u32 lane, u32 mask = kFullWarp, NXS_WHERE) {
  return detail::shuffle(value, lane, mask, where, [](u32, u32 source) { return source & 31; });
}
template <typename T> NXS_DEVICE T shuffle_xor(T value, u32 bits, u32 mask = kFullWarp, NXS_WHERE) {
  return detail::shuffle(value, bits, mask, where, [](u32 lane, u32 bits) { return lane ^ bits; });
}
template <typename T> NXS_DEVICE T shuffle_up(T value, u32 distance, u32 mask = kFullWarp, NXS_WHERE) {
  return detail::shuffle(value, distance, mask, where, [](u32 lane, u32 distance) { return lane - distance; });
}
template <typename T> NXS_DEVICE T shuffle_down(T value, u32 distance, u32 mask = kFullWarp, NXS_WHERE) {
  return detail::shuffle(value, distance, mask, where, [](u32 lane, u32 distance) { return lane + distance; });
}

template <typename T> NXS_DEVICE T shuffle_among(T value, u32 lane, u32 lanes, u32 mask = kFullWarp, NXS_WHERE) {
  const u32 source = (emulator::lane() & ~(lanes - 1)) | (lane & (lanes - 1));
  return detail::shuffle(value, source, mask, where, [](u32, u32 source) { return source & 31; });
}

NXS_DEVICE u32 warp_ballot(bool vote, u32 mask = kFullWarp, NXS_WHERE) {
  return detail::meet(emulator::Collective::kVote, mask, vote, 0, where, [](auto at, u32 mask, u32) {
    u32 votes = 0;
    for (u32 i = 0; i < 32; ++i)
      if (mask >> i & 1) votes |= at(i).value << i;
    return votes;
  });
}
NXS_DEVICE bool warp_any(bool vote, u32 mask = kFullWarp, NXS_WHERE) { return warp_ballot(vote, mask, where) != 0; }
NXS_DEVICE bool warp_all(bool vote, u32 mask = kFullWarp, NXS_WHERE) { return warp_ballot(vote, mask, where) == mask; }
NXS_DEVICE u32 warp_match_any(u32 value, u32 mask = kFullWarp, NXS_WHERE) {
  return detail::meet(emulator::Collective::kMatch, mask, value, 0, where, [](auto at, u32 mask, u32 lane) {
    u32 equal = 0;
    for (u32 i = 0; i < 32; ++i)
      if (mask >> i & 1 && at(i).value == at(lane).value) equal |= 1u << i;
    return equal;
  });
}

NXS_DEVICE u32 warp_reduce_add(u32 value, u32 mask = kFullWarp, NXS_WHERE) {
  return detail::reduce(value, mask, where, [](u32 a, u32 b) { return a + b; });
}
NXS_DEVICE u32 warp_reduce_min(u32 value, u32 mask = kFullWarp, NXS_WHERE) {
  return detail::reduce(value, mask, where, [](u32 a, u32 b) { return a < b ? a : b; });
}
NXS_DEVICE u32 warp_reduce_max(u32 value, u32 mask = kFullWarp, NXS_WHERE) {
  return detail::reduce(value, mask, where, [](u32 a, u32 b) { return a > b ? a : b; });
}
NXS_DEVICE u32 warp_reduce_and(u32 value, u32 mask = kFullWarp, NXS_WHERE) {
  return detail::reduce(value, mask, where, [](u32 a, u32 b) { return a & b; });
}
NXS_DEVICE u32 warp_reduce_or(u32 value, u32 mask = kFullWarp, NXS_WHERE) {
  return detail::reduce(value, mask, where, [](u32 a, u32 b) { return a | b; });
}

NXS_DEVICE bool elect_one(NXS_WHERE) {
  return detail::meet(emulator::Collective::kElect, kFullWarp, 0, 0, where,
                      [](auto, u32, u32 lane) -> u32 { return lane == 0; });
}

}  // namespace nxs
