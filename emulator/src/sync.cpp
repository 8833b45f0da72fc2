// Barriers, warp collectives, mbarriers, clusters, register limits.
#include <algorithm>

#include "machine.h"

namespace nxs::emulator {

// ---- bar.sync, bar.arrive

void block_barrier(u32 id, u32 threads, bool wait, bool whole_block, Where where) {
  Block& block = *self->block;
  if (whole_block) threads = self->place.block_threads;
  if (id >= kNamedBarriers) fail("barrier", where, "there is no barrier %u", id);
  if (!threads || threads % kWarp || threads > self->place.block_threads)
    fail("barrier", where, "barrier %u for %u threads: a multiple of 32 up to the block's %u is due", id, threads,
         self->place.block_threads);
  Barrier& barrier = block.barriers[id];
  if (barrier.arrived.empty()) barrier.expected = threads;
  if (barrier.expected != threads)
    fail("barrier", where, "barrier %u for %u threads, but others came to it for %u", id, threads, barrier.expected);
  for (const auto& [other, line] : barrier.arrived) {
    if (other == self) fail("arrival", where, "a second arrival at barrier %u before the first was answered", id);
    if (other->place.thread / kWarp == self->place.thread / kWarp && line != where.line())
      fail("divergence", where, "lanes of one warp come to barrier %u here and at line %u", id, line);
  }
  if (whole_block && block.alive < threads)
    fail("barrier", where, "a barrier of the whole block, of which %u threads have ended", threads - block.alive);
  barrier.arrived.push_back({self, where.line()});
  barrier.clocks.join(self->clocks);
  self->tick();
  if (barrier.arrived.size() < threads) {
    if (wait) block_on(barrier.waiting, "a barrier", where);
    return;
  }
  ++counts.barriers;
  if (wait) barrier.waiting.push_back(self);
  for (Thread* thread : barrier.waiting) thread->clocks.join(barrier.clocks);
  std::erase(barrier.waiting, self);
  machine->wake(barrier.waiting);
  barrier.arrived.clear();
  barrier.clocks.resize(barrier.clocks.seen.size());
}

// ---- clusters

void cluster_complete() {
  if (!machine->cluster_arrived || machine->cluster_arrived < machine->cluster_alive) return;
  machine->cluster_arrived = 0;
  ++machine->cluster_phase;
  ++counts.cluster_barriers;
  machine->cluster_completed.join(machine->cluster_clocks);
  machine->wake(machine->cluster_waiting);
}

void cluster_arrive(Where where) {
  if (self->at_cluster_barrier) fail("arrival", where, "a second arrival at the cluster barrier with no wait between");
  self->at_cluster_barrier = true;
  self->cluster_phase = machine->cluster_phase;
  machine->cluster_clocks.join(self->clocks);
  self->tick();
  ++machine->cluster_arrived;
  cluster_complete();
}

void cluster_wait(Where where) {
  if (!self->at_cluster_barrier) fail("arrival", where, "a wait at the cluster barrier with no arrival before it");
  if (self->cluster_phase == machine->cluster_phase) block_on(machine->cluster_waiting, "the cluster", where);
  self->at_cluster_barrier = false;
  self->clocks.join(machine->cluster_completed);
}

// ---- setmaxnreg

void change_registers(u32 registers, u32 blocks, bool raise, Where where) {
  Block& block = *self->block;
  // Blocks that share a multiprocessor begin with less; a launch does not say, the first change does.
  const u32 launch = launch_registers(self->place.block_threads * blocks);
  if (blocks > 1)
    for (Warpgroup& group : block.warpgroups)
      if (group.registers == launch_registers(self->place.block_threads)) group.registers = launch;
  if (registers < 24 || registers > 256 || registers % 8)
    fail("registers", where, "a limit of %u registers; a multiple of 8 from 24 to 256 is due", registers);
  Warpgroup& group = block.warpgroups[self->place.thread / kWarpgroup];
  if (group.asked && (group.asking != registers || group.raising != raise))
    fail("divergence", where, "threads of one warpgroup ask for %u and for %u registers", group.asking, registers);
  if (raise ? registers < group.registers : registers > group.registers)
    fail("registers", where, "a limit of %u registers is not %s than the present %u", registers,
         raise ? "more" : "less", group.registers);
  group.asking = registers;
  group.raising = raise;
  const u32 members = std::min(kWarpgroup, self->place.block_threads - self->place.thread / kWarpgroup * kWarpgroup);
  if (++group.asked < members) {
    block_on(group.waiting, "the other warps of its warpgroup", where);
    return;
  }
  const u32 pool = launch * static_cast<u32>(block.warpgroups.size());
  for (;;) {
    u32 used = registers;
    for (const Warpgroup& other : block.warpgroups) used += &other == &group ? 0 : other.registers;
    if (used <= pool) break;
    block_on(block.registers_waiting, "registers that other warpgroups hold", where);
  }
  group.registers = registers;
  group.asked = 0;
  machine->wake(group.waiting);
  machine->wake(block.registers_waiting);
}

// ---- warps

void warp_collective(Collective kind, u32 mask, void* slot, void (*finish)(Slots& slots, u32 mask), Where where) {
  Warp& warp = self->block->warps[self->place.thread / kWarp];
  const u32 lane = self->place.thread % kWarp, first = self->place.thread - lane;
  if (!(mask >> lane & 1)) fail("divergence", where, "lane %u is not in the mask 0x%08x that it gives", lane, mask);
  WarpMeeting* meeting = nullptr;
  for (const auto& other : warp.meetings) {
    if (!(other->mask >> lane & 1)) continue;
    const bool same_place = kind == Collective::kSync || other->where.line() == where.line();
    if (other->kind == kind && other->mask == mask && same_place)
      meeting = other.get();
    else if (other->arrived & mask)  // lanes that wait for this one there, and that this one would wait for here
      fail("divergence", where,
           "lane %u is here with mask 0x%08x while others of its warp are at line %u with mask 0x%08x", lane, mask,
           other->where.line(), other->mask);
  }
  if (!meeting) {
    for (u32 i = 0; i < kWarp; ++i)
      if (mask >> i & 1)
        if (first + i >= self->place.block_threads ||
            machine->threads[self->block->rank * self->place.block_threads + first + i]->state == Thread::kDone)
          fail("divergence", where, "lane %u of the mask 0x%08x has ended or does not exist", i, mask);
    warp.meetings.push_back(std::make_unique<WarpMeeting>());
    meeting = warp.meetings.back().get();
    meeting->kind = kind;
    meeting->mask = mask;
    meeting->where = where;
    if (kind == Collective::kSync) meeting->clocks.resize(self->clocks.seen.size());
  }
  meeting->slots[lane] = slot;
  meeting->arrived |= 1u << lane;
  if (kind == Collective::kSync) {
    meeting->clocks.join(self->clocks);
    self->tick();
  }
  if (meeting->arrived != mask) {
    block_on(meeting->waiting, "the lanes of its warp", where);
    return;
  }
  const auto position =
      std::find_if(warp.meetings.begin(), warp.meetings.end(), [&](const auto& m) { return m.get() == meeting; });
  const std::unique_ptr<WarpMeeting> complete = std::move(*position);
  warp.meetings.erase(position);
  if (finish) finish(complete->slots, mask);
  if (kind == Collective::kSync) {
    self->clocks.join(complete->clocks);
    for (Thread* thread : complete->waiting) thread->clocks.join(complete->clocks);
  }
  machine->wake(complete->waiting);
}

// ---- mbarriers

static Mbarrier& find_mbarrier(u32 address, bool cluster, Where where) {
  if (address % 8) fail("misaligned", where, "an mbarrier at shared address 0x%x", address);
  const SharedSpan span = shared_span(address, 8, cluster, where);
  const auto found = span.block->mbarriers.find(own_address(address));
  if (found == span.block->mbarriers.end())
    fail("uninitialised", where, "no mbarrier was initialised at shared address 0x%x", address);
  if (!happened(found->second->initialiser, self->clocks))
    fail("race", where, "use of an mbarrier that %s initialised, with nothing that orders the two",
         describe(found->second->initialiser).c_str());
  return *found->second;
}

Mbarrier& mbarrier_for_copy(u32 address, Where where) {
  Mbarrier& mbarrier = find_mbarrier(address, true, where);
  if (!mbarrier.fenced)
    fail("proxy fence", where,
         "a copy signals an mbarrier whose initialisation no fence.mbarrier_init or fence.proxy.async follows");
  return mbarrier;
}

void mbarrier_init(u32 address, u32 count, Where where) {
  if (address % 8) fail("misaligned", where, "an mbarrier at shared address 0x%x", address);
  if (!count || count >= 1u << 20) fail("arrival", where, "an mbarrier for %u arrivals", count);
  const SharedSpan span = shared_span(address, 8, false, where);
  Block& block = *span.block;
  auto& slot = block.mbarriers[own_address(address)];
  if (slot) fail("arrival", where, "a second initialisation of an mbarrier that was not invalidated");
  machine->shared_shadow.write(span.cells, 8, *self, Access::kWrite, where);
  for (u32 i = 0; i < 8; ++i) span.cells[i].flags |= kMbarrier;
  if (block.slots == kBarriersPerBlock) fail("arrival", where, "more than %u mbarriers in a block", kBarriersPerBlock);
  slot = std::make_unique<Mbarrier>();
  slot->count = slot->pending = count;
  slot->slot = block.slots++;
  slot->initialiser = self->epoch();
  slot->block = &block;
  slot->arriving.resize(self->clocks.seen.size());
  slot->completed.resize(self->clocks.seen.size());
}

void mbarrier_invalidate(u32 address, Where where) {
  const Mbarrier& mbarrier = find_mbarrier(address, false, where);
  if (!mbarrier.waiting.empty()) fail("arrival", where, "invalidation of an mbarrier that threads wait for");
  for (const auto& copy : machine->flying)
    if (copy->mbarrier == &mbarrier)
      fail("unwaited copy", where, "invalidation of an mbarrier that a copy will signal");
  const SharedSpan span = shared_span(address, 8, false, where);
  for (u32 i = 0; i < 8; ++i) span.cells[i].flags = 0;
  span.block->mbarriers.erase(own_address(address));
}

// Ends the phase when all arrivals and all bytes are there.
void complete_mbarrier(Mbarrier& mbarrier) {
  if (mbarrier.pending || mbarrier.bytes) return;
  ++mbarrier.phase;
  mbarrier.pending = mbarrier.count;
  mbarrier.arrived.clear();
  mbarrier.completed.join(mbarrier.arriving);
  ++counts.mbarrier_phases;
  machine->wake(mbarrier.waiting);
}

void mbarrier_arrive(u32 address, u32 expected_bytes, bool arrives, bool cluster, Where where, bool publishes) {
  Mbarrier& mbarrier = find_mbarrier(address, cluster, where);
  mbarrier.bytes += expected_bytes;
  if (expected_bytes >= 1u << 20 || mbarrier.bytes >= 1 << 20)
    fail("arrival", where, "an mbarrier that expects 2^20 bytes or more");
  if (!arrives) return;
  for (const Thread* other : mbarrier.arrived)
    if (other == self) fail("arrival", where, "a second arrival of this thread in one phase of an mbarrier");
  mbarrier.remote |= publishes && mbarrier.block != self->block;
  mbarrier.arrived.push_back(self);
  mbarrier.arriving.join(self->clocks);
  self->tick();
  --mbarrier.pending;
  complete_mbarrier(mbarrier);
  if (machine->random(4) == 3) let_others_run();
}

bool mbarrier_wait(u32 address, u32 parity, bool block, bool cluster, Where where) {
  if (parity > 1) fail("arrival", where, "a phase parity of %u", parity);
  Mbarrier& mbarrier = find_mbarrier(address, false, where);
  if (mbarrier.remote && !cluster)
    fail("race", where,
         "a wait with the block's scope for an mbarrier at which other blocks arrive; the cluster's is due");
  while ((mbarrier.phase & 1) == parity) {
    if (!block) {
      spin(where);
      if ((mbarrier.phase & 1) == parity) return false;
      break;
    }
    block_on(mbarrier.waiting, "an mbarrier", where);
  }
  self->clocks.join(mbarrier.completed);
  return true;
}

}  // namespace nxs::emulator
