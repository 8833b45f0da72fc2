/*
 * nextscale: CUDA kernels for coarse-to-fine, speculative and long-context generation.
 *
 * The C ABI. It is all that a C or C++ engine needs, and the Rust crate calls nothing else.
 *
 * Conventions
 *   - A launcher takes one params struct by pointer and a stream (a cudaStream_t or CUstream; NULL is the legacy
 *     default stream), enqueues its kernels there and returns. The struct may be discarded at once. A launcher never
 *     allocates, synchronises, reads back, changes the current device, prints or exits, and can be captured in a CUDA
 *     graph once it has run outside a capture (the first launch of a kernel loads its code).
 *   - The device that owns the pointers and the stream must be current on the calling thread.
 *   - It returns NXS_OK, a negative NXS_E_* code (nothing was launched), or a positive cudaError_t.
 *     Faults inside a kernel surface at the caller's next synchronising call, as with any CUDA launch.
 *   - Every pointer names its shape in a comment, outermost dimension first. Strides count elements, are 64-bit and
 *     not negative. The last dimension is contiguous unless it has a stride of its own.
 *   - An optional pointer ends in `_or_null`. A struct starts as all zeroes: a zero field is its documented default.
 *   - A problem with no elements returns NXS_OK without a launch.
 */
#ifndef NEXTSCALE_H
#define NEXTSCALE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Grows when a struct or the meaning of a field changes; compare with nxs_abi_version() at start-up. */
#define NXS_ABI_VERSION 1u

/* 0: done. Negative: one of NXS_E_*. Positive: a cudaError_t. */
typedef int32_t nxs_status;
#define NXS_OK 0
#define NXS_E_NULL (-1)        /* a required pointer is null */
#define NXS_E_SHAPE (-2)       /* a size is negative or larger than the op allows */
#define NXS_E_STRIDE (-3)      /* a stride is negative or not a multiple of the access width */
#define NXS_E_ALIGNMENT (-4)   /* a pointer is not aligned to its element or to the access width */
#define NXS_E_DTYPE (-5)       /* a dtype this op does not take */
#define NXS_E_UNSUPPORTED (-6) /* a combination this build or this device has no kernel for */

typedef int32_t nxs_dtype;
#define NXS_F32 0
#define NXS_F16 1
#define NXS_BF16 2
#define NXS_F8_E4M3 3 /* 1-4-3, bias 7, no infinity, S.1111.111 is NaN (OCP FP8) */
#define NXS_I8 4
#define NXS_U8 5
#define NXS_U16 6
#define NXS_I32 7
#define NXS_U32 8
#define NXS_I64 9

/* Bits that a kernel ORs into the device word that a caller passes as `flags_or_null`. */
#define NXS_FLAG_CODE_CLAMPED 1u     /* a code was outside its codebook and was clamped to the nearest entry */
#define NXS_FLAG_APPEND_SKIPPED 2u   /* a row had no place in the cache and was not written */
#define NXS_FLAG_POSITION_CLAMPED 4u /* a position was outside its table and was clamped to the nearest row */
#define NXS_FLAG_CODEBOOK_NOT_FINITE 8u /* a codebook has elements that are NaN or infinite; they were taken as 0 */
#define NXS_FLAG_ROW_NOT_FINITE 16u  /* a row had no finite distance to any code, and got code 0 */

/* The version this library was built with. */
uint32_t nxs_abi_version(void);

/* A static string: "NXS_E_SHAPE", or CUDA's own name for a positive status. Needs no driver. Never null. */
const char *nxs_status_name(nxs_status status);

/* What planning needs to know of a device. */
typedef struct nxs_device_info {
  int32_t cc_major, cc_minor;  /* compute capability */
  int32_t sm_count;            /* multiprocessors */
  int32_t smem_per_block_max;  /* bytes of shared memory a block may opt in to */
  int64_t l2_bytes;
} nxs_device_info;

/* Fills *info for device `ordinal`. Does not create a context. */
nxs_status nxs_get_device_info(int32_t ordinal, nxs_device_info *info);

/* The ordinal of the device that is current on this thread. */
nxs_status nxs_current_device(int32_t *ordinal);

/* ---- random ------------------------------------------------------------------------------------------------- */

/*
 * Philox 4x32-10 (Salmon et al., SC'11) blocks for consecutive positions:
 *   out[i, 0..4] = philox(key = seed, counter = {lo(first + i), hi(first + i), domain, draw})
 * as raw words (NXS_U32) or as uniforms in [0, 1): (word >> 8) * 2^-24 (NXS_F32).
 */
typedef struct nxs_philox_fill_params {
  void *out;               /* [positions, 4] out_dtype, contiguous, 16-byte aligned */
  int64_t positions;
  uint64_t seed;
  uint64_t first_position;
  uint32_t domain;         /* which kind of draw: two uses of one (seed, position) take different domains */
  uint32_t draw;           /* which draw within the domain */
  nxs_dtype out_dtype;     /* NXS_U32 or NXS_F32 */
} nxs_philox_fill_params;

nxs_status nxs_philox_fill(const nxs_philox_fill_params *params, void *stream);

/* ---- attention ---------------------------------------------------------------------------------------------- */

/*
 * Attention in which a schedule says who sees whom:
 *   out[b, i, h, :] = sum over visible j of softmax_j(scale * q[b, i, h, :] . k[b, j, g, :]) v[b, j, g, :]
 * with g = h / (heads / kv_heads). A row that sees nothing gives 0, and -inf as its log-sum-exp.
 *
 * The schedule is made by the caller (nextscale's Rust plans make it) and lies in device memory as 32-bit words. An item
 * is a block of query rows that read the same keys: `groups` tiles of up to 64 rows. The keys come in runs, and a run in
 * chunks of 128 keys (160 where groups are 4) from its start on, the last one shorter; runs are taken as listed, chunks of a
 * run from the last to the first. Offsets count words from the start of the schedule.
 *   item, NXS_SCHEDULE_ITEM_WORDS words, the first at offset 0, longest first:
 *     0 offset of the first run, a multiple of 4   1 runs   2 split   3 digest: the params' value, or the item is not taken
 *     4 + 2 g, 5 + 2 g: first row and number of rows (0 to 64) of tile g
 *   run, NXS_SCHEDULE_RUN_WORDS words:
 *     0 first key   1 keys   2 zero, or 1 + the index of the length that limits it   3 first key that this length counts from
 *     4 + g: mask of tile g: NXS_MASK_NONE, all keys of the run are visible; NXS_MASK_HIDDEN, none is: only before the
 *     first run of which the tile sees something, or after the last one; else the offset, a multiple of 4, of a mask that
 *     holds for every chunk of the run
 *   mask: w = 2 words (4 where groups are 4) for each of 128 threads, element i of thread t being bit i % 32 of word
 *     w t + i / 32: row 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2), key 8 (i / 4) + 2 (t % 4) + i % 2.
 * Each row belongs to one tile of each split.
 */
#define NXS_SCHEDULE_ITEM_WORDS 12
#define NXS_SCHEDULE_RUN_WORDS 8
#define NXS_SCHEDULE_MASK_WORDS 256
#define NXS_SCHEDULE_WIDE_MASK_WORDS 512
#define NXS_SCHEDULE_TILE_ROWS 64
#define NXS_SCHEDULE_CHUNK_KEYS 128
#define NXS_SCHEDULE_WIDE_CHUNK_KEYS 160
#define NXS_MASK_NONE 0u
#define NXS_MASK_HIDDEN 1u
/* What k and v are: of dtype, or packed as nxs_pack packs rows, each unpacked to dtype, rounded once, before it is used. */
#define NXS_KV_PLAIN 0
#define NXS_KV_FP8 1  /* NXS_PACK_FP8, n 1 */
#define NXS_KV_INT4 2 /* NXS_PACK_UNIFORM of 4 bits a row, numbers f32, n 2; scales below 2^100 */

typedef struct nxs_scale_attention_params {
  const void *q;                    /* [batch, q_rows, heads, dim] dtype; 16-byte aligned, as are k, v and out */
  const void *k;                    /* [batch, kv_rows, kv_heads, dim] dtype */
  const void *v;                    /* [batch, kv_rows, kv_heads, dim] dtype */
  void *out;                        /* [batch, rows, heads, dim] dtype; rows must not overlap */
  float *lse_or_null;               /* [batch, heads, rows] natural log of the sum of exponentials, every dimension strided */
  const uint32_t *schedule;         /* [schedule_words]; 16-byte aligned */
  const uint32_t *schedule_head_or_null; /* [schedule_head_words] in host memory: how the schedule begins. With it the
                                       kernel need not fetch what it has to know first; 128 words pay, most are ignored */
  const int32_t *lengths_or_null;   /* [length_count, batch, kv_heads]: keys that a run's length leaves; clamped to >= 0 */
  const int32_t *row_index_or_null; /* [batch, rows]: the row of q that row i is; null: i. Clamped into q */
  const int32_t *kv_offset_or_null; /* [batch]: added to every key index (varlen: keys of all entries in one row of memory) */
  float *parts_or_null;             /* workspace, splits > 1: [splits, batch, heads, rows, dim] then, 16-byte aligned,
                                       [splits, batch, heads, rows]; contiguous */
  int64_t q_stride_batch, q_stride_row, q_stride_head;       /* multiples of 8, as are those of k, v and out */
  int64_t k_stride_batch, k_stride_row, k_stride_head;       /* of q, k and v only the batch's may be 0 */
  int64_t v_stride_batch, v_stride_row, v_stride_head;
  int64_t out_stride_batch, out_stride_row, out_stride_head;
  int64_t lse_stride_batch, lse_stride_head, lse_stride_row;
  int64_t lengths_stride_index, lengths_stride_batch, lengths_stride_head;
  int64_t row_index_stride_batch;
  int64_t batch, rows, q_rows, kv_rows;
  int32_t heads, kv_heads, dim;     /* dim: a multiple of 8 up to 128 */
  int32_t items, splits;            /* items of all splits; splits >= 1 */
  int32_t pack;                     /* 1, or heads / kv_heads: rows of the schedule are (row, head within its group) */
  int32_t groups;                   /* tiles of an item: 1 or 2; for dim <= 64 also 3; beyond also 4, which a pair of blocks takes */
  int32_t section;                  /* heads (over the batch) whose items are taken before the next ones'; 0: all */
  int32_t length_count;
  int32_t schedule_head_words;
  uint32_t digest;                  /* word 3 of every item: tells this schedule from others */
  nxs_dtype dtype;                  /* NXS_BF16 or NXS_F16 */
  int32_t variant;                  /* 0: portable (sm_80), groups 1; 1: Hopper (sm_90a) */
  int32_t blocks;                   /* of the Hopper kernel's persistent grid; even for pairs */
  float scale;                      /* of the logits */
  float logit_bound;                /* > 0: the caller vouches for |scale * q . k| <= logit_bound; at most 40, bf16 only */
  int32_t kv_format;                /* NXS_KV_*; packed: k and v are [batch, kv_rows, kv_heads, slot] bytes, their strides count
                                       bytes and are multiples of 16; dim 64, 96 or 128, groups up to 2,
                                       of dim 64 up to 3 */
  const float *k_numbers_or_null;   /* packed: [batch, kv_rows, kv_heads, n], 16-byte aligned; null: in the slots, see nxs_pack */
  const float *v_numbers_or_null;
  int64_t k_numbers_stride_batch, k_numbers_stride_row, k_numbers_stride_head; /* multiples of n */
  int64_t v_numbers_stride_batch, v_numbers_stride_row, v_numbers_stride_head;
} nxs_scale_attention_params;

nxs_status nxs_scale_attention(const nxs_scale_attention_params *params, void *stream);

/*
 * Merge of partial attention outputs by their log-sum-exps: split keys, ring attention, rows of several intervals.
 *   m = max over i of lse[i, b, h, r];  w_i = exp(lse[i, b, h, r] - m);  s = sum over i ascending of w_i
 *   out[b, r, h, :] = round(sum over i ascending of w_i * parts[i, b, r, h, :] / s);  out_lse[b, h, r] = m + ln(s)
 * in f32, rounded once to out_dtype (nearest even). With accumulate, out and out_lse are read first, as the part before
 * part 0.
 * A part with lse = -inf adds nothing, whatever it holds; if all have, out is 0 and out_lse -inf. An lse of NaN or +inf
 * makes the row's out and out_lse NaN.
 * |out_lse - exact| <= 2^-24 (|exact| + parts + 64); |out - exact| <= 2^-24 / s * (sum over i of
 * (2 parts + 64 + 3 (m - lse_i)) w_i |parts_i|), and the rounding to out_dtype. Weights below 2^-126 count as 0.
 */
