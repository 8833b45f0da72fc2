// What one GPU reaches: copy, DRAM and L2 bandwidth, random rows from L2, exponentials, and the time of an empty kernel
// and of a bare lookup in a CUDA graph. Prints JSON. A bench's floor is taken from these, not from a data sheet.
//
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -o ceilings ceilings.cu
//   ./ceilings > ceilings.json
//
// Who does what  read: the grid fills the GPU; a block walks the working set tile after tile (128 KiB: a thread takes 8
//                loads of 16 bytes, neighbours next to each other), each block from another tile on, round and round.
//                gather: a warp takes a row of 512 bytes, 16 a lane; 8 rows, picked by a linear congruential
//                generator in registers, are in flight at a time.
//                exp: a thread has 8 chains of ex2 in registers.
// Loads          volatile asm, so that none is hoisted, merged or dropped; they go past L1, so that L2 is what is
//                measured; their xor goes to memory if it has a value that it hardly has.
// Occupancy      one block of 1024 threads a multiprocessor, 128 KiB in flight. Two blocks that walk the same tiles would
//                share their loads in L1 and show twice what L2 gives.
// Times          CUDA events; each figure is the median of 15 rounds after 3 to warm up.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr int kThreads = 1024;
constexpr uint64_t kTileBytes = 128 << 10;
constexpr int kInFlight = 8;
static_assert(kTileBytes == kThreads * 16 * kInFlight);
constexpr uint64_t kRowBytes = 512;
constexpr uint64_t kMiB = 1 << 20;
constexpr int kWarmUp = 3, kRounds = 15;

#define CHECK(call)                                                                                \
  do {                                                                                             \
    const cudaError_t status = (call);                                                             \
    if (status != cudaSuccess) {                                                                   \
      std::fprintf(stderr, "ceilings: %s: %s\n", #call, cudaGetErrorString(status));               \
      std::exit(1);                                                                                \
    }                                                                                              \
  } while (0)

__device__ __forceinline__ uint4 load_past_l1(const void* address) {
  uint4 v;
  // .cg: cached in L2 only.
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

__device__ __forceinline__ void mix(uint32_t& sum, const uint4& v) { sum ^= v.x ^ v.y ^ v.z ^ v.w; }

// Each block reads `tiles_each` tiles of the `tiles` of the working set.
__global__ void __launch_bounds__(kThreads, 1)
    read_kernel(const char* data, uint32_t tiles, uint32_t tiles_each, uint32_t* sink) {
  uint32_t tile = static_cast<uint32_t>(static_cast<uint64_t>(blockIdx.x) * tiles / gridDim.x);
  uint32_t sum = 0;
  for (uint32_t n = 0; n < tiles_each; ++n) {
    const char* from = data + tile * kTileBytes + threadIdx.x * 16;
    uint4 v[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) v[i] = load_past_l1(from + i * (kThreads * 16));
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) mix(sum, v[i]);
    tile = tile + 1 == tiles ? 0 : tile + 1;
  }
  if (sum == 0x9E3779B9u) *sink = sum;
}

// Each warp reads `rows_each` random rows of the `rows` of the working set.
__global__ void __launch_bounds__(kThreads, 1)
    gather_kernel(const char* data, uint32_t rows, uint32_t rows_each, uint32_t* sink) {
  const uint32_t warp = (blockIdx.x * kThreads + threadIdx.x) / 32;
  const char* mine = data + threadIdx.x % 32 * 16;
  uint32_t state = warp * 0x9E3779B9u + 12345u, sum = 0;
  for (uint32_t n = 0; n < rows_each; n += kInFlight) {
    uint4 v[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      state = state * 1664525u + 1013904223u;
      // The upper bits of a congruential generator are the random ones, and they pick the row.
      v[i] = load_past_l1(mine + static_cast<uint64_t>(__umulhi(state, rows)) * kRowBytes);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) mix(sum, v[i]);
  }
  if (sum == 0x9E3779B9u) *sink = sum;
}

// Each thread takes `each` times 8 exponentials; they tend to infinity, which is no slower.
__global__ void __launch_bounds__(kThreads, 2) exp_kernel(uint32_t each, uint32_t* sink) {
  float x[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) x[i] = -static_cast<float>(threadIdx.x + i);
  for (uint32_t n = 0; n < each; ++n) {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x[i]));
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) sum += x[i];
  if (sum == 1.5f) *sink = 1;
}

