// Verification of chains of drafts: which of them the target would have drawn, and the token that follows.
//
//   greedy   d = argmax p              match   d = x, x ~ p              reject   u q(d) < p(d), else x ~ max(p - q, 0)
//   block    h_i = Z_i / (Z_i + 1 - P_i), P_i = min(1, P_(i-1) p(d) / q(d)), Z_i = sum of max(P_i p - q, 0) over row i;
//            the last i with u_i < h_i is accepted, then x ~ max(P_i p - q, 0)
//
// Layouts      target [target_rows, vocab], draft [draft_rows, draft_vocab], raw logits with a stride between rows. Rows of a
//              request follow each other, one more than it has drafts. The rest is described in nextscale.h.
// Who does what
//              A persistent grid of blocks of 8 warps. A row of the target and the row of the draft beside it are cut into
//              chunks of 1024 columns, the target's first; an item is chunks_per_item of them. Items are numbered by row of
//              the request first, so that what lies behind a rejection is mostly passed over: blocks look at the
//              request's stop word before they load. Block i takes items i, i + blocks, ...
//              A warp writes the partials of its chunks; then the block arrives at the row's counter. The last to come
//              has all partials of both rows: it decides about the draft (or draws the row's token), keeps what is to be
//              kept in the row's state, and arrives at the request's counter. The last one there knows the first
//              draft that failed, draws the token in its place and writes the outputs.
//              Residual: 8 warps draw from p at once and keep with probability 1 - q/p (thinning: p is drawn from by its
//              partials, q is read at one column); the lowest trial that is kept wins. After `trials` of them the block
//              sweeps both rows for max(p - q, 0).
//              Counters return to zero by themselves: every item of a row arrives, also those that are passed over.
//              Requests of few chunks have a kernel of their own, a cluster each: rows are decided at once, a warp a row.
//              Block verification reads the rows again, in a second kernel of the same shape whose partials are the chunks'
//              sums of max(P_i p - q, 0).
// Bytes        (rows up to the one that stops) * vocab * sizeof(target), and as many of the draft where it is swept; 8 a
//              chunk. Twice that with blocks. FLOPs: about 22 a column.
// Determinism  bitwise: see row_stats.cuh and sample.cuh; a row's decision depends on that row alone, and the first that
//              fails is the first whatever the order in which they are known.
// Limits       vocabularies up to 2^24, batch up to 2^20, 1023 drafts a request.
#pragma once
#include <type_traits>

#include "common/ptx/atomic.cuh"
#include "common/ptx/cluster.cuh"
#include "common/ptx/launch.cuh"
#include "verification/sample.cuh"