typedef struct nxs_attention_merge_params {
  const void *parts;        /* [parts, batch, rows, heads, dim] parts_dtype */
  const float *lse;         /* [parts, batch, heads, rows], natural logarithm, every dimension strided */
  void *out;                /* [batch, rows, heads, dim] out_dtype; rows must not overlap */
  float *out_lse_or_null;   /* [batch, heads, rows], every dimension strided; required with accumulate */
  const uint32_t *gate_or_null; /* [1] in device memory: unless it equals `gate`, nothing is written */
  int64_t parts_stride_part, parts_stride_batch, parts_stride_row, parts_stride_head;
  int64_t lse_stride_part, lse_stride_batch, lse_stride_head, lse_stride_row;
  int64_t out_stride_batch, out_stride_row, out_stride_head;
  int64_t out_lse_stride_batch, out_lse_stride_head, out_lse_stride_row;
  int64_t batch, rows;
  int32_t parts_count;      /* 1 to 256 */
  int32_t heads;
  int32_t dim;              /* 1 to 1024 */
  nxs_dtype parts_dtype;    /* NXS_F32, NXS_F16 or NXS_BF16 */
  nxs_dtype out_dtype;      /* NXS_F32, NXS_F16 or NXS_BF16 */
  uint32_t gate;
  int32_t accumulate;       /* 1: out and out_lse are the part before part 0. A 16-bit out is rounded at every call. */
  int32_t vector;           /* 1: 16-byte reads of parts. dim and the strides of parts and out are multiples of
                               16 / sizeof(parts_dtype), parts is 16-byte aligned, and out is aligned to min(16, that
                               many output elements). 0: one element at a time, no demands. */
  int32_t log2_lanes;       /* 2^log2_lanes threads share a row of dim elements: 0 to 5. Every value is correct.
                               Fastest: the least one with 2^log2_lanes * (elements a read) >= dim, or 5. */
} nxs_attention_merge_params;

nxs_status nxs_attention_merge(const nxs_attention_merge_params *params, void *stream);

/* How the elements of a row are normalised, in f32. */
#define NXS_NORM_NONE 0
#define NXS_NORM_L2 1  /* x / max(sqrt(sum of x^2), eps); eps from 1e-18 on */
#define NXS_NORM_RMS 2 /* x / sqrt(mean of x^2 + eps) */

/* Which two elements a < b of a row are rotated together. */
#define NXS_ROPE_NONE 0
#define NXS_ROPE_INTERLEAVED 1 /* 2 j and 2 j + 1 */
#define NXS_ROPE_HALF 2        /* of each rope_block elements, j and j + rope_block / 2 */

/* One tensor that is prepared. With heads = 0 it is absent, and nothing else of it is looked at. */
typedef struct nxs_attention_prepare_tensor {
  const void *input;               /* [batch, rows, heads, dim] in_dtype */
  void *out;                       /* [batch, out_rows, heads, dim] out_dtype; rows must not overlap */
  const float *weight_or_null;     /* [dim]: factors of the elements, after the norm */
  const float *head_scale_or_null; /* [heads]: factors of the heads, after the norm */
  int64_t input_stride_batch, input_stride_row, input_stride_head;
  int64_t out_stride_batch, out_stride_row, out_stride_head;
  int64_t out_rows;                /* without append: rows */
  int32_t heads;
  nxs_dtype out_dtype;             /* NXS_F32, NXS_F16 or NXS_BF16 */
  int32_t norm;                    /* NXS_NORM_* */
  float norm_eps;
  int32_t rotate;                  /* 1: with the rope */
  int32_t append;                  /* 1: row i goes to row append_at + i of out, 0: to row i */
} nxs_attention_prepare_tensor;

/*
 * What queries, keys and values go through before attention, in one pass: norm, rotary position embedding, append to
 * a cache.
 *   y = norm(x) * weight * head_scale
 *   y[a], y[b] = y[a] cos[p, A] - y[b] sin[p, A], y[b] cos[p, B] + y[a] sin[p, B]   for the pairs below rotary_dim
 *   out = round(y)
 * in f32, rounded once to out_dtype (nearest even). p is the row's position; A = B is the number of the pair, counted
 * block by block, or with table_full A = a and B = b.
 * Row i of batch entry b has position positions[b, i], or append_at + i with position_at_append, or position + i. A
 * position outside [0, table_rows) is clamped to the nearest one, and NXS_FLAG_POSITION_CLAMPED is OR-ed into
 * *flags_or_null.
 * A row with append whose place is outside [0, out_rows) is not written, and NXS_FLAG_APPEND_SKIPPED is OR-ed in.
 */
typedef struct nxs_attention_prepare_params {
  nxs_attention_prepare_tensor tensor[3]; /* the queries, keys and values */
  const float *cos_or_null, *sin_or_null; /* [table_rows, rotary_dim / 2], with table_full [table_rows, rotary_dim] */
  const int32_t *positions_or_null;       /* [batch, rows], every dimension strided */
  const int32_t *append_at_or_null;       /* [batch] */
  uint32_t *flags_or_null;                /* [1]; only ever OR-ed into: the caller clears it */
  int64_t table_stride_row;
  int64_t positions_stride_batch, positions_stride_row;
  int64_t batch, rows, table_rows;
  int64_t append_at;                      /* if append_at_or_null is null */
  int64_t position;
  int32_t dim;                            /* 1 to 256 */
  int32_t rope;                           /* NXS_ROPE_* */
  int32_t rotary_dim;                     /* even, at most dim: elements from there on are not rotated */
  int32_t rope_block;                     /* NXS_ROPE_HALF: even, divides rotary_dim; rotary_dim for the usual halves */
  int32_t table_full;
  int32_t position_at_append;
  nxs_dtype in_dtype;                     /* NXS_F32, NXS_F16 or NXS_BF16 */
  int32_t vector;                         /* 1: chunks of 16 bytes of input. dim, rotary_dim, half of rope_block and the
                                             strides of input and out are multiples of v = 16 / sizeof(in_dtype),
                                             table_stride_row of 4; input, cos, sin and weights are 16-byte aligned, out
                                             is to min(16, v output elements). 0: one element at a time, no demands. */
  int32_t log2_lanes;                     /* 2^log2_lanes threads share a row: 0 to 5, with at most (vector ? 1 : 4)
                                             pairs of chunks each. */
} nxs_attention_prepare_params;

nxs_status nxs_attention_prepare(const nxs_attention_prepare_params *params, void *stream);

/* ---- quantization ------------------------------------------------------------------------------------------- */

/*
 * Residual-vector-quantization decode (EnCodec, Mimi, DAC tables, RQ-VAE):
 *   out[b, r, :] = round(sum over l ascending of codebooks[l, codes[b, l, r], :])
 * summed in f32 from +0, one addition a level in ascending order, rounded once to out_dtype (nearest even).
 * A code outside [0, entries) is clamped to the nearest entry and NXS_FLAG_CODE_CLAMPED is OR-ed into *flags_or_null;
 * a code equal to null_code (when has_null_code) adds nothing.
 */
typedef struct nxs_rvq_decode_params {
  const void *codes;             /* [batch, levels, rows] codes_dtype, every dimension strided */
  const void *codebooks;         /* [levels, entries, dim] codebooks_dtype; stride_level 0 shares one codebook */
  void *out;                     /* [batch, rows, dim] out_dtype; rows must not overlap */
  uint32_t *flags_or_null;       /* [1]; only ever OR-ed into: the caller clears it */
  int64_t codes_stride_batch, codes_stride_level, codes_stride_row;
  int64_t codebooks_stride_level, codebooks_stride_entry;
  int64_t out_stride_batch, out_stride_row;
  int64_t batch, rows, entries;
  int32_t levels, dim;
  int64_t null_code;
  int32_t has_null_code;
  nxs_dtype codes_dtype;         /* NXS_U16, NXS_U32 or NXS_I64 */
  nxs_dtype codebooks_dtype;     /* NXS_F32, NXS_F16 or NXS_BF16 */
  nxs_dtype out_dtype;           /* NXS_F32, NXS_F16 or NXS_BF16 */
  int32_t vector;                /* 1: 16-byte codebook reads. dim and the codebook and out strides are multiples of
                                    16 / sizeof(codebooks_dtype), codebooks is 16-byte aligned, and out is aligned to
                                    min(16, that many output elements). 0: one element at a time, no demands. */
  int32_t tiles;                 /* 1: the kernel for many rows (thousands, in batch entries of some tens or one), which takes
                                    a level or more, no null code, codebooks that span less than 2^32 reads, and log2_lanes
                                    of 3 to 5. 0: the one for any problem. */
  int32_t log2_lanes;            /* 2^log2_lanes threads share a row: 0 to 7; with tiles a row or each slice of it, 3 to 5.
                                    Every value is correct. Fastest: the least one with 2^log2_lanes * (elements a read) >=
                                    dim, or the greatest. With tiles and 16-byte reads: 3, or 4 with 16-bit codebooks where
                                    codes and outputs together are larger than L2. */
} nxs_rvq_decode_params;

nxs_status nxs_rvq_decode(const nxs_rvq_decode_params *params, void *stream);

/* What is nearest, and what a code stands for. */
#define NXS_METRIC_L2 0          /* the code of least distance; its row */
#define NXS_METRIC_COSINE_RAW 1  /* input and rows divided by max(norm, eps), then as L2; the row as it was (DAC, VAR znorm) */
#define NXS_METRIC_COSINE_UNIT 2 /* the same search; the row that was divided (LlamaGen) */

/*
 * Codebooks made ready for search by nxs_codebook_prepare, in one piece of memory of `bytes` bytes. With P = padded_dim,
 * Q = operand_dim and R = entries rounded up to 128:
 *   at 0           f32 [levels, 4]: greatest norm of a searched row, of its second bf16 piece, of what the pieces leave out; 0
 *   at values_at   f32 [levels, entries, P]: what codes stand for
 *   at search_at   f32 [levels, R / 32, P / 4, 32, 4]: searched rows, element k of code c at [c / 32, k / 4, c % 32, k % 4]
 *   at operand_at  bf16 [levels, R / 128, Q / 8, 128, 8]: B of the products, element q of code c at [c / 128, q / 8, c % 128,
 *                  q % 8]; of a searched row c, with hi = bf16(c), lo = bf16(c - hi) and three pieces n of -|c|^2 / 2:
 *                  (pieces 1) hi, n, 0, ...; (pieces 3) hi, hi, lo, n, 0, ...
 * Elements from dim on are 0, as are searched rows from entries on; the first piece of their n is -2^120.
 */
typedef struct nxs_codebook {
  void *prepared;       /* 256-byte aligned */
  int64_t values_at, search_at, operand_at, bytes; /* multiples of 256 */
  int64_t entries;      /* 1 to 131072 */
  int32_t levels;       /* 1 to 65536 */
  int32_t dim;          /* 1 to 512 */
  int32_t padded_dim;   /* dim rounded up to 8 */
  int32_t operand_dim;  /* pieces * padded_dim + 3 rounded up to 16 times a multiple of 2, 3 or 4: the least of these */
  int32_t pieces;       /* 1 or 3 */
  int32_t metric;       /* NXS_METRIC_* */
  float eps;            /* least norm that a row is divided by */
} nxs_codebook;

/*
 * Fills codebook.prepared from rows, or, if usage is given, from rows / max(usage, usage_eps) (running sums and counts of an
 * exponential moving average). Elements that are not finite are taken as 0, and NXS_FLAG_CODEBOOK_NOT_FINITE is OR-ed into
 * *flags_or_null.
 */
typedef struct nxs_codebook_prepare_params {
  nxs_codebook codebook;
  const void *rows;           /* [levels, entries, dim] rows_dtype */
  const float *usage_or_null; /* [levels, entries] */
  uint32_t *flags_or_null;    /* [1]; only ever OR-ed into: the caller clears it */
  int64_t rows_stride_level, rows_stride_entry, usage_stride_level;
  float usage_eps;
  nxs_dtype rows_dtype;       /* NXS_F32, NXS_F16 or NXS_BF16 */
} nxs_codebook_prepare_params;

nxs_status nxs_codebook_prepare(const nxs_codebook_prepare_params *params, void *stream);

/*
 * Residual-vector-quantization encode (EnCodec, Mimi, RQ-VAE, DAC; with one level vector quantization):
 *   r = input[b, t, :] in f32
 *   for l ascending: codes[b, l, t] = argmin over c of |s - search[l, c]|^2 with s = r, or with a cosine metric
 *                    r / max(|r|, eps);  r = r - values[l, codes[b, l, t]]
 *   residual[b, t, :] = round(r); quantized[b, t, :] = round(sum over l ascending of values[l, codes[b, l, t]])
 * The score that is least is f32: acc = fma(s[k] - c[k], s[k] - c[k], acc) for k ascending from acc = 0; the lowest code wins
 * ties. A code whose score is NaN or infinite does not win; if all are, the code is 0, its distance +inf, and
 * NXS_FLAG_ROW_NOT_FINITE is OR-ed into *flags_or_null. Norms are sqrt of an f32 fma chain, k ascending.
 *
 * With latent > 0 (DAC) input, residual and quantized have `latent` elements a row, and each level searches
 *   e[j] = in_bias[l, j] + sum over k of in_weight[l, j, k] r[k], in 32 chains of fma from 0, k ascending, element k in chain
 *          k / 4 % 32; chains are added in pairs that are 16 apart, then 8, 4, 2 and 1
 * instead of r, and takes y[k] = fma over j ascending of out_weight[l, k, j] values[l, code, j], from out_bias[l, k], from r.
 */
