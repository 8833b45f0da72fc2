// Warps, barriers, atomics, conversions, the ring of bulk copies, and fences between blocks.
#include "common/dtype.cuh"
#include "common/ptx/atomic.cuh"
#include "common/ptx/barrier.cuh"
#include "common/ptx/bulk.cuh"
#include "common/ptx/fence.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/math.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/memory.cuh"
#include "common/ptx/shared.cuh"
#include "common/ptx/warp.cuh"
#include <algorithm>

#include "device.h"

namespace nxs {

constexpr u32 kWarpResults = 20;
__global__ void __launch_bounds__(64) warp_kernel(const u32* in, u32* out) {
  const u32 t = thread_index(), v = load_global_nc(in + t);
  u32 half = 0;  // the halves of a warp go apart and meet among themselves
  if (t % 32 < 16)
    half = shuffle(v, 3, 0xffffu);
  else
    half = shuffle(v, 20, 0xffff0000u);
  u32 r[kWarpResults] = {
      shuffle(v, t + 5),  shuffle_xor(v, 9u),  shuffle_up(v, 3u),         shuffle_down(v, 7u),      half,
      warp_ballot(v & 1), warp_any(v == 77),   warp_all(v != 77),         warp_match_any(v % 5),    warp_reduce_add(v),
      warp_reduce_min(v), warp_reduce_max(v),  warp_reduce_and(v | 0xff), warp_reduce_or(v & 0xff), lane_index(),
      lanes_below(),      population_count(v), leading_zeros(v),          shuffle_among(v, 3, 8),   shuffle_among(v, t * 5, 16)};
#pragma unroll
  for (u32 i = 0; i < kWarpResults; ++i) store_global(out + i * 64 + t, r[i]);
  store_global_streaming_if(out + kWarpResults * 64 + t, v, t % 3 == 0);
}

// Two warps hand a value back and forth by named barriers; a third only arrives.
__global__ void __launch_bounds__(96) named_kernel(u32* out) {
  const u32 slot = dynamic_shared(), t = thread_index(), warp = t / 32;
  for (u32 i = 0; i < 4; ++i) {
    if (warp == 0) {
      store_shared(slot + t * 4, i * 100 + t);
      barrier_sync(1, 96);
      barrier_sync(2, 64);
    } else if (warp == 1) {
      barrier_sync(1, 96);
      store_global(out + i * 32 + t % 32, load_shared<u32>(slot + (31 - t % 32) * 4));
      barrier_sync(2, 64);
    } else {
      barrier_arrive(1, 96);
    }
    if (warp == 2) barrier_sync(3, 32);
    block_sync();
  }
}

// The last block to come adds what all have written: a ticket, which returns to zero.
__global__ void __launch_bounds__(64) ticket_kernel(u32* parts, u32* ticket, u32* total, u32* bits) {
  const u32 flag = dynamic_shared(), t = thread_index(), blocks = grid_size_x();
  store_global(parts + block_index_x() * 64 + t, block_index_x() * 1000 + t);
  atomic_or_global(bits, 1u << block_index_x());
  block_sync();
  if (t == 0) store_shared(flag, u32{atomic_inc_acq_rel_global(ticket, blocks - 1) == blocks - 1});
  block_sync();
  if (!load_shared<u32>(flag)) return;
  u32 sum = 0;
  for (u32 i = t; i < blocks * 64; i += 64) sum += load_global(parts + i);
  sum = warp_reduce_add(sum);
  if (t % 32 == 0) atomic_add_global(total, sum);
}

// The same order, by a fence and relaxed accesses; and a histogram in shared memory.
__global__ void __launch_bounds__(128) fence_kernel(u32* parts, u32* count, u32* seen, const u32* in, u32* histogram) {
  const u32 bins = dynamic_shared(), t = thread_index();
  if (t < 16) store_shared(bins + t * 4, 0u);
  block_sync();
  atomic_add_shared(bins + load_global_nc(in + block_index_x() * 128 + t) % 16 * 4, 1);
  block_sync();
  if (t < 16) atomic_add_global(histogram + t, load_shared<u32>(bins + t * 4));
  if (t == 0) {
    store_global(parts + block_index_x(), block_index_x() + 1);
    fence_gpu();
    const u32 before = atomic_add_global(count, 1u);
    fence_gpu();
    if (before == grid_size_x() - 1) {
      u32 sum = 0;
      for (u32 i = 0; i < grid_size_x(); ++i) sum += load_global(parts + i);
      store_global(seen, sum);
    }
  }
}

// A ring of bulk loads; sums of each row of bytes, doubled in place and stored in bulk.
template <u32 kStages, u32 kChunk> __global__ void __launch_bounds__(128)
    bulk_kernel(const u32* in, u32* out, u32* sums, u32 chunks) {
  const u32 ring = dynamic_shared(), result = ring + kStages * kChunk, full = result + kChunk, t = thread_index();
  const u32* mine = in + block_index_x() * chunks * (kChunk / 4);
  const auto issue = [&](u32 c) {
    mbarrier_arrive_expect(full + c % kStages * 8, kChunk);
    bulk_load(ring + c % kStages * kChunk, mine + c * (kChunk / 4), kChunk, full + c % kStages * 8);
  };
  if (t == 0) {
    for (u32 s = 0; s < kStages; ++s) mbarrier_init(full + s * 8, 1);
    fence_mbarrier_init();
  }
  block_sync();
  if (t == 0)
    for (u32 c = 0; c < kStages && c < chunks; ++c) issue(c);
  u32 sum = 0;
  for (u32 c = 0; c < chunks; ++c) {
    mbarrier_wait(full + c % kStages * 8, c / kStages & 1);
    for (u32 i = t; i < kChunk / 4; i += 128) {
      const u32 word = load_shared<u32>(ring + c % kStages * kChunk + i * 4);
      sum += word;
      store_shared(result + i * 4, word * 2);
    }
    fence_async_shared();
    block_sync();
    if (t == 0) {
      if (c + kStages < chunks) issue(c + kStages);
      bulk_store(out + (block_index_x() * chunks + c) * (kChunk / 4), result, kChunk);
      bulk_commit();
      bulk_wait_read<0>();
    }
    block_sync();
  }
  sum = warp_reduce_add(sum);
  if (t % 32 == 0) atomic_add_global(sums + block_index_x(), sum);
}

__global__ void __launch_bounds__(128) convert_kernel(const float* in, u16* f16s, u16* bf16s, float* back, u32 count) {
  const u32 i = block_index_x() * 128 + thread_index();
  if (i >= count) return;
  const float x = load_global_nc(in + i);
  const u16 h = f32_to_f16_bits(x), b = f32_to_bf16_bits(x);
  store_global(f16s + i, h);
  store_global(bf16s + i, b);
  store_global(back + 2 * i, f16_bits_to_f32(h));
  store_global(back + 2 * i + 1, bf16_bits_to_f32(b));
}

// Pairs to e4m3 and back to f16; then every pair of codes to f16.
__global__ void __launch_bounds__(128) e4m3_kernel(const float* in, u16* codes, u32* back, u32* all, u32 pairs) {
  const u32 i = block_index_x() * 128 + thread_index();
  if (i < pairs) {
    const u16 code = f32x2_to_e4m3x2_bits(load_global_nc(in + 2 * i), load_global_nc(in + 2 * i + 1));
    store_global(codes + i, code);
    store_global(back + i, e4m3x2_to_f16x2_bits(code));
  }
  if (i < 256) store_global(all + i, e4m3x2_to_f16x2_bits(static_cast<u16>(i | (255 - i) << 8)));
}

__global__ void __launch_bounds__(128) special_kernel(const float* in, float* out, u32 count) {
  const u32 i = thread_index();
  if (i >= count) return;
  const float x = load_global_nc(in + i);
  store_global(out + i, exp2_approx(x));
  store_global(out + count + i, log2_approx(x));
  store_global(out + 2 * count + i, rsqrt_approx(x));
  store_global(out + 3 * count + i, reciprocal_approx(x));
  store_global(out + 4 * count + i, nxs::fma(x, x, 0.5f));
  store_global(out + 5 * count + i, square_root(x));
  store_global(out + 6 * count + i, divide(x, 3.0f));
  // What f32 does not hold: the rest of a quotient of f64.
  const double third = divide_f64(static_cast<double>(x), 3.0);
  store_global(out + 7 * count + i, static_cast<float>(fma_f64(third, -3.0, static_cast<double>(x))));
}

// Maxima of floats and of pairs, and a product that is not fused.
__global__ void __launch_bounds__(128) maximum_kernel(const float* in, u32* out, u32 count) {
  const u32 i = thread_index();
  if (i >= count) return;
  const float a = load_global_nc(in + i), b = load_global_nc(in + (i * 7 + 3) % count);
  const float c = load_global_nc(in + (i * 5 + 1) % count), d = load_global_nc(in + (i * 11 + 2) % count);
  store_global(out + i, float_bits(maximum(a, b)));
  store_global(out + count + i, float_bits(maximum_nan(a, b)));
  store_global(out + 2 * count + i, maximum_nan_f16x2(f32x2_to_f16x2_bits(a, c), f32x2_to_f16x2_bits(b, d)));
  store_global(out + 3 * count + i, maximum_nan_bf16x2(f32x2_to_bf16x2_bits(a, c), f32x2_to_bf16x2_bits(b, d)));
  store_global(out + 4 * count + i, float_bits(multiply(a, b) + c));
}

// The least of each block's words.
__global__ void __launch_bounds__(128) minimum_kernel(const u64* in, u64* out) {
  const u32 least = dynamic_shared(), t = thread_index();
  if (t == 0) store_shared(least, ~u64{0});
  block_sync();
  atomic_min_shared(least, load_global_nc(in + block_index_x() * 128 + t));
  block_sync();
  if (t == 0) store_global(out + block_index_x(), load_shared<u64>(least));
}

}  // namespace nxs

