#include "compression/pack.cuh"

namespace nxs::compression {
template <> nxs_status unpack_of<bf16>(const PackParams& q, void* stream) { return unpack_rows<bf16>(q, stream); }
}  // namespace nxs::compression
