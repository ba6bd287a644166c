// The clip search: by how much each group's range is shrunk so that rounding it to its grid costs least, d^T D d with D
// the group's block on the diagonal of the Gram matrix.
//
//   weight      float32 [rows][groups * GROUP]     gram  float32 [groups * GROUP][groups * GROUP]
//   low, high   float32 [rows][groups]             best  float32 [rows][groups]: the first of the cheapest `shrink`
//
// A block of threads has one group and ROWS rows, 16 a warp, whose weights stay in registers while the shrinks go by. A
// lane 4r + c holds of the rows r and r + 8 the k = 2c, 2c+1, 2c+8, 2c+9 of every 16: as float16 those are the left
// operand of a product, and the same places are its sums, so that u^T D u needs no exchange but one in the quad at its
// end. The error u = d / scale is in units of the grid's step, and D is scaled by a power of two (its largest entry is on
// its diagonal): float16 then keeps 11 bits of both, whatever the weights and inputs are.
//
// D is symmetric: of its 16 x 16 blocks only those above the diagonal are there, twice as large. Shared memory has them as
// right operands, one after the other by column J and row S <= J, 512 bytes each, 16 bytes a lane 4r + c:
//
//   (16S + 2c, +1; 16J + r)  (16S + 2c+8, +9; 16J + r)  (16S + 2c, +1; 16J + 8 + r)  (16S + 2c+8, +9; 16J + 8 + r)
#include "common.cuh"
#include "grid.cuh"

#ifndef GROUP
#define GROUP 128
#endif

constexpr int THREADS = 256, WARPS = THREADS / 32, ROWS = 16 * WARPS, MOST_SHRINKS = 32, STEPS = GROUP / 16;
constexpr int BLOCKS = STEPS * (STEPS + 1) / 2;
constexpr int BLOCKS_A_SM = __CUDA_ARCH__ >= 800 ? 2 : 1;  // by registers; the products of sm_75 are in more steps
constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: added to |x| < 2^22, it leaves the nearest whole number
extern "C" __device__ const int threads = THREADS;
extern "C" __device__ const int rows_a_block = ROWS;
extern "C" __device__ const int most_shrinks = MOST_SHRINKS;

struct Params {
  const float* weight;
  const float* low;
  const float* high;
  const float* gram;
  float* best;
  int rows, groups, bits, zero_point, shrinks;
  float shrink[MOST_SHRINKS];
};

DEVICE u32 halves(float low, float high) {
#if __CUDA_ARCH__ >= 800
  u32 r; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)); return r;
#else
  return float_to_half(low) | (u32)float_to_half(high) << 16;
#endif
}

// A grid as the inner loop wants it: codes are clamped with MAGIC on top.
struct Bounds { float inverse, least, most, square; };
DEVICE Bounds bounds_of(Grid grid, float top) {
  return {__fdiv_rn(1.0f, grid.scale), MAGIC - grid.zero, MAGIC + (top - grid.zero), grid.scale * grid.scale};
}
DEVICE float error(float w, const Bounds& b) {
  const float step = fminf(fmaxf(__fmaf_rn(w, b.inverse, MAGIC), b.least), b.most) - MAGIC;
  return __fmaf_rn(w, b.inverse, -step);
}

// The power of two that brings the largest diagonal entry of D into [2^13, 2^14).
DEVICE float normalizer(const float* block, u64 stride, int lane) {
  float most = 0.0f;
  for (int i = lane; i < GROUP; i += 32) most = fmaxf(most, block[i * (stride + 1)]);
  for (int o = 16; o; o >>= 1) most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, o));
  const int exponent = 267 - (int)(__float_as_uint(most) >> 23);
  return __uint_as_float((u32)(exponent < 253 ? exponent : 253) << 23);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_A_SM) best_shrinks(const __grid_constant__ Params p) {
  __shared__ __align__(16) uint4 right[BLOCKS][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, c = lane % 4;
  const int group = blockIdx.x % p.groups, row = blockIdx.x / p.groups * ROWS + 16 * warp + r;
  const u64 stride = (u64)p.groups * GROUP;

  const float* block = p.gram + group * (stride + 1) * GROUP;
  const float unit = normalizer(block, stride, lane);
  for (int number = warp; number < BLOCKS; number += WARPS) {
    int J = 0;
    while (number >= (J + 1) * (J + 2) / 2) J++;
    const int S = number - J * (J + 1) / 2;
    const float* at = block + (16 * J + r) * stride + 16 * S + 2 * c;
    const float factor = S < J ? 2.0f * unit : unit;
    u32 part[4];
    for (int i = 0; i < 4; i++) {
      const float2 pair = *(const float2*)(at + (i / 2) * 8 * stride + (i % 2) * 8);
      part[i] = halves(pair.x * factor, pair.y * factor);
    }
    right[number][lane] = make_uint4(part[0], part[1], part[2], part[3]);
  }
  __syncthreads();
  if (row - r >= p.rows) return;

  float2 w[STEPS][4];  // of the rows r, r + 8, r, r + 8; the latter two 8 k later
  float low[2], high[2], least[2], best[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int mine = row + 8 * half;
    const bool here = mine < p.rows;
    const u64 at = (u64)mine * p.groups + group;
    low[half] = here ? p.low[at] : 0.0f;
    high[half] = here ? p.high[at] : 0.0f;
    best[half] = 1.0f;
    least[half] = __uint_as_float(0x7f800000);
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
      for (int i = half; i < 4; i += 2) {
        const float* from = p.weight + at * GROUP + 16 * step + 2 * c + 4 * (i - half);
        w[step][i] = here ? *(const float2*)from : make_float2(0.0f, 0.0f);
      }
  }

  const float top = (float)((1 << p.bits) - 1);
  const u32 operands = shared_address(&right[0][lane]);
#pragma unroll 1
  for (int number = 0; number < p.shrinks; number++) {
    const float shrink = p.shrink[number];
    Bounds b[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float lowest = __fmul_rn(low[half], shrink), highest = __fmul_rn(high[half], shrink);
      b[half] = bounds_of(grid_of(lowest, highest, p.bits, p.zero_point), top);
    }
    u32 u[STEPS][4];
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
      for (int i = 0; i < 4; i++) u[step][i] = halves(error(w[step][i].x, b[i % 2]), error(w[step][i].y, b[i % 2]));

    float loss[2] = {0.0f, 0.0f};
#pragma unroll
    for (int J = 0; J < STEPS; J++) {
      float sums[2][4] = {};
#pragma unroll
      for (int S = 0; S <= J; S++) {
        const uint4 d = load_shared16(operands + (J * (J + 1) / 2 + S) * 512);
        mma_acc(sums[0], u[S][0], u[S][1], u[S][2], u[S][3], d.x, d.y);
        mma_acc(sums[1], u[S][0], u[S][1], u[S][2], u[S][3], d.z, d.w);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float* sum = &sums[i / 2][2 * (i % 2)];
        loss[i % 2] = __fmaf_rn(sum[0], low_half(u[J][i]), loss[i % 2]);
        loss[i % 2] = __fmaf_rn(sum[1], high_half(u[J][i]), loss[i % 2]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float all = loss[half];
      all += __shfl_xor_sync(0xffffffff, all, 1);
      all += __shfl_xor_sync(0xffffffff, all, 2);
      all *= b[half].square;
      if (all < least[half]) {
        least[half] = all;
        best[half] = shrink;
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; half++)
    if (c == 0 && row + 8 * half < p.rows) p.best[(u64)(row + 8 * half) * p.groups + group] = best[half];
}
