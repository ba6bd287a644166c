// Logits of a decode step: RMSNorm of the residual stream, then the head, 16 bits or int8 with a scale a row. Bound by
// reading the head; up to 8 rows of x are the 8 columns of the products, so that their number costs little.
//
//   weight  [vocabulary][width], row after row, as the model has it      x  [batch][width] float32
//
// A warp takes tiles of 16 rows, all k of them. Lane 4r + c loads 16 bytes, k = 32j + 8c.. (int8: 64j + 16c..), of the rows
// r and r + 8, straight into registers, and they are its operands of two (four) k16 steps: which k those are does not
// matter, if x's are the same. The next 2 KB a row are on their way meanwhile, the first before x is there.
#include "common.cuh"

#ifndef INT8
#define INT8 0
#endif

constexpr int WARPS = 16, THREADS = 32 * WARPS;
constexpr int LOADS = 4;                                // of 16 bytes of each row at a time
constexpr int LANE_K = INT8 ? 16 : 8, LOAD_K = 4 * LANE_K, PART_K = LOADS * LOAD_K;

struct Params {
  const u8* weight;
  const float* scales;  // int8: [vocabulary]
  const float* bias;    // [vocabulary], null without
  const float* x;
  const float* norm;    // [width]
  float* logits;        // [batch][vocabulary]
  int vocabulary, width, batch, parts;  // width: a multiple of LANE_K; parts: of PART_K, the last may be shorter
  float epsilon, factor;                // factor: of the logits
};

struct Weights { uint4 row[2][LOADS]; };

DEVICE void load(Weights& to, const Params& p, int tile, int part, int lane) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    int row = min(tile * TILE_ROWS + (lane >> 2) + 8 * h, p.vocabulary - 1);
    const u8* from = p.weight + (u64)row * p.width * (INT8 ? 1 : 2);
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      int k = part * PART_K + i * LOAD_K + (lane & 3) * LANE_K;
      to.row[h][i] = k < p.width ? load_stream16(from + k * (INT8 ? 1 : 2)) : make_uint4(0, 0, 0, 0);
    }
  }
}

#if INT8
// Four int8 as halves: v + 128 in the mantissa of 1024, then the difference, exact.
DEVICE void halves(u32 bytes, u32& lo, u32& hi) {
  u32 v = bytes ^ 0x80808080u;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(lo) : "r"(__byte_perm(v, 0x64646464u, 0x4140)), "r"(0x64806480u));
  asm("sub.f16x2 %0, %1, %2;" : "=r"(hi) : "r"(__byte_perm(v, 0x64646464u, 0x4342)), "r"(0x64806480u));
}
DEVICE void multiply_step(float (&sums)[4], u32 a, u32 b, u32 x0, u32 x1) {
  u32 a0, a1, a2, a3;
  halves(a, a0, a2);
  halves(b, a1, a3);
  mma_acc(sums, a0, a1, a2, a3, x0, x1);
}
#endif

// x: shared address of this lane's part of x
DEVICE void multiply(float (&sums)[2][4], const Weights& w, u32 x) {
#pragma unroll
  for (int i = 0; i < LOADS; i++) {
    uint4 a = w.row[0][i], b = w.row[1][i], v = load_shared16(x + i * LOAD_K * 2);
#if INT8
    uint4 u = load_shared16(x + i * LOAD_K * 2 + 16);
    multiply_step(sums[0], a.x, b.x, v.x, v.y);
    multiply_step(sums[1], a.y, b.y, v.z, v.w);
    multiply_step(sums[0], a.z, b.z, u.x, u.y);
    multiply_step(sums[1], a.w, b.w, u.z, u.w);
#else
    mma_acc(sums[0], a.x, b.x, a.y, b.y, v.x, v.y);
    mma_acc(sums[1], a.z, b.z, a.w, b.w, v.z, v.w);
#endif
  }
}

// The normed rows of x to shared memory, `pitch` halves apart, zero up to the end of the last part.
DEVICE void take_x(const Params& p, u16* to, float* squares, int pitch, int thread) {
  for (int row = 0; row < p.batch; row++) {
    const float* x = p.x + (u64)row * p.width;
    float sum = 0.f;
    for (int i = thread * 4; i < p.width; i += THREADS * 4) {
      uint4 raw = load_fresh16(x + i);
      float a = __uint_as_float(raw.x), b = __uint_as_float(raw.y), c = __uint_as_float(raw.z), d = __uint_as_float(raw.w);
      sum += a * a + b * b + c * c + d * d;
    }
#pragma unroll
    for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
    if (thread % 32 == 0) squares[thread / 32] = sum;
    __syncthreads();
    sum = 0.f;
#pragma unroll
    for (int i = 0; i < WARPS; i++) sum += squares[i];
    float by = rsqrtf(sum / p.width + p.epsilon);
    for (int i = thread * 4; i < p.parts * PART_K; i += THREADS * 4) {
      uint2 v = make_uint2(0, 0);
      if (i < p.width) {
        uint4 raw = load_fresh16(x + i);
        float4 w = __ldg((const float4*)(p.norm + i));
        v.x = (u32)narrow(__uint_as_float(raw.x) * by * w.x) | (u32)narrow(__uint_as_float(raw.y) * by * w.y) << 16;
        v.y = (u32)narrow(__uint_as_float(raw.z) * by * w.z) | (u32)narrow(__uint_as_float(raw.w) * by * w.w) << 16;
      }
      *(uint2*)(to + row * pitch + i) = v;
    }
    __syncthreads();
  }
}

DEVICE void store(const Params& p, float (&sums)[2][4], int tile, int lane) {
#pragma unroll
  for (int e = 0; e < 4; e++) {
    int row = 2 * (lane & 3) + (e & 1), n = tile * TILE_ROWS + (lane >> 2) + 8 * (e >> 1);
    float v = sums[0][e] + sums[1][e];
    sums[0][e] = sums[1][e] = 0.f;
    if (row >= p.batch || n >= p.vocabulary) continue;
    if (INT8) v *= __ldg(p.scales + n);
    if (p.bias) v += __ldg(p.bias + n);
    p.logits[(u64)row * p.vocabulary + n] = v * p.factor;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) head(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) u16 x[];
  __shared__ float squares[WARPS];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, pitch = p.parts * PART_K + 8;
  const int tiles = (p.vocabulary + TILE_ROWS - 1) / TILE_ROWS, stride = gridDim.x * WARPS;
  int tile = blockIdx.x + warp * gridDim.x, part = 0;
  Weights w;
  if (tile < tiles) load(w, p, tile, 0, lane);
  wait_for_earlier_kernels();
  let_next_kernel_start();
  take_x(p, x, squares, pitch, thread);
  const u32 mine = shared_address(x) + (min(lane >> 2, p.batch - 1) * pitch + (lane & 3) * LANE_K) * 2;
  float sums[2][4] = {};
#pragma unroll 2
  while (tile < tiles) {
    int next_tile = tile, next = part + 1;
    if (next == p.parts) { next = 0; next_tile += stride; }
    Weights after;
    if (next_tile < tiles) load(after, p, next_tile, next, lane);
    multiply(sums, w, mine + part * PART_K * 2);
    if (next == 0) store(p, sums, tile, lane);
    w = after;
    tile = next_tile;
    part = next;
  }
}