using namespace test;

static nxs::LaunchShape shape_of(unsigned grid, unsigned block, unsigned shared = 0) {
  nxs::LaunchShape shape;
  shape.grid = dim3(grid);
  shape.block = block;
  shape.dynamic_smem = shared;
  return shape;
}

static void test_warps() {
  std::vector<uint32_t> in(64);
  Random random(9);
  for (auto& x : in) x = random.next();
  in[40] = 77;
  Buffer<uint32_t> din(in), out((nxs::kWarpResults + 1) * 64);
  check(finish_launch(nxs::launch(nxs::warp_kernel, shape_of(1, 64), nullptr, din.get(), out.get())) == NXS_OK,
        "warp runs");
  const auto got = out.read();
  std::vector<uint32_t> want(got.size());
  for (uint32_t t = 0; t < 64; ++t) {
    const uint32_t lane = t % 32, *v = in.data() + t / 32 * 32;
    uint32_t r[nxs::kWarpResults] = {v[(t + 5) % 32], v[lane ^ 9], lane < 3 ? v[lane] : v[lane - 3],
                      lane + 7 > 31 ? v[lane] : v[lane + 7], v[lane < 16 ? 3 : 20]};
    r[10] = ~0u, r[12] = ~0u, r[7] = 1;
    for (uint32_t i = 0; i < 32; ++i) {
      r[5] |= (v[i] & 1) << i;
      r[6] |= v[i] == 77;
      r[7] &= v[i] != 77;
      r[8] |= uint32_t(v[i] % 5 == v[lane] % 5) << i;
      r[9] += v[i];
      r[10] = std::min(r[10], v[i]);
      r[11] = std::max(r[11], v[i]);
      r[12] &= v[i] | 0xff;
      r[13] |= v[i] & 0xff;
    }
    r[14] = lane;
    r[15] = (1u << lane) - 1;
    r[16] = static_cast<uint32_t>(__builtin_popcount(v[lane]));
    r[17] = v[lane] ? static_cast<uint32_t>(__builtin_clz(v[lane])) : 32;
    r[18] = v[(lane & 24) + 3];
    r[19] = v[(lane & 16) + t * 5 % 16];
    for (uint32_t i = 0; i < nxs::kWarpResults; ++i) want[i * 64 + t] = r[i];
    want[nxs::kWarpResults * 64 + t] = t % 3 == 0 ? v[lane] : 0xfefefefe;  // not written
  }
  for (uint32_t i = 0; i <= nxs::kWarpResults; ++i)
    check(std::equal(got.begin() + i * 64, got.begin() + i * 64 + 64, want.begin() + i * 64),
          "warp result " + std::to_string(i));
  print_checksum("warp", got);
}

