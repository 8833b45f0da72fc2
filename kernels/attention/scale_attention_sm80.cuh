// Scale attention on any tensor cores since Ampere: mma.sync, cp.async.
//
//   out[b, i, h, :] = sum over visible j of softmax_j(scale * q . k_j) v_j, by the schedule of nextscale.h
//
// Grid       a block for each work: a tile of 64 rows.
// Block      4 warps of 16 rows each. q and the sums stay in registers; S and P are those of half a chunk, 64 keys.
// Stream     halves of K and of V alternate in a ring of 3 slots: two are under way while one is used.
// Overlap    kBlocks blocks share a multiprocessor: the exponentials of one run beside the products of the others.
// Softmax    base 2, f32. The row's reference is its maximum at the last time that it grew by more than 2^8 (then O is
//            rescaled), or at first a bound that the caller vouches for. A lane compares what it has with the reference; only
//            if one has grown do the lanes of a row look for its maximum.
// Masks      32 bits a thread and half, in the order of its accumulators; none where all is seen. A warp passes over a half
//            of which its rows see nothing.
// Tails      rows of K and V beyond a chunk's last key, or beyond the tensor, are zero and never read; logits are masked.
// Shared     3 slots [64 rows][2 kDim bytes], 16-byte pieces of a row permuted by row. At first the last one holds q, at the
//            end they hold what is stored.
// Bytes      q and out once; K and V once for each item and head, from L2 once a section's keys are there.
// FLOPs      4 * kDim * 64 * 64 a half.
// Packed     K and V of few bits (NXS_KV_*): the ring holds codes and numbers as they are; when a half is needed, the threads
//            write what it stands for, rounded to T, to the one place where halves are used. From there on all is as without.
// Limits     dim <= kDim, a multiple of 8, packed dim = kDim; items of one tile. Shared memory is read as fast as it can be where tensor cores
//            are fast (sm_80, sm_90): each warp reads all of K and V.
#pragma once
#include <type_traits>

#include "attention/packed_values.cuh"
#include "common/ptx/async_copy.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/matrix.cuh"
#include "common/ptx/warp.cuh"

namespace nxs::attention {

template <int kDim> struct Sm80 {
  static constexpr u32 kWarps = 4, kThreads = kWarps * kWarpSize;
  static constexpr u32 kHalf = kChunk / 2;  // keys of a step
  static constexpr u32 kPieces = kDim / 8;  // of 16 bytes, in a row
  static constexpr u32 kRowBytes = kDim * 2, kSlotBytes = kHalf * kRowBytes, kSlots = 3;
  static constexpr u32 kBlocks = kDim == 64 ? 4 : 3;  // on a multiprocessor, as far as registers go
  // What need not be in registers all the time: what the walk over the keys is of; head, split, first row, rows; k and v.
  static constexpr u32 kWalk = kSlots * kSlotBytes, kTile = kWalk + 16, kRows = kTile + 16, kSharedBytes = kRows + 16;
  static_assert(kHalf == kTileRows);
};

// A half of packed rows.
template <int kDim, int kFormat> struct PackedHalf {
  static constexpr u32 kBits = kFormat == NXS_KV_FP8 ? 8 : 4, kNumbers = kFormat == NXS_KV_FP8 ? 1 : 2;
  static constexpr u32 kPieces = kDim * kBits / 128;  // of 16 bytes, in a row's codes
  static constexpr u32 kCodes = 128 / kBits;          // in a piece
  static constexpr u32 kAll = Sm80<kDim>::kHalf * kPieces, kRounds = (kAll + Sm80<kDim>::kThreads - 1) / Sm80<kDim>::kThreads;
  static constexpr u32 kInlineAt = kPieces * 16;
  // Codes, then two numbers a row. The ring follows the place where halves are used, all before kWalk.
  static constexpr u32 kNumbersAt = kAll * 16, kSlotBytes = kNumbersAt + Sm80<kDim>::kHalf * 8;
  static_assert(Sm80<kDim>::kSlotBytes + Sm80<kDim>::kSlots * kSlotBytes <= Sm80<kDim>::kWalk);
};

// Where a piece of a row is in a slot: of eight rows that follow each other, the same piece is in other banks each time.
template <int kDim> NXS_DEVICE u32 piece_at(u32 row, u32 piece) {
  return row * Sm80<kDim>::kRowBytes + ((piece ^ (kDim == 96 ? row / 2 % 4 : row % 8)) * 16);
}
// From the address of piece 0 or 1 of a row to that of the piece 2 n further.
template <int kDim> NXS_DEVICE u32 pieces_on(u32 address, u32 n) {
  return kDim == 96 ? (address ^ n % 2 * 32) + n / 2 * 64 : (address ^ n % 4 * 32) + n / 4 * 128;
}

template <typename T> NXS_DEVICE void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (DType<T>::value == NXS_BF16) mma_bf16(c, a, b0, b1);
  else mma_f16(c, a, b0, b1);
}

