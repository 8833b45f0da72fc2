#include "attention/scale_attention_sm80.cuh"

namespace nxs::attention {
template nxs_status scale_attention_packed<bf16, 128>(const ScaleParams&, void*);
}
