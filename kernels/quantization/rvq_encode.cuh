// RVQ encode with tensor cores: what both of its kernels share. nextscale.h has the formula.
//
//   for each level: code = argmin over c of D(x, c), D = sum over k of (x[k] - c[k])^2;  x -= value of the code
//
// D itself is exact to the bit by definition: f32, one chain of fma. The products only filter. With s(c) = x . c - |c|^2 / 2
// (so that D = |x|^2 - 2 s) as the tensor cores find it, |s' - s| <= e, and the chain's own error t relative to D:
//   the winner w has  s'(w) >= max s' - 2 e - t (|x| + |c|)^2
// What the products leave out of x . c is bounded by norms: with x = pieces + xr, c = pieces + cr (pieces of 8 bits each) it is
// at most |xr| |c| + (|x| + |xr|) |cr| + |x2| |c2| (the product of the second pieces is not taken); sums of Q terms in f32 that may
// be cut off rather than rounded add Q 2^-23 of the sum of magnitudes. Norms of codes are the greatest of the level.
//
// Who does what
//   A warp owns 16 rows through all levels: their residuals in shared memory, f32. Of each tile of 128 codes a lane has 2 rows of
//   32 products, in groups of kGroup. It takes the maximum of each group; if one reaches what is the row's threshold so far, the
//   quad agrees on the best so far and its lanes list groups above the new threshold, each for itself. After the last tile the
//   listed groups that still reach the threshold are scored, a lane a code, and an atomic minimum of (score, code) decides.
//   Where a list overflows, and for rows whose bound means nothing (huge), the warp scores every code; a row with a NaN or an
//   infinity has no score at all.
//   With kSplit the codes of a level are dealt out to the blocks of a cluster, which all have the same rows: each finds the winner
//   among its own, and each warp tells the same warp of the other blocks.
// Shared     x [rows][P + 4] f32; with a cosine metric the same again for what is searched; A of the products, bf16
//            [Q / 8][rows][8]; lists of each warp; pieces of the operand, [eights][128][8].
// Bytes      the operand once for each tile of rows and level (L2); scored rows and winners' values in f32.
// FLOPs      2 * rows * entries * Q a level, and 1 to 1.3 maxima a product.
// Determinism bitwise, whatever the order of lists: the minimum is of exact scores.
// Limits     batch * rows < 2^31 - 64, entries <= 131072, levels <= 32.
#pragma once
#include "common/ptx/cluster.cuh"
#include "common/ptx/mbarrier.cuh"
#include "quantization/rvq_io.cuh"

namespace nxs::quantization {

constexpr u32 kWarpRows = 16;
constexpr u32 kListed = 8;    // groups that a lane lists of a row
constexpr u32 kItems = 256;   // groups that a warp scores
constexpr float kInfinity = __builtin_huge_valf();

// What a warp keeps beside its rows, bytes from its own start.
struct WarpShared {
  static constexpr u32 kLists = 0, kItemsAt = kLists + kWarpRows * 4 * kListed * 8, kBest = kItemsAt + kItems * 4,
                       kSlack = kBest + kWarpRows * 8, kNorm = kSlack + kWarpRows * 4, kState = kNorm + kWarpRows * 4,
                       kCount = kState + kWarpRows * 4, kBytes = 5632;
  static_assert(kCount + 16 <= kBytes);
};
// Of a row: filtered, every code scored, or nothing: not finite, or no row.
enum RowState : u32 { kFiltered = 0, kScanned = 1, kNothing = 2 };

// Steps of 16 of the operand's dimension that are streamed at once.
__host__ NXS_DEVICE constexpr u32 steps_of(u32 operand_dim) { return operand_dim % 64 == 0 ? 4 : operand_dim % 48 == 0 ? 3 : 2; }
constexpr u32 kStepBytes = 16 * kCodeTile * 2;

// Where things are in the shared memory of a block, bytes from its start.
struct EncodeShared {
  u32 x, search, a, warps, peers, barriers, stage_bytes, bytes;
};
// What the blocks of a cluster tell a warp: a winner a row and block, of odd and of even levels.
constexpr u32 kMostRanks = 8, kPeerBytes = kMostRanks * kWarpRows * 8;
__host__ NXS_DEVICE EncodeShared encode_shared(const nxs_codebook& book, u32 rows, u32 stages, u32 ranks) {
  const u32 padded = static_cast<u32>(book.padded_dim), vectors = rows * (padded + 4) * 4;
  EncodeShared s = {};
  s.stage_bytes = steps_of(static_cast<u32>(book.operand_dim)) * kStepBytes;
  s.x = stages * s.stage_bytes;  // the stages begin at 0
  s.search = s.x + (book.metric == NXS_METRIC_L2 ? 0 : vectors);
  s.a = s.search + vectors;
  s.warps = s.a + rows * static_cast<u32>(book.operand_dim) * 2;
  s.peers = s.warps + rows / kWarpRows * WarpShared::kBytes;
  s.barriers = s.peers + (ranks > 1 ? rows / kWarpRows * 2 * kPeerBytes : 0);
  s.bytes = s.barriers + 256;
  return s;
}

// The pieces of the operand that a block streams: of a level one after the other in memory, the levels too. Blocks begin with
// different tiles and go round, or all of them would ask the same few slices of L2 for the same piece at once.
struct PieceStream {
  const u8* operand;                // of the first tile
  u64 level_bytes, start_bytes;     // from a level to the next; to where the block begins
  u32 steps, piece_bytes, pieces;   // pieces: of a tile
  u32 first, tiles, level_pieces, all;  // the block's tiles
  u32 start;                            // the one it begins with, of its own

