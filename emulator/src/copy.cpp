// Asynchronous copies: cp.async, cp.async.bulk and tensor copies.
#include <algorithm>
#include <functional>
#include <utility>

#include "common/check.h"
#include "common/ptx/convert.cuh"
#include "common/ptx/tensor_map.cuh"
#include "common/tensor_shape.cuh"
#include "machine.h"

namespace nxs {

// What a TensorMap holds here.
struct EncodedMap {
  u32 magic;
  u8 rank, element_bytes, fill_nan;
  Swizzle swizzle;
  nxs_dtype dtype;
  u16 box[5];
  u64 address;
  u32 last[5];  // size - 1
  u64 stride[4];
};
static_assert(sizeof(EncodedMap) <= sizeof(TensorMap));
constexpr u32 kMapMagic = 0x7e5a0b1e;

nxs_status encode_tensor_map(TensorMap* map, const TensorShape& shape) {
  constexpr nxs_status kInvalidValue = 1;
  const i64 bytes = dtype_bytes(shape.dtype);
  const bool is_float = shape.dtype == NXS_F32 || shape.dtype == NXS_F16 || shape.dtype == NXS_BF16;
  if (!map || reinterpret_cast<u64>(map) % 64 || !bytes || shape.rank < 1 || shape.rank > 5 || !shape.address ||
      reinterpret_cast<u64>(shape.address) % 16 || (shape.fill_nan && !is_float))
    return kInvalidValue;
  EncodedMap encoded = {};
  encoded.magic = kMapMagic;
  encoded.rank = static_cast<u8>(shape.rank);
  encoded.element_bytes = static_cast<u8>(bytes);
  encoded.fill_nan = shape.fill_nan;
  encoded.swizzle = shape.swizzle;
  encoded.dtype = shape.dtype;
  encoded.address = reinterpret_cast<u64>(shape.address);
  for (u32 i = 0; i < shape.rank; ++i) {
    if (!shape.size[i] || shape.size[i] > u64{1} << 32 || !shape.box[i] || shape.box[i] > 256) return kInvalidValue;
    encoded.last[i] = static_cast<u32>(shape.size[i] - 1);
    encoded.box[i] = static_cast<u16>(shape.box[i]);
    if (i + 1 < shape.rank) {
      if (shape.stride_bytes[i] % 16 || shape.stride_bytes[i] >= u64{1} << 40) return kInvalidValue;
      encoded.stride[i] = shape.stride_bytes[i];
    }
  }
  const u32 row = static_cast<u32>(shape.box[0] * bytes);
  if (row % 16 || (shape.swizzle != Swizzle::kNone && row > swizzle_bytes(shape.swizzle))) return kInvalidValue;
  memset(map, 0, sizeof(*map));
  memcpy(map, &encoded, sizeof(encoded));
  return NXS_OK;
}

namespace emulator {

// ---- moving and ending

template <typename T, typename F> static void add(u8* to, const u8* from, u32 bytes, F sum) {
  for (u32 i = 0; i < bytes; i += sizeof(T)) {
    T a, b;
    memcpy(&a, to + i, sizeof(T));
    memcpy(&b, from + i, sizeof(T));
    a = sum(a, b);
    memcpy(to + i, &a, sizeof(T));
  }
}

static void store_bytes(u8* to, const u8* from, u32 bytes, Reduction reduction) {
  const auto sum_f16 = [](u16 a, u16 b) { return f32_to_f16_bits(f16_bits_to_f32(a) + f16_bits_to_f32(b)); };
  const auto sum_bf16 = [](u16 a, u16 b) { return f32_to_bf16_bits(bf16_bits_to_f32(a) + bf16_bits_to_f32(b)); };
  switch (reduction) {
    case Reduction::kNone: memcpy(to, from, bytes); break;
    case Reduction::kAddF32: add<float>(to, from, bytes, std::plus<float>()); break;
    case Reduction::kAddU32: add<u32>(to, from, bytes, std::plus<u32>()); break;
    case Reduction::kAddBf16: add<u16>(to, from, bytes, sum_bf16); break;
    case Reduction::kAddF16: add<u16>(to, from, bytes, sum_f16); break;
  }
}

static void move(Copy& copy) {
  if (std::exchange(copy.moved, true)) return;
  u32 at = 0;
  for (const Piece& piece : copy.pieces) {
    if (piece.global)
      store_bytes(piece.global, piece.shared, piece.bytes, copy.reduction);
    else
      memcpy(piece.shared, copy.data.data() + at, piece.bytes);
    at += piece.bytes;
  }
}

// A copy that an mbarrier counts ends.
void land(Copy& copy) {
  move(copy);
  Mbarrier& mbarrier = *copy.mbarrier;
  const Epoch epoch = {machine->cluster, mbarrier.block->copy_agent(mbarrier.slot), mbarrier.phase + 1};
  const u8 flags = kInitialised | kWrittenAsync | (copy.tensor ? kKnownSwizzle : 0);
  for (const Piece& piece : copy.pieces)
    machine->shared_shadow.end_write(piece.cells, piece.bytes, epoch, flags, copy.swizzle);
  for (const auto& [cells, count] : copy.sources) machine->shared_shadow.end_read(cells, count, epoch);
  mbarrier.arriving.seen[epoch.agent] = epoch.step;
  mbarrier.bytes -= copy.transaction_bytes;
  complete_mbarrier(mbarrier);
}

static void fly(std::unique_ptr<Copy> copy) {
  machine->flying.push_back(std::move(copy));
  machine->idle = 0;
  if (machine->options.landing == NXS_EMULATOR_LANDING_EARLY) {
    const std::unique_ptr<Copy> now = std::move(machine->flying.back());
    machine->flying.pop_back();
    land(*now);
  }
}

static void store_read(Copy& copy) {
  move(copy);
  if (std::exchange(copy.read_done, true)) return;
  for (const Piece& piece : copy.pieces) machine->shared_shadow.end_read(piece.cells, piece.bytes, self->epoch());
}

static void store_written(Copy& copy, const Epoch& epoch) {
  if (copy.reduction != Reduction::kNone) return;
  for (const Piece& piece : copy.pieces)
    each_global(piece.global, piece.bytes, [&](Cell* cells, u32 count) {
      machine->global_shadow.end_write(cells, count, epoch, kInitialised | kWrittenAsync, Swizzle{});
    });
}

void end_copies(Thread& thread) {
  for (const auto& copy : thread.open_bulk)
    fail("unwaited copy", copy->where, "the thread ends with this copy neither committed nor waited for");
  for (const CopyGroup& group : thread.bulk_groups)
    for (const auto& copy : group) {
      if (!copy->read_done)
        fail("unwaited copy", copy->where, "the thread ends before this copy is known to have read its source");
      store_written(*copy, {machine->cluster, thread.agent, ~0u});  // no other block can know when
    }
}

// ---- cp.async

void copy_async(u32 to, const void* from, u32 bytes, u32 source_bytes, Where where) {
  if (to % bytes || reinterpret_cast<u64>(from) % bytes)
    fail("misaligned", where, "copy of %u bytes from %p to shared address 0x%x", bytes, from, to);
  if (source_bytes > bytes) fail("out of bounds", where, "a copy of %u bytes that reads %u", bytes, source_bytes);
  const SharedSpan span = shared_span(to, bytes, false, where);
  machine->shared_shadow.begin_write(span.cells, bytes, self->clocks, where);
  if (source_bytes) {
    if (source_bytes == bytes)
      global_access(from, bytes, Access::kRead, where);
    else
      for (u32 i = 0; i < source_bytes; ++i) global_access(static_cast<const u8*>(from) + i, 1, Access::kRead, where);
  }
  auto copy = std::make_unique<Copy>();
  copy->pieces.push_back({span.bytes, span.cells, nullptr, bytes});
  copy->data.resize(bytes);
  memcpy(copy->data.data(), from, source_bytes);
  copy->where = where;
  if (machine->landing_now()) move(*copy);
  self->open_copies.push_back(std::move(copy));
}

void copy_async_commit() { self->copy_groups.push_back(std::exchange(self->open_copies, {})); }

void copy_async_wait(u32 pending, Where) {
  while (self->copy_groups.size() > pending) {
    for (const auto& copy : self->copy_groups.front()) {
      move(*copy);
      for (const Piece& piece : copy->pieces)
        machine->shared_shadow.end_write(piece.cells, piece.bytes, self->epoch(), kInitialised, Swizzle{});
    }
    self->copy_groups.erase(self->copy_groups.begin());
  }
}

// ---- cp.async.bulk

static void read_source(Copy& copy, const void* from, u32 bytes, Where where) {
  check_bounds(from, bytes, where);
  each_global(from, bytes, [&](Cell* cells, u32 count) {
    machine->global_shadow.begin_read(cells, count, self->clocks, where);
    machine->global_shadow.end_read(cells, count, self->epoch());
  });
  const u8* p = static_cast<const u8*>(from);
  copy.data.insert(copy.data.end(), p, p + bytes);
  counts.global_load_bytes += 32 * sectors(reinterpret_cast<u64>(from), bytes);
}

// Begins a copy to this block or a peer, whose pieces are still to come.
static std::unique_ptr<Copy> load_to(const SharedSpan& to, u32 mbarrier, u32 bytes, Where where) {
  auto copy = std::make_unique<Copy>();
  copy->mbarrier = &mbarrier_for_copy(mbarrier, where);
  copy->transaction_bytes = bytes;
  copy->where = where;
  if (to.block != copy->mbarrier->block)
    fail("arrival", where, "a copy to one block that signals an mbarrier of another");
  machine->shared_shadow.begin_write(to.cells, bytes, self->clocks, where);
  return copy;
}

// Calls issue(to, mbarrier) for this block or for each rank of the mask.
template <typename F> static void each_target(u32 to, u32 mbarrier, u32 multicast, Where where, F issue) {
  if (!multicast) return issue(to, mbarrier);
  for (u32 rank = 0; rank < 16; ++rank)
    if (multicast >> rank & 1) issue(map_to_rank(to, rank, where), map_to_rank(mbarrier, rank, where));
}

static void check_bulk(u32 shared, const void* global, u32 bytes, Where where) {
  if (shared % 16 || reinterpret_cast<u64>(global) % 16 || bytes % 16 || !bytes)
    fail("misaligned", where, "bulk copy of %u bytes between %p and shared address 0x%x: multiples of 16 are due",
         bytes, global, shared);
}

void bulk_load(u32 to, const void* from, u32 bytes, u32 mbarrier, u32 multicast, Where where) {
  check_bulk(to, from, bytes, where);
  each_target(to, mbarrier, multicast, where, [&](u32 target, u32 signal) {
    const SharedSpan span = shared_span(target, bytes, true, where);
    auto copy = load_to(span, signal, bytes, where);
    copy->pieces.push_back({span.bytes, span.cells, nullptr, bytes});
    read_source(*copy, from, bytes, where);
    fly(std::move(copy));
  });
}

void bulk_copy_cluster(u32 to, u32 from, u32 bytes, u32 mbarrier, Where where) {
  check_bulk(to | from, nullptr, bytes, where);
  const SharedSpan source = shared_span(from, bytes, false, where), target = shared_span(to, bytes, true, where);
  auto copy = load_to(target, mbarrier, bytes, where);
  machine->shared_shadow.begin_read(source.cells, bytes, self->clocks, where);
  copy->pieces.push_back({target.bytes, target.cells, nullptr, bytes});
  copy->sources.push_back({source.cells, bytes});
  copy->data.assign(source.bytes, source.bytes + bytes);
  fly(std::move(copy));
}

static void store_piece(Copy& copy, u8* to, const SharedSpan& from, u32 bytes, Where where) {
  check_bounds(to, bytes, where);
  machine->shared_shadow.begin_read(from.cells, bytes, self->clocks, where);
  each_global(to, bytes, [&](Cell* cells, u32 count) {
    if (copy.reduction == Reduction::kNone)
      machine->global_shadow.begin_write(cells, count, self->clocks, where);
    else
      machine->global_shadow.write(cells, count, *self, Access::kAtomic, where);
  });
  copy.pieces.push_back({from.bytes, from.cells, to, bytes});
}

static void store(std::unique_ptr<Copy> copy) {
  if (machine->landing_now()) move(*copy);
  self->open_bulk.push_back(std::move(copy));
}

void bulk_store(void* to, u32 from, u32 bytes, Reduction reduction, Where where) {
  check_bulk(from, to, bytes, where);
  auto copy = std::make_unique<Copy>();
  copy->reduction = reduction;
  copy->where = where;
  store_piece(*copy, static_cast<u8*>(to), shared_span(from, bytes, false, where), bytes, where);
  counts.global_store_bytes += 32 * sectors(reinterpret_cast<u64>(to), bytes);
  store(std::move(copy));
}

void bulk_commit() { self->bulk_groups.push_back(std::exchange(self->open_bulk, {})); }

void bulk_wait(u32 pending, bool read_only, Where) {
  auto& groups = self->bulk_groups;
  const size_t done = groups.size() > pending ? groups.size() - pending : 0;
  for (size_t i = 0; i < done; ++i)
    for (const auto& copy : groups[i]) {
      store_read(*copy);
      if (!read_only) store_written(*copy, self->epoch());
    }
  if (!read_only) groups.erase(groups.begin(), groups.begin() + static_cast<std::ptrdiff_t>(done));
}

// ---- tensor copies

static EncodedMap decode(const TensorMap* map, u32 rank, Where where) {
  EncodedMap encoded;
  if (reinterpret_cast<u64>(map) % 64) fail("tensor map", where, "a tensor map that is not aligned to 64 bytes");
  memcpy(&encoded, map, sizeof(encoded));
  if (encoded.magic != kMapMagic) fail("tensor map", where, "a tensor map that encode_tensor_map did not make");
  if (rank && encoded.rank != rank)
    fail("tensor map", where, "a copy of rank %u with a map of rank %u", rank, encoded.rank);
  return encoded;
}

void check_tensor_map(const TensorMap* map, u32 rank, Where where) { decode(map, rank, where); }

// Calls visit(row in the box, global address of its first element, first and last in-bounds element) for each row of a
// box.
template <typename F> static void each_row(const EncodedMap& map, const i32* at, F visit) {
  u32 rows = 1;
  for (u32 i = 1; i < map.rank; ++i) rows *= map.box[i];
  for (u32 row = 0; row < rows; ++row) {
    bool inside = true;
    i64 address = static_cast<i64>(map.address) + i64{at[0]} * map.element_bytes;
    for (u32 i = 1, rest = row; i < map.rank; rest /= map.box[i], ++i) {
      const i64 x = i64{at[i]} + rest % map.box[i];
      inside &= x >= 0 && x <= map.last[i];
      address += x * static_cast<i64>(map.stride[i - 1]);
    }
    const i64 first = std::max<i64>(0, -i64{at[0]}), end = std::min<i64>(map.box[0], i64{map.last[0]} + 1 - at[0]);
    visit(row, reinterpret_cast<u8*>(address), static_cast<u32>(first),
          inside && end > first ? static_cast<u32>(end) : static_cast<u32>(first));
  }
}

static u32 box_bytes(const EncodedMap& map) {
  u32 bytes = map.element_bytes;
  for (u32 i = 0; i < map.rank; ++i) bytes *= map.box[i];
  return bytes;
}

static void check_tensor_copy(const EncodedMap& map, u32 shared, Where where) {
  if (shared % 128) fail("misaligned", where, "tensor copy at shared address 0x%x: a multiple of 128 is due", shared);
  if (map.swizzle != Swizzle::kNone && map.box[0] * map.element_bytes != swizzle_bytes(map.swizzle))
    fail("tensor map", where, "a swizzled box whose rows are shorter than the swizzle is not modelled");
}

void tensor_load(u32 to, const TensorMap* tensor_map, u32 mbarrier, const i32* at, u32 rank, u32 multicast,
                 Where where) {
  const EncodedMap map = decode(tensor_map, rank, where);
  check_tensor_copy(map, to, where);
  const u32 bytes = box_bytes(map), row_bytes = map.box[0] * map.element_bytes;
  each_target(to, mbarrier, multicast, where, [&](u32 target, u32 signal) {
    const SharedSpan span = shared_span(target, bytes, true, where);
    auto copy = load_to(span, signal, bytes, where);
    copy->tensor = true;
    copy->swizzle = map.swizzle;
    const u32 offset = own_address(target);
    each_row(map, at, [&](u32 row, u8* global, u32 first, u32 end) {
      const u32 begin = static_cast<u32>(copy->data.size()), e = map.element_bytes;
      copy->data.resize(begin + first * e);
      if (end > first) read_source(*copy, global + first * e, (end - first) * e, where);
      copy->data.resize(begin + row_bytes);
      if (map.fill_nan)
        for (u32 x = 0; x < map.box[0]; ++x)
          if (x < first || x >= end)
            memset(copy->data.data() + begin + x * e, 0xff, e), copy->data[begin + x * e + e - 1] = 0x7f;
      for (u32 x = 0; x < row_bytes; x += 16) {
        const u32 place = swizzled(offset + row * row_bytes + x, map.swizzle) - offset;
        copy->pieces.push_back({span.bytes + place, span.cells + place, nullptr, 16});
      }
    });
    fly(std::move(copy));
  });
}

void tensor_store(const TensorMap* tensor_map, u32 from, const i32* at, u32 rank, bool add, Where where) {
  const EncodedMap map = decode(tensor_map, rank, where);
  check_tensor_copy(map, from, where);
  const u32 row_bytes = map.box[0] * map.element_bytes, e = map.element_bytes;
  auto copy = std::make_unique<Copy>();
  copy->where = where;
  if (add)
    copy->reduction = map.dtype == NXS_F32    ? Reduction::kAddF32
                      : map.dtype == NXS_BF16 ? Reduction::kAddBf16
                      : map.dtype == NXS_F16  ? Reduction::kAddF16
                                              : Reduction::kAddU32;
  if (add && copy->reduction == Reduction::kAddU32 && map.element_bytes != 4)
    fail("tensor map", where, "an addition of this type is not modelled");
  const SharedSpan span = shared_span(from, box_bytes(map), false, where);
  each_row(map, at, [&](u32 row, u8* global, u32 first, u32 end) {
    for (u32 x = 0; x < row_bytes; x += 16) {
      const u32 begin = std::max(x, first * e), stop = std::min(x + 16, end * e);
      if (begin >= stop) continue;
      const u32 place = swizzled(from + row * row_bytes + x, map.swizzle) - from + begin - x;
      store_piece(*copy, global + begin, {span.block, span.bytes + place, span.cells + place}, stop - begin, where);
    }
    counts.global_store_bytes += 32 * sectors(reinterpret_cast<u64>(global) + first * e, (end - first) * e);
  });
  store(std::move(copy));
}

}  // namespace emulator
}  // namespace nxs
