// The state of one launch: a cluster of blocks at a time, one fiber a thread.
//
// Order in time is a happens-before relation kept in vector clocks. An agent is whatever acts on its own: a thread, the
// wgmma unit as one warp sees it, or the copies of one mbarrier. Each agent counts its own steps; a Clocks holds, for
// every agent of the cluster, up to which step its holder has seen it. Barriers and mbarriers carry Clocks from those
// who arrive to those who wait, release and acquire operations carry them through memory (also between clusters), and
// every byte remembers who touched it last. Two accesses of which neither has seen the other are a race, whatever the
// order they happened to run in.
#pragma once
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator/runtime.h"
#include "fiber.h"
#include "nextscale_emulator.h"

namespace nxs::emulator {

constexpr u32 kWarp = 32, kWarpgroup = 128, kBarriersPerBlock = 64, kNamedBarriers = 16;
constexpr u32 kSharedLimit = 232448, kSharedWithoutOptIn = 48 << 10;
constexpr u32 kRankShift = 24;  // an address of the cluster window is (rank + 1) << kRankShift | address
constexpr u32 own_address(u32 address) { return address & ((1u << kRankShift) - 1); }

struct Clocks {
  std::vector<u32> seen;     // steps of each agent that happened before
  std::vector<u32> proxied;  // steps of each agent that a proxy fence of that agent follows, before
  // What is known of other clusters of the launch.
  using Others = std::map<u32, std::shared_ptr<const Clocks>>;
  std::shared_ptr<const Others> others;

  void resize(size_t agents);
  void join(const Clocks& clocks);
  void meet(const Clocks& clocks);  // keeps what both know
  static std::shared_ptr<const Others> join(const std::shared_ptr<const Others>& a,
                                            const std::shared_ptr<const Others>& b);
};

struct Epoch {
  u32 cluster = ~0u, agent = ~0u, step = 0;
  bool operator==(const Epoch&) const = default;
};

// What is known of one byte.
struct Cell {
  Epoch writer;
  u32 readers = 0;  // a list in Shadow
  u8 pending_reads = 0, pending_writes = 0, flags = 0;
  Swizzle swizzle{};  // of the tensor copy that wrote it
};
enum CellFlags : u8 {
  kInitialised = 1,
  kWrittenAtomically = 2,
  kReadAsConstant = 4,
  kWrittenAsync = 8,  // by the async proxy: no proxy fence needed to read it there
  kMbarrier = 16,
  kKnownSwizzle = 32,
};

struct Thread;

// The cells of shared or of global memory. Every check reports through fail().
class Shadow {
 public:
  explicit Shadow(bool shared) : shared_(shared) {}
  void clear();
  void read(Cell* cells, u32 count, const Thread& thread, Access access, Where where);
  void write(Cell* cells, u32 count, const Thread& thread, Access access, Where where);
  // An asynchronous operation begins: what it will read or write must be ready for that now, as far as `clocks` know.
  void begin_read(Cell* cells, u32 count, const Clocks& clocks, Where where);
  void begin_write(Cell* cells, u32 count, const Clocks& clocks, Where where);
  // It ends, and was a step of `epoch`.
  void end_read(Cell* cells, u32 count, const Epoch& epoch);
  void end_write(Cell* cells, u32 count, const Epoch& epoch, u8 flags, Swizzle swizzle);

 private:
  struct Reader {
    Epoch epoch;
    u32 next;
  };
  u32 add_reader(u32 list, const Epoch& epoch, const Clocks* clocks);
  void check_writer(const Cell& cell, const Clocks& clocks, const char* what, Where where) const;
  void check_readers(const Cell& cell, const Clocks& clocks, Where where) const;

