#include "compression/pack.cuh"

namespace nxs::compression {
template <> nxs_status unpack_of<float>(const PackParams& q, void* stream) { return unpack_rows<float>(q, stream); }
}  // namespace nxs::compression
