// Prepare: norm, rotary position embedding and cache append of queries, keys and values, in one pass over them.
//
// Layouts    in [batch, rows, heads, dim] and out [batch, out_rows, heads, dim] of three tensors, strided but for dim;
//            cos and sin [table_rows, columns]. The formula, dtypes and flags are described in nextscale.h.
// Who does what
//            A row is one head of one token: `dim` elements, cut into chunks of kVec (16 bytes of input, or one
//            element). A thread owns pairs of chunks (pair_at): two that rotate together, or any two. So rotating needs
//            no shuffles; the norm sums over the 2^log2_lanes threads of the row by shuffles. kRows heads of one token
//            go through a thread together: their loads are in flight at once, and the token's cos and sin are loaded
//            once for them. A block of 128 threads works on one tensor: the blocks of the queries come first, then
//            those of the keys, then those of the values, so that tensors, strides and dtypes are uniform. Output
//            dtypes are told apart at the store. Schedule in src/attention/prepare/plan.rs walks the same cells.
// Bytes      each element read once and written once; cos and sin come from L1 and L2.
// FLOPs      about 10 an element.
// Determinism bitwise: the order of additions depends on dim and dtype only. Without a norm the host gives the same
//            bits.
// Limits     dim <= 256, batch * rows * heads < 2^31 for each tensor.
#pragma once
#include "common/chunk.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/math.cuh"
#include "common/ptx/warp.cuh"

namespace nxs::attention {

constexpr int kPrepareThreads = 128;

enum class Rope { kNone, kInterleaved, kInterleavedFull, kHalf, kHalfFull };
template <Rope kRope> constexpr bool kIsHalf = kRope == Rope::kHalf || kRope == Rope::kHalfFull;
// Every element has its own angle.
template <Rope kRope> constexpr bool kIsFull = kRope == Rope::kInterleavedFull || kRope == Rope::kHalfFull;

// Heads of a token that a thread takes together, and pairs of chunks of each that it owns.
template <int kVec> constexpr int kRows = kVec > 1 ? 2 : 1;
template <int kVec> constexpr int kPairs = kVec > 1 ? 1 : 4;
// Blocks a multiprocessor: as many as leave each the registers that it needs without a spill.
template <int kVec, Rope kRope> constexpr int kPrepareBlocks = kVec == 8 && kIsFull<kRope> ? 5 : 6;
// Whether the two chunks of a pair rotate together; otherwise each within itself.
template <int kVec, Rope kRope> constexpr bool kTogether = kIsHalf<kRope> || (kRope != Rope::kNone && kVec == 1);

// Two chunks of a row: where they begin, and whether there are such chunks. A chunk that is not there stands at 0.
struct Pair {
  u32 at[2];
  bool there[2];
  bool rotates[2];
  u32 column[2];  // of cos and sin
};

// Chunks [begin, begin + others), none of which rotates with another: in two halves, so that neighbouring lanes reach
// neighbouring chunks.
template <int kVec> NXS_DEVICE Pair pair_of_others(u32 begin, u32 others, u32 index) {
  const u32 span = (others + 1) / 2;
  Pair pair;
  pair.there[0] = index < span;
  pair.there[1] = index < span && index + span < others;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    pair.at[s] = pair.there[s] ? (begin + index + s * span) * kVec : 0;
    pair.rotates[s] = false;
    pair.column[s] = 0;
  }
  return pair;
}

template <int kVec, Rope kRope> NXS_DEVICE Pair pair_at(const nxs_attention_prepare_params& p, u32 index) {
  const u32 chunks = static_cast<u32>(p.dim) / kVec;
  if constexpr (kRope == Rope::kNone) {
    return pair_of_others<kVec>(0, chunks, index);
  } else if constexpr (!kTogether<kVec, kRope>) {
    Pair pair = pair_of_others<kVec>(0, chunks, index);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      pair.rotates[s] = pair.there[s] && pair.at[s] < static_cast<u32>(p.rotary_dim);
      pair.column[s] = kIsFull<kRope> ? pair.at[s] : pair.at[s] / 2;
    }
    return pair;
  } else {
    const u32 rotary = static_cast<u32>(p.rotary_dim), together = rotary / (2 * kVec);
    if (index >= together) return pair_of_others<kVec>(2 * together, chunks - 2 * together, index - together);
    Pair pair;
    pair.column[0] = pair.column[1] = index * kVec;
    if constexpr (kIsHalf<kRope>) {
      const u32 block = static_cast<u32>(p.rope_block), half = block / 2;
      const u32 of_block = block == rotary ? 0 : index / (half / kVec);
      pair.at[0] = index * kVec + of_block * half;
      pair.at[1] = pair.at[0] + half;
    } else {
      pair.at[0] = 2 * index;
      pair.at[1] = 2 * index + 1;
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      pair.there[s] = pair.rotates[s] = true;
      if (kIsFull<kRope>) pair.column[s] = pair.at[s];
    }
    return pair;
  }
}