typedef struct nxs_rvq_encode_params {
  nxs_codebook codebook;           /* levels 1: shared by all levels */
  const void *input;               /* [batch, rows, dim or latent] dtype, every dimension strided */
  void *codes;                     /* [batch, levels, rows] codes_dtype, every dimension strided */
  void *quantized_or_null;         /* [batch, rows, dim or latent] dtype, every dimension strided; no elements overlap */
  void *residual_or_null;          /* [batch, rows, dim or latent] dtype, every dimension strided; no elements overlap */
  float *distances_or_null;        /* [batch, levels, rows]: the winners' scores, every dimension strided */
  uint32_t *histogram_or_null;     /* [levels, entries], contiguous: counts are added to what is there */
  uint32_t *flags_or_null;         /* [1]; only ever OR-ed into: the caller clears it */
  const float *in_weight_or_null;  /* [levels, dim, latent]; these four contiguous and required with latent > 0 */
  const float *in_bias_or_null;    /* [levels, dim] */
  const float *out_weight_or_null; /* [levels, latent, dim] */
  const float *out_bias_or_null;   /* [levels, latent] */
  int64_t input_stride_batch, input_stride_row, input_stride_dim;
  int64_t codes_stride_batch, codes_stride_level, codes_stride_row;
  int64_t quantized_stride_batch, quantized_stride_row, quantized_stride_dim;
  int64_t residual_stride_batch, residual_stride_row, residual_stride_dim;
  int64_t distances_stride_batch, distances_stride_level, distances_stride_row;
  int64_t batch, rows;
  int32_t levels;                  /* 1 to 32; at most codebook.levels unless that is 1 */
  int32_t latent;                  /* 0, or 1 to 1024 with dim up to 32 */
  nxs_dtype dtype;                 /* NXS_F32, NXS_F16 or NXS_BF16 */
  nxs_dtype codes_dtype;           /* NXS_U16 (entries up to 65536), NXS_U32 or NXS_I64 */
  int32_t variant;                 /* NXS_RVQ_ENCODE_* */
  int32_t tile_rows;               /* SM80: 16, 32 or 64; SM90: 64; STREAM: rows of a cluster, 1 to 8; PROJECTED: 16 */
  int32_t stages;                  /* SM80, SM90: pieces of the operand that shared memory has room for, 2 to 8 */
  int32_t splits;                  /* SM90, STREAM: blocks that the codes of a level are dealt out to, 1, 2, 4 or 8, STREAM
                                      also 16; SM90: at most one for each 128 entries */
  int32_t sharers;                 /* SM90: tiles of rows that share what is streamed by multicast, 1, 2 or 4; 1 where
                                      codes are dealt out */
} nxs_rvq_encode_params;
#define NXS_RVQ_ENCODE_SM80 0      /* mma.sync */
#define NXS_RVQ_ENCODE_SM90 1      /* wgmma; dim up to 256 */
#define NXS_RVQ_ENCODE_STREAM 2    /* few rows, one cluster each tile_rows; sm_90 */
#define NXS_RVQ_ENCODE_PROJECTED 3 /* latent > 0 */

nxs_status nxs_rvq_encode(const nxs_rvq_encode_params *params, void *stream);
/* How a map is resized along each axis, align_corners false. */
#define NXS_RESIZE_BICUBIC 0  /* a = -0.75, source positions not clamped, taps clamped into the map */
#define NXS_RESIZE_BILINEAR 1 /* source positions clamped from below */
#define NXS_RESIZE_AREA 2     /* the mean over [floor(i in / out), ceil((i + 1) in / out)), as adaptive average pooling */
/* What the tokens of a multi-scale quantizer are. */
#define NXS_TOKENS_CODES 0      /* [batch, tokens] NXS_U16, NXS_U32 or NXS_I64: rows of the codebook */
#define NXS_TOKENS_EMBEDDINGS 1 /* [batch, tokens, width] NXS_F32, NXS_F16 or NXS_BF16 */
#define NXS_TOKENS_BITS 2       /* [batch, tokens, width] NXS_U8: 0 is -bit_scale, anything else +bit_scale */
#define NXS_MAX_SCALES 32
/* The Philox domain of the flips of bit labels. */
#define NXS_DOMAIN_BIT_FLIP 0x62666c70u

/*
 * Scales of a multi-scale residual quantizer (VAR, HART, Infinity): adds their tokens to the running map f_hat and makes
 * the next scale's input.
 *   h_s   = resize(map of the tokens of scale s -> height x width, by `up`)
 *   f_hat = f_hat + h'_s    h'_s = phi(h_s) with a phi: a 3x3 convolution with zero padding; else h_s
 *   next  = resize(f_hat -> next_height x next_width, by `down`), token-major, rounded to next_dtype, `repeat` times
 *   label = (resize(target - f_hat, by area) > 0) ? 1 : 0
 * Maps are [batch, channels, height, width] f32. A token of a grid [grid_height, grid_width] lies at pixel (y, x) of the
 * scale's map, or with patch 2 at pixels (2 y + dy, 2 x + dx), whose channel c is its element 4 c + 2 dy + dx
 * (pixel shuffle); scale sizes are in pixels. width = channels * patch * patch.
 * Sums are in f32. A code outside [0, entries) is clamped and NXS_FLAG_CODE_CLAMPED is OR-ed into *flags_or_null.
 */
typedef struct nxs_multi_scale_params {
  const void *tokens_or_null;   /* of the scales taken, one after the other, in each batch entry; null: scales is 0 */
  const float *codebook_or_null; /* [entries, channels]; NXS_TOKENS_CODES */
  const float *phi_or_null;     /* [phis, ceil(channels / 4), 9 channels + 1, 4]: of outputs 4 g to 4 g + 3, the weights of
                                   input i and tap (ky, kx) in row 9 i + 3 ky + kx, and last their biases; outputs
                                   beyond `channels` are 0. 16-byte aligned */
  const float *f_hat_or_null;   /* the map before; null: zeroes. May be f_hat_out_or_null itself, unless rows */
  float *f_hat_out_or_null;     /* the map after, or with prefixes [scales, batch, channels, height, width]: after each
                                   scale; null: not kept */
  const float *target_or_null;  /* labels, or next of target - f_hat instead of f_hat: with next_of_residual */
  void *next_or_null;           /* [repeat, batch, tokens of next, width] next_dtype */
  uint8_t *labels_or_null;      /* [batch, tokens of next, width] */
  uint8_t *flipped_or_null;     /* the same, each bit flipped with probability flip_rate */
  const int64_t *seeds_or_null; /* [batch]: of the flips; a bit is flipped by Philox of (seed, position of its token times
                                   ceil(width / 4) plus element / 4, NXS_DOMAIN_BIT_FLIP, 0), word element % 4 */
  uint32_t *flags_or_null;      /* [1]; only ever OR-ed into */
  int64_t tokens_stride_batch;  /* elements */
  int64_t next_stride_batch, labels_stride_batch; /* elements; next of the second repeat follows after batch entries */
  int64_t batch, entries;
  int64_t first_label;          /* position of the first token of next, for the flips */
  int32_t channels;             /* 1 to 256 */
  int32_t height, width;        /* of maps, 1 to 1024 */
  int32_t patch;                /* 1 or 2 */
  int32_t scales;               /* taken by this call */
  int32_t prefixes;
  int32_t independent;          /* 1: scales do not add up: f_hat is that of the last one, next is the last scale's map
                                   itself, resized by `up`; needs rows if there is a next */
  uint16_t scale_height[NXS_MAX_SCALES], scale_width[NXS_MAX_SCALES]; /* pixels; at most height, width */
  int8_t scale_phi[NXS_MAX_SCALES]; /* which phi; -1: none */
  int32_t up;                   /* NXS_RESIZE_BICUBIC or NXS_RESIZE_BILINEAR */
  int32_t down;                 /* NXS_RESIZE_AREA or NXS_RESIZE_BILINEAR */
  int32_t next_height, next_width; /* pixels; 0: no next and no labels */
  int32_t next_of_residual;
  int32_t repeat;               /* 1 or 2 */
  int32_t tokens_kind;          /* NXS_TOKENS_* */
  nxs_dtype tokens_dtype, next_dtype;
  float bit_scale, flip_rate;
  int32_t rows;                 /* 1: a block a row of the map or of the next, none of which waits for another: one scale
                                   without phi, next by bilinear or independent, no labels or target, f_hat_or_null not
                                   f_hat_out_or_null. 0: a block some channels of an image; takes everything else */
  int32_t group;                /* rows 0: channels of a block, a multiple of 4 */
  int32_t band;                 /* rows 0: rows of the map that are worked on at a time; even */
  int32_t plane_shared;         /* rows 0: 1: what the next is made from is kept in shared memory */
  int32_t blocks;               /* rows 0: blocks that take turns at the bands of the same channels, a cluster: 1 to 8;
                                   beyond 1 on sm_90, without plane_shared */
  int32_t programmatic;         /* 1, on sm_90: may be started before the kernel before it on the stream has ended, for which it
                                   then waits: programmatic dependent launch */
} nxs_multi_scale_params;

nxs_status nxs_multi_scale(const nxs_multi_scale_params *params, void *stream);

/*
 * Nearest codebook rows (the search of VAR's encoder):
 *   codes[b, l] = the least i with the least score; score(i) = sum over k ascending of (z[b, l, k] - codebook[i, k])^2,
 *   each step one f32 subtraction and one fused multiply-add. A row without a score below infinity gets code 0.
 * With normalize, z is first divided by max(sqrt(sum over k ascending of z^2, fused), eps).
 */
typedef struct nxs_nearest_code_params {
  const float *z;               /* [batch, rows, channels] */
  const float *codebook;        /* [entries, channels] */
  void *codes;                  /* [batch, rows] codes_dtype */
  int64_t codes_stride_batch;   /* elements */
  int64_t batch, rows, entries; /* batch * rows < 2^31; entries fit in codes_dtype */
  int32_t channels;             /* 1 to 256 */
  int32_t normalize;
  float eps;
  nxs_dtype codes_dtype;        /* NXS_U16, NXS_U32 or NXS_I64 */
  int32_t log2_tile;            /* rows of a block: 8, 16 or 32 */
  int32_t splits;               /* blocks that share the codebook: 1, or on sm_90 a cluster of 2, 4 or 8 */
  int32_t programmatic;         /* as of nxs_multi_scale */
} nxs_nearest_code_params;

nxs_status nxs_nearest_code(const nxs_nearest_code_params *params, void *stream);

/* Which channel is the most significant bit of an integer of `dim` bits. */
#define NXS_BITS_MSB_FIRST 0 /* channel 0, as Infinity and LFQ have it */
#define NXS_BITS_LSB_FIRST 1 /* the last one */

/*
 * Bits between their forms (LFQ, BSQ): values by their signs, labels, integers.
 *   bit[r, k] = input > 0 (values; 0 for NaN), input != 0 (labels), bit k of the integer in `order`
 *   flipped where philox_uniform(Philox(seeds[r / rows_per_seed], (first_row + r % rows_per_seed) * ceil(dim / 4) + k / 4,
 *   NXS_DOMAIN_BIT_FLIP, 0) word k % 4) < flip_rate, if there are seeds
 *   labels = bit;  values = bit ? scale : -scale, NaN where the input was a NaN;  codes = the integer
 */
typedef struct nxs_bits_params {
  const void *input;            /* [rows, dim] NXS_F32, NXS_F16, NXS_BF16 values or NXS_U8 labels; [rows] NXS_U16, NXS_U32
                                   or NXS_I64 integers */
  uint8_t *labels_or_null;      /* [rows, dim] */
  void *values_or_null;         /* [rows, dim] values_dtype */
  void *codes_or_null;          /* [rows] codes_dtype */
  const int64_t *seeds_or_null; /* [ceil(rows / rows_per_seed)], bits of u64 */
  int64_t rows, rows_per_seed, first_row;
  int32_t dim;                  /* 1 to 4096; at most the bits of an integer where there are integers */
  int32_t order;                /* NXS_BITS_* */
  float scale, flip_rate;
  nxs_dtype input_dtype;
  nxs_dtype values_dtype;       /* NXS_F32, NXS_F16 or NXS_BF16 */
  nxs_dtype codes_dtype;        /* NXS_U16, NXS_U32 or NXS_I64 */
} nxs_bits_params;

nxs_status nxs_bits(const nxs_bits_params *params, void *stream);

/* How finite scalar quantization bounds a value. */
#define NXS_FSQ_TANH 0      /* tanh(z + shift) half - offset, rounded to even (arXiv 2309.15505) */
#define NXS_FSQ_SYMMETRIC 1 /* floor((L - 1) (tanh(z) + 1) / 2 + 0.5) */
#define NXS_FSQ_CLAMP 2     /* the same with clamp(z, -1, 1) for tanh(z) */
#define NXS_FSQ_MOST_DIM 16

/*
 * Finite scalar quantization, of one or more quantizers one after the other (residual FSQ):
 *   r = z, or tanh(z / soft[k]) soft[k] where soft[k] > 0
 *   for each quantizer q:  v = value(level(r / scales[q, k]));  r -= v scales[q, k];  values += v scales[q, k]
 *   index[q] = sum over k of level * (product of levels before k)
 * With halves H = levels / 2 (an integer division): NXS_FSQ_TANH has level - H = round(tanh(z + shift) half - offset),
 * half = (levels - 1) 1.001 / 2, offset 0.5 for even levels and 0 for odd ones, shift = atanh(offset / half), and value =
 * (level - H) / H; the symmetric ones have value = (2 level - (levels - 1)) / (levels - 1). Levels are clamped to
 * [0, levels). A NaN has level 0 and stays a NaN in values.
 * Without z, values are made from indices; an index outside [0, product of levels) is clamped, and NXS_FLAG_CODE_CLAMPED
 * is OR-ed into *flags_or_null.
 */
