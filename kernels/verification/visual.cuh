// Verification of chains of image tokens: p, q, d as in verify.cuh, u uniform.
//
//   lantern   u q(d) < p(d) + s, s the probability of as many of d's nearest codes as the bound allows; else those codes lose
//             their probability, x ~ max(p - q, 0), or uniform if nothing is left
//   grouped   u sum of q < sum of p over d's group: neighbours in the order of logits of like probability; else
//             x ~ max(p - q, 0)
//   jacobi    u q(d) < p(d), else x ~ max(p - q, 0)
//   redraft   behind the step's end, of every row: x ~ p; or d if its own test passes, else its x; or the greatest of
//             p(v) / E(v) with an exponential variate E of position and token (Gumbel noise)
//
// Layouts      as verify.cuh; with guidance a row is two rows, see guided.cuh. Tables have a row for each code.
// Who does what
//              A persistent grid of blocks of 8 warps; an item is a row of the step, numbered by row of the request first.
//              A block sweeps its row (and the draft's, where it is swept) chunk by chunk, a warp a chunk: partials, and for
//              groups each lane's nearest. What follows reads the row again, from L1: 32 KB at 16384 columns of bf16.
//              The block decides its draft and draws what replaces it, keeps that in the row's state and arrives at the
//              request's counter. The last to come looks for the first row that ends the step and writes the outputs.
//              Without a re-draft, rows behind a known end are passed over. Counters return to zero by themselves.
//   lantern    256 neighbours at a time: ids, weights, a scan a warp, the warps' totals through shared memory.
//   grouped    nearest.cuh; the members' embeddings a warp each; one warp decides.
//   drawing    all warps sum their chunks, one draws a chunk, a lane, a place.
//   race       4 tokens a thread from one Philox block.
// Bytes        each visited row once; k ids a row (lantern), 14 vectors a row (grouped with embeddings). About 12
//              instructions a column, 9 more for groups (u64: 16), about 50 for a race.
// Determinism  bitwise; src/verification/visual/host.rs is the same in the same order.
// Limits       vocabularies up to 2^18, batch up to 2^20, 1023 drafts a request.
#pragma once
#include "common/ptx/atomic.cuh"
#include "common/ptx/launch.cuh"
#include "verification/log2.cuh"
#include "verification/nearest.cuh"

