#include "verification/verify.cuh"

namespace nxs::verification {
template <> nxs_status verify_target<bf16>(const nxs_verify_params& p, void* stream) {
  return verify_for_draft<bf16>(p, stream);
}
}  // namespace nxs::verification
