// Scale attention on Hopper: TMA, wgmma, warp specialisation.
//
//   out[b, i, h, :] = sum over visible j of softmax_j(scale * q . k_j) v_j, by the schedule of nextscale.h
//
// Grid       persistent: block c takes works c, then 2 G - 1 - c, 2 G + c, ... of the G blocks: back and forth, as works come
//            longest first.
// Block      a producer warpgroup and kGroups consumer warpgroups. Warp 0 streams the chunks of K and V (TMA, kStages
//            deep); warps 1 to 3 load the q tiles of the next work while this one is computed. Each consumer warpgroup owns
//            a tile of 64 rows: S = Q K^T from shared memory, softmax in registers, O += P V with P from registers.
// Overlap    S of the next chunk and P V of the last are in flight while the exponentials of a chunk are computed; and the
//            warpgroups take turns to issue, so that one's exponentials run beside another's products.
// Softmax    base 2, f32. The row's reference is its maximum at the last time that it grew by more than 2^8 (then O is
//            rescaled), or a bound that the caller vouches for.
// Masks      a chunk whose keys all rows see costs nothing; else 64 bits a thread, in the order of its accumulators.
// Tails      the rows of V beyond a chunk's last key belong to others and may hold anything: warp 0 overwrites them with
//            zeroes before the consumers see them. K needs nothing, its logits are masked.
// Shared     q: 2 slots of kGroups tiles [blocks of 64 columns][64 rows][128 B]; K and V: kStages chunks [blocks][128][128 B];
//            all with the 128-byte swizzle.
// Bytes      q and out once; K and V once for each item and head, from L2 once a section's keys are there.
// FLOPs      4 * kDim * 64 * 128 a tile and chunk.
// Limits     dim <= kDim, a multiple of 8; sm_90a.
#pragma once
#include "attention/scale_schedule.cuh"
#include "common/ptx/async_copy.cuh"
#include "common/ptx/barrier.cuh"
#include "common/ptx/fence.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/math.cuh"
#include "common/ptx/mbarrier.cuh"
#include "common/ptx/shared.cuh"
#include "common/ptx/tensor_map.cuh"
#include "common/ptx/warp.cuh"
#include "common/ptx/wgmma.cuh"

