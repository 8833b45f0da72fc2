// Importance on any tensor cores since Ampere: mma.sync, in two passes over the keys.
//
//   statistics  lse[i] = log2 sum over j of 2^x[i, j],  x = scale * log2(e) * q . k, of a row, or the maximum over its query heads
//   columns     sum over i of 2^(x[i, j] - lse[i])
//
// Both compute S^T = K Q^T: keys are the rows of the products, queries the columns. So a column sum is a running sum in a
// thread, a row's softmax one in each of 8 lanes, and the maximum over query heads an elementwise one.
//
// Products   those of products.cuh: each warp has 32 keys in registers, queries lie in shared memory.
// Statistics a block: stat_rows rows, which stay, and a span of keys that its 8 warps go through. Maximum and sum of a row are
//            kept by each thread for its keys, merged at the end: lanes, then warps, in a fixed order.
// Columns    a block: spans of 256 keys, which stay in registers while rows pass, sum_rows at a time in two buffers (cp.async);
//            where all rows fit at once they stay, and spans follow each other.
// Grid       x: tiles and splits, the keys of the second pass last to first, for the last are still in L2; y: sets and heads.
// Bytes      a pass reads K once for stat_rows rows, and all rows once for 256 keys: the latter from L2.
// FLOPs      2 kDim a row and key, in each pass; an exponential a row and key each (a quarter more in the first).
// Limits     kDim 64, 96, 128, exactly; 16-byte aligned keys and queries.
#pragma once
#include "common/ptx/async_copy.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/shared.cuh"
#include "common/ptx/warp.cuh"
#include "compression/importance.cuh"
#include "compression/products.cuh"