__global__ void empty_kernel() {}

// The least that a lookup does: load an index, load what it points to, store it.
__global__ void lookup_kernel(const uint32_t* data, uint32_t* out) {
  uint32_t index, value;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(index) : "l"(data + threadIdx.x));
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(value) : "l"(data + (index & 1023)));
  out[threadIdx.x] = value;
}

struct Gpu {
  cudaStream_t stream;
  cudaEvent_t start, end;
  int multiprocessors;
  uint32_t* sink;
};

// Median seconds of what `work` enqueues.
template <typename Work> double seconds(const Gpu& gpu, Work work) {
  std::vector<float> times;
  for (int round = 0; round < kWarmUp + kRounds; ++round) {
    CHECK(cudaEventRecord(gpu.start, gpu.stream));
    work();
    CHECK(cudaGetLastError());
    CHECK(cudaEventRecord(gpu.end, gpu.stream));
    CHECK(cudaEventSynchronize(gpu.end));
    float milliseconds = 0;
    CHECK(cudaEventElapsedTime(&milliseconds, gpu.start, gpu.end));
    if (round >= kWarmUp) times.push_back(milliseconds);
  }
  std::nth_element(times.begin(), times.begin() + kRounds / 2, times.end());
  return times[kRounds / 2] * 1e-3;
}

// GB/s of reading a working set of `bytes` again and again, about `total` bytes in all.
double read_rate(const Gpu& gpu, const char* data, uint64_t bytes, uint64_t total) {
  const uint32_t blocks = gpu.multiprocessors, tiles = static_cast<uint32_t>(bytes / kTileBytes);
  const uint32_t tiles_each = static_cast<uint32_t>((total / kTileBytes + blocks - 1) / blocks);
  const double time =
      seconds(gpu, [&] { read_kernel<<<blocks, kThreads, 0, gpu.stream>>>(data, tiles, tiles_each, gpu.sink); });
  return static_cast<double>(blocks) * tiles_each * kTileBytes / time * 1e-9;
}

// The same for random rows.
double gather_rate(const Gpu& gpu, const char* data, uint64_t bytes, uint64_t total) {
  const uint32_t blocks = gpu.multiprocessors, warps = blocks * (kThreads / 32);
  const uint32_t rows = static_cast<uint32_t>(bytes / kRowBytes);
  const uint32_t rows_each = static_cast<uint32_t>(total / kRowBytes / warps / kInFlight + 1) * kInFlight;
  const double time =
      seconds(gpu, [&] { gather_kernel<<<blocks, kThreads, 0, gpu.stream>>>(data, rows, rows_each, gpu.sink); });
  return static_cast<double>(warps) * rows_each * kRowBytes / time * 1e-9;
}

// 10^9 exponentials a second, as ex2 gives them.
double exp_rate(const Gpu& gpu) {
  const uint32_t blocks = 2 * gpu.multiprocessors, each = 4096;
  const double time = seconds(gpu, [&] { exp_kernel<<<blocks, kThreads, 0, gpu.stream>>>(each, gpu.sink); });
  return static_cast<double>(blocks) * kThreads * each * kInFlight / time * 1e-9;
}

constexpr int kKernels = 200;

// Microseconds a kernel of a graph of many, which `enqueue` puts on the stream one at a time.
template <typename Enqueue> double graph_us(const Gpu& gpu, Enqueue enqueue) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  enqueue();
  CHECK(cudaStreamSynchronize(gpu.stream));
  CHECK(cudaStreamBeginCapture(gpu.stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kKernels; ++i) enqueue();
  CHECK(cudaStreamEndCapture(gpu.stream, &graph));
  CHECK(cudaGraphInstantiate(&exec, graph, 0));
  const double time = seconds(gpu, [&] { CHECK(cudaGraphLaunch(exec, gpu.stream)); });
  CHECK(cudaGraphExecDestroy(exec));
  CHECK(cudaGraphDestroy(graph));
  return time / kKernels * 1e6;
}

// Microseconds that enqueuing costs the calling thread, which no library can undercut.
template <typename Enqueue> double enqueue_us(const Gpu& gpu, Enqueue enqueue) {
  std::vector<double> times;
  for (int round = 0; round < kRounds; ++round) {
    CHECK(cudaStreamSynchronize(gpu.stream));
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kKernels; ++i) enqueue();
    times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::nth_element(times.begin(), times.begin() + kRounds / 2, times.end());
  return times[kRounds / 2] / kKernels * 1e6;
}

}  // namespace

