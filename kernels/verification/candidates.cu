// Candidates: two heads mixed by a gate before sampling, one of several sequences selected, tokens that take back others.
//
// Who does what  gated_sample: a persistent grid of blocks of 8 warps, a row a block: a sweep, truncation, a draw by a warp.
//                select: a block a request; a warp has all scores as one chunk of a row, all threads copy the sequence.
//                backspace: a thread a request, token after token.
// Bytes          gated_sample 2 * rows * vocab * sizeof(dtype) once, and the chunk that is drawn from again; the others what
//                they read and write.
// Determinism    bitwise.
#include "common/check.h"
#include "common/ptx/launch.cuh"
#include "verification/row_block.cuh"

namespace nxs::verification {

// Beside those of sample.cuh.
constexpr u32 kUseSelect = 11;
constexpr u32 kCandidateShared = 128;

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) gated_sample_kernel(const __grid_constant__ nxs_gated_sample_params p) {
  const u32 shared = dynamic_shared(), columns = static_cast<u32>(p.vocab), chunks = chunks_of(columns);
  Partial* partials = static_cast<Partial*>(p.workspace) + static_cast<u64>(block_index_x()) * chunks;
  for (u32 r = block_index_x(); r < p.rows; r += grid_size_x()) {
    const auto row = make_row<Guided<T>>(p.first, p.second, r * p.stride_row, load_global_nc(p.gate + r), nullptr, columns);
    const Scale scale = scale_of(input_or(p.temperature_or_null, r, 1.0f));
    sweep_row(row, chunks, scale, partials);
    const RowOf<Guided<T>> of = distribution_of(
        row, chunks, scale, truncation_of(p.top_k_or_null, p.top_p_or_null, p.min_p_or_null, r), partials, shared);
    if (thread_index() < 32) {
      u32 token = of.peak;
      const bool spread = of.summary.shape == kSpread;
      if (spread) {
        Uniforms u;
        if (p.uniforms_or_null) {
          for (u32 k = 0; k < 3; ++k) u.at[k] = load_global_nc(p.uniforms_or_null + i64{3} * r + k);
        } else {
          const u64 seed = static_cast<u64>(input_or(p.seeds_or_null, r, i64{0}));
          const u64 position = static_cast<u64>(input_or(p.positions_or_null, r, i64{0}));
          const u32 row_in_step = static_cast<u32>(p.row_in_step);
          u = draw(seed, position + row_in_step, kUseDraft, row_in_step, 0);
        }
        token = sample_row(of.summary, row, chunks, u.at[0], u.at[1], u.at[2],
                           [&](u32 chunk) { return load_global(partials + chunk); });
      }
      if (lane_index() == 0) {
        store_global(p.tokens + r, token == kNothing ? p.fallback : static_cast<i32>(token));
        store_global(p.status + r, said_of(of.summary));
        if (p.stats_or_null) {
          float* stats = p.stats_or_null + r * i64{4};
          const float sum = spread ? of.summary.sum : 0.0f;
          store_global(stats, of.summary.top);
          store_global(stats + 1, of.summary.nan ? -sum : sum);
          store_global(stats + 2, spread ? of.summary.cut : -INFINITY);
          store_global(stats + 3, spread ? of.summary.scale.per_logit : 0.0f);
        }
      }
    }
    block_sync();
  }
}

