// Drawing a token from a row of which the partials are known: by a warp, with every result in all of its lanes.
//
// A token is drawn in three steps, each the inverse of a cumulative sum with a uniform of its own: a chunk (chunk c belongs to
// lane c % 32, lanes one after the other), a lane of the chunk, a place of the lane. Picking goes to the first entry with
// weight at which the running sum exceeds uniform * total, or to the last one with weight.
// src/verification/rows.rs is the same, bit for bit.
#pragma once
#include "common/philox.cuh"
#include "common/ptx/shared.cuh"
#include "verification/row_stats.cuh"

namespace nxs::verification {

constexpr u32 kNothing = 0xffffffffu;

// The low byte of the counter's domain word; the rest is the row's number in the step, 0 for kSample.
enum Use : u32 { kUseDraft = 0, kUseAccept = 1, kUseResidual = 2, kUseSample = 3, kUseThin = 4 };

struct Uniforms {
  float at[4];
};
NXS_DEVICE Uniforms draw(u64 seed, u64 position, u32 use, u32 row, u32 number) {
  const PhiloxBlock block = philox(seed, position, use | row << 8, number);
  Uniforms uniforms;
#pragma unroll
  for (u32 i = 0; i < 4; ++i) uniforms.at[i] = philox_uniform(block.word[i]);
  return uniforms;
}

enum Shape : u32 {
  kEmpty,   // no column has weight
  kPeak,    // the lowest column of the greatest logit has all of it
  kSpread,  // logits from `cut` on, relative to 2^reference
};

struct Summary {
  Shape shape;
  bool nan, beyond;
  float top, reference, sum, cut;
  Scale scale;
};

NXS_DEVICE float weight_of(const Summary& row, float logit) {
  return weight_of(row.scale, row.reference, row.cut, logit);
}

NXS_DEVICE bool says_nan(const Partial& partial) {
  return float_bits(partial.sum) >> 31 || partial.sum != partial.sum || partial.max != partial.max;
}
NXS_DEVICE float magnitude(float x) { return bits_float(float_bits(x) & 0x7fffffffu); }

// What a chunk adds to a row.
NXS_DEVICE float share_of(const Partial& partial, const Scale& scale, float reference) {
  if (!has_reference(scale, partial.max)) return 0;
  return multiply(magnitude(partial.sum), power_of_integer(reference_of(scale, partial.max) - reference));
}

// From the partials of its chunks. Of `load(chunk)` and so on: the chunk's partial, ordered after its writing. A lane has eight
// of them on the way at once, and keeps them if there are no more.
template <typename Load> NXS_DEVICE Summary summarize(u32 chunks, const Scale& scale, Load load) {
  constexpr u32 kHeld = 8;
  Partial held[kHeld];
  const auto hold = [&](u32 first) {
#pragma unroll
    for (u32 k = 0; k < kHeld; ++k) {
      const u32 chunk = first + k * 32 + lane_index();
      held[k] = Partial{-INFINITY, 0};
      if (chunk < chunks) held[k] = load(chunk);
    }
  };
  Summary row = {kPeak, false, false, -INFINITY, 0, 0, -INFINITY, scale};
  bool nan = false;
  float top = -INFINITY;
#pragma unroll 1
  for (u32 first = 0; first < chunks; first += kHeld * 32) {
    hold(first);
#pragma unroll
    for (u32 k = 0; k < kHeld; ++k) {
      nan = nan || says_nan(held[k]);
      top = maximum(top, held[k].max);
    }
  }
  row.nan = warp_any(nan);
  row.top = key_float(warp_reduce_max(key_of(top)));
  if (row.top == -INFINITY) {
    row.shape = kEmpty;
  } else if (!scale.greedy()) {
    if (has_reference(scale, row.top)) {
      row.shape = kSpread;
      row.reference = reference_of(scale, row.top);
      float sum = 0;
#pragma unroll 1
      for (u32 first = 0; first < chunks; first += kHeld * 32) {
        if (chunks > kHeld * 32) hold(first);
        // Where there is no chunk, 0 is added, which changes no bit.
#pragma unroll
        for (u32 k = 0; k < kHeld; ++k) sum = sum + share_of(held[k], scale, row.reference);
      }
      row.sum = sum_of_lanes(sum);
    } else {
      row.beyond = true;
    }
  }
  return row;
}

// What a drafter stored of its row.
NXS_DEVICE Summary summary_of_draft(const float* stats) {
  const float top = load_global_nc(stats), sum = load_global_nc(stats + 1);
  const Scale scale = scale_from_per_logit(load_global_nc(stats + 3));
  Summary row = {kPeak, says_nan(Partial{top, sum}), false, top, 0, magnitude(sum), load_global_nc(stats + 2), scale};
  if (top == -INFINITY) {
    row.shape = kEmpty;
  } else if (!scale.greedy() && has_reference(scale, top)) {
    row.shape = kSpread;
    row.reference = reference_of(scale, top);
  }
  return row;
}

// The first lane with weight whose inclusive sum exceeds `target`, or the last one with weight, or kNothing.
NXS_DEVICE u32 pick_lane(float weight, float sums, float target) {
  const u32 with_weight = warp_ballot(weight > 0), beyond = warp_ballot(weight > 0 && sums > target);
  if (with_weight == 0) return kNothing;
  return beyond ? 31 - leading_zeros(beyond & -beyond) : 31 - leading_zeros(with_weight);
}

// A chunk by its weight, or kNothing.
template <typename Weight> NXS_DEVICE u32 pick_chunk(u32 chunks, float uniform, Weight weight) {
  float own = 0;
#pragma unroll 1
  for (u32 first = lane_index(); first < chunks; first += 4 * 32) {
    float some[4];
#pragma unroll
    for (u32 k = 0; k < 4; ++k) some[k] = first + k * 32 < chunks ? weight(first + k * 32) : 0.0f;
#pragma unroll
    for (u32 k = 0; k < 4; ++k) own = own + some[k];
  }
  warp_sync();
  const float sums = scan(own), target = multiply(uniform, shuffle(sums, 31));
  const u32 lane = pick_lane(own, sums, target);
  if (lane == kNothing) return kNothing;
  const float before = lane == 0 ? 0.0f : shuffle(sums, lane - 1);
  const float rest = maximum(target - before, 0.0f);
  u32 found = kNothing;
  float sum = 0;
#pragma unroll 1
  for (u32 chunk = lane_index(); chunk < chunks; chunk += 32) {
    const float w = weight(chunk);
    if (!(w > 0)) continue;
    sum = sum + w;
    found = chunk;
    if (sum > rest) break;
  }
  warp_sync();
  return shuffle(found, lane);
}

// A place of a chunk, as the column within it, or kNothing. `weight` by place, of this lane.
template <typename Weight> NXS_DEVICE u32 pick_place(float uniform_of_lane, float uniform_of_place, Weight weight) {
  float own = 0;
#pragma unroll
  for (u32 place = 0; place < 32; ++place) own = own + weight(place);
  const float sums = scan(own);
  const u32 lane = pick_lane(own, sums, multiply(uniform_of_lane, shuffle(sums, 31)));
  if (lane == kNothing) return kNothing;
  const float rest = multiply(uniform_of_place, own);
  u32 found = 0;
  float sum = 0;
  bool done = false;
#pragma unroll
  for (u32 place = 0; place < 32; ++place) {
    const float w = weight(place);
    if (!done && w > 0) {
      sum = sum + w;
      found = place / 8 * 256 + lane_index() * 8 + place % 8;
      done = sum > rest;
    }
  }
  return shuffle(found, lane);
}

// The lowest column of the row's greatest logit.
template <typename T, typename Load>
NXS_DEVICE u32 find_peak(const Summary& summary, const Row<T>& row, u32 chunks, Load load) {
  u32 chunk = kNothing;
  for (u32 at = lane_index(); at < chunks; at += 32) {
    if (load(at).max == summary.top) {
      chunk = at;
      break;
    }
  }
  chunk = warp_reduce_min(chunk);
  if (chunk == kNothing) return kNothing;
  const Logits<T> logits = load_logits(row, chunk);
  u32 found = kNothing;
#pragma unroll
  for (u32 place = 0; place < 32; ++place) {
    const u32 column = place / 8 * 256 + lane_index() * 8 + place % 8;
    if (logits.at(place) == summary.top && column < found) found = column;
  }
  found = warp_reduce_min(found);
  return found == kNothing ? kNothing : chunk * kChunk + found;
}

// A column of a row, or kNothing.
template <typename T, typename Load>
NXS_DEVICE u32 sample_row(const Summary& summary, const Row<T>& row, u32 chunks, float a, float b, float c, Load load) {
  if (summary.shape != kSpread) return summary.shape == kEmpty ? kNothing : find_peak(summary, row, chunks, load);
  const u32 chunk =
      pick_chunk(chunks, a, [&](u32 at) { return share_of(load(at), summary.scale, summary.reference); });
  if (chunk == kNothing) return kNothing;
  // By the chunk's own reference something of it always has weight.
  const float reference = reference_of(summary.scale, load(chunk).max);
  const Logits<T> logits = load_logits(row, chunk);
  const u32 place = pick_place(b, c, [&](u32 at) {
    return weight_of(summary.scale, reference, summary.cut, logits.at(at));
  });
  return place == kNothing ? kNothing : chunk * kChunk + place;
}

// The natural logarithm of a logit's probability.
NXS_DEVICE float log_probability(const Summary& row, float logit) {
  if (row.shape != kSpread || !(logit >= row.cut)) return -INFINITY;
  return multiply(fma(logit, row.scale.per_logit, -row.reference) - log2_approx(row.sum), kLn2);
}

// ---- by a block of kWarps warps ----

constexpr u32 kWarps = 8, kThreads = kWarps * 32;

// Whole chunks of an aligned row without a mask: those that are read 16 bytes at a time.
template <typename T> NXS_DEVICE u32 wide_chunks(const Row<T>& row) {
  return is_wide(row.logits) && !row.allow ? row.columns / kChunk : 0;
}

// This warp's share of the chunks from `begin` to `end` of a row: every eighth, the first of which is warp `turn`'s.
// Partials are numbered as chunks are. Those that are not wide, and those among which there is a NaN:
template <typename T>
NXS_DEVICE_CALL void sweep_narrow(const Row<T>& row, const Scale& scale, Partial* partials, u32 begin, u32 end) {
#pragma unroll 1
  for (u32 chunk = begin; chunk < end; chunk += kWarps) {
    Logits<T> logits = load_logits(row, chunk);
    const Partial partial = chunk_partial(logits, scale);
    if (lane_index() == 0) store_global(partials + chunk, partial);
  }
}
// All. The first two chunks are asked for at once, and the next one is on its way while one is added up, if the
// registers hold both; nothing is called in between. A NaN is noticed at the end: then the chunks are done again.
template <typename T>
NXS_DEVICE void sweep_chunks(const Row<T>& row, const Scale& scale, Partial* partials, u32 begin, u32 end, u32 turn) {
  const u32 first = begin + (thread_index() / 32 - turn) % kWarps;
  const u32 all = wide_chunks(row), wide = all < end ? all : end;
  u32 narrow = first;
  if (first < wide) {
    u32 more = (wide - 1 - first) / kWarps;  // after the first one
    narrow += (more + 1) * kWarps;
    const T* from = row.logits + static_cast<u64>(first) * kChunk;
    Partial* to = partials + first;
    bool nan = false;
    const auto keep = [&](const Logits<T>& logits) {
      const float top = lane_maximum(logits);
      nan = nan || top != top;
      const Partial partial = partial_of_numbers(logits, top, scale);
      if (lane_index() == 0) store_global(to, partial);
      to += kWarps;
    };
    if constexpr (sizeof(T) == 2) {
      Logits<T> now = detail::load_wide(from, 0);
#pragma unroll 1
      for (;; --more) {
        // The last one twice: what is loaded under a condition ptxas keeps in local memory.
        if (more > 0) from += kWarps * kChunk;
        const Logits<T> next = detail::load_wide(from, 0);
        keep(now);
        if (more == 0) break;
        now = next;
      }
    } else {
#pragma unroll 1
      for (;; --more, from += kWarps * kChunk) {
        const Logits<T> logits = detail::load_wide(from, 0);
        keep(logits);
        if (more == 0) break;
      }
    }
    if (warp_any(nan)) narrow = first;
  }
  if (narrow < end) {
    const Row<T> copied = row;  // the row itself stays in registers
    const Scale with = scale;
    sweep_narrow(copied, with, partials, narrow, end);
  }
}

struct Truncation {
  u32 top_k;     // 0: off
  float top_p;   // from 1 on: off
  float min_p;   // 0: off
};

// Adds up a 64-bit number of each thread over the block. `shared` has 8 bytes a warp.
NXS_DEVICE u64 block_sum(u64 value, u32 shared) {
#pragma unroll
  for (u32 distance = 16; distance > 0; distance /= 2) {
    const u32 low = shuffle_xor(static_cast<u32>(value), distance);
    const u32 high = shuffle_xor(static_cast<u32>(value >> 32), distance);
    value += static_cast<u64>(high) << 32 | low;
  }
  block_sync();
  if (lane_index() == 0) store_shared(shared + thread_index() / 32 * 8, value);
  block_sync();
  u64 sum = 0;
#pragma unroll
  for (u32 warp = 0; warp < kWarps; ++warp) sum += load_shared<u64>(shared + warp * 8);
  return sum;
}

template <typename T> constexpr u32 kKeyBits = 32;
template <> constexpr u32 kKeyBits<f16> = 19;
template <> constexpr u32 kKeyBits<bf16> = 16;

// Cuts a row down. All threads of the block, with the same `summary`, which gets its cut and sum; `partials` get the sums of
// what is left. Chunks whose greatest logit is below a bound are not read for it.
template <typename T>
NXS_DEVICE void truncate_row(const Truncation& truncation, Summary& summary, const Row<T>& row, u32 chunks,
                             Partial* partials, u32 shared) {
  const bool by_k = truncation.top_k > 0 && truncation.top_k < row.columns;
  const bool by_p = truncation.top_p < 1.0f, by_min = truncation.min_p > 0.0f;
  if (summary.shape != kSpread || !(by_k || by_p || by_min)) return;
  const u32 warp = thread_index() / 32, most = key_of(summary.top);
  const auto load = [&](u32 chunk) { return load_global(partials + chunk); };
  constexpr u32 kStep = 1u << (32 - kKeyBits<T>), kTop = 0x80000000u;
  u32 least = 0;
  if (by_min) {
    const Power top = power(summary.scale, (kMagic + 127.0f) - summary.reference, summary.top);
    const float bound = multiply(truncation.min_p, multiply(top.fraction, top.whole));
    // The greatest key that is still too small, and one step up.
    u32 below = 0;
#pragma unroll 1
    for (u32 bit = kTop; bit >= kStep && bit != 0; bit >>= 1) {
      const u32 next = below | bit;
      if (next > most) continue;
      // Below 0, logits of this many bits have ones after them.
      const float logit = key_float(next >> 31 ? next : next | (kStep - 1));
      if (!(weight_of(summary.scale, summary.reference, -INFINITY, logit) >= bound)) below = next;
    }
    const u32 above = below > 0xffffffffu - kStep ? 0xffffffffu : below + kStep;
    least = above < (most & ~(kStep - 1)) ? above : most & ~(kStep - 1);
  }
  // First the greatest key at which there are top_k columns, then the greatest one at which there is the mass.
#pragma unroll 1
  for (u32 pass = 0; pass < 2; ++pass) {
    if (!(pass == 0 ? by_k : by_p)) continue;
    u64 need = truncation.top_k;
    u32 found = 0;
    // Bit 0 stands for the question for all the mass.
#pragma unroll 1
    for (u32 bit = pass == 0 ? kTop : 0;;) {
      const u32 from = bit == 0 ? least : found | bit;
      if (from <= most) {
        u64 sum = 0;
#pragma unroll 1
        for (u32 chunk = warp; chunk < chunks; chunk += kWarps) {
          // Chunks whose greatest logit is too small are not read.
          if (key_of(load(chunk).max) < from) continue;
          const Logits<T> logits = load_logits(row, chunk);
#pragma unroll
          for (u32 place = 0; place < 32; ++place) {
            const float logit = logits.at(place);
            const u32 column = chunk * kChunk + place / 8 * 256 + lane_index() * 8 + place % 8;
            if (logit != logit || column >= row.columns || key_of(logit) < from) continue;
            const float weight = weight_of(summary.scale, summary.reference, -INFINITY, logit);
            sum += pass == 0 ? 1u : static_cast<u32>(multiply(weight, 2147483648.0f));
          }
        }
        warp_sync();
        sum = block_sum(sum, shared);
        if (bit != 0) {
          if (sum >= need) found = from;
        } else {
          const u64 part = static_cast<u64>(multiply(maximum(truncation.top_p, 0.0f), 16777216.0f));
          need = (sum >> 24) * part + (((sum & 0xffffffu) * part + 0xffffffu) >> 24);
          if (need < 1) need = 1;
        }
      }
      if (bit == kStep) break;
      bit = bit == 0 ? kTop : bit >> 1;
    }
    if (found > least) least = found;
  }
  // Keys up to that of -inf are NaNs.
  summary.cut = least <= key_of(-INFINITY) ? -INFINITY : key_float(least);
  // Others may still be at the partials as they were.
  block_sync();
#pragma unroll 1
  for (u32 chunk = warp; chunk < chunks; chunk += kWarps) {
    Partial partial = load(chunk);
    float sum = 0;
    if (has_reference(summary.scale, partial.max) && partial.max >= summary.cut) {
      const float reference = reference_of(summary.scale, partial.max);
      const Logits<T> logits = load_logits(row, chunk);
#pragma unroll
      for (u32 place = 0; place < 32; ++place)
        sum = sum + weight_of(summary.scale, reference, summary.cut, logits.at(place));
      sum = sum_of_lanes(sum);
    }
    warp_sync();
    if (lane_index() == 0) store_global(partials + chunk, Partial{partial.max, sum});
  }
  block_sync();
  float sum = 0;
#pragma unroll 1
  for (u32 chunk = lane_index(); chunk < chunks; chunk += 32)
    sum = sum + share_of(load(chunk), summary.scale, summary.reference);
  warp_sync();
  summary.sum = sum_of_lanes(sum);
}

}  // namespace nxs::verification
