// GEMM for few rows, with mma.sync: y [rows, N] = x [rows, K] W^T (+ kept channels) (+ bias). sm_75 and newer.
//
// Layout of the weight: "units", drawn in common.cuh. A tile is BLOCK_TILES * 16 weight rows x TOKENS rows of x; k is
// walked in steps of SLICES * 64. A block's shared memory:
//
//     stage 0 .. STAGES - 1      x [SLICES][TOKENS][64 k], 16-byte pieces swizzled: piece p of row t lies at p ^ (t & 7)
//                                codes [BLOCK_TILES][SLICES][512 bytes]
//     affine 0 .. STAGES - 1     [BLOCK_TILES][AFFINE_BYTES]
//     sums                       partial sums on their way from one warp to another
//     barriers                   full and empty, one of each a stage
//     kept x                     [TOKENS][kept_room * 16 channels + 8]
//
// Warps: ROW_WARPS x K_WARPS consumers, each WARP_TILES tiles of 16 rows x its own SLICES / K_WARPS slices of k; and the
// producers. Scales multiply the float32 sum of a group and not the weights (SCALE_SUMS): 5 % faster at 16 tokens, and
// nothing is rounded before the result. Four stages: rings of 2, 6 and 8 were 8, 6 and 9 % slower.
//
// COPY, how a stage is filled:
//     2 TENSOR   tensor copies by one lane (sm_90 and newer); 13 % faster than
//     1 ASYNC    16-byte cp.async by four warps (sm_80 and newer), and
//     0 PLAIN    loads to registers under the products of the stage before, no producers, no barriers (sm_75)
#include "gemm_common.cuh"

#ifndef TOKENS
#define TOKENS 16
#endif
#ifndef ROW_WARPS
#define ROW_WARPS 4
#endif
#ifndef K_WARPS
#define K_WARPS 2
#endif
#ifndef WARP_TILES
#define WARP_TILES 2
#endif
#ifndef SLICES
#define SLICES 4
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef SCALE_SUMS
#define SCALE_SUMS 1
#endif
#ifndef COPY
#define COPY 2
#endif

constexpr bool PLAIN = COPY == 0, ASYNC = COPY == 1;
constexpr int CONSUMERS = ROW_WARPS * K_WARPS, PRODUCERS = PLAIN ? 0 : ASYNC ? 4 : 1;
constexpr int CONSUMER_THREADS = 32 * CONSUMERS, THREADS = 32 * (CONSUMERS + PRODUCERS);
constexpr int BLOCK_TILES = ROW_WARPS * WARP_TILES;
constexpr int WARP_SLICES = SLICES / K_WARPS, STEP_K = 64 * SLICES;
constexpr int N8 = TOKENS / 8, SUMS = 4 * N8;        // n8 blocks; float32 sums of a lane for one tile of 16 rows
constexpr int OWN_TILES = WARP_TILES / K_WARPS;      // tiles that a warp finishes, of those it shares with K_WARPS - 1
// Slices of one body of the loop over them: two where 168 registers hold what the compiler then loads ahead.
constexpr int UNROLLED_SLICES = TOKENS == 64 || (TOKENS == 32 && GROUP < 128) ? 1 : WARP_SLICES;
constexpr int GROUP_STEPS = GROUP / 16 < 4 * UNROLLED_SLICES ? GROUP / 16 : 4 * UNROLLED_SLICES;  // k16 steps under one scale
// Too few registers to hold anything through the k walk beside its sums and scales.
constexpr bool CROWDED = TOKENS == 64 || (GROUP < 128 && TOKENS * WARP_TILES > 32);
constexpr int X_AHEAD = CROWDED ? (TOKENS == 64 ? 1 : 2) : 4;  // k16 steps whose fragments of x are loaded at once

