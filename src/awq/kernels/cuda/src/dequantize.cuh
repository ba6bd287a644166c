// From the codes of common.cuh to operands of an m16n8k16 product: float16 or bfloat16, exact.
#pragma once
#include "common.cuh"

DEVICE u32 narrow2(float low, float high) {
#if __CUDA_ARCH__ < 800
  return (u32)narrow(low) | (u32)narrow(high) << 16;
#elif AWQ_BF16
  u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)); return r;
#else
  u32 r; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)); return r;
#endif
}

// Pairs of activations: a b + c, a - b, a b. bfloat16 has only the fma before sm_90; -0 keeps a product's sign.
DEVICE u32 fma2(u32 a, u32 b, u32 c) {
  u32 r;
#if AWQ_BF16
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
#else
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
#endif
  return r;
}
DEVICE u32 sub2(u32 a, u32 b) {
#if AWQ_BF16
  return fma2(b, 0xbf80bf80u, a);
#else
  u32 r; asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r;
#endif
}
DEVICE u32 mul2(u32 a, u32 b) {
#if AWQ_BF16
  return fma2(a, b, 0x80008000u);
#else
  u32 r; asm("mul.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r;
#endif
}

// A code becomes a number by being or-ed into the mantissa of a constant. float16: 1024 + q, and for a code that lies
// four bits higher 64 + q. bfloat16 has 7 bits of mantissa: 128 + q, and the higher code is shifted down first.
#if AWQ_BF16
constexpr u32 EVEN_BASE = 0x43004300u, ODD_BASE = 0x43004300u;
#else
constexpr u32 EVEN_BASE = 0x64006400u, ODD_BASE = 0x54005400u;
#endif

// The zero points of a lane's rows r and r + 8 for a group, as the constants above plus the zero point, twice.
struct Zeros { u32 even[2], odd[2]; };

DEVICE Zeros zeros_from(u32 byte) {
  u32 v = byte | byte << 16;
  Zeros z;
  z.even[0] = and_or(v, 0x000f000fu, EVEN_BASE);
  z.even[1] = and_or(v >> 4, 0x000f000fu, EVEN_BASE);
#if AWQ_BF16
  z.odd[0] = z.even[0];
  z.odd[1] = z.even[1];
#else
  z.odd[0] = and_or(v << 4, 0x00f000f0u, ODD_BASE);
  z.odd[1] = and_or(v, 0x00f000f0u, ODD_BASE);
#endif
  return z;
}

// The A fragment of k16 step `step` (0..3) of a slice: code - zero point, exact.
DEVICE void differences(u32 (&a)[4], const uint4& q, int step, const Zeros& z) {
  const u32 word[2] = {step < 2 ? q.x : q.z, step < 2 ? q.y : q.w};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    u32 near = word[half], far = near >> 8;  // k 2c, 2c + 1 and k 2c + 8, 2c + 9
    if (step % 2 == 0) {
      a[half] = sub2(and_or(near, 0x000f000fu, EVEN_BASE), z.even[half]);
      a[half + 2] = sub2(and_or(far, 0x000f000fu, EVEN_BASE), z.even[half]);
    } else {
#if AWQ_BF16
      a[half] = sub2(and_or(near >> 4, 0x000f000fu, ODD_BASE), z.odd[half]);
      a[half + 2] = sub2(and_or(near >> 12, 0x000f000fu, ODD_BASE), z.odd[half]);
#else
      a[half] = sub2(and_or(near, 0x00f000f0u, ODD_BASE), z.odd[half]);
      a[half + 2] = sub2(and_or(far, 0x00f000f0u, ODD_BASE), z.odd[half]);
#endif
    }
  }
}