// The cosines and sines of the elements of a pair of chunks.
template <int kVec> struct Angles {
  float cos[2][kVec], sin[2][kVec];
};

template <int kVec, Rope kRope>
NXS_DEVICE void load_angles(const nxs_attention_prepare_params& p, i64 row, const Pair& pair, Angles<kVec>& angles) {
  const float* cos = p.cos_or_null + row * p.table_stride_row;
  const float* sin = p.sin_or_null + row * p.table_stride_row;
  if constexpr (kIsFull<kRope>) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const auto c = load_chunk_nc<float, kVec>(cos + pair.column[s]);
      const auto n = load_chunk_nc<float, kVec>(sin + pair.column[s]);
#pragma unroll
      for (int k = 0; k < kVec; ++k) angles.cos[s][k] = c.data[k], angles.sin[s][k] = n.data[k];
    }
  } else if constexpr (kTogether<kVec, kRope>) {
    const auto c = load_chunk_nc<float, kVec>(cos + pair.column[0]);
    const auto n = load_chunk_nc<float, kVec>(sin + pair.column[0]);
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int k = 0; k < kVec; ++k) angles.cos[s][k] = c.data[k], angles.sin[s][k] = n.data[k];
  } else if constexpr (kVec > 1) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      // A chunk that does not rotate may have no columns.
      const u32 column = pair.rotates[s] ? pair.column[s] : 0;
      const auto c = load_chunk_nc<float, kVec / 2>(cos + column), n = load_chunk_nc<float, kVec / 2>(sin + column);
#pragma unroll
      for (int k = 0; k < kVec; ++k) angles.cos[s][k] = c.data[k / 2], angles.sin[s][k] = n.data[k / 2];
    }
  }
}

// One product is rounded, the other goes into the sum unrounded: the same on the host.
NXS_DEVICE void rotate(float& a, float& b, float cos_a, float sin_a, float cos_b, float sin_b) {
  const float x = a, y = b;
  a = fma(x, cos_a, -(y * sin_a));
  b = fma(y, cos_b, x * sin_b);
}

template <int kVec, Rope kRope>
NXS_DEVICE void rotate_pair(const Pair& pair, const Angles<kVec>& angles, float (&x)[2][kVec]) {
  if constexpr (kTogether<kVec, kRope>) {
    if (pair.rotates[0])
#pragma unroll
      for (int k = 0; k < kVec; ++k)
        rotate(x[0][k], x[1][k], angles.cos[0][k], angles.sin[0][k], angles.cos[1][k], angles.sin[1][k]);
  } else if constexpr (kVec > 1) {
#pragma unroll
    for (int s = 0; s < 2; ++s)
      if (pair.rotates[s])
#pragma unroll
        for (int k = 0; k < kVec; k += 2)
          rotate(x[s][k], x[s][k + 1], angles.cos[s][k], angles.sin[s][k], angles.cos[s][k + 1], angles.sin[s][k + 1]);
  }
}

template <int kVec> NXS_DEVICE void store_as(nxs_dtype dtype, void* out, i64 at, const float (&x)[kVec]) {
  switch (dtype) {
    case NXS_F32: return store_chunk<false>(static_cast<float*>(out) + at, x);
    case NXS_F16: return store_chunk<false>(static_cast<f16*>(out) + at, x);
    default: return store_chunk<false>(static_cast<bf16*>(out) + at, x);
  }
}

