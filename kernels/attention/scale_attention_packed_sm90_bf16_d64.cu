#include "attention/scale_attention_packed_sm90.cuh"

namespace nxs::attention {
template nxs_status scale_attention_packed_sm90<bf16, 64>(const ScaleParams&, void*);
}
