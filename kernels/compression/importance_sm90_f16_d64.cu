#include "compression/importance_sm90.cuh"

namespace nxs::compression {
template <> nxs_status importance_sm90<f16, 64>(const ImportanceParams& p, void* stream) {
  return sm90::importance_launch<f16, 64>(p, stream);
}
}  // namespace nxs::compression
