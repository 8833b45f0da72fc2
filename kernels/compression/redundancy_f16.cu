#include "compression/redundancy.cuh"

namespace nxs::compression {
template <> nxs_status redundancy<f16>(const RedundancyParams& p, void* stream) {
  return p.dim == 64   ? redundancy_launch<f16, 64>(p, stream)
         : p.dim == 96 ? redundancy_launch<f16, 96>(p, stream)
                       : redundancy_launch<f16, 128>(p, stream);
}
}  // namespace nxs::compression
