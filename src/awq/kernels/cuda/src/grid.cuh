// The integer grid of a group: value = (code - zero) * scale, codes 0 .. 2^bits - 1.
//
//   low, high   the range of the group, which holds 0        scale   exactly representable in float16
//
// Bit by bit what torch makes of it on a GPU: it divides by a number as it multiplies by the inverse, rounded to float32.
#pragma once
#include "common.cuh"

struct Grid { float scale, zero; };

DEVICE Grid grid_of(float low, float high, int bits, bool zero_point) {
  const float top = (float)((1 << bits) - 1), half = (float)(1 << (bits - 1));
  const float wanted = zero_point ? __fmul_rn(high - low, __fdiv_rn(1.0f, top))
                                  : fmaxf(__fmul_rn(high, __fdiv_rn(1.0f, half - 1.0f)), __fdiv_rn(-low, half));
  const float scale = fmaxf(half_to_float(float_to_half(wanted)), 5.9604644775390625e-8f);  // 2^-24
  return {scale, zero_point ? fminf(fmaxf(rintf(__fdiv_rn(-low, scale)), 0.0f), top) : half};
}
