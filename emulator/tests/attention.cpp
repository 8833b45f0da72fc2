// The launchers of the attention family that no tensor core computes, against plain host code in double; and what they
// refuse, which the typed API never asks of them.
#include "device.h"

using namespace test;

static std::vector<float> randoms(size_t count, uint64_t seed) {
  Random random(seed);
  std::vector<float> values(count);
  for (auto& x : values) x = random.symmetric();
  return values;
}

static void test_merge() {
  const int parts = 11, batch = 2, rows = 5, heads = 3, dim = 64, items = batch * rows * heads;
  const auto values = randoms(parts * items * dim, 1);
  auto lse = randoms(parts * items, 2);
  for (size_t i = 0; i < lse.size(); i += 4) lse[i] = -INFINITY;
  for (const int vector : {0, 1}) {
    Buffer<float> device_parts(values), device_lse(lse), out(items * dim), out_lse(items);
    nxs_attention_merge_params p = {};
    p.parts = device_parts.get(), p.lse = device_lse.get();
    p.out = out.get(), p.out_lse_or_null = out_lse.get();
    p.parts_stride_part = items * dim, p.parts_stride_batch = rows * heads * dim;
    p.parts_stride_row = heads * dim, p.parts_stride_head = dim;
    p.lse_stride_part = items, p.lse_stride_batch = heads * rows, p.lse_stride_head = rows, p.lse_stride_row = 1;
    p.out_stride_batch = rows * heads * dim, p.out_stride_row = heads * dim, p.out_stride_head = dim;
    p.out_lse_stride_batch = heads * rows, p.out_lse_stride_head = rows, p.out_lse_stride_row = 1;
    p.batch = batch, p.rows = rows, p.parts_count = parts, p.heads = heads, p.dim = dim;
    p.parts_dtype = p.out_dtype = NXS_F32;
    p.vector = vector, p.log2_lanes = vector ? 4 : 5;
    check(finish_launch(nxs_attention_merge(&p, nullptr)) == NXS_OK, "merge runs");
    const auto got = out.read(), got_lse = out_lse.read();
    bool close = true;
    for (int b = 0; b < batch; ++b)
      for (int r = 0; r < rows; ++r)
        for (int h = 0; h < heads; ++h) {
          const auto lse_of = [&](int i) { return lse[(i * batch + b) * heads * rows + h * rows + r]; };
          double total = 0;
          for (int i = 0; i < parts; ++i) total += exp(lse_of(i));
          close &= fabs(got_lse[(b * heads + h) * rows + r] - log(total)) < 1e-5;
          for (int d = 0; d < dim; ++d) {
            double sum = 0;
            for (int i = 0; i < parts; ++i)
              sum += exp(lse_of(i)) * values[(((i * batch + b) * rows + r) * heads + h) * dim + d];
            close &= fabs(got[((b * rows + r) * heads + h) * dim + d] - sum / total) < 1e-5;
          }
        }
    check(close, "merge is the reference's");

    const auto refused = [&](nxs_status expected, auto change, const char* name) {
      nxs_attention_merge_params bad = p;
      change(bad);
      check(nxs_attention_merge(&bad, nullptr) == expected, name);
    };
    refused(NXS_E_NULL, [](auto& b) { b.parts = nullptr; }, "merge without parts");
    refused(NXS_E_NULL, [](auto& b) { b.accumulate = 1, b.out_lse_or_null = nullptr; }, "merge onto no lse");
    refused(NXS_E_SHAPE, [](auto& b) { b.parts_count = 257; }, "merge of 257 parts");
    refused(NXS_E_SHAPE, [](auto& b) { b.dim = 1025; }, "merge of 1025 dims");
    refused(NXS_E_SHAPE, [](auto& b) { b.rows = int64_t{1} << 31; }, "merge of 2^31 rows");
    refused(NXS_E_STRIDE, [](auto& b) { b.lse_stride_row = -1; }, "merge with a negative stride");
    refused(NXS_E_DTYPE, [](auto& b) { b.out_dtype = NXS_I8; }, "merge to i8");
    refused(NXS_E_UNSUPPORTED, [](auto& b) { b.log2_lanes = 6; }, "merge by 64 lanes");
    refused(NXS_E_STRIDE, [](auto& b) { b.vector = 1, b.out_stride_head = 65; }, "merge to odd heads");
    refused(NXS_E_ALIGNMENT, [](auto& b) { b.vector = 1, b.parts = static_cast<const float*>(b.parts) + 1; },
            "merge of parts off their alignment");
    refused(NXS_OK, [](auto& b) { b.rows = 0, b.parts = nullptr; }, "merge of nothing");
  }
  check(nxs_attention_merge(nullptr, nullptr) == NXS_E_NULL, "merge without params");
}

