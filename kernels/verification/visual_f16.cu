#include "verification/visual.cuh"

namespace nxs::verification {
template <> nxs_status visual_verify<f16>(const nxs_visual_verify_params& p, void* stream) {
  return p.target_free_or_null ? visual_launch<Guided<f16>, u64>(p, stream) : visual_launch<f16, u64>(p, stream);
}
}  // namespace nxs::verification
