// wgmma: m64nNk16 of a warpgroup (four warps, the first a multiple of four), f32 sums, bf16 or f16 factors; sm_90a.
//
// D of thread t of the group, element i: row 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (t % 4) + i
// % 2. A from registers: as of mma.sync m16n8k16, rows 16 (t / 32) up. Operands in shared memory are described below.
// wgmma_fence comes before the first wgmma and again after any wait; D, and A's registers, are not to be touched
// between a wgmma and the wait for its group, nor operands in shared memory overwritten. Operands that ordinary stores
// wrote need fence_async_shared by each writing thread, then a barrier.
#pragma once
#include "common/ptx/sm90.cuh"
#include "common/swizzle.cuh"

namespace nxs {

// wgmma.fence, .commit_group, .wait_group (until at most kPending of the latest groups are under way): all four warps.
NXS_DEVICE void wgmma_fence() { NXS_SM90A("wgmma.fence.sync.aligned;" :: : "memory"); }
NXS_DEVICE void wgmma_commit() { NXS_SM90A("wgmma.commit_group.sync.aligned;" :: : "memory"); }
template <int kPending> NXS_DEVICE void wgmma_wait() {
  NXS_SM90A("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// No instruction. After a wait: keeps the compiler from reading accumulators before it.
template <int kCount> NXS_DEVICE void keep_registers(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// An operand's layout. With rows of W = swizzle_bytes(swizzle), permuted by swizzled(), in groups of 8:
//   K-major   row r of A, or column r of B, at r * W; stride_bytes: from 8 rows to the next. leading_bytes: unused, but
//             without swizzle (W = 16) from 8 k to the next. The next 16 k: 32 bytes on, within a row of W.
//   MN-major  a row holds W / 2 elements of one k; stride_bytes: from 8 k to the next, leading_bytes: from W / 2 elements of
//             M or N to the next; without swizzle the other way round.
// A tile begins at a multiple of 8 W.
NXS_DEVICE u64 matrix_descriptor(u32 address, u32 leading_bytes, u32 stride_bytes, Swizzle swizzle) {
  return static_cast<u64>((address & 0x3ffff) >> 4) | static_cast<u64>(leading_bytes >> 4) << 16 |
         static_cast<u64>(stride_bytes >> 4) << 32 | static_cast<u64>(swizzle) << 62;
}
// The operand that begins `bytes` further on, in arithmetic of 32 bits.
NXS_DEVICE u64 advanced(u64 descriptor, u32 bytes) {
  return (descriptor & 0xffffffff00000000) | (static_cast<u32>(descriptor) + (bytes >> 4));
}

enum class Major : int { kK = 0, kMN = 1 };

namespace detail {

// The registers of D: of each N its operands and their text, those of N - 8 and four more.
#define NXS_D8 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define NXS_D16 NXS_D8, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define NXS_D24 NXS_D16, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define NXS_D32 NXS_D24, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define NXS_D40 NXS_D32, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define NXS_D48 NXS_D40, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define NXS_D56 NXS_D48, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define NXS_D64 NXS_D56, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define NXS_D72 NXS_D64, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define NXS_D80 NXS_D72, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define NXS_D88 NXS_D80, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define NXS_D96 NXS_D88, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define NXS_D104 NXS_D96, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define NXS_D112 NXS_D104, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define NXS_D120 NXS_D112, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define NXS_D128 NXS_D120, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define NXS_D136 NXS_D128, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define NXS_D144 NXS_D136, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define NXS_D152 NXS_D144, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define NXS_D160 NXS_D152, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define NXS_D168 NXS_D160, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define NXS_D176 NXS_D168, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define NXS_D184 NXS_D176, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define NXS_D192 NXS_D184, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define NXS_D200 NXS_D192, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define NXS_D208 NXS_D200, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define NXS_D216 NXS_D208, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define NXS_D224 NXS_D216, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define NXS_D232 NXS_D224, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define NXS_D240 NXS_D232, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define NXS_D248 NXS_D240, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define NXS_D256 NXS_D248, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
#define NXS_T8 "%0, %1, %2, %3"
#define NXS_T16 NXS_T8 ", %4, %5, %6, %7"
#define NXS_T24 NXS_T16 ", %8, %9, %10, %11"
#define NXS_T32 NXS_T24 ", %12, %13, %14, %15"
#define NXS_T40 NXS_T32 ", %16, %17, %18, %19"
#define NXS_T48 NXS_T40 ", %20, %21, %22, %23"
#define NXS_T56 NXS_T48 ", %24, %25, %26, %27"
#define NXS_T64 NXS_T56 ", %28, %29, %30, %31"
#define NXS_T72 NXS_T64 ", %32, %33, %34, %35"
#define NXS_T80 NXS_T72 ", %36, %37, %38, %39"
#define NXS_T88 NXS_T80 ", %40, %41, %42, %43"
#define NXS_T96 NXS_T88 ", %44, %45, %46, %47"
#define NXS_T104 NXS_T96 ", %48, %49, %50, %51"
#define NXS_T112 NXS_T104 ", %52, %53, %54, %55"
#define NXS_T120 NXS_T112 ", %56, %57, %58, %59"
#define NXS_T128 NXS_T120 ", %60, %61, %62, %63"
#define NXS_T136 NXS_T128 ", %64, %65, %66, %67"
#define NXS_T144 NXS_T136 ", %68, %69, %70, %71"
#define NXS_T152 NXS_T144 ", %72, %73, %74, %75"
#define NXS_T160 NXS_T152 ", %76, %77, %78, %79"
#define NXS_T168 NXS_T160 ", %80, %81, %82, %83"
#define NXS_T176 NXS_T168 ", %84, %85, %86, %87"
#define NXS_T184 NXS_T176 ", %88, %89, %90, %91"
#define NXS_T192 NXS_T184 ", %92, %93, %94, %95"
#define NXS_T200 NXS_T192 ", %96, %97, %98, %99"
#define NXS_T208 NXS_T200 ", %100, %101, %102, %103"
#define NXS_T216 NXS_T208 ", %104, %105, %106, %107"
#define NXS_T224 NXS_T216 ", %108, %109, %110, %111"
#define NXS_T232 NXS_T224 ", %112, %113, %114, %115"
#define NXS_T240 NXS_T232 ", %116, %117, %118, %119"
#define NXS_T248 NXS_T240 ", %120, %121, %122, %123"
#define NXS_T256 NXS_T248 ", %124, %125, %126, %127"

enum class WgmmaType { kBf16, kF16 };
template <int kN> struct WgmmaShape;

// P0 up name the operands after D's.
#define NXS_WGMMA_TYPE(N, TYPE, A, B, P, IMMEDIATES, ...)                                                            \
  NXS_SM90A("{ .reg .pred p; setp.ne.b32 p, " P ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE \
            " {" NXS_T##N "}, " A ", " B ", p, 1, 1, " IMMEDIATES "; }" : NXS_D##N:__VA_ARGS__ : "memory")
#define NXS_WGMMA_SHAPE(N, P0, P1, P2, P3, P4, P5, P6)                                                             \
  template <> struct WgmmaShape<N> {                                                                               \
    template <WgmmaType kType, int kA, int kB>                                                                     \
    NXS_DEVICE static void run(float (&d)[N / 2], u64 a, u64 b, u32 accumulate) {                                  \
      if constexpr (kType == WgmmaType::kBf16)                                                                     \
        NXS_WGMMA_TYPE(N, "bf16", P0, P1, P2, P3 ", " P4, "l"(a), "l"(b), "r"(accumulate), "n"(kA), "n"(kB));      \
      else                                                                                                         \
        NXS_WGMMA_TYPE(N, "f16", P0, P1, P2, P3 ", " P4, "l"(a), "l"(b), "r"(accumulate), "n"(kA), "n"(kB));       \
    }                                                                                                              \
    template <WgmmaType kType, int kB>                                                                             \
    NXS_DEVICE static void run(float (&d)[N / 2], const u32 (&a)[4], u64 b, u32 accumulate) {                      \
      if constexpr (kType == WgmmaType::kBf16)                                                                     \
        NXS_WGMMA_TYPE(N, "bf16", "{" P0 ", " P1 ", " P2 ", " P3 "}", P4, P5, P6, "r"(a[0]), "r"(a[1]), "r"(a[2]), \
                       "r"(a[3]), "l"(b), "r"(accumulate), "n"(kB));                                               \
      else                                                                                                         \
        NXS_WGMMA_TYPE(N, "f16", "{" P0 ", " P1 ", " P2 ", " P3 "}", P4, P5, P6, "r"(a[0]), "r"(a[1]), "r"(a[2]),  \
                       "r"(a[3]), "l"(b), "r"(accumulate), "n"(kB));                                               \
    }                                                                                                              \
  };
NXS_WGMMA_SHAPE(8, "%4", "%5", "%6", "%7", "%8", "%9", "%10")
NXS_WGMMA_SHAPE(16, "%8", "%9", "%10", "%11", "%12", "%13", "%14")
NXS_WGMMA_SHAPE(24, "%12", "%13", "%14", "%15", "%16", "%17", "%18")
NXS_WGMMA_SHAPE(32, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
NXS_WGMMA_SHAPE(40, "%20", "%21", "%22", "%23", "%24", "%25", "%26")
NXS_WGMMA_SHAPE(48, "%24", "%25", "%26", "%27", "%28", "%29", "%30")
NXS_WGMMA_SHAPE(56, "%28", "%29", "%30", "%31", "%32", "%33", "%34")
NXS_WGMMA_SHAPE(64, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
NXS_WGMMA_SHAPE(72, "%36", "%37", "%38", "%39", "%40", "%41", "%42")
NXS_WGMMA_SHAPE(80, "%40", "%41", "%42", "%43", "%44", "%45", "%46")
NXS_WGMMA_SHAPE(88, "%44", "%45", "%46", "%47", "%48", "%49", "%50")
NXS_WGMMA_SHAPE(96, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
NXS_WGMMA_SHAPE(104, "%52", "%53", "%54", "%55", "%56", "%57", "%58")
NXS_WGMMA_SHAPE(112, "%56", "%57", "%58", "%59", "%60", "%61", "%62")
NXS_WGMMA_SHAPE(120, "%60", "%61", "%62", "%63", "%64", "%65", "%66")
NXS_WGMMA_SHAPE(128, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
NXS_WGMMA_SHAPE(136, "%68", "%69", "%70", "%71", "%72", "%73", "%74")
NXS_WGMMA_SHAPE(144, "%72", "%73", "%74", "%75", "%76", "%77", "%78")
NXS_WGMMA_SHAPE(152, "%76", "%77", "%78", "%79", "%80", "%81", "%82")
NXS_WGMMA_SHAPE(160, "%80", "%81", "%82", "%83", "%84", "%85", "%86")
NXS_WGMMA_SHAPE(168, "%84", "%85", "%86", "%87", "%88", "%89", "%90")
NXS_WGMMA_SHAPE(176, "%88", "%89", "%90", "%91", "%92", "%93", "%94")
NXS_WGMMA_SHAPE(184, "%92", "%93", "%94", "%95", "%96", "%97", "%98")
NXS_WGMMA_SHAPE(192, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
NXS_WGMMA_SHAPE(200, "%100", "%101", "%102", "%103", "%104", "%105", "%106")
NXS_WGMMA_SHAPE(208, "%104", "%105", "%106", "%107", "%108", "%109", "%110")
NXS_WGMMA_SHAPE(216, "%108", "%109", "%110", "%111", "%112", "%113", "%114")
NXS_WGMMA_SHAPE(224, "%112", "%113", "%114", "%115", "%116", "%117", "%118")
NXS_WGMMA_SHAPE(232, "%116", "%117", "%118", "%119", "%120", "%121", "%122")
NXS_WGMMA_SHAPE(240, "%120", "%121", "%122", "%123", "%124", "%125", "%126")
NXS_WGMMA_SHAPE(248, "%124", "%125", "%126", "%127", "%128", "%129", "%130")
NXS_WGMMA_SHAPE(256, "%128", "%129", "%130", "%131", "%132", "%133", "%134")
#undef NXS_WGMMA_SHAPE
#undef NXS_WGMMA_TYPE

}  // namespace detail

// wgmma.mma_async: d = a * b, plus d if `accumulate`. N a multiple of 8 up to 256; A from shared memory or from
// registers.
#define NXS_WGMMA(name, type)                                                                                   \
  template <int kN, Major kMajorA = Major::kK, Major kMajorB = Major::kK>                                       \
  NXS_DEVICE void name(float (&d)[kN / 2], u64 a, u64 b, bool accumulate) {                                     \
    detail::WgmmaShape<kN>::template run<detail::WgmmaType::type, int(kMajorA), int(kMajorB)>(d, a, b,          \
                                                                                              u32{accumulate}); \
  }                                                                                                             \
  template <int kN, Major kMajorB = Major::kK>                                                                  \
  NXS_DEVICE void name(float (&d)[kN / 2], const u32(&a)[4], u64 b, bool accumulate) {                          \
    detail::WgmmaShape<kN>::template run<detail::WgmmaType::type, int(kMajorB)>(d, a, b, u32{accumulate});      \
  }
NXS_WGMMA(wgmma_bf16, kBf16)
NXS_WGMMA(wgmma_f16, kF16)
#undef NXS_WGMMA

// setmaxnreg.inc, .dec: the registers of each thread, 24 to 256 by 8, of a kernel with __launch_bounds__(threads,
// kBlocks). All warps of a warpgroup call it; inc waits until others have given back enough. Sums stay within the launch's
// registers.
template <int kRegisters, int kBlocks = 1> NXS_DEVICE void raise_registers() {
  NXS_SM90A("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters) : "memory");
}
template <int kRegisters, int kBlocks = 1> NXS_DEVICE void lower_registers() {
  NXS_SM90A("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters) : "memory");
}

}  // namespace nxs
