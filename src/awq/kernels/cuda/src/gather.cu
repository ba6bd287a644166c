// The kept channels of x, for the wgmma kernel, which needs them as a tensor of their own:
//
//     gathered [rows, columns] = x [rows, index[columns]], 0 where index is -1
//
// columns is a multiple of 16; x has rows x_stride elements apart. A column's neighbours in x are not needed, so every
// element costs a sector of 32 bytes; threads of a warp take adjacent columns, so that at least the results are whole.
#include "common.cuh"

struct Params {
  const u16* x;       // 0
  const int* index;   // 8
  u16* gathered;      // 16
  int rows, columns;  // 24
  int x_stride;       // 32
};

constexpr int UNROLL = 4;  // loads in flight for a thread

extern "C" __global__ void __launch_bounds__(256) gather(const __grid_constant__ Params p) {
  let_next_kernel_start();
  const int all = p.rows * p.columns, threads = gridDim.x * 256, start = blockIdx.x * 256 + threadIdx.x;
  int channels[UNROLL];
  auto load_channels = [&](int first) {
#pragma unroll
    for (int i = 0; i < UNROLL; i++) channels[i] = first + i * threads < all ? __ldg(p.index + (first + i * threads) % p.columns) : -1;
  };
  load_channels(start);
  wait_for_earlier_kernels();
  for (int first = start; first < all; first += threads * UNROLL) {
    if (first > start) load_channels(first);
    u16 v[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; i++)
      v[i] = channels[i] < 0 ? (u16)0 : load_fresh2(p.x + (u64)((first + i * threads) / p.columns) * p.x_stride + channels[i]);
#pragma unroll
    for (int i = 0; i < UNROLL; i++)
      if (first + i * threads < all) p.gathered[first + i * threads] = v[i];
  }
}
