// y = x W^T + x[:, kept] R + bias for 1 to ROWS rows of x, W in the units of common.cuh. Bound by reading W.
//
// A block takes every gridDim-th tile of 16 output rows, and of those the units one after the other:
//
//    copy warp     -> ring of stages of WARPS units in shared memory, by bulk copies (AWQ_RING 0: loads to registers)
//    math warps    -> unit u by warp u % WARPS: integer mma against x, float32 sums kept until the warp's tile changes
//    kept warp     -> where channels are kept, their products
//    output warp   -> adds the warps' sums of a tile in fixed order and the bias, and stores
//
// What a shape has not is not compiled: with all ways to multiply in one kernel a token of Llama-2-7B took 1.143 ms on an
// H200, so 1.091.
//
// One row of x (ROWS 1) becomes fixed point, 23 bits of the largest in its group of input channels, as three int8 planes,
// columns of the mma: exact integer sums, 2 logic operations for 8 weights (float16 products take 5 and 4 subtractions,
// and the integer ones run at half rate), and beside a channel 1000 times larger the others keep 13 bits. 16 bits, two
// planes, would keep 5. An mma has 8 columns, in two halves of 4: three planes and an idle one. The halves are two groups
// of input channels, each zero where the other's are, so that one accumulator and one scaling serve both.
//
// In shared memory a plane holds the bytes of x as the mma wants them: per 64 k four blocks of 16 bytes, block c holding
// of each k16 step the bytes 2c, 2c+8, 2c+1, 2c+9; block c lies at c ^ (slice / 2 % 4) to spread writes over banks.
//
// Up to 8 rows (ROWS 8) are the 8 columns of float products with code - zero point, both exact, so their number costs
// little; making planes of them would cost every block more than it saves (13.3 us at 12288 x 4096 and 4 rows).
//
// A fused decode step asks for more:
//
//    NORM 1    x is the residual stream, float32, and what is multiplied is its RMSNorm. One row's scale, one number, is
//              put to the sums at the end, so that nothing waits for it. Several rows are normed before they are rounded
//              to 16 bits, which the stream itself might exceed.
//    OUTPUT 1  y float32 += factor * result: the residual stream again
//    OUTPUT 2  y = act(gate) * up: the first half of the tiles are gates, the second what they multiply, and a block
//              takes a tile of each in turn
//
// With OUTPUT 1 and several rows a launch may take a part of the input channels: x of all would not fit.
#include "common.cuh"
#include "dequantize.cuh"
#include "activation.cuh"  // of OUTPUT 2

#ifndef GROUP
#define GROUP 128
#endif
#ifndef ROWS  // 1, or 8 for 1 to 8
#define ROWS 1
#endif
#ifndef AWQ_RING
#define AWQ_RING 1
#endif
#ifndef WARPS  // that multiply
#define WARPS 16
#endif
#ifndef KEEP  // units that each math warp has of every tile, whose x stays in registers; 0: they do not fall to all alike
#define KEEP 0
#endif
#ifndef KEPT  // 1: with kept channels
#define KEPT 0
#endif
#ifndef NORM
#define NORM 0
#endif
#ifndef OUTPUT  // 0 y, 1 y added to the residual stream, 2 act(gate) * up
#define OUTPUT 0
#endif

constexpr int MATH_THREADS = 32 * WARPS, THREADS = MATH_THREADS + 32 * (1 + AWQ_RING + KEPT);
constexpr int GROUPS = UNIT_K / GROUP, RECORD = 40 * GROUPS;
constexpr int STAGE_CODES = WARPS * UNIT_BYTES, STAGE = STAGE_CODES + WARPS * RECORD;
constexpr bool ONE = ROWS == 1;
constexpr int SCALED = ONE ? GROUPS / 2 : GROUPS;  // groups of a unit that a lane scales
constexpr int SLOTS = 16;                          // tiles whose sums wait for the output warp, at most
constexpr int SLOT = (WARPS + KEPT) * 32 * (ONE ? 8 : 16);  // [warp][lane], float2 or float4
constexpr int MAX_STAGES = 16, MAX_CHUNKS = 24, MAX_KEPT = 8;
constexpr int KEPT_STEP = 512;                     // bytes of 16 kept channels of a tile
constexpr float FIXED_MAX = 4194300.f;         // just below 2^22
constexpr u32 MAGIC = 0x4B400000;              // the float 1.5 * 2^23: adding an integer below 2^22 puts it in the mantissa
constexpr float MAGIC_FLOAT = 12582912.f;

struct Params {
  const u8* codes;
  const u8* affine;
  const u8* kept;      // null without, as the index
  const int* index;
  const u16* x;        // [rows, in_features], rows x_stride elements apart
  const u16* bias;     // null without
  u16* y;              // [rows, out_features]
  long long x_stride;
  int rows, out_features, in_features;  // in_features up to the next multiple of 8: x is zero beyond the weight's
  int tiles, extra;    // tiles of a block, and blocks that have one more
  int units;           // of a tile
  int kept_steps;
  int stages;          // of the ring
  int in_flight;       // stages requested and not arrived, at most
  int slots;           // tiles whose sums wait for the output warp (2^n): no fewer than lie between two of a math warp
  int kept_ahead;      // tiles whose kept channels are in shared memory or on their way (2^n); 0: read them where they are
#if NORM || OUTPUT
  const float* norm;   // [in_features] weight of the norm
  const float* kept_norm;  // of one row: [16 * kept_steps], its weights of the kept channels
  float share, epsilon;  // of the mean of squares: 1 / width, and what is added to it
  float factor;        // of OUTPUT 1
  int half;            // tiles of gates of OUTPUT 2
  int apart;           // of OUTPUT 1 and several rows: units from a tile to the next, of which this launch takes some
#endif
};

// Shared memory, in this order. The launcher computes the same sizes: see gemv.py.
struct Layout {
  u32 ring, sums, x, zeros, table, kept_x, kept, barriers;  // zeros and the table: one row's
  int pitch;           // bytes from one plane, or row, of x to the next: 64, or 16, apart in the banks
};
DEVICE Layout layout_of(const Params& p, u32 base) {
  Layout s;
  s.pitch = ONE ? p.units * UNIT_K + 64 : p.units * UNIT_K * 2 + 16;
  s.ring = base;
  s.sums = s.ring + (AWQ_RING ? p.stages * STAGE : 0);
  s.x = s.sums + p.slots * SLOT;
  s.zeros = s.x + (ONE ? 3 : p.rows) * s.pitch;
  s.table = s.zeros + 16;
  s.kept_x = s.table + (ONE ? p.units * GROUPS * 8 : 0);
  s.kept = (s.kept_x + ROWS * (p.kept_steps * 16 + 8) * 2 + 15) & ~15;
  s.barriers = s.kept + p.kept_ahead * p.kept_steps * KEPT_STEP;
  return s;
}
DEVICE u32 full_stage(const Layout& s, int i) { return s.barriers + 8 * i; }
DEVICE u32 empty_stage(const Layout& s, int i) { return s.barriers + 8 * (MAX_STAGES + i); }
DEVICE u32 full_chunk(const Layout& s, int i) { return s.barriers + 8 * (2 * (MAX_STAGES + SLOTS) + i); }
DEVICE u32 full_kept(const Layout& s, int i) { return s.barriers + 8 * (2 * (MAX_STAGES + SLOTS) + MAX_CHUNKS + i); }
DEVICE u32 squares(const Layout& s) { return s.barriers + 8 * (2 * (MAX_STAGES + SLOTS) + MAX_CHUNKS + MAX_KEPT); }
DEVICE u32 full_slot(const Layout& s, int i) { return s.barriers + 8 * (2 * MAX_STAGES + i); }
DEVICE u32 empty_slot(const Layout& s, int i) { return s.barriers + 8 * (2 * MAX_STAGES + SLOTS + i); }

