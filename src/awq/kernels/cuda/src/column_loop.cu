// The inner loop of compensated rounding: a block of columns of W, one after the other, in one launch.
//
//   weight, scales, zeros  float32 [columns][rows]     W^T on its grids: a column of W is a row here
//   factor                 float32 [columns][stride]   upper triangular U with U^T U = Gram^-1, its block on the diagonal
//   codes                  uint8   [columns][rows]     errors  float32 [columns][rows]: (w - rounded) / U[c][c]
//
//              c ->
//     w[c]  |  r r r . . . .     c is rounded, then every column j > c of the same row gives way: w[j] -= U[c][j] e[c]
//
// Rows of W do not touch each other: one thread a row. STEP columns at a time are rounded in registers, and what they
// ask of the later ones follows at once: the sums of a column are still taken in the order of the columns, so that the
// result is that of the plain loop. A block's columns stay in shared memory in between.
#include "common.cuh"

constexpr int COLUMNS = 64, STEP = 16, THREADS = 64;
extern "C" __device__ const int most_columns = COLUMNS;
extern "C" __device__ const int threads = THREADS;

struct Params {
  const float* weight;
  const float* factor;
  const float* scales;
  const float* zeros;
  u8* codes;
  float* errors;
  int columns, rows, stride;
  float highest;
};

extern "C" __global__ void __launch_bounds__(THREADS) column_loop(const __grid_constant__ Params p) {
  __shared__ float w[COLUMNS][THREADS];
  __shared__ alignas(16) float u[COLUMNS][COLUMNS + 4];  // [j][c]: what j takes of the error of c; 4 keep banks apart
  const int t = threadIdx.x, row = blockIdx.x * THREADS + t;
  const bool here = row < p.rows;
  for (int i = t; i < COLUMNS * COLUMNS; i += THREADS) {
    const int c = i / COLUMNS, j = i % COLUMNS;
    u[j][c] = c <= j && j < p.columns ? p.factor[(u64)c * p.stride + j] : 0.0f;
  }
  for (int c = 0; c < p.columns; c++) w[c][t] = here ? p.weight[(u64)c * p.rows + row] : 0.0f;
  __syncthreads();
  if (!here) return;

  for (int first = 0; first < p.columns; first += STEP) {
    float v[STEP], scale[STEP], zero[STEP], e[STEP];
#pragma unroll
    for (int i = 0; i < STEP; i++) {
      const int c = first + i;
      const u64 at = (u64)c * p.rows + row;
      const bool inside = c < p.columns;
      v[i] = inside ? w[c][t] : 0.0f;
      scale[i] = inside ? p.scales[at] : 1.0f;
      zero[i] = inside ? p.zeros[at] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < STEP; i++) {
      const int c = first + i;
      e[i] = 0.0f;
      if (c >= p.columns) continue;
      const float code = fminf(fmaxf(rintf(__fdiv_rn(v[i], scale[i])) + zero[i], 0.0f), p.highest);
      e[i] = __fdiv_rn(v[i] - __fmul_rn(code - zero[i], scale[i]), u[c][c]);
      const u64 at = (u64)c * p.rows + row;
      p.codes[at] = (u8)code;
      p.errors[at] = e[i];
#pragma unroll
      for (int later = i + 1; later < STEP; later++) v[later] = __fmaf_rn(-u[first + later][c], e[i], v[later]);
    }
    for (int j = first + STEP; j < p.columns; j++) {
      float sum = w[j][t];
#pragma unroll
      for (int i = 0; i < STEP; i += 4) {
        const float4 from = *(const float4*)&u[j][first + i];
        sum = __fmaf_rn(-from.x, e[i], sum);
        sum = __fmaf_rn(-from.y, e[i + 1], sum);
        sum = __fmaf_rn(-from.z, e[i + 2], sum);
        sum = __fmaf_rn(-from.w, e[i + 3], sum);
      }
      w[j][t] = sum;
    }
  }
}
