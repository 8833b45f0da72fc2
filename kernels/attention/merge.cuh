// Merge: out[b, r, h, :] = round(sum_i w_i parts[i, b, r, h, :] / sum_i w_i), w_i = exp(lse[i, b, h, r] - max_i lse),
// and    out_lse[b, h, r] = max + ln(sum_i w_i).
//
// Layouts    parts [parts, batch, rows, heads, dim], lse [parts, batch, heads, rows], out [batch, rows, heads, dim],
//            out_lse [batch, heads, rows]; strides of all but the last dimension of parts and out. Dtypes and bounds
//            are described in nextscale.h.
// Who does what
//            A row of `dim` elements is cut into chunks of kVec elements: 16 bytes of parts, or one element.
//            2^log2_lanes threads of a warp share a row, one chunk each, and walk its chunks if they are more; a block
//            of 128 threads owns 128 >> log2_lanes rows, heads innermost. Every thread reads the row's lse itself (one
//            address a row). kGroup parts are in flight at a time, their chunks beside their lse: with up to kGroup
//            parts nothing waits for the maximum. A part beyond the last is the last one again, without weight, so that
//            loads need no predicates. With more parts the lse are read twice: for the maximum, then for the weights.
//            Schedule in src/attention/merge/plan.rs walks the same cells.
// Bytes      batch * rows * heads * (parts * (dim * sizeof(parts) + 4) + dim * sizeof(out) + 4), each once; parts whose
//            lse is -inf are read all the same.
// FLOPs      2 a part and element, one exponential a part, row and thread.
// Determinism bitwise: parts are added in ascending order, and nothing depends on the batch.
// Limits     parts <= 256, dim <= 1024, batch * rows * heads < 2^31.
#pragma once
#include "common/chunk.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/math.cuh"

namespace nxs::attention {

constexpr int kMergeThreads = 128;
constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

// kGroup parts of one chunk.
template <typename P, int kVec, int kGroup> struct MergeGroup {
  float lse[kGroup];
  Vec<P, kVec> value[kGroup];
};

// The lse of parts [first, first + kGroup). Beyond the last part it is that of the last, which changes no maximum.
template <int kGroup> NXS_DEVICE void load_lse(const nxs_attention_merge_params& p, const float* from, i32 first,
                                               float (&lse)[kGroup]) {
  const i32 last = p.parts_count - 1;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    const i32 i = first + j < last ? first + j : last;
    lse[j] = load_global_nc(from + i * p.lse_stride_part);
  }
}

template <typename P, int kVec, int kGroup>
NXS_DEVICE void load_group(const nxs_attention_merge_params& p, const P* parts, const float* lse, i32 first,
                           MergeGroup<P, kVec, kGroup>& group) {
  const i32 last = p.parts_count - 1;
  load_lse(p, lse, first, group.lse);
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    const i32 i = first + j < last ? first + j : last;
    group.value[j] = load_chunk_nc<P, kVec>(parts + i * p.parts_stride_part);
  }
}

template <int kGroup> NXS_DEVICE float greatest(float top, const float (&lse)[kGroup]) {
#pragma unroll
  for (int j = 0; j < kGroup; ++j) top = lse[j] > top ? lse[j] : top;
  return top;
}

// Adds one part to the sums, if there is such a part. -inf adds nothing, whatever the part holds.
template <typename P, int kVec>
NXS_DEVICE void add_part(bool is_part, float lse, float top, const Vec<P, kVec>& value, float& total,
                         float (&sum)[kVec]) {
  if (!is_part || lse == -INFINITY) return;
  const float weight = exp2_approx((lse - top) * kLog2E);
  total += weight;
#pragma unroll
  for (int k = 0; k < kVec; ++k) sum[k] = fma(weight, to_f32(value.data[k]), sum[k]);
}

// Blocks a multiprocessor: as many as leave each the registers that it needs without a spill.
template <int kVec, int kGroup>
constexpr int kMergeBlocks = kGroup == 8 ? 5 : kGroup == 4 ? (kVec == 8 ? 6 : 8) : (kVec == 8 ? 8 : 10);

// 1 / x for x from 1 on: one Newton step makes it exact for 1, and within an ulp.
NXS_DEVICE float reciprocal(float x) {
  const float guess = reciprocal_approx(x);
  return fma(guess, fma(-x, guess, 1.0f), guess);
}

