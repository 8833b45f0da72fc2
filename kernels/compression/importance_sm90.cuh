// Importance on Hopper, for many queries: TMA, wgmma, warp specialisation; the two passes of importance_sm80.cuh.
//
//   statistics  lse[i] = log2 sum over j of 2^x[i, j],  x = scale * log2(e) * q . k, of a row, or the maximum over its query heads
//   columns     sum over i of 2^(x[i, j] - lse[i])
//
// Block      a producer warpgroup, of which warp 0 issues TMA loads and, in the second pass, warp 1 puts log-sum-exps beside the
//            queries; two consumer warpgroups, each with its own rows of the products. While one takes exponentials the
//            other's products run.
// Statistics S = Q K^T. Queries stay in shared memory: 256 rows of one query head, two tiles of 64 a warpgroup, whose softmaxes
//            and products take turns; or (kTogether) 128 queries of all query heads, and the maximum over them is taken in
//            registers. Keys pass, 128 at a time, kStages deep. Maximum and sum of a row are kept by each of its 4 lanes,
//            merged at the end.
// Columns    S^T = K Q^T. A block's 256 keys stay, as A in registers, 128 a warpgroup; queries pass, 64 of one query head at a
//            time. A key's sum is a running sum in 4 lanes.
// Grid       x: tiles of rows and splits; spans of keys, the last first, and splits. y: sets and heads.
// Shared     tiles [blocks of 64 columns][rows][128 B] with the 128-byte swizzle.
// Bytes      statistics: K once for 128 queries or 256 rows; columns: all queries once for 256 keys; from L2.
// FLOPs      2 kDim a row and key, in each pass; an exponential a row and key.
// Limits     not causal, no listed queries; statistics of up to 4 query heads together; sm_90a.
#pragma once
#include "common/ptx/barrier.cuh"
#include "common/ptx/fence.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/shared.cuh"
#include "common/ptx/tensor_map.cuh"
#include "common/ptx/warp.cuh"
#include "common/ptx/wgmma.cuh"
#include "compression/importance.cuh"