namespace nxs::attention {

constexpr u32 kGroupThreads = 128;
constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;
// Log2 of how far a row's sum may run ahead of its reference before O is rescaled: P stays below 2^8, exact in both types.
constexpr float kLazyRescale = 8.0f;
// A row with no visible key yet.
constexpr float kNothing = -__builtin_huge_valf();

// What the producer tells a consumer warpgroup of a chunk.
struct ChunkInfo {
  u32 keys;  // valid ones, with the flags below
  u32 mask;  // offset in the schedule, or 0
};
constexpr u32 kChunkHidden = 1u << 16, kChunkLast = 1u << 17;

template <int kDim, int kGroups> struct Sm90 {
  static constexpr u32 kBlocks = (kDim + 63) / 64;                 // columns of 64 elements
  static constexpr u32 kStages = kDim == 64 ? 4 : 2;
  static constexpr u32 kTileBytes = kBlocks * kTileRows * 128;     // q of one group
  static constexpr u32 kSlotBytes = kGroups * kTileBytes;
  static constexpr u32 kChunkBytes = kBlocks * kChunk * 128;       // K or V of one chunk
  static constexpr u32 kThreads = kGroupThreads * (kGroups + 1);
  static constexpr bool kTurns = kGroups > 1;

  static constexpr u32 kQ = 0, kK = kQ + 2 * kSlotBytes, kV = kK + kStages * kChunkBytes,
                       kInfo = kV + kStages * kChunkBytes, kHeader = kInfo + kStages * kGroups * sizeof(ChunkInfo),
                       kHeaderBytes = 16 + 8 * kGroups, kBarriers = (kHeader + 2 * kHeaderBytes + 7) / 8 * 8;
  // mbarriers, 8 bytes each
  static constexpr u32 kQFull = kBarriers, kQEmpty = kQFull + 16, kKFull = kQEmpty + 16, kKEmpty = kKFull + 8 * kStages,
                       kVFull = kKEmpty + 8 * kStages, kVEmpty = kVFull + 8 * kStages, kTail = kVEmpty + 8 * kStages,
                       kSharedBytes = kTail + 8;
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

template <typename T> NXS_DEVICE u32 round_pair(float low, float high) {
  return DType<T>::value == NXS_BF16 ? f32x2_to_bf16x2_bits(low, high) : f32x2_to_f16x2_bits(low, high);
}

// The n-th work of this block, or one beyond the last.
NXS_DEVICE u32 nth_work(u32 n) {
  const u32 grid = grid_size_x();
  return n * grid + (n & 1 ? grid - 1 - block_index_x() : block_index_x());
}
NXS_DEVICE u32 all_works(const ScaleParams& p) {
  return static_cast<u32>(p.items) * static_cast<u32>(p.batch) * static_cast<u32>(p.pack > 1 ? p.kv_heads : p.heads);
}

// A row of a work's tile in the tensors of the call.
struct RowAt {
  u32 row, head;
};
NXS_DEVICE RowAt row_at(const ScaleParams& p, u32 head, u32 row) {
  if (p.pack <= 1) return {row, head};
  const u32 pack = static_cast<u32>(p.pack), token = row / pack;
  return {token, head * pack + row - token * pack};
}

// ---- producer: K and V, by one warp

template <int kDim, int kGroups>
NXS_DEVICE void stream_chunks(const ScaleParams& p, const TensorMap* map_k, const TensorMap* map_v, u32 shared) {
  using C = Sm90<kDim, kGroups>;
  const u32 lane = thread_index() % kWarpSize;
  u32 use = 0, tails = 0;
  u32 tail_stage = C::kStages, tail_keys = 0;  // V of a chunk that still has to be cleaned; kStages: none

  const auto clean_tail = [&] {
    if (tail_stage == C::kStages) return;
    mbarrier_wait(shared + C::kTail, tails++ & 1);
    const u32 tile = shared + C::kV + tail_stage * C::kChunkBytes;
    for (u32 i = tail_keys * 8 + lane; i < kChunk * 8; i += kWarpSize)
      for (u32 block = 0; block < C::kBlocks; ++block)
        store_shared(tile + block * kChunk * 128 + i * 16, Vec<u32, 4>{});
    fence_async_shared();
    warp_sync();
    if (lane == 1) mbarrier_arrive(shared + C::kVFull + 8 * tail_stage);
    tail_stage = C::kStages;
  };

  const u32 works = all_works(p);
  for (u32 n = 0; n * grid_size_x() < works; ++n) {
    const u32 index = nth_work(n);
    if (index >= works) continue;
    const Work work = work_at(p, index);
    const i32 kv_head = static_cast<i32>(kv_head_of(p, work));
    const i32 batch_k = p.k_stride_batch ? static_cast<i32>(work.batch) : 0,
              batch_v = p.v_stride_batch ? static_cast<i32>(work.batch) : 0;
    const u32 offset = p.kv_offset_or_null ? static_cast<u32>(load_global_nc(p.kv_offset_or_null + work.batch)) : 0;
    ChunkWalk walk(p, work);
    bool more = walk.next();
    bool nothing = !more;
    while (more || nothing) {
      const u32 stage = use % C::kStages, parity = (use / C::kStages & 1) ^ 1;
      const u32 k_full = shared + C::kKFull + 8 * stage, v_full = shared + C::kVFull + 8 * stage;
      const u32 key = nothing ? 0 : walk.first_key() + offset, keys = nothing ? 0 : walk.count();
      u32 mask[kGroups];
#pragma unroll
      for (u32 g = 0; g < kGroups; ++g) mask[g] = nothing ? NXS_MASK_HIDDEN : walk.mask(g);
      more = !nothing && walk.next();

      mbarrier_wait(shared + C::kKEmpty + 8 * stage, parity);
      if (lane == 0) {
#pragma unroll
        for (u32 g = 0; g < kGroups; ++g) {
          ChunkInfo info;
          info.keys = keys | (mask[g] == NXS_MASK_HIDDEN ? kChunkHidden : 0) | (more ? 0 : kChunkLast);
          info.mask = mask[g] == NXS_MASK_HIDDEN ? 0 : mask[g];
          store_shared(shared + C::kInfo + (stage * kGroups + g) * static_cast<u32>(sizeof(ChunkInfo)), info);
        }
        if (nothing) {
          mbarrier_arrive(k_full);
        } else {
          mbarrier_arrive_expect(k_full, C::kChunkBytes);
#pragma unroll
          for (u32 block = 0; block < C::kBlocks; ++block)
            tensor_load(shared + C::kK + stage * C::kChunkBytes + block * kChunk * 128, map_k, k_full,
                        {static_cast<i32>(block * 64), static_cast<i32>(key), kv_head, batch_k});
        }
      }
      // What lies beyond the end of the tensor is zero already.
      const bool tail = !nothing && keys < kChunk && key + keys < static_cast<u64>(p.kv_rows);
      if (tail) clean_tail();
      mbarrier_wait(shared + C::kVEmpty + 8 * stage, parity);
      if (nothing) {
        if (lane < 2) mbarrier_arrive(v_full);
      } else {
        const u32 loaded = tail ? shared + C::kTail : v_full;
        if (lane == 0) {
          mbarrier_arrive_expect(loaded, C::kChunkBytes);
#pragma unroll
          for (u32 block = 0; block < C::kBlocks; ++block)
            tensor_load(shared + C::kV + stage * C::kChunkBytes + block * kChunk * 128, map_v, loaded,
                        {static_cast<i32>(block * 64), static_cast<i32>(key), kv_head, batch_v});
          if (tail) mbarrier_arrive(v_full);
        }
        if (!tail && lane == 1) mbarrier_arrive(v_full);
      }
      // Only now: the loads of this chunk are under way while that of the last one is waited for.
      if (!tail) clean_tail();
      if (tail) tail_stage = stage, tail_keys = keys;
      nothing = false;
      ++use;
    }
  }
  clean_tail();
}

// ---- producer: q, by three warps

template <typename T, int kDim, int kGroups> NXS_DEVICE void load_queries(const ScaleParams& p, u32 shared) {
  using C = Sm90<kDim, kGroups>;
  constexpr u32 kThreads = 3 * kWarpSize, kPieces = kDim / 8;  // of 16 bytes, in a row
  const u32 t = thread_index() - kWarpSize, lane = t % kWarpSize;
  const u32 works = all_works(p);
  u32 turn = 0;
  for (u32 n = 0; n * grid_size_x() < works; ++n) {
    const u32 index = nth_work(n);
    if (index >= works) continue;
    const Work work = work_at(p, index);
    const u32 slot = turn & 1, to = shared + C::kQ + slot * C::kSlotBytes, header = shared + C::kHeader + slot * C::kHeaderBytes;
    Vec<u32, 2> tile[kGroups];  // first row and rows
#pragma unroll
    for (u32 g = 0; g < kGroups; ++g)
      tile[g] = load_global_nc(reinterpret_cast<const Vec<u32, 2>*>(p.schedule + work.item + 4 + 2 * g));
    const Vec<u32, 4> item = load_global_nc(reinterpret_cast<const Vec<u32, 4>*>(p.schedule + work.item));
#pragma unroll
    for (u32 g = 0; g < kGroups; ++g)
      if (item.data[3] != p.digest) tile[g].data[1] = 0;  // of another schedule: nothing is read or written
    mbarrier_wait(shared + C::kQEmpty + 8 * slot, (turn / 2 & 1) ^ 1);
    if (t == 0) {
      store_shared(header, Vec<u32, 4>{{work.batch, work.head, item.data[2], 0}});
#pragma unroll
      for (u32 g = 0; g < kGroups; ++g) store_shared(header + 16 + 8 * g, tile[g]);
    }
    const T* q = static_cast<const T*>(p.q) + work.batch * p.q_stride_batch;
#pragma unroll
    for (u32 g = 0; g < kGroups; ++g) {
      for (u32 i = t; i < kTileRows * kPieces; i += kThreads) {
        const u32 row = i / kPieces, piece = i % kPieces;
        const bool valid = row < tile[g].data[1] && piece * 8 < static_cast<u32>(p.dim);
        const T* from = q;
        if (valid) {
          const RowAt at = row_at(p, work.head, tile[g].data[0] + row);
          i64 source = at.row;
          if (p.row_index_or_null) {
            source = load_global_nc(p.row_index_or_null + work.batch * p.row_index_stride_batch + at.row);
            source = source < 0 ? 0 : source < p.q_rows ? source : p.q_rows - 1;
          }
          from += source * p.q_stride_row + at.head * p.q_stride_head + piece * 8;
        }
        const u32 plain = to + g * C::kTileBytes + piece / 8 * (kTileRows * 128) + row * 128 + piece % 8 * 16;
        copy_async<16>(swizzled(plain, Swizzle::k128), from, valid ? 16 : 0);
      }
    }
    copy_async_commit();
    copy_async_wait<0>();
    fence_async_shared();
    warp_sync();
    if (lane == 0) mbarrier_arrive(shared + C::kQFull + 8 * slot);
    ++turn;
  }
}

// ---- consumer: one warpgroup, one tile of 64 rows

template <typename T, int kDim, int kGroups, bool kBounded> struct Consumer {
  using C = Sm90<kDim, kGroups>;

  const ScaleParams& p;
  const u32 shared, group, warp, lane;
  const float scale2;                 // of the logits, for base 2
  u32 use = 0;                        // chunks of the stream so far
  ChunkInfo info;                     // of chunk `use`

  float o[kDim / 2];
  float s[kChunk / 2];
  u32 prob[kChunk / 16][4];           // P, as the A operand of P V
  float reference[2], sum[2], grow[2];  // of the thread's two rows: base-2 reference, sum, factor of the last rescale

  NXS_DEVICE Consumer(const ScaleParams& p_, u32 shared_, u32 group_)
      : p(p_), shared(shared_), group(group_), warp(thread_index() % kGroupThreads / kWarpSize),
        lane(thread_index() % kWarpSize), scale2(p_.scale * kLog2E) {}

  NXS_DEVICE u32 stage() const { return use % C::kStages; }
  NXS_DEVICE u32 parity() const { return use / C::kStages & 1; }
  NXS_DEVICE bool hidden() const { return info.keys & kChunkHidden; }
  NXS_DEVICE bool last() const { return info.keys & kChunkLast; }

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

  // Waits for K of chunk `use`, and learns what the chunk is.
  NXS_DEVICE void wait_chunk() {
    mbarrier_wait(shared + C::kKFull + 8 * stage(), parity());
    info = load_shared<ChunkInfo>(shared + C::kInfo + (stage() * kGroups + group) * static_cast<u32>(sizeof(ChunkInfo)));
  }
  // Passes over a chunk of which this group sees nothing.
  NXS_DEVICE void skip_chunk() {
    turn_begin();
    turn_end();
    release(shared + C::kKEmpty + 8 * stage());
    mbarrier_wait(shared + C::kVFull + 8 * stage(), parity());
    release(shared + C::kVEmpty + 8 * stage());
    ++use;
  }

  // S = Q K^T of the chunk in `at`.
  NXS_DEVICE void start_logits(u32 q_tile, u32 at) {
    const u64 a = matrix_descriptor(q_tile, 16, 1024, Swizzle::k128);
    const u64 b = matrix_descriptor(shared + C::kK + at * C::kChunkBytes, 16, 1024, Swizzle::k128);
    wgmma_fence();
#pragma unroll
    for (u32 k = 0; k < kDim / 16; ++k) {
      const u32 block = k / 4, within = k % 4 * 32;
      const u64 step_a = (block * kTileRows * 128 + within) >> 4, step_b = (block * kChunk * 128 + within) >> 4;
      multiply<T, kChunk, Major::kK>(s, a + step_a, b + step_b, k != 0);
    }
    wgmma_commit();
  }
  // O += P V of the chunk in `at`.
  NXS_DEVICE void start_sum(u32 at, bool accumulate) {
    const u64 b = matrix_descriptor(shared + C::kV + at * C::kChunkBytes, kChunk * 128, 1024, Swizzle::k128);
    wgmma_fence();
#pragma unroll
    for (u32 k = 0; k < kChunk / 16; ++k) multiply<T, kDim, Major::kMN>(o, prob[k], b + (k * 2048 >> 4), accumulate || k != 0);
    wgmma_commit();
  }

  // Logits that are not to be seen become -inf.
  NXS_DEVICE void mask_logits(const ChunkInfo& chunk) {
    u64 bits = ~u64{0};
    if (chunk.mask)
      bits = load_global_nc(reinterpret_cast<const u64*>(p.schedule + chunk.mask) + thread_index() % kGroupThreads);
    const u32 keys = chunk.keys & 0xffff;
#pragma unroll
    for (u32 i = 0; i < kChunk / 2; ++i) {
      const u32 key = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
      if (!(bits >> i & 1) || key >= keys) s[i] = kNothing;
    }
  }

  // Exponentials of S in place; references and sums follow.
  NXS_DEVICE void exponentiate(bool first) {
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
      if constexpr (kBounded) {
        if (first) sum[r] = 0;
      } else {
        float most = s[2 * r];
#pragma unroll
        for (u32 i = 2 * r; i < kChunk / 2; i += 4) most = fmaxf(most, fmaxf(s[i], s[i + 1]));
        most = fmaxf(most, shuffle_xor(most, 1));
        most = fmaxf(most, shuffle_xor(most, 2)) * scale2;
        const float before = first ? kNothing : reference[r];
        const bool grows = most > before + kLazyRescale;
        // A row that has seen nothing keeps 0: its exponentials are 2^(-inf).
        reference[r] = grows ? most : before;
        grow[r] = grows ? exp2_approx(before - most) : 1.0f;
        sum[r] = first ? 0.0f : sum[r] * grow[r];
      }
      const float shift = reference[r] == kNothing ? 0.0f : reference[r];
      float add = 0;
#pragma unroll
      for (u32 i = 2 * r; i < kChunk / 2; i += 4) {
        s[i] = exp2_approx(fma(s[i], scale2, -shift));
        s[i + 1] = exp2_approx(fma(s[i + 1], scale2, -shift));
        add += s[i] + s[i + 1];
      }
      sum[r] += add;
    }
  }
  NXS_DEVICE void softmax(bool first) {
    if (info.mask != 0 || (info.keys & 0xffff) < kChunk) mask_logits(info);
    exponentiate(first);
  }
  NXS_DEVICE void rescale() {
    if constexpr (!kBounded) {
      if (warp_any(grow[0] != 1.0f || grow[1] != 1.0f))
#pragma unroll
        for (u32 i = 0; i < kDim / 2; ++i) o[i] *= grow[i / 2 % 2];
    }
  }
  NXS_DEVICE void round_probabilities() {
#pragma unroll
    for (u32 i = 0; i < kChunk / 4; ++i) prob[i / 4][i % 4] = round_pair<T>(s[2 * i], s[2 * i + 1]);
  }

  // All chunks of one work. False: no row of the tile sees anything.
  NXS_DEVICE bool attend(u32 q_tile) {
    wait_chunk();
    while (hidden()) {
      const bool end = last();
      skip_chunk();
      if (end) return false;
      wait_chunk();
    }
    if constexpr (kBounded) reference[0] = reference[1] = p.logit_bound * kLog2E;
    turn_begin();
    start_logits(q_tile, stage());
    turn_end();
    wgmma_wait<0>();
    keep_registers(s);
    release(shared + C::kKEmpty + 8 * stage());
    softmax(true);
    round_probabilities();
    u32 value_stage = stage(), value_parity = parity();  // of the chunk whose P V is to come
    bool end = last(), accumulate = false;
    ++use;
    if (!end) wait_chunk();
    while (!end && !hidden()) {
      turn_begin();
      keep_registers(s);
      start_logits(q_tile, stage());
      mbarrier_wait(shared + C::kVFull + 8 * value_stage, value_parity);
      start_sum(value_stage, accumulate);
      turn_end();
      wgmma_wait<1>();
      keep_registers(s);
      release(shared + C::kKEmpty + 8 * stage());
      softmax(false);
      keep_registers(s);
      const u32 done = value_stage;
      value_stage = stage(), value_parity = parity();
      end = last();
      ++use;
      if (!end) wait_chunk();  // also keeps the compiler from moving the wait below above the exponentials
      wgmma_wait<0>();
      keep_registers(o);
      release(shared + C::kVEmpty + 8 * done);
      rescale();
      round_probabilities();
      accumulate = true;
    }
    mbarrier_wait(shared + C::kVFull + 8 * value_stage, value_parity);
    start_sum(value_stage, accumulate);
    wgmma_wait<0>();
    keep_registers(o);
    release(shared + C::kVEmpty + 8 * value_stage);
    while (!end) {
      end = last();
      skip_chunk();
      if (!end) wait_chunk();
    }
    return true;
  }

  // Divides by the sums and writes the tile, in 16-byte pieces by way of the q tile, which no longer is needed.
  NXS_DEVICE void finish(u32 q_tile, u32 header, bool any) {
    const Vec<u32, 4> work = load_shared<Vec<u32, 4>>(header);
    const Vec<u32, 2> tile = load_shared<Vec<u32, 2>>(header + 16 + 8 * group);
    const u32 batch = work.data[0], head = work.data[1], split = work.data[2], rows = tile.data[1];
    float inverse[2];
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
      float total = any ? sum[r] : 0.0f;
      total += shuffle_xor(total, 1);
      total += shuffle_xor(total, 2);
      inverse[r] = total > 0 ? 1.0f / total : 0.0f;
      const u32 row = warp * 16 + lane / 4 + 8 * r;
      if (lane % 4 == 0 && row < rows && (p.splits > 1 || p.lse_or_null)) {
        const RowAt at = row_at(p, head, tile.data[0] + row);
        const float lse = total > 0 ? (reference[r] + log2_approx(total)) * kLn2 : kNothing;
        store_global(lse_at(split, batch, at), lse);
      }
    }
    if (!any)
#pragma unroll
      for (u32 i = 0; i < kDim / 2; ++i) o[i] = 0;
    if (p.splits > 1) {
#pragma unroll
      for (u32 r = 0; r < 2; ++r) {
        const u32 row = warp * 16 + lane / 4 + 8 * r;
        if (row < rows) {
          const RowAt at = row_at(p, head, tile.data[0] + row);
          float* part = p.parts_or_null + part_row(split, batch, at) * p.dim;
#pragma unroll
          for (u32 i = 0; i < kDim / 8; ++i) {
            const u32 column = 8 * i + 2 * (lane % 4);
            if (column < static_cast<u32>(p.dim))
              store_global(reinterpret_cast<Vec<float, 2>*>(part + column),
                           Vec<float, 2>{{o[4 * i + 2 * r] * inverse[r], o[4 * i + 2 * r + 1] * inverse[r]}});
          }
        }
      }
      return;
    }
    // Products of the other warps may still read the tile.
    barrier_sync(1 + kGroups + group, kGroupThreads);
    const u32 mine = q_tile + warp * 16 * 128;  // this warp's 16 rows of each block of columns
#pragma unroll
    for (u32 i = 0; i < kDim / 8; ++i)
#pragma unroll
      for (u32 r = 0; r < 2; ++r) {
        const u32 plain = mine + i / 8 * (kTileRows * 128) + (lane / 4 + 8 * r) * 128 + i % 8 * 16 + lane % 4 * 4;
        store_shared(swizzled(plain, Swizzle::k128), round_pair<T>(o[4 * i + 2 * r] * inverse[r], o[4 * i + 2 * r + 1] * inverse[r]));
      }
    warp_sync();
    constexpr u32 kPieces = kDim / 8;
    for (u32 i = lane; i < 16 * kPieces; i += kWarpSize) {
      const u32 row = i / kPieces, piece = i % kPieces;
      if (warp * 16 + row >= rows || piece * 8 >= static_cast<u32>(p.dim)) continue;
      const u32 plain = mine + piece / 8 * (kTileRows * 128) + row * 128 + piece % 8 * 16;
      const Vec<u32, 4> value = load_shared<Vec<u32, 4>>(swizzled(plain, Swizzle::k128));
      const RowAt at = row_at(p, head, tile.data[0] + warp * 16 + row);
      T* out = static_cast<T*>(p.out) + batch * p.out_stride_batch + at.row * p.out_stride_row + at.head * p.out_stride_head;
      store_global(reinterpret_cast<Vec<u32, 4>*>(out + piece * 8), value);
    }
  }
  NXS_DEVICE i64 part_row(u32 split, u32 batch, const RowAt& at) const {
    return ((split * p.batch + batch) * p.heads + at.head) * p.rows + at.row;
  }
  NXS_DEVICE float* lse_at(u32 split, u32 batch, const RowAt& at) const {
    if (p.splits > 1) return p.parts_or_null + p.splits * p.batch * p.heads * p.rows * p.dim + part_row(split, batch, at);
    return p.lse_or_null + batch * p.lse_stride_batch + at.head * p.lse_stride_head + at.row * p.lse_stride_row;
  }

