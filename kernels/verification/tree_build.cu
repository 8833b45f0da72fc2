// Trees of drafts from their parents: links, depths, positions, who sees whom, paths; and the choice of nodes by scores.
//
// Who does what  A block a request, everything in shared memory: a thread a candidate, then a thread a node (or a node and a
//                word of its mask). Depths by walking up; values level by level, f32 from the root on; the least value
//                that is chosen by bisection, bit by bit of its key; ties and numbers by counting bits of ballots. Leaves in the
//                order of trial: before a leaf come the leaves below earlier siblings of its ancestors.
// Bytes          12 a candidate read, 32 and a mask a node written: the launch is what it costs.
// Determinism    bitwise; integers, and sums in the order of the path.
// Limits         1024 nodes, 2048 candidates, 64 drafts on a path, batch up to 2^20.
#include "common/check.h"
#include "common/ptx/atomic.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/math.cuh"
#include "common/ptx/memory.cuh"
#include "common/ptx/shared.cuh"
#include "common/ptx/warp.cuh"
#include "verification/row_stats.cuh"

namespace nxs::verification::tree {

constexpr u32 kBuildThreads = 256, kMostCandidates = 2048, kNodes = 1024, kDepth = 64;

// Words of shared memory: by candidate parent, depth, value, least value on the path (later its key), number; by node
// candidate, parent, depth, first child, leaves below, leaves before; of the block two words, a counter for each bit of a key,
// and a word of ballots for each 32 candidates, twice.
constexpr u32 kBlockWords = 2 + 32 + 2 * kMostCandidates / 32;
inline u32 build_shared_bytes(u32 candidates, u32 nodes) { return (candidates * 5 + nodes * 6 + kBlockWords) * 4; }

template <typename T> NXS_DEVICE void store_if(T* p, i64 at, T value) {
  if (p) store_global(p + at, value);
}

__global__ void __launch_bounds__(kBuildThreads) tree_build_kernel(const __grid_constant__ nxs_tree_build_params p) {
  const u32 b = block_index_x(), n = static_cast<u32>(p.nodes), most_candidates = static_cast<u32>(p.candidates);
  const u32 shared = dynamic_shared();
  const auto place = [&](u32 array, u32 at) { return shared + (array * most_candidates + at) * 4; };
  const auto of_node = [&](u32 array, u32 at) { return shared + (5 * most_candidates + array * n + at) * 4; };
  const u32 said_word = of_node(6, 0), depth_word = of_node(6, 1);
  const auto counter = [&](u32 bit) { return of_node(6, 2 + bit); };
  const auto ballots = [&](u32 array, u32 word) { return of_node(6, 34 + array * (kMostCandidates / 32) + word); };
  const auto parent = [&](u32 at) { return load_shared<i32>(place(0, at)); };
  const auto depth = [&](u32 at) { return load_shared<i32>(place(1, at)); };
  const auto least = [&](u32 at) { return load_shared<float>(place(3, at)); };
  const auto number = [&](u32 at) { return load_shared<i32>(place(4, at)); };
  const auto node_parent = [&](u32 at) { return load_shared<i32>(of_node(1, at)); };
  const auto node_depth = [&](u32 at) { return load_shared<i32>(of_node(2, at)); };

  const i64 most = p.batch * p.candidates;
  i64 begin = static_cast<i64>(b) * p.candidates, end = begin + p.candidates;
  if (p.cu_rows_or_null) {
    begin = load_global_nc(p.cu_rows_or_null + b);
    end = load_global_nc(p.cu_rows_or_null + b + 1);
  }
  const i64 first = begin < 0 ? 0 : begin > most ? most : begin;
  i64 rows = (end < most ? end : most) - first;
  rows = rows < 0 ? 0 : rows > p.candidates ? p.candidates : rows;
  const u32 m = static_cast<u32>(rows);
  u32 said = end - first > rows ? NXS_STATUS_DRAFTS_IGNORED : 0;

  for (u32 i = thread_index(); i < m; i += kBuildThreads) store_shared(place(0, i), load_global_nc(p.parents + first + i));
  for (u32 i = thread_index(); i < n; i += kBuildThreads) {
    store_shared(of_node(0, i), i32{-1});
    store_shared(of_node(1, i), i32{-1});
    store_shared(of_node(2, i), i32{-1});
    store_shared(of_node(4, i), u32{0});
  }
  if (thread_index() < 34) store_shared(said_word + thread_index() * 4, u32{0});
  block_sync();

  // Depths, -1 for what is no node.
  for (u32 i = thread_index(); i < m; i += kBuildThreads) {
    i32 found = 0;
    for (u32 at = i; at > 0;) {
      const i32 up = parent(at);
      if (up < 0 || up >= static_cast<i32>(at)) {
        // Only its own link is held against a candidate.
        if (at == i && up != -1) said |= NXS_STATUS_TREE_BAD;
        found = -1;
        break;
      }
      at = static_cast<u32>(up);
      if (++found > p.max_depth) {
        said |= NXS_STATUS_DRAFTS_IGNORED;
        found = -1;
        break;
      }
    }
    if (i == 0 && parent(0) != -1) said |= NXS_STATUS_TREE_BAD;
    store_shared(place(1, i), found);
    if (found > 0) atomic_max_shared(depth_word, static_cast<u32>(found));
  }
  if (said) atomic_or_shared(said_word, said);
  block_sync();

  u32 count = m;
  if (!p.scores_or_null) {
    for (u32 i = thread_index(); i < m; i += kBuildThreads)
      store_shared(place(4, i), depth(i) >= 0 ? static_cast<i32>(i) : -1);
  } else {
    const i32 levels = load_shared<i32>(depth_word);
    for (i32 level = 0; level <= levels; ++level) {
      for (u32 i = thread_index(); i < m; i += kBuildThreads) {
        if (depth(i) != level) continue;
        float value = 0, worst = INFINITY;
        if (level > 0) {
          const u32 up = static_cast<u32>(parent(i));
          const float score = load_global_nc(p.scores_or_null + first + i);
          value = p.cumulative ? score : load_shared<float>(place(2, up)) + score;
          if (value != value) value = -INFINITY;
          worst = value < least(up) ? value : least(up);
        }
        store_shared(place(2, i), value);
        store_shared(place(3, i), worst);
      }
      block_sync();
    }
    // What is no node comes after everything.
    for (u32 i = thread_index(); i < m; i += kBuildThreads)
      store_shared(place(3, i), depth(i) >= 0 ? key_of(least(i)) : 0u);
    const auto key = [&](u32 i) { return i < m ? load_shared<u32>(place(3, i)) : 0u; };
    // The greatest key that n candidates reach, or 1 where there are fewer.
    u32 from = 0;
#pragma unroll 1
    for (u32 bit = 32; bit-- > 0;) {
      const u32 next = from | 1u << bit;
      u32 own = 0;
      for (u32 i = thread_index(); i < m; i += kBuildThreads) own += key(i) >= next;
      own = warp_reduce_add(own);
      if (lane_index() == 0) atomic_add_shared(counter(bit), own);
      block_sync();
      if (load_shared<u32>(counter(bit)) >= n) from = next;
    }
    if (from == 0) from = 1;
    // Of those that tie with the last one the first.
    const auto below = [&](u32 array, u32 i) {
      u32 sum = population_count(load_shared<u32>(ballots(array, i / 32)) & ((1u << i % 32) - 1));
      for (u32 word = 0; word < i / 32; ++word) sum += population_count(load_shared<u32>(ballots(array, word)));
      return sum;
    };
    const u32 words = (m + 31) / 32;
    for (u32 word = thread_index() / 32; word < words; word += kBuildThreads / 32) {
      const u32 ties = warp_ballot(key(word * 32 + lane_index()) == from);
      const u32 above = warp_ballot(key(word * 32 + lane_index()) > from);
      if (lane_index() == 0) {
        store_shared(ballots(0, word), ties);
        store_shared(ballots(1, word), above);
      }
    }
    block_sync();
    u32 above = 0;
    for (u32 word = 0; word < words; ++word) above += population_count(load_shared<u32>(ballots(1, word)));
    block_sync();
    for (u32 word = thread_index() / 32; word < words; word += kBuildThreads / 32) {
      const u32 i = word * 32 + lane_index();
      const bool chosen = key(i) > from || (key(i) == from && above + below(0, i) < n);
      const u32 all = warp_ballot(chosen);
      if (lane_index() == 0) store_shared(ballots(1, word), all);
    }
    block_sync();
    count = 0;
    for (u32 word = 0; word < words; ++word) count += population_count(load_shared<u32>(ballots(1, word)));
    for (u32 i = thread_index(); i < m; i += kBuildThreads) {
      const bool chosen = load_shared<u32>(ballots(1, i / 32)) >> i % 32 & 1;
      store_shared(place(4, i), chosen ? static_cast<i32>(below(1, i)) : -1);
    }
  }
  block_sync();
  for (u32 i = thread_index(); i < m; i += kBuildThreads) {
    const i32 node = number(i);
    if (node < 0) continue;
    store_shared(of_node(0, node), static_cast<i32>(i));
    store_shared(of_node(1, node), i == 0 ? -1 : number(parent(i)));
    store_shared(of_node(2, node), depth(i));
  }
  block_sync();

  const i64 root = p.positions_or_null ? load_global_nc(p.positions_or_null + b) : 0;
  const i64 to = static_cast<i64>(b) * n;
  for (u32 node = thread_index(); node < n; node += kBuildThreads) {
    const i32 candidate = load_shared<i32>(of_node(0, node)), up = node_parent(node), level = node_depth(node);
    i32 child = -1, sibling = -1;
    for (u32 k = n; k-- > node + 1;) {
      const i32 of = node_parent(k);
      if (of == static_cast<i32>(node)) child = static_cast<i32>(k);
      if (of == up && up >= 0) sibling = static_cast<i32>(k);
    }
    store_shared(of_node(3, node), child);
    store_if(p.selected_or_null, to + node, candidate);
    store_if(p.parents_or_null, to + node, up);
    store_if(p.first_child_or_null, to + node, child);
    store_if(p.next_sibling_or_null, to + node, sibling);
    store_if(p.depths_or_null, to + node, level);
    store_if(p.node_positions_or_null, to + node,
             static_cast<i64>(static_cast<u64>(root) + static_cast<u64>(level > 0 ? level : 0)));
    if (p.drafts_out_or_null)
      store_global(p.drafts_out_or_null + to + node,
                   candidate >= 0 ? load_global_nc(p.drafts_or_null + first + candidate) : -1);
    // A leaf counts for itself and its ancestors.
    if (level >= 0 && child < 0) {
      for (i32 at = static_cast<i32>(node); at >= 0; at = node_parent(static_cast<u32>(at)))
        atomic_add_shared(of_node(4, static_cast<u32>(at)), 1u);
    }
  }
  if (p.mask_or_null) {
    const u32 words = (n + 31) / 32;
    for (u32 item = thread_index(); item < n * words; item += kBuildThreads) {
      const u32 node = item / words, word = item - node * words;
      u32 bits = 0;
      if (node_depth(node) >= 0) {
        for (i32 at = static_cast<i32>(node); at >= static_cast<i32>(word * 32);
             at = node_parent(static_cast<u32>(at))) {
          if (static_cast<u32>(at) / 32 == word) bits |= 1u << (at % 32);
        }
      }
      store_global(p.mask_or_null + to * words + item, bits);
    }
  }
  const u32 columns = static_cast<u32>(p.max_depth) + 1, leaves = static_cast<u32>(p.leaves);
  i32* paths = p.paths_or_null ? p.paths_or_null + static_cast<i64>(b) * leaves * columns : nullptr;
  block_sync();
  // Leaves below siblings that come before.
  for (u32 node = thread_index(); node < n; node += kBuildThreads) {
    const i32 up = node_parent(node);
    u32 before = 0;
    if (up >= 0) {
      for (u32 k = static_cast<u32>(up) + 1; k < node; ++k)
        if (node_parent(k) == up) before += load_shared<u32>(of_node(4, k));
    }
    store_shared(of_node(5, node), before);
  }
  block_sync();
  const u32 all = m > 0 ? load_shared<u32>(of_node(4, 0)) : 0;
  for (u32 node = thread_index(); node < n; node += kBuildThreads) {
    if (node_depth(node) < 0 || load_shared<i32>(of_node(3, node)) >= 0) continue;
    u32 leaf = 0;
    for (i32 at = static_cast<i32>(node); at >= 0; at = node_parent(static_cast<u32>(at)))
      leaf += load_shared<u32>(of_node(5, static_cast<u32>(at)));
    if (!paths || leaf >= leaves) continue;
    u32 column = static_cast<u32>(node_depth(node));
    for (u32 rest = column + 1; rest < columns; ++rest) store_global(paths + leaf * columns + rest, -1);
    for (i32 at = static_cast<i32>(node); at >= 0; at = node_parent(static_cast<u32>(at)), --column)
      store_global(paths + leaf * columns + column, at);
  }
  if (paths) {
    for (u32 at = (all < leaves ? all : leaves) * columns + thread_index(); at < leaves * columns; at += kBuildThreads)
      store_global(paths + at, -1);
  }
  if (thread_index() == 0) {
    store_if(p.counts_or_null, b, static_cast<i32>(count));
    store_if(p.leaf_counts_or_null, b, static_cast<i32>(all < leaves ? all : leaves));
    store_global(p.status + b, load_shared<u32>(said_word) | (all > leaves ? NXS_STATUS_DRAFTS_IGNORED : 0));
  }
}

}  // namespace nxs::verification::tree

