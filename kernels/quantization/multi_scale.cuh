// Multi-scale residual quantizers: a scale's tokens, resized and convolved, are added to the running map, and the map
// is resized to what the next scale reads, in one launch.
//
//   h = resize(tokens of scale s -> H x W);  f_hat += phi_s(h);  next = resize(f_hat -> next size), token-major
//
// Layouts    as nextscale.h says: maps [batch, C, H, W] f32, tokens [batch, l, C] or codes [batch, l] with a codebook
//            [V, C], next [repeat, batch, l, C]; phi packed [phis, C / 4, 9 C + 1, 4].
// Who does what, `owner` kernel (any call)
//            A block of 256 threads, or a cluster of p.blocks of them that take turns at the bands, owns p.group channels of
//            one image: a phi mixes all inputs into each output, but outputs do not meet, and only next has windows
//            that reach into several bands. It works on bands of p.band rows, scale after scale:
//            1. gather: the tokens that the band reaches, all channels with a phi, else its own, to shared memory
//               [pixel][channel], eight chunks of four channels in flight a thread;
//            2. resize: a thread takes a column x, four channels and a stretch of rows; it keeps the up to four
//               source rows that are in reach, each resized along x once, in registers. With a phi into `up`
//               [channel][band + 2 rows][x], zeros around the map; else straight into f_hat;
//            3. phi: a thread takes 2 x 4 pixels, four outputs and an eighth of the inputs: 32 sums, for each input 8
//               loads of pixels and 9 of weights (broadcast) beside 288 FMAs. The eighths meet in shared memory and
//               are added in order, so no cut of the work changes a bit;
//            4. f_hat: read, added, written, and kept in shared memory for
//            5. next: a thread takes a pixel of the next map and four channels; large windows are shared by up to 32
//               lanes and summed by shuffles.
// `rows` kernel (no phi; next by bilinear sampling, or of the tokens; f_hat into another buffer)
//            A block makes one row of the new f_hat, or one row of next, for which it works out the four pixels of f_hat
//            that each sample needs once more: no barrier between the two, and batch x (H + rows of next) blocks.
// Bytes      tokens, f_hat read and written, next written; each of the C / group blocks of an image reads all tokens
//            and its part of a phi, which L2 holds.
// FLOPs      18 C^2 H W an image with a phi (4.7 MFLOP for C 32 at 16 x 16), about 32 C H W for resizing.
// Loads      none through the non-coherent path: a kernel that is launched early runs while the one before writes.
// Limits     C <= 256, sides <= 1024, 32 scales a call; the working set of a band in shared memory.
#pragma once
#include <type_traits>

#include "common/chunk.cuh"
#include "common/dtype.cuh"
#include "common/philox.cuh"
#include "common/ptx/async_copy.cuh"
#include "common/ptx/cluster.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/math.cuh"
#include "common/ptx/memory.cuh"
#include "common/ptx/programmatic.cuh"
#include "common/ptx/shared.cuh"
#include "common/ptx/warp.cuh"

namespace nxs::quantization {

constexpr u32 kScaleThreads = 256;
constexpr u32 kParts = 8;   // parts of a phi's inputs
constexpr u32 kAhead = 8;   // chunks of tokens that a thread has in flight
using Params = nxs_multi_scale_params;
using Four = Vec<float, 4>;

__host__ NXS_DEVICE constexpr u32 ceil_div(u32 a, u32 b) { return (a + b - 1) / b; }
__host__ NXS_DEVICE constexpr u32 round_up(u32 a, u32 b) { return ceil_div(a, b) * b; }
__host__ NXS_DEVICE constexpr u32 min_of(u32 a, u32 b) { return a < b ? a : b; }
NXS_DEVICE constexpr i32 clamp_to(i32 x, i32 last) { return x < 0 ? 0 : x > last ? last : x; }

// Words between rows of `up`: the row, a zero on either side, and such that the pixels of eight neighbouring tiles
// lie in different banks.
__host__ NXS_DEVICE constexpr u32 up_stride(u32 width) {
  const u32 width4 = round_up(width, 4);
  return width4 == 16 ? 24 : width4 + 4;
}

// Words between channels of `up`: such that the same column of two chunks of four channels lies in different banks.
__host__ NXS_DEVICE constexpr u32 up_plane(u32 band, u32 width) {
  const u32 words = (band + 2) * up_stride(width);
  return words % 8 == 0 ? words + 4 : words;
}

// Where the owner kernel keeps things, bytes from the start of shared memory.
struct OwnerLayout {
  u32 weights, plane, up, work, bytes;
};
inline OwnerLayout owner_layout(const Params& p, u32 taps) {
  const u32 channels4 = round_up(p.channels, 4), width4 = round_up(p.width, 4);
  const bool plane = p.plane_shared && p.next_height > 0;
  u32 work = 0;
  bool conv = false;
  for (int s = 0; s < p.scales; ++s) {
    const bool phi = p.scale_phi[s] >= 0, copy = p.scale_height[s] == p.height && p.scale_width[s] == p.width;
    conv |= phi;
    const u32 rows = p.band + (phi ? 2 : 0), channels = phi ? channels4 : p.group, height = p.scale_height[s];
    const u32 reach = copy ? rows : ceil_div((rows - 1) * height, p.height) + taps;
    const u32 bytes = min_of(reach, height) * p.scale_width[s] * (channels + 4) * 4;
    if (bytes > work) work = bytes;
  }
  const u32 parts = kParts * 16 * p.band * width4;
  if (conv && parts > work) work = parts;
  OwnerLayout at;
  at.weights = round_up(p.height * 20, 16);
  at.plane = at.weights + (conv ? p.group / 4 * (9 * p.channels + 1) * 16 : 0);
  at.up = at.plane + (plane ? p.group * p.height * p.width * 4 : 0);
  at.work = at.up + (conv ? channels4 * up_plane(p.band, p.width) * 4 : 0);
  at.bytes = at.work + work;
  return at;
}

// Params as the kernels take them: with what the launcher worked out.
struct ScaleParams {
  Params p;
  OwnerLayout at;
  u32 lanes;         // that share a window of next
  bool vector_rows;  // chunks of four of the codebook or of embeddings and bits are aligned
  bool vector_map;   // f_hat rows too
  bool vector_next;
};

// ---- resizing

// The taps of one place of an axis that is made `to` from `from` long: the first one's place (not clamped) and
// weights. The position is a fraction of integers, so the weights are those of its exact value.
template <int kTaps> struct Taps {
  i32 first;
  float weight[kTaps];
};
template <int kTaps> NXS_DEVICE Taps<kTaps> taps_at(u32 place, u32 from, u32 to) {
  Taps<kTaps> taps;
  const i32 twice = static_cast<i32>(2 * to);
  i32 position = static_cast<i32>((2 * place + 1) * from) - static_cast<i32>(to);  // in units of 1 / twice
  if (kTaps == 2 && position < 0) position = 0;
  // An integer division takes a hundred instructions; the quotient is off by at most one.
  i32 whole = static_cast<i32>(static_cast<float>(position + twice) * reciprocal_approx(static_cast<float>(twice))) - 1;
  i32 rest = position - whole * twice;
  if (rest < 0) --whole, rest += twice;
  if (rest >= twice) ++whole, rest -= twice;
  const float t = divide(static_cast<float>(rest), static_cast<float>(twice));
  if constexpr (kTaps == 2) {
    taps.first = whole;
    taps.weight[0] = 1.0f - t;
    taps.weight[1] = t;
  } else {
    constexpr float kA = -0.75f;
    const float near[2] = {t, 1.0f - t}, far[2] = {t + 1.0f, 2.0f - t};
    taps.first = whole - 1;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float s = near[i], r = far[i];
      taps.weight[1 + i] = fma(fma(kA + 2.0f, s, -(kA + 3.0f)) * s, s, 1.0f);
      taps.weight[3 * i] = fma(fma(fma(kA, r, -5.0f * kA), r, 8.0f * kA), r, -4.0f * kA);
    }
  }
  return taps;
}