  bool shared_;
  std::vector<Reader> readers_ = std::vector<Reader>(1);  // lists share their tails; 0 is the empty one
  struct Added {
    u32 list = 0, result = 0;
    Epoch epoch;
  } added_[1024];  // recent calls of add_reader
};

// Counts what a warp's lanes do together: the n-th time that each lane comes to one place in the source.
struct WarpLog {
  enum Kind : u8 { kGlobalLoad, kGlobalStore, kSharedAccess };
  struct Group {
    u32 lanes = 0;
    u32 bytes = 0;
    Kind kind = kGlobalLoad;
    u64 address[kWarp];
    void count() const;
  };
  std::unordered_map<u64, Group> groups;
  std::vector<std::pair<u64, u32>> visits[kWarp];
  void add(u32 lane, Kind kind, u64 address, u32 bytes, Where where);
  void flush();
};
u32 sectors(u64 address, u64 bytes);

// One asynchronous copy, from its issue to the wait that covers it.
struct Piece {
  u8* shared;
  Cell* cells;  // of `shared`
  u8* global;   // of a store
  u32 bytes;
};
struct Block;
struct Mbarrier;
struct Copy {
  std::vector<Piece> pieces;
  std::vector<u8> data;  // of a load: its source when it was issued, with the fill of what is out of bounds
  std::vector<std::pair<Cell*, u32>> sources;  // in shared memory, of a copy to a peer
  bool moved = false;                          // the bytes are where they go; whether anyone may look is another matter
  bool read_done = false;                      // of a store: its source may be reused
  Mbarrier* mbarrier = nullptr;
  u32 transaction_bytes = 0;
  Reduction reduction = Reduction::kNone;
  bool tensor = false;
  Swizzle swizzle{};
  Where where;
};
using CopyGroup = std::vector<std::unique_ptr<Copy>>;

struct Mbarrier {
  u32 count, pending, phase = 0, slot;
  i64 bytes = 0;  // expected and not yet arrived
  Epoch initialiser;
  bool fenced = false, remote = false;  // remote: threads of other blocks arrive
  Block* block;
  Clocks arriving, completed;
  std::vector<const Thread*> arrived;
  std::vector<Thread*> waiting;
};

struct Barrier {
  u32 expected = 0;
  std::vector<std::pair<const Thread*, u32>> arrived;  // with their lines
  std::vector<Thread*> waiting;
  Clocks clocks;
};

struct WarpMeeting {
  Collective kind;
  u32 mask, arrived = 0;
  Slots slots;
  Where where;
  Clocks clocks;
  std::vector<Thread*> waiting;
};

struct Warp {
  std::vector<std::unique_ptr<WarpMeeting>> meetings;
  WarpLog log;
};

// A wgmma of four warps, from the first thread that issues it to the last that waits for it.
struct WgmmaOp {
  Wgmma op;
  Where where;
  u32 issued = 0;
  Clocks clocks;                            // what all threads knew when they issued it
  std::vector<std::pair<u8*, Cell*>> a, b;  // 16-byte chunks
  struct Lane {
    float* d = nullptr;
    const u32* a = nullptr;
    u32 a_values[4] = {};
  } lanes[kWarpgroup];
};

struct Warpgroup {
  std::vector<std::unique_ptr<WgmmaOp>> ops;  // of the block's whole life
  u32 computed = 0;
  u32 registers = 0, asked = 0, asking = 0;
  bool raising = false;
  std::vector<Thread*> waiting;
};

struct Block {
  dim3 index;
  u32 rank, first_agent, alive;
  std::vector<u8> shared;
  std::vector<Cell> cells;
  std::map<u32, std::unique_ptr<Mbarrier>> mbarriers;  // by address
  Barrier barriers[kNamedBarriers];
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  std::map<u32, u32> remote;  // step of each agent's last access from another block
  u32 slots = 0;
  std::vector<Thread*> registers_waiting;

  // A block's agents: its threads, the wgmmas of each warp, the copies of each mbarrier.
  u32 wgmma_agent(u32 warp) const;
  u32 copy_agent(u32 slot) const;
};

struct Accumulator {
  std::vector<float> value;
  u32 uses;  // wgmmas in flight that write it
};

// Of one cluster.
struct ThreadState {
  Place place = {};
  Block* block = nullptr;
  u32 agent = 0;
  Clocks clocks;
  enum State : u8 { kFresh, kReady, kBlocked, kDone } state = kDone;
  const char* waits_for = "";
  Where where;  // of the latest blocking call

  // Fences of memory: what a later relaxed write publishes, what a later fence takes in.
  std::shared_ptr<const Clocks::Others> published, collected;

