// ldmatrix, stmatrix, mma.sync and wgmma.
#include <algorithm>
#include <bit>

#include "common/ptx/convert.cuh"
#include "common/swizzle.cuh"
#include "machine.h"

namespace nxs::emulator {

static double number(MmaType type, u16 bits) {
  return type == MmaType::kF16 ? f16_bits_to_f32(bits) : bf16_bits_to_f32(bits);
}
// The k-th 16-bit value of registers that hold two each.
static double half_of(MmaType type, u32 word, u32 k) { return number(type, static_cast<u16>(word >> 16 * k)); }
// tf32 keeps 10 bits of mantissa; the hardware does not look at the others.
static double tf32(u32 bits) { return std::bit_cast<float>(bits & 0xffffe000u); }

// ---- 8x8 matrices of 16-bit elements

struct MatrixSlot {
  u32* load;         // null for a store
  const u32* store;  // null for a load
  u32 count;
  bool transposed;
  u8* row;  // of lanes 0 to 8 * count - 1
};

static void move_matrices(Slots& slots, u32) {
  for (u32 l = 0; l < kWarp; ++l) {
    const MatrixSlot& mine = *static_cast<MatrixSlot*>(slots[l]);
    for (u32 i = 0; i < 2 * mine.count; ++i) {
      const u32 matrix = i / 2, shift = i % 2 * 16, r = l / 4, c = l % 4 * 2 + i % 2;
      const u32 row = mine.transposed ? c : r, column = mine.transposed ? r : c;
      u8* element = static_cast<MatrixSlot*>(slots[8 * matrix + row])->row + 2 * column;
      if (mine.load) {
        u16 bits;
        memcpy(&bits, element, 2);
        mine.load[matrix] = (shift ? mine.load[matrix] : 0) | static_cast<u32>(bits) << shift;
      } else {
        const u16 bits = static_cast<u16>(mine.store[matrix] >> shift);
        memcpy(element, &bits, 2);
      }
    }
  }
}

void load_matrix(u32* registers, u32 count, u32 address, bool transposed, Where where) {
  MatrixSlot slot = {registers, nullptr, count, transposed, nullptr};
  if (lane() < 8 * count) slot.row = shared_access(address, 16, Access::kRead, where);
  warp_collective(Collective::kLoadMatrix, ~0u, &slot, move_matrices, where);
}

void store_matrix(const u32* registers, u32 count, u32 address, bool transposed, Where where) {
  MatrixSlot slot = {nullptr, registers, count, transposed, nullptr};
  if (lane() < 8 * count) slot.row = shared_access(address, 16, Access::kWrite, where);
  warp_collective(Collective::kStoreMatrix, ~0u, &slot, move_matrices, where);
}

// ---- mma.sync m16n8k16 and, for tf32, m16n8k8

struct MmaSlot {
  MmaType type;
  float* c;
  const u32 *a, *b;
};

void mma(MmaType type, float* c, const u32* a, const u32* b, Where where) {
  MmaSlot slot = {type, c, a, b};
  warp_collective(
      Collective::kMma, ~0u, &slot,
      [](Slots& slots, u32) {
        const MmaType type = static_cast<MmaSlot*>(slots[0])->type;
        const u32 depth = type == MmaType::kTf32 ? 8 : 16;
        double a[16][16], b[16][8];
        for (u32 l = 0; l < kWarp; ++l) {
          const MmaSlot& mine = *static_cast<MmaSlot*>(slots[l]);
          const u32 g = l / 4, t = l % 4;
          if (type == MmaType::kTf32) {
            for (u32 i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = tf32(mine.a[i]);
            for (u32 i = 0; i < 2; ++i) b[t + i * 4][g] = tf32(mine.b[i]);
          } else {
            for (u32 i = 0; i < 4; ++i)
              for (u32 k = 0; k < 2; ++k) a[g + i % 2 * 8][2 * t + i / 2 * 8 + k] = half_of(type, mine.a[i], k);
            for (u32 i = 0; i < 2; ++i)
              for (u32 k = 0; k < 2; ++k) b[2 * t + i * 8 + k][g] = half_of(type, mine.b[i], k);
          }
        }
        for (u32 l = 0; l < kWarp; ++l) {
          float* c = static_cast<MmaSlot*>(slots[l])->c;
          for (u32 i = 0; i < 4; ++i) {
            double sum = c[i];
            for (u32 k = 0; k < depth; ++k) sum += a[l / 4 + i / 2 * 8][k] * b[k][l % 4 * 2 + i % 2];
            c[i] = static_cast<float>(sum);
          }
        }
        u64& flops = type == MmaType::kTf32  ? counts.mma_tf32_flops
                     : type == MmaType::kF16 ? counts.mma_f16_flops
                                             : counts.mma_bf16_flops;
        flops += 2 * 16 * 8 * depth;
      },
      where);
}

// ---- wgmma

struct Descriptor {
  u32 start, leading, stride;
  Swizzle swizzle;
};

static Descriptor decode(u64 bits, Where where) {
  if (bits & ~0xc0003fff3fff3fffull)
    fail("descriptor", where, "a matrix descriptor with bits outside its fields (base offsets are not modelled)");
  const Descriptor d = {static_cast<u32>(bits & 0x3fff) << 4, static_cast<u32>(bits >> 16 & 0x3fff) << 4,
                        static_cast<u32>(bits >> 32 & 0x3fff) << 4, static_cast<Swizzle>(bits >> 62)};
  const u32 width = swizzle_bytes(d.swizzle);
  if (d.swizzle != Swizzle::kNone && d.start % (8 * width) >= width)
    fail("descriptor", where, "a tile at 0x%x: rows of %u bytes in groups of 8 must start at a multiple of %u", d.start,
         width, 8 * width);
  return d;
}

// The 16-byte chunks of an operand: of each row its two halves of k (K-major), or of each k the groups of 8 rows
// (MN-major).
static std::vector<std::pair<u8*, Cell*>> operand(u64 bits, u32 rows, bool mn_major, const WgmmaOp& op) {
  const Descriptor d = decode(bits, op.where);
  const u32 width = swizzle_bytes(d.swizzle);
  const bool plain = d.swizzle == Swizzle::kNone;
  std::vector<std::pair<u8*, Cell*>> chunks;
  const auto add = [&](u32 address) {
    const SharedSpan span = shared_span(swizzled(address, d.swizzle), 16, false, op.where);
    chunks.push_back({span.bytes, span.cells});
  };
  if (mn_major) {
    for (u32 k = 0; k < 16; ++k)
      for (u32 m = 0; m < rows; m += 8) {
        const u32 x = m * 2;
        add(plain ? d.start + m / 8 * d.stride + k / 8 * d.leading + k % 8 * 16
                  : d.start + x / width * d.leading + k / 8 * d.stride + k % 8 * width + x % width);
      }
  } else {
    for (u32 m = 0; m < rows; ++m)
      for (u32 half = 0; half < 2; ++half)
        add(d.start + m / 8 * d.stride + m % 8 * width + half * (plain ? d.leading : 16));
  }
  auto sorted = chunks;
  std::sort(sorted.begin(), sorted.end());
  if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end())
    fail("descriptor", op.where, "the strides %u and %u of a matrix descriptor make its rows overlap", d.leading,
         d.stride);
  for (const auto& [bytes, cells] : chunks) {
    machine->shared_shadow.begin_read(cells, 16, op.clocks, op.where);
    if (cells->flags & kKnownSwizzle && cells->swizzle != d.swizzle)
      fail("descriptor", op.where, "a descriptor with rows of %u bytes for a tile that was loaded with rows of %u",
           width, swizzle_bytes(cells->swizzle));
  }
  return chunks;
}

static void read_operand(const std::vector<std::pair<u8*, Cell*>>& chunks, MmaType type, u32 rows, bool mn_major,
                         double* k_by_row) {
  for (u32 i = 0; i < chunks.size(); ++i)
    for (u32 j = 0; j < 8; ++j) {
      u16 bits;
      memcpy(&bits, chunks[i].first + 2 * j, 2);
      const u32 row = mn_major ? i % (rows / 8) * 8 + j : i / 2, k = mn_major ? i / (rows / 8) : i % 2 * 8 + j;
      k_by_row[k * rows + row] = number(type, bits);
    }
}

__attribute__((no_sanitize("address", "undefined"))) static void multiply(u32 n, const double* a, const double* b,
                                                                          double* d) {
  for (u32 m = 0; m < 64; ++m)
    for (u32 k = 0; k < 16; ++k) {
      const double x = a[k * 64 + m];
      for (u32 j = 0; j < n; ++j) d[m * n + j] += x * b[k * n + j];
    }
}

static void compute(WgmmaOp& op, u32 index) {
  const u32 first_thread = self->place.thread / kWarpgroup * kWarpgroup;
  const u32 n = op.op.n;
  std::vector<double> a(64 * 16), b(n * 16), d(64 * n);
  if (op.op.a_registers) {
    for (u32 t = 0; t < kWarpgroup; ++t)
      for (u32 i = 0; i < 4; ++i)
        for (u32 k = 0; k < 2; ++k) {
          const u32 row = t / 32 * 16 + t % 32 / 4 + i % 2 * 8, column = t % 4 * 2 + i / 2 * 8 + k;
          a[column * 64 + row] = half_of(op.op.type, op.lanes[t].a_values[i], k);
        }
  } else {
    read_operand(op.a, op.op.type, 64, op.op.a_transposed, a.data());
  }
  read_operand(op.b, op.op.type, n, op.op.b_transposed, b.data());
  multiply(n, a.data(), b.data(), d.data());
  Block& block = *self->block;
  for (u32 t = 0; t < kWarpgroup; ++t) {
    Thread& thread = *machine->threads[block.rank * self->place.block_threads + first_thread + t];
    std::vector<float>& value = thread.accumulators.at(op.lanes[t].d).value;
    for (u32 i = 0; i < n / 2; ++i) {
      const u32 row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
      value[i] = static_cast<float>(d[row * n + column] + (op.op.accumulate ? value[i] : 0.0));
    }
  }
  for (u32 warp = 0; warp < 4; ++warp) {
    const Epoch epoch = {machine->cluster, block.wgmma_agent(first_thread / kWarp + warp), index + 1};
    for (const auto* chunks : {&op.a, &op.b})
      for (const auto& [bytes, cells] : *chunks) {
        if (warp)
          for (u32 i = 0; i < 16; ++i) ++cells[i].pending_reads;  // end_read takes one away for each warp
        machine->shared_shadow.end_read(cells, 16, epoch);
      }
  }
  (op.op.type == MmaType::kF16 ? counts.wgmma_f16_flops : counts.wgmma_bf16_flops) += 2ull * 64 * n * 16;
}

// They complete in the order of their issue.
static void compute_through(Warpgroup& group, u32 index) {
  for (; group.computed <= index; ++group.computed) compute(*group.ops[group.computed], group.computed);
}

static Warpgroup& warpgroup(Where where) {
  const u32 index = self->place.thread / kWarpgroup;
  if ((index + 1) * kWarpgroup > self->place.block_threads)
    fail("divergence", where, "wgmma in a warpgroup of fewer than 4 warps");
  return self->block->warpgroups[index];
}

void wgmma_fence(Where where) {
  warpgroup(where);
  self->wgmma_fenced = true;
}

void wgmma(const Wgmma& op, Where where) {
  Warpgroup& group = warpgroup(where);
  if (!self->wgmma_fenced)
    fail("registers", where, "a wgmma with no wgmma_fence since its registers were last free to use");
  const u32 index = self->wgmma_issued;
  if (index == group.ops.size()) {
    group.ops.push_back(std::make_unique<WgmmaOp>());
    WgmmaOp& fresh = *group.ops.back();
    fresh.op = op;
    fresh.where = where;
    fresh.clocks = self->clocks;
  }
  WgmmaOp& shared = *group.ops[index];
  if (shared.where.line() != where.line() || shared.op.n != op.n || shared.op.type != op.type || shared.op.a != op.a ||
      shared.op.b != op.b || shared.op.accumulate != op.accumulate || !shared.op.a_registers != !op.a_registers)
    fail("divergence", where, "threads of one warpgroup issue wgmmas that differ (line %u, or a descriptor)",
         shared.where.line());
  shared.clocks.meet(self->clocks);
  WgmmaOp::Lane& lane = shared.lanes[self->place.thread % kWarpgroup];
  lane.d = op.d;
  lane.a = op.a_registers;
  if (lane.a) std::copy(lane.a, lane.a + 4, lane.a_values);
  auto [found, fresh] = self->accumulators.try_emplace(op.d);
  Accumulator& accumulator = found->second;
  if (fresh) {
    accumulator.value.assign(op.d, op.d + op.n / 2);
    accumulator.uses = 0;
    std::fill(op.d, op.d + op.n / 2, std::bit_cast<float>(kInFlight));
  } else if (accumulator.value.size() != op.n / 2) {
    fail("registers", where, "an accumulator that a wgmma of another shape still writes");
  }
  ++accumulator.uses;
  ++self->wgmma_issued;
  if (++shared.issued < kWarpgroup) return;
  if (!op.a_registers) shared.a = operand(op.a, 64, op.a_transposed, shared);
  shared.b = operand(op.b, op.n, op.b_transposed, shared);
  if (machine->landing_now()) compute_through(group, index);
  machine->wake(group.waiting);
}

void wgmma_commit(Where where) {
  warpgroup(where);
  self->wgmma_groups.push_back(self->wgmma_issued);
}

// The kernel's arrays may be gone by now; then this reads what took their place.
__attribute__((no_sanitize("address"))) static bool unchanged(const u32* now, const u32* then, u32 count) {
  for (u32 i = 0; i < count; ++i)
    if (now[i] != then[i]) return false;
  return true;
}

void wgmma_wait(u32 pending, Where where) {
  Warpgroup& group = warpgroup(where);
  const auto& groups = self->wgmma_groups;
  const u32 target = groups.size() > pending ? groups[groups.size() - 1 - pending] : 0;
  for (; self->wgmma_done < target; ++self->wgmma_done) {
    const u32 index = self->wgmma_done;
    while (group.ops[index]->issued < kWarpgroup) block_on(group.waiting, "the other warps of its warpgroup", where);
    WgmmaOp& op = *group.ops[index];
    compute_through(group, index);
    const WgmmaOp::Lane& lane = op.lanes[self->place.thread % kWarpgroup];
    if (lane.a && !unchanged(lane.a, lane.a_values, 4))
      fail("registers", op.where, "the registers of A were changed before the wait for this wgmma");
    const auto found = self->accumulators.find(lane.d);
    Accumulator& accumulator = found->second;
    if (--accumulator.uses == 0) {
      for (u32 i = 0; i < accumulator.value.size(); ++i)
        if (std::bit_cast<u32>(lane.d[i]) != kInFlight)
          fail("registers", op.where, "an accumulator was changed before the wait for this wgmma");
      std::copy(accumulator.value.begin(), accumulator.value.end(), lane.d);
      self->accumulators.erase(found);
    }
    self->clocks.seen[self->block->wgmma_agent(self->place.thread / kWarp)] = index + 1;
    self->wgmma_fenced = false;
  }
}

}  // namespace nxs::emulator
