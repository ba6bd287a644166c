// Attention of one new token a sequence over its cache: norms of query and key, RoPE, the new key and value put into the
// cache, softmax and the sum of values. Bound by reading keys and values.
//
//   qkv     [batch][qkv_stride]                             what the projection wrote: heads of query, key and value
//   cache   [batch][key_heads][capacity][HEAD_DIM], twice   keys as they are after norm and RoPE
//   y       [batch][heads][HEAD_DIM]
//
// A cluster of SPLITS blocks takes one key head and up to 8 of its query heads (where more share it, others take them). The
// tokens from the first visible one up to the new one come in chunks of 16; chunk j goes to block j % SPLITS and there to
// warp j / SPLITS % WARPS. A warp keeps running maximum, sum and result of its chunks; then the warps' are put together,
// then the blocks' through the cluster's shared memory. The new token, not yet in the cache, is one more part.
//
// All the products are mma of 16 tokens (or 16 channels) by 8 heads, with keys and values straight from memory:
//
//   scores [16 tokens, 8 heads] = K [16 tokens, d] Q^T:  lane 4r + c loads 16 bytes, channels 32j + 8c.., of the tokens r
//       and r + 8. They are its operands of two k16 steps: which channels those are does not matter, if Q's are the same.
//   y^T [16 channels, 8 heads] += V^T [16 channels, 16 tokens] P^T:  lane 4r + c loads channels PER_LANE r.. of both
//       halves of the tokens 2c, 2c + 1, 2c + 8, 2c + 9; channel i of all of these makes the fragment of rows r and r + 8.
//       P^T is the transpose of the scores, 8 x 8 at a time.
//
// What earlier steps wrote is loaded before the wait for the projection: the kernel that begins a step lets none start
// before all of the last step is over.
#include "common.cuh"

#ifndef HEAD_DIM  // a multiple of 8
#define HEAD_DIM 128
#endif
#ifndef SPLITS  // 1 to 8; 1 before sm_90, which has no clusters
#define SPLITS 4
#endif

constexpr int WARPS = 8, THREADS = 32 * WARPS, HEADS = 8, CHUNK = 16;
constexpr int WIDE = (HEAD_DIM + 31) / 32 * 32;  // channels with padding
constexpr int PER_LANE = WIDE / 16;              // channels of one half that a lane loads of a value
constexpr int Q_PITCH = WIDE + 8;                // halves from head to head: 16 bytes apart in the banks
constexpr bool DOUBLE = WIDE <= 128;             // the registers hold a second chunk, on its way
constexpr float LOWEST = -1e30f;

struct Params {
  const u16* qkv;
  u16* keys;
  u16* values;
  u16* y;
  const float2* rope;       // [positions][rotary / 2] cosine and sine; null without
  const float* query_norm;  // [HEAD_DIM] weights, null without
  const float* key_norm;
  const long long* slot;      // [1] where in the cache the new token goes
  const long long* first;     // [batch] first slot that counts
  const long long* position;  // [batch] of the new token, for RoPE
  long long qkv_stride;
  int query_at, key_at, value_at;  // in a row of qkv
  int batch, key_heads, group;     // group: query heads of a key head
  int parts;                       // that they are taken in, of up to 8
  int capacity, window;            // window: slots that are seen, the new one included; 0: all
  int rotary, interleaved;         // channels that turn; whether pairs are neighbours or half of them apart
  float scale;                     // of the scores, times log2(e)
  float query_epsilon, key_epsilon;
};

struct Shared {
  u16 q[HEADS][Q_PITCH];
  u16 new_key[WIDE];
  float new_value[WIDE];
  float turning[WARPS][WIDE];      // a head while its channels find their partners
  float most[WARPS + 1][HEADS], sum[WARPS + 1][HEADS];  // of each warp; the last is the new token
  float block_most[HEADS], block_sum[HEADS];
  float block_y[HEADS][WIDE];
};
// then [WARPS][heads][WIDE] floats: the warps' results

