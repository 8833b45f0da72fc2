// Compact: out[s, r, h, :] = convert(turn(input[s, indices[s, h, r], h, :])) for r < counts[s, h], and 4-byte values of rows.
//
// Layouts    K, V [sets, rows, heads, dim], strides of all but dim; indices [sets, heads, kept]; a row's place is the row, or
//            with pages pages[set, row / page_rows] * page_rows + row % page_rows. nextscale.h has the rest.
// Who does what
//            A mover says what a unit of a row is: so many bytes, or 8, 2 or 1 elements that are converted or turned.
//            gather     2^log2_lanes threads share a row, a unit each; a thread has kRows rows on the way at once, heads innermost,
//                       so that writes run through memory. Other blocks of the same grid have the 4-byte values, a thread a row.
//            in place   a block has a (set, head, tensor), or a slice of its units, and walks its rows upwards: it loads a tile, waits
//                       for all of its threads, stores it. Indices ascend, so that a row's source is not before the row: no tile
//                       overwrites what a later one reads. Units and heads share no byte. The 4-byte values follow in a second
//                       launch, as K reads its old positions.
// Turning    K was rotated by its old position: it is rotated by new - old, whose cosines and sines are those of the table's row
//            |new - old|, the sines negated if it is negative.
// Bytes      2 * sets * heads * kept * (dim of K + dim of V) * sizeof, and the indices.
// Determinism bitwise.
#pragma once
#include "common/check.h"
#include "common/chunk.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/math.cuh"