constexpr int X_SLICE = TOKENS * 128, X_BYTES = SLICES * X_SLICE, CODE_BYTES = BLOCK_TILES * SLICES * 512;
constexpr int STAGE_BYTES = X_BYTES + CODE_BYTES, STAGE_AFFINE = BLOCK_TILES * AFFINE_BYTES;
constexpr int AFFINE_AT = STAGES * STAGE_BYTES;
constexpr int SUMS_AT = AFFINE_AT + STAGES * STAGE_AFFINE;
constexpr int BARRIERS_AT = SUMS_AT + ROW_WARPS * K_WARPS * (WARP_TILES - OWN_TILES) * SUMS * 128;
constexpr int KEPT_AT = BARRIERS_AT + 128;
static_assert(BLOCK_TILES * 4 * KEPT_STEP_BYTES <= STAGE_BYTES, "a stage holds the weights of 64 kept channels");
static_assert(TOKENS % (2 * CONSUMERS) == 0 && WARP_TILES % K_WARPS == 0 && SLICES % K_WARPS == 0 && TOKENS % 16 == 0 && STAGES <= 8, "shape");
#ifdef SHARED_BYTES
static_assert(KEPT_AT == SHARED_BYTES, "designs.py computes another size");
#endif

DEVICE void load_matrices(u32 (&b0)[2], u32 (&b1)[2], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(b0[0]), "=r"(b0[1]), "=r"(b1[0]), "=r"(b1[1]) : "r"(address));
}
DEVICE u32 transpose_matrix(u32 v) {
  u32 r; asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v)); return r;
}

// A tile's place: row blocks after one another, each with all its tokens.
struct Place {
  int token_tile = 0, row_block;
  DEVICE Place(const Params& p, int tile) : row_block(tile) {
    if (p.token_tiles > 1) {
      row_block = (u32)tile / (u32)p.token_tiles;
      token_tile = tile - row_block * p.token_tiles;
    }
  }
};

// ---------------------------------------------------------------------------------- filling a stage, piece by piece

// 16 bytes on their way to shared memory, of which the first `bytes` exist and the rest is 0.
struct Piece { u32 to; const u8* from; int bytes; };

// The pieces of a thread among the FILLERS that fill a stage. Addresses are worked out once a segment: done piece by
// piece, they made cp.async half as fast as tensor copies.
template <int FILLERS> struct Pieces {
  static constexpr int TILE = SLICES * 32, ROW = SLICES * 8;  // of a tile's codes in a stage, and of a row of x
  static constexpr int CODES = BLOCK_TILES * TILE / FILLERS, X = TOKENS * ROW / FILLERS, SCALES = STAGE_AFFINE / 16;
  static constexpr int AFFINE = (SCALES + FILLERS - 1) / FILLERS;
  static_assert(FILLERS % TILE == 0 && BLOCK_TILES * TILE % FILLERS == 0 && TOKENS * ROW % FILLERS == 0, "shape");

  const Params& p;
  const int first, first_tile, units;
  const u8 *code_bytes, *x_bytes;  // of the thread's first piece in step 0
  const u64 code_stride, x_stride;  // bytes from a piece to its next
  const int tiles, rows, width;    // left from the thread's first piece on, and channels
  u32 stage, affine;
  int step;

  DEVICE Pieces(const Params& p, int first, int row_block, int token_tile)
      : p(p), first(first), first_tile(row_block * BLOCK_TILES), units((p.in_features + UNIT_K - 1) / UNIT_K),
        code_bytes(p.code_bytes + (u64)(first_tile + first / TILE) * units * UNIT_BYTES + first % TILE * 16),
        x_bytes((const u8*)(p.x_values + (u64)(token_tile * TOKENS + first / ROW) * p.x_stride + first % ROW * 8)),
        code_stride((u64)(FILLERS / TILE) * units * UNIT_BYTES), x_stride((u64)(FILLERS / ROW) * p.x_stride * 2),
        tiles((p.out_features + 15) / 16 - first_tile - first / TILE),
        rows(p.rows - token_tile * TOKENS - first / ROW), width(p.in_features - first % ROW * 8) {}

  DEVICE void go_to(int to_step, u32 to_stage, u32 to_affine) {
    step = to_step;
    stage = to_stage;
    affine = to_affine;
  }
  DEVICE Piece codes(int j) const {
    bool there = j * (FILLERS / TILE) < tiles;
    return {stage + X_BYTES + (j * FILLERS + first) * 16, code_bytes + j * code_stride + step * (SLICES * 512), there ? 16 : 0};
  }
  DEVICE Piece scales(int j) const {
    constexpr int EACH = AFFINE_BYTES / 16;
    int i = j * FILLERS + first, tile = first_tile + i / EACH;
    bool there = i < SCALES && tile < (p.out_features + 15) / 16;
    u64 at = there ? ((u64)tile * units + step * SLICES / 4) * AFFINE_BYTES + i % EACH * 16 : 0;
    return {affine + i * 16, p.affine_bytes + at, there ? 16 : 0};
  }
  DEVICE bool has_scales(int j) const { return j * FILLERS + first < SCALES; }
  DEVICE Piece tokens(int j) const {
    int t = j * (FILLERS / ROW) + first / ROW, c = first % ROW;
    int bytes = j * (FILLERS / ROW) < rows ? max(0, min(16, 2 * (width - step * STEP_K))) : 0;
    return {stage + (c >> 3) * X_SLICE + t * 128 + (((c & 7) ^ (t & 7)) << 4), x_bytes + j * x_stride + step * (STEP_K * 2), bytes};
  }
};

