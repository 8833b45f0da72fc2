#include "quantization/rvq_encode_projected.cuh"

#include "quantization/rvq_encode.h"

namespace nxs::quantization {
nxs_status rvq_encode_projected(const nxs_rvq_encode_params& p, void* stream) {
  return p.codebook.dim <= 8 ? rvq_encode_projected_launch<2>(p, stream) : rvq_encode_projected_launch<8>(p, stream);
}
}  // namespace nxs::quantization