static void test_prepare() {
  const int batch = 2, rows = 3, heads = 4, dim = 64, cache_rows = 8, table_rows = 8, all = 3 * heads;
  const auto packed = randoms(batch * rows * all * dim, 3), cos_values = randoms(table_rows * dim / 2, 4),
             sin_values = randoms(table_rows * dim / 2, 5);
  // The second batch entry has no place for its last row.
  const std::vector<int32_t> append = {1, cache_rows - 2};
  for (const int vector : {0, 1})
    for (const int rope : {NXS_ROPE_INTERLEAVED, NXS_ROPE_HALF}) {
      Buffer<float> device_packed(packed), cos(cos_values), sin(sin_values), q_out(batch * rows * heads * dim),
          k_cache(batch * cache_rows * heads * dim), v_cache(batch * cache_rows * heads * dim);
      Buffer<int32_t> append_at(append);
      Buffer<uint32_t> flags(std::vector<uint32_t>{0});
      nxs_attention_prepare_params p = {};
      float* outs[3] = {q_out.get(), k_cache.get(), v_cache.get()};
      for (int i = 0; i < 3; ++i) {
        nxs_attention_prepare_tensor& t = p.tensor[i];
        t.input = device_packed.get() + i * heads * dim;
        t.out = outs[i];
        t.input_stride_batch = rows * all * dim, t.input_stride_row = all * dim, t.input_stride_head = dim;
        t.out_rows = i == 0 ? rows : cache_rows;
        t.out_stride_batch = t.out_rows * heads * dim, t.out_stride_row = heads * dim, t.out_stride_head = dim;
        t.heads = heads;
        t.norm = i < 2 ? NXS_NORM_L2 : NXS_NORM_NONE, t.norm_eps = 1e-12f;
        t.rotate = i < 2, t.append = i > 0;
        t.out_dtype = NXS_F32;
      }
      p.cos_or_null = cos.get(), p.sin_or_null = sin.get(), p.table_stride_row = dim / 2, p.table_rows = table_rows;
      p.append_at_or_null = append_at.get(), p.position_at_append = 1, p.flags_or_null = flags.get();
      p.batch = batch, p.rows = rows, p.dim = dim;
      p.rope = rope, p.rotary_dim = p.rope_block = dim;
      p.in_dtype = NXS_F32, p.vector = vector, p.log2_lanes = vector ? 3 : 5;
      check(finish_launch(nxs_attention_prepare(&p, nullptr)) == NXS_OK, "prepare runs");
      // The last row of the second entry is at position 8 as well.
      check(flags.read()[0] == (NXS_FLAG_APPEND_SKIPPED | NXS_FLAG_POSITION_CLAMPED), "prepare says what did not fit");
      const std::vector<float> got[3] = {q_out.read(), k_cache.read(), v_cache.read()};
      bool close = true;
      for (int i = 0; i < 3; ++i)
        for (int b = 0; b < batch; ++b)
          for (int r = 0; r < rows; ++r)
            for (int h = 0; h < heads; ++h) {
              const float* x = &packed[((b * rows + r) * all + i * heads + h) * dim];
              const int place = append[b] + r, row = i == 0 ? r : place;
              if (i > 0 && place >= cache_rows) continue;
              const int position = place < table_rows ? place : table_rows - 1;
              const float* out = &got[i][((b * p.tensor[i].out_rows + row) * heads + h) * dim];
              double squares = 0;
              for (int d = 0; d < dim; ++d) squares += double(x[d]) * x[d];
              const double length = i < 2 ? sqrt(squares) : 1;
              for (int pair = 0; pair < dim / 2; ++pair) {
                const bool half = rope == NXS_ROPE_HALF;
                const int a = half ? pair : 2 * pair, c = half ? pair + dim / 2 : a + 1;
                const double cosine = i < 2 ? cos_values[position * dim / 2 + pair] : 1,
                             sine = i < 2 ? sin_values[position * dim / 2 + pair] : 0;
                close &= fabs(out[a] - (x[a] * cosine - x[c] * sine) / length) < 1e-5;
                close &= fabs(out[c] - (x[c] * cosine + x[a] * sine) / length) < 1e-5;
              }
            }
      check(close, "prepare is the reference's");
      bool untouched = true;
      const uint32_t poison = 0xfefefefeu;
      for (int d = 0; d < heads * dim; ++d) untouched &= memcmp(&got[1][d], &poison, 4) == 0;
      check(untouched, "prepare writes the rows of this call only");

      const auto refused = [&](nxs_status expected, auto change, const char* name) {
        nxs_attention_prepare_params bad = p;
        change(bad);
        check(nxs_attention_prepare(&bad, nullptr) == expected, name);
      };
      refused(NXS_E_NULL, [](auto& b) { b.sin_or_null = nullptr; }, "prepare without sines");
      refused(NXS_E_NULL, [](auto& b) { b.tensor[1].out = nullptr; }, "prepare to no cache");
      refused(NXS_E_SHAPE, [](auto& b) { b.dim = 257; }, "prepare of 257 dims");
      refused(NXS_E_SHAPE, [](auto& b) { b.rotary_dim = 66; }, "prepare with a rope beyond the head");
      refused(NXS_E_SHAPE, [](auto& b) { b.rows = int64_t{1} << 31; }, "prepare of 2^31 rows");
      refused(NXS_E_SHAPE, [](auto& b) { b.tensor[0].out_rows = 2; }, "prepare to fewer rows");
      refused(NXS_E_SHAPE, [](auto& b) { b.append_at = INT64_MAX; }, "prepare far away");
      refused(NXS_E_STRIDE, [](auto& b) { b.tensor[2].out_stride_row = -1; }, "prepare with a negative stride");
      refused(NXS_E_DTYPE, [](auto& b) { b.tensor[0].out_dtype = NXS_U8; }, "prepare to u8");
      refused(NXS_E_UNSUPPORTED, [](auto& b) { b.tensor[0].norm_eps = NAN; }, "prepare with an eps of NaN");
      refused(NXS_E_UNSUPPORTED, [](auto& b) { b.log2_lanes = 2; }, "prepare by too few lanes");
      refused(NXS_E_STRIDE, [](auto& b) { b.vector = 1, b.table_stride_row = 33; }, "prepare with odd tables");
      refused(NXS_OK, [](auto& b) { b.batch = 0; }, "prepare of nothing");
    }
  check(nxs_attention_prepare(nullptr, nullptr) == NXS_E_NULL, "prepare without params");
}

int main() {
  test_merge();
  test_prepare();
  return finish();
}