extern "C" nxs_status nxs_tree_build(const nxs_tree_build_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::verification::tree;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_tree_build_params& p = *params;
  NXS_REQUIRE(p.batch >= 0 && p.batch <= i64{1} << 20, NXS_E_SHAPE);
  NXS_REQUIRE(p.nodes >= 1 && p.nodes <= static_cast<i32>(kNodes) && p.candidates >= p.nodes &&
                  p.candidates <= static_cast<i32>(kMostCandidates) && p.leaves >= 1 && p.leaves <= p.nodes,
              NXS_E_SHAPE);
  NXS_REQUIRE(p.max_depth >= 0 && p.max_depth <= static_cast<i32>(kDepth), NXS_E_SHAPE);
  NXS_REQUIRE(p.scores_or_null || p.candidates == p.nodes, NXS_E_SHAPE);
  if (p.batch == 0) return NXS_OK;
  NXS_REQUIRE(p.parents && p.status && (p.drafts_or_null || !p.drafts_out_or_null), NXS_E_NULL);
  for (const void* word :
       {static_cast<const void*>(p.cu_rows_or_null), static_cast<const void*>(p.parents),
        static_cast<const void*>(p.drafts_or_null), static_cast<const void*>(p.scores_or_null),
        static_cast<const void*>(p.counts_or_null), static_cast<const void*>(p.selected_or_null),
        static_cast<const void*>(p.parents_or_null), static_cast<const void*>(p.drafts_out_or_null),
        static_cast<const void*>(p.first_child_or_null), static_cast<const void*>(p.next_sibling_or_null),
        static_cast<const void*>(p.depths_or_null), static_cast<const void*>(p.mask_or_null),
        static_cast<const void*>(p.paths_or_null), static_cast<const void*>(p.leaf_counts_or_null),
        static_cast<const void*>(p.status)})
    NXS_REQUIRE(is_aligned(word, 4), NXS_E_ALIGNMENT);
  NXS_REQUIRE(is_aligned(p.positions_or_null, 8) && is_aligned(p.node_positions_or_null, 8), NXS_E_ALIGNMENT);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(p.batch));
  shape.block = kBuildThreads;
  shape.dynamic_smem = build_shared_bytes(static_cast<u32>(p.candidates), static_cast<u32>(p.nodes));
  if (shape.dynamic_smem > 48 * 1024) NXS_TRY(allow_dynamic_smem(tree_build_kernel));
  return launch(tree_build_kernel, shape, stream, p);
}
