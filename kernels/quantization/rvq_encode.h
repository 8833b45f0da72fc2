// The kernels of RVQ encode, an instantiation file each. kGroup: codes whose maximum is taken before it is compared.
#pragma once
#include "nextscale.h"

namespace nxs::quantization {
template <int kGroup> nxs_status rvq_encode_sm80(const nxs_rvq_encode_params& p, void* stream);
template <int kGroup> nxs_status rvq_encode_sm90(const nxs_rvq_encode_params& p, void* stream);
nxs_status rvq_encode_stream(const nxs_rvq_encode_params& p, void* stream);
nxs_status rvq_encode_projected(const nxs_rvq_encode_params& p, void* stream);
}  // namespace nxs::quantization