// Where a block stands.
struct Place { int split, part, key_head, row, heads, head; };
DEVICE Place place_of(const Params& p) {
  Place a;
  int i = blockIdx.x;
  a.split = i % SPLITS;
  i /= SPLITS;
  a.part = i % p.parts;
  i /= p.parts;
  a.key_head = i % p.key_heads;
  a.row = i / p.key_heads;
  int each = (p.group + p.parts - 1) / p.parts, from = a.part * each;
  a.heads = min(each, p.group - from);
  a.head = a.key_head * p.group + from;
  return a;
}

DEVICE float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE u32 narrow2(float lo, float hi) { return (u32)narrow(lo) | (u32)narrow(hi) << 16; }
// The transpose of an 8 x 8 matrix of halves, a row in four lanes.
DEVICE u32 transposed(u32 v) {
  u32 t; asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(t) : "r"(v)); return t;
}
DEVICE u32 load_fresh4(const void* p) {
  u32 v; asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory"); return v;
}

// ------------------------------------------------------------------------------------------------ chunks of the cache

struct Chunk {
  u32 k[2][WIDE / 32][4];        // of the tokens r and r + 8
  u32 v[4][2][PER_LANE / 2];     // of the tokens 2c, 2c + 1, 2c + 8, 2c + 9
};

// Words of 2 channels from channel `at` on, zero beyond HEAD_DIM or where `there` is false.
template <int N> DEVICE void load_channels(u32 (&to)[N], const u16* row, int at, bool there) {
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      uint4 v = make_uint4(0, 0, 0, 0);
      if (there && at + 2 * i < HEAD_DIM) v = load_fresh16(row + at + 2 * i);
      to[i] = v.x; to[i + 1] = v.y; to[i + 2] = v.z; to[i + 3] = v.w;
    }
  } else if constexpr (N == 2) {
    uint2 v = make_uint2(0, 0);
    if (there && at < HEAD_DIM) v = load_fresh8(row + at);
    to[0] = v.x; to[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) to[i] = there && at + 2 * i < HEAD_DIM ? load_fresh4(row + at + 2 * i) : 0;
  }
}

// from: slot of the chunk's first token; those before `start` and from `slot` on are zeros.
DEVICE void load(Chunk& chunk, const u16* keys, const u16* values, int from, int start, int slot, int lane) {
  const int r = lane >> 2, c = lane & 3;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    int token = from + r + 8 * h;
#pragma unroll
    for (int j = 0; j < WIDE / 32; j++)
      load_channels(chunk.k[h][j], keys + (u64)token * HEAD_DIM, 32 * j + 8 * c, token >= start && token < slot);
  }
#pragma unroll
  for (int t = 0; t < 4; t++) {
    int token = from + 2 * c + (t & 1) + 8 * (t >> 1);
#pragma unroll
    for (int half = 0; half < 2; half++)
      load_channels(chunk.v[t][half], values + (u64)token * HEAD_DIM, half * (WIDE / 2) + PER_LANE * r, token >= start && token < slot);
  }
}

// What a warp has so far: of the heads 2c and 2c + 1 the maximum and the sum (of its own tokens r, r + 8), and y^T.
struct Running {
  float most[2], sum[2], y[PER_LANE][4];
};

DEVICE u32 pair(const u32 (&a)[PER_LANE / 2], const u32 (&b)[PER_LANE / 2], int i) {
  return __byte_perm(a[i / 2], b[i / 2], i & 1 ? 0x7632 : 0x5410);
}

