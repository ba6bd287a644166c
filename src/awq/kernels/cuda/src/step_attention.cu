// Attention of one new token a sequence over its cache: norms of query and key, RoPE, the new key and value put into the
// cache, softmax and the sum of values. Bound by reading keys and values, and by latency where those are few.
//
//   qkv     [batch][qkv_stride]                             what the projection wrote: heads of query, key and value
//   cache   [batch][key_heads][capacity][HEAD_DIM], twice   keys as they are after norm and RoPE
//   y       [batch][heads][HEAD_DIM]
//
// A block takes one key head and up to 8 of its query heads (where more share it, others take them). The tokens from the
// first visible one up to the new one come in chunks of 16, and the chunks go in turn to the warps. Up to PER chunks, what
// the rings hold, are the first block's; more are shared among as many blocks as have PER each, up to 8 and for long texts
// SPLITS. The last of them puts the shares together: it waits for every number of the others to be there, which costs a
// trip to the second-level cache and back. The blocks of a cluster, which could do with less, start only where a whole
// cluster finds room: 32 clusters of 4 on 132 multiprocessors took 8.9 us at 128 tokens, and 8 clusters of 8 5.1.
//
// A warp copies its chunks to a ring of its own, the first before the wait for the projection: the kernel that begins a
// step lets none start before all of the last step is over. It keeps running maximum, sum and result of its chunks. Where
// the new token belongs, which is not in the cache yet, the ring gets its key and value from the projection.
//
// All the products are mma of 16 tokens (or 16 channels) by 8 heads: scores [16 tokens, 8 heads] = K Q^T, and
// y^T [16 channels, 8 heads] += V^T P^T, where P^T is the transpose of the scores, 8 x 8 at a time.
#include "common.cuh"

#ifndef HEAD_DIM  // a multiple of 8
#define HEAD_DIM 128
#endif
#ifndef SPLITS
#define SPLITS 4
#endif
#ifndef WARPS
#define WARPS 16
#endif
#ifndef UNITS  // of a warp's ring: 16 keys or 16 values each
#define UNITS 2
#endif

constexpr int THREADS = 32 * WARPS, HEADS = 8, CHUNK = 16;
constexpr int PER = WARPS * UNITS / 2;           // chunks that the rings hold
constexpr int WIDE = (HEAD_DIM + 31) / 32 * 32;  // channels with padding
constexpr int PITCH = WIDE + 8;                  // halves from row to row in shared memory: 16 bytes apart in the banks
constexpr int UNIT = CHUNK * PITCH * 2, RING = UNITS * UNIT;
constexpr int LANE_CHANNELS = WIDE / 32;         // of a head
constexpr int NEW_KEY = HEADS, NEW_VALUE = HEADS + 1;  // rows beside the queries
constexpr int RESULT_PITCH = WIDE + 4;           // floats; most and sum of a head's share lie behind its channels
constexpr float LOWEST = -1e30f;
constexpr u32 ABSENT = 0xffffffffu;              // no arithmetic has this result: its NaN is 0x7fffffff

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
  u32* shares;                // [groups of blocks][SPLITS][each][RESULT_PITCH] floats; ABSENT between the steps
  long long qkv_stride;
  int query_at, key_at, value_at;  // in a row of qkv
  int key_heads, group;            // group: query heads of a key head
  int parts, each;                 // that they are taken in, and heads of a part: up to 8
  int capacity, window;            // window: slots that are seen, the new one included; 0: all
  int rotary, interleaved;         // channels that turn; whether pairs are neighbours or half of them apart
  float scale;                     // of the scores, times log2(e)
  float query_epsilon, key_epsilon;
};

constexpr int TOGETHER = SPLITS > 9 ? 8 : SPLITS > 1 ? SPLITS - 1 : 1;  // shares looked at at once: more take registers

struct Shared {
  u16 rows[HEADS + 2][PITCH];   // queries, the new key and value
  float turning[WARPS][WIDE];   // a head while its channels find their partners
  alignas(16) float most[HEADS][WARPS], sum[HEADS][WARPS];
};
// then WARPS rings, at last the warps' results: [heads][RESULT_PITCH] floats each

