#include "verification/visual.cuh"

namespace nxs::verification {
template <> nxs_status visual_verify<bf16>(const nxs_visual_verify_params& p, void* stream) {
  if (p.target_free_or_null) return visual_launch<Guided<bf16>, u64>(p, stream);
  return p.vocab <= 65536 ? visual_launch<bf16, u32>(p, stream) : visual_launch<bf16, u64>(p, stream);
}
}  // namespace nxs::verification
