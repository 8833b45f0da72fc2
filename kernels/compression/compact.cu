// C entry of the compaction: refuse what the kernels cannot take, cut the rows, then pick the mover.
#include "compression/compact.cuh"

namespace nxs::compression {

template <> nxs_status convert_from<float>(const nxs_compact_params&, const MoveShape&, void*);
template <> nxs_status convert_from<f16>(const nxs_compact_params&, const MoveShape&, void*);
template <> nxs_status convert_from<bf16>(const nxs_compact_params&, const MoveShape&, void*);

// In place, after the rows: the values of 4 bytes; a block has a (set, head).
__global__ void __launch_bounds__(kCompactThreads, 4) values_in_place_kernel(const __grid_constant__ nxs_compact_params p) {
  const u32 heads = static_cast<u32>(p.heads), set = block_index_x() / heads, head = block_index_x() - set * heads;
  const i32 count = count_of(p, set, head);
#pragma unroll 1
  for (i32 tile = 0; tile < count; tile += static_cast<i32>(kCompactThreads)) {
    const i32 row = tile + static_cast<i32>(thread_index());
    const u32 heads_of[1] = {head};
    const i32 rows_of[1] = {row < count ? row : count - 1};
    bool go[1] = {row < count};
    i32 source[1];
    i64 from[1], to[1];
    find_rows<true>(p, set, heads_of, rows_of, go, source, from, to);
    Values values;
    if (go[0]) load_values<true>(p, set, head, row, source[0], from[0], values);
    block_sync();
    if (go[0]) store_values(p, set, head, to[0], values);
  }
}

inline bool has_values(const nxs_compact_params& p) {
  bool has = p.positions.out_or_null;
  for (const nxs_compact_extra& extra : p.extra) has = has || extra.out_or_null;
  return has;
}

nxs_status copy_gather(const nxs_compact_params& p, const MoveShape& shape, void* stream) {
  switch (p.unit) {
    case 1: return gather_launch<Copy<1>>(p, shape, stream);
    case 2: return gather_launch<Copy<2>>(p, shape, stream);
    case 4: return gather_launch<Copy<4>>(p, shape, stream);
    case 8: return gather_launch<Copy<8>>(p, shape, stream);
    default: return gather_launch<Copy<16>>(p, shape, stream);
  }
}
nxs_status copy_in_place(const nxs_compact_params& p, const MoveShape& shape, void* stream) {
  switch (p.unit) {
    case 1: return in_place_launch<Copy<1>>(p, shape, stream);
    case 2: return in_place_launch<Copy<2>>(p, shape, stream);
    case 4: return in_place_launch<Copy<4>>(p, shape, stream);
    case 8: return in_place_launch<Copy<8>>(p, shape, stream);
    default: return in_place_launch<Copy<16>>(p, shape, stream);
  }
}

inline bool is_float(nxs_dtype dtype) { return dtype == NXS_F32 || dtype == NXS_F16 || dtype == NXS_BF16; }

nxs_status check_tensor(const nxs_compact_params& p, const nxs_compact_tensor& t, bool copies, i64 in_bytes, i64 out_bytes) {
  if (!t.out_or_null) return NXS_OK;
  NXS_REQUIRE(t.dim >= 1 && t.dim <= 1024, NXS_E_SHAPE);
  NXS_REQUIRE(p.in_place ? !t.input_or_null : t.input_or_null != nullptr, NXS_E_NULL);
  const i64 strides_in[] = {t.input_stride_set, t.input_stride_row, t.input_stride_head};
  const i64 strides_out[] = {t.out_stride_set, t.out_stride_row, t.out_stride_head};
  // Bytes that a unit's address is a multiple of.
  const i64 in_unit = copies ? p.unit : p.unit == 8 ? 16 : in_bytes, out_unit = copies ? p.unit : p.unit == 8 ? 16 : out_bytes;
  for (int i = 0; i < 3; ++i) {
    NXS_REQUIRE(strides_in[i] >= 0 && strides_out[i] >= 0, NXS_E_STRIDE);
    NXS_REQUIRE((p.in_place || strides_in[i] * in_bytes % in_unit == 0) && strides_out[i] * out_bytes % out_unit == 0,
                NXS_E_STRIDE);
  }
  NXS_REQUIRE(copies ? t.dim * in_bytes % p.unit == 0 : t.dim % p.unit == 0, NXS_E_SHAPE);
  NXS_REQUIRE(is_aligned(t.input_or_null, in_unit) && is_aligned(t.out_or_null, out_unit), NXS_E_ALIGNMENT);
  return NXS_OK;
}

nxs_status compact(const nxs_compact_params& p, void* stream) {
  const i64 in_bytes = dtype_bytes(p.in_dtype), out_bytes = dtype_bytes(p.out_dtype);
  const bool same = p.in_dtype == p.out_dtype, rotates = p.renumber && p.rotary_dim > 0 && p.tensor[0].out_or_null;
  const bool copies = same && !rotates;
  NXS_REQUIRE(in_bytes > 0 && (same || (is_float(p.in_dtype) && is_float(p.out_dtype))), NXS_E_DTYPE);
  NXS_REQUIRE(copies || is_float(p.in_dtype), NXS_E_DTYPE);
  NXS_REQUIRE(!p.in_place || same, NXS_E_DTYPE);
  NXS_REQUIRE(p.sets >= 0 && p.heads >= 0 && p.kept >= 0 && p.tokens >= 0 && p.tokens <= INT32_MAX && p.kept <= p.tokens,
              NXS_E_SHAPE);
  NXS_REQUIRE(p.log2_lanes >= 0 && p.log2_lanes <= 5 && p.slices >= 1 && p.slices <= 64, NXS_E_UNSUPPORTED);
  if (p.sets == 0 || p.heads == 0 || p.kept == 0) return NXS_OK;
  NXS_REQUIRE(p.heads <= INT32_MAX / p.kept && p.sets <= INT32_MAX / p.heads, NXS_E_SHAPE);
  NXS_REQUIRE(p.input_rows >= 0 && p.out_rows >= 0 && (!p.in_place || p.input_rows == p.out_rows), NXS_E_SHAPE);
  NXS_REQUIRE(p.page_rows >= 1 || !(p.input_pages_or_null || p.out_pages_or_null), NXS_E_SHAPE);
  NXS_REQUIRE(p.page_rows <= INT32_MAX, NXS_E_SHAPE);
  NXS_REQUIRE((p.input_pages_or_null || p.input_rows >= p.tokens) && (p.out_pages_or_null || p.out_rows >= p.kept),
              NXS_E_SHAPE);
  NXS_REQUIRE(!p.in_place || !p.input_pages_or_null == !p.out_pages_or_null, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(copies ? p.unit == 1 || p.unit == 2 || p.unit == 4 || p.unit == 8 || p.unit == 16
                     : p.unit == 8 || p.unit == 2 || (p.unit == 1 && !same && !rotates),
              NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.indices && is_aligned(p.indices, 4) && is_aligned(p.counts_or_null, 4) && is_aligned(p.flags_or_null, 4),
              p.indices ? NXS_E_ALIGNMENT : NXS_E_NULL);
  for (const i64 stride : {p.indices_stride_set, p.indices_stride_head, p.counts_stride_set, p.counts_stride_head,
                           p.input_pages_stride_set, p.out_pages_stride_set, p.table_stride_row})
    NXS_REQUIRE(stride >= 0, NXS_E_STRIDE);
  NXS_TRY(check_tensor(p, p.tensor[0], copies, in_bytes, out_bytes));
  NXS_TRY(check_tensor(p, p.tensor[1], copies, in_bytes, out_bytes));
  MoveShape shape = {};
  for (int t = 0; t < 2; ++t)
    if (p.tensor[t].out_or_null)
      shape.units[t] = static_cast<u32>(copies ? p.tensor[t].dim * in_bytes / p.unit : p.tensor[t].dim / p.unit);
  if (rotates) {
    NXS_REQUIRE(p.rope == NXS_ROPE_INTERLEAVED || p.rope == NXS_ROPE_HALF, NXS_E_UNSUPPORTED);
    NXS_REQUIRE(p.rotary_dim <= p.tensor[0].dim && p.rotary_dim % p.unit == 0, NXS_E_SHAPE);
    NXS_REQUIRE(p.table_rows >= 1 && p.table_rows <= INT32_MAX, NXS_E_SHAPE);
    NXS_REQUIRE(p.cos_or_null && p.sin_or_null, NXS_E_NULL);
    const i64 table = p.unit == 8 ? 16 : 4;
    NXS_REQUIRE(is_aligned(p.cos_or_null, table) && is_aligned(p.sin_or_null, table), NXS_E_ALIGNMENT);
    NXS_REQUIRE(p.table_stride_row * 4 % table == 0, NXS_E_STRIDE);
    shape.rotated = static_cast<u32>(p.rotary_dim / p.unit);
  }
  for (int i = 0; i <= NXS_COMPACT_EXTRAS; ++i) {
    const nxs_compact_extra& extra = i == 0 ? p.positions : p.extra[i - 1];
    NXS_REQUIRE(is_aligned(extra.input_or_null, 4) && is_aligned(extra.out_or_null, 4), NXS_E_ALIGNMENT);
    NXS_REQUIRE(!p.in_place || !extra.input_or_null, NXS_E_UNSUPPORTED);
    NXS_REQUIRE(i == 0 || p.in_place || !extra.out_or_null || extra.input_or_null, NXS_E_NULL);
    for (const i64 stride : {extra.input_stride_set, extra.input_stride_row, extra.input_stride_head,
                             extra.out_stride_set, extra.out_stride_row, extra.out_stride_head})
      NXS_REQUIRE(stride >= 0, NXS_E_STRIDE);
  }
  shape.in_bytes = static_cast<u32>(in_bytes);
  shape.out_bytes = static_cast<u32>(out_bytes);
  const bool moves = shape.units[0] + shape.units[1] > 0;

  if (!p.in_place) {
    if (has_values(p)) shape.value_blocks = static_cast<u32>((p.kept + kCompactThreads - 1) / kCompactThreads);
    if (copies) return copy_gather(p, shape, stream);
  } else if (moves) {
    for (const u32 units : shape.units)
      NXS_REQUIRE((units + p.slices - 1) / p.slices <= i64{1} << p.log2_lanes, NXS_E_UNSUPPORTED);
    if (copies) NXS_TRY(copy_in_place(p, shape, stream));
  }
  if (!copies && moves) {
    const nxs_status status = p.in_dtype == NXS_F32   ? convert_from<float>(p, shape, stream)
                              : p.in_dtype == NXS_F16 ? convert_from<f16>(p, shape, stream)
                                                      : convert_from<bf16>(p, shape, stream);
    if (status != NXS_OK || !p.in_place) return status;
  } else if (!p.in_place) {
    // Values alone.
    return copy_gather(p, shape, stream);
  }
  if (!has_values(p)) return NXS_OK;
  LaunchShape launch_shape;
  launch_shape.grid = dim3(static_cast<unsigned>(p.sets * p.heads));
  launch_shape.block = kCompactThreads;
  return launch(values_in_place_kernel, launch_shape, stream, p);
}

}  // namespace nxs::compression

extern "C" nxs_status nxs_compact(const nxs_compact_params* params, void* stream) {
  NXS_REQUIRE(params, NXS_E_NULL);
  return nxs::compression::compact(*params, stream);
}
