// Drift: change = mean|f - p| / (mean|p| + eps) of each chunk, added to what has accumulated and held against a threshold.
//
// Layouts    features, previous [chunks, elements], a stride between chunks; partials [chunks, slabs, 2] f32.
// Who does what
//            A block of 256 threads adds a slab of 16384 elements: grid.x slabs, grid.y chunks. Thread t has the elements
//            2048 g + 8 t to 2048 g + 8 t + 7 of it, g from 0 to 7, and adds them in this order; lanes are added pairwise, warps in
//            order. The last block of a chunk to arrive adds the slabs in f64, decides, and counts the step. A chunk whose
//            decision is known beforehand is only copied, or not touched.
//            src/compression/drift/host.rs adds in the same order: the sums are its bits.
// Bytes      chunks * elements * sizeof(dtype) * 2 read (3 with keep: one written), each once.
// FLOPs      4 an element.
// Determinism bitwise; no sum depends on the grid, the device, or other chunks.
#pragma once
#include "common/chunk.cuh"
#include "common/ptx/atomic.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/math.cuh"
#include "common/ptx/shared.cuh"
#include "common/ptx/warp.cuh"

namespace nxs::compression {

constexpr u32 kDriftThreads = 256, kDriftGroup = 8;
constexpr u32 kDriftGroups = NXS_DRIFT_SLAB / (kDriftThreads * kDriftGroup);

NXS_DEVICE float magnitude(float x) { return bits_float(float_bits(x) & 0x7fffffffu); }

struct alignas(8) DriftSums {
  float difference, magnitude;
};

template <typename T> NXS_DEVICE void add_drift(DriftSums& sums, T feature, T before) {
  const float f = to_f32(feature), p = to_f32(before);
  sums.difference += magnitude(f - p);
  sums.magnitude += magnitude(p);
}

// Adds a thread's part of the slab at `from`, `elements` of the chunk being left; copies it where `keep`.
template <typename T, bool kWide>
NXS_DEVICE void drift_slab(DriftSums& sums, const T* features, T* previous, i64 left, bool tested, bool keep) {
  const u32 first = thread_index() * kDriftGroup;
  if (kWide && left >= NXS_DRIFT_SLAB) {
    constexpr u32 kBatch = 8 / sizeof(T);  // groups in flight: 64 bytes of each tensor a thread
#pragma unroll 1
    for (u32 g = 0; g < kDriftGroups; g += kBatch) {
      Vec<T, kDriftGroup> f[kBatch], p[kBatch];
#pragma unroll
      for (u32 b = 0; b < kBatch; ++b) {
        const u32 at = first + (g + b) * kDriftThreads * kDriftGroup;
        f[b] = load_chunk_nc<T, kDriftGroup>(features + at);
        if (tested) p[b] = load_chunk<T, kDriftGroup>(previous + at);
      }
#pragma unroll
      for (u32 b = 0; b < kBatch; ++b) {
        if (tested) {
#pragma unroll
          for (u32 j = 0; j < kDriftGroup; ++j) add_drift(sums, f[b].data[j], p[b].data[j]);
        }
        if (keep) {
          const u32 at = first + (g + b) * kDriftThreads * kDriftGroup;
          constexpr u32 kPiece = 16 / sizeof(T);
#pragma unroll
          for (u32 j = 0; j < kDriftGroup; j += kPiece) {
            Vec<T, kPiece> piece;
#pragma unroll
            for (u32 k = 0; k < kPiece; ++k) piece.data[k] = f[b].data[j + k];
            store_global_streaming(reinterpret_cast<Vec<T, kPiece>*>(previous + at + j), piece);
          }
        }
      }
    }
    return;
  }
#pragma unroll 1
  for (u32 g = 0; g < kDriftGroups; ++g) {
    const u32 at = first + g * kDriftThreads * kDriftGroup;
#pragma unroll 1
    for (u32 j = 0; j < kDriftGroup && at + j < left; ++j) {
      const T f = load_global_nc(features + at + j);
      if (tested) add_drift(sums, f, load_global(previous + at + j));
      if (keep) store_global(previous + at + j, f);
    }
  }
}

// The sum over a block, in thread 0. `scratch`: 8 words.
NXS_DEVICE float drift_block_sum(float value, u32 scratch) {
#pragma unroll
  for (u32 distance = 16; distance > 0; distance /= 2) value = value + shuffle_xor(value, distance);
  if (lane_index() == 0) store_shared(scratch + thread_index() / 32 * 4, value);
  block_sync();
  float sum = 0;
  if (thread_index() == 0) {
#pragma unroll
    for (u32 warp = 0; warp < kDriftThreads / 32; ++warp) sum += load_shared<float>(scratch + warp * 4);
  }
  return sum;
}

// Sums of both columns of the partials of a chunk, in thread 0.
struct DriftTotals {
  double difference, magnitude;
};
NXS_DEVICE DriftTotals drift_totals(const DriftSums* partials, u32 slabs, u32 scratch) {
  double difference = 0, magnitude = 0;
  for (u32 slab = thread_index(); slab < slabs; slab += kDriftThreads) {
    const DriftSums sums = load_global(partials + slab);
    difference += static_cast<double>(sums.difference);
    magnitude += static_cast<double>(sums.magnitude);
  }
  const u32 mine = scratch + thread_index() * 16;
  store_shared(mine, DriftTotals{difference, magnitude});
  block_sync();
#pragma unroll 1
  for (u32 half = kDriftThreads / 2; half > 0; half /= 2) {
    if (thread_index() < half) {
      DriftTotals totals = load_shared<DriftTotals>(mine);
      const DriftTotals other = load_shared<DriftTotals>(mine + half * 16);
      totals.difference += other.difference;
      totals.magnitude += other.magnitude;
      store_shared(mine, totals);
    }
    block_sync();
  }
  return load_shared<DriftTotals>(scratch);
}

constexpr u32 kDriftShared = kDriftThreads * sizeof(DriftTotals);

template <typename T, bool kWide>
__global__ void __launch_bounds__(kDriftThreads, 4) drift_kernel(const __grid_constant__ nxs_drift_params p) {
  const u32 chunk = block_index_y(), slab = block_index_x(), slabs = grid_size_x();
  const i32 force = p.force_or_null ? load_global_nc(p.force_or_null + chunk) : NXS_DRIFT_TEST;
  if (force == NXS_DRIFT_LEAVE) return;
  const i32 step = load_global(p.steps + chunk);
  const bool forced = force == NXS_DRIFT_COMPUTE || step < p.compute_before || step >= p.compute_from;
  const bool tested = !forced && step >= p.warmup;
  const u32 scratch = dynamic_shared();

  DriftSums sums = {0, 0};
  const i64 from = static_cast<i64>(slab) * NXS_DRIFT_SLAB;
  if (tested || p.keep)
    drift_slab<T, kWide>(sums, static_cast<const T*>(p.features) + chunk * p.features_stride_chunk + from,
                         static_cast<T*>(p.previous) + chunk * p.previous_stride_chunk + from, p.elements - from, tested,
                         p.keep != 0);
  DriftSums* partials = static_cast<DriftSums*>(p.workspace) + static_cast<i64>(chunk) * slabs;
  if (tested) {
    const float difference = drift_block_sum(sums.difference, scratch);
    const float magnitude = drift_block_sum(sums.magnitude, scratch + 32);
    if (thread_index() == 0) store_global(partials + slab, DriftSums{difference, magnitude});
  }
  // Every thread has read `steps` before the block arrives.
  block_sync();
  if (thread_index() == 0) store_shared(scratch + 64, atomic_inc_acq_rel_global(p.counters + chunk, slabs - 1));
  block_sync();
  if (load_shared<u32>(scratch + 64) != slabs - 1) return;
  block_sync();

  DriftTotals totals = {0, 0};
  if (tested) totals = drift_totals(partials, slabs, scratch);
  if (thread_index() != 0) return;
  float change = bits_float(0x7fc00000u);
  i32 compute = 1;
  if (tested) {
    const double elements = static_cast<double>(p.elements);
    const double mean = divide_f64(totals.magnitude, elements);
    change = static_cast<float>(divide_f64(divide_f64(totals.difference, elements), mean + p.eps));
    float rescaled = change;
    if (p.polynomial_terms > 0) {
      double sum = 0;
      for (i32 i = 0; i < p.polynomial_terms; ++i) sum = fma_f64(sum, static_cast<double>(change), p.polynomial[i]);
      rescaled = static_cast<float>(sum);
    }
    const float sum = load_global(p.accumulated + chunk) + rescaled;
    compute = !(sum < p.threshold);
    store_global(p.accumulated + chunk, compute ? 0.0f : sum);
  } else if (!forced || p.reset_forced) {
    store_global(p.accumulated + chunk, 0.0f);
  }
  store_global(p.decision + chunk, compute);
  if (p.change_or_null) store_global(p.change_or_null + chunk, change);
  store_global(p.steps + chunk, step == INT32_MAX ? step : step + 1);
}

template <typename T> nxs_status drift_launch(const nxs_drift_params& p, void* stream) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((p.elements + NXS_DRIFT_SLAB - 1) / NXS_DRIFT_SLAB),
                    static_cast<unsigned>(p.chunks));
  shape.block = kDriftThreads;
  shape.dynamic_smem = kDriftShared;
  return p.vector ? launch(drift_kernel<T, true>, shape, stream, p) : launch(drift_kernel<T, false>, shape, stream, p);
}

}  // namespace nxs::compression
