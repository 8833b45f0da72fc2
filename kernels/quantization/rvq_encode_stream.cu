#include "quantization/rvq_encode_stream.cuh"

#include "quantization/rvq_encode.h"

namespace nxs::quantization {
nxs_status rvq_encode_stream(const nxs_rvq_encode_params& p, void* stream) {
  switch (p.tile_rows) {
    case 1: return rvq_encode_stream_launch<1>(p, stream);
    case 2: return rvq_encode_stream_launch<2>(p, stream);
    case 4: return rvq_encode_stream_launch<4>(p, stream);
    case 8: return rvq_encode_stream_launch<8>(p, stream);
    default: return NXS_E_UNSUPPORTED;
  }
}
}  // namespace nxs::quantization
