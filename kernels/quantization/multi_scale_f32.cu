#include "quantization/multi_scale.cuh"

namespace nxs::quantization {
template <> nxs_status multi_scale_launch<float>(const ScaleParams& q, void* stream) {
  return multi_scale_launch_up<float>(q, stream);
}
}  // namespace nxs::quantization
