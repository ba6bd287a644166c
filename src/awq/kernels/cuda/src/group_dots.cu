// What the refit of scales asks of the products of some groups' steps with the Gram matrix: their dot products with the
// steps of the same row, group by group, put into the symmetric matrix of each row's normal equations.
//
//   products  bf16 or float32  [count][rows][groups - first][GROUP]     steps  as products  [rows][groups][GROUP]
//   normal    float32          [rows][groups][groups]: at [h][first + c], h from `first` on, and at [first + c][h], h from
//                              `first + count` on: between the products themselves all are there
//
// GROUP / 8 lanes beside each other have a group of a row, 8 numbers each, and of all products, up to 4, at once. In
// three operations of torch a block of Llama-3-70B (effort "fast") took 2.40 s on an H200, of which they were 0.21.
#include "common.cuh"

#ifndef GROUP
#define GROUP 128
#endif

constexpr int THREADS = 256, LANES = GROUP / 8, COUNT = 4;
extern "C" __device__ const int threads = THREADS;
extern "C" __device__ const int most_products = COUNT;
static_assert(LANES <= 32, "a group lies within a warp");

struct Params {
  const void* products;
  const void* steps;
  float* normal;
  int count, rows, groups, first, bf16;
};

struct Eight { float v[8]; };
DEVICE Eight eight(const void* from, u64 at, bool bf16, bool there) {
  const uint4 zero = make_uint4(0, 0, 0, 0), low = there ? ((const uint4*)from)[bf16 ? at : 2 * at] : zero;
  const uint4 high = there && !bf16 ? ((const uint4*)from)[2 * at + 1] : zero;
  const u32 words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  Eight to;
#pragma unroll
  for (int i = 0; i < 8; i++) to.v[i] = __uint_as_float(!bf16 ? words[i] : i & 1 ? words[i / 2] & 0xffff0000 : words[i / 2] << 16);
  return to;
}

extern "C" __global__ void __launch_bounds__(THREADS) group_dots(const __grid_constant__ Params p) {
  const u32 later = p.groups - p.first, places = p.rows * later, lane = threadIdx.x % LANES;
  const u32 place = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
  const bool here = place < places;  // all lanes of a group, but not of a warp
  const u32 row = here ? place / later : 0, group = here ? p.first + place % later : 0;
  const Eight step = eight(p.steps, ((u64)row * p.groups + group) * LANES + lane, p.bf16, here);
  Eight product[COUNT];
#pragma unroll
  for (int c = 0; c < COUNT; c++) product[c] = eight(p.products, ((u64)c * places + place) * LANES + lane, p.bf16, here && c < p.count);
#pragma unroll
  for (int c = 0; c < COUNT; c++) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) sum = fmaf(product[c].v[i], step.v[i], sum);
#pragma unroll
    for (int o = LANES / 2; o; o >>= 1) sum += __shfl_xor_sync(0xffffffff, sum, o);
    if (!here || lane || c >= p.count) continue;
    float* of_row = p.normal + (u64)row * p.groups * p.groups;
    of_row[group * p.groups + p.first + c] = sum;
    if (group >= p.first + p.count) of_row[(p.first + c) * p.groups + group] = sum;
  }
}
