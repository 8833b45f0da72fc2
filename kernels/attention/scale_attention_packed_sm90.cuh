// Scale attention over packed caches on Hopper: the consumers, queries and results of scale_attention_sm90.cuh, and before them
// warpgroups that write the tiles of K and V which those read.
//
//   out[b, i, h, :] = sum over visible j of softmax_j(scale * q . k_j) v_j, by the schedule of nextscale.h, where k and v are
//   what NXS_KV_FP8 or NXS_KV_INT4 stand for, rounded to T
//
// Grid       persistent, as in scale_attention_sm90.cuh.
// Block      a producer warpgroup, kExpanders warpgroups that unpack, and kGroups consumer warpgroups. Of the producer, warp 0
//            streams units of 64 rows of codes (TMA) and says what the chunks are, warp 1 copies the rows' numbers where they are
//            not in the slots, warp 2 loads q, warp 3 writes results.
// Unpacking  a ring of units: K of a chunk, then V of it, then the next chunk. Of one expander's warpgroup all units are its own; of
//            two each has every other unit of a chunk. A thread takes 16 bytes of codes to the 16 or 32 elements that the portable
//            kernel and nxs_unpack make of them, writes these to the swizzled tile, and fences: so each row is what it is in the
//            unpacked cache, and the result is that of scale_attention_sm90.cuh over it, bit for bit, where both are cut alike.
// Tails      rows beyond a chunk's last key are written as zeroes.
// Shared     as in scale_attention_sm90.cuh with two slots of q; then units [64 rows][bytes of a slot], and their numbers
//            [64 rows][n] f32; what a chunk is, for each unit.
// Banks      eight threads, which a store of 16 bytes each takes together, have pieces of all eight places of a swizzled row: see
//            piece_of.
// Bytes      q and out once; codes and numbers of K and V once for each item and head.
// FLOPs      4 * kDim * 64 * kKeys a tile and chunk; about 3 instructions an element of fp8, 3.6 of 4 bits, for all groups.
// Limits     dim = kDim; items of one or two tiles; sm_90a.
#pragma once
#include "attention/packed_values.cuh"
#include "attention/scale_attention_sm90.cuh"

