// Scale attention on Hopper: TMA, wgmma, warp specialisation.
//
//   out[b, i, h, :] = sum over visible j of softmax_j(scale * q . k_j) v_j, by the schedule of nextscale.h
//
// Grid       persistent: block c takes works c, then 2 G - 1 - c, 2 G + c, ... of the G blocks: back and forth, as works come
//            longest first. With kPair 2 a cluster of two blocks takes a work together, each its tiles of the item: each loads
//            half of every chunk, into both, for what L2 is read costs power, and power is what bounds the clock.
// Block      a producer warpgroup and kGroups consumer warpgroups. Of the producer, warp 0 streams the chunks of K and V (TMA,
//            kStages deep), warp 1 cleans the tails of V, warp 2 loads q tiles of works to come, warp 3 writes the results
//            of works done. Each consumer warpgroup owns a tile of 64 rows: S = Q K^T from shared memory, softmax in
//            registers, O += P V with P from registers. It leaves O where its q was.
// Overlap    the warpgroups take turns to issue S of a chunk and P V of the one before, so that one's exponentials run beside
//            another's products; also from one work to the next.
// Softmax    base 2, f32, relative to a reference that is the row's maximum at the time it was set, in the first chunk. It is
//            raised, and O rescaled, only when exponentials grow large: their sum tells, so that no maximum is taken. Then
//            the warp computes the chunk's logits again (mma.sync) and takes the maximum after all. A bound that the caller
//            vouches for may stand in for the first maximum.
// Masks      a chunk whose keys all rows see costs nothing; else a bit for each element of a thread, in the order of its accumulators. Of a
//            chunk of up to half the keys only half the exponentials are taken.
// Tails      the rows of V beyond a chunk's last key belong to others and may hold anything: they are overwritten with
//            zeroes before the consumers see them. K needs nothing, its logits are masked.
// Shared     q: kSlots slots of kGroups tiles [blocks of 64 columns][64 rows][128 B]; K and V: kStages chunks [blocks][kKeys][128 B];
//            all with the 128-byte swizzle.
// Bytes      q and out once; K and V once for each item and head, from L2 once a section's keys are there.
// FLOPs      4 * kDim * 64 * kKeys a tile and chunk.
// Limits     dim <= kDim, a multiple of 8; sm_90a.
#pragma once
#include "attention/scale_rows.cuh"
#include "common/ptx/async_copy.cuh"
#include "common/ptx/barrier.cuh"
#include "common/ptx/bulk.cuh"
#include "common/ptx/cluster.cuh"
#include "common/ptx/fence.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/math.cuh"
#include "common/ptx/matrix.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/shared.cuh"
#include "common/ptx/tensor_map.cuh"
#include "common/ptx/warp.cuh"
#include "common/ptx/wgmma.cuh"