namespace nxs::compression {

constexpr u32 kWarps = 8, kThreads = kWarps * kWarpSize, kSpan = kImportanceSpan;
static_assert(kWarps * kWarpKeys == kSpan);

// What becomes of the products of a row and a key.
enum class Column : int { kSum, kMaxLogit, kMaxProb, kLogit };
template <Column kColumn>
constexpr Rows kRowsOf = kColumn == Column::kMaxLogit || kColumn == Column::kMaxProb ? Rows::kTogether : Rows::kSingle;

// Starts the copies of a tile: of `count` rows of `tile_rows`, the first of which is `first`; zeroes where there is none.
template <typename T, int kDim, Rows kRows>
NXS_DEVICE void copy_queries(const ImportanceParams& p, const Item& item, u32 to, u32 first, u32 tile_rows) {
  using Tile = VectorTile<kDim>;
  // So many threads share a row, each every kLanes-th of its pieces.
  constexpr u32 kLanes = kDim == 96 ? 4 : Tile::kPieces, kStep = kThreads / kLanes;
  const u32 lane = thread_index() % kLanes, groups = static_cast<u32>(p.groups);
  const auto copy = [&](u32 vector, u32 query, u32 group, bool exists) {
    const T* from = static_cast<const T*>(p.q);
    if (exists) from = query_at<T>(p, item, query, group) + lane * 8;
#pragma unroll
    for (u32 i = 0; i < Tile::kPieces / kLanes; ++i)
      copy_async<16>(to + Tile::piece_at(vector, lane + i * kLanes), exists ? from + i * kLanes * 8 : from, exists ? 16 : 0);
  };
  if constexpr (kRows == Rows::kTogether) {
    for (u32 group = 0; group < groups; ++group)
      for (u32 row = thread_index() / kLanes; row < tile_rows; row += kStep)
        copy(group * tile_rows + row, first + row, group, first + row < static_cast<u32>(p.queries));
  } else {
    const u32 all = static_cast<u32>(p.queries) * groups;
    for (u32 row = thread_index() / kLanes; row < tile_rows; row += kStep) {
      const u32 flat = first + row, query = groups == 1 ? flat : flat / groups;
      copy(row, query, flat - query * groups, flat < all);
    }
  }
}

// The query of row `row` of a tile.
template <Rows kRows> NXS_DEVICE u32 query_of(const ImportanceParams& p, u32 row) {
  return kRows == Rows::kTogether || p.groups == 1 ? row : row / static_cast<u32>(p.groups);
}

// ---- statistics

template <Rows kRows> constexpr u32 kMostStatRows = kRows == Rows::kTogether ? 64 : 128;

template <typename T, int kDim, Rows kRows>
__global__ void __launch_bounds__(kThreads, 1) importance_stats_sm80_kernel(const __grid_constant__ ImportanceParams p) {
  // p.scale comes times log2(e).
  using Tile = VectorTile<kDim>;
  constexpr u32 kEights = kMostStatRows<kRows> / 8;
  const u32 shared = dynamic_shared(), lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize;
  const u32 tile_rows = static_cast<u32>(p.stat_rows), all = stat_rows_of(p), tiles = (all + tile_rows - 1) / tile_rows;
  const u32 split = block_index_x() / tiles, first = (block_index_x() - split * tiles) * tile_rows;
  const Item item(p, block_index_y());
  const u32 begin = split * static_cast<u32>(p.stat_span), end = begin + static_cast<u32>(p.stat_span);
  const u32 key_end = end < item.seen ? end : item.seen;
  const u32 rows = all - first < tile_rows ? all - first : tile_rows;

  copy_queries<T, kDim, kRows>(p, item, shared, first, tile_rows);
  copy_async_commit();
  copy_async_wait<0>();
  block_sync();

  float most[kEights][2], sum[kEights][2];
#pragma unroll
  for (u32 e = 0; e < kEights; ++e)
#pragma unroll
    for (u32 c = 0; c < 2; ++c) most[e][c] = -kInfinity, sum[e][c] = 0;

  const Tile tile(lane);
  const T* of_item = keys_of<T>(p, item);
  const u32 hidden_from = item.visible(p, query_of<kRows>(p, first));
  Keys<T, kDim> keys;
  for (u32 key = begin + warp * kWarpKeys; key < key_end; key += kSpan) {
    keys.load(of_item, p.k_stride_token, key, item.length - 1, item.places);
    const bool edge = key + kWarpKeys > hidden_from;
#pragma unroll
    for (u32 e = 0; e < kEights; ++e) {
      if (e * 8 >= rows) break;
      float x[2][4];
      keys.multiply(x, tile, shared + e * 8 * Tile::kRowBytes);
      if constexpr (kRows == Rows::kTogether) {
#pragma unroll 1
        for (u32 group = 1; group < static_cast<u32>(p.groups); ++group) {
          float other[2][4];
          keys.multiply(other, tile, shared + (group * tile_rows + e * 8) * Tile::kRowBytes);
#pragma unroll
          for (u32 i = 0; i < 8; ++i) x[i / 4][i % 4] = maximum_nan(x[i / 4][i % 4], other[i / 4][i % 4]);
        }
      }
      if (edge) {
#pragma unroll
        for (u32 c = 0; c < 2; ++c) {
          const u32 visible = item.visible(p, query_of<kRows>(p, first + e * 8 + lane % 4 * 2 + c));
#pragma unroll
          for (u32 i = 0; i < 4; ++i)
            if (key + i * 8 + lane / 4 >= visible) x[i / 2][i % 2 * 2 + c] = -kInfinity;
        }
      }
#pragma unroll
      for (u32 c = 0; c < 2; ++c) {
        const float top = fmaxf(fmaxf(x[0][c], x[0][2 + c]), fmaxf(x[1][c], x[1][2 + c])) * p.scale;
        const float now = fmaxf(most[e][c], top), reference = reference_of(now);
        float add = 0;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) add += exp2_approx(fma(x[i / 2][i % 2 * 2 + c], p.scale, -reference));
        sum[e][c] = sum[e][c] * exp2_approx(most[e][c] - reference) + add;
        most[e][c] = now;
      }
    }
  }

  // Of each warp, then of all: [warp][row].
  block_sync();
#pragma unroll
  for (u32 e = 0; e < kEights; ++e) {
    if (e * 8 >= rows) break;
#pragma unroll
    for (u32 c = 0; c < 2; ++c) {
      Softmax found{most[e][c], sum[e][c]};
#pragma unroll
      for (u32 bits = 4; bits < 32; bits *= 2)
        found = merged(found, Softmax{shuffle_xor(found.most, bits), shuffle_xor(found.sum, bits)});
      if (lane < 4)
        store_shared(shared + (warp * kMostStatRows<kRows> + e * 8 + lane * 2 + c) * 8,
                     Vec<float, 2>{{found.most, found.sum}});
    }
  }
  block_sync();
  if (thread_index() >= rows) return;
  Softmax found;
  for (u32 w = 0; w < kWarps; ++w) {
    const auto part = load_shared<Vec<float, 2>>(shared + (w * kMostStatRows<kRows> + thread_index()) * 8);
    found = merged(found, Softmax{part.data[0], part.data[1]});
  }
  store_stat(p, item, split, first + thread_index(), found);
}