// Where a block stands. The first blocks, those of split 0, are the first that find room, and often do all. Where tokens
// are split there are few blocks, and quotients are small and mostly 0: loops are shorter than divisions.
struct Place { int split, among, part, key_head, row, heads, head; };
DEVICE Place place_of(const Params& p) {
  Place a = {};
  if constexpr (SPLITS == 1) {
    a.among = blockIdx.x;
    a.part = a.among / p.key_heads;
    a.row = a.part / p.parts;
    a.key_head = a.among - a.part * p.key_heads;
    a.part -= a.row * p.parts;
    a.heads = min(p.each, p.group - a.part * p.each);
    a.head = a.key_head * p.group + a.part * p.each;
    return a;
  }
  const int groups = gridDim.x / SPLITS;
  a.split = (int)__fdividef(blockIdx.x + 0.5f, (float)groups);
  a.among = a.key_head = blockIdx.x - a.split * groups;
#pragma unroll 1
  while (a.key_head >= p.key_heads) { a.key_head -= p.key_heads; a.part++; }
#pragma unroll 1
  while (a.part >= p.parts) { a.part -= p.parts; a.row++; }
  a.heads = min(p.each, p.group - a.part * p.each);
  a.head = a.key_head * p.group + a.part * p.each;
  return a;
}

// Whether half of the last block's threads would do to put the shares together: the other half then takes those that it
// would come to later.
DEVICE bool has_halves(const Place& a) { return SPLITS > TOGETHER + 1 && UNITS > 1 && a.heads * WIDE <= 2 * THREADS; }

DEVICE long long load_number(const long long* p) { uint2 v = load_fresh8(p); return (long long)((u64)v.y << 32 | v.x); }

// Slots `start` to `slot` are seen, in chunks from slot `base` on. A warp takes every `stride`-th of the `count` chunks.
struct Tokens {
  int start, slot, base, count, stride, blocks;
  bool alone;

  DEVICE Tokens(const Params& p, const Place& a) {
    slot = (int)load_number(p.slot);
    int first = (int)load_number(p.first + a.row);
    start = p.window ? max(first, slot - p.window + 1) : first;
    base = start & ~(CHUNK - 1);
    count = (slot - base) / CHUNK + 1;
    // Each block more costs the last one a look: Llama-3-8B's shape took 1563 us a token at 1024 tokens with 9 of them on
    // an H200, 1440 with 5. Where halves look, 16 are worth it: 1528 us and 1553 with 8 at 2048, 1635 and 1649 at 4096.
    int wanted = has_halves(a) && count > 96 ? SPLITS : max(min(8, (count + PER - 1) / PER), (count + 39) / 40);
    blocks = SPLITS == 1 || count <= PER ? 1 : min(SPLITS, wanted);
    alone = blocks == 1;
    stride = blocks * WARPS;
  }
  DEVICE int first_chunk(const Place& a, int warp) const { return a.split + blocks * warp; }
  // The block of the last chunk has the new key and value.
  DEVICE bool has_new(const Place& a) const { return a.split == (count - 1) % blocks; }
};

DEVICE float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE u32 narrow2(float lo, float hi) { return (u32)narrow(lo) | (u32)narrow(hi) << 16; }
// The transpose of an 8 x 8 matrix of halves, a row in four lanes.
DEVICE u32 transposed(u32 v) {
  u32 t; asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(t) : "r"(v)); return t;
}
// Four 8 x 8 matrices of halves; lane 8m + i has the address of row i of matrix m.
DEVICE void load_matrices(u32 (&to)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
}
DEVICE void load_transposed(u32 (&to)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
}

// ------------------------------------------------------------------------------------------------------ a warp's ring

