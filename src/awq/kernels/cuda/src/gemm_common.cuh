// What both GEMM kernels share: their parameters, the schedule (whole tiles, then stream-K), int4 to float16 or
// bfloat16, the hand-over of split tiles, tensor copies.
//
// Both compute Y^T = W X^T, weights as the A operand, so that a handful of rows of x fills a narrow n instead of wasting
// a wide m. A tile is BLOCK_ROWS weight rows x TOKENS rows of x ("tokens"); K is walked in steps of STEP_K.
#pragma once

#include "common.cuh"
#include "dequantize.cuh"

#ifndef GROUP
#define GROUP 128
#endif

constexpr int GROUPS = UNIT_K / GROUP;           // groups in a unit of 256 k
constexpr int AFFINE_BYTES = 40 * GROUPS;        // scales and zero points of a unit
constexpr int KEPT_STEP_BYTES = 512;             // one k16 step of a tile's kept channels

// The kernels' only argument; gemm.py writes it at these offsets.
struct Params {
  TensorMap x;             // 0    [rows, in_features], rows x_stride apart
  TensorMap out;           // 128  [rows, out_features] (wgmma's tensor stores only)
  TensorMap gathered;      // 256  [rows, 16 * kept_steps]: the kept channels of x (wgmma only)
  TensorMap codes;         // 384  [tiles, units * 2048 bytes]
  TensorMap affine;        // 512  [tiles, units * AFFINE_BYTES]
  const u8* code_bytes;    // 640  the same two as plain pointers
  const u8* affine_bytes;  // 648
  const u8* kept;          // 656  null without kept channels
  const int* kept_index;   // 664
  const u16* x_values;     // 672
  u16* y;                  // 680
  const u16* bias;         // 688  in the activations' type, or null
  float* partial;          // 696  sums of split tiles, one block's tile after another
  u32* flags;              // 704  one for each partial sum: 1 when it is there; all 0 between kernels
  int x_stride;                         // 712
  int rows, in_features, out_features;  // 716
  int token_tiles, row_blocks;          // 728  tiles are row_blocks x token_tiles
  int workers, steps;                   // 736  blocks or clusters; steps of a tile: of its k walk, then of kept channels
  int walk;                             // 744  of the k walk alone
  int whole_tiles;                      // 748  of each worker
  int share, longer;                    // 752  steps of each worker after those; so many take one more
  int kept_steps, kept_room;            // 760  k16 steps of kept channels; how many fit shared memory (mma)
};

// ------------------------------------------------------------------------------------------------------- schedule

// Steps [first, last) of one tile: those of its k walk, then those of its kept channels, which are shared out like them
// (with all of them left to a tile's owner, 1 % kept cost 4096 x 11008 12 to 26 % up to 128 rows).
struct Segment { int tile = -1, first = 0, last = 0; };

// The segments of one worker: whole tiles of its own, then its even share of the k steps of all remaining tiles
// (stream-K). Who has a tile's first step owns it: it adds what the workers after it hand over. Workers count down from
// the last block, so a block only ever waits for blocks that started before it. Nothing is stored here that a segment
// tells: a k walk has no register to spare.
struct Schedule {
  const Params& p;
  const int worker;

  DEVICE Schedule(const Params& p_, int block) : p(p_), worker(p_.workers - 1 - block) {}
  DEVICE int whole() const { return p.whole_tiles * p.workers; }
  DEVICE int share(int w) const { return w * p.share + min(w, p.longer); }  // where worker w's share starts

  DEVICE bool next(Segment& s) const {
    int tile = s.tile < 0 ? worker : s.tile + p.workers;
    if (s.tile < whole() && tile < whole()) {
      s = {tile, 0, p.steps};
      return tile < p.row_blocks * p.token_tiles;
    }
    int step = s.tile < whole() ? share(worker) : (s.tile - whole()) * p.steps + s.last, end = share(worker + 1);
    if (step >= end) return false;
    int t = (u32)step / (u32)p.steps, first = step - t * p.steps;
    s = {t + whole(), first, min(p.steps, first + end - step)};
    return true;
  }
  DEVICE bool owns(const Segment& s) const { return s.first == 0; }
  // Whether worker w, after this one, holds a part of the split tile that this one owns.
  DEVICE bool shares(const Segment& s, int w) const {
    return w < p.workers && share(w) < (s.tile - whole() + 1) * p.steps;
  }
};

// A walk around the stages of shared memory. A stage has DATA bytes of x and codes, AFFINE bytes at AFFINE_FROM, and at
// BARRIERS_FROM a barrier that says that it is full; 64 bytes behind, one that says that it is empty.
template <int COUNT, int DATA, int AFFINE, int AFFINE_FROM, int BARRIERS_FROM> struct StageRing {
  u32 shared;
  int stage = 0;
  u32 parity;

  DEVICE StageRing(u32 shared_, u32 parity_) : shared(shared_), parity(parity_) {}
  DEVICE u32 full() const { return shared + BARRIERS_FROM + 8 * stage; }
  DEVICE u32 empty() const { return shared + BARRIERS_FROM + 64 + 8 * stage; }
  DEVICE u32 data() const { return shared + stage * DATA; }
  DEVICE u32 affine() const { return shared + AFFINE_FROM + stage * AFFINE; }
  DEVICE void advance() { if (++stage == COUNT) { stage = 0; parity ^= 1; } }
};

