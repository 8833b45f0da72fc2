// Codebooks made ready for search: rows / max(usage, eps) or rows, and with a cosine metric divided by max(norm, eps).
//
// Layouts    nextscale.h: what codes stand for, searched rows, the bf16 operand of the products, greatest norms.
// Who does what
//            clear    one thread a word of the norms.
//            prepare  one thread a code (of those that fill up a tile too): it reads its row two or three times, in order, for the
//                     norm is a chain of fma. A block has codes of one level.
// Bytes      rows once or twice from memory, prepared once; done once, so no effort is made.
// Determinism bitwise: the maxima of norms are taken by integer atomics.
#pragma once
#include "quantization/codebook.cuh"

namespace nxs::quantization {

constexpr int kPrepareThreads = 128;
static_assert(kPrepareThreads == int(kCodeTile));

__global__ void __launch_bounds__(kPrepareThreads) codebook_clear_kernel(const __grid_constant__ nxs_codebook book) {
  const u32 i = block_index_x() * kPrepareThreads + thread_index();
  if (i < static_cast<u32>(book.levels) * 4) store_global(static_cast<u32*>(book.prepared) + i, 0u);
}

// One code.
struct PrepareCode {
  const nxs_codebook_prepare_params& p;
  i64 level, entry;
  float count;  // what sums are divided by, or 0
  bool finite = true;

  NXS_DEVICE float element(u32 k) {
    float x = load_element(p.rows, level * p.rows_stride_level + entry * p.rows_stride_entry + k, p.rows_dtype);
    if (p.usage_or_null) x = divide(x, count);
    if (is_finite(x)) return x;
    finite = false;
    return 0;
  }
};

__global__ void __launch_bounds__(kPrepareThreads)
    codebook_prepare_kernel(const __grid_constant__ nxs_codebook_prepare_params p) {
  const nxs_codebook& book = p.codebook;
  const u32 dim = static_cast<u32>(book.dim), padded = static_cast<u32>(book.padded_dim);
  const i64 tiles = (book.entries + kCodeTile - 1) / kCodeTile, tile = block_index_x();
  PrepareCode code{p, tile / tiles, tile % tiles * kCodeTile + thread_index(), 0.0f};
  const bool is_code = code.entry < book.entries;
  u8* prepared = static_cast<u8*>(book.prepared);

  if (is_code && p.usage_or_null) {
    const float usage = load_global_nc(p.usage_or_null + code.level * p.usage_stride_level + code.entry);
    code.finite = is_finite(usage);
    // Not fmaxf, which the host has not: a count that is not finite is reported, and stands for the least one.
    code.count = usage > p.usage_eps && is_finite(usage) ? usage : p.usage_eps;
  }
  float norm = 1;
  if (is_code && book.metric != NXS_METRIC_L2) {
    float sum = 0;
    for (u32 k = 0; k < dim; ++k) {
      const float x = code.element(k);
      sum = fma(x, x, sum);
    }
    norm = square_root(sum);
    if (norm < book.eps) norm = book.eps;
  }

  float* value = reinterpret_cast<float*>(prepared + book.values_at) + (code.level * book.entries + code.entry) * padded;
  float* search = reinterpret_cast<float*>(prepared + book.search_at) +
                  ((code.level * tiles * 4 + code.entry / kCodeLanes) * (padded / 4) * kCodeLanes + code.entry % kCodeLanes) * 4;
  bf16* operand = reinterpret_cast<bf16*>(prepared + book.operand_at) +
                  (tile * (book.operand_dim / 8) * kCodeTile + thread_index()) * 8;
  float sum[3] = {};  // of squares: the row, its second piece, what is left
  for (u32 k = 0; k < padded; k += 4) {
    Vec<float, 4> row = {}, found = {};
    Vec<bf16, 4> high, low;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      if (is_code && k + i < dim) {
        row.data[i] = code.element(k + i);
        found.data[i] = book.metric == NXS_METRIC_L2 ? row.data[i] : divide(row.data[i], norm);
      }
      const float x = found.data[i];
      high.data[i] = from_f32<bf16>(x);
      float left = x - to_f32(high.data[i]);
      low.data[i] = from_f32<bf16>(left);
      if (book.pieces == 3) {
        const float second = to_f32(low.data[i]);
        left -= second;
        sum[1] = fma(second, second, sum[1]);
      }
      sum[0] = fma(x, x, sum[0]);
      sum[2] = fma(left, left, sum[2]);
    }
    if (is_code) {
      // Element by element: of two vectors the compiler would choose in local memory.
      if (book.metric == NXS_METRIC_COSINE_UNIT)
#pragma unroll
        for (u32 i = 0; i < 4; ++i) row.data[i] = found.data[i];
      store_global(reinterpret_cast<Vec<float, 4>*>(value + k), row);
    }
    store_global(reinterpret_cast<Vec<float, 4>*>(search + k * kCodeLanes), found);
    const auto put = [&](u32 q, const Vec<bf16, 4>& piece) {
      store_global(reinterpret_cast<Vec<bf16, 4>*>(operand + q / 8 * (kCodeTile * 8) + q % 8), piece);
    };
    put(k, high);
    if (book.pieces == 3) {
      put(padded + k, high);
      put(2 * padded + k, low);
    }
  }
  // Minus half the squared norm in three pieces; what is no code is far from everything.
  float half = is_code ? -0.5f * sum[0] : -0x1p120f;
  const u32 q0 = static_cast<u32>(book.pieces) * padded;
  for (u32 q = q0; q < static_cast<u32>(book.operand_dim); ++q) {
    const bf16 piece = q < q0 + 3 ? from_f32<bf16>(half) : bf16{0};
    half -= to_f32(piece);
    store_global(operand + q / 8 * (kCodeTile * 8) + q % 8, piece);
  }
  // Sums are not negative, so that their bits are in their order; a NaN is above all.
#pragma unroll
  for (u32 i = 0; i < 3; ++i) {
    const u32 most = warp_reduce_max(float_bits(square_root(sum[i])) & 0x7fffffffu);
    if (lane_index() == 0) atomic_max_global(static_cast<u32*>(book.prepared) + code.level * 4 + i, most);
  }
  if (!code.finite && p.flags_or_null) atomic_or_global(p.flags_or_null, NXS_FLAG_CODEBOOK_NOT_FINITE);
}

}  // namespace nxs::quantization