// 16 bytes on their way to shared memory, zeros where they are not `there`.
DEVICE void copy_piece(u32 to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
DEVICE void end_unit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// For the oldest unit of a full ring.
DEVICE void wait_for_unit() {
  asm volatile("cp.async.wait_group %0;" ::"n"(UNITS - 1) : "memory");
  __syncwarp();
}

// The chunk's keys (or values) by one warp. from: slot of the first token; what is not in the cache becomes zeros.
DEVICE void copy_unit(u32 to, const u16* cache, int from, const Tokens& t, int lane) {
  constexpr int ROW = WIDE / 8;  // pieces of a token
  const auto there = [&](int token, int column) {
    return (u32)(from + token - t.start) < (u32)(t.slot - t.start) && (HEAD_DIM == WIDE || column < HEAD_DIM / 8);
  };
  const u16* at = cache + (long long)from * HEAD_DIM;
  if constexpr (32 % ROW == 0) {  // one address, and constants
    constexpr int STEP = 32 / ROW;
    const int token = (u32)lane / ROW, column = (u32)lane % ROW;
    at += token * HEAD_DIM + column * 8;
    to += token * (PITCH * 2) + column * 16;
#pragma unroll
    for (int n = 0; n < CHUNK; n += STEP) copy_piece(to + n * (PITCH * 2), at + n * HEAD_DIM, there(token + n, column));
  } else {
#pragma unroll
    for (int piece = lane; piece < CHUNK * ROW; piece += 32) {
      int token = piece / ROW, column = piece % ROW;
      copy_piece(to + token * (PITCH * 2) + column * 16, at + token * HEAD_DIM + column * 8, there(token, column));
    }
  }
}

struct Ring {
  u32 first, at;          // address of the oldest unit
  int chunk, values;      // to be copied next: keys, then values of a chunk
  const u16 *keys, *vals; // of the cache

  DEVICE void fill(const Tokens& t, int lane) {
    if (chunk < t.count) copy_unit(at, values ? vals : keys, t.base + chunk * CHUNK, t, lane);
    end_unit();
    if (values) chunk += t.stride;
    values ^= 1;
    at += UNIT;
    if (at == first + RING) at = first;
  }
};

// The new token's row to where its chunk has it.
DEVICE void put_new(u32 unit, const u16* row, const Tokens& t, int lane) {
  u32 to = unit + (t.slot & (CHUNK - 1)) * (PITCH * 2), from = shared_address(row);
#pragma unroll
  for (int i = 0; i < WIDE / 2; i += 32)
    if (i + lane < WIDE / 2) store_shared4(to + 4 * (i + lane), load_shared4(from + 4 * (i + lane)));
  __syncwarp();
}

// What a warp has so far: of the heads 2c and 2c + 1 the maximum, y^T, and the sum of exponentials, as if by a channel of
// which all values are 1 (all of whose rows are alike).
struct Running {
  float most[2], sum[4], y[WIDE / 16][4];
};

DEVICE void score(float (&s)[4], u32 keys, u32 queries, int lane) {
  float odd[4] = {};
  u32 at = keys + (lane & 15) * (PITCH * 2) + (lane >> 4) * 16, query = queries + (lane & 7) * (PITCH * 2) + (lane >> 3) * 16;
#pragma unroll
  for (int j = 0; j < WIDE / 32; j++) {
    u32 q[4], k[4];
    load_matrices(q, query + 64 * j);
    load_matrices(k, at + 64 * j);
    mma_acc(s, k[0], k[1], k[2], k[3], q[0], q[1]);
    load_matrices(k, at + 64 * j + 32);
    mma_acc(odd, k[0], k[1], k[2], k[3], q[2], q[3]);
  }
#pragma unroll
  for (int e = 0; e < 4; e++) s[e] += odd[e];
}

// Scores to probabilities, with what is there fading by as much as the maximum grew.
DEVICE void weigh(Running& run, float (&s)[4], int from, const Tokens& t, float scale, int lane) {
  bool seen[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    int token = from + (lane >> 2) + 8 * h;
    seen[h] = token >= t.start && token <= t.slot;
  }
#pragma unroll
  for (int e = 0; e < 2; e++) {
    float a = seen[0] ? s[e] * scale : LOWEST, b = seen[1] ? s[2 + e] * scale : LOWEST, most = fmaxf(a, b);
#pragma unroll
    for (int o = 4; o < 32; o <<= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
    most = fmaxf(most, run.most[e]);
    float fade = exp2_fast(run.most[e] - most);
    s[e] = seen[0] ? exp2_fast(a - most) : 0.f;
    s[2 + e] = seen[1] ? exp2_fast(b - most) : 0.f;
    run.most[e] = most;
    run.sum[e] *= fade;
#pragma unroll
    for (int i = 0; i < WIDE / 16; i++) {
      run.y[i][e] *= fade;
      run.y[i][2 + e] *= fade;
    }
  }
}

DEVICE void add_values(Running& run, const float (&s)[4], u32 values, int lane) {
  u32 b0 = transposed(narrow2(s[0], s[1])), b1 = transposed(narrow2(s[2], s[3]));
  const u32 ones = narrow2(1.f, 1.f);
  mma_acc(run.sum, ones, ones, ones, ones, b0, b1);
  u32 at = values + ((lane & 7) + (lane >> 4) * 8) * (PITCH * 2) + (lane >> 3 & 1) * 16;
#pragma unroll
  for (int i = 0; i < WIDE / 16; i++) {
    u32 v[4];
    load_transposed(v, at + 32 * i);
    mma_acc(run.y[i], v[0], v[1], v[2], v[3], b0, b1);
  }
}

// ---------------------------------------------------------------------------------- the new token's query, key, value

// What a lane needs that does not come from the projection: channels lane, lane + 32, ... of a head.
struct Turn {
  float cosine[LANE_CHANNELS], sine[LANE_CHANNELS], query_weight[LANE_CHANNELS], key_weight[LANE_CHANNELS];
  int partner[LANE_CHANNELS];  // the channel that turns with this one; itself where none does

  DEVICE Turn(const Params& p, long long position, int lane) {
    const int half = p.rotary / 2;
    const float2* angles = p.rope + position * half;
#pragma unroll
    for (int n = 0; n < LANE_CHANNELS; n++) {
      int at = lane + 32 * n, pair = p.interleaved ? at / 2 : at < half ? at : at - half;
      float2 angle = at < p.rotary ? __ldg(angles + pair) : make_float2(1.f, 0.f);  // no RoPE: rotary is 0
      partner[n] = at >= p.rotary ? at : p.interleaved ? at ^ 1 : at < half ? at + half : at - half;
      cosine[n] = angle.x;
      sine[n] = (p.interleaved ? at & 1 : at >= half) ? angle.y : -angle.y;
      query_weight[n] = p.query_norm && at < HEAD_DIM ? __ldg(p.query_norm + at) : 1.f;
      key_weight[n] = p.key_norm && at < HEAD_DIM ? __ldg(p.key_norm + at) : 1.f;
    }
  }
};

// A head of the projection, for one warp: the queries first, then the new key and value where they are this block's.
struct Item {
  const u16* from;
  u16 *row, *cache;   // where it goes: in shared memory, and by the first part to the cache, else null
  const float* norm;  // null without
  float epsilon;
  bool query, value;

  DEVICE Item(const Params& p, const Place& a, Shared& shared, int slot, int item) {
    query = item < a.heads;
    value = item > a.heads;
    from = p.qkv + a.row * p.qkv_stride;
    from += query ? p.query_at + (a.head + item) * HEAD_DIM : (value ? p.value_at : p.key_at) + a.key_head * HEAD_DIM;
    row = shared.rows[query ? item : value ? NEW_VALUE : NEW_KEY];
    cache = (value ? p.values : p.keys) + ((u64)(a.row * p.key_heads + a.key_head) * p.capacity + slot) * HEAD_DIM;
    if (query || a.part) cache = nullptr;
    norm = value ? nullptr : query ? p.query_norm : p.key_norm;
    epsilon = query ? p.query_epsilon : p.key_epsilon;
    asm volatile("" : "+l"(from), "+l"(row), "+l"(cache), "+l"(norm), "+f"(epsilon));  // now, and not when x is there
  }
};

// Norm and RoPE, but of a value neither.
DEVICE void take(const Item& item, const Turn& turn, float* turning, int lane) {
  float v[LANE_CHANNELS];
#pragma unroll
  for (int n = 0; n < LANE_CHANNELS; n++) v[n] = lane + 32 * n < HEAD_DIM ? widen(load_fresh2(item.from + lane + 32 * n)) : 0.f;
  if (item.norm) {
    float square = 0.f;
#pragma unroll
    for (int n = 0; n < LANE_CHANNELS; n++) square = fmaf(v[n], v[n], square);
#pragma unroll
    for (int o = 16; o; o >>= 1) square += __shfl_xor_sync(~0u, square, o);
    float by = rsqrtf(fmaf(square, 1.f / HEAD_DIM, item.epsilon));
#pragma unroll
    for (int n = 0; n < LANE_CHANNELS; n++) v[n] *= by * (item.query ? turn.query_weight[n] : turn.key_weight[n]);
  }
  if (!item.value) {
#pragma unroll
    for (int n = 0; n < LANE_CHANNELS; n++) turning[lane + 32 * n] = v[n];
    __syncwarp();
#pragma unroll
    for (int n = 0; n < LANE_CHANNELS; n++) v[n] = fmaf(v[n], turn.cosine[n], turning[turn.partner[n]] * turn.sine[n]);
    __syncwarp();
  }
#pragma unroll
  for (int n = 0; n < LANE_CHANNELS; n++) {
    int at = lane + 32 * n;
    item.row[at] = narrow(v[n]);
    if (item.cache && at < HEAD_DIM) item.cache[at] = narrow(v[n]);
  }
}

// ----------------------------------------------------------------------------------------------------- putting together

DEVICE void hand_over(const Running& run, Shared& shared, float* result, int heads, int warp, int lane) {
  const int r = lane >> 2, c = lane & 3;
#pragma unroll
  for (int e = 0; e < 2; e++) {
    int head = 2 * c + e;
    if (r == 0) { shared.most[head][warp] = run.most[e]; shared.sum[head][warp] = run.sum[e]; }
    if (head >= heads) continue;
    float* to = result + head * RESULT_PITCH + r;
#pragma unroll
    for (int i = 0; i < WIDE / 16; i++) {
      to[16 * i] = run.y[i][e];
      to[16 * i + 8] = run.y[i][2 + e];
    }
  }
}

// Shares of a head put together: maximum, sum of exponentials, and four channels of y.
struct Share { float most, sum, y[4]; };
template <int N> DEVICE Share together(const Share (&parts)[N]) {
  Share all = {LOWEST, 0.f, {}};
#pragma unroll
  for (int i = 0; i < N; i++) all.most = fmaxf(all.most, parts[i].most);
#pragma unroll
  for (int i = 0; i < N; i++) {
    float by = exp2_fast(parts[i].most - all.most);
    all.sum = fmaf(by, parts[i].sum, all.sum);
#pragma unroll
    for (int e = 0; e < 4; e++) all.y[e] = fmaf(by, parts[i].y[e], all.y[e]);
  }
  return all;
}

// What the warps have of channels at, at + 1, ... results: the first warp's
DEVICE Share of_warps(const Shared& shared, const u8* results, int head, int at) {
  Share parts[WARPS];
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    float4 y = *(const float4*)(results + w * RING + (head * RESULT_PITCH + at) * 4);
    parts[w] = {shared.most[head][w], shared.sum[head][w], {y.x, y.y, y.z, y.w}};
  }
  return together(parts);
}

// To memory number by number, none of which is ABSENT.
DEVICE void hand_in(u32* to, const Share& share, int at) {
  const u32 *y = (const u32*)share.y, most = __float_as_uint(share.most), sum = __float_as_uint(share.sum);
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to + at), "r"(y[0]), "r"(y[1]), "r"(y[2]), "r"(y[3]) : "memory");
  if (at == 0) asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1,%2};" ::"l"(to + WIDE), "r"(most), "r"(sum) : "memory");
}
// Where it is `wanted`. Loads without a branch: behind one each share would wait for the last, 0.35 us.
struct Parcel { u32 most, sum, y[4]; };
DEVICE void fetch(Parcel& to, const u32* from, int at, bool wanted) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %3, 0; @p ld.relaxed.gpu.global.v2.u32 {%0,%1}, [%2]; }"
               : "+r"(to.most), "+r"(to.sum) : "l"(from + WIDE), "r"((u32)wanted) : "memory");
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4]; }"
               : "+r"(to.y[0]), "+r"(to.y[1]), "+r"(to.y[2]), "+r"(to.y[3]) : "l"(from + at), "r"((u32)wanted) : "memory");
}
DEVICE bool arrived(const Parcel& from) {
  bool all = from.most != ABSENT && from.sum != ABSENT;
#pragma unroll
  for (int e = 0; e < 4; e++) all &= from.y[e] != ABSENT;
  return all;
}
DEVICE Share opened(const Parcel& from) {
  const u32 (&y)[4] = from.y;
  return {__uint_as_float(from.most), __uint_as_float(from.sum),
          {__uint_as_float(y[0]), __uint_as_float(y[1]), __uint_as_float(y[2]), __uint_as_float(y[3])}};
}