namespace nxs::compression::sm90 {

constexpr u32 kGroupThreads = 128, kConsumers = 2, kThreads = kGroupThreads * (kConsumers + 1);
constexpr u32 kConsumerWarps = kConsumers * kGroupThreads / kWarpSize;

template <u32 kStages> NXS_DEVICE u32 stage_of(u32 n) { return n % kStages; }
// The parity that the consumer of use `n` waits for; the producer waits for the other.
template <u32 kStages> NXS_DEVICE u32 parity_of(u32 n) { return n / kStages & 1; }

template <typename T, int kN, typename A> NXS_DEVICE void multiply(float (&d)[kN / 2], const A& a, u64 b, bool accumulate) {
  if constexpr (DType<T>::value == NXS_BF16) wgmma_bf16<kN>(d, a, b, accumulate);
  else wgmma_f16<kN>(d, a, b, accumulate);
}

// Loads a tile of `kRows` rows from row `row` on, of a head of a set, to `to`; signals `barrier`.
template <int kBlocks, u32 kRows>
NXS_DEVICE void load_tile(u32 to, const TensorMap* map, u32 barrier, u32 row, u32 head, u32 set) {
#pragma unroll
  for (u32 block = 0; block < kBlocks; ++block)
    tensor_load(to + block * kRows * 128, map, barrier,
                {static_cast<i32>(block * 64), static_cast<i32>(row), static_cast<i32>(head), static_cast<i32>(set)});
}

// ---- statistics

// The keys that are seen, in chunks of kKeys rows that lie together: none reaches beyond a page. Their order is free.
template <u32 kKeys> struct KeyChunks {
  u32 page_rows, of_page;  // rows, chunks of a page; without pages all rows are one
  u32 count;               // chunks
  u32 first_rows, first_end, end;  // rows that hold keys: below first_end, and from first_rows to end

  NXS_DEVICE KeyChunks(const ImportanceParams& p, const Item& item) {
    const KeyPlaces& places = item.places;
    page_rows = static_cast<u32>(places.pages ? p.places.page_rows : p.tokens);
    of_page = (page_rows + kKeys - 1) / kKeys;
    first_rows = static_cast<u32>(p.places.first_rows);
    first_end = item.seen < places.first ? item.seen : places.first;
    end = item.seen > places.first ? item.seen + places.skipped() : first_end;
    const u32 pages = end / page_rows;
    count = pages * of_page + (end - pages * page_rows + kKeys - 1) / kKeys;
  }
  NXS_DEVICE u32 first_row(u32 chunk) const {
    const u32 page = chunk / of_page;
    return page * page_rows + (chunk - page * of_page) * kKeys;
  }
  NXS_DEVICE u32 valid(u32 chunk) const {
    const u32 page = chunk / of_page, row = first_row(chunk), last = row < first_rows ? first_end : end;
    const u32 page_end = (page + 1) * page_rows, stop = last < page_end ? last : page_end;
    return stop > row ? stop - row < kKeys ? stop - row : kKeys : 0;
  }
};

// Rows of all chunks, of the longest set.
inline i64 chunk_rows(const ImportanceParams& p, i64 keys) {
  if (!p.places.pages_or_null) return p.tokens;
  const i64 page_rows = p.places.page_rows, pages = p.tokens / page_rows, rest = p.tokens - pages * page_rows;
  return (pages * ((page_rows + keys - 1) / keys) + (rest + keys - 1) / keys) * keys;
}

template <int kDim, Rows kRows> struct Stats {
  static constexpr u32 kBlocks = (kDim + 63) / 64, kKeys = 128, kStages = 3;
  static constexpr u32 kTiles = kRows == Rows::kSingle ? 2 : 1;  // of 64 rows, a warpgroup
  static constexpr u32 kBlockRows = kConsumers * kTiles * 64;
  static constexpr u32 kTileBytes = kBlocks * 64 * 128, kStageBytes = kBlocks * kKeys * 128;
  // Query tiles of `groups` heads, then stages, then mbarriers: queries there; stage full; stage empty.
  static constexpr u32 query_bytes(u32 groups) { return groups * kConsumers * kTiles * kTileBytes; }
  static constexpr u32 kBarrierBytes = 8 * (1 + 2 * kStages);
};

template <typename T, int kDim, Rows kRows>
__global__ void __launch_bounds__(kThreads, 1)
    importance_stats_sm90_kernel(const __grid_constant__ ImportanceParams p, const __grid_constant__ TensorMap map_q,
                                 const __grid_constant__ TensorMap map_k, const u32 query_bytes) {
  using C = Stats<kDim, kRows>;
  constexpr bool kTogether = kRows == Rows::kTogether;
  const u32 shared = dynamic_shared(), t = thread_index(), lane = t % kWarpSize;
  const u32 stages = shared + query_bytes, queries_full = stages + C::kStages * C::kStageBytes;
  const u32 full = queries_full + 8, empty = full + 8 * C::kStages;
  const u32 groups = static_cast<u32>(p.groups), queries = static_cast<u32>(p.queries);
  const u32 tiles = (queries + C::kBlockRows - 1) / C::kBlockRows, of_split = tiles * (kTogether ? 1 : groups);
  const u32 split = block_index_x() / of_split, rest = block_index_x() - split * of_split;
  const u32 group = rest / tiles, first = (rest - group * tiles) * C::kBlockRows;  // together: all groups
  const Item item(p, block_index_y());
  const KeyChunks<C::kKeys> all(p, item);
  const u32 span = static_cast<u32>(p.stat_span) / C::kKeys, begin = split * span;
  const u32 chunks = all.count > begin ? all.count - begin < span ? all.count - begin : span : 0;
  if (t == 0) {
    prefetch_tensor_map(&map_q);
    prefetch_tensor_map(&map_k);
    mbarrier_init(queries_full, 1);
    for (u32 stage = 0; stage < C::kStages; ++stage) {
      mbarrier_init(full + 8 * stage, 1);
      mbarrier_init(empty + 8 * stage, kConsumerWarps);
    }
    fence_mbarrier_init();
  }
  block_sync();

  if (t < kGroupThreads) {
    lower_registers<40>();
    if (t >= kWarpSize || chunks == 0) return;
    if (lane == 0) {
      const u32 vectors = kTogether ? groups : 1;
      mbarrier_arrive_expect(queries_full, query_bytes);
      for (u32 g = 0; g < vectors; ++g)
        for (u32 tile = 0; tile < kConsumers * C::kTiles; ++tile)
          load_tile<C::kBlocks, 64>(shared + (g * kConsumers * C::kTiles + tile) * C::kTileBytes, &map_q, queries_full,
                                    first + tile * 64, item.head * groups + (kTogether ? g : group),
                                    p.q_stride_set ? item.set : 0);
    }
    for (u32 n = 0; n < chunks; ++n) {
      const u32 stage = stage_of<C::kStages>(n);
      mbarrier_wait(empty + 8 * stage, parity_of<C::kStages>(n) ^ 1);
      warp_sync();  // before what lets the phase go on
      if (lane == 0) {
        mbarrier_arrive_expect(full + 8 * stage, C::kStageBytes);
        load_tile<C::kBlocks, C::kKeys>(stages + stage * C::kStageBytes, &map_k, full + 8 * stage,
                                        item.places.place_of_row(all.first_row(begin + n)), item.head,
                                        p.k_stride_set ? item.set : 0);
      }
    }
    return;
  }

  raise_registers<232>();
  const u32 consumer = t / kGroupThreads - 1, warp = t % kGroupThreads / kWarpSize;
  // [tile][row lane / 4 or that and 8]
  float most[C::kTiles][2], sum[C::kTiles][2];
#pragma unroll
  for (u32 i = 0; i < C::kTiles * 2; ++i) most[i / 2][i % 2] = -kInfinity, sum[i / 2][i % 2] = 0;
  if (chunks > 0) mbarrier_wait(queries_full, 0);

  const auto start = [&](float (&s)[C::kKeys / 2], u32 tile, u32 stage) {
    keep_registers(s);
    const u64 a = matrix_descriptor(shared + tile * C::kTileBytes, 16, 1024, Swizzle::k128);
    const u64 b = matrix_descriptor(stages + stage * C::kStageBytes, 16, 1024, Swizzle::k128);
    wgmma_fence();
#pragma unroll
    for (u32 i = 0; i < kDim / 16; ++i)
      multiply<T, C::kKeys>(s, advanced(a, i / 4 * 64 * 128 + i % 4 * 32), advanced(b, i / 4 * C::kKeys * 128 + i % 4 * 32),
                            i != 0);
    wgmma_commit();
  };
  const auto take = [&](float (&s)[C::kKeys / 2], u32 tile, u32 valid) {
    if (valid < C::kKeys) {
#pragma unroll
      for (u32 i = 0; i < C::kKeys / 2; ++i)
        if (i / 4 * 8 + lane % 4 * 2 + i % 2 >= valid) s[i] = -kInfinity;
    }
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
      float top[2] = {s[2 * r], s[2 * r + 1]};
#pragma unroll
      for (u32 i = 4; i < C::kKeys / 2; i += 4) {
        top[0] = fmaxf(top[0], s[i + 2 * r]);
        top[1] = fmaxf(top[1], s[i + 2 * r + 1]);
      }
      const float now = fmaxf(most[tile][r], fmaxf(top[0], top[1]) * p.scale), reference = reference_of(now);
      float add[2] = {};
#pragma unroll
      for (u32 i = 0; i < C::kKeys / 2; i += 4) {
        add[0] += exp2_approx(fma(s[i + 2 * r], p.scale, -reference));
        add[1] += exp2_approx(fma(s[i + 2 * r + 1], p.scale, -reference));
      }
      sum[tile][r] = sum[tile][r] * exp2_approx(most[tile][r] - reference) + (add[0] + add[1]);
      most[tile][r] = now;
    }
  };
  const auto release = [&](u32 stage) {
    warp_sync();
    if (lane == 0) mbarrier_arrive(empty + 8 * stage);
  };
  float x[C::kKeys / 2], y[C::kKeys / 2];
#pragma unroll
  for (u32 i = 0; i < C::kKeys / 2; ++i) x[i] = y[i] = 0;
#pragma unroll 1
  for (u32 n = 0; n < chunks; ++n) {
    const u32 stage = stage_of<C::kStages>(n), valid = all.valid(begin + n);
    mbarrier_wait(full + 8 * stage, parity_of<C::kStages>(n));
    if constexpr (kTogether) {
      start(x, consumer, stage);
      wgmma_wait<0>();
      keep_registers(x);
#pragma unroll 1
      for (u32 g = 1; g < groups; ++g) {
        start(y, g * kConsumers + consumer, stage);
        wgmma_wait<0>();
        keep_registers(y);
#pragma unroll
        for (u32 i = 0; i < C::kKeys / 2; ++i) x[i] = maximum_nan(x[i], y[i]);
      }
      release(stage);
      take(x, 0, valid);
    } else {
      start(x, consumer * 2, stage);
      start(y, consumer * 2 + 1, stage);
      wgmma_wait<1>();
      keep_registers(x);
      take(x, 0, valid);
      wgmma_wait<0>();
      keep_registers(y);
      release(stage);
      take(y, C::kTiles - 1, valid);
    }
  }
#pragma unroll
  for (u32 i = 0; i < C::kTiles * 2; ++i) {
    Softmax found{most[i / 2][i % 2], sum[i / 2][i % 2]};
#pragma unroll
    for (u32 bits = 1; bits < 4; bits *= 2)
      found = merged(found, Softmax{shuffle_xor(found.most, bits), shuffle_xor(found.sum, bits)});
    const u32 query = first + (consumer * C::kTiles + i / 2) * 64 + warp * 16 + i % 2 * 8 + lane / 4;
    if (lane % 4 == 0 && query < queries) store_stat(p, item, split, kTogether ? query : query * groups + group, found);
  }
}