typedef struct nxs_fsq_params {
  const void *z_or_null;        /* [rows, dim] z_dtype */
  void *values_or_null;         /* [rows, dim] values_dtype */
  void *indices_or_null;        /* [rows, quantizers] indices_dtype: written, or without z read */
  uint32_t *flags_or_null;      /* [1]; only ever OR-ed into */
  int64_t rows;
  int32_t dim;                  /* 1 to NXS_FSQ_MOST_DIM */
  int32_t quantizers;           /* 1 to 16 */
  int32_t levels[NXS_FSQ_MOST_DIM];    /* 2 to 65536; the product at most what an index can hold, and 2^31 */
  float scales[16 * NXS_FSQ_MOST_DIM]; /* of quantizer q and channel k at 16 q + k */
  float soft[NXS_FSQ_MOST_DIM];
  int32_t bound;                /* NXS_FSQ_* */
  nxs_dtype z_dtype, values_dtype;     /* NXS_F32, NXS_F16 or NXS_BF16 */
  nxs_dtype indices_dtype;      /* NXS_U16, NXS_U32 or NXS_I64 */
} nxs_fsq_params;

nxs_status nxs_fsq(const nxs_fsq_params *params, void *stream);

/*
 * Labels by a table (coarse labels of codes):  out[i] = table[codes[i]]
 * A code outside [0, entries) is clamped and NXS_FLAG_CODE_CLAMPED is OR-ed into *flags_or_null.
 */
typedef struct nxs_remap_params {
  const void *codes;            /* [count] codes_dtype */
  const void *table;            /* [entries] out_dtype */
  void *out;                    /* [count] out_dtype */
  uint32_t *flags_or_null;      /* [1]; only ever OR-ed into */
  int64_t count, entries;       /* entries: 1 to 2^31 - 1 */
  nxs_dtype codes_dtype, out_dtype; /* NXS_U16, NXS_U32 or NXS_I64 */
} nxs_remap_params;

nxs_status nxs_remap(const nxs_remap_params *params, void *stream);

/* ---- verification ------------------------------------------------------------------------------------------- */

/*
 * Rows of logits are cut into chunks of NXS_CHUNK_COLUMNS columns. A row's distribution is the softmax of
 * logit / temperature, in powers of two: with s = log2(e) / temperature, max the greatest logit of a chunk and r the
 * integer nearest to s * max, the chunk's partial is { max, sum over its columns of 2^(s * logit - r) }. The sum is 0
 * where max is infinite, where |s * max| > 2^21, and for greedy rows; its sign is set if the chunk holds a NaN, which has
 * no part in either number. A temperature below 1e-5 is greedy. Temperatures, seeds and positions stand in device memory,
 * so that a captured graph takes those of the moment.
 *
 * The random draws are Philox blocks of (seed, absolute position, use | row << 8, draw), as nextscale's documentation of
 * the module `verification` says.
 */
#define NXS_CHUNK_COLUMNS 1024

/* Bits of a status word. */
#define NXS_STATUS_TARGET_NAN 1u        /* a row of the target holds a NaN */
#define NXS_STATUS_DRAFT_BAD 2u         /* a row of the draft holds a NaN or nothing */
#define NXS_STATUS_TARGET_EMPTY 4u      /* a row of the target allows no token */
#define NXS_STATUS_TARGET_BEYOND 8u     /* a greatest logit is infinite or too large for its temperature */
#define NXS_STATUS_DRAFT_IMPOSSIBLE 16u /* q is 0 for a draft */
#define NXS_STATUS_ROW_OUT_OF_RANGE 32u /* a row index lies outside its tensor */
#define NXS_STATUS_DRAFTS_IGNORED 64u   /* a request has more drafts than max_drafts */
#define NXS_STATUS_SEQUENCE_FULL 1024u  /* tokens had no place in their sequence and were dropped */
#define NXS_STATUS_TREE_BAD 4096u       /* a link of a tree of drafts leads nowhere, or a node comes before its parent */

/* partials[r, c] = the partial of chunk c of logits[r]. */
typedef struct nxs_row_stats_params {
  const void *logits;               /* [rows, vocab] dtype */
  const float *temperature_or_null; /* [rows]; null: 1 */
  const uint32_t *allow_or_null;    /* [rows, ceil(vocab / 32)]: bit v % 32 of word v / 32 is column v; the others count
                                       as -inf */
  float *partials;                  /* [rows, ceil(vocab / NXS_CHUNK_COLUMNS), 2], 8-byte aligned */
  int64_t stride_row, allow_stride_row;
  int64_t rows, vocab;              /* vocab from 1 to 2^24, fewer than 2^31 chunks */
  nxs_dtype dtype;                  /* NXS_F32, NXS_F16 or NXS_BF16 */
} nxs_row_stats_params;

nxs_status nxs_row_stats(const nxs_row_stats_params *params, void *stream);

/* Drafts of each row, drawn from its distribution one after the other, and what nxs_verify has to know of the row. */
typedef struct nxs_draft_sample_params {
  const void *logits;                     /* [rows, vocab] dtype */
  const float *temperature_or_null;       /* [rows]; null: 1 */
  const int32_t *top_k_or_null;           /* [rows]; 0 and null: off */
  const float *top_p_or_null;             /* [rows]; 1 and null: off */
  const float *min_p_or_null;             /* [rows]; 0 and null: off */
  const int32_t *draft_to_target_or_null; /* [vocab]: the token of a column; null: the column */
  const int64_t *seeds_or_null;           /* [rows]; null: 0 */
  const int64_t *positions_or_null;       /* [rows], of the step's first draft; null: 0 */
  const int32_t *rows_in_step_or_null;    /* [rows], 0 to 2^24 - 1, in place of row_in_step; positions are then the drafts' own */
  const float *uniforms_or_null;          /* [rows, drafts, 4] in [0, 1); in place of seeds */
  int32_t *tokens;                        /* [rows, drafts]; -1 where none is left to draw, but for the first */
  float *stats_or_null;                   /* [rows, 4], 4-byte aligned: greatest logit; sum (its sign: a NaN); least logit that is
                                             kept; log2(e) / temperature, 0 for a greedy row */
  float *log_probs_or_null;               /* [rows, drafts], natural logarithms of the row's probabilities; NaN where no token
                                             could be drawn */
  uint32_t *status;                       /* [rows] NXS_STATUS_*, the row being the target */
  void *workspace;                        /* [rows, ceil(vocab / NXS_CHUNK_COLUMNS)] partials, 8-byte aligned */
  uint32_t *counters;                     /* [rows], all 0 before the first run and after each */
  int64_t stride_row;
  int64_t rows, vocab;                    /* vocab from 1 to 2^24 */
  int32_t row_in_step;                    /* 0 to 1023 */
  int32_t drafts;                         /* of a row, up to 32; 0: 1 */
  int32_t with_replacement;               /* 0: a row's drafts are distinct */
  int32_t fallback;                       /* the first draft where none can be drawn */
  int32_t chunks_per_item;                /* a multiple of 8: chunks that a block takes between two arrivals */
  int32_t blocks;                         /* of the persistent grid */
  nxs_dtype dtype;                        /* NXS_F32, NXS_F16 or NXS_BF16 */
} nxs_draft_sample_params;

nxs_status nxs_draft_sample(const nxs_draft_sample_params *params, void *stream);

/* When a draft is accepted. */
#define NXS_RULE_GREEDY 0
#define NXS_RULE_MATCH 1
#define NXS_RULE_REJECT 2
#define NXS_RULE_BLOCK 3

/*
 * Verification of chains of drafts. Request b has the rows cu_rows[b] to cu_rows[b + 1] - 1 of the step, one more than
 * drafts; row i is the target's distribution after the first i drafts. What is emitted, and when a draft is accepted, is
 * described at nextscale::verification::Verifier and Rule. `rows` below is batch * (max_drafts + 1).
 */
typedef struct nxs_verify_params {
  const void *target;                      /* [target_rows, vocab] target_dtype: raw logits */
  const void *draft_or_null;               /* [draft_rows, draft_vocab] draft_dtype: raw logits; null: drafts are not random */
  const int32_t *cu_rows;                  /* [batch + 1], ascending */
  const int32_t *drafts;                   /* [rows]: at row r the draft that it scores; -1: none from here on */
  const int32_t *row_index_or_null;        /* [rows]: the row of target; null: r */
  const int32_t *draft_row_or_null;        /* [rows]: the row of draft; null: b * max_drafts + i */
  const float *draft_stats_or_null;        /* [draft_rows, 4] of nxs_draft_sample: rows of draft are not swept */
  const int32_t *target_to_draft_or_null;  /* [vocab]: the column of draft, or -1; null: the token itself */
  const float *target_stats_or_null;       /* [target_rows, chunks, 2]: partials; rows of target are not swept */
  const uint32_t *allow_or_null;           /* [rows, ceil(vocab / 32)] */
  const int32_t *rules_or_null;            /* [batch] NXS_RULE_*; null, and what is none: rule */
  const float *temperature_or_null;        /* [batch]; null: 1 */
  const float *draft_temperature_or_null;  /* [batch]; null: temperature */
  const int32_t *top_k_or_null;            /* [batch] */
  const float *top_p_or_null;              /* [batch] */
  const float *min_p_or_null;              /* [batch] */
  const int64_t *seeds_or_null;            /* [batch] */
  const int64_t *positions_or_null;        /* [batch]: of the token after row 0 */
  const float *uniforms_or_null;           /* [rows, 4] by request and row: accept test, three for a token */
  int32_t *tokens;                         /* [batch, max_drafts + 1], -1 after what is emitted */
  int32_t *emitted;                        /* [batch] */
  int32_t *accepted;                       /* [batch] */
  uint32_t *status;                        /* [batch] NXS_STATUS_* */
  int32_t *last_row_or_null;               /* [batch] */
  float *log_probs_or_null;                /* [batch, max_drafts + 1], NaN after what is emitted */
  void *workspace;                         /* 16-byte aligned: [rows] of NXS_VERIFY_ROW_BYTES, then [rows, chunks of target and
                                              of draft where it is swept, 2] f32, then [rows, chunks of target] f32 */
  uint32_t *counters;                      /* [rows + 2 * batch], all 0 before the first run and after each */
  int64_t target_stride_row, draft_stride_row, allow_stride_row;
  int64_t batch, vocab, draft_vocab;       /* vocabularies from 1 to 2^24, batch up to 2^20 */
  int64_t target_rows, draft_rows;         /* fewer than 2^31 */
  int32_t max_drafts;                      /* 0 to 1023 */
  int32_t rule;
  int32_t may_block;                       /* 1: a request may have NXS_RULE_BLOCK: a second kernel is enqueued */
  int32_t trials;                          /* draws of thinning before the rows are swept for the residual */
  int32_t fallback;                        /* the token where none can be drawn */
  int32_t chunks_per_item;                 /* a multiple of 8 */
  int32_t blocks;                          /* of the persistent grid */
  int32_t cluster;                         /* 0, or without may_block 1 to 8: each request by a cluster of so many blocks,
                                              beyond 1 on sm_90; neither counters nor chunks_per_item and blocks are used */
  nxs_dtype target_dtype, draft_dtype;     /* NXS_F32, NXS_F16 or NXS_BF16 */
} nxs_verify_params;

#define NXS_VERIFY_ROW_BYTES 64

nxs_status nxs_verify(const nxs_verify_params *params, void *stream);

/* When a draft of an image model is accepted. */
#define NXS_VISUAL_LANTERN 0
#define NXS_VISUAL_GROUPED 1
#define NXS_VISUAL_JACOBI 2

/* What is drawn for the positions behind a step's end. */
#define NXS_REDRAFT_NONE 0
#define NXS_REDRAFT_INDEPENDENT 1
#define NXS_REDRAFT_MAXIMAL 2
#define NXS_REDRAFT_GUMBEL 3

/*
 * Verification of chains of image tokens. Rows, requests and draws are those of nxs_verify; rules and their parameters are
 * described at nextscale::verification::VisualVerifier. Codes are the `codes` tokens from first_code on. With
 * target_free_or_null a logit is free + guidance * (target - free), and -inf where either is. `rows` below is
 * batch * (max_drafts + 1), `chunks` that of vocab.
 */
