// What the kernels of a decode step ask for on behalf of those behind them: into the second-level cache, awaited by none.
//
// The blocks of the next kernel find room only as those of this one end, and until the first of its weights arrive the
// memory would idle 1.5 to 2 us. So the last that a kernel asks for is what the next one begins with; and that one, while
// it takes this from the cache, asks for what follows, or else the memory would idle then.
#pragma once
#include "common.cuh"

// `bytes`: a multiple of 16
DEVICE void fetch_to_cache(const void* from, u32 bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// Of a weight, `count` units of each block that reads it, behind its first `first`.
struct Ahead {
  const u8 *codes, *affine, *kept;
  int tiles;          // of the weight, or pairs of them
  int paired;         // whether a block takes tiles i and tiles + i in turn, as with OUTPUT 2 of gemv.cu
  int units, record;  // of a tile, and bytes of a unit's record
  int steps;          // bytes of a tile's kept channels, 0 without
  int blocks;
  int first, count;
};
// `count` units of a block from its `first` on, as gemv.cu deals them.
DEVICE void fetch_units(const Ahead& a, int block, int first, int count) {
  if (count <= 0) return;
  int turn = first / a.units, unit = first - turn * a.units;
#pragma unroll 1
  for (; count > 0; turn++, unit = 0) {
    int tile = block + (turn >> a.paired) * a.blocks, run = min(a.units - unit, count);
    if (tile >= a.tiles) return;
    if (a.paired && turn & 1) tile += a.tiles;
    u64 at = (u64)tile * a.units + unit;
    fetch_to_cache(a.codes + at * UNIT_BYTES, run * UNIT_BYTES);
    fetch_to_cache(a.affine + at * a.record, run * a.record);
    if (!unit && a.steps) fetch_to_cache(a.kept + (u64)tile * a.steps, a.steps);
    count -= run;
  }
}
// All of it, by one thread of every block of this grid.
DEVICE void fetch_ahead(const Ahead& a) {
#pragma unroll 1
  for (int block = blockIdx.x; block < a.blocks; block += gridDim.x) fetch_units(a, block, a.first, a.count);
}

// The first keys and values that attention will see, up to `most` tokens of each row and head.
struct CacheAhead {
  const u8 *keys, *values;         // [rows][key_heads][capacity] tokens
  const long long *slot, *first;   // of the new token, which is not there yet; [rows] of the first that counts
  int rows, key_heads, capacity, token;  // token: bytes
  int window;                      // slots that are seen, the new one included; 0: all
  int most;
};
// By a warp of every block of this grid: pieces of all heads in turn, the first tokens first.
DEVICE void fetch_cache(const CacheAhead& c, int lane) {
  constexpr int PIECE = 4096;
  if (!c.most) return;
  const int slot = min((int)load_number(c.slot), c.capacity), heads = c.rows * c.key_heads;
  const int pieces = (min(slot, c.most) * c.token + PIECE - 1) / PIECE;
#pragma unroll 1
  for (int i = blockIdx.x + lane * gridDim.x; i < pieces * heads * 2; i += 32 * gridDim.x) {
    int piece = i / (heads * 2), head = (i - piece * heads * 2) >> 1, row = head / c.key_heads;
    int start = max((int)load_number(c.first + row), c.window ? slot - c.window + 1 : 0);
    int left = min(slot - start, c.most) * c.token - piece * PIECE;
    if (start < 0 || left <= 0) continue;
    const u8* from = i & 1 ? c.values : c.keys;
    fetch_to_cache(from + ((u64)head * c.capacity + start) * c.token + piece * PIECE, min(left, PIECE));
  }
}
