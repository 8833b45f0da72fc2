#include "quantization/multi_scale.cuh"

namespace nxs::quantization {
template <> nxs_status multi_scale_launch<f16>(const ScaleParams& q, void* stream) {
  return multi_scale_launch_up<f16>(q, stream);
}
}  // namespace nxs::quantization
