#include "attention/scale_attention_sm90.cuh"

namespace nxs::attention {
template <> nxs_status scale_attention_sm90<f16, 64>(const ScaleParams& p, void* stream) {
  switch (p.groups) {
    case 1: return scale_attention_sm90_launch<f16, 64, 1, 1>(p, stream);
    case 2: return scale_attention_sm90_launch<f16, 64, 2, 1>(p, stream);
    case 3: return scale_attention_sm90_launch<f16, 64, 3, 1>(p, stream);
    default: return NXS_E_UNSUPPORTED;
  }
}
}  // namespace nxs::attention
