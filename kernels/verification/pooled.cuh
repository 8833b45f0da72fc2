// Acceptance of a block of image tokens by the probability of their neighbourhoods.
//
//   accepted(t)   p_t(d) + sum of p_t over the k codes nearest to d  >=  threshold
//   resample(u)   some rejected t with |row(t) - row(u)| <= radius, |column(t) - column(u)| <= radius, t <= u
//   islands       8-connected components of resample, numbered by their first token
//
// Layouts      target [batch * height * width, vocab], a stride between rows; guided.cuh where there are two sources.
// Who does what
//              A persistent grid of blocks of 8 warps; an item is a row. A block sweeps it and adds up 256 neighbours at a
//              time, 32 a warp by a scan, the warps' sums in order. Then it arrives at its request's counter; the last to
//              come widens the rejected set, labels it and lists it. A label is the least token that is known to be of
//              the island: the least of the neighbours' labels, and the label of that token, round by round until
//              nothing changes; two arrays, so that no round reads what it writes.
// Bytes        every row once, k ids a row. The last block: (2 radius + 1) (radius + 1) words a token, 9 a round.
// Determinism  bitwise: what labels come to does not depend on the order.
// Limits       see nextscale.h.
#pragma once
#include "common/ptx/atomic.cuh"
#include "common/ptx/launch.cuh"
#include "verification/row_block.cuh"

