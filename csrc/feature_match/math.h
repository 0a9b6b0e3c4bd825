// SPDX-License-Identifier: Apache-2.0
// Distances between student and teacher features, element by element; written for a number type F that is a float on a GPU
// and sixteen lanes on a CPU.
//
//   mse             tap = mean((s - t)^2)                       d tap / d s = 2 (s - t) / n
//   normalized_mse  tap = mean((s - t)^2) / (mean(t^2) + eps)   d tap / d s = 2 (s - t) / n / (mean(t^2) + eps)
//   huber           tap = mean(c (s - t - c / 2))               d tap / d s = c / n,  c = s - t clamped to [-delta, delta]
#pragma once
#include "common.h"

namespace fd {

enum class Distance : int { mse = 0, normalized_mse = 1, huber = 2 };

// One tap: flat arrays of n elements in one memory order. gradient is null where none is wanted.
struct Tap {
  const void* student;
  const void* teacher;
  void* gradient;
  int64_t n;
  Dtype student_dtype, teacher_dtype;
};

struct FeatureMatch {
  const Tap* taps;
  int64_t count;
  const float* weights;     // [count]
  const float* grad_scale;  // []
  Distance distance;
  float parameter;   // eps of normalized_mse, delta of huber
  float* loss;       // []
  float* tap_loss;   // [count]
  double* partials;  // workspace: 2 numbers a chunk and 2 a tap
  int threads;
};

namespace FD_ISA {

// Elements of one partial sum. Chunks are cut by position alone, so sums do not depend on the thread count.
constexpr int64_t feature_match_chunk = 8192;

template <typename F> FD_HD F square(F x) { return x * x; }

// The term of a difference d in the sum, and d's part of the gradient, which gradient_factor scales.
template <bool huber, typename F> FD_HD F slope(F d, F delta) { return huber ? clamp(d, delta) : d; }
template <bool huber, typename F, typename H> FD_HD F term(F d, F delta, H half) {
  if (!huber) return square(d);
  const F c = clamp(d, delta);
  return c * (d - half * c);
}

FD_HD float gradient_factor(float grad_scale, float weight, double denominator, int64_t n, bool huber) {
  return float(double(grad_scale) * double(weight) * (huber ? 1.0 : 2.0) / (double(n) * denominator));
}

}  // namespace FD_ISA
}  // namespace fd