// ---- columns

template <typename T, int kDim, Column kColumn>
__global__ void __launch_bounds__(kThreads, 2) importance_columns_sm80_kernel(const __grid_constant__ ImportanceParams p) {
  // p.scale comes times log2(e), but of logits is part of p.factor.
  using Tile = VectorTile<kDim>;
  constexpr Rows kRows = kRowsOf<kColumn>;
  const u32 shared = dynamic_shared(), lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize;
  const u32 groups = static_cast<u32>(p.groups), vectors = kRows == Rows::kTogether ? groups : 1;
  const u32 tile_rows = static_cast<u32>(p.sum_rows), tile_vectors = tile_rows * vectors;
  const u32 all = static_cast<u32>(p.queries) * (groups / vectors);
  const u32 sum_span = static_cast<u32>(p.sum_span), spans = (static_cast<u32>(p.tokens) + sum_span - 1) / sum_span;
  const u32 split = block_index_x() / spans, begin = (spans - 1 - (block_index_x() - split * spans)) * sum_span;
  const Item item(p, grid_size_y() - 1 - block_index_y());

  u32 row_begin = split * static_cast<u32>(p.sum_rows_split);
  if (row_begin > all) row_begin = all;
  const u32 left = all - row_begin, share = static_cast<u32>(p.sum_rows_split);
  const u32 row_end = row_begin + (left < share ? left : share);
  const u32 tiles = (row_end - row_begin + tile_rows - 1) / tile_rows;
  // A tile, and the log-sum-exps of its vectors.
  const u32 buffer_bytes = (tile_vectors * (Tile::kRowBytes + 4) + 255) / 256 * 256;

  // Of vector `vector` of the tile whose first row is `first`.
  const auto lse_of_vector = [&](u32 first, u32 vector) {
    const u32 group_of = kRows == Rows::kTogether ? vector / tile_rows : 0;
    const u32 row = first + vector - group_of * tile_rows;
    if (row >= all) return kInfinity;
    if constexpr (kColumn == Column::kMaxLogit) {
      return lse_at(p, item, row, row, 0);
    } else {
      const u32 query = query_of<kRows>(p, row), group = kRows == Rows::kTogether ? group_of : row - query * groups;
      return lse_at(p, item, query * groups + group, query, group);
    }
  };
  constexpr bool kNormalised = kColumn != Column::kLogit;
  const u32 lse_vectors = kColumn == Column::kMaxLogit ? tile_rows : tile_vectors;

  u32 key_end = begin + sum_span;
  if (key_end > static_cast<u32>(p.tokens)) key_end = static_cast<u32>(p.tokens);
  const Tile tile(lane);
  const T* of_item = keys_of<T>(p, item);
  u32 buffer = 0;
  bool loaded = false;  // the only tile is there
  for (u32 span = begin; span < key_end; span += kSpan) {
    const u32 key = span + warp * kWarpKeys;
    float column[4] = {};  // of keys 8 i + lane / 4
    if (span < item.scored && tiles > 0) {
      if (!loaded) {
        block_sync();  // the buffers are free
        copy_queries<T, kDim, kRows>(p, item, shared + buffer * buffer_bytes, row_begin, tile_rows);
        copy_async_commit();
        if (kNormalised)
          for (u32 i = thread_index(); i < lse_vectors; i += kThreads)
            store_shared(shared + buffer * buffer_bytes + tile_vectors * Tile::kRowBytes + i * 4, lse_of_vector(row_begin, i));
      }
      Keys<T, kDim> keys;
      keys.load(of_item, p.k_stride_token, key, item.length - 1, item.places);
      for (u32 n = 0; n < tiles; ++n) {
        const u32 first = row_begin + n * tile_rows, here = shared + buffer * buffer_bytes;
        const u32 lse = here + tile_vectors * Tile::kRowBytes, next = shared + (buffer ^ 1) * buffer_bytes;
        if (!loaded) {
          copy_async_wait<0>();
          block_sync();  // the tile has come, and nobody is at the one before
        }
        float next_lse = 0;
        if (n + 1 < tiles) {
          copy_queries<T, kDim, kRows>(p, item, next, first + tile_rows, tile_rows);
          copy_async_commit();
          if (kNormalised && thread_index() < lse_vectors) next_lse = lse_of_vector(first + tile_rows, thread_index());
        }
        if (key < item.scored) {
          const u32 rows = row_end - first < tile_rows ? row_end - first : tile_rows;
          const bool edge = p.causal && key + kWarpKeys > item.visible(p, query_of<kRows>(p, first));
          float part[4] = {};
#pragma unroll 1
          for (u32 row = 0; row < rows; row += 8) {
            float x[2][4];
            keys.multiply(x, tile, here + row * Tile::kRowBytes);
            Vec<float, 2> of_rows{};
            if constexpr (kNormalised) of_rows = load_shared<Vec<float, 2>>(lse + (row + lane % 4 * 2) * 4);
            if constexpr (kColumn == Column::kMaxProb) {
#pragma unroll
              for (u32 i = 0; i < 8; ++i) x[i / 4][i % 4] = fma(x[i / 4][i % 4], p.scale, -of_rows.data[i % 2]);
            }
            if constexpr (kRows == Rows::kTogether) {
#pragma unroll 1
              for (u32 group = 1; group < groups; ++group) {
                float other[2][4];
                keys.multiply(other, tile, here + (group * tile_rows + row) * Tile::kRowBytes);
                if constexpr (kColumn == Column::kMaxProb)
                  of_rows = load_shared<Vec<float, 2>>(lse + (group * tile_rows + row + lane % 4 * 2) * 4);
#pragma unroll
                for (u32 i = 0; i < 8; ++i) {
                  float& it = x[i / 4][i % 4];
                  const float that = other[i / 4][i % 4];
                  it = maximum_nan(it, kColumn == Column::kMaxProb ? fma(that, p.scale, -of_rows.data[i % 2]) : that);
                }
              }
            }
#pragma unroll
            for (u32 i = 0; i < 8; ++i) {
              float& it = x[i / 4][i % 4];
              if constexpr (kColumn == Column::kSum || kColumn == Column::kMaxLogit)
                it = exp2_approx(fma(it, p.scale, -of_rows.data[i % 2]));
              if constexpr (kColumn == Column::kMaxProb) it = exp2_approx(it);
            }
            if (edge) {
#pragma unroll
              for (u32 i = 0; i < 8; ++i) {
                const u32 query = query_of<kRows>(p, first + row + lane % 4 * 2 + i % 2);
                if (key + i / 2 * 8 + lane / 4 >= item.visible(p, query)) x[i / 4][i % 4] = 0;
              }
            }
#pragma unroll
            for (u32 i = 0; i < 4; ++i) part[i] += x[i / 2][i % 2 * 2] + x[i / 2][i % 2 * 2 + 1];
          }
#pragma unroll
          for (u32 i = 0; i < 4; ++i) column[i] += part[i];
        }
        if (n + 1 < tiles) {
          if (kNormalised && thread_index() < lse_vectors)
            store_shared(next + tile_vectors * Tile::kRowBytes + thread_index() * 4, next_lse);
          buffer ^= 1;
        }
      }
      loaded = tiles == 1;
    }
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      column[i] += shuffle_xor(column[i], 1);
      column[i] += shuffle_xor(column[i], 2);
    }
    const u32 mine = lane % 4;
    const float low = mine & 1 ? column[1] : column[0], high = mine & 1 ? column[3] : column[2];
    if (key + mine * 8 + lane / 4 < key_end) store_column(p, item, split, key + mine * 8 + lane / 4, mine & 2 ? high : low);
  }
}