// Bits i of which 8 (i / 4) + i % 2 < keys.
NXS_DEVICE u32 elements_below(u32 keys) {
  const auto fours = [](u32 n) { return n >= 8 ? ~0u : (1u << 4 * n) - 1; };
  return (fours((keys + 7) / 8) & 0x55555555u) | (fours((keys + 6) / 8) & 0xaaaaaaaau);
}

// One block: a tile of 64 rows. Scale and bound of the logits are for base 2.
template <typename T, int kDim, int kFormat> struct Attend {
  static constexpr bool kPacked = kFormat != NXS_KV_PLAIN;
  using Stored = std::conditional_t<kPacked, u8, T>;
  using C = Sm80<kDim>;
  using Walk = KeyWalk<C::kHalf>;

  const ScaleKernelParams& p;
  const u32 shared, thread, lane, warp;

  u32 q[kDim / 16][4];
  float s[C::kHalf / 8][4];           // logits
  u32 prob[C::kHalf / 16][4];         // P, as the A operand of P V
  float o[kDim / 8][4];
  float reference[2], sum[2];         // of the thread's rows: base-2 reference, its share of the sum

  NXS_DEVICE explicit Attend(const ScaleKernelParams& p_)
      : p(p_), shared(dynamic_shared()), thread(thread_index()), lane(thread % kWarpSize), warp(thread / kWarpSize) {}

  // How many keys come next of which the tile sees some, or 0.
  NXS_DEVICE u32 next_keys(Walk& walk, const typename Walk::Of& of) const {
    u32 count;
    do count = walk.next(p, of);
    while (count > 0 && walk.mask(p, 0) == NXS_MASK_HIDDEN);
    return count;
  }
  // Of the thread's accumulators, in their order, those whose row does not see their key.
  NXS_DEVICE u32 hidden_of(const Walk& walk, u32 count) const {
    const u32 mask = walk.mask(p, 0);
    u32 seen = ~0u;
    if (mask != NXS_MASK_NONE) seen = load_global_nc(p.schedule + mask + 2 * thread + walk.keys / C::kHalf % 2);
    const u32 skip = 2 * (lane % 4);
    if (count < C::kHalf) seen &= elements_below(count > skip ? count - skip : 0);
    return ~seen;
  }

  // In copies kLanes threads have a row, and each every kLanes-th of its pieces.
  static constexpr u32 kLanes = kDim == 96 ? 4 : 8, kRowStep = C::kThreads / kLanes;

  // Starts the copy of a thread's pieces of a row: of zeroes, where there is no such row or, unless kWhole, no such column.
  template <bool kWhole> NXS_DEVICE void copy_row(u32 to, const u8* from, bool exists, const void* somewhere) const {
#pragma unroll
    for (u32 i = 0; i < C::kPieces / kLanes; ++i) {
      const bool there = exists && (kWhole || thread % kLanes + i * kLanes < static_cast<u32>(p.dim) / 8);
      copy_async<16>(to + i * kLanes * 16, there ? from + i * kLanes * 16 : somewhere, there ? 16 : 0);
    }
  }
  NXS_DEVICE void copy_queries(u32 slot, const Work& work, u32 first, u32 rows) const {
    const u32 row = thread / kLanes, piece = thread % kLanes;
#pragma unroll
    for (u32 i = 0; i < kTileRows; i += kRowStep) {
      const bool exists = row + i < rows;
      const void* from = p.q;
      if (exists) from = query_at<T>(p, work.batch, row_at(p, work.head, first + row + i));
      copy_row<false>(slot + piece_at<kDim>(row + i, piece), static_cast<const u8*>(from) + piece * 16, exists, p.q);
    }
  }
  // Rows `key` and up of k or v (`all`), which are `stride` elements apart; `rows` are those of the batch entry and head.
  NXS_DEVICE void copy_keys(u32 slot, const Stored* rows, bool of_k, u32 key, u32 count) const {
    const void* all = of_k ? p.k : p.v;
    i64 stride = of_k ? p.k_stride_row : p.v_stride_row;
    if constexpr (kPacked) return copy_packed(slot, rows, of_k, all, stride, key, count);
    const u32 kv_rows = static_cast<u32>(p.kv_rows), left = key < kv_rows ? kv_rows - key : 0;
    const u32 row = thread / kLanes, piece = thread % kLanes, to = slot + piece_at<kDim>(row, piece);
    if (count > left) count = left;
    stride *= sizeof(T);
    const u8* from = reinterpret_cast<const u8*>(rows) + (key + row) * stride + piece * 16;
    if (count == C::kHalf && p.dim == kDim) {
#pragma unroll
      for (u32 i = 0; i < C::kHalf; i += kRowStep, from += kRowStep * stride)
        copy_row<true>(to + i * C::kRowBytes, from, true, all);
    } else {
#pragma unroll 1
      for (u32 i = 0; i < C::kHalf; i += kRowStep, from += kRowStep * stride)
        copy_row<false>(to + i * C::kRowBytes, from, row + i < count, all);
    }
  }

  // The same of packed rows: codes to the beginning of the slot, numbers to their place.
  NXS_DEVICE void copy_packed(u32 slot, const u8* rows, bool of_k, const void* all, i64 stride, u32 key, u32 count) const {
    using H = PackedHalf<kDim, kFormat>;
    const u32 kv_rows = static_cast<u32>(p.kv_rows), left = key < kv_rows ? kv_rows - key : 0;
    if (count > left) count = left;
#pragma unroll
    for (u32 i = 0; i < H::kRounds; ++i) {
      const u32 at = thread + i * C::kThreads, row = at / H::kPieces, piece = at % H::kPieces;
      if (H::kAll % C::kThreads != 0 && at >= H::kAll) break;
      const bool there = row < count;
      copy_async<16>(slot + at * 16, there ? rows + (key + row) * stride + piece * 16 : all, there ? 16 : 0);
    }
    if (thread >= C::kHalf) return;
    const bool there = thread < count;
    const float* numbers = of_k ? p.k_numbers_or_null : p.v_numbers_or_null;
    const void* from = all;
    if (there && numbers) {
      const auto of = load_shared<Vec<u32, 4>>(shared + C::kWalk);
      const i64 batch = of_k ? p.k_numbers_stride_batch : p.v_numbers_stride_batch;
      const i64 head = of_k ? p.k_numbers_stride_head : p.v_numbers_stride_head;
      from = numbers + of.data[0] * batch + (key + thread) * (of_k ? p.k_numbers_stride_row : p.v_numbers_stride_row) +
             of.data[1] * head;
    } else if (there) {
      from = rows + (key + thread) * stride + H::kInlineAt;
    }
    copy_async<4 * H::kNumbers>(slot + H::kNumbersAt + thread * 8, from, there ? 4 * H::kNumbers : 0);
  }

  // From the codes of a slot to values where they are used. All have come; all threads take part.
  NXS_DEVICE void expand(u32 slot) const {
    using H = PackedHalf<kDim, kFormat>;
    [[maybe_unused]] constexpr u32 kUnroll = kFormat == NXS_KV_FP8 ? H::kRounds : 1;
#pragma unroll kUnroll
    for (u32 i = 0; i < H::kRounds; ++i) {
      const u32 at = thread + i * C::kThreads, row = at / H::kPieces, piece = at % H::kPieces;
      if (H::kAll % C::kThreads != 0 && at >= H::kAll) break;
      const auto code = load_shared<Vec<u32, 4>>(slot + at * 16);
      const auto of = load_row_numbers<kFormat>(slot + H::kNumbersAt + row * 8);
#pragma unroll
      for (u32 j = 0; j < H::kCodes / 8; ++j)
        store_shared(shared + piece_at<kDim>(row, piece * (H::kCodes / 8) + j), eight_of<T, kFormat>(code, j, of));
    }
    block_sync();
  }

  NXS_DEVICE void load_queries(u32 slot) {
    const u32 at = slot + piece_at<kDim>(warp * 16 + lane % 16, lane / 16);
#pragma unroll
    for (u32 k = 0; k < kDim / 16; ++k) load_matrix(q[k], pieces_on<kDim>(at, k));
  }

  // S = Q K^T.
  NXS_DEVICE void find_logits(u32 slot) {
    const u32 at = slot + piece_at<kDim>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (u32 i = 0; i < C::kHalf / 2; ++i) s[i / 4][i % 4] = 0;
#pragma unroll
    for (u32 n = 0; n < C::kHalf / 16; ++n)
#pragma unroll
      for (u32 k = 0; k < kDim / 16; ++k) {
        u32 b[4];
        load_matrix(b, pieces_on<kDim>(at, k) + n * 16 * C::kRowBytes);
        multiply<T>(s[2 * n], q[k], b[0], b[1]);
        multiply<T>(s[2 * n + 1], q[k], b[2], b[3]);
      }
  }

  // Logits that are not to be seen become -inf.
  NXS_DEVICE void mask_logits(u32 hidden) {
    if (!warp_any(hidden != 0)) return;
#pragma unroll
    for (u32 i = 0; i < C::kHalf / 2; ++i)
      if (hidden >> i & 1) s[i / 4][i % 4] = kNothing;
  }

  // Where a row has grown too far above its reference, that moves up; O and the sum follow.
  NXS_DEVICE void move_references() {
    float most[2];
    bool grows = false;
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
      most[r] = fmaxf(s[0][2 * r], s[0][2 * r + 1]);
#pragma unroll
      for (u32 n = 1; n < C::kHalf / 8; ++n) most[r] = fmaxf(most[r], fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      most[r] *= p.scale;
      grows |= most[r] > reference[r] + kLazyRescale;
    }
    if (!warp_any(grows)) return;
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
      const float before = reference[r];
      float after = fmaxf(most[r], shuffle_xor(most[r], 1));
      after = fmaxf(after, shuffle_xor(after, 2));
      if (!(after > before + kLazyRescale)) continue;
      const float factor = exp2_approx(before - after);
      reference[r] = after;
      sum[r] *= factor;
#pragma unroll
      for (u32 n = 0; n < kDim / 8; ++n) {
        o[n][2 * r] *= factor;
        o[n][2 * r + 1] *= factor;
      }
    }
  }

  // P and the sums, from S. Before V is waited for: beside the products of P V there are no registers left for this.
  NXS_DEVICE void exponentiate() {
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
      // A row that has seen nothing keeps 0: its exponentials are 2^(-inf).
      const float shift = reference[r] == kNothing ? 0.0f : reference[r];
#pragma unroll
      for (u32 k = 0; k < C::kHalf / 16; ++k) {
        float e[4];
#pragma unroll
        for (u32 i = 0; i < 4; ++i) e[i] = exp2_approx(fma(s[2 * k + i / 2][2 * r + i % 2], p.scale, -shift));
        prob[k][r] = round_pair<T>(e[0], e[1]);
        prob[k][2 + r] = round_pair<T>(e[2], e[3]);
        sum[r] += (e[0] + e[1]) + (e[2] + e[3]);
      }
    }
  }

  // O += P V.
  NXS_DEVICE void add_values(u32 slot) {
    const u32 at = slot + piece_at<kDim>(lane % 16, lane / 16);
#pragma unroll
    for (u32 k = 0; k < C::kHalf / 16; ++k)
#pragma unroll
      for (u32 n = 0; n < kDim / 16; ++n) {
        u32 b[4];
        load_matrix_transposed(b, pieces_on<kDim>(at, n) + k * 16 * C::kRowBytes);
        multiply<T>(o[2 * n], prob[k], b[0], b[1]);
        multiply<T>(o[2 * n + 1], prob[k], b[2], b[3]);
      }
  }

  // Divides by the sums and writes the tile.
  NXS_DEVICE void finish() {
    block_sync();  // the slots are free
    const u32 batch = load_shared<u32>(shared + C::kWalk);
    const auto tile = load_shared<Vec<u32, 4>>(shared + C::kTile);
    const u32 head = tile.data[0], split = tile.data[1], first = tile.data[2] + warp * 16;
    const u32 rows = tile.data[3] > warp * 16 ? tile.data[3] - warp * 16 : 0;
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
      float total = sum[r];
      total += shuffle_xor(total, 1);
      total += shuffle_xor(total, 2);
      const float inverse = total == 0 ? 0.0f : reciprocal_approx(total);
#pragma unroll
      for (u32 n = 0; n < kDim / 8; ++n) {
        o[n][2 * r] *= inverse;
        o[n][2 * r + 1] *= inverse;
      }
      const u32 row = lane / 4 + 8 * r;
      if (row >= rows) continue;
      const RowAt at = row_at(p, head, first + row);
      if (lane % 4 == 0) store_lse(p, split, batch, at, lse_of(reference[r], total));
      if (p.splits > 1) store_part<kDim>(p, split, batch, at, [&](u32 i) { return o[i / 2][2 * r + i % 2]; });
    }
    if (p.splits > 1) return;
    const u32 mine = shared + warp * 16 * C::kRowBytes;
