// Philox 4x32-10: counter-based random words (J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11).
//
// Keyed by (request seed, absolute position, domain, draw), so a result depends on nothing but those: not on the batch,
// the grid or the order of threads. src/philox.rs is the same function; tests/philox.rs holds both to the published
// known answers.
#pragma once
#include "common/ptx/simt.cuh"

namespace nxs {

struct PhiloxBlock { u32 word[4]; };

NXS_DEVICE PhiloxBlock philox(u64 seed, u64 position, u32 domain, u32 draw) {
  u32 key0 = static_cast<u32>(seed), key1 = static_cast<u32>(seed >> 32);
  u32 c0 = static_cast<u32>(position), c1 = static_cast<u32>(position >> 32), c2 = domain, c3 = draw;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const u64 p0 = static_cast<u64>(0xD2511F53u) * c0, p1 = static_cast<u64>(0xCD9E8D57u) * c2;
    const u32 n0 = static_cast<u32>(p1 >> 32) ^ c1 ^ key0, n2 = static_cast<u32>(p0 >> 32) ^ c3 ^ key1;
    c1 = static_cast<u32>(p1);
    c3 = static_cast<u32>(p0);
    c0 = n0;
    c2 = n2;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return PhiloxBlock{{c0, c1, c2, c3}};
}

// Word `i % 4`, by selects: an index would put the block into local memory.
NXS_DEVICE u32 philox_word(const PhiloxBlock& block, u32 i) {
  const u32 low = i & 1 ? block.word[1] : block.word[0], high = i & 1 ? block.word[3] : block.word[2];
  return i & 2 ? high : low;
}

// The upper 24 bits as a float in [0, 1): every value is exact.
NXS_DEVICE float philox_uniform(u32 word) { return static_cast<float>(word >> 8) * 0x1p-24f; }

}  // namespace nxs