// ---- host

template <typename T, int kDim, Rows kRows> nxs_status launch_stats(const ImportanceParams& p, void* stream) {
  const bool together = kRows == Rows::kTogether;
  const i64 all = p.queries * (together ? 1 : p.groups), vectors = p.stat_rows * (together ? p.groups : 1);
  NXS_REQUIRE(p.stat_rows > 0 && p.stat_rows % 8 == 0 && p.stat_rows <= static_cast<i64>(kMostStatRows<kRows>), NXS_E_SHAPE);
  NXS_REQUIRE(p.stat_span > 0 && p.stat_span % kSpan == 0 && p.stat_splits == (p.tokens + p.stat_span - 1) / p.stat_span,
              NXS_E_SHAPE);
  const i64 bytes = vectors * VectorTile<kDim>::kRowBytes, found = kWarps * kMostStatRows<kRows> * 8;
  NXS_REQUIRE(bytes <= kImportanceQueryBytes, NXS_E_SHAPE);
  const i64 blocks = (all + p.stat_rows - 1) / p.stat_rows * p.stat_splits;
  NXS_REQUIRE(blocks <= INT32_MAX, NXS_E_SHAPE);
  const auto kernel = importance_stats_sm80_kernel<T, kDim, kRows>;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(p.sets * p.heads));
  shape.block = kThreads;
  shape.dynamic_smem = static_cast<unsigned>(bytes > found ? bytes : found);
  NXS_TRY(allow_dynamic_smem(kernel));
  return launch(kernel, shape, stream, p);
}

