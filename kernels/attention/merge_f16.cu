#include "attention/merge.cuh"

namespace nxs::attention {
template <> nxs_status merge_parts<f16>(const nxs_attention_merge_params& p, void* stream) {
  return merge_for_out<f16>(p, stream);
}
}  // namespace nxs::attention
