// Where the keys of a set and head lie: nxs_key_places of nextscale.h. For all kernels that read a cache in place.
#pragma once
#include "common/ptx/memory.cuh"
#include "common/ptx/warp.cuh"
#include "nextscale.h"

namespace nxs::compression {

struct KeyPlaces {
  const nxs_key_places& of;
  const i32* pages;
  u32 first;  // keys of the first rows

  NXS_DEVICE KeyPlaces(const nxs_key_places& places, u32 set, u32 head)
      : of(places), pages(places.pages_or_null), first(static_cast<u32>(places.first_rows)) {
    if (pages) pages += set * of.pages_stride_set;
    if (of.kept_or_null) {
      const i32 kept = load_global_nc(of.kept_or_null + set * of.kept_stride_set + head * of.kept_stride_head);
      first = kept < 0 ? 0 : kept < of.first_rows ? static_cast<u32>(kept) : first;
    }
  }
  // Rows among the keys that hold none.
  NXS_DEVICE u32 skipped() const { return static_cast<u32>(of.first_rows) - first; }
  // The place of a row that is the first of a page, or in a page from there on: as a row of k.
  NXS_DEVICE u32 place_of_row(u32 row) const {
    if (!pages) return row;
    const u32 page_rows = static_cast<u32>(of.page_rows), index = row / page_rows;
    const i32 given = load_global_nc(pages + index);
    const i32 page = given < 0 ? 0 : given < of.pool_pages ? given : of.pool_pages - 1;
    return static_cast<u32>(page) * page_rows + (row - index * page_rows);
  }
  NXS_DEVICE u32 operator()(u32 key) const { return place_of_row(key < first ? key : key + skipped()); }
};

// Keys there are of a set and head, of ops with `tokens`, `places` and `lengths`.
template <typename Params> NXS_DEVICE u32 length_of(const Params& p, const KeyPlaces& places, u32 set, u32 head) {
  i32 n = static_cast<i32>(p.tokens);
  if (p.lengths_or_null) {
    const i32 given = load_global_nc(p.lengths_or_null + set * p.lengths_stride_set + head * p.lengths_stride_head);
    return static_cast<u32>(given < 0 ? 0 : given < n ? given : n);
  }
  return static_cast<u32>(n) - places.skipped();
}

// Whether places are such as kernels take.
inline bool are_places(const nxs_key_places& p, i64 tokens, const void* lengths) {
  if (!p.pages_or_null) return !p.kept_or_null && p.first_rows == 0;
  return p.page_rows > 0 && p.pool_pages > 0 && p.page_rows <= INT32_MAX / p.pool_pages && p.pages_stride_set >= 0 &&
         p.kept_stride_set >= 0 && p.kept_stride_head >= 0 && p.first_rows >= 0 && p.first_rows <= tokens &&
         p.first_rows % p.page_rows == 0 && (!p.kept_or_null || !lengths);
}

}  // namespace nxs::compression
