/*
 * RVQ decode from C: the header, the static library and the CUDA runtime, nothing else.
 * scripts/c-example builds it. Exits with 0 if the GPU's result is right, 77 if there is no GPU.
 */
#include <cuda_runtime_api.h>
#include <nextscale.h>
#include <stdio.h>
#include <stdlib.h>

#define LEVELS 4
#define ENTRIES 64
#define DIM 32
#define ROWS 100

static void require(int ok, const char *what, const char *why) {
  if (!ok) {
    fprintf(stderr, "%s: %s\n", what, why);
    exit(1);
  }
}

static void *upload(const void *host, size_t bytes) {
  void *device = NULL;
  require(cudaMalloc(&device, bytes) == cudaSuccess, "cudaMalloc", "no memory");
  require(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice) == cudaSuccess, "cudaMemcpy", "failed");
  return device;
}

int main(void) {
  static uint16_t codes[LEVELS * ROWS];
  static float codebooks[LEVELS * ENTRIES * DIM], out[ROWS * DIM];
  nxs_rvq_decode_params params = {0};
  nxs_device_info info;
  nxs_status status;
  int32_t i, row, level, d;

  require(nxs_abi_version() == NXS_ABI_VERSION, "nextscale", "header and library differ");
  status = nxs_get_device_info(0, &info);
  if (status != NXS_OK) {
    printf("no GPU: %s\n", nxs_status_name(status));
    return 77;
  }
  for (i = 0; i < LEVELS * ROWS; ++i) codes[i] = (uint16_t)(i * 31 % ENTRIES);
  for (i = 0; i < LEVELS * ENTRIES * DIM; ++i) codebooks[i] = (float)(i % 251) - 125.0f;

  params.codes = upload(codes, sizeof codes);
  params.codes_stride_level = ROWS; /* [levels, rows] */
  params.codes_stride_row = 1;
  params.codes_dtype = NXS_U16;
  params.codebooks = upload(codebooks, sizeof codebooks);
  params.codebooks_stride_level = ENTRIES * DIM;
  params.codebooks_stride_entry = DIM;
  params.codebooks_dtype = NXS_F32;
  params.out = upload(out, sizeof out);
  params.out_stride_row = DIM;
  params.out_dtype = NXS_F32;
  params.batch = 1;
  params.rows = ROWS;
  params.levels = LEVELS;
  params.entries = ENTRIES;
  params.dim = DIM;
  params.vector = 1;     /* cudaMalloc aligns to 256 bytes, and DIM is a multiple of 4 */
  params.log2_lanes = 3; /* 8 threads of 4 elements cover DIM */
  status = nxs_rvq_decode(&params, NULL);
  require(status == NXS_OK, "nxs_rvq_decode", nxs_status_name(status));
  require(cudaMemcpy(out, params.out, sizeof out, cudaMemcpyDeviceToHost) == cudaSuccess, "cudaMemcpy", "failed");

  for (row = 0; row < ROWS; ++row)
    for (d = 0; d < DIM; ++d) {
      float sum = 0.0f;
      for (level = 0; level < LEVELS; ++level)
        sum += codebooks[(level * ENTRIES + codes[level * ROWS + row]) * DIM + d];
      require(out[row * DIM + d] == sum, "nxs_rvq_decode", "wrong result");
    }
  params.vector = 2;
  params.out = (char *)params.out + 4;
  status = nxs_rvq_decode(&params, NULL);
  require(status == NXS_E_ALIGNMENT, "a misaligned output", nxs_status_name(status));
  printf("%d rows on sm_%d%d: right\n", ROWS, info.cc_major, info.cc_minor);
  return 0;
}
