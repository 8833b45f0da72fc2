// Tensor maps, and the copies of boxes that they describe; sm_90.
//
// A map is a kernel parameter of its own: `const __grid_constant__ TensorMap map`, passed by address, never copied.
// `at` is the coordinate of the box's first element, dimension 0 first; it may lie outside: what is out of bounds loads
// as zero (or NaN), is not stored, and counts as bytes all the same. The box lies in shared memory without gaps,
// dimension 0 innermost, at a multiple of 128 bytes (1024 for Swizzle::k128), its bytes permuted by swizzled().
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include "common/ptx/sm90.cuh"
#include "common/tensor_shape.cuh"

namespace nxs {

using TensorMap = CUtensorMap;

// cuTensorMapEncodeTiled, found at run time: nothing links to the driver. Host code. Returns NXS_OK or a cudaError_t.
inline nxs_status encode_tensor_map(TensorMap* map, const TensorShape& shape) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess) (void)cudaGetLastError();
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(entry) : nullptr;
  }();
  if (!encode) return cudaErrorNotSupported;
  if (!map || shape.rank < 1 || shape.rank > 5) return cudaErrorInvalidValue;
  CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_UINT8;
  switch (shape.dtype) {
    case NXS_F32: type = CU_TENSOR_MAP_DATA_TYPE_FLOAT32; break;
    case NXS_F16: type = CU_TENSOR_MAP_DATA_TYPE_FLOAT16; break;
    case NXS_BF16: type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16; break;
    case NXS_U16: type = CU_TENSOR_MAP_DATA_TYPE_UINT16; break;
    case NXS_I32: type = CU_TENSOR_MAP_DATA_TYPE_INT32; break;
    case NXS_U32: type = CU_TENSOR_MAP_DATA_TYPE_UINT32; break;
    case NXS_I64: type = CU_TENSOR_MAP_DATA_TYPE_INT64; break;
    default: break;
  }
  cuuint64_t size[5], stride[4];
  cuuint32_t box[5], step[5] = {1, 1, 1, 1, 1};
  for (u32 i = 0; i < 5; ++i) size[i] = shape.size[i], box[i] = shape.box[i];
  for (u32 i = 0; i < 4; ++i) stride[i] = shape.stride_bytes[i];
  const CUtensorMapSwizzle swizzle = shape.swizzle == Swizzle::k128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : shape.swizzle == Swizzle::k64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : shape.swizzle == Swizzle::k32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                                     : CU_TENSOR_MAP_SWIZZLE_NONE;
  const CUresult result =
      encode(map, type, shape.rank, const_cast<void*>(shape.address), size, stride, box, step,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             shape.fill_nan ? CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA : CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? NXS_OK : cudaErrorInvalidValue;
}