template <typename T, int kDim, Column kColumn> nxs_status launch_columns(const ImportanceParams& p, void* stream) {
  const bool together = kRowsOf<kColumn> == Rows::kTogether;
  const i64 all = p.queries * (together ? 1 : p.groups), vectors = p.sum_rows * (together ? p.groups : 1);
  NXS_REQUIRE(p.sum_rows > 0 && p.sum_rows % 8 == 0 && p.sum_span > 0 && p.sum_span % kSpan == 0, NXS_E_SHAPE);
  NXS_REQUIRE(p.sum_rows_split > 0 && p.sum_rows_split % p.sum_rows == 0 &&
                  (all == 0 ? p.sum_splits == 1 : p.sum_splits == (all + p.sum_rows_split - 1) / p.sum_rows_split),
              NXS_E_SHAPE);
  const int buffers = all > p.sum_rows ? 2 : 1;
  NXS_REQUIRE(vectors * buffers * VectorTile<kDim>::kRowBytes <= kImportanceQueryBytes, NXS_E_SHAPE);
  NXS_REQUIRE(buffers == 1 || vectors <= static_cast<i64>(kThreads), NXS_E_SHAPE);
  const i64 blocks = (p.tokens + p.sum_span - 1) / p.sum_span * p.sum_splits;
  NXS_REQUIRE(blocks <= INT32_MAX, NXS_E_SHAPE);
  const auto kernel = importance_columns_sm80_kernel<T, kDim, kColumn>;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(p.sets * p.heads));
  shape.block = kThreads;
  shape.dynamic_smem =
      static_cast<unsigned>((vectors * (VectorTile<kDim>::kRowBytes + 4) + 255) / 256 * 256) * static_cast<unsigned>(buffers);
  NXS_TRY(allow_dynamic_smem(kernel));
  return launch(kernel, shape, stream, p);
}

template <typename T, int kDim> nxs_status importance_sm80_launch(const ImportanceParams& given, void* stream) {
  ImportanceParams p = given;
  const bool logits = p.aggregation == NXS_IMPORTANCE_LOGIT;
  if (logits) p.factor *= p.scale;
  p.scale *= kLog2E;
  if (!logits && !p.lse_or_null && p.queries > 0) {
    if (p.aggregation == NXS_IMPORTANCE_MAX_LOGIT)
      NXS_TRY((launch_stats<T, kDim, Rows::kTogether>(p, stream)));
    else
      NXS_TRY((launch_stats<T, kDim, Rows::kSingle>(p, stream)));
  }
  switch (p.aggregation) {
    case NXS_IMPORTANCE_MAX_LOGIT: return launch_columns<T, kDim, Column::kMaxLogit>(p, stream);
    case NXS_IMPORTANCE_MEAN_PROB: return launch_columns<T, kDim, Column::kSum>(p, stream);
    case NXS_IMPORTANCE_MAX_PROB: return launch_columns<T, kDim, Column::kMaxProb>(p, stream);
    default: return launch_columns<T, kDim, Column::kLogit>(p, stream);
  }
}

}  // namespace nxs::compression
