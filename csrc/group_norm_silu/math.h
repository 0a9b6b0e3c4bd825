// SPDX-License-Identifier: Apache-2.0
// Group norm between a bias and affine maps, element by element; F is sixteen lanes on a CPU.
//
//   n = (x + time_bias - mean) rstd     z = (n weight + bias) (1 + scale) + shift     y = z sigmoid(z), or z
//   dn = dz weight (1 + scale)          dx = rstd (dn - mean(dn) - n mean(dn n)), means over the group
#pragma once
#include "rows.h"

namespace fd {

struct GroupNormSilu {
  const void* x;  // [batch, channels, positions], or [batch, positions, channels] if channels_last
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

// How a GPU divides it: ``groups`` groups of a sample (a slice) per cluster of ``cluster`` blocks, and at most ``clusters`` of
// these, which take one slice after the other.
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

// sigmoid(z), where power = -z log2(e).
FD_HD float sigmoid_of_power(float power) {
#ifdef __CUDA_ARCH__
  float two, gate;  // error at most 2 ulp; 0 if the power of two overflows to infinity
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(two) : "f"(power));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(gate) : "f"(1.0f + two));
  return gate;
#else
  return 1.0f / (1.0f + __builtin_exp2f(power));
#endif
}

constexpr float minus_log2e = -1.44269504f, minus_ln2 = -0.693147181f;

FD_HD float sigmoid(float z) {
#ifdef __CUDA_ARCH__
  return sigmoid_of_power(z * minus_log2e);
#else
  return 1.0f / (1.0f + __builtin_expf(-z));
#endif
}

// -ln 2 times the slope of SiLU at z, where power = -z log2(e), gate = sigmoid(z). In dx = dz factor + ... both constants
// cancel, where power is computed with the factor times -log2(e).
FD_HD float silu_slope_of_power(float power, float gate) {
  constexpr float square = minus_ln2 * minus_ln2;
  return gate * muladd(power, muladd(gate, -square, square), minus_ln2);
}

}  // namespace FD_ISA
}  // namespace fd