typedef struct nxs_visual_verify_params {
  const void *target;                      /* [target_rows, vocab] dtype: raw logits */
  const void *target_free_or_null;         /* [target_rows, vocab] dtype: those without the condition */
  const void *draft_or_null;               /* [draft_rows, vocab] dtype; null: drafts are not random */
  const void *draft_free_or_null;          /* [draft_rows, vocab] dtype; goes with the two before it */
  const int32_t *cu_rows;                  /* [batch + 1], ascending */
  const int32_t *drafts;                   /* [rows]: at row r the draft that it scores; -1: none from here on */
  const int32_t *row_index_or_null;        /* [rows]: the row of target; null: r */
  const int32_t *draft_row_or_null;        /* [rows]: the row of draft; null: b * max_drafts + i */
  const float *draft_stats_or_null;        /* [draft_rows, 4]: rows of draft are not swept */
  const uint32_t *allow_or_null;           /* [rows, ceil(vocab / 32)] */
  const uint32_t *syntax_or_null;          /* [ceil(vocab / 32)]: drafts that are accepted whatever their probability */
  const void *neighbours_or_null;          /* [codes, most of accumulated and zeroed]: nearest codes, nearest first, without
                                              the code itself; those outside 0 to codes - 1 are none. For NXS_VISUAL_LANTERN */
  const void *embeddings_or_null;          /* [codes, dim], for NXS_VISUAL_GROUPED */
  const float *temperature_or_null;        /* [batch]; null: 1 */
  const float *draft_temperature_or_null;  /* [batch]; null: temperature */
  const float *guidance_or_null;           /* [batch]; null: 1 */
  const int32_t *top_k_or_null;            /* [batch] */
  const float *top_p_or_null;              /* [batch] */
  const float *min_p_or_null;              /* [batch] */
  const int64_t *seeds_or_null;            /* [batch] */
  const int64_t *positions_or_null;        /* [batch]: of the token after row 0 */
  const float *uniforms_or_null;           /* [rows, 4] by request and row: accept test, three for a token */
  int32_t *tokens;                         /* [batch, max_drafts + 1], -1 after what is emitted */
  int32_t *emitted;                        /* [batch] */
  int32_t *accepted;                       /* [batch] */
  uint32_t *status;                        /* [batch] NXS_STATUS_* */
  int32_t *last_row_or_null;               /* [batch] */
  int32_t *redrafts_or_null;               /* [batch, max_drafts + 1]: drafts of positions behind the step's end, else -1 */
  float *redraft_stats_or_null;            /* [batch, max_drafts + 1, 4] beside redrafts, as nxs_draft_sample's; else NaN */
  void *workspace;                         /* 16-byte aligned: [rows, 8] words, then for each block 5 * chunks f32 and,
                                              where that is odd, one more */
  uint32_t *counters;                      /* [2 * batch], all 0 before the first run and after each */
  int64_t target_stride_row, draft_stride_row, allow_stride_row; /* of the rows without the condition too */
  int64_t neighbours_stride_row, embeddings_stride_row;
  int64_t batch, vocab;                    /* vocab from 1 to 2^18, batch up to 2^20 */
  int64_t target_rows, draft_rows;         /* fewer than 2^31 */
  int64_t first_code, codes;               /* 0 <= first_code, codes >= 1, first_code + codes <= vocab */
  int32_t max_drafts;                      /* 0 to 1023 */
  int32_t rule;                            /* NXS_VISUAL_* */
  int32_t redraft;                         /* NXS_REDRAFT_*; with one, redrafts is not null */
  int32_t accumulated, zeroed;             /* neighbours whose probability is added; that a rejection zeroes: 0 to 65535 */
  int32_t below, above;                    /* of a group, beside the draft: each 0 to 15 */
  int32_t dim;                             /* of the embeddings, 1 to 65536 */
  float bound;                             /* up to 1: most probability added; above: 1 + the most, in parts of the draft's */
  float probability_gap, distance;         /* of a group: below them; distance is squared */
  int32_t fallback;                        /* the token where none can be drawn */
  int32_t blocks;                          /* of the persistent grid */
  nxs_dtype dtype;                         /* NXS_F32, NXS_F16 or NXS_BF16 */
  nxs_dtype neighbours_dtype;              /* NXS_U16 or NXS_I32 */
  nxs_dtype embeddings_dtype;              /* NXS_F32, NXS_F16 or NXS_BF16 */
} nxs_visual_verify_params;

nxs_status nxs_visual_verify(const nxs_visual_verify_params *params, void *stream);

/*
 * Acceptance of a whole block of image tokens by the probability of their neighbourhoods, as described at
 * nextscale::verification::PooledVerifier. Row b * height * width + t of target is the distribution of token t of request b.
 * Codes and guidance are those of nxs_visual_verify. `rows` is batch * height * width, `chunks` that of vocab.
 */
typedef struct nxs_pooled_verify_params {
  const void *target;              /* [rows, vocab] dtype: raw logits */
  const void *target_free_or_null; /* [rows, vocab] dtype: those without the condition */
  const int32_t *drafts;           /* [rows]; -1 is rejected */
  const void *neighbours_or_null;  /* [codes, neighbours], without the code itself; may be null where neighbours is 0 */
  const float *temperature_or_null; /* [batch]; null: 1 */
  const float *guidance_or_null;   /* [batch]; null: 1 */
  const int32_t *top_k_or_null;    /* [batch] */
  const float *top_p_or_null;      /* [batch] */
  const float *min_p_or_null;      /* [batch] */
  const float *threshold_or_null;  /* [batch]; null: threshold */
  uint8_t *resample;               /* [rows]: 0 accepted, 1 rejected, 2 near and behind a rejected one */
  int32_t *positions_or_null;      /* [rows]: of each request those that are not 0, ascending, then -1 */
  int32_t *islands_or_null;        /* [rows]: the number of the 8-connected island, by its first token; -1 where accepted */
  int32_t *counts;                 /* [batch, 2]: positions, islands */
  float *pooled_or_null;           /* [rows]: probability of the neighbourhood */
  uint32_t *status;                /* [batch] NXS_STATUS_* */
  void *workspace;                 /* 16-byte aligned: [3, rows] words, rounded up to 16 bytes, then [blocks, chunks, 2] f32 */
  uint32_t *counters;              /* [batch], all 0 before the first run and after each */
  int64_t target_stride_row, neighbours_stride_row;
  int64_t batch, height, width;    /* batch up to 2^20, height * width from 1 to 2^20, fewer than 2^31 rows */
  int64_t vocab;                   /* 1 to 2^18 */
  int64_t first_code, codes;
  int32_t neighbours;              /* 0 to 65535 */
  int32_t radius;                  /* rows and columns on each side: 0 to 255 */
  float threshold;
  int32_t blocks;                  /* of the persistent grid */
  nxs_dtype dtype;                 /* NXS_F32, NXS_F16 or NXS_BF16 */
  nxs_dtype neighbours_dtype;      /* NXS_U16 or NXS_I32 */
} nxs_pooled_verify_params;

nxs_status nxs_pooled_verify(const nxs_pooled_verify_params *params, void *stream);

/* What a row's confidence is, of its probabilities at temperature 1: p of the candidate, its logarithm, the greatest less the
 * second, or the sum of p ln p. */
#define NXS_CONFIDENCE_PROBABILITY 0
#define NXS_CONFIDENCE_LOG_PROBABILITY 1
#define NXS_CONFIDENCE_MARGIN 2
#define NXS_CONFIDENCE_ENTROPY 3

/*
 * Typical acceptance of candidate paths, as described at nextscale::verification::TypicalVerifier. Node n of request b is
 * row b * nodes + n of the step; `rows` is batch * nodes, `chunks` that of vocab.
 */
typedef struct nxs_typical_verify_params {
  const void *target;               /* [target_rows, vocab] dtype: raw logits of what follows a node */
  const int32_t *drafts;            /* [rows]: the token of a node; that of node 0 is not looked at */
  const int32_t *paths_or_null;     /* [paths, depth]: nodes of each path, the first 0, then -1; null: 0 to nodes - 1 */
  const int32_t *row_index_or_null; /* [rows]: the row of target; null: the row of the step */
  const float *temperature_or_null; /* [batch]; null: 1 */
  const int64_t *seeds_or_null;     /* [batch] */
  const int64_t *positions_or_null; /* [batch]: of the token after node 0 */
  const float *uniforms_or_null;    /* [batch, 3], in place of seeds: for the token that follows */
  int32_t *tokens;                  /* [batch, depth]: what is emitted, then -1 */
  int32_t *accepted_nodes_or_null;  /* [batch, depth]: nodes of the path up to the last that is accepted, then -1 */
  int32_t *emitted;                 /* [batch] */
  int32_t *accepted;                /* [batch]: how many drafts */
  int32_t *path_or_null;            /* [batch]: which path */
  int32_t *last_row_or_null;        /* [batch]: row of the step of the last accepted node */
  uint32_t *status;                 /* [batch] NXS_STATUS_* */
  void *workspace;                  /* 16-byte aligned: [rows, 8] words, then [rows, chunks, 4] f32 */
  uint32_t *counters;               /* [batch], all 0 before the first run and after each */
  int64_t target_stride_row;
  int64_t batch, vocab;             /* vocab from 1 to 2^24, batch up to 2^20 */
  int64_t target_rows;              /* fewer than 2^31 */
  int32_t nodes;                    /* 1 to 1024 */
  int32_t paths, depth;             /* 1 to 1024 each; without paths_or_null 1 and nodes */
  float epsilon, alpha;             /* accepted: p above min(epsilon, alpha * exp(-entropy)) */
  int32_t fallback;                 /* the token where none can be drawn */
  int32_t blocks;                   /* of the persistent grid */
  nxs_dtype dtype;                  /* NXS_F32, NXS_F16 or NXS_BF16 */
} nxs_typical_verify_params;

nxs_status nxs_typical_verify(const nxs_typical_verify_params *params, void *stream);

/*
 * Which tokens of a sequence under decoding are committed: those of which the model is sure, as described at
 * nextscale::verification::ConfidenceRank. `rows` is batch * length, `chunks` that of vocab.
 */
typedef struct nxs_confidence_rank_params {
  const void *logits;               /* [rows, vocab] dtype */
  const uint8_t *masked_or_null;    /* [rows]: 0 is decided already and not looked at; null: all are masked */
  const float *temperature_or_null; /* [batch], of the candidates; null: 0, the most probable token */
  const int32_t *top_k_or_null;     /* [batch] */
  const float *top_p_or_null;       /* [batch] */
  const float *min_p_or_null;       /* [batch] */
  const float *threshold_or_null;   /* [batch]: all whose confidence is above are committed; null: none is */
  const int32_t *counts;            /* [batch]: how many are committed where none is above; negative: all that are masked */
  const float *noise_or_null;       /* [batch]: the temperature of Gumbel noise on confidences; 0 and null: none */
  const int64_t *seeds_or_null;     /* [batch] */
  const int64_t *positions_or_null; /* [batch]: of row 0 */
  int32_t *tokens;                  /* [rows]: the candidate where it is committed, else -1 */
  int32_t *candidates_or_null;      /* [rows]: of masked rows, else -1 */
  float *confidence_or_null;        /* [rows]: of masked rows, else NaN */
  int32_t *committed;               /* [batch]: how many */
  uint32_t *status;                 /* [batch] NXS_STATUS_* */
  void *workspace;                  /* 16-byte aligned: [rows, 4] words, then for each block [chunks, 6] f32,
                                       rounded up to 16 bytes */
  uint32_t *counters;               /* [batch], all 0 before the first run and after each */
  int64_t stride_row;
  int64_t batch, length, vocab;     /* vocab from 1 to 2^24, batch up to 2^20, length 1 to 2^20, fewer than 2^31 rows */
  int32_t confidence;               /* NXS_CONFIDENCE_* */
  int32_t row_in_step;              /* 0 to 2^24 - 1: number of this step, which keeps draws of two steps apart */
  int32_t blocks;                   /* of the persistent grid */
  nxs_dtype dtype;                  /* NXS_F32, NXS_F16 or NXS_BF16 */
} nxs_confidence_rank_params;

nxs_status nxs_confidence_rank(const nxs_confidence_rank_params *params, void *stream);

/*
 * A token of each row of two heads, mixed by the row's gate before anything else: logit = second + gate * (first - second),
 * and -inf where either is. The rest is as in nxs_draft_sample.
 */
typedef struct nxs_gated_sample_params {
  const void *first, *second;       /* [rows, vocab] dtype */
  const float *gate;                /* [rows] */
  const float *temperature_or_null; /* [rows]; null: 1 */
  const int32_t *top_k_or_null;     /* [rows] */
  const float *top_p_or_null;       /* [rows] */
  const float *min_p_or_null;       /* [rows] */
  const int64_t *seeds_or_null;     /* [rows] */
  const int64_t *positions_or_null; /* [rows], of the step's first draft */
  const float *uniforms_or_null;    /* [rows, 3], in place of seeds */
  int32_t *tokens;                  /* [rows] */
  float *stats_or_null;             /* [rows, 4] as nxs_draft_sample's */
  uint32_t *status;                 /* [rows] NXS_STATUS_* */
  void *workspace;                  /* 8-byte aligned: [blocks, ceil(vocab / NXS_CHUNK_COLUMNS), 2] f32 */
  int64_t stride_row;               /* of both */
  int64_t rows, vocab;              /* vocab from 1 to 2^24, rows up to 2^20 */
  int32_t row_in_step;              /* 0 to 1023 */
  int32_t fallback;
  int32_t blocks;                   /* of the persistent grid */
  nxs_dtype dtype;                  /* NXS_F32, NXS_F16 or NXS_BF16 */
} nxs_gated_sample_params;

nxs_status nxs_gated_sample(const nxs_gated_sample_params *params, void *stream);

/*
 * One of a request's candidates, by the softmax of score / temperature (importance resampling: scores are logarithms of
 * weights), or the one of the greatest score (best of n), and its tokens.
 */