// This block's tiles are blockIdx.x, blockIdx.x + gridDim.x, ...: neighbours in memory are read at the same time (in one
// run of tiles a block instead, 12288 x 4096 took 3 % longer).
#if OUTPUT == 2  // tiles and extra count pairs
DEVICE int count_tiles(const Params& p) { return 2 * (p.tiles + ((int)blockIdx.x < p.extra)); }
DEVICE int tile_at(const Params& p, int i) { return (i & 1) * p.half + (int)blockIdx.x + (i >> 1) * (int)gridDim.x; }
#else
DEVICE int count_tiles(const Params& p) { return p.tiles + ((int)blockIdx.x < p.extra); }
DEVICE int tile_at(const Params& p, int i) { return (int)blockIdx.x + i * (int)gridDim.x; }
#endif
// Units from one tile of the weight to the next.
DEVICE int units_apart(const Params& p) {
#if OUTPUT == 1 && ROWS > 1
  return p.apart;
#else
  return p.units;
#endif
}
// The how manieth tile in its slot.
DEVICE int turn_of(const Params& p, int tile) { return tile >> __popc(p.slots - 1); }
// Warps that have a unit of a given tile.
DEVICE int contributors(const Params& p) { return KEEP || p.units >= WARPS ? WARPS : p.units; }

// -------------------------------------------------------------- signals between warps, also where there is no mbarrier

// Every lane of a warp signals for itself: one that spoke for all after __syncwarp was no faster with one row, 1 % with
// several, and racecheck does not follow such an order.
DEVICE void signal_init(u32 at, u32 warps) {
#if __CUDA_ARCH__ >= 800
  barrier_init(at, 32 * warps);
#else
  asm volatile("st.shared.u64 [%0], %1;" ::"r"(at), "l"(0ull) : "memory");
#endif
}
DEVICE void signal(u32 at) {
#if __CUDA_ARCH__ >= 800
  barrier_arrive(at);
#else
  asm volatile("red.release.cta.shared.add.u32 [%0], 1;" ::"r"(at) : "memory");
#endif
}
// Until `warps` warps signalled for the `turn`-th time (from 0; -1 is over at once).
DEVICE void await(u32 at, int turn, int warps) {
#if __CUDA_ARCH__ >= 800
  barrier_wait(at, turn & 1);
#else
  int seen;
  do asm volatile("ld.acquire.cta.shared.u32 %0, [%1];" : "=r"(seen) : "r"(at) : "memory");
  while (seen < (turn + 1) * warps * 32);
#endif
}

// ------------------------------------------------------------------------------------------------- x to shared memory

// 8 k of a k16 step, 4d..4d+3 and 4d+8..4d+11 (d = part % 2), become 8 bytes of each plane, the blocks 2d and 2d + 1, and
// each group an entry of the table: {step, sum / 65536}. A step is worth 1/16 of the last plane's unit, since the odd
// steps' codes come 16 times too large.
#if NORM && ROWS == 1
DEVICE void make_planes(const Layout& s, const float (&v)[8], bool there, int part) {
  float most = 0.f, sum = 0.f;
#else
DEVICE void make_planes(const Layout& s, uint4 raw, bool there, int part) {
  float v[8], most = 0.f, sum = 0.f;
  widen2(raw.x, v[0], v[1]);
  widen2(raw.y, v[2], v[3]);
  widen2(raw.z, v[4], v[5]);
  widen2(raw.w, v[6], v[7]);
#endif
#pragma unroll
  for (int e = 0; e < 8; e++) { most = fmaxf(most, fabsf(v[e])); sum += v[e]; }
#pragma unroll
  for (int o = 1; o < GROUP / 8; o <<= 1) {
    most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
    sum += __shfl_xor_sync(~0u, sum, o);
  }
  if (!there) return;
#if AWQ_BF16  // the fast division gives 0 beyond 2^126, where bfloat16 still has numbers
  float scale = most > 1e-30f ? FIXED_MAX / most : 0.f;
#else
  float scale = most > 1e-30f ? __fdividef(FIXED_MAX, most) : 0.f;
#endif
  // NaN and infinity are in the sum, whichever the largest is: they make the whole row's result NaN.
  float unit = fabsf(sum) < __int_as_float(0x7f800000) ? most * (1.f / (FIXED_MAX * 16.f)) : __int_as_float(0x7fffffff);
  u32 x[8];
#pragma unroll
  for (int e = 0; e < 8; e++) x[e] = __float_as_uint(fmaf(v[e], scale, MAGIC_FLOAT));
  u32 slice = part >> 3, turn = (slice >> 1) & 3, at = s.x + slice * 64 + ((part >> 1) & 3) * 4, block = 2 * (part & 1);
  auto put = [&](int plane, u32 add, u32 pick) {  // a digit of -128..127 is a byte after adding half of what lies below
#pragma unroll
    for (int e = 0; e < 2; e++) {
      u32 even = __byte_perm(x[2 * e] + add, x[2 * e + 4] + add, pick), odd = __byte_perm(x[2 * e + 1] + add, x[2 * e + 5] + add, pick);
      store_shared4(at + plane * s.pitch + (((block + e) ^ turn) << 4), __byte_perm(even, odd, 0x5410));
    }
  };
  put(0, 0x8080u - (MAGIC & 0xff0000), 0x0062);
  put(1, 0x80u, 0x0051);
  put(2, 0, 0x0040);
  if ((part & (GROUP / 8 - 1)) == 0) store_shared8(s.table + part / (GROUP / 8) * 8, unit, sum * (1.f / 65536.f));
}

#if NORM
DEVICE float4 floats(uint4 v) { return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)); }
#endif

// Chunks of x, of 8 k a math thread: what one stage of the ring multiplies.
DEVICE int chunks_of(const Params& p) { return (p.units + WARPS - 1) / WARPS; }

