// The next token of every row by its scores and a number of chance: temperature, top-k, top-p, min-p, as transformers
// defines them. Bound by latency: a block reads its row two to eight times, from the first-level cache where it fits.
//
// How far a score lies below the largest of its row, divided by the temperature, becomes an integer, its depth, in units of
// 2^-23; from 255 on all are the same, and never chosen. A token stays if its depth is no more than a limit. That of top-k
// is where the number of tokens reaches k, that of top-p where their mass reaches p of the whole: found by histograms of
// 11, 11 and 9 bits of the depth, one of the tokens in the last one's bin. Equal scores stay or go together.
// Masses are integers, so that no order of additions changes a sum, and a seed repeats.
#include "common.cuh"

constexpr int WARPS = 32, THREADS = 32 * WARPS, BINS = 2048;
constexpr u32 LOWEST = 0x7fffffffu;  // the depth of what is never chosen
constexpr float FINENESS = 8388608.f;

struct Params {
  const float* scores;   // [rows][vocabulary]
  const double* chance;  // [rows] from 0 to 1, without 1
  const float* numbers;  // penalty, tokens that must come, temperature, p of top-p, of min-p
  long long* tokens;     // [rows] result
  int vocabulary;        // up to 2^18
  int top_k, top_p, min_p;  // k, and whether the others are asked for; 0: not
};

struct Shared {
  u32 low[BINS], high[BINS];  // sums of counts; or of masses, in two digits of 14 bits
  u64 sums[WARPS];
  float most[WARPS];
  u32 bin;
  u64 reached;
};

// The sum of what the threads before this one have, and of what all have.
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
#pragma unroll
  for (int i = 0; i < WARPS; i++) {
    u64 of_warp = shared.sums[i];
    if (i < warp) ahead += of_warp;
    all += of_warp;
  }
  return ahead + sum - v;
}

struct Row {
  const float* scores;
  int count;
  float most, by;  // largest score, and 1 / temperature
  u32 limit;       // the depth up to which tokens stay

  DEVICE u32 depth(float score) const {
    float d = (most - score) * by;
    return d < 255.f ? (u32)(d * FINENESS) : LOWEST;
  }
  // Every score, eight under way at a time.
  template <class USE> DEVICE void each(USE use) const {
    for (int i = threadIdx.x; i < count; i += 8 * THREADS) {
      float v[8];
#pragma unroll
      for (int j = 0; j < 8; j++) v[j] = i + j * THREADS < count ? scores[i + j * THREADS] : 0.f;
#pragma unroll
      for (int j = 0; j < 8; j++)
        if (i + j * THREADS < count) use(v[j]);
    }
  }
};

// e^-depth, in units of 2^-bits.
DEVICE float weight(u32 depth) {
  float v;
  asm("ex2.approx.f32 %0, %1;" : "=f"(v) : "f"((float)depth * (-1.442695041f / FINENESS)));
  return depth == LOWEST ? 0.f : v;
}
DEVICE u32 mass(u32 depth) { return min((1u << 28) - 1, (u32)(weight(depth) * 268435456.f + 0.5f)); }
DEVICE u64 fine_mass(u32 depth) { return (u64)(weight(depth) * 1099511627776.f); }

DEVICE float largest(Shared& shared, const Row& row) {
  float most = __int_as_float(0xff800000);
  row.each([&](float v) { most = fmaxf(most, v); });
#pragma unroll
  for (int o = 16; o; o >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
  if (threadIdx.x % 32 == 0) shared.most[threadIdx.x / 32] = most;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < WARPS; i++) most = fmaxf(most, shared.most[i]);
  return most;
}

// The least depth up to which there are so many tokens; MASS: so large a share of the mass.
template <bool MASS> DEVICE u32 depth_of(Shared& shared, const Row& row, float wanted) {
  u64 target = (u64)wanted, reached = 0;
  u32 prefix = 0;
#pragma unroll 1
  for (int level = 0; level < 3; level++) {
    const int shift = level == 0 ? 20 : level == 1 ? 9 : 0, bits = level == 2 ? 9 : 11;
    for (int i = threadIdx.x; i < BINS; i += THREADS) shared.low[i] = shared.high[i] = 0;
    if (threadIdx.x == 0) shared.bin = BINS;
    __syncthreads();
    row.each([&](float v) {
      u32 depth = row.depth(v), bin = (depth >> shift) & ((1u << bits) - 1);
      if (depth > row.limit || depth >> shift >> bits != prefix) return;
      if (!MASS) { atomicAdd(&shared.low[bin], 1u); return; }
      u32 m = mass(depth);
      atomicAdd(&shared.low[bin], m & 0x3fffu);
      atomicAdd(&shared.high[bin], m >> 14);
    });
    __syncthreads();
    auto sum_of = [&](int bin) { return shared.low[bin] + ((u64)shared.high[bin] << 14); };
    const int first = 2 * threadIdx.x;
    u64 one = sum_of(first), two = sum_of(first + 1), all, before = reached + sum_before(shared, one + two, all);
    if (MASS && level == 0) target = (u64)((double)wanted * (double)all);
    const bool in_one = before + one >= target;
    if ((before < target || first == 0) && before + one + two >= target) {
      shared.bin = in_one ? first : first + 1;
      shared.reached = in_one ? before : before + one;
    }
    __syncthreads();
    if (shared.bin == BINS) return row.limit;  // there are fewer
    prefix = prefix << bits | shared.bin;
    reached = shared.reached;
    __syncthreads();
  }
  return prefix;
}

// The token at which the mass of all up to it exceeds `chance` of the whole. Thread by thread, and of each in order.
DEVICE int draw(Shared& shared, const Row& row, double chance) {
  auto mass_of = [&](float v) { u32 depth = row.depth(v); return depth <= row.limit ? fine_mass(depth) : 0; };
  u64 mine = 0, all;
  row.each([&](float v) { mine += mass_of(v); });
  u64 before = sum_before(shared, mine, all);
  if (all == 0) return 0;
  u64 target = min((u64)(chance * (double)all), all - 1);
  if (before <= target && target < before + mine) { shared.bin = threadIdx.x; shared.reached = before; }
  __syncthreads();
  const int found = shared.bin, at = found + threadIdx.x * THREADS;  // its tokens, one a thread
  target -= shared.reached;
  mine = at < row.count ? mass_of(row.scores[at]) : 0;
  before = sum_before(shared, mine, all);
  if (before <= target && target < before + mine) shared.bin = at;
  __syncthreads();
  return shared.bin;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) sample(const __grid_constant__ Params p) {
  __shared__ __align__(16) Shared shared;
  wait_for_earlier_kernels();
  Row row = {p.scores + (u64)blockIdx.x * p.vocabulary, p.vocabulary, 0.f, __fdividef(1.f, p.numbers[2]), LOWEST};
  row.most = largest(shared, row);
  if (p.top_k && p.top_k < p.vocabulary) row.limit = depth_of<false>(shared, row, (float)p.top_k);
  if (p.top_p) row.limit = depth_of<true>(shared, row, p.numbers[3]);
  if (p.min_p) row.limit = min(row.limit, (u32)(fminf(-logf(p.numbers[4]), 255.f) * FINENESS));
  int token = draw(shared, row, p.chance[blockIdx.x]);
  if (threadIdx.x == 0) p.tokens[blockIdx.x] = token;
}
