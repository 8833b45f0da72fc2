/*
 * The emulator's own interface, beside the C ABI of nextscale.h that a library built over it exports.
 * Settings, report and counters belong to the host thread that launches. docs/emulator.md explains them.
 */
#ifndef NEXTSCALE_EMULATOR_H
#define NEXTSCALE_EMULATOR_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The status of a launch that the emulator stopped: cudaErrorLaunchFailure. */
#define NXS_EMULATOR_FAILURE 719

/* When an asynchronous copy or wgmma takes effect. Every choice is legal on a GPU. */
#define NXS_EMULATOR_LANDING_LATE 0   /* when a wait demands it and nothing else can run */
#define NXS_EMULATOR_LANDING_RANDOM 1 /* at a moment drawn from the seed, at the latest when a wait demands it */
#define NXS_EMULATOR_LANDING_EARLY 2  /* at once */

typedef struct nxs_emulator_options {
  uint64_t seed;   /* 0: blocks and threads take turns in order; else: in an order drawn from it */
  int32_t landing; /* one of NXS_EMULATOR_LANDING_* */
  int32_t quiet;   /* 1: do not also print a report to stderr */
} nxs_emulator_options;

/*
 * Replaces the settings of this thread; NULL brings back the defaults: the seed of NXS_EMULATOR_SEED (0), landing of
 * NXS_EMULATOR_LANDING (late | random | early; late), not quiet.
 */
void nxs_emulator_configure(const nxs_emulator_options *options);

/*
 * What stopped the latest launch of this thread that was stopped, or "". Never null; valid until the next launch. One line:
 *   <kind>: <sentence> [kernel <name>, block (x,y,z), thread <t>, <file>:<line> in <function>]
 */
const char *nxs_emulator_report(void);

typedef struct nxs_emulator_counts {
  uint64_t launches, blocks, threads;
  uint64_t global_load_bytes, global_store_bytes; /* 32 per sector that a warp's instruction touches */
  uint64_t shared_accesses;                       /* load and store instructions of warps, ldmatrix and stmatrix included */
  uint64_t shared_conflicts;                      /* passes beyond those that their bytes need */
  uint64_t mma_bf16_flops, mma_f16_flops, mma_tf32_flops;
  uint64_t wgmma_bf16_flops, wgmma_f16_flops;
  uint64_t special_ops;                           /* ex2, lg2, rsqrt, rcp, tanh, by thread */
  uint64_t barriers;                              /* completions of a block's barriers, named ones included */
  uint64_t mbarrier_phases;                       /* completions of a phase */
  uint64_t cluster_barriers;
} nxs_emulator_counts;

/* Sums over the launches of this thread since the last reset. */
void nxs_emulator_counters(nxs_emulator_counts *counts);

/* Clears report and counters of this thread. */
void nxs_emulator_reset(void);

#ifdef __cplusplus
}
#endif

#endif /* NEXTSCALE_EMULATOR_H */
