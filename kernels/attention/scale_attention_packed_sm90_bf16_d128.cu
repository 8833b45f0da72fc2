#include "attention/scale_attention_packed_sm90.cuh"

namespace nxs::attention {
template nxs_status scale_attention_packed_sm90<bf16, 128>(const ScaleParams&, void*);
}
