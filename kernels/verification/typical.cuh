// Typical acceptance of candidate paths.
//
//   node m on a path is followed by node n:  accepted while p_m(d_n) > min(epsilon, alpha exp(-H_m)), H_m the entropy of p_m
//   the longest path wins; of those the one whose accepted tokens have the greatest sum of log p; of those the first
//   then x ~ p of its last accepted node
//
// Layouts      target [target_rows, vocab], a row a node. Paths are lists of nodes, the same for all requests.
// Who does what
//              A persistent grid of blocks of 8 warps; an item is a row: a warp a chunk, moments.cuh. The block keeps the
//              row's sum and threshold and arrives at its request's counter. The last to come walks the paths, one a
//              thread, reading single logits; warps agree on the best; the first draws the token that follows.
// Bytes        each row once, 16 a chunk written and read. About 16 instructions a column.
// Determinism  bitwise.
// Limits       see nextscale.h.
#pragma once
#include "common/ptx/atomic.cuh"
#include "common/ptx/launch.cuh"
#include "verification/moments.cuh"

namespace nxs::verification {

struct TypicalRow {
  u32 shape, said, peak;
  float top, sum, threshold;  // threshold: of weights
  u32 unused[2];
};
static_assert(sizeof(TypicalRow) == 32);

// Shared memory: a word for all; three words of each warp.
constexpr u32 kTypicalWord = 0, kTypicalBest = 16, kTypicalBytes = 128;

template <typename T> struct Typical {
  const nxs_typical_verify_params& p;
  const u32 shared, chunks;

  NXS_DEVICE Typical(const nxs_typical_verify_params& params, u32 memory)
      : p(params), shared(memory), chunks(chunks_of(static_cast<u32>(params.vocab))) {}

  NXS_DEVICE TypicalRow* state(u64 r) const { return static_cast<TypicalRow*>(p.workspace) + r; }
  NXS_DEVICE Moments* moments(u64 r) const {
    return reinterpret_cast<Moments*>(state(static_cast<u64>(p.batch) * p.nodes)) + r * chunks;
  }
  NXS_DEVICE Row<T> row_of(u64 r) const {
    const i64 index = input_or(p.row_index_or_null, r, static_cast<i32>(r));
    const bool there = index >= 0 && index < p.target_rows;
    return Row<T>{static_cast<const T*>(p.target) + (there ? index : 0) * p.target_stride_row, nullptr,
                  there ? static_cast<u32>(p.vocab) : 0};
  }
  NXS_DEVICE Scale scale(u32 b) const { return scale_of(input_or(p.temperature_or_null, b, 1.0f)); }

  // All of the block: what is kept of a row.
  NXS_DEVICE void measure(u32 b, u64 r) const {
    const Row<T> row = row_of(r);
    const Scale s = scale(b);
    Moments* mine = moments(r);
#pragma unroll 1
    for (u32 chunk = thread_index() / 32; chunk < chunks; chunk += kWarps) {
      Logits<T> logits = load_logits(row, chunk);
      const Moments of = chunk_moments(logits, s);
      if (lane_index() == 0) store_global(mine + chunk, of);
    }
    block_sync();
    if (thread_index() >= 32) return;
    const auto load = [&](u32 chunk) { return load_global(mine + chunk); };
    const RowMoments of = summarize_moments(chunks, s, load);
    const Summary& summary = of.summary;
    TypicalRow kept = {summary.shape, said_of(summary), kNothing, summary.top, summary.sum, 0, {}};
    if (row.columns == 0) kept.said |= NXS_STATUS_ROW_OUT_OF_RANGE;
    float typical = p.alpha, sum = 1.0f;
    if (summary.shape == kPeak) kept.peak = find_peak(summary, row, chunks, [&](u32 chunk) {
      const Moments at = load(chunk);
      return Partial{at.max, at.sum};
    });
    if (summary.shape == kSpread) {
      typical = multiply(p.alpha, power_of_minus(of.entropy_bits()));
      sum = summary.sum;
    }
    kept.threshold = multiply(typical < p.epsilon ? typical : p.epsilon, sum);
    if (lane_index() == 0) {
      Vec<u32, 4> words[2];
      memcpy(words, &kept, sizeof(kept));
      store_global(reinterpret_cast<Vec<u32, 4>*>(state(r)), words[0]);
      store_global(reinterpret_cast<Vec<u32, 4>*>(state(r)) + 1, words[1]);
    }
  }

  // What is kept of a row, as a distribution.
  struct Node {
    Row<T> row;
    Summary summary;
    u32 peak;
    float threshold;
  };
  NXS_DEVICE Node node(u32 b, u32 n) const {
    const u64 r = static_cast<u64>(b) * p.nodes + n;
    Vec<u32, 4> words[2] = {load_global(reinterpret_cast<const Vec<u32, 4>*>(state(r))),
                            load_global(reinterpret_cast<const Vec<u32, 4>*>(state(r)) + 1)};
    TypicalRow kept;
    memcpy(&kept, words, sizeof(kept));
    const Scale s = scale(b);
    Node of = {row_of(r), {static_cast<Shape>(kept.shape), false, false, kept.top, 0, kept.sum, -INFINITY, s}, kept.peak,
               kept.threshold};
    if (kept.shape == kSpread) of.summary.reference = reference_of(s, kept.top);
    return of;
  }

  NXS_DEVICE i32 at_path(u32 path, u32 j) const {
    const i32 n = p.paths_or_null ? load_global_nc(p.paths_or_null + static_cast<i64>(path) * p.depth + j)
                                  : static_cast<i32>(j);
    return n < p.nodes ? n : -1;
  }

  // How many drafts of a path are accepted, and the sum of their log2 p.
  NXS_DEVICE u32 walk(u32 b, u32 path, float& log_sum) const {
    log_sum = 0;
    u32 accepted = 0;
    i32 from = at_path(path, 0);
    if (from != 0) return 0;
    for (u32 j = 1; j < static_cast<u32>(p.depth); ++j) {
      const i32 to = at_path(path, j);
      if (to < 0) break;
      const i32 token = load_global_nc(p.drafts + static_cast<i64>(b) * p.nodes + to);
      if (token < 0 || token >= p.vocab) break;
      const Node of = node(b, static_cast<u32>(from));
      float weight = 0, log = 0;
      if (of.summary.shape == kPeak) {
        weight = of.peak == static_cast<u32>(token) ? 1.0f : 0.0f;
      } else if (of.summary.shape == kSpread) {
        const float logit = logit_at(of.row, static_cast<u32>(token));
        weight = weight_of(of.summary, logit);
        log = fma(logit, of.summary.scale.per_logit, -of.summary.reference) - log2_exact(of.summary.sum);
      }
      if (!(weight > of.threshold)) break;
      log_sum = log_sum + log;
      ++accepted;
      from = to;
    }
    return accepted;
  }

  // All of the block, with all rows of the request known.
  NXS_DEVICE void finish(u32 b) const {
    const u32 warp = thread_index() / 32, lane = lane_index();
    u32 length = 0, key = 0, best = kNothing;
    for (u32 path = thread_index(); path < static_cast<u32>(p.paths); path += kThreads) {
      float log_sum;
      const u32 accepted = walk(b, path, log_sum), of = key_of(log_sum);
      if (best == kNothing || accepted > length || (accepted == length && of > key)) {
        length = accepted;
        key = of;
        best = path;
      }
    }
    warp_sync();
    const auto agree = [&] {
      const u32 most = warp_reduce_max(best == kNothing ? 0 : length + 1);
      const bool among = best != kNothing && length + 1 == most;
      const u32 greatest = warp_reduce_max(among ? key : 0);
      best = warp_reduce_min(among && key == greatest ? best : kNothing);
      length = most == 0 ? 0 : most - 1;
      key = greatest;
    };
    agree();
    if (lane == 0) {
      store_shared(shared + kTypicalBest + warp * 12, length);
      store_shared(shared + kTypicalBest + warp * 12 + 4, key);
      store_shared(shared + kTypicalBest + warp * 12 + 8, best);
    }
    block_sync();
    length = key = 0;
    best = kNothing;
    if (lane < kWarps) {
      length = load_shared<u32>(shared + kTypicalBest + lane * 12);
      key = load_shared<u32>(shared + kTypicalBest + lane * 12 + 4);
      best = load_shared<u32>(shared + kTypicalBest + lane * 12 + 8);
    }
    warp_sync();
    agree();
    const u32 depth = static_cast<u32>(p.depth);
    const u64 first = static_cast<u64>(b) * depth;
    const i32 last = length == 0 ? 0 : at_path(best, length);
    u32 said = 0;
    for (u32 n = thread_index(); n < static_cast<u32>(p.nodes); n += kThreads)
      said |= load_global(&state(static_cast<u64>(b) * p.nodes + n)->said);
    warp_sync();
    said = warp_reduce_or(said);
    block_sync();
    if (lane == 0) store_shared(shared + kTypicalBest + warp * 4, said);
    block_sync();
    for (u32 w = 0; w < kWarps; ++w) said |= load_shared<u32>(shared + kTypicalBest + w * 4);
    u32 token = kNothing;
    if (warp == 0) {
      const Node of = node(b, static_cast<u32>(last));
      const Moments* mine = moments(static_cast<u64>(b) * p.nodes + static_cast<u32>(last));
      if (of.summary.shape == kPeak) {
        token = of.peak;
      } else if (of.summary.shape == kSpread) {
        Uniforms u;
        if (p.uniforms_or_null) {
          for (u32 k = 0; k < 3; ++k) u.at[k] = load_global_nc(p.uniforms_or_null + i64{3} * b + k);
        } else {
          const u64 seed = static_cast<u64>(input_or(p.seeds_or_null, b, i64{0}));
          const u64 position = static_cast<u64>(input_or(p.positions_or_null, b, i64{0}));
          u = draw(seed, position + length, kUseSample, 0, 0);
        }
        token = sample_row(of.summary, of.row, chunks, u.at[0], u.at[1], u.at[2], [&](u32 chunk) {
          const Moments at = load_global(mine + chunk);
          return Partial{at.max, at.sum};
        });
      }
    }
    token = say_to_block(shared + kTypicalWord, thread_index() == 0, token);
    for (u32 j = thread_index(); j < depth; j += kThreads) {
      i32 emitted = -1;
      if (j < length) emitted = load_global_nc(p.drafts + static_cast<i64>(b) * p.nodes + at_path(best, j + 1));
      if (j == length) emitted = token == kNothing ? p.fallback : static_cast<i32>(token);
      store_global(p.tokens + first + j, emitted);
      if (p.accepted_nodes_or_null)
        store_global(p.accepted_nodes_or_null + first + j, j > length ? -1 : j == 0 ? 0 : at_path(best, j));
    }
    if (thread_index() == 0) {
      store_global(p.emitted + b, static_cast<i32>(length) + 1);
      store_global(p.accepted + b, static_cast<i32>(length));
      store_global(p.status + b, said);
      if (p.path_or_null) store_global(p.path_or_null + b, static_cast<i32>(best));
      if (p.last_row_or_null) store_global(p.last_row_or_null + b, static_cast<i32>(static_cast<i64>(b) * p.nodes + last));
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 3) typical_kernel(
    const __grid_constant__ nxs_typical_verify_params p) {
  const Typical<T> typical(p, dynamic_shared());
  const u64 rows = static_cast<u64>(p.batch) * p.nodes;
  for (u64 r = block_index_x(); r < rows; r += grid_size_x()) {
    const u32 b = static_cast<u32>(r / static_cast<u32>(p.nodes));
    typical.measure(b, r);
    u32 old = 0;
    if (thread_index() == 0) old = atomic_inc_acq_rel_global(p.counters + b, static_cast<u32>(p.nodes) - 1);
    if (say_to_block(typical.shared + kTypicalWord, thread_index() == 0, old) != static_cast<u32>(p.nodes) - 1) continue;
    typical.finish(b);
    block_sync();
  }
}

template <typename T> nxs_status typical_launch(const nxs_typical_verify_params& p, void* stream) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(p.blocks));
  shape.block = kThreads;
  shape.dynamic_smem = kTypicalBytes;
  return launch(typical_kernel<T>, shape, stream, p);
}

}  // namespace nxs::verification