namespace nxs::verification {

// Beside those of sample.cuh: noise of a token of a position; the row's number is 0.
constexpr u32 kUseNoise = 8, kNoUse = 255;

enum VisualKind : u32 { kStays, kEnds };

// What is kept of a row of the step.
struct VisualRow {
  u32 kind;
  i32 token;  // with kEnds: it, or -1 if none can be drawn
  u32 said;
  i32 redraft;  // or -1
  float stats[4];
};
static_assert(sizeof(VisualRow) == 32);

// Shared memory: a word for all; block_sum's; totals of warps; the last neighbour within the bound of each warp; the lists of
// nearest before and after; a group's members; a bit a column.
constexpr u32 kVisualWord = 0, kVisualSum = 16, kVisualTotals = 80, kVisualLast = 112, kVisualBefore = 192,
              kVisualAfter = kVisualBefore + kMostBeside * 64, kVisualMembers = kVisualAfter + kMostBeside * 64,
              kVisualBits = kVisualMembers + 128;

NXS_DEVICE u32 visual_bit_words(u32 columns) { return (columns + 31) / 32; }

template <typename T> NXS_DEVICE T given_or(const T* p, i64 at, T otherwise) {
  return p ? load_global_nc(p + at) : otherwise;
}

NXS_DEVICE float element_of(const void* table, nxs_dtype dtype, i64 at) {
  if (dtype == NXS_F32) return load_global_nc(static_cast<const float*>(table) + at);
  const u16 bits = load_global_nc(static_cast<const u16*>(table) + at);
  return dtype == NXS_F16 ? to_f32(f16{bits}) : to_f32(bf16{bits});
}

struct VisualRequest {
  u32 b;
  i64 row;       // the first
  u32 rows;      // 0: nothing to do
  bool ignored;  // there are more drafts
  Scale scale, draft_scale;
  float guidance;
};

NXS_DEVICE VisualRequest visual_request(const nxs_visual_verify_params& p, u32 b) {
  VisualRequest r;
  r.b = b;
  const i64 most_rows = p.max_drafts + 1, most = p.batch * most_rows;
  const i64 begin = load_global_nc(p.cu_rows + b), end = load_global_nc(p.cu_rows + b + 1);
  r.row = begin < 0 ? 0 : begin > most ? most : begin;
  i64 rows = (end < most ? end : most) - r.row;
  rows = rows < 0 ? 0 : rows > most_rows ? most_rows : rows;
  r.rows = static_cast<u32>(rows);
  r.ignored = end - r.row > rows;
  const float temperature = given_or(p.temperature_or_null, b, 1.0f);
  r.scale = scale_of(temperature);
  r.draft_scale = scale_of(given_or(p.draft_temperature_or_null, b, temperature));
  r.guidance = given_or(p.guidance_or_null, b, 1.0f);
  return r;
}

// A row of the step and the block that decides it.
template <typename E, typename O> struct VisualBlock {
  const nxs_visual_verify_params& p;
  const VisualRequest& r;
  const u32 i, shared, columns, chunks;
  Partial *partials, *draft_partials;
  float* sums;
  // The target; the draft's id or kNothing; the draft's row of logits, empty if it is not in its tensor.
  Row<E> row, draft_row;
  u32 drafted;
  i64 draft_index;
  Summary target, draft;
  u32 peak, draft_peak;  // the only token with weight, or kNothing
  O here, before, after;
  u32 said;

  NXS_DEVICE VisualBlock(const nxs_visual_verify_params& params, const VisualRequest& request, u32 number, u32 memory)
      : p(params), r(request), i(number), shared(memory), columns(static_cast<u32>(params.vocab)),
        chunks(chunks_of(static_cast<u32>(params.vocab))), said(0) {
    const u64 rows = static_cast<u64>(p.batch) * (static_cast<u64>(p.max_drafts) + 1);
    float* mine = reinterpret_cast<float*>(static_cast<VisualRow*>(p.workspace) + rows) +
                  static_cast<u64>(block_index_x()) * ((chunks * 5 + 1) & ~1u);
    partials = reinterpret_cast<Partial*>(mine);
    draft_partials = partials + chunks;
    sums = mine + chunks * 4;
  }


  // Says one thread's word to the block.
  NXS_DEVICE u32 say(bool mine, u32 word) const {
    block_sync();
    if (mine) store_shared(shared + kVisualWord, word);
    block_sync();
    return load_shared<u32>(shared + kVisualWord);
  }

  NXS_DEVICE Uniforms draws(u32 use) const {
    Uniforms u;
    if (p.uniforms_or_null) {
      const float* given = p.uniforms_or_null + (static_cast<u64>(r.b) * (p.max_drafts + 1) + i) * 4;
      // A test takes the first, a token the others.
      const u32 first = use == kUseAccept ? 0 : 1;
#pragma unroll
      for (u32 k = 0; k < 3; ++k) u.at[k] = load_global_nc(given + first + k);
      u.at[3] = 0;
      return u;
    }
    return draw(seed(), position(), use, use == kUseSample ? 0 : i, 0);
  }
  NXS_DEVICE u64 seed() const { return p.seeds_or_null ? static_cast<u64>(load_global_nc(p.seeds_or_null + r.b)) : 0; }
  NXS_DEVICE u64 position() const {
    return (p.positions_or_null ? static_cast<u64>(load_global_nc(p.positions_or_null + r.b)) : 0) + i;
  }

  NXS_DEVICE float p_sum() const { return target.sum; }
  NXS_DEVICE float q_sum() const { return draft_peak != kNothing ? 1.0f : draft.sum; }
  NXS_DEVICE float p_weight(u32 token) const { return weight_of(target, logit_at(row, token)); }
  NXS_DEVICE float q_weight(u32 token) const {
    if (draft_peak != kNothing) return draft_peak == token ? 1.0f : 0.0f;
    return weight_of(draft, logit_at(draft_row, token));
  }
  // The code of a token, or kNothing.
  NXS_DEVICE u32 code_of(u32 token) const {
    const i64 code = static_cast<i64>(token) - p.first_code;
    return code >= 0 && code < p.codes ? static_cast<u32>(code) : kNothing;
  }
  // The token that is the n-th neighbour of a code, or kNothing.
  NXS_DEVICE u32 neighbour(u32 code, u32 n) const {
    const i64 at = code * p.neighbours_stride_row + n;
    const i64 other = p.neighbours_dtype == NXS_U16
                          ? static_cast<i64>(load_global_nc(static_cast<const u16*>(p.neighbours_or_null) + at))
                          : load_global_nc(static_cast<const i32*>(p.neighbours_or_null) + at);
    return other >= 0 && other < p.codes ? static_cast<u32>(p.first_code + other) : kNothing;
  }

  NXS_DEVICE bool is_grouped() const { return p.rule == NXS_VISUAL_GROUPED; }

  // All of the block: what is known of the row and of the draft's beside it.
  NXS_DEVICE void sweep() {
    const i64 logical = r.row + i, index = given_or(p.row_index_or_null, logical, static_cast<i32>(logical));
    const bool there = index >= 0 && index < p.target_rows;
    row = make_row<E>(p.target, p.target_free_or_null, (there ? index : 0) * p.target_stride_row, r.guidance,
                      p.allow_or_null ? p.allow_or_null + logical * p.allow_stride_row : nullptr, there ? columns : 0);
    drafted = kNothing;
    if (i + 1 < r.rows) {
      const i32 id = load_global_nc(p.drafts + logical);
      if (id >= 0 && id < p.vocab) drafted = static_cast<u32>(id);
    }
    bool swept = false;
    draft_index = -1;
    if (p.draft_or_null && drafted != kNothing && !r.scale.greedy()) {
      draft_index = p.draft_row_or_null ? load_global_nc(p.draft_row_or_null + logical)
                                        : static_cast<i64>(r.b) * p.max_drafts + i;
      if (draft_index >= p.draft_rows) draft_index = -1;
      swept = draft_index >= 0 && !p.draft_stats_or_null;
    }
    draft_row = make_row<E>(p.draft_or_null, p.draft_free_or_null, (draft_index < 0 ? 0 : draft_index) * p.draft_stride_row,
                            r.guidance, nullptr, draft_index < 0 ? 0 : columns);
    here = 0;
    before = after = ~O{0};
    const bool grouped = is_grouped() && drafted != kNothing;
    if (grouped) here = order_at<E, O>(row, drafted);
    for (u32 at = thread_index() / 32; at < (swept ? 2 * chunks : chunks); at += kWarps) {
      const bool of_draft = at >= chunks;
      const u32 chunk = of_draft ? at - chunks : at;
      // By value: of a choice between two places the address would be taken.
      Row<E> source = row;
      Scale scale = r.scale;
      if (of_draft) {
        source = draft_row;
        scale = r.draft_scale;
      }
      Logits<E> logits = load_logits(source, chunk);
      const Partial partial = chunk_partial(logits, scale);
      if (lane_index() == 0) store_global(partials + at, partial);
      if (grouped && !of_draft) nearest_of_chunk<E, O>(row, logits, chunk, here, before, after);
    }
    block_sync();
    const auto load = [&](u32 chunk) { return load_global(partials + chunk); };
    target = summarize_few(chunks, r.scale, load);
    if (p.top_k_or_null || p.top_p_or_null || p.min_p_or_null) {
      const i32 top_k = given_or(p.top_k_or_null, r.b, 0);
      const Truncation truncation = {top_k > 0 ? static_cast<u32>(top_k) : 0, given_or(p.top_p_or_null, r.b, 1.0f),
                                     given_or(p.min_p_or_null, r.b, 0.0f)};
      truncate_row(truncation, target, row, chunks, partials, shared + kVisualSum);
    }
    peak = target.shape == kPeak ? find_peak(target, row, chunks, load) : kNothing;
    draft_peak = drafted;
    draft.sum = 1.0f;
    if (swept || (draft_index >= 0 && p.draft_stats_or_null)) {
      draft = swept ? summarize_few(chunks, r.draft_scale, [&](u32 chunk) { return load_global(draft_partials + chunk); })
                    : summary_of_draft(p.draft_stats_or_null + draft_index * 4);
      if (draft.shape == kSpread) draft_peak = kNothing;
    }
    if (row.columns == 0) said |= NXS_STATUS_ROW_OUT_OF_RANGE;
    if (target.nan) said |= NXS_STATUS_TARGET_NAN;
    if (target.beyond || target.top == INFINITY) said |= NXS_STATUS_TARGET_BEYOND;
    if (target.shape == kEmpty) said |= NXS_STATUS_TARGET_EMPTY;
  }

  // A warp: a token of the target, or kNothing.
  NXS_DEVICE u32 sample(u32 use) const {
    if (peak != kNothing) return peak;
    if (target.shape != kSpread) return kNothing;
    const Uniforms u = draws(use);
    return sample_row(target, row, chunks, u.at[0], u.at[1], u.at[2],
                      [&](u32 chunk) { return load_global(partials + chunk); });
  }

  // All of the block: the weight that neighbours add; `any`: whether the bound allows one.
  NXS_DEVICE float added(u32 code, float most, bool& any) const {
    const u32 warp = thread_index() / 32, lane = lane_index(), accumulated = static_cast<u32>(p.accumulated);
    float base = 0, found = 0;
    any = false;
#pragma unroll 1
    for (u32 first = 0; first < accumulated && base <= most; first += kThreads) {
      const u32 n = first + thread_index(), token = n < accumulated ? neighbour(code, n) : kNothing;
      const float weight = token != kNothing ? p_weight(token) : 0.0f;
      warp_sync();
      const float sums = scan(weight);
      block_sync();
      if (lane == 31) store_shared(shared + kVisualTotals + warp * 4, sums);
      block_sync();
      float mine = base;
#pragma unroll
      for (u32 w = 0; w < kWarps; ++w) {
        if (w == warp) mine = base;
        base = base + load_shared<float>(shared + kVisualTotals + w * 4);
      }
      const float at = mine + sums;
      const u32 within = warp_ballot(n < accumulated && at <= most);
      const float last = shuffle(at, within ? 31 - leading_zeros(within) : 0);
      if (lane == 0) store_shared(shared + kVisualLast + warp * 8, Vec<u32, 2>{{within != 0, float_bits(last)}});
      block_sync();
#pragma unroll
      for (u32 w = 0; w < kWarps; ++w) {
        const auto other = load_shared<Vec<u32, 2>>(shared + kVisualLast + w * 8);
        if (other.data[0]) {
          any = true;
          found = bits_float(other.data[1]);
        }
      }
    }
    return found;
  }

  // A warp: the squared distance of two codes' embeddings, in every lane.
  NXS_DEVICE float distance(u32 a, u32 b) const {
    const i64 from_a = a * p.embeddings_stride_row, from_b = b * p.embeddings_stride_row;
    float sum = 0;
#pragma unroll 4
    for (u32 d = lane_index(); d < static_cast<u32>(p.dim); d += 32) {
      const float difference = element_of(p.embeddings_or_null, p.embeddings_dtype, from_a + d) -
                               element_of(p.embeddings_or_null, p.embeddings_dtype, from_b + d);
      sum = fma(difference, difference, sum);
    }
    warp_sync();
    return sum_of_lanes(sum);
  }

  // All of the block: p and q of the draft's group, in warp 0.
  NXS_DEVICE void group(float& of_p, float& of_q) const {
    const u32 warp = thread_index() / 32, lane = lane_index();
    const Side<O> down = {here, false}, up = {here, true};
    const u32 below = static_cast<u32>(p.below), above = static_cast<u32>(p.above), code = code_of(drafted);
    const bool embedded = p.embeddings_or_null != nullptr;
    if (!(embedded && code == kNothing)) {
      list_nearest(row, down, before, below, shared + kVisualBefore);
      list_nearest(row, up, after, above, shared + kVisualAfter);
    }
    block_sync();
    u32 member = kNothing;
    const auto weight_and_gap = [&] {
      const float own = p_weight(drafted);
      if (member == kNothing || member == drafted) return;
      const float gap = magnitude(p_weight(member) - own);
      if (!(gap < multiply(p.probability_gap, p_sum()))) member = kNothing;
    };
    if (warp == 0) {
      if (!(embedded && code == kNothing)) {
        member = take_nearest(down, below, shared + kVisualBefore, 1, kNothing);
        const bool alone = below > 0 && shuffle(member, below) == kNothing;
        member = take_nearest(up, above, shared + kVisualAfter, 1 + below, member);
        if (alone) member = kNothing;
      }
      if (lane == 0) member = drafted;
      weight_and_gap();
      if (embedded) store_shared(shared + kVisualMembers + lane * 4, member);
    }
    if (embedded) {
      block_sync();
      for (u32 n = 1 + warp; n < 32; n += kWarps) {
        const u32 other = load_shared<u32>(shared + kVisualMembers + n * 4);
        if (other == kNothing) continue;
        const u32 of_other = code_of(other);
        const bool near = of_other != kNothing && distance(code, of_other) < p.distance;
        warp_sync();
        if (!near && lane == 0) store_shared(shared + kVisualMembers + n * 4, u32{kNothing});
      }
      block_sync();
      if (warp == 0) member = load_shared<u32>(shared + kVisualMembers + lane * 4);
    }
    if (warp == 0) {
      const float w = member != kNothing ? p_weight(member) : 0.0f, v = member != kNothing ? q_weight(member) : 0.0f;
      warp_sync();
      of_p = sum_of_lanes(w);
      of_q = sum_of_lanes(v);
    }
  }

  // A token by weights: max(p - q, 0) without what the bits in shared memory take away, or the codes that are allowed.
  struct Weights {
    const VisualBlock& block;
    bool uniform, zeroing;
    u32 chunk, zeroed;  // a byte for each of a lane's groups
    Logits<E> of_p, of_q;

    NXS_DEVICE Weights(const VisualBlock& of, bool is_uniform, bool is_zeroing, u32 number)
        : block(of), uniform(is_uniform), zeroing(is_zeroing), chunk(number), zeroed(0) {
      of_p = load_logits(block.row, chunk);
      if (block.draft_peak == kNothing && !uniform) of_q = load_logits(block.draft_row, chunk);
      if (zeroing) {
#pragma unroll
        for (u32 j = 0; j < kGroups; ++j) {
          const u32 column = column_of(chunk, lane_index(), j * kGroup);
          if (column < block.columns)
            zeroed |= static_cast<u32>(load_shared<u8>(block.shared + kVisualBits + column / 8)) << j * 8;
        }
      }
    }
    NXS_DEVICE float operator()(u32 place) const {
      const u32 token = column_of(chunk, lane_index(), place);
      if (uniform) return of_p.at(place) > -INFINITY && block.code_of(token) != kNothing ? 1.0f : 0.0f;
      const float p = weight_straight(block.target, of_p.at(place));
      float q = block.draft_peak == token ? 1.0f : 0.0f;
      if (block.draft_peak == kNothing) q = weight_straight(block.draft, of_q.at(place));
      const float excess = maximum(fma(p, block.q_sum(), -multiply(q, block.p_sum())), 0.0f);
      return p == 0 || (zeroed >> place & 1) ? 0.0f : excess;
    }
  };

  // All of the block.
  NXS_DEVICE u32 draw_by(bool uniform, bool zeroing) const {
    const u32 warp = thread_index() / 32;
#pragma unroll 1
    for (u32 chunk = warp; chunk < chunks; chunk += kWarps) {
      const Weights weights(*this, uniform, zeroing, chunk);
      float sum = 0;
#pragma unroll
      for (u32 place = 0; place < 32; ++place) sum = sum + weights(place);
      sum = sum_of_lanes(sum);
      if (lane_index() == 0) store_global(sums + chunk, sum);
    }
    block_sync();
    u32 token = kNothing;
    if (warp == 0) {
      const Uniforms u = draws(kUseResidual);
      const u32 chunk = pick_chunk(chunks, u.at[0], [&](u32 at) { return load_global(sums + at); });
      if (chunk != kNothing) {
        const Weights weights(*this, uniform, zeroing, chunk);
        const u32 place = pick_place(u.at[1], u.at[2], [&](u32 at) { return weights(at); });
        if (place != kNothing) token = chunk * kChunk + place;
      }
    }
    return say(thread_index() == 0, token);
  }

  // All of the block: the token in place of a draft that was rejected; `zeroing`: its code, whose nearest lose their
  // probability, or kNothing.
  NXS_DEVICE u32 replace(u32 zeroing) const {
    if (zeroing != kNothing) {
      const u32 words = visual_bit_words(columns);
      for (u32 at = thread_index(); at < words; at += kThreads) store_shared(shared + kVisualBits + at * 4, 0u);
      block_sync();
      for (u32 n = thread_index(); n < static_cast<u32>(p.zeroed); n += kThreads) {
        const u32 token = neighbour(zeroing, n);
        if (token != kNothing) atomic_or_shared(shared + kVisualBits + token / 32 * 4, 1u << token % 32);
      }
      block_sync();
    }
    // Once more only if nothing is left.
    u32 token = kNothing;
#pragma unroll 1
    for (u32 round = 0; round < (p.rule == NXS_VISUAL_LANTERN ? 2 : 1) && token == kNothing; ++round)
      token = draw_by(round == 1, round == 0 && zeroing != kNothing);
    return token;
  }

  // All of the block: whether the draft stays, and else the token in its place, or the use of a draw from p that is.
  NXS_DEVICE u32 test(u32& token, u32& use) {
    token = kNothing;
    use = kNoUse;
    if (target.shape == kEmpty) return kEnds;
    bool good = drafted != kNothing;
    if (good) {
      if (p.syntax_or_null && load_global_nc(p.syntax_or_null + drafted / 32) >> (drafted % 32) & 1) return kStays;
      if (peak != kNothing) {
        token = peak;
        return peak == drafted ? kStays : kEnds;
      }
      if (p.draft_or_null && draft_index < 0) {
        said |= NXS_STATUS_ROW_OUT_OF_RANGE | NXS_STATUS_DRAFT_BAD;
        good = false;
      } else if (p.draft_or_null && (draft.nan || draft.shape == kEmpty)) {
        said |= NXS_STATUS_DRAFT_BAD;
        good = false;
      }
    }
    if (!good) {
      use = kUseSample;
      return kEnds;
    }
    const float own = p_weight(drafted);
    float of_p = own, of_q = q_weight(drafted);
    if (of_q == 0) said |= NXS_STATUS_DRAFT_IMPOSSIBLE;
    u32 zeroing = kNothing;
    if (is_grouped()) {
      group(of_p, of_q);
    } else if (p.rule == NXS_VISUAL_LANTERN) {
      const u32 code = code_of(drafted);
      of_p = 0;
      if (code != kNothing) {
        bool any;
        const float most = p.bound <= 1.0f ? multiply(p.bound, p_sum()) : multiply(p.bound - 1.0f, own);
        of_p = own + added(code, most, any);
        if (any) zeroing = code;
      }
    }
    u32 stays = 0;
    if (thread_index() == 0)
      stays = multiply(multiply(draws(kUseAccept).at[0], of_q), p_sum()) < multiply(of_p, q_sum());
    if (say(thread_index() == 0, stays)) return kStays;
    token = replace(zeroing);
    // p is q but for rounding.
    if (token == kNothing && p.rule != NXS_VISUAL_LANTERN) use = kUseResidual;
    return kEnds;
  }

  // All of the block: the token whose weight over its variate is greatest.
  NXS_DEVICE u32 race() const {
    const u64 of_seed = seed(), at = position();
    float most = 0;
    u32 best = kNothing;
#pragma unroll 1
    for (u32 first = thread_index() * 4; first < columns; first += kThreads * 4) {
      const PhiloxBlock words = philox(of_seed, at, kUseNoise, first / 4);
#pragma unroll
      for (u32 k = 0; k < 4; ++k) {
        const float score = divide(p_weight(first + k), exponential(words.word[k]));
        if (score > most) {
          most = score;
          best = first + k;
        }
      }
    }
    warp_sync();
    const u32 warp = thread_index() / 32;
    u32 top = warp_reduce_max(float_bits(most));
    best = warp_reduce_min(top == float_bits(most) ? best : kNothing);
    block_sync();
    if (lane_index() == 0) store_shared(shared + kVisualLast + warp * 8, Vec<u32, 2>{{top, best}});
    block_sync();
    top = 0;
#pragma unroll
    for (u32 w = 0; w < kWarps; ++w) {
      const auto other = load_shared<Vec<u32, 2>>(shared + kVisualLast + w * 8);
      if (other.data[0] > top || (other.data[0] == top && other.data[1] < best)) {
        top = other.data[0];
        best = other.data[1];
      }
    }
    return best;
  }

  // All of the block: decides the row, and keeps what is to be kept.
  NXS_DEVICE u32 decide() {
    sweep();
    u32 token, use, redraft = kNothing;
    const u32 kind = test(token, use);
    const bool races = p.redraft == NXS_REDRAFT_GUMBEL && target.shape == kSpread;
    const u32 again = p.redraft == NXS_REDRAFT_NONE || p.redraft == NXS_REDRAFT_MAXIMAL || races ? kNoUse : kUseDraft;
    // One copy of the code for both.
#pragma unroll 1
    for (u32 round = 0; round < 2; ++round) {
      const u32 of_round = round == 0 ? use : again;
      if (of_round == kNoUse) continue;
      u32 drawn = kNothing;
      if (thread_index() < 32) drawn = sample(of_round);
      if (round == 0) token = drawn;
      if (round == 1) redraft = drawn;
    }
    // Those of thread 0 are kept.
    if (p.redraft == NXS_REDRAFT_MAXIMAL) redraft = kind == kStays ? drafted : token;
    if (races) redraft = race();
    if (thread_index() == 0) {
      VisualRow state = {kind, static_cast<i32>(token), said, static_cast<i32>(redraft), {}};
      const bool spread = target.shape == kSpread;
      const float sum = spread ? target.sum : 0.0f;
      state.stats[0] = target.top;
      state.stats[1] = target.nan ? -sum : sum;
      state.stats[2] = spread ? target.cut : -INFINITY;
      state.stats[3] = spread ? target.scale.per_logit : 0.0f;
      Vec<u32, 4> words[2];
      memcpy(words, &state, sizeof(state));
      Vec<u32, 4>* to = reinterpret_cast<Vec<u32, 4>*>(static_cast<VisualRow*>(p.workspace) +
                                                       static_cast<u64>(r.b) * (p.max_drafts + 1) + i);
      store_global(to, words[0]);
      store_global(to + 1, words[1]);
    }
    return kind;
  }
};

// All of the block: the outputs of a request, of whose rows all up to the one that ends the step are decided.
NXS_DEVICE void write_visual(const nxs_visual_verify_params& p, const VisualRequest& r) {
  const u32 most_rows = static_cast<u32>(p.max_drafts) + 1, lane = lane_index();
  const u64 first = static_cast<u64>(r.b) * most_rows;
  const VisualRow* states = static_cast<const VisualRow*>(p.workspace) + first;
  // Each warp for itself: the first row that ends it.
  u32 end = 0;
  for (u32 base = 0; base < r.rows; base += 32) {
    const u32 ends = warp_ballot(base + lane < r.rows && load_global(&states[base + lane].kind) != kStays);
    if (ends) {
      end = base + 31 - leading_zeros(ends & -ends);
      break;
    }
  }
  u32 said = r.ignored ? NXS_STATUS_DRAFTS_IGNORED : 0;
  const u32 looked_at = r.rows == 0 ? 0 : p.redraft == NXS_REDRAFT_NONE ? end + 1 : r.rows;
  for (u32 base = 0; base < looked_at; base += 32)
    said |= warp_reduce_or(base + lane < looked_at ? load_global(&states[base + lane].said) : 0);
  for (u32 at = thread_index(); at < most_rows; at += kThreads) {
    i32 token = -1, redraft = -1;
    const bool behind = at < r.rows && at > end && p.redraft != NXS_REDRAFT_NONE;
    if (at < r.rows && at < end) token = load_global_nc(p.drafts + r.row + at);
    if (at < r.rows && at == end) {
      token = load_global(&states[at].token);
      if (token < 0) token = p.fallback;
    }
    store_global(p.tokens + first + at, token);
    if (p.redrafts_or_null) {
      if (behind) {
        redraft = load_global(&states[at].redraft);
        if (redraft < 0) redraft = p.fallback;
      }
      store_global(p.redrafts_or_null + first + at, redraft);
    }
    if (p.redraft_stats_or_null) {
      for (u32 k = 0; k < 4; ++k)
        store_global(p.redraft_stats_or_null + (first + at) * 4 + k,
                     behind ? load_global(&states[at].stats[k]) : bits_float(0x7fc00000u));
    }
  }
  if (thread_index() == 0) {
    store_global(p.emitted + r.b, r.rows > 0 ? static_cast<i32>(end) + 1 : 0);
    store_global(p.accepted + r.b, static_cast<i32>(end));
    store_global(p.status + r.b, said);
    if (p.last_row_or_null)
      store_global(p.last_row_or_null + r.b, r.rows > 0 ? static_cast<i32>(r.row) + static_cast<i32>(end) : -1);
  }
}

// Rows in f32 hold twice the registers, guided ones more.
template <typename E> constexpr u32 kVisualBlocks = kGuided<E> ? 2 : sizeof(E) == 4 ? 3 : 4;

template <typename E, typename O>
__global__ void __launch_bounds__(kThreads, kVisualBlocks<E>) visual_kernel(
    const __grid_constant__ nxs_visual_verify_params p) {
  const u32 shared = dynamic_shared(), batch = static_cast<u32>(p.batch);
  const u64 items = static_cast<u64>(p.batch) * (static_cast<u64>(p.max_drafts) + 1);
  for (u64 item = block_index_x(); item < items; item += grid_size_x()) {
    const u32 i = static_cast<u32>(item / batch), b = static_cast<u32>(item - static_cast<u64>(i) * batch);
    const VisualRequest r = visual_request(p, b);
    if (i >= r.rows) {
      if (r.rows == 0 && i == 0) write_visual(p, r);
      continue;
    }
    // 0, or max_drafts + 1 - i where i is the first row known to end the step.
    u32* stop_word = p.counters + p.batch + b;
    VisualBlock<E, O> block(p, r, i, shared);
    // In the first round nothing is known yet.
    u32 passed = 0;
    if (item != block_index_x() && p.redraft == NXS_REDRAFT_NONE) {
      u32 stop = 0;
      if (thread_index() == 0) stop = load_relaxed_global(stop_word);
      stop = block.say(thread_index() == 0, stop);
      passed = stop != 0 && i > static_cast<u32>(p.max_drafts) + 1 - stop;
    }
    if (!passed) {
      const u32 kind = block.decide();
      if (kind == kEnds && thread_index() == 0) atomic_max_global(stop_word, static_cast<u32>(p.max_drafts) + 1 - i);
    }
    u32 old = 0;
    if (thread_index() == 0) old = atomic_inc_acq_rel_global(p.counters + b, r.rows - 1);
    if (block.say(thread_index() == 0, old) != r.rows - 1) continue;
    if (thread_index() == 0) store_global(stop_word, 0u);
    write_visual(p, r);
    block_sync();
  }
}

// One instantiation file a dtype (visual_<dtype>.cu).
template <typename T> nxs_status visual_verify(const nxs_visual_verify_params& p, void* stream);

template <typename E, typename O> nxs_status visual_launch(const nxs_visual_verify_params& p, void* stream) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(p.blocks));
  shape.block = kThreads;
  shape.dynamic_smem = kVisualBits + static_cast<unsigned>((p.vocab + 31) / 32 * 4);
  return launch(visual_kernel<E, O>, shape, stream, p);
}

}  // namespace nxs::verification
