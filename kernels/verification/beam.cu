// The best continuations of beams: (beam, token) by score + ln p(token).
//
// Who does what  A persistent grid of blocks of 8 warps; an item is a row. A warp has a chunk: partials, and each lane's best
//                element. Then nearest.cuh takes out the row's `width` best, the greatest first; one warp adds logarithms. The
//                last block of a request merges up to 32 lists of up to 32, one warp, 32 entries a lane.
// Bytes          batch * beams * vocab * sizeof(dtype) once. About 19 instructions a column.
// Determinism    bitwise.
#include "common/check.h"
#include "common/ptx/atomic.cuh"
#include "common/ptx/launch.cuh"
#include "verification/log2.cuh"
#include "verification/nearest.cuh"
#include "verification/row_block.cuh"

namespace nxs::verification {

constexpr u32 kMostWidth = 32;
// Shared memory: a word for all; the lists of the warps.
constexpr u32 kBeamWord = 0, kBeamLists = 64, kBeamBytes = kBeamLists + kMostWidth * 64;

struct alignas(8) Continuation {
  i32 token;  // -1: none
  float score;
};

template <typename T> struct Beam {
  const nxs_beam_rank_params& p;
  const u32 shared, chunks, width;

  NXS_DEVICE Beam(const nxs_beam_rank_params& params, u32 memory)
      : p(params), shared(memory), chunks(chunks_of(static_cast<u32>(params.vocab))),
        width(static_cast<u32>(params.width)) {}
  // A row's continuations, and a word for its status.
  NXS_DEVICE u32* words(u64 r) const { return static_cast<u32*>(p.workspace) + r * (2 * width + 2); }

  NXS_DEVICE void extend(u32 b, u64 r) const {
    const Row<T> row = {static_cast<const T*>(p.logits) + static_cast<i64>(r) * p.stride_row, nullptr,
                        static_cast<u32>(p.vocab)};
    const u64 rows = static_cast<u64>(p.batch) * static_cast<u32>(p.beams);
    Partial* partials = reinterpret_cast<Partial*>(words(rows)) + static_cast<u64>(block_index_x()) * chunks;
    const float temperature = input_or(p.temperature_or_null, b, 1.0f);
    const Scale scale = scale_of(temperature >= 1e-5f ? temperature : 1e-5f);
    u64 head = ~u64{0};
#pragma unroll 1
    for (u32 chunk = thread_index() / 32; chunk < chunks; chunk += kWarps) {
      Logits<T> logits = load_logits(row, chunk);
      const Partial partial = chunk_partial(logits, scale);
      if (lane_index() == 0) store_global(partials + chunk, partial);
#pragma unroll
      for (u32 place = 0; place < 32; ++place) {
        const u32 column = column_of(chunk, lane_index(), place);
        const u64 at = order_of<u64, true>(logits.at(place), column) - 1;
        if (column < row.columns && at < head) head = at;
      }
    }
    block_sync();
    const Side<u64> best_first = {0, true};
    list_nearest<true>(row, best_first, head, width, shared + kBeamLists);
    block_sync();
    if (thread_index() < 32) {
      const Summary summary = summarize_few(chunks, scale, [&](u32 chunk) { return load_global(partials + chunk); });
      const u32 token = take_nearest<kMostWidth>(best_first, width, shared + kBeamLists, 0, kNothing);
      const float so_far = load_global_nc(p.scores + r);
      Continuation of = {-1, -INFINITY};
      if (token != kNothing && so_far > -INFINITY && summary.shape != kEmpty) {
        const float logit = logit_at(row, token);
        float log = -INFINITY;
        if (summary.shape == kSpread) {
          if (logit > -INFINITY)
            log = multiply(fma(logit, scale.per_logit, -summary.reference) - log2_exact(summary.sum), kLn2);
        } else if (logit == summary.top && lane_index() == 0) {
          // All weight is on the first.
          log = 0;
        }
        if (log > -INFINITY) of = Continuation{static_cast<i32>(token), so_far + log};
      }
      u32* to = words(r);
      if (lane_index() < width) store_global(reinterpret_cast<Continuation*>(to) + lane_index(), of);
      if (lane_index() == 0) store_global(to + 2 * width, said_of(summary));
    }
    block_sync();
  }

  // One warp: the best of a request, all of whose rows are extended.
  NXS_DEVICE void merge(u32 b) const {
    const u32 beams = static_cast<u32>(p.beams), all = beams * width, lane = lane_index();
    const u64 first = static_cast<u64>(b) * beams;
    u32 said = lane < beams ? load_global(words(first + lane) + 2 * width) : 0;
    said = warp_reduce_or(said);
    u64 taken = 0;
    // Places are great for small scores; 0 is none.
#pragma unroll 1
    for (u32 n = 0; n < width; ++n) {
      u64 least = ~u64{0};
#pragma unroll 1
      for (u32 at = lane; at < all; at += 32) {
        const Continuation of =
            load_global(reinterpret_cast<const Continuation*>(words(first + at / width)) + at % width);
        if (of.token < 0) continue;
        const u64 place = (static_cast<u64>(~key_of(of.score)) << 32 | at) + 1;
        if (place > taken && place < least) least = place;
      }
      warp_sync();
      taken = warp_least(least);
      if (lane == 0) {
        const bool there = taken != ~u64{0};
        const u32 at = static_cast<u32>(taken - 1);
        Continuation of = {-1, -INFINITY};
        if (there) of = load_global(reinterpret_cast<const Continuation*>(words(first + at / width)) + at % width);
        const u64 to = static_cast<u64>(b) * width + n;
        store_global(p.parents + to, there ? static_cast<i32>(at / width) : -1);
        store_global(p.tokens + to, of.token);
        store_global(p.best + to, of.score);
      }
    }
    if (lane == 0) store_global(p.status + b, said);
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 3) beam_kernel(
    const __grid_constant__ nxs_beam_rank_params p) {
  const Beam<T> beam(p, dynamic_shared());
  const u32 beams = static_cast<u32>(p.beams);
  const u64 rows = static_cast<u64>(p.batch) * beams;
  for (u64 r = block_index_x(); r < rows; r += grid_size_x()) {
    const u32 b = static_cast<u32>(r / beams);
    beam.extend(b, r);
    u32 old = 0;
    if (thread_index() == 0) old = atomic_inc_acq_rel_global(p.counters + b, beams - 1);
    if (say_to_block(beam.shared + kBeamWord, thread_index() == 0, old) != beams - 1) continue;
    if (thread_index() < 32) beam.merge(b);
    block_sync();
  }
}

template <typename T> nxs_status beam_launch(const nxs_beam_rank_params& p, void* stream) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(p.blocks));
  shape.block = kThreads;
  shape.dynamic_smem = kBeamBytes;
  return launch(beam_kernel<T>, shape, stream, p);
}

}  // namespace nxs::verification