// ---- columns

enum class Column : int { kSum, kMaxLogit, kMaxProb };

template <int kDim> struct Columns {
  static constexpr u32 kBlocks = (kDim + 63) / 64, kRows = 64, kStages = 8, kSpan = kConsumers * 128;
  static constexpr u32 kStageBytes = kBlocks * kRows * 128;
  static constexpr u32 kLse = kStages * kStageBytes, kFull = kLse + kStages * kRows * 4, kEmpty = kFull + 8 * kStages,
                       kSharedBytes = kEmpty + 8 * kStages;
};

template <typename T, int kDim, Column kColumn>
__global__ void __launch_bounds__(kThreads, 1)
    importance_columns_sm90_kernel(const __grid_constant__ ImportanceParams p, const __grid_constant__ TensorMap map_q) {
  using C = Columns<kDim>;
  const u32 shared = dynamic_shared(), t = thread_index(), lane = t % kWarpSize;
  const u32 full = shared + C::kFull, empty = shared + C::kEmpty;
  const u32 groups = static_cast<u32>(p.groups), queries = static_cast<u32>(p.queries);
  const u32 spans = (static_cast<u32>(p.tokens) + C::kSpan - 1) / C::kSpan;
  const u32 split = block_index_x() / spans, span = (spans - 1 - (block_index_x() - split * spans)) * C::kSpan;
  const Item item(p, grid_size_y() - 1 - block_index_y());
  const u32 share = static_cast<u32>(p.sum_rows_split), row_begin = split * share;
  const u32 left = row_begin < queries ? queries - row_begin : 0, row_end = row_begin + (left < share ? left : share);
  const u32 tiles = span < item.scored && row_end > row_begin ? (row_end - row_begin + C::kRows - 1) / C::kRows : 0;
  if (t == 0) {
    prefetch_tensor_map(&map_q);
    for (u32 stage = 0; stage < C::kStages; ++stage) {
      mbarrier_init(full + 8 * stage, 2);  // the copy, and the log-sum-exps
      mbarrier_init(empty + 8 * stage, kConsumerWarps);
    }
    fence_mbarrier_init();
  }
  block_sync();

  if (t < kGroupThreads) {
    lower_registers<40>();
    if (t >= 2 * kWarpSize) return;
    const bool copies = t < kWarpSize;
    u32 n = 0;
    for (u32 tile = 0; tile < tiles; ++tile)
      for (u32 g = 0; g < groups; ++g, ++n) {
        const u32 stage = stage_of<C::kStages>(n), row = row_begin + tile * C::kRows;
        mbarrier_wait(empty + 8 * stage, parity_of<C::kStages>(n) ^ 1);
        warp_sync();
        if (copies) {
          if (lane == 0) {
            mbarrier_arrive_expect(full + 8 * stage, C::kStageBytes);
            load_tile<C::kBlocks, C::kRows>(shared + stage * C::kStageBytes, &map_q, full + 8 * stage, row,
                                            item.head * groups + g, p.q_stride_set ? item.set : 0);
          }
          continue;
        }
        // Of a maximum of logits with the last query head.
        if (kColumn != Column::kMaxLogit || g + 1 == groups)
          for (u32 i = lane; i < C::kRows; i += kWarpSize) {
            const u32 query = row + i;
            float lse = kInfinity;
            if (query < row_end) lse = lse_at(p, item, kColumn == Column::kMaxLogit ? query : query * groups + g, query, g);
            store_shared(shared + C::kLse + (stage * C::kRows + i) * 4, lse);
          }
        warp_sync();
        if (lane == 0) mbarrier_arrive(full + 8 * stage);
      }
    return;
  }

  raise_registers<232>();
  const u32 consumer = t / kGroupThreads - 1, warp = t % kGroupThreads / kWarpSize;
  // Of rows 8 r + lane / 4 of the warp's 16, of each tile of 64 keys.
  const u32 key = span + consumer * 128 + warp * 16 + lane / 4;
  float column[2][2] = {};
  if (tiles > 0) {
    u32 a[2][kDim / 16][4];
    const T* of_item = keys_of<T>(p, item);
#pragma unroll
    for (u32 m = 0; m < 2; ++m)
#pragma unroll
      for (u32 r = 0; r < 2; ++r) {
        u32 row = key + m * 64 + r * 8;
        if (row >= item.length) row = item.length - 1;
        const T* from = of_item + item.places(row) * p.k_stride_token + lane % 4 * 2;
#pragma unroll
        for (u32 i = 0; i < kDim / 16; ++i)
#pragma unroll
          for (u32 half = 0; half < 2; ++half)
            a[m][i][r + 2 * half] = load_global_nc(reinterpret_cast<const u32*>(from + i * 16 + half * 8));
      }
    float y[2][C::kRows / 2], x[2][C::kRows / 2];
#pragma unroll
    for (u32 i = 0; i < C::kRows / 2; ++i) y[0][i] = y[1][i] = x[0][i] = x[1][i] = 0;
    u32 n = 0;
#pragma unroll 1
    for (u32 tile = 0; tile < tiles; ++tile) {
#pragma unroll 1
      for (u32 g = 0; g < groups; ++g, ++n) {
        const u32 stage = stage_of<C::kStages>(n), lse = shared + C::kLse + (stage * C::kRows + lane % 4 * 2) * 4;
        mbarrier_wait(full + 8 * stage, parity_of<C::kStages>(n));
        const u64 b = matrix_descriptor(shared + stage * C::kStageBytes, 16, 1024, Swizzle::k128);
        keep_registers(y[0]);
        keep_registers(y[1]);
        wgmma_fence();
#pragma unroll
        for (u32 m = 0; m < 2; ++m) {
#pragma unroll
          for (u32 i = 0; i < kDim / 16; ++i)
            multiply<T, C::kRows>(y[m], a[m][i], advanced(b, i / 4 * C::kRows * 128 + i % 4 * 32), i != 0);
          wgmma_commit();
        }
        const bool last = kColumn == Column::kSum || g + 1 == groups;
        const auto take = [&](u32 m) {
          float part[2] = {};
#pragma unroll
          for (u32 i = 0; i < C::kRows / 2; i += 4) {
            Vec<float, 2> of_rows{};
            if (kColumn != Column::kMaxLogit || last) of_rows = load_shared<Vec<float, 2>>(lse + i * 8);
#pragma unroll
            for (u32 e = 0; e < 4; ++e) {
              float it = y[m][i + e];
              if constexpr (kColumn == Column::kMaxProb) it = fma(it, p.scale, -of_rows.data[e % 2]);
              if constexpr (kColumn != Column::kSum) {
                it = g == 0 ? it : maximum_nan(x[m][i + e], it);
                x[m][i + e] = it;
              }
              if (last) part[e / 2] += exp2_approx(kColumn == Column::kMaxProb ? it : fma(it, p.scale, -of_rows.data[e % 2]));
            }
          }
          column[m][0] += part[0];
          column[m][1] += part[1];
        };
        wgmma_wait<1>();
        keep_registers(y[0]);
        take(0);
        wgmma_wait<0>();
        keep_registers(y[1]);
        take(1);
        warp_sync();
        if (lane == 0) mbarrier_arrive(empty + 8 * stage);
      }
    }
  }
#pragma unroll
  for (u32 i = 0; i < 4; ++i) {
    float sum = column[i / 2][i % 2];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    const u32 at = key + i / 2 * 64 + i % 2 * 8;
    if (lane % 4 == 0 && at < static_cast<u32>(p.tokens)) store_column(p, item, split, at, sum);
  }
}

