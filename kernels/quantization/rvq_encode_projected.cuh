// RVQ encode of rows that each level projects to few dimensions and back (DAC): no tensor cores, every code is scored, exactly.
//
//   e[j] = in_weight[l, j, :] . r + in_bias[l, j];  code = argmin over c of |e - search[l, c]|^2 (e divided by its norm first with
//   a cosine metric);  r[k] -= out_weight[l, k, :] . value + out_bias[l, k]
//
// Grid       a block for each 16 rows.
// Block      4 warps. Rows lie in shared memory, f32, filled up with zeros to whole 128 elements. In: a warp has four rows, a
//            lane four neighbouring elements of each 128: it keeps the sums of 4 rows and 8 dimensions, which a butterfly
//            adds up and leaves one a lane. Search: a thread takes every 128th code, against all rows. Out: a thread
//            takes elements of all rows, whose weights it keeps in registers.
// Bytes      weights and searched rows once a level and block, from L2; twice the weights out if quantized is wanted.
// FLOPs      rows * levels * (4 dim latent + 3 entries dim), 2 dim latent more for quantized.
// Limits     dim <= 32, latent <= 1024.
#pragma once
#include "quantization/rvq_io.cuh"

namespace nxs::quantization {

constexpr u32 kProjectedRows = 16, kProjectedThreads = 128, kProjectedDim = 32, kProjectedRun = 128;

struct ProjectedShared {
  u32 stride;          // bytes from row to row
  u32 e, best, bytes;  // searched rows, or what is projected out, [16][32] f32; winners of each warp, then of the block
};
__host__ NXS_DEVICE ProjectedShared projected_shared(u32 latent) {
  ProjectedShared s = {};
  s.stride = ((latent + kProjectedRun - 1) / kProjectedRun * kProjectedRun + 4) * 4;
  s.e = kProjectedRows * s.stride;
  s.best = s.e + kProjectedRows * kProjectedDim * 4;
  s.bytes = s.best + 5 * kProjectedRows * 8;
  return s;
}

// All of the block, through `rows` x `width` elements of a tensor: `each(row, k)`. Neighbouring lanes take what lies closer in memory.
template <typename Each>
NXS_DEVICE void walk(u32 rows, u32 width, i64 stride_row, i64 stride_dim, Each each) {
  const u32 thread = thread_index();
  if (stride_dim <= stride_row) {
#pragma unroll 1
    for (u32 row = 0; row < rows; ++row)
#pragma unroll 8
      for (u32 k = thread; k < width; k += kProjectedThreads) each(row, k);
  } else if (thread % kProjectedRows < rows) {
#pragma unroll 8
    for (u32 k = thread / kProjectedRows; k < width; k += kProjectedThreads / kProjectedRows)
      each(thread % kProjectedRows, k);
  }
}

// Adds up 32 sums a lane over the warp's lanes: those that are 16 apart first, then 8, 4, 2 and 1. Lane n gets sum n.
NXS_DEVICE float butterfly(float (&sum)[32]) {
  const u32 lane = lane_index();
#pragma unroll
  for (u32 step = 0; step < 5; ++step) {
    const u32 apart = 16 >> step;
    const bool upper = lane & apart;
#pragma unroll
    for (u32 n = 0; n < 16; ++n) {
      if (n >= apart) continue;
      const float low = sum[n], high = sum[n + apart];
      sum[n] = (upper ? high : low) + shuffle_xor(upper ? low : high, apart);
    }
  }
  return sum[0];
}

// Four neighbouring weights; 0 from `end` on.
NXS_DEVICE Vec<float, 4> four_weights(const float* weights, u32 k, u32 end, bool aligned) {
  Vec<float, 4> four = {};
  if (aligned && k + 4 <= end) return load_global_nc(reinterpret_cast<const Vec<float, 4>*>(weights + k));
#pragma unroll
  for (u32 c = 0; c < 4; ++c)
    if (k + c < end) four.data[c] = load_global_nc(weights + k + c);
  return four;
}

// The warp's four rows projected in, 8 dimensions from `first` on at a time, to e.
NXS_DEVICE void project_in(const nxs_rvq_encode_params& p, u32 level, u32 rows, u32 stride, u32 e, u32 first_row) {
  const u32 latent = static_cast<u32>(p.latent), dim = static_cast<u32>(p.codebook.dim), lane = lane_index();
  const bool aligned = latent % 4 == 0 && reinterpret_cast<u64>(p.in_weight_or_null) % 16 == 0;
#pragma unroll 1
  for (u32 first = 0; first < dim; first += 8) {
    float sum[32] = {};
    const float* weights = p.in_weight_or_null + (static_cast<u64>(level) * dim + first) * latent;
#pragma unroll 1
    for (u32 k = lane * 4; k < (latent + kProjectedRun - 1) / kProjectedRun * kProjectedRun; k += kProjectedRun) {
      Vec<float, 4> w[8];
#pragma unroll
      for (u32 j = 0; j < 8; ++j)
        w[j] = four_weights(weights + static_cast<u64>(j) * latent, k, first + j < dim ? latent : 0, aligned);
#pragma unroll
      for (u32 r = 0; r < 4; ++r) {
        const auto x = load_shared<Vec<float, 4>>(rows + (first_row + r) * stride + k * 4);
#pragma unroll
        for (u32 j = 0; j < 8; ++j)
#pragma unroll
          for (u32 c = 0; c < 4; ++c) sum[r * 8 + j] = fma(w[j].data[c], x.data[c], sum[r * 8 + j]);
      }
    }
    warp_sync();
    const float all = butterfly(sum);
    const u32 j = first + lane % 8;
    if (j < dim)
      store_shared(e + ((first_row + lane / 8) * kProjectedDim + j) * 4,
                   load_global_nc(p.in_bias_or_null + static_cast<u64>(level) * dim + j) + all);
  }
}

// All of the block: what the rows' codes of a level project to, taken from the rows or added to them. `values` [16][32] f32 is
// room for what stands for the codes; `code_of` a row's.
template <int kChunks, typename Code>
NXS_DEVICE void project_out(const nxs_rvq_encode_params& p, u32 level, u32 rows, u32 shared, u32 stride, u32 values,
                            bool subtract, Code code_of) {
  const u32 latent = static_cast<u32>(p.latent), dim = static_cast<u32>(p.codebook.dim), thread = thread_index();
  const u32 padded = static_cast<u32>(p.codebook.padded_dim);
  const float* stands = values_of(p, level);
  for (u32 i = thread; i < rows * dim; i += kProjectedThreads) {
    const u32 row = i / dim, j = i - row * dim;
    store_shared(values + (row * kProjectedDim + j) * 4,
                 load_global_nc(stands + static_cast<u64>(code_of(row)) * padded + j));
  }
  block_sync();
  constexpr u32 kWide = kChunks <= 2 ? 4 : kChunks == 4 ? 2 : 1;  // elements a thread has the weights of
  const bool aligned = dim % 4 == 0 && reinterpret_cast<u64>(p.out_weight_or_null) % 16 == 0;
#pragma unroll 1
  for (u32 k = thread * kWide; k < latent; k += kProjectedThreads * kWide) {
    Vec<float, 4> w[kWide][kChunks];
    float bias[kWide];
#pragma unroll
    for (u32 n = 0; n < kWide; ++n) {
      const bool there = k + n < latent;
      const u64 element = static_cast<u64>(level) * latent + (there ? k + n : 0);
      bias[n] = load_global_nc(p.out_bias_or_null + element);
#pragma unroll
      for (u32 i = 0; i < kChunks; ++i)
        w[n][i] = four_weights(p.out_weight_or_null + element * dim, i * 4, there ? dim : 0, aligned);
    }
#pragma unroll 2
    for (u32 r = 0; r < rows; ++r) {
      float y[kWide];
#pragma unroll
      for (u32 n = 0; n < kWide; ++n) y[n] = bias[n];
#pragma unroll
      for (u32 i = 0; i < kChunks; ++i) {
        const auto v = load_shared<Vec<float, 4>>(values + (r * kProjectedDim + i * 4) * 4);
#pragma unroll
        for (u32 c = 0; c < 4; ++c) {
          // Beyond dim there is nothing, not even a product with 0: the value might be what a row before left.
          if (i * 4 + c < dim) {
#pragma unroll
            for (u32 n = 0; n < kWide; ++n) y[n] = fma(w[n][i].data[c], v.data[c], y[n]);
          }
        }
      }
      const u32 place = shared + r * stride + k * 4;
      auto left = load_shared<Vec<float, kWide>>(place);
#pragma unroll
      for (u32 n = 0; n < kWide; ++n)
        // What fills a row up stays 0.
        if (k + n < latent) left.data[n] = subtract ? left.data[n] - y[n] : left.data[n] + y[n];
      store_shared(place, left);
    }
  }
  block_sync();
}

// kChunks: of 4 elements of a searched row.
template <int kChunks>
__global__ void __launch_bounds__(kProjectedThreads, 3)
    rvq_encode_projected_kernel(const __grid_constant__ nxs_rvq_encode_params p) {
  const nxs_codebook& book = p.codebook;
  const u32 shared = dynamic_shared(), thread = thread_index(), warp = thread / kWarpSize;
  const u32 latent = static_cast<u32>(p.latent), dim = static_cast<u32>(book.dim), padded = static_cast<u32>(book.padded_dim);
  const u32 entries = static_cast<u32>(book.entries), levels = static_cast<u32>(p.levels);
  const ProjectedShared at = projected_shared(latent);
  const u32 first = block_index_x() * kProjectedRows, all = static_cast<u32>(p.batch * p.rows);
  const u32 rows = all - first < kProjectedRows ? all - first : kProjectedRows;
  const u32 e = shared + at.e, winners = shared + at.best + 4 * kProjectedRows * 8;

  // Zeros where there is no row or no element.
  for (u32 i = thread * 4; i < kProjectedRows * (at.stride / 4); i += kProjectedThreads * 4)
    store_shared(shared + i * 4, Vec<float, 4>{});
  RowOut out;
  if (thread < rows) out = RowOut(p, first + thread);
  for (u32 i = thread; i < kProjectedRows * kProjectedDim; i += kProjectedThreads) store_shared(e + i * 4, 0.0f);
  block_sync();
  walk(rows, latent, p.input_stride_row, p.input_stride_dim, [&](u32 row, u32 k) {
    const BatchRow in = batch_row(p, first + row);
    const i64 from = in.batch * p.input_stride_batch + in.row * p.input_stride_row + k * p.input_stride_dim;
    store_shared(shared + row * at.stride + k * 4, load_element(p.input, from, p.dtype));
  });
  block_sync();

#pragma unroll 1
  for (u32 level = 0; level < levels; ++level) {
    project_in(p, level, shared, at.stride, e, warp * 4);
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
    project_out<kChunks>(p, level, rows, shared, at.stride, e, true, [&](u32 row) {
      return static_cast<u32>(load_shared<u64>(winners + row * 8));
    });
  }

  if (p.residual_or_null)
    walk(rows, latent, p.residual_stride_row, p.residual_stride_dim, [&](u32 row, u32 k) {
      const BatchRow of = batch_row(p, first + row);
      const i64 to = of.batch * p.residual_stride_batch + of.row * p.residual_stride_row + k * p.residual_stride_dim;
      store_element(p.residual_or_null, to, p.dtype, load_shared<float>(shared + row * at.stride + k * 4));
    });
  if (!p.quantized_or_null) return;
  block_sync();
  for (u32 i = thread * 4; i < kProjectedRows * (at.stride / 4); i += kProjectedThreads * 4)
    store_shared(shared + i * 4, Vec<float, 4>{});
  block_sync();
#pragma unroll 1
  for (u32 level = 0; level < levels; ++level)
    project_out<kChunks>(p, level, rows, shared, at.stride, e, false, [&](u32 row) {
      const BatchRow of = batch_row(p, first + row);
      const i64 code = of.batch * p.codes_stride_batch + of.row * p.codes_stride_row + level * p.codes_stride_level;
      return load_code(p.codes, code, p.codes_dtype);
    });
  walk(rows, latent, p.quantized_stride_row, p.quantized_stride_dim, [&](u32 row, u32 k) {
    const BatchRow of = batch_row(p, first + row);
    const i64 to = of.batch * p.quantized_stride_batch + of.row * p.quantized_stride_row + k * p.quantized_stride_dim;
    store_element(p.quantized_or_null, to, p.dtype, load_shared<float>(shared + row * at.stride + k * 4));
  });
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
