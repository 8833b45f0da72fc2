#include "attention/scale_attention_sm90.cuh"

namespace nxs::attention {
template <> nxs_status scale_attention_sm90<bf16, 96>(const ScaleParams& p, void* stream) {
  switch (p.groups) {
    case 1: return scale_attention_sm90_launch<bf16, 96, 1, 1>(p, stream);
    case 2: return scale_attention_sm90_launch<bf16, 96, 2, 1>(p, stream);
    case 4: return scale_attention_sm90_launch<bf16, 96, 2, 2>(p, stream);
    default: return NXS_E_UNSUPPORTED;
  }
}
}  // namespace nxs::attention