// ---- tokens

// What tokens are: codes, or elements f32, f16, bf16 or bits (u8).
struct Codes {};

NXS_DEVICE i64 load_code(const void* codes, nxs_dtype dtype, i64 at) {
  switch (dtype) {
    case NXS_U16: return load_global(static_cast<const u16*>(codes) + at);
    case NXS_U32: return load_global(static_cast<const u32*>(codes) + at);
    default: return load_global(static_cast<const i64*>(codes) + at);
  }
}

template <typename T> NXS_DEVICE float element_value(const Params&, T element) { return to_f32(element); }
template <> NXS_DEVICE float element_value<u8>(const Params& p, u8 bit) { return bit ? p.bit_scale : -p.bit_scale; }

// Where a pixel of a map of tokens is: its token, and with a patch its place in that.
struct Place {
  u32 token, corner;
};
NXS_DEVICE Place place_of(const Params& p, u32 y, u32 x, u32 width) {
  if (p.patch == 1) return {y * width + x, 0};
  return {y / 2 * (width / 2) + x / 2, y % 2 * 2 + x % 2};
}
NXS_DEVICE Place place_of_pixel(const Params& p, u32 pixel, u32 width) {
  if (p.patch == 1) return {pixel, 0};
  return place_of(p, pixel / width, pixel % width, width);
}

// The tokens of one scale of one image.
struct Grid {
  i64 first;  // element of p.tokens_or_null
  u32 height, width;
};

// First half of a load, all that a second half depends on: where the codebook's row or the token's elements begin.
template <typename T> NXS_DEVICE i64 locate(const Params& p, const Grid& grid, u32 pixel, bool& clamped) {
  const Place place = place_of_pixel(p, pixel, grid.width);
  if constexpr (std::is_same_v<T, Codes>) {
    const i64 code = load_code(p.tokens_or_null, p.tokens_dtype, grid.first + place.token);
    const i64 entry = code < 0 ? 0 : code >= p.entries ? p.entries - 1 : code;
    clamped |= entry != code;
    return entry * p.channels;
  } else {
    return grid.first + static_cast<i64>(place.token) * (p.channels * p.patch * p.patch) + place.corner;
  }
}
// Channels c to c + 3, in one load.
template <typename T> NXS_DEVICE Four load_four(const Params& p, i64 at, u32 c) {
  Four four;
  if constexpr (std::is_same_v<T, Codes>) {
    four = load_global(reinterpret_cast<const Four*>(p.codebook_or_null + at + c));
  } else {
    const T* from = static_cast<const T*>(p.tokens_or_null) + at + c;
    const auto chunk = load_global(reinterpret_cast<const Vec<T, 4>*>(from));
#pragma unroll
    for (int i = 0; i < 4; ++i) four.data[i] = element_value(p, chunk.data[i]);
  }
  return four;
}
// One by one; zeros beyond the last channel.
template <typename T> NXS_DEVICE Four load_singly(const Params& p, i64 at, u32 c) {
  Four four;
#pragma unroll
  for (u32 i = 0; i < 4; ++i) {
    four.data[i] = 0;
    if (c + i >= static_cast<u32>(p.channels)) continue;
    if constexpr (std::is_same_v<T, Codes>)
      four.data[i] = load_global(p.codebook_or_null + at + c + i);
    else
      four.data[i] = element_value(p, load_global(static_cast<const T*>(p.tokens_or_null) + at +
                                                     static_cast<i64>(c + i) * (p.patch * p.patch)));
  }
  return four;
}

NXS_DEVICE void add_scaled(Four& sum, float weight, const Four& value) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sum.data[i] = fma(weight, value.data[i], sum.data[i]);
}
NXS_DEVICE Four scaled(float weight, const Four& value) {
  Four four;
#pragma unroll
  for (int i = 0; i < 4; ++i) four.data[i] = weight * value.data[i];
  return four;
}

// ---- the next scale's input

