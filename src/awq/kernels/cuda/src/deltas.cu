// What the scale search makes of every weight of a candidate, each in one pass: the rounding errors, and what their
// product with the Gram matrix comes to by row.
//
//   rounded_delta   delta[n][k] = round(weight[n][k] * scale[k]) / scale[k] - weight[n][k], on the grid that spans the
//                   range of each group or, where there are steps, on theirs. A lane has 4 weights, and group / 4 lanes
//                   beside each other a group. Every rounding is torch's own: no multiplication melts into a sum.
//   row_dots        sums[n] = sum over k of product[n][k] delta[n][k]: a block of threads a row, always in one order
//
//   weight, product  float32 [rows][width]       delta   float32 or bfloat16 [rows][width]
//   scale            float32 [width] or null     steps, zeros   float32 [rows][width / group] or null
#include "common.cuh"
#include "grid.cuh"

constexpr int THREADS = 256;
extern "C" __device__ const int threads = THREADS;

struct Params {
  const float* weight;  // or product
  const float* scale;
  const float* steps;
  const float* zeros;
  void* delta;
  float* sums;
  u32 vectors, row_vectors;  // fours of weights, in all and a row
  u32 lanes;                 // a group
  int bits, zero_point, bf16;
};

DEVICE u32 bfloats(float low, float high) {
#if __CUDA_ARCH__ >= 800
  u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)); return r;
#else
  const u32 a = __float_as_uint(low), b = __float_as_uint(high);
  return (a + 0x7fff + (a >> 16 & 1)) >> 16 | ((b + 0x7fff + (b >> 16 & 1)) & 0xffff0000);
#endif
}

DEVICE float rounded(float w, Grid grid, float top) {
  const float step = fminf(rintf(__fdiv_rn(w, grid.scale)), top - grid.zero);
  return __fmul_rn(fmaxf(step, -grid.zero), grid.scale);
}

extern "C" __global__ void __launch_bounds__(THREADS) rounded_delta(const __grid_constant__ Params p) {
  const u32 at = blockIdx.x * THREADS + threadIdx.x;
  const bool here = at < p.vectors;  // of all lanes of a group
  const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  const float4 w = here ? ((const float4*)p.weight)[at] : zero;
  const float4 s = here && p.scale ? ((const float4*)p.scale)[at % p.row_vectors] : zero;
  const float from[4] = {w.x, w.y, w.z, w.w}, by[4] = {s.x, s.y, s.z, s.w};
  float v[4], low = 0.0f, high = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    v[i] = p.scale ? __fmul_rn(from[i], by[i]) : from[i];
    low = fminf(low, v[i]);
    high = fmaxf(high, v[i]);
  }
  Grid grid;
  if (p.steps) {
    grid = {here ? p.steps[at / p.lanes] : 1.0f, here ? p.zeros[at / p.lanes] : 0.0f};
  } else {
    for (u32 o = p.lanes / 2; o; o >>= 1) {
      low = fminf(low, __shfl_xor_sync(0xffffffff, low, o));
      high = fmaxf(high, __shfl_xor_sync(0xffffffff, high, o));
    }
    grid = grid_of(low, high, p.bits, p.zero_point);
  }
  if (!here) return;
  const float top = (float)((1 << p.bits) - 1);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float value = rounded(v[i], grid, top);
    v[i] = __fsub_rn(p.scale ? __fdiv_rn(value, by[i]) : value, from[i]);
  }
  if (p.bf16)
    ((uint2*)p.delta)[at] = make_uint2(bfloats(v[0], v[1]), bfloats(v[2], v[3]));
  else
    ((float4*)p.delta)[at] = make_float4(v[0], v[1], v[2], v[3]);
}

extern "C" __global__ void __launch_bounds__(THREADS) row_dots(const __grid_constant__ Params p) {
  __shared__ float found[THREADS / 32];
  const u64 first = (u64)blockIdx.x * p.row_vectors;
  float sum = 0.0f;
#pragma unroll 4
  for (u32 i = threadIdx.x; i < p.row_vectors; i += THREADS) {
    const float4 a = ((const float4*)p.weight)[first + i];
    float4 d;
    if (p.bf16) {
      const uint2 pairs = ((const uint2*)p.delta)[first + i];
      d = make_float4(__uint_as_float(pairs.x << 16), __uint_as_float(pairs.x & 0xffff0000),
                      __uint_as_float(pairs.y << 16), __uint_as_float(pairs.y & 0xffff0000));
    } else {
      d = ((const float4*)p.delta)[first + i];
    }
    sum += a.x * d.x + a.y * d.y + (a.z * d.z + a.w * d.w);
  }
  for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(0xffffffff, sum, o);
  if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x) return;
  for (int i = 1; i < THREADS / 32; i++) sum += found[i];
  p.sums[blockIdx.x] = sum;
}
