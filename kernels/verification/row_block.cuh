// A row of logits, swept and cut down by one block of kWarps warps, and what many ops ask of it.
#pragma once
#include "verification/guided.cuh"

namespace nxs::verification {

// Says one thread's word to the block, through a word of shared memory.
NXS_DEVICE u32 say_to_block(u32 word_at, bool mine, u32 word) {
  block_sync();
  if (mine) store_shared(word_at, word);
  block_sync();
  return load_shared<u32>(word_at);
}

template <typename T> NXS_DEVICE T input_or(const T* p, i64 at, T otherwise) {
  return p ? load_global_nc(p + at) : otherwise;
}

// All of the block: writes the partials of a row.
template <typename E> NXS_DEVICE void sweep_row(const Row<E>& row, u32 chunks, const Scale& scale, Partial* partials) {
#pragma unroll 1
  for (u32 chunk = thread_index() / 32; chunk < chunks; chunk += kWarps) {
    Logits<E> logits = load_logits(row, chunk);
    const Partial partial = chunk_partial(logits, scale);
    if (lane_index() == 0) store_global(partials + chunk, partial);
  }
  block_sync();
}

// A distribution: by its summary, or all on one token.
template <typename E> struct RowOf {
  Row<E> row;
  Summary summary;
  u32 peak;
  NXS_DEVICE float sum() const { return peak != kNothing ? 1.0f : summary.sum; }
  NXS_DEVICE float weight(u32 token) const {
    if (peak != kNothing) return peak == token ? 1.0f : 0.0f;
    return weight_of(summary, logit_at(row, token));
  }
};

// All of the block, after the sweep. `shared`: 64 bytes for sums of the block.
template <typename E>
NXS_DEVICE RowOf<E> distribution_of(const Row<E>& row, u32 chunks, const Scale& scale, const Truncation& truncation,
                                    Partial* partials, u32 shared) {
  const auto load = [&](u32 chunk) { return load_global(partials + chunk); };
  RowOf<E> of = {row, summarize_few(chunks, scale, load), kNothing};
  truncate_row(truncation, of.summary, row, chunks, partials, shared);
  if (of.summary.shape == kPeak) of.peak = find_peak(of.summary, row, chunks, load);
  return of;
}

// What there is to say of a row of the target.
NXS_DEVICE u32 said_of(const Summary& summary) {
  u32 said = summary.nan ? NXS_STATUS_TARGET_NAN : 0;
  if (summary.beyond || summary.top == INFINITY) said |= NXS_STATUS_TARGET_BEYOND;
  if (summary.shape == kEmpty) said |= NXS_STATUS_TARGET_EMPTY;
  return said;
}

NXS_DEVICE Truncation truncation_of(const i32* top_k, const float* top_p, const float* min_p, i64 at) {
  const i32 k = input_or(top_k, at, 0);
  return Truncation{k > 0 ? static_cast<u32>(k) : 0, input_or(top_p, at, 1.0f), input_or(min_p, at, 0.0f)};
}

}  // namespace nxs::verification