static void test_barriers() {
  Buffer<uint32_t> out(128);
  check(finish_launch(nxs::launch(nxs::named_kernel, shape_of(1, 96, 128), nullptr, out.get())) == NXS_OK,
        "named barriers run");
  const auto got = out.read();
  bool equal = true;
  for (uint32_t i = 0; i < 128; ++i) equal &= got[i] == i / 32 * 100 + 31 - i % 32;
  check(equal, "named barriers order");
}

static void test_ticket() {
  const uint32_t blocks = 20;
  Buffer<uint32_t> parts(blocks * 64), words(std::vector<uint32_t>{0, 0, 0});
  uint32_t want = 0;
  for (uint32_t i = 0; i < blocks * 64; ++i) want += i / 64 * 1000 + i % 64;
  for (uint32_t launch = 1; launch <= 2; ++launch) {
    check(finish_launch(nxs::launch(nxs::ticket_kernel, shape_of(blocks, 64, 4), nullptr, parts.get(), words.get(),
                                    words.get() + 1, words.get() + 2)) == NXS_OK,
          "ticket runs");
    const auto got = words.read();
    check(got[0] == 0 && got[1] == want * launch && got[2] == (1u << blocks) - 1, "the last block sees what all wrote");
  }
}

static void test_fences() {
  const uint32_t blocks = 9;
  std::vector<uint32_t> in(blocks * 128), bins(16);
  Random random(4);
  for (auto& x : in) x = random.next(), ++bins[x % 16];
  Buffer<uint32_t> din(in), parts(blocks), words(std::vector<uint32_t>{0, 0}), histogram(std::vector<uint32_t>(16));
  check(finish_launch(nxs::launch(nxs::fence_kernel, shape_of(blocks, 128, 64), nullptr, parts.get(), words.get(),
                                  words.get() + 1, din.get(), histogram.get())) == NXS_OK,
        "fences run");
  check(words.read()[1] == blocks * (blocks + 1) / 2, "fences order");
  check(histogram.read() == bins, "shared atomics count");
}

