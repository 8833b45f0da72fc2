#include "quantization/rvq_decode.cuh"

namespace nxs::quantization {
template <> nxs_status rvq_decode<f16>(const nxs_rvq_decode_params& p, void* stream) {
  return rvq_decode_for_out<f16>(p, stream);
}
}  // namespace nxs::quantization