NXS_DEVICE void store_next(const ScaleParams& q, u32 b, const Place& place, u32 c, const Four& value) {
  const Params& p = q.p;
  const i64 at = b * p.next_stride_batch + static_cast<i64>(place.token) * (p.channels * p.patch * p.patch);
  for (int r = 0; r < p.repeat; ++r) {
    const i64 to = at + r * p.batch * p.next_stride_batch;
    if (q.vector_next) {
      switch (p.next_dtype) {
        case NXS_F32: store_chunk<false>(static_cast<float*>(p.next_or_null) + to + c, value.data); break;
        case NXS_F16: store_chunk<false>(static_cast<f16*>(p.next_or_null) + to + c, value.data); break;
        default: store_chunk<false>(static_cast<bf16*>(p.next_or_null) + to + c, value.data); break;
      }
      continue;
    }
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      if (c + i >= static_cast<u32>(p.channels)) continue;
      const i64 element = to + static_cast<i64>(c + i) * (p.patch * p.patch) + place.corner;
      switch (p.next_dtype) {
        case NXS_F32: store_global(static_cast<float*>(p.next_or_null) + element, value.data[i]); break;
        case NXS_F16: store_global(static_cast<f16*>(p.next_or_null) + element, from_f32<f16>(value.data[i])); break;
        default: store_global(static_cast<bf16*>(p.next_or_null) + element, from_f32<bf16>(value.data[i])); break;
      }
    }
  }
}

NXS_DEVICE void store_labels(const Params& p, u32 b, const Place& place, u32 c, const Four& value) {
  const u32 width = p.channels * p.patch * p.patch;
  const i64 at = b * p.labels_stride_batch + static_cast<i64>(place.token) * width;
  const u64 seed = p.flipped_or_null ? static_cast<u64>(load_global(p.seeds_or_null + b)) : 0;
  const u64 position = static_cast<u64>(p.first_label + place.token) * ceil_div(width, 4);
  PhiloxBlock block = {};
  u32 of = 0xffffffffu;
#pragma unroll
  for (u32 i = 0; i < 4; ++i) {
    if (c + i >= static_cast<u32>(p.channels)) continue;
    const u32 element = (c + i) * (p.patch * p.patch) + place.corner;
    const u8 bit = value.data[i] > 0;
    store_global(p.labels_or_null + at + element, bit);
    if (!p.flipped_or_null) continue;
    if (element / 4 != of) {
      of = element / 4;
      block = philox(seed, position + of, NXS_DOMAIN_BIT_FLIP, 0);
    }
    const u32 word = philox_word(block, element);
    store_global(p.flipped_or_null + at + element, static_cast<u8>(bit ^ (philox_uniform(word) < p.flip_rate ? 1 : 0)));
  }
}

// ---- the owner kernel

// What a block of the owner kernel knows.
struct Owner {
  u32 image, channel, own;  // its first channel and their number, a multiple of 4
  u32 shared;
  const float* before;  // f_hat before the scale, of the image; null: zeroes
  float* after;         // null: not kept
};

NXS_DEVICE Four map_before(const ScaleParams& q, const Owner& o, u32 c, u32 y, u32 x, bool vector) {
  const Params& p = q.p;
  Four four = {};
  if (!o.before) return four;
  const float* from = o.before + (static_cast<i64>(c) * p.height + y) * p.width + x;
  if (vector) return load_global(reinterpret_cast<const Four*>(from));
#pragma unroll
  for (u32 i = 0; i < 4; ++i)
    if (x + i < static_cast<u32>(p.width)) four.data[i] = load_global(from + i);
  return four;
}

// Loads the band's source rows [lo, hi], channels [c0, c0 + 4 chunks), as rows of chunks * 4 + 4 words. A thread has
// one chunk of each of its pixels.
template <typename T>
NXS_DEVICE void gather(const ScaleParams& q, const Grid& grid, u32 lo, u32 hi, u32 c0, u32 chunks, u32 to,
                       bool& clamped) {
  const u32 pixels = (hi - lo + 1) * grid.width, lanes = kScaleThreads / chunks, first = lo * grid.width;
  const u32 lane = thread_index() / chunks, chunk = thread_index() - lane * chunks, c = c0 + chunk * 4;
  if (lane >= lanes) return;
  const u32 at_chunk = to + chunk * 16, pixel_bytes = (chunks + 1) * 16;
  if (!q.vector_rows) {
#pragma unroll 1
    for (u32 pixel = lane; pixel < pixels; pixel += lanes)
      store_shared(at_chunk + pixel * pixel_bytes,
                   load_singly<T>(q.p, locate<T>(q.p, grid, first + pixel, clamped), c));
    return;
  }
#pragma unroll 1
  for (u32 base = lane; base < pixels; base += kAhead * lanes) {
    i64 at[kAhead];
    Four four[kAhead];
#pragma unroll
    for (u32 k = 0; k < kAhead; ++k) {
      const u32 pixel = base + k * lanes;
      at[k] = pixel < pixels ? locate<T>(q.p, grid, first + pixel, clamped) : 0;
    }
#pragma unroll
    for (u32 k = 0; k < kAhead; ++k)
      if (base + k * lanes < pixels) four[k] = load_four<T>(q.p, at[k], c);
#pragma unroll
    for (u32 k = 0; k < kAhead; ++k)
      if (base + k * lanes < pixels) store_shared(at_chunk + (base + k * lanes) * pixel_bytes, four[k]);
  }
}

// Four channels of source row `row`, resized along x.
template <int kTaps>
NXS_DEVICE Four resized_row(u32 row, u32 pixel_bytes, const u32 (&column)[kTaps], const float (&weight)[kTaps]) {
  Four sum = scaled(weight[0], load_shared<Four>(row + column[0] * pixel_bytes));
#pragma unroll
  for (int t = 1; t < kTaps; ++t) add_scaled(sum, weight[t], load_shared<Four>(row + column[t] * pixel_bytes));
  return sum;
}

