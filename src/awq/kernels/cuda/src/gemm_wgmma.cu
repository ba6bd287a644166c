// GEMM with wgmma, from about 17 rows up: y [rows, N] = x [rows, K] W^T (+ kept channels) (+ bias). sm_90a only.
//
// Layout of the weight: "units", drawn in common.cuh. A tile is BLOCK_ROWS = 64 * ROW_GROUPS * ROW_BLOCKS weight rows x
// TOKENS rows of x. wgmma takes the weights from registers, freshly converted, and x from shared memory. A block's
// shared memory:
//
//     stage 0 .. STAGES - 1      x [SLICES][TOKENS][64 k], 128-byte swizzle as the tensor copy leaves it
//                                codes [BLOCK_ROWS / 16][SLICES][512 bytes]
//     affine 0 .. STAGES - 1     [BLOCK_ROWS / 16][AFFINE_BYTES]
//     results                    on their way to y, or partial sums between the warpgroups of a tile
//     barriers                   full and empty, one of each a stage
//
// Warpgroups: ROW_GROUPS x K_GROUPS consumers (each ROW_BLOCKS blocks of 64 rows; K_GROUPS share the k of a stage) and a
// producer, one warp, or with MOVE_REGISTERS a warpgroup that gives its registers away. While one warpgroup converts, the
// tensor cores work for another.
//
//     CONVERT_AHEAD   converts into a second set of registers before waiting for the running product
//     TENSOR_STORE    results leave through one tensor store a warpgroup, under the next tile: +0-3 % from 2048 rows on
//     CLUSTER         blocks that share their tokens and multicast x to one another: +2-4 % at 4096 rows
#include "gemm_common.cuh"
#include "gemm_wgmma_ops.cuh"

#ifndef TOKENS
#define TOKENS 128
#endif
#ifndef ROW_GROUPS
#define ROW_GROUPS 2
#endif
#ifndef K_GROUPS
#define K_GROUPS 1
#endif
#ifndef ROW_BLOCKS
#define ROW_BLOCKS 1
#endif
#ifndef SLICES
#define SLICES 2
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef CLUSTER
#define CLUSTER 1
#endif
#ifndef CONVERT_AHEAD
#define CONVERT_AHEAD 0
#endif
#ifndef TENSOR_STORE
#define TENSOR_STORE 0
#endif
#ifndef MOVE_REGISTERS
#define MOVE_REGISTERS 0
#endif

constexpr int CONSUMERS = ROW_GROUPS * K_GROUPS, CONSUMER_THREADS = 128 * CONSUMERS, CONSUMER_WARPS = 4 * CONSUMERS;
constexpr int THREADS = CONSUMER_THREADS + (MOVE_REGISTERS ? 128 : 32);
constexpr int BLOCK_ROWS = 64 * ROW_GROUPS * ROW_BLOCKS, BLOCK_TILES = BLOCK_ROWS / 16;
constexpr int STEP_SLICES = SLICES == 1 ? 2 : SLICES;  // slices of 64 k in a step of the k walk: a group of 128 at least
constexpr int WARP_SLICES = STEP_SLICES / K_GROUPS;    // of which one warpgroup multiplies
constexpr int STEP_STAGES = STEP_SLICES / SLICES;
constexpr int ACC = TOKENS / 2;                        // float32 sums of a thread for 64 rows

constexpr int X_SLICE = TOKENS * 128, X_BYTES = SLICES * X_SLICE, CODE_BYTES = BLOCK_TILES * SLICES * 512;
constexpr int STAGE_BYTES = X_BYTES + CODE_BYTES, STAGE_AFFINE = BLOCK_TILES * AFFINE_BYTES;
constexpr int CHUNK = TOKENS < 32 ? TOKENS : 32, CHUNK_BYTES = CHUNK * 144;  // tokens stored at once, rows of 64 + 8
constexpr int EXCHANGE_BYTES = (K_GROUPS - 1) * ROW_GROUPS * 128 * ACC * 4;
constexpr int RESULT_BYTES = TENSOR_STORE ? BLOCK_ROWS * TOKENS * 2
                             : CONSUMERS * CHUNK_BYTES > EXCHANGE_BYTES ? CONSUMERS * CHUNK_BYTES : EXCHANGE_BYTES;
