// C entries of the scalar quantizers: refuse what the kernels cannot take, then pick types and width.
#include "quantization/scalar.cuh"

#include <cmath>

#include "common/check.h"

namespace nxs::quantization {
namespace {

bool is_float(nxs_dtype dtype) { return dtype == NXS_F32 || dtype == NXS_F16 || dtype == NXS_BF16; }
bool is_integer(nxs_dtype dtype) { return dtype == NXS_U16 || dtype == NXS_U32 || dtype == NXS_I64; }

nxs_status grid_of(i64 items, i64 per_block, LaunchShape& shape) {
  const i64 blocks = (items + per_block - 1) / per_block;
  NXS_REQUIRE(blocks <= INT32_MAX, NXS_E_SHAPE);
  shape.grid = dim3(static_cast<unsigned>(blocks));
  shape.block = kScalarThreads;
  return NXS_OK;
}

template <int kVec> nxs_status launch_bits(BitsParams q, void* stream) {
  q.log2_lanes = 0;
  while (q.log2_lanes < 5 && (kVec << q.log2_lanes) < q.p.dim) ++q.log2_lanes;
  LaunchShape shape;
  NXS_TRY(grid_of(q.p.rows, kScalarThreads >> q.log2_lanes, shape));
  switch (q.p.input_dtype) {
    case NXS_F32: return launch(bits_kernel<Source::kF32, kVec>, shape, stream, q);
    case NXS_F16: return launch(bits_kernel<Source::kF16, kVec>, shape, stream, q);
    case NXS_BF16: return launch(bits_kernel<Source::kBF16, kVec>, shape, stream, q);
    case NXS_U8: return launch(bits_kernel<Source::kLabels, kVec>, shape, stream, q);
    default: return launch(bits_kernel<Source::kIntegers, kVec>, shape, stream, q);
  }
}

template <typename Z> nxs_status launch_fsq(const FsqParams& q, const LaunchShape& shape, void* stream) {
  switch (q.p.values_dtype) {
    case NXS_F32: return launch(fsq_kernel<Z, float>, shape, stream, q);
    case NXS_F16: return launch(fsq_kernel<Z, f16>, shape, stream, q);
    default: return launch(fsq_kernel<Z, bf16>, shape, stream, q);
  }
}

template <typename C, typename O> nxs_status launch_remap(const nxs_remap_params& p, void* stream) {
  constexpr i64 kVec = 8;
  const bool wide = p.count % kVec == 0 && is_aligned(p.codes, 16) && is_aligned(p.out, 16);
  LaunchShape shape;
  NXS_TRY(grid_of(p.count, kScalarThreads * (wide ? kVec : 1), shape));
  return wide ? launch(remap_kernel<C, O, kVec>, shape, stream, p) : launch(remap_kernel<C, O, 1>, shape, stream, p);
}
template <typename C> nxs_status launch_remap_to(const nxs_remap_params& p, void* stream) {
  switch (p.out_dtype) {
    case NXS_U16: return launch_remap<C, u16>(p, stream);
    case NXS_U32: return launch_remap<C, u32>(p, stream);
    default: return launch_remap<C, i64>(p, stream);
  }
}

}  // namespace
}  // namespace nxs::quantization

