// Instructions that need sm_90, or sm_90a, in code that is also compiled for less: there they trap. The launcher never
// picks such a kernel on such a device.
#pragma once
#include "common/ptx/simt.cuh"

#if !defined(__CUDA_ARCH__)
#define NXS_SM90(...) ((void)0)
#elif __CUDA_ARCH__ >= 900
#define NXS_SM90(...) asm volatile(__VA_ARGS__)
#else
#define NXS_SM90(...) __trap()
#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define NXS_SM90A(...) asm volatile(__VA_ARGS__)
#elif defined(__CUDA_ARCH__)
#define NXS_SM90A(...) __trap()
#else
#define NXS_SM90A(...) ((void)0)
#endif
