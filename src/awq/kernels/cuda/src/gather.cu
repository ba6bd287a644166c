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
  const int all = p.rows * p.columns, threads = gridDim.x * 256;
  wait_for_earlier_kernels();
  for (int first = blockIdx.x * 256 + threadIdx.x; first < all; first += threads * UNROLL) {
    u16 v[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; i++) {
      const int at = first + i * threads, row = at / p.columns;
      const int channel = at < all ? p.index[at - row * p.columns] : -1;
      v[i] = channel < 0 ? (u16)0 : load_fresh2(p.x + (u64)row * p.x_stride + channel);
    }
#pragma unroll
    for (int i = 0; i < UNROLL; i++)
      if (first + i * threads < all) p.gathered[first + i * threads] = v[i];
  }
}
