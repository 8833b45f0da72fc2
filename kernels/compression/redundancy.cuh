// Redundancy of cached keys: how alike each is to the others. u[j] = k[j] * inverse_norms[j].
//
//   anchor   c[j] = u[j] . unit_sum / n (of COSINE: / |unit_sum|); SOFTMAX: e^c[j] / sum over j of e^c[j]
//   similar  c[j] = (u[j] . unit_sum - |u[j]|^2 - sum over i with retain(i) = j of u[i] . u[j]) / n, then the same softmax
//
// No c leaves [-1, 1], so a softmax needs no maximum: e^c is written, then divided by its sum.
// The n x n cosines are never stored: all but those retained add up to a product with the sum of the unit keys, and only
// retain(i) has to look at pairs.
//
// Anchor     grid x: spans of keys, y: sets and heads; 8 warps, rows shared by lanes as in key_norms.cu; K read once. SOFTMAX has
//            a second kernel, which adds the spans' sums in order and divides.
// Neighbours grid x: 128 rows i, y: sets and heads; a warp has 32 of them in registers (products.cuh), tiles of 64 keys j pass
//            through shared memory (cp.async, two buffers) from the last to the first (or the other way), until all rows of the
//            block have found theirs. Hits of 4 x 8 keys are the bits of a word that the lanes of a row put together. It leaves
//            (retain, cosine) for each i.
// Similar    a block for each set and head: c, then what is retained, subtracted by integer atomics in shared memory, in units of
//            2^-17 (the order of integer additions is free), then the softmax.
// FLOPs      anchor: 2 kDim a key; neighbours: up to 2 kDim a pair.
// Limits     dim 64, 96, 128; similar: up to 8192 keys.
#pragma once
#include "common/check.h"
#include "common/ptx/async_copy.cuh"
#include "common/ptx/atomic.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/math.cuh"
#include "common/ptx/shared.cuh"
#include "common/ptx/warp.cuh"
#include "compression/key_rows.cuh"
#include "compression/products.cuh"

