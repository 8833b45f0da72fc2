#include "verification/tree_verify.cuh"

namespace nxs::verification::tree {
template <> nxs_status tree_verify_target<bf16>(const nxs_tree_verify_params& p, void* stream) {
  return tree_verify_for_draft<bf16>(p, stream);
}
}  // namespace nxs::verification::tree