// Resizes the gathered rows to rows [ya, yb) of the map, and hands each (chunk, y, x, value) to `take`.
template <int kTaps, typename Take>
NXS_DEVICE void resize(const ScaleParams& q, const Grid& grid, u32 shared, u32 lo, u32 chunks, u32 ya, u32 yb,
                       Take take) {
  const u32 width = q.p.width, height = q.p.height, rows = yb - ya, pixel_bytes = (chunks + 1) * 16;
  const u32 tokens = shared + q.at.work, row_bytes = grid.width * pixel_bytes, lines = width * chunks;
  const bool copy = grid.height == height && grid.width == width;
  const u32 segments = lines >= kScaleThreads ? 1 : min_of(kScaleThreads / lines, rows);
  for (u32 item = thread_index(); item < lines * segments; item += kScaleThreads) {
    const u32 x = item % width, rest = item / width, chunk = rest % chunks, segment = rest / chunks;
    const u32 from = ya + segment * rows / segments, to = ya + (segment + 1) * rows / segments;
    const u32 base = tokens + chunk * 16;
    if (copy) {
      for (u32 y = from; y < to; ++y)
        take(chunk, y, x, load_shared<Four>(base + (y - lo) * row_bytes + x * pixel_bytes));
      continue;
    }
    const Taps<kTaps> across = taps_at<kTaps>(x, grid.width, width);
    u32 column[kTaps];
#pragma unroll
    for (int t = 0; t < kTaps; ++t) column[t] = clamp_to(across.first + t, grid.width - 1);
    const auto source = [&](i32 row) {
      const u32 at = base + (clamp_to(row, grid.height - 1) - lo) * row_bytes;
      return resized_row<kTaps>(at, pixel_bytes, column, across.weight);
    };
    Four reach[kTaps];
    i32 first = load_shared<i32>(shared + from * 4);
#pragma unroll
    for (int t = 0; t < kTaps; ++t) reach[t] = source(first + t);
    for (u32 y = from; y < to; ++y) {
      // Maps only grow, so a row down is at most a source row down.
      if (load_shared<i32>(shared + y * 4) != first) {
        ++first;
#pragma unroll
        for (int t = 0; t + 1 < kTaps; ++t) reach[t] = reach[t + 1];
        reach[kTaps - 1] = source(first + kTaps - 1);
      }
      const u32 weights = shared + height * 4 + y * (kTaps * 4);
      Four sum = scaled(load_shared<float>(weights), reach[0]);
#pragma unroll
      for (int t = 1; t < kTaps; ++t) add_scaled(sum, load_shared<float>(weights + t * 4), reach[t]);
      take(chunk, y, x, sum);
    }
  }
}

// The phi of a band: sums of each eighth of the inputs, for outputs 4 `group` and on, to the working memory.
NXS_DEVICE void convolve(const ScaleParams& q, u32 shared, u32 group) {
  const Params& p = q.p;
  const u32 channels = p.channels, band = p.band, stride = up_stride(p.width) * 4;
  const u32 plane = up_plane(band, p.width) * 4;
  const u32 columns = ceil_div(p.width, 4), tiles = band / 2 * columns, share = ceil_div(channels, kParts);
  const u32 weights = shared + q.at.weights + group * (9 * channels + 1) * 16;
  for (u32 item = thread_index(); item < tiles * kParts; item += kScaleThreads) {
    const u32 tile = item % tiles, part = item / tiles, row = tile / columns * 2, x = tile % columns * 4;
    const u32 begin = min_of(part * share, channels), end = min_of(begin + share, channels);
    const u32 pixels = shared + q.at.up + row * stride + x * 4;
    float sum[2][4][4] = {};  // row, x, output
    for (u32 input = begin; input < end; ++input) {
      float pixel[4][6];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const u32 at = pixels + input * plane + r * stride;
        const Four four = load_shared<Four>(at);
        const Vec<float, 2> two = load_shared<Vec<float, 2>>(at + 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) pixel[r][i] = four.data[i];
        pixel[r][4] = two.data[0], pixel[r][5] = two.data[1];
      }
#pragma unroll
      for (int tap = 0; tap < 9; ++tap) {
        const Four weight = load_shared<Four>(weights + (input * 9 + tap) * 16);
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int k = 0; k < 4; ++k)
              sum[r][i][k] = fma(pixel[r + tap / 3][i + tap % 3], weight.data[k], sum[r][i][k]);
      }
    }
    const u32 to = shared + q.at.work + (part * 4 * band * columns + tile) * 16;  // [part][output][row % 2][tile]
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        store_shared(to + (2 * k + r) * tiles * 16,
                     Four{{sum[r][0][k], sum[r][1][k], sum[r][2][k], sum[r][3][k]}});
  }
}

// Where item `item` of a band's sums belongs: four pixels of a channel.
struct Sums {
  u32 x, y, k, channel;
  bool there;
};
NXS_DEVICE Sums sums_of(const Params& p, const Owner& o, u32 group, u32 y0, u32 item) {
  const u32 columns = ceil_div(p.width, 4), tiles = p.band / 2 * columns;
  const u32 half = item / tiles, tile = item - half * tiles, row = tile / columns;
  Sums at;
  at.k = half / 2;
  at.x = (tile - row * columns) * 4, at.y = y0 + row * 2 + half % 2;
  at.channel = o.channel + group * 4 + at.k;
  at.there = at.k < 4 && at.y < static_cast<u32>(p.height) && at.channel < static_cast<u32>(p.channels);
  return at;
}
// The map before, of a thread's first sums: asked for early.
NXS_DEVICE Four old_of(const ScaleParams& q, const Owner& o, u32 group, u32 y0) {
  const Sums at = sums_of(q.p, o, group, y0, thread_index());
  return at.there ? map_before(q, o, at.channel, at.y, at.x, q.vector_map) : Four{};
}

