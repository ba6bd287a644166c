// Logits of a decode step: RMSNorm of the residual stream, then the head, 16 bits or int8 with a scale a row. Bound by
// reading the head; up to 8 rows of x are the 8 columns of the products, so that their number costs little.
//
//   weight  [vocabulary][width], row after row, as the model has it      x  [batch][width] float32
//
// A warp takes tiles of 16 rows, all k of them, and has a ring of its own, which tensor copies fill with 16 rows x ROW_BYTES
// at a time, the first before x is there. Beyond the last row and the last k they are zeros. Lane 4r + c loads 16 bytes,
// k = 32j + 8c.. (int8: 64j + 16c..), of the rows r and r + 8, and they are its operands of two (four) k16 steps: which k
// those are does not matter, if x's are the same. Loads into two sets of registers instead, of which one was moved to the
// other at the end of a part, waited at every move: 70 % of the bandwidth.
#include "common.cuh"

#ifndef INT8
#define INT8 0
#endif

#ifndef ROW_BYTES
#define ROW_BYTES 512
#endif
#ifndef WARPS
#define WARPS 8
#endif

constexpr int THREADS = 32 * WARPS, LOADS = ROW_BYTES / 64;  // of 16 bytes of each row, by a lane
constexpr int LANE_K = INT8 ? 16 : 8, LOAD_K = 4 * LANE_K, PART_K = LOADS * LOAD_K;
constexpr int STAGE = TILE_ROWS * ROW_BYTES, MOST_STAGES = 8;

struct Params {
  TensorMap weight;     // [vocabulary][width], in elements of 8 bytes
  const float* scales;  // int8: [vocabulary]
  const float* bias;    // [vocabulary], null without
  const float* x;
  const float* norm;    // [width]
  float* logits;        // [batch][vocabulary]
  int vocabulary, width, batch, parts;  // width: a multiple of LANE_K; parts: of PART_K, the last may be shorter
  int stages;                           // of a ring: up to MOST_STAGES
  float epsilon, factor;                // factor: of the logits
};

// A warp's ring. Copies go `stages` ahead of the products, in the same order: the parts of a tile, then the next tile.
struct Ring {
  u32 data, full;             // addresses of the first stage and of its barrier
  int stage, tile, part;      // stage: of the next product, and of the copy behind it; tile, part: of the next copy
  u32 parity;

  DEVICE void copy(const Params& p, int tile_stride) {
    if (tile * TILE_ROWS >= p.vocabulary) return;
    barrier_expect(full + 8 * stage, STAGE);
    copy_box(data + stage * STAGE, p.weight, part * (ROW_BYTES / 8), tile * TILE_ROWS, full + 8 * stage);
    if (++part == p.parts) { part = 0; tile += tile_stride; }
  }
  DEVICE void advance(const Params& p) {
    if (++stage == p.stages) { stage = 0; parity ^= 1; }
  }
};

struct Weights { uint4 row[2][LOADS]; };

// A stage to registers, then its place to the next copy.
DEVICE void take(Weights& to, Ring& ring, const Params& p, int tile_stride, int lane) {
  u32 from = ring.data + ring.stage * STAGE + (lane >> 2) * ROW_BYTES + (lane & 3) * 16, seen = 0;
  barrier_wait(ring.full + 8 * ring.stage, ring.parity);
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      to.row[h][i] = load_shared16(from + h * 8 * ROW_BYTES + i * 64);
      seen ^= to.row[h][i].x;
    }
  have_arrived(ring.full + 8 * ring.stage, seen);
  __syncwarp();
  if (lane == 0) ring.copy(p, tile_stride);
  ring.advance(p);
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
    float by = rsqrtf(__fdividef(sum, (float)p.width) + p.epsilon);
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
  extern __shared__ __align__(128) u8 dynamic[];  // rings, then x
  __shared__ float squares[WARPS];
  __shared__ __align__(8) u64 full[WARPS][MOST_STAGES];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, pitch = p.parts * PART_K + 8;
  const int stride = gridDim.x * WARPS;
  u16* x = (u16*)(dynamic + WARPS * p.stages * STAGE);
  int tile = blockIdx.x + warp * gridDim.x;
  Ring ring = {shared_address(dynamic) + warp * p.stages * STAGE, shared_address(full[warp]), 0, tile, 0, 0};
  if (lane == 0) {
#pragma unroll 1
    for (int i = 0; i < p.stages; i++) barrier_init(ring.full + 8 * i, 1);
    fence_for_copies();
#pragma unroll 1
    for (; ring.stage < p.stages; ring.stage++) ring.copy(p, stride);
    ring.stage = 0;
  }
  wait_for_earlier_kernels();
  let_next_kernel_start();
  take_x(p, x, squares, pitch, thread);  // with barriers, behind which all see the rings'
  const u32 mine = shared_address(x) + (min(lane >> 2, p.batch - 1) * pitch + (lane & 3) * LANE_K) * 2;
  float sums[2][4] = {};
#pragma unroll 1
  for (; tile * TILE_ROWS < p.vocabulary; tile += stride) {
#pragma unroll 1
    for (int part = 0; part < p.parts; part++) {
      Weights w;
      take(w, ring, p, stride, lane);
      multiply(sums, w, mine + part * PART_K * 2);
    }
    store(p, sums, tile, lane);
  }
}
