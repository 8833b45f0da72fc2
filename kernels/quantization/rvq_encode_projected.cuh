// RVQ encode of rows that each level projects to few dimensions and back (DAC): no tensor cores, every code is scored, exactly.
//
//   e[j] = in_weight[l, j, :] . r + in_bias[l, j];  code = argmin over c of |e - search[l, c]|^2 (e divided by its norm first with
//   a cosine metric);  r[k] -= out_weight[l, k, :] . value + out_bias[l, k]
//
// Grid       a block for each 16 rows.
// Block      4 warps. Rows lie in shared memory, f32. In: a thread for each row and dimension j, four chains of fma. Search: a
//            thread takes every 128th code, against all rows. Out: a thread takes every 128th element of all rows.
// Bytes      weights and searched rows once a level and block, from L2.
// FLOPs      rows * levels * (4 dim latent + 3 entries dim).
// Limits     dim <= 32, latent <= 1024.
#pragma once
#include "quantization/rvq_io.cuh"

namespace nxs::quantization {

constexpr u32 kProjectedRows = 16, kProjectedThreads = 128, kProjectedDim = 32;

struct ProjectedShared {
  u32 stride;    // bytes from row to row
  u32 e, best, bytes;  // searched rows, [16][32] f32; winners of each warp, then of the block
};
__host__ NXS_DEVICE ProjectedShared projected_shared(u32 latent) {
  ProjectedShared s = {};
  s.stride = ((latent + 7) / 4 * 4) * 4;
  s.e = kProjectedRows * s.stride;
  s.best = s.e + kProjectedRows * kProjectedDim * 4;
  s.bytes = s.best + 5 * kProjectedRows * 8;
  return s;
}

// kChunks: of 4 elements of a searched row.
template <int kChunks>
__global__ void __launch_bounds__(kProjectedThreads, 2)
    rvq_encode_projected_kernel(const __grid_constant__ nxs_rvq_encode_params p) {
  const nxs_codebook& book = p.codebook;
  const u32 shared = dynamic_shared(), thread = thread_index(), warp = thread / kWarpSize;
  const u32 latent = static_cast<u32>(p.latent), dim = static_cast<u32>(book.dim), padded = static_cast<u32>(book.padded_dim);
  const u32 entries = static_cast<u32>(book.entries), levels = static_cast<u32>(p.levels);
  const ProjectedShared at = projected_shared(latent);
  const u32 first = block_index_x() * kProjectedRows, all = static_cast<u32>(p.batch * p.rows);
  const u32 rows = all - first < kProjectedRows ? all - first : kProjectedRows;
  const u32 e = shared + at.e, winners = shared + at.best + 4 * kProjectedRows * 8;

  if (warp == 0) load_tile(p, first, rows, kProjectedRows, latent, shared, at.stride);
  RowOut out;
  if (thread < rows) out = RowOut(p, first + thread);
  for (u32 i = thread; i < kProjectedRows * kProjectedDim; i += kProjectedThreads) store_shared(e + i * 4, 0.0f);
  block_sync();

  // y[k] of a level: what its winner projects to.
  const auto projected_out = [&](u32 level, u32 k, u32 code) {
    const float* weight = p.out_weight_or_null + (static_cast<u64>(level) * latent + k) * dim;
    const float* value = values_of(p, level) + static_cast<u64>(code) * padded;
    float y = load_global_nc(p.out_bias_or_null + static_cast<u64>(level) * latent + k);
    for (u32 j = 0; j < dim; ++j) y = fma(load_global_nc(weight + j), load_global_nc(value + j), y);
    return y;
  };

#pragma unroll 1
  for (u32 level = 0; level < levels; ++level) {
#pragma unroll 1
    for (u32 i = thread; i < kProjectedRows * dim; i += kProjectedThreads) {
      const u32 row = i / dim, j = i % dim, from = shared + row * at.stride;
      const float* weight = p.in_weight_or_null + (static_cast<u64>(level) * dim + j) * latent;
      float sum[4] = {load_global_nc(p.in_bias_or_null + static_cast<u64>(level) * dim + j), 0, 0, 0};
      u32 k = 0;
      if (latent % 4 == 0 && reinterpret_cast<u64>(p.in_weight_or_null) % 16 == 0) {
#pragma unroll 4
        for (; k < latent; k += 4) {
          const auto w = load_global_nc(reinterpret_cast<const Vec<float, 4>*>(weight + k));
          const auto v = load_shared<Vec<float, 4>>(from + k * 4);
#pragma unroll
          for (u32 c = 0; c < 4; ++c) sum[c] = fma(w.data[c], v.data[c], sum[c]);
        }
      } else {
#pragma unroll 1
        for (; k < latent; k += 4)
#pragma unroll
          for (u32 c = 0; c < 4; ++c)
            if (k + c < latent) sum[c] = fma(load_global_nc(weight + k + c), load_shared<float>(from + (k + c) * 4), sum[c]);
      }
      store_shared(e + (row * kProjectedDim + j) * 4, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
    block_sync();
    if (book.metric != NXS_METRIC_L2) {
      if (thread < kProjectedRows) {
        float sum = 0;
        for (u32 j = 0; j < dim; ++j) {
          const float v = load_shared<float>(e + (thread * kProjectedDim + j) * 4);
          sum = fma(v, v, sum);
        }
        float norm = square_root(sum);
        if (norm < book.eps) norm = book.eps;
        for (u32 j = 0; j < dim; ++j) {
          const u32 place = e + (thread * kProjectedDim + j) * 4;
          store_shared(place, divide(load_shared<float>(place), norm));
        }
      }
      block_sync();
    }

    float least[kProjectedRows];
    u32 code_of[kProjectedRows];
#pragma unroll
    for (u32 r = 0; r < kProjectedRows; ++r) least[r] = __builtin_huge_valf(), code_of[r] = 0;
    const u64 tiles = (static_cast<u64>(entries) + 127) / 128 * 4;
    const auto* searched = reinterpret_cast<const Vec<float, 4>*>(static_cast<const u8*>(book.prepared) + book.search_at) +
                           (book.levels == 1 ? 0 : level * tiles * (padded / 4) * kCodeLanes);
#pragma unroll 1
    for (u32 code = thread; code < entries; code += kProjectedThreads) {
      const auto* from = searched + static_cast<u64>(code / kCodeLanes) * (padded / 4 * kCodeLanes) + code % kCodeLanes;
      Vec<float, 4> c[kChunks];
#pragma unroll
      for (u32 i = 0; i < kChunks; ++i) c[i] = i * 4 < padded ? load_global_nc(from + i * kCodeLanes) : Vec<float, 4>{};
#pragma unroll
      for (u32 r = 0; r < kProjectedRows; ++r) {
        float score = 0;
#pragma unroll
        for (u32 i = 0; i < kChunks; ++i) {
          const auto v = load_shared<Vec<float, 4>>(e + (r * kProjectedDim + i * 4) * 4);
#pragma unroll
          for (u32 n = 0; n < 4; ++n) {
            const float difference = v.data[n] - c[i].data[n];
            score = fma(difference, difference, score);
          }
        }
        if (score < least[r]) least[r] = score, code_of[r] = code;
      }
    }
#pragma unroll
    for (u32 r = 0; r < kProjectedRows; ++r) {
      const u32 bits = float_bits(least[r]), best = warp_reduce_min(bits);
      const u32 code = warp_reduce_min(bits == best ? code_of[r] : ~0u);
      if (lane_index() == 0)
        store_shared(shared + at.best + (warp * kProjectedRows + r) * 8, static_cast<u64>(best) << 32 | code);
    }
    block_sync();
    if (thread < kProjectedRows) {
      u64 winner = load_shared<u64>(shared + at.best + thread * 8);
#pragma unroll
      for (u32 w = 1; w < kProjectedThreads / kWarpSize; ++w) {
        const u64 other = load_shared<u64>(shared + at.best + (w * kProjectedRows + thread) * 8);
        if (other < winner) winner = other;
      }
      store_shared(winners + thread * 8, winner);
      if (thread < rows) out.write(p, level, static_cast<u32>(winner), bits_float(static_cast<u32>(winner >> 32)));
    }
    block_sync();
#pragma unroll 1
    for (u32 k = thread; k < latent; k += kProjectedThreads)
#pragma unroll 1
      for (u32 r = 0; r < kProjectedRows; ++r) {
        const u32 place = shared + r * at.stride + k * 4, code = static_cast<u32>(load_shared<u64>(winners + r * 8));
        store_shared(place, load_shared<float>(place) - projected_out(level, k, code));
      }
    block_sync();
  }

  if (p.residual_or_null && warp == 0) store_residual(p, first, rows, shared, at.stride);
  if (p.quantized_or_null) {
#pragma unroll 1
    for (u32 r = 0; r < rows; ++r) {
      const BatchRow row = batch_row(p, first + r);
      const i64 codes = row.batch * p.codes_stride_batch + row.row * p.codes_stride_row;
      const i64 to = row.batch * p.quantized_stride_batch + row.row * p.quantized_stride_row;
#pragma unroll 1
      for (u32 k = thread; k < latent; k += kProjectedThreads) {
        float sum = 0;
        for (u32 level = 0; level < levels; ++level)
          sum += projected_out(level, k, load_code(p.codes, codes + level * p.codes_stride_level, p.codes_dtype));
        store_element(p.quantized_or_null, to + k * p.quantized_stride_dim, p.dtype, sum);
      }
    }
  }
}

template <int kChunks> nxs_status rvq_encode_projected_launch(const nxs_rvq_encode_params& p, void* stream) {
  const ProjectedShared at = projected_shared(static_cast<u32>(p.latent));
  const auto kernel = rvq_encode_projected_kernel<kChunks>;
  NXS_TRY(allow_dynamic_smem(kernel));
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((p.batch * p.rows + kProjectedRows - 1) / kProjectedRows));
  shape.block = kProjectedThreads;
  shape.dynamic_smem = at.bytes;
  return launch(kernel, shape, stream, p);
}

}  // namespace nxs::quantization
