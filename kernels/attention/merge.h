// Merging partial attention outputs, for launchers of this library that split the keys. Host code.
#pragma once
#include "nextscale.h"

namespace nxs::attention {

// nxs_attention_merge by another name: checks the params, then enqueues one kernel.
nxs_status merge(const nxs_attention_merge_params& p, void* stream);

}  // namespace nxs::attention