template <int kVec> __host__ NXS_DEVICE u32 prepare_groups(const nxs_attention_prepare_tensor& t) {
  return (static_cast<u32>(t.heads) + kRows<kVec> - 1) / kRows<kVec>;
}
// Blocks of a tensor. `tokens`: rows of the whole batch.
template <int kVec>
__host__ NXS_DEVICE u32 prepare_blocks(const nxs_attention_prepare_params& p, const nxs_attention_prepare_tensor& t) {
  const u32 groups_a_block = kPrepareThreads >> p.log2_lanes;
  const u32 groups = static_cast<u32>(p.batch) * static_cast<u32>(p.rows) * prepare_groups<kVec>(t);
  return (groups + groups_a_block - 1) / groups_a_block;
}

template <typename I, int kVec, Rope kRope>
__global__ void __launch_bounds__(kPrepareThreads, kPrepareBlocks<kVec, kRope>)
    prepare_kernel(const __grid_constant__ nxs_attention_prepare_params p) {
  constexpr int kHeads = kRows<kVec>, kOwned = kPairs<kVec>;
  u32 block = block_index_x(), which = 0;
  for (; which < 2; ++which) {
    const u32 blocks = prepare_blocks<kVec>(p, p.tensor[which]);
    if (block < blocks) break;
    block -= blocks;
  }
  const nxs_attention_prepare_tensor& t = p.tensor[which];

  const u32 log2_lanes = static_cast<u32>(p.log2_lanes), lanes = 1u << log2_lanes, lane = thread_index() & (lanes - 1);
  const u32 rows = static_cast<u32>(p.rows), groups = prepare_groups<kVec>(t);
  const u32 all = static_cast<u32>(p.batch) * rows * groups;
  const u32 mine = block * (kPrepareThreads >> log2_lanes) + (thread_index() >> log2_lanes);
  // Warps beyond the end are done. Threads beyond it do as the last ones do, so that shuffles stay whole; they store
  // nothing.
  if (mine - (thread_index() % kWarpSize >> log2_lanes) >= all) return;
  const bool inside = mine < all;
  const u32 item = inside ? mine : all - 1, token = item / groups, group = item - token * groups;
  const u32 batch = p.batch == 1 ? 0 : token / rows, row = token - batch * rows;

  u32 head[kHeads];
  const I* in[kHeads];
#pragma unroll
  for (int j = 0; j < kHeads; ++j) {
    const u32 wanted = group * kHeads + j;
    head[j] = wanted < static_cast<u32>(t.heads) ? wanted : t.heads - 1;
    in[j] = static_cast<const I*>(t.input) + batch * t.input_stride_batch + row * t.input_stride_row +
            head[j] * t.input_stride_head;
  }
  Pair pair[kOwned];
  Vec<I, kVec> chunk[kHeads][kOwned][2];
#pragma unroll
  for (int o = 0; o < kOwned; ++o) {
    pair[o] = pair_at<kVec, kRope>(p, lane + o * lanes);
#pragma unroll
    for (int j = 0; j < kHeads; ++j)
#pragma unroll
      for (int s = 0; s < 2; ++s) chunk[j][o][s] = load_chunk_nc<I, kVec>(in[j] + pair[o].at[s]);
  }

  const i64 append = p.append_at_or_null ? load_global_nc(p.append_at_or_null + batch) : p.append_at;
  u32 flags = 0;
  Angles<kVec> angles[kOwned];
  const bool rotated = kRope != Rope::kNone && t.rotate;
  if (rotated) {
    i64 position = (p.position_at_append ? append : p.position) + row;
    if (p.positions_or_null)
      position = load_global_nc(p.positions_or_null + batch * p.positions_stride_batch + row * p.positions_stride_row);
    const i64 near = position < 0 ? 0 : position < p.table_rows ? position : p.table_rows - 1;
    if (near != position) flags = NXS_FLAG_POSITION_CLAMPED;
#pragma unroll
    for (int o = 0; o < kOwned; ++o)
      if (pair[o].rotates[0] || pair[o].rotates[1]) load_angles<kVec, kRope>(p, near, pair[o], angles[o]);
  }
  const i64 to = t.append ? append + row : row;
  const bool fits = !t.append || (to >= 0 && to < t.out_rows);
  if (!fits) flags |= NXS_FLAG_APPEND_SKIPPED;
  if (flags && inside && lane == 0 && p.flags_or_null) atomic_or_global(p.flags_or_null, flags);

  float factor[kHeads], scale[kHeads];
#pragma unroll
  for (int j = 0; j < kHeads; ++j) {
    factor[j] = t.head_scale_or_null ? load_global_nc(t.head_scale_or_null + head[j]) : 1;
    scale[j] = 1;
  }
  if (t.norm != NXS_NORM_NONE) {
    float sum[kHeads] = {};
#pragma unroll
    for (int j = 0; j < kHeads; ++j)
#pragma unroll
      for (int o = 0; o < kOwned; ++o)
#pragma unroll
        for (int s = 0; s < 2; ++s)
#pragma unroll
          for (int k = 0; k < kVec; ++k) {
            const float x = pair[o].there[s] ? to_f32(chunk[j][o][s].data[k]) : 0;
            sum[j] = fma(x, x, sum[j]);
          }
#pragma unroll 1
    for (u32 bit = lanes >> 1; bit > 0; bit >>= 1)
#pragma unroll
      for (int j = 0; j < kHeads; ++j) sum[j] += shuffle_xor(sum[j], bit);
#pragma unroll
    for (int j = 0; j < kHeads; ++j) {
      const float least = t.norm_eps * t.norm_eps;
      scale[j] = rsqrt_approx(t.norm == NXS_NORM_RMS
                                  ? fma(sum[j], reciprocal_approx(static_cast<float>(p.dim)), t.norm_eps)
                                  : sum[j] < least ? least : sum[j]);
    }
  }
  if (!inside || !fits) return;
#pragma unroll
  for (int j = 0; j < kHeads; ++j) scale[j] *= factor[j];

#pragma unroll
  for (int o = 0; o < kOwned; ++o)
#pragma unroll
    for (int j = 0; j < kHeads; ++j) {
      float x[2][kVec];
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int k = 0; k < kVec; ++k) x[s][k] = to_f32(chunk[j][o][s].data[k]) * scale[j];
      if (t.weight_or_null)
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const auto weight = load_chunk_nc<float, kVec>(t.weight_or_null + pair[o].at[s]);
#pragma unroll
          for (int k = 0; k < kVec; ++k) x[s][k] *= weight.data[k];
        }
      if (rotated) rotate_pair<kVec, kRope>(pair[o], angles[o], x);
      const i64 out = batch * t.out_stride_batch + to * t.out_stride_row + head[j] * t.out_stride_head;
      if (group * kHeads + j < static_cast<u32>(t.heads))
