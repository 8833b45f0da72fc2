// Verification of trees of drafts: the path that the target would have gone, and the token that follows.
//
//   greedy, match   x = argmax p, or x ~ p: on to the first child that is x, else x ends the walk
//   reject          children in turn: on to x if p(x) - (c + u s / l) q(x) > 0, else c += s / l with
//                   s = sum of max(p - c q, 0), l = 1 or what q has beside the children tried; after the last one
//                   x ~ max(p - c q, 0) ends the walk
//
// Recursive rejection replaces p by r = norm(max(r - q, 0)) after each child that fails. With r = max(p - c q, 0) / s and q
// divided by l, max(r - q, 0) is max(p - (c + s / l) q, 0) / s again: one number stands for all of r. A child that was tried
// without replacement has no weight in r either, as it failed and c grew by no less than its test took away.
//
// Layouts      as of verify.cuh, but rows of a request are the nodes of its tree, and children come after their parents.
//              Described in nextscale.h.
// Who does what
//              A request has a cluster of 1 to 16 blocks of 8 warps (one block without clusters). They walk down its tree
//              together, a node at a time: rows beside the path are never read. Of the chunks of the node's rows each warp has
//              those that leave its rest; it puts their partials into the shared memory of all blocks of the cluster (one store,
//              a lane a block), or where they are too many, into global memory. After the cluster's barrier the
//              first warp of each block knows all partials and decides as the others do: no decision is passed on.
//              After each child that fails the blocks sum max(p - c q, 0), rows then coming from L2, and pass on the sums in
//              the same way. Partials and sums have two places by turns, so that a block that is ahead writes to the other one.
//              Truncation is done by the first block, in global memory.
//              The kernel itself is the sweep; what is done once a node is in functions that are called, which find the
//              request and the summaries of the node's rows in shared memory.
// Bytes        rows of the path * vocab * sizeof(target), once, and of the draft where it is swept; again, from L2, for each
//              child that fails. FLOPs: about 22 a column, 30 with a residual.
// Determinism  bitwise: see row_stats.cuh and sample.cuh; sums are made chunk by chunk whoever makes them.
// Limits       vocabularies up to 2^24, batch up to 2^20, 1024 nodes, 64 drafts on a path.
#pragma once
#include <type_traits>

#include "common/ptx/cluster.cuh"
#include "common/ptx/launch.cuh"
#include "verification/sample.cuh"