// One row: loads, planes, stores. Four chunks at a time: one after the other each would wait for the second-level cache,
// and all of 28672 channels at once took 2 us in which the math stood still.
#if NORM && ROWS == 1  // 8 floats and the norm's weights of them, which do not wait for an earlier kernel
struct Part { float4 x[2], weight[2]; };
DEVICE void load_weight(Part& to, const Params& p, int part) {
  bool there = 8 * part < p.in_features;
#pragma unroll
  for (int e = 0; e < 2; e++) to.weight[e] = there ? floats(load_fresh16(p.norm + 8 * part + 4 * e)) : make_float4(0.f, 0.f, 0.f, 0.f);
}
DEVICE void load_x(Part& to, const Params& p, int part) {
  bool there = 8 * part < p.in_features;
#pragma unroll
  for (int e = 0; e < 2; e++) to.x[e] = there ? floats(load_fresh16((const float*)p.x + 8 * part + 4 * e)) : make_float4(0.f, 0.f, 0.f, 0.f);
}
// As below, and the sum of squares.
DEVICE void store_part(const Params& p, const Layout& s, const Part& part_of, int part, float& square) {
  bool upper = part & 1;
  float v[8], a[4], b[4], w[8];
  *(float4*)a = part_of.x[0];
  *(float4*)b = part_of.x[1];
  *(float4*)w = part_of.weight[0];
  *(float4*)(w + 4) = part_of.weight[1];
#pragma unroll
  for (int e = 0; e < 4; e++) {
    square = fmaf(a[e], a[e], fmaf(b[e], b[e], square));
    a[e] *= w[e];
    b[e] *= w[4 + e];
    float other = __shfl_xor_sync(~0u, upper ? a[e] : b[e], 1);
    v[e] = upper ? other : a[e];
    v[4 + e] = upper ? b[e] : other;
  }
  make_planes(s, v, part < p.units * (UNIT_K / 8), part);
}
// A thread's squares for the output warp and the kept warp, which have time to add them up: see norm_scale_of.
constexpr int SQUARES_THREADS = MATH_THREADS + 32 * (1 + KEPT);
DEVICE void hand_over_squares(const Layout& s, int thread, float square) {
  store_shared4(squares(s) + 4 * thread, __float_as_uint(square));
  asm volatile("bar.arrive 2, %0;" ::"n"(SQUARES_THREADS) : "memory");
}
DEVICE float norm_scale_of(const Params& p, const Layout& s, int lane) {
  named_barrier(2, SQUARES_THREADS);
  float sums[4] = {};
#pragma unroll
  for (int i = 0; i < WARPS; i++) sums[i % 4] += __uint_as_float(load_shared4(squares(s) + 4 * (32 * i + lane)));
  float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
#pragma unroll
  for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
  return rsqrtf(fmaf(sum, p.share, p.epsilon));
}
#else
DEVICE uint4 load_part(const Params& p, int part) {
  return 8 * part < p.in_features ? load_fresh16(p.x + 8 * part) : make_uint4(0, 0, 0, 0);
}
// Two lanes loaded 0..7 and 8..15 of a k16 step; each gets 4 of both.
DEVICE void store_part(const Params& p, const Layout& s, uint4 raw, int part) {
  bool upper = part & 1;
  u32 x = __shfl_xor_sync(~0u, upper ? raw.x : raw.z, 1), y = __shfl_xor_sync(~0u, upper ? raw.y : raw.w, 1);
  make_planes(s, upper ? make_uint4(x, y, raw.z, raw.w) : make_uint4(raw.x, raw.y, x, y), part < p.units * (UNIT_K / 8), part);
}
#endif

#if NORM && ROWS > 1
// Several rows of the stream: a thread takes 4 channels of every row at a time, HELD such in registers. Where there are
// more, all but the last are read again for the second pass, from the second-level cache.
constexpr int HELD = 2, QUADS_K = 4 * MATH_THREADS;
struct Quads { float4 x[HELD][ROWS], weight[HELD]; };
DEVICE void load_weights(Quads& to, const Params& p, int k) {
#pragma unroll
  for (int j = 0; j < HELD; j++, k += QUADS_K)
    to.weight[j] = k < p.in_features ? floats(load_fresh16(p.norm + k)) : make_float4(0.f, 0.f, 0.f, 0.f);
}
DEVICE void load_quads(Quads& to, const Params& p, int k) {
  const float* x = (const float*)p.x + k;
#pragma unroll
  for (int row = 0; row < ROWS; row++, x += p.x_stride)
#pragma unroll
    for (int j = 0; j < HELD; j++) {
      bool there = row < p.rows && k + j * QUADS_K < p.in_features;
      to.x[j][row] = there ? floats(load_fresh16(x + j * QUADS_K)) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
}
// Each row's sum over the lanes; lane 4r + c gets that of row r. Halves of the rows change hands, then quarters.
DEVICE float sum_of_row(float (&v)[ROWS], int lane) {
#pragma unroll
  for (int o = 16, rows = ROWS / 2; rows; o >>= 1, rows >>= 1)
#pragma unroll
    for (int row = 0; row < rows; row++) {
      float mine = lane & o ? v[row + rows] : v[row], other = lane & o ? v[row] : v[row + rows];
      v[row] = mine + __shfl_xor_sync(~0u, other, o);
    }
  v[0] += __shfl_xor_sync(~0u, v[0], 2);
  return v[0] + __shfl_xor_sync(~0u, v[0], 1);
}
// What the norm multiplies every row by: the same in all threads.
DEVICE void scales_of_rows(float (&scales)[ROWS], const Params& p, const Layout& s, float (&square)[ROWS], int warp, int lane) {
  float mine = sum_of_row(square, lane), sum = 0.f;
  if ((lane & 3) == 0) store_shared4(squares(s) + (warp * ROWS + (lane >> 2)) * 4, __float_as_uint(mine));
  named_barrier(1, MATH_THREADS);
#pragma unroll
  for (int i = 0; i < WARPS; i += 4)
    sum += __uint_as_float(load_shared4(squares(s) + ((i + (lane & 3)) * ROWS + (lane >> 2)) * 4));
  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  float scale = rsqrtf(fmaf(sum, p.share, p.epsilon));
#pragma unroll
  for (int row = 0; row < ROWS; row++) scales[row] = __shfl_sync(~0u, scale, 4 * row);
}
DEVICE void norm_rows(const Params& p, const Layout& s, int thread, int warp, int lane) {
  constexpr int STEP = HELD * QUADS_K;
  const int width = p.units * UNIT_K, last = (width - 1) / STEP * STEP + 4 * thread;
  Quads quads;
  float square[ROWS] = {}, scales[ROWS];
  load_weights(quads, p, last);  // no earlier kernel writes them
  wait_for_earlier_kernels();
#pragma unroll 1
  for (int k = 4 * thread; k <= last; k += STEP) {
    load_quads(quads, p, k);
#pragma unroll
    for (int j = 0; j < HELD; j++)
#pragma unroll
      for (int row = 0; row < ROWS; row++) {
        float4 x = quads.x[j][row];
        square[row] = fmaf(x.x, x.x, fmaf(x.y, x.y, fmaf(x.z, x.z, fmaf(x.w, x.w, square[row]))));
      }
  }
  scales_of_rows(scales, p, s, square, warp, lane);
#pragma unroll 1
  for (int k = last; k >= 0; k -= STEP) {
    if (k < last) {
      load_weights(quads, p, k);
      load_quads(quads, p, k);
    }
    u32 to = s.x + k * 2;
#pragma unroll
    for (int row = 0; row < ROWS; row++, to += s.pitch)
#pragma unroll
      for (int j = 0; j < HELD; j++) {
        float4 x = quads.x[j][row], w = quads.weight[j];
        float low = __uint_as_float(narrow2(x.x * scales[row] * w.x, x.y * scales[row] * w.y));
        float high = __uint_as_float(narrow2(x.z * scales[row] * w.z, x.w * scales[row] * w.w));
        if (row < p.rows && k + j * QUADS_K < width) store_shared8(to + j * QUADS_K * 2, low, high);
      }
  }
  if (KEPT) asm volatile("bar.arrive 2, %0;" ::"n"(MATH_THREADS + 32) : "memory");  // see Gather
}
#endif

// Several rows: 8 k of each to where they are.
DEVICE void copy_part(const Params& p, const Layout& s, int part) {
  uint4 raw[ROWS];
#pragma unroll
  for (int row = 0; row < ROWS; row++)
    raw[row] = row < p.rows && 8 * part < p.in_features ? load_fresh16(p.x + row * p.x_stride + 8 * part) : make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int row = 0; row < ROWS; row++)
    if (row < p.rows) store_shared16(s.x + row * s.pitch + part * 16, raw[row]);
}
#if AWQ_RING
// Of more than two stages' channels bulk copies by one warp are faster (4096 x 11008, 4 rows: 9.6 us and 10.6), of fewer
// slower (4096 x 4096: 5.2 and 4.6). Math warps await them chunk by chunk; what lies beyond the channels is zero.
constexpr int CHUNK_K = 8 * MATH_THREADS;
DEVICE bool copies_rows(const Params& p) { return !ONE && !NORM && p.units > 2 * WARPS; }
DEVICE void copy_rows(const Params& p, const Layout& s, int lane) {
  if (lane == 0)
    for (int i = 0; i < chunks_of(p); i++) {
      int left = p.in_features - i * CHUNK_K, bytes = 2 * (left < CHUNK_K ? left : CHUNK_K);
      barrier_expect(full_chunk(s, i), p.rows * bytes);
      for (int row = 0; row < p.rows; row++)
        copy_bulk(s.x + row * s.pitch + i * CHUNK_K * 2, p.x + row * p.x_stride + i * CHUNK_K, bytes, full_chunk(s, i));
    }
}
DEVICE void clear_beyond(const Params& p, const Layout& s, int thread) {
  int beyond = (p.units * UNIT_K - p.in_features) / 8;
  if (!beyond) return;
  for (int i = thread; i < p.rows * beyond; i += MATH_THREADS)
    store_shared16(s.x + i / beyond * s.pitch + p.in_features * 2 + i % beyond * 16, make_uint4(0, 0, 0, 0));
  named_barrier(1, MATH_THREADS);
}
#endif

