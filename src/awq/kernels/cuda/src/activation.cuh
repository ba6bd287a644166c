// What becomes of a gate. ACTIVATION: 0 SiLU, 1 GELU, 2 GELU by tanh.
#pragma once
#include "common.cuh"

#ifndef ACTIVATION
#define ACTIVATION 0
#endif

DEVICE float activated(float x) {
#if ACTIVATION == 0
  return x / (1.f + __expf(-x));
#elif ACTIVATION == 1
  return 0.5f * x * (1.f + erff(x * 0.70710678f));
#else
  return x / (1.f + __expf(-1.5957691216f * (x + 0.044715f * x * x * x)));
#endif
}
