#include "attention/scale_attention_sm80.cuh"

namespace nxs::attention {
template nxs_status scale_attention_packed<f16, 96>(const ScaleParams&, void*);
}
