#include "verification/visual.cuh"

namespace nxs::verification {
template <> nxs_status visual_verify<float>(const nxs_visual_verify_params& p, void* stream) {
  return p.target_free_or_null ? visual_launch<Guided<float>, u64>(p, stream) : visual_launch<float, u64>(p, stream);
}
}  // namespace nxs::verification