// ----------------------------------------------------------------------------------------------- math of one unit

struct Unit { uint4 q[4]; u32 scales[SCALED], zeros[SCALED]; };  // scales of rows r and r + 8 as halves, zeros as nibbles

// What a lane needs of one row. Its operand column is lane / 4: half `upper`, plane (lane / 4) % 4; idle columns repeat
// others. Its result columns are 2 (lane % 4) and the next.
// KEEP: a warp has KEEP units of each tile, always at the same k, and their x stays in registers. 0: it is loaded again.
#if ROWS == 1
struct Operands {
  u32 plane, table, zeros;
  bool upper;                        // operand columns 4 to 7
  float hi;                          // 1 in the lanes of the first plane, which carry the zero points, else 0
  uint4 x[KEEP ? KEEP : 1][4];
  uint2 t[KEEP ? KEEP : 1][SCALED];

  // x of slice j, zero in the half of the columns that is another group's.
  DEVICE uint4 load(int unit, int j, int lane, bool mine) const {
    u32 block = ((lane & 3) << 4) ^ ((unit & 1) << 5) ^ ((j >> 1) << 4);
    return load_shared16(mine ? plane + unit * UNIT_K + j * 64 + block : zeros);
  }
  DEVICE uint2 entry(int unit, int scaled) const { return load_shared8(table + (unit * GROUPS + 2 * scaled) * 8); }
  DEVICE Operands(const Params& p, const Layout& s, int lane, int warp) {
    int column = (lane >> 2) & 3;
    upper = lane >> 4;
    hi = lane & 1 ? 0.f : 1.f;
    plane = s.x + (column < 3 ? column : 1) * s.pitch;
    table = s.table + 8 * ((lane & 3) >> 1);
    zeros = s.zeros;
#pragma unroll
    for (int k = 0; k < KEEP; k++) {
#pragma unroll
      for (int j = 0; j < 4; j++) x[k][j] = load(warp + k * WARPS, j, lane, upper == (GROUP == 128 ? j >> 1 : j & 1));
#pragma unroll
      for (int g = 0; g < SCALED; g++) t[k][g] = entry(warp + k * WARPS, g);
    }
  }
};

// o += scale * (step * sums - zero * sum of x), of rows r, r + 8 and two columns; sums are floats of MAGIC and more.
DEVICE void add_group(float (&o)[4], const int (&sums)[4], uint2 entry, float hi, u32 scales, u32 zeros) {
  float step = __uint_as_float(entry.x), sum = __uint_as_float(entry.y) * hi;
  float scale0 = low_half(scales), scale1 = high_half(scales);
  float zero0 = __uint_as_float(and_or(zeros, 0xfu, 0x4B000000u)) - 8388608.f;
  float zero1 = fmaf(__uint_as_float(and_or(zeros, 0xf0u, 0x4B000000u)), 0.0625f, -524288.f);
  float step0 = scale0 * step, step1 = scale1 * step, v[4];
#pragma unroll
  for (int e = 0; e < 4; e++) v[e] = __int_as_float(sums[e]) - MAGIC_FLOAT;
  o[0] = fmaf(step0, v[0], fmaf(-scale0 * zero0, sum, o[0]));
  o[1] = fmaf(step0, v[1], o[1]);
  o[2] = fmaf(step1, v[2], fmaf(-scale1 * zero1, sum, o[2]));
  o[3] = fmaf(step1, v[3], o[3]);
}

// o: rows r, r + 8 and two columns each, as an mma leaves them.
// `kept` of the planes' x, where they are kept.
DEVICE void multiply(const Unit& w, int unit, int kept, const Operands& planes, int lane, float (&o)[4]) {
  constexpr u32 EVEN = 0x0f0f0f0fu, ODD = 0xf0f0f0f0u;
#pragma unroll
  for (int scaled = 0; scaled < SCALED; scaled++) {  // two groups
    int even[4] = {0, 0, 0, 0}, sums[4] = {(int)MAGIC, (int)MAGIC, (int)MAGIC, (int)MAGIC};
    if constexpr (GROUP == 32) {  // two k16 steps are a group: both into one mma, so that no factor parts them
#pragma unroll
      for (int k = 0; k < 2; k++) {
        uint4 q = w.q[scaled], x = planes.load(unit, scaled, lane, planes.upper == k);
        u32 q0 = k ? q.z : q.x, q1 = k ? q.w : q.y;
        u32 a[4] = {q0 & EVEN, q1 & EVEN, (q0 >> 4) & EVEN, (q1 >> 4) & EVEN};
        mma_u8s8(even, a, k ? x.z : x.x, k ? x.w : x.y, even);
      }
    } else {
      constexpr int SLICES = GROUP / 32;
#pragma unroll
      for (int k = 0; k < SLICES; k++) {
        int j = scaled * SLICES + k;
        uint4 q = w.q[j], x = KEEP ? planes.x[kept][j] : planes.load(unit, j, lane, planes.upper == (k >= SLICES / 2));
        u32 a[4] = {q.x & EVEN, q.y & EVEN, q.z & EVEN, q.w & EVEN}, b[4] = {q.x & ODD, q.y & ODD, q.z & ODD, q.w & ODD};
        mma_u8s8(even, a, x.x, x.z, even);
        mma_u8s8(sums, b, x.y, x.w, sums);
      }
    }
    // 128 products of at most 15 * 16 and 128 stay below 2^22.
#pragma unroll
    for (int e = 0; e < 4; e++) sums[e] += even[e] * 16;
    uint2 entry = KEEP ? planes.t[kept][scaled] : planes.entry(unit, scaled);
    add_group(o, sums, entry, planes.hi, w.scales[scaled], w.zeros[scaled]);
  }
}