typedef struct nxs_select_candidate_params {
  const float *scores;              /* [batch, candidates]; NaN and -inf are never selected */
  const int32_t *sequences_or_null; /* [batch, candidates, length] */
  const float *temperature_or_null; /* [batch]; null: 1; below 1e-5: the greatest, of ties the first */
  const int64_t *seeds_or_null;     /* [batch] */
  const int64_t *positions_or_null; /* [batch] */
  const float *uniforms_or_null;    /* [batch, 3], in place of seeds */
  int32_t *parents;                 /* [batch]: which; 0 where none can be selected */
  int32_t *selected_or_null;        /* [batch, length]: its sequence; goes with sequences_or_null */
  uint32_t *status;                 /* [batch] NXS_STATUS_*, the scores being the target */
  int64_t batch, candidates, length; /* batch up to 2^20, candidates 1 to NXS_CHUNK_COLUMNS, length from 0 on */
} nxs_select_candidate_params;

nxs_status nxs_select_candidate(const nxs_select_candidate_params *params, void *stream);

/* What is emitted, appended to sequences; the token `backspace` takes the last one away instead, down to `least`. */
typedef struct nxs_backspace_params {
  const int32_t *emitted;       /* [batch, most]; up to the first that is negative */
  const int32_t *least_or_null; /* [batch]: tokens that are never taken away; null: 0 */
  int32_t *sequences;           /* [batch, capacity], read and written */
  int32_t *lengths;             /* [batch], read and written; those outside 0 to capacity are taken for the nearest of these */
  int32_t *kept;                /* [batch]: the least length on the way: what of a cache remains */
  uint32_t *status;             /* [batch] NXS_STATUS_SEQUENCE_FULL or 0 */
  int64_t batch, most, capacity; /* each from 0 to 2^31 - 1 */
  int32_t backspace;            /* from 0 on */
} nxs_backspace_params;

nxs_status nxs_backspace(const nxs_backspace_params *params, void *stream);

/*
 * The best continuations of a request's beams: of all (beam, token), those of the greatest score + ln p(token), p the
 * softmax of the beam's row; of ties the lower beam, then the more probable token, then the lower one.
 */
typedef struct nxs_beam_rank_params {
  const void *logits;          /* [batch * beams, vocab] dtype */
  const float *scores;         /* [batch, beams]: sums of ln p so far; NaN and -inf: a beam that is not there */
  const float *temperature_or_null; /* [batch]; null: 1; below 1e-5: 1e-5 */
  int32_t *parents;            /* [batch, width]: beams, for the cache to follow; -1 where there are no more */
  int32_t *tokens;             /* [batch, width], or -1 */
  float *best;                 /* [batch, width]: their scores, or -inf */
  uint32_t *status;            /* [batch] NXS_STATUS_* */
  void *workspace;             /* 16-byte aligned: for each row 2 * width + 2 words, then
                                  [blocks, ceil(vocab / NXS_CHUNK_COLUMNS), 2] f32 */
  uint32_t *counters;          /* [batch], all 0 before the first run and after each */
  int64_t stride_row;
  int64_t batch, vocab;        /* vocab from 1 to 2^24, batch up to 2^20 */
  int32_t beams, width;        /* 1 to 32 each */
  int32_t blocks;              /* of the persistent grid */
  nxs_dtype dtype;             /* NXS_F32, NXS_F16 or NXS_BF16 */
} nxs_beam_rank_params;

nxs_status nxs_beam_rank(const nxs_beam_rank_params *params, void *stream);

/* ---- compression: drift, select, compact -------------------------------------------------------------------- */

/*
 * Whether the features of a chunk have changed enough to be computed anew (FlowCache, arXiv 2602.10825; TeaCache,
 * arXiv 2411.19108). For each chunk that is tested
 *   change = mean|features - previous| / (mean|previous| + eps);  rescaled = polynomial(change), or change
 *   accumulated + rescaled < threshold:  accumulated += rescaled, decision = 0 (reuse)
 *   else                                 accumulated = 0,         decision = 1 (compute)
 * Not tested, decision = 1: force is NXS_DRIFT_COMPUTE, or steps < compute_before, or steps >= compute_from (accumulated stays
 * as it is, or becomes 0 with reset_forced); else steps < warmup (accumulated becomes 0). Every call adds 1 to steps.
 */
#define NXS_DRIFT_TEST 0
#define NXS_DRIFT_COMPUTE 1
#define NXS_DRIFT_LEAVE 2 /* nothing of the chunk is read or written */
#define NXS_DRIFT_SLAB 16384 /* elements whose differences a block adds */
#define NXS_DRIFT_TERMS 8

typedef struct nxs_drift_params {
  const void *features;         /* [chunks, elements] dtype */
  void *previous;               /* [chunks, elements] dtype: the features of the step before; written over if keep */
  float *accumulated;           /* [chunks], 0 before a chunk's first step */
  int32_t *steps;               /* [chunks], 0 before a chunk's first step */
  const int32_t *force_or_null; /* [chunks] NXS_DRIFT_*; null: NXS_DRIFT_TEST */
  int32_t *decision;            /* [chunks] 1: compute, 0: reuse */
  float *change_or_null;        /* [chunks], before the polynomial; NaN where nothing was tested */
  void *workspace;              /* [chunks, ceil(elements / NXS_DRIFT_SLAB), 2] f32, 8-byte aligned */
  uint32_t *counters;           /* [chunks], all 0 before the first run and after each */
  int64_t features_stride_chunk, previous_stride_chunk;
  int64_t chunks, elements;     /* chunks < 65536; fewer than 2^31 slabs a chunk */
  double eps;
  double polynomial[NXS_DRIFT_TERMS]; /* coefficients, of the highest power first */
  int32_t polynomial_terms;     /* 0: none */
  float threshold;
  int32_t warmup;
  int32_t compute_before, compute_from;
  int32_t reset_forced;
  int32_t keep;                 /* previous = features */
  int32_t vector;               /* 16 bytes at a time: addresses and strides allow it */
  nxs_dtype dtype;              /* NXS_F32, NXS_F16 or NXS_BF16 */
} nxs_drift_params;

nxs_status nxs_drift(const nxs_drift_params *params, void *stream);

/*
 * The tokens to keep: score = lambda * importance - (1 - lambda) * redundancy, or the one that is given (redundancy negated), or 0;
 * averaged over the heads of a set and added over sets, as the scope says; then averaged over blocks of `block` tokens. To an
 * item (token or block): minus the least finite score of the list with `relative`, times its weight, minus `demotion` if it is
 * one of the first `demoted`. The first `sink` and the last `recent` tokens of a list are kept, then the items of the
 * greatest scores, until the budget is used; of equal ones the oldest, or the newest. NaN is less than every number. The
 * `active` tokens after the list are kept too and do not count.
 * A list is what shares one set of kept tokens: (set, head), set, or all. Lists are [sets, heads], [sets] or [1].
 */
#define NXS_SELECT_PER_HEAD 0
#define NXS_SELECT_PER_SET 1
#define NXS_SELECT_SHARED 2
#define NXS_SELECT_ADA 3 /* lists are (set, head); the budget of a set is split over its heads by their scores */

/* Bits of a list's status. */
#define NXS_SELECT_NAN 1u     /* a score was NaN: its token is kept only where numbers do not fill the budget */
#define NXS_SELECT_CLAMPED 2u /* a length or a budget was out of range, and was clamped */

typedef struct nxs_select_params {
  const float *importance_or_null; /* [sets, heads, tokens] */
  const float *redundancy_or_null; /* [sets, heads, tokens] */
  const float *weights_or_null;    /* [items], items being ceil(tokens / block); null: 1 */
  const int32_t *lengths_or_null;  /* [lists], 0 to tokens; null: length */
  const int32_t *budgets_or_null;  /* [lists], 0 to capacity - active; null: budget */
  int32_t *indices;                /* [lists, capacity] ascending, -1 after them */
  int32_t *counts;                 /* [lists]; with first_rows > 0 also read: see there */
  uint32_t *status_or_null;        /* [lists] NXS_SELECT_* */
  void *workspace_or_null;         /* 16-byte aligned. If the scope is PER_SET or SHARED, or block > 1: [lists, items rounded up
                                      to 4] f32; if block > 1: [lists, items] i32; with NXS_SELECT_ADA: [lists] i32 */
  int64_t importance_stride_set, importance_stride_head;
  int64_t redundancy_stride_set, redundancy_stride_head;
  int64_t sets, heads, tokens;     /* tokens < 2^30, sets * heads < 2^31; with NXS_SELECT_ADA heads <= 1024, heads * tokens < 2^30 */
  int64_t capacity;                /* fewer than 2^30 */
  int32_t scope;                   /* NXS_SELECT_* */
  int32_t first_rows;              /* the first rows of a list are what a compression left, counts[list] of them (clamped into 0 to
                                      first_rows), and the other tokens - first_rows follow at row first_rows. 0: no compression
                                      has been. Else lengths are null and length is tokens; indices are rows, as in
                                      nxs_key_places */
  int32_t length, budget;
  int32_t sink, recent, active;
  int32_t block;                   /* tokens that are kept or dropped together; 0 and 1: each for itself */
  float lambda;
  int32_t relative;
  int32_t demoted;                 /* items */
  float demotion;
  int32_t newest;                  /* of equal scores the newest are kept */
  int32_t floor_alpha;             /* with NXS_SELECT_ADA: of 65536, the part of the budget that is split evenly */
  int32_t shared_bytes;            /* of shared memory that a block may have, 16384 or more: lists whose scores do not fit are
                                      read several times */
  int32_t threads;                 /* of a block: 128, 256 or 512 */
} nxs_select_params;

nxs_status nxs_select(const nxs_select_params *params, void *stream);

/*
 * Rows of K and V gathered by indices: out[s, r, h, :] = input[s, indices[s, h, r], h, :] for r < counts[s, h], converted, and
 * with them 4-byte values that belong to rows. A row lies at place `row` of its tensor, or with a page table at place
 * pages[s, row / page_rows] * page_rows + row % page_rows. Without an input a tensor is compacted where it lies: indices
 * then ascend strictly. K may be turned to new positions: row r gets position first_position + r, and is rotated by the
 * difference from its old one, which is positions[s, row, h], or the row where there are none.
 */
#define NXS_COMPACT_EXTRAS 4
#define NXS_COMPACT_ROW_CLAMPED 1u      /* flags: an index was out of range, or in place less than its target */
#define NXS_COMPACT_POSITION_CLAMPED 2u /* flags: a rotation was out of the table */
#define NXS_COMPACT_COUNT_CLAMPED 4u    /* flags: a count was out of range */

typedef struct nxs_compact_tensor {
  const void *input_or_null;  /* [sets, rows, heads, dim] in_dtype; null: in place */
  void *out_or_null;          /* [sets, rows, heads, dim] out_dtype; null: no such tensor */
  int64_t input_stride_set, input_stride_row, input_stride_head;
  int64_t out_stride_set, out_stride_row, out_stride_head;
  int64_t dim;                /* 1 to 1024 */
} nxs_compact_tensor;

/* A value of 4 bytes for each row and head. */
typedef struct nxs_compact_extra {
  const void *input_or_null; /* [sets, rows, heads]; null: in place */
  void *out_or_null;         /* [sets, rows, heads] */
  int64_t input_stride_set, input_stride_row, input_stride_head;
  int64_t out_stride_set, out_stride_row, out_stride_head;
} nxs_compact_extra;

typedef struct nxs_compact_params {
  nxs_compact_tensor tensor[2];        /* K, V */
  nxs_compact_extra positions;         /* i32; in place out is read too, else without input a row's position is the row */
  nxs_compact_extra extra[NXS_COMPACT_EXTRAS];
  const int32_t *indices;              /* [sets, heads, kept], contiguous along kept */
  const int32_t *counts_or_null;       /* [sets, heads]; null: kept */
  const int32_t *input_pages_or_null;  /* [sets, pages] */
  const int32_t *out_pages_or_null;    /* [sets, pages] */
  const float *cos_or_null;            /* [table_rows, rotary_dim / 2]: row p has the angles of position p */
  const float *sin_or_null;
  uint32_t *flags_or_null;             /* [1] NXS_COMPACT_* */
  int64_t indices_stride_set, indices_stride_head; /* 0: shared */
  int64_t counts_stride_set, counts_stride_head;
  int64_t input_pages_stride_set, out_pages_stride_set;
  int64_t table_stride_row, table_rows;
  int64_t sets, heads, tokens, kept;   /* tokens < 2^31, kept <= tokens, heads * kept < 2^31 */
  int64_t input_rows, out_rows;        /* places of a tensor, for each set; in place they are equal */
  int64_t page_rows;                   /* with page tables */
  int64_t first_position;
  int32_t renumber;                    /* new positions from first_position on; with rotary_dim > 0 K is rotated */
  int32_t rope;                        /* NXS_ROPE_INTERLEAVED or NXS_ROPE_HALF */
  int32_t rotary_dim;
  int32_t in_place;
  int32_t slices;                      /* in place: blocks that share a (set, head, tensor), 1 to 64 */
  int32_t unit;                        /* bytes of a move where dtypes are equal and nothing is rotated: 1, 2, 4, 8, 16; else
                                          8, 2 or 1 elements (1: nothing is rotated) */
  int32_t log2_lanes;                  /* threads that share a row: 0 to 5 */
  nxs_dtype in_dtype, out_dtype;       /* equal, or each NXS_F32, NXS_F16 or NXS_BF16 */
} nxs_compact_params;

