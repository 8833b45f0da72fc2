#include "verification/verify.cuh"

namespace nxs::verification {
template <> nxs_status verify_target<float>(const nxs_verify_params& p, void* stream) {
  return verify_for_draft<float>(p, stream);
}
}  // namespace nxs::verification
