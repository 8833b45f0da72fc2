// Launches, the scheduler, reports, and the C interface.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <unordered_set>

#include "machine.h"

namespace nxs::emulator {

constinit thread_local Machine* machine = nullptr;
constinit thread_local Thread* self = nullptr;
constinit thread_local nxs_emulator_counts counts = {};

namespace {

thread_local std::string report;
thread_local std::vector<std::unique_ptr<Thread>> thread_pool;
std::mutex opted_in_mutex;
std::unordered_set<const void*> opted_in;  // kernels, of the whole process as on a GPU

nxs_emulator_options default_options() {
  nxs_emulator_options options = {};
  if (const char* seed = getenv("NXS_EMULATOR_SEED")) options.seed = strtoull(seed, nullptr, 0);
  const char* landing = getenv("NXS_EMULATOR_LANDING");
  if (landing && !strcmp(landing, "random")) options.landing = NXS_EMULATOR_LANDING_RANDOM;
  if (landing && !strcmp(landing, "early")) options.landing = NXS_EMULATOR_LANDING_EARLY;
  return options;
}
thread_local nxs_emulator_options current_options = default_options();

// Thrown through a kernel to end its fiber.
struct Stop {};

// The first argument of a launch as it was written: up to a comma outside brackets.
std::string kernel_name(const char* text) {
  int depth = 0;
  const char* end = text;
  for (; *end && !(*end == ',' && depth == 0); ++end)
    depth += (*end == '<' || *end == '(') - (*end == '>' || *end == ')');
  return std::string(text, end);
}

std::string file_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

// The last name before the parameters in what the compiler calls a function.
std::string function_name(const char* text) {
  const std::string before(text, strcspn(text, "("));
  const size_t start = before.find_last_of(": ");
  return start == std::string::npos ? before : before.substr(start + 1);
}

void record(const char* kind, const Thread* thread, Where where, const std::string& sentence) {
  if (machine->stopping) return;
  machine->stopping = true;
  report = std::string(kind) + ": " + sentence + " [kernel " + kernel_name(machine->launch.text);
  if (thread) {
    const dim3& b = thread->place.block;
    char text[80];
    snprintf(text, sizeof(text), ", block (%u,%u,%u), thread %u", b.x, b.y, b.z, thread->place.thread);
    report += text;
  }
  report += ", " + file_name(where.file_name()) + ":" + std::to_string(where.line()) + " in " +
            function_name(where.function_name()) + "]";
  if (!machine->options.quiet) fprintf(stderr, "nextscale emulator: %s\n", report.c_str());
}

}  // namespace

void fail(const char* kind, Where where, const char* format, ...) {
  char sentence[600];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(sentence, sizeof(sentence), format, arguments);
  va_end(arguments);
  record(kind, self, where, sentence);
  throw Stop();
}

void fail_in_flight(Where where) { fail("registers", where, "use of a wgmma accumulator before the wait for it"); }

// ---- threads

const Place& place() { return self->place; }

Epoch ThreadState::epoch() const { return {machine->cluster, agent, step()}; }

std::shared_ptr<const Clocks::Others> snapshot(const Thread& thread) {
  Clocks now = thread.clocks;
  now.others = nullptr;
  auto others = thread.clocks.others ? std::make_shared<Clocks::Others>(*thread.clocks.others)
                                     : std::make_shared<Clocks::Others>();
  (*others)[machine->cluster] = std::make_shared<const Clocks>(std::move(now));
  return others;
}

void block_on(std::vector<Thread*>& waiting, const char* waits_for, Where where) {
  waiting.push_back(self);
  self->state = Thread::kBlocked;
  self->waits_for = waits_for;
  self->where = where;
  self->fiber.suspend();
  if (machine->stopping) throw Stop();
}

void let_others_run() {
  machine->ready.push_back(self);
  self->fiber.suspend();
  if (machine->stopping) throw Stop();
}

void spin(Where where) {
  if (++machine->idle > 200000 + 100ull * machine->thread_count)
    fail("deadlock", where, "a thread keeps reading and nothing changes any more");
  let_others_run();
}

void Machine::wake(std::vector<Thread*>& waiting) {
  idle = 0;
  for (Thread* thread : waiting) {
    thread->state = Thread::kReady;
    ready.push_back(thread);
  }
  waiting.clear();
}

u32 Machine::random(u32 below) {
  if (options.seed == 0) return 0;
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<u32>((random_state * 0x2545f4914f6cdd1dull) >> 33) % below;
}

bool Machine::landing_now() {
  return options.landing == NXS_EMULATOR_LANDING_EARLY ||
         (options.landing == NXS_EMULATOR_LANDING_RANDOM && random(3) == 0);
}

// ---- a launch

Machine::Machine(const Launch& launch_, const nxs_emulator_options& options_,
                 std::vector<std::unique_ptr<Thread>>& threads_)
    : launch(launch_),
      options(options_),
      random_state(options_.seed * 0x9e3779b97f4a7c15ull + 1),
      warps((launch.block + kWarp - 1) / kWarp),
      agents_per_block(launch.block + warps + kBarriersPerBlock),
      threads(threads_) {}

void Machine::body(void* argument) {
  Thread& thread = *static_cast<Thread*>(argument);
  for (;;) {
    try {
      machine->launch.call(machine->launch.arguments);
      machine->end_thread(thread);
    } catch (const Stop&) {
    }
    thread.state = Thread::kDone;
    thread.fiber.suspend();
  }
}

void Machine::run_cluster(const std::vector<dim3>& indices) {
  const size_t agents = indices.size() * agents_per_block;
  thread_count = static_cast<u32>(indices.size()) * launch.block;
  while (threads.size() < thread_count) threads.push_back(std::make_unique<Thread>());
  shared_shadow.clear();
  ready.clear();
  cluster_arrived = cluster_phase = 0;
  cluster_alive = thread_count;
  cluster_clocks.resize(agents);
  cluster_completed.resize(agents);
  blocks.clear();
  blocks.resize(indices.size());
  for (u32 rank = 0; rank < indices.size(); ++rank) {
    Block& block = blocks[rank];
    block.index = indices[rank];
    block.rank = rank;
    block.first_agent = rank * agents_per_block;
    block.alive = launch.block;
    block.shared.assign(launch.dynamic_smem, 0xfe);
    block.cells.assign(launch.dynamic_smem, Cell{});
    for (Barrier& barrier : block.barriers) barrier.clocks.resize(agents);
    block.warps.resize(warps);
    block.warpgroups.resize((launch.block + kWarpgroup - 1) / kWarpgroup);
    for (Warpgroup& group : block.warpgroups) group.registers = launch_registers(launch.block);
    for (u32 t = 0; t < launch.block; ++t) {
      Thread& thread = *threads[rank * launch.block + t];
      static_cast<ThreadState&>(thread) = {};
      thread.place = {t, launch.block, rank, static_cast<u32>(indices.size()), block.index, launch.grid};
      thread.block = &block;
      thread.agent = block.first_agent + t;
      thread.clocks.resize(agents);
      thread.clocks.seen[thread.agent] = 1;
      thread.state = Thread::kFresh;
      if (!thread.fiber.prepared()) thread.fiber.prepare(&Machine::body, &thread);
      ready.push_back(&thread);
    }
  }
  counts.blocks += indices.size();
  counts.threads += thread_count;

  while (!stopping) {
    const bool land_one = !flying.empty() && (ready.empty() || (idle && idle % 64 == 0) || landing_now());
    if (land_one) {
      const u32 which = random(static_cast<u32>(flying.size()));
      const std::unique_ptr<Copy> copy = std::move(flying[which]);
      flying.erase(flying.begin() + which);
      land(*copy);
      continue;
    }
    if (ready.empty()) break;
    const u32 which = random(static_cast<u32>(ready.size()));
    std::swap(ready[which], ready.front());
    self = ready.front();
    ready.pop_front();
    self->state = Thread::kReady;
    self->fiber.resume();
    self = nullptr;
  }
  if (!stopping) {
    const bool done = std::all_of(threads.begin(), threads.begin() + thread_count,
                                  [](const auto& thread) { return thread->state == Thread::kDone; });
    done ? end_cluster() : report_deadlock();
  }
  if (stopping)  // every fiber that has begun unwinds
    for (u32 i = 0; i < thread_count; ++i)
      if (threads[i]->state == Thread::kReady || threads[i]->state == Thread::kBlocked) {
        self = threads[i].get();
        self->fiber.resume();
        self = nullptr;
      }
  flying.clear();
}

void Machine::end_thread(Thread& thread) {
  Block& block = *thread.block;
  const u32 lane_bit = 1u << (thread.place.thread % kWarp);
  for (const auto& meeting : block.warps[thread.place.thread / kWarp].meetings)
    if (meeting->mask & lane_bit)
      fail("divergence", meeting->where, "thread %u ends while lanes of its warp wait for it here",
           thread.place.thread);
  if (thread.wgmma_done < thread.wgmma_issued)
    fail("registers", block.warpgroups[thread.place.thread / kWarpgroup].ops[thread.wgmma_done]->where,
         "the thread ends without a wait for this wgmma");
  end_copies(thread);
  --cluster_alive;
  cluster_complete();
  if (--block.alive) return;
  for (const auto& copy : flying)
    if (copy->mbarrier->block == &block)
      fail("unwaited copy", copy->where, "the block ends while this copy to it is in flight");
  for (const auto& [agent, step] : block.remote) {
    bool known = false;
    for (u32 t = 0; t < launch.block; ++t) known |= threads[block.rank * launch.block + t]->clocks.seen[agent] >= step;
    if (!known)
      fail("race", thread.where, "the block ends while %s may still access its shared memory",
           describe({cluster, agent, step}).c_str());
  }
}

void Machine::end_cluster() {
  for (Block& block : blocks)
    for (Warp& warp : block.warps) warp.log.flush();
}

// Nothing can run. What one waits for says what went wrong; a barrier that lacks threads is often only the consequence.
void Machine::report_deadlock() {
  std::map<std::string, u32> waits;
  const Thread* first = nullptr;
  const auto rank = [](const Thread& thread) {
    return !strcmp(thread.waits_for, "a barrier") ? 1 : !strcmp(thread.waits_for, "the lanes of its warp") ? 2 : 3;
  };
  u32 done = 0;
  for (u32 i = 0; i < thread_count; ++i) {
    const Thread& thread = *threads[i];
    if (thread.state == Thread::kDone) {
      ++done;
      continue;
    }
    ++waits[std::string("at ") + file_name(thread.where.file_name()) + ":" + std::to_string(thread.where.line()) +
            " for " + thread.waits_for];
    if (!first || rank(thread) > rank(*first)) first = &thread;
  }
  std::string text;
  for (const auto& [what, count] : waits)
    if (text.size() < 400) text += ", " + std::to_string(count) + " wait " + what;
  if (done) text += ", " + std::to_string(done) + " have ended";
  const char* kind = rank(*first) == 1 ? "barrier" : rank(*first) == 2 ? "divergence" : "deadlock";
  record(kind, first, first->where, "no thread can go on" + text);
}

void Machine::run() {
  const dim3 grid = launch.grid;
  const u32 clusters = grid.x / launch.cluster * grid.y * grid.z;
  std::vector<u32> order(clusters);
  for (u32 i = 0; i < clusters; ++i) order[i] = i;
  if (options.seed)
    for (u32 i = clusters; i > 1; --i) std::swap(order[i - 1], order[random(i)]);
  for (u32 i = 0; i < clusters && !stopping; ++i) {
    cluster = order[i];
    const u32 in_row = grid.x / launch.cluster, x = cluster % in_row * launch.cluster, y = cluster / in_row % grid.y,
              z = cluster / in_row / grid.y;
    std::vector<dim3> indices;
    for (u32 rank = 0; rank < launch.cluster; ++rank) indices.push_back(dim3(x + rank, y, z));
    run_cluster(indices);
  }
}

nxs_status run(const Launch& launch) {
  constexpr nxs_status kInvalidValue = 1;
  const dim3 grid = launch.grid;
  unsigned shared_limit = kSharedWithoutOptIn;
  {
    const std::lock_guard lock(opted_in_mutex);
    if (opted_in.count(launch.kernel)) shared_limit = kSharedLimit;
  }
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || !launch.block || launch.block > 1024 ||
      launch.dynamic_smem > shared_limit || !launch.cluster || launch.cluster > 16 || grid.x % launch.cluster)
    return kInvalidValue;
  if (machine) return kInvalidValue;  // a launch inside a kernel
  report.clear();
  ++counts.launches;
  Machine running(launch, current_options, thread_pool);
  machine = &running;
  running.run();
  machine = nullptr;
  return running.stopping ? NXS_EMULATOR_FAILURE : NXS_OK;
}

