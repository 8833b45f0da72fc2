// Draft sampling: tokens of each row, each by three uniforms, and what a verifier has to know of the row.
//
// Distinct drafts are drawn one after the other, each from what the ones before it left: what is drawn is taken out of
// its chunk's partial, which is summed again without it, so that nothing is lost to cancellation. That is the law which
// recursive rejection without replacement takes siblings to have. A row with all weight on one token gives its greatest
// logits in turn.
//
// Who does what  A persistent grid of blocks of 8 warps. An item is chunks_per_item chunks of a row; block i takes items i,
//                i + blocks, ... A warp writes the partials of its chunks, then the block arrives at the row's counter.
//                The last block to come, whichever it is, has all partials of the row; its first warp draws the tokens.
// Bytes          rows * vocab * sizeof(dtype), once; the chunks of the tokens again; 8 a chunk written and read.
// Determinism    bitwise: partials do not depend on who makes them, and one block reads them in order.
#include "common/check.h"
#include "common/ptx/atomic.cuh"
#include "common/ptx/launch.cuh"
#include "verification/sample.cuh"

namespace nxs::verification {

template <typename T> NXS_DEVICE Row<T> row_of(const nxs_draft_sample_params& p, u32 r) {
  return Row<T>{static_cast<const T*>(p.logits) + r * p.stride_row, nullptr, static_cast<u32>(p.vocab)};
}
NXS_DEVICE Scale scale_of_row(const nxs_draft_sample_params& p, u32 r) {
  return scale_of(p.temperature_or_null ? load_global_nc(p.temperature_or_null + r) : 1.0f);
}
NXS_DEVICE Partial* partials_of(const nxs_draft_sample_params& p, u32 r) {
  return static_cast<Partial*>(p.workspace) + static_cast<u64>(r) * chunks_of(static_cast<u32>(p.vocab));
}

// The columns that a row's drafts are so far, draft i's in lane i; the first `count`.
struct Taken {
  u32 column, count;
};
// Of a chunk: a bit for each of this lane's places that is taken.
NXS_DEVICE u32 gone_of(const Taken& taken, u32 chunk) {
  u32 gone = 0;
#pragma unroll 1
  for (u32 i = 0; i < taken.count; ++i) {
    const u32 within = shuffle(taken.column, i) - chunk * kChunk;
    if (within < kChunk && within / 8 % 32 == lane_index()) gone |= 1u << (within / 256 * 8 + within % 8);
  }
  return gone;
}

// A column of what is left of a row, or kNothing; partials are those of what is left.
template <typename T, typename Load>
NXS_DEVICE u32 draw_left(const Summary& summary, const Row<T>& row, u32 chunks, const Uniforms& u, const Taken& taken,
                         Load load) {
  if (summary.shape == kEmpty) return kNothing;
  u32 chunk = kNothing;
  float top = -INFINITY;
  if (summary.shape == kSpread) {
    chunk = pick_chunk(chunks, u.at[0], [&](u32 at) { return share_of(load(at), summary.scale, summary.reference); });
  } else {
    for (u32 at = lane_index(); at < chunks; at += 32) {
      const float of = load(at).max;
      if (of > top) {
        top = of;
        chunk = at;
      }
    }
    warp_sync();
    const float mine = top;
    top = key_float(warp_reduce_max(key_of(mine)));
    chunk = warp_reduce_min(mine == top ? chunk : kNothing);
  }
  if (chunk == kNothing) return kNothing;
  const Logits<T> logits = load_logits(row, chunk);
  const u32 gone = gone_of(taken, chunk);
  u32 place = kNothing;
  if (summary.shape == kSpread) {
    const float reference = reference_of(summary.scale, load(chunk).max);
    place = pick_place(u.at[1], u.at[2], [&](u32 at) {
      const float weight = weight_of(summary.scale, reference, summary.cut, logits.at(at));
      return gone >> at & 1 ? 0.0f : weight;
    });
  } else {
#pragma unroll
    for (u32 at = 0; at < 32; ++at) {
      const u32 column = at / 8 * 256 + lane_index() * 8 + at % 8;
      if (logits.at(at) == top && !(gone >> at & 1) && column < place) place = column;
    }
    place = warp_reduce_min(place);
  }
  return place == kNothing ? kNothing : chunk * kChunk + place;
}

// One warp: the partial of what is left of a chunk. The greatest logit stays that of the chunk's reference where
// weights count.
template <typename T>
NXS_DEVICE Partial partial_left(const Summary& summary, const Row<T>& row, u32 chunk, float max, const Taken& taken) {
  const Logits<T> logits = load_logits(row, chunk);
  const u32 gone = gone_of(taken, chunk);
  if (summary.shape == kSpread) {
    const float reference = reference_of(summary.scale, max);
    float sum = 0;
#pragma unroll
    for (u32 at = 0; at < 32; ++at) {
      const float weight = weight_of(summary.scale, reference, summary.cut, logits.at(at));
      sum = sum + (gone >> at & 1 ? 0.0f : weight);
    }
    return Partial{max, sum_of_lanes(sum)};
  }
  float top = -INFINITY;
#pragma unroll
  for (u32 at = 0; at < 32; ++at) top = maximum(top, gone >> at & 1 ? -INFINITY : logits.at(at));
  return Partial{key_float(warp_reduce_max(key_of(top))), 0};
}

// The first warp, with the partials of row r as truncation left them: draws its tokens.
template <typename T>
NXS_DEVICE void draw_drafts(const nxs_draft_sample_params& p, u32 r, const Summary& summary, const Row<T>& row, u32 chunks,
                            Partial* partials) {
  const auto load = [&](u32 chunk) { return load_global(partials + chunk); };
  const u32 drafts = p.drafts > 1 ? static_cast<u32>(p.drafts) : 1;
  const bool distinct = p.with_replacement == 0;
  const u64 seed = p.seeds_or_null ? static_cast<u64>(load_global_nc(p.seeds_or_null + r)) : 0;
  u64 position = p.positions_or_null ? static_cast<u64>(load_global_nc(p.positions_or_null + r)) : 0;
  u32 row_in_step = static_cast<u32>(p.row_in_step);
  if (p.rows_in_step_or_null)
    row_in_step = static_cast<u32>(load_global_nc(p.rows_in_step_or_null + r)) & 0xffffffu;
  else
    position += row_in_step;
  Taken taken = {kNothing, 0};
#pragma unroll 1
  for (u32 j = 0; j < drafts; ++j) {
    const i64 at = r * static_cast<i64>(drafts) + j;
    Uniforms u;
    if (p.uniforms_or_null) {
#pragma unroll
      for (u32 i = 0; i < 4; ++i) u.at[i] = load_global_nc(p.uniforms_or_null + at * 4 + i);
    } else {
      u = draw(seed, position, kUseDraft, row_in_step, j);
    }
    const u32 column = draw_left(summary, row, chunks, u, taken, load);
    if (lane_index() == 0) {
      i32 token = j == 0 ? p.fallback : -1;
      if (column != kNothing)
        token = p.draft_to_target_or_null ? load_global_nc(p.draft_to_target_or_null + column)
                                          : static_cast<i32>(column);
      store_global(p.tokens + at, token);
      if (p.log_probs_or_null) {
        float log_prob = bits_float(0x7fffffffu);
        if (column != kNothing)
          log_prob = summary.shape == kSpread ? log_probability(summary, logit_at(row, column))
                                              : (taken.count == 0 ? 0.0f : -INFINITY);
        store_global(p.log_probs_or_null + at, log_prob);
      }
    }
    warp_sync();
    if (!distinct || column == kNothing || j + 1 == drafts) continue;
    if (lane_index() == taken.count) taken.column = column;
    ++taken.count;
    const u32 chunk = column / kChunk;
    const Partial left = partial_left(summary, row, chunk, load(chunk).max, taken);
    warp_sync();
    if (lane_index() == 0) store_global(partials + chunk, left);
    warp_sync();
  }
}

// All of the block that came last at row r: draws its tokens and writes what is to be known of it.
template <typename T> NXS_DEVICE_CALL void settle_row(const nxs_draft_sample_params& p, u32 r) {
  const u32 chunks = chunks_of(static_cast<u32>(p.vocab)), shared = dynamic_shared(), warp = thread_index() / 32;
  const Row<T> row = row_of<T>(p, r);
  const Scale scale = scale_of_row(p, r);
  Partial* partials = partials_of(p, r);
  const auto load = [&](u32 chunk) { return load_global(partials + chunk); };
  Summary summary = summarize(chunks, scale, load);
  Truncation truncation = {0, 1.0f, 0.0f};
  if (p.top_k_or_null) {
    const i32 top_k = load_global_nc(p.top_k_or_null + r);
    truncation.top_k = top_k > 0 ? static_cast<u32>(top_k) : 0;
  }
  if (p.top_p_or_null) truncation.top_p = load_global_nc(p.top_p_or_null + r);
  if (p.min_p_or_null) truncation.min_p = load_global_nc(p.min_p_or_null + r);
  truncate_row(truncation, summary, row, chunks, partials, shared + 16);
  // All have seen the partials before drafts are taken out of them.
  block_sync();
  if (warp == 0) {
    draw_drafts(p, r, summary, row, chunks, partials);
    if (lane_index() == 0) {
      u32 said = summary.nan ? NXS_STATUS_TARGET_NAN : 0;
      if (summary.beyond || summary.top == INFINITY) said |= NXS_STATUS_TARGET_BEYOND;
      if (summary.shape == kEmpty) said |= NXS_STATUS_TARGET_EMPTY;
      store_global(p.status + r, said);
      const bool spread = summary.shape == kSpread;
      if (p.stats_or_null) {
        float* stats = p.stats_or_null + r * i64{4};
        const float sum = spread ? summary.sum : 0.0f;
        store_global(stats, summary.top);
        store_global(stats + 1, summary.nan ? -sum : sum);
        store_global(stats + 2, spread ? summary.cut : -INFINITY);
        store_global(stats + 3, spread ? summary.scale.per_logit : 0.0f);
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 3) draft_sample_kernel(const __grid_constant__ nxs_draft_sample_params p) {
  const u32 shared = dynamic_shared(), chunks = chunks_of(static_cast<u32>(p.vocab));
  const u32 an_item = static_cast<u32>(p.chunks_per_item), slices = (chunks + an_item - 1) / an_item;
  const u64 items = static_cast<u64>(p.rows) * slices;
  for (u64 item = block_index_x(); item < items; item += grid_size_x()) {
    const u32 r = static_cast<u32>(item / slices), begin = static_cast<u32>(item - static_cast<u64>(r) * slices) * an_item;
    const u32 end = begin + an_item < chunks ? begin + an_item : chunks;
    sweep_chunks(row_of<T>(p, r), scale_of_row(p, r), partials_of(p, r), begin, end, 0);
    block_sync();
    if (thread_index() == 0) store_shared(shared, atomic_inc_acq_rel_global(p.counters + r, slices - 1));
    block_sync();
    if (load_shared<u32>(shared) != slices - 1) continue;
    settle_row<T>(p, r);
    block_sync();
  }
}

template <typename T> nxs_status draft_sample(const nxs_draft_sample_params& p, void* stream) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(p.blocks));
  shape.block = kThreads;
  shape.dynamic_smem = 128;
  return launch(draft_sample_kernel<T>, shape, stream, p);
}

}  // namespace nxs::verification

extern "C" nxs_status nxs_draft_sample(const nxs_draft_sample_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::verification;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_draft_sample_params& p = *params;
  NXS_REQUIRE(p.dtype == NXS_F32 || p.dtype == NXS_F16 || p.dtype == NXS_BF16, NXS_E_DTYPE);
  NXS_REQUIRE(p.rows >= 0 && p.rows <= i64{1} << 20 && p.vocab >= 1 && p.vocab <= i64{1} << 24, NXS_E_SHAPE);
  NXS_REQUIRE(p.row_in_step >= 0 && p.row_in_step <= 1023 && p.drafts >= 0 && p.drafts <= 32, NXS_E_SHAPE);
  NXS_REQUIRE(p.stride_row >= 0, NXS_E_STRIDE);
  if (p.rows == 0) return NXS_OK;
  NXS_REQUIRE(p.chunks_per_item >= 8 && p.chunks_per_item % 8 == 0 && p.blocks >= 1, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.logits && p.tokens && p.status && p.workspace && p.counters, NXS_E_NULL);
  for (const void* word : {static_cast<const void*>(p.temperature_or_null), static_cast<const void*>(p.top_k_or_null),
                           static_cast<const void*>(p.top_p_or_null), static_cast<const void*>(p.min_p_or_null),
                           static_cast<const void*>(p.draft_to_target_or_null),
                           static_cast<const void*>(p.rows_in_step_or_null),
                           static_cast<const void*>(p.uniforms_or_null), static_cast<const void*>(p.tokens),
                           static_cast<const void*>(p.stats_or_null), static_cast<const void*>(p.log_probs_or_null),
                           static_cast<const void*>(p.status), static_cast<const void*>(p.counters)})
    NXS_REQUIRE(is_aligned(word, 4), NXS_E_ALIGNMENT);
  NXS_REQUIRE(is_aligned(p.logits, dtype_bytes(p.dtype)) && is_aligned(p.seeds_or_null, 8) &&
                  is_aligned(p.positions_or_null, 8) && is_aligned(p.workspace, 8),
              NXS_E_ALIGNMENT);
  switch (p.dtype) {
    case NXS_F32: return draft_sample<float>(p, stream);
    case NXS_F16: return draft_sample<f16>(p, stream);
    default: return draft_sample<bf16>(p, stream);
  }
}
