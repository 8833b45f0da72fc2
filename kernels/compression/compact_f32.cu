#include "compression/compact.cuh"

namespace nxs::compression {
template <> nxs_status convert_from<float>(const nxs_compact_params& p, const MoveShape& shape, void* stream) {
  return convert_for_out<float>(p, shape, stream);
}
}  // namespace nxs::compression
