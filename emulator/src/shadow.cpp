// Who touched each byte, and whether the next one may.
#include <algorithm>

#include "machine.h"

namespace nxs::emulator {

void Clocks::resize(size_t agents) {
  seen.assign(agents, 0);
  proxied.assign(agents, 0);
  others = nullptr;
}

void Clocks::join(const Clocks& clocks) {
  for (size_t i = 0; i < seen.size(); ++i) seen[i] = std::max(seen[i], clocks.seen[i]);
  for (size_t i = 0; i < seen.size(); ++i) proxied[i] = std::max(proxied[i], clocks.proxied[i]);
  others = join(others, clocks.others);
}

void Clocks::meet(const Clocks& clocks) {
  for (size_t i = 0; i < seen.size(); ++i) seen[i] = std::min(seen[i], clocks.seen[i]);
  for (size_t i = 0; i < seen.size(); ++i) proxied[i] = std::min(proxied[i], clocks.proxied[i]);
  if (others != clocks.others) others = nullptr;
}

std::shared_ptr<const Clocks::Others> Clocks::join(const std::shared_ptr<const Others>& a,
                                                   const std::shared_ptr<const Others>& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  auto both = std::make_shared<Others>(*a);
  for (const auto& [cluster, clocks] : *b) {
    auto& mine = (*both)[cluster];
    if (!mine) {
      mine = clocks;
    } else if (mine != clocks) {
      auto joined = std::make_shared<Clocks>(*mine);
      joined->join(*clocks);
      mine = joined;
    }
  }
  return both;
}

static const Clocks* clocks_for(const Epoch& epoch, const Clocks& clocks) {
  if (epoch.cluster == machine->cluster) return &clocks;
  if (!clocks.others) return nullptr;
  const auto found = clocks.others->find(epoch.cluster);
  return found == clocks.others->end() ? nullptr : found->second.get();
}

bool happened(const Epoch& epoch, const Clocks& clocks) {
  if (epoch.agent == ~0u) return true;
  const Clocks* known = clocks_for(epoch, clocks);
  return known && known->seen[epoch.agent] >= epoch.step;
}

static bool fenced(const Epoch& epoch, const Clocks& clocks) {
  const Clocks* known = clocks_for(epoch, clocks);
  return known && known->proxied[epoch.agent] >= epoch.step;
}

u32 Block::wgmma_agent(u32 warp) const { return first_agent + machine->launch.block + warp; }
u32 Block::copy_agent(u32 slot) const { return wgmma_agent(machine->warps) + slot; }
static bool is_copy(const Epoch& epoch) {
  return epoch.agent % machine->agents_per_block >= machine->launch.block + machine->warps;
}
static bool is_wgmma(const Epoch& epoch) {
  return epoch.agent % machine->agents_per_block >= machine->launch.block && !is_copy(epoch);
}

std::string describe(const Epoch& epoch) {
  const u32 agents = machine->agents_per_block, in_block = epoch.agent % agents, rank = epoch.agent / agents;
  std::string who = is_copy(epoch)    ? "a copy that an mbarrier counts"
                    : is_wgmma(epoch) ? "a wgmma of warp " + std::to_string(in_block - machine->launch.block)
                                      : "thread " + std::to_string(in_block);
  if (epoch.cluster != machine->cluster) return who + " of another block";
  if (machine->launch.cluster > 1) who += " of rank " + std::to_string(rank);
  return who;
}


void Shadow::clear() {
  readers_.resize(1);
  for (Added& added : added_) added = {};
}

u32 Shadow::add_reader(u32 list, const Epoch& epoch, const Clocks* clocks) {
  if (list && readers_[list].epoch == epoch) return list;
  Added& added = added_[(list * 31 + epoch.agent * 7 + epoch.step) % std::size(added_)];
  if (added.result && added.list == list && added.epoch == epoch) return added.result;
  u32 rest = list;
  // Readers that this one follows need not be remembered: who follows this one follows them.
  if (list && clocks && happened(readers_[list].epoch, *clocks)) {
    rest = 0;
    for (u32 i = list; i; i = readers_[i].next)
      if (!happened(readers_[i].epoch, *clocks)) {
        readers_.push_back({readers_[i].epoch, rest});
        rest = static_cast<u32>(readers_.size() - 1);
      }
  }
  readers_.push_back({epoch, rest});
  added = {list, static_cast<u32>(readers_.size() - 1), epoch};
  return added.result;
}

void Shadow::check_writer(const Cell& cell, const Clocks& clocks, const char* what, Where where) const {
  if (happened(cell.writer, clocks)) return;
  if (is_copy(cell.writer))
    fail("unwaited copy", where, "%s of bytes that an asynchronous copy writes, without a wait for it", what);
  fail("race", where, "%s of bytes that %s wrote, with nothing that orders the two", what,
       describe(cell.writer).c_str());
}

void Shadow::check_readers(const Cell& cell, const Clocks& clocks, Where where) const {
  for (u32 i = cell.readers; i; i = readers_[i].next) {
    const Epoch& epoch = readers_[i].epoch;
    if (happened(epoch, clocks)) continue;
    if (is_wgmma(epoch)) fail("async read", where, "write of bytes that %s may still read", describe(epoch).c_str());
    fail("race", where, "write of bytes that %s read, with nothing that orders the two", describe(epoch).c_str());
  }
  if (cell.flags & kReadAsConstant)
    fail("race", where, "write of bytes that were read as constant (ld.global.nc) in this launch");
}

void Shadow::read(Cell* cells, u32 count, const Thread& thread, Access access, Where where) {
  const Epoch epoch = thread.epoch();
  Epoch checked;
  for (Cell* cell = cells; cell != cells + count; ++cell) {
    if (cell->pending_writes) fail("unwaited copy", where, "read of bytes that an asynchronous copy still writes");
    if (shared_ && !(cell->flags & kInitialised))
      fail("uninitialised", where, "read of shared memory that nobody wrote");
    if (cell->flags & kMbarrier) fail("race", where, "read of an mbarrier as data");
    if (access == Access::kReadConstant) {
      if (cell->writer.agent != ~0u)
        fail("race", where, "read as constant (ld.global.nc) of bytes that %s wrote in this launch",
             describe(cell->writer).c_str());
      cell->flags |= kReadAsConstant;
      continue;
    }
    if (!(cell->writer == checked) && !(access == Access::kReadAtomically && cell->flags & kWrittenAtomically)) {
      check_writer(*cell, thread.clocks, "read", where);
      checked = cell->writer;
    }
    if (access == Access::kRead) cell->readers = add_reader(cell->readers, epoch, &thread.clocks);
  }
}

void Shadow::write(Cell* cells, u32 count, const Thread& thread, Access access, Where where) {
  const bool atomic = access == Access::kAtomic;
  const Epoch epoch = thread.epoch();
  Epoch checked;
  u32 readers = 0;
  for (Cell* cell = cells; cell != cells + count; ++cell) {
    if (cell->pending_writes) fail("unwaited copy", where, "write of bytes that an asynchronous copy still writes");
    if (cell->pending_reads) fail("async read", where, "write of bytes that an asynchronous operation may still read");
    if (cell->flags & kMbarrier) fail("race", where, "write of an mbarrier as data");
    if (atomic && shared_ && !(cell->flags & kInitialised))
      fail("uninitialised", where, "atomic on shared memory that nobody wrote");
    if (!(cell->writer == checked) && !(atomic && cell->flags & kWrittenAtomically)) {
      check_writer(*cell, thread.clocks, "write", where);
      checked = cell->writer;
    }
    if ((cell->readers && cell->readers != readers) || cell->flags & kReadAsConstant) {
      check_readers(*cell, thread.clocks, where);
      readers = cell->readers;
    }
    cell->writer = epoch;
    cell->readers = 0;
    cell->flags = kInitialised | (atomic ? kWrittenAtomically : 0);
  }
}

void Shadow::begin_read(Cell* cells, u32 count, const Clocks& clocks, Where where) {
  for (Cell* cell = cells; cell != cells + count; ++cell) {
    if (cell->pending_writes) fail("unwaited copy", where, "asynchronous read of bytes that a copy still writes");
    if (shared_ && !(cell->flags & kInitialised))
      fail("uninitialised", where, "asynchronous read of shared memory that nobody wrote");
    if (cell->flags & kMbarrier) fail("race", where, "asynchronous read of an mbarrier as data");
    if (cell == cells || !(cell->writer == cell[-1].writer)) {
      check_writer(*cell, clocks, "asynchronous read", where);
      if (cell->writer.agent != ~0u && !(cell->flags & kWrittenAsync) && !fenced(cell->writer, clocks))
        fail("proxy fence", where, "asynchronous read of bytes that %s wrote with no fence.proxy.async after it",
             describe(cell->writer).c_str());
    }
  }
  if (shared_)
    for (Cell* cell = cells; cell != cells + count; ++cell) ++cell->pending_reads;
}

void Shadow::begin_write(Cell* cells, u32 count, const Clocks& clocks, Where where) {
  for (Cell* cell = cells; cell != cells + count; ++cell) {
    if (cell->pending_writes) fail("unwaited copy", where, "a second asynchronous copy to bytes that one still writes");
    if (cell->pending_reads) fail("async read", where, "copy to bytes that an asynchronous operation may still read");
    if (cell->flags & kMbarrier) fail("race", where, "copy onto an mbarrier");
    if (cell == cells || !(cell->writer == cell[-1].writer)) check_writer(*cell, clocks, "asynchronous write", where);
    if (cell == cells || cell->readers != cell[-1].readers || cell->flags & kReadAsConstant)
      check_readers(*cell, clocks, where);
  }
  for (Cell* cell = cells; cell != cells + count; ++cell) ++cell->pending_writes;
}

void Shadow::end_read(Cell* cells, u32 count, const Epoch& epoch) {
  for (Cell* cell = cells; cell != cells + count; ++cell) {
    if (shared_ && cell->pending_reads) --cell->pending_reads;
    cell->readers = add_reader(cell->readers, epoch, nullptr);
  }
}

void Shadow::end_write(Cell* cells, u32 count, const Epoch& epoch, u8 flags, Swizzle swizzle) {
  for (Cell* cell = cells; cell != cells + count; ++cell) {
    --cell->pending_writes;
    cell->writer = epoch;
    cell->readers = 0;
    cell->flags = flags;
    cell->swizzle = swizzle;
  }
}

}  // namespace nxs::emulator