DEVICE void copy_piece(const Piece& c) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(c.to), "l"(c.from), "r"(c.bytes) : "memory");
#endif
}

DEVICE uint4 load_piece(const Piece& c) {
  if (c.bytes == 16) return load_fresh16(c.from);
  u32 words[4] = {0, 0, 0, 0};
  for (int i = 0; i < 8; i++)
    if (2 * i < c.bytes) words[i / 2] |= (u32)load_fresh2(c.from + 2 * i) << 16 * (i % 2);
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// PLAIN: the next stage in registers.
struct Held {
  using From = Pieces<CONSUMER_THREADS>;
  uint4 codes[From::CODES], tokens[From::X], scales[From::AFFINE];

  DEVICE void load(const From& from) {
#pragma unroll
    for (int j = 0; j < From::CODES; j++) codes[j] = load_piece(from.codes(j));
#pragma unroll
    for (int j = 0; j < From::AFFINE; j++) scales[j] = load_piece(from.scales(j));
#pragma unroll
    for (int j = 0; j < From::X; j++) tokens[j] = load_piece(from.tokens(j));
  }
  DEVICE void store(const From& to) const {
#pragma unroll
    for (int j = 0; j < From::CODES; j++) store_shared16(to.codes(j).to, codes[j]);
#pragma unroll
    for (int j = 0; j < From::AFFINE; j++)
      if (to.has_scales(j)) store_shared16(to.scales(j).to, scales[j]);
#pragma unroll
    for (int j = 0; j < From::X; j++) store_shared16(to.tokens(j).to, tokens[j]);
  }
};

// ------------------------------------------------------------------------------- the ring of stages and its barriers

using Ring = StageRing<STAGES, STAGE_BYTES, STAGE_AFFINE, AFFINE_AT, BARRIERS_AT>;

// k16 steps of kept channels in a stage.
DEVICE int kept_each(const Params& p) { return min(4, p.kept_room); }

#if COPY != 0
DEVICE void arrive_after_copies(u32 bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(bar) : "memory");
}
DEVICE void init_ring(u32 shared) {
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(shared + BARRIERS_AT + 8 * s, ASYNC ? PRODUCERS * 32 : 1);
      barrier_init(shared + BARRIERS_AT + 64 + 8 * s, CONSUMERS);
    }
    barrier_init_done();
  }
  __syncthreads();
}