  CopyGroup open_copies, open_bulk;
  std::vector<CopyGroup> copy_groups, bulk_groups;

  u32 wgmma_issued = 0, wgmma_done = 0;
  std::vector<u32> wgmma_groups;  // ends of the committed groups, as counts of wgmmas
  bool wgmma_fenced = false;
  std::map<float*, Accumulator> accumulators;

  bool at_cluster_barrier = false;
  u32 cluster_phase = 0;

  Epoch epoch() const;
  u32 step() const { return clocks.seen[agent]; }
  void tick() { ++clocks.seen[agent]; }
};
struct Thread : ThreadState {
  Fiber fiber;
};

// Everything of a launch.
struct Machine {
  const Launch& launch;
  nxs_emulator_options options;
  u64 random_state;
  u32 cluster = 0;  // index of the running one
  const u32 warps, agents_per_block;
  std::vector<std::unique_ptr<Thread>>& threads;  // kept between launches for their stacks
  u32 thread_count = 0;
  std::vector<Block> blocks;
  std::deque<Thread*> ready;
  std::vector<std::unique_ptr<Copy>> flying;  // copies that end on an mbarrier
  Shadow shared_shadow{true}, global_shadow{false};
  std::unordered_map<u64, std::unique_ptr<Cell[]>> pages;  // of global memory, 4096 bytes each
  u64 last_page = ~0ull;
  Cell* last_cells = nullptr;
  std::unordered_map<const void*, std::shared_ptr<const Clocks::Others>> published;
  std::vector<Thread*> cluster_waiting;
  u32 cluster_arrived = 0, cluster_alive = 0, cluster_phase = 0;
  Clocks cluster_clocks, cluster_completed;
  u64 idle = 0;  // spins since anything changed
  bool stopping = false;

  Machine(const Launch& launch, const nxs_emulator_options& options, std::vector<std::unique_ptr<Thread>>& threads);
  void run();
  u32 random(u32 below);  // 0 always with seed 0
  bool landing_now();
  void wake(std::vector<Thread*>& waiting);

 private:
  void run_cluster(const std::vector<dim3>& indices);
  void end_thread(Thread& thread);
  void end_cluster();
  void report_deadlock();
  static void body(void* thread);
};

extern constinit thread_local Machine* machine;
extern constinit thread_local Thread* self;
extern constinit thread_local nxs_emulator_counts counts;

// Stops the launch with a report. Does not return to the kernel.
[[noreturn]] void fail(const char* kind, Where where, const char* format, ...) __attribute__((format(printf, 3, 4)));

// Suspends the running thread until someone wakes it.
void block_on(std::vector<Thread*>& waiting, const char* waits_for, Where where);
void let_others_run();

// Whether what happened at `epoch` is known to `clocks`.
bool happened(const Epoch& epoch, const Clocks& clocks);
// A snapshot for other clusters, of everything that `thread` knows.
std::shared_ptr<const Clocks::Others> snapshot(const Thread& thread);

// Address to block, host memory and cells; fails outside of it.
struct SharedSpan {
  Block* block;
  u8* bytes;
  Cell* cells;
};
SharedSpan shared_span(u32 address, u32 bytes, bool cluster, Where where);
// Calls f(cells, offset, count) for the pages of [p, p + bytes).
Cell* global_cells(const void* p, u32* count);
template <typename F> void each_global(const void* p, u32 bytes, F f) {
  for (u32 at = 0; at < bytes;) {
    u32 count = bytes - at;
    Cell* cells = global_cells(static_cast<const char*>(p) + at, &count);
    f(cells, count);
    at += count;
  }
}
std::string describe(const Epoch& epoch);
Mbarrier& mbarrier_for_copy(u32 address, Where where);
void complete_mbarrier(Mbarrier& mbarrier);
void cluster_complete();
void land(Copy& copy);
void end_copies(Thread& thread);
void check_bounds(const void* p, u32 bytes, Where where);
// What ptxas gives a thread whose kernel says __launch_bounds__(threads, 1), or of two blocks together (threads / 2, 2).
inline u32 launch_registers(u32 threads) { return threads > 256 ? 65536 / threads / 8 * 8 : 256; }

}  // namespace nxs::emulator