// Adds the eighths and the bias to f_hat, rows [y0, y0 + band), outputs 4 `group` and on.
NXS_DEVICE void add_phi(const ScaleParams& q, const Owner& o, u32 group, u32 y0, const Four& first) {
  const Params& p = q.p;
  const u32 items = 4 * p.band * ceil_div(p.width, 4), height = p.height, width = p.width;
  const bool keep = p.plane_shared && p.next_height > 0;
  for (u32 item = thread_index(); item < items; item += kScaleThreads) {
    const Sums at = sums_of(p, o, group, y0, item);
    if (!at.there) continue;
    Four sum = item == thread_index() ? first : map_before(q, o, at.channel, at.y, at.x, q.vector_map);
    Four h = load_shared<Four>(o.shared + q.at.work + item * 16);
#pragma unroll
    for (u32 part = 1; part < kParts; ++part) {
      const Four more = load_shared<Four>(o.shared + q.at.work + (part * items + item) * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) h.data[i] += more.data[i];
    }
    const float bias =
        load_shared<float>(o.shared + q.at.weights + ((group + 1) * (9 * p.channels + 1) - 1) * 16 + at.k * 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum.data[i] += h.data[i] + bias;
    float* to = o.after + (static_cast<i64>(at.channel) * height + at.y) * width + at.x;
    const u32 kept = o.shared + q.at.plane + (((group * 4 + at.k) * height + at.y) * width + at.x) * 4;
    if (q.vector_map) {
      store_global(reinterpret_cast<Four*>(to), sum);
      if (keep) store_shared(kept, sum);
    } else {
#pragma unroll
      for (u32 i = 0; i < 4; ++i) {
        if (at.x + i >= width) continue;
        store_global(to + i, sum.data[i]);
        if (keep) store_shared(kept + i * 4, sum.data[i]);
      }
    }
  }
}

// One pixel of next, four channels: of the map, of target - map, or only of the target.
template <typename Read>
NXS_DEVICE Four sample(const Params& p, bool area, u32 y, u32 x, u32 lane, u32 lanes, Read read) {
  Four sum = {};
  const u32 height = p.height, width = p.width, to_height = p.next_height, to_width = p.next_width;
  if (area) {
    const u32 y0 = y * height / to_height, y1 = ceil_div((y + 1) * height, to_height);
    const u32 x0 = x * width / to_width, x1 = ceil_div((x + 1) * width, to_width);
    const u32 columns = x1 - x0, count = (y1 - y0) * columns;
    u32 row = lane / columns, column = lane - row * columns;
    for (u32 i = lane; i < count; i += lanes) {
      const Four four = read(y0 + row, x0 + column);
#pragma unroll
      for (int k = 0; k < 4; ++k) sum.data[k] += four.data[k];
      for (column += lanes; column >= columns; column -= columns) ++row;
    }
    return sum;
  }
  if (lane > 0) return sum;
  const Taps<2> down = taps_at<2>(y, height, to_height), across = taps_at<2>(x, width, to_width);
  const u32 columns[2] = {static_cast<u32>(clamp_to(across.first, width - 1)),
                          static_cast<u32>(clamp_to(across.first + 1, width - 1))};
  // What has no weight is not looked at: it might be infinite.
  const auto line = [&](i32 row) {
    const u32 at = clamp_to(row, height - 1);
    Four four = scaled(across.weight[0], read(at, columns[0]));
    if (across.weight[1] != 0) add_scaled(four, across.weight[1], read(at, columns[1]));
    return four;
  };
  sum = scaled(down.weight[0], line(down.first));
  if (down.weight[1] != 0) add_scaled(sum, down.weight[1], line(down.first + 1));
  return sum;
}

// The block's share of the pixels of next, of its channels.
NXS_DEVICE void make_next(const ScaleParams& q, const Owner& o, bool labels, u32 rank, u32 blocks) {
  const Params& p = q.p;
  const u32 height = p.height, width = p.width, pixels = p.next_height * p.next_width, chunks = o.own / 4;
  const bool residual = labels || p.next_of_residual, area = labels || p.down == NXS_RESIZE_AREA;
  const u32 lanes = area ? q.lanes : 1, items = pixels * chunks;
  const float* target = p.target_or_null + static_cast<i64>(o.image) * p.channels * height * width;
  for (u32 base = rank * kScaleThreads; base < items * lanes; base += blocks * kScaleThreads) {
    const u32 item = (base + thread_index()) / lanes, lane = thread_index() % lanes;
    const u32 pixel = item % pixels, chunk = item / pixels, c = o.channel + chunk * 4;
    const u32 y = pixel / p.next_width, x = pixel % p.next_width;
    Four sum = {};
    if (item < items) {
      sum = sample(p, area, y, x, lane, lanes, [&](u32 y, u32 x) {
        Four four = {};
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
          if (c + i >= static_cast<u32>(p.channels)) continue;
          const i64 at = (static_cast<i64>(c + i) * height + y) * width + x;
          const u32 kept = o.shared + q.at.plane + (((chunk * 4 + i) * height + y) * width + x) * 4;
          float value = 0;
          if (p.scales > 0) value = p.plane_shared ? load_shared<float>(kept) : load_global(o.after + at);
          four.data[i] = residual ? load_global(target + at) - value : value;
        }
        return four;
      });
    }
    for (u32 distance = lanes / 2; distance > 0; distance /= 2)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum.data[i] += shuffle_xor(sum.data[i], distance);
    if (item >= items || lane > 0) continue;
    if (area) {
      const u32 rows = ceil_div((y + 1) * height, p.next_height) - y * height / p.next_height;
      const u32 columns = ceil_div((x + 1) * width, p.next_width) - x * width / p.next_width;
#pragma unroll
      for (int i = 0; i < 4; ++i) sum.data[i] /= static_cast<float>(rows * columns);
    }
    const Place place = place_of(p, y, x, p.next_width);
    if (labels)
      store_labels(p, o.image, place, c, sum);
    else
      store_next(q, o.image, place, c, sum);
  }
}

// Taps of the rows of the map; and once, zeros around it.
template <int kTaps> NXS_DEVICE void prepare_scale(const ScaleParams& q, u32 shared, int s, bool& zeroed) {
  const Params& p = q.p;
  const u32 height = p.height;
  for (u32 y = thread_index(); y < height; y += kScaleThreads) {
    const Taps<kTaps> taps = taps_at<kTaps>(y, p.scale_height[s], height);
    store_shared(shared + y * 4, taps.first);
#pragma unroll
    for (int t = 0; t < kTaps; ++t) store_shared(shared + height * 4 + (y * kTaps + t) * 4, taps.weight[t]);
  }
  if (p.scale_phi[s] < 0 || zeroed) return;
  // What lies beside the map; what lies above and below is written with each band.
  const u32 words = round_up(p.channels, 4) * up_plane(p.band, p.width);
  for (u32 i = thread_index(); i < words / 4; i += kScaleThreads) store_shared(shared + q.at.up + i * 16, Four{});
  zeroed = true;
}