// What `mine` and other blocks have, as soon as it is there. first: the first of those blocks' share
DEVICE Share of_blocks(const Params& p, const u32* first, int others, Share mine, int at) {
#pragma unroll 1
  for (int from = 0; from < others; from += TOGETHER) {
    Parcel parcels[TOGETHER];
    bool all;
    do {
      all = true;
#pragma unroll
      for (int s = 0; s < TOGETHER; s++) {
        parcels[s] = {__float_as_uint(LOWEST), 0, {}};
        fetch(parcels[s], first + (u64)(from + s) * p.each * RESULT_PITCH, at, from + s < others);
      }
#pragma unroll
      for (int s = 0; s < TOGETHER; s++) all &= arrived(parcels[s]);
    } while (!all);
    Share parts[TOGETHER + 1];
    parts[TOGETHER] = mine;
#pragma unroll
    for (int s = 0; s < TOGETHER; s++) parts[s] = opened(parcels[s]);
    mine = together(parts);
  }
  return mine;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) u8 dynamic[];
  __shared__ __align__(16) Shared shared;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const Place a = place_of(p);
  const long long position = load_number(p.position + a.row);  // all three numbers at once
  const Tokens t(p, a);
  if (a.split >= t.blocks) return;
  const u64 cache = (u64)(a.row * p.key_heads + a.key_head) * p.capacity * HEAD_DIM;
  const u32 ring_at = shared_address(dynamic) + warp * RING;
  int chunk = t.first_chunk(a, warp);
  Ring ring = {ring_at, ring_at, chunk, 0, p.keys + cache, p.values + cache};