namespace nxs::attention {

constexpr u32 kGroupThreads = 128;
// Where no maximum is taken: of a thread's sum of the exponentials of a row. None of them exceeds it then, nor what f16 can hold.
constexpr float kMostSum = 4096.0f;
// What the producer tells a consumer warpgroup of a chunk.
struct ChunkInfo {
  u32 keys;  // valid ones, with the flags below
  u32 mask;  // offset in the schedule, or 0
};
constexpr u32 kChunkHidden = 1u << 16, kChunkLast = 1u << 17;

// Use number `n` of a ring of kStages: its stage, and the parity that the consumer waits for; the producer
// waits for the other.
template <u32 kStages> NXS_DEVICE u32 stage_of(u32 n) { return n % kStages; }
template <u32 kStages> NXS_DEVICE u32 parity_of(u32 n) { return n / kStages & 1; }

template <int kDim_, int kGroups_, int kPair_> struct Sm90 {
  static constexpr int kDim = kDim_, kGroups = kGroups_, kPair = kPair_;
  static constexpr u32 kBlocks = (kDim + 63) / 64;  // columns of 64 elements
  // A wide chunk has more products to what a chunk costs besides; two slots of q are left beside it, so it is for long items.
  static constexpr u32 kKeys = kPair > 1 ? NXS_SCHEDULE_WIDE_CHUNK_KEYS : kChunk;
  static constexpr u32 kMaskWords = (kPair > 1 ? NXS_SCHEDULE_WIDE_MASK_WORDS : NXS_SCHEDULE_MASK_WORDS) / kGroupThreads;
  static constexpr u32 kStages = kDim == 64 ? 4 : 2;  // of K, and of V
  static constexpr u32 kTileBytes = kBlocks * kTileRows * 128;  // q of one group
  static constexpr u32 kSlotBytes = kGroups * kTileBytes;
  static constexpr u32 kChunkBytes = kBlocks * kKeys * 128;  // K or V of one chunk
  static constexpr u32 kThreads = kGroupThreads * (kGroups + 1);
  static constexpr bool kTurns = kGroups > 1;
  // Whether plain chunks have a loop of their own: measured, ptxas makes better code for two narrow tiles without.
  static constexpr bool kTight = kDim > 64 || kGroups != 2;
  static_assert(kPair == 1 || (kPair == 2 && kGroups == 2));  // an item has at most four tiles

  static constexpr u32 kSlots = kPair > 1 ? 2 : 3;
  static constexpr u32 kQ = 0, kK = kQ + kSlots * kSlotBytes, kV = kK + kStages * kChunkBytes,
                       kInfo = kV + kStages * kChunkBytes,
                       kHeader = (kInfo + kStages * kGroups * sizeof(ChunkInfo) + 15) / 16 * 16,
                       kHeaderBytes = (16 + 8 * kGroups + 15) / 16 * 16,
                       kInverse = kHeader + kSlots * kHeaderBytes,  // of the sums, f32 [kGroups][kTileRows]
      kLse = kInverse + kGroups * kTileRows * 4,                    // f32 [kSlots][kGroups][kTileRows]
      kBarriers = kLse + kSlots * kGroups * kTileRows * 4;
  // mbarriers, 8 bytes each. Of a slot: q has come; the results lie there; they are written, the slot is free.
  static constexpr u32 kQFull = kBarriers, kResults = kQFull + 8 * kSlots, kQEmpty = kResults + 8 * kSlots,
                       kKFull = kQEmpty + 8 * kSlots, kKEmpty = kKFull + 8 * kStages, kVFull = kKEmpty + 8 * kStages,
                       kVEmpty = kVFull + 8 * kStages, kTail = kVEmpty + 8 * kStages, kSharedBytes = kTail + 8 * kStages;
  static_assert(kSharedBytes <= 232448);
};

template <typename T, int kN, Major kMajorB, typename A>
NXS_DEVICE void multiply(float (&d)[kN / 2], const A& a, u64 b, bool accumulate) {
  if constexpr (DType<T>::value == NXS_BF16) {
    if constexpr (sizeof(A) == 8) wgmma_bf16<kN, Major::kK, kMajorB>(d, a, b, accumulate);
    else wgmma_bf16<kN, kMajorB>(d, a, b, accumulate);
  } else {
    if constexpr (sizeof(A) == 8) wgmma_f16<kN, Major::kK, kMajorB>(d, a, b, accumulate);
    else wgmma_f16<kN, kMajorB>(d, a, b, accumulate);
  }
}

// The n-th work of this block (of its pair), or one beyond the last.
template <int kPair> NXS_DEVICE u32 nth_work(u32 n) {
  const u32 grid = grid_size_x() / kPair, block = block_index_x() / kPair;
  return n * grid + (n & 1 ? grid - 1 - block : block);
}
// Which of the pair this is.
template <int kPair> NXS_DEVICE u32 rank_in_pair() { return kPair > 1 ? cluster_rank() : 0; }

// ---- producer

// V of this chunk has rows that belong to others and lie within the tensor; what lies beyond it comes as zero.
template <u32 kChunkKeys> NXS_DEVICE bool has_tail(const ScaleKernelParams& p, u32 key, u32 keys) {
  return keys < kChunkKeys && static_cast<u64>(key) + keys < static_cast<u64>(p.kv_rows);
}
// Warp 0: K and V.
template <int kDim, int kGroups, int kPair>
NXS_DEVICE void stream_chunks(const ScaleKernelParams& p, const TensorMap* map_k, const TensorMap* map_v, u32 shared) {
  using C = Sm90<kDim, kGroups, kPair>;
  const u32 lane = thread_index() % kWarpSize, works = all_works(p), rank = rank_in_pair<kPair>();
  // Of a pair each block loads its share of the rows, for both.
  constexpr u32 kShare = C::kKeys / kPair;
  const auto load = [&](u32 to, const TensorMap* map, u32 barrier, u32 key, u32 kv_head, u32 batch) {
#pragma unroll
    for (u32 block = 0; block < C::kBlocks; ++block) {
      const u32 at = to + (block * C::kKeys + rank * kShare) * 128;
      const i32 from[4] = {static_cast<i32>(block * 64), static_cast<i32>(key + rank * kShare), static_cast<i32>(kv_head),
                           static_cast<i32>(batch)};
      if constexpr (kPair == 1)
        tensor_load(at, map, barrier, from);
      else
        tensor_load_multicast(at, map, barrier, from, static_cast<u16>((1 << kPair) - 1));
    }
  };
  const auto wait_empty = [&](u32 barrier, u32 parity) {
    mbarrier_wait(barrier, parity);
    warp_sync();  // before what lets the phase go on: a lane that is late would wait for the one after
  };
  u32 chunk = 0;
  for (u32 n = 0;; ++n) {
    const u32 index = nth_work<kPair>(n);
    if (index >= works) break;
    typename KeyWalk<C::kKeys>::Of of;
    KeyWalk<C::kKeys> walk(p, work_at(p, index), of);
    u32 coming = walk.next(p, of);
    bool nothing = coming == 0;  // a work without keys still has one chunk, hidden from all
    while (coming > 0 || nothing) {
      const u32 stage = stage_of<C::kStages>(chunk), parity = parity_of<C::kStages>(chunk) ^ 1;
      const u32 k_full = shared + C::kKFull + 8 * stage, v_full = shared + C::kVFull + 8 * stage;
      const u32 key = walk.first_key(), keys = coming;
      const Vec<u32, 4> masks = nothing ? Vec<u32, 4>{} : walk.masks(p);
      u32 mask[kGroups];
#pragma unroll
      for (u32 g = 0; g < kGroups; ++g) mask[g] = rank == 0 ? masks.data[g] : masks.data[(kGroups + g) % 4];
      coming = walk.next(p, of);

      wait_empty(shared + C::kKEmpty + 8 * stage, parity);
      if (lane == 0) {
#pragma unroll
        for (u32 g = 0; g < kGroups; ++g) {
          const bool hidden = nothing || mask[g] == NXS_MASK_HIDDEN;
          ChunkInfo info;
          info.keys = keys | (hidden ? kChunkHidden : 0) | (coming > 0 ? 0 : kChunkLast);
          info.mask = hidden ? 0 : mask[g];
          store_shared(shared + C::kInfo + (stage * kGroups + g) * static_cast<u32>(sizeof(ChunkInfo)), info);
        }
        if (nothing) {
          mbarrier_arrive(k_full);
        } else {
          mbarrier_arrive_expect(k_full, C::kChunkBytes);
          load(shared + C::kK + stage * C::kChunkBytes, map_k, k_full, key, of.kv_head, p.k_stride_batch ? of.batch : 0);
        }
      }
      const bool tail = !nothing && has_tail<C::kKeys>(p, key, keys);
      wait_empty(shared + C::kVEmpty + 8 * stage, parity);
      if (lane == 0) {
        if (nothing) {
          mbarrier_arrive(v_full);
        } else {
          const u32 loaded = tail ? shared + C::kTail + 8 * stage : v_full;
          mbarrier_arrive_expect(loaded, C::kChunkBytes);
          load(shared + C::kV + stage * C::kChunkBytes, map_v, loaded, key, of.kv_head, p.v_stride_batch ? of.batch : 0);
          if (tail) mbarrier_arrive(v_full);
        }
      }
      if (lane == 1 && !tail) mbarrier_arrive(v_full);  // nothing to clean
      nothing = false;
      ++chunk;
    }
  }
}

// Warp 1: zeroes where V of a chunk is not its own. Walks as warp 0 does.
template <int kDim, int kGroups, int kPair> NXS_DEVICE void clean_tails(const ScaleKernelParams& p, u32 shared) {
  using C = Sm90<kDim, kGroups, kPair>;
  const u32 lane = thread_index() % kWarpSize, works = all_works(p);
  u32 chunk = 0, parities = 0;  // a bit for each stage
  for (u32 n = 0;; ++n) {
    const u32 index = nth_work<kPair>(n);
    if (index >= works) break;
    const Work work = work_at(p, index);
    typename KeyWalk<C::kKeys>::Of of;
    KeyWalk<C::kKeys> walk(p, work, of);
    const u32 before = chunk;
    for (u32 keys; (keys = walk.next(p, of)) > 0; ++chunk) {
      const u32 stage = stage_of<C::kStages>(chunk);
      if (!has_tail<C::kKeys>(p, walk.first_key(), keys)) continue;
      mbarrier_wait(shared + C::kTail + 8 * stage, parities >> stage & 1);
      parities ^= 1u << stage;
      const u32 tile = shared + C::kV + stage * C::kChunkBytes;
      for (u32 i = keys * 8 + lane; i < C::kKeys * 8; i += kWarpSize)
#pragma unroll
        for (u32 block = 0; block < C::kBlocks; ++block) store_shared(tile + block * C::kKeys * 128 + i * 16, Vec<u32, 4>{});
      fence_async_shared();
      warp_sync();
      if (lane == 0) mbarrier_arrive(shared + C::kVFull + 8 * stage);
    }
    if (chunk == before) ++chunk;
  }
}

// Warp 2: q of works to come, and headers that tell what the slots hold; or of the block's work number `first` alone.
template <typename T, typename C, bool kOne = false>
NXS_DEVICE void load_queries(const ScaleKernelParams& p, const TensorMap* map_q, u32 shared, u32 first = 0) {
  constexpr int kDim = C::kDim, kGroups = C::kGroups, kPair = C::kPair;
  constexpr u32 kPieces = kDim / 8;  // of 16 bytes, in a row
  const u32 lane = thread_index() % kWarpSize, works = all_works(p);
  for (u32 n = first;; ++n) {
    const u32 index = nth_work<kPair>(n);
    if (index >= works) break;
    const Work work = work_at(p, index);
    const u32 slot = stage_of<C::kSlots>(n), header = shared + C::kHeader + slot * C::kHeaderBytes;
    const u32 full = shared + C::kQFull + 8 * slot, tiles = shared + C::kQ + slot * C::kSlotBytes;
    const Vec<u32, 4> item = p.words(work.item), tile01 = p.words(work.item + 4 + 4 * rank_in_pair<kPair>());
    const Vec<u32, 4> tile2 = kGroups > 2 ? p.words(work.item + 8) : Vec<u32, 4>{};
    const bool ours = item.data[3] == p.digest;  // else nothing is read or written
    mbarrier_wait(shared + C::kQEmpty + 8 * slot, parity_of<C::kSlots>(n) ^ 1);
    warp_sync();
    const bool plain = p.pack <= 1 && !p.row_index_or_null;
    if (lane == 0) {
      store_shared(header, Vec<u32, 4>{{work.batch, work.head, item.data[2], 0}});
      if (plain) mbarrier_expect(full, C::kSlotBytes);
    }
#pragma unroll
    for (u32 g = 0; g < kGroups; ++g) {
      const Vec<u32, 4>& pair = g < 2 ? tile01 : tile2;
      Vec<u32, 2> tile{{pair.data[g % 2 * 2], pair.data[g % 2 * 2 + 1]}};
      if (!ours) tile.data[1] = 0;
      const u32 to = tiles + g * C::kTileBytes;
      if (lane == 0) store_shared(header + 16 + 8 * g, tile);
      if (plain) {
        // Rows beyond the tile's are loaded too, and lead to nothing.
        if (lane == 0)
#pragma unroll
          for (u32 block = 0; block < C::kBlocks; ++block)
            tensor_load(to + block * kTileRows * 128, map_q, full,
                        {static_cast<i32>(block * 64), static_cast<i32>(ours ? tile.data[0] : 0), static_cast<i32>(work.head),
                         static_cast<i32>(p.q_stride_batch ? work.batch : 0)});
        continue;
      }
#pragma unroll 1
      for (u32 i = lane; i < kTileRows * kPieces; i += kWarpSize) {
        const u32 row = i / kPieces, piece = i % kPieces;
        const bool valid = row < tile.data[1] && piece * 8 < static_cast<u32>(p.dim);
        const T* from = static_cast<const T*>(p.q);
        if (valid) from = query_at<T>(p, work.batch, row_at(p, work.head, tile.data[0] + row)) + piece * 8;
        const u32 address = to + piece / 8 * (kTileRows * 128) + row * 128 + piece % 8 * 16;
        copy_async<16>(swizzled(address, Swizzle::k128), from, valid ? 16 : 0);
      }
    }
    if (!plain) {
      copy_async_commit();
      copy_async_wait<0>();
      fence_async_shared();
      warp_sync();
    }
    if (lane == 0) mbarrier_arrive(full);
    if constexpr (kOne) break;
  }
}

// Warp 3: the results that the consumers left in a slot; or of the block's work number `first` alone. Parts they have written
// themselves.
template <typename T, typename C, bool kOne = false>
NXS_DEVICE void write_results(const ScaleKernelParams& p, const TensorMap* map_out, u32 shared, u32 first = 0) {
  constexpr int kDim = C::kDim, kGroups = C::kGroups, kPair = C::kPair;
  const u32 lane = thread_index() % kWarpSize, works = all_works(p);
  // The items may have come with the params, but masks did not.
  const bool ours = load_global_nc(p.schedule + 3) == p.digest;
  for (u32 n = first; nth_work<kPair>(n) < works; ++n) {
    const u32 slot = stage_of<C::kSlots>(n), header = shared + C::kHeader + slot * C::kHeaderBytes;
    mbarrier_wait(shared + C::kResults + 8 * slot, parity_of<C::kSlots>(n));
    const Vec<u32, 4> work = load_shared<Vec<u32, 4>>(header);
    const u32 batch = work.data[0], head = work.data[1], split = work.data[2];
#pragma unroll 1
    for (u32 g = 0; g < kGroups; ++g) {
      Vec<u32, 2> tile = load_shared<Vec<u32, 2>>(header + 16 + 8 * g);
      if (!ours) tile.data[1] = 0;
      if (p.splits > 1 || p.lse_or_null)
#pragma unroll 1
        for (u32 row = lane; row < tile.data[1]; row += kWarpSize) {
          const RowAt at = row_at(p, head, tile.data[0] + row);
          store_lse(p, split, batch, at,
                    load_shared<float>(shared + C::kLse + ((slot * kGroups + g) * kTileRows + row) * 4));
        }
      if (p.splits > 1) continue;
      const u32 from = shared + C::kQ + slot * C::kSlotBytes + g * C::kTileBytes;
      // Eight rows a copy; the rest, and packed heads, in pieces of 16 bytes.
      const u32 eights = p.pack <= 1 ? tile.data[1] / 8 : 0;
      if (lane < eights)
#pragma unroll
        for (u32 block = 0; block < C::kBlocks; ++block)
          tensor_store(map_out, from + block * kTileRows * 128 + lane * 1024,
                       {static_cast<i32>(block * 64), static_cast<i32>(tile.data[0] + lane * 8), static_cast<i32>(head),
                        static_cast<i32>(batch)});
#pragma unroll 1
      for (u32 i = eights * kDim + lane; i < tile.data[1] * (kDim / 8); i += kWarpSize) {
        const u32 row = i / (kDim / 8), piece = i % (kDim / 8);
        if (piece * 8 >= static_cast<u32>(p.dim)) continue;
        const RowAt at = row_at(p, head, tile.data[0] + row);
        const u32 address = from + piece / 8 * (kTileRows * 128) + row * 128 + piece % 8 * 16;
        T* out = static_cast<T*>(p.out) + batch * p.out_stride_batch + at.row * p.out_stride_row + at.head * p.out_stride_head;
        store_global(reinterpret_cast<Vec<u32, 4>*>(out + piece * 8),
                     load_shared<Vec<u32, 4>>(swizzled(address, Swizzle::k128)));
      }
    }
    bulk_commit();
    bulk_wait_read<0>();
    fence_async_shared();  // q comes next by TMA
    warp_sync();
    if (lane == 0) mbarrier_arrive(shared + C::kQEmpty + 8 * slot);
    if constexpr (kOne) break;
  }
}

// ---- consumer: one warpgroup, one tile of 64 rows at a time

template <typename T, typename C> struct Consumer {
  static constexpr int kDim = C::kDim, kGroups = C::kGroups, kPair = C::kPair;

  const ScaleKernelParams& p;
  const u32 shared, group, warp, lane;
  u32 work = 0;          // works begun
  u32 chunk = 0;         // chunks whose K was released
  ChunkInfo info;        // of that one
  bool owed = false;     // P V of the chunk before is still to come, with `prob`
  bool settled = false;  // all rows of the warp have a reference
  u64 q_operand;         // q of the work at hand

  float o[kDim / 2];
  float s[C::kKeys / 2];
  u32 prob[C::kKeys / 16][4];            // P, as the A operand of P V
  float reference[2], sum[2], grow[2];  // of the thread's two rows: base-2 reference, sum, factor of the last rescale

  NXS_DEVICE Consumer(const ScaleKernelParams& p_, u32 shared_, u32 group_)
      : p(p_), shared(shared_), group(group_), warp(thread_index() % kGroupThreads / kWarpSize),
        lane(thread_index() % kWarpSize) {}

  NXS_DEVICE u32 slot() const { return stage_of<C::kSlots>(work); }
  NXS_DEVICE u32 slot_before() const { return stage_of<C::kSlots>(work + C::kSlots - 1); }
  NXS_DEVICE u32 stage() const { return stage_of<C::kStages>(chunk); }
  NXS_DEVICE bool hidden() const { return info.keys & kChunkHidden; }
  NXS_DEVICE bool last() const { return info.keys & kChunkLast; }
  NXS_DEVICE u32 q_tile(u32 of_slot) const { return shared + C::kQ + of_slot * C::kSlotBytes + group * C::kTileBytes; }

  NXS_DEVICE void turn_begin() const {
    if constexpr (C::kTurns) barrier_sync(1 + group, 2 * kGroupThreads);
  }
  NXS_DEVICE void turn_end() const {
    if constexpr (C::kTurns) barrier_arrive(1 + (group + 1) % kGroups, 2 * kGroupThreads);
  }
  // Lane 0 speaks for its warp.
  NXS_DEVICE void release(u32 barrier) const {
    warp_sync();
    if (lane == 0) mbarrier_arrive(barrier);
  }

  // Waits for K of the next chunk, and learns what the chunk is.
  NXS_DEVICE void wait_chunk() {
    mbarrier_wait(shared + C::kKFull + 8 * stage(), parity_of<C::kStages>(chunk));
    info = info_of(chunk);
  }
  NXS_DEVICE bool chunk_is_there(u32 of_chunk) const {
    return mbarrier_test_wait(shared + C::kKFull + 8 * stage_of<C::kStages>(of_chunk), parity_of<C::kStages>(of_chunk));
  }
  NXS_DEVICE ChunkInfo info_of(u32 of_chunk) const {
    const u32 place = stage_of<C::kStages>(of_chunk) * kGroups + group;
    return load_shared<ChunkInfo>(shared + C::kInfo + place * static_cast<u32>(sizeof(ChunkInfo)));
  }
  // A stage of K or V is free when the consumers of every block of the cluster have left it.
  NXS_DEVICE void release_stage(u32 barrier) const {
    warp_sync();
    if constexpr (kPair == 1) {
      if (lane == 0) mbarrier_arrive(barrier);
    } else {
      if (lane < kPair) mbarrier_arrive_read(map_to_rank(barrier, lane));
    }
  }
  NXS_DEVICE u32 v_empty(u32 of_chunk) const { return shared + C::kVEmpty + 8 * stage_of<C::kStages>(of_chunk); }
  NXS_DEVICE void release_keys() {
    release_stage(shared + C::kKEmpty + 8 * stage());
    ++chunk;
  }
  // V of the chunk before, whose K was released.
  NXS_DEVICE void wait_values() const {
    mbarrier_wait(shared + C::kVFull + 8 * stage_of<C::kStages>(chunk - 1), parity_of<C::kStages>(chunk - 1));
  }
  // Passes over a chunk of which this group sees nothing. No P V is owed: its V might be in the way of this one's.
  NXS_DEVICE void skip_chunk() {
    turn_begin();
    turn_end();
    release_keys();
    wait_values();
    release_stage(v_empty(chunk - 1));
  }

  // S = Q K^T
  NXS_DEVICE void start_logits() {
    keep_registers(s);
    const u64 b = matrix_descriptor(shared + C::kK + stage() * C::kChunkBytes, 16, 1024, Swizzle::k128);
    wgmma_fence();
#pragma unroll
    for (u32 i = 0; i < kDim / 16; ++i) {
      const u32 block = i / 4, within = i % 4 * 32;
      multiply<T, C::kKeys, Major::kK>(s, advanced(q_operand, block * kTileRows * 128 + within), advanced(b, block * C::kKeys * 128 + within),
                                     i != 0);
    }
    wgmma_commit();
  }
  // O += P V
  NXS_DEVICE void start_sum() {
    wait_values();
    const u64 b = matrix_descriptor(shared + C::kV + stage_of<C::kStages>(chunk - 1) * C::kChunkBytes, C::kKeys * 128, 1024, Swizzle::k128);
    wgmma_fence();
#pragma unroll
    for (u32 i = 0; i < C::kKeys / 16; ++i) multiply<T, kDim, Major::kMN>(o, prob[i], advanced(b, i * 2048), true);
    wgmma_commit();
  }

  // Logits that are not to be seen become -inf.
  NXS_DEVICE void mask_logits(bool half, const Vec<u32, C::kMaskWords>& bits) {
    if (info.mask != 0) {
      const auto mask = [&](u32 first) {
#pragma unroll
        for (u32 i = first; i < first + C::kKeys / 4; ++i)
          if (!(bits.data[i / 32] & 1u << i % 32)) s[i] = kNothing;
      };
      mask(0);
      if (!half) mask(C::kKeys / 4);
    }
    const i32 left = static_cast<i32>(info.keys & 0xffff) - static_cast<i32>(2 * (lane % 4));
    const auto mask = [&](u32 first) {
#pragma unroll
      for (u32 j = 0; j < C::kKeys / 4; ++j)
        if (left <= static_cast<i32>(8 * ((first + j) / 4) + j % 2)) s[first + j] = kNothing;
    };
    if (half)
      mask(0);
    else
      mask(C::kKeys / 4);  // more than half are left
  }

  // The maximum of each row decides of its reference; `forced` rows take it even if it grew little.
  template <bool kForced> NXS_DEVICE void take_maximum(bool starts, bool half, const bool (&forced)[2]) {
    float most[2][2] = {{s[0], s[1]}, {s[2], s[3]}};
    const auto look = [&](u32 first) {
#pragma unroll
      for (u32 j = 0; j < C::kKeys / 4; j += 4)
#pragma unroll
        for (u32 r = 0; r < 2; ++r)
#pragma unroll
          for (u32 e = 0; e < 2; ++e) most[r][e] = fmaxf(most[r][e], s[first + j + 2 * r + e]);
    };
    look(0);
    if (!half) look(C::kKeys / 4);
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
      float all = fmaxf(most[r][0], most[r][1]);
      all = fmaxf(all, shuffle_xor(all, 1));
      all = fmaxf(all, shuffle_xor(all, 2)) * p.scale;
      const float before = starts ? kNothing : reference[r];
      const bool grows = kForced ? forced[r] : all > before + kLazyRescale;
      reference[r] = grows ? all : before;
      grow[r] = grows ? exp2_approx(before - all) : 1.0f;
      sum[r] = starts ? 0.0f : sum[r] * grow[r];
    }
  }
  // Exponentials of a quarter of the thread's logits, or more, in place; adds them to `part`, [row][even or odd].
  NXS_DEVICE void exponentiate(u32 first, u32 count, float (&part)[2][2]) {
    const float shift[2] = {reference[0] == kNothing ? 0.0f : reference[0], reference[1] == kNothing ? 0.0f : reference[1]};
#pragma unroll
    for (u32 j = first; j < first + count; j += 4)
#pragma unroll
      for (u32 r = 0; r < 2; ++r)
#pragma unroll
        for (u32 e = 0; e < 2; ++e) {
          float& x = s[j + 2 * r + e];
          x = exp2_approx(fma(x, p.scale, -shift[r]));
          part[r][e] += x;
        }
  }
  NXS_DEVICE void exponentiate(bool half, float (&add)[2]) {
    float part[2][2] = {};
    exponentiate(0, C::kKeys / 4, part);
    if (!half) exponentiate(C::kKeys / 4, C::kKeys / 4, part);
    add[0] = part[0][0] + part[0][1];
    add[1] = part[1][0] + part[1][1];
  }
  // The chunk's logits again, by mma.sync, each warp for itself.
  NXS_DEVICE void logits_again() {
    const u32 q = q_tile(slot()) + (warp * 16 + lane % 16) * 128 + lane / 16 * 16;
    const u32 keys = shared + C::kK + stage() * C::kChunkBytes + (lane % 8 + lane / 16 * 8) * 128 + lane / 8 % 2 * 16;
#pragma unroll
    for (u32 i = 0; i < C::kKeys / 2; ++i) s[i] = 0;
#pragma unroll
    for (u32 step = 0; step < kDim / 16; ++step) {
      u32 a[4];
      load_matrix(a, swizzled(q + step / 4 * (kTileRows * 128) + step % 4 * 32, Swizzle::k128));
#pragma unroll
      for (u32 n = 0; n < C::kKeys / 16; ++n) {
        u32 b[4];
        load_matrix(b, swizzled(keys + step / 4 * (C::kKeys * 128) + step % 4 * 32 + n * 16 * 128, Swizzle::k128));
        multiply_again(reinterpret_cast<float(&)[4]>(s[8 * n]), a, b[0], b[1]);
        multiply_again(reinterpret_cast<float(&)[4]>(s[8 * n + 4]), a, b[2], b[3]);
      }
    }
  }
  NXS_DEVICE static void multiply_again(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if constexpr (DType<T>::value == NXS_BF16) mma_bf16(d, a, b0, b1);
    else mma_f16(d, a, b0, b1);
  }