namespace nxs::verification {

// What is kept of a row of the step.
struct RowState {
  u32 kind;             // of Kind
  i32 token;            // with kToken: it, or -1 if none can be drawn
  u32 said;             // bits of the status
  float log_prob;       // of the draft
  float p_weight, p_sum, q_weight, q_sum;
  float ratio;          // P_i: of the prefix before this row
  u32 passes;           // whether the prefix that ends before this row passes its test
  u32 end;              // row 0: where the rows of use end
  float cut;            // the least logit that truncation kept
  float p_top, q_top;   // greatest logits
  u32 p_peak, q_peak;   // the only token with weight, or kNothing
};
static_assert(sizeof(RowState) == NXS_VERIFY_ROW_BYTES);

NXS_DEVICE RowState load_state(const RowState* from) {
  Vec<u32, 4> words[sizeof(RowState) / 16];
#pragma unroll
  for (u32 k = 0; k < sizeof(RowState) / 16; ++k)
    words[k] = load_global(reinterpret_cast<const Vec<u32, 4>*>(from) + k);
  RowState state;
  memcpy(&state, words, sizeof(state));
  return state;
}
NXS_DEVICE void store_state(RowState* to, const RowState& state) {
  Vec<u32, 4> words[sizeof(RowState) / 16];
  memcpy(words, &state, sizeof(state));
#pragma unroll
  for (u32 k = 0; k < sizeof(RowState) / 16; ++k) store_global(reinterpret_cast<Vec<u32, 4>*>(to) + k, words[k]);
}

enum Kind : u32 {
  kAccepted,  // the draft is
  kToken,     // the step ends here with `token`
  kResidual,  // the step ends here with a token of max(p - q, 0)
  kOpen,      // block: to be seen
};

// Where things of a row lie in shared memory.
constexpr u32 kSharedBroadcast = 0, kSharedSum = 16, kSharedToken = 96, kSharedBytes = 256;

// A request as its parameters say.
struct Request {
  u32 b;
  i64 row;        // the first
  u32 rows;       // 0: nothing to do
  bool ignored;   // there are more drafts
  i32 rule;
  Scale scale, draft_scale, measure;  // measure: what partials of the target are made with
};

template <typename T> NXS_DEVICE T or_else(const T* p, i64 at, T otherwise) {
  return p ? load_global_nc(p + at) : otherwise;
}

NXS_DEVICE Request request_of(const nxs_verify_params& p, u32 b) {
  Request r;
  r.b = b;
  const i64 most_rows = p.max_drafts + 1, most = p.batch * most_rows;
  const i64 begin = load_global_nc(p.cu_rows + b), end = load_global_nc(p.cu_rows + b + 1);
  r.row = begin < 0 ? 0 : begin > most ? most : begin;
  i64 rows = (end < most ? end : most) - r.row;
  rows = rows < 0 ? 0 : rows > most_rows ? most_rows : rows;
  r.rows = static_cast<u32>(rows);
  r.ignored = end - r.row > rows;
  r.rule = or_else(p.rules_or_null, b, p.rule);
  if (r.rule < NXS_RULE_GREEDY || r.rule > NXS_RULE_BLOCK) r.rule = p.rule;
  if (r.rule == NXS_RULE_BLOCK && !p.may_block) r.rule = NXS_RULE_REJECT;
  const float temperature = or_else(p.temperature_or_null, b, 1.0f);
  r.scale = r.rule == NXS_RULE_GREEDY ? Scale{0, 0} : scale_of(temperature);
  r.draft_scale = scale_of(or_else(p.draft_temperature_or_null, b, temperature));
  r.measure = r.scale.greedy() && p.log_probs_or_null ? scale_of(1.0f) : r.scale;
  return r;
}

template <typename P, typename Q> struct Step {
  const nxs_verify_params& p;
  u32 of_target, of_draft;  // chunks; of_draft: 0 where rows of the draft are not swept

  NXS_DEVICE explicit Step(const nxs_verify_params& params) : p(params) {
    of_target = chunks_of(static_cast<u32>(p.vocab));
    of_draft = p.draft_or_null && !p.draft_stats_or_null ? chunks_of(static_cast<u32>(p.draft_vocab)) : 0;
  }
  NXS_DEVICE u32 most_rows() const { return static_cast<u32>(p.max_drafts) + 1; }
  NXS_DEVICE u64 slot(u32 b, u32 i) const { return static_cast<u64>(b) * most_rows() + i; }
  NXS_DEVICE u64 slots() const { return static_cast<u64>(p.batch) * most_rows(); }
  NXS_DEVICE RowState* state(u64 slot) const { return static_cast<RowState*>(p.workspace) + slot; }
  NXS_DEVICE Partial* partials(u64 slot) const {
    return reinterpret_cast<Partial*>(state(slots())) + slot * (of_target + of_draft);
  }
  NXS_DEVICE float* residuals(u64 slot) const {
    return reinterpret_cast<float*>(partials(slots())) + slot * of_target;
  }
  NXS_DEVICE u32* row_counter(u64 slot) const { return p.counters + slot; }
  NXS_DEVICE u32* request_counter(u32 b) const { return p.counters + slots() + b; }
  // 0, or max_drafts + 1 - i where i is the first row known to end the step.
  NXS_DEVICE u32* stop_word(u32 b) const { return p.counters + slots() + p.batch + b; }

  NXS_DEVICE bool swept(const Request& r, u32 i) const {
    return of_draft > 0 && i + 1 < r.rows &&
           (r.rule == NXS_RULE_BLOCK || (r.rule == NXS_RULE_REJECT && !r.scale.greedy()));
  }

  NXS_DEVICE i64 target_index(const Request& r, u32 i) const {
    const i64 logical = r.row + i, row = or_else(p.row_index_or_null, logical, static_cast<i32>(logical));
    return row >= 0 && row < p.target_rows ? row : -1;
  }
  NXS_DEVICE Row<P> target_row(const Request& r, u32 i) const {
    const i64 row = target_index(r, i);
    return Row<P>{static_cast<const P*>(p.target) + (row < 0 ? 0 : row) * p.target_stride_row,
                  p.allow_or_null ? p.allow_or_null + (r.row + i) * p.allow_stride_row : nullptr,
                  row < 0 ? 0 : static_cast<u32>(p.vocab)};
  }
  NXS_DEVICE i64 draft_index(const Request& r, u32 i) const {
    const i64 row = p.draft_row_or_null ? load_global_nc(p.draft_row_or_null + r.row + i)
                                        : static_cast<i64>(r.b) * p.max_drafts + i;
    return row >= 0 && row < p.draft_rows ? row : -1;
  }
  NXS_DEVICE Row<Q> draft_row(i64 row) const {
    return Row<Q>{static_cast<const Q*>(p.draft_or_null) + (row < 0 ? 0 : row) * p.draft_stride_row, nullptr,
                  row < 0 ? 0 : static_cast<u32>(p.draft_vocab)};
  }

  NXS_DEVICE Summary target_summary(const Request& r, u32 i, const Scale& scale) const {
    const Partial* mine = partials(slot(r.b, i));
    return summarize(of_target, scale, [&](u32 chunk) { return load_global(mine + chunk); });
  }

  // The four uniforms of a row for a use.
  NXS_DEVICE Uniforms draws(const Request& r, u32 i, u32 use, u32 number) const {
    Uniforms u;
    if (p.uniforms_or_null) {
      const float* given = p.uniforms_or_null + slot(r.b, i) * 4;
      // A test takes the first, a token the others.
      const u32 first = use == kUseAccept ? 0 : 1;
#pragma unroll
      for (u32 k = 0; k < 3; ++k) u.at[k] = load_global_nc(given + first + k);
      u.at[3] = 0;
      return u;
    }
    const u64 seed = p.seeds_or_null ? static_cast<u64>(load_global_nc(p.seeds_or_null + r.b)) : 0;
    const u64 position = p.positions_or_null ? static_cast<u64>(load_global_nc(p.positions_or_null + r.b)) : 0;
    return draw(seed, position + i, use, use == kUseSample ? 0 : i, number);
  }
};

// The draft's distribution beside a row.
template <typename Q> struct Draft {
  bool good;
  u32 peak;  // the only token with weight, or kNothing
  Row<Q> row;
  Summary summary;
  NXS_DEVICE float sum() const { return peak != kNothing ? 1.0f : summary.sum; }
};

template <typename P, typename Q>
NXS_DEVICE Draft<Q> draft_of(const Step<P, Q>& step, const Request& r, u32 i, u32 drafted, u32& said) {
  Draft<Q> q;
  q.good = true;
  q.peak = drafted;
  q.summary.sum = 1.0f;
  if (!step.p.draft_or_null) return q;
  const i64 row = step.draft_index(r, i);
  if (row < 0) {
    said |= NXS_STATUS_ROW_OUT_OF_RANGE | NXS_STATUS_DRAFT_BAD;
    q.good = false;
    return q;
  }
  q.row = step.draft_row(row);
  if (step.p.draft_stats_or_null) {
    q.summary = summary_of_draft(step.p.draft_stats_or_null + row * 4);
  } else {
    const Partial* partials = step.partials(step.slot(r.b, i)) + step.of_target;
    q.summary = summarize(step.of_draft, r.draft_scale, [&](u32 chunk) { return load_global(partials + chunk); });
  }
  if (q.summary.nan || q.summary.shape == kEmpty) {
    said |= NXS_STATUS_DRAFT_BAD;
    q.good = false;
  } else if (q.summary.shape == kSpread) {
    q.peak = kNothing;
  }
  return q;
}

// A draft's logit of a token of the target, -inf where it has none.
template <typename P, typename Q> NXS_DEVICE float draft_logit(const Step<P, Q>& step, const Row<Q>& row, u32 token) {
  const i64 column = step.p.target_to_draft_or_null ? load_global_nc(step.p.target_to_draft_or_null + token) : token;
  if (column < 0 || column >= step.p.draft_vocab) return -INFINITY;
  return logit_at(row, static_cast<u32>(column));
}
// The draft's weight of a token.
template <typename Q> NXS_DEVICE float draft_weight(const Draft<Q>& q, u32 token, float logit) {
  if (q.peak != kNothing) return q.peak == token ? 1.0f : 0.0f;
  return logit == -INFINITY ? 0.0f : weight_of(q.summary, logit);
}
template <typename P, typename Q>
NXS_DEVICE float draft_weight(const Step<P, Q>& step, const Draft<Q>& q, u32 token) {
  return draft_weight(q, token, q.peak != kNothing ? 0.0f : draft_logit(step, q.row, token));
}

// The draft beside a row whose state is known to be open or to end in a residual.
template <typename P, typename Q>
NXS_DEVICE Draft<Q> draft_again(const Step<P, Q>& step, const Request& r, u32 i, const RowState& state) {
  Draft<Q> q;
  q.good = true;
  q.peak = state.q_peak;
  q.summary = Summary{kSpread, false, false, state.q_top, 0, state.q_sum, -INFINITY, r.draft_scale};
  if (!step.p.draft_or_null) return q;
  const i64 row = step.draft_index(r, i);
  q.row = step.draft_row(row);
  if (step.p.draft_stats_or_null) q.summary = summary_of_draft(step.p.draft_stats_or_null + row * 4);
  q.summary.reference = reference_of(q.summary.scale, q.summary.top);
  return q;
}

// The target's distribution of a row: with a peak, all on it.
template <typename P> struct Target {
  Row<P> row;
  Summary summary;
  u32 peak;
  NXS_DEVICE float sum() const { return peak != kNothing ? 1.0f : summary.sum; }
  NXS_DEVICE float weight(u32 token, float logit) const {
    if (peak != kNothing) return peak == token ? 1.0f : 0.0f;
    return weight_of(summary, logit);
  }
};
template <typename P, typename Q>
NXS_DEVICE Target<P> target_again(const Step<P, Q>& step, const Request& r, u32 i, const RowState& state) {
  Target<P> target;
  target.row = step.target_row(r, i);
  target.peak = state.p_peak;
  // Where the row was cut down, so are its partials.
  target.summary = Summary{state.p_peak == kNothing ? kSpread : kPeak, false, false, state.p_top, 0, state.p_sum,
                           state.cut, r.scale};
  if (state.p_peak == kNothing) target.summary.reference = reference_of(r.scale, state.p_top);
  return target;
}

NXS_DEVICE float residual_of(float factor, float p, float p_sum, float q, float q_sum) {
  if (p == 0) return 0;
  return maximum(fma(multiply(p, factor), q_sum, -multiply(q, p_sum)), 0.0f);
}
// Weights of max(factor p - q, 0) of this lane's places of a chunk, in units of 1 / (sum of p * sum of q).
template <typename P, typename Q>
NXS_DEVICE void residual_weights(const Step<P, Q>& step, float factor, const Target<P>& p, const Draft<Q>& q, u32 chunk,
                                 float (&weight)[32]) {
  const Logits<P> of_p = load_logits(p.row, chunk);
  if (q.peak == kNothing && !step.p.target_to_draft_or_null) {
    const Logits<Q> of_q = load_logits(q.row, chunk);
#pragma unroll
    for (u32 place = 0; place < 32; ++place) {
      const u32 token = chunk * kChunk + place / 8 * 256 + lane_index() * 8 + place % 8;
      weight[place] = residual_of(factor, p.weight(token, of_p.at(place)), p.sum(),
                                  weight_of(q.summary, of_q.at(place)), q.sum());
    }
  } else {
#pragma unroll
    for (u32 place = 0; place < 32; ++place) {
      const u32 token = chunk * kChunk + place / 8 * 256 + lane_index() * 8 + place % 8;
      const float of_token = p.weight(token, of_p.at(place));
      // The map has no entry beyond the vocabulary, where p has no weight either.
      const float beside = of_token == 0 ? 0.0f : draft_weight(step, q, token);
      weight[place] = residual_of(factor, of_token, p.sum(), beside, q.sum());
    }
  }
}
// The sum over a chunk, in every lane of the warp.
template <typename P, typename Q>
NXS_DEVICE float residual_sum(const Step<P, Q>& step, float factor, const Target<P>& p, const Draft<Q>& q, u32 chunk) {
  float weight[32], sum = 0;
  residual_weights(step, factor, p, q, chunk, weight);
#pragma unroll
  for (u32 place = 0; place < 32; ++place) sum = sum + weight[place];
  return sum_of_lanes(sum);
}

// Says one thread's word to the block.
NXS_DEVICE u32 broadcast(u32 shared, bool mine, u32 word) {
  block_sync();
  if (mine) store_shared(shared + kSharedBroadcast, word);
  block_sync();
  return load_shared<u32>(shared + kSharedBroadcast);
}

// Partials that the engine has found already.
template <typename P, typename Q>
NXS_DEVICE_CALL void copy_partials(const nxs_verify_params& p, u32 b, u32 i, u32 begin, u32 end) {
  const Step<P, Q> step(p);
  const i64 row = step.target_index(request_of(p, b), i);
  Partial* partials = step.partials(step.slot(b, i));
  for (u32 chunk = begin + thread_index(); chunk < end; chunk += kThreads) {
    Partial partial = {-INFINITY, 0};
    if (row >= 0) {
      // Not necessarily aligned to a pair.
      const float* pair = p.target_stats_or_null + (row * step.of_target + chunk) * 2;
      partial = Partial{load_global_nc(pair), load_global_nc(pair + 1)};
    }
    store_global(partials + chunk, partial);
  }
}

// Partials of the chunks `begin` to `end` of the pair of rows i: the target's chunks, then the draft's.
template <typename P, typename Q>
NXS_DEVICE void sweep_item(const Step<P, Q>& step, const Request& r, u32 i, u32 begin, u32 end) {
  const nxs_verify_params& p = step.p;
  Partial* partials = step.partials(step.slot(r.b, i));
  const u32 of_target = end < step.of_target ? end : step.of_target;
  if (begin < of_target) {
    if (p.target_stats_or_null)
      copy_partials<P, Q>(p, r.b, i, begin, of_target);
    else
      sweep_chunks(step.target_row(r, i), r.measure, partials, begin, of_target, 0);
  }
  if (end > step.of_target) {
    const u32 first = begin > step.of_target ? begin - step.of_target : 0, turn = begin < of_target ? of_target - begin : 0;
    sweep_chunks(step.draft_row(step.draft_index(r, i)), r.draft_scale, partials + step.of_target, first,
                 end - step.of_target, turn);
  }
}

// What a decision about a row is made from.
template <typename P> struct Sight {
  Target<P> target;  // its peak is found by judge_row
  Summary measured;
  u32 drafted;       // or kNothing
  float p_logit, q_logit;
};

// Any warps, with all partials of row i at hand.
template <typename P, typename Q> NXS_DEVICE Sight<P> look_at_row(const Step<P, Q>& step, const Request& r, u32 i) {
  const nxs_verify_params& p = step.p;
  Sight<P> sight;
  sight.target.row = step.target_row(r, i);
  // The draft's logits are fetched while the partials are.
  sight.drafted = kNothing;
  if (i + 1 < r.rows) {
    const i32 id = load_global_nc(p.drafts + r.row + i);
    if (id >= 0 && id < p.vocab) sight.drafted = static_cast<u32>(id);
  }
  sight.p_logit = sight.q_logit = -INFINITY;
  if (sight.drafted != kNothing) {
    sight.p_logit = logit_at(sight.target.row, sight.drafted);
    if (p.draft_or_null) sight.q_logit = draft_logit(step, step.draft_row(step.draft_index(r, i)), sight.drafted);
  }
  sight.target.summary = step.target_summary(r, i, r.scale);
  sight.measured = sight.target.summary;
  if (r.scale.greedy() && p.log_probs_or_null) sight.measured = step.target_summary(r, i, r.measure);
  return sight;
}

// One warp: decides about the draft of row i, or draws its token, and keeps what is to be kept.
template <typename P, typename Q>
NXS_DEVICE u32 judge_row(const Step<P, Q>& step, const Request& r, u32 i, Sight<P>& sight) {
  const nxs_verify_params& p = step.p;
  const Partial* partials = step.partials(step.slot(r.b, i));
  const auto load = [&](u32 chunk) { return load_global(partials + chunk); };
  Target<P>& target = sight.target;
  const u32 drafted = sight.drafted;
  RowState state = {};
  u32 kind = kToken;
  if (target.row.columns == 0) state.said |= NXS_STATUS_ROW_OUT_OF_RANGE;
  if (target.summary.nan) state.said |= NXS_STATUS_TARGET_NAN;
  if (target.summary.beyond || target.summary.top == INFINITY) state.said |= NXS_STATUS_TARGET_BEYOND;
  if (target.summary.shape == kEmpty) state.said |= NXS_STATUS_TARGET_EMPTY;
  target.peak = target.summary.shape == kPeak ? find_peak(target.summary, target.row, step.of_target, load) : kNothing;
  const bool ratio_rule = r.rule == NXS_RULE_BLOCK || (r.rule == NXS_RULE_REJECT && target.peak == kNothing);
  bool draw_token = true;
  if (target.summary.shape == kEmpty) {
    draw_token = false;
    state.token = -1;
  } else if (drafted != kNothing && ratio_rule) {
    const Draft<Q> q = draft_of(step, r, i, drafted, state.said);
    if (q.good) {
      draw_token = false;
      const float p_weight = target.weight(drafted, sight.p_logit), q_weight = draft_weight(q, drafted, sight.q_logit);
      if (q_weight == 0) state.said |= NXS_STATUS_DRAFT_IMPOSSIBLE;
      state.p_weight = p_weight;
      state.q_weight = q_weight;
      state.p_sum = target.sum();
      state.q_sum = q.sum();
      state.p_top = target.summary.top;
      state.q_top = q.summary.top;
      state.p_peak = target.peak;
      state.q_peak = q.peak;
      if (r.rule == NXS_RULE_BLOCK) {
        kind = kOpen;
      } else {
        const float u = step.draws(r, i, kUseAccept, 0).at[0];
        const bool accepted = multiply(multiply(u, q_weight), target.sum()) < multiply(p_weight, q.sum());
        kind = accepted ? kAccepted : kResidual;
      }
    }
  }
  if (draw_token) {
    const Uniforms u = step.draws(r, i, kUseSample, 0);
    const u32 token = target.peak != kNothing
                          ? target.peak
                          : sample_row(target.summary, target.row, step.of_target, u.at[0], u.at[1], u.at[2], load);
    state.token = static_cast<i32>(token);
    if (token == drafted && token != kNothing && !ratio_rule) kind = kAccepted;
  }
  if (p.log_probs_or_null && drafted != kNothing) state.log_prob = log_probability(sight.measured, sight.p_logit);
  state.kind = kind;
  // Its token may be drawn by another block, from the partials as they are now.
  state.cut = target.summary.cut;
  if (lane_index() == 0) store_state(step.state(step.slot(r.b, i)), state);
  return kind;
}

// All of the block, with all partials of row i at hand.
template <typename P, typename Q>
NXS_DEVICE u32 decide_row(const Step<P, Q>& step, const Request& r, u32 i, u32 shared) {
  const nxs_verify_params& p = step.p;
  Sight<P> sight = look_at_row(step, r, i);
  if (p.top_k_or_null || p.top_p_or_null || p.min_p_or_null) {
    const i32 top_k = or_else(p.top_k_or_null, r.b, 0);
    const Truncation truncation = {top_k > 0 ? static_cast<u32>(top_k) : 0, or_else(p.top_p_or_null, r.b, 1.0f),
                                   or_else(p.min_p_or_null, r.b, 0.0f)};
    truncate_row(truncation, sight.target.summary, sight.target.row, step.of_target, step.partials(step.slot(r.b, i)),
                 shared + kSharedSum);
    if (!r.scale.greedy()) sight.measured = sight.target.summary;
  }
  u32 kind = kToken;
  if (thread_index() < 32) kind = judge_row(step, r, i, sight);
  return broadcast(shared, thread_index() == 0, kind);
}

// All of the block: a token of max(factor p - q, 0) of row i, or kNothing. With `summed`, the chunks' sums are known.
template <typename P, typename Q>
NXS_DEVICE_CALL u32 residual_token(const nxs_verify_params& p, const Request& r, u32 i, float factor, bool summed) {
  const Step<P, Q> step(p);
  const u32 shared = dynamic_shared(), warp = thread_index() / 32;
  const u64 slot = step.slot(r.b, i);
  const Partial* partials = step.partials(slot);
  const auto load = [&](u32 chunk) { return load_global(partials + chunk); };
  const RowState state = load_state(step.state(slot));
  const Target<P> target = target_again(step, r, i, state);
  const Draft<Q> q = draft_again(step, r, i, state);
  if (!summed) {
    const u32 trials = p.uniforms_or_null ? 0 : static_cast<u32>(p.trials);
    for (u32 first = 0; first < trials; first += kWarps) {
      const u32 trial = first + warp;
      u32 kept = kNothing;
      if (trial < trials) {
        const Uniforms u = step.draws(r, i, kUseThin, trial);
        const u32 token = sample_row(target.summary, target.row, step.of_target, u.at[0], u.at[1], u.at[2], load);
        if (token != kNothing) {
          const float p_weight = target.weight(token, logit_at(target.row, token));
          const float q_weight = draft_weight(step, q, token);
          if (multiply(multiply(u.at[3], p_weight), q.sum()) >= multiply(q_weight, target.sum())) kept = token;
        }
      }
      block_sync();
      if (lane_index() == 0) store_shared(shared + kSharedToken + warp * 4, kept);
      block_sync();
      u32 token = kNothing;
      for (u32 at = kWarps; at-- > 0;) {
        const u32 other = load_shared<u32>(shared + kSharedToken + at * 4);
        if (other != kNothing) token = other;
      }
      if (token != kNothing) return token;
    }
    float* residuals = step.residuals(slot);
    for (u32 chunk = warp; chunk < step.of_target; chunk += kWarps) {
      const float sum = residual_sum(step, factor, target, q, chunk);
      if (lane_index() == 0) store_global(residuals + chunk, sum);
    }
  }
  block_sync();
  u32 token = kNothing;
  if (warp == 0) {
    const float* residuals = step.residuals(slot);
    const Uniforms u = step.draws(r, i, kUseResidual, 0);
    const u32 chunk = pick_chunk(step.of_target, u.at[0], [&](u32 at) { return load_global(residuals + at); });
    if (chunk != kNothing) {
      float weight[32];
      residual_weights(step, factor, target, q, chunk, weight);
      const u32 place = pick_place(u.at[1], u.at[2], [&](u32 at) { return weight[at]; });
      if (place != kNothing) token = chunk * kChunk + place;
    } else {
      // p is q but for rounding.
      token = target.peak != kNothing
                  ? target.peak
                  : sample_row(target.summary, target.row, step.of_target, u.at[0], u.at[1], u.at[2], load);
    }
  }
  return broadcast(shared, thread_index() == 0, token);
}

// All of the block: writes what a request gets, which accepts `accepted` drafts and then emits `last`. What the request
// is told is what rows 0 to `known` said.
template <typename P, typename Q>
NXS_DEVICE_CALL void write_request(const nxs_verify_params& p, const Request& r, u32 accepted, u32 last, u32 known) {
  const Step<P, Q> step(p);
  const u32 b = r.b, most_rows = step.most_rows();
  const i64 first = static_cast<i64>(step.slot(b, 0));
  const bool any = r.rows > 0;
  for (u32 i = thread_index(); i < most_rows; i += kThreads) {
    i32 token = -1;
    if (any && i < accepted) token = load_global_nc(p.drafts + r.row + i);
    if (any && i == accepted) token = last == kNothing ? p.fallback : static_cast<i32>(last);
    store_global(p.tokens + first + i, token);
    if (p.log_probs_or_null && !(any && i == accepted)) {
      float log_prob = bits_float(0x7fffffffu);
      if (any && i < accepted) log_prob = load_global(&step.state(step.slot(b, i))->log_prob);
      store_global(p.log_probs_or_null + first + i, log_prob);
    }
  }
  if (thread_index() >= 32) return;
  if (p.log_probs_or_null && any) {
    Summary measured = step.target_summary(r, accepted, r.measure);
    measured.cut = load_global(&step.state(step.slot(b, accepted))->cut);
    const u32 token = last == kNothing ? (p.fallback > 0 ? static_cast<u32>(p.fallback) : 0) : last;
    const float log_prob = log_probability(measured, logit_at(step.target_row(r, accepted), token));
    if (lane_index() == 0) store_global(p.log_probs_or_null + first + accepted, log_prob);
  }
  u32 said = 0;
  if (any)
    for (u32 i = lane_index(); i <= known; i += 32) said |= load_global(&step.state(step.slot(b, i))->said);
  warp_sync();
#pragma unroll
  for (u32 distance = 16; distance > 0; distance /= 2) said |= shuffle_xor(said, distance);
  if (lane_index() == 0) {
    store_global(p.emitted + b, any ? static_cast<i32>(accepted) + 1 : 0);
    store_global(p.accepted + b, static_cast<i32>(accepted));
    store_global(p.status + b, said | (r.ignored ? NXS_STATUS_DRAFTS_IGNORED : 0));
    if (p.last_row_or_null)
      store_global(p.last_row_or_null + b, any ? static_cast<i32>(r.row) + static_cast<i32>(accepted) : -1);
  }
}

// Arrives at the request's counter; true in all of the block that comes last.
template <typename P, typename Q>
NXS_DEVICE bool last_of_request(const Step<P, Q>& step, u32 b, u32 arrivals, u32 shared) {
  u32 old = 0;
  if (thread_index() == 0) old = atomic_inc_acq_rel_global(step.request_counter(b), arrivals - 1);
  return broadcast(shared, thread_index() == 0, old) == arrivals - 1;
}

// Block: P_i of all rows, and where the rows of use end. One thread.
template <typename P, typename Q> NXS_DEVICE void write_ratios(const Step<P, Q>& step, const Request& r) {
  float ratio = 1;
  u32 i = 0;
  for (;; ++i) {
    RowState* state = step.state(step.slot(r.b, i));
    store_global(&state->ratio, ratio);
    if (load_global(&state->kind) != kOpen) break;
    const float above = multiply(multiply(ratio, load_global(&state->p_weight)), load_global(&state->q_sum));
    const float below = multiply(load_global(&state->q_weight), load_global(&state->p_sum));
    ratio = above >= below ? (above > 0 ? 1.0f : 0.0f) : above / below;
  }
  store_global(&step.state(step.slot(r.b, 0))->end, i);
}

// All of the block that came last at row i: decides about it if it is of use, and if all rows of the request are known
// then, writes what the request gets. Also for a request without rows.
template <typename P, typename Q>
NXS_DEVICE_CALL void settle_row(const nxs_verify_params& p, const Request& r, u32 i, bool of_use) {
  const Step<P, Q> step(p);
  const u32 b = r.b;
  if (r.rows == 0) return write_request<P, Q>(p, r, 0, kNothing, 0);
  const u32 shared = dynamic_shared();
  u32* stop_word = step.stop_word(b);
  if (of_use) {
    const u32 kind = decide_row(step, r, i, shared);
    const bool ends = kind == kToken || kind == kResidual;
    if (ends && r.rule != NXS_RULE_BLOCK && thread_index() == 0) atomic_max_global(stop_word, step.most_rows() - i);
  }
  if (!last_of_request(step, b, r.rows, shared)) return;
  if (r.rule == NXS_RULE_BLOCK) {
    if (thread_index() == 0) write_ratios(step, r);
    return;
  }
  const u32 word = load_relaxed_global(stop_word), at = step.most_rows() - word;
  block_sync();
  // Back to 0. Blocks with items of rows that the request has not may be looking at it.
  if (thread_index() == 0) atomic_add_global(stop_word, 0u - word);
  const RowState* state = step.state(step.slot(b, at));
  u32 last = static_cast<u32>(load_global(&state->token));
  if (load_global(&state->kind) == kResidual) last = residual_token<P, Q>(p, r, at, 1.0f, false);
  write_request<P, Q>(p, r, at, last, at);
}

// The items of a kernel's block, as the row of the request, the request, and the slice of the pair of rows.
struct Item {
  u32 i, b, slice;
  u32 rest;  // b * slices + slice
};
// The first, or the next one, of this block; `i` is beyond all rows after the last.
NXS_DEVICE void settle_item(const nxs_verify_params& p, u32 slices, Item& item) {
  const u32 a_row = static_cast<u32>(p.batch) * slices;
  while (item.rest >= a_row) {
    item.rest -= a_row;
    ++item.i;
  }
  item.b = item.rest / slices;
  item.slice = item.rest - item.b * slices;
}

// The first kernel: all rows, and all requests but those that are decided by blocks. What a block rarely does is in
// functions that are called: it needs registers that the sweep would have to put aside.
template <typename P, typename Q>
__global__ void __launch_bounds__(kThreads, 3) verify_kernel(const __grid_constant__ nxs_verify_params p) {
  const Step<P, Q> step(p);
  const u32 shared = dynamic_shared();
  const u32 an_item = static_cast<u32>(p.chunks_per_item);
  const u32 slices = (step.of_target + step.of_draft + an_item - 1) / an_item;
  Item item = {0, 0, 0, block_index_x()};
  for (settle_item(p, slices, item); item.i < step.most_rows(); item.rest += grid_size_x(), settle_item(p, slices, item)) {
    const u32 i = item.i, b = item.b, begin = item.slice * an_item;
    const u32 stop = load_relaxed_global(step.stop_word(b));
    const Request r = request_of(p, b);
    if (i >= r.rows) {
      const Request copied = r;  // r itself stays in registers
      if (r.rows == 0 && i == 0 && item.slice == 0) settle_row<P, Q>(p, copied, 0, false);
      continue;
    }
    const u32 chunks = step.of_target + (step.swept(r, i) ? step.of_draft : 0);
    if (begin >= chunks) continue;
    // What lies behind a row that ends the step is of no use.
    const u32 end = begin + an_item < chunks ? begin + an_item : chunks;
    if (stop == 0 || i <= step.most_rows() - stop) sweep_item(step, r, i, begin, end);
    block_sync();
    const u32 arrivals = (chunks + an_item - 1) / an_item;
    u32 word = 0;
    // A block that has all of the row need not ask whether it is the last.
    if (thread_index() == 0 &&
        (arrivals == 1 ||
         atomic_inc_acq_rel_global(step.row_counter(step.slot(b, i)), arrivals - 1) == arrivals - 1)) {
      const u32 stopped = load_relaxed_global(step.stop_word(b));
      word = stopped == 0 || i <= step.most_rows() - stopped ? 1 : 2;
    }
    word = broadcast(shared, thread_index() == 0, word);
    if (word == 0) continue;
    const Request copied = r;
    settle_row<P, Q>(p, copied, i, word == 1);
    block_sync();
  }
}

// All of the block, with the prefixes of request b tested: finds the last that passes and writes what the request gets.
template <typename P, typename Q>
NXS_DEVICE_CALL void settle_blocks(const nxs_verify_params& p, u32 b, u32 end) {
  const Step<P, Q> step(p);
  const Request r = request_of(p, b);
  u32 at = 0;
  for (u32 row = 1; row <= end; ++row)
    if (load_global(&step.state(step.slot(b, row))->passes)) at = row;
  u32 last = static_cast<u32>(load_global(&step.state(step.slot(b, at))->token));
  if (at < end) {
    const float factor = load_global(&step.state(step.slot(b, at))->ratio);
    last = residual_token<P, Q>(p, r, at, factor, true);
  }
  write_request<P, Q>(p, r, at, last, end);
}

// The second kernel: the tests of prefixes, for requests that are decided by blocks.
template <typename P, typename Q>
__global__ void __launch_bounds__(kThreads, 3) verify_blocks_kernel(const __grid_constant__ nxs_verify_params p) {
  const Step<P, Q> step(p);
  const u32 shared = dynamic_shared(), warp = thread_index() / 32;
  const u32 an_item = static_cast<u32>(p.chunks_per_item);
  const u32 slices = (step.of_target + an_item - 1) / an_item;
  Item item = {0, 0, 0, block_index_x()};
  for (settle_item(p, slices, item); item.i < step.most_rows(); item.rest += grid_size_x(), settle_item(p, slices, item)) {
    const u32 i = item.i, b = item.b;
    const u64 slot = step.slot(b, i);
    const u32 end = load_global(&step.state(step.slot(b, 0))->end);
    const Request r = request_of(p, b);
    if (r.rule != NXS_RULE_BLOCK || r.rows == 0) continue;
    // Row `end` has no draft: its prefix passes with probability P.
    if (i > end || (i == end && item.slice > 0)) continue;
    float passing;
    if (i == end) {
      passing = load_global(&step.state(slot)->ratio);
    } else {
      const RowState state = load_state(step.state(slot));
      const Target<P> target = target_again(step, r, i, state);
      const Draft<Q> q = draft_again(step, r, i, state);
      float* residuals = step.residuals(slot);
#pragma unroll 1
      for (u32 round = warp; round < an_item; round += kWarps) {
        const u32 chunk = item.slice * an_item + round;
        if (chunk >= step.of_target) break;
        const float sum = residual_sum(step, state.ratio, target, q, chunk);
        if (lane_index() == 0) store_global(residuals + chunk, sum);
      }
      block_sync();
      u32 old = 0;
      if (thread_index() == 0) old = atomic_inc_acq_rel_global(step.row_counter(slot), slices - 1);
      if (broadcast(shared, thread_index() == 0, old) != slices - 1) continue;
      passing = state.ratio;
      if (i > 0) {
        float own = 0;
        for (u32 chunk = lane_index(); chunk < step.of_target; chunk += 32) own = own + load_global(residuals + chunk);
        warp_sync();
        const float mass = sum_of_lanes(own) / multiply(target.sum(), q.sum());
        const float all = mass + (1.0f - state.ratio);
        passing = all > 0 ? mass / all : 1.0f;
      }
    }
    if (thread_index() == 0)
      store_global(&step.state(slot)->passes,
                   u32{i > 0 && step.draws(r, i - (i > 0), kUseAccept, 0).at[0] < passing});
    if (!last_of_request(step, b, end + 1, shared)) continue;
    settle_blocks<P, Q>(p, b, end);
    block_sync();
  }
}

// The first block of a request's cluster, with all partials at hand.
template <typename P, typename Q> NXS_DEVICE_CALL void settle_request(const nxs_verify_params& p, const Request& r) {
  const Step<P, Q> step(p);
  if (r.rows == 0) return write_request<P, Q>(p, r, 0, kNothing, 0);
  if (p.top_k_or_null || p.top_p_or_null || p.min_p_or_null) {
    const u32 shared = dynamic_shared();
    for (u32 i = 0; i < r.rows; ++i) decide_row(step, r, i, shared);
  } else {
    // A warp a row.
#pragma unroll 1
    for (u32 i = thread_index() / 32; i < r.rows; i += kWarps) {
      Sight<P> sight = look_at_row(step, r, i);
      judge_row(step, r, i, sight);
    }
  }
  block_sync();
  // The first row that ends the step; the last one does.
  u32 at = 0;
  for (u32 first = 0;; first += 32) {
    const u32 i = first + lane_index();
    const u32 kind = i < r.rows ? load_global(&step.state(step.slot(r.b, i))->kind) : u32{kAccepted};
    const u32 ends = warp_ballot(kind == kToken || kind == kResidual);
    if (ends == 0) continue;
    at = first + 31 - leading_zeros(ends & -ends);
    break;
  }
  const RowState* state = step.state(step.slot(r.b, at));
  u32 last = static_cast<u32>(load_global(&state->token));
  if (load_global(&state->kind) == kResidual) last = residual_token<P, Q>(p, r, at, 1.0f, false);
  write_request<P, Q>(p, r, at, last, at);
}

// A chunk that is not wide, or that may hold a NaN.
template <typename T> NXS_DEVICE_CALL void sweep_one(const Row<T>& row, u32 chunk, const Scale& scale, Partial* to) {
  Logits<T> logits = load_logits(row, chunk);
  const Partial partial = chunk_partial(logits, scale);
  if (lane_index() == 0) store_global(to, partial);
}

// A wide chunk of a pair of rows of a request that is to be swept.
template <typename T> struct Swept {
  const T* from;
  Partial* to;
  bool draft;
};

// Requests of few chunks: each by a cluster of p.cluster blocks, whose warps share out the chunks of all of its rows; then
// the first block decides. No counter is needed, and no row is passed over.
template <typename P, typename Q>
__global__ void __launch_bounds__(kThreads, 2) verify_requests_kernel(const __grid_constant__ nxs_verify_params p) {
  const Step<P, Q> step(p);
  const u32 ranks = static_cast<u32>(p.cluster), rank = ranks > 1 ? cluster_rank() : 0;
  const Request r = request_of(p, block_index_x() / ranks);
  const u32 chunks = step.of_target + step.of_draft, all = r.rows * chunks, stride = ranks * kWarps;
  if (p.target_stats_or_null)
    for (u32 i = rank; i < r.rows; i += ranks) copy_partials<P, Q>(p, r.b, i, 0, step.of_target);
  // Row i and the chunk `number` of the pair, in steps of the stride: no division but the first.
  const u32 begin = rank * kWarps + thread_index() / 32;
  u32 at = begin, i = at / chunks, number = at - i * chunks;
  const u32 rows_on = stride / chunks, chunks_on = stride - rows_on * chunks;
  const auto go_on = [&] {
    at += stride;
    i += rows_on;
    number += chunks_on;
    if (number >= chunks) {
      number -= chunks;
      ++i;
    }
  };
  if constexpr (std::is_same_v<P, Q> && sizeof(P) == 2) {
    // From here on, the first chunk that is this warp's to sweep and is wide; those before it that are not are done at
    // once, as are all the second time, if a NaN was among them.
    bool nan = false, again = false;
    const Scale measure = r.measure, draft_scale = r.draft_scale;
    const auto find = [&](Swept<P>& found) {
      for (; at < all; go_on()) {
        const bool draft = number >= step.of_target;
        if (draft ? !step.swept(r, i) : p.target_stats_or_null != nullptr) continue;
        // By value: of a choice between two places the address would be taken.
        Row<P> row = step.target_row(r, i);
        if (draft) row = step.draft_row(step.draft_index(r, i));
        const u32 chunk = draft ? number - step.of_target : number;
        Partial* to = step.partials(step.slot(r.b, i)) + number;
        if (!again && chunk < wide_chunks(row)) {
          found = Swept<P>{row.logits + static_cast<u64>(chunk) * kChunk, to, draft};
          return true;
        }
        const Row<P> copied = row;
        Scale scale = measure;
        if (draft) scale = draft_scale;
        sweep_one(copied, chunk, scale, to);
      }
      return false;
    };
#pragma unroll 1
    for (;;) {
      Swept<P> now, next;
      Logits<P> of_now, of_next;
      bool more = find(now), further = false;
      if (more) {
        of_now = detail::load_wide(now.from, 0);
        go_on();
        further = find(next);
        if (further) of_next = detail::load_wide(next.from, 0);
      }
#pragma unroll 1
      while (more) {
        const float top = lane_maximum(of_now);
        nan = nan || top != top;
        Scale scale = measure;
        if (now.draft) scale = draft_scale;
        const Partial partial = partial_of_numbers(of_now, top, scale);
        if (lane_index() == 0) store_global(now.to, partial);
        more = further;
        if (!more) break;
        now = next;
        of_now = of_next;
        go_on();
        further = find(next);
        if (further) of_next = detail::load_wide(next.from, 0);
      }
      if (again || !warp_any(nan)) break;
      again = true;
      at = begin;
      i = at / chunks;
      number = at - i * chunks;
    }
  } else {
#pragma unroll 1
    for (; at < all; go_on()) {
      Partial partial;
      if (number >= step.of_target) {
        if (!step.swept(r, i)) continue;
        Logits<Q> logits = load_logits(step.draft_row(step.draft_index(r, i)), number - step.of_target);
        partial = chunk_partial(logits, r.draft_scale);
      } else {
        if (p.target_stats_or_null) continue;
        Logits<P> logits = load_logits(step.target_row(r, i), number);
        partial = chunk_partial(logits, r.measure);
      }
      if (lane_index() == 0) store_global(step.partials(step.slot(r.b, i)) + number, partial);
    }
  }
  if (ranks > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    block_sync();
  }
  const Request copied = r;
  if (rank == 0) settle_request<P, Q>(p, copied);
}

// One instantiation file a dtype of the target (verify_<dtype>.cu) picks the draft's.
template <typename P> nxs_status verify_target(const nxs_verify_params& p, void* stream);

template <typename P, typename Q> nxs_status verify_launch(const nxs_verify_params& p, void* stream) {
  LaunchShape shape;
  shape.block = kThreads;
  shape.dynamic_smem = kSharedBytes;
  if (p.cluster > 0) {
    shape.grid = dim3(static_cast<unsigned>(p.batch * p.cluster));
    shape.cluster = static_cast<unsigned>(p.cluster);
    return launch(verify_requests_kernel<P, Q>, shape, stream, p);
  }
  shape.grid = dim3(static_cast<unsigned>(p.blocks));
  const nxs_status status = launch(verify_kernel<P, Q>, shape, stream, p);
  if (status != NXS_OK || !p.may_block) return status;
  return launch(verify_blocks_kernel<P, Q>, shape, stream, p);
}

template <typename P> nxs_status verify_for_draft(const nxs_verify_params& p, void* stream) {
  switch (p.draft_dtype) {
    case NXS_F32: return verify_launch<P, float>(p, stream);
    case NXS_F16: return verify_launch<P, f16>(p, stream);
    default: return verify_launch<P, bf16>(p, stream);
  }
}

}  // namespace nxs::verification
