// A weight in full, for products of many rows where there is no wgmma: dense [N, K] = (codes - zero points) * scales,
// plus the residual of kept channels; rounded once to the activations' type. K is a multiple of 8 here.
//
// One block for a unit of 16 rows x 256 k (common.cuh): a warp a slice of 64 k, through float32 in shared memory
//
//     [16 rows][256 k + 4]
//
// from where whole rows of 512 bytes are stored.
#include "common.cuh"

#ifndef GROUP
#define GROUP 128
#endif

constexpr int GROUPS = UNIT_K / GROUP, RECORD = 40 * GROUPS, THREADS = 128;

struct Params {
  const u8* codes;                                      // 0
  const u8* affine;                                     // 8
  const u8* kept;                                       // 16
  const int* kept_index;                                // 24
  u16* dense;                                           // 32
  int out_features, in_features, units, kept_steps;     // 40
};

DEVICE u32 pair(const float* v) { return (u32)narrow(v[0]) | (u32)narrow(v[1]) << 16; }

extern "C" __global__ void __launch_bounds__(THREADS) dequantize(const __grid_constant__ Params p) {
  __shared__ __align__(16) float weights[TILE_ROWS][UNIT_K + 4];
  const int tile = blockIdx.x / p.units, unit = blockIdx.x % p.units, slice = threadIdx.x / 32;
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const uint4 q = load_stream16(p.codes + (u64)blockIdx.x * UNIT_BYTES + threadIdx.x * 16);
  const u8* record = p.affine + (u64)blockIdx.x * RECORD;
  const u32 words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
  for (int w = 0; w < 4; w++) {
    const int half = w & 1, k0 = slice * 64 + (w >> 1) * 32, group = k0 / GROUP;
    const float scale = half_to_float(((const u16*)record)[(r * GROUPS + group) * 2 + half]);
    const int zero = record[32 * GROUPS + r * GROUPS + group] >> (4 * half) & 15;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int k = k0 + (i & 1) * 16 + (i >> 1 & 1) * 8 + 2 * c + (i >> 2);
      weights[r + 8 * half][k] = (float)((int)(words[w] >> (4 * i) & 15) - zero) * scale;
    }
  }
  __syncthreads();
  for (int j = threadIdx.x; j < p.kept_steps * 16; j += THREADS) {
    const u32 k = p.kept_index[j] - unit * UNIT_K;
    if (k >= UNIT_K) continue;  // in another unit, or padding
    // As common.cuh draws a step's fragments: rows r in lane 4r + c, and all that one k selects.
    const u8* step = p.kept + ((u64)tile * p.kept_steps + j / 16) * 512 + (j % 8 / 2) * 16 + (j % 16 / 8) * 8 + j % 2 * 2;
    for (int row = 0; row < TILE_ROWS; row++)
      weights[row][k] += half_to_float(*(const u16*)(step + row % 8 * 64 + row / 8 * 4));
  }
  __syncthreads();
  for (int i = threadIdx.x; i < TILE_ROWS * UNIT_K / 8; i += THREADS) {
    const int row = i / (UNIT_K / 8), k = i % (UNIT_K / 8) * 8, n = tile * TILE_ROWS + row;
    if (n >= p.out_features || unit * UNIT_K + k >= p.in_features) continue;
    const float* v = weights[row] + k;
    *(uint4*)(p.dense + (u64)n * p.in_features + unit * UNIT_K + k) =
        make_uint4(pair(v), pair(v + 2), pair(v + 4), pair(v + 6));
  }
}
