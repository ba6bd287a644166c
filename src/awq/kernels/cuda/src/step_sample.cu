// The end of a decode step: the next token of every row, by its scores and a number of chance: repetition penalty, barred
// tokens, temperature, top-k, top-p, min-p, as transformers defines them; or, without a number, the largest score's, the
// first of equals. The thread that finds it leaves all as the next step wants it, and the token in the host's memory: with a
// kernel of its own for each count, and a copy to the host, 26 us lay between the logits and the next step. Bound by latency:
// a cluster of blocks holds a row in registers, and every pass over it costs one barrier of the cluster and one read of its
// other blocks.
//
// How far a score lies below the largest of its row, divided by the temperature, becomes an integer, its depth, in units of
// 2^-23; from 255 on none is ever chosen. A token stays if its depth is no more than a limit. That of top-k is where the
// number of tokens reaches k, that of top-p where their mass reaches p of the whole: found by histograms of 11, 11 and 9
// bits of the depth, one of the tokens in the last one's bin. Equal scores stay or go together. Each histogram takes 6 us:
// top-k ends where all of a bin stays, and top-p with the second, which does not tell scores apart that differ by 2^-14.
// Masses are integers, so that no order of additions changes a sum, and a seed repeats.
//
// A set of tokens is a bit of each: a word for every thread of the cluster, with a bit for every score that it holds.
#include "common.cuh"

#ifndef HELD  // scores of a thread
#define HELD 4
#endif

constexpr int BLOCKS = 8, WARPS = 32, THREADS = 32 * WARPS, WORDS = BLOCKS * THREADS, BINS = 2048;
constexpr u32 LOWEST = 0x7fffffffu, NEVER = ~0u;  // depths: beyond that of all tokens, and of what is never chosen
DEVICE float lowest_score() { return __int_as_float(0xff800000); }
constexpr float FINENESS = 8388608.f;

struct Params {
  const float* scores;    // [rows][vocabulary]
  const double* chances;  // [draws][rows] from 0 to 1, without 1, taken in turn; null: the largest score
  const float* numbers;   // penalty, tokens that come before an end may, temperature, p of top-p, of min-p
  const u32* barred;      // [2] sets of tokens: that may not come, and that before an end may; null: none
  u32* seen;              // [rows] sets of tokens: of the text; null: repetition costs nothing
  long long* tokens;      // [rows] result
  long long* arrivals;    // [places][arrival_rows] result, in the host's memory, at places taken in turn
  long long* made;        // [rows] tokens before this one; becomes one more, and so do
  long long* slot;        // [1], null: not
  long long* positions;   // [planes][position_rows]
  int vocabulary;         // up to HELD times the threads of a cluster
  int rows, draws, places, arrival_rows, planes, position_rows;
  int top_k, top_p, min_p;  // k, and whether the others are asked for; 0: not
};

// A number of each block of the cluster, for all of them: pushed to each, which waits for the bytes of all. A barrier of the
// cluster with reads behind it costs a fence of all memory more, and a second one before any block may end.
struct Exchange { u64 of[BLOCKS], arrived; };

struct Shared {
  uint2 low[2][BINS / 2], high[2][BINS / 2];  // sums of counts; or of masses, in two digits of 14 bits: of this pass, or the next
  u64 sums[WARPS];
  Exchange largest, masses;
  u32 bin, made;  // made: as in Params, before this token
  bool whole;     // whether all of the bin stays, and no more
  u64 reached;
  double chance;
};

// What the other blocks of the cluster wrote before it is there, and what they were to read of this one was read.
DEVICE void cluster_barrier() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
}
// The two halves of a barrier that orders nothing but barriers set up (`barrier_init_done`).
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait;" ::: "memory"); }