  NXS_DEVICE void run() {
    if constexpr (C::kTurns)
      if (group == kGroups - 1) barrier_arrive(1, 2 * kGroupThreads);  // the first turn is group 0's
    const u32 works = all_works(p);
    u32 turn = 0;
    for (u32 n = 0; n * grid_size_x() < works; ++n) {
      if (nth_work(n) >= works) continue;
      const u32 slot = turn & 1, header = shared + C::kHeader + slot * C::kHeaderBytes;
      const u32 q_tile = shared + C::kQ + slot * C::kSlotBytes + group * C::kTileBytes;
      mbarrier_wait(shared + C::kQFull + 8 * slot, turn / 2 & 1);
      const bool any = attend(q_tile);
      finish(q_tile, header, any);
      release(shared + C::kQEmpty + 8 * slot);
      ++turn;
    }
    if constexpr (C::kTurns)
      if (group == 0) barrier_sync(1, 2 * kGroupThreads);  // absorbs the last arrival
  }
};

template <typename T, int kDim, int kGroups, bool kBounded>
__global__ void __launch_bounds__(Sm90<kDim, kGroups>::kThreads, 1)
    scale_attention_sm90_kernel(const __grid_constant__ ScaleParams p, const __grid_constant__ TensorMap map_k,
                                const __grid_constant__ TensorMap map_v) {
  using C = Sm90<kDim, kGroups>;
  const u32 shared = dynamic_shared(), t = thread_index();
  if (t == 0) {
    prefetch_tensor_map(&map_k);
    prefetch_tensor_map(&map_v);
    for (u32 slot = 0; slot < 2; ++slot) {
      mbarrier_init(shared + C::kQFull + 8 * slot, 3);            // warps 1 to 3
      mbarrier_init(shared + C::kQEmpty + 8 * slot, 4 * kGroups);  // consumer warps
    }
    for (u32 stage = 0; stage < C::kStages; ++stage) {
      mbarrier_init(shared + C::kKFull + 8 * stage, 1);
      mbarrier_init(shared + C::kKEmpty + 8 * stage, 4 * kGroups);
      mbarrier_init(shared + C::kVFull + 8 * stage, 2);  // the copy, and that nothing of it is left to clean
      mbarrier_init(shared + C::kVEmpty + 8 * stage, 4 * kGroups);
    }
    mbarrier_init(shared + C::kTail, 1);
    fence_mbarrier_init();
  }
  block_sync();
  if (t < kGroupThreads) {
    if constexpr (kGroups == 2) lower_registers<40>();
    if constexpr (kGroups == 3) lower_registers<32>();
    if (t < kWarpSize)
      stream_chunks<kDim, kGroups>(p, &map_k, &map_v, shared);
    else
      load_queries<T, kDim, kGroups>(p, shared);
  } else {
    if constexpr (kGroups == 2) raise_registers<232>();
    if constexpr (kGroups == 3) raise_registers<160>();
    Consumer<T, kDim, kGroups, kBounded>(p, shared, t / kGroupThreads - 1).run();
  }
}