int main() {
  cudaDeviceProp properties;
  int driver = 0, runtime = 0;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  CHECK(cudaDriverGetVersion(&driver));
  CHECK(cudaRuntimeGetVersion(&runtime));
  Gpu gpu;
  gpu.multiprocessors = properties.multiProcessorCount;
  CHECK(cudaStreamCreateWithFlags(&gpu.stream, cudaStreamNonBlocking));
  CHECK(cudaEventCreate(&gpu.start));
  CHECK(cudaEventCreate(&gpu.end));
  CHECK(cudaMalloc(&gpu.sink, 32 * sizeof(*gpu.sink)));

  // Two buffers of up to 2 GiB: far beyond L2, and no more than a third of what is free.
  size_t free_bytes = 0, total_bytes = 0;
  CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
  const uint64_t large = std::min<uint64_t>(2048 * kMiB, free_bytes / 3 / kTileBytes * kTileBytes);
  char *a = nullptr, *b = nullptr;
  CHECK(cudaMalloc(&a, large));
  CHECK(cudaMalloc(&b, large));
  CHECK(cudaMemsetAsync(a, 1, large, gpu.stream));
  CHECK(cudaMemsetAsync(b, 2, large, gpu.stream));

  const double copy_time =
      seconds(gpu, [&] { CHECK(cudaMemcpyAsync(b, a, large, cudaMemcpyDeviceToDevice, gpu.stream)); });
  const double write_time = seconds(gpu, [&] { CHECK(cudaMemsetAsync(b, 3, large, gpu.stream)); });
  const double copy = 2.0 * large / copy_time * 1e-9, write = large / write_time * 1e-9;
  const double dram = read_rate(gpu, a, large, large);

  std::printf("{\n  \"device\": \"%s\",\n", properties.name);
  std::printf("  \"driver_version\": \"%d.%d\",\n", driver / 1000, driver % 1000 / 10);
  std::printf("  \"runtime_version\": \"%d.%d\",\n", runtime / 1000, runtime % 1000 / 10);
  std::printf("  \"multiprocessors\": %d,\n", properties.multiProcessorCount);
  std::printf("  \"l2_bytes\": %d,\n", properties.l2CacheSize);
  std::printf("  \"copy_gbps\": %.1f,\n  \"write_gbps\": %.1f,\n  \"dram_read_gbps\": %.1f,\n", copy, write, dram);
  // 40 MiB holds what 32 do not, where L2 still does.
  const uint64_t sets[] = {1, 2, 4, 8, 16, 32, 40};
  const uint64_t total = 2048 * kMiB;
  const auto list = [&](const char* name, auto rate) {
    std::printf("  \"%s\": [", name);
    const char* comma = "";
    for (uint64_t mib : sets) {
      if (mib * kMiB > large) continue;
      const unsigned size = static_cast<unsigned>(mib);
      std::printf("%s\n    {\"mib\": %u, \"gbps\": %.1f}", comma, size, rate(mib * kMiB));
      comma = ",";
    }
    std::printf("\n  ],\n");
  };
  list("l2_read", [&](uint64_t bytes) { return read_rate(gpu, a, bytes, total); });
  list("l2_gather_512", [&](uint64_t bytes) { return gather_rate(gpu, a, bytes, total); });
  std::printf("  \"exp2_gops\": %.1f,\n", exp_rate(gpu));
  const auto empty = [&] { empty_kernel<<<1, 32, 0, gpu.stream>>>(); };
  const uint32_t* indices = reinterpret_cast<const uint32_t*>(a);
  const auto lookup = [&] { lookup_kernel<<<1, 32, 0, gpu.stream>>>(indices, gpu.sink); };
  std::printf("  \"empty_kernel_graph_us\": %.3f,\n", graph_us(gpu, empty));
  std::printf("  \"lookup_kernel_graph_us\": %.3f,\n", graph_us(gpu, lookup));
  std::printf("  \"empty_kernel_enqueue_us\": %.3f\n}\n", enqueue_us(gpu, empty));

  CHECK(cudaFree(a));
  CHECK(cudaFree(b));
  CHECK(cudaFree(gpu.sink));
  return 0;
}