constexpr int AFFINE_AT = STAGES * STAGE_BYTES;
constexpr int RESULTS_AT = (AFFINE_AT + STAGES * STAGE_AFFINE + 1023) / 1024 * 1024;
constexpr int BARRIERS_AT = RESULTS_AT + RESULT_BYTES;
static_assert(K_GROUPS == 1 || ROW_BLOCKS == 1, "the exchange between warpgroups takes one block of rows");
static_assert(K_GROUPS == 1 || SLICES > 1, "a stage must hold a slice for every warpgroup");
static_assert(STAGES <= 8, "barriers");
static_assert(BLOCK_TILES * 4 * KEPT_STEP_BYTES <= STAGE_BYTES, "a stage holds the weights of 64 kept channels");
#ifdef SHARED_BYTES
static_assert(BARRIERS_AT + 128 == SHARED_BYTES, "designs.py computes another size");
#endif

// x of a slice as wgmma wants it described: 128-byte swizzle, 1024 bytes from 8 tokens to the next 8.
constexpr u64 X_DESCRIPTOR = 1ull << 62 | 64ull << 32 | 1ull << 16;

DEVICE void arrive_at(u32 bar, u32 block) {
  // No .release.cluster: it became a fence of the whole GPU a warp and stage, and cost 10-50 %.
  asm volatile("{ .reg .u32 r; mapa.shared::cluster.u32 r, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [r]; }"
               ::"r"(bar), "r"(block) : "memory");
}
DEVICE void cluster_barrier() {
  if (CLUSTER > 1) {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
  }
}
// A tile's place: groups of 8 row blocks, whose codes stay in the second-level cache while the tokens go by.
struct Place {
  int token_tile = 0, row_block;
  DEVICE Place(const Params& p, int tile, int rank) : row_block(tile) {
    if (p.token_tiles > 1) {  // divisions, on the way to a kernel's first copy
      const u32 rows = 8, all = rows * p.token_tiles, group = (u32)tile / all, rest = (u32)tile - group * all;
      const u32 here = min(rows, (u32)p.row_blocks - group * rows);
      token_tile = rest / here;
      row_block = group * rows + rest - token_tile * here;
    }
    row_block = row_block * CLUSTER + rank;
  }
};

using Ring = StageRing<STAGES, STAGE_BYTES, STAGE_AFFINE, AFFINE_AT, BARRIERS_AT>;

// A consumer warp is done with a stage.
DEVICE void release(u32 empty) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
  if (CLUSTER > 1) {
    if (lane < CLUSTER) arrive_at(empty, lane);
  } else if (lane == 0) {
    barrier_arrive(empty);
  }
}

// --------------------------------------------------------------------------------------------------------- producer

// 64 k of x for a tile, by one lane; in a cluster each block copies its share of the tokens to all.
DEVICE void copy_tokens(u32 to, const TensorMap& x, int k, int token, u32 bar, int rank) {
  if (CLUSTER > 1) {
    constexpr int EACH = TOKENS / CLUSTER;
    copy_box_to_all(to + rank * EACH * 128, x, k, token + rank * EACH, bar, (u16)((1 << CLUSTER) - 1));
  } else {
    copy_box(to, x, k, token, bar);
  }
}