#pragma unroll 1
  for (int i = 0; i < UNITS; i++) ring.fill(t, lane);
  const Turn turn(p, position, lane);
#pragma unroll 1
  for (int i = thread; i < HEADS * PITCH / 8; i += THREADS) store_shared16(shared_address(shared.rows) + 16 * i, make_uint4(0, 0, 0, 0));
  const int items = a.heads + (t.has_new(a) ? 2 : 0);
  Item item(p, a, shared, t.slot, warp);
  __syncthreads();
  wait_for_earlier_kernels();
  let_next_kernel_start();  // now that all before the projection is over: see the head

#pragma unroll 1
  for (int i = warp; i < items; item = Item(p, a, shared, t.slot, i)) {
    take(item, turn, shared.turning[warp], lane);
    i += WARPS;
  }
  __syncthreads();
  const u32 queries = shared_address(shared.rows);
  Running run = {{LOWEST, LOWEST}, {}, {}};
#pragma unroll 1
  for (; chunk < t.count; chunk += t.stride) {
    const bool last = chunk == t.count - 1;
    float s[4] = {};
    wait_for_unit();
    if (last) put_new(ring.at, shared.rows[NEW_KEY], t, lane);
    score(s, ring.at, queries, lane);
    ring.fill(t, lane);
    weigh(run, s, t.base + chunk * CHUNK, t, p.scale, lane);
    wait_for_unit();
    if (last) put_new(ring.at, shared.rows[NEW_VALUE], t, lane);
    add_values(run, s, ring.at, lane);
    ring.fill(t, lane);
  }
  hand_over(run, shared, (float*)(dynamic + warp * RING), a.heads, warp, lane);
  __syncthreads();
  u32* shares = p.shares + (u64)a.among * SPLITS * p.each * RESULT_PITCH;  // of the blocks of this key head
  const int others = t.blocks - 1;
  u16* y = p.y + ((u64)a.row * p.key_heads * p.group + a.head) * HEAD_DIM;
  const auto put = [&](const Share& all, int head, int at) {
    float by = __fdividef(1.f, all.sum);
    if (at < HEAD_DIM)
      *(uint2*)(y + head * HEAD_DIM + at) = make_uint2(narrow2(all.y[0] * by, all.y[1] * by), narrow2(all.y[2] * by, all.y[3] * by));
  };
  const bool halves = has_halves(a) && a.split == others && others > TOGETHER;
  const int second = halves && thread >= THREADS / 2, from = 4 * (thread - second * (THREADS / 2));
  Share all = {LOWEST, 0.f, {}}, *rest = (Share*)(dynamic + (warp + (1 - second) * (WARPS / 2)) * RING + UNIT) + lane;
#pragma unroll 1
  for (int i = from; i < a.heads * WIDE; i += 4 * THREADS) {
    int head = i / WIDE, at = i % WIDE;
    if (!second) all = of_warps(shared, dynamic, head, at);
    if (a.split < others) {
      hand_in(shares + (u64)(a.split * p.each + head) * RESULT_PITCH, all, at);
      continue;
    }
    const u32* first = shares + (u64)(second * TOGETHER * p.each + head) * RESULT_PITCH;
    if (others) all = of_blocks(p, first, second ? others - TOGETHER : halves ? TOGETHER : others, all, at);
    if (second) *rest = all;
    if (!halves) put(all, head, at);
  }
  if (halves) {
    __syncthreads();
    if (!second && from < a.heads * WIDE) put(together<2>({all, *rest}), from / WIDE, from % WIDE);
  }
  if (a.split < others || t.alone) return;
  __syncthreads();  // all is read
  for (int i = thread; i < others * p.each * (RESULT_PITCH / 4); i += THREADS)
    ((uint4*)shares)[i] = make_uint4(ABSENT, ABSENT, ABSENT, ABSENT);
}
