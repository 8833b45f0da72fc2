#include "attention/prepare.cuh"

namespace nxs::attention {
template <> nxs_status prepare<float>(const nxs_attention_prepare_params& p, void* stream) {
  return prepare_for_access<float>(p, stream);
}
}  // namespace nxs::attention