nxs_status allow_dynamic_smem(const void* kernel) {
  const std::lock_guard lock(opted_in_mutex);
  opted_in.insert(kernel);
  return NXS_OK;
}

// ---- counters

u32 sectors(u64 address, u64 bytes) {
  return bytes ? static_cast<u32>((address + bytes - 1) / 32 - address / 32 + 1) : 0;
}

void WarpLog::add(u32 lane, Kind kind, u64 address, u32 bytes, Where where) {
  const u64 site = (reinterpret_cast<u64>(where.file_name()) * 31 + where.line()) * 1024 + where.column() * 4 + kind;
  auto& mine = visits[lane];
  auto visit = std::find_if(mine.begin(), mine.end(), [&](const auto& v) { return v.first == site; });
  if (visit == mine.end()) visit = mine.insert(mine.end(), {site, 0});
  const u64 instruction = site * 0x9e3779b97f4a7c15ull + visit->second++;
  Group& group = groups[instruction];
  group.kind = kind;
  group.bytes = bytes;
  group.lanes |= 1u << lane;
  group.address[lane] = address;
  if (group.lanes == ~0u) {
    group.count();
    groups.erase(instruction);
  }
}

void WarpLog::flush() {
  for (const auto& [instruction, group] : groups) group.count();
  groups.clear();
}

