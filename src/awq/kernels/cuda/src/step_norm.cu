// Between two products of many rows: the result of one joins the residual stream, whose norm is what the next one reads.
//
//   stream[row] += factor * y[row]        x[row] = stream[row] * rsqrt(mean(stream[row]^2) + epsilon) * norm
//
// A block takes a row and keeps it in registers, PIECES x 8 channels a thread. Where only some rows of the stream are
// wanted, one of every `each`, x has those alone.
#include "common.cuh"

#ifndef THREADS
#define THREADS 512
#endif
#ifndef PIECES
#define PIECES 1
#endif

constexpr int WARPS = THREADS / 32;

struct Params {
  float* stream;          // [rows][width]
  const u16* y;           // [rows][width]; null: nothing joins
  const float* norm;      // [width]
  u16* x;                 // [blocks][width]
  const long long* last;  // [1] which of `each` rows is wanted; null: that at `at`
  int width, each, at;    // width: a multiple of 8
  float factor, epsilon;
};

DEVICE void load8(float (&v)[8], const float* from) {
  uint4 a = load_fresh16(from), b = load_fresh16(from + 4);
  const u32 words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = __uint_as_float(words[i]);
}
DEVICE void store8(float* to, const float (&v)[8]) {
  ((float4*)to)[0] = make_float4(v[0], v[1], v[2], v[3]);
  ((float4*)to)[1] = make_float4(v[4], v[5], v[6], v[7]);
}
DEVICE u32 narrow2(float lo, float hi) { return (u32)narrow(lo) | (u32)narrow(hi) << 16; }

extern "C" __global__ void __launch_bounds__(THREADS) add_and_norm(const __grid_constant__ Params p) {
  __shared__ float squares[WARPS];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  float weight[PIECES][8], v[PIECES][8];
  let_next_kernel_start();
#pragma unroll
  for (int n = 0; n < PIECES; n++) {
    const int at = (n * THREADS + thread) * 8;
    if (at < p.width) load8(weight[n], p.norm + at);
  }
  wait_for_earlier_kernels();
  const u64 row = (u64)blockIdx.x * p.each + (p.last ? (int)load_fresh8(p.last).x : p.at);
  float* stream = p.stream + row * p.width;
  const u16* y = p.y ? p.y + row * p.width : nullptr;
  float square = 0.f;
#pragma unroll
  for (int n = 0; n < PIECES; n++) {
    const int at = (n * THREADS + thread) * 8;
    if (at < p.width) load8(v[n], stream + at);
  }
#pragma unroll
  for (int n = 0; n < PIECES; n++) {
    const int at = (n * THREADS + thread) * 8;
    if (at >= p.width) continue;
    if (y) {
      uint4 raw = load_fresh16(y + at);
      const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float lo, hi;
        widen2(words[i], lo, hi);
        v[n][2 * i] = fmaf(p.factor, lo, v[n][2 * i]);
        v[n][2 * i + 1] = fmaf(p.factor, hi, v[n][2 * i + 1]);
      }
      store8(stream + at, v[n]);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) square = fmaf(v[n][i], v[n][i], square);
  }
#pragma unroll
  for (int o = 16; o; o >>= 1) square += __shfl_xor_sync(~0u, square, o);
  if (lane == 0) squares[warp] = square;
  __syncthreads();
  square = lane < WARPS ? squares[lane] : 0.f;
#pragma unroll
  for (int o = 16; o; o >>= 1) square += __shfl_xor_sync(~0u, square, o);
  const float by = rsqrtf(square / p.width + p.epsilon);
  u16* x = p.x + (u64)blockIdx.x * p.width;
#pragma unroll
  for (int n = 0; n < PIECES; n++) {
    const int at = (n * THREADS + thread) * 8;
    if (at >= p.width) continue;
    float w[8];
#pragma unroll
    for (int i = 0; i < 8; i++) w[i] = v[n][i] * by * weight[n][i];
    *(uint4*)(x + at) = make_uint4(narrow2(w[0], w[1]), narrow2(w[2], w[3]), narrow2(w[4], w[5]), narrow2(w[6], w[7]));
  }
}