static void test_bulk() {
  constexpr uint32_t kStages = 3, kChunk = 2048;
  const uint32_t blocks = 3, chunks = 7, words = blocks * chunks * kChunk / 4;
  std::vector<uint32_t> in(words), doubled(words), sums(blocks);
  Random random(6);
  for (uint32_t i = 0; i < words; ++i)
    in[i] = random.next(), doubled[i] = in[i] * 2, sums[i / (words / blocks)] += in[i];
  Buffer<uint32_t> din(in), out(words), dsums(std::vector<uint32_t>(blocks, 0));
#if !defined(__CUDACC__)
  nxs_emulator_reset();
#endif
  check(finish_launch(nxs::launch(nxs::bulk_kernel<kStages, kChunk>,
                                  shape_of(blocks, 128, (kStages + 1) * kChunk + 8 * kStages), nullptr, din.get(),
                                  out.get(), dsums.get(), chunks)) == NXS_OK,
        "bulk ring runs");
  check(out.read() == doubled && dsums.read() == sums, "bulk ring");
#if !defined(__CUDACC__)
  nxs_emulator_counts counts;
  nxs_emulator_counters(&counts);
  check(counts.global_load_bytes == words * 4 && counts.mbarrier_phases == blocks * chunks,
        "bulk ring loads what its plan says");
#endif
}

