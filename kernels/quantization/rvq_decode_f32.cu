#include "quantization/rvq_decode.cuh"

namespace nxs::quantization {
template <> nxs_status rvq_decode<float>(const nxs_rvq_decode_params& p, void* stream) {
  return rvq_decode_for_out<float>(p, stream);
}
}  // namespace nxs::quantization