  // Of a chunk that all rows see whole, to the rounded probabilities; returns whether O has to be rescaled. On the way it
  // waits for the P V under way, whose last products are done while the first exponentials are taken.
  NXS_DEVICE bool softmax_plain() {
    const bool before = settled;
    bool raised = false;
    if (__builtin_expect(!before, 0)) {
      take_maximum<false>(false, false, {});
      settle();
      raised = warp_any(grow[0] != 1.0f || grow[1] != 1.0f);
    }
    float part[2][2] = {};
    exponentiate(0, C::kKeys / 4, part);
    // With three groups a look at the sums keeps ptxas from taking these exponentials behind the wait.
    bool large = false;
    if constexpr (kGroups == 3) large = warp_any(fmaxf(part[0][0], part[1][0]) > kMostSum);
    keep_registers(s);
    wgmma_wait<0>();
    keep_registers(o);
    keep_registers(s);  // so that nothing is written to P before
    release_stage(v_empty(chunk - 1));
    round_half(0);
    exponentiate(C::kKeys / 4, C::kKeys / 4, part);
    round_half(C::kKeys / 8);
    float add[2] = {part[0][0] + part[0][1], part[1][0] + part[1][1]};
    bool over[2] = {add[0] > kMostSum, add[1] > kMostSum};
    if (__builtin_expect(before && (large || warp_any(over[0] || over[1])), 0)) {
      // Each row by its own logits alone: a neighbour's do not change its result.
#pragma unroll
      for (u32 r = 0; r < 2; ++r) over[r] = warp_ballot(over[r]) >> (lane & ~3u) & 15;
      logits_again();
      take_maximum<true>(false, false, over);
      exponentiate(false, add);
      round_probabilities(false);
      raised = true;
    }
    sum[0] += add[0];
    sum[1] += add[1];
    return raised;
  }
  // Masks the logits of any chunk, and lets their maximum, or a bound, decide of the reference.
  NXS_DEVICE void set_reference(bool starts, bool half, const Vec<u32, C::kMaskWords>& bits) {
    if (!plain()) mask_logits(half, bits);
    if (starts && p.logit_bound > 0) {
#pragma unroll
      for (u32 r = 0; r < 2; ++r) reference[r] = p.logit_bound, sum[r] = 0, grow[r] = 1;
    } else {
      take_maximum<false>(starts, half, {});
    }
    settle();
  }
  NXS_DEVICE void settle() { settled = !warp_any(reference[0] == kNothing || reference[1] == kNothing); }
  NXS_DEVICE void rescale() {
#pragma unroll
    for (u32 i = 0; i < kDim / 2; ++i) o[i] *= grow[i / 2 % 2];
  }
  NXS_DEVICE void round_half(u32 first) {
#pragma unroll
    for (u32 i = first; i < first + C::kKeys / 8; ++i) prob[i / 4][i % 4] = round_pair<T>(s[2 * i], s[2 * i + 1]);
  }
  NXS_DEVICE void round_probabilities(bool half) {
    round_half(0);
    if (half)
#pragma unroll
      for (u32 i = C::kKeys / 8; i < C::kKeys / 4; ++i) prob[i / 4][i % 4] = 0;
    else
      round_half(C::kKeys / 8);
  }