namespace nxs::verification::tree {

constexpr u32 kMostNodes = 1024, kMostDepth = 64, kMostCluster = 16, kMostShared = 1024;

// Where things lie in shared memory; the tree and the partials follow. Two summaries: the target's row and the draft's.
constexpr u32 kSharedSum = 0, kSharedWords = 64, kSharedSaid = 80, kSharedRequest = 96, kSharedSummaries = kSharedRequest + 64,
              kSharedPath = kSharedSummaries + 64, kSharedTree = kSharedPath + (kMostDepth + 1) * 4 + 12;
static_assert(kSharedTree % 16 == 0 && kSharedRequest % 16 == 0 && kSharedSummaries % 16 == 0);

// Bytes of shared memory: nodes have two words of links, a token, a place in the list of children and one in that of tokens
// tried; chunks have partials and sums, each twice.
inline u32 shared_bytes(u32 max_nodes, u32 chunks) { return kSharedTree + (max_nodes * 5 + 1) / 2 * 8 + chunks * 32; }

template <typename T> NXS_DEVICE T or_else(const T* p, i64 at, T otherwise) {
  return p ? load_global_nc(p + at) : otherwise;
}

// A request as its parameters say: in shared memory, from which whoever needs it reads it again.
struct alignas(16) Request {
  i64 row;       // the first
  u32 b;
  u32 nodes;     // 0: nothing to do
  u32 said;      // from the start
  i32 rule;
  Scale scale, draft_scale, measure;  // measure: what partials of the target are made with
  Truncation truncation;
  u32 truncates;
};
static_assert(sizeof(Request) == 64);

// Structures of whole 16-byte pieces, in shared memory.
template <typename T> NXS_DEVICE void put_shared(u32 to, const T& value) {
  Vec<u32, 4> pieces[sizeof(T) / 16];
  memcpy(pieces, &value, sizeof(value));
#pragma unroll
  for (u32 k = 0; k < sizeof(T) / 16; ++k) store_shared(to + k * 16, pieces[k]);
}
template <typename T> NXS_DEVICE T get_shared(u32 from) {
  Vec<u32, 4> pieces[sizeof(T) / 16];
#pragma unroll
  for (u32 k = 0; k < sizeof(T) / 16; ++k) pieces[k] = load_shared<Vec<u32, 4>>(from + k * 16);
  T value;
  memcpy(&value, pieces, sizeof(value));
  return value;
}

NXS_DEVICE Request request_of(const nxs_tree_verify_params& p, u32 b) {
  Request r;
  r.b = b;
  const i64 most = p.batch * p.max_nodes;
  i64 begin = static_cast<i64>(b) * p.max_nodes, end = begin + p.max_nodes;
  if (p.cu_rows_or_null) {
    begin = load_global_nc(p.cu_rows_or_null + b);
    end = load_global_nc(p.cu_rows_or_null + b + 1);
  }
  r.row = begin < 0 ? 0 : begin > most ? most : begin;
  i64 nodes = (end < most ? end : most) - r.row;
  nodes = nodes < 0 ? 0 : nodes > p.max_nodes ? p.max_nodes : nodes;
  r.nodes = static_cast<u32>(nodes);
  r.said = end - r.row > nodes ? NXS_STATUS_DRAFTS_IGNORED : 0;
  r.rule = or_else(p.rules_or_null, b, p.rule);
  if (r.rule < NXS_RULE_GREEDY || r.rule > NXS_RULE_REJECT) r.rule = p.rule;
  const float temperature = or_else(p.temperature_or_null, b, 1.0f);
  r.scale = r.rule == NXS_RULE_GREEDY ? Scale{0, 0} : scale_of(temperature);
  r.draft_scale = scale_of(or_else(p.draft_temperature_or_null, b, temperature));
  r.measure = r.scale.greedy() && p.log_probs_or_null ? scale_of(1.0f) : r.scale;
  const i32 top_k = or_else(p.top_k_or_null, b, 0);
  r.truncation = {top_k > 0 ? static_cast<u32>(top_k) : 0, or_else(p.top_p_or_null, b, 1.0f),
                  or_else(p.min_p_or_null, b, 0.0f)};
  r.truncates = !r.scale.greedy() && ((r.truncation.top_k > 0 && r.truncation.top_k < p.vocab) ||
                                      r.truncation.top_p < 1.0f || r.truncation.min_p > 0.0f);
  return r;
}

// The target's distribution after a node: with a peak, all on it.
template <typename P> struct Target {
  Row<P> row;
  Summary summary;
  u32 peak;
  NXS_DEVICE float weight(u32 token, float logit) const {
    if (peak != kNothing) return peak == token ? 1.0f : 0.0f;
    return weight_of(summary, logit);
  }
};

// That which its children were drawn from, if it is spread.
template <typename Q> struct Draft {
  Row<Q> row;
  Summary summary;
};

// What is left of p after the children tried, max(p - c q, 0).
NXS_DEVICE float residual_of(float c, float p, float q) { return p == 0 ? 0.0f : maximum(fma(-c, q, p), 0.0f); }

enum Command : u32 { kGo, kEmit, kResidual };

// What is to be known of a node before its rows are swept.
struct Node {
  u32 count;   // children
  u32 random;  // whether they are tried against what they were drawn from
};

// What is tested of a child: by lane, of the first 32 children of a node.
struct Tested {
  float p_logit, q_logit;
};

// A block's part in a request. Each function that is called makes one of its own, so that none has to be put aside.
template <typename P, typename Q> struct Walk {
  const nxs_tree_verify_params& p;
  const u32 shared, ranks, rank, warp;
  const u32 of_target, of_draft;  // chunks; of_draft: 0 where there is no draft
  const Request r;
  const bool shares;              // partials lie in shared memory

  NXS_DEVICE explicit Walk(const nxs_tree_verify_params& params)
      : p(params), shared(dynamic_shared()), ranks(static_cast<u32>(params.cluster)),
        rank(ranks > 1 ? cluster_rank() : 0), warp(thread_index() / 32),
        of_target(chunks_of(static_cast<u32>(params.vocab))),
        of_draft(params.draft_or_null ? chunks_of(static_cast<u32>(params.draft_vocab)) : 0),
        r(get_shared<Request>(shared + kSharedRequest)), shares(params.shared_partials && !r.truncates) {}

  // ---- places
  NXS_DEVICE u32 words() const { return shared + kSharedWords; }
  NXS_DEVICE u32 tree(u32 array, u32 node) const {
    return shared + kSharedTree + (array * static_cast<u32>(p.max_nodes) + node) * 4;
  }
  NXS_DEVICE u32 links(u32 node) const { return tree(0, node); }
  NXS_DEVICE u32 siblings(u32 node) const { return tree(1, node); }
  NXS_DEVICE u32 token_of(u32 node) const { return load_shared<u32>(tree(2, node)); }
  NXS_DEVICE u32 child(u32 at) const { return load_shared<u32>(tree(3, at)); }
  NXS_DEVICE u32 tried(u32 at) const { return tree(4, at); }
  // Partials, or with `place` 2 and 3 sums of residuals, of chunk `at`: the target's first.
  NXS_DEVICE u32 in_shared(u32 place, u32 at) const {
    const u32 begin = kSharedTree + (static_cast<u32>(p.max_nodes) * 5 + 1) / 2 * 8;
    return shared + begin + (place * (of_target + of_draft) + at) * 8;
  }
  NXS_DEVICE Partial* in_global(u32 place, u32 at) const {
    u8* begin = static_cast<u8*>(p.workspace) + static_cast<u64>(p.batch) * NXS_TREE_STATE_BYTES;
    return reinterpret_cast<Partial*>(begin) + (static_cast<u64>(r.b) * 4 + place) * (of_target + of_draft) + at;
  }
  // Of a row that was cut down: the least logit that is left, and whether there was a NaN.
  NXS_DEVICE Vec<u32, 2>* cut() const {
    return reinterpret_cast<Vec<u32, 2>*>(static_cast<u8*>(p.workspace) + static_cast<u64>(r.b) * NXS_TREE_STATE_BYTES);
  }
  NXS_DEVICE Partial load(u32 place, u32 at) const {
    return shares ? load_shared<Partial>(in_shared(place, at)) : load_global(in_global(place, at));
  }
  // By all lanes of a warp, with the same value.
  NXS_DEVICE void pass_on(u32 place, u32 at, const Partial& value) const {
    if (!shares) {
      if (lane_index() == 0) store_global(in_global(place, at), value);
    } else if (ranks == 1) {
      if (lane_index() == 0) store_shared(in_shared(place, at), value);
    } else if (lane_index() < ranks) {
      store_cluster(map_to_rank(in_shared(place, at), lane_index()), value);
    }
  }
  // All threads of all blocks of the request.
  NXS_DEVICE void meet() const {
    if (ranks == 1) {
      block_sync();
    } else {
      warp_sync();
      cluster_arrive();
      cluster_wait();
    }
  }
  // What is said of the request; the first thread's.
  NXS_DEVICE void say(u32 said) const {
    if (said != 0 && thread_index() == 0)
      store_shared(shared + kSharedSaid, load_shared<u32>(shared + kSharedSaid) | said);
  }
  // Summaries of the node's rows, the target's (0) and the draft's (1); the first warp keeps them.
  NXS_DEVICE void keep(u32 which, const Summary& of) const {
    if (lane_index() != 0) return;
    const u32 to = shared + kSharedSummaries + which * 32;
    store_shared(to, Vec<u32, 4>{{of.shape, of.nan, float_bits(of.top), float_bits(of.reference)}});
    store_shared(to + 16, Vec<float, 4>{{of.sum, of.cut, of.scale.per_logit, of.scale.per_exponent}});
  }
  NXS_DEVICE Summary kept(u32 which) const {
    const u32 from = shared + kSharedSummaries + which * 32;
    const auto a = load_shared<Vec<u32, 4>>(from);
    const auto b = load_shared<Vec<float, 4>>(from + 16);
    return Summary{static_cast<Shape>(a.data[0]), a.data[1] != 0, false,     bits_float(a.data[2]),
                   bits_float(a.data[3]),         b.data[0],      b.data[1], Scale{b.data[2], b.data[3]}};
  }
  // Says the first thread's words to the block.
  NXS_DEVICE Vec<u32, 4> tell(const Vec<u32, 4>& mine) const {
    block_sync();
    if (thread_index() == 0) store_shared(words(), mine);
    block_sync();
    return load_shared<Vec<u32, 4>>(words());
  }

  // ---- rows
  NXS_DEVICE i64 target_index(u32 node) const {
    const i64 logical = r.row + node, row = or_else(p.row_index_or_null, logical, static_cast<i32>(logical));
    return row >= 0 && row < p.target_rows ? row : -1;
  }
  NXS_DEVICE Row<P> target_row(u32 node) const {
    const i64 row = target_index(node);
    return Row<P>{static_cast<const P*>(p.target) + (row < 0 ? 0 : row) * p.target_stride_row,
                  p.allow_or_null ? p.allow_or_null + (r.row + node) * p.allow_stride_row : nullptr,
                  row < 0 ? 0 : static_cast<u32>(p.vocab)};
  }
  NXS_DEVICE i64 draft_index(u32 node) const {
    const i64 logical = r.row + node, row = or_else(p.draft_row_or_null, logical, static_cast<i32>(logical));
    return row >= 0 && row < p.draft_rows ? row : -1;
  }
  NXS_DEVICE Row<Q> draft_row(u32 node) const {
    const i64 row = draft_index(node);
    return Row<Q>{static_cast<const Q*>(p.draft_or_null) + (row < 0 ? 0 : row) * p.draft_stride_row, nullptr,
                  row < 0 ? 0 : static_cast<u32>(p.draft_vocab)};
  }
  NXS_DEVICE i64 draft_column(u32 token) const {
    const i64 column = p.target_to_draft_or_null ? load_global_nc(p.target_to_draft_or_null + token) : token;
    return column >= 0 && column < p.draft_vocab ? column : -1;
  }
  NXS_DEVICE float draft_logit(const Row<Q>& row, u32 token) const {
    const i64 column = draft_column(token);
    return column < 0 ? -INFINITY : logit_at(row, static_cast<u32>(column));
  }
  NXS_DEVICE float draft_weight(const Draft<Q>& q, u32 token) const {
    return weight_of(q.summary, draft_logit(q.row, token));
  }
  NXS_DEVICE Tested test(const Row<P>& p_row, const Row<Q>& q_row, u32 token) const {
    return Tested{logit_at(p_row, token), draft_logit(q_row, token)};
  }
  // Of this lane's child of a node, for the first warp: on its way while the rows are swept.
  NXS_DEVICE Tested test_child(u32 node, const Node& of) const {
    Tested tested = {-INFINITY, -INFINITY};
    if (warp == 0 && of.random && lane_index() < of.count)
      tested = test(target_row(node), draft_row(node), token_of(child(lane_index())));
    return tested;
  }

  // ---- randomness
  NXS_DEVICE Uniforms draws(u32 depth, u32 use, u32 number) const {
    const u64 seed = p.seeds_or_null ? static_cast<u64>(load_global_nc(p.seeds_or_null + r.b)) : 0;
    const u64 position = p.positions_or_null ? static_cast<u64>(load_global_nc(p.positions_or_null + r.b)) : 0;
    return draw(seed, position + depth, use, use == kUseSample ? 0 : depth, number);
  }
  NXS_DEVICE const float* given(u32 node) const {
    return p.uniforms_or_null + (static_cast<i64>(r.b) * p.max_nodes + node) * 4;
  }
  NXS_DEVICE Uniforms three(u32 node, u32 depth, u32 use) const {
    if (!p.uniforms_or_null) return draws(depth, use, 0);
    Uniforms u;
#pragma unroll
    for (u32 k = 0; k < 3; ++k) u.at[k] = load_global_nc(given(node) + 1 + k);
    u.at[3] = 0;
    return u;
  }

  // ---- the tree
  // Puts it into shared memory; what is said of it, in all threads.
  NXS_DEVICE u32 load_tree() const {
    bool bad = false;
    for (u32 node = thread_index(); node < r.nodes; node += kThreads) {
      const i64 row = r.row + node;
      i32 link, sibling = -1;
      if (p.parents_or_null) {
        link = load_global_nc(p.parents_or_null + row);
        bad = bad || (link != -1 && (link < 0 || link >= static_cast<i32>(node)));
      } else {
        link = load_global_nc(p.first_child_or_null + row);
        sibling = load_global_nc(p.next_sibling_or_null + row);
        const i32 nodes = static_cast<i32>(r.nodes);
        bad = bad || (link != -1 && (link <= static_cast<i32>(node) || link >= nodes)) ||
              (sibling != -1 && (sibling < 1 || sibling >= nodes));
      }
      const i32 token = load_global_nc(p.drafts + row);
      store_shared(links(node), link);
      store_shared(siblings(node), sibling);
      store_shared(tree(2, node), token >= 0 && token < p.vocab ? static_cast<u32>(token) : kNothing);
    }
    warp_sync();
    bad = warp_any(bad);
    if (lane_index() == 0) store_shared(shared + kSharedSum + warp * 8, u64{bad});
    block_sync();
    bool any = false;
    for (u32 w = 0; w < kWarps; ++w) any = any || load_shared<u64>(shared + kSharedSum + w * 8) != 0;
    return any ? NXS_STATUS_TREE_BAD : 0;
  }

  // Lists the children of a node that are drafts, in the order of trial; one warp.
  NXS_DEVICE u32 list_children(u32 node, u32& said) const {
    u32 count = 0;
    if (p.parents_or_null) {
      for (u32 first = (node + 1) & ~31u; first < r.nodes; first += 32) {
        const u32 at = first + lane_index();
        bool is_child = at > node && at < r.nodes;
        if (is_child)
          is_child = load_shared<i32>(links(at)) == static_cast<i32>(node) && token_of(at) != kNothing;
        const u32 children = warp_ballot(is_child);
        if (is_child) store_shared(tree(3, count + population_count(children & lanes_below())), at);
        count += population_count(children);
      }
    } else {
      u32 bad = 0;
      if (lane_index() == 0) {
        i32 at = load_shared<i32>(links(node));
        u32 steps = 0;
        // A list that is longer than the tree goes in circles.
        for (; steps <= r.nodes; ++steps) {
          if (at <= static_cast<i32>(node) || at >= static_cast<i32>(r.nodes)) {
            bad = at != -1;
            break;
          }
          if (token_of(static_cast<u32>(at)) != kNothing && count < r.nodes) {
            store_shared(tree(3, count), static_cast<u32>(at));
            ++count;
          }
          at = load_shared<i32>(siblings(static_cast<u32>(at)));
        }
        if (steps > r.nodes) bad = 1;
      }
      warp_sync();
      count = shuffle(count, 0);
      if (shuffle(bad, 0)) said |= NXS_STATUS_TREE_BAD;
    }
    warp_sync();
    return count;
  }

  // ---- sweeps
  // The node's rows, as they are swept: where no statistics are given, and of the draft where it is asked for.
  NXS_DEVICE Row<P> swept_target(u32 node) const {
    return p.target_stats_or_null ? Row<P>{nullptr, nullptr, 0} : target_row(node);
  }
  NXS_DEVICE Row<Q> swept_draft(u32 node, bool swept) const {
    return swept ? draft_row(node) : Row<Q>{nullptr, nullptr, 0};
  }
  // Partials of the wide chunks of a row from `first` on.
  template <typename T>
  NXS_DEVICE void sweep_wide(const Row<T>& row, u32 first, const Scale& scale, u32 place, u32 begin, bool& nan) const {
    const u32 stride = ranks * kWarps, all = wide_chunks(row);
#pragma unroll 1
    for (u32 chunk = first; chunk < all; chunk += stride) {
      const Logits<T> logits = detail::load_wide(row.logits, chunk);
      const float top = lane_maximum(logits);
      nan = nan || top != top;
      pass_on(place, begin + chunk, partial_of_numbers(logits, top, scale));
    }
  }
  // Partials of a node's row, and of the draft's if it is swept, into `place`: of all chunks that are read 16 bytes at
  // a time. -> how many those are, or 0 if there is a NaN among this warp's, which are then to be done again. Nothing is
  // called, so that what is on its way stays in registers.
  NXS_DEVICE u32 sweep(u32 node, u32 place, bool swept) const {
    bool nan = false;
    const Row<P> p_row = swept_target(node);
    const Row<Q> q_row = swept_draft(node, swept);
    const u32 of_p = wide_chunks(p_row), all = of_p + wide_chunks(q_row);
    // Chunks of both rows one after the other.
    const u32 first = rank * kWarps + warp, stride = ranks * kWarps;
    if constexpr (std::is_same_v<P, Q> && sizeof(P) == 2) {
      const Scale measure = r.measure, draft_scale = r.draft_scale;
      // Two at once: most warps have no more. Not under a condition, or ptxas would keep what is loaded in local
      // memory.
      const auto load_at = [&](u32 at) {
        return detail::load_wide(at < of_p ? p_row.logits : q_row.logits, at < of_p ? at : at - of_p);
      };
      const auto finish = [&](u32 at, const Logits<P>& logits) {
        const float top = lane_maximum(logits);
        nan = nan || top != top;
        // By value: of a choice between two places the address would be taken.
        Scale scale = measure;
        if (at >= of_p) scale = draft_scale;
        pass_on(place, at < of_p ? at : of_target + (at - of_p), partial_of_numbers(logits, top, scale));
      };
      u32 at = first;
#pragma unroll 1
      for (; at + stride < all; at += 2 * stride) {
        const Logits<P> one = load_at(at), other = load_at(at + stride);
        finish(at, one);
        finish(at + stride, other);
      }
      if (at < all) {
        const Logits<P> one = load_at(at);
        finish(at, one);
      }
    } else {
      sweep_wide(p_row, first, r.measure, place, 0, nan);
      sweep_wide(q_row, (first + stride - of_p % stride) % stride, r.draft_scale, place, of_target, nan);
    }
    return warp_any(nan) ? 0 : all;
  }

  // The node's distributions, from partials in `place`; each warp for itself.
  NXS_DEVICE Target<P> target_of(u32 node, u32 place, const Scale& scale) const {
    Target<P> target;
    target.row = target_row(node);
    const auto partial = [&](u32 chunk) { return load(place, chunk); };
    target.summary = summarize(of_target, scale, partial);
    if (r.truncates) {
      const Vec<u32, 2> known = load_global(cut());
      target.summary.cut = bits_float(known.data[0]);
      target.summary.nan = known.data[1] != 0;
    }
    target.peak = target.summary.shape == kPeak ? find_peak(target.summary, target.row, of_target, partial) : kNothing;
    return target;
  }
  // As the first warp has kept them, of rows that are spread.
  NXS_DEVICE Target<P> target_kept(u32 node) const { return Target<P>{target_row(node), kept(0), kNothing}; }
  NXS_DEVICE Draft<Q> draft_kept(u32 node) const { return Draft<Q>{draft_row(node), kept(1)}; }
  NXS_DEVICE Draft<Q> draft_of(u32 node, u32 place) const {
    Draft<Q> q = {draft_row(node), {kEmpty, false, false, -INFINITY, 0, 0, -INFINITY, Scale{0, 0}}};
    if (q.row.columns == 0) return q;
    if (p.draft_stats_or_null)
      q.summary = summary_of_draft(p.draft_stats_or_null + draft_index(node) * 4);
    else
      q.summary = summarize(of_draft, r.draft_scale, [&](u32 chunk) { return load(place, of_target + chunk); });
    return q;
  }

  // Weights of max(p - c q, 0) of this lane's places of a chunk.
  NXS_DEVICE void residual_weights(float c, const Target<P>& target, const Draft<Q>& q, u32 chunk,
                                   float (&weight)[32]) const {
    const Logits<P> of_p = load_logits(target.row, chunk);
    if (!p.target_to_draft_or_null) {
      const Logits<Q> of_q = load_logits(q.row, chunk);
#pragma unroll
      for (u32 place = 0; place < 32; ++place)
        weight[place] = residual_of(c, weight_of(target.summary, of_p.at(place)), weight_of(q.summary, of_q.at(place)));
    } else {
#pragma unroll
      for (u32 place = 0; place < 32; ++place) {
        const u32 token = chunk * kChunk + place / 8 * 256 + lane_index() * 8 + place % 8;
        const float of_token = weight_of(target.summary, of_p.at(place));
        // The map has no entry beyond the vocabulary, where p has no weight either.
        weight[place] = of_token == 0 ? 0.0f : residual_of(c, of_token, draft_weight(q, token));
      }
    }
  }

  // The sum over the chunks from `begin` on, in every lane.
  NXS_DEVICE float total(u32 place, u32 begin, u32 chunks) const {
    float own = 0;
#pragma unroll 1
    for (u32 chunk = lane_index(); chunk < chunks; chunk += 32) own = own + load(place, begin + chunk).max;
    warp_sync();
    return sum_of_lanes(own);
  }
};

// Puts the request and its tree into shared memory, all of the block.
template <typename P, typename Q> NXS_DEVICE_CALL void begin_walk(const nxs_tree_verify_params& p) {
  const u32 shared = dynamic_shared();
  if (thread_index() == 0)
    put_shared(shared + kSharedRequest, request_of(p, block_index_x() / static_cast<u32>(p.cluster)));
  block_sync();
  const Walk<P, Q> walk(p);
  const u32 said = walk.r.said | walk.load_tree();
  if (thread_index() == 0) store_shared(shared + kSharedSaid, said);
}

template <typename P, typename Q> NXS_DEVICE_CALL Node open_node(const nxs_tree_verify_params& p, u32 node, u32 depth) {
  const Walk<P, Q> walk(p);
  u32 count = 0;
  if (walk.warp == 0) {
    u32 said = 0;
    count = walk.list_children(node, said);
    if (depth == static_cast<u32>(p.max_depth)) {
      if (count > 0) said |= NXS_STATUS_DRAFTS_IGNORED;
      count = 0;
    }
    walk.say(said);
  }
  count = walk.tell(Vec<u32, 4>{{count, 0, 0, 0}}).data[0];
  return Node{count, walk.r.rule == NXS_RULE_REJECT && p.draft_or_null && !walk.r.scale.greedy() && count > 0};
}

// Partials of the chunks that the sweep has left: in the order of wide chunks, the target's first, then of the others,
// this warp's from number `done` on. With 0 of all of them.
template <typename P, typename Q>
NXS_DEVICE_CALL void sweep_rest(const nxs_tree_verify_params& p, u32 node, u32 place, bool swept, u32 done) {
  const Walk<P, Q> walk(p);
  const Row<P> p_row = walk.swept_target(node);
  const Row<Q> q_row = walk.swept_draft(node, swept);
  const u32 first = walk.rank * kWarps + walk.warp, stride = walk.ranks * kWarps;
  const u32 p_wide = wide_chunks(p_row), wide = p_wide + wide_chunks(q_row);
  const u32 p_rest = p.target_stats_or_null ? 0 : walk.of_target - p_wide;
  const u32 all = wide + p_rest + (swept ? walk.of_draft - (wide - p_wide) : 0);
#pragma unroll 1
  for (u32 at = done + (first + stride - done % stride) % stride; at < all; at += stride) {
    const bool of_target = at < wide ? at < p_wide : at < wide + p_rest;
    if (of_target) {
      const u32 chunk = at < wide ? at : p_wide + (at - wide);
      Logits<P> logits = load_logits(p_row, chunk);
      walk.pass_on(place, chunk, chunk_partial(logits, walk.r.measure));
    } else {
      const u32 chunk = at < wide ? at - p_wide : (wide - p_wide) + (at - wide - p_rest);
      Logits<Q> logits = load_logits(q_row, chunk);
      walk.pass_on(place, walk.of_target + chunk, chunk_partial(logits, walk.r.draft_scale));
    }
  }
}

// Partials that the engine has found already.
template <typename P, typename Q> NXS_DEVICE_CALL void copy_partials(const nxs_tree_verify_params& p, u32 node, u32 place) {
  const Walk<P, Q> walk(p);
  const i64 row = walk.target_index(node);
  // Each block for itself; in global memory the first for all.
  if (!walk.shares && walk.rank != 0) return;
  for (u32 chunk = thread_index(); chunk < walk.of_target; chunk += kThreads) {
    Partial partial = {-INFINITY, 0};
    if (row >= 0) {
      // Not necessarily aligned to a pair.
      const float* pair = p.target_stats_or_null + (row * walk.of_target + chunk) * 2;
      partial = Partial{load_global_nc(pair), load_global_nc(pair + 1)};
    }
    if (walk.shares)
      store_shared(walk.in_shared(place, chunk), partial);
    else
      store_global(walk.in_global(place, chunk), partial);
  }
}

// Cuts the node's row down: the first block, in global memory; then all have met.
template <typename P, typename Q> NXS_DEVICE_CALL void truncate_node(const nxs_tree_verify_params& p, u32 node, u32 place) {
  const Walk<P, Q> walk(p);
  if (walk.rank == 0) {
    Summary summary =
        summarize(walk.of_target, walk.r.scale, [&](u32 chunk) { return walk.load(place, chunk); });
    truncate_row(walk.r.truncation, summary, walk.target_row(node), walk.of_target, walk.in_global(place, 0),
                 walk.shared + kSharedSum);
    block_sync();
    if (thread_index() == 0) store_global(walk.cut(), Vec<u32, 2>{{float_bits(summary.cut), summary.nan}});
  }
  walk.meet();
}

// Sums of max(p - c q, 0) of all chunks, into `place`, and without replacement of what q has beside the tokens tried;
// then all have met.
template <typename P, typename Q>
NXS_DEVICE_CALL void sweep_residual(const nxs_tree_verify_params& p, u32 node, u32 place, float c, u32 count) {
  const Walk<P, Q> walk(p);
  const Target<P> target = walk.target_kept(node);
  const Draft<Q> q = walk.draft_kept(node);
  const u32 first = walk.rank * kWarps + walk.warp, stride = walk.ranks * kWarps;
#pragma unroll 1
  for (u32 chunk = first; chunk < walk.of_target; chunk += stride) {
    float weight[32], sum = 0;
    walk.residual_weights(c, target, q, chunk, weight);
#pragma unroll
    for (u32 at = 0; at < 32; ++at) sum = sum + weight[at];
    walk.pass_on(place, chunk, Partial{sum_of_lanes(sum), 0});
  }
  if (p.without_replacement) {
#pragma unroll 1
    for (u32 chunk = first; chunk < walk.of_draft; chunk += stride) {
      Logits<Q> logits = load_logits(q.row, chunk);
      // A bit for each place of this lane that was tried.
      u32 gone = 0;
#pragma unroll 1
      for (u32 at = 0; at < count; ++at) {
        const i64 column = walk.draft_column(load_shared<u32>(walk.tried(at)));
        const u32 within = static_cast<u32>(column - static_cast<i64>(chunk) * kChunk);
        if (column >= 0 && within < kChunk && within / 8 % 32 == lane_index())
          gone |= 1u << (within / 256 * 8 + within % 8);
      }
      warp_sync();
      float sum = 0;
#pragma unroll
      for (u32 at = 0; at < 32; ++at) {
        const float weight = weight_of(q.summary, logits.at(at));
        sum = sum + (gone >> at & 1 ? 0.0f : weight);
      }
      walk.pass_on(place, walk.of_target + chunk, Partial{sum_of_lanes(sum), 0});
    }
  }
  walk.meet();
}

// Recursive rejection at a node; the first warp's.
struct Trials {
  u32 next, tried;
  float c, step;  // a child's test is u * step + c against p / q; step is what c grows by when it fails
};

// What becomes of a node, as the first warp finds it.
struct Choice {
  u32 command, result;  // a child, or a token, or kNothing
};

// Tries children from trials.next on, up to one that is accepted or one that fails.
template <typename P, typename Q>
NXS_DEVICE Choice try_children(const Walk<P, Q>& walk, u32 depth, u32 count, const Target<P>& target, const Draft<Q>& q,
                               const Tested& tested, Trials& trials, u32& said) {
  const nxs_tree_verify_params& p = walk.p;
  while (trials.next < count) {
    const u32 j = trials.next++;
    const u32 child = walk.child(j), token = walk.token_of(child);
    float p_logit = shuffle(tested.p_logit, j % 32), q_logit = shuffle(tested.q_logit, j % 32);
    if (j >= 32) {
      const Tested late = walk.test(target.row, q.row, token);
      p_logit = late.p_logit;
      q_logit = late.q_logit;
    }
    const float p_weight = weight_of(target.summary, p_logit), q_weight = weight_of(q.summary, q_logit);
    bool again = false;
    if (p.without_replacement) {
      for (u32 at = lane_index(); at < trials.tried; at += 32)
        again = again || load_shared<u32>(walk.tried(at)) == token;
      warp_sync();
      again = warp_any(again);
    }
    if (q_weight == 0 || again) {
      said |= NXS_STATUS_DRAFT_IMPOSSIBLE;
      if (p_weight > 0 && !again) return Choice{kGo, child};
      continue;
    }
    const float u = p.uniforms_or_null ? load_global_nc(walk.given(child)) : walk.draws(depth, kUseAccept, j).at[0];
    const float threshold = fma(u, trials.step, trials.c);
    if (fma(-threshold, q_weight, p_weight) > 0) return Choice{kGo, child};
    trials.c = trials.c + trials.step;
    if (lane_index() == 0) store_shared(walk.tried(trials.tried), token);
    ++trials.tried;
    warp_sync();
    return Choice{kResidual, kNothing};
  }
  return Choice{kEmit, kNothing};
}

// The first warp, with the partials of a node's rows at hand.
template <typename P, typename Q>
NXS_DEVICE Choice judge(const Walk<P, Q>& walk, u32 node, u32 depth, const Node& of, const Tested& tested, Trials& trials) {
  const u32 place = depth % 2, count = of.count;
  const auto partial = [&](u32 chunk) { return walk.load(place, chunk); };
  Choice choice = {kEmit, kNothing};
  u32 said = 0;
  const Target<P> target = walk.target_of(node, place, walk.r.scale);
  walk.keep(0, target.summary);
  if (target.row.columns == 0) said |= NXS_STATUS_ROW_OUT_OF_RANGE;
  if (target.summary.nan) said |= NXS_STATUS_TARGET_NAN;
  if (target.summary.beyond || target.summary.top == INFINITY) said |= NXS_STATUS_TARGET_BEYOND;
  if (target.summary.shape == kEmpty) {
    said |= NXS_STATUS_TARGET_EMPTY;
  } else {
    bool draws_token = true, matches = true;
    if (of.random && target.peak == kNothing) {
      const Draft<Q> q = walk.draft_of(node, place);
      walk.keep(1, q.summary);
      if (q.row.columns == 0) {
        said |= NXS_STATUS_ROW_OUT_OF_RANGE | NXS_STATUS_DRAFT_BAD;
        matches = false;
      } else if (q.summary.nan || q.summary.shape == kEmpty) {
        said |= NXS_STATUS_DRAFT_BAD;
        matches = false;
      } else if (q.summary.shape == kSpread) {
        trials.step = target.summary.sum / q.summary.sum;
        choice = try_children(walk, depth, count, target, q, tested, trials, said);
        // No child was one that could be tried.
        draws_token = choice.command == kEmit;
        matches = false;
      }
    }
    if (draws_token) {
      u32 token = target.peak;
      if (token == kNothing) {
        const Uniforms u = walk.three(node, depth, kUseSample);
        token = sample_row(target.summary, target.row, walk.of_target, u.at[0], u.at[1], u.at[2], partial);
      }
      choice.result = token;
      u32 chosen = kNothing;
      if (matches && token != kNothing) {
        for (u32 at = lane_index(); at < count; at += 32) {
          if (walk.token_of(walk.child(at)) == token) {
            chosen = at;
            break;
          }
        }
        warp_sync();
        chosen = warp_reduce_min(chosen);
      }
      if (chosen != kNothing) choice = Choice{kGo, walk.child(chosen)};
    }
  }
  walk.say(said);
  return choice;
}

// The first warp, with the sums in `sums` of what is left of p after a child that failed.
template <typename P, typename Q>
NXS_DEVICE Choice judge_rest(const Walk<P, Q>& walk, u32 node, u32 depth, u32 sums, const Node& of, const Tested& tested,
                             Trials& trials) {
  const nxs_tree_verify_params& p = walk.p;
  const Target<P> target = walk.target_kept(node);
  const Draft<Q> q = walk.draft_kept(node);
  const float mass = walk.total(sums, 0, walk.of_target);
  if (mass == 0) {
    // p is q but for rounding.
    const Uniforms u = walk.three(node, depth, kUseResidual);
    const u32 token = sample_row(target.summary, target.row, walk.of_target, u.at[0], u.at[1], u.at[2],
                                 [&](u32 chunk) { return walk.load(depth % 2, chunk); });
    return Choice{kEmit, token};
  }
  trials.step = mass / (p.without_replacement ? walk.total(sums, walk.of_target, walk.of_draft) : q.summary.sum);
  const float c = trials.c;
  u32 said = 0;
  Choice choice = try_children(walk, depth, of.count, target, q, tested, trials, said);
  walk.say(said);
  if (choice.command == kEmit) {
    const Uniforms u = walk.three(node, depth, kUseResidual);
    const u32 chunk = pick_chunk(walk.of_target, u.at[0], [&](u32 at) { return walk.load(sums, at).max; });
    if (chunk != kNothing) {
      float weight[32];
      walk.residual_weights(c, target, q, chunk, weight);
      const u32 of_chunk = pick_place(u.at[1], u.at[2], [&](u32 at) { return weight[at]; });
      if (of_chunk != kNothing) choice.result = chunk * kChunk + of_chunk;
    }
  }
  return choice;
}

// The first warp of the first block: the logarithm of the probability of the token after `node`.
template <typename P, typename Q>
NXS_DEVICE_CALL void note_node(const nxs_tree_verify_params& p, u32 node, u32 depth, u32 command, u32 result) {
  const Walk<P, Q> walk(p);
  u32 token = command == kGo ? walk.token_of(result) : result;
  if (token == kNothing) token = p.fallback > 0 ? static_cast<u32>(p.fallback) : 0;
  const Summary measured =
      walk.r.scale.greedy() ? walk.target_of(node, depth % 2, walk.r.measure).summary : walk.kept(0);
  const float log_prob = log_probability(measured, logit_at(walk.target_row(node), token));
  const i64 at = static_cast<i64>(walk.r.b) * (p.max_depth + 1) + depth;
  if (lane_index() == 0) store_global(p.log_probs_or_null + at, log_prob);
}

// All of the block, with the partials of a node's rows at hand: the first warp decides, the others help with residuals.
template <typename P, typename Q>
NXS_DEVICE_CALL Choice decide_node(const nxs_tree_verify_params& p, u32 node, u32 depth, Node of, Tested tested) {
  if (p.top_k_or_null || p.top_p_or_null || p.min_p_or_null) {
    if (get_shared<Request>(dynamic_shared() + kSharedRequest).truncates) truncate_node<P, Q>(p, node, depth % 2);
  }
  const Walk<P, Q> walk(p);
  Trials trials = {0, 0, 0, 0};
  Choice choice = {kEmit, kNothing};
  if (walk.warp == 0) choice = judge(walk, node, depth, of, tested, trials);
  for (;;) {
    const Vec<u32, 4> told =
        walk.tell(Vec<u32, 4>{{choice.command, choice.result, float_bits(trials.c), trials.tried}});
    choice = Choice{told.data[0], told.data[1]};
    if (choice.command != kResidual) break;
    // By turns: with each child that fails one more was tried.
    const u32 sums = 2 + told.data[3] % 2;
    sweep_residual<P, Q>(p, node, sums, bits_float(told.data[2]), told.data[3]);
    if (walk.warp == 0) choice = judge_rest(walk, node, depth, sums, of, tested, trials);
  }
  if (walk.rank == 0 && walk.warp == 0) {
    if (lane_index() == 0) store_shared(walk.shared + kSharedPath + depth * 4, node);
    if (p.log_probs_or_null) note_node<P, Q>(p, node, depth, choice.command, choice.result);
  }
  return choice;
}

// All of the first block: what the request gets whose walk ended at `node`, `depth` drafts down.
template <typename P, typename Q>
NXS_DEVICE_CALL void write_request(const nxs_tree_verify_params& p, u32 node, u32 depth, u32 last) {
  block_sync();
  const Walk<P, Q> walk(p);
  const Request& r = walk.r;
  const u32 columns = static_cast<u32>(p.max_depth) + 1, emitted = r.nodes > 0 ? depth + 1 : 0;
  const i64 first = static_cast<i64>(r.b) * columns;
  const i32 start = or_else(p.kv_start_or_null, r.b, 0);
  for (u32 i = thread_index(); i < columns; i += kThreads) {
    i32 token = -1, at = -1, source = -1, destination = -1;
    if (i < emitted) {
      at = load_shared<i32>(walk.shared + kSharedPath + i * 4);
      if (i < depth)
        token = static_cast<i32>(walk.token_of(load_shared<u32>(walk.shared + kSharedPath + i * 4 + 4)));
      else
        token = last == kNothing ? p.fallback : static_cast<i32>(last);
      const u32 slot = static_cast<u32>(start);
      source = p.kv_slots_or_null ? load_global_nc(p.kv_slots_or_null + r.row + at)
                                  : static_cast<i32>(slot + static_cast<u32>(at));
      destination =
          p.kv_slots_or_null ? load_global_nc(p.kv_slots_or_null + r.row + i) : static_cast<i32>(slot + i);
    }
    store_global(p.tokens + first + i, token);
    if (p.path_or_null) store_global(p.path_or_null + first + i, at);
    if (p.kv_source_or_null) store_global(p.kv_source_or_null + first + i, source);
    if (p.kv_destination_or_null) store_global(p.kv_destination_or_null + first + i, destination);
    if (p.log_probs_or_null && i >= emitted) store_global(p.log_probs_or_null + first + i, bits_float(0x7fffffffu));
  }
  if (thread_index() == 0) {
    store_global(p.emitted + r.b, static_cast<i32>(emitted));
    store_global(p.accepted + r.b, static_cast<i32>(depth));
    store_global(p.status + r.b, load_shared<u32>(walk.shared + kSharedSaid));
    if (p.last_row_or_null)
      store_global(p.last_row_or_null + r.b, emitted > 0 ? static_cast<i32>(r.row) + static_cast<i32>(node) : -1);
  }
}

// The walk: what is done once a node is in functions that are called, so that the sweep has the registers.
template <typename P, typename Q>
__global__ void __launch_bounds__(kThreads, 2) tree_verify_kernel(const __grid_constant__ nxs_tree_verify_params p) {
  begin_walk<P, Q>(p);
  // All blocks have begun before one writes to another's memory.
  Walk<P, Q>(p).meet();
  u32 node = 0, depth = 0;
  Choice choice = {kEmit, kNothing};
  bool going = get_shared<Request>(dynamic_shared() + kSharedRequest).nodes > 0;
#pragma unroll 1
  while (going) {
    const Node of = open_node<P, Q>(p, node, depth);
    if (p.target_stats_or_null) copy_partials<P, Q>(p, node, depth % 2);
    const bool swept = of.random && !p.draft_stats_or_null;
    Tested tested;
    {
      const Walk<P, Q> walk(p);
      tested = walk.test_child(node, of);
      const u32 done = walk.sweep(node, depth % 2, swept);
      if (done < (p.target_stats_or_null ? 0 : walk.of_target) + (swept ? walk.of_draft : 0))
        sweep_rest<P, Q>(p, node, depth % 2, swept, done);
      walk.meet();
    }
    choice = decide_node<P, Q>(p, node, depth, of, tested);
    going = choice.command == kGo;
    if (going) {
      node = choice.result;
      ++depth;
    }
  }
  const u32 rank = p.cluster > 1 ? cluster_rank() : 0;
  if (rank == 0) write_request<P, Q>(p, node, depth, choice.result);
}

// One instantiation file a dtype of the target (tree_verify_<dtype>.cu) picks the draft's.
template <typename P> nxs_status tree_verify_target(const nxs_tree_verify_params& p, void* stream);

template <typename P, typename Q> nxs_status tree_verify_launch(const nxs_tree_verify_params& p, void* stream) {
  const auto kernel = tree_verify_kernel<P, Q>;
  const auto chunks = [](i64 columns) { return static_cast<u32>((columns + kChunk - 1) / kChunk); };
  const u32 all = chunks(p.vocab) + (p.draft_or_null ? chunks(p.draft_vocab) : 0);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(p.batch * p.cluster));
  shape.block = kThreads;
  shape.cluster = static_cast<unsigned>(p.cluster);
  shape.dynamic_smem = shared_bytes(static_cast<u32>(p.max_nodes), p.shared_partials ? all : 0);
  if (shape.dynamic_smem > 48 * 1024) NXS_TRY(allow_dynamic_smem(kernel));
  if (p.cluster > 8) NXS_TRY(allow_large_clusters(kernel));
  return launch(kernel, shape, stream, p);
}

template <typename P> nxs_status tree_verify_for_draft(const nxs_tree_verify_params& p, void* stream) {
  switch (p.draft_dtype) {
    case NXS_F32: return tree_verify_launch<P, float>(p, stream);
    case NXS_F16: return tree_verify_launch<P, f16>(p, stream);
    default: return tree_verify_launch<P, bf16>(p, stream);
  }
}

}  // namespace nxs::verification::tree
