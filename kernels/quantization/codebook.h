// What every op that searches or looks up prepared codebooks checks of them. Host code.
#pragma once
#include "common/check.h"

namespace nxs::quantization {

inline nxs_status check_codebook(const nxs_codebook& book) {
  NXS_REQUIRE(book.prepared, NXS_E_NULL);
  NXS_REQUIRE(is_aligned(book.prepared, 256), NXS_E_ALIGNMENT);
  NXS_REQUIRE(book.levels >= 1 && book.levels <= 65536 && book.entries >= 1 && book.entries <= 131072, NXS_E_SHAPE);
  NXS_REQUIRE(book.dim >= 1 && book.dim <= 512 && book.padded_dim == (book.dim + 7) / 8 * 8, NXS_E_SHAPE);
  NXS_REQUIRE(book.pieces == 1 || book.pieces == 3, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(book.operand_dim >= book.pieces * book.padded_dim + 3 && book.operand_dim <= 2048, NXS_E_SHAPE);
  NXS_REQUIRE(book.operand_dim % 32 == 0 || book.operand_dim % 48 == 0, NXS_E_SHAPE);
  NXS_REQUIRE(book.metric >= NXS_METRIC_L2 && book.metric <= NXS_METRIC_COSINE_UNIT, NXS_E_UNSUPPORTED);
  NXS_REQUIRE(book.metric == NXS_METRIC_L2 || book.eps > 0, NXS_E_UNSUPPORTED);
  const int64_t rows = (book.entries + 127) / 128 * 128, levels = book.levels;
  const int64_t needs[4][2] = {{0, levels * 16},
                               {book.values_at, levels * book.entries * book.padded_dim * 4},
                               {book.search_at, levels * rows * book.padded_dim * 4},
                               {book.operand_at, levels * rows * book.operand_dim * 2}};
  for (int i = 0; i < 4; ++i) {
    const int64_t end = i < 3 ? needs[i + 1][0] : book.bytes;
    NXS_REQUIRE(needs[i][0] % 256 == 0 && needs[i][0] + needs[i][1] <= end, NXS_E_SHAPE);
  }
  return NXS_OK;
}

}  // namespace nxs::quantization