// What a lane needs of up to 8 rows: operands of two k16 steps at a time. Rows beyond the last repeat it.
#else
struct Operands {
  u32 row;
  uint4 x[KEEP ? KEEP : 1][8];

  DEVICE uint4 load(int unit, int two_steps) const {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(row + unit * (UNIT_K * 2) + two_steps * 64));
    return v;
  }
  DEVICE Operands(const Params& p, const Layout& s, int lane, int warp) {
    int wanted = lane & 7;
    row = s.x + (wanted < p.rows ? wanted : p.rows - 1) * s.pitch + (lane >> 3) * 16;
#pragma unroll
    for (int k = 0; k < KEEP; k++)
#pragma unroll
      for (int i = 0; i < 8; i++) x[k][i] = load(warp + k * WARPS, i);
  }
};

DEVICE void multiply(const Unit& w, int unit, int kept, const Operands& halves, int lane, float (&o)[4]) {
  constexpr int TWO_STEPS = GROUP / 32;
#pragma unroll
  for (int group = 0; group < GROUPS; group++) {
    const Zeros zeros = zeros_from(w.zeros[group]);
    float sums[4] = {};
#pragma unroll
    for (int k = 0; k < TWO_STEPS; k++) {
      int two = group * TWO_STEPS + k;
      uint4 x = KEEP ? halves.x[kept][two] : halves.load(unit, two);
      u32 a[4];
      differences(a, w.q[two / 2], two % 2 * 2, zeros);
      mma_acc(sums, a[0], a[1], a[2], a[3], x.x, x.y);
      differences(a, w.q[two / 2], two % 2 * 2 + 1, zeros);
      mma_acc(sums, a[0], a[1], a[2], a[3], x.z, x.w);
    }
    float scale0 = low_half(w.scales[group]), scale1 = high_half(w.scales[group]);
    o[0] = fmaf(scale0, sums[0], o[0]);
    o[1] = fmaf(scale0, sums[1], o[1]);
    o[2] = fmaf(scale1, sums[2], o[2]);
    o[3] = fmaf(scale1, sums[3], o[3]);
  }
}
#endif

// ------------------------------------------------------------------------------------------------------ math warps

// One row: a lane needs every second group, that of its result columns.
template <class LOAD16, class LOAD4, class LOAD1>
DEVICE void read_unit(Unit& w, LOAD16 load16, LOAD4 load4, LOAD1 load1, int lane) {
  int r = lane >> 2, group = ONE ? (lane & 3) >> 1 : 0;
#pragma unroll
  for (int j = 0; j < 4; j++) w.q[j] = load16(j * 512 + lane * 16);
#pragma unroll
  for (int g = 0; g < SCALED; g++) {
    w.scales[g] = load4((r * GROUPS + group + (ONE ? 2 : 1) * g) * 4);
    w.zeros[g] = load1(32 * GROUPS + r * GROUPS + group + (ONE ? 2 : 1) * g);
  }
}

// The sums of a tile, where the output warp finds them.
DEVICE void hand_over(u32 slot, int warp, int lane, float (&o)[4]) {
  u32 to = slot + (warp * 32 + lane) * (ONE ? 8 : 16);
  if (ONE) {  // planes put together: an odd lane's first column is the last plane, its second is idle, however large
    float hi = lane & 1 ? 1.f : 65536.f, mid = lane & 1 ? 0.f : 256.f;
    store_shared8(to, fmaf(o[0], hi, lane & 1 ? 0.f : o[1] * mid), fmaf(o[2], hi, lane & 1 ? 0.f : o[3] * mid));
  } else {
    store_shared8(to, o[0], o[1]);
    store_shared8(to + 8, o[2], o[3]);
  }
  o[0] = o[1] = o[2] = o[3] = 0.f;
}

DEVICE void finish_tile(const Params& p, const Layout& s, int tile, int warp, int lane, float (&o)[4]) {
  int slot = tile & (p.slots - 1);
  await(empty_slot(s, slot), turn_of(p, tile) - 1, 1);
  hand_over(s.sums + slot * SLOT, warp, lane, o);
  signal(full_slot(s, slot));
}

#if AWQ_RING
struct Ring { int stage; u32 parity; };

DEVICE void take_unit(Unit& w, const Params& p, const Layout& s, const Ring& ring, int warp, int lane) {
  u32 codes = s.ring + ring.stage * STAGE + warp * UNIT_BYTES, record = s.ring + ring.stage * STAGE + STAGE_CODES + warp * RECORD;
  barrier_wait(full_stage(s, ring.stage), ring.parity);
  read_unit(w, [&](int i) { return load_shared16(codes + i); }, [&](int i) { return load_shared4(record + i); },
            [&](int i) { return load_shared1(record + i); }, lane);
}
// The unit's place may be filled again. After its products: before them the wait for its loads cost 2 %.
DEVICE void leave_unit(const Unit& w, const Params& p, const Layout& s, Ring& ring) {
  u32 affine = 0;
#pragma unroll
  for (int g = 0; g < SCALED; g++) affine ^= w.scales[g] ^ w.zeros[g];
  const u32 empty = empty_stage(s, ring.stage);
  have_arrived(empty, w.q[0].x, w.q[1].x, w.q[2].x, w.q[3].x, affine);
  signal(empty);
  if (++ring.stage == p.stages) { ring.stage = 0; ring.parity ^= 1; }
}
#endif