extern "C" nxs_status nxs_beam_rank(const nxs_beam_rank_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::verification;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_beam_rank_params& p = *params;
  NXS_REQUIRE(p.dtype == NXS_F32 || p.dtype == NXS_F16 || p.dtype == NXS_BF16, NXS_E_DTYPE);
  NXS_REQUIRE(p.batch >= 0 && p.batch <= i64{1} << 20 && p.vocab >= 1 && p.vocab <= i64{1} << 24, NXS_E_SHAPE);
  NXS_REQUIRE(p.beams >= 1 && p.beams <= static_cast<i32>(kMostWidth) && p.width >= 1 &&
                  p.width <= static_cast<i32>(kMostWidth),
              NXS_E_SHAPE);
  NXS_REQUIRE(p.stride_row >= 0, NXS_E_STRIDE);
  if (p.batch == 0) return NXS_OK;
  NXS_REQUIRE(p.blocks >= 1, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.logits && p.scores && p.parents && p.tokens && p.best && p.status && p.workspace && p.counters,
              NXS_E_NULL);
  for (const void* word :
       {static_cast<const void*>(p.scores), static_cast<const void*>(p.temperature_or_null),
        static_cast<const void*>(p.parents), static_cast<const void*>(p.tokens), static_cast<const void*>(p.best),
        static_cast<const void*>(p.status), static_cast<const void*>(p.counters)})
    NXS_REQUIRE(is_aligned(word, 4), NXS_E_ALIGNMENT);
  NXS_REQUIRE(is_aligned(p.logits, dtype_bytes(p.dtype)) && is_aligned(p.workspace, 16), NXS_E_ALIGNMENT);
  switch (p.dtype) {
    case NXS_F32: return beam_launch<float>(p, stream);
    case NXS_F16: return beam_launch<f16>(p, stream);
    default: return beam_launch<bf16>(p, stream);
  }
}
