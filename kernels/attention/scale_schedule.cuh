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

// The chunks of an item in the order in which they are taken; those beyond a length are left out.
struct ChunkWalk {
  const ScaleKernelParams& p;
  const i32* lengths;  // of this batch entry and kv head, or null
  i64 length_stride;
  u32 run, runs;       // offset of the run at hand; how many are left, this one included
  u32 key, keys;       // of the run at hand
  u32 chunks;          // of it that are left
  Vec<u32, 4> masks;   // of the run at hand, by group

  NXS_DEVICE ChunkWalk(const ScaleKernelParams& p_, const Work& work) : p(p_), length_stride(p_.lengths_stride_index) {
    lengths = p.lengths_or_null ? p.lengths_or_null + work.batch * p.lengths_stride_batch +
                                      kv_head_of(p, work) * p.lengths_stride_head
                                : nullptr;
    const Vec<u32, 4> item = p.words(work.item);
    run = item.data[0] - NXS_SCHEDULE_RUN_WORDS;
    runs = item.data[3] == p.digest ? item.data[1] + 1 : 1;
    key = keys = chunks = 0;
  }

  // Steps to the next chunk; false after the last one.
  NXS_DEVICE bool next() {
    while (chunks == 0) {
      if (--runs == 0) return false;
      run += NXS_SCHEDULE_RUN_WORDS;
      const Vec<u32, 4> head = p.words(run);
      masks = p.words(run + 4);
      key = head.data[0];
      keys = head.data[1];
      if (head.data[2]) {
        const i32 length = load_global_nc(lengths + (head.data[2] - 1) * length_stride);
        const u32 end = head.data[3] + static_cast<u32>(length > 0 ? length : 0);
        keys = end <= key ? 0 : end - key < keys ? end - key : keys;
      }
      chunks = (keys + kChunk - 1) / kChunk;
    }
    --chunks;
    return true;
  }
  NXS_DEVICE u32 first_key() const { return key + chunks * kChunk; }
  NXS_DEVICE u32 count() const { return keys - chunks * kChunk < kChunk ? keys - chunks * kChunk : kChunk; }
};

}  // namespace nxs::attention