  // Logits and exponentials of the chunk at hand, beside the P V that is owed; this chunk's P V is owed then.
  NXS_DEVICE void take_chunk(bool starts) {
    const bool half = (info.keys & 0xffff) <= C::kKeys / 2;
    Vec<u32, C::kMaskWords> bits{};
    if (info.mask != 0)
      bits = load_global_nc(reinterpret_cast<const Vec<u32, C::kMaskWords>*>(p.schedule + info.mask) +
                            thread_index() % kGroupThreads);
    turn_begin();
    start_logits();
    if (owed) {
      start_sum();
      turn_end();
      wgmma_wait<1>();
    } else {
      turn_end();
      wgmma_wait<0>();
    }
    keep_registers(s);
    const bool ends = last();
    release_keys();
    if (starts && owed) close_sums(slot_before());
    set_reference(starts, half, bits);
    float add[2];
    exponentiate(half, add);
    sum[0] += add[0];
    sum[1] += add[1];
    keep_registers(s);
    if (!ends) wait_chunk();
    wgmma_wait<0>();
    keep_registers(o);
    if (owed) {
      release_stage(v_empty(chunk - 2));
      if (starts)
        leave_tile(slot_before());
      else
        rescale();
    }
    round_probabilities(half);
    owed = true;
  }
  // The same for a chunk that all rows see whole and that starts no work: where the time goes.
  NXS_DEVICE void take_plain_chunk(bool ends) {
    turn_begin();
    start_logits();
    start_sum();
    turn_end();
    // What the next chunk is is mostly known by now: then it need not be waited for later.
    ChunkInfo next{};
    const bool known = !ends && chunk_is_there(chunk + 1);
    if (known) next = info_of(chunk + 1);
    wgmma_wait<1>();
    keep_registers(s);
    const bool raised = softmax_plain();
    release_keys();  // not before: the logits may be needed again
    if (known)
      info = next;
    else if (!ends)
      wait_chunk();
    if (__builtin_expect(raised, 0)) rescale();
  }
  NXS_DEVICE bool plain() const { return info.mask == 0 && (info.keys & 0x1ffff) == C::kKeys; }
  // The P V that is owed to the work in `of_slot`, without another chunk beside it.
  NXS_DEVICE void pay(u32 of_slot) {
    if (!owed) return;
    keep_registers(o);
    start_sum();
    wgmma_wait<0>();
    keep_registers(o);
    release_stage(v_empty(chunk - 1));
    close_sums(of_slot);
    warp_sync();
    leave_tile(of_slot);
    owed = false;
  }