#pragma unroll
    for (u32 n = 0; n < kDim / 8; ++n)
#pragma unroll
      for (u32 r = 0; r < 2; ++r)
        store_shared(mine + piece_at<kDim>(lane / 4 + 8 * r, n) + lane % 4 * 4,
                     round_pair<T>(o[n][2 * r], o[n][2 * r + 1]));
    warp_sync();
    store_rows<T, kDim>(p, batch, head, first, rows,
                        [&](u32 row, u32 piece) { return mine + piece_at<kDim>(row, piece); });
  }

  NXS_DEVICE void run() {
    const Work work = work_at(p, block_index_x());
    const Vec<u32, 4> item = p.words(work.item), tile = p.words(work.item + 4);
    const u32 first = tile.data[0], rows = tile.data[1];
    // The items may have come with the params, but masks did not.
    const bool ours = item.data[3] == p.digest && load_global_nc(p.schedule + 3) == p.digest;
    if (!ours || rows == 0) return;  // nothing is read or written
    typename Walk::Of of;
    Walk walk(p, work, of);
    const Stored* k = static_cast<const Stored*>(p.k) + of.batch * p.k_stride_batch + of.kv_head * p.k_stride_head;
    const Stored* v = static_cast<const Stored*>(p.v) + of.batch * p.v_stride_batch + of.kv_head * p.v_stride_head;
    if (thread == 0) {
      store_shared(shared + C::kWalk, Vec<u32, 4>{{of.batch, of.kv_head, of.last, 0}});
      store_shared(shared + C::kTile, Vec<u32, 4>{{work.head, item.data[2], first, rows}});
      store_shared(shared + C::kRows, k);
      store_shared(shared + C::kRows + 8, v);
    }
    u32 now = shared, bytes = C::kSlotBytes;
    if constexpr (kPacked) {
      now += bytes;
      bytes = PackedHalf<kDim, kFormat>::kSlotBytes;
    }
    u32 next = now + bytes, last = next + bytes;  // slots, in the order of their use
    copy_queries(kPacked ? shared : last, work, first, rows);
    copy_async_commit();
    u32 count = p.kv_rows > 0 ? next_keys(walk, of) : 0, hidden = 0;
    if constexpr (kPacked) block_sync();  // the batch entry and head
    if (count > 0) copy_keys(now, k, true, walk.first_key(), count);
    copy_async_commit();
    if (count > 0) {
      copy_keys(next, v, false, walk.first_key(), count);
      hidden = hidden_of(walk, count);
    }
    copy_async_commit();

#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
      reference[r] = p.logit_bound > 0 ? p.logit_bound : kNothing;
      sum[r] = 0;
    }