// ---- host

inline nxs_status encode_map(TensorMap* map, nxs_dtype dtype, const void* address, int dim, i64 rows, i64 heads, i64 sets,
                             i64 stride_row, i64 stride_head, i64 stride_set, u32 box_rows) {
  TensorShape shape;
  shape.dtype = dtype;
  shape.rank = 4;
  shape.address = address;
  shape.size[0] = static_cast<u64>(dim);
  shape.size[1] = static_cast<u64>(rows);
  shape.size[2] = static_cast<u64>(heads);
  shape.size[3] = static_cast<u64>(stride_set ? sets : 1);  // else all sets share the memory
  // A dimension of one element may have any stride; a map wants a valid one.
  const auto bytes = [](i64 stride) { return static_cast<u64>(stride ? stride : 8) * 2; };
  shape.stride_bytes[0] = bytes(stride_row);
  shape.stride_bytes[1] = bytes(stride_head);
  shape.stride_bytes[2] = bytes(stride_set);
  shape.box[0] = 64;
  shape.box[1] = box_rows;
  shape.swizzle = Swizzle::k128;
  return encode_tensor_map(map, shape);
}

template <typename T, int kDim, Rows kRows>
nxs_status launch_stats(const ImportanceParams& p, const TensorMap& map_q, void* stream) {
  using C = Stats<kDim, kRows>;
  const i64 groups = kRows == Rows::kTogether ? p.groups : 1;
  NXS_REQUIRE(p.stat_rows == static_cast<i32>(C::kBlockRows) && groups <= 4, NXS_E_SHAPE);
  NXS_REQUIRE(p.stat_span > 0 && p.stat_span % static_cast<i32>(C::kKeys) == 0 &&
                  p.stat_splits == (chunk_rows(p, C::kKeys) + p.stat_span - 1) / p.stat_span,
              NXS_E_SHAPE);
  const i64 tiles = (p.queries + C::kBlockRows - 1) / C::kBlockRows * (kRows == Rows::kTogether ? 1 : p.groups);
  NXS_REQUIRE(tiles * p.stat_splits <= INT32_MAX, NXS_E_SHAPE);
  const i64 k_rows = p.places.pages_or_null ? static_cast<i64>(p.places.pool_pages) * p.places.page_rows : p.tokens;
  TensorMap map_k;
  NXS_TRY(encode_map(&map_k, p.dtype, p.k, p.dim, k_rows, p.heads, p.sets, p.k_stride_token, p.k_stride_head,
                     p.k_stride_set, C::kKeys));
  const u32 query_bytes = C::query_bytes(static_cast<u32>(groups));
  const auto kernel = importance_stats_sm90_kernel<T, kDim, kRows>;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(tiles * p.stat_splits), static_cast<unsigned>(p.sets * p.heads));
  shape.block = kThreads;
  shape.dynamic_smem = query_bytes + C::kStages * C::kStageBytes + C::kBarrierBytes;
  NXS_TRY(allow_dynamic_smem(kernel));
  return launch(kernel, shape, stream, p, map_q, map_k, query_bytes);
}