// One lane: every stage of every segment. Weights are asked for before the wait for earlier kernels.
DEVICE void produce(const Params& p, const Schedule& schedule, u32 shared, int rank) {
  Ring ring(shared, 1);
  bool waited = false;
  Segment s;
  while (schedule.next(s)) {
    const Place at(p, s.tile, rank);
    for (int k = s.first * STEP_STAGES; k < min(s.last, p.walk) * STEP_STAGES; k++) {
      barrier_wait(ring.empty(), ring.parity);
      barrier_expect(ring.full(), STAGE_BYTES + STAGE_AFFINE);
      copy_box(ring.data() + X_BYTES, p.codes, k * SLICES * 64, at.row_block * BLOCK_TILES, ring.full());
      copy_box(ring.affine(), p.affine, k * SLICES / 4 * (AFFINE_BYTES / 8), at.row_block * BLOCK_TILES, ring.full());
      if (!waited) wait_for_earlier_kernels();
      waited = true;
#pragma unroll
      for (int j = 0; j < SLICES; j++)
        copy_tokens(ring.data() + j * X_SLICE, p.x, (k * SLICES + j) * 64, at.token_tile * TOKENS, ring.full(), rank);
      ring.advance();
    }
    for (int step = max(s.first, p.walk); step < s.last; step++) {  // weights of 64 kept channels, then x there, a stage each
      const int k = (step - p.walk) * 4;
      barrier_wait(ring.empty(), ring.parity);
      copy_kept(p, ring.data(), ring.full(), at.row_block * BLOCK_TILES, BLOCK_TILES, k, 4);
      ring.advance();
      barrier_wait(ring.empty(), ring.parity);
      barrier_expect(ring.full(), X_SLICE);
      if (!waited) wait_for_earlier_kernels();
      waited = true;
      copy_tokens(ring.data(), p.gathered, k * 16, at.token_tile * TOKENS, ring.full(), rank);
      ring.advance();
    }
  }
}

// -------------------------------------------------------------------------------------------------------- consumers

typedef float Sums[ROW_BLOCKS][ACC];

// Pins registers here: no conversion may sink below the fence of the product that reads them, and none of a product's
// sums may be read above its wait (ptxas would serialize every wgmma: C7513).
DEVICE void pin(u32 (&a)[ROW_BLOCKS][4][4]) {
#pragma unroll
  for (int i = 0; i < 16 * ROW_BLOCKS; i++) asm volatile("" : "+r"(a[i / 16][i / 4 % 4][i % 4])::"memory");
}
DEVICE void pin(Sums& acc) {
#pragma unroll
  for (int i = 0; i < ROW_BLOCKS * ACC; i++) asm volatile("" : "+f"(acc[i / ACC][i % ACC])::"memory");
}

// acc += a x for one slice of 64 k; runs on while the warpgroup goes on.
DEVICE void start_products(Sums& acc, const u32 (&a)[ROW_BLOCKS][4][4], u32 x) {
  wgmma_fence();
  const u64 descriptor = X_DESCRIPTOR | x >> 4;
#pragma unroll
  for (int s = 0; s < 4; s++)
#pragma unroll
    for (int m = 0; m < ROW_BLOCKS; m++) wgmma(acc[m], a[m][s], descriptor + 2 * s);
  wgmma_commit();
}

