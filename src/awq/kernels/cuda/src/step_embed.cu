// The first kernel of a decode step: the tokens' embeddings become the residual stream, in float32.
//
// It lets the next kernel start only when all before it is over. From here on a kernel may read what the last step wrote,
// and what counts the steps, without waiting for the kernel ahead of it.
#include "common.cuh"

constexpr int THREADS = 128;

struct Params {
  const u16* table;        // [vocabulary][width]
  const long long* tokens; // [batch]
  float* x;                // [batch][width]
  int width, blocks;       // width: a multiple of 8; blocks: of a row
  float factor;
};

extern "C" __global__ void __launch_bounds__(THREADS) embed(const __grid_constant__ Params p) {
  wait_for_earlier_kernels();
  let_next_kernel_start();
  const int row = blockIdx.x / p.blocks, at = (blockIdx.x % p.blocks * THREADS + threadIdx.x) * 8;
  if (at >= p.width) return;
  const long long token = *(volatile const long long*)(p.tokens + row);
  uint4 raw = load_stream16(p.table + token * p.width + at);
  float v[8];
  widen2(raw.x, v[0], v[1]);
  widen2(raw.y, v[2], v[3]);
  widen2(raw.z, v[4], v[5]);
  widen2(raw.w, v[6], v[7]);
  float4* to = (float4*)(p.x + (u64)row * p.width + at);
  to[0] = make_float4(v[0] * p.factor, v[1] * p.factor, v[2] * p.factor, v[3] * p.factor);
  to[1] = make_float4(v[4] * p.factor, v[5] * p.factor, v[6] * p.factor, v[7] * p.factor);
}
