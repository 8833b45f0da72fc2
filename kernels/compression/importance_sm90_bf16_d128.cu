#include "compression/importance_sm90.cuh"

namespace nxs::compression {
template <> nxs_status importance_sm90<bf16, 128>(const ImportanceParams& p, void* stream) {
  return sm90::importance_launch<bf16, 128>(p, stream);
}
}  // namespace nxs::compression
