// The execution model: thread and block indices, barriers, shuffles, votes.
//
// kernels/common/ptx/ is the only folder that may contain asm, CUDA built-ins or CUDA headers. A kernel includes its
// headers as "common/ptx/<name>.cuh" and uses nothing else of CUDA beyond the qualifiers __global__, __device__,
// __launch_bounds__ and __grid_constant__, so that the emulator can put its own folder of the same name first on the
// include path and compile the same kernel for the CPU. One function wraps one instruction.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#define NXS_DEVICE __device__ __forceinline__
// For what is rarely run and would take registers and instructions from what is run all the time.
#define NXS_DEVICE_CALL __device__ __noinline__

namespace nxs {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i32 = int32_t;
using i64 = int64_t;

constexpr u32 kWarpSize = 32;
constexpr u32 kFullWarp = 0xffffffffu;

NXS_DEVICE u32 thread_index() { return threadIdx.x; }
NXS_DEVICE u32 block_size() { return blockDim.x; }
NXS_DEVICE u32 block_index_x() { return blockIdx.x; }
NXS_DEVICE u32 block_index_y() { return blockIdx.y; }
NXS_DEVICE u32 block_index_z() { return blockIdx.z; }
NXS_DEVICE u32 grid_size_x() { return gridDim.x; }
NXS_DEVICE u32 grid_size_y() { return gridDim.y; }
NXS_DEVICE u32 grid_size_z() { return gridDim.z; }

// bar.sync 0: every thread of the block arrives; shared and global writes before it are visible after it.
NXS_DEVICE void block_sync() { __syncthreads(); }
// bar.warp.sync
NXS_DEVICE void warp_sync(u32 mask = kFullWarp) { __syncwarp(mask); }

}  // namespace nxs