__global__ void __launch_bounds__(kThreads, 4) select_candidate_kernel(
    const __grid_constant__ nxs_select_candidate_params p) {
  const u32 shared = dynamic_shared(), b = block_index_x();
  u32 chosen = kNothing;
  if (thread_index() < 32) {
    const Row<float> row = {p.scores + static_cast<i64>(b) * p.candidates, nullptr, static_cast<u32>(p.candidates)};
    const Scale scale = scale_of(input_or(p.temperature_or_null, b, 1.0f));
    Logits<float> logits = load_logits(row, 0);
    const Partial partial = chunk_partial(logits, scale);
    const auto load = [&](u32) { return partial; };
    const Summary summary = summarize_few(1, scale, load);
    Uniforms u;
    if (p.uniforms_or_null) {
      for (u32 k = 0; k < 3; ++k) u.at[k] = load_global_nc(p.uniforms_or_null + i64{3} * b + k);
    } else {
      u = draw(static_cast<u64>(input_or(p.seeds_or_null, b, i64{0})),
               static_cast<u64>(input_or(p.positions_or_null, b, i64{0})), kUseSelect, 0, 0);
    }
    chosen = sample_row(summary, row, 1, u.at[0], u.at[1], u.at[2], load);
    if (lane_index() == 0) {
      store_global(p.parents + b, chosen == kNothing ? 0 : static_cast<i32>(chosen));
      store_global(p.status + b, said_of(summary));
    }
  }
  chosen = say_to_block(shared, thread_index() == 0, chosen);
  if (chosen == kNothing) chosen = 0;
  if (!p.selected_or_null) return;
  const i32* from = p.sequences_or_null + (static_cast<i64>(b) * p.candidates + chosen) * p.length;
  for (i64 i = thread_index(); i < p.length; i += kThreads)
    store_global(p.selected_or_null + static_cast<i64>(b) * p.length + i, load_global_nc(from + i));
}

__global__ void __launch_bounds__(kThreads, 4) backspace_kernel(const __grid_constant__ nxs_backspace_params p) {
  const i64 b = static_cast<i64>(block_index_x()) * kThreads + thread_index();
  if (b >= p.batch) return;
  i32 length = load_global(p.lengths + b);
  const i32 capacity = static_cast<i32>(p.capacity), given = input_or(p.least_or_null, b, 0);
  length = length < 0 ? 0 : length > capacity ? capacity : length;
  const i32 least = given < 0 ? 0 : given;
  i32 kept = length;
  u32 said = 0;
  for (i64 i = 0; i < p.most; ++i) {
    const i32 token = load_global_nc(p.emitted + b * p.most + i);
    if (token < 0) break;
    if (token == p.backspace) {
      if (length > least) --length;
      kept = length < kept ? length : kept;
    } else if (length < capacity) {
      store_global(p.sequences + b * p.capacity + length, token);
      ++length;
    } else {
      said = NXS_STATUS_SEQUENCE_FULL;
    }
  }
  store_global(p.lengths + b, length);
  store_global(p.kept + b, kept);
  store_global(p.status + b, said);
}

template <typename T> nxs_status gated_sample(const nxs_gated_sample_params& p, void* stream) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(p.blocks));
  shape.block = kThreads;
  shape.dynamic_smem = kCandidateShared;
  return launch(gated_sample_kernel<T>, shape, stream, p);
}

}  // namespace nxs::verification