// The k walk of a segment. tile16: of the warp's 16 rows within the block.
DEVICE void multiply_segment(Sums& acc, const Params& p, Ring& ring, const Segment& s, int tile16, int k_group) {
  const int lane = threadIdx.x % 32;
  const u32 codes_at = X_BYTES + tile16 * SLICES * 512 + lane * 16;
  const u32 scales_at = tile16 * AFFINE_BYTES + scale_offset(lane), zeros_at = tile16 * AFFINE_BYTES + zero_offset(lane);
  u32 a[CONVERT_AHEAD ? 2 : 1][ROW_BLOCKS][4][4];
  u32 running = 0;  // the empty barrier of the stage whose product may still run
#pragma unroll 1
  for (int step = s.first; step < s.last && step < p.walk; step++) {  // not their minimum: no register to spare
    Zeros zeros[ROW_BLOCKS];
    Scales scales[ROW_BLOCKS];
#pragma unroll
    for (int jj = 0; jj < WARP_SLICES; jj++) {
      const int j = k_group * WARP_SLICES + jj;
      const bool new_stage = STEP_STAGES > 1 || jj == 0, last_of_stage = STEP_STAGES > 1 || jj == WARP_SLICES - 1;
      if (new_stage) barrier_wait(ring.full(), ring.parity);
      const u32 data = ring.data(), slice = STEP_STAGES > 1 ? 0 : j;
      auto finish_earlier = [&] {
        wgmma_wait();
        if (new_stage && (jj || running)) release(running);
      };
      uint4 q[ROW_BLOCKS];
#pragma unroll
      for (int m = 0; m < ROW_BLOCKS; m++) q[m] = load_shared16(data + codes_at + m * 4 * SLICES * 512 + slice * 512);
      constexpr int PARTS = GROUP == 32 ? 2 : 1;  // groups in a slice
      auto load_group = [&](int part) {
        int group = (((step * STEP_SLICES + j) & 3) * 4 + part * 2) / (GROUP / 16);
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; m++) {
          const u32 record = ring.affine() + m * 4 * AFFINE_BYTES;
          scales[m] = scales_from(load_shared4(record + scales_at + group * 4));
          zeros[m] = zeros_from(load_shared1(record + zeros_at + group));
        }
      };
      if (GROUP < 128 || jj % 2 == 0) load_group(0);
      if (!CONVERT_AHEAD) finish_earlier();
      u32 (&fragments)[ROW_BLOCKS][4][4] = a[CONVERT_AHEAD ? jj & 1 : 0];
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        if (part) load_group(part);
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; m++)
#pragma unroll
          for (int t = part * 4 / PARTS; t < (part + 1) * 4 / PARTS; t++) {
            differences(fragments[m][t], q[m], t, zeros[m]);
            scale_fragment<(TOKENS >= 128)>(fragments[m][t], scales[m]);
          }
      }
      pin(fragments);
      if (CONVERT_AHEAD) finish_earlier();
      start_products(acc, fragments, data + slice * X_SLICE);
      if (last_of_stage) {
        running = ring.empty();
        ring.advance();
      }
    }
  }
  wgmma_wait();
  pin(acc);
  if (running) release(running);
}

// 64 kept channels a step, from the `first`-th of a tile's to its `last`-th.
DEVICE void multiply_kept(Sums& acc, const Params& p, Ring& ring, int first, int last, int tile16, int k_group) {
#pragma unroll 1
  for (int step = 4 * first; step < 4 * last; step += 4) {
    u32 a[ROW_BLOCKS][4][4];
    barrier_wait(ring.full(), ring.parity);
    if (k_group == 0) {
#pragma unroll
      for (int m = 0; m < ROW_BLOCKS; m++)
#pragma unroll
        for (int s = 0; s < 4; s++) {
          uint4 v = make_uint4(0, 0, 0, 0);
          if (step + s < p.kept_steps)
            v = load_shared16(ring.data() + ((tile16 + 4 * m) * 4 + s) * KEPT_STEP_BYTES + threadIdx.x % 32 * 16);
          a[m][s][0] = as_activations(v.x);
          a[m][s][1] = as_activations(v.y);
          a[m][s][2] = as_activations(v.z);
          a[m][s][3] = as_activations(v.w);
        }
    }
    const u32 weights = ring.empty();
    ring.advance();
    barrier_wait(ring.full(), ring.parity);
    if (k_group == 0) {
      pin(a);
      start_products(acc, a, ring.data());
      wgmma_wait();
      pin(acc);
    }
    release(weights);  // not before what was loaded of them has arrived, as the product tells
    release(ring.empty());
    ring.advance();
  }
}