// The producers: every step of every segment into the ring. Weights are asked for before the wait for earlier kernels.
DEVICE void produce(const Params& p, const Schedule& schedule, u32 shared) {
  Ring ring(shared, 1);
  bool waited = false;
  Segment s;
  while (schedule.next(s)) {
    const Place at(p, s.tile);
#if COPY == 1
    Pieces<PRODUCERS * 32> pieces(p, threadIdx.x - CONSUMER_THREADS, at.row_block, at.token_tile);
#endif
    for (int step = s.first; step < min(s.last, p.walk); step++) {
      barrier_wait(ring.empty(), ring.parity);
#if COPY == 2
      if (threadIdx.x % 32 == 0) {
        barrier_expect(ring.full(), STAGE_BYTES + STAGE_AFFINE);
        copy_box(ring.data() + X_BYTES, p.codes, step * SLICES * 64, at.row_block * BLOCK_TILES, ring.full());
        copy_box(ring.affine(), p.affine, step * SLICES / 4 * (AFFINE_BYTES / 8), at.row_block * BLOCK_TILES, ring.full());
        if (!waited) wait_for_earlier_kernels();
#pragma unroll
        for (int j = 0; j < SLICES; j++)
          copy_box(ring.data() + j * X_SLICE, p.x, step * STEP_K + j * 64, at.token_tile * TOKENS, ring.full());
      }
      __syncwarp();
#else
      pieces.go_to(step, ring.data(), ring.affine());
#pragma unroll
      for (int j = 0; j < pieces.CODES; j++) copy_piece(pieces.codes(j));
#pragma unroll
      for (int j = 0; j < pieces.AFFINE; j++)
        if (pieces.has_scales(j)) copy_piece(pieces.scales(j));
      if (!waited) wait_for_earlier_kernels();
#pragma unroll
      for (int j = 0; j < pieces.X; j++) copy_piece(pieces.tokens(j));
      arrive_after_copies(ring.full());
#endif
      waited = true;
      ring.advance();
    }
    for (int step = max(s.first, p.walk); step < s.last; step++) {
      const int first = (step - p.walk) * kept_each(p);
      barrier_wait(ring.empty(), ring.parity);
#if COPY == 2
      if (threadIdx.x % 32 == 0)
        copy_kept(p, ring.data(), ring.full(), at.row_block * BLOCK_TILES, BLOCK_TILES, first, kept_each(p));
      __syncwarp();
#else
      for (int i = threadIdx.x - CONSUMER_THREADS; i < BLOCK_TILES * kept_each(p) * 32; i += PRODUCERS * 32) {
        int t = i / (kept_each(p) * 32), within = i - t * kept_each(p) * 32, tile = at.row_block * BLOCK_TILES + t;
        bool there = tile < (p.out_features + 15) / 16 && first + within / 32 < p.kept_steps;
        u64 from = there ? ((u64)tile * p.kept_steps + first) * KEPT_STEP_BYTES + within * 16 : 0;
        copy_piece({ring.data() + i * 16, p.kept + from, there ? 16 : 0});
      }
      arrive_after_copies(ring.full());
#endif
      ring.advance();
    }
  }
#if COPY == 1
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}
#endif

// ---------------------------------------------------------------------------------------------------------- products