void WarpLog::Group::count() const {
  std::vector<u64> units;  // sectors, or words of 4 bytes
  if (kind != kSharedAccess) {
    for (u32 lane = 0; lane < kWarp; ++lane)
      if (lanes >> lane & 1)
        for (u64 s = address[lane] / 32; s <= (address[lane] + bytes - 1) / 32; ++s) units.push_back(s);
    std::sort(units.begin(), units.end());
    const u64 touched = static_cast<u64>(std::unique(units.begin(), units.end()) - units.begin());
    (kind == kGlobalLoad ? counts.global_load_bytes : counts.global_store_bytes) += 32 * touched;
    return;
  }
  // A pass serves 32 banks of 4 bytes; accesses of 8 and 16 bytes are served half and quarter warps at a time.
  ++counts.shared_accesses;
  const u32 lanes_a_pass = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  for (u32 first = 0; first < kWarp; first += lanes_a_pass) {
    units.clear();
    for (u32 lane = first; lane < first + lanes_a_pass; ++lane)
      if (lanes >> lane & 1)
        for (u32 at = 0; at < bytes; at += 4) units.push_back((address[lane] + at) / 4);
    std::sort(units.begin(), units.end());
    units.erase(std::unique(units.begin(), units.end()), units.end());
    u32 in_bank[32] = {}, passes = 0;
    for (u64 word : units) passes = std::max(passes, ++in_bank[word % 32]);
    if (passes > 1) counts.shared_conflicts += passes - 1;
  }
}

void count_special() { ++counts.special_ops; }

}  // namespace nxs::emulator

// ---- the C interface

using namespace nxs::emulator;

extern "C" void nxs_emulator_configure(const nxs_emulator_options* options) {
  current_options = options ? *options : default_options();
}
extern "C" const char* nxs_emulator_report(void) { return report.c_str(); }
extern "C" void nxs_emulator_counters(nxs_emulator_counts* out) { *out = counts; }
extern "C" void nxs_emulator_reset(void) {
  report.clear();
  counts = {};
}
