#include "quantization/multi_scale.cuh"

namespace nxs::quantization {
template <> nxs_status multi_scale_launch<2>(const ScaleParams& q, void* stream) {
  return multi_scale_launch_taps<2>(q, stream);
}
}  // namespace nxs::quantization