DEVICE void add(Running& run, const Chunk& chunk, const uint4 (&q)[WIDE / 32], int from, int start, int slot, float scale, int lane) {
  float s[4] = {};
#pragma unroll
  for (int j = 0; j < WIDE / 32; j++) {
    const u32 (&a)[4] = chunk.k[0][j], (&b)[4] = chunk.k[1][j];
    mma_acc(s, a[0], b[0], a[1], b[1], q[j].x, q[j].y);
    mma_acc(s, a[2], b[2], a[3], b[3], q[j].z, q[j].w);
  }
  bool seen[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    int token = from + (lane >> 2) + 8 * h;
    seen[h] = token >= start && token < slot;
  }
  float fade[2];
#pragma unroll
  for (int e = 0; e < 2; e++) {
    float a = seen[0] ? s[e] * scale : LOWEST, b = seen[1] ? s[2 + e] * scale : LOWEST, most = fmaxf(a, b);
#pragma unroll
    for (int o = 4; o < 32; o <<= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
    most = fmaxf(most, run.most[e]);
    fade[e] = exp2_fast(run.most[e] - most);
    s[e] = seen[0] ? exp2_fast(a - most) : 0.f;
    s[2 + e] = seen[1] ? exp2_fast(b - most) : 0.f;
    run.sum[e] = fmaf(run.sum[e], fade[e], s[e] + s[2 + e]);
    run.most[e] = most;
  }
  u32 b0 = transposed(narrow2(s[0], s[1])), b1 = transposed(narrow2(s[2], s[3]));
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
#pragma unroll
    for (int e = 0; e < 4; e++) run.y[i][e] *= fade[e & 1];
    mma_acc(run.y[i], pair(chunk.v[0][0], chunk.v[1][0], i), pair(chunk.v[0][1], chunk.v[1][1], i),
            pair(chunk.v[2][0], chunk.v[3][0], i), pair(chunk.v[2][1], chunk.v[3][1], i), b0, b1);
  }
}

// ---------------------------------------------------------------------------------- the new token's query, key, value

// What a lane needs that does not come from the projection: channels lane, lane + 32, ... of a head.
struct Turn {
  float cosine[WIDE / 32], sine[WIDE / 32], query_weight[WIDE / 32], key_weight[WIDE / 32];

  DEVICE Turn(const Params& p, long long position, int lane) {
#pragma unroll
    for (int n = 0; n < WIDE / 32; n++) {
      int at = lane + 32 * n, half = p.rotary / 2;
      bool turns = p.rope && at < p.rotary, there = at < HEAD_DIM;
      float2 angle = make_float2(1.f, 0.f);
      if (turns) angle = __ldg(p.rope + position * half + (p.interleaved ? at / 2 : at % half));
      cosine[n] = angle.x;
      sine[n] = turns && (p.interleaved ? at & 1 : at >= half) ? angle.y : -angle.y;
      query_weight[n] = p.query_norm && there ? __ldg(p.query_norm + at) : 1.f;
      key_weight[n] = p.key_norm && there ? __ldg(p.key_norm + at) : 1.f;
    }
  }
};

// One head by one warp: norm, RoPE, to `put(channel, value)`.
template <class PUT>
DEVICE void turn_head(const Params& p, const Turn& turn, const u16* from, bool query, float* turning, int lane, PUT put) {
  const float* norm = query ? p.query_norm : p.key_norm;
  float v[WIDE / 32], square = 0.f;
#pragma unroll
  for (int n = 0; n < WIDE / 32; n++) {
    int at = lane + 32 * n;
    v[n] = at < HEAD_DIM ? widen(load_fresh2(from + at)) : 0.f;
    square = fmaf(v[n], v[n], square);
  }
  if (norm) {
#pragma unroll
    for (int o = 16; o; o >>= 1) square += __shfl_xor_sync(~0u, square, o);
    float by = rsqrtf(fmaf(square, 1.f / HEAD_DIM, query ? p.query_epsilon : p.key_epsilon));
#pragma unroll
    for (int n = 0; n < WIDE / 32; n++) v[n] *= by * (query ? turn.query_weight[n] : turn.key_weight[n]);
  }
#pragma unroll
  for (int n = 0; n < WIDE / 32; n++) turning[lane + 32 * n] = v[n];
  __syncwarp();
#pragma unroll
  for (int n = 0; n < WIDE / 32; n++) {
    int at = lane + 32 * n, half = p.rotary / 2, partner = p.interleaved ? at ^ 1 : at < half ? at + half : at - half;
    float other = p.rope && at < p.rotary ? turning[partner] : 0.f;
    if (at < HEAD_DIM) put(at, fmaf(v[n], turn.cosine[n], other * turn.sine[n]));
  }
  __syncwarp();
}

