// The projection of a prompt's tokens becomes queries, where they are, and keys and values in the cache: norms of heads
// and RoPE.
//
//   qkv     [rows * columns][stride]                        what the projection wrote: heads of query, key and value
//   cache   [rows][key_heads][capacity][HEAD_DIM], twice    keys as they are after norm and RoPE
//
// A block takes WARPS x EACH heads of a token: a warp some heads one after the other, all of which it has asked for
// before it goes on with the first, and a lane 4 channels in a row.
#include "common.cuh"

#ifndef HEAD_DIM  // a multiple of 8
#define HEAD_DIM 128
#endif
#ifndef EACH
#define EACH 4
#endif

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int QUADS = (HEAD_DIM + 127) / 128;  // of channels that a lane has

struct Params {
  u16* qkv;
  u16* keys;
  u16* values;
  const float2* rope;       // [positions][rotary / 2] cosine and sine; null without
  const float* query_norm;  // [HEAD_DIM] weights, null without
  const float* key_norm;
  const long long* first;   // [rows] first slot that counts
  long long stride;
  int query_at, key_at, value_at;  // in a row of qkv
  int heads, key_heads, blocks;    // blocks: of a token
  int columns, past;               // tokens of a row, of which the first goes to slot `past`
  int capacity, rotary, interleaved;
  float query_epsilon, key_epsilon;
};

struct Shared {
  float turning[WARPS][128 * QUADS];  // a head while its channels find their partners
};

// How 4 channels of a lane turn: those of a head from `at` on.
struct Turn {
  float cosine[QUADS][4], sine[QUADS][4];

  DEVICE Turn(const Params& p, int position, int lane) {
    const int half = p.rotary / 2;
    const float2* angles = p.rope + (long long)position * half;
#pragma unroll
    for (int n = 0; n < QUADS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int at = 128 * n + 4 * lane + i, pair = p.interleaved ? at / 2 : at < half ? at : at - half;
        const float2 angle = at < p.rotary ? __ldg(angles + pair) : make_float2(1.f, 0.f);
        cosine[n][i] = angle.x;
        sine[n][i] = (p.interleaved ? at & 1 : at >= half) ? angle.y : -angle.y;
      }
  }
  // The channel that turns with this one; itself where none does.
  DEVICE static int partner(const Params& p, int at) {
    const int half = p.rotary / 2;
    return at >= p.rotary ? at : p.interleaved ? at ^ 1 : at < half ? at + half : at - half;
  }
};

DEVICE void normed(float (&v)[QUADS][4], const float* norm, float epsilon, int lane) {
  float square = 0.f;
#pragma unroll
  for (int n = 0; n < QUADS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) square = fmaf(v[n][i], v[n][i], square);
#pragma unroll
  for (int o = 16; o; o >>= 1) square += __shfl_xor_sync(~0u, square, o);
  const float by = rsqrtf(fmaf(square, 1.f / HEAD_DIM, epsilon));
#pragma unroll
  for (int n = 0; n < QUADS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int at = 128 * n + 4 * lane + i;
      v[n][i] *= at < HEAD_DIM ? by * __ldg(norm + at) : 0.f;
    }
}

DEVICE void turned(float (&v)[QUADS][4], const Turn& turn, const Params& p, float* turning, int lane) {
#pragma unroll
  for (int n = 0; n < QUADS; n++) *(float4*)(turning + 128 * n + 4 * lane) = make_float4(v[n][0], v[n][1], v[n][2], v[n][3]);
  __syncwarp();
#pragma unroll
  for (int n = 0; n < QUADS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      v[n][i] = fmaf(v[n][i], turn.cosine[n][i], turning[Turn::partner(p, 128 * n + 4 * lane + i)] * turn.sine[n][i]);
  __syncwarp();
}

extern "C" __global__ void __launch_bounds__(THREADS) place(const __grid_constant__ Params p) {
  __shared__ __align__(16) Shared shared;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int token = blockIdx.x / p.blocks, row = token / p.columns, slot = p.past + token - row * p.columns;
  const int begin = ((blockIdx.x - token * p.blocks) * WARPS + warp) * EACH, all = p.heads + 2 * p.key_heads;
  let_next_kernel_start();
  const Turn turn(p, max(0, slot - (int)load_fresh8(p.first + row).x), lane);
  wait_for_earlier_kernels();
  const u16* from[EACH];
  uint2 raw[EACH][QUADS];
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const int item = begin + e, key = item - p.heads, value = key - p.key_heads;
    const int at = key < 0 ? p.query_at + item * HEAD_DIM : value < 0 ? p.key_at + key * HEAD_DIM : p.value_at + value * HEAD_DIM;
    from[e] = p.qkv + token * p.stride + at;
#pragma unroll
    for (int n = 0; n < QUADS; n++)
      raw[e][n] = item < all && 128 * n + 4 * lane < HEAD_DIM ? load_fresh8(from[e] + 128 * n + 4 * lane) : make_uint2(0, 0);
  }
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const int item = begin + e, key = item - p.heads, value = key - p.key_heads;
    if (item >= all) break;
    u16* to = (u16*)from[e];
    if (key >= 0) to = (value < 0 ? p.keys : p.values) + ((u64)(row * p.key_heads + (value < 0 ? key : value)) * p.capacity + slot) * HEAD_DIM;
    float v[QUADS][4];
#pragma unroll
    for (int n = 0; n < QUADS; n++) {
      widen2(raw[e][n].x, v[n][0], v[n][1]);
      widen2(raw[e][n].y, v[n][2], v[n][3]);
    }
    const float* norm = key < 0 ? p.query_norm : p.key_norm;
    if (value < 0 && norm) normed(v, norm, key < 0 ? p.query_epsilon : p.key_epsilon, lane);
    if (value < 0 && p.rotary) turned(v, turn, p, shared.turning[warp], lane);
#pragma unroll
    for (int n = 0; n < QUADS; n++) {
      const uint2 made = make_uint2((u32)narrow(v[n][0]) | (u32)narrow(v[n][1]) << 16, (u32)narrow(v[n][2]) | (u32)narrow(v[n][3]) << 16);
      if (128 * n + 4 * lane < HEAD_DIM) *(uint2*)(to + 128 * n + 4 * lane) = made;
    }
  }
}
