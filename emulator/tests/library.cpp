// The library's own launchers: Philox, RVQ decode and encode against plain host code, to the bit.
#include <cmath>

#include "device.h"

using namespace test;

static void philox_reference(uint64_t seed, uint64_t position, uint32_t domain, uint32_t draw, uint32_t out[4]) {
  uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  uint32_t c[4] = {uint32_t(position), uint32_t(position >> 32), domain, draw};
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53ull * c[0], p1 = 0xCD9E8D57ull * c[2];
    const uint32_t next[4] = {uint32_t(p1 >> 32) ^ c[1] ^ key[0], uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ key[1],
                              uint32_t(p0)};
    memcpy(c, next, sizeof(c));
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  memcpy(out, c, sizeof(c));
}

static void test_philox() {
  const int64_t n = 1000;
  for (const nxs_dtype type : {NXS_U32, NXS_F32}) {
    Buffer<uint32_t> out(n * 4);
    nxs_philox_fill_params p = {};
    p.out = out.get();
    p.positions = n;
    p.seed = 0x0123456789abcdefull;
    p.first_position = 0xfffffff0ull;
    p.domain = 3;
    p.draw = 7;
    p.out_dtype = type;
    check(finish_launch(nxs_philox_fill(&p, nullptr)) == NXS_OK, "philox runs");
    const auto got = out.read();
    bool equal = true;
    for (int64_t i = 0; i < n; ++i) {
      uint32_t want[4];
      philox_reference(p.seed, p.first_position + i, p.domain, p.draw, want);
      for (int j = 0; j < 4; ++j) {
        if (type == NXS_F32) {
          const float uniform = static_cast<float>(want[j] >> 8) * 0x1p-24f;
          memcpy(&want[j], &uniform, 4);
        }
        equal &= got[i * 4 + j] == want[j];
      }
    }
    check(equal, "philox is the reference's");
    print_checksum(type == NXS_U32 ? "philox words" : "philox uniforms", got);
  }
}

static void test_rvq() {
  const int batch = 2, levels = 7, rows = 33, entries = 50, dim = 72;
  Random random(5);
  std::vector<uint32_t> codes(batch * levels * rows);
  std::vector<float> books(levels * entries * dim);
  for (auto& code : codes) code = random.below(entries + 2);  // a few too large
  for (auto& x : books) x = random.symmetric();
  for (const int vector : {0, 1, 2}) {  // 2: with tiles
    Buffer<uint32_t> device_codes(codes), flags(std::vector<uint32_t>{0});
    Buffer<float> device_books(books);
    Buffer<float> out(batch * rows * dim);
    nxs_rvq_decode_params p = {};
    p.codes = device_codes.get();
    p.codebooks = device_books.get();
    p.out = out.get();
    p.flags_or_null = flags.get();
    p.codes_stride_batch = levels * rows, p.codes_stride_level = rows, p.codes_stride_row = 1;
    p.codebooks_stride_level = entries * dim, p.codebooks_stride_entry = dim;
    p.out_stride_batch = rows * dim, p.out_stride_row = dim;
    p.batch = batch, p.rows = rows, p.entries = entries, p.levels = levels, p.dim = dim;
    p.codes_dtype = NXS_U32, p.codebooks_dtype = NXS_F32, p.out_dtype = NXS_F32;
    p.vector = vector > 0;
    p.tiles = vector == 2;
    p.log2_lanes = 5 - vector;
    check(finish_launch(nxs_rvq_decode(&p, nullptr)) == NXS_OK, "rvq_decode runs");
    const auto got = out.read();
    bool equal = true;
    for (int b = 0; b < batch; ++b)
      for (int r = 0; r < rows; ++r)
        for (int d = 0; d < dim; ++d) {
          float sum = 0;
          for (int l = 0; l < levels; ++l) {
            uint32_t code = codes[(b * levels + l) * rows + r];
            if (code >= entries) code = entries - 1;
            sum += books[(l * entries + code) * dim + d];
          }
          equal &= got[(b * rows + r) * dim + d] == sum;
        }
    check(equal, "rvq_decode is the reference's");
    check(flags.read()[0] == NXS_FLAG_CODE_CLAMPED, "rvq_decode says that a code was clamped");
    print_checksum("rvq_decode", got);
  }
}