#pragma unroll
    for (u32 i = 0; i < kDim / 2; ++i) o[i / 4][i % 4] = 0;
    copy_async_wait<2>();
    block_sync();
    load_queries(kPacked ? shared : last);

    while (count > 0) {
      const auto same = load_shared<Vec<u32, 4>>(shared + C::kWalk);
      count = next_keys(walk, {same.data[0], same.data[1], same.data[2]});
      copy_async_wait<1>();
      block_sync();  // K has come, and the last slot is free
      if (count > 0)
        copy_keys(last, load_shared<const Stored*>(shared + C::kRows), true, walk.first_key(), count);
      copy_async_commit();
      if constexpr (kPacked) expand(now);
      const bool sees = warp_any(hidden != ~0u);
      if (sees) {
        find_logits(kPacked ? shared : now);
        mask_logits(hidden);
        move_references();
        exponentiate();
      }
      copy_async_wait<1>();
      block_sync();  // V has come, and K's slot is free
      if (count > 0)
        copy_keys(now, load_shared<const Stored*>(shared + C::kRows + 8), false, walk.first_key(), count);
      copy_async_commit();
      if constexpr (kPacked) expand(next);
      if (sees) add_values(kPacked ? shared : next);
      if (count > 0) hidden = hidden_of(walk, count);
      const u32 used = next;
      next = now;
      now = last;
      last = used;
    }
    finish();
  }
};