// Query heads to shared memory; in the cluster's first block the key and the value too, and by its first part the cache.
DEVICE void take_token(const Params& p, const Place& a, const Turn& turn, Shared& shared, int slot, int warp, int lane) {
  const u16* row = p.qkv + a.row * p.qkv_stride;
  const int extra = a.split == 0 ? 2 : 0;
  const bool writes = a.part == 0;
  const u64 to = ((u64)(a.row * p.key_heads + a.key_head) * p.capacity + slot) * HEAD_DIM;
  for (int item = warp; item < a.heads + extra; item += WARPS) {
    if (item < a.heads) {
      turn_head(p, turn, row + p.query_at + (a.head + item) * HEAD_DIM, true, shared.turning[warp], lane,
                [&](int at, float v) { shared.q[item][at] = narrow(v); });
    } else if (item == a.heads) {
      turn_head(p, turn, row + p.key_at + a.key_head * HEAD_DIM, false, shared.turning[warp], lane, [&](int at, float v) {
        shared.new_key[at] = narrow(v);
        if (writes) p.keys[to + at] = narrow(v);
      });
    } else {
      for (int at = lane; at < HEAD_DIM; at += 32) {
        u16 v = load_fresh2(row + p.value_at + a.key_head * HEAD_DIM + at);
        shared.new_value[at] = widen(v);
        if (writes) p.values[to + at] = v;
      }
    }
  }
}

// The new token as one more part: its score, and a sum of 1.
DEVICE void score_token(const Place& a, Shared& shared, float scale, int warp, int lane) {
  if (warp >= HEADS) return;
  float s = 0.f;
  for (int at = lane; at < HEAD_DIM; at += 32) s = fmaf(widen(shared.q[warp][at]), widen(shared.new_key[at]), s);
#pragma unroll
  for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o);
  if (lane == 0) {
    shared.most[WARPS][warp] = a.split == 0 ? s * scale : LOWEST;
    shared.sum[WARPS][warp] = a.split == 0 ? 1.f : 0.f;
  }
}

// ----------------------------------------------------------------------------------------------------- putting together

DEVICE void hand_over(Running& run, Shared& shared, float* results, int heads, int warp, int lane) {
  const int r = lane >> 2, c = lane & 3;
#pragma unroll
  for (int e = 0; e < 2; e++) {
#pragma unroll
    for (int o = 4; o < 32; o <<= 1) run.sum[e] += __shfl_xor_sync(~0u, run.sum[e], o);
    int head = 2 * c + e;
    if (r == 0) { shared.most[warp][head] = run.most[e]; shared.sum[warp][head] = run.sum[e]; }
    if (head >= heads) continue;
    float* to = results + (warp * heads + head) * WIDE + PER_LANE * r;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      to[i] = run.y[i][e];
      to[WIDE / 2 + i] = run.y[i][2 + e];
    }
  }
}

DEVICE void put_warps_together(Shared& shared, const float* results, int heads, bool new_token, int thread) {
  for (int i = thread; i < heads * WIDE; i += THREADS) {
    int head = i / WIDE, at = i % WIDE;
    float most = shared.most[WARPS][head], sum = 0.f, y = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) most = fmaxf(most, shared.most[w][head]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      float part = exp2_fast(shared.most[w][head] - most);
      sum = fmaf(part, shared.sum[w][head], sum);
      y = fmaf(part, results[(w * heads + head) * WIDE + at], y);
    }
    if (new_token) {
      float part = exp2_fast(shared.most[WARPS][head] - most);
      sum += part;
      y = fmaf(part, at < HEAD_DIM ? shared.new_value[at] : 0.f, y);
    }
    shared.block_y[head][at] = y;
    if (at == 0) { shared.block_most[head] = most; shared.block_sum[head] = sum; }
  }
}

#if __CUDA_ARCH__ >= 900
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// A float of shared memory as block `rank` of the cluster has it.
DEVICE float load_of(const float* mine, u32 rank) {
  u32 at; float v;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(mine)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
  return v;
}
#endif