template <typename T, int kTaps>
__global__ void __launch_bounds__(kScaleThreads, 1) multi_scale_owner_kernel(const __grid_constant__ ScaleParams q) {
  const Params& p = q.p;
  const u32 channels4 = round_up(p.channels, 4), height = p.height, width = p.width, stride = up_stride(width);
  Owner o;
  o.image = block_index_y();
  const u32 blocks = p.blocks, rank = blocks > 1 ? cluster_rank() : 0;
  o.channel = block_index_x() / blocks * p.group;
  o.own = min_of(p.group, channels4 - o.channel);
  o.shared = dynamic_shared();
  bool zeroed = false;
  if (p.programmatic) programmatic_trigger();
  if (p.scales > 0) prepare_scale<kTaps>(q, o.shared, 0, zeroed);
  if (p.programmatic) programmatic_wait();

  const i64 image = static_cast<i64>(o.image) * p.channels * height * width;
  const i64 maps = p.batch * p.channels * height * width;
  o.before = p.f_hat_or_null && !p.independent ? p.f_hat_or_null + image : nullptr;
  o.after = p.f_hat_out_or_null ? p.f_hat_out_or_null + image : nullptr;
  const bool keep = p.plane_shared && p.next_height > 0;
  bool clamped = false;
  Grid grid;
  grid.first = o.image * p.tokens_stride_batch;
  i32 loaded = -1;
  for (int s = 0; s < p.scales; ++s) {
    grid.height = p.scale_height[s], grid.width = p.scale_width[s];
    const i32 phi = p.scale_phi[s];
    if (s > 0) prepare_scale<kTaps>(q, o.shared, s, zeroed);
    if (phi >= 0 && phi != loaded) {
      const u32 rows = 9 * p.channels + 1, chunks = o.own / 4 * rows;
      const float* from = p.phi_or_null + (static_cast<i64>(phi) * (channels4 / 4) + o.channel / 4) * rows * 4;
      for (u32 i = thread_index(); i < chunks; i += kScaleThreads)
        copy_async<16>(o.shared + q.at.weights + i * 16, from + i * 4);
      loaded = phi;
    }
    copy_async_commit();
    const bool copy = grid.height == height && grid.width == width;
    for (u32 y0 = rank * p.band; y0 < height; y0 += blocks * p.band) {
      const u32 y1 = min_of(y0 + p.band, height);
      const u32 ya = phi >= 0 && y0 > 0 ? y0 - 1 : y0, yb = phi >= 0 ? min_of(y1 + 1, height) : y1;
      const u32 lo = copy ? ya : clamp_to(taps_at<kTaps>(ya, grid.height, height).first, grid.height - 1);
      const u32 hi =
          copy ? yb - 1 : clamp_to(taps_at<kTaps>(yb - 1, grid.height, height).first + kTaps - 1, grid.height - 1);
      const u32 chunks = (phi >= 0 ? channels4 : o.own) / 4;
      gather<T>(q, grid, lo, hi, phi >= 0 ? 0 : o.channel, chunks, o.shared + q.at.work, clamped);
      if (phi >= 0) {
        Four old = old_of(q, o, 0, y0);
        copy_async_wait<0>();
        block_sync();
        const u32 plane = up_plane(p.band, width);
        resize<kTaps>(q, grid, o.shared, lo, chunks, ya, yb, [&](u32 chunk, u32 y, u32 x, const Four& h) {
          const u32 to = o.shared + q.at.up + (chunk * 4 * plane + (y + 1 - y0) * stride + x + 1) * 4;
#pragma unroll
          for (u32 i = 0; i < 4; ++i) store_shared(to + i * plane * 4, h.data[i]);
        });
        // Rows of the band above and below the map.
        const u32 above = y0 == 0 ? 1 : 0, below = p.band + 1 - (yb - y0);
        if (p.band < static_cast<i32>(height)) {  // else they are still as prepared
          for (u32 i = thread_index(); i < (above + below) * width * channels4; i += kScaleThreads) {
            const u32 x = i % width, row = i / width % (above + below), c = i / width / (above + below);
            const u32 at = row < above ? 0 : p.band + 2 - below + (row - above);
            store_shared(o.shared + q.at.up + (c * plane + at * stride + x + 1) * 4, 0.0f);
          }
        }
        block_sync();
        for (u32 group = 0; group < o.own / 4; ++group) {
          if (group > 0) old = old_of(q, o, group, y0);
          convolve(q, o.shared, group);
          block_sync();
          add_phi(q, o, group, y0, old);
          block_sync();
        }
      } else {
        copy_async_wait<0>();
        block_sync();
        resize<kTaps>(q, grid, o.shared, lo, chunks, ya, yb, [&](u32 chunk, u32 y, u32 x, const Four& h) {
#pragma unroll
          for (u32 i = 0; i < 4; ++i) {
            const u32 c = o.channel + chunk * 4 + i;
            if (c >= static_cast<u32>(p.channels)) continue;
            const i64 at = (static_cast<i64>(c) * height + y) * width + x;
            const float sum = (o.before ? load_global(o.before + at) : 0.0f) + h.data[i];
            store_global(o.after + at, sum);
            if (keep) store_shared(o.shared + q.at.plane + (((chunk * 4 + i) * height + y) * width + x) * 4, sum);
          }
        });
        block_sync();
      }
    }
    grid.first += static_cast<i64>(grid.height) * grid.width *
                  (std::is_same_v<T, Codes> ? 1 : p.channels);  // pixels times channels, whatever the patch
    if (s + 1 == p.scales) break;
    if (!p.independent) o.before = o.after;
    if (p.prefixes) o.after += maps;
  }
  if (p.next_height > 0) {
    if (blocks > 1) {
      // A window may reach into bands of the others.
      cluster_arrive();
      cluster_wait();
    }
    if (p.next_or_null) make_next(q, o, false, rank, blocks);
    if (p.labels_or_null) make_next(q, o, true, rank, blocks);
  }
  if (clamped && p.flags_or_null) atomic_or_global(p.flags_or_null, NXS_FLAG_CODE_CLAMPED);
}