template <typename T, int kDim>
__global__ void __launch_bounds__(Sm80<kDim>::kThreads, Sm80<kDim>::kBlocks)
    scale_attention_sm80_kernel(const __grid_constant__ ScaleKernelParams p) {
  Attend<T, kDim, NXS_KV_PLAIN>(p).run();
}
template <typename T, int kDim, int kFormat>
__global__ void __launch_bounds__(Sm80<kDim>::kThreads, Sm80<kDim>::kBlocks)
    scale_attention_packed_kernel(const __grid_constant__ ScaleKernelParams p) {
  Attend<T, kDim, kFormat>(p).run();
}

template <int kDim, typename Kernel> nxs_status launch_sm80(const ScaleParams& p, Kernel kernel, u32 shared, void* stream) {
  ScaleKernelParams base2(p);
  base2.scale *= kLog2E;
  base2.logit_bound *= kLog2E;
  NXS_TRY(allow_dynamic_smem(kernel));
  LaunchShape shape;
  shape.grid = dim3(all_works(p));
  shape.block = Sm80<kDim>::kThreads;
  shape.dynamic_smem = shared;
  return launch(kernel, shape, stream, base2);
}
// One instantiation file for each dtype and dim: scale_attention_sm80_<dtype>_d<dim>.cu, scale_attention_packed_<dtype>_d<dim>.cu.
template <typename T, int kDim> nxs_status scale_attention_sm80(const ScaleParams& p, void* stream) {
  return launch_sm80<kDim>(p, scale_attention_sm80_kernel<T, kDim>, Sm80<kDim>::kSharedBytes, stream);
}
template <typename T, int kDim> nxs_status scale_attention_packed(const ScaleParams& p, void* stream) {
  constexpr u32 kShared = Sm80<kDim>::kSharedBytes;
  if (p.kv_format == NXS_KV_FP8)
    return launch_sm80<kDim>(p, scale_attention_packed_kernel<T, kDim, NXS_KV_FP8>, kShared, stream);
  return launch_sm80<kDim>(p, scale_attention_packed_kernel<T, kDim, NXS_KV_INT4>, kShared, stream);
}

}  // namespace nxs::attention