extern "C" nxs_status nxs_bits(const nxs_bits_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::quantization;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_bits_params& p = *params;
  const bool integers = is_integer(p.input_dtype);
  NXS_REQUIRE(is_float(p.input_dtype) || p.input_dtype == NXS_U8 || integers, NXS_E_DTYPE);
  NXS_REQUIRE(!p.values_or_null || is_float(p.values_dtype), NXS_E_DTYPE);
  NXS_REQUIRE(!p.codes_or_null || is_integer(p.codes_dtype), NXS_E_DTYPE);
  NXS_REQUIRE(p.rows >= 0 && p.dim >= 1 && p.dim <= 4096, NXS_E_SHAPE);
  NXS_REQUIRE(!integers || p.dim <= 8 * dtype_bytes(p.input_dtype), NXS_E_SHAPE);
  NXS_REQUIRE(!p.codes_or_null || p.dim <= 8 * dtype_bytes(p.codes_dtype), NXS_E_SHAPE);
  NXS_REQUIRE(p.order == NXS_BITS_MSB_FIRST || p.order == NXS_BITS_LSB_FIRST, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(!p.seeds_or_null || p.rows_per_seed >= 1, NXS_E_SHAPE);
  if (p.rows == 0 || (!p.labels_or_null && !p.values_or_null && !p.codes_or_null)) return NXS_OK;
  NXS_REQUIRE(p.rows <= INT64_MAX / 4096 / 8, NXS_E_SHAPE);
  NXS_REQUIRE(p.input, NXS_E_NULL);
  NXS_REQUIRE(is_aligned(p.input, dtype_bytes(p.input_dtype)) && is_aligned(p.seeds_or_null, 8), NXS_E_ALIGNMENT);
  NXS_REQUIRE(!p.values_or_null || is_aligned(p.values_or_null, dtype_bytes(p.values_dtype)), NXS_E_ALIGNMENT);
  NXS_REQUIRE(!p.codes_or_null || is_aligned(p.codes_or_null, dtype_bytes(p.codes_dtype)), NXS_E_ALIGNMENT);
  const i64 reads = 8 * dtype_bytes(p.input_dtype);
  const bool wide = p.dim % 8 == 0 && (integers || is_aligned(p.input, reads < 16 ? reads : 16)) &&
                    is_aligned(p.labels_or_null, 8) && is_aligned(p.values_or_null, 16);
  BitsParams q = {};
  q.p = p;
  return wide ? launch_bits<8>(q, stream) : launch_bits<1>(q, stream);
}

extern "C" nxs_status nxs_fsq(const nxs_fsq_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::quantization;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_fsq_params& p = *params;
  NXS_REQUIRE(!p.z_or_null || is_float(p.z_dtype), NXS_E_DTYPE);
  NXS_REQUIRE(!p.values_or_null || is_float(p.values_dtype), NXS_E_DTYPE);
  NXS_REQUIRE(!p.indices_or_null || is_integer(p.indices_dtype), NXS_E_DTYPE);
  NXS_REQUIRE(p.rows >= 0 && p.dim >= 1 && p.dim <= NXS_FSQ_MOST_DIM && p.quantizers >= 1 && p.quantizers <= 16,
              NXS_E_SHAPE);
  NXS_REQUIRE(p.bound >= NXS_FSQ_TANH && p.bound <= NXS_FSQ_CLAMP, NXS_E_UNSUPPORTED);
  FsqParams q = {};
  q.p = p;
  q.product = 1;
  for (int k = 0; k < p.dim; ++k) {
    NXS_REQUIRE(p.levels[k] >= 2 && p.levels[k] <= 65536, NXS_E_SHAPE);
    q.product *= p.levels[k];
    NXS_REQUIRE(q.product <= i64{1} << 31, NXS_E_SHAPE);
    const double half = (p.levels[k] - 1) * 1.001 / 2, offset = p.levels[k] % 2 == 0 ? 0.5 : 0;
    q.half[k] = static_cast<float>(half);
    q.offset[k] = static_cast<float>(offset);
    q.shift[k] = static_cast<float>(std::atanh(offset / half));
  }
  NXS_REQUIRE(!p.indices_or_null || p.indices_dtype != NXS_U16 || q.product <= 65536, NXS_E_SHAPE);
  if (p.rows == 0) return NXS_OK;
  NXS_REQUIRE(p.z_or_null ? p.values_or_null || p.indices_or_null : p.values_or_null && p.indices_or_null, NXS_E_NULL);
  NXS_REQUIRE(p.rows <= INT64_MAX / 256, NXS_E_SHAPE);
  NXS_REQUIRE(!p.z_or_null || is_aligned(p.z_or_null, dtype_bytes(p.z_dtype)), NXS_E_ALIGNMENT);
  NXS_REQUIRE(!p.values_or_null || is_aligned(p.values_or_null, dtype_bytes(p.values_dtype)), NXS_E_ALIGNMENT);
  NXS_REQUIRE(!p.indices_or_null || is_aligned(p.indices_or_null, dtype_bytes(p.indices_dtype)), NXS_E_ALIGNMENT);
  NXS_REQUIRE(is_aligned(p.flags_or_null, 4), NXS_E_ALIGNMENT);
  LaunchShape shape;
  NXS_TRY(grid_of(p.rows, kScalarThreads, shape));
  if (!p.z_or_null) return launch_fsq<float>(q, shape, stream);
  switch (p.z_dtype) {
    case NXS_F32: return launch_fsq<float>(q, shape, stream);
    case NXS_F16: return launch_fsq<f16>(q, shape, stream);
    default: return launch_fsq<bf16>(q, shape, stream);
  }
}

extern "C" nxs_status nxs_remap(const nxs_remap_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::quantization;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_remap_params& p = *params;
  NXS_REQUIRE(is_integer(p.codes_dtype) && is_integer(p.out_dtype), NXS_E_DTYPE);
  NXS_REQUIRE(p.count >= 0 && p.entries >= 1 && p.entries <= INT32_MAX, NXS_E_SHAPE);
  if (p.count == 0) return NXS_OK;
  NXS_REQUIRE(p.codes && p.table && p.out, NXS_E_NULL);
  NXS_REQUIRE(is_aligned(p.codes, dtype_bytes(p.codes_dtype)) && is_aligned(p.table, dtype_bytes(p.out_dtype)) &&
                  is_aligned(p.out, dtype_bytes(p.out_dtype)) && is_aligned(p.flags_or_null, 4),
              NXS_E_ALIGNMENT);
  switch (p.codes_dtype) {
    case NXS_U16: return launch_remap_to<u16>(p, stream);
    case NXS_U32: return launch_remap_to<u32>(p, stream);
    default: return launch_remap_to<i64>(p, stream);
  }
}