// A warp's part of one stage, added to acc. slice: of the stage's first 64 k within their unit. A word of each of the last
// loads of shared memory, for `release`.
DEVICE u32 multiply_stage(float (&acc)[WARP_TILES][SUMS], u32 x, u32 codes, u32 affine, int slice, int k_warp) {
  const int lane = threadIdx.x % 32, matrix = lane >> 3, row = lane & 7;
  float group_sums[WARP_TILES][SUMS];
  float (&sums)[WARP_TILES][SUMS] = SCALE_SUMS ? group_sums : acc;
  Zeros zeros[WARP_TILES];
  Scales scales[WARP_TILES];
  float sum_scale[WARP_TILES][2];
  u32 b[X_AHEAD][N8][2], loaded = 0;
#pragma unroll (UNROLLED_SLICES)
  for (int jj = 0; jj < WARP_SLICES; jj++) {
    const int j = k_warp * WARP_SLICES + jj;
    uint4 q[WARP_TILES];
#pragma unroll
    for (int m = 0; m < WARP_TILES; m++) {
      q[m] = load_shared16(codes + (m * SLICES + j) * 512 + lane * 16);
      loaded = m ? loaded ^ q[m].x : q[m].x;
    }
#pragma unroll
    for (int s = 0; s < 4; s++) {
      if ((jj % UNROLLED_SLICES * 4 + s) % GROUP_STEPS == 0) {
        int group = ((slice + j) * 4 + s) / (GROUP / 16);
#pragma unroll
        for (int m = 0; m < WARP_TILES; m++) {
          u32 pair = load_shared4(affine + m * AFFINE_BYTES + scale_offset(lane) + group * 4);
          zeros[m] = zeros_from(load_shared1(affine + m * AFFINE_BYTES + zero_offset(lane) + group));
          if (SCALE_SUMS) {
            sum_scale[m][0] = low_half(pair);
            sum_scale[m][1] = high_half(pair);
#pragma unroll
            for (int i = 0; i < SUMS; i++) sums[m][i] = 0.f;
          } else {
            scales[m] = scales_from(pair);
          }
        }
      }
      if (s % X_AHEAD == 0) {
#pragma unroll
        for (int a = 0; a < X_AHEAD; a++)
#pragma unroll
          for (int n = 0; n < N8; n += 2) {
            load_matrices(b[a][n], b[a][n + 1],
                          x + j * X_SLICE + (n * 8 + (matrix >> 1) * 8 + row) * 128
                              + ((((s + a) * 2 + (matrix & 1)) ^ row) << 4));
            loaded ^= b[a][n][0];
          }
      }
      u32 a[WARP_TILES][4];
#pragma unroll
      for (int m = 0; m < WARP_TILES; m++) {
        differences(a[m], q[m], s, zeros[m]);
        if (!SCALE_SUMS) scale_fragment<true>(a[m], scales[m]);
      }
#pragma unroll
      for (int n = 0; n < N8; n++)
#pragma unroll
        for (int m = 0; m < WARP_TILES; m++) {
          float (&d)[4] = *(float (*)[4])(sums[m] + 4 * n);
          mma_acc(d, a[m][0], a[m][1], a[m][2], a[m][3], b[s % X_AHEAD][n][0], b[s % X_AHEAD][n][1]);
        }
      if (SCALE_SUMS && (jj % UNROLLED_SLICES * 4 + s + 1) % GROUP_STEPS == 0) {
#pragma unroll
        for (int m = 0; m < WARP_TILES; m++)
#pragma unroll
          for (int i = 0; i < SUMS; i++) acc[m][i] += sums[m][i] * sum_scale[m][(i >> 1) & 1];
      }
    }
  }
#pragma unroll
  for (int m = 0; m < WARP_TILES; m++) loaded ^= SCALE_SUMS ? __float_as_uint(sum_scale[m][0]) : 0;
  return loaded;
}

#if COPY != 0
// Sums in which all that a warp loaded is.
DEVICE u32 sums_of(const float (&acc)[WARP_TILES][SUMS]) {
  u32 all = 0;
#pragma unroll
  for (int i = 0; i < WARP_TILES * N8; i++) all ^= __float_as_uint(acc[i / N8][i % N8 * 4]);
  return all;
}
// A consumer warp is done with a stage, once what it loaded has arrived.
DEVICE void release(u32 empty, u32 loaded) {
  if (COPY == 2) have_arrived(empty, loaded);
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(empty);
}
#endif

// Whether x at the kept channels is gathered once, for all tiles.
DEVICE bool kept_once(const Params& p) { return p.token_tiles == 1 && p.kept_steps == p.kept_room; }