static void test_conversions() {
  std::vector<float> in = {0.0f,        -0.0f,       1.0f,      65504.0f, 65519.99f,      65520.0f,
                           1e30f,       -1e30f,      3.4e38f,   1e-40f,   5.9604645e-8f,  2.9e-8f,
                           6e-5f,       INFINITY,    -INFINITY, NAN,      1.00048828125f, 1.00146484375f,
                           1.00390625f, 1.01171875f, 9e-41f,    4.6e-41f};
  Random random(8);
  while (in.size() < 4000) {
    const uint32_t bits = random.next();
    float x;
    memcpy(&x, &bits, 4);
    in.push_back(x);
  }
  const uint32_t n = static_cast<uint32_t>(in.size());
  Buffer<float> din(in), back(2 * n);
  Buffer<uint16_t> f16s(n), bf16s(n);
  check(finish_launch(nxs::launch(nxs::convert_kernel, shape_of((n + 127) / 128, 128), nullptr, din.get(), f16s.get(),
                                  bf16s.get(), back.get(), n)) == NXS_OK,
        "conversions run");
  const auto h = f16s.read(), b = bf16s.read();
  bool nearest = true;
  const auto value = [](uint32_t bits, int mantissa, int exponent) {  // of a 16-bit float's magnitude
    const int e = static_cast<int>(bits >> mantissa), bias = (1 << (exponent - 1)) - 1;
    const double m = bits & ((1u << mantissa) - 1);
    return e ? std::ldexp(m + (1 << mantissa), e - bias - mantissa) : std::ldexp(m, 1 - bias - mantissa);
  };
  for (uint32_t i = 0; i < n; ++i) {
    if (std::isnan(in[i])) {
      nearest &= h[i] == 0x7fff && b[i] == 0x7fff;
      continue;
    }
    for (const bool f16 : {true, false}) {
      const uint32_t got = (f16 ? h[i] : b[i]) & 0x7fff, infinity = f16 ? 0x7c00 : 0x7f80;
      const int mantissa = f16 ? 10 : 7, exponent = f16 ? 5 : 8;
      nearest &= (f16 ? h[i] : b[i]) >> 15 == int(std::signbit(in[i])) && got <= infinity;
      // Nearer than both neighbours, or as near as one of them and even. Infinity counts as the number after the
      // largest.
      const auto error = [&](uint32_t bits) {
        return std::fabs(value(bits, mantissa, exponent) - std::fabs(double(in[i])));
      };
      if (std::isinf(in[i])) {
        nearest &= got == infinity;
        continue;
      }
      for (const uint32_t other : {got - 1, got + 1})
        if (other <= infinity) nearest &= error(got) < error(other) || (error(got) == error(other) && got % 2 == 0);
    }
  }
  check(nearest, "conversions round to nearest even");
  print_checksum("f16", h);
  print_checksum("bf16", b);
  print_checksum("back", back.read());
}

static double e4m3_value(uint32_t code) {
  const uint32_t e = code >> 3 & 15, m = code & 7;
  if (e == 15 && m == 7) return NAN;
  const double magnitude = e ? (8.0 + m) * std::pow(2.0, int(e) - 10) : m / 512.0;
  return code & 128 ? -magnitude : magnitude;
}
static double f16_value(uint32_t bits) {
  const uint32_t e = bits >> 10 & 31, m = bits & 1023;
  if (e == 31) return m ? NAN : bits >> 15 ? -INFINITY : INFINITY;
  const double magnitude = e ? (1024.0 + m) * std::pow(2.0, int(e) - 25) : m * std::pow(2.0, -24);
  return bits >> 15 ? -magnitude : magnitude;
}