// cp.async.bulk.tensor.shared::cluster.global
template <int kRank> NXS_DEVICE void tensor_load(u32 to, const TensorMap* map, u32 mbarrier, const i32 (&at)[kRank]) {
  static_assert(kRank >= 1 && kRank <= 5);
  if constexpr (kRank == 1)
    NXS_SM90(
        "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3}], [%2];" ::"r"(to),
        "l"(map), "r"(mbarrier), "r"(at[0]) : "memory");
  else if constexpr (kRank == 2)
    NXS_SM90(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            to),
        "l"(map), "r"(mbarrier), "r"(at[0]), "r"(at[1]) : "memory");
  else if constexpr (kRank == 3)
    NXS_SM90(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
            "r"(to),
        "l"(map), "r"(mbarrier), "r"(at[0]), "r"(at[1]), "r"(at[2]) : "memory");
  else if constexpr (kRank == 4)
    NXS_SM90(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];" ::"r"(to),
        "l"(map), "r"(mbarrier), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]) : "memory");
  else
    NXS_SM90(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
        "[%2];" ::"r"(to),
        "l"(map), "r"(mbarrier), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]) : "memory");
}
// The same for every rank of the mask: to the same address there, signalling the mbarrier at the same address there.
template <int kRank>
NXS_DEVICE void tensor_load_multicast(u32 to, const TensorMap* map, u32 mbarrier, const i32 (&at)[kRank], u16 ranks) {
  static_assert(kRank >= 1 && kRank <= 5);
  if constexpr (kRank == 1)
    NXS_SM90(
        "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
        "{%4}], [%2], %3;" ::"r"(to),
        "l"(map), "r"(mbarrier), "h"(ranks), "r"(at[0]) : "memory");
  else if constexpr (kRank == 2)
    NXS_SM90(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
        "{%4, %5}], [%2], %3;" ::"r"(to),
        "l"(map), "r"(mbarrier), "h"(ranks), "r"(at[0]), "r"(at[1]) : "memory");
  else if constexpr (kRank == 3)
    NXS_SM90(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
        "{%4, %5, %6}], [%2], %3;" ::"r"(to),
        "l"(map), "r"(mbarrier), "h"(ranks), "r"(at[0]), "r"(at[1]), "r"(at[2]) : "memory");
  else if constexpr (kRank == 4)
    NXS_SM90(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
        "{%4, %5, %6, %7}], [%2], %3;" ::"r"(to),
        "l"(map), "r"(mbarrier), "h"(ranks), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]) : "memory");
  else
    NXS_SM90(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
        "{%4, %5, %6, %7, %8}], [%2], %3;" ::"r"(to),
        "l"(map), "r"(mbarrier), "h"(ranks), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]) : "memory");
}
// cp.async.bulk.tensor.global.shared::cta: ends by bulk_commit and bulk_wait.
template <int kRank> NXS_DEVICE void tensor_store(const TensorMap* map, u32 from, const i32 (&at)[kRank]) {
  static_assert(kRank >= 1 && kRank <= 5);
  if constexpr (kRank == 1)
    NXS_SM90("cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [%0, {%2}], [%1];" ::"l"(map), "r"(from),
             "r"(at[0]) : "memory");
  else if constexpr (kRank == 2)
    NXS_SM90("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from),
             "r"(at[0]), "r"(at[1]) : "memory");
  else if constexpr (kRank == 3)
    NXS_SM90("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map), "r"(from),
             "r"(at[0]), "r"(at[1]), "r"(at[2]) : "memory");
  else if constexpr (kRank == 4)
    NXS_SM90("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
             "r"(from), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]) : "memory");
  else
    NXS_SM90("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
             "r"(from), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]) : "memory");
}
// cp.reduce.async.bulk.tensor.add
template <int kRank> NXS_DEVICE void tensor_add(const TensorMap* map, u32 from, const i32 (&at)[kRank]) {
  static_assert(kRank >= 1 && kRank <= 5);
  if constexpr (kRank == 1)
    NXS_SM90("cp.reduce.async.bulk.tensor.1d.global.shared::cta.add.tile.bulk_group [%0, {%2}], [%1];" ::"l"(map),
             "r"(from), "r"(at[0]) : "memory");
  else if constexpr (kRank == 2)
    NXS_SM90("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
             "r"(from), "r"(at[0]), "r"(at[1]) : "memory");
  else if constexpr (kRank == 3)
    NXS_SM90(
        "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
        "r"(from), "r"(at[0]), "r"(at[1]), "r"(at[2]) : "memory");
  else if constexpr (kRank == 4)
    NXS_SM90(
        "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
            map),
        "r"(from), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]) : "memory");
  else
    NXS_SM90(
        "cp.reduce.async.bulk.tensor.5d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(
            map),
        "r"(from), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]) : "memory");
}
// cp.async.bulk.prefetch.tensor: into L2
template <int kRank> NXS_DEVICE void tensor_prefetch(const TensorMap* map, const i32 (&at)[kRank]) {
  static_assert(kRank >= 1 && kRank <= 5);
  if constexpr (kRank == 1)
    NXS_SM90("cp.async.bulk.prefetch.tensor.1d.L2.global [%0, {%1}];" ::"l"(map), "r"(at[0]) : "memory");
  else if constexpr (kRank == 2)
    NXS_SM90("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map), "r"(at[0]),
             "r"(at[1]) : "memory");
  else if constexpr (kRank == 3)
    NXS_SM90("cp.async.bulk.prefetch.tensor.3d.L2.global [%0, {%1, %2, %3}];" ::"l"(map), "r"(at[0]), "r"(at[1]),
             "r"(at[2]) : "memory");
  else if constexpr (kRank == 4)
    NXS_SM90("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];" ::"l"(map), "r"(at[0]), "r"(at[1]),
             "r"(at[2]), "r"(at[3]) : "memory");
  else
    NXS_SM90("cp.async.bulk.prefetch.tensor.5d.L2.global [%0, {%1, %2, %3, %4, %5}];" ::"l"(map), "r"(at[0]),
             "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]) : "memory");
}
// prefetch.tensormap
NXS_DEVICE void prefetch_tensor_map(const TensorMap* map) {
  NXS_SM90("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

}  // namespace nxs
