// What every kernel here needs: types, conversions, matrix instructions, asynchronous copies. No header of CUDA's own,
// so that NVRTC compiles it in a fraction of a second. AWQ_BF16 says what activations are: 0 float16, 1 bfloat16.
//
// The layout of a weight [N, K] in memory, for every kernel ("units"): tiles of 16 rows, in units of 16 rows x 256 k.
//
//   codes   [N/16][K/256] units of 2048 bytes = 4 slices of 64 k = 512 bytes; lane 4r + c of a warp owns 16 bytes:
//
//             word    row    k16 steps          nibbles of a word, step s = the word's first (even) or second (odd)
//              x      r        0, 1              bits  28 24 20 16 12  8  4  0
//              y      r + 8    0, 1              step   o  e  o  e  o  e  o  e
//              z      r        2, 3              k     2c+9  2c+1  2c+8  2c      (of 16, each for both steps)
//              w      r + 8    2, 3
//
//           So word & 0x0f0f0f0f is an operand of an integer mma, and so is word & 0xf0f0f0f0 (times 16);
//           word & 0x000f000f are the halves k = 2c, 2c+1 of an m16n8k16 fragment, and (word >> 8) those of 2c+8, 2c+9.
//   affine  [N/16][K/256] records of 40 G bytes, G = 256 / group: float16 scales [8 r][G][rows r, r + 8], then
//           zero points [8 r][G], a byte with row r in its low and row r + 8 in its high nibble.
//   kept    [N/16][P] steps of 512 bytes: float16 fragments of the residual of 16 kept input channels, 16 bytes a lane:
//           (r; 2c, 2c+1) (r+8; 2c, 2c+1) (r; 2c+8, 2c+9) (r+8; 2c+8, 2c+9).
//
// Rows and k beyond the weight have code 0, zero point 0 and scale 0.
#pragma once

#ifndef AWQ_BF16
#define AWQ_BF16 0
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__

struct alignas(64) TensorMap { u64 words[16]; };

constexpr int TILE_ROWS = 16, UNIT_K = 256, UNIT_BYTES = 2048;

// ---------------------------------------------------------------------------------------------------- conversions

DEVICE float half_to_float(u16 h) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h)); return f; }
DEVICE u16 float_to_half(float f) { u16 h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f)); return h; }
DEVICE float low_half(u32 v) { return half_to_float((u16)(v & 0xffff)); }
DEVICE float high_half(u32 v) { return half_to_float((u16)(v >> 16)); }

// One activation, float16 or bfloat16, from and to float32.
DEVICE float widen(u16 v) {
#if AWQ_BF16
  return __uint_as_float((u32)v << 16);
#else
  return half_to_float(v);
#endif
}
DEVICE u16 narrow(float f) {
#if AWQ_BF16
  u16 h; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f)); return h;
#else
  return float_to_half(f);
#endif
}
DEVICE void widen2(u32 v, float& lo, float& hi) { lo = widen((u16)(v & 0xffff)); hi = widen((u16)(v >> 16)); }

// Two float16 of `kept` as two activations: bfloat16 rounds them once more.
DEVICE u32 as_activations(u32 halves) {
#if AWQ_BF16
  u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high_half(halves)), "f"(low_half(halves))); return r;
#else
  return halves;
#endif
}

DEVICE u32 and_or(u32 q, u32 mask, u32 bits) {
  u32 r; asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(q), "r"(mask), "r"(bits)); return r;
}

// ------------------------------------------------------------------------------------------------ matrix products

// acc [16, 8] = a [16, 32] (u8) b [32, 8] (s8) + c, exact in int32.
DEVICE void mma_u8s8(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const int (&c)[4]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
#else  // sm_75 has a quarter of it: rows r and r + 8, and both halves of k, lie in the same registers
  int t[4] = {c[0], c[1], c[2], c[3]};
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int rows = 0; rows < 2; rows++)
      asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
          : "+r"(t[2 * rows]), "+r"(t[2 * rows + 1]) : "r"(a[2 * half + rows]), "r"(half ? b1 : b0));
  for (int i = 0; i < 4; i++) d[i] = t[i];
#endif
}

// acc [16, 8] += a [16, 16] b [16, 8], activations in float32.
DEVICE void mma_acc(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if __CUDA_ARCH__ < 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a2), "r"(a3), "r"(b1));
#elif AWQ_BF16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

// -------------------------------------------------------------------------------------------------- memory access

