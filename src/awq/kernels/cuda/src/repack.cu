// From a checkpoint's `gemm` layout to the units of common.cuh, at the speed of memory.
//
//   qweight int32 [K][N/8]         nibble i of a word: output channel 8w + {0, 2, 4, 6, 1, 3, 5, 7}[i]
//   qzeros  int32 [K/source][N/8]  likewise       scales float16 [K/source][N]       source: input channels of a group
//
// One block for 8 tiles (128 rows) of one unit (256 k): it reads 64 bytes of each k, all that a sector holds of them,
// through shared memory, and writes 8 units of 2048 bytes and their records.
#include "common.cuh"

#ifndef GROUP
#define GROUP 128
#endif

constexpr int TILES = 8, WORDS = TILES * TILE_ROWS / 8, THREADS = 256;
constexpr int GROUPS = UNIT_K / GROUP, RECORD = 40 * GROUPS;

struct Params {
  const u32* qweight;
  const u32* qzeros;
  const u16* scales;
  u8* codes;
  u8* affine;
  int out_features, in_features, source, tiles, units;
};

DEVICE u32 code_of(u32 word, int row) { return word >> (4 * ((row & 7) >> 1 | (row & 1) << 2)) & 15; }

extern "C" __global__ void __launch_bounds__(THREADS) repack(const __grid_constant__ Params p) {
  __shared__ u32 words[UNIT_K][WORDS + 1];
  const int unit = blockIdx.x % p.units, tile0 = blockIdx.x / p.units * TILES, words_of_k = p.out_features / 8;
  for (int i = threadIdx.x; i < UNIT_K * WORDS; i += THREADS) {
    int k = i / WORDS, w = i % WORDS, from = tile0 * 2 + w, at = unit * UNIT_K + k;
    words[k][w] = at < p.in_features && from < words_of_k ? p.qweight[(u64)at * words_of_k + from] : 0;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < TILES * UNIT_BYTES / 16; i += THREADS) {
    int tile = i / (UNIT_BYTES / 16), j = i / 32 % 4, r = i % 32 / 4, c = i % 4;
    if (tile0 + tile >= p.tiles) break;
    u32 out[4];
#pragma unroll
    for (int w = 0; w < 4; w++) {
      int row = r + 8 * (w & 1), k = j * 64 + (w >> 1) * 32 + 2 * c;
      u32 word = 0;
#pragma unroll
      for (int nibble = 0; nibble < 8; nibble++) {
        int offset = (nibble & 1) * 16 + (nibble >> 1 & 1) * 8 + (nibble >> 2);
        word |= code_of(words[k + offset][tile * 2 + row / 8], row) << (4 * nibble);
      }
      out[w] = word;
    }
    *(uint4*)(p.codes + ((u64)(tile0 + tile) * p.units + unit) * UNIT_BYTES + i % (UNIT_BYTES / 16) * 16) =
        make_uint4(out[0], out[1], out[2], out[3]);
  }
  for (int i = threadIdx.x; i < TILES * 8 * GROUPS; i += THREADS) {
    int tile = i / (8 * GROUPS), r = i / GROUPS % 8, group = i % GROUPS, k = unit * UNIT_K + group * GROUP;
    if (tile0 + tile >= p.tiles) break;
    u32 scales = 0, zeros = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int n = (tile0 + tile) * TILE_ROWS + half * 8 + r, from = k / p.source;
      if (k >= p.in_features || n >= p.out_features) continue;
      scales |= (u32)p.scales[(u64)from * p.out_features + n] << (16 * half);
      zeros |= code_of(p.qzeros[(u64)from * words_of_k + n / 8], n) << (4 * half);
    }
    u8* record = p.affine + ((u64)(tile0 + tile) * p.units + unit) * RECORD;
    *(u32*)(record + (r * GROUPS + group) * 4) = scales;
    record[32 * GROUPS + r * GROUPS + group] = (u8)zeros;
  }
}