// By one thread, before all of the cluster have met.
DEVICE void prepare(Exchange& exchange) {
  barrier_init(shared_address(&exchange.arrived), 1);
  barrier_expect(shared_address(&exchange.arrived), 8 * BLOCKS);
}
// By one thread for each block of the cluster.
DEVICE void push(Exchange& exchange, u64 v, int from, int block) {
  asm volatile("{ .reg .u32 to, bar; mapa.shared::cluster.u32 to, %0, %3; mapa.shared::cluster.u32 bar, %2, %3; "
               "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u64 [to], %1, [bar]; }"
               ::"r"(shared_address(&exchange.of[from])), "l"(v), "r"(shared_address(&exchange.arrived)), "r"(block) : "memory");
}
DEVICE void wait_for(Exchange& exchange) {
  asm volatile("{ .reg .pred p; WAIT_%=: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], 0; @p bra DONE_%=; "
               "bra WAIT_%=; DONE_%=: }" ::"r"(shared_address(&exchange.arrived)) : "memory");
}
// A number of this block's shared memory, as another block of the cluster has it.
DEVICE u64 load_of(const void* mine, int block) {
  u64 v;
  asm volatile("{ .reg .u32 r; mapa.shared::cluster.u32 r, %1, %2; ld.shared::cluster.u64 %0, [r]; }"
               : "=l"(v) : "r"(shared_address(mine)), "r"(block) : "memory");
  return v;
}

// The sum of what the threads of this block before this one have, and of what all have.
DEVICE u64 sum_before(Shared& shared, u64 v, u64& all) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u64 sum = v, ahead = 0;
#pragma unroll
  for (int o = 1; o < 32; o <<= 1) {
    u64 other = __shfl_up_sync(~0u, sum, o);
    if (lane >= o) sum += other;
  }
  __syncthreads();  // the last sums are read
  if (lane == 31) shared.sums[warp] = sum;
  __syncthreads();
  all = 0;
#pragma unroll 8
  for (int i = 0; i < WARPS; i++) {
    u64 of_warp = shared.sums[i];
    if (i < warp) ahead += of_warp;
    all += of_warp;
  }
  return ahead + sum - v;
}

DEVICE int token_at(int block, int i) { return (i * BLOCKS + block) * THREADS + (int)threadIdx.x; }

// Score and token as one number: the larger score has the larger, and of equals the first token.
DEVICE u64 rank_of(float score, int token) {
  u32 bits = __float_as_uint(score + 0.f);  // -0 is 0
  return (u64)(bits >> 31 ? ~bits : bits | 0x80000000u) << 32 | ~(u32)token;
}
DEVICE float score_of(u64 rank) {
  u32 bits = (u32)(rank >> 32);
  return __uint_as_float(bits >> 31 ? bits & 0x7fffffffu : ~bits);
}
// What repetition costs, and what may not come.
DEVICE void lower(const Params& p, float (&scores)[HELD], int block, int row, u32 made) {
  const int word = block * THREADS + threadIdx.x;
  const u32 seen = p.seen ? load_fresh4(p.seen + row * WORDS + word) : 0;
  const u32 barred = p.barred ? load_fresh4(p.barred + ((float)made < p.numbers[1] ? WORDS : 0) + word) : 0;
  const float penalty = p.numbers[0];
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    if (seen >> i & 1) scores[i] = scores[i] < 0.f ? scores[i] * penalty : scores[i] / penalty;
    if (barred >> i & 1) scores[i] = lowest_score();
  }
}
// The highest rank of the row.
DEVICE u64 largest(Shared& shared, const float (&scores)[HELD], int block, int vocabulary) {
  float most = lowest_score();
  int which = 0;
#pragma unroll
  for (int i = 0; i < HELD; i++)
    if (scores[i] > most) { most = scores[i]; which = i; }
  const int token = token_at(block, which);
  u64 rank = token < vocabulary ? rank_of(most, token) : 0;
#pragma unroll
  for (int o = 16; o; o >>= 1) rank = max(rank, (u64)__shfl_xor_sync(~0u, rank, o));
  if (threadIdx.x % 32 == 0) shared.sums[threadIdx.x / 32] = rank;
  __syncthreads();
  cluster_wait();
  if (threadIdx.x < WARPS) {
    rank = shared.sums[threadIdx.x];
#pragma unroll
    for (int o = 16; o; o >>= 1) rank = max(rank, (u64)__shfl_xor_sync(~0u, rank, o));
    if (threadIdx.x < BLOCKS) push(shared.largest, rank, block, threadIdx.x);
  }
  wait_for(shared.largest);
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) rank = max(rank, shared.largest.of[i]);
  return rank;
}

