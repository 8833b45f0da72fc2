// Scale attention over packed caches on Hopper: the consumers, queries and results of scale_attention_sm90.cuh, and before them
// warpgroups that write the tiles of K and V which those read.
//
//   out[b, i, h, :] = sum over visible j of softmax_j(scale * q . k_j) v_j, by the schedule of nextscale.h, where k and v are
//   what NXS_KV_FP8 or NXS_KV_INT4 stand for, rounded to T
//
// Grid       persistent, as in scale_attention_sm90.cuh.
// Block      a producer warpgroup, kGroups consumer warpgroups, and between them two warpgroups that unpack for one consumer, one
//            for two, none for three, for which there would be no registers. Of the producer, warp 0 streams units of 64 rows:
//            codes by TMA, and what the chunks are. Warp 1 copies the rows' numbers (cp.async) where they are not in the slots,
//            warp 2 loads q, warp 3 writes results. For three consumers warp 0 does both of the first, warp 1 both of the last,
//            and warps 2 and 3 unpack.
// Unpacking  a ring of units: K of a chunk, then V of it, then the next chunk. Two warpgroups have every other unit of a chunk
//            each; else all who unpack share each unit. A thread takes 16 bytes of codes to the 16 or 32 elements that the portable
//            kernel and nxs_unpack make of them, writes these to the swizzled tile, and fences: so each row is what it is in the
//            unpacked cache, and the result is that of scale_attention_sm90.cuh over it, bit for bit, where both are cut alike.
// Tails      rows beyond a chunk's last key are written as zeroes.
// Shared     as in scale_attention_sm90.cuh with two slots of q; then units [64 rows][bytes of a slot], and their numbers
//            [64 rows][n] f32; what a chunk is, for each unit.
// Banks      eight threads, which a store of 16 bytes each takes together, have pieces of all eight places of a swizzled row: see
//            piece_of.
// Bytes      q and out once; codes and numbers of K and V once for each item and head.
// FLOPs      4 * kDim * 64 * kKeys a tile and chunk; about 3 instructions an element to unpack, for all groups.
// Limits     dim = kDim; items of one or two tiles, of dim 64 also three; sm_90a.
#pragma once
#include <type_traits>

#include "attention/packed_values.cuh"
#include "attention/scale_attention_sm90.cuh"