DEVICE u32 shared_address(const void* p) {
  u32 a; asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(a) : "l"(p)); return a;
}
DEVICE uint4 load_shared16(u32 a) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a));
  return v;
}
DEVICE uint2 load_shared8(u32 a) {
  uint2 v; asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(a)); return v;
}
DEVICE u32 load_shared4(u32 a) { u32 v; asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(a)); return v; }
DEVICE u32 load_shared1(u32 a) { u32 v; asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(a)); return v; }
DEVICE void store_shared4(u32 a, u32 v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(a), "r"(v) : "memory"); }
DEVICE void store_shared16(u32 a, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(a), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
DEVICE void store_shared8(u32 a, float v, float w) {
  asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(a), "f"(v), "f"(w) : "memory");
}
// Weights are read once: past the first-level cache.
DEVICE uint4 load_stream16(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
// What an earlier kernel wrote: from the second-level cache, since this one may have started before it ended. Also what
// none writes, where it is to be under way before the wait for an earlier kernel: the compiler moves `__ldg` behind that.
DEVICE uint4 load_fresh16(const void* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
DEVICE uint2 load_fresh8(const void* p) {
  uint2 v; asm volatile("ld.global.cg.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory"); return v;
}
DEVICE u32 load_fresh4(const void* p) {
  u32 v; asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory"); return v;
}
DEVICE float load_fresh_float(const void* p) {
  float v; asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory"); return v;
}
DEVICE u16 load_fresh2(const void* p) {
  u16 v; asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(p) : "memory"); return v;
}

// ----------------------------------------------------------------------- barriers and copies of sm_90 and newer

DEVICE void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Barrier `id` of this block among `threads` of its threads; 0 is __syncthreads.
DEVICE void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

#if __CUDA_ARCH__ >= 800
DEVICE void barrier_init(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
// Where this thread goes on, what it loaded into `words` (one of each load) has left shared memory: only then may it tell
// a copy to overwrite that, through `bar`. An arrival is ordered behind the loads ahead of it for other threads, not for
// bulk copies: with two blocks a multiprocessor and its load queue full, 1 tile in 3000 held weights of a later stage.
// What follows from `words` must be a single instruction without a branch, which took 3 % of 12288 x 4096.
template <class... WORDS> DEVICE void have_arrived(u32 bar, WORDS... words) {
  u32 all = (0u ^ ... ^ words);
  asm volatile("{ .reg .pred p; .reg .u32 t; setp.eq.u32 p, %0, 0x9e3779b9; @p ld.volatile.shared.u32 t, [%1]; }"
               ::"r"(all), "r"(bar) : "memory");
}

// Makes the barriers that this thread has set up visible to copies; __syncthreads makes them so to the other threads.
DEVICE void barrier_init_done() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
DEVICE void barrier_arrive(u32 bar) {
  asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(bar) : "memory");
}
// Until the phase of this parity is over: parity 1 passes at once on a barrier never used.
DEVICE void barrier_wait(u32 bar, u32 parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .pred p; WAIT_%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra DONE_%=; "
               "bra WAIT_%=; DONE_%=: }" ::"r"(bar), "r"(parity) : "memory");
#else
  asm volatile("{ .reg .pred p; WAIT_%=: mbarrier.test_wait.parity.shared.b64 p, [%0], %1; @p bra DONE_%=; "
               "bra WAIT_%=; DONE_%=: }" ::"r"(bar), "r"(parity) : "memory");
#endif
}
#endif

#if __CUDA_ARCH__ >= 900
// Shared memory that this thread wrote, barriers among it, is what copies from now on find there.
DEVICE void fence_for_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void barrier_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
DEVICE u64 policy_evict_first() {
  u64 p; asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(p)); return p;
}
// `bytes` (a multiple of 16) from global to shared memory; `bar` counts them.
DEVICE void copy_bulk(u32 to, const void* from, u32 bytes, u32 bar, u64 policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
               ::"r"(to), "l"(from), "r"(bytes), "r"(bar), "l"(policy) : "memory");
}
DEVICE void copy_bulk(u32 to, const void* from, u32 bytes, u32 bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(to), "l"(from), "r"(bytes), "r"(bar) : "memory");
}
// A box at (column, row) of a tensor into shared memory; `bar` counts its bytes.
DEVICE void copy_box(u32 to, const TensorMap& map, int column, int row, u32 bar) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2,%3}], [%4];"
               ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(bar) : "memory");
}
#endif
