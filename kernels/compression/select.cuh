// Select: of each list the tokens of the greatest scores, in ascending order.
//
//   raw   = lambda * importance - (1 - lambda) * redundancy; summed over sets, averaged over heads and blocks as asked
//   score = (raw - least) * weight - demotion
//
// Layouts    importance, redundancy [sets, heads, tokens] f32, strides of sets and heads; indices [lists, capacity] i32.
// Who does what
//            aggregate   a thread (with blocks of tokens a warp) an item: its raw score into the workspace. Only where scores are
//                        averaged. Sums run over sets, then heads, ascending; the tokens of a block over lanes, then pairwise.
//            split       Ada-KV: a block a set finds the threshold over all of its heads, and from what each has above it the
//                        heads' budgets, in integers: their sum is exact.
//            select      a block a list. Scores become integers of their order; NaN is 0. If they fit they lie in shared
//                        memory, else they are read again in each pass. A radix select over the range that the keys have, 11
//                        bits a round, gives the threshold; then each warp has a stretch of the list, counts, and writes what it
//                        keeps behind what the warps before it keep. No order of atomics is seen.
// Bytes      4 a score and operand (select: times 1 if cached, else up to 7), 4 a place of the output.
// Determinism bitwise; a list knows of no other list.
//            A list whose first rows a compression left has as many tokens of them as counts says, read before it is written: indices
//            are rows, which skip the others.
// Limits     tokens < 2^30, capacity < 2^30; heads <= 1024 for Ada-KV.
#pragma once
#include "common/chunk.cuh"
#include "common/ptx/atomic.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/math.cuh"
#include "common/ptx/shared.cuh"
#include "common/ptx/warp.cuh"

