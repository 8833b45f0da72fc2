#include "compression/pack.cuh"

namespace nxs::compression {
template <> nxs_status unpack_of<f16>(const PackParams& q, void* stream) { return unpack_rows<f16>(q, stream); }
}  // namespace nxs::compression
