// The elements of a row that come just before and just after one of them, in the order of (value, column): a selection by a
// block of kWarps warps that has swept the row chunk by chunk, warp w the chunks w, w + 8, ...
//
// In the sweep each lane keeps its own nearest one on either side, two subtractions and two minima an element. Then each warp
// takes out its nearest, one after the other: the least of the lanes', in whose place comes the next one of that lane, for
// which all lanes look among its elements. Of the 8 lists one warp takes the nearest of all.
// O is an unsigned integer that holds value and column: u32 for bf16 in rows of up to 65536 columns, else u64. NaNs are -inf.
#pragma once
#include "verification/guided.cuh"

namespace nxs::verification {

constexpr u32 kMostBeside = 15;

// kDown: the greatest values first; the lower column comes first all the same.
template <typename O, bool kDown = false> NXS_DEVICE O order_of(float logit, u32 column) {
  const u32 key = kDown ? ~key_of(logit) : key_of(logit);
  if constexpr (sizeof(O) == 4)
    return (key & 0xffff0000u) | column;
  else
    return static_cast<u64>(key) << 32 | column;
}
template <typename O> NXS_DEVICE u32 column_of_order(O order) {
  return sizeof(O) == 4 ? static_cast<u32>(order) & 0xffffu : static_cast<u32>(order);
}

NXS_DEVICE u32 warp_least(u32 value) { return warp_reduce_min(value); }
NXS_DEVICE u64 warp_least(u64 value) {
  const u32 high = warp_reduce_min(static_cast<u32>(value >> 32));
  const u32 low = warp_reduce_min(static_cast<u32>(value >> 32) == high ? static_cast<u32>(value) : 0xffffffffu);
  return static_cast<u64>(high) << 32 | low;
}

// Distances in the order, less 1, of what lies on one side of `here`; on the other side they wrap round and are greater.
template <typename O> struct Side {
  O here;
  bool after;
  NXS_DEVICE O distance(O at) const { return after ? at - here - 1 : here - 1 - at; }
  NXS_DEVICE bool is_there(O distance) const { return distance < (after ? ~O{0} - here : here); }
  NXS_DEVICE u32 column(O distance) const {
    return column_of_order<O>(after ? here + 1 + distance : here - 1 - distance);
  }
};

template <typename E, typename O, bool kDown = false> NXS_DEVICE O order_at(const Row<E>& row, u32 column) {
  const float x = logit_at(row, column);
  return order_of<O, kDown>(x != x ? -INFINITY : x, column);
}

// A lane's nearest on either side, of a chunk without NaNs.
template <typename E, typename O>
NXS_DEVICE void nearest_of_chunk(const Row<E>& row, const Logits<E>& logits, u32 chunk, O here, O& before, O& after) {
  const auto take = [&](O at) {
    const O down = here - 1 - at, up = at - here - 1;
    before = down < before ? down : before;
    after = up < after ? up : after;
  };
  if (chunk * kChunk + kChunk <= row.columns) {
#pragma unroll
    for (u32 place = 0; place < 32; ++place)
      take(order_of<O>(logits.at(place), column_of(chunk, lane_index(), place)));
  } else {
#pragma unroll 1
    for (u32 place = 0; place < 32; ++place) {
      const u32 column = column_of(chunk, lane_index(), place);
      if (column < row.columns) take(order_at<E, O>(row, column));
    }
  }
}

// By each warp: its `count` nearest on a side, into `list` + 64 n + 8 warp of shared memory. `head`: this lane's nearest.
template <bool kDown = false, typename E, typename O>
NXS_DEVICE void list_nearest(const Row<E>& row, const Side<O>& side, O head, u32 count, u32 list) {
  const u32 warp = thread_index() / 32, lane = lane_index();
#pragma unroll 1
  for (u32 n = 0; n < count; ++n) {
    const O best = warp_least(head);
    if (lane == 0) store_shared(list + n * 64 + warp * 8, static_cast<u64>(best));
    if (!side.is_there(best)) {
      // Nor is what would follow.
      for (u32 rest = n + 1 + lane; rest < count; rest += 32)
        store_shared(list + rest * 64 + warp * 8, static_cast<u64>(static_cast<O>(~O{0})));
      break;
    }
    const u32 owner = 31 - leading_zeros(warp_ballot(head == best));
    O next = ~O{0};
#pragma unroll 1
    for (u32 chunk = warp; chunk * kChunk < row.columns; chunk += kWarps) {
      const u32 column = column_of(chunk, owner, lane);
      if (column < row.columns) {
        const O distance = side.distance(order_at<E, O, kDown>(row, column));
        if (distance > best && distance < next) next = distance;
      }
    }
    warp_sync();
    next = warp_least(next);
    if (lane == owner) head = next;
  }
}

// By one warp, after a barrier: the column of the n-th nearest in lane first + n, n below `count`, or kNothing where there are
// fewer; other lanes keep `column`.
template <u32 kMost = kMostBeside, typename O>
NXS_DEVICE u32 take_nearest(const Side<O>& side, u32 count, u32 list, u32 first, u32 column) {
  constexpr u32 kMine = (kMost * kWarps + 31) / 32;
  const u32 lane = lane_index();
  O mine[kMine];
#pragma unroll
  for (u32 k = 0; k < kMine; ++k) {
    const u32 at = k * 32 + lane;
    mine[k] = at < count * kWarps ? static_cast<O>(load_shared<u64>(list + at * 8)) : ~O{0};
  }
#pragma unroll 1
  for (u32 n = 0; n < count; ++n) {
    O least = mine[0];
#pragma unroll
    for (u32 k = 1; k < kMine; ++k) least = mine[k] < least ? mine[k] : least;
    least = warp_least(least);
    if (lane == first + n) column = side.is_there(least) ? side.column(least) : kNothing;
#pragma unroll
    for (u32 k = 0; k < kMine; ++k)
      if (mine[k] == least) mine[k] = ~O{0};
  }
  return column;
}

}  // namespace nxs::verification