  // The sums of the owed work are whole: log-sum-exp, and what O has to be multiplied by.
  NXS_DEVICE void close_sums(u32 of_slot) {
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
      float total = sum[r];
      total += shuffle_xor(total, 1);
      total += shuffle_xor(total, 2);
      const bool none = total == 0;
      if (lane % 4 == 0) {
        store_shared(inverse_at(r), none ? 0.0f : reciprocal_approx(total));
        store_shared(lse_at(of_slot, r), lse_of(reference[r], total));
      }
    }
  }
  NXS_DEVICE u32 row_in_tile(u32 r) const { return warp * 16 + lane / 4 + 8 * r; }
  NXS_DEVICE u32 inverse_at(u32 r) const { return shared + C::kInverse + (group * kTileRows + row_in_tile(r)) * 4; }
  NXS_DEVICE u32 lse_at(u32 of_slot, u32 r) const {
    return shared + C::kLse + ((of_slot * kGroups + group) * kTileRows + row_in_tile(r)) * 4;
  }
  // Leaves O of the owed work where its q was, for the producer to write, and begins a new one. Parts go to memory at once.
  NXS_DEVICE void leave_tile(u32 of_slot) {
    const float inverse[2] = {load_shared<float>(inverse_at(0)), load_shared<float>(inverse_at(1))};
    if (p.splits > 1) {
      write_part(of_slot, inverse);
    } else {
      // Products of the other warps may still read the tile.
      barrier_sync(1 + kGroups + group, kGroupThreads);
      const u32 mine = q_tile(of_slot) + (warp * 16 + lane % 16) * 128 + lane / 16 * 16;
#pragma unroll
      for (u32 i = 0; i < kDim / 16; ++i) {
        u32 registers[4];
#pragma unroll
        for (u32 j = 0; j < 4; ++j)
          registers[j] = round_pair<T>(o[8 * i + 2 * j] * inverse[j % 2], o[8 * i + 2 * j + 1] * inverse[j % 2]);
        store_matrix(registers, swizzled(mine + i / 4 * (kTileRows * 128) + i % 4 * 32, Swizzle::k128));
      }
      fence_async_shared();
    }
    release(shared + C::kResults + 8 * of_slot);
#pragma unroll
    for (u32 i = 0; i < kDim / 2; ++i) o[i] = 0;
  }
  NXS_DEVICE void write_part(u32 of_slot, const float (&inverse)[2]) {
    const u32 header = shared + C::kHeader + of_slot * C::kHeaderBytes;
    const Vec<u32, 4> work = load_shared<Vec<u32, 4>>(header);
    const Vec<u32, 2> tile = load_shared<Vec<u32, 2>>(header + 16 + 8 * group);
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
      if (row_in_tile(r) >= tile.data[1]) continue;
      const RowAt at = row_at(p, work.data[1], tile.data[0] + row_in_tile(r));
      store_part<kDim>(p, work.data[2], work.data[0], at, [&](u32 i) { return o[2 * i + 2 * r - i % 2] * inverse[r]; });
    }
  }
  // The tile in `slot` sees nothing: zeroes, and -inf, which keeps parts from being read.
  NXS_DEVICE void leave_nothing() {
    for (u32 r = 0; r < 2; ++r)
      if (lane % 4 == 0) store_shared(lse_at(slot(), r), float{kNothing});
    barrier_sync(1 + kGroups + group, kGroupThreads);
    for (u32 i = thread_index() % kGroupThreads; i < C::kTileBytes / 16; i += kGroupThreads)
      store_shared(q_tile(slot()) + i * 16, Vec<u32, 4>{});
    fence_async_shared();
    release(shared + C::kResults + 8 * slot());
  }

  NXS_DEVICE void run() {
    if constexpr (C::kTurns)
      if (group == kGroups - 1) barrier_arrive(1, 2 * kGroupThreads);  // the first turn is group 0's
#pragma unroll
    for (u32 i = 0; i < kDim / 2; ++i) o[i] = 0;
    const u32 works = all_works(p);
    for (; nth_work<kPair>(work) < works; ++work) {
      mbarrier_wait(shared + C::kQFull + 8 * slot(), parity_of<C::kSlots>(work));
      q_operand = matrix_descriptor(q_tile(slot()), 16, 1024, Swizzle::k128);
      wait_chunk();
      bool starts = true, ends = false;
      do {
        ends = last();
        if (hidden()) {  // before the first visible chunk, or after the last
          pay(starts ? slot_before() : slot());
          skip_chunk();
          if (!ends) wait_chunk();
        } else if (starts || !plain()) {
          take_chunk(starts);
          starts = false;
        } else {
          do {
            ends = last();
            take_plain_chunk(ends);
          } while (C::kTight && !ends && plain());
        }
      } while (!ends);
      if (starts) leave_nothing();
    }
    pay(slot_before());
    if constexpr (C::kTurns)
      if (group == 0) barrier_sync(1, 2 * kGroupThreads);  // absorbs the last arrival
  }
};