nxs_status nxs_compact(const nxs_compact_params *params, void *stream);

/*
 * Verification of trees of drafts. Node 0 of a request is its root, the last certain token; node n is row
 * cu_rows[b] + n of the step, and comes after its parent. The walk begins at the root; at a node of depth d with the
 * target's distribution p, s the sum of what is left and c 0:
 *   NXS_RULE_GREEDY, NXS_RULE_MATCH   x = argmax p or x ~ p; on to the first child that is x, else x ends the step
 *   NXS_RULE_REJECT                   each child in turn: u q(x) < max(p(x) - c q(x), 0) / s, and on to it; else c += s / l,
 *                                     s = sum of max(p - c q, 0); after the last one a token of max(p - c q, 0) ends the step
 * l is 1, or without replacement what q leaves beside the children tried. At a leaf a token of p ends the step. Where
 * drafts are not random, or the drafter is greedy, NXS_RULE_REJECT is NXS_RULE_MATCH, which has the same law.
 * `rows` below is batch * max_nodes.
 */
typedef struct nxs_tree_verify_params {
  const void *target;                      /* [target_rows, vocab] target_dtype: raw logits */
  const void *draft_or_null;               /* [draft_rows, draft_vocab] draft_dtype: raw logits; null: drafts are not random */
  const int32_t *cu_rows_or_null;          /* [batch + 1], ascending; null: request b has rows b * max_nodes and on */
  const int32_t *parents_or_null;          /* [rows]: each node's parent by its number in the tree; -1: root, or no node */
  const int32_t *first_child_or_null;      /* [rows], with next_sibling_or_null in place of parents; -1: none */
  const int32_t *next_sibling_or_null;     /* [rows] */
  const int32_t *drafts;                   /* [rows]: each node's token; outside the vocabulary: no draft */
  const int32_t *row_index_or_null;        /* [rows]: the row of target; null: r */
  const int32_t *draft_row_or_null;        /* [rows]: the row of draft that the node's children were drawn from; null: r */
  const float *draft_stats_or_null;        /* [draft_rows, 4] of nxs_draft_sample: rows of draft are not swept for them */
  const int32_t *target_to_draft_or_null;  /* [vocab] */
  const float *target_stats_or_null;       /* [target_rows, chunks, 2]: partials; rows of target are not swept */
  const uint32_t *allow_or_null;           /* [rows, ceil(vocab / 32)] */
  const int32_t *rules_or_null;            /* [batch] NXS_RULE_*; null, and what is none of three: rule */
  const float *temperature_or_null;        /* [batch]; null: 1 */
  const float *draft_temperature_or_null;  /* [batch]; null: temperature */
  const int32_t *top_k_or_null;            /* [batch] */
  const float *top_p_or_null;              /* [batch] */
  const float *min_p_or_null;              /* [batch] */
  const int64_t *seeds_or_null;            /* [batch] */
  const int64_t *positions_or_null;        /* [batch]: of the token after the root */
  const float *uniforms_or_null;           /* [rows, 4] by request and node: the node's test, three for a token after it */
  const int32_t *kv_start_or_null;         /* [batch]: node n lies in row kv_start + n of the cache; null: 0 */
  const int32_t *kv_slots_or_null;         /* [rows]: where each node lies; in place of kv_start */
  int32_t *tokens;                         /* [batch, max_depth + 1], -1 after what is emitted */
  int32_t *emitted;                        /* [batch] */
  int32_t *accepted;                       /* [batch] */
  uint32_t *status;                        /* [batch] NXS_STATUS_* */
  int32_t *last_row_or_null;               /* [batch]: the row of the step that the walk ended at */
  int32_t *path_or_null;                   /* [batch, max_depth + 1]: the root and the nodes accepted, then -1 */
  int32_t *kv_source_or_null;              /* [batch, max_depth + 1]: the cache's row of each of them, then -1 */
  int32_t *kv_destination_or_null;         /* [batch, max_depth + 1]: where nodes 0, 1, .. lie, then -1 */
  float *log_probs_or_null;                /* [batch, max_depth + 1], NaN after what is emitted */
  void *workspace;                         /* 16-byte aligned: [batch, NXS_TREE_STATE_BYTES], then [batch, 4, chunks of target and
                                              of draft, 2] f32 */
  int64_t target_stride_row, draft_stride_row, allow_stride_row;
  int64_t batch, vocab, draft_vocab;       /* vocabularies from 1 to 2^24, batch up to 2^20 */
  int64_t target_rows, draft_rows;         /* fewer than 2^31 */
  int32_t max_nodes;                       /* 1 to 1024, the root among them */
  int32_t max_depth;                       /* 0 to 64 drafts on a path */
  int32_t rule;                            /* NXS_RULE_GREEDY, NXS_RULE_MATCH or NXS_RULE_REJECT */
  int32_t without_replacement;             /* 1: the children of a node are distinct draws */
  int32_t fallback;                        /* the token where none can be drawn */
  int32_t cluster;                         /* blocks that share a request: 1, on sm_90 also 2, 4, 8 or 16 */
  int32_t shared_partials;                 /* 1: partials are passed on in shared memory; up to 1024 chunks of target and draft */
  nxs_dtype target_dtype, draft_dtype;     /* NXS_F32, NXS_F16 or NXS_BF16 */
} nxs_tree_verify_params;

#define NXS_TREE_STATE_BYTES 16

nxs_status nxs_tree_verify(const nxs_tree_verify_params *params, void *stream);

/*
 * What the nodes of trees of drafts need, from their parents; and before it the choice of `nodes` of them by scores
 * (EAGLE-2). A candidate that is chosen brings its parent; the order is kept. The root is always chosen.
 *   value(i) = score[i], or with `cumulative` 0 value(parent) + score[i]; the root's is 0
 *   rank by min(value(i), that of the parent), greatest first, the lower number at ties; NaN as -inf
 */
typedef struct nxs_tree_build_params {
  const int32_t *cu_rows_or_null;   /* [batch + 1], ascending; null: request b has rows b * candidates and on */
  const int32_t *parents;           /* [batch * candidates]: by number in the tree; -1: root, or no node */
  const int32_t *drafts_or_null;    /* [batch * candidates]: tokens */
  const float *scores_or_null;      /* [batch * candidates]; null: all candidates are nodes, candidates = nodes */
  const int64_t *positions_or_null; /* [batch]: of the root; null: 0 */
  int32_t *counts_or_null;          /* [batch]: nodes of each tree */
  int32_t *selected_or_null;        /* [batch, nodes]: the candidate that each node is; these and below -1 where no node is */
  int32_t *parents_or_null;         /* [batch, nodes] */
  int32_t *drafts_out_or_null;      /* [batch, nodes]; with drafts_or_null */
  int32_t *first_child_or_null;     /* [batch, nodes] */
  int32_t *next_sibling_or_null;    /* [batch, nodes] */
  int32_t *depths_or_null;          /* [batch, nodes] */
  int64_t *node_positions_or_null;  /* [batch, nodes]: position of the root + depth; where no node is, that of the root */
  uint32_t *mask_or_null;           /* [batch, nodes, ceil(nodes / 32)]: bit j % 32 of word j / 32: whether j is the node or on
                                       the path to it; 0 where no node is */
  int32_t *paths_or_null;           /* [batch, leaves, max_depth + 1]: nodes from the root to each leaf, in order of trial */
  int32_t *leaf_counts_or_null;     /* [batch] */
  uint32_t *status;                 /* [batch]: NXS_STATUS_TREE_BAD, NXS_STATUS_DRAFTS_IGNORED */
  int64_t batch;                    /* up to 2^20 */
  int32_t candidates;               /* 1 to 2048 */
  int32_t nodes;                    /* 1 to 1024, at most candidates */
  int32_t leaves;                   /* 1 to nodes */
  int32_t max_depth;                /* 0 to 64; deeper candidates are ignored */
  int32_t cumulative;               /* 1: scores are sums over the path already */
} nxs_tree_build_params;

nxs_status nxs_tree_build(const nxs_tree_build_params *params, void *stream);
/* ---- compression: pack --------------------------------------------------------------------------------------- */

/*
 * Keys and values in few bits, and back. A slot holds the codes of one row (token) and head, element k of `bits` bits at bit
 * k * bits of its little-endian bytes; numbers that a slot's codes are scaled by lie in an array or, inline, at the next
 * multiple of 16 bytes after the codes, with zeroes before and after up to 16 bytes. n there are for each row, head and group:
 *   NXS_PACK_FP8        n 1  x = code * scale, code e4m3;          scale = max(greatest |x| / 448, 2^-96) to 17 bits
 *   NXS_PACK_INT8       n 1  x = code * scale, code -127 to 127;   scale = max(greatest |x| / 127, 2^-96) to 17 bits
 *   NXS_PACK_UNIFORM    n 2  x = code * scale + min, of `group` elements; scale = (max - min) / (2^bits - 1) to 17 bits, 0
 *                            where it is below 2^-126, and then all codes are 0
 *   NXS_PACK_CHANNEL    n 2  the same, of each element of a head over `group` rows: arrays are [sets, rows / group, heads, dim, 2]
 *   NXS_PACK_LLOYD_MAX  n 1  x = norm / sqrt(dim) * centroid: with half = 2^(bits - 1) and c = code - half, of code >= half
 *                            centroids[c], else -centroids[-1 - c]. c counts the thresholds below |x| sqrt(dim) / |row|
 * Codes are rounded to nearest even from x * (1 / scale) or (x - min) * (1 / scale), with scale and min as they are stored, and
 * clamped. To 17 bits: to nearest, ties away from 0. A min of -0 is stored as +0. Numbers stored as f16 are clamped to +-65504.
 * With rotate, x is R applied to the row: signs (element k negated where bit k % 32 of signs[k / 32] is set), then a
 * Walsh-Hadamard transform in natural order, by sums and differences of elements 1, 2, 4, ... apart, of each block of b elements,
 * b being the greatest power of two that divides dim, times 1 / sqrt(b) rounded to f32.
 * Before all this a NaN counts as 0, and what is 2^59 or more in magnitude as the greatest magnitude below 2^59 in its row (its
 * element's group of rows for NXS_PACK_CHANNEL), with its sign; NXS_PACK_NOT_FINITE is then OR-ed into *flags_or_null.
 */
#define NXS_PACK_FP8 0
#define NXS_PACK_INT8 1
#define NXS_PACK_UNIFORM 2
#define NXS_PACK_CHANNEL 3
#define NXS_PACK_LLOYD_MAX 4

#define NXS_PACK_NOT_FINITE 1u    /* flags: an element was NaN, or 2^59 or more */
#define NXS_PACK_ROW_CLAMPED 2u   /* flags: a kept index was outside the tokens, and was clamped */
#define NXS_PACK_COUNT_CLAMPED 4u /* flags: a count was outside 0 to rows, and was clamped */

typedef struct nxs_pack_params {
  void *unpacked;               /* [sets, tokens, heads, dim] dtype, read; to unpack [sets, rows, heads, dim], written */
  uint8_t *codes;               /* [sets, rows, heads, slot], strides in bytes; inline: 16-byte aligned, and its strides */
  void *numbers_or_null;        /* [sets, rows, heads, groups, n] or as above, numbers_dtype; null: inline, or given */
  const float *scales_or_null;  /* [sets, heads]: given, of NXS_PACK_FP8 and NXS_PACK_INT8; one that is not positive and
                                   finite makes codes of 0 */
  const int32_t *kept_or_null;  /* [sets, heads, rows], contiguous along rows: the token of a row; null: the row. Pack only */
  const int32_t *counts_or_null; /* [sets, heads]: rows that there are, others are left alone; null: rows */
  uint32_t *flags_or_null;      /* [1]; only ever OR-ed into */
  int64_t unpacked_stride_set, unpacked_stride_row, unpacked_stride_head;
  int64_t codes_stride_set, codes_stride_row, codes_stride_head;
  int64_t numbers_stride_set, numbers_stride_row, numbers_stride_head; /* row: of the group of rows for NXS_PACK_CHANNEL */
  int64_t scales_stride_set, scales_stride_head;
  int64_t kept_stride_set, kept_stride_head;
  int64_t counts_stride_set, counts_stride_head;
  int64_t sets, tokens, rows;   /* sets < 65536, tokens < 2^31; rows * heads < 2^31, for NXS_PACK_CHANNEL rows a multiple of group */
  int32_t heads, dim;           /* dim: a multiple of 8 up to 256 */
  int32_t format;               /* NXS_PACK_* */
  int32_t bits;                 /* 8 of the first two; 2, 3, 4 or 8; of NXS_PACK_LLOYD_MAX 2, 3 or 4 */
  int32_t group;                /* NXS_PACK_UNIFORM: dim, or a power of two from 8 that divides it; NXS_PACK_CHANNEL: 32, 64 or 128 */
  int32_t renormalize;          /* NXS_PACK_LLOYD_MAX: the norm stored is times sqrt(dim) / |centroids of the codes| */
  int32_t rotate;               /* not for NXS_PACK_CHANNEL */
  int32_t unpack;
  int32_t vector;               /* 1: unpacked and its strides are multiples of 16 bytes, codes and their strides of `bits` */
  uint32_t signs[8];
  float centroids[8];           /* the positive ones, 2^(bits - 1), ascending, for N(0, 1) */
  float thresholds[7];          /* between them */
  nxs_dtype dtype;              /* NXS_F32, NXS_F16 or NXS_BF16 */
  nxs_dtype numbers_dtype;      /* NXS_F32; of the last three formats also NXS_F16 */
} nxs_pack_params;

