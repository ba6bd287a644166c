// Reads a buffer once, as fast as the GPU can: the ceiling that kernels which read their weights once are held against.
//
//   data   [count] pieces of PIECE bytes, 128-byte aligned; warp w of block b takes pieces b * 8 + w, then every
//          gridDim.x * 8th.
//
// From compute capability 9.0 on, every warp copies its pieces in bulk through a ring of its own in shared memory, RING
// pieces deep, and looks at one word a lane. An H200 reads 4619 GB/s with 5 pieces of 4 KB and 4629 with 3 of 8 KB; with
// plain 16-byte loads, which older GPUs get, 4591.

typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef RING
#define RING 5
#endif

constexpr int PIECE = 4096, WARPS = 8;

struct Params {
  const char* data;
  u64 count;   // pieces
  u32* sink;   // never written, but the compiler cannot know
};

#if __CUDA_ARCH__ >= 900

extern "C" __device__ const int smem_bytes = WARPS * RING * PIECE;

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(barrier), "r"(parity) : "memory");
}

// One lane asks for a piece; the weights of a model are read once too, so L2 is told to drop it first.
__device__ __forceinline__ void request(const char* from, u32 to, u32 barrier, u64 policy) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(PIECE) : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(to), "l"(from), "r"(PIECE), "r"(barrier), "l"(policy) : "memory");
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) read(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) char rings[];
  __shared__ u64 barriers[WARPS * RING];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u32 ring = shared_address(rings) + warp * RING * PIECE, barrier = shared_address(barriers + warp * RING);
  const u64 stride = (u64)gridDim.x * WARPS;
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  u64 piece = (u64)blockIdx.x * WARPS + warp, ahead = piece;
  if (lane == 0) {
    for (int i = 0; i < RING; i++)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier + i * 8) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    for (int i = 0; i < RING; i++, ahead += stride)
      if (ahead < p.count) request(p.data + ahead * PIECE, ring + i * PIECE, barrier + i * 8, policy);
  }
  __syncwarp();
  u32 seen = 0, parity = 0;
  for (int slot = 0; piece < p.count; piece += stride) {
    wait(barrier + slot * 8, parity);
    u32 word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(ring + slot * PIECE + lane * 16));
    seen ^= word;
    __syncwarp();
    if (lane == 0 && ahead < p.count) request(p.data + ahead * PIECE, ring + slot * PIECE, barrier + slot * 8, policy);
    ahead += stride;
    if (++slot == RING) { slot = 0; parity ^= 1; }
  }
  if (seen == 0x12345678u) *p.sink = seen;
}

#else

extern "C" __device__ const int smem_bytes = 0;

extern "C" __global__ void __launch_bounds__(WARPS * 32) read(const __grid_constant__ Params p) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 seen = 0;
  for (u64 piece = (u64)blockIdx.x * WARPS + warp; piece < p.count; piece += (u64)gridDim.x * WARPS) {
    const char* from = p.data + piece * PIECE + lane * 16;
    uint4 v[PIECE / 512];
    #pragma unroll
    for (int i = 0; i < PIECE / 512; i++)
      asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v[i].x), "=r"(v[i].y), "=r"(v[i].z), "=r"(v[i].w) : "l"(from + i * 512));
    #pragma unroll
    for (int i = 0; i < PIECE / 512; i++) seen ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
  }
  if (seen == 0x12345678u) *p.sink = seen;
}

#endif