// e^-depth, in units of 2^-bits.
DEVICE float weight(u32 depth) {
  float v;
  asm("ex2.approx.f32 %0, %1;" : "=f"(v) : "f"((float)depth * (-1.442695041f / FINENESS)));
  return depth < LOWEST ? v : 0.f;
}
DEVICE u32 mass(u32 depth) { return min((1u << 28) - 1, (u32)(weight(depth) * 268435456.f + 0.5f)); }
DEVICE u64 fine_mass(u32 depth) { return (u64)(weight(depth) * 1099511627776.f); }

struct Row {
  u32 depths[HELD];
  u32 limit;  // the depth up to which tokens stay
  int turn;   // histograms so far
};

// The least depth up to which there are so many tokens; MASS: so large a share of the mass.
template <bool MASS> DEVICE u32 depth_of(Shared& shared, Row& row, float wanted) {
  u64 target = (u64)wanted, reached = 0;
  u32 prefix = 0;
#pragma unroll 1
  for (int level = 0;; level++) {
    const int shift = level == 0 ? 20 : level == 1 ? 9 : 0, bits = level == 2 ? 9 : 11, now = row.turn++ & 1;
    u32 *low = (u32*)shared.low[now], *high = (u32*)shared.high[now];
#pragma unroll
    for (int i = 0; i < HELD; i++) {
      u32 depth = row.depths[i], bin = (depth >> shift) & ((1u << bits) - 1);
      if (depth > row.limit || depth >> shift >> bits != prefix) continue;
      u32 m = MASS ? mass(depth) : 1;
      atomicAdd(&low[bin], MASS ? m & 0x3fffu : m);
      if (MASS) atomicAdd(&high[bin], m >> 14);
    }
    cluster_barrier();
    shared.low[now ^ 1][threadIdx.x] = shared.high[now ^ 1][threadIdx.x] = make_uint2(0, 0);
    if (threadIdx.x == 0) shared.bin = BINS;
    u64 one = 0, two = 0, all;  // of two bins a thread
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
      u64 lows = load_of(&shared.low[now][threadIdx.x], i), highs = MASS ? load_of(&shared.high[now][threadIdx.x], i) : 0;
      one += (u32)lows + ((u64)(u32)highs << 14);
      two += (lows >> 32) + (highs >> 32 << 14);
    }
    const u64 before = reached + sum_before(shared, one + two, all);
    if (MASS && level == 0) target = (u64)((double)wanted * (double)all);
    const bool in_one = before + one >= target;
    if ((before < target || threadIdx.x == 0) && before + one + two >= target) {
      shared.bin = 2 * threadIdx.x + !in_one;
      shared.reached = in_one ? before : before + one;
      shared.whole = !MASS && before + one + (in_one ? 0 : two) == target;
    }
    __syncthreads();
    if (shared.bin == BINS) return row.limit;  // there are fewer
    prefix = prefix << bits | shared.bin;
    if (shared.whole || level == (MASS ? 1 : 2)) return min(row.limit, (prefix + 1 << shift) - 1);
    reached = shared.reached;
  }
}

