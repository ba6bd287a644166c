// Between the two products of a gated MLP, for many rows: out = act(gate) * up.
//
//   projected  [rows][2 * width]   gate, then up
//   out        [rows][width]
//
// A thread takes 8 channels.
#include "common.cuh"
#include "activation.cuh"

constexpr int THREADS = 256;

struct Params {
  const u16* projected;
  u16* out;
  int width, blocks;  // width: a multiple of 8; blocks: of a row
};

DEVICE u32 gated(u32 gate, u32 up) {
  float a, b, c, d;
  widen2(gate, a, b);
  widen2(up, c, d);
  return (u32)narrow(activated(a) * c) | (u32)narrow(activated(b) * d) << 16;
}

extern "C" __global__ void __launch_bounds__(THREADS) gate(const __grid_constant__ Params p) {
  const int row = blockIdx.x / p.blocks, at = ((blockIdx.x - row * p.blocks) * THREADS + threadIdx.x) * 8;
  let_next_kernel_start();
  wait_for_earlier_kernels();
  if (at >= p.width) return;
  const u16* from = p.projected + (u64)row * 2 * p.width + at;
  uint4 a = load_fresh16(from), b = load_fresh16(from + p.width);
  *(uint4*)(p.out + (u64)row * p.width + at) = make_uint4(gated(a.x, b.x), gated(a.y, b.y), gated(a.z, b.z), gated(a.w, b.w));
}
