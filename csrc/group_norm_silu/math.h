// SPDX-License-Identifier: Apache-2.0
// Group norm between a bias and affine maps, element by element; F is sixteen lanes on a CPU.
//
//   n = (x + time_bias - mean) rstd     z = (n weight + bias) (1 + scale) + shift     y = z sigmoid(z), or z
//   dn = dz weight (1 + scale)          dx = rstd (dn - mean(dn) - n mean(dn n)), means over the group
#pragma once
#include "rows.h"

namespace fd {

struct GroupNormSilu {
  const void* x;  // [batch, channels, positions], or [batch, positions, channels] where channels_last
  Dtype dtype;
  int64_t batch, channels, positions, groups;
  bool channels_last, silu;
  double eps;
  Row weight, bias, time_bias, scale, shift;
  float *mean, *rstd;  // [batch, groups]
  void* y;
  const void* grad;
  void* dx;
  Row dweight, dbias, dtime_bias, dscale, dshift;
  int threads;
};

// How a GPU cuts it: whole groups of a sample, on a cluster of blocks; as many clusters as run at once.
struct GroupNormCut {
  int groups, cluster, clusters;
};

namespace FD_ISA {

template <typename F> FD_HD F standardized(F x, F middle, F rstd) { return (x - middle) * rstd; }

// dz / dy of SiLU at z, gate = sigmoid(z).
template <typename F> FD_HD F silu_slope(F z, F gate, F one) { return gate * muladd(z, one - gate, one); }

template <typename F> FD_HD F gradient(F dz, F n, F rstd, F factor, F mean, F mean_n) {
  return rstd * (dz * factor - mean - n * mean_n);
}

FD_HD float sigmoid(float z) {
#ifdef __CUDA_ARCH__
  float power, gate;  // to two units of the last place; 0 where the power of two is infinite
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(z * -1.44269504f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(gate) : "f"(1.0f + power));
  return gate;
#else
  return 1.0f / (1.0f + __builtin_expf(-z));
#endif
}

}  // namespace FD_ISA
}  // namespace fd