namespace nxs::compression {

using RedundancyParams = nxs_redundancy_params;
constexpr float kLog2OfE = 1.44269504f;

struct Retained {
  i32 key;       // -1: none
  float cosine;
};

struct RedundancyItem {
  u32 item, set, head;
  KeyPlaces places;
  u32 length;
  NXS_DEVICE RedundancyItem(const RedundancyParams& p, u32 index)
      : item(index),
        set(index / static_cast<u32>(p.heads)),
        head(index - set * static_cast<u32>(p.heads)),
        places(p.places, set, head),
        length(length_of(p, places, set, head)) {}
  template <typename T> NXS_DEVICE const T* keys(const RedundancyParams& p) const {
    return static_cast<const T*>(p.k) + set * p.k_stride_set + head * p.k_stride_head;
  }
  NXS_DEVICE const float* norms(const RedundancyParams& p) const {
    return p.inverse_norms + set * p.norms_stride_set + head * p.norms_stride_head;
  }
  NXS_DEVICE float* scores(const RedundancyParams& p) const {
    return p.scores + set * p.scores_stride_set + head * p.scores_stride_head;
  }
  NXS_DEVICE Retained* retained(const RedundancyParams& p) const {
    return static_cast<Retained*>(p.retained_or_null) + item * ((p.tokens + 1) / 2 * 2);
  }
};

constexpr u32 kAnchorThreads = 256, kAnchorWarps = kAnchorThreads / kWarpSize, kKeysAtOnce = 4;

// A thread's eight elements of the sum of the unit keys.
template <int kDim> struct Anchor {
  KeyRows<kDim> rows;
  float sum[8];
  NXS_DEVICE Anchor(const RedundancyParams& p, const RedundancyItem& of) {
    const float* from = p.unit_sum + of.set * p.sum_stride_set + of.head * p.sum_stride_head + rows.lane * 8;
#pragma unroll
    for (u32 d = 0; d < 8; ++d) sum[d] = rows.busy() ? load_global_nc(from + d) : 0.0f;
  }
  // For each key from `begin` to `end` that there is: each(j, its inverse norm, k[j] . sum, |k[j]|^2), in all lanes of its row. All
  // threads come.
  template <typename T, typename Each>
  NXS_DEVICE void walk(const RedundancyParams& p, const RedundancyItem& of, u32 begin, u32 end, const Each& each) const {
    constexpr u32 kStep = kAnchorWarps * KeyRows<kDim>::kRows;
    const T* k = of.keys<T>(p);
    const float* norms = of.norms(p);
    const u32 mine = thread_index() / kWarpSize * KeyRows<kDim>::kRows + rows.row;
    if (end > of.length) end = of.length;
    for (u32 first = begin; first < end; first += kStep * kKeysAtOnce) {
      Vec<T, 8> key[kKeysAtOnce];
      float norm[kKeysAtOnce];
#pragma unroll
      for (u32 i = 0; i < kKeysAtOnce; ++i) {
        const u32 j = first + i * kStep + mine, row = j < end ? j : end - 1;
        key[i] = rows.load(k + of.places(row) * p.k_stride_token);
        norm[i] = load_global_nc(norms + row);
      }
#pragma unroll
      for (u32 i = 0; i < kKeysAtOnce; ++i) {
        const u32 j = first + i * kStep + mine;
        float dot = 0, square = 0;
#pragma unroll
        for (u32 d = 0; d < 8; ++d) {
          const float x = to_f32(key[i].data[d]);
          dot = fma(x, sum[d], dot);
          square = fma(x, x, square);
        }
        dot = rows.total(dot);
        square = rows.total(square);
        if (j < end) each(j, norm[i], dot, square);
      }
    }
  }
};

// The sum over all threads of the block, in each of them; `shared`: a float for each warp, used once.
NXS_DEVICE float block_total(float value, u32 shared) {
#pragma unroll
  for (u32 bits = 1; bits < kWarpSize; bits *= 2) value += shuffle_xor(value, bits);
  if (thread_index() % kWarpSize == 0) store_shared(shared + thread_index() / kWarpSize * 4, value);
  block_sync();
  float all = 0;
  for (u32 w = 0; w < kAnchorWarps; ++w) all += load_shared<float>(shared + w * 4);
  return all;
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kAnchorThreads) redundancy_anchor_kernel(const __grid_constant__ RedundancyParams p) {
  const RedundancyItem of(p, block_index_y());
  const u32 begin = block_index_x() * static_cast<u32>(p.span), left = static_cast<u32>(p.tokens) - begin;
  const u32 end = begin + (left < static_cast<u32>(p.span) ? left : static_cast<u32>(p.span));
  const Anchor<kDim> anchor(p, of);
  const bool softmax = p.form == NXS_REDUNDANCY_SOFTMAX;
  float factor;
  if (softmax) {
    factor = divide(1.0f, static_cast<float>(of.length));
  } else {
    float square = 0;
#pragma unroll
    for (u32 d = 0; d < 8; ++d) square = fma(anchor.sum[d], anchor.sum[d], square);
    square = anchor.rows.total(square);
    factor = square == 0 ? 0.0f : divide(1.0f, square_root(square));
  }
  float* scores = of.scores(p);
  float sum = 0;
  anchor.template walk<T>(p, of, begin, end, [&](u32 j, float norm, float dot, float) {
    const float c = dot * norm * factor;
    const float score = softmax ? exp2_approx(c * kLog2OfE) : c;
    if (anchor.rows.lane == 0) {
      store_global(scores + j, score);
      sum += score;
    }
  });
  for (u32 j = begin + thread_index(); j < end; j += kAnchorThreads)
    if (j >= of.length) store_global(scores + j, 0.0f);
  if (!softmax) return;
  sum = block_total(sum, dynamic_shared());
  if (thread_index() == 0)
    store_global(p.parts_or_null + static_cast<i64>(of.item) * grid_size_x() + block_index_x(), sum);
}

// ---- similar

constexpr u32 kPairWarps = 4, kPairThreads = kPairWarps * kWarpSize, kPairRows = kPairWarps * kWarpKeys, kPairKeys = 64;

template <typename T, int kDim>
__global__ void __launch_bounds__(kPairThreads) redundancy_neighbours_kernel(const __grid_constant__ RedundancyParams p) {
  using Tile = VectorTile<kDim>;
  constexpr u32 kTileBytes = kPairKeys * Tile::kRowBytes, kNorms = 2 * kTileBytes, kDone = kNorms + 2 * kPairKeys * 4;
  const RedundancyItem of(p, block_index_y());
  const u32 length = of.length, row_begin = block_index_x() * kPairRows;
  if (row_begin >= length) return;
  const u32 shared = dynamic_shared(), lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize;
  const T* k = of.keys<T>(p);
  const float* norms = of.norms(p);

  const auto copy_tile = [&](u32 buffer, u32 first) {
    constexpr u32 kLanes = kDim == 96 ? 4 : Tile::kPieces, kStep = kPairThreads / kLanes;
    const u32 piece = thread_index() % kLanes, to = shared + buffer * kTileBytes;
    for (u32 row = thread_index() / kLanes; row < kPairKeys; row += kStep) {
      const bool exists = first + row < length;
      const T* from = exists ? k + of.places(first + row) * p.k_stride_token + piece * 8 : k;
#pragma unroll
      for (u32 i = 0; i < Tile::kPieces / kLanes; ++i)
        copy_async<16>(to + Tile::piece_at(row, piece + i * kLanes), exists ? from + i * kLanes * 8 : from, exists ? 16 : 0);
    }
    if (thread_index() < kPairKeys) {
      const bool exists = first + thread_index() < length;
      copy_async<4>(shared + kNorms + (buffer * kPairKeys + thread_index()) * 4, exists ? norms + first + thread_index() : norms,
                    exists ? 4 : 0);
    }
    copy_async_commit();
  };

  // Slots are the thread's rows: 8 slot + lane / 4 of its warp's.
  u32 nth = static_cast<u32>(p.nth);
  if (p.nth_of_length) {
    u32 some = static_cast<u32>(static_cast<float>(length) * p.ratio);
    some = some < 1 ? 1 : some > length ? length : some;
    nth = length - some + 1;
  }
  const u32 tiles = nth == 0 ? 1 : (length + kPairKeys - 1) / kPairKeys;
  u32 left[4], open = 0;  // hits still to come; a bit for each slot that is not done
  i32 found[4] = {-1, -1, -1, -1};
  float cosine[4] = {}, to_first[4] = {}, norm[4];
#pragma unroll
  for (u32 slot = 0; slot < 4; ++slot) {
    const u32 i = row_begin + warp * kWarpKeys + slot * 8 + lane / 4;
    left[slot] = nth;
    if (i < length) open |= 1u << slot;
    norm[slot] = i < length ? load_global_nc(norms + i) : 0.0f;
  }
  const u32 base = row_begin + warp * kWarpKeys;
  Keys<T, kDim> keys;
  copy_tile(0, (p.first ? 0 : tiles - 1) * kPairKeys);
  keys.load(k, p.k_stride_token, base, length - 1, of.places);
  const VectorTile<kDim> tile(lane);
  for (u32 n = 0; n < tiles; ++n) {
    const u32 buffer = n & 1, first = (p.first ? n : tiles - 1 - n) * kPairKeys;
    copy_async_wait<0>();
    block_sync();
    if (n > 0) {
      // What the warps said after the tile before; two places, for a warp ahead writes the other.
      bool all = true;
      for (u32 w = 0; w < kPairWarps; ++w) all = all && load_shared<u32>(shared + kDone + (buffer * kPairWarps + w) * 4) != 0;
      if (all) break;
    }
    if (n + 1 < tiles) copy_tile(buffer ^ 1, (p.first ? n + 1 : tiles - 2 - n) * kPairKeys);
    if (warp_any(open != 0)) {
#pragma unroll 1
      for (u32 step = 0; step < kPairKeys / 8; ++step) {
        const u32 e = p.first ? step : kPairKeys / 8 - 1 - step, column = first + e * 8;
        float x[2][4];
        keys.multiply(x, tile, shared + buffer * kTileBytes + e * 8 * Tile::kRowBytes);
        const auto other = load_shared<Vec<float, 2>>(shared + kNorms + (buffer * kPairKeys + e * 8 + lane % 4 * 2) * 4);
        u32 hits = 0;
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
          const u32 slot = i / 2, c = i % 2;
          float& it = x[slot / 2][slot % 2 * 2 + c];
          it *= norm[slot] * other.data[c];
          const bool itself = base + slot * 8 + lane / 4 == column + lane % 4 * 2 + c;
          if (it > p.threshold && !itself) hits |= 1u << (8 * slot + lane % 4 * 2 + c);
          if (column == 0 && lane % 4 == 0 && c == 0) to_first[slot] = itself ? 0.0f : it;
        }
        if (nth == 0 || !warp_any(hits != 0)) continue;
        hits |= shuffle_xor(hits, 1);
        hits |= shuffle_xor(hits, 2);
#pragma unroll
        for (u32 slot = 0; slot < 4; ++slot) {
          u32 of_row = hits >> (8 * slot) & 255;
          const u32 count = population_count(of_row);
          if (!(open >> slot & 1) || count == 0) continue;
          if (left[slot] > count) {
            left[slot] -= count;
            continue;
          }
          u32 bit = 0;
          if (p.first) {
            bit = 31 - leading_zeros(of_row & (~of_row + 1));
          } else {
            for (u32 skip = left[slot] - 1; skip > 0; --skip) of_row &= ~(0x80000000u >> leading_zeros(of_row));
            bit = 31 - leading_zeros(of_row);
          }
          open &= ~(1u << slot);
          found[slot] = static_cast<i32>(column + bit);
          if (bit / 2 == lane % 4) cosine[slot] = bit & 1 ? x[slot / 2][slot % 2 * 2 + 1] : x[slot / 2][slot % 2 * 2];
        }
      }
    }
    const bool any = warp_any(open != 0);
    if (lane == 0) store_shared(shared + kDone + ((buffer ^ 1) * kPairWarps + warp) * 4, any ? 0u : 1u);
  }
  Retained* to = of.retained(p);
#pragma unroll
  for (u32 slot = 0; slot < 4; ++slot) {
    const u32 i = base + slot * 8 + lane / 4;
    if (i >= length) continue;
    const bool none = found[slot] < 0;
    // The lane that has the cosine.
    const u32 owner = none ? 0 : static_cast<u32>(found[slot]) % 8 / 2;
    if (lane % 4 != owner) continue;
    const Retained it = none ? Retained{p.lonely ? 0 : -1, p.lonely ? to_first[slot] : 0.0f} : Retained{found[slot], cosine[slot]};
    store_global(to + i, it);
  }
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kAnchorThreads) redundancy_similar_kernel(const __grid_constant__ RedundancyParams p) {
  constexpr float kUnit = 131072.0f;
  const RedundancyItem of(p, block_index_x());
  const u32 length = of.length, shared = dynamic_shared(), scratch = shared + static_cast<u32>(p.tokens) * 8;
  const u32 of_sum = shared, of_taken = shared + static_cast<u32>(p.tokens) * 4;
  for (u32 j = thread_index(); j < length; j += kAnchorThreads) store_shared(of_taken + j * 4, 0u);
  block_sync();
  const Anchor<kDim> anchor(p, of);
  anchor.template walk<T>(p, of, 0, length, [&](u32 j, float norm, float dot, float square) {
    if (anchor.rows.lane == 0) store_shared(of_sum + j * 4, fma(-square * norm, norm, dot * norm));
  });
  // Most that retain nothing retain key 0: these are added up first.
  i32 of_first = 0;
  const Retained* retained = of.retained(p);
  for (u32 i = thread_index(); i < length; i += kAnchorThreads) {
    const Retained it = load_global_nc(retained + i);
    const float scaled = it.cosine * kUnit;
    const i32 taken = scaled == scaled ? static_cast<i32>(scaled + (scaled < 0 ? -0.5f : 0.5f)) : 0;
    if (it.key == 0)
      of_first += taken;
    else if (it.key > 0)
      atomic_add_shared(of_taken + static_cast<u32>(it.key) * 4, static_cast<u32>(taken));
  }
  of_first = static_cast<i32>(warp_reduce_add(static_cast<u32>(of_first)));
  if (length > 0 && thread_index() % kWarpSize == 0) atomic_add_shared(of_taken, static_cast<u32>(of_first));
  block_sync();
  const float factor = divide(1.0f, static_cast<float>(length));
  float sum = 0;
  for (u32 j = thread_index(); j < length; j += kAnchorThreads) {
    const float taken = static_cast<float>(static_cast<i32>(load_shared<u32>(of_taken + j * 4))) * (1.0f / kUnit);
    const float e = exp2_approx((load_shared<float>(of_sum + j * 4) - taken) * (factor * kLog2OfE));
    store_shared(of_sum + j * 4, e);
    sum += e;
  }
  sum = block_total(sum, scratch);
  float* scores = of.scores(p);
  for (u32 j = thread_index(); j < static_cast<u32>(p.tokens); j += kAnchorThreads)
    store_global(scores + j, j < length ? divide(load_shared<float>(of_sum + j * 4), sum) : 0.0f);
}

