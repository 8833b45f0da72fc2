// How kernels read the schedule of a scale attention: see nextscale.h for its words.
#pragma once
#include "common/dtype.cuh"
#include "common/ptx/memory.cuh"

namespace nxs::attention {

constexpr u32 kTileRows = NXS_SCHEDULE_TILE_ROWS, kChunk = NXS_SCHEDULE_CHUNK_KEYS;

using ScaleParams = nxs_scale_attention_params;

// The params as kernels get them: with the beginning of the schedule, where there is one.
constexpr u32 kScheduleHead = 256;
struct ScaleKernelParams : ScaleParams {
  u32 head_words;
  u32 head[kScheduleHead];

  explicit ScaleKernelParams(const ScaleParams& p) : ScaleParams(p), head_words(0), head{} {
    if (!p.schedule_head_or_null || p.schedule_head_words <= 0) return;
    const u32 words = static_cast<u32>(p.schedule_head_words);
    head_words = words < kScheduleHead ? words : kScheduleHead;
    for (u32 i = 0; i < head_words; ++i) head[i] = p.schedule_head_or_null[i];
  }
  // Four words of the schedule; `at` is a multiple of four.
  NXS_DEVICE Vec<u32, 4> words(u32 at) const {
    if (at + 4 <= head_words) return {{head[at], head[at + 1], head[at + 2], head[at + 3]}};
    return load_global_nc(reinterpret_cast<const Vec<u32, 4>*>(schedule + at));
  }
};

// One unit of work: an item for one head (or, packed, for the heads of one kv head) of one batch entry.
struct Work {
  u32 item;   // offset of the item
  u32 batch;
  u32 head;   // of q, or of k where packed
};

// Work number `index` of `items` times `heads` over the batch. Within a section of heads the items come one after the
// other, each for all of its heads, so that the longest start first and a section's keys stay in L2.
NXS_DEVICE Work work_at(const ScaleParams& p, u32 index) {
  const u32 heads = static_cast<u32>(p.pack > 1 ? p.kv_heads : p.heads), all = static_cast<u32>(p.batch) * heads;
  const u32 items = static_cast<u32>(p.items), section = p.section ? static_cast<u32>(p.section) : all;
  const u32 number = index / (items * section), first = number * section;
  const u32 size = all - first < section ? all - first : section;
  const u32 within = index - number * (items * section);
  const u32 item = within / size, flat = first + within - item * size, batch = flat / heads;
  return {item * NXS_SCHEDULE_ITEM_WORDS, batch, flat - batch * heads};
}

NXS_DEVICE u32 kv_head_of(const ScaleParams& p, const Work& work) {
  return p.pack > 1 ? work.head : work.head / static_cast<u32>(p.heads / p.kv_heads);
}

__host__ NXS_DEVICE u32 all_works(const ScaleParams& p) {
  return static_cast<u32>(p.items) * static_cast<u32>(p.batch) * static_cast<u32>(p.pack > 1 ? p.kv_heads : p.heads);
}

// The keys of an item, up to kStep at a time (a chunk or a part of it), in the order in which they are taken; those beyond a
// length are left out.
template <u32 kStep> struct KeyWalk {
  static_assert(kChunk % kStep == 0 || kStep == NXS_SCHEDULE_WIDE_CHUNK_KEYS);

  // What stays the same on the way.
  struct Of {
    u32 batch, kv_head;
    u32 last;  // offset of the last run
  };
  u32 run;        // offset of the run at hand
  u32 key, keys;  // of the run at hand: the row of k and v that its first key is, keys that are left

  NXS_DEVICE KeyWalk(const ScaleKernelParams& p, const Work& work, Of& of) : key(0), keys(0) {
    const Vec<u32, 4> item = p.words(work.item);
    run = item.data[0] - NXS_SCHEDULE_RUN_WORDS;
    of = {work.batch, kv_head_of(p, work), run + (item.data[3] == p.digest ? item.data[1] * NXS_SCHEDULE_RUN_WORDS : 0)};
  }

  // How many keys come next, from first_key() on; 0 after the last ones.
  NXS_DEVICE u32 next(const ScaleKernelParams& p, const Of& of) {
    while (keys == 0) {
      if (run == of.last) return 0;
      run += NXS_SCHEDULE_RUN_WORDS;
      const Vec<u32, 4> head = p.words(run);
      key = head.data[0];
      keys = head.data[1];
      if (head.data[2]) {
        const i64 at = (head.data[2] - 1) * p.lengths_stride_index + of.batch * p.lengths_stride_batch +
                       of.kv_head * p.lengths_stride_head;
        const i32 length = load_global_nc(p.lengths_or_null + at);
        const u32 end = head.data[3] + static_cast<u32>(length > 0 ? length : 0);
        keys = end <= key ? 0 : end - key < keys ? end - key : keys;
      }
      if (p.kv_offset_or_null) key += static_cast<u32>(load_global_nc(p.kv_offset_or_null + of.batch));
    }
    const u32 count = (keys - 1) % kStep + 1;
    keys -= count;
    return count;
  }
  NXS_DEVICE u32 first_key() const { return key + keys; }
  // The mask of one group, or those of all, of the run at hand.
  NXS_DEVICE u32 mask(const ScaleKernelParams& p, u32 group) const { return load_global_nc(p.schedule + run + 4 + group); }
  NXS_DEVICE Vec<u32, 4> masks(const ScaleKernelParams& p) const { return p.words(run + 4); }
};

}  // namespace nxs::attention
