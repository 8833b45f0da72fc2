// What typical acceptance and confidences need of a row in one sweep: entropy, and the second greatest logit.
//
//   partial = { max, second, sum of w, sum of w (s * logit - r) },  w = 2^(s * logit - r),  see row_stats.cuh
//   entropy in bits = log2(sum) - moment / sum
//
// src/verification/moments.rs is the same, bit for bit.
#pragma once
#include "verification/log2.cuh"
#include "verification/row_block.cuh"

namespace nxs::verification {

struct alignas(16) Moments {
  float max, second, sum, moment;
};

// Of the warp's chunk, in every lane; the sign of `sum` says that there is a NaN. Two greatest logits that tie are both.
template <typename T> NXS_DEVICE Moments chunk_moments(Logits<T>& logits, const Scale& scale) {
  float top = -INFINITY, second = -INFINITY;
  bool nan = false;
#pragma unroll
  for (u32 place = 0; place < 32; ++place) {
    float x = logits.at(place);
    if (x != x) {
      nan = true;
      x = -INFINITY;
      logits.set(place, Logits<T>::minus_infinity());
    }
    second = maximum(second, x < top ? x : top);
    top = maximum(top, x);
  }
  nan = warp_any(nan);
#pragma unroll
  for (u32 distance = 16; distance > 0; distance /= 2) {
    const float other = shuffle_xor(top, distance), beside = shuffle_xor(second, distance);
    second = maximum(maximum(second, beside), other < top ? other : top);
    top = maximum(top, other);
  }
  // -0 is 0.
  top = top + 0.0f;
  second = second + 0.0f;
  float sum = 0, moment = 0;
  if (!scale.greedy() && has_reference(scale, top)) {
    const float reference = reference_of(scale, top), shift = (kMagic + 127.0f) - reference;
    const float floor = floor_of(scale, reference);
#pragma unroll
    for (u32 place = 0; place < 32; ++place) {
      const float x = maximum(logits.at(place), floor);
      const Power p = power(scale, shift, x);
      const float w = multiply(p.fraction, p.whole);
      sum = sum + w;
      moment = fma(w, fma(x, scale.per_logit, -reference), moment);
    }
    sum = sum_of_lanes(sum);
    moment = sum_of_lanes(moment);
  }
  return Moments{top, second, nan ? -sum : sum, moment};
}

struct RowMoments {
  Summary summary;
  float second, moment;
  NXS_DEVICE float entropy_bits() const {
    const float bits = log2_exact(summary.sum) - divide(moment, summary.sum);
    return bits > 0 ? bits : 0.0f;
  }
};

// From the moments of its chunks, by a warp.
template <typename Load> NXS_DEVICE RowMoments summarize_moments(u32 chunks, const Scale& scale, Load load) {
  RowMoments row;
  row.summary = summarize_few(chunks, scale, [&](u32 chunk) {
    const Moments of = load(chunk);
    return Partial{of.max, of.sum};
  });
  float top = -INFINITY, second = -INFINITY, moment = 0;
  const bool spread = row.summary.shape == kSpread;
#pragma unroll 1
  for (u32 chunk = lane_index(); chunk < chunks; chunk += 32) {
    const Moments of = load(chunk);
    second = maximum(maximum(second, of.second), of.max < top ? of.max : top);
    top = maximum(top, of.max);
    if (spread && has_reference(scale, of.max)) {
      const float apart = reference_of(scale, of.max) - row.summary.reference;
      moment = moment + multiply(power_of_integer(apart), fma(apart, magnitude(of.sum), of.moment));
    }
  }
  warp_sync();
#pragma unroll
  for (u32 distance = 16; distance > 0; distance /= 2) {
    const float other = shuffle_xor(top, distance), beside = shuffle_xor(second, distance);
    second = maximum(maximum(second, beside), other < top ? other : top);
    top = maximum(top, other);
  }
  row.second = second;
  row.moment = sum_of_lanes(moment);
  return row;
}

// 2^-x for x from 0 on; 0 above 100.
NXS_DEVICE float power_of_minus(float x) {
  if (!(x <= 100.0f)) return 0;
  const float whole = (x + kMagic) - kMagic;
  return multiply(power_of_fraction(whole - x), power_of_integer(-whole));
}

}  // namespace nxs::verification
