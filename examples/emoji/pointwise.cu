// What is left between dense layers and the library's ops. `pointwise.rs` has the same functions for the host, and
// says what they do. Compiled by NVRTC, without headers: f16 is its bits.

typedef unsigned short f16;

__device__ float load(const f16* p) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(*p));
    return x;
}

__device__ void store(f16* p, float x) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(*p) : "f"(x));
}

__device__ float sum_of_warp(float x) {
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}

__device__ long long thread() { return (long long)blockIdx.x * blockDim.x + threadIdx.x; }

// A thread an element of x [rows, width].
extern "C" __global__ void emoji_embed(float* x, const float* table_or_null, const int* index, const float* positions,
                                       const int* place, int rows, int width) {
    long long at = thread();
    if (at >= (long long)rows * width) return;
    long long row = at / width, column = at % width;
    float value = table_or_null ? table_or_null[(long long)index[row] * width + column] : x[at];
    x[at] = value + positions[(long long)place[row] * width + column];
}

// A warp a row.
extern "C" __global__ void emoji_norm(float* x, const float* y_or_null, const float* gate_or_null, const float* scale,
                                      const float* shift, f16* h, int rows, int width, int rows_a_group, int silu) {
    long long row = thread() / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    x += row * width, h += row * width;
    long long group = row / rows_a_group * width;
    float sum = 0;
    for (long long i = lane; i < width; i += 32) {
        if (y_or_null) x[i] += (gate_or_null ? gate_or_null[group + i] : 1.f) * y_or_null[row * width + i];
        sum += x[i];
    }
    float mean = sum_of_warp(sum) / width, squares = 0;
    for (long long i = lane; i < width; i += 32) squares += (x[i] - mean) * (x[i] - mean);
    float inverse = rsqrtf(sum_of_warp(squares) / width + 1e-6f);
    for (long long i = lane; i < width; i += 32) {
        float value = (x[i] - mean) * inverse * (1.f + scale[group + i]) + shift[group + i];
        store(h + i, silu ? value / (1.f + expf(-value)) : value);
    }
}

// A thread an element.
extern "C" __global__ void emoji_gelu(const float* x, f16* h, int count) {
    long long at = thread();
    if (at >= count) return;
    float v = x[at];
    store(h + at, 0.5f * v * (1.f + tanhf(0.7978845608028654f * (v + 0.044715f * v * v * v))));
}

// A thread an element of out [images, side * up, side * up, 9, channels].
extern "C" __global__ void emoji_unfold(const f16* h, f16* out, int images, int side, int channels, int up) {
    int to = side * up;
    long long at = thread();
    if (at >= (long long)images * to * to * 9 * channels) return;
    int c = at % channels, tap = at / channels % 9;
    long long pixel = at / (9ll * channels);
    int x = pixel % to + tap % 3 - 1, y = pixel / to % to + tap / 3 - 1;
    long long image = pixel / to / to;
    bool inside = x >= 0 && x < to && y >= 0 && y < to;
    out[at] = inside ? h[((image * side + y / up) * side + x / up) * channels + c] : 0;
}

// A thread an element of out [images, pixels, channels].
extern "C" __global__ void emoji_to_rows(const float* map, f16* out, int images, int channels, int pixels) {
    long long at = thread();
    if (at >= (long long)images * channels * pixels) return;
    int c = at % channels, pixel = at / channels % pixels;
    long long image = at / channels / pixels;
    store(out + at, map[(image * channels + c) * pixels + pixel]);
}

// A thread an element of out.
extern "C" __global__ void emoji_guide(const float* logits, float* out, int count, float guidance) {
    long long at = thread();
    if (at < count) out[at] = (1.f + guidance) * logits[at] - guidance * logits[at + count];
}