namespace nxs::attention {

constexpr u32 kUnitKeys = 64;

template <int kFormat_, int kDim_, int kGroups_> struct PackedSm90 {
  static constexpr int kFormat = kFormat_, kDim = kDim_, kGroups = kGroups_, kPair = 1;
  static_assert(kGroups == 1 || kGroups == 2);
  static constexpr u32 kBlocks = (kDim + 63) / 64, kKeys = kChunk, kMaskWords = NXS_SCHEDULE_MASK_WORDS / kGroupThreads;
  static constexpr u32 kStages = kDim == 64 ? 4 : 2, kSlots = 2;
  static constexpr u32 kTileBytes = kBlocks * kTileRows * 128, kSlotBytes = kGroups * kTileBytes;
  static constexpr u32 kChunkBytes = kBlocks * kKeys * 128;
  static constexpr bool kTurns = kGroups > 1, kTight = kDim > 64 || kGroups != 2;
  // One group waits for memory, so unpacking has to keep up with that; two need the registers.
  static constexpr u32 kExpanders = kGroups == 1 ? 2 : 1;
  static constexpr u32 kThreads = kGroupThreads * (1 + kExpanders + kGroups);

  // Units.
  static constexpr u32 kBits = kFormat == NXS_KV_FP8 ? 8 : 4, kNumbers = kFormat == NXS_KV_FP8 ? 1 : 2;
  static constexpr u32 kCodeBytes = kDim * kBits / 8, kPieces = kCodeBytes / 16, kEights = 16 / kBits;  // 16 bytes; in each
  static constexpr u32 kPlainUnit = kUnitKeys * (kCodeBytes + 4 * kNumbers), kInlineUnit = kUnitKeys * (kCodeBytes + 16);
  static constexpr u32 kMostUnits = 8;

  static constexpr u32 kQ = 0, kK = kQ + kSlots * kSlotBytes, kV = kK + kStages * kChunkBytes,
                       kInfo = kV + kStages * kChunkBytes,
                       kHeader = (kInfo + kStages * kGroups * sizeof(ChunkInfo) + 15) / 16 * 16,
                       kHeaderBytes = (16 + 8 * kGroups + 15) / 16 * 16,
                       kInverse = kHeader + kSlots * kHeaderBytes,  // of the sums, f32 [kGroups][kTileRows]
      kLse = kInverse + kGroups * kTileRows * 4,                    // f32 [kSlots][kGroups][kTileRows]
      kUnitInfo = kLse + kSlots * kGroups * kTileRows * 4,          // ChunkInfo of each group, 16 bytes a unit
      kBarriers = kUnitInfo + kMostUnits * 16;
  static constexpr u32 kQFull = kBarriers, kResults = kQFull + 8 * kSlots, kQEmpty = kResults + 8 * kSlots,
                       kKFull = kQEmpty + 8 * kSlots, kKEmpty = kKFull + 8 * kStages, kVFull = kKEmpty + 8 * kStages,
                       kVEmpty = kVFull + 8 * kStages, kUnitFull = kVEmpty + 8 * kStages,
                       kUnitEmpty = kUnitFull + 8 * kMostUnits,
                       kRing = (kUnitEmpty + 8 * kMostUnits + 127) / 128 * 128;
  static constexpr u32 kMostShared = 232448;
  static constexpr u32 units(u32 bytes) { return (kMostShared - kRing) / bytes < kMostUnits ? (kMostShared - kRing) / bytes : kMostUnits; }
  static constexpr u32 kPlainUnits = units(kPlainUnit), kInlineUnits = units(kInlineUnit);
  static constexpr u32 kSharedBytes =
      kRing + (kPlainUnits * kPlainUnit > kInlineUnits * kInlineUnit ? kPlainUnits * kPlainUnit : kInlineUnits * kInlineUnit);
  // Units whose numbers are under way while those of one more are asked for: less than there are slots, or nothing would go on.
  static constexpr int kLag = (kPlainUnits < kInlineUnits + 1 ? kPlainUnits : kInlineUnits + 1) - 2;
  static_assert(kInlineUnits >= 3 && kPlainUnits >= 3 && kPlainUnit % 128 == 0 && kInlineUnit % 128 == 0);

  // How rows' numbers come: of k and of v.
  NXS_DEVICE static bool all_inline(const ScaleKernelParams& p) { return !p.k_numbers_or_null && !p.v_numbers_or_null; }
};

// A place in the ring of units.
template <typename C> struct UnitAt {
  const u32 shared, bytes, count;
  u32 slot = 0, parity = 0;

  NXS_DEVICE UnitAt(const ScaleKernelParams& p, u32 shared_)
      : shared(shared_),
        // One size, if any rows have their numbers with them.
        bytes(p.k_numbers_or_null && p.v_numbers_or_null ? C::kPlainUnit : C::kInlineUnit),
        count(p.k_numbers_or_null && p.v_numbers_or_null ? C::kPlainUnits : C::kInlineUnits) {}
  NXS_DEVICE u32 codes() const { return shared + C::kRing + slot * bytes; }
  NXS_DEVICE u32 info() const { return shared + C::kUnitInfo + slot * 16; }
  NXS_DEVICE u32 full() const { return shared + C::kUnitFull + slot * 8; }
  NXS_DEVICE u32 empty() const { return shared + C::kUnitEmpty + slot * 8; }
  NXS_DEVICE void advance() {
    if (++slot == count) slot = 0, parity ^= 1;
  }
};

// Calls take(which, first key, keys, infos, of) for each unit of the block's works in their order, which being 0 for K and 1 for V;
// of a work without keys, once, with no keys.
template <typename C, typename Take> NXS_DEVICE void for_each_unit(const ScaleKernelParams& p, const Take& take) {
  const u32 works = all_works(p);
  for (u32 n = 0;; ++n) {
    const u32 index = nth_work<1>(n);
    if (index >= works) break;
    typename KeyWalk<C::kKeys>::Of of;
    KeyWalk<C::kKeys> walk(p, work_at(p, index), of);
    u32 coming = walk.next(p, of);
    bool nothing = coming == 0;  // still one chunk, hidden from all
    while (coming > 0 || nothing) {
      const u32 key = walk.first_key(), keys = coming;
      const Vec<u32, 4> masks = nothing ? Vec<u32, 4>{} : walk.masks(p);
      coming = walk.next(p, of);
      Vec<u32, 4> infos{};
#pragma unroll
      for (u32 g = 0; g < static_cast<u32>(C::kGroups); ++g) {
        const bool hidden = nothing || masks.data[g] == NXS_MASK_HIDDEN;
        infos.data[2 * g] = keys | (hidden ? kChunkHidden : 0) | (coming > 0 ? 0 : kChunkLast);
        infos.data[2 * g + 1] = hidden ? 0 : masks.data[g];
      }
#pragma unroll 1
      for (u32 which = 0; which < 2; ++which)
#pragma unroll 1
        for (u32 first = 0; first < keys || (nothing && which == 0 && first == 0); first += kUnitKeys)
          take(which, key + first, keys - first < kUnitKeys ? keys - first : kUnitKeys, infos, of);
      nothing = false;
    }
  }
}

// Warp 0: codes, and what each chunk is.
template <typename C>
NXS_DEVICE void stream_codes(const ScaleKernelParams& p, const TensorMap* map_k, const TensorMap* map_v, u32 shared) {
  const u32 lane = thread_index() % kWarpSize;
  UnitAt<C> unit(p, shared);
  for_each_unit<C>(p, [&](u32 which, u32 key, u32 keys, const Vec<u32, 4>& infos, const typename KeyWalk<C::kKeys>::Of& of) {
    mbarrier_wait(unit.empty(), unit.parity ^ 1);
    warp_sync();  // before what lets the phase go on: a lane that is late would wait for the one after
    if (lane == 0) {
      store_shared(unit.info(), infos);
      if (keys == 0) {
        mbarrier_arrive(unit.full());
      } else {
        const bool inlined = which == 0 ? !p.k_numbers_or_null : !p.v_numbers_or_null;
        const bool batched = which == 0 ? p.k_stride_batch != 0 : p.v_stride_batch != 0;
        mbarrier_arrive_expect(unit.full(), kUnitKeys * (C::kCodeBytes + (inlined ? 16 : 0)));
        const i32 from[4] = {0, static_cast<i32>(key), static_cast<i32>(of.kv_head), static_cast<i32>(batched ? of.batch : 0)};
        tensor_load(unit.codes(), which == 0 ? map_k : map_v, unit.full(), from);
      }
    }
    unit.advance();
  });
}

// Warp 1: numbers that are not in the slots. It is kLag units ahead of what it says has come.
template <typename C> NXS_DEVICE void stream_numbers(const ScaleKernelParams& p, u32 shared) {
  if (C::all_inline(p)) return;
  const u32 lane = thread_index() % kWarpSize, rows = static_cast<u32>(p.kv_rows);
  UnitAt<C> unit(p, shared), come(p, shared);
  int under_way = 0;
  const auto announce = [&] {
    warp_sync();
    if (lane == 0) mbarrier_arrive(come.full());
    come.advance();
    --under_way;
  };
  for_each_unit<C>(p, [&](u32 which, u32 key, u32 keys, const Vec<u32, 4>&, const typename KeyWalk<C::kKeys>::Of& of) {
    mbarrier_wait(unit.empty(), unit.parity ^ 1);
    warp_sync();
    const float* numbers = which == 0 ? p.k_numbers_or_null : p.v_numbers_or_null;
    if (numbers && keys > 0) {
      const i64 stride = which == 0 ? p.k_numbers_stride_row : p.v_numbers_stride_row;
      const float* from = numbers + of.batch * (which == 0 ? p.k_numbers_stride_batch : p.v_numbers_stride_batch) +
                          of.kv_head * (which == 0 ? p.k_numbers_stride_head : p.v_numbers_stride_head);
#pragma unroll
      for (u32 i = 0; i < kUnitKeys; i += kWarpSize) {
        const u32 row = i + lane;
        const bool there = row < keys && key + row < rows;
        copy_async<4 * C::kNumbers>(unit.codes() + kUnitKeys * C::kCodeBytes + row * (4 * C::kNumbers),
                                    there ? from + (static_cast<u64>(key) + row) * stride : numbers, there ? 4 * C::kNumbers : 0);
      }
    }
    copy_async_commit();
    unit.advance();
    if (++under_way > C::kLag) {
      copy_async_wait<C::kLag>();
      announce();
    }
  });
  copy_async_wait<0>();
  while (under_way > 0) announce();
}

// Of the pieces of a unit number `at`: its row, and which 16 bytes of it. Two pieces of fp8 that are 64 bytes apart land in the same
// banks of their blocks, as do two of 4 bits that are 32 bytes apart. So of eight threads those of one row have a block, those of
// the next rows the other.
template <typename C> NXS_DEVICE void piece_of(u32 at, u32& row, u32& piece) {
  if constexpr (C::kPieces == 8) {
    row = at / 16 * 2 + at / 4 % 2;
    piece = at % 4 + (at / 4 ^ at / 8) % 2 * 4;
  } else if constexpr (C::kPieces == 4 && C::kDim == 128) {
    row = at / 16 * 4 + at / 2 % 4;
    piece = at % 2 + (at / 4 ^ at / 8) % 2 * 2;
  } else {
    row = at / C::kPieces;
    piece = at % C::kPieces;
  }
}

// A warpgroup that unpacks.
template <typename T, typename C> struct Expander {
  const ScaleKernelParams& p;
  const u32 shared, number, thread, lane;  // of the expanders; within it
  UnitAt<C> unit;

  NXS_DEVICE Expander(const ScaleKernelParams& p_, u32 shared_, u32 number_)
      : p(p_), shared(shared_), number(number_), thread(thread_index() % kGroupThreads), lane(thread_index() % kWarpSize),
        unit(p_, shared_) {}

  // Lane 0 speaks for its warp.
  NXS_DEVICE void arrive(u32 barrier) const {
    warp_sync();
    if (lane == 0) mbarrier_arrive(barrier);
  }
  NXS_DEVICE static u32 place(u32 tile, u32 row, u32 eight) {
    return tile + eight / 8 * (C::kKeys * 128) + row * 128 + (eight ^ row) % 8 * 16;
  }
  // Rows `first` and up of a tile, from the unit at hand; those from `keys` on are zero.
  NXS_DEVICE void unpack(u32 tile, u32 first, u32 keys, bool inlined) const {
    constexpr u32 kAll = kUnitKeys * C::kPieces, kRounds = (kAll + kGroupThreads - 1) / kGroupThreads;
    const u32 codes = unit.codes(), pitch = C::kCodeBytes + (inlined ? 16 : 0);
    const u32 numbers = codes + (inlined ? C::kCodeBytes : kUnitKeys * C::kCodeBytes), next = inlined ? pitch : 4 * C::kNumbers;
#pragma unroll
    for (u32 i = 0; i < kRounds; ++i) {
      const u32 at = thread + i * kGroupThreads;
      if (kAll % kGroupThreads != 0 && at >= kAll) break;
      u32 row, piece;
      piece_of<C>(at, row, piece);
      const auto code = load_shared<Vec<u32, 4>>(codes + row * pitch + piece * 16);
      const auto of = load_row_numbers<C::kFormat>(numbers + row * next);
      const bool there = row < keys;
#pragma unroll
      for (u32 j = 0; j < C::kEights; ++j) {
        const auto value = eight_of<T, C::kFormat>(code, j, of);
        store_shared(place(tile, first + row, piece * C::kEights + j), there ? value : Vec<u32, 4>{});
      }
    }
  }
  // Rows that no unit came for.
  NXS_DEVICE void clear(u32 tile, u32 first) const {
#pragma unroll 1
    for (u32 i = thread; i < kUnitKeys * (C::kDim / 8); i += kGroupThreads)
      store_shared(place(tile, first + i / (C::kDim / 8), i % (C::kDim / 8)), Vec<u32, 4>{});
  }
  // K or V of a chunk, whose first unit is the one at hand; it has come, if `keys` says that there is one.
  NXS_DEVICE void take_tile(u32 tile, u32 keys, bool inlined, u32 full) {
#pragma unroll 1
    for (u32 first = 0; first < C::kKeys; first += kUnitKeys) {
      const bool mine = C::kExpanders == 1 || first / kUnitKeys % C::kExpanders == number;
      if (first < keys) {
        mbarrier_wait(unit.full(), unit.parity);
        if (mine) unpack(tile, first, keys - first, inlined);
        arrive(unit.empty());
        unit.advance();
      } else if (mine) {
        clear(tile, first);
      }
    }
    fence_async_shared();
    arrive(full);
  }

  NXS_DEVICE void run() {
    const u32 works = all_works(p);
    u32 chunk = 0;
    for (u32 n = 0; nth_work<1>(n) < works; ++n) {
      bool last = false;
      while (!last) {
        const u32 stage = stage_of<C::kStages>(chunk), parity = parity_of<C::kStages>(chunk) ^ 1;
        mbarrier_wait(unit.full(), unit.parity);
        const auto infos = load_shared<Vec<u32, 4>>(unit.info());
        const u32 keys = infos.data[0] & 0xffff;
        last = infos.data[0] & kChunkLast;
        mbarrier_wait(shared + C::kKEmpty + 8 * stage, parity);
        warp_sync();
        if (number == 0 && thread == 0)
#pragma unroll
          for (u32 g = 0; g < static_cast<u32>(C::kGroups); ++g)
            store_shared(shared + C::kInfo + (stage * C::kGroups + g) * static_cast<u32>(sizeof(ChunkInfo)),
                         ChunkInfo{infos.data[2 * g], infos.data[2 * g + 1]});
        const u32 k_full = shared + C::kKFull + 8 * stage, v_full = shared + C::kVFull + 8 * stage;
        if (keys == 0) {  // nothing to see; the unit said only that
          arrive(unit.empty());
          unit.advance();
          arrive(k_full);
        } else {
          take_tile(shared + C::kK + stage * C::kChunkBytes, keys, !p.k_numbers_or_null, k_full);
        }
        mbarrier_wait(shared + C::kVEmpty + 8 * stage, parity);
        if (keys == 0)
          arrive(v_full);
        else
          take_tile(shared + C::kV + stage * C::kChunkBytes, keys, !p.v_numbers_or_null, v_full);
        ++chunk;
      }
    }
  }
};

// In whose order of arguments the kernels of pairs in scale_attention_sm90.cuh and these differ, for the budgets.
template <typename T, int kFormat, int kDim, int kGroups>
__global__ void __launch_bounds__(PackedSm90<kFormat, kDim, kGroups>::kThreads, 1)
    scale_attention_packed_sm90_kernel(const __grid_constant__ ScaleKernelParams p, const __grid_constant__ TensorMap map_q,
                                       const __grid_constant__ TensorMap map_k, const __grid_constant__ TensorMap map_v,
                                       const __grid_constant__ TensorMap map_out) {
  // p.scale and p.logit_bound come times log2(e).
  using C = PackedSm90<kFormat, kDim, kGroups>;
  const u32 shared = dynamic_shared(), t = thread_index();
  if (t == 0) {
    prefetch_tensor_map(&map_q);
    prefetch_tensor_map(&map_k);
    prefetch_tensor_map(&map_v);
    prefetch_tensor_map(&map_out);
    for (u32 slot = 0; slot < C::kSlots; ++slot) {
      mbarrier_init(shared + C::kQFull + 8 * slot, 1);
      mbarrier_init(shared + C::kResults + 8 * slot, 4 * kGroups);  // consumer warps
      mbarrier_init(shared + C::kQEmpty + 8 * slot, 1);
    }
    for (u32 stage = 0; stage < C::kStages; ++stage) {
      mbarrier_init(shared + C::kKFull + 8 * stage, 4 * C::kExpanders);
      mbarrier_init(shared + C::kKEmpty + 8 * stage, 4 * kGroups);
      mbarrier_init(shared + C::kVFull + 8 * stage, 4 * C::kExpanders);
      mbarrier_init(shared + C::kVEmpty + 8 * stage, 4 * kGroups);
    }
    for (u32 slot = 0; slot < C::kMostUnits; ++slot) {
      mbarrier_init(shared + C::kUnitFull + 8 * slot, C::all_inline(p) ? 1 : 2);  // codes, numbers
      mbarrier_init(shared + C::kUnitEmpty + 8 * slot, 4 * C::kExpanders);
    }
    fence_mbarrier_init();
  }
  block_sync();
  const u32 group = t / kGroupThreads;
  if (group == 0) {
    lower_registers<40>();
    if (t < kWarpSize)
      stream_codes<C>(p, &map_k, &map_v, shared);
    else if (t < 2 * kWarpSize)
      stream_numbers<C>(p, shared);
    else if (t < 3 * kWarpSize)
      load_queries<T, C>(p, &map_q, shared);
    else
      write_results<T, C>(p, &map_out, shared);
  } else if (group <= C::kExpanders) {
    if constexpr (kGroups == 1) lower_registers<104>();
    if constexpr (kGroups == 2) lower_registers<64>();
    Expander<T, C>(p, shared, group - 1).run();
  } else {
    if constexpr (kGroups == 1) raise_registers<240>();
    if constexpr (kGroups == 2) raise_registers<200>();
    Consumer<T, C>(p, shared, group - 1 - C::kExpanders).run();
  }
}

template <typename T, int kFormat, int kDim, int kGroups>
nxs_status scale_attention_packed_sm90_launch(const ScaleParams& p, void* stream) {
  using C = PackedSm90<kFormat, kDim, kGroups>;
  TensorMap maps[4];
  const u64 slot_k = C::kCodeBytes + (p.k_numbers_or_null ? 0 : 16), slot_v = C::kCodeBytes + (p.v_numbers_or_null ? 0 : 16);
  const struct {
    const void* address;
    i64 row, head, batch, rows, heads;
    nxs_dtype dtype;
    u64 element, columns;  // bytes of an element, elements of a row
    u32 box_columns, box_rows;
  } views[4] = {
      {p.q, p.q_stride_row, p.q_stride_head, p.q_stride_batch, p.q_rows, p.heads, DType<T>::value, 2, kDim, 64, kTileRows},
      {p.k, p.k_stride_row, p.k_stride_head, p.k_stride_batch, p.kv_rows, p.kv_heads, NXS_U8, 1, slot_k, static_cast<u32>(slot_k),
       kUnitKeys},
      {p.v, p.v_stride_row, p.v_stride_head, p.v_stride_batch, p.kv_rows, p.kv_heads, NXS_U8, 1, slot_v, static_cast<u32>(slot_v),
       kUnitKeys},
      {p.out, p.out_stride_row, p.out_stride_head, p.out_stride_batch, p.rows, p.heads, DType<T>::value, 2, kDim, 64, 8},
  };
  for (int i = 0; i < 4; ++i) {
    TensorShape shape;
    shape.dtype = views[i].dtype;
    shape.rank = 4;
    // Without rows nothing is loaded; a map wants an address and sizes all the same.
    const bool none = views[i].rows == 0;
    shape.address = none ? p.q : views[i].address;
    shape.size[0] = views[i].columns;
    shape.size[1] = static_cast<u64>(none ? 1 : views[i].rows);
    shape.size[2] = static_cast<u64>(none ? 1 : views[i].heads);
    shape.size[3] = static_cast<u64>(!none && views[i].batch ? p.batch : 1);  // else all entries share the memory
    // A dimension of one element may have any stride; a map wants a valid one.
    const auto bytes = [&](i64 stride) { return stride ? static_cast<u64>(stride) * views[i].element : u64{16}; };
    shape.stride_bytes[0] = bytes(views[i].row);
    shape.stride_bytes[1] = bytes(views[i].head);
    shape.stride_bytes[2] = bytes(views[i].batch);
    shape.box[0] = views[i].box_columns;
    shape.box[1] = views[i].box_rows;
    shape.swizzle = views[i].element == 1 ? Swizzle::kNone : Swizzle::k128;
    NXS_TRY(encode_tensor_map(&maps[i], shape));
  }
  const auto kernel = scale_attention_packed_sm90_kernel<T, kFormat, kDim, kGroups>;
  NXS_TRY(allow_dynamic_smem(kernel));
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(p.blocks));
  shape.block = C::kThreads;
  shape.dynamic_smem = C::kSharedBytes;
  ScaleKernelParams base2(p);
  base2.scale *= kLog2E;
  base2.logit_bound *= kLog2E;
  return launch(kernel, shape, stream, base2, maps[0], maps[1], maps[2], maps[3]);
}

// One instantiation file for each dtype and dim: scale_attention_packed_sm90_<dtype>_d<dim>.cu.
template <typename T, int kDim> nxs_status scale_attention_packed_sm90(const ScaleParams& p, void* stream) {
  switch (p.kv_format * 4 + p.groups) {
    case NXS_KV_FP8 * 4 + 1: return scale_attention_packed_sm90_launch<T, NXS_KV_FP8, kDim, 1>(p, stream);
    case NXS_KV_FP8 * 4 + 2: return scale_attention_packed_sm90_launch<T, NXS_KV_FP8, kDim, 2>(p, stream);
    case NXS_KV_INT4 * 4 + 1: return scale_attention_packed_sm90_launch<T, NXS_KV_INT4, kDim, 1>(p, stream);
    case NXS_KV_INT4 * 4 + 2: return scale_attention_packed_sm90_launch<T, NXS_KV_INT4, kDim, 2>(p, stream);
    default: return NXS_E_UNSUPPORTED;
  }
}

}  // namespace nxs::attention
