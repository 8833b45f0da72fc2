#include "attention/merge.cuh"

namespace nxs::attention {
template <> nxs_status merge_parts<float>(const nxs_attention_merge_params& p, void* stream) {
  return merge_for_out<float>(p, stream);
}
}  // namespace nxs::attention