static void test_e4m3() {
  std::vector<float> in = {0.0f, -0.0f, 448.0f, -448.0f, 464.0f, 463.9f, 1e30f, -1e30f, INFINITY, -INFINITY, NAN, 1e-40f, 0x1p-10f,
                           -0x1p-10f, 0x1.8p-9f, 0x1.fp-7f};
  Random random(9);
  while (in.size() < 8000) {  // of magnitudes around what there is
    const uint32_t bits = (random.next() & 0x81ffffffu) + 0x3a000000u + (random.next() % 12 << 23);
    float x;
    memcpy(&x, &bits, 4);
    in.push_back(x);
  }
  const uint32_t pairs = static_cast<uint32_t>(in.size() / 2);
  Buffer<float> din(in);
  Buffer<uint16_t> codes(pairs);
  Buffer<uint32_t> back(pairs), all(256);
  check(finish_launch(nxs::launch(nxs::e4m3_kernel, shape_of((pairs + 127) / 128, 128), nullptr, din.get(), codes.get(), back.get(),
                                  all.get(), pairs)) == NXS_OK,
        "e4m3 conversions run");
  const auto got = codes.read();
  const auto halves = back.read(), every = all.read();
  const auto same = [](double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); };
  bool nearest = true, exact = true;
  for (uint32_t i = 0; i < 2 * pairs; ++i) {
    const uint32_t code = got[i / 2] >> (i % 2 * 8) & 255, half = halves[i / 2] >> (i % 2 * 16) & 0xffff;
    exact &= same(f16_value(half), e4m3_value(code));
    if (std::isnan(in[i])) {
      nearest &= code == 0x7f;
      continue;
    }
    nearest &= code >> 7 == uint32_t(std::signbit(in[i])) && (code & 127) != 127;
    const double x = std::fabs(double(in[i])), least = std::fabs(x - std::fabs(e4m3_value(code)));
    if (x >= 448) nearest &= (code & 127) == 126;
    for (uint32_t other = 0; other < 127 && x < 448; ++other) {
      const double error = std::fabs(x - e4m3_value(other));
      nearest &= least < error || (least == error && (code % 2 == 0 || other == (code & 127)));
    }
  }
  for (uint32_t i = 0; i < 256; ++i)
    exact &= same(f16_value(every[i] & 0xffff), e4m3_value(i)) && same(f16_value(every[i] >> 16), e4m3_value(255 - i));
  check(nearest, "e4m3 is the nearest, ties to even, and saturates");
  check(exact, "every code of e4m3 is exact in f16");
  print_checksum("e4m3", got);
}

static void test_special() {
  const uint32_t n = 100;
  std::vector<float> in(n);
  for (uint32_t i = 0; i < n; ++i) in[i] = 0.01f + static_cast<float>(i) * 0.2f;
  Buffer<float> din(in), out(8 * n);
  check(finish_launch(nxs::launch(nxs::special_kernel, shape_of(1, 128), nullptr, din.get(), out.get(), n)) == NXS_OK,
        "special functions run");
  const auto got = out.read();
  double worst = 0;
  bool fused = true, rounded = true;
  for (uint32_t i = 0; i < n; ++i) {
    const double x = in[i], want[4] = {std::exp2(x), std::log2(x), 1 / std::sqrt(x), 1 / x};
    for (int f = 0; f < 4; ++f)
      worst = std::fmax(worst, std::fabs(got[f * n + i] - want[f]) / std::fmax(std::fabs(want[f]), 0.5));
    fused &= got[4 * n + i] == std::fma(in[i], in[i], 0.5f);
    rounded &= got[5 * n + i] == std::sqrt(in[i]) && got[6 * n + i] == in[i] / 3.0f;
    const double third = in[i] / 3.0;
    rounded &= got[7 * n + i] == static_cast<float>(std::fma(third, -3.0, static_cast<double>(in[i])));
  }
  check(worst < 0x1p-21, "special functions are within 2^-21");
  check(fused, "fma rounds once");
  check(rounded, "roots and quotients are rounded to nearest");
}

