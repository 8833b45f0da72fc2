#include "compression/pack.cuh"

namespace nxs::compression {
template <> nxs_status pack_of<bf16>(const PackParams& q, void* stream) { return pack_rows<bf16>(q, stream); }
}  // namespace nxs::compression
