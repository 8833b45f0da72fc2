#include "quantization/multi_scale.cuh"

namespace nxs::quantization {
template <> nxs_status multi_scale_launch<Codes>(const ScaleParams& q, void* stream) {
  return multi_scale_launch_up<Codes>(q, stream);
}
}  // namespace nxs::quantization
