#include "quantization/rvq_encode.h"
#include "quantization/rvq_encode_sm90.cuh"

namespace nxs::quantization {
template <> nxs_status rvq_encode_sm90<4>(const nxs_rvq_encode_params& p, void* stream) {
  return rvq_encode_sm90_launch<4>(p, stream);
}
}  // namespace nxs::quantization
