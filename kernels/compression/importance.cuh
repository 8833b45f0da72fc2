// Which keys a query of an importance scoring sees, where its rows lie, what is known of its softmax. For all kernels of it.
#pragma once
#include "common/dtype.cuh"
#include "common/ptx/math.cuh"
#include "common/ptx/memory.cuh"
#include "compression/importance.h"
#include "compression/key_places.cuh"

namespace nxs::compression {

constexpr float kLog2E = 1.44269504f;
constexpr float kInfinity = __builtin_huge_valf();

// How rows of queries are taken.
enum class Rows : int {
  kSingle,    // a row is a query of one query head
  kTogether,  // a row is a query; tiles hold its query heads one after the other: vector g * tile rows + row
};

// A set and KV head, and its keys.
struct Item {
  u32 set, head;
  KeyPlaces places;
  u32 length, seen, scored;

  NXS_DEVICE Item(const ImportanceParams& p, u32 index)
      : set(index / static_cast<u32>(p.heads)),
        head(index - set * static_cast<u32>(p.heads)),
        places(p.places, set, head),
        length(length_of(p, places, set, head)) {
    const u32 excluded = static_cast<u32>(p.excluded), unscored = static_cast<u32>(p.unscored);
    seen = length > excluded ? length - excluded : 0;
    scored = seen > unscored ? seen - unscored : 0;
  }

  // Keys that a query sees; no fewer for a later one.
  NXS_DEVICE u32 visible(const ImportanceParams& p, u32 query) const {
    if (!p.causal) return seen;
    const u32 end = length + query + 1, queries = static_cast<u32>(p.queries);
    const u32 up_to = end > queries ? end - queries : 0;
    return up_to < seen ? up_to : seen;
  }
};

// Rows that have a log-sum-exp of their own.
NXS_DEVICE u32 stat_rows_of(const ImportanceParams& p) {
  return static_cast<u32>(p.queries) * (p.aggregation == NXS_IMPORTANCE_MAX_LOGIT ? 1u : static_cast<u32>(p.groups));
}

template <typename T> NXS_DEVICE const T* query_at(const ImportanceParams& p, const Item& item, u32 query, u32 group) {
  i64 row = query;
  if (p.rows_or_null) {
    row = load_global_nc(p.rows_or_null + query);
    row = row < 0 ? 0 : row < p.q_rows ? row : p.q_rows - 1;
  }
  return static_cast<const T*>(p.q) + item.set * p.q_stride_set + row * p.q_stride_row +
         (item.head * static_cast<u32>(p.groups) + group) * p.q_stride_head;
}

template <typename T> NXS_DEVICE const T* keys_of(const ImportanceParams& p, const Item& item) {
  return static_cast<const T*>(p.k) + item.set * p.k_stride_set + item.head * p.k_stride_head;
}

// A running softmax: the maximum so far, base 2, and the sum of exponentials relative to it.
struct Softmax {
  float most = -kInfinity, sum = 0;
};
NXS_DEVICE float reference_of(float most) { return most == -kInfinity ? 0.0f : most; }
NXS_DEVICE Softmax merged(const Softmax& a, const Softmax& b) {
  Softmax both;
  both.most = fmaxf(a.most, b.most);
  const float reference = reference_of(both.most);
  both.sum = a.sum * exp2_approx(a.most - reference) + b.sum * exp2_approx(b.most - reference);
  return both;
}
// Of a row that has seen nothing +inf, so that 2^(x - lse) is 0.
NXS_DEVICE float lse_of(const Softmax& row) { return row.sum == 0 ? kInfinity : row.most + log2_approx(row.sum); }

// Base 2, of row `stat` of the statistics, which is query `query` of query head `group`; what the first pass or attention has
// left.
NXS_DEVICE float lse_at(const ImportanceParams& p, const Item& item, u32 stat, u32 query, u32 group) {
  if (p.lse_or_null) {
    const u32 head = item.head * static_cast<u32>(p.groups) + group;
    const float lse = load_global_nc(p.lse_or_null + item.set * p.lse_stride_set + head * p.lse_stride_head +
                                     query * p.lse_stride_query);
    return lse == -kInfinity ? kInfinity : lse * kLog2E;
  }
  const i64 rows = stat_rows_of(p), of_item = (static_cast<i64>(item.set) * p.heads + item.head) * rows + stat;
  if (p.stat_splits == 1) return load_global_nc(p.stats_or_null + of_item);
  const auto* parts = reinterpret_cast<const Vec<float, 2>*>(p.stats_or_null) + of_item;
  const i64 stride = p.sets * p.heads * rows;
  Softmax all;
  for (i32 split = 0; split < p.stat_splits; ++split) {
    const Vec<float, 2> part = load_global_nc(parts + split * stride);
    all = merged(all, Softmax{part.data[0], part.data[1]});
  }
  return lse_of(all);
}

// What a block of the first pass has found of a row.
NXS_DEVICE void store_stat(const ImportanceParams& p, const Item& item, u32 split, u32 stat, const Softmax& found) {
  const i64 rows = stat_rows_of(p), of_item = (static_cast<i64>(item.set) * p.heads + item.head) * rows + stat;
  if (p.stat_splits == 1) return store_global(p.stats_or_null + of_item, lse_of(found));
  auto* part = reinterpret_cast<Vec<float, 2>*>(p.stats_or_null) + split * (p.sets * p.heads * rows) + of_item;
  store_global(part, Vec<float, 2>{{found.most, found.sum}});
}

// What a block of the second pass has found of a key: the sum to where the third pass finds it, or the score.
NXS_DEVICE void store_column(const ImportanceParams& p, const Item& item, u32 split, u32 key, float sum) {
  if (p.sums_or_null) {
    if (key >= item.scored) return;
    const i64 row = (split * p.sets + item.set) * p.heads + item.head;
    return store_global(p.sums_or_null + row * p.tokens + key, sum);
  }
  if (key >= static_cast<u32>(p.tokens) || (p.accumulate && key >= item.scored)) return;
  float* score = p.scores + item.set * p.scores_stride_set + item.head * p.scores_stride_head + key;
  float value = key < item.scored ? sum * p.factor : 0.0f;
  if (p.accumulate) value += load_global(score);
  store_global(score, value);
}

}  // namespace nxs::compression