template <typename T, int kDim, Column kColumn>
nxs_status launch_columns(const ImportanceParams& p, const TensorMap& map_q, void* stream) {
  using C = Columns<kDim>;
  NXS_REQUIRE(p.sum_rows == static_cast<i32>(C::kRows) && p.sum_span == static_cast<i32>(C::kSpan), NXS_E_SHAPE);
  NXS_REQUIRE(p.sum_rows_split > 0 && p.sum_rows_split % p.sum_rows == 0 &&
                  p.sum_splits == (p.queries + p.sum_rows_split - 1) / p.sum_rows_split,
              NXS_E_SHAPE);
  const i64 blocks = (p.tokens + C::kSpan - 1) / C::kSpan * p.sum_splits;
  NXS_REQUIRE(blocks <= INT32_MAX, NXS_E_SHAPE);
  const auto kernel = importance_columns_sm90_kernel<T, kDim, kColumn>;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(p.sets * p.heads));
  shape.block = kThreads;
  shape.dynamic_smem = C::kSharedBytes;
  NXS_TRY(allow_dynamic_smem(kernel));
  return launch(kernel, shape, stream, p, map_q);
}

template <typename T, int kDim> nxs_status importance_launch(const ImportanceParams& given, void* stream) {
  ImportanceParams p = given;
  p.scale *= kLog2E;
  NXS_REQUIRE(!p.causal && !p.rows_or_null && p.queries > 0 && p.aggregation != NXS_IMPORTANCE_LOGIT, NXS_E_UNSUPPORTED);
  NXS_REQUIRE((p.queries == 1 || p.q_stride_row > 0) && (p.heads * p.groups == 1 || p.q_stride_head > 0), NXS_E_STRIDE);
  NXS_REQUIRE(((p.tokens == 1 && !p.places.pages_or_null) || p.k_stride_token > 0) && (p.heads == 1 || p.k_stride_head > 0), NXS_E_STRIDE);
  TensorMap map_q;
  NXS_TRY(encode_map(&map_q, p.dtype, p.q, p.dim, p.q_rows, p.heads * p.groups, p.sets, p.q_stride_row, p.q_stride_head,
                     p.q_stride_set, 64));
  if (!p.lse_or_null) {
    if (p.aggregation == NXS_IMPORTANCE_MAX_LOGIT)
      NXS_TRY((launch_stats<T, kDim, Rows::kTogether>(p, map_q, stream)));
    else
      NXS_TRY((launch_stats<T, kDim, Rows::kSingle>(p, map_q, stream)));
  }
  switch (p.aggregation) {
    case NXS_IMPORTANCE_MAX_LOGIT: return launch_columns<T, kDim, Column::kMaxLogit>(p, map_q, stream);
    case NXS_IMPORTANCE_MEAN_PROB: return launch_columns<T, kDim, Column::kSum>(p, map_q, stream);
    default: return launch_columns<T, kDim, Column::kMaxProb>(p, map_q, stream);
  }
}

}  // namespace nxs::compression::sm90