#pragma unroll
        for (int s = 0; s < 2; ++s)
          if (pair[o].there[s]) store_as<kVec>(t.out_dtype, t.out, out + pair[o].at[s], x[s]);
    }
}

template <typename I, int kVec> nxs_status prepare_launch(const nxs_attention_prepare_params& p, void* stream) {
  i64 blocks = 0;
  for (const nxs_attention_prepare_tensor& t : p.tensor) blocks += prepare_blocks<kVec>(p, t);
  NXS_REQUIRE(blocks <= INT32_MAX, NXS_E_SHAPE);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(blocks));
  shape.block = kPrepareThreads;
  switch (p.rope) {
    case NXS_ROPE_NONE: return launch(prepare_kernel<I, kVec, Rope::kNone>, shape, stream, p);
    case NXS_ROPE_INTERLEAVED:
      return p.table_full ? launch(prepare_kernel<I, kVec, Rope::kInterleavedFull>, shape, stream, p)
                          : launch(prepare_kernel<I, kVec, Rope::kInterleaved>, shape, stream, p);
    default:
      return p.table_full ? launch(prepare_kernel<I, kVec, Rope::kHalfFull>, shape, stream, p)
                          : launch(prepare_kernel<I, kVec, Rope::kHalf>, shape, stream, p);
  }
}

// One instantiation file per dtype of the input (prepare_<dtype>.cu).
template <typename I> nxs_status prepare(const nxs_attention_prepare_params& p, void* stream);

template <typename I> nxs_status prepare_for_access(const nxs_attention_prepare_params& p, void* stream) {
  return p.vector ? prepare_launch<I, 16 / sizeof(I)>(p, stream) : prepare_launch<I, 1>(p, stream);
}

}  // namespace nxs::attention