// ---- host

template <typename T, int kDim> nxs_status redundancy_launch(const RedundancyParams& p, void* stream) {
  const u32 items = static_cast<u32>(p.sets * p.heads), tokens = static_cast<u32>(p.tokens);
  LaunchShape shape;
  if (p.form != NXS_REDUNDANCY_SIMILAR) {
    shape.grid = dim3((tokens + static_cast<u32>(p.span) - 1) / static_cast<u32>(p.span), items);
    shape.block = kAnchorThreads;
    shape.dynamic_smem = kAnchorWarps * 4;
    return launch(redundancy_anchor_kernel<T, kDim>, shape, stream, p);
  }
  shape.grid = dim3((tokens + kPairRows - 1) / kPairRows, items);
  shape.block = kPairThreads;
  shape.dynamic_smem = 2 * kPairKeys * (VectorTile<kDim>::kRowBytes + 4) + 2 * kPairWarps * 4;
  NXS_TRY(launch(redundancy_neighbours_kernel<T, kDim>, shape, stream, p));
  shape.grid = dim3(items);
  shape.block = kAnchorThreads;
  shape.dynamic_smem = tokens * 8 + kAnchorWarps * 4;
  NXS_TRY(allow_dynamic_smem(redundancy_similar_kernel<T, kDim>));
  return launch(redundancy_similar_kernel<T, kDim>, shape, stream, p);
}

template <typename T> nxs_status redundancy(const RedundancyParams& p, void* stream);

}  // namespace nxs::compression