// The same number, of which the compiler does not know that it has it in a register already.
DEVICE int recomputed(int v) { asm volatile("" : "+r"(v)); return v; }

// After a barrier of those who stored the partial sum: a release of the whole GPU by one of them covers the others.
DEVICE void raise_flag(u32* flag) { asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory"); }
// Waits for a flag and puts it back to 0, as the next kernel expects it.
DEVICE void take_flag(u32* flag) {
  u32 v;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(flag) : "memory"); while (!v);
  *flag = 0;
}
DEVICE void store_partial(float4* to, const float* v) { __stcg(to, make_float4(v[0], v[1], v[2], v[3])); }
DEVICE void add_partial(float* v, const float4* from) {
  uint4 p = load_fresh16(from);
  v[0] += __uint_as_float(p.x); v[1] += __uint_as_float(p.y); v[2] += __uint_as_float(p.z); v[3] += __uint_as_float(p.w);
}

// ------------------------------------------------------------------------------------- int4 to float16 or bfloat16

DEVICE void store_shared16(u32 a, const float* v) {
  store_shared16(a, make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])));
}
DEVICE void add_shared16(float* v, u32 a) {
  uint4 p = load_shared16(a);
  v[0] += __uint_as_float(p.x); v[1] += __uint_as_float(p.y); v[2] += __uint_as_float(p.z); v[3] += __uint_as_float(p.w);
}
// 16 bytes of y. Inline, since the compiler split a plain store of a uint4 into four.
DEVICE void store_global16(void* p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Scales of rows r and r + 8 that multiply the weights. EXACT: a bfloat16 weight is rounded once: the float16 scale is split
// into two bfloat16, and d * high + d * low differs from d * scale by less than a rounding (error 2.3e-3, else 2.9e-3).
// The second product took 16 % where few tokens share a weight, at 32 and 64 rows.
struct Scales {
  u32 row[2];
#if AWQ_BF16
  u32 low[2];
#endif
};

DEVICE Scales scales_from(u32 pair) {
  Scales s;
#if AWQ_BF16
  const float scale[2] = {low_half(pair), high_half(pair)};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    s.row[half] = narrow2(scale[half], scale[half]);
    float rest = scale[half] - __uint_as_float(s.row[half] & 0xffff0000u);
    s.low[half] = narrow2(rest, rest);
  }
#else
  s.row[0] = __byte_perm(pair, pair, 0x1010);
  s.row[1] = __byte_perm(pair, pair, 0x3232);
#endif
  return s;
}

template <bool EXACT> DEVICE void scale_fragment(u32 (&a)[4], const Scales& s) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
#if AWQ_BF16
    a[i] = EXACT ? fma2(a[i], s.row[i & 1], mul2(a[i], s.low[i & 1])) : mul2(a[i], s.row[i & 1]);
#else
    a[i] = mul2(a[i], s.row[i & 1]);
#endif
  }
}

// Where a lane (row r = lane / 4) finds scales and zero points in a record of `affine`.
DEVICE u32 scale_offset(int lane) { return (lane >> 2) * GROUPS * 4; }
DEVICE u32 zero_offset(int lane) { return 32 * GROUPS + (lane >> 2) * GROUPS; }

// ---------------------------------------------------------------------------------------- tensor copies (sm_90 and up)

#if __CUDA_ARCH__ >= 900
// The box (copy_box) into every block of the cluster whose bit is set, at the same place.
DEVICE void copy_box_to_all(u32 to, const TensorMap& map, int column, int row, u32 bar, u16 blocks) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
               "[%0], [%1, {%2,%3}], [%4], %5;"
               ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(bar), "h"(blocks) : "memory");
}
// k16 steps [first, first + most) of the kept channels of `count` tiles into a stage: [count][most][512 bytes].
DEVICE void copy_kept(const Params& p, u32 to, u32 bar, int tile, int count, int first, int most) {
  const int there = max(0, min(count, (p.out_features + 15) / 16 - tile)), bytes = min(most, p.kept_steps - first) * KEPT_STEP_BYTES;
  barrier_expect(bar, there * bytes);
  const u8* from = p.kept + ((u64)tile * p.kept_steps + first) * KEPT_STEP_BYTES;
#pragma unroll 1  // a producer has few registers
  for (int i = 0; i < there; i++, from += p.kept_steps * KEPT_STEP_BYTES, to += most * KEPT_STEP_BYTES) copy_bulk(to, from, bytes, bar);
}
#endif