// The sums of the warpgroups that shared a tile's k, into the first of them.
DEVICE void exchange_sums(Sums& acc, u32 results, int row_group, int k_group) {
  const u32 at = results + (row_group * 128 + threadIdx.x % 128) * 16;
  for (int k = 1; k < K_GROUPS; k++) {
    named_barrier(1, CONSUMER_THREADS);
    if (k_group == k) {
#pragma unroll
      for (int i = 0; i < ACC; i += 4) store_shared16(at + i / 4 * ROW_GROUPS * 2048, acc[0] + i);
    }
    named_barrier(1, CONSUMER_THREADS);
    if (k_group == 0) {
#pragma unroll
      for (int i = 0; i < ACC; i += 4) add_shared16(acc[0] + i, at + i / 4 * ROW_GROUPS * 2048);
    }
  }
  named_barrier(1, CONSUMER_THREADS);
}

// 16 rows x 16 tokens of a warp, rounded and transposed: 8 x 8 blocks, a token's 8 rows in 16 bytes at `address`.
DEVICE void store_transposed(u32 address, const float* v, const float (&bias)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
               ::"r"(address), "r"(narrow2(v[0] + bias[0], v[1] + bias[0])), "r"(narrow2(v[2] + bias[1], v[3] + bias[1])),
               "r"(narrow2(v[4] + bias[0], v[5] + bias[0])), "r"(narrow2(v[6] + bias[1], v[7] + bias[1])) : "memory");
}

// A warpgroup's rows from row0 on, TOKENS tokens from token0 on: 128 bytes a token and block of 64 rows.
DEVICE void store_tile(const Params& p, const Sums& acc, const float (&bias)[ROW_BLOCKS][2], u32 results, int group,
                       int row_group, int row0, int token0) {
  const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32, matrix = lane >> 3;
#if TENSOR_STORE
  results += row_group * ROW_BLOCKS * TOKENS * 128;
  if (thread == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  named_barrier(2 + group, 128);
#pragma unroll
  for (int m = 0; m < ROW_BLOCKS; m++)
#pragma unroll
    for (int i = 0; i < TOKENS / 16; i++)
      store_transposed(results + m * TOKENS * 128 + (i * 16 + (matrix >> 1) * 8 + (lane & 7)) * 128
                           + (((warp * 2 + (matrix & 1)) ^ (lane & 7)) << 4), acc[m] + i * 8, bias[m]);
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  named_barrier(2 + group, 128);
  if (thread == 0) {
#pragma unroll
    for (int m = 0; m < ROW_BLOCKS; m++)
      asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1,%2}], [%3];"
                   ::"l"(&p.out), "r"(row0 + m * 64), "r"(token0), "r"(results + m * TOKENS * 128) : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  }
#else
  results += group * CHUNK_BYTES;
#pragma unroll
  for (int m = 0; m < ROW_BLOCKS; m++)
#pragma unroll
    for (int c = 0; c < TOKENS / CHUNK; c++) {
#pragma unroll
      for (int i = 0; i < CHUNK / 16; i++)
        store_transposed(results + (i * 16 + (matrix >> 1) * 8 + (lane & 7)) * 144 + warp * 32 + (matrix & 1) * 16,
                         acc[m] + (c * CHUNK + i * 16) / 2, bias[m]);
      named_barrier(2 + group, 128);
#pragma unroll
      for (int i = 0; i < CHUNK / 16; i++) {
        int t = i * 16 + thread / 8, token = token0 + c * CHUNK + t, row = row0 + m * 64 + thread % 8 * 8;
        uint4 v = load_shared16(results + t * 144 + thread % 8 * 16);
        if (token < p.rows && row < p.out_features) store_global16(p.y + (u64)token * p.out_features + row, v);
      }
      named_barrier(2 + group, 128);
    }
#endif
}