// x at the kept channels of k16 steps [first, first + steps), for one token tile; all consumers together, a warp a token.
// Several elements of a lane at a time: one after the other each waited for its channel's number and then for x.
struct Gather {
  static constexpr int CHANNELS = 4, TOGETHER = 2, PARTS = TOKENS / CONSUMERS / TOGETHER;  // of a lane; tokens of a warp
  const Params& p;
  const int first, width, token0, lane, warp;
  int channels[CHANNELS];
  u16 v[TOGETHER][CHANNELS];

  DEVICE Gather(const Params& p, int first, int steps, int token_tile)
      : p(p), first(first), width(steps * 16), token0(token_tile * TOKENS), lane(threadIdx.x % 32), warp(threadIdx.x / 32) {
    load_channels(0);
  }
  DEVICE void load_channels(int from) {
#pragma unroll
    for (int j = 0; j < CHANNELS; j++) {
      int i = from + 32 * j + lane;
      channels[j] = i < width ? __ldg(p.kept_index + first * 16 + i) : -1;
    }
  }
  DEVICE int token(int part, int t) const { return (part * TOGETHER + t) * CONSUMERS + warp; }
  DEVICE void load(int part) {
#pragma unroll
    for (int t = 0; t < TOGETHER; t++) {
      int row = token0 + token(part, t);
#pragma unroll
      for (int j = 0; j < CHANNELS; j++)
        v[t][j] = channels[j] < 0 || row >= p.rows ? (u16)0 : load_fresh2(p.x_values + (u64)row * p.x_stride + channels[j]);
    }
  }
  DEVICE void store(u32 to, int from, int part) const {
#pragma unroll
    for (int t = 0; t < TOGETHER; t++)
#pragma unroll
      for (int j = 0; j < CHANNELS; j++) {
        int i = from + 32 * j + lane;
        if (i < width)
          asm volatile("st.shared.u16 [%0], %1;" ::"r"(to + token(part, t) * (p.kept_room * 32 + 16) + i * 2), "h"(v[t][j]) : "memory");
      }
  }
  // Behind load(0): all of it.
  DEVICE void finish(u32 to) {
#pragma unroll 1
    for (int from = 0; from < width; from += 32 * CHANNELS) {
      if (from) load_channels(from);
#pragma unroll 1
      for (int part = 0; part < PARTS; part++) {
        if (from || part) load(part);
        store(to, from, part);
      }
    }
    named_barrier(1, CONSUMER_THREADS);
  }
};

// The kept channels' steps of a segment; the k warps share their k16 steps. tile: of the warp's first 16 rows;
// first_tile: the same within the block.
DEVICE void add_kept(float (&acc)[WARP_TILES][SUMS], const Params& p, Ring& ring, const Segment& segment, u32 kept_x,
                     int token_tile, int tile, int first_tile, int k_warp) {
  const int lane = threadIdx.x % 32, matrix = lane >> 3, row = lane & 7, room = p.kept_room, each = kept_each(p);
  const u32 stride = room * 32 + 16, x = kept_x + ((matrix >> 1) * 8 + row) * stride + (matrix & 1) * 16;
  const int start = max(segment.first, p.walk);
  for (int step = start; step < segment.last; step++) {
    const int first = (step - p.walk) * each, within = first % room;
    if (!kept_once(p) && (step == start || within == 0)) {
      named_barrier(1, CONSUMER_THREADS);  // all are done with what lies there
      Gather some(p, first - within, min(room, p.kept_steps - first + within), token_tile);
      some.load(0);
      some.finish(kept_x);
    }
#if COPY != 0
    barrier_wait(ring.full(), ring.parity);
#endif
#pragma unroll 1
    for (int s = k_warp; s < min(each, p.kept_steps - first); s += K_WARPS) {
      uint4 a[WARP_TILES];
#pragma unroll
      for (int m = 0; m < WARP_TILES; m++) {
#if COPY != 0
        a[m] = load_shared16(ring.data() + ((first_tile + m) * each + s) * KEPT_STEP_BYTES + lane * 16);
#else
        a[m] = make_uint4(0, 0, 0, 0);
        if (tile + m < (p.out_features + 15) / 16)
          a[m] = load_stream16(p.kept + ((u64)(tile + m) * p.kept_steps + first + s) * KEPT_STEP_BYTES + lane * 16);
#endif
      }
#pragma unroll
      for (int n = 0; n < N8; n += 2) {
        u32 b[2][2];
        load_matrices(b[0], b[1], x + n * 8 * stride + (within + s) * 32);
#pragma unroll
        for (int i = 0; i < 2 * WARP_TILES; i++) {
          const uint4& w = a[i / 2];
          float (&d)[4] = *(float (*)[4])(acc[i / 2] + 4 * (n + i % 2));
          mma_acc(d, as_activations(w.x), as_activations(w.y), as_activations(w.z), as_activations(w.w), b[i % 2][0],
                  b[i % 2][1]);
        }
      }
    }
#if COPY != 0
    release(ring.empty(), sums_of(acc));
    ring.advance();
#endif
  }
}

