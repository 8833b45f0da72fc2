#include "compression/importance_sm80.cuh"

namespace nxs::compression {
template <> nxs_status importance_sm80<bf16, 96>(const ImportanceParams& p, void* stream) {
  return importance_sm80_launch<bf16, 96>(p, stream);
}
}  // namespace nxs::compression