nxs_status nxs_pack(const nxs_pack_params *params, void *stream);

/* out = R input, as nxs_pack rotates, or with inverse its transpose; rounded once. */
typedef struct nxs_rotate_params {
  const void *input;            /* [batch, rows, heads, dim] dtype */
  void *out;                    /* [batch, rows, heads, dim] dtype */
  int64_t input_stride_batch, input_stride_row, input_stride_head;
  int64_t out_stride_batch, out_stride_row, out_stride_head;
  int64_t batch, rows;          /* batch < 65536, rows * heads < 2^31 */
  int32_t heads, dim;           /* dim: a multiple of 8 up to 256 */
  int32_t inverse;
  int32_t vector;               /* 1: addresses and strides are multiples of 16 bytes */
  uint32_t signs[8];
  nxs_dtype dtype;              /* NXS_F32, NXS_F16 or NXS_BF16 */
} nxs_rotate_params;

nxs_status nxs_rotate(const nxs_rotate_params *params, void *stream);

/* ---- compression: importance, redundancy ---------------------------------------------------------------------- */

/*
 * Where the keys of a cache lie that is read in place: row j of a set and head in a pool of pages, or j itself. The first
 * first_rows rows are what a compression left: a head has kept[set, head] of them, and the others follow at row first_rows.
 *   f = kept ? clamp(kept[set, head], 0, first_rows) : first_rows;   row(j) = j < f ? j : j + first_rows - f
 *   place(row) = pages ? pages[set, row / page_rows] * page_rows + row % page_rows : row
 * Key j of an op is then k[set, place(row(j)), head]. With `kept` a head has tokens - first_rows + f keys, and `lengths` are null.
 */
typedef struct nxs_key_places {
  const int32_t *pages_or_null;  /* [sets, ceil(tokens / page_rows)]: pages, clamped into 0 to pool_pages */
  const int32_t *kept_or_null;   /* [sets, heads]; only with pages */
  int64_t pages_stride_set;
  int64_t kept_stride_set, kept_stride_head;
  int32_t page_rows, pool_pages; /* of pages: at least 1 each */
  int32_t first_rows;            /* a multiple of page_rows, up to tokens; 0: no compression has been */
} nxs_key_places;

/*
 * Importance of cached keys: column scores of softmax(scale * Q K^T) over the keys of a set, one set (a layer of a
 * sequence) and KV head at a time; no matrix is ever stored. With s[g, i, j] = scale * q[i, h * groups + g, :] . k[j, h, :]
 * for the visible keys j of query i, that is j < length - excluded, and with `causal` also j <= length - queries + i:
 *   NXS_IMPORTANCE_MAX_LOGIT  x[i, j] = softmax over j of (max over g of s[g, i, j])
 *   NXS_IMPORTANCE_MEAN_PROB  x[i, j] = sum over g of softmax over j of s[g, i, j]
 *   NXS_IMPORTANCE_MAX_PROB   x[i, j] = max over g of softmax over j of s[g, i, j]
 *   NXS_IMPORTANCE_LOGIT      x[i, j] = sum over g of s[g, i, j]
 * and 0 where j is not visible:
 *   raw[j] = factor * sum over i of x[i, j]          for j < scored = length - excluded - unscored
 *   scores[set, h, j] = pool(raw)[j], plus the old scores[set, h, j] with `accumulate`; 0 (nothing) for j >= scored
 * pool: maximum or average over pool_width columns around j; an average counts columns beyond either end as 0 and divides
 * by pool_width. Columns listed in `masked` are -inf before the pooling. A query that sees no key adds nothing.
 * A NaN makes the scores of its set and head NaN and no other's.
 *
 * Schedule: two passes, each a grid of blocks over all sets and heads. Statistics: tiles of stat_rows queries (MAX_LOGIT) or
 * rows, a row being (query, group), times stat_splits spans of stat_span keys. Columns: spans of sum_span keys times sum_splits
 * spans of sum_rows_split queries or rows, taken sum_rows at a time. Then, if needed, a pass that adds splits, masks and pools.
 */
#define NXS_IMPORTANCE_MAX_LOGIT 0
#define NXS_IMPORTANCE_MEAN_PROB 1
#define NXS_IMPORTANCE_MAX_PROB 2
#define NXS_IMPORTANCE_LOGIT 3
#define NXS_POOL_NONE 0
#define NXS_POOL_MAX 1
#define NXS_POOL_AVERAGE 2

typedef struct nxs_importance_params {
  const void *q;                  /* [sets, q_rows, heads * groups, dim] dtype; 16-byte aligned, as is k */
  const void *k;                  /* [sets, tokens, heads, dim] dtype */
  float *scores;                  /* [sets, heads, tokens], tokens contiguous */
  const int32_t *rows_or_null;    /* [queries]: the row of q that query i is; null: i. Clamped into q */
  const int32_t *masked_or_null;  /* [masked]: columns; those outside a set are ignored */
  const int32_t *lengths_or_null; /* [sets, heads]: keys there are, clamped into 0 to tokens; null: tokens */
  const float *lse_or_null;       /* [sets, heads * groups, queries]: natural log of each row's sum of exponentials over the
                                     visible keys, every dimension strided; takes the place of the first pass. Not with LOGIT, with
                                     MAX_LOGIT only where groups are 1 */
  float *stats_or_null;           /* workspace, 16-byte aligned: [sets, heads, rows] log2 of sums where stat_splits are 1, else
                                     [stat_splits, sets, heads, rows, 2] maxima and sums; rows: queries (MAX_LOGIT) or
                                     queries * groups. Not read with LOGIT or lse */
  float *sums_or_null;            /* workspace, 16-byte aligned: [sum_splits, sets, heads, tokens]; null: the second pass writes
                                     scores itself (sum_splits 1, no pool, nothing masked) */
  int64_t q_stride_set, q_stride_row, q_stride_head;   /* multiples of 8, as are those of k */
  nxs_key_places places;           /* of k; with pages its second dimension is that of the pool, pool_pages * page_rows */
  int64_t k_stride_set, k_stride_token, k_stride_head;
  int64_t scores_stride_set, scores_stride_head;
  int64_t lengths_stride_set, lengths_stride_head;
  int64_t lse_stride_set, lse_stride_head, lse_stride_query;
  int64_t sets, tokens, queries, q_rows; /* tokens, and queries * groups, below 2^31 - 2^16 */
  int32_t heads, groups, dim;     /* KV heads; query heads of each, up to 16 but with MEAN_PROB any; dim: 64, 96 or 128 */
  int32_t aggregation;            /* NXS_IMPORTANCE_ */
  int32_t causal;                 /* 1: query i sees keys up to length - queries + i: the queries are those of the last keys */
  int32_t excluded, unscored;     /* trailing keys that are left out; that are seen but not scored */
  int32_t pool, pool_width;       /* NXS_POOL_; width: odd, 1 to 63 */
  int32_t masked;                 /* 0 to 1024 */
  int32_t protect;                /* 1: scores of masked columns are +inf */
  int32_t accumulate;             /* 1: adds to the scores there are; then nothing may be masked */
  nxs_dtype dtype;                /* NXS_BF16 or NXS_F16 */
  int32_t variant;                /* 0: portable (sm_80); 1: Hopper (sm_90a) */
  float scale;                    /* of the logits; > 0 */
  float factor;                   /* of the sums: 1, or 1 over what a mean divides by */
  int32_t stat_rows, stat_span, stat_splits; /* see NXS_IMPORTANCE_ limits in the launcher: multiples of 8, 256 and 1 */
  int32_t sum_rows, sum_span, sum_rows_split, sum_splits;
} nxs_importance_params;

nxs_status nxs_importance(const nxs_importance_params *params, void *stream);

/*
 * Norms of keys, as they are appended: with u[j] = k[j] / (|k[j]| + eps), for j < length
 *   inverse_norms[set, h, j] = 1 / (|k[j]| + eps);  unit_sum[set, h, :] = sum over j of u[j], plus what it was with `accumulate`
 * in f32; the sum in a fixed order: spans of `span` keys, then the spans ascending. A zero key has a unit vector of 0.
 */
typedef struct nxs_key_norms_params {
  const void *k;                  /* [sets, tokens, heads, dim] dtype, the keys that are new; 16-byte aligned */
  float *inverse_norms;           /* [sets, heads, tokens], tokens contiguous; 0 for j >= length */
  float *unit_sum;                /* [sets, heads, dim] */
  const int32_t *lengths_or_null; /* [sets, heads], clamped into 0 to tokens; null: tokens */
  float *parts;                   /* workspace, 16-byte aligned: [sets, heads, spans, dim] */
  nxs_key_places places;           /* of k; with pages its second dimension is that of the pool, pool_pages * page_rows */
  int64_t k_stride_set, k_stride_token, k_stride_head;  /* multiples of 8 */
  int64_t norms_stride_set, norms_stride_head;
  int64_t sum_stride_set, sum_stride_head;
  int64_t lengths_stride_set, lengths_stride_head;
  int64_t sets, tokens;
  int32_t heads, dim;             /* dim: 64, 96 or 128 */
  int32_t span;                   /* a multiple of 64 */
  int32_t accumulate;
  nxs_dtype dtype;                /* NXS_BF16 or NXS_F16 */
  float eps;                      /* >= 0 */
} nxs_key_norms_params;

nxs_status nxs_key_norms(const nxs_key_norms_params *params, void *stream);

/*
 * Redundancy of cached keys, from what nxs_key_norms has left: u[j] = k[j] * inverse_norms[j], n = length,
 *   NXS_REDUNDANCY_COSINE   u[j] . unit_sum / |unit_sum|             the cosine to the mean of the unit keys; 0 where either is 0
 *   NXS_REDUNDANCY_SOFTMAX  softmax over j of (u[j] . unit_sum / n)
 *   NXS_REDUNDANCY_SIMILAR  softmax over j of (sum over i != j with retain(i) != j of u[i] . u[j]) / n
 * retain(i): of the j != i with u[i] . u[j] > threshold, the nth from the last on (the first one with `first`); where there
 * are fewer, 0 with `lonely`, else none. 0 for j >= length.
 */
#define NXS_REDUNDANCY_COSINE 0
#define NXS_REDUNDANCY_SOFTMAX 1
#define NXS_REDUNDANCY_SIMILAR 2

typedef struct nxs_redundancy_params {
  const void *k;                  /* [sets, tokens, heads, dim] dtype; 16-byte aligned */
  const float *inverse_norms;     /* [sets, heads, tokens], tokens contiguous */
  const float *unit_sum;          /* [sets, heads, dim] */
  float *scores;                  /* [sets, heads, tokens], tokens contiguous */
  const int32_t *lengths_or_null; /* [sets, heads], clamped into 0 to tokens; null: tokens */
  float *parts_or_null;           /* workspace of SOFTMAX, 16-byte aligned: [sets, heads, spans] */
  void *retained_or_null;         /* workspace of SIMILAR, 16-byte aligned: [sets, heads, tokens to an even number] of 8 bytes:
                                     retain i32 (-1: none), its cosine f32 */
  nxs_key_places places;           /* of k; with pages its second dimension is that of the pool, pool_pages * page_rows */
  int64_t k_stride_set, k_stride_token, k_stride_head;  /* multiples of 8 */
  int64_t norms_stride_set, norms_stride_head;
  int64_t sum_stride_set, sum_stride_head;
  int64_t scores_stride_set, scores_stride_head;
  int64_t lengths_stride_set, lengths_stride_head;
  int64_t sets, tokens;           /* tokens: with SIMILAR up to NXS_REDUNDANCY_SIMILAR_TOKENS */
  int32_t heads, dim;             /* dim: 64, 96 or 128 */
  int32_t form;                   /* NXS_REDUNDANCY_ */
  int32_t span;                   /* of COSINE and SOFTMAX: keys of a block, a multiple of 64 */
  int32_t nth;                    /* of SIMILAR: from 1 on; 0: retain is 0 for all i, whatever is similar, with `lonely` */
  int32_t nth_of_length;          /* 1: nth is length - max(1, floor(length * ratio)) + 1 */
  int32_t first, lonely;
  nxs_dtype dtype;                /* NXS_BF16 or NXS_F16 */
  float threshold;                /* 0 to 1 */
  float ratio;                    /* 0 to 1 */
} nxs_redundancy_params;

#define NXS_REDUNDANCY_SIMILAR_TOKENS 8192

nxs_status nxs_redundancy(const nxs_redundancy_params *params, void *stream);

/* ---- end of compression: importance, redundancy --------------------------------------------------------------- */

#ifdef __cplusplus
}
#endif

#endif /* NEXTSCALE_H */