namespace nxs::verification {

// Shared memory: a word for all; block_sum's; totals of warps, twice.
constexpr u32 kPooledWord = 0, kPooledSum = 16, kPooledTotals = 80, kPooledRoots = 112, kPooledBytes = 160;

template <typename E> struct Pooled {
  const nxs_pooled_verify_params& p;
  u32 shared, tokens;
  // Bit 0: rejected; the rest is the row's status.
  u32* flags;
  u32 *labels, *other_labels;

  NXS_DEVICE Pooled(const nxs_pooled_verify_params& params, u32 memory)
      : p(params), shared(memory), tokens(static_cast<u32>(params.height * params.width)) {
    const u64 rows = static_cast<u64>(p.batch) * tokens;
    flags = static_cast<u32*>(p.workspace);
    labels = flags + rows;
    other_labels = labels + rows;
  }
  NXS_DEVICE Partial* partials(u32 chunks) const {
    const u64 words = (static_cast<u64>(p.batch) * tokens * 3 + 3) & ~u64{3};
    return reinterpret_cast<Partial*>(flags + words) + static_cast<u64>(block_index_x()) * chunks;
  }

  // The token that is the n-th neighbour of a code, or kNothing.
  NXS_DEVICE u32 neighbour(u32 code, u32 n) const {
    const i64 at = code * p.neighbours_stride_row + n;
    const i64 other = p.neighbours_dtype == NXS_U16
                          ? static_cast<i64>(load_global_nc(static_cast<const u16*>(p.neighbours_or_null) + at))
                          : load_global_nc(static_cast<const i32*>(p.neighbours_or_null) + at);
    return other >= 0 && other < p.codes ? static_cast<u32>(p.first_code + other) : kNothing;
  }

  // All of the block: the weight of a draft's neighbourhood.
  NXS_DEVICE float neighbourhood(const RowOf<E>& row, u32 drafted) const {
    const u32 warp = thread_index() / 32, count = static_cast<u32>(p.neighbours);
    const i64 code = static_cast<i64>(drafted) - p.first_code;
    float sum = 0;
    if (code >= 0 && code < p.codes) {
#pragma unroll 1
      for (u32 first = 0; first < count; first += kThreads) {
        const u32 n = first + thread_index(), token = n < count ? neighbour(static_cast<u32>(code), n) : kNothing;
        const float weight = token != kNothing ? row.weight(token) : 0.0f;
        warp_sync();
        const float sums = scan(weight);
        block_sync();
        if (lane_index() == 31) store_shared(shared + kPooledTotals + warp * 4, sums);
        block_sync();
#pragma unroll
        for (u32 w = 0; w < kWarps; ++w) sum = sum + load_shared<float>(shared + kPooledTotals + w * 4);
      }
    }
    return row.weight(drafted) + sum;
  }

  // All of the block: whether a row's draft is accepted.
  NXS_DEVICE void decide(u32 b, u64 r) const {
    const u32 columns = static_cast<u32>(p.vocab), chunks = chunks_of(columns);
    const Row<E> row = make_row<E>(p.target, p.target_free_or_null, static_cast<i64>(r) * p.target_stride_row,
                                   input_or(p.guidance_or_null, b, 1.0f), nullptr, columns);
    const Scale scale = scale_of(input_or(p.temperature_or_null, b, 1.0f));
    Partial* mine = partials(chunks);
    const i32 id = load_global_nc(p.drafts + r);
    sweep_row(row, chunks, scale, mine);
    const RowOf<E> of = distribution_of(row, chunks, scale,
                                        truncation_of(p.top_k_or_null, p.top_p_or_null, p.min_p_or_null, b), mine,
                                        shared + kPooledSum);
    float pooled = 0;
    const bool drafted = id >= 0 && id < p.vocab && of.summary.shape != kEmpty;
    if (drafted) pooled = neighbourhood(of, static_cast<u32>(id));
    const bool accepted = drafted && pooled >= multiply(input_or(p.threshold_or_null, b, p.threshold), of.sum());
    if (thread_index() == 0) {
      store_global(flags + r, u32{!accepted} | said_of(of.summary) << 1);
      if (p.pooled_or_null) store_global(p.pooled_or_null + r, drafted ? divide(pooled, of.sum()) : 0.0f);
    }
  }

  // All of the block: what a request gets, all of whose rows are decided.
  NXS_DEVICE void finish(u32 b) {
    const u64 first = static_cast<u64>(b) * tokens;
    const u32 width = static_cast<u32>(p.width), warp = thread_index() / 32, lane = lane_index();
    const i32 radius = p.radius, columns = static_cast<i32>(p.width), height = static_cast<i32>(p.height);
    u32 *now = labels + first, *next = other_labels + first, said = 0;
    for (u32 u = thread_index(); u < tokens; u += kThreads) {
      const u32 flag = load_global(flags + first + u);
      said |= flag >> 1;
      u32 resample = flag & 1;
      const i32 row = static_cast<i32>(u / width), column = static_cast<i32>(u % width);
      // Rows above, and what comes before in its own.
      for (i32 y = row - radius < 0 ? 0 : row - radius; y <= row && !resample; ++y) {
        const i32 last = y == row ? column - 1 : column + radius < columns ? column + radius : columns - 1;
        for (i32 x = column - radius < 0 ? 0 : column - radius; x <= last; ++x) {
          if (load_global(flags + first + static_cast<u32>(y * columns + x)) & 1) {
            resample = 2;
            break;
          }
        }
      }
      store_global(p.resample + first + u, static_cast<u8>(resample));
      store_global(now + u, resample ? u : u32{kNothing});
    }
    warp_sync();
    said = warp_reduce_or(said);
    if (lane == 0) store_shared(shared + kPooledTotals + warp * 4, said);
    block_sync();
    if (thread_index() == 0) {
      for (u32 w = 1; w < kWarps; ++w) said |= load_shared<u32>(shared + kPooledTotals + w * 4);
      store_global(p.status + b, said);
    }
    // kNothing is the greatest label: it never wins.
    for (u32 changed = 1; changed;) {
      block_sync();
      if (thread_index() == 0) store_shared(shared + kPooledWord, 0u);
      block_sync();
      for (u32 u = thread_index(); u < tokens; u += kThreads) {
        const u32 old = load_global(now + u);
        u32 least = old;
        if (old != kNothing) {
          const i32 row = static_cast<i32>(u / width), column = static_cast<i32>(u % width);
          for (i32 y = row > 0 ? row - 1 : 0; y <= row + 1 && y < height; ++y) {
            for (i32 x = column > 0 ? column - 1 : 0; x <= column + 1 && x < columns; ++x) {
              const u32 label = load_global(now + static_cast<u32>(y * columns + x));
              least = label < least ? label : least;
            }
          }
          least = load_global(now + least);
          if (least != old) atomic_or_shared(shared + kPooledWord, 1u);
        }
        store_global(next + u, least);
      }
      block_sync();
      changed = load_shared<u32>(shared + kPooledWord);
      u32* const swapped = now;
      now = next;
      next = swapped;
    }
    // `next` holds the same labels; it now gets the numbers of roots.
    u32 positions = 0, islands = 0;
    for (u32 base = 0; base < tokens; base += kThreads) {
      const u32 u = base + thread_index(), label = u < tokens ? load_global(now + u) : kNothing;
      const u32 there = warp_ballot(label != kNothing), roots = warp_ballot(label != kNothing && label == u);
      block_sync();
      if (lane == 0) {
        store_shared(shared + kPooledTotals + warp * 4, population_count(there));
        store_shared(shared + kPooledRoots + warp * 4, population_count(roots));
      }
      block_sync();
      u32 at = positions + population_count(there & lanes_below());
      u32 number = islands + population_count(roots & lanes_below());
      for (u32 w = 0; w < kWarps; ++w) {
        const u32 of_warp = load_shared<u32>(shared + kPooledTotals + w * 4);
        const u32 roots_of_warp = load_shared<u32>(shared + kPooledRoots + w * 4);
        positions += of_warp;
        islands += roots_of_warp;
        if (w < warp) {
          at += of_warp;
          number += roots_of_warp;
        }
      }
      if (label != kNothing) {
        if (p.positions_or_null) store_global(p.positions_or_null + first + at, static_cast<i32>(u));
        if (label == u) store_global(next + u, number);
      }
    }
    block_sync();
    for (u32 u = thread_index(); u < tokens; u += kThreads) {
      if (p.positions_or_null && u >= positions) store_global(p.positions_or_null + first + u, i32{-1});
      if (p.islands_or_null) {
        const u32 label = load_global(now + u);
        store_global(p.islands_or_null + first + u, label == kNothing ? -1 : static_cast<i32>(load_global(next + label)));
      }
    }
    if (thread_index() == 0) {
      store_global(p.counts + i64{2} * b, static_cast<i32>(positions));
      store_global(p.counts + i64{2} * b + 1, static_cast<i32>(islands));
    }
  }
};

template <typename E>
__global__ void __launch_bounds__(kThreads, kGuided<E> || sizeof(E) == 4 ? 2 : 4) pooled_kernel(
    const __grid_constant__ nxs_pooled_verify_params p) {
  Pooled<E> pooled(p, dynamic_shared());
  const u64 rows = static_cast<u64>(p.batch) * pooled.tokens;
  for (u64 r = block_index_x(); r < rows; r += grid_size_x()) {
    const u32 b = static_cast<u32>(r / pooled.tokens);
    pooled.decide(b, r);
    u32 old = 0;
    if (thread_index() == 0) old = atomic_inc_acq_rel_global(p.counters + b, pooled.tokens - 1);
    if (say_to_block(pooled.shared + kPooledWord, thread_index() == 0, old) != pooled.tokens - 1) continue;
    pooled.finish(b);
    block_sync();
  }
}

template <typename E> nxs_status pooled_launch(const nxs_pooled_verify_params& p, void* stream) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(p.blocks));
  shape.block = kThreads;
  shape.dynamic_smem = kPooledBytes;
  return launch(pooled_kernel<E>, shape, stream, p);
}

}  // namespace nxs::verification
