#include "attention/merge.cuh"

namespace nxs::attention {
template <> nxs_status merge_parts<bf16>(const nxs_attention_merge_params& p, void* stream) {
  return merge_for_out<bf16>(p, stream);
}
}  // namespace nxs::attention