DEVICE void consume(const Params& p, const Schedule& schedule, u32 shared, int rank) {
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32, group = threadIdx.x / 128;
  const int row_group = group % ROW_GROUPS, k_group = group / ROW_GROUPS;
  const int tile16 = row_group * 4 * ROW_BLOCKS + thread / 32;
  Ring ring(shared, 0);
  Segment s;
  while (schedule.next(s)) {
    const bool owner = schedule.owns(s);
    Sums acc;
#pragma unroll
    for (int i = 0; i < ROW_BLOCKS * ACC; i++) acc[i / ACC][i % ACC] = 0.f;
    multiply_segment(acc, p, ring, s, tile16, k_group);
    const Place at(p, recomputed(s.tile), rank);
    if (s.last > p.walk) multiply_kept(acc, p, ring, max(0, s.first - p.walk), s.last - p.walk, tile16, k_group);
    if (K_GROUPS > 1) {
      exchange_sums(acc, shared + RESULTS_AT, row_group, k_group);
      if (k_group) continue;
    }

    constexpr int PIECES = ROW_BLOCKS * ACC / 4, TILE = PIECES * ROW_GROUPS * 128;  // float4 of a thread, of a block
    float4* partial = (float4*)p.partial + row_group * 128 + thread;
    if (!owner) {
      const int slot = schedule.worker * CLUSTER + rank;
      partial += (u64)slot * TILE;
#pragma unroll
      for (int i = 0; i < PIECES; i++)
        store_partial(partial + i * ROW_GROUPS * 128, &acc[i / (ACC / 4)][i % (ACC / 4) * 4]);
      named_barrier(2 + group, 128);
      if (thread == 0) raise_flag(p.flags + slot * ROW_GROUPS + row_group);
      continue;
    }
    if (s.last < p.steps)
      for (int w = schedule.worker + 1; schedule.shares(s, w); w++) {
        const int slot = w * CLUSTER + rank;
        if (thread == 0) take_flag(p.flags + slot * ROW_GROUPS + row_group);
        named_barrier(2 + group, 128);
#pragma unroll
        for (int i = 0; i < PIECES; i++)
          add_partial(&acc[i / (ACC / 4)][i % (ACC / 4) * 4], partial + (u64)slot * TILE + i * ROW_GROUPS * 128);
      }

    const int row0 = at.row_block * BLOCK_ROWS + row_group * 64 * ROW_BLOCKS;
    float bias[ROW_BLOCKS][2];
#pragma unroll
    for (int m = 0; m < ROW_BLOCKS; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        int row = row0 + m * 64 + thread / 32 * 16 + h * 8 + (lane >> 2);
        bias[m][h] = p.bias && row < p.out_features ? widen(p.bias[row]) : 0.f;
      }
    store_tile(p, acc, bias, shared + RESULTS_AT, group, row_group, row0, at.token_tile * TOKENS);
  }
  if (TENSOR_STORE && thread == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

#if CLUSTER > 1
#define IN_CLUSTERS __cluster_dims__(CLUSTER, 1, 1)
#else
#define IN_CLUSTERS
#endif

extern "C" __global__ void IN_CLUSTERS __launch_bounds__(THREADS, 1) gemm_wgmma(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 dynamic[];
  const u32 shared = shared_address(dynamic);
  const int warp = threadIdx.x / 32, rank = blockIdx.x % CLUSTER;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(shared + BARRIERS_AT + 8 * s, 1);
      barrier_init(shared + BARRIERS_AT + 64 + 8 * s, CONSUMER_WARPS * CLUSTER);
    }
    barrier_init_done();
  }
  __syncthreads();
  cluster_barrier();
  const Schedule schedule(p, blockIdx.x / CLUSTER);
  let_next_kernel_start();
  if (warp >= CONSUMER_WARPS) {
#if MOVE_REGISTERS
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(CONSUMERS == 2 ? 40 : 32));
#endif
    if (threadIdx.x == CONSUMER_THREADS) produce(p, schedule, shared, rank);
  } else {
#if MOVE_REGISTERS
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMERS == 2 ? 232 : 112));
#endif
    wait_for_earlier_kernels();
    consume(p, schedule, shared, rank);
  }
  cluster_barrier();  // a block must not leave while another still writes or arrives here
}
