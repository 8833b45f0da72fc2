// Global and shared memory, atomics and fences.
#include <algorithm>
#include <utility>

#include "machine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace nxs::emulator {

// ---- global

void check_bounds([[maybe_unused]] const void* p, [[maybe_unused]] u32 bytes, [[maybe_unused]] Where where) {
#if defined(__SANITIZE_ADDRESS__)
  if (__asan_region_is_poisoned(const_cast<void*>(p), bytes))
    fail("out of bounds", where, "access of %u bytes of global memory that are not all inside a buffer", bytes);
#endif
}

Cell* global_cells(const void* p, u32* count) {
  constexpr u32 kPage = 4096;
  const u64 address = reinterpret_cast<u64>(p), page = address / kPage;
  if (page != machine->last_page) {
    auto& cells = machine->pages[page];
    if (!cells) cells = std::make_unique<Cell[]>(kPage);
    machine->last_page = page;
    machine->last_cells = cells.get();
  }
  *count = std::min<u32>(*count, kPage - static_cast<u32>(address % kPage));
  return machine->last_cells + address % kPage;
}

void global_access(const void* p, u32 bytes, Access access, Where where) {
  if (!p) fail("out of bounds", where, "access through a null pointer");
  if (reinterpret_cast<u64>(p) % bytes) fail("misaligned", where, "access of %u bytes at %p", bytes, p);
  check_bounds(p, bytes, where);
  const bool writes = access == Access::kWrite || access == Access::kAtomic;
  each_global(p, bytes, [&](Cell* cells, u32 count) {
    writes ? machine->global_shadow.write(cells, count, *self, access, where)
           : machine->global_shadow.read(cells, count, *self, access, where);
  });
  if (writes) machine->idle = 0;
  self->block->warps[self->place.thread / kWarp].log.add(lane(), writes ? WarpLog::kGlobalStore : WarpLog::kGlobalLoad,
                                                         reinterpret_cast<u64>(p), bytes, where);
}

// ---- shared

SharedSpan shared_span(u32 address, u32 bytes, bool cluster, Where where) {
  Block* block = self->block;
  const u32 rank = address >> kRankShift, offset = own_address(address) - kDynamicShared;
  if (rank) {
    if (!cluster) fail("out of bounds", where, "an address of the cluster window where one of this block's is due");
    if (rank > machine->blocks.size())
      fail("out of bounds", where, "shared address 0x%x names no block of the cluster", address);
    block = &machine->blocks[rank - 1];
  }
  if (static_cast<u64>(offset) + bytes > block->shared.size())
    fail("out of bounds", where, "%u bytes at shared address 0x%x; the block has 0x%x to 0x%zx", bytes, address,
         kDynamicShared, kDynamicShared + block->shared.size());
  if (block != self->block) {
    if (!block->alive) fail("race", where, "access to shared memory of a block that has ended");
    if (!self->clocks.seen[block->first_agent])
      fail("race", where,
           "access to shared memory of a block that is not known to have begun: a cluster barrier must come first");
    block->remote[self->agent] = self->step();
  }
  return {block, block->shared.data() + offset, block->cells.data() + offset};
}

u8* shared_access(u32 address, u32 bytes, Access access, Where where, bool cluster) {
  if (address % bytes) fail("misaligned", where, "access of %u bytes at shared address 0x%x", bytes, address);
  const SharedSpan span = shared_span(address, bytes, cluster, where);
  if (access == Access::kRead || access == Access::kReadAtomically)
    machine->shared_shadow.read(span.cells, bytes, *self, access, where);
  else
    machine->shared_shadow.write(span.cells, bytes, *self, access, where);
  if (span.block == self->block)
    self->block->warps[self->place.thread / kWarp].log.add(lane(), WarpLog::kSharedAccess, address, bytes, where);
  return span.bytes;
}

u32 map_to_rank(u32 address, u32 rank, Where where) {
  if (rank >= machine->blocks.size())
    fail("out of bounds", where, "rank %u of a cluster of %zu", rank, machine->blocks.size());
  return own_address(address) | (rank + 1) << kRankShift;
}

// ---- ordering through memory

static void collect(const std::shared_ptr<const Clocks::Others>& others) {
  if (!others) return;
  self->clocks.others = Clocks::join(self->clocks.others, others);
  if (const auto own = self->clocks.others->find(machine->cluster); own != self->clocks.others->end()) {
    const auto clocks = own->second;
    self->clocks.join(*clocks);
  }
}

void atomic_order(const void* p, bool acquire, bool release, bool writes, Where where) {
  if (!writes)
    spin(where);
  else if (machine->random(4) == 3)
    let_others_run();
  auto& memory = machine->published[p];
  if (acquire)
    collect(memory);
  else
    self->collected = Clocks::join(self->collected, memory);
  if (release) {
    memory = Clocks::join(memory, snapshot(*self));
    self->tick();
  } else if (writes && self->published) {
    memory = Clocks::join(memory, self->published);
  }
}

void fence_memory() {
  collect(std::exchange(self->collected, nullptr));
  self->published = snapshot(*self);
  self->tick();
}

void fence_proxy() {
  self->clocks.proxied[self->agent] = self->step();
  self->tick();
  fence_mbarrier();
}

void fence_mbarrier() {
  for (auto& [address, mbarrier] : self->block->mbarriers)
    if (mbarrier->initialiser.agent == self->agent) mbarrier->fenced = true;
}

}  // namespace nxs::emulator