  // `block`: of those that have the same codes.
  NXS_DEVICE PieceStream(const nxs_rvq_encode_params& p, u32 block, u32 rank, u32 ranks) {
    const nxs_codebook& book = p.codebook;
    const u32 all_tiles = (static_cast<u32>(book.entries) + kCodeTile - 1) / kCodeTile;
    steps = steps_of(static_cast<u32>(book.operand_dim));
    piece_bytes = steps * kStepBytes;
    pieces = static_cast<u32>(book.operand_dim) / 16 / steps;
    first = all_tiles * rank / ranks;
    tiles = all_tiles * (rank + 1) / ranks - first;
    level_pieces = tiles * pieces;
    all = static_cast<u32>(p.levels) * level_pieces;
    const u64 tile_bytes = static_cast<u64>(pieces) * piece_bytes;
    level_bytes = book.levels == 1 ? 0 : all_tiles * tile_bytes;
    operand = static_cast<const u8*>(book.prepared) + book.operand_at + first * tile_bytes;
    start = block % tiles;
    start_bytes = start * tile_bytes;
  }
  // The number of the tile that comes at this place.
  NXS_DEVICE u32 tile(u32 place) const {
    const u32 at = start + place;
    return first + (at < tiles ? at : at - tiles);
  }
};
// Walks it.
struct PieceWalk {
  const u8 *level, *from;
  u32 place = 0;  // in the level
  NXS_DEVICE explicit PieceWalk(const PieceStream& s) : level(s.operand), from(s.operand + s.start_bytes) {}
  NXS_DEVICE void next(const PieceStream& s) {
    from += s.piece_bytes;
    ++place;
    if (place == s.level_pieces - s.start * s.pieces) from = level;
    if (place < s.level_pieces) return;
    place = 0;
    level += s.level_bytes;
    from = level + s.start_bytes;
  }
};

// One warp and its 16 rows.
template <int kGroup, bool kSplit> struct EncodeWarp {
  static constexpr u32 kGroups = 32 / kGroup;  // of a row, in a lane and tile

  const nxs_rvq_encode_params& p;
  const u32 lane, padded, stride;
  u32 first, rows;               // of the encode; how many are there
  u32 x, search, a, a_rows, own;  // shared memory: of the first row; rows of A; WarpShared
  u32 rank = 0, ranks = 1, peers = 0, told = 0;  // with kSplit; told: an mbarrier
  float best[2], threshold[2], slack[2];  // of rows lane / 4 and 8 more
  u32 count[2];
  RowOut out;

  NXS_DEVICE EncodeWarp(const nxs_rvq_encode_params& p_, u32 shared, const EncodeShared& s, u32 tile_rows, u32 tile, u32 warp)
      : p(p_), lane(thread_index() % kWarpSize), padded(static_cast<u32>(p_.codebook.padded_dim)), stride((padded + 4) * 4) {
    first = tile * tile_rows + warp * kWarpRows;
    const u32 all = static_cast<u32>(p.batch * p.rows), left = first < all ? all - first : 0;
    rows = left < kWarpRows ? left : kWarpRows;
    x = shared + s.x + warp * kWarpRows * stride;
    search = shared + s.search + warp * kWarpRows * stride;
    a = shared + s.a + warp * kWarpRows * 16;
    a_rows = tile_rows;
    own = shared + s.warps + warp * WarpShared::kBytes;
    if (lane < rows) out = RowOut(p, first + lane);
  }

  NXS_DEVICE bool cosine() const { return search != x; }
  NXS_DEVICE u32 a_at(u32 row, u32 q) const { return a + (q / 8 * a_rows + row) * 16 + q % 8 * 2; }

  // Rows of the input, and what of A does not change.
  NXS_DEVICE void load_rows() {
    load_tile(p, first, rows, kWarpRows, padded, x, stride);
    const u32 q0 = static_cast<u32>(p.codebook.pieces) * padded, ends = static_cast<u32>(p.codebook.operand_dim);
    for (u32 row = lane; row < kWarpRows; row += kWarpSize)
      for (u32 q = q0; q < ends; ++q) store_shared(a_at(row, q), from_f32<bf16>(q < q0 + 3 ? 1.0f : 0.0f));
    warp_sync();
  }

  // What is searched at this level: A, and how far below the best a row's winner may seem.
  NXS_DEVICE void begin_level(u32 level) {
    const nxs_codebook& book = p.codebook;
    if (cosine()) {
      if (lane < kWarpRows) {
        float sum = 0;
        for (u32 k = 0; k < padded; k += 4) {
          const auto v = load_shared<Vec<float, 4>>(x + lane * stride + k * 4);
#pragma unroll
          for (u32 i = 0; i < 4; ++i) sum = fma(v.data[i], v.data[i], sum);
        }
        const float norm = square_root(sum);
        store_shared(own + WarpShared::kNorm + lane * 4, norm < book.eps ? book.eps : norm);
      }
      warp_sync();
    }
    const float* stats = static_cast<const float*>(book.prepared) + (book.levels == 1 ? 0 : level) * 4;
    const Vec<float, 4> most = load_global_nc(reinterpret_cast<const Vec<float, 4>*>(stats));
    const u32 sub = lane % 8;
#pragma unroll 1
    for (u32 row = lane / 8; row < kWarpRows; row += 4) {
      float sum[3] = {};  // of squares: x, its second piece, what the pieces leave out
      bool finite = true;
      const float norm = cosine() ? load_shared<float>(own + WarpShared::kNorm + row * 4) : 1.0f;
#pragma unroll 1
      for (u32 k = 4 * sub; k < padded; k += 32) {
        auto v = load_shared<Vec<float, 4>>(x + row * stride + k * 4);
        if (cosine()) {
#pragma unroll
          for (u32 i = 0; i < 4; ++i) v.data[i] = divide(v.data[i], norm);
          store_shared(search + row * stride + k * 4, v);
        }
        Vec<bf16, 4> high, low;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
          const float e = v.data[i];
          finite &= is_finite(e);
          high.data[i] = from_f32<bf16>(e);
          float left = e - to_f32(high.data[i]);
          low.data[i] = from_f32<bf16>(left);
          if (book.pieces == 3) {
            const float second = to_f32(low.data[i]);
            left -= second;
            sum[1] = fma(second, second, sum[1]);
          }
          sum[0] = fma(e, e, sum[0]);
          sum[2] = fma(left, left, sum[2]);
        }
        store_shared(a_at(row, k), high);
        if (book.pieces == 3) {
          store_shared(a_at(row, padded + k), low);
          store_shared(a_at(row, 2 * padded + k), high);
        }
      }
#pragma unroll
      for (u32 i = 0; i < 3; ++i) {
        sum[i] += shuffle_xor(sum[i], 1);
        sum[i] += shuffle_xor(sum[i], 2);
        sum[i] += shuffle_xor(sum[i], 4);
        sum[i] = square_root(sum[i]);
      }
      const u32 bad = warp_ballot(!finite) >> (lane & 24) & 255;
      if (sub == 0) {
        const float q = static_cast<float>(book.operand_dim), n = static_cast<float>(padded);
        const float cut = (q + 2 * n + 16) * 0x1p-23f;  // of sums, and of |c|^2 / 2 itself
        const float left = sum[2] * most.data[0] + (sum[0] + sum[2]) * most.data[2] + sum[1] * most.data[1];
        const float e = left + cut * (1.05f * sum[0] * most.data[0] + 0.5f * most.data[0] * most.data[0]);
        const float reach = sum[0] + most.data[0];
        const float chain = (n + 4) * 0x1.04p-24f * reach * reach;
        // The last term is for what is too small for f32's exponents.
        const float most_slack = 1.02f * (2 * e + chain) + 0x1p-100f * (1 + reach);
        // Where squares may overflow the bound is none. Negated, so that a NaN is caught.
        const bool huge = !(reach < 0x1p50f);
        const u32 state = row >= rows || bad ? kNothing : huge ? kScanned : kFiltered;
        store_shared(own + WarpShared::kState + row * 4, state);
        store_shared(own + WarpShared::kSlack + row * 4, state == kFiltered ? most_slack : -kInfinity);
        store_shared(own + WarpShared::kBest + row * 8, static_cast<u64>(float_bits(kInfinity)) << 32);
      }
    }
    if (lane == 0) store_shared(own + WarpShared::kCount, 0u);
    warp_sync();
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
      slack[r] = load_shared<float>(own + WarpShared::kSlack + (lane / 4 + 8 * r) * 4);
      best[r] = -kInfinity;
      threshold[r] = slack[r] < 0 ? kInfinity : -kInfinity;  // a row without filter lists nothing
      count[r] = 0;
    }
  }

  // Products of a tile: element i is of row lane / 4 + 8 (i / 2 % 2), code 8 (i / 4) + 2 (lane % 4) + i % 2.
  NXS_DEVICE void take_tile(u32 tile, const float (&s)[64]) {
    float most[2][kGroups], top[2];
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
#pragma unroll
      for (u32 j = 0; j < kGroups; ++j) {
        const u32 i0 = j * (2 * kGroup) + 2 * r;
        most[r][j] = fmaxf(s[i0], s[i0 + 1]);
#pragma unroll
        for (u32 m = 1; m < kGroup / 2; ++m) most[r][j] = fmaxf(most[r][j], fmaxf(s[i0 + 4 * m], s[i0 + 4 * m + 1]));
      }
      top[r] = most[r][0];
#pragma unroll
      for (u32 j = 1; j < kGroups; ++j) top[r] = fmaxf(top[r], most[r][j]);
    }
    if (warp_any(top[0] >= threshold[0] || top[1] >= threshold[1])) list_groups(tile, most, top);
  }
  NXS_DEVICE void list_groups(u32 tile, const float (&most)[2][kGroups], const float (&top)[2]) {
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
      float all = fmaxf(top[r], shuffle_xor(top[r], 1));
      all = fmaxf(all, shuffle_xor(all, 2));
      if (all > best[r]) {
        best[r] = all;
        threshold[r] = all - slack[r];
      }
      if (!(top[r] >= threshold[r])) continue;
      u32 above = 0;
#pragma unroll
      for (u32 j = 0; j < kGroups; ++j)
        if (most[r][j] >= threshold[r]) above |= 1u << j;
      // Mostly one: a loop is as fast as to write it out for each group, and much less code.
#pragma unroll 1
      for (u32 j = 0; above != 0; ++j, above >>= 1) {
        if (!(above & 1)) continue;
        float here = most[r][0];
#pragma unroll
        for (u32 i = 1; i < kGroups; ++i)
          if (i == j) here = most[r][i];
        list(r, (tile * kGroups + j) * 4 + lane % 4, here);
      }
    }
  }
  struct Listed {
    float most;
    u32 group;
  };
  NXS_DEVICE u32 list_at(u32 r, u32 i) const {
    return own + WarpShared::kLists + (((lane / 4 + 8 * r) * 4 + lane % 4) * kListed + i) * 8;
  }
  NXS_DEVICE void list(u32 r, u32 group, float most) {
    if (count[r] == kListed) {
      // Many fall below the threshold as it rises.
      u32 kept = 0;
#pragma unroll 1
      for (u32 i = 0; i < kListed; ++i) {
        const auto old = load_shared<Listed>(list_at(r, i));
        if (old.most >= threshold[r]) store_shared(list_at(r, kept++), old);
      }
      count[r] = kept;
    }
    if (count[r] < kListed)
      store_shared(list_at(r, count[r]++), Listed{most, group});
    else
      atomic_or_shared(own + WarpShared::kState + (lane / 4 + 8 * r) * 4, kScanned);
  }

  // A code to be scored against a row, or none.
  struct Item {
    u32 row, code;
  };
  // The exact scores of kItems items, each a chain of its own; a trip to L2 takes longer than what is done with what it
  // brings, so as much is on the way as registers hold.
  template <u32 kMany> NXS_DEVICE void take_scores(const float* rows_of_level, const Item (&items)[kMany], u32 entries) const {
    const u32 chunks = padded / 4;
    const Vec<float, 4>* from[kMany];
    u32 at[kMany];
    float sum[kMany];
#pragma unroll
    for (u32 n = 0; n < kMany; ++n) {
      // Where there is none, that of code 0 is found and not taken.
      const u32 code = items[n].code < entries ? items[n].code : 0;
      from[n] = reinterpret_cast<const Vec<float, 4>*>(rows_of_level) +
                static_cast<u64>(code / kCodeLanes) * (chunks * kCodeLanes) + code % kCodeLanes;
      at[n] = search + items[n].row * stride;
      sum[n] = 0;
    }
    u32 k = 0;
    if constexpr (kSplit) {  // the Hopper kernel, whose consumers have registers
#pragma unroll 1
      for (; k + 16 <= chunks; k += 16) score_chunks<kMany, 16>(from, at, k, sum);
    }
#pragma unroll 1
    for (; k + 8 <= chunks; k += 8) score_chunks<kMany, 8>(from, at, k, sum);
#pragma unroll 1
    for (; k < chunks; k += 2) score_chunks<kMany, 2>(from, at, k, sum);
#pragma unroll
    for (u32 n = 0; n < kMany; ++n)
      // Scores are not negative: their bits are in their order, and below them lies the code.
      if (items[n].code < entries && sum[n] < kInfinity)
        atomic_min_shared(own + WarpShared::kBest + items[n].row * 8,
                          static_cast<u64>(float_bits(sum[n])) << 32 | items[n].code);
  }
  template <u32 kMany, u32 kChunks>
  NXS_DEVICE static void score_chunks(const Vec<float, 4>* const (&from)[kMany], const u32 (&at)[kMany], u32 k, float (&sum)[kMany]) {
    Vec<float, 4> c[kMany][kChunks];
#pragma unroll
    for (u32 j = 0; j < kChunks; ++j)
#pragma unroll
      for (u32 n = 0; n < kMany; ++n) c[n][j] = load_global_nc(from[n] + (k + j) * kCodeLanes);
#pragma unroll
    for (u32 j = 0; j < kChunks; ++j)
#pragma unroll
      for (u32 n = 0; n < kMany; ++n) {
        const auto v = load_shared<Vec<float, 4>>(at[n] + (k + j) * 16);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
          const float difference = v.data[i] - c[n][j].data[i];
          sum[n] = fma(difference, difference, sum[n]);
        }
      }
  }
  NXS_DEVICE const float* searched(u32 level) const {
    const nxs_codebook& book = p.codebook;
    const u64 tiles = (static_cast<u64>(book.entries) + kCodeTile - 1) / kCodeTile;
    const u64 at = book.levels == 1 ? 0 : level * tiles * kCodeTile * padded;
    return reinterpret_cast<const float*>(static_cast<const u8*>(book.prepared) + book.search_at) + at;
  }

  // The winners, from what is listed.
  NXS_DEVICE void choose(u32 level, u32 first_tile, u32 tiles) {
    const u32 scan_from = first_tile * kCodeTile, scan_to = scan_from + tiles * kCodeTile;
    const u32 entries = static_cast<u32>(p.codebook.entries), items = own + WarpShared::kItemsAt;
    const float* rows_of_level = searched(level);
#pragma unroll
    for (u32 r = 0; r < 2; ++r)
#pragma unroll 1
      for (u32 i = 0; i < count[r]; ++i) {
        const auto listed = load_shared<Listed>(list_at(r, i));
        if (!(listed.most >= threshold[r])) continue;
        const u32 row = lane / 4 + 8 * r, at = atomic_add_shared(own + WarpShared::kCount, 1);
        if (at < kItems)
          store_shared(items + at * 4, row | listed.group << 4);
        else
          atomic_or_shared(own + WarpShared::kState + row * 4, kScanned);
      }
    warp_sync();
    u32 scored = load_shared<u32>(own + WarpShared::kCount);
    scored = (scored < kItems ? scored : kItems) * kGroup;
    const auto item_of = [&](u32 i) {
      if (i >= scored) return Item{0, ~0u};
      const u32 item = load_shared<u32>(items + i / kGroup * 4), member = i % kGroup, group = item >> 4, tile = group / (4 * kGroups);
      const u32 block = group / 4 % kGroups * (kGroup / 2) + member / 2;  // of 8 codes
      return Item{item & 15, tile * kCodeTile + block * 8 + group % 4 * 2 + member % 2};
    };
#pragma unroll 1
    for (u32 i = 0; i < scored; i += 2 * kWarpSize)
      take_scores<2>(rows_of_level, {item_of(i + lane), item_of(i + lane + kWarpSize)}, entries);
    warp_sync();
#pragma unroll 1
    for (u32 row = 0; row < kWarpRows; ++row) {
      if (load_shared<u32>(own + WarpShared::kState + row * 4) != kScanned) continue;
#pragma unroll 1
      for (u32 code = scan_from + lane; code < scan_to; code += 2 * kWarpSize)
        take_scores<2>(rows_of_level, {{row, code}, {row, code + kWarpSize}}, entries);
    }
    warp_sync();
    if constexpr (kSplit)
      if (ranks > 1) agree(level);
  }
  // The winner among all blocks' codes.
  NXS_DEVICE void agree(u32 level) const {
    const u32 words = peers + level % 2 * kPeerBytes, mine = own + WarpShared::kBest + lane * 8;
    if (lane < kWarpRows) {
      const u64 winner = load_shared<u64>(mine);
      for (u32 peer = 0; peer < ranks; ++peer)
        if (peer != rank) store_cluster(map_to_rank(words + (rank * kWarpRows + lane) * 8, peer), winner);
    }
    warp_sync();
    if (lane < ranks && lane != rank) mbarrier_arrive_cluster(map_to_rank(told, lane));
    mbarrier_wait_cluster(told, level % 2);
    if (lane < kWarpRows) {
      u64 winner = load_shared<u64>(mine);
      for (u32 peer = 0; peer < ranks; ++peer) {
        if (peer == rank) continue;
        const u64 other = load_shared<u64>(words + (peer * kWarpRows + lane) * 8);
        if (other < winner) winner = other;
      }
      store_shared(mine, winner);
    }
    warp_sync();
  }

  // Writes the winners and takes them from the rows.
  NXS_DEVICE void end_level(u32 level) {
    if (rank == 0 && lane < rows) {
      const u64 winner = load_shared<u64>(own + WarpShared::kBest + lane * 8);
      out.write(p, level, static_cast<u32>(winner), bits_float(static_cast<u32>(winner >> 32)));
    }
    // A lane has a part of four rows, whose values are on the way at once.
    const float* value[4];
#pragma unroll
    for (u32 r = 0; r < 4; ++r) {
      const u32 code = static_cast<u32>(load_shared<u64>(own + WarpShared::kBest + (lane / 8 + 4 * r) * 8));
      value[r] = values_of(p, level) + static_cast<u64>(code) * padded;
    }
#pragma unroll 2
    for (u32 k = lane % 8 * 4; k < padded; k += 32) {
      Vec<float, 4> taken[4];
#pragma unroll
      for (u32 r = 0; r < 4; ++r) taken[r] = load_global_nc(reinterpret_cast<const Vec<float, 4>*>(value[r] + k));
#pragma unroll
      for (u32 r = 0; r < 4; ++r) {
        const u32 at = x + (lane / 8 + 4 * r) * stride + k * 4;
        auto v = load_shared<Vec<float, 4>>(at);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) v.data[i] -= taken[r].data[i];
        store_shared(at, v);
      }
    }
    warp_sync();
  }

  NXS_DEVICE void finish() {
    if (rank != 0) return;
    if (p.residual_or_null) store_residual(p, first, rows, x, stride);
    if (p.quantized_or_null) store_quantized(p, first, rows);
  }
};

}  // namespace nxs::quantization
