// How the kernels of RVQ encode reach their operands: any strides, dtypes that are known when they run. What is moved this way is
// little beside what the search takes.
#pragma once
#include "common/ptx/shared.cuh"
#include "quantization/codebook.cuh"

namespace nxs::quantization {

NXS_DEVICE void store_element(void* to, i64 at, nxs_dtype dtype, float value) {
  if (dtype == NXS_F32)
    store_global(static_cast<float*>(to) + at, value);
  else if (dtype == NXS_F16)
    store_global(static_cast<f16*>(to) + at, from_f32<f16>(value));
  else
    store_global(static_cast<bf16*>(to) + at, from_f32<bf16>(value));
}
NXS_DEVICE void store_code(void* to, i64 at, nxs_dtype dtype, u32 code) {
  if (dtype == NXS_U16)
    store_global(static_cast<u16*>(to) + at, static_cast<u16>(code));
  else if (dtype == NXS_U32)
    store_global(static_cast<u32*>(to) + at, code);
  else
    store_global(static_cast<i64*>(to) + at, static_cast<i64>(code));
}
// Of codes that this kernel wrote.
NXS_DEVICE u32 load_code(const void* from, i64 at, nxs_dtype dtype) {
  if (dtype == NXS_U16) return load_global(static_cast<const u16*>(from) + at);
  if (dtype == NXS_U32) return load_global(static_cast<const u32*>(from) + at);
  return static_cast<u32>(load_global(static_cast<const i64*>(from) + at));
}

// Batch entry and row of a row of the encode.
struct BatchRow {
  i64 batch, row;
};
NXS_DEVICE BatchRow batch_row(const nxs_rvq_encode_params& p, u32 n) {
  const u32 batch = p.batch == 1 ? 0 : n / static_cast<u32>(p.rows);
  return {batch, n - batch * static_cast<u32>(p.rows)};
}

// What stands for a code of a level, from its first element on.
NXS_DEVICE const float* values_of(const nxs_rvq_encode_params& p, u32 level) {
  const nxs_codebook& book = p.codebook;
  const u64 at = book.levels == 1 ? 0 : static_cast<u64>(level) * book.entries * book.padded_dim;
  return reinterpret_cast<const float*>(static_cast<const u8*>(book.prepared) + book.values_at) + at;
}

// Where the results of a row go.
struct RowOut {
  i64 code = 0, distance = 0;
  NXS_DEVICE RowOut() {}
  NXS_DEVICE RowOut(const nxs_rvq_encode_params& p, u32 n) {
    const BatchRow at = batch_row(p, n);
    code = at.batch * p.codes_stride_batch + at.row * p.codes_stride_row;
    distance = at.batch * p.distances_stride_batch + at.row * p.distances_stride_row;
  }
  NXS_DEVICE void write(const nxs_rvq_encode_params& p, u32 level, u32 winner, float score) const {
    store_code(p.codes, code + level * p.codes_stride_level, p.codes_dtype, winner);
    if (p.distances_or_null) store_global(p.distances_or_null + distance + level * p.distances_stride_level, score);
    if (p.histogram_or_null) atomic_add_global(p.histogram_or_null + level * p.codebook.entries + winner, 1u);
    if (p.flags_or_null && !is_finite(score)) atomic_or_global(p.flags_or_null, NXS_FLAG_ROW_NOT_FINITE);
  }
};

// One warp: rows [first, first + rows) of the input to shared memory, f32, `stride` bytes apart, up to `padded` elements and
// `all_rows` rows with zeroes. Lanes walk what lies closer in memory.
NXS_DEVICE void load_tile(const nxs_rvq_encode_params& p, u32 first, u32 rows, u32 all_rows, u32 padded, u32 to, u32 stride) {
  const u32 lane = thread_index() % kWarpSize, width = static_cast<u32>(p.latent ? p.latent : p.codebook.dim);
  if (p.input_stride_dim <= p.input_stride_row || all_rows != 16) {
#pragma unroll 1
    for (u32 row = 0; row < all_rows; ++row) {
      const bool there = row < rows;
      const BatchRow at = batch_row(p, there ? first + row : first);
      const i64 from = at.batch * p.input_stride_batch + at.row * p.input_stride_row;
#pragma unroll 4
      for (u32 k = lane; k < padded; k += kWarpSize)
        store_shared(to + row * stride + k * 4,
                     there && k < width ? load_element(p.input, from + k * p.input_stride_dim, p.dtype) : 0.0f);
    }
  } else {
    const u32 row = lane % 16;
    const bool there = row < rows;
    const BatchRow at = batch_row(p, there ? first + row : first);
    const i64 from = at.batch * p.input_stride_batch + at.row * p.input_stride_row;
#pragma unroll 4
    for (u32 k = lane / 16; k < padded; k += 2)
      store_shared(to + row * stride + k * 4,
                   there && k < width ? load_element(p.input, from + k * p.input_stride_dim, p.dtype) : 0.0f);
  }
}

// One warp: what is left of rows.
NXS_DEVICE void store_residual(const nxs_rvq_encode_params& p, u32 first, u32 rows, u32 from, u32 stride) {
  const u32 lane = thread_index() % kWarpSize, width = static_cast<u32>(p.latent ? p.latent : p.codebook.dim);
  const auto put = [&](u32 row, u32 k) {
    const BatchRow at = batch_row(p, first + row);
    const i64 to = at.batch * p.residual_stride_batch + at.row * p.residual_stride_row + k * p.residual_stride_dim;
    store_element(p.residual_or_null, to, p.dtype, load_shared<float>(from + row * stride + k * 4));
  };
  if (p.residual_stride_dim <= p.residual_stride_row || rows < 16) {
    for (u32 row = 0; row < rows; ++row)
      for (u32 k = lane; k < width; k += kWarpSize) put(row, k);
  } else {
    for (u32 k = lane / 16; k < width; k += 2) put(lane % 16, k);
  }
}

// One warp: the sums of what the codes stand for, which the same warp has written before a warp_sync.
NXS_DEVICE void store_quantized(const nxs_rvq_encode_params& p, u32 first, u32 rows) {
  const u32 lane = thread_index() % kWarpSize, width = static_cast<u32>(p.codebook.dim);
  const u32 padded = static_cast<u32>(p.codebook.padded_dim), levels = static_cast<u32>(p.levels);
  const bool across = p.quantized_stride_dim > p.quantized_stride_row && rows == 16;
  const u32 step = across ? 2 : kWarpSize;
  // Lanes of one row go through its elements; or half a warp takes the same element of 16 rows.
  for (u32 row = across ? lane % 16 : 0; row < rows; row += across ? 16 : 1) {
    const BatchRow at = batch_row(p, first + row);
    const i64 codes = at.batch * p.codes_stride_batch + at.row * p.codes_stride_row;
    const i64 to = at.batch * p.quantized_stride_batch + at.row * p.quantized_stride_row;
    for (u32 k = across ? lane / 16 : lane; k < width; k += step) {
      float sum = 0;
      for (u32 level = 0; level < levels; ++level) {
        const u32 code = load_code(p.codes, codes + level * p.codes_stride_level, p.codes_dtype);
        sum += load_global_nc(values_of(p, level) + static_cast<u64>(code) * padded + k);
      }
      store_element(p.quantized_or_null, to + k * p.quantized_stride_dim, p.dtype, sum);
    }
  }
}

}  // namespace nxs::quantization