// The blocks of a cluster share out the channels, and each divides its by the sum.
DEVICE void put_blocks_together(const Params& p, const Place& a, Shared& shared, int thread) {
  u16* y = p.y + ((u64)a.row * p.key_heads * p.group + a.head) * HEAD_DIM;
#if __CUDA_ARCH__ >= 900
  if constexpr (SPLITS > 1) {
    cluster_arrive();
    cluster_wait();
    for (int i = a.split * THREADS + thread; i < a.heads * HEAD_DIM; i += SPLITS * THREADS) {
      int head = i / HEAD_DIM, at = i % HEAD_DIM;
      float most[SPLITS], sums[SPLITS], parts[SPLITS], top = LOWEST, sum = 0.f, out = 0.f;
#pragma unroll
      for (int s = 0; s < SPLITS; s++) {
        most[s] = load_of(&shared.block_most[head], s);
        sums[s] = load_of(&shared.block_sum[head], s);
        parts[s] = load_of(&shared.block_y[head][at], s);
        top = fmaxf(top, most[s]);
      }
#pragma unroll
      for (int s = 0; s < SPLITS; s++) {
        float part = exp2_fast(most[s] - top);
        sum = fmaf(part, sums[s], sum);
        out = fmaf(part, parts[s], out);
      }
      y[i] = narrow(__fdividef(out, sum));
    }
    cluster_arrive();  // none leaves while another reads its memory
    cluster_wait();
    return;
  }
#endif
  __syncthreads();
  for (int i = thread; i < a.heads * HEAD_DIM; i += THREADS) {
    int head = i / HEAD_DIM;
    y[i] = narrow(__fdividef(shared.block_y[head][i % HEAD_DIM], shared.block_sum[head]));
  }
}

#if __CUDA_ARCH__ >= 900 && SPLITS > 1
#define CLUSTER __cluster_dims__(SPLITS, 1, 1)
#else
#define CLUSTER
#endif

extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, 1) attention(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) float results[];
  __shared__ __align__(16) Shared shared;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const Place a = place_of(p);
  const int slot = (int)*(volatile const long long*)p.slot, first = (int)*(volatile const long long*)(p.first + a.row);
  const int start = p.window ? max(first, slot - p.window + 1) : first;
  const int base = start & ~(CHUNK - 1), count = slot > base ? (slot - base + CHUNK - 1) / CHUNK : 0;
  const u64 cache = (u64)(a.row * p.key_heads + a.key_head) * p.capacity * HEAD_DIM;
  const u16 *keys = p.keys + cache, *values = p.values + cache;
  const Turn turn(p, *(volatile const long long*)(p.position + a.row), lane);
  for (int i = thread; i < HEADS * Q_PITCH; i += THREADS) (&shared.q[0][0])[i] = 0;
  for (int i = thread; i < WIDE; i += THREADS) shared.new_key[i] = 0;

  constexpr int STRIDE = SPLITS * WARPS;
  int at = a.split + SPLITS * warp;
  Chunk chunks[DOUBLE ? 2 : 1];
  if (at < count) load(chunks[0], keys, values, base + at * CHUNK, start, slot, lane);
  if (DOUBLE && at + STRIDE < count) load(chunks[DOUBLE], keys, values, base + (at + STRIDE) * CHUNK, start, slot, lane);
  __syncthreads();
  wait_for_earlier_kernels();
  let_next_kernel_start();  // now that all before the projection is over: see the head

  take_token(p, a, turn, shared, slot, warp, lane);
  __syncthreads();
  uint4 q[WIDE / 32];
#pragma unroll
  for (int j = 0; j < WIDE / 32; j++) q[j] = load_shared16(shared_address(&shared.q[lane >> 2][32 * j + 8 * (lane & 3)]));
  score_token(a, shared, p.scale, warp, lane);

  Running run = {{LOWEST, LOWEST}, {}, {}};
#pragma unroll 1
  while (at < count) {
    add(run, chunks[0], q, base + at * CHUNK, start, slot, p.scale, lane);
    if constexpr (DOUBLE) {
      chunks[0] = chunks[1];
      if (at + 2 * STRIDE < count) load(chunks[1], keys, values, base + (at + 2 * STRIDE) * CHUNK, start, slot, lane);
    } else if (at + STRIDE < count) {
      load(chunks[0], keys, values, base + (at + STRIDE) * CHUNK, start, slot, lane);
    }
    at += STRIDE;
  }
  hand_over(run, shared, results, a.heads, warp, lane);
  __syncthreads();
  put_warps_together(shared, results, a.heads, a.split == 0, thread);
  put_blocks_together(p, a, shared, thread);
}
