// What a conformance program needs of a device, on the emulator and on a GPU: buffers, and a check of launches.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "nextscale.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "nextscale_emulator.h"
#endif

namespace test {

inline int passed = 0, failed = 0;
inline void check(bool ok, const std::string& name) {
  ok ? ++passed : ++failed;
  if (!ok) printf("FAILED %s\n", name.c_str());
}
// The program's last line, which run.sh adds up.
inline int finish() {
  printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}

#if defined(__CUDACC__)
inline void* allocate(size_t bytes) {
  void* p = nullptr;
  if (cudaMalloc(&p, bytes)) printf("cudaMalloc failed\n"), exit(2);
  return p;
}
inline void release(void* p) { cudaFree(p); }
inline void copy(void* to, const void* from, size_t bytes) {
  if (const auto error = cudaMemcpy(to, from, bytes, cudaMemcpyDefault))
    printf("cudaMemcpy: %s\n", cudaGetErrorString(error)), exit(2);
}
inline nxs_status finish_launch(nxs_status status) {
  const auto error = cudaDeviceSynchronize();
  if (status || error) printf("launch: %d, then %s\n", status, cudaGetErrorString(error));
  return status ? status : static_cast<nxs_status>(error);
}
inline bool is_emulated() { return false; }
#else
inline void* allocate(size_t bytes) { return aligned_alloc(256, (bytes + 255) / 256 * 256); }
inline void release(void* p) { free(p); }
inline void copy(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
inline nxs_status finish_launch(nxs_status status) { return status; }
inline bool is_emulated() { return true; }
#endif

template <typename T> class Buffer {
 public:
  explicit Buffer(size_t count) : count_(count), p_(static_cast<T*>(allocate(count * sizeof(T)))) {
    const std::vector<uint8_t> poison(count * sizeof(T), 0xfe);
    copy(p_, poison.data(), poison.size());
  }
  explicit Buffer(const std::vector<T>& values)
      : count_(values.size()), p_(static_cast<T*>(allocate(count_ * sizeof(T)))) {
    copy(p_, values.data(), count_ * sizeof(T));
  }
  ~Buffer() { release(p_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return p_; }
  std::vector<T> read() const {
    std::vector<T> values(count_);
    copy(values.data(), p_, count_ * sizeof(T));
    return values;
  }

 private:
  size_t count_;
  T* p_;
};

// FNV-1a of the bits: equal on the emulator and on a GPU where the arithmetic is defined to the bit.
template <typename T> void print_checksum(const char* name, const std::vector<T>& values) {
  uint64_t hash = 0xcbf29ce484222325ull;
  const auto* bytes = reinterpret_cast<const uint8_t*>(values.data());
  for (size_t i = 0; i < values.size() * sizeof(T); ++i) hash = (hash ^ bytes[i]) * 0x100000001b3ull;
  printf("checksum %-40s %016llx\n", name, static_cast<unsigned long long>(hash));
}

// A small generator of test data.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ull + 1) {}
  uint32_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<uint32_t>(state_ >> 32);
  }
  uint32_t below(uint32_t n) { return next() % n; }
  float symmetric() { return static_cast<float>(next() >> 8) * 0x1p-23f - 1.0f; }

 private:
  uint64_t state_;
};

inline uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_bf16(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

}  // namespace test