static void test_maxima() {
  // Every third a multiple of 1/8, which all three types hold; infinities and NaNs among them.
  const uint32_t n = 96;
  std::vector<float> in(n);
  for (uint32_t i = 0; i < n; ++i) in[i] = (static_cast<float>(i * 37 % n) - 48.0f) / 8;
  in[5] = INFINITY, in[17] = -INFINITY, in[40] = NAN, in[77] = NAN;
  Buffer<float> din(in);
  Buffer<uint32_t> out(5 * n);
  check(finish_launch(nxs::launch(nxs::maximum_kernel, shape_of(1, 128), nullptr, din.get(), out.get(), n)) == NXS_OK,
        "maxima run");
  const auto got = out.read();
  const auto f32_at = [&](uint32_t i) {
    float x;
    memcpy(&x, &got[i], 4);
    return x;
  };
  bool numbers = true, nans = true, pairs = true, products = true;
  for (uint32_t i = 0; i < n; ++i) {
    const float a = in[i], b = in[(i * 7 + 3) % n], c = in[(i * 5 + 1) % n], d = in[(i * 11 + 2) % n];
    const float number = std::fmax(a, b);
    numbers &= std::isnan(number) ? std::isnan(f32_at(i)) : f32_at(i) == number;
    const bool nan = std::isnan(a) || std::isnan(b);
    nans &= nan ? std::isnan(f32_at(n + i)) : f32_at(n + i) == number;
    const float want[2] = {nan ? NAN : number, std::isnan(c) || std::isnan(d) ? NAN : std::fmax(c, d)};
    for (int half = 0; half < 2; ++half) {
      // bf16 is the upper half of the float; f16 is looked at by sign, exponent and mantissa.
      const uint32_t f16 = got[2 * n + i] >> (16 * half) & 0xffff, bf16 = got[3 * n + i] >> (16 * half) & 0xffff;
      uint32_t bits;
      memcpy(&bits, &want[half], 4);
      if (std::isnan(want[half])) {
        pairs &= f16 == 0x7fff && bf16 == 0x7fff;
      } else if (std::isinf(want[half])) {
        pairs &= f16 == (bits >> 31 << 15 | 0x7c00) && bf16 == bits >> 16;
      } else if (want[half] == 0) {
        pairs &= (f16 & 0x7fff) == 0 && (bf16 & 0x7fff) == 0;
      } else {
        pairs &= f16 == (bits >> 31 << 15 | ((bits >> 23 & 255) - 112) << 10 | (bits >> 13 & 1023)) && bf16 == bits >> 16;
      }
    }
    const float product = a * b;
    const volatile float rounded = product;
    const float sum = rounded + c;
    products &= std::isnan(sum) ? std::isnan(f32_at(4 * n + i)) : f32_at(4 * n + i) == sum;
  }
  check(numbers, "max leaves NaN out");
  check(nans, "max.NaN keeps it");
  check(pairs, "maxima of pairs");
  check(products, "a product is rounded before it is added to");
}

static void test_minimum() {
  const uint32_t blocks = 5;
  std::vector<uint64_t> in(blocks * 128), least(blocks, ~uint64_t{0});
  Random random(12);
  for (uint32_t i = 0; i < in.size(); ++i) {
    in[i] = uint64_t{random.next()} << 32 | random.next();
    least[i / 128] = std::min(least[i / 128], in[i]);
  }
  Buffer<uint64_t> din(in), out(blocks);
  check(finish_launch(nxs::launch(nxs::minimum_kernel, shape_of(blocks, 128, 8), nullptr, din.get(), out.get())) == NXS_OK,
        "minima run");
  check(out.read() == least, "minima of 64 bits");
}

int main() {
  test_warps();
  test_barriers();
  test_ticket();
  test_fences();
  test_bulk();
  test_conversions();
  test_e4m3();
  test_special();
  test_maxima();
  test_minimum();
  return finish();
}