template <typename P, typename O, int kVec, int kGroup>
__global__ void __launch_bounds__(kMergeThreads, kMergeBlocks<kVec, kGroup>)
    merge_kernel(const __grid_constant__ nxs_attention_merge_params p) {
  if (p.gate_or_null && load_global_nc(p.gate_or_null) != p.gate) return;
  const u32 log2_lanes = static_cast<u32>(p.log2_lanes), lane = thread_index() & ((1u << log2_lanes) - 1);
  const u32 heads = static_cast<u32>(p.heads), rows = static_cast<u32>(p.rows);
  const u32 item = block_index_x() * (kMergeThreads >> log2_lanes) + (thread_index() >> log2_lanes);
  const bool inside = item < static_cast<u32>(p.batch) * rows * heads;
  const u32 row_of_all = item / heads, head = item - row_of_all * heads;
  const u32 batch = p.batch == 1 ? 0 : row_of_all / rows, row = row_of_all - batch * rows;
  float* out_lse = p.out_lse_or_null ? p.out_lse_or_null + batch * p.out_lse_stride_batch +
                                           head * p.out_lse_stride_head + row * p.out_lse_stride_row
                                     : nullptr;
  float before = -INFINITY;
  if (p.accumulate) {
    if (inside) before = load_global(out_lse);
    // One lane of the row writes it: not before all have read it.
    warp_sync();
  }
  if (!inside) return;

  const float* lse = p.lse + batch * p.lse_stride_batch + head * p.lse_stride_head + row * p.lse_stride_row;
  const P* parts = static_cast<const P*>(p.parts) + batch * p.parts_stride_batch + row * p.parts_stride_row +
                   head * p.parts_stride_head;
  O* out = static_cast<O*>(p.out) + batch * p.out_stride_batch + row * p.out_stride_row + head * p.out_stride_head;
  float top = 0, total = 0;
  for (i32 d = static_cast<i32>(lane) * kVec; d < p.dim; d += kVec << log2_lanes) {
    MergeGroup<P, kVec, kGroup> group;
    load_group(p, parts + d, lse, 0, group);
    total = 0;
    float sum[kVec] = {};
    Vec<O, kVec> old;
    if (p.accumulate) old = load_chunk<O, kVec>(out + d);
    top = greatest(before, group.lse);
#pragma unroll 1
    for (i32 first = kGroup; first < p.parts_count; first += kGroup) {
      float more[kGroup];
      load_lse(p, lse, first, more);
      top = greatest(top, more);
    }

    add_part(p.accumulate, before, top, old, total, sum);
#pragma unroll 1
    for (i32 first = 0;;) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        add_part(first + j < p.parts_count, group.lse[j], top, group.value[j], total, sum);
      first += kGroup;
      if (first >= p.parts_count) break;
      load_group(p, parts + d, lse, first, group);
    }

    const float scale = total == 0 ? 0 : reciprocal(total);
#pragma unroll
    for (int k = 0; k < kVec; ++k) sum[k] *= scale;
    store_chunk<false>(out + d, sum);
  }
  // Lane 0 has a chunk, whatever dim is.
  if (out_lse && lane == 0) store_global(out_lse, total == 0 ? -INFINITY : fma(log2_approx(total), kLn2, top));
}

template <typename P, typename O, int kVec, int kGroup>
nxs_status merge_launch_at(const nxs_attention_merge_params& p, void* stream) {
  const i64 rows_a_block = kMergeThreads >> p.log2_lanes, rows = p.batch * p.rows * p.heads;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((rows + rows_a_block - 1) / rows_a_block));
  shape.block = kMergeThreads;
  return launch(merge_kernel<P, O, kVec, kGroup>, shape, stream, p);
}

template <typename P, typename O> nxs_status merge_launch(const nxs_attention_merge_params& p, void* stream) {
  constexpr int kVec = 16 / sizeof(P);
  if (!p.vector) return merge_launch_at<P, O, 1, 4>(p, stream);
  if (p.parts_count <= 2) return merge_launch_at<P, O, kVec, 2>(p, stream);
  if (p.parts_count <= 4) return merge_launch_at<P, O, kVec, 4>(p, stream);
  return merge_launch_at<P, O, kVec, 8>(p, stream);
}

// One instantiation file per dtype of the parts (merge_<dtype>.cu) picks the output's.
template <typename P> nxs_status merge_parts(const nxs_attention_merge_params& p, void* stream);

template <typename P> nxs_status merge_for_out(const nxs_attention_merge_params& p, void* stream) {
  switch (p.out_dtype) {
    case NXS_F32: return merge_launch<P, float>(p, stream);
    case NXS_F16: return merge_launch<P, f16>(p, stream);
    case NXS_BF16: return merge_launch<P, bf16>(p, stream);
    default: return NXS_E_DTYPE;
  }
}

}  // namespace nxs::attention