// Sums over the K_WARPS warps of the same rows: each keeps OWN_TILES of its tiles and hands the others over.
DEVICE void exchange_sums(float (&own)[OWN_TILES][SUMS], const float (&acc)[WARP_TILES][SUMS], u32 shared, int row_warp,
                          int k_warp) {
  constexpr int PIECES = OWN_TILES * SUMS / 4;
  u32 at = shared + SUMS_AT + row_warp * K_WARPS * (WARP_TILES - OWN_TILES) * SUMS * 128 + threadIdx.x % 32 * 16;
  if (K_WARPS > 1) named_barrier(1, CONSUMER_THREADS);
#pragma unroll
  for (int to = 0; to < K_WARPS; to++) {
    int slot = to * (K_WARPS - 1) + (k_warp < to ? k_warp : k_warp - 1);
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      const float* v = &acc[to * OWN_TILES + i / (SUMS / 4)][i % (SUMS / 4) * 4];
      if (to != k_warp) {
        store_shared16(at + (slot * PIECES + i) * 512, v);
      } else {
#pragma unroll
        for (int e = 0; e < 4; e++) own[i / (SUMS / 4)][i % (SUMS / 4) * 4 + e] = v[e];
      }
    }
  }
  if (K_WARPS > 1) named_barrier(1, CONSUMER_THREADS);
#pragma unroll
  for (int slot = 0; slot < K_WARPS - 1; slot++)
#pragma unroll
    for (int i = 0; i < PIECES; i++)
      add_shared16(&own[i / (SUMS / 4)][i % (SUMS / 4) * 4], at + ((k_warp * (K_WARPS - 1) + slot) * PIECES + i) * 512);
}

// bias and rounding; then every lane has two adjacent columns of y for a token, after a transposition of 8 x 8.
DEVICE void store_tiles(const Params& p, const float (&own)[OWN_TILES][SUMS], int row0, int token0) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < OWN_TILES; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int row = row0 + m * 16 + h * 8;
      if (row >= p.out_features) continue;
      float bias = p.bias ? widen(p.bias[row + (lane >> 2)]) : 0.f;