template <typename T, int kDim, int kGroups, bool kBounded>
nxs_status scale_attention_sm90_launch(const ScaleParams& p, void* stream) {
  using C = Sm90<kDim, kGroups>;
  TensorMap maps[2];
  const struct {
    const void* address;
    i64 row, head, batch;
  } views[2] = {{p.k, p.k_stride_row, p.k_stride_head, p.k_stride_batch}, {p.v, p.v_stride_row, p.v_stride_head, p.v_stride_batch}};
  for (int i = 0; i < 2; ++i) {
    TensorShape shape;
    shape.dtype = DType<T>::value;
    shape.rank = 4;
    shape.address = views[i].address;
    shape.size[0] = static_cast<u64>(p.dim);
    shape.size[1] = static_cast<u64>(p.kv_rows);
    shape.size[2] = static_cast<u64>(p.kv_heads);
    shape.size[3] = static_cast<u64>(views[i].batch ? p.batch : 1);
    // A dimension of one element may have any stride; a map wants a valid one.
    const auto bytes = [](i64 stride) { return static_cast<u64>(stride ? stride : 8) * sizeof(T); };
    shape.stride_bytes[0] = bytes(views[i].row);
    shape.stride_bytes[1] = bytes(views[i].head);
    shape.stride_bytes[2] = bytes(views[i].batch);
    shape.box[0] = 64;
    shape.box[1] = kChunk;
    shape.swizzle = Swizzle::k128;
    NXS_TRY(encode_tensor_map(&maps[i], shape));
  }
  const auto kernel = scale_attention_sm90_kernel<T, kDim, kGroups, kBounded>;
  NXS_TRY(allow_dynamic_smem(kernel, C::kSharedBytes));
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(p.blocks));
  shape.block = C::kThreads;
  shape.dynamic_smem = C::kSharedBytes;
  return launch(kernel, shape, stream, p, maps[0], maps[1]);
}

// One instantiation file for each dtype and dim (scale_attention_sm90_<dtype>_d<dim>.cu) picks the rest.
template <typename T, int kDim> nxs_status scale_attention_sm90(const ScaleParams& p, void* stream);

template <typename T, int kDim, int kGroups> nxs_status scale_attention_sm90_bound(const ScaleParams& p, void* stream) {
  if constexpr (DType<T>::value == NXS_BF16)
    if (p.logit_bound > 0) return scale_attention_sm90_launch<T, kDim, kGroups, true>(p, stream);
  return scale_attention_sm90_launch<T, kDim, kGroups, false>(p, stream);
}

}  // namespace nxs::attention