// Codes of each kernel of RVQ encode, of normals and of codes that 16-bit products cannot tell apart.
static void test_encode() {
  const int levels = 3, rows = 70, entries = 600, dim = 20, padded = 24;
  Random random(8);
  std::vector<float> books(levels * entries * dim), x(rows * dim);
  for (size_t i = 0; i < books.size(); ++i) books[i] = i / dim % 2 ? random.symmetric() : 0.5f + 1e-4f * random.symmetric();
  for (size_t i = 0; i < x.size(); ++i) x[i] = i / dim % 3 ? random.symmetric() : 0.5f + 1e-4f * random.symmetric();
  x[5 * dim + 3] = NAN;
  std::vector<uint32_t> want(levels * rows);
  auto left = x;
  for (int r = 0; r < rows; ++r)
    for (int l = 0; l < levels; ++l) {
      float least = INFINITY;
      int code = 0;
      for (int c = 0; c < entries; ++c) {
        float score = 0;
        for (int k = 0; k < dim; ++k) {
          const float difference = left[r * dim + k] - books[(l * entries + c) * dim + k];
          score = std::fma(difference, difference, score);
        }
        if (score < least) least = score, code = c;
      }
      want[l * rows + r] = code;
      for (int k = 0; k < dim; ++k) left[r * dim + k] -= books[(l * entries + code) * dim + k];
    }

  Buffer<float> device_books(books), device_x(x);
  for (const int pieces : {1, 3}) {
    nxs_codebook book = {};
    const int64_t all = (entries + 127) / 128 * 128;
    book.entries = entries, book.levels = levels, book.dim = dim, book.padded_dim = padded, book.pieces = pieces;
    book.operand_dim = pieces == 1 ? 32 : 96;
    const auto section = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
    book.values_at = section(levels * 16);
    book.search_at = book.values_at + section(levels * entries * padded * 4);
    book.operand_at = book.search_at + section(levels * all * padded * 4);
    book.bytes = book.operand_at + section(levels * all * book.operand_dim * 2);
    Buffer<uint8_t> memory(book.bytes);
    book.prepared = memory.get();
    nxs_codebook_prepare_params prepare = {};
    prepare.codebook = book;
    prepare.rows = device_books.get();
    prepare.rows_stride_level = entries * dim, prepare.rows_stride_entry = dim;
    prepare.rows_dtype = NXS_F32;
    check(finish_launch(nxs_codebook_prepare(&prepare, nullptr)) == NXS_OK, "codebook_prepare runs");
    const struct {
      int32_t variant, tile_rows, stages, splits, sharers;
    } kernels[] = {{NXS_RVQ_ENCODE_SM80, 64, 3, 1, 1},    {NXS_RVQ_ENCODE_SM80, 16, 2, 1, 1},
                   {NXS_RVQ_ENCODE_SM90, 64, 2, 1, 1},    {NXS_RVQ_ENCODE_SM90, 64, 4, 4, 1},
                   {NXS_RVQ_ENCODE_SM90, 64, 3, 1, 2},    {NXS_RVQ_ENCODE_SM90, 64, 2, 1, 4},
                   {NXS_RVQ_ENCODE_STREAM, 8, 0, 16, 1}, {NXS_RVQ_ENCODE_STREAM, 1, 0, 2, 1}};
    for (const auto& kernel : kernels) {
      Buffer<uint32_t> codes(levels * rows), flags(std::vector<uint32_t>{0});
      nxs_rvq_encode_params p = {};
      p.codebook = book;
      p.input = device_x.get();
      p.codes = codes.get();
      p.flags_or_null = flags.get();
      p.input_stride_row = dim, p.input_stride_dim = 1;
      p.codes_stride_level = rows, p.codes_stride_row = 1;
      p.batch = 1, p.rows = rows, p.levels = levels;
      p.dtype = NXS_F32, p.codes_dtype = NXS_U32;
      p.variant = kernel.variant, p.tile_rows = kernel.tile_rows, p.stages = kernel.stages;
      p.splits = kernel.splits, p.sharers = kernel.sharers;
      check(finish_launch(nxs_rvq_encode(&p, nullptr)) == NXS_OK, "rvq_encode runs");
      check(codes.read() == want, "rvq_encode is the reference's, kernel " + std::to_string(kernel.variant));
      check(flags.read()[0] == NXS_FLAG_ROW_NOT_FINITE, "rvq_encode says that a row was not finite");
    }
  }
}

#if !defined(__CUDACC__)
static void test_emulator() {
  // 250 positions of 16 bytes: 4000 bytes stored, none loaded.
  nxs_emulator_reset();
  Buffer<uint32_t> out(1000);
  nxs_philox_fill_params p = {};
  p.out = out.get();
  p.positions = 250;
  p.out_dtype = NXS_U32;
  check(nxs_philox_fill(&p, nullptr) == NXS_OK, "philox runs");
  nxs_emulator_counts counts;
  nxs_emulator_counters(&counts);
  check(counts.launches == 1 && counts.blocks == 1 && counts.threads == 256, "counts of a launch");
  check(counts.global_store_bytes == 4000 && counts.global_load_bytes == 0, "bytes of a launch");
  check(nxs_emulator_report()[0] == 0, "no report");
#if defined(__SANITIZE_ADDRESS__)
  // Position 249 lies outside of this buffer.
  nxs_emulator_options options = {3, NXS_EMULATOR_LANDING_LATE, 1};
  nxs_emulator_configure(&options);
  char* small = static_cast<char*>(malloc(249 * 16));
  p.out = small;
  check(nxs_philox_fill(&p, nullptr) == NXS_EMULATOR_FAILURE, "a store out of bounds stops the launch");
  const std::string report = nxs_emulator_report();
  check(report.find("out of bounds: ") == 0 &&
            report.find("kernel philox_fill_kernel<false>, block (0,0,0), thread 249") != std::string::npos &&
            report.find("philox_fill.cu:") != std::string::npos,
        "report of a store out of bounds: " + report);
  free(small);
  nxs_emulator_configure(nullptr);
#endif
  check(!strcmp(nxs_status_name(NXS_EMULATOR_FAILURE), "cudaErrorLaunchFailure"), "name of the failure");
}
#endif

int main() {
  test_philox();
  test_rvq();
  test_encode();
#if !defined(__CUDACC__)
  test_emulator();
#endif
  return finish();
}
