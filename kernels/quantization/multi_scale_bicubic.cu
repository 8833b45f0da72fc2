#include "quantization/multi_scale.cuh"

namespace nxs::quantization {
template <> nxs_status multi_scale_launch<4>(const ScaleParams& q, void* stream) {
  return multi_scale_launch_taps<4>(q, stream);
}
}  // namespace nxs::quantization