#if KEEP
// The units of every tile fall to the warps alike, KEEP to each: x is read from shared memory once.
DEVICE void math_warp(const Params& p, const Layout& s, int thread, int warp, int lane) {
  if constexpr (ONE) {
#if NORM && ROWS == 1
    Part parts[KEEP];
    float square = 0.f;
#pragma unroll
    for (int k = 0; k < KEEP; k++) load_weight(parts[k], p, k * MATH_THREADS + thread);
    wait_for_earlier_kernels();
#pragma unroll
    for (int k = 0; k < KEEP; k++) load_x(parts[k], p, k * MATH_THREADS + thread);
#pragma unroll
    for (int k = 0; k < KEEP; k++) store_part(p, s, parts[k], k * MATH_THREADS + thread, square);
    hand_over_squares(s, thread, square);
#else
    wait_for_earlier_kernels();
    uint4 raw[KEEP];
#pragma unroll
    for (int k = 0; k < KEEP; k++) raw[k] = load_part(p, k * MATH_THREADS + thread);
#pragma unroll
    for (int k = 0; k < KEEP; k++) store_part(p, s, raw[k], k * MATH_THREADS + thread);
#endif
    named_barrier(1, MATH_THREADS);
  } else {
#if NORM && ROWS > 1
    norm_rows(p, s, thread, warp, lane);
#else
    wait_for_earlier_kernels();
    copy_part(p, s, thread);
#endif
    named_barrier(1, MATH_THREADS);
  }
  const Operands x(p, s, lane, warp);
  const int count = count_tiles(p);
  float o[4] = {};
  Ring ring = {0, 0};
#pragma unroll 1
  for (int tile = 0; tile < count; tile++) {
#pragma unroll
    for (int k = 0; k < KEEP; k++) {
      Unit w;
      take_unit(w, p, s, ring, warp, lane);
      multiply(w, 0, k, x, lane, o);
      leave_unit(w, p, s, ring);
    }
    finish_tile(p, s, tile, warp, lane, o);
  }
}
#else
constexpr int AT_ONCE = NORM ? 2 : 4;  // chunks of x that a thread loads together, of one row
DEVICE void math_warp(const Params& p, const Layout& s, int thread, int warp, int lane) {
  const int count = count_tiles(p), chunks = chunks_of(p);
  const Operands x(p, s, lane, warp);
  float o[4] = {};
  Unit w;
  int tile = 0, unit = warp;
  while (unit >= p.units) { unit -= p.units; tile++; }
#if AWQ_RING
  Ring ring = {0, 0};
#else
  auto fetch = [&](Unit& to, int tile, int unit) {
    u64 at = (u64)tile_at(p, tile) * units_apart(p) + unit;
    const u8 *codes = p.codes + at * UNIT_BYTES, *record = p.affine + at * RECORD;
    read_unit(to, [&](int i) { return load_stream16(codes + i); }, [&](int i) { return __ldg((const u32*)(record + i)); },
              [&](int i) { return (u32)__ldg(record + i); }, lane);
  };
  if (ONE && tile < count) fetch(w, tile, unit);
#endif
  auto stage = [&] {
    if (tile >= count) return;
    int next_tile = tile, next = unit + WARPS;
    while (next >= p.units) { next -= p.units; next_tile++; }
#if AWQ_RING
    take_unit(w, p, s, ring, warp, lane);
    multiply(w, unit, 0, x, lane, o);
    leave_unit(w, p, s, ring);
#else
    Unit after;
    if (next_tile < count) fetch(after, next_tile, next);
    multiply(w, unit, 0, x, lane, o);
    w = after;
#endif
    if (next_tile != tile) finish_tile(p, s, tile, warp, lane, o);
    tile = next_tile;
    unit = next;
  };
  if constexpr (ONE) {
#if NORM && ROWS == 1
    Part parts[AT_ONCE];
    float square = 0.f;
    auto load_weights = [&](int first) {
#pragma unroll
      for (int b = 0; b < AT_ONCE; b++) load_weight(parts[b], p, (first + b) * MATH_THREADS + thread);
    };
    auto load_parts = [&](int first) {
#pragma unroll
      for (int b = 0; b < AT_ONCE; b++) load_x(parts[b], p, (first + b) * MATH_THREADS + thread);
    };
    load_weights(0);
    wait_for_earlier_kernels();
#else
    wait_for_earlier_kernels();
    uint4 raw[AT_ONCE];
    auto load_parts = [&](int first) {
#pragma unroll
      for (int b = 0; b < AT_ONCE; b++) raw[b] = load_part(p, (first + b) * MATH_THREADS + thread);
    };
#endif
    load_parts(0);
#pragma unroll 1
    for (int first = 0; first < chunks; first += AT_ONCE) {
#pragma unroll
      for (int b = 0; b < AT_ONCE; b++)
#if NORM && ROWS == 1
        if (first + b < chunks) store_part(p, s, parts[b], (first + b) * MATH_THREADS + thread, square);
      if (first + AT_ONCE >= chunks) hand_over_squares(s, thread, square);
#else
        if (first + b < chunks) store_part(p, s, raw[b], (first + b) * MATH_THREADS + thread);
#endif
      named_barrier(1, MATH_THREADS);
      if (first + AT_ONCE >= chunks) break;
#if NORM && ROWS == 1
      load_weights(first + AT_ONCE);
#endif
      load_parts(first + AT_ONCE);
#pragma unroll 1
      for (int b = 0; b < AT_ONCE; b++) stage();
    }
  } else {
#if AWQ_RING
    if (copies_rows(p)) {
      clear_beyond(p, s, thread);
#pragma unroll 1
      for (int i = 0; i < chunks; i++) {
        barrier_wait(full_chunk(s, i), 0);
        stage();
      }
    } else
#endif
    {
#if NORM && ROWS > 1
      norm_rows(p, s, thread, warp, lane);
#else
      wait_for_earlier_kernels();
#pragma unroll 2
      for (int part = thread; part < p.units * (UNIT_K / 8); part += MATH_THREADS) copy_part(p, s, part);
#endif
      named_barrier(1, MATH_THREADS);
    }
#if !AWQ_RING
    if (tile < count) fetch(w, tile, unit);  // not before: too few registers for both
#endif
  }
#pragma unroll 1
  while (tile < count) stage();
}
#endif

// -------------------------------------------------------------------------------------------------------- kept warp

#if KEPT

#if NORM && ROWS > 1  // what the math warps have put there
DEVICE u16 normed(const Layout& s, int row, int channel) {
  u32 two = load_shared4(s.x + row * s.pitch + (channel & ~1) * 2);
  return (u16)(channel & 1 ? two >> 16 : two);
}
#endif

// x[:, kept] of every row, zero in the padding. The channels' numbers of the first come before all else, and several at a
// time: one after the other each would wait for memory twice, while the sums of tiles wait.
struct Gather {
  static constexpr int TOGETHER = ONE ? 4 : 2;
  int channels[TOGETHER];
#if NORM && ROWS == 1
  float weights[TOGETHER], x[TOGETHER];
#endif

  DEVICE void load_channels(const Params& p, int from) {
#pragma unroll
    for (int j = 0; j < TOGETHER; j++) {
      int i = from + 32 * j;
      channels[j] = i < p.kept_steps * 16 ? (int)__float_as_uint(load_fresh_float(p.index + i)) : -1;
#if NORM && ROWS == 1
      weights[j] = i < p.kept_steps * 16 ? load_fresh_float(p.kept_norm + i) : 0.f;
#endif
    }
  }
#if NORM && ROWS == 1  // what need not wait for the norm's scale
  DEVICE void load_x(const Params& p) {
#pragma unroll
    for (int j = 0; j < TOGETHER; j++) x[j] = channels[j] >= 0 ? load_fresh_float((const float*)p.x + channels[j]) : 0.f;
  }
#endif
  DEVICE void run(const Params& p, const Layout& s, int lane, float norm_scale = 1.f) {
    int width = p.kept_steps * 16;
#pragma unroll 1
    for (int from = lane; from < width; from += 32 * TOGETHER) {
#if NORM && ROWS == 1
      if (from >= 32) { load_channels(p, from); load_x(p); }
#else
      if (from >= 32) load_channels(p, from);
#endif
      u16 v[TOGETHER][ROWS];
#pragma unroll
      for (int j = 0; j < TOGETHER; j++)
#pragma unroll
        for (int row = 0; row < ROWS; row++)
#if NORM && ROWS > 1
          v[j][row] = channels[j] >= 0 && row < p.rows ? normed(s, row, channels[j]) : (u16)0;
#elif NORM
          v[j][row] = narrow(x[j] * weights[j] * norm_scale);
#else
          v[j][row] = channels[j] >= 0 && row < p.rows ? load_fresh2(p.x + row * p.x_stride + channels[j]) : (u16)0;
#endif
#pragma unroll
      for (int j = 0; j < TOGETHER; j++)
#pragma unroll
        for (int row = 0; row < ROWS; row++)
          if (from + 32 * j < width)
            asm volatile("st.shared.u16 [%0], %1;" ::"r"(s.kept_x + (row * (width + 8) + from + 32 * j) * 2), "h"(v[j][row]) : "memory");
    }
    __syncwarp();
  }
};