namespace nxs::attention {

constexpr u32 kUnitKeys = 64;

template <int kFormat_, int kDim_, int kGroups_> struct PackedSm90 {
  static constexpr int kFormat = kFormat_, kDim = kDim_, kGroups = kGroups_, kPair = 1;
  static_assert(kGroups == 1 || kGroups == 2 || (kGroups == 3 && kDim == 64));
  static constexpr u32 kBlocks = (kDim + 63) / 64, kKeys = kChunk, kMaskWords = NXS_SCHEDULE_MASK_WORDS / kGroupThreads;
  static constexpr u32 kStages = kDim == 64 ? 4 : 2, kSlots = 2;
  static constexpr u32 kTileBytes = kBlocks * kTileRows * 128, kSlotBytes = kGroups * kTileBytes;
  static constexpr u32 kChunkBytes = kBlocks * kKeys * 128;
  static constexpr bool kTurns = kGroups > 1, kTight = kDim > 64 || kGroups != 2;
  // Who unpacks: teams of threads, in so many warpgroups of their own. One group waits for memory, with which unpacking has to keep
  // up; more need the registers.
  static constexpr u32 kTeams = kGroups == 1 ? 2 : 1, kTeam = kGroups == 3 ? 64 : kGroupThreads;
  static constexpr u32 kApart = kGroups == 3 ? 0 : kTeams, kUnpackWarps = kTeams * kTeam / kWarpSize;
  static constexpr u32 kThreads = kGroupThreads * (1 + kApart + kGroups);

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
      kUnitInfo = kLse + kSlots * kGroups * kTileRows * 4,          // of a unit: keys of its chunk and flags, masks of the groups
      kBarriers = kUnitInfo + kMostUnits * 16;
  static constexpr u32 kQFull = kBarriers, kResults = kQFull + 8 * kSlots, kQEmpty = kResults + 8 * kSlots,
                       kKFull = kQEmpty + 8 * kSlots, kKEmpty = kKFull + 8 * kStages, kVFull = kKEmpty + 8 * kStages,
                       kVEmpty = kVFull + 8 * kStages, kUnitFull = kVEmpty + 8 * kStages,
                       kUnitEmpty = kUnitFull + 8 * kMostUnits,
                       kRing = (kUnitEmpty + 8 * kMostUnits + 127) / 128 * 128;
  static constexpr u32 kMostShared = 232448;
  static constexpr u32 units(u32 bytes) {
    return (kMostShared - kRing) / bytes < kMostUnits ? (kMostShared - kRing) / bytes : kMostUnits;
  }
  static constexpr u32 kPlainUnits = units(kPlainUnit), kInlineUnits = units(kInlineUnit);
  static constexpr u32 kSharedBytes =
      kRing + (kPlainUnits * kPlainUnit > kInlineUnits * kInlineUnit ? kPlainUnits * kPlainUnit : kInlineUnits * kInlineUnit);
  // Units whose numbers are under way while those of one more are asked for: less than there are slots, or nothing would go on.
  static constexpr int kLag = (kPlainUnits < kInlineUnits + 1 ? kPlainUnits : kInlineUnits + 1) - 2;
  static_assert(kInlineUnits >= 3 && kPlainUnits >= 3 && kPlainUnit % 128 == 0 && kInlineUnit % 128 == 0);
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

// The numbers of a unit have come, in all lanes. Lane 1 says so: lane 0 has arrived for the codes.
template <typename C> NXS_DEVICE void announce_next(UnitAt<C>& unit, u32 lane) {
  warp_sync();
  if (lane == 1) mbarrier_arrive(unit.full());
  unit.advance();
}
// Units, in the order of their use: codes and what the chunks are, or numbers, or both. The warp says that numbers have come kLag
// units after it has asked for them.
template <typename C, bool kCodes, bool kNumbers>
NXS_DEVICE void stream_units(const ScaleKernelParams& p, const TensorMap* map_k, const TensorMap* map_v, u32 shared) {
  const u32 lane = thread_index() % kWarpSize, works = all_works(p);
  const bool apart = kNumbers && (p.k_numbers_or_null || p.v_numbers_or_null);
  if (!kCodes && !apart) return;
  UnitAt<C> unit(p, shared), come(p, shared);
  int under_way = 0;
  for (u32 n = 0;; ++n) {
    const u32 index = nth_work<1>(n);
    if (index >= works) break;
    typename KeyWalk<C::kKeys>::Of of;
    KeyWalk<C::kKeys> walk(p, work_at(p, index), of);
    u32 coming = walk.next(p, of);
    bool nothing = coming == 0;  // a work without keys still has one chunk, hidden from all, and a unit that says so
    while (coming > 0 || nothing) {
      const u32 first_key = walk.first_key(), all = coming;
      Vec<u32, 4> masks{};
      if (kCodes && !nothing) masks = walk.masks(p);
      coming = walk.next(p, of);
      const Vec<u32, 4> info{{all | (coming > 0 ? 0 : kChunkLast), masks.data[0], masks.data[1], masks.data[2]}};
      const u32 units = nothing ? 1 : (all + kUnitKeys - 1) / kUnitKeys;
#pragma unroll 1
      for (u32 i = 0; i < (nothing ? 1 : 2 * units); ++i) {
        const bool of_k = i < units;
        const u32 first = (of_k ? i : i - units) * kUnitKeys, key = first_key + first, keys = all - first;
        mbarrier_wait(unit.empty(), unit.parity ^ 1);
        warp_sync();  // before what lets the phase go on: a lane that is late would wait for the one after
        const float* numbers = of_k ? p.k_numbers_or_null : p.v_numbers_or_null;
        if (kCodes && lane == 0) {
          store_shared(unit.info(), info);
          if (nothing) {
            mbarrier_arrive(unit.full());
          } else {
            const bool batched = of_k ? p.k_stride_batch != 0 : p.v_stride_batch != 0;
            mbarrier_arrive_expect(unit.full(), kUnitKeys * (C::kCodeBytes + (numbers ? 0 : 16)));
            const i32 from[4] = {0, static_cast<i32>(key), static_cast<i32>(of.kv_head), static_cast<i32>(batched ? of.batch : 0)};
            tensor_load(unit.codes(), of_k ? map_k : map_v, unit.full(), from);
          }
        }
        if (apart) {
          if (numbers && !nothing) {
            const i64 stride = of_k ? p.k_numbers_stride_row : p.v_numbers_stride_row;
            const float* from = numbers + of.batch * (of_k ? p.k_numbers_stride_batch : p.v_numbers_stride_batch) +
                                of.kv_head * (of_k ? p.k_numbers_stride_head : p.v_numbers_stride_head);
#pragma unroll
            for (u32 j = 0; j < kUnitKeys; j += kWarpSize) {
              const u32 row = j + lane;
              const bool there = row < keys && static_cast<u64>(key) + row < static_cast<u64>(p.kv_rows);
              copy_async<4 * C::kNumbers>(unit.codes() + kUnitKeys * C::kCodeBytes + row * (4 * C::kNumbers),
                                          there ? from + (static_cast<u64>(key) + row) * stride : numbers,
                                          there ? 4 * C::kNumbers : 0);
            }
          }
          copy_async_commit();
          if (++under_way > C::kLag) {
            copy_async_wait<C::kLag>();
            announce_next(come, lane);
            --under_way;
          }
        }
        unit.advance();
      }
      nothing = false;
    }
  }
  copy_async_wait<0>();
  for (; under_way > 0; --under_way) announce_next(come, lane);
}

// Of the pieces of a unit number `at`: its row, and which 16 bytes of it. Eight threads access shared memory together. Where rows are
// not a power of two of bytes apart, they have the same piece of eight rows. Else they would read the same banks then, so they
// have all pieces of a row or of some; of dim 128 two pieces in different blocks land in the same banks, so that those of one
// row have a block, those of the next the other.
template <typename C, bool kInline> NXS_DEVICE void piece_of(u32 at, u32& row, u32& piece) {
  if constexpr (kInline || C::kDim == 96) {
    row = at % kUnitKeys;
    piece = at / kUnitKeys;
  } else if constexpr (C::kPieces == 8) {
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

// Who unpacks: one of `kTeams`.
template <typename T, typename C> struct Expander {
  const ScaleKernelParams& p;
  const u32 shared, team, thread, lane;
  UnitAt<C> unit;

  NXS_DEVICE Expander(const ScaleKernelParams& p_, u32 shared_, u32 team_, u32 thread_)
      : p(p_), shared(shared_), team(team_), thread(thread_), lane(thread_ % kWarpSize), unit(p_, shared_) {}

  // Lane 0 speaks for its warp.
  NXS_DEVICE void arrive(u32 barrier) const {
    warp_sync();
    if (lane == 0) mbarrier_arrive(barrier);
  }
  NXS_DEVICE static u32 place(u32 tile, u32 row, u32 eight) {
    return tile + eight / 8 * (C::kKeys * 128) + row * 128 + (eight ^ row) % 8 * 16;
  }
  // Rows `first` and up of a tile, from the unit at hand; those from `keys` on are zero.
  template <bool kInline> NXS_DEVICE void unpack(u32 tile, u32 first, u32 keys) const {
    constexpr bool kSameRow = kInline || C::kDim == 96;  // a thread's pieces are of one row, else the same piece of many
    constexpr u32 kRounds = (kUnitKeys * C::kPieces + C::kTeam - 1) / C::kTeam;
    [[maybe_unused]] constexpr u32 kUnroll = C::kApart == 0 ? 1 : kRounds;  // as far as registers go
    constexpr u32 kPitch = C::kCodeBytes + (kInline ? 16 : 0), kNext = kInline ? kPitch : 4 * C::kNumbers;
    const u32 numbers = unit.codes() + (kInline ? C::kCodeBytes : kUnitKeys * C::kCodeBytes);
    u32 row, piece;
    piece_of<C, kInline>(thread, row, piece);
    RowNumbers<C::kFormat> of{};
    if (kSameRow && row < keys) of = load_row_numbers<C::kFormat>(numbers + row * kNext);
#pragma unroll kUnroll
    for (u32 i = 0; i < kRounds; ++i) {
      const u32 this_row = kSameRow ? row : row + i * (C::kTeam / C::kPieces);
      const u32 this_piece = kSameRow ? piece + i * (C::kTeam / kUnitKeys) : piece;
      if (kSameRow && C::kPieces * kUnitKeys % C::kTeam != 0 && this_piece >= C::kPieces) break;
      auto code = load_shared<Vec<u32, 4>>(unit.codes() + this_row * kPitch + this_piece * 16);
      if (!kSameRow) of = load_row_numbers<C::kFormat>(numbers + this_row * kNext);
      if (this_row >= keys) code = {}, of = {};
#pragma unroll
      for (u32 j = 0; j < C::kEights; ++j)
        store_shared(place(tile, first + this_row, this_piece * C::kEights + j), eight_of<T, C::kFormat>(code, j, of));
    }
  }
  // Rows that no unit came for.
  NXS_DEVICE void clear(u32 tile, u32 first) const {
#pragma unroll 1
    for (u32 i = thread; i < kUnitKeys * (C::kDim / 8); i += C::kTeam)
      store_shared(place(tile, first + i / (C::kDim / 8), i % (C::kDim / 8)), Vec<u32, 4>{});
  }
  // K or V of a chunk of `keys` keys, whose first unit is the one at hand, if there are any.
  NXS_DEVICE void take_tile(u32 tile, u32 keys, bool inlined, u32 full) {
    if (keys > 0) {
#pragma unroll 1
      for (u32 first = 0; first < C::kKeys; first += kUnitKeys) {
        const bool mine = first / kUnitKeys % C::kTeams == team;
        if (first < keys) {
          mbarrier_wait(unit.full(), unit.parity);
          if (mine && inlined)
            unpack<true>(tile, first, keys - first);
          else if (mine)
            unpack<false>(tile, first, keys - first);
          arrive(unit.empty());
          unit.advance();
        } else if (mine) {
          clear(tile, first);
        }
      }
      fence_async_shared();
    }
    arrive(full);
  }

  NXS_DEVICE void run() {
    const u32 works = all_works(p);
    u32 chunk = 0;
    for (u32 n = 0; nth_work<1>(n) < works; ++n) {
      u32 keys;  // of the chunk, with its flags
      do {
        const u32 stage = stage_of<C::kStages>(chunk), parity = parity_of<C::kStages>(chunk) ^ 1;
        mbarrier_wait(unit.full(), unit.parity);
        const auto info = load_shared<Vec<u32, 4>>(unit.info());
        keys = info.data[0];
        mbarrier_wait(shared + C::kKEmpty + 8 * stage, parity);
        warp_sync();
        if (team == 0 && thread == 0)
#pragma unroll
          for (u32 g = 0; g < static_cast<u32>(C::kGroups); ++g) {
            const bool hidden = (keys & 0xffff) == 0 || info.data[1 + g] == NXS_MASK_HIDDEN;
            store_shared(shared + C::kInfo + (stage * C::kGroups + g) * static_cast<u32>(sizeof(ChunkInfo)),
                         ChunkInfo{keys | (hidden ? kChunkHidden : 0), hidden ? 0 : info.data[1 + g]});
          }
        if ((keys & 0xffff) == 0) {  // the unit said only that
          arrive(unit.empty());
          unit.advance();
        }
        take_tile(shared + C::kK + stage * C::kChunkBytes, keys & 0xffff, !p.k_numbers_or_null, shared + C::kKFull + 8 * stage);
        mbarrier_wait(shared + C::kVEmpty + 8 * stage, parity);
        take_tile(shared + C::kV + stage * C::kChunkBytes, keys & 0xffff, !p.v_numbers_or_null, shared + C::kVFull + 8 * stage);
        ++chunk;
      } while (!(keys & kChunkLast));
    }
  }
};

// The results of works done, then q of those to come, for which they make room.
template <typename T, typename C>
NXS_DEVICE void serve_slots(const ScaleKernelParams& p, const TensorMap* map_q, const TensorMap* map_out, u32 shared) {
  const u32 works = all_works(p);
#pragma unroll 1
  for (u32 n = 0; n < C::kSlots || nth_work<1>(n - C::kSlots) < works; ++n) {
    if (n >= C::kSlots) write_results<T, C, true>(p, map_out, shared, n - C::kSlots);
    load_queries<T, C, true>(p, map_q, shared, n);
  }
}

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
      mbarrier_init(shared + C::kKFull + 8 * stage, C::kUnpackWarps);
      mbarrier_init(shared + C::kKEmpty + 8 * stage, 4 * kGroups);
      mbarrier_init(shared + C::kVFull + 8 * stage, C::kUnpackWarps);
      mbarrier_init(shared + C::kVEmpty + 8 * stage, 4 * kGroups);
    }
    for (u32 slot = 0; slot < C::kMostUnits; ++slot) {
      mbarrier_init(shared + C::kUnitFull + 8 * slot, p.k_numbers_or_null || p.v_numbers_or_null ? 2 : 1);  // codes, numbers
      mbarrier_init(shared + C::kUnitEmpty + 8 * slot, C::kUnpackWarps);
    }
    fence_mbarrier_init();
  }
  block_sync();
  const u32 group = t / kGroupThreads;
  if (group == 0) {
    lower_registers<kGroups == 3 ? 32 : 56>();
    if constexpr (C::kApart > 0) {
      if (t < kWarpSize)
        stream_units<C, true, false>(p, &map_k, &map_v, shared);
      else if (t < 2 * kWarpSize)
        stream_units<C, false, true>(p, &map_k, &map_v, shared);
      else if (t < 3 * kWarpSize)
        load_queries<T, C>(p, &map_q, shared);
      else
        write_results<T, C>(p, &map_out, shared);
    } else {
      if (t < kWarpSize)
        stream_units<C, true, true>(p, &map_k, &map_v, shared);
      else if (t < 2 * kWarpSize)
        serve_slots<T, C>(p, &map_q, &map_out, shared);
      else
        Expander<T, C>(p, shared, 0, t - 2 * kWarpSize).run();
    }
  } else if (group <= C::kApart) {
    if constexpr (C::kApart > 0) {
      lower_registers<kGroups == 1 ? 104 : 40>();
      Expander<T, C>(p, shared, group - 1, t % kGroupThreads).run();
    }
  } else {
    raise_registers<kGroups == 1 ? 240 : kGroups == 2 ? 208 : 160>();
    Consumer<T, C>(p, shared, group - 1 - C::kApart).run();
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
  const auto of_format = [&](auto format) -> nxs_status {
    constexpr int kFormat = decltype(format)::value;
    switch (p.groups) {
      case 1: return scale_attention_packed_sm90_launch<T, kFormat, kDim, 1>(p, stream);
      case 2: return scale_attention_packed_sm90_launch<T, kFormat, kDim, 2>(p, stream);
      case 3:
        if constexpr (kDim == 64) return scale_attention_packed_sm90_launch<T, kFormat, kDim, 3>(p, stream);
      default: return NXS_E_UNSUPPORTED;
    }
  };
  if (p.kv_format == NXS_KV_FP8) return of_format(std::integral_constant<int, NXS_KV_FP8>{});
  return of_format(std::integral_constant<int, NXS_KV_INT4>{});
}

}  // namespace nxs::attention