template <typename T, int kDim, int kGroups, int kPair>
__global__ void __launch_bounds__(Sm90<kDim, kGroups, kPair>::kThreads, 1)
    scale_attention_sm90_kernel(const __grid_constant__ ScaleKernelParams p, const __grid_constant__ TensorMap map_q,
                                const __grid_constant__ TensorMap map_k, const __grid_constant__ TensorMap map_v,
                                const __grid_constant__ TensorMap map_out) {
  // p.scale and p.logit_bound come times log2(e).
  using C = Sm90<kDim, kGroups, kPair>;
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
      mbarrier_init(shared + C::kKFull + 8 * stage, 1);
      mbarrier_init(shared + C::kKEmpty + 8 * stage, 4 * kGroups * kPair);
    }
    for (u32 stage = 0; stage < C::kStages; ++stage) {
      mbarrier_init(shared + C::kVFull + 8 * stage, 2);  // the copy, and that nothing of it is left to clean
      mbarrier_init(shared + C::kVEmpty + 8 * stage, 4 * kGroups * kPair);
      mbarrier_init(shared + C::kTail + 8 * stage, 1);
    }
    fence_mbarrier_init();
  }
  if constexpr (kPair > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    block_sync();
  }
  if (t < kGroupThreads) {
    if constexpr (kGroups == 2) lower_registers<kPair == 1 ? 56 : 40>();
    if constexpr (kGroups == 3) lower_registers<32>();
    if (t < kWarpSize)
      stream_chunks<kDim, kGroups, kPair>(p, &map_k, &map_v, shared);
    else if (t < 2 * kWarpSize)
      clean_tails<kDim, kGroups, kPair>(p, shared);
    else if (t < 3 * kWarpSize)
      load_queries<T, C>(p, &map_q, shared);
    else
      write_results<T, C>(p, &map_out, shared);
  } else {
    if constexpr (kGroups == 2) raise_registers<kPair == 1 ? 224 : 232>();
    if constexpr (kGroups == 3) raise_registers<160>();
    Consumer<T, C>(p, shared, t / kGroupThreads - 1).run();
  }
  if constexpr (kPair > 1) {  // the other block may still copy to this one and arrive here
    warp_sync();
    cluster_arrive();
    cluster_wait();
  }
}

