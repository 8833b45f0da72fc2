// 8x8 matrices of 16-bit elements between shared memory and registers, and mma.sync. All 32 lanes take part.
#pragma once
#include "common/ptx/sm90.cuh"

namespace nxs {

// ldmatrix.x1, .x2, .x4: lane 8 i + r gives the address of row r of matrix i, 16 bytes, aligned to them. Register i of
// lane l gets, of matrix i, row l / 4, elements 2 (l % 4) and the next; transposed: column l / 4, rows 2 (l % 4) and
// the next.
#define NXS_LOAD_MATRIX(name, transposed)                                                           \
  template <int kCount> NXS_DEVICE void name(u32(&registers)[kCount], u32 address) {                \
    static_assert(kCount == 1 || kCount == 2 || kCount == 4);                                       \
    if constexpr (kCount == 1)                                                                      \
      asm volatile("ldmatrix.sync.aligned.m8n8.x1" transposed ".shared.b16 {%0}, [%1];"             \
                   : "=r"(registers[0])                                                             \
                   : "r"(address)                                                                   \
                   : "memory");                                                                     \
    else if constexpr (kCount == 2)                                                                 \
      asm volatile("ldmatrix.sync.aligned.m8n8.x2" transposed ".shared.b16 {%0, %1}, [%2];"         \
                   : "=r"(registers[0]), "=r"(registers[1])                                         \
                   : "r"(address)                                                                   \
                   : "memory");                                                                     \
    else                                                                                            \
      asm volatile("ldmatrix.sync.aligned.m8n8.x4" transposed ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                   : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3]) \
                   : "r"(address)                                                                   \
                   : "memory");                                                                     \
  }
NXS_LOAD_MATRIX(load_matrix, "")
NXS_LOAD_MATRIX(load_matrix_transposed, ".trans")
#undef NXS_LOAD_MATRIX

// stmatrix: the same places, the other way; sm_90
#define NXS_STORE_MATRIX(name, transposed)                                                                      \
  template <int kCount> NXS_DEVICE void name(const u32(&registers)[kCount], u32 address) {                      \
    static_assert(kCount == 1 || kCount == 2 || kCount == 4);                                                   \
    if constexpr (kCount == 1)                                                                                  \
      NXS_SM90("stmatrix.sync.aligned.m8n8.x1" transposed ".shared.b16 [%0], {%1};" ::"r"(address),             \
               "r"(registers[0]) : "memory");                                                                   \
    else if constexpr (kCount == 2)                                                                             \
      NXS_SM90("stmatrix.sync.aligned.m8n8.x2" transposed ".shared.b16 [%0], {%1, %2};" ::"r"(address),         \
               "r"(registers[0]), "r"(registers[1]) : "memory");                                                \
    else                                                                                                        \
      NXS_SM90("stmatrix.sync.aligned.m8n8.x4" transposed ".shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), \
               "r"(registers[0]), "r"(registers[1]), "r"(registers[2]), "r"(registers[3]) : "memory");          \
  }
NXS_STORE_MATRIX(store_matrix, "")
NXS_STORE_MATRIX(store_matrix_transposed, ".trans")
#undef NXS_STORE_MATRIX

// mma.sync: c += a * b in f32. With g = lane / 4 and t = lane % 4, two 16-bit elements a register (low half first):
//   m16n8k16  a: (row g, k 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..);  b: (k 2t.., column g), (2t + 8..,
//   g) m16n8k8   (tf32, one element a register) a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4);  b: (t, g), (t + 4,
//   g) c: (row g, column 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
#define NXS_MMA(name, instruction)                                                                        \
  NXS_DEVICE void name(float (&c)[4], const u32(&a)[4], u32 b0, u32 b1) {                                 \
    asm volatile("mma.sync.aligned." instruction " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                         \
  }
NXS_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
NXS_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
NXS_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef NXS_MMA

}  // namespace nxs
