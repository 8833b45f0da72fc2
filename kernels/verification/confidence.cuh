// Which tokens of a sequence are committed: those whose candidate the model is sure of.
//
//   candidate  x ~ the row at the request's temperature, or its most probable token
//   c          p(x), ln p(x), p1 - p2 or sum of p ln p, at temperature 1
//   committed  all masked rows with c > threshold; if there are none the n greatest of c, or of c / noise + Gumbel noise
//
// Layouts      logits [batch * length, vocab], a stride between rows.
// Who does what
//              A persistent grid of blocks of 8 warps; an item is a row: moments.cuh at temperature 1; for candidates that
//              are drawn a second sweep at their temperature, from L1. The block keeps candidate and confidence and arrives
//              at its request's counter. The last to come counts, and where it must finds the n-th greatest (score, row)
//              bit by bit: all are different, so just n are at or above it.
// Bytes        each masked row once. About 16 instructions a column, 12 more where candidates are drawn.
// Determinism  bitwise.
// Limits       see nextscale.h.
#pragma once
#include "common/ptx/atomic.cuh"
#include "common/ptx/launch.cuh"
#include "verification/moments.cuh"

namespace nxs::verification {

// Beside those of sample.cuh; the rest of the word is the number of the step.
constexpr u32 kUseCandidate = 9, kUseRank = 10;

struct ConfidentRow {
  i32 candidate;  // -1: none, or not masked
  float confidence, score;
  u32 said;
};
static_assert(sizeof(ConfidentRow) == 16);

// Shared memory: a word for all; block_sum's; status of the warps.
constexpr u32 kConfidentWord = 0, kConfidentSum = 16, kConfidentSaid = 80, kConfidentBytes = 128;
constexpr u32 kConfidentIndexBits = 20;

template <typename T> struct Confident {
  const nxs_confidence_rank_params& p;
  const u32 shared, chunks;

  NXS_DEVICE Confident(const nxs_confidence_rank_params& params, u32 memory)
      : p(params), shared(memory), chunks(chunks_of(static_cast<u32>(params.vocab))) {}
  NXS_DEVICE ConfidentRow* state(u64 r) const { return static_cast<ConfidentRow*>(p.workspace) + r; }

  NXS_DEVICE PhiloxBlock words(u32 b, u32 i, u32 use) const {
    const u64 seed = static_cast<u64>(input_or(p.seeds_or_null, b, i64{0}));
    const u64 position = static_cast<u64>(input_or(p.positions_or_null, b, i64{0}));
    return philox(seed, position + i, use | static_cast<u32>(p.row_in_step) << 8, 0);
  }

  // All of the block: a row's candidate and how sure it is.
  NXS_DEVICE void measure(u32 b, u32 i, u64 r) const {
    ConfidentRow kept = {-1, bits_float(0x7fc00000u), -INFINITY, 0};
    if (!p.masked_or_null || load_global_nc(p.masked_or_null + r)) {
      const Row<T> row = {static_cast<const T*>(p.logits) + static_cast<i64>(r) * p.stride_row, nullptr,
                          static_cast<u32>(p.vocab)};
      Moments* moments = reinterpret_cast<Moments*>(state(static_cast<u64>(p.batch) * p.length)) +
                         static_cast<u64>(block_index_x()) * (chunks + (chunks + 1) / 2);
      Partial* partials = reinterpret_cast<Partial*>(moments + chunks);
      const Scale one = scale_of(1.0f), scale = scale_of(input_or(p.temperature_or_null, b, 0.0f));
#pragma unroll 1
      for (u32 chunk = thread_index() / 32; chunk < chunks; chunk += kWarps) {
        Logits<T> logits = load_logits(row, chunk);
        const Moments of = chunk_moments(logits, one);
        if (lane_index() == 0) {
          store_global(moments + chunk, of);
          // Enough for the most probable token.
          if (scale.greedy()) store_global(partials + chunk, Partial{of.max, float_bits(of.sum) >> 31 ? -0.0f : 0.0f});
        }
      }
      if (!scale.greedy()) sweep_row(row, chunks, scale, partials);
      block_sync();
      const RowOf<T> of = distribution_of(row, chunks, scale,
                                          truncation_of(p.top_k_or_null, p.top_p_or_null, p.min_p_or_null, b), partials,
                                          shared + kConfidentSum);
      kept.said = said_of(of.summary);
      if (thread_index() < 32) {
        const RowMoments sure = summarize_moments(chunks, one, [&](u32 chunk) { return load_global(moments + chunk); });
        u32 token = of.peak;
        if (of.summary.shape == kSpread) {
          const PhiloxBlock block = words(b, i, kUseCandidate);
          token = sample_row(of.summary, row, chunks, philox_uniform(block.word[0]), philox_uniform(block.word[1]),
                             philox_uniform(block.word[2]), [&](u32 chunk) { return load_global(partials + chunk); });
        }
        if (token != kNothing) {
          kept.candidate = static_cast<i32>(token);
          kept.confidence = confidence(row, sure, token);
          kept.score = kept.confidence;
          const float noise = input_or(p.noise_or_null, b, 0.0f);
          if (noise > 0) {
            const float variate = exponential(words(b, i, kUseRank).word[0]);
            kept.score = divide(kept.confidence, noise) - multiply(log2_exact(variate), kLn2);
          }
        }
      }
      block_sync();
    }
    if (thread_index() == 0) {
      Vec<u32, 4> packed;
      memcpy(&packed, &kept, sizeof(kept));
      store_global(reinterpret_cast<Vec<u32, 4>*>(state(r)), packed);
    }
  }

  NXS_DEVICE float confidence(const Row<T>& row, const RowMoments& sure, u32 token) const {
    const Summary& summary = sure.summary;
    const float logit = logit_at(row, token);
    const bool spread = summary.shape == kSpread;
    // Without a spread all weight is on the greatest logit.
    const float p_of_token = spread ? divide(weight_of(summary, logit), summary.sum) : logit == summary.top ? 1.0f : 0.0f;
    switch (p.confidence) {
      case NXS_CONFIDENCE_PROBABILITY: return p_of_token;
      case NXS_CONFIDENCE_LOG_PROBABILITY:
        if (!spread) return p_of_token > 0 ? 0.0f : -INFINITY;
        return multiply(fma(logit, summary.scale.per_logit, -summary.reference) - log2_exact(summary.sum), kLn2);
      case NXS_CONFIDENCE_MARGIN:
        if (!spread) return 1.0f;
        return divide(weight_of(summary, summary.top) - weight_of(summary, sure.second), summary.sum);
      default: return spread ? -multiply(sure.entropy_bits(), kLn2) : 0.0f;
    }
  }

  // Greater for greater scores, and for lower rows; 0 for none.
  NXS_DEVICE u64 place_of(u64 first, u32 i) const {
    const ConfidentRow* of = state(first + i);
    if (load_global(&of->candidate) < 0) return 0;
    return static_cast<u64>(key_of(load_global(&of->score))) << kConfidentIndexBits |
           (((1u << kConfidentIndexBits) - 1) - i);
  }

  // All of the block, with all rows of the request known.
  NXS_DEVICE void finish(u32 b) const {
    const u32 length = static_cast<u32>(p.length), warp = thread_index() / 32;
    const u64 first = static_cast<u64>(b) * length;
    const bool by_threshold = p.threshold_or_null != nullptr;
    const float threshold = by_threshold ? load_global_nc(p.threshold_or_null + b) : 0;
    u64 eligible = 0, above = 0;
    u32 said = 0;
    for (u32 i = thread_index(); i < length; i += kThreads) {
      const ConfidentRow* of = state(first + i);
      said |= load_global(&of->said);
      if (load_global(&of->candidate) < 0) continue;
      ++eligible;
      above += by_threshold && load_global(&of->confidence) > threshold;
    }
    warp_sync();
    said = warp_reduce_or(said);
    if (lane_index() == 0) store_shared(shared + kConfidentSaid + warp * 4, said);
    eligible = block_sum(eligible, shared + kConfidentSum);
    above = block_sum(above, shared + kConfidentSum);
    for (u32 w = 0; w < kWarps; ++w) said |= load_shared<u32>(shared + kConfidentSaid + w * 4);
    const i32 count = load_global_nc(p.counts + b);
    u64 n = count < 0 || static_cast<u64>(count) > eligible ? eligible : static_cast<u64>(count);
    // Committed are places from here on.
    u64 least = 1;
    if (above == 0 && n == 0) least = ~u64{0};
    if (above == 0 && n > 0 && n < eligible) {
      least = 0;
#pragma unroll 1
      for (u32 bit = 32 + kConfidentIndexBits; bit-- > 0;) {
        const u64 next = least | u64{1} << bit;
        u64 there = 0;
        for (u32 i = thread_index(); i < length; i += kThreads) there += place_of(first, i) >= next;
        warp_sync();
        if (block_sum(there, shared + kConfidentSum) >= n) least = next;
      }
    }
    u64 committed = 0;
    for (u32 i = thread_index(); i < length; i += kThreads) {
      const ConfidentRow* of = state(first + i);
      const i32 candidate = load_global(&of->candidate);
      const float sure = load_global(&of->confidence);
      const bool commits = candidate >= 0 && (above > 0 ? sure > threshold : place_of(first, i) >= least);
      committed += commits;
      store_global(p.tokens + first + i, commits ? candidate : -1);
      if (p.candidates_or_null) store_global(p.candidates_or_null + first + i, candidate);
      if (p.confidence_or_null) store_global(p.confidence_or_null + first + i, sure);
    }
    warp_sync();
    committed = block_sum(committed, shared + kConfidentSum);
    if (thread_index() == 0) {
      store_global(p.committed + b, static_cast<i32>(committed));
      store_global(p.status + b, said);
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 3) confidence_kernel(
    const __grid_constant__ nxs_confidence_rank_params p) {
  const Confident<T> confident(p, dynamic_shared());
  const u32 length = static_cast<u32>(p.length);
  const u64 rows = static_cast<u64>(p.batch) * length;
  for (u64 r = block_index_x(); r < rows; r += grid_size_x()) {
    const u32 b = static_cast<u32>(r / length), i = static_cast<u32>(r - static_cast<u64>(b) * length);
    confident.measure(b, i, r);
    u32 old = 0;
    if (thread_index() == 0) old = atomic_inc_acq_rel_global(p.counters + b, length - 1);
    if (say_to_block(confident.shared + kConfidentWord, thread_index() == 0, old) != length - 1) continue;
    confident.finish(b);
    block_sync();
  }
}

template <typename T> nxs_status confidence_launch(const nxs_confidence_rank_params& p, void* stream) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(p.blocks));
  shape.block = kThreads;
  shape.dynamic_smem = kConfidentBytes;
  return launch(confidence_kernel<T>, shape, stream, p);
}

}  // namespace nxs::verification