template <typename T, int kDim, int kGroups, int kPair> nxs_status scale_attention_sm90_launch(const ScaleParams& p, void* stream) {
  using C = Sm90<kDim, kGroups, kPair>;
  TensorMap maps[4];
  const struct {
    const void* address;
    i64 row, head, batch, rows, heads;
    u32 box_rows;
  } views[4] = {
      {p.q, p.q_stride_row, p.q_stride_head, p.q_stride_batch, p.q_rows, p.heads, kTileRows},
      {p.k, p.k_stride_row, p.k_stride_head, p.k_stride_batch, p.kv_rows, p.kv_heads, C::kKeys / kPair},
      {p.v, p.v_stride_row, p.v_stride_head, p.v_stride_batch, p.kv_rows, p.kv_heads, C::kKeys / kPair},
      {p.out, p.out_stride_row, p.out_stride_head, p.out_stride_batch, p.rows, p.heads, 8},
  };
  for (int i = 0; i < 4; ++i) {
    TensorShape shape;
    shape.dtype = DType<T>::value;
    shape.rank = 4;
    // Without rows nothing is loaded; a map wants an address and sizes all the same.
    const bool none = views[i].rows == 0;
    shape.address = none ? p.q : views[i].address;
    shape.size[0] = static_cast<u64>(p.dim);
    shape.size[1] = static_cast<u64>(none ? 1 : views[i].rows);
    shape.size[2] = static_cast<u64>(none ? 1 : views[i].heads);
    shape.size[3] = static_cast<u64>(!none && views[i].batch ? p.batch : 1);  // else all entries share the memory
    // A dimension of one element may have any stride; a map wants a valid one.
    const auto bytes = [](i64 stride) { return static_cast<u64>(stride ? stride : 8) * sizeof(T); };
    shape.stride_bytes[0] = bytes(views[i].row);
    shape.stride_bytes[1] = bytes(views[i].head);
    shape.stride_bytes[2] = bytes(views[i].batch);
    shape.box[0] = 64;
    shape.box[1] = views[i].box_rows;
    shape.swizzle = Swizzle::k128;
    NXS_TRY(encode_tensor_map(&maps[i], shape));
  }
  const auto kernel = scale_attention_sm90_kernel<T, kDim, kGroups, kPair>;
  NXS_TRY(allow_dynamic_smem(kernel));
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(p.blocks));
  shape.block = C::kThreads;
  shape.dynamic_smem = C::kSharedBytes;
  shape.cluster = kPair;
  ScaleKernelParams base2(p);
  base2.scale *= kLog2E;
  base2.logit_bound *= kLog2E;
  return launch(kernel, shape, stream, base2, maps[0], maps[1], maps[2], maps[3]);
}

// One instantiation file for each dtype and dim (scale_attention_sm90_<dtype>_d<dim>.cu) picks the rest.
template <typename T, int kDim> nxs_status scale_attention_sm90(const ScaleParams& p, void* stream);

}  // namespace nxs::attention