// ---- the kernel of rows

// Rows of the map of tokens, resized along y to places `y` of `to`, to shared memory [row][x][channel].
template <typename T, int kTaps, int kRows>
NXS_DEVICE void gather_rows(const ScaleParams& q, const Grid& grid, const u32 (&y)[kRows], u32 to, u32 shared,
                            bool& clamped) {
  const u32 chunks = ceil_div(q.p.channels, 4), lanes = kScaleThreads / chunks;
  const u32 lane = thread_index() / chunks, chunk = thread_index() - lane * chunks, c = chunk * 4;
  if (lane >= lanes) return;
  const bool copy = grid.height == to;
  u32 row[kRows][kTaps];
  float weight[kRows][kTaps];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const Taps<kTaps> taps = taps_at<kTaps>(y[r], grid.height, to);
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      row[r][t] = (copy ? y[r] : clamp_to(taps.first + t, grid.height - 1)) * grid.width;
      weight[r][t] = taps.weight[t];
    }
  }
#pragma unroll 1
  for (u32 x = lane; x < grid.width; x += lanes) {
    i64 at[kRows][kTaps];
    Four four[kRows][kTaps];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int t = 0; t < kTaps; ++t)
        at[r][t] = !copy || t == 0 ? locate<T>(q.p, grid, row[r][t] + x, clamped) : 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int t = 0; t < kTaps; ++t)
        if (!copy || t == 0)
          four[r][t] = q.vector_rows ? load_four<T>(q.p, at[r][t], c) : load_singly<T>(q.p, at[r][t], c);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Four sum = four[r][0];
      if (!copy) {
        sum = scaled(weight[r][0], four[r][0]);
#pragma unroll
        for (int t = 1; t < kTaps; ++t) add_scaled(sum, weight[r][t], four[r][t]);
      }
      store_shared(shared + ((r * grid.width + x) * (chunks + 1) + chunk) * 16, sum);
    }
  }
}

// Where place `x` of `to` is in a row in shared memory, and with what weights.
template <int kTaps> struct Across {
  u32 at[kTaps];
  float weight[kTaps];
  bool copy;
};
template <int kTaps> NXS_DEVICE Across<kTaps> across_at(const Grid& grid, u32 pixel_bytes, u32 x, u32 to) {
  Across<kTaps> across;
  across.copy = grid.width == to;
  const Taps<kTaps> taps = taps_at<kTaps>(x, grid.width, to);
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
    across.at[t] = (across.copy ? x : clamp_to(taps.first + t, grid.width - 1)) * pixel_bytes;
    across.weight[t] = taps.weight[t];
  }
  return across;
}
template <int kTaps> NXS_DEVICE Four across_row(const Across<kTaps>& across, u32 row) {
  Four sum = load_shared<Four>(row + across.at[0]);
  if (across.copy) return sum;
  sum = scaled(across.weight[0], sum);
#pragma unroll
  for (int t = 1; t < kTaps; ++t) add_scaled(sum, across.weight[t], load_shared<Four>(row + across.at[t]));
  return sum;
}