#pragma unroll
      for (int n = 0; n < N8; n++) {
        u32 v = transpose_matrix(narrow2(own[m][n * 4 + h * 2] + bias, own[m][n * 4 + h * 2 + 1] + bias));
        int token = token0 + n * 8 + (lane >> 2);
        if (token < p.rows) *(u32*)(p.y + (u64)token * p.out_features + row + (lane & 3) * 2) = v;
      }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) gemm_mma(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 dynamic[];
  const u32 shared = shared_address(dynamic);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Schedule schedule(p, blockIdx.x);
#if COPY != 0
  init_ring(shared);
#endif
  let_next_kernel_start();
#if COPY != 0
  if (warp >= CONSUMERS) return produce(p, schedule, shared);
#endif
  Gather kept(p, 0, p.kept_steps && kept_once(p) ? p.kept_steps : 0, 0);
  wait_for_earlier_kernels();

  const int row_warp = warp % ROW_WARPS, k_warp = warp / ROW_WARPS, first_tile = row_warp * WARP_TILES;
  const u32 codes_at = X_BYTES + first_tile * SLICES * 512, affine_at = first_tile * AFFINE_BYTES;
  Ring ring(shared, 0);
  Segment s;
  bool gathering = kept.width > 0;  // on its way during the k walk, where it is all that a warp loads at a time
  if (gathering) kept.load(0);
  if ((CROWDED || Gather::PARTS > 1) && gathering) {
    kept.finish(shared + KEPT_AT);
    gathering = false;
  }
  while (schedule.next(s)) {
    const Place at(p, s.tile);
    float acc[WARP_TILES][SUMS];
#pragma unroll
    for (int i = 0; i < WARP_TILES * SUMS; i++) acc[i / SUMS][i % SUMS] = 0.f;
#if COPY == 0
    Held held;
    Held::From pieces(p, threadIdx.x, at.row_block, at.token_tile);
    pieces.go_to(s.first, ring.data(), ring.affine());
    if (s.first < p.walk) held.load(pieces);
#endif
#pragma unroll 1
    for (int step = s.first; step < s.last && step < p.walk; step++) {  // not their minimum: a register less
#if COPY == 0
      // One barrier a step: a stage is written again only after the barrier of the step between.
      pieces.go_to(step, ring.data(), ring.affine());
      held.store(pieces);
      __syncthreads();
      pieces.go_to(step + 1, ring.data(), ring.affine());
      if (step + 1 < s.last && step + 1 < p.walk) held.load(pieces);
#else
      barrier_wait(ring.full(), ring.parity);
#endif
      u32 loaded = multiply_stage(acc, ring.data(), ring.data() + codes_at, ring.affine() + affine_at, step * SLICES % 4, k_warp);
#if COPY != 0
      release(ring.empty(), CROWDED ? sums_of(acc) : loaded);
#endif
      ring.advance();
    }

    if (gathering && s.last > p.walk) {
      kept.finish(shared + KEPT_AT);
      gathering = false;
    }
    if (s.last > p.walk)
      add_kept(acc, p, ring, s, shared + KEPT_AT, at.token_tile, at.row_block * BLOCK_TILES + first_tile, first_tile, k_warp);

    float own[OWN_TILES][SUMS];
    exchange_sums(own, acc, shared, row_warp, k_warp);
    constexpr int PIECES = OWN_TILES * SUMS / 4;
    float4* partial = (float4*)p.partial + warp * PIECES * 32 + lane;
    if (!schedule.owns(s)) {
      partial += (u64)schedule.worker * CONSUMERS * PIECES * 32;
#pragma unroll
      for (int i = 0; i < PIECES; i++) store_partial(partial + i * 32, &own[i / (SUMS / 4)][i % (SUMS / 4) * 4]);
      __syncwarp();
      if (lane == 0) raise_flag(p.flags + schedule.worker * CONSUMERS + warp);
      continue;
    }
    if (s.last < p.steps)
      for (int w = schedule.worker + 1; schedule.shares(s, w); w++) {
        if (lane == 0) take_flag(p.flags + w * CONSUMERS + warp);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < PIECES; i++)
          add_partial(&own[i / (SUMS / 4)][i % (SUMS / 4) * 4], partial + (u64)w * CONSUMERS * PIECES * 32 + i * 32);
      }
    store_tiles(p, own, (at.row_block * BLOCK_TILES + first_tile + k_warp * OWN_TILES) * 16, at.token_tile * TOKENS);
  }
}