namespace nxs::compression {

constexpr u32 kCompactThreads = 256;

// How a row of K and of V is cut.
struct MoveShape {
  u32 units[2];
  u32 rotated;            // of K's units
  u32 in_bytes, out_bytes;  // of an element
  u32 row_blocks;         // of a set: blocks that move rows; gather_launch knows how many
  u32 value_blocks;       // of a (set, head): blocks that move values
};

// The row of the table, negative where keys are turned backwards.
struct Angles {
  i32 turn;
};

// kUnit bytes, unchanged.
template <u32 kUnit> struct Copy {
  using Regs = Vec<u8, kUnit>;
  static constexpr u32 kRows = 4;
  static constexpr bool kTurns = false;
  template <bool kInPlace> static NXS_DEVICE Regs load(const u8* row, u32 unit, const nxs_compact_params&, bool) {
    const Regs* from = reinterpret_cast<const Regs*>(row) + unit;
    if constexpr (kInPlace)
      return load_global(from);
    else
      return load_global_nc(from);
  }
  static NXS_DEVICE void store(u8* row, u32 unit, const Regs& regs, const nxs_compact_params&, bool, const Angles&) {
    store_global_streaming(reinterpret_cast<Regs*>(row) + unit, regs);
  }
};

// kElements of type I, turned or not, as type O.
template <typename I, typename O, u32 kElements> struct Convert {
  static constexpr u32 kHalf = kElements / 2, kRows = 2;
  static constexpr bool kTurns = kElements > 1;
  struct Regs {
    Vec<I, kElements> x;
  };
  static NXS_DEVICE bool is_half(const nxs_compact_params& p) { return p.rope == NXS_ROPE_HALF; }

  template <bool kInPlace, u32 kCount> static NXS_DEVICE Vec<I, kCount> load_some(const I* from) {
    if constexpr (kInPlace)
      return load_chunk<I, kCount>(from);
    else
      return load_chunk_nc<I, kCount>(from);
  }
  template <bool kInPlace>
  static NXS_DEVICE Regs load(const u8* row, u32 unit, const nxs_compact_params& p, bool turned) {
    const I* from = reinterpret_cast<const I*>(row);
    Regs regs;
    if constexpr (kTurns) {
      if (turned && is_half(p)) {
        const auto a = load_some<kInPlace, kHalf>(from + unit * kHalf);
        const auto b = load_some<kInPlace, kHalf>(from + p.rotary_dim / 2 + unit * kHalf);
#pragma unroll
        for (u32 j = 0; j < kHalf; ++j) {
          regs.x.data[j] = a.data[j];
          regs.x.data[kHalf + j] = b.data[j];
        }
        return regs;
      }
    }
    // Two elements need not be aligned as a pair.
    constexpr u32 kPiece = kElements == 2 ? 1 : kElements;
#pragma unroll
    for (u32 i = 0; i < kElements; i += kPiece) {
      const auto piece = load_some<kInPlace, kPiece>(from + unit * kElements + i);
#pragma unroll
      for (u32 j = 0; j < kPiece; ++j) regs.x.data[i + j] = piece.data[j];
    }
    return regs;
  }
  static NXS_DEVICE void store(u8* row, u32 unit, const Regs& regs, const nxs_compact_params& p, bool turned,
                               const Angles& angles) {
    O* to = reinterpret_cast<O*>(row);
    float x[kElements];
#pragma unroll
    for (u32 j = 0; j < kElements; ++j) x[j] = to_f32(regs.x.data[j]);
    if constexpr (kTurns) {
      if (turned) {
        const i64 at = (angles.turn < 0 ? -angles.turn : angles.turn) * p.table_stride_row + unit * kHalf;
        const auto cos = load_chunk_nc<float, kHalf>(p.cos_or_null + at);
        const auto sin = load_chunk_nc<float, kHalf>(p.sin_or_null + at);
        const bool half = is_half(p);
#pragma unroll
        for (u32 j = 0; j < kHalf; ++j) {
          const float c = cos.data[j], s = angles.turn < 0 ? -sin.data[j] : sin.data[j];
          const float a = half ? x[j] : x[2 * j], b = half ? x[kHalf + j] : x[2 * j + 1];
          const float turned_a = fma(a, c, -multiply(b, s)), turned_b = fma(b, c, multiply(a, s));
          // Both places are written under both styles: registers have no addresses.
          if (half) {
            x[j] = turned_a;
            x[kHalf + j] = turned_b;
          } else {
            x[2 * j] = turned_a;
            x[2 * j + 1] = turned_b;
          }
        }
        if (half) {
          float low[kHalf], high[kHalf];
#pragma unroll
          for (u32 j = 0; j < kHalf; ++j) {
            low[j] = x[j];
            high[j] = x[kHalf + j];
          }
          store_chunk<true>(to + unit * kHalf, low);
          store_chunk<true>(to + p.rotary_dim / 2 + unit * kHalf, high);
          return;
        }
      }
    }
    if constexpr (kElements == 2) {
      store_global_streaming(to + unit * 2, from_f32<O>(x[0]));
      store_global_streaming(to + unit * 2 + 1, from_f32<O>(x[1]));
    } else {
      store_chunk<true>(to + unit * kElements, x);
    }
  }
};

NXS_DEVICE void set_flag(const nxs_compact_params& p, u32 flag) {
  if (p.flags_or_null) atomic_or_global(p.flags_or_null, flag);
}

// How many rows of a (set, head) are kept.
NXS_DEVICE i32 count_of(const nxs_compact_params& p, i64 set, i64 head) {
  const i32 kept = static_cast<i32>(p.kept);
  if (!p.counts_or_null) return kept;
  const i32 count = load_global_nc(p.counts_or_null + set * p.counts_stride_set + head * p.counts_stride_head);
  if (count >= 0 && count <= kept) return count;
  set_flag(p, NXS_COMPACT_COUNT_CLAMPED);
  return count < 0 ? 0 : kept;
}

// Replaces rows by their places, by a page table; rows of pages that are not there go nowhere. All loads are on the way at once.
template <u32 kRows>
NXS_DEVICE void turn_pages(const nxs_compact_params& p, const i32* pages, i64 rows, i64 (&place)[kRows], bool (&go)[kRows]) {
  const u32 page_rows = static_cast<u32>(p.page_rows);
  i32 page[kRows];
#pragma unroll
  for (u32 u = 0; u < kRows; ++u) page[u] = load_global_nc(pages + static_cast<u32>(place[u]) / page_rows);
#pragma unroll
  for (u32 u = 0; u < kRows; ++u) {
    place[u] = page[u] * p.page_rows + static_cast<u32>(place[u]) % page_rows;
    if (place[u] >= 0 && place[u] < rows) continue;
    if (go[u]) set_flag(p, NXS_COMPACT_ROW_CLAMPED);
    go[u] = false;
  }
}

// Where rows come from and go to: rows `row`, below kept, of which those that `go` are asked for. All loads of a kind are on the
// way at once.
template <bool kInPlace, u32 kRows>
NXS_DEVICE void find_rows(const nxs_compact_params& p, i64 set, const u32 (&head)[kRows], const i32 (&row)[kRows],
                          bool (&go)[kRows], i32 (&source)[kRows], i64 (&from)[kRows], i64 (&to)[kRows]) {
  const i32* indices = p.indices + set * p.indices_stride_set;
#pragma unroll
  for (u32 u = 0; u < kRows; ++u) source[u] = load_global_nc(indices + head[u] * p.indices_stride_head + row[u]);
  const i32 most = static_cast<i32>(p.tokens) - 1;
#pragma unroll
  for (u32 u = 0; u < kRows; ++u) {
    const i32 least = kInPlace ? row[u] : 0, index = source[u];
    source[u] = index < least ? least : index > most ? most : index;
    if (go[u] && source[u] != index) set_flag(p, NXS_COMPACT_ROW_CLAMPED);
    from[u] = source[u];
    to[u] = row[u];
  }
  if (p.input_pages_or_null)
    turn_pages(p, p.input_pages_or_null + set * p.input_pages_stride_set, p.input_rows, from, go);
  if (p.out_pages_or_null) turn_pages(p, p.out_pages_or_null + set * p.out_pages_stride_set, p.out_rows, to, go);
}

template <bool kInPlace> NXS_DEVICE i64 old_position(const nxs_compact_params& p, i64 set, i64 head, i32 source, i64 place) {
  const nxs_compact_extra& at = p.positions;
  if constexpr (kInPlace) {
    if (!at.out_or_null) return source;
    return load_global(static_cast<const i32*>(at.out_or_null) + set * at.out_stride_set + place * at.out_stride_row +
                       head * at.out_stride_head);
  } else {
    if (!at.input_or_null) return source;
    return load_global_nc(static_cast<const i32*>(at.input_or_null) + set * at.input_stride_set +
                          place * at.input_stride_row + head * at.input_stride_head);
  }
}

template <bool kInPlace>
NXS_DEVICE Angles angles_of(const nxs_compact_params& p, i64 set, i64 head, i32 row, i32 source, i64 place) {
  const i64 turn = p.first_position + row - old_position<kInPlace>(p, set, head, source, place);
  const i64 most = p.table_rows - 1, clamped = turn < -most ? -most : turn > most ? most : turn;
  if (clamped != turn) set_flag(p, NXS_COMPACT_POSITION_CLAMPED);
  return Angles{static_cast<i32>(clamped)};
}

// A row on its way.
struct Moving {
  const u8* from;
  u8* to;
  Angles angles;
  bool go;
};
template <bool kInPlace>
NXS_DEVICE void aim(const MoveShape& shape, const nxs_compact_tensor& tensor, i64 set, i64 head, i64 from_place, i64 to_place,
                    Moving& row) {
  const u8* base = static_cast<const u8*>(kInPlace ? tensor.out_or_null : tensor.input_or_null);
  const i64 by_set = kInPlace ? tensor.out_stride_set : tensor.input_stride_set;
  const i64 by_row = kInPlace ? tensor.out_stride_row : tensor.input_stride_row;
  const i64 by_head = kInPlace ? tensor.out_stride_head : tensor.input_stride_head;
  row.from = base + (set * by_set + from_place * by_row + head * by_head) * shape.in_bytes;
  row.to = static_cast<u8*>(tensor.out_or_null) +
           (set * tensor.out_stride_set + to_place * tensor.out_stride_row + head * tensor.out_stride_head) * shape.out_bytes;
}

// Values of 4 bytes of one row, and its position.
struct Values {
  u32 value[1 + NXS_COMPACT_EXTRAS];
};
NXS_DEVICE const nxs_compact_extra& extra_of(const nxs_compact_params& p, u32 which) {
  return which == 0 ? p.positions : p.extra[which - 1];
}
template <bool kInPlace>
NXS_DEVICE void load_values(const nxs_compact_params& p, i64 set, i64 head, i32 row, i32 source, i64 place, Values& values) {
#pragma unroll
  for (u32 which = 0; which <= NXS_COMPACT_EXTRAS; ++which) {
    values.value[which] = 0;
    const nxs_compact_extra& at = extra_of(p, which);
    if (!at.out_or_null) continue;
    if (which == 0) {
      values.value[0] = static_cast<u32>(p.renumber ? p.first_position + row
                                                    : old_position<kInPlace>(p, set, head, source, place));
    } else if constexpr (kInPlace) {
      values.value[which] = load_global(static_cast<const u32*>(at.out_or_null) + set * at.out_stride_set +
                                        place * at.out_stride_row + head * at.out_stride_head);
    } else {
      values.value[which] = load_global_nc(static_cast<const u32*>(at.input_or_null) + set * at.input_stride_set +
                                           place * at.input_stride_row + head * at.input_stride_head);
    }
  }
}
NXS_DEVICE void store_values(const nxs_compact_params& p, i64 set, i64 head, i64 place, const Values& values) {
#pragma unroll
  for (u32 which = 0; which <= NXS_COMPACT_EXTRAS; ++which) {
    const nxs_compact_extra& at = extra_of(p, which);
    if (at.out_or_null)
      store_global(static_cast<u32*>(at.out_or_null) + set * at.out_stride_set + place * at.out_stride_row +
                       head * at.out_stride_head,
                   values.value[which]);
  }
}

template <typename Mover>
__global__ void __launch_bounds__(kCompactThreads, 3) gather_kernel(const __grid_constant__ nxs_compact_params p,
                                                                    const __grid_constant__ MoveShape shape) {
  const u32 heads = static_cast<u32>(p.heads), blocks_of_set = shape.row_blocks + shape.value_blocks * heads;
  const u32 set = block_index_x() / blocks_of_set, block = block_index_x() - set * blocks_of_set;
  if (block >= shape.row_blocks) {
    const u32 number = block - shape.row_blocks, head = number / shape.value_blocks;
    const i32 row = static_cast<i32>((number - head * shape.value_blocks) * kCompactThreads + thread_index());
    if (row >= count_of(p, set, head)) return;
    const u32 heads_of[1] = {head};
    const i32 rows_of[1] = {row};
    bool go[1] = {true};
    i32 source[1];
    i64 from[1], to[1];
    find_rows<false>(p, set, heads_of, rows_of, go, source, from, to);
    if (!go[0]) return;
    Values values;
    load_values<false>(p, set, head, row, source[0], from[0], values);
    store_values(p, set, head, to[0], values);
    return;
  }
  constexpr u32 kRows = Mover::kRows;
  const u32 lanes = 1u << p.log2_lanes, lane = thread_index() & (lanes - 1), at_once = kCompactThreads >> p.log2_lanes;
  const u32 first = block * at_once * kRows + (thread_index() >> p.log2_lanes);
  const u32 items = heads * static_cast<u32>(p.kept);
  Moving moving[kRows];
  i64 from[kRows], to[kRows];
  u32 head[kRows];
  i32 row[kRows], source[kRows];
  bool go[kRows];
#pragma unroll
  for (u32 u = 0; u < kRows; ++u) {
    const u32 item = first + u * at_once, inside = item < items ? item : items - 1;
    row[u] = static_cast<i32>(inside / heads);
    head[u] = inside - static_cast<u32>(row[u]) * heads;
    go[u] = item < items;
  }
  if (p.counts_or_null) {
#pragma unroll
    for (u32 u = 0; u < kRows; ++u) go[u] = go[u] && row[u] < count_of(p, set, head[u]);
  }
  find_rows<false>(p, set, head, row, go, source, from, to);
#pragma unroll
  for (u32 u = 0; u < kRows; ++u) {
    moving[u].go = go[u];
    if constexpr (Mover::kTurns) {
      if (go[u] && shape.rotated > 0) moving[u].angles = angles_of<false>(p, set, head[u], row[u], source[u], from[u]);
    }
  }
#pragma unroll 1
  for (u32 t = 0; t < 2; ++t) {
    const nxs_compact_tensor& tensor = p.tensor[t];
    if (!tensor.out_or_null) continue;
#pragma unroll
    for (u32 u = 0; u < kRows; ++u)
      aim<false>(shape, tensor, set, head[u], from[u], to[u], moving[u]);
    const u32 units = shape.units[t], rotated = t == 0 ? shape.rotated : 0;
#pragma unroll 1
    for (u32 unit = lane; unit < units; unit += lanes) {
      const bool turned = Mover::kTurns && unit < rotated;
      typename Mover::Regs regs[kRows];
#pragma unroll
      for (u32 u = 0; u < kRows; ++u)
        if (moving[u].go) regs[u] = Mover::template load<false>(moving[u].from, unit, p, turned);
#pragma unroll
      for (u32 u = 0; u < kRows; ++u)
        if (moving[u].go) Mover::store(moving[u].to, unit, regs[u], p, turned, moving[u].angles);
    }
  }
}

template <typename Mover>
__global__ void __launch_bounds__(kCompactThreads, 4) in_place_kernel(const __grid_constant__ nxs_compact_params p,
                                                                      const __grid_constant__ MoveShape shape) {
  const u32 heads = static_cast<u32>(p.heads), slices = static_cast<u32>(p.slices);
  const u32 slice = block_index_x() % slices, of_head = block_index_x() / slices;
  const u32 t = of_head & 1, number = of_head >> 1, set = number / heads, head = number - set * heads;
  const nxs_compact_tensor& tensor = p.tensor[t];
  if (!tensor.out_or_null) return;
  constexpr u32 kRows = Mover::kRows;
  const u32 lane = thread_index() & ((1u << p.log2_lanes) - 1), at_once = kCompactThreads >> p.log2_lanes;
  const u32 units = shape.units[t], of_slice = (units + slices - 1) / slices, unit = slice * of_slice + lane;
  const bool has_unit = lane < of_slice && unit < units;
  const bool turned = Mover::kTurns && t == 0 && unit < shape.rotated;
  const i32 count = count_of(p, set, head);
#pragma unroll 1
  for (i32 tile = 0; tile < count; tile += static_cast<i32>(at_once * kRows)) {
    Moving moving[kRows];
    typename Mover::Regs regs[kRows];
    u32 heads_of[kRows];
    i32 row[kRows], source[kRows];
    i64 from[kRows], to[kRows];
    bool go[kRows];
#pragma unroll
    for (u32 u = 0; u < kRows; ++u) {
      const i32 wanted = tile + static_cast<i32>(u * at_once + (thread_index() >> p.log2_lanes));
      go[u] = has_unit && wanted < count;
      row[u] = wanted < count ? wanted : count - 1;
      heads_of[u] = head;
    }
    find_rows<true>(p, set, heads_of, row, go, source, from, to);
#pragma unroll
    for (u32 u = 0; u < kRows; ++u) {
      moving[u].go = go[u];
      if (!go[u]) continue;
      aim<true>(shape, tensor, set, head, from[u], to[u], moving[u]);
      if constexpr (Mover::kTurns) {
        if (turned) moving[u].angles = angles_of<true>(p, set, head, row[u], source[u], from[u]);
      }
      regs[u] = Mover::template load<true>(moving[u].from, unit, p, turned);
    }
    block_sync();
#pragma unroll
    for (u32 u = 0; u < kRows; ++u)
      if (moving[u].go) Mover::store(moving[u].to, unit, regs[u], p, turned, moving[u].angles);
  }
}

// One instantiation file per mover's input picks the rest.
template <typename Mover> nxs_status gather_launch(const nxs_compact_params& p, MoveShape shape, void* stream) {
  LaunchShape launch_shape;
  const i64 of_block = (kCompactThreads >> p.log2_lanes) * Mover::kRows;
  if (shape.units[0] + shape.units[1] > 0)
    shape.row_blocks = static_cast<u32>((p.heads * p.kept + of_block - 1) / of_block);
  const i64 blocks = (shape.row_blocks + i64{shape.value_blocks} * p.heads) * p.sets;
  NXS_REQUIRE(blocks <= INT32_MAX, NXS_E_SHAPE);
  if (blocks == 0) return NXS_OK;
  launch_shape.grid = dim3(static_cast<unsigned>(blocks));
  launch_shape.block = kCompactThreads;
  return launch(gather_kernel<Mover>, launch_shape, stream, p, shape);
}
template <typename Mover> nxs_status in_place_launch(const nxs_compact_params& p, const MoveShape& shape, void* stream) {
  LaunchShape launch_shape;
  const i64 blocks = 2 * p.sets * p.heads * p.slices;
  NXS_REQUIRE(blocks <= INT32_MAX, NXS_E_SHAPE);
  launch_shape.grid = dim3(static_cast<unsigned>(blocks));
  launch_shape.block = kCompactThreads;
  return launch(in_place_kernel<Mover>, launch_shape, stream, p, shape);
}

template <typename I, typename O>
nxs_status convert_launch(const nxs_compact_params& p, const MoveShape& shape, void* stream) {
  if constexpr (DType<I>::value == DType<O>::value) {
    if (p.in_place)
      return p.unit == 8 ? in_place_launch<Convert<I, O, 8>>(p, shape, stream)
                         : in_place_launch<Convert<I, O, 2>>(p, shape, stream);
  } else if (p.unit == 1) {
    return gather_launch<Convert<I, O, 1>>(p, shape, stream);
  }
  return p.unit == 8 ? gather_launch<Convert<I, O, 8>>(p, shape, stream)
                     : gather_launch<Convert<I, O, 2>>(p, shape, stream);
}

// One instantiation file per dtype of the input (compact_<dtype>.cu) picks the output's.
template <typename I> nxs_status convert_from(const nxs_compact_params& p, const MoveShape& shape, void* stream);

template <typename I> nxs_status convert_for_out(const nxs_compact_params& p, const MoveShape& shape, void* stream) {
  switch (p.out_dtype) {
    case NXS_F32: return convert_launch<I, float>(p, shape, stream);
    case NXS_F16: return convert_launch<I, f16>(p, shape, stream);
    case NXS_BF16: return convert_launch<I, bf16>(p, shape, stream);
    default: return NXS_E_DTYPE;
  }
}

}  // namespace nxs::compression