template <typename T, int kTaps>
__global__ void __launch_bounds__(kScaleThreads, 2) multi_scale_rows_kernel(const __grid_constant__ ScaleParams q) {
  constexpr u32 kEarly = 2;  // items whose old values are asked for before the barrier
  const Params& p = q.p;
  const u32 height = p.height, width = p.width, channels = p.channels, chunks = ceil_div(channels, 4);
  const u32 pixel_bytes = (chunks + 1) * 16, shared = dynamic_shared(), image = block_index_y();
  const u32 map_rows = p.f_hat_out_or_null ? height : 0;
  if (p.programmatic) {
    programmatic_trigger();
    programmatic_wait();
  }
  bool clamped = false;
  Grid grid;
  grid.first = image * p.tokens_stride_batch;
  grid.height = p.scale_height[0], grid.width = p.scale_width[0];
  const i64 first = static_cast<i64>(image) * channels * height * width;
  const float* before = p.f_hat_or_null && !p.independent ? p.f_hat_or_null + first : nullptr;
  // Four channels of a pixel of the map before; nothing writes it.
  const auto old_at = [&](u32 chunk, u32 y, u32 x) {
    Four four = {};
    if (!before) return four;
#pragma unroll
    for (u32 i = 0; i < 4; ++i)
      if (chunk * 4 + i < channels)
        four.data[i] = load_global(before + (static_cast<i64>(chunk * 4 + i) * height + y) * width + x);
    return four;
  };

  if (block_index_x() < map_rows) {
    const u32 y = block_index_x(), items = width * chunks;
    Four early[kEarly];
#pragma unroll
    for (u32 k = 0; k < kEarly; ++k) {
      const u32 item = thread_index() + k * kScaleThreads;
      early[k] = item < items ? old_at(item / width, y, item % width) : Four{};
    }
    gather_rows<T, kTaps, 1>(q, grid, {y}, height, shared, clamped);
    block_sync();
    const auto add = [&](u32 item, const Four& old) {
      const u32 x = item % width, chunk = item / width;
      const Four h = across_row(across_at<kTaps>(grid, pixel_bytes, x, width), shared + chunk * 16);
#pragma unroll
      for (u32 i = 0; i < 4; ++i)
        if (chunk * 4 + i < channels)
          store_global(p.f_hat_out_or_null + first + (static_cast<i64>(chunk * 4 + i) * height + y) * width + x,
                       old.data[i] + h.data[i]);
    };
#pragma unroll
    for (u32 k = 0; k < kEarly; ++k) {
      const u32 item = thread_index() + k * kScaleThreads;
      if (item < items) add(item, early[k]);
    }
    for (u32 item = thread_index() + kEarly * kScaleThreads; item < items; item += kScaleThreads)
      add(item, old_at(item / width, y, item % width));
  } else {
    const u32 y = block_index_x() - map_rows, to_width = p.next_width, row_bytes = grid.width * pixel_bytes;
    const u32 staged = shared + 2 * row_bytes;
    // The map's rows that this row of next lies between; of the tokens themselves it is one.
    const Taps<2> down = taps_at<2>(y, height, p.next_height);
    const u32 rows[2] = {static_cast<u32>(clamp_to(down.first, height - 1)),
                         static_cast<u32>(clamp_to(down.first + 1, height - 1))};
    const auto columns_of = [&](u32 x, u32 (&columns)[2]) {
      const Taps<2> across = taps_at<2>(x, width, to_width);
      columns[0] = clamp_to(across.first, width - 1);
      columns[1] = clamp_to(across.first + 1, width - 1);
      return across.weight[1];
    };
    const u32 items = to_width * chunks;
    const auto old_of = [&](u32 item, Four (&old)[2][2]) {
      u32 columns[2];
      columns_of(item % to_width, columns);
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int k = 0; k < 2; ++k) old[r][k] = old_at(item / to_width, rows[r], columns[k]);
    };
    const auto make = [&](u32 item, Four (&old)[2][2]) {
      const u32 x = item % to_width, chunk = item / to_width;
      u32 columns[2];
      const float right = columns_of(x, columns);
      const float weight[2] = {1.0f - right, right};
      const Across<kTaps> at[2] = {across_at<kTaps>(grid, pixel_bytes, columns[0], width),
                                   across_at<kTaps>(grid, pixel_bytes, columns[1], width)};
      Four sum = {};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        Four line = {};
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const Four h = across_row(at[k], shared + r * row_bytes + chunk * 16);
#pragma unroll
          for (int i = 0; i < 4; ++i) old[r][k].data[i] += h.data[i];
          // What has no weight is not looked at: it might be infinite.
          if (k == 0 || weight[k] != 0) add_scaled(line, weight[k], old[r][k]);
        }
        if (r == 0 || down.weight[r] != 0) add_scaled(sum, down.weight[r], line);
      }
      store_shared(staged + x * pixel_bytes + chunk * 16, sum);
    };
    if (p.independent) {
      gather_rows<T, kTaps, 1>(q, grid, {y}, p.next_height, shared, clamped);
      block_sync();
      for (u32 item = thread_index(); item < items; item += kScaleThreads) {
        const u32 x = item % to_width, chunk = item / to_width;
        store_shared(staged + x * pixel_bytes + chunk * 16,
                     across_row(across_at<kTaps>(grid, pixel_bytes, x, to_width), shared + chunk * 16));
      }
    } else {
      Four early[kEarly][2][2];
#pragma unroll
      for (u32 k = 0; k < kEarly; ++k) {
        const u32 item = thread_index() + k * kScaleThreads;
        if (item < items) old_of(item, early[k]);
      }
      gather_rows<T, kTaps, 2>(q, grid, rows, height, shared, clamped);
      block_sync();
#pragma unroll
      for (u32 k = 0; k < kEarly; ++k) {
        const u32 item = thread_index() + k * kScaleThreads;
        if (item < items) make(item, early[k]);
      }
      for (u32 item = thread_index() + kEarly * kScaleThreads; item < items; item += kScaleThreads) {
        Four old[2][2];
        old_of(item, old);
        make(item, old);
      }
    }
    block_sync();
    // Neighbouring lanes write neighbouring chunks.
    for (u32 item = thread_index(); item < items; item += kScaleThreads) {
      const u32 x = item / chunks, chunk = item % chunks;
      store_next(q, image, place_of(p, y, x, to_width), chunk * 4,
                 load_shared<Four>(staged + x * pixel_bytes + chunk * 16));
    }
  }
  if (clamped && p.flags_or_null) atomic_or_global(p.flags_or_null, NXS_FLAG_CODE_CLAMPED);
}

inline u32 rows_bytes(const Params& p) {
  return (2 * p.scale_width[0] + p.next_width) * (round_up(p.channels, 4) + 4) * 4;
}

// One instantiation file per kind of tokens (multi_scale_<kind>.cu).
template <typename T> nxs_status multi_scale_launch(const ScaleParams& q, void* stream);

template <typename T, int kTaps> nxs_status multi_scale_launch_taps(ScaleParams q, void* stream) {
  const Params& p = q.p;
  LaunchShape shape;
  shape.block = kScaleThreads;
  shape.programmatic = p.programmatic;
  if (p.rows) {
    const unsigned rows = (p.f_hat_out_or_null ? p.height : 0) + p.next_height;
    shape.grid = dim3(rows, static_cast<unsigned>(p.batch));
    shape.dynamic_smem = rows_bytes(p);
    if (shape.dynamic_smem > 48 << 10)
      NXS_TRY(allow_dynamic_smem(multi_scale_rows_kernel<T, kTaps>));
    return launch(multi_scale_rows_kernel<T, kTaps>, shape, stream, q);
  }
  q.at = owner_layout(p, kTaps);
  shape.grid = dim3(ceil_div(round_up(p.channels, 4), p.group) * p.blocks, static_cast<unsigned>(p.batch));
  shape.cluster = p.blocks;
  shape.dynamic_smem = q.at.bytes;
  if (shape.dynamic_smem > 48 << 10)
    NXS_TRY(allow_dynamic_smem(multi_scale_owner_kernel<T, kTaps>));
  return launch(multi_scale_owner_kernel<T, kTaps>, shape, stream, q);
}

template <typename T> nxs_status multi_scale_launch_up(const ScaleParams& q, void* stream) {
  return q.p.up == NXS_RESIZE_BICUBIC ? multi_scale_launch_taps<T, 4>(q, stream)
                                      : multi_scale_launch_taps<T, 2>(q, stream);
}

}  // namespace nxs::quantization