// The kept channels of a tile of this block on their way to shared memory, by one lane.
#if AWQ_RING
DEVICE void copy_kept(const Params& p, const Layout& s, int i) {
  int slot = i & (p.kept_ahead - 1), bytes = p.kept_steps * KEPT_STEP;
  barrier_expect(full_kept(s, slot), bytes);
  copy_bulk(s.kept + slot * bytes, p.kept + (u64)tile_at(p, i) * bytes, bytes, full_kept(s, slot));
}
#endif

// Their part of a tile: tile rows r and r + 8 of the rows 2c and 2c + 1 of x, as an mma leaves it. load: 16 bytes of a step
template <class LOAD> DEVICE void multiply_kept(const Params& p, const Layout& s, int lane, float (&d)[4], LOAD load) {
  constexpr int TOGETHER = 4;  // loads ahead of their products
  u32 x = s.kept_x + (((lane >> 2) % ROWS) * (p.kept_steps * 16 + 8) + 2 * (lane & 3)) * 2;
#pragma unroll 1
  for (int first = 0; first < p.kept_steps; first += TOGETHER) {
    uint4 a[TOGETHER];
    u32 b[TOGETHER][2];
#pragma unroll
    for (int j = 0; j < TOGETHER; j++)
      if (first + j < p.kept_steps) {
        a[j] = load((first + j) * KEPT_STEP + lane * 16);
        b[j][0] = load_shared4(x + (first + j) * 32);
        b[j][1] = load_shared4(x + (first + j) * 32 + 16);
      }
#pragma unroll
    for (int j = 0; j < TOGETHER; j++)
      if (first + j < p.kept_steps)
        mma_acc(d, as_activations(a[j].x), as_activations(a[j].y), as_activations(a[j].z), as_activations(a[j].w), b[j][0], b[j][1]);
  }
}
// Read where they are, they took the longest of all: 12288 x 4096 needed 11.0 us with 1 % kept, 6.8 without.
DEVICE void multiply_kept(const Params& p, const Layout& s, int i, int count, int lane, float (&d)[4]) {
#if AWQ_RING
  if (p.kept_ahead) {
    int slot = i & (p.kept_ahead - 1);
    u32 from = s.kept + slot * p.kept_steps * KEPT_STEP;
    barrier_wait(full_kept(s, slot), (i >> __popc(p.kept_ahead - 1)) & 1);
    multiply_kept(p, s, lane, d, [&](int at) { return load_shared16(from + at); });
    have_arrived(full_kept(s, slot), __float_as_uint(d[0]), __float_as_uint(d[1]), __float_as_uint(d[2]), __float_as_uint(d[3]));
    __syncwarp();
    if (lane == 0 && i + p.kept_ahead < count) copy_kept(p, s, i + p.kept_ahead);
    return;
  }
#endif
  const u8* from = p.kept + (u64)tile_at(p, i) * p.kept_steps * KEPT_STEP;
  multiply_kept(p, s, lane, d, [&](int at) { return load_stream16(from + at); });
}

// The kept channels' part of every tile, beside what the math warps hand over: the output warp, which did this too, was
// behind them: a token of Llama-2-7B with 1 % kept took 1.25 ms, so 1.17.
DEVICE void kept_warp(const Params& p, const Layout& s, int lane) {
  const int count = count_tiles(p);
  Gather kept;
  kept.load_channels(p, lane);
  __syncthreads();  // the signals are there
#if AWQ_RING
  if (lane == 0)
    for (int i = 0; i < min(p.kept_ahead, count); i++) copy_kept(p, s, i);
#endif
  wait_for_earlier_kernels();
#if NORM && ROWS > 1
  named_barrier(2, MATH_THREADS + 32);
  kept.run(p, s, lane);
#elif NORM
  kept.load_x(p);
  kept.run(p, s, lane, norm_scale_of(p, s, lane));
#else
  kept.run(p, s, lane);
#endif
#pragma unroll 1
  for (int i = 0; i < count; i++) {
    int slot = i & (p.slots - 1);
    u32 to = s.sums + slot * SLOT + (WARPS * 32 + lane) * (ONE ? 8 : 16);
    float d[4] = {};
    multiply_kept(p, s, i, count, lane, d);
    await(empty_slot(s, slot), turn_of(p, i) - 1, 1);
    if (ONE) {
      store_shared8(to, d[0], d[2]);
    } else {
      store_shared8(to, d[0], d[1]);
      store_shared8(to + 8, d[2], d[3]);
    }
    signal(full_slot(s, slot));
  }
}
#endif

// ------------------------------------------------------------------------------------------------------ output warp