// The token at which the mass of all up to it exceeds `chance` of the whole. Block by block, of each thread by thread, and
// of each in order. -1 in every thread but the one that has it.
DEVICE int draw(Shared& shared, const Row& row, int block) {
  auto mass_of = [&](int i) { return row.depths[i] <= row.limit ? fine_mass(row.depths[i]) : 0; };
  u64 mine = 0, all = 0, of_block;
#pragma unroll
  for (int i = 0; i < HELD; i++) mine += mass_of(i);
  u64 before = sum_before(shared, mine, of_block);
  if (threadIdx.x < BLOCKS) push(shared.masses, of_block, block, threadIdx.x);
  wait_for(shared.masses);  // a block that has summed has read all that it will of the others, which may end
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) {
    u64 its = shared.masses.of[i];
    if (i < block) before += its;
    all += its;
  }
  u64 target = min((u64)(shared.chance * (double)all), all - 1);
  if (all == 0) return block == 0 && threadIdx.x == 0 ? 0 : -1;
  int token = -1;
  if (target < before || target >= before + mine) return token;
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    before += mass_of(i);
    if (token < 0 && target < before) token = token_at(block, i);
  }
  return token;
}

// By the one thread that has the token of its row. What it counts, no other block of the row reads any more.
DEVICE void finish(const Params& p, int row, u32 made, int token) {
  p.arrivals[made % p.places * p.arrival_rows + row] = token;  // first: it has the longest way
  p.tokens[row] = token;
  p.made[row] = made + 1;
  if (p.seen) atomicOr(p.seen + row * WORDS + token % WORDS, 1u << token / WORDS);
  if (!p.slot) return;
  if (row == 0) atomicAdd((u64*)p.slot, 1ull);
  for (int i = 0; i < p.planes; i++) atomicAdd((u64*)p.positions + i * p.position_rows + row, 1ull);
}

extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, 1) sample(const __grid_constant__ Params p) {
  __shared__ __align__(16) Shared shared;
  const int block = blockIdx.x % BLOCKS, which = blockIdx.x / BLOCKS;
  if (threadIdx.x == 0) {
    prepare(shared.largest);
    prepare(shared.masses);
    barrier_init_done();
  }
  cluster_arrive();
  if (p.chances)
    for (int i = 0; i < 2; i++) shared.low[i][threadIdx.x] = shared.high[i][threadIdx.x] = make_uint2(0, 0);
  wait_for_earlier_kernels();
  let_next_kernel_start();
  float scores[HELD];
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    int token = token_at(block, i);
    scores[i] = token < p.vocabulary ? load_fresh_float(p.scores + (u64)which * p.vocabulary + token) : lowest_score();
  }
  const float temperature = p.numbers[2];
  if (threadIdx.x == 0) {  // behind the scores: it waits for one number, or two
    const u32 made = load_fresh8(p.made + which).x;
    if (p.chances) shared.chance = *(volatile const double*)(p.chances + made % p.draws * p.rows + which);
    shared.made = made;
  }
  if (p.seen || p.barred) {
    __syncthreads();
    lower(p, scores, block, which, shared.made);
  }
  const u64 first = largest(shared, scores, block, p.vocabulary);
  int token = block == 0 && threadIdx.x == 0 ? (int)~(u32)first : -1;
  if (p.chances) {
    Row row = {{}, LOWEST, 0};
    const float most = score_of(first), by = __fdividef(1.f, temperature);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
      float depth = (most - scores[i]) * by;
      row.depths[i] = depth < 255.f ? (u32)(depth * FINENESS) : NEVER;
    }
    if (p.top_k && p.top_k < p.vocabulary) row.limit = depth_of<false>(shared, row, (float)p.top_k);
    if (p.top_p) row.limit = depth_of<true>(shared, row, p.numbers[3]);
    if (p.min_p) row.limit = min(row.limit, (u32)(fminf(-logf(p.numbers[4]), 255.f) * FINENESS));
    token = draw(shared, row, block);
  }
  if (token >= 0) finish(p, which, shared.made, token);
}
