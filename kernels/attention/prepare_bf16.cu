#include "attention/prepare.cuh"

namespace nxs::attention {
template <> nxs_status prepare<bf16>(const nxs_attention_prepare_params& p, void* stream) {
  return prepare_for_access<bf16>(p, stream);
}
}  // namespace nxs::attention