DEVICE void output_warp(const Params& p, const Layout& s, int lane) {
  const int count = count_tiles(p), several = contributors(p), r = lane >> 2, c = lane & 3;
  auto bias_at = [&](int n) { return p.bias && n < p.out_features ? widen(load_fresh2(p.bias + n)) : 0.f; };
  float bias[2] = {bias_at(tile_at(p, 0) * TILE_ROWS + r), bias_at(tile_at(p, 0) * TILE_ROWS + r + 8)};
  __syncthreads();  // the signals are there
  wait_for_earlier_kernels();
#if AWQ_RING
  if (copies_rows(p)) copy_rows(p, s, lane);
#endif
#if NORM && ROWS == 1
  const float norm_scale = norm_scale_of(p, s, lane);
#endif
#if OUTPUT == 2
  float gate[ONE ? 2 : 4] = {};
#endif
#pragma unroll 1
  for (int i = 0; i < count; i++) {
    int slot = i & (p.slots - 1), first = p.units < WARPS ? i * p.units : 0, n = tile_at(p, i) * TILE_ROWS + r;
    float d[4] = {bias[0], bias[0], bias[1], bias[1]}, sums[4] = {}, more[4] = {};
#if OUTPUT == 1 && ROWS > 1  // under way while the sums are awaited
    float before[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
      int row = 2 * c + (e & 1), at = n + 8 * (e >> 1);
      bool there = row < p.rows && at < p.out_features;
      before[e] = there ? load_fresh_float((const float*)p.y + (u64)row * p.out_features + at) : 0.f;
    }
#elif OUTPUT == 1
    float before[2] = {n < p.out_features ? load_fresh_float((const float*)p.y + n) : 0.f,
                       n + 8 < p.out_features ? load_fresh_float((const float*)p.y + n + 8) : 0.f};
#endif
    bias[0] = bias_at(tile_at(p, i + 1) * TILE_ROWS + r);  // a tile ahead
    bias[1] = bias_at(tile_at(p, i + 1) * TILE_ROWS + r + 8);
    await(full_slot(s, slot), turn_of(p, i), several + KEPT);
    u32 at = s.sums + slot * SLOT + lane * (ONE ? 8 : 16);
    auto add = [&](float (&to)[4], int from_warp) {
      u32 from = at + from_warp * (ONE ? 256 : 512);
      uint2 v = load_shared8(from), w = ONE ? make_uint2(0, 0) : load_shared8(from + 8);
      to[0] += __uint_as_float(v.x);
      to[1] += __uint_as_float(v.y);
      to[2] += __uint_as_float(w.x);
      to[3] += __uint_as_float(w.y);
    };
#if KEPT
    uint4 kept = ONE ? make_uint4(0, 0, 0, 0) : load_shared16(at + WARPS * 512);
    if (ONE) {
      uint2 both = load_shared8(at + WARPS * 256);
      kept.x = both.x;
      kept.z = both.y;
    }
    d[0] += __uint_as_float(kept.x);
    d[1] += __uint_as_float(kept.y);
    d[2] += __uint_as_float(kept.z);
    d[3] += __uint_as_float(kept.w);
#endif
    if (several == WARPS) {
#pragma unroll
      for (int k = 0; k < WARPS; k += 2) {  // two chains of half the length
        add(sums, k);
        add(more, k + 1);
      }
#pragma unroll
      for (int e = 0; e < 4; e++) sums[e] += more[e];
    } else {
      for (int k = 0; k < several; k++) add(sums, (first + k) % WARPS);
    }
    signal(empty_slot(s, slot));
    if (ONE) {  // planes and groups lie in neighbouring lanes
#pragma unroll
      for (int o = 1; o < 4; o <<= 1) {
        sums[0] += __shfl_xor_sync(~0u, sums[0], o);
        sums[1] += __shfl_xor_sync(~0u, sums[1], o);
      }
#if NORM && ROWS == 1
      sums[0] *= norm_scale;
      sums[1] *= norm_scale;
#endif
#if ROWS > 1
#elif OUTPUT == 1
      float* y = (float*)p.y;
      if (c == 0 && n < p.out_features) y[n] = fmaf(p.factor, sums[0] + d[0], before[0]);
      if (c == 0 && n + 8 < p.out_features) y[n + 8] = fmaf(p.factor, sums[1] + d[2], before[1]);
#elif OUTPUT == 2  // whole tiles: half of them times 16 is the width of y
      int at = n - (i & 1) * p.half * TILE_ROWS;
      if (c == 0 && (i & 1)) p.y[at] = narrow(activated(gate[0]) * (sums[0] + d[0]));
      if (c == 0 && (i & 1)) p.y[at + 8] = narrow(activated(gate[1]) * (sums[1] + d[2]));
      gate[0] = sums[0] + d[0];
      gate[1] = sums[1] + d[2];
#else
      if (c == 0 && n < p.out_features) p.y[n] = narrow(sums[0] + d[0]);
      if (c == 0 && n + 8 < p.out_features) p.y[n + 8] = narrow(sums[1] + d[2]);
#endif
    } else {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        int row = 2 * c + (e & 1), at = n + 8 * (e >> 1);
#if OUTPUT == 1 && ROWS > 1
        if (row < p.rows && at < p.out_features)
          ((float*)p.y)[(u64)row * p.out_features + at] = fmaf(p.factor, sums[e] + d[e], before[e]);
#elif OUTPUT == 2 && ROWS > 1
        at -= (i & 1) * p.half * TILE_ROWS;
        if (row < p.rows && (i & 1))
          p.y[((u64)row * p.half) * TILE_ROWS + at] = narrow(activated(gate[e]) * (sums[e] + d[e]));
        gate[e] = sums[e] + d[e];
#else
        if (row < p.rows && at < p.out_features) p.y[(u64)row * p.out_features + at] = narrow(sums[e] + d[e]);
#endif
      }
    }
  }
}

// -------------------------------------------------------------------------------------------------------- copy warp

#if AWQ_RING
// Fills the ring, a stage a call. No more than in_flight stages are under way: a deeper queue in the memory system delays
// every small access of the grid (12288 x 4096 takes 6.9 us with 2 of 5 and 7.1 without a limit), while arrived ones may
// wait.
struct Copier {
  int left, stage, turn, tile, unit;
  u64 policy;

  DEVICE Copier(const Params& p) : left(count_tiles(p) * p.units), stage(0), turn(0), tile(0), unit(0), policy(policy_evict_first()) {}

  DEVICE void fill(const Params& p, const Layout& s) {
    int count = left < WARPS ? left : WARPS, before = stage - p.in_flight, turn_before = turn;
    u32 full = full_stage(s, stage), to = s.ring + stage * STAGE;
    if (turn) barrier_wait(empty_stage(s, stage), (turn - 1) & 1);
    if (before < 0) { before += p.stages; turn_before--; }
    if (turn_before >= 0) barrier_wait(full_stage(s, before), turn_before & 1);
    barrier_expect(full, count * (UNIT_BYTES + RECORD));
    for (int done = 0; done < count;) {  // runs of units that lie together
      int run = p.units - unit < count - done ? p.units - unit : count - done;
      u64 at = (u64)tile_at(p, tile) * units_apart(p) + unit;
      copy_bulk(to + done * UNIT_BYTES, p.codes + at * UNIT_BYTES, run * UNIT_BYTES, full, policy);
      copy_bulk(to + STAGE_CODES + done * RECORD, p.affine + at * RECORD, run * RECORD, full, policy);
      done += run;
      unit += run;
      if (unit == p.units) { unit = 0; tile++; }
    }
    left -= count;
    if (++stage == p.stages) { stage = 0; turn++; }
  }
};
#endif

// The signals among warps, by one thread.
DEVICE void set_up_signals(const Params& p, const Layout& s) {
  for (int i = 0; i < p.stages; i++) signal_init(empty_stage(s, i), WARPS);
  for (int i = 0; i < p.slots; i++) {
    signal_init(full_slot(s, i), contributors(p) + KEPT);
    signal_init(empty_slot(s, i), 1);
  }
}

// Blocks of 8 math warps may be two on a multiprocessor (see gemv.py), but where the registers for that are too few.
constexpr int BLOCKS = AWQ_RING && WARPS == 8 && !(KEPT && NORM) ? 2 : 1;

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) gemv(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) u8 dynamic[];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const Layout s = layout_of(p, shared_address(dynamic));
#if AWQ_RING
  if (warp == WARPS + 1) {
    Copier copier(p);
    if (lane == 0) {
      for (int i = 0; i < p.stages; i++) barrier_init(full_stage(s, i), 1);
      if (copies_rows(p))
        for (int i = 0; i < chunks_of(p); i++) barrier_init(full_chunk(s, i), 1);
      for (int i = 0; KEPT && i < p.kept_ahead; i++) barrier_init(full_kept(s, i), 1);
      fence_for_copies();  // by this lane alone: 32 of them took 1.2 us
      copier.fill(p, s);   // before anything else
      set_up_signals(p, s);
    }
    __syncthreads();
    if (lane == 0) {
      let_next_kernel_start();  // later gained nothing
      while (copier.left > 0) copier.fill(p, s);
    }
    return;
  }
#else
  if (thread == 0) set_up_signals(p, s);
#endif
  if (warp == WARPS) {
    output_warp(p, s, lane);
    return;
  }
#if KEPT
  if (warp == WARPS + 1 + AWQ_RING) {
    kept_warp(p, s, lane);
    return;
  }
#endif
  __syncthreads();
  if (ONE && thread < 4) store_shared4(s.zeros + 4 * thread, 0);
  math_warp(p, s, thread, warp, lane);
}