namespace nxs::compression {

constexpr u32 kSelectThreads = 512;                      // most threads of a block
constexpr u32 kTile = 128;                               // items that a warp takes at once, 4 a lane
constexpr u32 kBins = 2048, kDigit = 11, kGroupBins = kBins / 32;
constexpr u32 kSelectSlots = 8;                          // of 16 words, for reductions over warps
constexpr u32 kSelectHeads = 1024;
constexpr u32 kSelectFixed = kBins * 4 + 32 * 4 + kSelectSlots * 64;
// Three words a head.
__host__ NXS_DEVICE constexpr u32 split_bytes(u32 heads) { return (heads * 12 + 15) / 16 * 16; }

// Shared memory by byte.
struct SelectShared {
  u32 bins, groups, slots, heads, keys;
};
NXS_DEVICE SelectShared select_shared(u32 heads) {
  SelectShared at;
  at.bins = dynamic_shared();
  at.groups = at.bins + kBins * 4;
  at.slots = at.groups + 32 * 4;
  at.heads = at.slots + kSelectSlots * 64;
  at.keys = at.heads + split_bytes(heads);
  return at;
}

NXS_DEVICE i32 least_of(i32 a, i32 b) { return a < b ? a : b; }
NXS_DEVICE i32 clamp(i32 x, i32 least, i32 most) { return x < least ? least : x > most ? most : x; }

// Unsigned integers in the order of the floats; NaN is 0, and -0 is 0's.
NXS_DEVICE u32 score_key(float x) {
  const u32 bits = float_bits(x + 0.0f);
  return x != x ? 0 : bits >> 31 ? ~bits : bits | 0x80000000u;
}
NXS_DEVICE bool is_finite(float x) { return (float_bits(x) & 0x7f800000u) != 0x7f800000u; }

// What of a list is kept, in items.
struct Quota {
  i32 length;                 // tokens
  i32 first, skipped;         // tokens of the first rows, which a compression left; rows after them that hold none
  i32 items, sink, end, kept;  // candidates [sink, end), of which `kept` are to be chosen
  bool clamped;
};
// Tokens of a list, and the first ones, which a compression left.
struct ListLength {
  i32 first, skipped, length;
  bool clamped;
};
NXS_DEVICE ListLength length_of_list(const nxs_select_params& p, u32 list) {
  const i32 tokens = static_cast<i32>(p.tokens);
  if (p.first_rows > 0) {
    // Not by the read-only path: what is kept is written here.
    const i32 given = load_global(p.counts + list), first = clamp(given, 0, p.first_rows);
    return {first, p.first_rows - first, tokens - p.first_rows + first, first != given};
  }
  const i32 given = p.lengths_or_null ? load_global_nc(p.lengths_or_null + list) : p.length;
  const i32 length = clamp(given, 0, tokens);
  return {0, 0, length, length != given};
}

NXS_DEVICE Quota quota_of(const nxs_select_params& p, u32 list, const i32* budgets) {
  Quota q;
  const i32 block = p.block > 1 ? p.block : 1, most = static_cast<i32>(p.capacity) - p.active;
  const ListLength its = length_of_list(p, list);
  const i32 asked = p.budgets_or_null ? load_global_nc(p.budgets_or_null + list) : p.budget;
  q.length = its.length;
  q.first = its.first;
  q.skipped = its.skipped;
  i32 budget = clamp(asked, 0, most);
  q.clamped = its.clamped || (p.budgets_or_null && budget != asked);
  if (budgets) {
    const i32 split = load_global(budgets + list);
    budget = clamp(split, 0, most);
    q.clamped = q.clamped || budget != split;
  }
  q.items = (q.length + block - 1) / block;
  budget = budget >= q.length ? q.items : budget / block;
  const i32 recent_items =
      p.recent >= q.length ? q.items : q.items - (q.length - p.recent) / block;
  q.sink = least_of(p.sink / block + (p.sink % block != 0), least_of(budget, q.items));
  const i32 recent = least_of(p.recent > 0 ? recent_items : 0, least_of(budget - q.sink, q.items - q.sink));
  q.end = q.items - recent;
  q.kept = least_of(budget - q.sink - recent, q.end - q.sink);
  return q;
}

// The row of a token.
NXS_DEVICE i32 row_of(const Quota& q, i32 token) { return token < q.first ? token : token + q.skipped; }

// The scores of a list, or of a head.
struct ScoreRow {
  const float *importance, *redundancy, *weights;  // or null
  float lambda, rest, least, demotion;
  u32 demoted, first, end;  // candidates [first, end)
  bool wide, relative;
};

NXS_DEVICE bool is_wide(const float* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

NXS_DEVICE ScoreRow score_row(const nxs_select_params& p, const float* importance, const float* redundancy,
                              const Quota& q) {
  ScoreRow row;
  row.importance = importance;
  row.redundancy = redundancy;
  row.weights = p.weights_or_null;
  row.lambda = p.lambda;
  row.rest = 1.0f - p.lambda;
  row.least = 0;
  row.demotion = p.demotion;
  row.demoted = static_cast<u32>(p.demoted);
  row.first = static_cast<u32>(q.sink);
  row.end = static_cast<u32>(q.end);
  row.wide = is_wide(importance) && is_wide(redundancy) && is_wide(row.weights);
  row.relative = p.relative != 0;
  return row;
}

NXS_DEVICE float combine(float lambda, float rest, bool both, bool importance, float a, float b) {
  if (both) return fma(lambda, a, -multiply(rest, b));
  return importance ? a : -b;
}

// Four items from `item` on; what is beyond the end is 0.
NXS_DEVICE Vec<float, 4> load_four(const float* from, u32 item, u32 end, bool wide) {
  if (wide && item + 4 <= end) return load_global_nc(reinterpret_cast<const Vec<float, 4>*>(from + item));
  Vec<float, 4> four;
#pragma unroll
  for (u32 j = 0; j < 4; ++j) {
    four.data[j] = 0;
    if (item + j < end) four.data[j] = load_global_nc(from + item + j);
  }
  return four;
}
NXS_DEVICE Vec<float, 4> raw_four(const ScoreRow& row, u32 item) {
  Vec<float, 4> a = {}, b = {};
  if (row.importance) a = load_four(row.importance, item, row.end, row.wide);
  if (row.redundancy) b = load_four(row.redundancy, item, row.end, row.wide);
  const bool both = row.importance && row.redundancy;
#pragma unroll
  for (u32 j = 0; j < 4; ++j)
    a.data[j] = combine(row.lambda, row.rest, both, row.importance != nullptr, a.data[j], b.data[j]);
  return a;
}
NXS_DEVICE bool is_candidate(const ScoreRow& row, u32 item) { return item >= row.first && item < row.end; }

struct Keys {
  u32 key[4];
};
NXS_DEVICE Keys keys_of(const ScoreRow& row, const Vec<float, 4>& raw, u32 item) {
  Vec<float, 4> weight = {{1, 1, 1, 1}};
  if (row.weights) weight = load_four(row.weights, item, row.end, row.wide);
  Keys keys;
#pragma unroll
  for (u32 j = 0; j < 4; ++j) {
    float score = raw.data[j];
    if (row.relative) score = score - row.least;
    if (row.weights) score = multiply(score, weight.data[j]);
    if (item + j < row.demoted) score = score - row.demotion;
    keys.key[j] = score_key(score);
  }
  return keys;
}

// Calls f(item of lane) for every tile up to `end`, in the same split over warps each time.
template <typename F> NXS_DEVICE void for_tiles(u32 end, F f) {
#pragma unroll 1
  for (u32 tile = thread_index() / 32 * kTile; tile < end; tile += block_size() / 32 * kTile) f(tile + lane_index() * 4);
}

// The keys of four items: of shared memory, or from the scores again.
template <bool kCached> NXS_DEVICE Keys keys_at(const ScoreRow& row, u32 keys, u32 item) {
  if constexpr (kCached)
    return load_shared<Keys>(keys + item * 4);
  else
    return keys_of(row, raw_four(row, item), item);
}

// Reductions over the block: every thread gets the result. `slot` is not used for another one before the next barrier.
template <typename Reduce> NXS_DEVICE u32 over_block(u32 value, u32 none, u32 slot, Reduce reduce) {
  value = reduce(value);
  if (lane_index() == 0) store_shared(slot + thread_index() / 32 * 4, value);
  block_sync();
  u32 of_warp = none;
  if (lane_index() < block_size() / 32) of_warp = load_shared<u32>(slot + lane_index() * 4);
  return reduce(of_warp);
}
NXS_DEVICE u32 block_min(u32 value, u32 slot) {
  return over_block(value, ~0u, slot, [](u32 x) { return warp_reduce_min(x); });
}
NXS_DEVICE u32 block_max(u32 value, u32 slot) {
  return over_block(value, 0, slot, [](u32 x) { return warp_reduce_max(x); });
}
NXS_DEVICE u32 block_sum(u32 value, u32 slot) {
  return over_block(value, 0, slot, [](u32 x) { return warp_reduce_add(x); });
}

// The least finite raw score of a row; 0 if there is none.
template <bool kCached> NXS_DEVICE float least_score(const ScoreRow& row, u32 keys, u32 slot) {
  u32 least = ~0u;
  for_tiles(row.end, [&](u32 item) {
    const Vec<float, 4> raw = raw_four(row, item);
    if constexpr (kCached) store_shared(keys + item * 4, raw);
#pragma unroll
    for (u32 j = 0; j < 4; ++j)
      if (is_candidate(row, item + j) && is_finite(raw.data[j])) {
        const u32 key = score_key(raw.data[j]);
        least = key < least ? key : least;
      }
  });
  least = block_min(least, slot);
  if (least == ~0u) return 0;
  return bits_float(least >> 31 ? least & 0x7fffffffu : ~least);
}

// What is known of the keys after the first pass.
struct KeyRange {
  u32 least, most, nans;
};
// Makes the keys of a row; `has_raw`: least_score has left the raw scores where they go.
template <bool kCached> NXS_DEVICE void make_keys(const ScoreRow& row, u32 keys, bool has_raw, KeyRange& range) {
  for_tiles(row.end, [&](u32 item) {
    Vec<float, 4> raw;
    if (kCached && has_raw)
      raw = load_shared<Vec<float, 4>>(keys + item * 4);
    else
      raw = raw_four(row, item);
    const Keys made = keys_of(row, raw, item);
    if constexpr (kCached) store_shared(keys + item * 4, made);
#pragma unroll
    for (u32 j = 0; j < 4; ++j)
      if (is_candidate(row, item + j)) {
        const u32 key = made.key[j];
        range.nans += key == 0;
        if (key != 0) {
          range.least = key < range.least ? key : range.least;
          range.most = key > range.most ? key : range.most;
        }
      }
  });
}

// Keys above `key` are kept, and of those that equal it, `total` in number, `need`: the first or the last.
struct Threshold {
  u32 key, need, total;
  bool newest;
  NXS_DEVICE bool keeps_equal(u32 rank) const { return newest ? rank >= total - need : rank < need; }
  NXS_DEVICE u32 kept_of_first(u32 equal) const {
    if (!newest) return equal < need ? equal : need;
    return equal > total - need ? equal - (total - need) : 0;
  }
};

// Adds 1 to the bin of each lane that is `in`: once for all lanes that share the bin of one of them.
NXS_DEVICE void count_bin(u32 bins, bool in, u32 bin) {
  const u32 lanes = warp_ballot(in);
  if (lanes == 0) return;
  const u32 leader = 31 - leading_zeros(lanes);
  const u32 common = shuffle(bin, leader);
  const u32 same = warp_ballot(in && bin == common);
  if (lane_index() == leader)
    atomic_add_shared(bins + common * 4, population_count(same));
  else if (in && bin != common)
    atomic_add_shared(bins + bin * 4, 1);
}

// Sums over this and the higher lanes.
NXS_DEVICE u32 sum_from_lane(u32 value) {
#pragma unroll
  for (u32 distance = 1; distance < 32; distance *= 2) {
    const u32 other = shuffle_down(value, distance);
    if (lane_index() + distance < 32) value += other;
  }
  return value;
}

// The bin that holds the `need`-th greatest key, what the bins above hold, and what it holds itself. For every thread.
struct Bin {
  u32 bin, above, inside;
};
NXS_DEVICE Bin find_bin(const SelectShared& at, u32 need) {
  const u32 lane = lane_index();
#pragma unroll 1
  for (u32 group = thread_index() / 32; group < 32; group += block_size() / 32) {
    const u32 first = at.bins + group * kGroupBins * 4;
    const u32 sum = warp_reduce_add(load_shared<u32>(first + lane * 4) + load_shared<u32>(first + (lane + 32) * 4));
    if (lane == 0) store_shared(at.groups + group * 4, sum);
  }
  block_sync();
  Bin found;
  const u32 of_group = load_shared<u32>(at.groups + lane * 4), from_group = sum_from_lane(of_group);
  const u32 group = 31 - leading_zeros(warp_ballot(from_group >= need));
  const u32 above_group = shuffle(from_group - of_group, group);
  const u32 first = at.bins + (group * kGroupBins + lane * 2) * 4;
  const u32 low = load_shared<u32>(first), high = load_shared<u32>(first + 4);
  const u32 from_pair = sum_from_lane(low + high) + above_group;
  const u32 pair = 31 - leading_zeros(warp_ballot(from_pair >= need));
  const u32 above = shuffle(from_pair - low - high, pair), in_high = shuffle(high, pair), in_low = shuffle(low, pair);
  const bool is_high = above + in_high >= need;
  found.bin = group * kGroupBins + pair * 2 + is_high;
  found.above = is_high ? above : above + in_high;
  found.inside = is_high ? in_high : in_low;
  return found;
}

// Of `candidates` keys, the threshold that keeps `kept`. `walk(f)` calls f(keys of four items, mask of candidates).
template <typename Walk>
NXS_DEVICE Threshold find_threshold(const SelectShared& at, KeyRange range, u32 candidates, u32 kept, bool newest,
                                    Walk walk) {
  constexpr u32 kNone = ~0u;
  range.least = block_min(range.least, at.slots);
  range.most = block_max(range.most, at.slots + 64);
  range.nans = block_sum(range.nans, at.slots + 128);
  const u32 numbers = candidates - range.nans;
  if (kept == 0) return Threshold{kNone, 0, kNone, newest};
  if (kept >= numbers) return Threshold{0, kept - numbers, range.nans, newest};
  u32 base = range.least, need = kept;
  u32 bits = 32 - leading_zeros(range.most - range.least);
  if (bits == 0) return Threshold{base, need, numbers, newest};
#pragma unroll 1
  for (;;) {
    const u32 shift = bits > kDigit ? bits - kDigit : 0, digits = 1u << (bits - shift);
    block_sync();
    for (u32 bin = thread_index(); bin < kBins; bin += block_size()) store_shared(at.bins + bin * 4, 0u);
    block_sync();
    walk([&](const Keys& keys, u32 mask) {
#pragma unroll
      for (u32 j = 0; j < 4; ++j) {
        const u32 key = keys.key[j], bin = (key - base) >> shift;
        count_bin(at.bins, (mask >> j & 1) && key >= base && bin < digits, bin);
      }
    });
    block_sync();
    const Bin found = find_bin(at, need);
    need -= found.above;
    base += found.bin << shift;
    if (shift == 0) return Threshold{base, need, found.inside, newest};
    // All of the bin: no key equals the threshold.
    if (need == found.inside) return Threshold{base - 1, 0, kNone, newest};
    bits = shift;
  }
}

NXS_DEVICE u32 candidates_of(const ScoreRow& row, u32 item) {
  u32 mask = 0;
#pragma unroll
  for (u32 j = 0; j < 4; ++j) mask |= static_cast<u32>(is_candidate(row, item + j)) << j;
  return mask;
}

// Raw scores of a list in the workspace, a multiple of 4 items apart.
NXS_DEVICE i64 items_of(const nxs_select_params& p) {
  const i64 block = p.block > 1 ? p.block : 1;
  return (p.tokens + block - 1) / block;
}

template <bool kCached>
__global__ void __launch_bounds__(kSelectThreads, 2) select_kernel(const __grid_constant__ nxs_select_params p,
                                                                   const float* scores, i32* ids, const i32* budgets) {
  const u32 list = block_index_x(), warp = thread_index() / 32, warps = block_size() / 32, lane = lane_index();
  const SelectShared at = select_shared(0);
  const Quota q = quota_of(p, list, budgets);
  const u32 block = p.block > 1 ? static_cast<u32>(p.block) : 1;
  const i64 all_items = items_of(p);
  ScoreRow row;
  if (scores) {
    row = score_row(p, scores + list * ((all_items + 3) / 4 * 4), nullptr, q);
  } else {
    const u32 heads = static_cast<u32>(p.heads), set = list / heads, head = list - set * heads;
    const i64 a = set * p.importance_stride_set + head * p.importance_stride_head;
    const i64 b = set * p.redundancy_stride_set + head * p.redundancy_stride_head;
    row = score_row(p, p.importance_or_null ? p.importance_or_null + a : nullptr,
                    p.redundancy_or_null ? p.redundancy_or_null + b : nullptr, q);
  }
  i32* indices = p.indices + list * p.capacity;
  i32* to = block > 1 ? ids + list * all_items : indices;

  const u32 candidates = row.end - row.first;
  u32 nans = 0;
  if (candidates > 0) {
    if (row.relative) row.least = least_score<kCached>(row, at.keys, at.slots + 192);
    KeyRange range = {~0u, 0, 0};
    make_keys<kCached>(row, at.keys, row.relative, range);
    const Threshold threshold = find_threshold(
        at, range, candidates, static_cast<u32>(q.kept), p.newest != 0, [&](auto count) {
          for_tiles(row.end, [&](u32 item) { count(keys_at<kCached>(row, at.keys, item), candidates_of(row, item)); });
        });
    nans = range.nans;

    // Each warp has the tiles of a stretch: how many keys of it are above the threshold, and how many equal it.
    const u32 tiles = (row.end + kTile - 1) / kTile, of_warp = (tiles + warps - 1) / warps;
    const u32 begin = warp * of_warp * kTile, stop = least_of(begin + of_warp * kTile, row.end);
    u32 above = 0, equal = 0;
    block_sync();  // all keys are made
#pragma unroll 1
    for (u32 tile = begin; tile < stop; tile += kTile) {
      const u32 item = tile + lane * 4, mask = candidates_of(row, item);
      const Keys keys = keys_at<kCached>(row, at.keys, item);
#pragma unroll
      for (u32 j = 0; j < 4; ++j) {
        above += (mask >> j & 1) && keys.key[j] > threshold.key;
        equal += (mask >> j & 1) && keys.key[j] == threshold.key;
      }
    }
    above = warp_reduce_add(above);
    equal = warp_reduce_add(equal);
    if (lane == 0) {
      store_shared(at.slots + 256 + warp * 4, above);
      store_shared(at.slots + 320 + warp * 4, equal);
    }
    block_sync();
    u32 before_above = 0, before_equal = 0;
    if (lane < warp) {
      before_above = load_shared<u32>(at.slots + 256 + lane * 4);
      before_equal = load_shared<u32>(at.slots + 320 + lane * 4);
    }
    above = warp_reduce_add(before_above);
    equal = warp_reduce_add(before_equal);
#pragma unroll 1
    for (u32 tile = begin; tile < stop; tile += kTile) {
      const u32 item = tile + lane * 4, mask = candidates_of(row, item);
      const Keys keys = keys_at<kCached>(row, at.keys, item);
      u32 lane_above = above, lane_equal = equal;
#pragma unroll
      for (u32 j = 0; j < 4; ++j) {
        const u32 is_above = warp_ballot((mask >> j & 1) && keys.key[j] > threshold.key);
        const u32 is_equal = warp_ballot((mask >> j & 1) && keys.key[j] == threshold.key);
        lane_above += population_count(is_above & lanes_below());
        lane_equal += population_count(is_equal & lanes_below());
        above += population_count(is_above);
        equal += population_count(is_equal);
      }
#pragma unroll
      for (u32 j = 0; j < 4; ++j) {
        const bool in = mask >> j & 1;
        const bool is_above = in && keys.key[j] > threshold.key, is_equal = in && keys.key[j] == threshold.key;
        const u32 place = row.first + lane_above + threshold.kept_of_first(lane_equal);
        if (is_above || (is_equal && threshold.keeps_equal(lane_equal)))
          store_global(to + place, block > 1 ? static_cast<i32>(item + j) : row_of(q, static_cast<i32>(item + j)));
        lane_above += is_above;
        lane_equal += is_equal;
      }
    }
  }

  // What is kept in any case.
  const u32 threads = block_size(), t = thread_index();
  const u32 recent = static_cast<u32>(q.items) - row.end, chosen = row.first + static_cast<u32>(q.kept);
  const auto of_item = [&](u32 item) { return block > 1 ? static_cast<i32>(item) : row_of(q, static_cast<i32>(item)); };
  for (u32 i = t; i < row.first; i += threads) store_global(to + i, of_item(i));
  for (u32 i = t; i < recent; i += threads) store_global(to + chosen + i, of_item(row.end + i));
  u32 tokens = chosen + recent;
  if (block > 1) {
    // The last block of a list may be short, and is then the last one that is kept.
    block_sync();
    const u32 items = tokens, length = static_cast<u32>(q.length);
    tokens = items * block;
    if (items > 0 && load_global(to + items - 1) == q.items - 1) tokens -= static_cast<u32>(q.items) * block - length;
    for (u32 i = t; i < tokens; i += threads)
      store_global(indices + i, row_of(q, static_cast<i32>(static_cast<u32>(load_global(to + i / block)) * block + i % block)));
  }
  const u32 active = static_cast<u32>(p.active), count = tokens + active;
  for (u32 i = t; i < active; i += threads) store_global(indices + tokens + i, row_of(q, q.length + static_cast<i32>(i)));
  for (u32 i = count + t; i < p.capacity; i += threads) store_global(indices + i, -1);
  // Some thread has seen every NaN of its own.
  const bool has_nan = block_max(nans, at.slots + 384) > 0;
  if (t == 0) {
    store_global(p.counts + list, static_cast<i32>(count));
    if (p.status_or_null)
      store_global(p.status_or_null + list, (has_nan ? NXS_SELECT_NAN : 0) | (q.clamped ? NXS_SELECT_CLAMPED : 0));
  }
}

// Ada-KV: one block a set. Heads get by what they have above the threshold of all heads, and a part evenly.
template <bool kCached>
__global__ void __launch_bounds__(kSelectThreads, 2) split_kernel(const __grid_constant__ nxs_select_params p,
                                                                  i32* budgets) {
  const u32 set = block_index_x(), heads = static_cast<u32>(p.heads), t = thread_index(), threads = block_size();
  const SelectShared at = select_shared(heads);
  const u32 above_at = at.heads, equal_at = above_at + heads * 4, base_at = equal_at + heads * 4;
  const u32 stride = (static_cast<u32>(p.tokens) + kTile - 1) / kTile * kTile * 4;
  const auto row_of = [&](u32 head) {
    const i64 a = set * p.importance_stride_set + head * p.importance_stride_head;
    const i64 b = set * p.redundancy_stride_set + head * p.redundancy_stride_head;
    return score_row(p, p.importance_or_null ? p.importance_or_null + a : nullptr,
                     p.redundancy_or_null ? p.redundancy_or_null + b : nullptr,
                     quota_of(p, set * heads + head, nullptr));
  };
  u32 mine = 0, its = 0;
  for (u32 head = t; head < heads; head += threads) {
    const Quota q = quota_of(p, set * heads + head, nullptr);
    mine += static_cast<u32>(q.kept);
    its += static_cast<u32>(q.end - q.sink);
    store_shared(above_at + head * 4, 0u);
    store_shared(equal_at + head * 4, 0u);
    store_shared(base_at + head * 4, static_cast<u32>(q.kept));
  }
  const u32 kept = block_sum(mine, at.slots + 192), candidates = block_sum(its, at.slots + 256);
  KeyRange range = {~0u, 0, 0};
#pragma unroll 1
  for (u32 head = 0; head < heads; ++head) make_keys<kCached>(row_of(head), at.keys + head * stride, false, range);
  const auto walk = [&](auto count) {
#pragma unroll 1
    for (u32 head = 0; head < heads; ++head) {
      const ScoreRow row = row_of(head);
      for_tiles(row.end, [&](u32 item) {
        count(keys_at<kCached>(row, at.keys + head * stride, item), candidates_of(row, item));
      });
    }
  };
  const Threshold threshold = find_threshold(at, range, candidates, kept, p.newest != 0, walk);
#pragma unroll 1
  for (u32 head = 0; head < heads; ++head) {
    const ScoreRow row = row_of(head);
    u32 above = 0, equal = 0;
    for_tiles(row.end, [&](u32 item) {
      const u32 mask = candidates_of(row, item);
      const Keys keys = keys_at<kCached>(row, at.keys + head * stride, item);
#pragma unroll
      for (u32 j = 0; j < 4; ++j) {
        above += (mask >> j & 1) && keys.key[j] > threshold.key;
        equal += (mask >> j & 1) && keys.key[j] == threshold.key;
      }
    });
    above = warp_reduce_add(above);
    equal = warp_reduce_add(equal);
    if (lane_index() == 0) {
      atomic_add_shared(above_at + head * 4, above);
      atomic_add_shared(equal_at + head * 4, equal);
    }
  }
  block_sync();

  // Shares in units of 2^-16: all of it is the sum of the heads' kept, so the largest remainders fill up what rounding down left.
  const u64 even = static_cast<u64>(p.floor_alpha), earned = 65536 - even;
  u32 floors = 0;
  for (u32 head = t; head < heads; head += threads) {
    u32 before = 0;
    for (u32 other = 0; other < head; ++other) before += load_shared<u32>(equal_at + other * 4);
    const u32 equal = load_shared<u32>(equal_at + head * 4);
    const u32 count = load_shared<u32>(above_at + head * 4) + threshold.kept_of_first(before + equal) -
                      threshold.kept_of_first(before);
    const u64 share = count * earned + load_shared<u32>(base_at + head * 4) * even;
    floors += static_cast<u32>(share >> 16);
    // Others read the equal ones yet: the share goes where only this thread has looked.
    store_shared(above_at + head * 4, static_cast<u32>(share >> 16));
    store_shared(base_at + head * 4, static_cast<u32>(share & 0xffff));
  }
  const u32 left = kept - block_sum(floors, at.slots + 320);
  for (u32 head = t; head < heads; head += threads) {
    const u32 rest = load_shared<u32>(base_at + head * 4);
    u32 rank = 0;
    for (u32 other = 0; other < heads; ++other) {
      const u32 its_rest = load_shared<u32>(base_at + other * 4);
      rank += its_rest > rest || (its_rest == rest && other < head);
    }
    const Quota q = quota_of(p, set * heads + head, nullptr);
    const i32 share = static_cast<i32>(load_shared<u32>(above_at + head * 4) + (rank < left));
    store_global(budgets + set * heads + head, q.sink + (q.items - q.end) + share);
  }
}

// The raw score of a token over the sets and heads of a list.
NXS_DEVICE float aggregate_token(const nxs_select_params& p, i64 first_set, i64 sets, i64 first_head, i64 heads, i64 token) {
  const bool importance = p.importance_or_null, both = importance && p.redundancy_or_null;
  const float rest = 1.0f - p.lambda, part = divide(1.0f, static_cast<float>(heads));
  float total = 0;
#pragma unroll 1
  for (i64 set = first_set; set < first_set + sets; ++set) {
    float sum = 0;
#pragma unroll 8
    for (i64 head = first_head; head < first_head + heads; ++head) {
      float a = 0, b = 0;
      if (importance)
        a = load_global_nc(p.importance_or_null + set * p.importance_stride_set + head * p.importance_stride_head + token);
      if (p.redundancy_or_null)
        b = load_global_nc(p.redundancy_or_null + set * p.redundancy_stride_set + head * p.redundancy_stride_head + token);
      sum += combine(p.lambda, rest, both, importance, a, b);
    }
    total += multiply(sum, part);
  }
  return total;
}

constexpr u32 kAggregateThreads = 256;

__global__ void __launch_bounds__(kAggregateThreads, 4) aggregate_kernel(const __grid_constant__ nxs_select_params p,
                                                                         float* scores) {
  const u32 block = p.block > 1 ? static_cast<u32>(p.block) : 1;
  const u32 of_block = block > 1 ? kAggregateThreads / 32 : kAggregateThreads;
  const u32 all_items = static_cast<u32>(items_of(p)), blocks = (all_items + of_block - 1) / of_block;
  const u32 list = block_index_x() / blocks, first = (block_index_x() - list * blocks) * of_block;
  const u32 length = static_cast<u32>(length_of_list(p, list).length);
  const bool shared = p.scope == NXS_SELECT_SHARED, per_set = p.scope == NXS_SELECT_PER_SET;
  const i64 set = shared ? 0 : per_set ? list : list / p.heads, sets = shared ? p.sets : 1;
  const i64 head = shared || per_set ? 0 : list - set * p.heads, heads = shared || per_set ? p.heads : 1;
  float* to = scores + list * static_cast<i64>((all_items + 3) / 4 * 4);
  if (block == 1) {
    const u32 token = first + thread_index();
    if (token < length) store_global(to + token, aggregate_token(p, set, sets, head, heads, token));
    return;
  }
  const u32 item = first + thread_index() / 32;
  const u64 begin = static_cast<u64>(item) * block;
  if (begin >= length) return;
  const u32 tokens = length - begin < block ? length - static_cast<u32>(begin) : block;
  float sum = 0;
  for (u32 i = lane_index(); i < tokens; i += 32)
    sum += aggregate_token(p, set, sets, head, heads, static_cast<i64>(begin) + i);
  warp_sync();
#pragma unroll
  for (u32 distance = 16; distance > 0; distance /= 2) sum += shuffle_xor(sum, distance);
  if (lane_index() == 0) store_global(to + item, divide(sum, static_cast<float>(tokens)));
}

}  // namespace nxs::compression
