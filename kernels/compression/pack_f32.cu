#include "compression/pack.cuh"

namespace nxs::compression {
template <> nxs_status pack_of<float>(const PackParams& q, void* stream) { return pack_rows<float>(q, stream); }
}  // namespace nxs::compression
