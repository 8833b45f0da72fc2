#pragma once
#include "emulator/runtime.h"

namespace nxs {

constexpr u32 kWarpSize = 32;
constexpr u32 kFullWarp = 0xffffffffu;

NXS_DEVICE u32 thread_index() { return emulator::place().thread; }
NXS_DEVICE u32 block_size() { return emulator::place().block_threads; }
NXS_DEVICE u32 block_index_x() { return emulator::place().block.x; }
NXS_DEVICE u32 block_index_y() { return emulator::place().block.y; }
NXS_DEVICE u32 block_index_z() { return emulator::place().block.z; }
NXS_DEVICE u32 grid_size_x() { return emulator::place().grid.x; }
NXS_DEVICE u32 grid_size_y() { return emulator::place().grid.y; }
NXS_DEVICE u32 grid_size_z() { return emulator::place().grid.z; }

NXS_DEVICE void block_sync(NXS_WHERE) { emulator::block_barrier(0, 0, true, true, where); }
NXS_DEVICE void warp_sync(u32 mask = kFullWarp, NXS_WHERE) {
  emulator::warp_collective(emulator::Collective::kSync, mask, nullptr, nullptr, where);
}

}  // namespace nxs

#include "common/ptx/warp.cuh"
