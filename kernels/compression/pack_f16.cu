#include "compression/pack.cuh"

namespace nxs::compression {
template <> nxs_status pack_of<f16>(const PackParams& q, void* stream) { return pack_rows<f16>(q, stream); }
}  // namespace nxs::compression