extern "C" nxs_status nxs_gated_sample(const nxs_gated_sample_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::verification;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_gated_sample_params& p = *params;
  NXS_REQUIRE(p.dtype == NXS_F32 || p.dtype == NXS_F16 || p.dtype == NXS_BF16, NXS_E_DTYPE);
  NXS_REQUIRE(p.rows >= 0 && p.rows <= i64{1} << 20 && p.vocab >= 1 && p.vocab <= i64{1} << 24, NXS_E_SHAPE);
  NXS_REQUIRE(p.row_in_step >= 0 && p.row_in_step <= 1023, NXS_E_SHAPE);
  NXS_REQUIRE(p.stride_row >= 0, NXS_E_STRIDE);
  if (p.rows == 0) return NXS_OK;
  NXS_REQUIRE(p.blocks >= 1, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(p.first && p.second && p.gate && p.tokens && p.status && p.workspace, NXS_E_NULL);
  for (const void* word :
       {static_cast<const void*>(p.gate), static_cast<const void*>(p.temperature_or_null),
        static_cast<const void*>(p.top_k_or_null), static_cast<const void*>(p.top_p_or_null),
        static_cast<const void*>(p.min_p_or_null), static_cast<const void*>(p.uniforms_or_null),
        static_cast<const void*>(p.tokens), static_cast<const void*>(p.stats_or_null),
        static_cast<const void*>(p.status)})
    NXS_REQUIRE(is_aligned(word, 4), NXS_E_ALIGNMENT);
  NXS_REQUIRE(is_aligned(p.first, dtype_bytes(p.dtype)) && is_aligned(p.second, dtype_bytes(p.dtype)) &&
                  is_aligned(p.seeds_or_null, 8) && is_aligned(p.positions_or_null, 8) && is_aligned(p.workspace, 8),
              NXS_E_ALIGNMENT);
  switch (p.dtype) {
    case NXS_F32: return gated_sample<float>(p, stream);
    case NXS_F16: return gated_sample<f16>(p, stream);
    default: return gated_sample<bf16>(p, stream);
  }
}

extern "C" nxs_status nxs_select_candidate(const nxs_select_candidate_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::verification;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_select_candidate_params& p = *params;
  NXS_REQUIRE(p.batch >= 0 && p.batch <= i64{1} << 20 && p.candidates >= 1 && p.candidates <= NXS_CHUNK_COLUMNS &&
                  p.length >= 0 && p.length <= INT32_MAX,
              NXS_E_SHAPE);
  if (p.batch == 0) return NXS_OK;
  NXS_REQUIRE(p.scores && p.parents && p.status, NXS_E_NULL);
  NXS_REQUIRE((p.sequences_or_null != nullptr) == (p.selected_or_null != nullptr), NXS_E_NULL);
  for (const void* word :
       {static_cast<const void*>(p.scores), static_cast<const void*>(p.sequences_or_null),
        static_cast<const void*>(p.temperature_or_null), static_cast<const void*>(p.uniforms_or_null),
        static_cast<const void*>(p.parents), static_cast<const void*>(p.selected_or_null),
        static_cast<const void*>(p.status)})
    NXS_REQUIRE(is_aligned(word, 4), NXS_E_ALIGNMENT);
  NXS_REQUIRE(is_aligned(p.seeds_or_null, 8) && is_aligned(p.positions_or_null, 8), NXS_E_ALIGNMENT);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(p.batch));
  shape.block = kThreads;
  shape.dynamic_smem = kCandidateShared;
  return launch(select_candidate_kernel, shape, stream, p);
}

extern "C" nxs_status nxs_backspace(const nxs_backspace_params* params, void* stream) {
  using namespace nxs;
  using namespace nxs::verification;
  NXS_REQUIRE(params, NXS_E_NULL);
  const nxs_backspace_params& p = *params;
  NXS_REQUIRE(p.batch >= 0 && p.batch <= INT32_MAX && p.most >= 0 && p.most <= INT32_MAX && p.capacity >= 0 &&
                  p.capacity <= INT32_MAX,
              NXS_E_SHAPE);
  NXS_REQUIRE(p.backspace >= 0, NXS_E_UNSUPPORTED);
  if (p.batch == 0) return NXS_OK;
  NXS_REQUIRE((p.emitted || p.most == 0) && (p.sequences || p.capacity == 0) && p.lengths && p.kept && p.status, NXS_E_NULL);
  for (const void* word :
       {static_cast<const void*>(p.emitted), static_cast<const void*>(p.least_or_null),
        static_cast<const void*>(p.sequences), static_cast<const void*>(p.lengths), static_cast<const void*>(p.kept),
        static_cast<const void*>(p.status)})
    NXS_REQUIRE(is_aligned(word, 4), NXS_E_ALIGNMENT);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((p.batch + kThreads - 1) / kThreads));
  shape.block = kThreads;
  return launch(backspace_kernel, shape, stream, p);
}
